"""Solved examples before the question: what the policy reads is what it could have written, computed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, Flight, GroupSampler, LocalEngine, Request
from modules.policy import PolicyError
from modules.prefill import Prompts
from modules.replay import Replayer
from modules.scoring import collate, token_log_probs
from modules.trajectory import Sample, Visual
from tests.conftest import make_backbone, make_samples, scripted

SAMPLED = Decoding(1.0, max_turns=3, max_turn_tokens=10)


def asked(count: int = 3, shots: int = 2) -> list[Sample]:
    """Questions that share their examples."""
    samples = make_samples(count + shots)
    examples = tuple(samples[count:])
    return [replace(sample, examples=examples) for sample in samples[:count]]


def test_examples_stand_before_the_question_as_they_would_have_been_written() -> None:
    backbone = make_backbone(context_length=512)
    samples = asked()
    told = Replayer(backbone)(samples[0].examples)[0]
    (prompt, *_) = Prompts(backbone).make(samples)
    expected = [part for t in told for part in (t.prompt_ids, t.completion_ids)]
    expected.append(backbone.prompt_ids(samples[0], backbone.see(samples[0].images)))
    assert torch.equal(prompt.ids, torch.cat(expected))
    assert [v.role for v in prompt.visuals] == ["image", "crop", "image", "crop", "image"]
    assert len(prompt.visuals) == samples[0].prompt_visuals == 5


def test_a_rollout_behind_examples_is_one_pass_over_all_of_it() -> None:
    backbone = make_backbone(seed=1, context_length=512)
    played = LocalEngine().rollout(backbone, GroupSampler(2).requests(asked(), seed=3), SAMPLED)
    log_probs, _ = token_log_probs(backbone, collate(backbone, played), 10_000)
    torch.testing.assert_close(
        log_probs.detach(), torch.cat([t.log_probs[t.sampled] for t in played]), atol=2e-5, rtol=0
    )


def test_examples_change_what_is_written() -> None:
    backbone = make_backbone(seed=1, context_length=512)
    few = asked()
    zero = [replace(sample, examples=()) for sample in few]
    a, b = (
        LocalEngine().rollout(backbone, [Request(s, k) for k, s in enumerate(samples)], SAMPLED)
        for samples in (few, zero)
    )
    assert [t.text for t in a] != [t.text for t in b]


def test_examples_are_computed_once_for_all_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_backbone(context_length=512)
    widths: list[tuple[int, int]] = []
    forward = TimmLMBackbone.forward

    def counted(self: TimmLMBackbone, embeddings: Tensor, *rest: object) -> Tensor:
        widths.append((embeddings.shape[0], embeddings.shape[1]))
        return forward(self, embeddings, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(TimmLMBackbone, "forward", counted)
    samples = asked(3)
    prompts = Prompts(backbone).make(samples)
    assert len({id(prompt.solved) for prompt in prompts}) == 1
    Flight(backbone, GroupSampler(2).requests(samples, seed=0), SAMPLED)
    assert prompts[0].solved is not None
    assert widths == [(1, len(prompts[0].solved.ids)), (3, max(len(prompt.asked.ids) for prompt in prompts))]


def test_questions_with_and_without_examples_fly_together() -> None:
    backbone = make_backbone(seed=1, context_length=512)
    mixed = [*asked(2), *make_samples(1, seed=5)]
    requests = [Request(sample, k) for k, sample in enumerate(mixed)]
    together = LocalEngine().rollout(backbone, requests, SAMPLED)
    alone = [LocalEngine().rollout(backbone, [request], SAMPLED)[0] for request in requests]
    assert [t.text for t in together] == [t.text for t in alone]


def test_a_box_means_the_questions_own_image() -> None:
    backbone = scripted(['<think>I zoom in on red {"bbox_2d": [0, 0, 32, 32]}'], context_length=512)
    (sample,) = asked(1)
    other = torch.zeros(3, 32, 128, dtype=torch.uint8)  # of another shape than the question's
    examples = tuple(replace(e, images=(other,), rationale=e.rationale[1:]) for e in sample.examples)
    seen: list[Tensor] = []
    look = backbone.look

    def watched(images: list[Tensor], regions: list[object]) -> list[Visual]:
        seen.extend(images)
        return look(images, regions)  # type: ignore[arg-type]

    backbone.look = watched  # type: ignore[method-assign,assignment]
    asked_again = replace(sample, examples=examples)
    (played,) = LocalEngine().rollout(
        backbone, [Request(asked_again, 0)], Decoding(0.0, max_turns=2, max_turn_tokens=10)
    )
    assert [image is sample.images[0] for image in seen] == [True]
    assert played.regions[0].image == 0


def test_an_example_without_rationale_shows_its_answer_and_one_that_cannot_be_written_is_named() -> None:
    backbone = make_backbone(context_length=512)
    sample = make_samples(2)
    plain = replace(sample[1], rationale=(), answers=("7",))
    with pytest.raises(
        PolicyError, match="sample-1: step 1 has words that the policy cannot write: '<answer>7</answer>'"
    ):
        Prompts(backbone).make([replace(sample[0], examples=(plain,))])
    with pytest.raises(PolicyError, match="'sample-1' to have a rationale or an answer"):
        Prompts(backbone).make([replace(sample[0], examples=(replace(plain, answers=()),))])
