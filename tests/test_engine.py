"""The rollout: exact, reproducible, and within its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from modules.backbones.cache import RaggedCache
from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, Flight, GroupSampler, LocalEngine, Request
from modules.environment import REFUSALS
from modules.prefill import Prompts, buckets
from modules.scoring import collate, token_log_probs
from modules.trajectory import Sample, StopReason, Trajectory, Visual
from tests.conftest import make_backbone, make_samples, scripted

LIMITS = {"max_turns": 4, "max_turn_tokens": 12}


def rollouts(
    backbone: TimmLMBackbone, samples: list[Sample], temperature: float = 1.0, group: int = 2, **kw: int
) -> list[Trajectory]:
    requests = GroupSampler(group).requests(samples, seed=3)
    return LocalEngine(**kw).rollout(backbone, requests, Decoding(temperature, **LIMITS))


BOX = 'red {"bbox_2d": [4, 8, 28, 40]}'
ANSWER = "I can read it now.</think><answer>7</answer>"


def test_crop_is_woven_into_the_trajectory() -> None:
    backbone = scripted([f"<think>I zoom in on {BOX}{ANSWER}"])
    sample = make_samples(1)[0]
    (t,) = LocalEngine().rollout(backbone, [Request(sample, 0)], Decoding(0.0, **LIMITS))
    assert t.stop is StopReason.ANSWER
    assert t.answer == "7"
    assert t.text == f"<think>I zoom in on {BOX}{ANSWER}"
    assert [turn.text for turn in t.turns] == [f"<think>I zoom in on {BOX}", ANSWER]
    assert t.regions[0].box == (4.0, 8.0, 28.0, 40.0)
    placeholders = t.completion_ids == backbone.image_token_id
    assert int(placeholders.sum()) == 4  # a 16 x 16 crop in patches of 8
    assert torch.equal(t.sampled, ~placeholders)
    written = t.completion_ids[t.sampled]
    assert torch.equal(written, backbone.tokenize(t.text))
    # the crop is the one that the crop layer cuts out of the original
    expected = backbone.look([sample.images[0]], [t.regions[0]])[0]
    assert t.turns[0].crop is not None
    assert torch.equal(t.turns[0].crop.pixels, expected.pixels)
    assert t.visuals == (t.visuals[0], t.turns[0].crop)


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ('red {"bbox_2d": [28, 8, 4, 40]}', "order"),
        ('red {"bbox_2d": [4, 8, 4, 40]}', "order"),
        ('red {"bbox_2d": [4, 8, 28]}', "arity"),
    ],
)
def test_invalid_box_is_refused_in_text_and_shows_nothing(box: str, fault: str) -> None:
    backbone = scripted([f"<think>I zoom in on {box}{ANSWER}"])
    (t,) = LocalEngine().rollout(backbone, [Request(make_samples(1)[0], 0)], Decoding(0.0, **LIMITS))
    assert t.turns[0].fault == fault
    assert t.turns[0].crop is None
    assert len(t.visuals) == 1  # the image only
    assert t.stop is StopReason.ANSWER
    forced = t.completion_ids[~t.sampled]
    assert backbone.detokenize(forced) == REFUSALS[fault]


def test_trajectories_of_different_turns_advance_together() -> None:
    texts = [ANSWER, f"<think>I zoom in on {BOX}{BOX}{ANSWER}", f"<think>I zoom in on {BOX}{ANSWER}"]
    backbone = scripted(texts)
    requests = [Request(sample, k) for k, sample in enumerate(make_samples(3))]
    trajectories = LocalEngine().rollout(backbone, requests, Decoding(0.0, **LIMITS))
    assert [t.text for t in trajectories] == texts
    assert [len(t.regions) for t in trajectories] == [0, 2, 1]
    assert [t.sample.id for t in trajectories] == ["sample-0", "sample-1", "sample-2"]


@pytest.mark.parametrize(
    ("text", "limits", "stop"),
    [
        ("<think>I zoom in on red" * 9, {"max_turns": 4, "max_turn_tokens": 5}, StopReason.TURN_LENGTH),
        (BOX * 5, {"max_turns": 3, "max_turn_tokens": 12}, StopReason.MAX_TURNS),
        ("<think>I zoom in on <eos>", {"max_turns": 3, "max_turn_tokens": 12}, StopReason.EOS),
        (BOX * 50, {"max_turns": 50, "max_turn_tokens": 12}, StopReason.CONTEXT),
        ("red" * 200, {"max_turns": 50, "max_turn_tokens": 500}, StopReason.CONTEXT),
    ],
)
def test_limits_act_and_say_so(text: str, limits: dict[str, int], stop: StopReason) -> None:
    backbone = scripted([text])
    if "<eos>" in text:
        backbone.lines[0][-1] = next(iter(backbone.eos_ids))
    (t,) = LocalEngine().rollout(backbone, [Request(make_samples(1)[0], 0)], Decoding(0.0, **limits))
    assert t.stop is stop
    assert t.stop.truncated == (stop is not StopReason.EOS)
    assert len(t.prompt_ids) + len(t.completion_ids) <= backbone.context_length
    if stop is StopReason.TURN_LENGTH:
        assert len(t.completion_ids) == 5
    if stop is StopReason.MAX_TURNS:
        assert len(t.turns) == 3
        assert sum(turn.crop is not None for turn in t.turns) == 2  # the last request is not fulfilled
    sum_of_turns = sum(turn.stop - turn.start for turn in t.turns)
    assert sum_of_turns == int(t.sampled.sum())


def test_recorded_log_probs_are_the_learners(zooming: TimmLMBackbone) -> None:
    backbone = zooming
    trajectories = rollouts(backbone, make_samples(8), group=4)
    assert sum(bool(t.regions) for t in trajectories) >= 4  # otherwise nothing is shown about crops
    assert len({len(t.completion_ids) for t in trajectories}) > 3  # ragged
    batch = collate(backbone, trajectories)
    log_probs, _ = token_log_probs(backbone, batch, chunk=64)
    assert (log_probs - batch.log_probs).abs().max() < 1e-5
    # the control: another crop is another probability
    first = next(t for t in trajectories if t.regions and t.sampled[t.turns[0].stop :].any())
    swapped = list(first.visuals)
    swapped[1] = type(swapped[1])(1 - swapped[1].pixels, swapped[1].tokens, "crop")
    altered = Trajectory(**{**vars(first), "visuals": tuple(swapped)})
    alone = collate(backbone, [altered])
    changed, _ = token_log_probs(backbone, alone, chunk=64)
    assert (changed - alone.log_probs).abs().max() > 1e-2


def test_temperature_is_part_of_the_recorded_distribution(zooming: TimmLMBackbone) -> None:
    backbone = zooming
    trajectories = rollouts(backbone, make_samples(4), temperature=0.7)
    batch = collate(backbone, trajectories)
    log_probs, _ = token_log_probs(backbone, batch, chunk=1000)
    assert (log_probs - batch.log_probs).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_16_equals_one_at_a_time(zooming: TimmLMBackbone, temperature: float) -> None:
    backbone = zooming
    samples = make_samples(8)
    together = rollouts(backbone, samples, temperature)
    alone = rollouts(backbone, samples, temperature, max_batch=1)
    assert len(together) == len(alone) == 16
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.completion_ids, b.completion_ids)
        assert a.stop is b.stop
        assert (a.log_probs - b.log_probs).abs().max() < 1e-5


def test_members_of_a_group_differ_and_seeds_repeat() -> None:
    backbone = make_backbone()
    first = rollouts(backbone, make_samples(2), group=4)
    again = rollouts(backbone, make_samples(2), group=4)
    assert [t.text for t in first] == [t.text for t in again]
    assert len({t.text for t in first[:4]}) > 1


def test_reserved_tokens_are_never_sampled() -> None:
    backbone = make_backbone()
    with torch.no_grad():  # the placeholder is by far the likeliest token
        backbone.language.lm_head.weight[backbone.image_token_id] = 100 * backbone.language.lm_head.weight.mean(0)
    for t in rollouts(backbone, make_samples(8), group=4):
        assert not backbone.banned[t.completion_ids[t.sampled]].any()


def test_zoom_rule_gives_crops_of_different_sizes() -> None:
    small, large = 'red {"bbox_2d": [0, 0, 16, 16]}', 'red {"bbox_2d": [0, 0, 64, 48]}'
    crop = ScalerConfig(min_pixels=8 * 8, max_pixels=64 * 64)
    backbone = scripted([f"{small}{large}{ANSWER}"], crop=crop)
    (t,) = LocalEngine().rollout(backbone, [Request(make_samples(1)[0], 0)], Decoding(0.0, **LIMITS))
    shapes = [tuple(turn.crop.pixels.shape[1:]) for turn in t.turns if turn.crop is not None]
    assert shapes == [(32, 32), (48, 64)]  # r = 1/16: twice; r = 3/4: once
    assert [v.tokens for v in t.visuals] == [4, 16, 48]


def test_blank_crops_are_grey_and_of_the_same_size() -> None:
    backbone = scripted([f"{BOX}{ANSWER}"])
    (t,) = LocalEngine().rollout(backbone, [Request(make_samples(1)[0], 0)], Decoding(0.0, crops="blank", **LIMITS))
    assert t.turns[0].crop is not None
    assert t.turns[0].crop.pixels.unique().tolist() == pytest.approx([128 / 255])
    assert t.turns[0].crop.tokens == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"temperature": -1}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"max_turns": 0}, "max_turns")],
)
def test_impossible_decodings_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**wrong)  # type: ignore[arg-type]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (rows, columns) of every pass from now on."""
    passes: list[tuple[int, int]] = []
    forward = TimmLMBackbone.forward

    def noted(self: TimmLMBackbone, embeddings: torch.Tensor, *rest: object) -> torch.Tensor:
        passes.append((embeddings.shape[0], embeddings.shape[1]))
        return forward(self, embeddings, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(TimmLMBackbone, "forward", noted)
    return passes


@pytest.mark.parametrize("places", [3, 5, 16])
def test_freed_places_are_taken_and_nothing_is_computed_twice(
    zooming: TimmLMBackbone, monkeypatch: pytest.MonkeyPatch, places: int
) -> None:
    requests = GroupSampler(4).requests(make_samples(4), seed=3)
    expected = LocalEngine(max_batch=1).rollout(zooming, requests, Decoding(**LIMITS))
    passes = counted(monkeypatch)
    found = LocalEngine(max_batch=places).rollout(zooming, requests, Decoding(**LIMITS))
    assert [t.completion_ids.tolist() for t in found] == [t.completion_ids.tolist() for t in expected]
    # float32 in batches of other sizes: differences of 2e-5 were seen, whatever the order of the computation
    assert max((a.log_probs - b.log_probs).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-4
    # a prompt once a group, though its members start at different times; no padding; behind the last token nothing
    prompts = sum(len(t.prompt_ids) for t in found[::4])
    assert sum(rows * columns for rows, columns in passes) == prompts + sum(len(t.completion_ids) - 1 for t in found)
    assert max(rows for rows, _ in passes) <= places


def test_a_crop_pads_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{BOX}{ANSWER}", f"red{BOX}{ANSWER}", "red" * 9 + ANSWER]
    backbone = scripted(texts)
    passes = counted(monkeypatch)
    requests = [Request(sample, k) for k, sample in enumerate(make_samples(3))]
    found = LocalEngine().rollout(backbone, requests, Decoding(0.0, **LIMITS))
    assert [t.text for t in found] == texts
    prompts = sum(len(t.prompt_ids) for t in found)
    assert sum(rows * columns for rows, columns in passes) == prompts + sum(len(t.completion_ids) - 1 for t in found)


def test_buckets_are_padded_by_no_more_than_their_slack() -> None:
    drawn = torch.randn(256, generator=torch.Generator().manual_seed(0))
    lengths = (48 * (0.7 * drawn).exp()).round().clamp(min=1).long().tolist()
    for slack in (0.0, 0.02, 0.05):
        found = buckets(lengths, slack)
        assert sorted(k for bucket in found for k in bucket) == list(range(256))
        computed = sum(len(bucket) * max(lengths[k] for k in bucket) for bucket in found)
        assert computed <= (1 + slack) * sum(lengths)
    assert len(buckets(lengths, 0.05)) < len(buckets(lengths, 0.02)) < len(set(lengths)) == len(buckets(lengths, 0.0))
    assert buckets([]) == []


def test_what_a_place_held_before_does_not_reach_the_next() -> None:
    cache, new = RaggedCache(), RaggedCache()
    for target, count, value in ((cache, 5, torch.nan), (new, 2, 1.0)):
        states = torch.full((2, 1, count, 1), value)
        target.prepare(torch.full((2,), count), count)
        target.update(states, states, 0)
        target.commit()
    cache.select(torch.tensor([0]))
    cache.append([(new, torch.tensor([1]))])
    assert cache.lengths.tolist() == [5, 2]
    assert cache.keys[0][1, 0, :, 0].tolist() == [1, 1] + [0] * 62


def test_the_prefix_is_kept_for_members_that_wait_and_no_longer() -> None:
    samples = make_samples(2)
    flight = Flight(make_backbone(), GroupSampler(3).requests(samples, seed=0), Decoding(**LIMITS), places=2)
    assert list(flight.prefixes) == [0]
    whole = Flight(make_backbone(), GroupSampler(3).requests(samples, seed=0), Decoding(**LIMITS), places=3)
    assert whole.prefixes == {}


def test_an_image_is_scaled_with_the_first_prompt_that_shows_it_and_kept_for_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = make_backbone()
    samples = make_samples(6)
    samples[4] = replace(samples[4], images=samples[0].images)  # far apart, one image
    images = {id(sample.images[0]): k for k, sample in enumerate(samples[:4] + samples[5:])}
    seen: list[list[int]] = []
    encoded: list[Visual] = []
    see, encode = TimmLMBackbone.see, TimmLMBackbone.encode

    def watched(self: TimmLMBackbone, shown: Sequence[torch.Tensor]) -> list[Visual]:
        seen.append([images[id(image)] for image in shown])
        return see(self, shown)

    def noted(self: TimmLMBackbone, visuals: Sequence[Visual]) -> list[torch.Tensor]:
        encoded.extend(visual for visual in visuals if visual.role == "image")
        return encode(self, visuals)

    monkeypatch.setattr(TimmLMBackbone, "see", watched)
    monkeypatch.setattr(TimmLMBackbone, "encode", noted)
    flight = Flight(backbone, GroupSampler(2).requests(samples, seed=3), Decoding(**LIMITS), places=2)
    assert seen == [[0]]
    found = dict(flight.run())
    assert sorted(number for part in seen for number in part) == [0, 1, 2, 3, 4]
    assert len(encoded) == len(set(encoded)) == 5
    assert {found[number].visuals[0] for number in (0, 1, 8, 9)} == {encoded[0]}


def test_prompts_are_made_once_and_forgotten_when_nobody_needs_them() -> None:
    samples = make_samples(5)
    examples = tuple(samples[4:])
    samples = [replace(sample, examples=examples) for sample in samples[:4]]
    samples[1] = replace(samples[1], images=samples[0].images)
    prompts = Prompts(make_backbone(context_length=512))
    first, second = prompts.make(samples[:2])
    assert prompts.make([samples[0]]) == [first]
    assert first.solved is second.solved
    assert first.asked.visuals == second.asked.visuals
    assert prompts.made(samples[2:]) == {first.solved}
    assert prompts.made(samples[1:]) == {first.solved, first.asked.visuals[0]}
    prompts.keep(samples[1:])
    (again, *_) = prompts.make(samples)
    assert again is not first  # but made of what the others needed
    assert (again.solved, again.asked.visuals) == (first.solved, first.asked.visuals)
    prompts.keep([])
    assert prompts.made(samples) == set()
