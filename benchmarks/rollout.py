"""What a rollout computes, against what there is to compute; and how its time grows with the number of crops.

    python -m benchmarks.rollout

Tiny random policies that write what they are told: the boxes, and so the crops, are known beforehand. Positions are
counted where they enter the language model, padding included, and visuals where they enter the vision tower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import Row, interleaved, markdown, seconds_of
from modules.backbones.cache import RaggedCache
from modules.backbones.fragments import FragmentVocabulary
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import LanguageConfig, TimmLMBackbone, TokenizerConfig, VisionConfig
from modules.engine import Decoding, Flight, GroupSampler, LocalEngine, Request
from modules.trajectory import Sample, Trajectory, Visual

PATCH = 8
MEDIAN, SIGMA, CHUNKS = 48, 0.7, 64  # of the log-normal lengths, and how many of them
GROUP, QUESTIONS, PLACES = 8, 8, 24
CROPS = (1, 2, 4, 8)
LOOK, ANSWER = 'red {"bbox_2d": [', "I can read it now.</think><answer>7</answer>"
WORDS = ["red", LOOK, "I can read it now.</think><answer>", *"0123456789", "</answer>"]
UNBOUND = Decoding(temperature=0.0, max_turns=50, max_turn_tokens=500)


class Told(TimmLMBackbone):
    """Writes what it is told, and counts what it computes."""

    lines: Sequence[Sequence[int]] = ()
    positions_computed = 0
    visuals_encoded = 0

    def tell(self, texts: Sequence[str]) -> Told:
        """Have the n-th trajectory write the n-th text; counts from 0."""
        self.lines = [self.tokenize(text).tolist() for text in texts]
        self.at = [0] * len(texts)
        self.positions_computed, self.visuals_encoded = 0, 0
        return self

    def head(self, hidden: Tensor) -> Tensor:
        """Trajectories in flight come in the order of their requests, and places are taken in that order."""
        logits = super().head(hidden)
        alive = [k for k, line in enumerate(self.lines) if self.at[k] < len(line)][: len(hidden)]
        told = torch.tensor([self.lines[k][self.at[k]] for k in alive], dtype=torch.long)
        logits[torch.arange(len(alive)), told] += 1e4
        for k in alive:
            self.at[k] += 1
        return logits

    def forward(
        self, embeddings: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: RaggedCache | None = None
    ) -> Tensor:
        """See `Backbone.forward`."""
        self.positions_computed += embeddings.shape[0] * embeddings.shape[1]
        return super().forward(embeddings, position_ids, attention_mask, cache)

    def encode(self, visuals: Sequence[Visual]) -> list[Tensor]:
        """See `Backbone.encode`."""
        self.visuals_encoded += len(visuals)
        return super().encode(visuals)


def policy(width: int = 32, layers: int = 2) -> Told:
    """Random weights; images of 16 to 144 tokens, crops of 4 to 64."""
    torch.manual_seed(0)
    vision = {"img_size": 32, "patch_size": PATCH, "embed_dim": 16, "depth": 1, "num_heads": 2}
    language = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Told(
        vision=VisionConfig(
            "vit_tiny_patch16_224",
            options={**vision, "class_token": False, "global_pool": "", "dynamic_img_size": True},
        ),
        language=LanguageConfig(
            config={
                "model_type": "qwen2",
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": False,
                **language,
            }
        ),
        tokenizer=TokenizerConfig(vocabulary=FragmentVocabulary(WORDS, 41, 4)),
        image=ScalerConfig(min_pixels=16 * PATCH**2, max_pixels=144 * PATCH**2),
        crop=ScalerConfig(min_pixels=4 * PATCH**2, max_pixels=64 * PATCH**2),
    ).eval()


def questions() -> list[Sample]:
    """Two questions about each image; images of several sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(48, 64), (96, 96), (64, 120), (80, 40)]
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    return [Sample(id=str(k), question="red" * (3 + 5 * k), images=(images[k // 2],)) for k in range(QUESTIONS)]


def texts(count: int) -> list[str]:
    """None to three looks at boxes of different sizes, with as many words between them as it comes."""
    generator = torch.Generator().manual_seed(1)

    def below(bound: int) -> int:
        return int(torch.randint(bound, (), generator=generator))

    written = []
    for _ in range(count):
        looks = ["red" * below(12) + f"{LOOK}0, 0, {8 + 4 * below(8)}, {8 + 4 * below(9)}]}}" for _ in range(below(4))]
        written.append("".join(looks) + "red" * below(12) + ANSWER)
    return written


def mixed() -> tuple[Told, list[Trajectory]]:
    """A rollout of groups that share images, with fewer places than trajectories; the tower counts as training."""
    backbone = policy().tell(texts(QUESTIONS * GROUP))
    requests = GroupSampler(GROUP).requests(questions(), seed=0)
    return backbone, LocalEngine(max_batch=PLACES).rollout(backbone, requests, UNBOUND)


def tokens() -> Row:
    """Positions that go through the language model, over those that have to: prompts once a group, then every token
    that something is written behind."""
    backbone, found = mixed()
    prompts = sum(len(t.prompt_ids) for t in found[::GROUP])
    written = sum(len(t.completion_ids) - 1 for t in found)
    value = backbone.positions_computed / (prompts + written)
    detail = {"computed": backbone.positions_computed, "prompts": prompts, "completions": written}
    return Row("rollout: tokens computed / tokens that exist", value, 1.02, True, (value, value), detail)


def visuals() -> Row:
    """Images and crops that go through the vision tower, over distinct ones."""
    backbone, found = mixed()
    images = len({id(image) for t in found for image in t.sample.images})
    crops = sum(turn.crop is not None for t in found for turn in t.turns)
    value = backbone.visuals_encoded / (images + crops)
    detail = {"encoded": backbone.visuals_encoded, "images": images, "crops": crops}
    return Row("rollout: images encoded / distinct images", value, 1.0, True, (value, value), detail)


def lengths() -> list[int]:
    """Log-normal, at least 1."""
    drawn = torch.randn(CHUNKS, generator=torch.Generator().manual_seed(0))
    return (MEDIAN * (SIGMA * drawn).exp()).round().clamp(min=1).long().tolist()


def padding() -> Row:
    """Positions computed over real ones, of prompts and of what is shown in mid-flight, both of log-normal lengths."""
    backbone, drawn = policy().tell([]), lengths()
    samples = [Sample(id=str(k), question="red" * n) for k, n in enumerate(drawn)]
    with torch.no_grad():
        flight = Flight(backbone, [Request(sample, 0) for sample in samples], UNBOUND)
    prefill, prompts = backbone.positions_computed, sum(len(row.prompt) for row in flight.rows)
    word = backbone.tokenize("red")
    with torch.no_grad():
        flight.advance(word.repeat(CHUNKS), {k: (word.repeat(n), []) for k, n in enumerate(drawn)})
    shown, behind = backbone.positions_computed - prefill, sum(drawn) + CHUNKS
    value = (prefill + shown) / (prompts + behind)
    detail = {"prefill": prefill / prompts, "shown": shown / behind, "real": prompts + behind, "longest": max(drawn)}
    return Row("rollout: padded positions / real ones, log-normal", value, 1.05, True, (value, value), detail)


def growth(repeats: int = 5) -> Row:
    """The exponent of a rollout's time in the number of its crops: slope of log time over log crops."""
    backbone = policy(width=64)
    sample = questions()[0]
    turn = f"{'red' * 6}{LOOK}0, 0, 32, 32]}}"

    def side(crops: int) -> Callable[[], object]:
        def run() -> None:
            backbone.tell([turn * crops + ANSWER] * 16)
            found = LocalEngine().rollout(backbone, GroupSampler(16).requests([sample], seed=0), UNBOUND)
            assert all(len(t.regions) == crops for t in found)

        return run

    times = interleaved({str(n): side(n) for n in CROPS}, repeats)
    medians = [sorted(taken)[len(taken) // 2] for taken in times.values()]
    rounds = [slope(CROPS, taken) for taken in zip(*times.values(), strict=True)]
    value = slope(CROPS, medians)
    spread = (min(*rounds, value), max(*rounds, value))
    return Row("rollout: exponent of time in crops (1, 2, 4, 8)", value, 1.1, True, spread, seconds_of(times))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line through (log x, log y)."""
    across, up = [math.log(value) for value in x], [math.log(value) for value in y]
    middle, height = sum(across) / len(across), sum(up) / len(up)
    above = sum((a - middle) * (b - height) for a, b in zip(across, up, strict=True))
    return above / sum((a - middle) ** 2 for a in across)


ROWS: dict[str, Callable[[], Row]] = {
    "rollout tokens": tokens,
    "rollout images": visuals,
    "rollout padding": padding,
    "rollout growth": growth,
}


def main() -> None:
    """Measure all and print a table."""
    start = time.perf_counter()
    rows = [measure() for measure in ROWS.values()]
    print(markdown(rows))
    details: dict[str, Any] = {row.name: row.detail for row in rows}
    for name, detail in details.items():
        print(f"{name}: {detail}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
