"""A replayed rationale is what the engine records when the policy writes it; what cannot be replayed is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modules.backbones.scaling import ScalerConfig
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, LocalEngine, Request
from modules.replay import Replayer
from modules.trajectory import Region, Sample, Step, StopReason, Trajectory
from tests.conftest import make_backbone, make_samples, scripted

ZOOM = ScalerConfig(min_pixels=64, max_pixels=64 * 64)  # crops of different sizes
LAST = "I can read it now.</think><answer>7</answer>"
OPEN = "<think>I zoom in on red "


def question(*steps: Step, size: int = 64) -> Sample:
    return replace(make_samples(1, size=size)[0], rationale=steps)


def refusal(sample: Sample) -> str:
    made, skipped = Replayer(make_backbone())([sample])
    assert made == []
    (why,) = skipped
    return why


# a rationale, and by hand what the policy writes to say it
SCRIPTS = {
    "one look": (
        (Step(OPEN, Region((4, 8, 28, 40))), Step(LAST)),
        f'{OPEN}{{"bbox_2d": [4, 8, 28, 40]}}{LAST}',
    ),
    "two looks": (
        (Step(OPEN, Region((0, 0, 16, 16))), Step("blue ", Region((0, 0, 64, 48))), Step(LAST)),
        f'{OPEN}{{"bbox_2d": [0, 0, 16, 16]}}blue {{"bbox_2d": [0, 0, 64, 48]}}{LAST}',
    ),
    "no look": ((Step("<think>I zoom in on red" + LAST),), "<think>I zoom in on red" + LAST),
    "between two tokens": (
        (Step(OPEN, Region((5.3, 8, 28, 39))), Step(LAST)),
        f'{OPEN}{{"bbox_2d": [4, 8, 28, 40]}}{LAST}',
    ),
}


def same(replayed: Trajectory, recorded: Trajectory) -> None:
    for name in ("prompt_ids", "completion_ids", "sampled"):
        assert torch.equal(getattr(replayed, name), getattr(recorded, name)), name
    for name in ("stop", "answer", "text", "temperature", "regions"):
        assert getattr(replayed, name) == getattr(recorded, name), name
    for a, b in zip(replayed.turns, recorded.turns, strict=True):
        assert (a.text, a.start, a.stop, a.region, a.fault) == (b.text, b.start, b.stop, b.region, b.fault)
        assert (a.crop is None) == (b.crop is None)
    for v, w in zip(replayed.visuals, recorded.visuals, strict=True):
        assert (v.role, v.tokens) == (w.role, w.tokens)
        torch.testing.assert_close(v.pixels, w.pixels, atol=1e-6, rtol=0)  # cut in batches of their own
    assert all(turn.crop is None or turn.crop in replayed.visuals for turn in replayed.turns)


@pytest.mark.parametrize("crop", [None, ZOOM])
def test_what_is_replayed_is_what_the_engine_records(crop: ScalerConfig | None) -> None:
    samples = [question(*steps) for steps, _ in SCRIPTS.values()]
    texts = [text for _, text in SCRIPTS.values()]
    replayed, skipped = Replayer(make_backbone(crop=crop))(samples)
    assert skipped == []
    requests = [Request(sample, 0) for sample in samples]
    recorded = LocalEngine().rollout(scripted(texts, crop=crop), requests, Decoding(0.0, max_turn_tokens=20))
    assert [t.text for t in recorded] == texts
    for a, b in zip(replayed, recorded, strict=True):
        same(a, b)
    assert [t.stop for t in replayed] == [StopReason.ANSWER] * 4
    assert [t.answer for t in replayed] == ["7"] * 4


def test_exact_coordinates_stand_behind_the_coordinate_tokens() -> None:
    backbone = make_backbone()
    assert backbone.coordinate_bins is not None
    (t,), _ = Replayer(backbone)([question(*SCRIPTS["between two tokens"][0])])
    at = torch.isin(t.completion_ids, backbone.coordinate_bins)
    assert t.coordinates[at].tolist() == pytest.approx([5.3 / 4, 2, 7, 39 / 4])
    assert t.coordinates[~at].isnan().all()
    assert not t.log_probs.any()


@pytest.mark.parametrize("box", [(8, 8, 8, 40), (30, 8, 10, 40), (8, 8, 9, 40)])
def test_a_refused_box_is_skipped_by_name(box: tuple[float, float, float, float]) -> None:
    """The last one is valid, but both of its sides are written as the same coordinate."""
    why = refusal(question(Step(OPEN, Region(box)), Step(LAST)))
    assert why.startswith("sample-0: step 1 should end in a valid box")
    assert "order" in why


def test_a_box_outside_the_image_is_skipped_by_name() -> None:
    why = refusal(question(Step(OPEN, Region((8, 8, 64, 40))), Step(LAST), size=48))
    assert why.startswith("sample-0: step 1")
    assert "outside" in why


def test_a_refused_box_in_the_words_of_a_step_is_skipped_by_name() -> None:
    """The environment would have said no, and the rationale does not go on from there."""
    why = refusal(question(Step('red {"bbox_2d": [28, 8, 4, 40]}'), Step(LAST)))
    assert why.startswith("sample-0: step 1")
    assert "order" in why


def test_a_box_in_the_words_of_a_step_is_shown() -> None:
    (t,), _ = Replayer(make_backbone())([question(Step('red {"bbox_2d": [4, 8, 28, 40]}'), Step(LAST))])
    assert t.regions == (Region((4.0, 8.0, 28.0, 40.0)),)
    assert len(t.visuals) == 2


def test_no_rationale() -> None:
    assert refusal(question()) == "sample-0: it has no rationale to learn from"


def test_an_answer_too_early() -> None:
    why = refusal(question(Step(LAST), Step(OPEN, Region((4, 8, 28, 40))), Step(LAST)))
    assert why == "sample-0: step 1 of 3 answers already"


def test_words_that_the_policy_cannot_write_are_skipped_by_name() -> None:
    """Training on the unknown token, which is never sampled, would teach nothing but noise."""
    why = refusal(question(Step("The colour is mauve. " + LAST)))
    assert why.startswith("sample-0: step 1")
    assert "cannot write" in why


def test_a_placeholder_in_the_words_of_a_step_is_skipped_by_name() -> None:
    why = refusal(question(Step("red<image>" + LAST)))
    assert why.startswith("sample-0: step 1")
    assert "cannot write" in why


def test_a_rationale_beyond_the_context_is_skipped_by_name() -> None:
    backbone = make_backbone(context_length=20)
    made, skipped = Replayer(backbone)([question(*SCRIPTS["two looks"][0]), question(*SCRIPTS["no look"][0])])
    assert [t.text for t in made] == [SCRIPTS["no look"][1]]
    (why,) = skipped
    assert why.startswith("sample-0:")
    assert "context" in why


def test_the_others_are_replayed_in_order() -> None:
    samples = make_samples(4)
    samples[1] = replace(samples[1], rationale=())
    made, skipped = Replayer(make_backbone())(samples)
    assert [t.sample.id for t in made] == ["sample-0", "sample-2", "sample-3"]
    assert skipped == ["sample-1: it has no rationale to learn from"]


def test_crops_belong_to_their_own_sample() -> None:
    backbone: TimmLMBackbone = make_backbone()
    samples = [question(*SCRIPTS["two looks"][0]), *make_samples(2, seed=3)]
    made, _ = Replayer(backbone)(samples)
    for t in made:
        for turn in t.turns:
            if turn.region is not None:
                (expected,) = backbone.look([t.sample.images[0]], [turn.region])
                assert turn.crop is not None
                torch.testing.assert_close(turn.crop.pixels, expected.pixels, atol=1e-6, rtol=0)


def test_a_second_epoch_is_the_same_and_a_changed_rationale_is_not_the_old_one() -> None:
    replay = Replayer(make_backbone())
    sample = question(*SCRIPTS["one look"][0])
    (first,), _ = replay([sample])
    (again,), _ = replay([sample])
    same(first, again)
    (changed,), _ = replay([replace(sample, rationale=SCRIPTS["two looks"][0])])
    assert len(changed.regions) == 2
    brighter = replace(sample, images=(255 - sample.images[0],))
    (other,), _ = replay([brighter])
    assert torch.equal(other.completion_ids, first.completion_ids)
    assert not torch.equal(other.visuals[1].pixels, first.visuals[1].pixels)  # pixels are not kept
