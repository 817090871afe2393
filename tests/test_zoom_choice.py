"""The policy chooses how much a crop is enlarged: in rollouts, in written rationales, in what is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from callbacks.rollout import prediction
from modules.backbones.scaling import ScalerConfig
from modules.engine import Decoding, LocalEngine, Request
from modules.environment import REFUSALS
from modules.functional.boxes import zoom_factor
from modules.metrics import measure
from modules.replay import Replayer
from modules.scoring import collate, token_log_probs
from modules.trajectory import Group, Region, Sample, Step, Trajectory
from tests.conftest import make_backbone, make_samples, scripted

RULE = ScalerConfig(min_pixels=64, max_pixels=64 * 64)  # in cells of 8 x 8
ZOOMS = (0.5, 1.0, 2.0, 4.0)
OPEN, LAST = "<think>I zoom in on ", "I can read it now.</think><answer>7</answer>"
BOX = (4.0, 8.0, 28.0, 40.0)  # 24 x 32 of 64 x 64 pixels: r = 0.1875
DECODING = Decoding(0.0, max_turns=4, max_turn_tokens=12)


def written(zoom: str) -> str:
    return f'{OPEN}red {{"bbox_2d": [4, 8, 28, 40]{zoom}}}{LAST}'


def rolled(*zooms: str, crop: ScalerConfig | None = RULE) -> list[Trajectory]:
    """What comes of boxes that differ in what is said about their zoom."""
    backbone = scripted([written(zoom) for zoom in zooms], crop=crop, zooms=ZOOMS)
    return LocalEngine().rollout(backbone, [Request(sample, 0) for sample in make_samples(len(zooms))], DECODING)


@pytest.mark.parametrize(("zoom", "size"), [("0.5", (16, 16)), ("1", (32, 24)), ("2", (64, 48)), ("4", (72, 48))])
def test_the_crop_is_enlarged_as_asked(zoom: str, size: tuple[int, int]) -> None:
    """16 x 12, 32 x 24, 64 x 48 and 128 x 96 pixels, on the grid of 8; the last are more than 64 x 64."""
    (t,) = rolled(f', "zoom": {zoom}')
    assert t.regions == (Region(BOX, zoom=float(zoom)),)
    (turn, last) = t.turns
    assert turn.crop is not None
    assert turn.crop.pixels.shape[-2:] == size
    assert last.text == LAST


def test_the_rules_own_factor_is_the_same_crop() -> None:
    own = zoom_factor(24 * 32 / 64**2)
    backbone = make_backbone(crop=RULE)
    image = make_samples(1)[0].images[0]
    ruled, chosen = backbone.look([image, image], [Region(BOX), Region(BOX, zoom=own)])
    assert torch.equal(ruled.pixels, chosen.pixels)
    assert ruled.pixels.shape != backbone.look([image], [Region(BOX, zoom=1.0)])[0].pixels.shape


def test_what_is_measured_and_saved_tells_the_zoom() -> None:
    one, two, unsaid = rolled(', "zoom": 1', ', "zoom": 2', "")
    assert [measure(t)["zoom_factor"] for t in (one, two)] == pytest.approx([1, 2])
    assert [measure(t)["zoom_chosen"] for t in (one, two, unsaid)] == [1, 1, 0]
    zeros = torch.zeros(1)
    lines = [prediction("greedy", Group(t.sample, (t,), {}, zeros, zeros)) for t in (two, unsaid)]
    assert [line["zooms"] for line in lines] == [[2.0], [None]]


def test_crops_of_one_size_refuse_in_words() -> None:
    fixed = ScalerConfig(size=(16, 16))
    (t,) = rolled(', "zoom": 2', crop=fixed)
    assert t.turns[0].fault == "zoom_fixed"
    assert t.regions == ()
    backbone = make_backbone(crop=fixed, zooms=ZOOMS)
    assert backbone.detokenize(t.completion_ids[~t.sampled]) == REFUSALS["zoom_fixed"]


def rationale(zoom: float | None) -> Sample:
    steps = (Step(f"{OPEN}red ", Region(BOX, zoom=zoom)), Step(LAST))
    return replace(make_samples(1)[0], rationale=steps)


@pytest.mark.parametrize("zoom", [None, 0.5, 2.0])
def test_a_written_zoom_is_replayed_as_the_engine_records_it(zoom: float | None) -> None:
    (made,), skipped = Replayer(make_backbone(crop=RULE, zooms=ZOOMS))([rationale(zoom)])
    (recorded,) = rolled("" if zoom is None else f', "zoom": {zoom:g}')
    assert skipped == []
    assert made.regions == recorded.regions == (Region(BOX, zoom=zoom),)
    assert made.text == recorded.text
    assert torch.equal(made.completion_ids, recorded.completion_ids)
    assert torch.equal(made.sampled, recorded.sampled)
    torch.testing.assert_close(made.visuals[1].pixels, recorded.visuals[1].pixels, atol=1e-6, rtol=0)
    assert made.coordinates.isfinite().sum() == 4  # the last of them before "], " is a coordinate as well


def test_two_zooms_of_one_question_are_two_rationales() -> None:
    """What a rationale comes to is kept for the next epoch, by what is written in it."""
    replay = Replayer(make_backbone(crop=RULE, zooms=ZOOMS))
    made = [replay([rationale(zoom)])[0][0] for zoom in (1.0, 2.0, 1.0)]
    assert [t.visuals[1].pixels.shape[-2:] for t in made] == [(32, 24), (64, 48), (32, 24)]


def test_a_rationale_with_a_zoom_that_cannot_act_is_skipped_by_name() -> None:
    made, (why,) = Replayer(make_backbone(zooms=ZOOMS))([rationale(2.0)])
    assert made == []
    assert why.startswith("sample-0: step 1 should end in a valid box")
    assert "zoom_fixed" in why


def test_a_policy_without_a_word_for_it_skips_the_rationale() -> None:
    made, (why,) = Replayer(make_backbone(crop=RULE))([rationale(2.0)])
    assert made == []
    assert "cannot write" in why


def test_the_learner_says_what_the_sampler_said() -> None:
    """Crops of chosen sizes are packed into rows as they stood in the rollout."""
    backbone = make_backbone(crop=RULE, zooms=ZOOMS, seed=2)
    replay = Replayer(backbone)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=3e-3)
    for _ in range(30):
        made, _ = replay([rationale(zoom) for zoom in (1.0, 2.0)])
        log_probs, _ = token_log_probs(backbone, collate(backbone, made), chunk=10_000)
        optimizer.zero_grad()
        (-log_probs.mean()).backward()
        optimizer.step()
    backbone.eval()
    requests = [Request(rationale(None), seed) for seed in range(24)]
    played = LocalEngine().rollout(backbone, requests, replace(DECODING, temperature=1.0))
    chosen = {region.zoom for t in played for region in t.regions}
    assert {1.0, 2.0} <= chosen  # otherwise nothing is shown
    batch = collate(backbone, played)
    with torch.no_grad():
        log_probs, _ = token_log_probs(backbone, batch, chunk=10_000)
    torch.testing.assert_close(log_probs, batch.log_probs, atol=1e-4, rtol=1e-4)
