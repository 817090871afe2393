"""Few-shot prompts of Hugging Face's families: the conversation that their own chat template writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.families import build
from modules.backbones.hf_vlm import QUESTION, HFVLMBackbone, render
from modules.backbones.scaling import ScalerConfig
from modules.engine import Decoding, GroupSampler, LocalEngine
from modules.prefill import Prompts
from modules.scoring import collate, token_log_probs
from modules.trajectory import Sample


def picture(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 56, 56), generator=generator, dtype=torch.uint8)


def few_shot(count: int) -> list[Sample]:
    examples = tuple(Sample(f"e{k}", f"What is number {k}?", (picture(k),), (f"thing {k}",)) for k in range(2))
    asked = [Sample(f"q{k}", f"And what is this, {k}?", (picture(10 + k),), ("x",)) for k in range(count)]
    return [replace(sample, examples=examples) for sample in asked]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_the_prompt_is_the_templates_own_conversation(family: str, tmp_path: Path) -> None:
    backbone = HFVLMBackbone(
        str(build(family, tmp_path)), image=ScalerConfig(size=(56, 56)), crop=ScalerConfig(size=(56, 56))
    ).eval()
    samples = few_shot(2)
    prompts = Prompts(backbone).make(samples)
    ask = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    turns = [("user", ask), ("assistant", [{"type": "text", "text": "SAID"}])] * 2 + [("user", ask)]
    text = render(backbone.processor, turns)
    texts = [e.question for e in samples[0].examples] + [samples[0].question]
    for asked in texts:
        text = text.replace(QUESTION, asked + backbone.instruction, 1)
    for example in samples[0].examples:
        text = text.replace("SAID", f"<answer>{example.answers[0]}</answer>", 1)
    shown = backbone._expansion(*prompts[0].visuals[0].pixels.shape[-2:])[0]
    text = text.replace(backbone.marker, shown)
    assert backbone.tokenizer.decode(prompts[0].ids) == backbone.tokenizer.decode(
        backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    played = LocalEngine().rollout(
        backbone, GroupSampler(2).requests(samples, 0), Decoding(max_turns=2, max_turn_tokens=6)
    )
    log_probs, _ = token_log_probs(backbone, collate(backbone, played), 10_000)
    torch.testing.assert_close(
        log_probs.detach(), torch.cat([t.log_probs[t.sampled] for t in played]), atol=1e-4, rtol=0
    )
