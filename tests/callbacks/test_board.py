"""Where the policy looks, as numbers against closed forms; one question over time; the layout's switches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.board import Board, Looks, write_looks
from callbacks.heatmap import SHADES, colours, coverage, draw_looks, shares, shown
from callbacks.timeline import COLUMNS, Timeline, crowded, draw_card
from callbacks.trajectory_log import TrajectoryLogger
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, LocalEngine, Request
from modules.sft import SFTModule
from modules.trajectory import Group, Region, Sample, SampleBatch, Trajectory
from tests.conftest import make_samples
from tests.fitting import Batches, fresh, trainer

pytestmark = pytest.mark.filterwarnings("ignore")
SIDES = st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda pair: abs(pair[0] - pair[1]) > 1e-3).map(sorted)


@pytest.fixture
def played(zooming: TimmLMBackbone) -> list[Trajectory]:
    requests = [Request(sample, k) for k, sample in enumerate(make_samples(6))]
    return LocalEngine().rollout(zooming, requests, Decoding(1.0, max_turns=3, max_turn_tokens=10))


def test_coverage_of_known_boxes() -> None:
    quarter = torch.tensor([[0.0, 0.0, 0.5, 0.5]], dtype=torch.float64)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[:2, :2] = 1
    assert torch.equal(coverage(quarter, 4), expected)
    # x from an eighth to three eighths, y over the top eighth: half of two cells in x, half of the first row in y
    part = torch.tensor([[0.125, 0.0, 0.375, 0.125]], dtype=torch.float64)
    both = coverage(torch.cat([quarter, part]), 4)
    assert both[0].tolist() == [(1 + 0.25) / 2, (1 + 0.25) / 2, 0, 0]
    assert both[1].tolist() == [0.5, 0.5, 0, 0]
    assert coverage(torch.zeros(0, 4), 4).sum() == 0


@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=5))
def test_coverage_adds_up_to_the_mean_area(sides: list[tuple[list[float], list[float]]]) -> None:
    boxes = torch.tensor([(x[0], y[0], x[1], y[1]) for x, y in sides], dtype=torch.float64)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).mean()
    assert float(coverage(boxes).mean()) == pytest.approx(float(area), abs=1e-9)


def test_boxes_are_shares_of_the_image_that_they_are_on() -> None:
    images = (torch.zeros(3, 50, 100, dtype=torch.uint8), torch.zeros(3, 10, 20, dtype=torch.uint8))
    found = shares(Sample("id", "?", images), [Region((10, 10, 50, 50)), Region((0, 5, 20, 10), 1)])
    assert found.tolist() == [[0.1, 0.2, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0]]


def test_the_colours_run_from_the_first_shade_to_the_last() -> None:
    row = colours(torch.linspace(0, 1, 7)[None])[0]
    assert [tuple(colour) for colour in row.tolist()] == list(SHADES)
    light = colours(torch.linspace(0, 1, 50)[None])[0].double().sum(1)
    assert bool((light.diff() > 0).all())  # ordered on paper too


def test_what_is_shown_is_where_the_crops_came_from(played: list[Trajectory]) -> None:
    for trajectory in played:
        crops = [turn for turn in trajectory.turns if turn.crop is not None]
        assert len(shown(trajectory)) == len(crops)
        for box, turn in zip((shown(trajectory) * 64).tolist(), crops, strict=True):
            assert turn.region is not None
            assert tuple(box) == pytest.approx(turn.region.box)
    assert draw_looks(shown(played[0]), torch.zeros(0, 4)).width < draw_looks(shown(played[0]), shown(played[0])).width


def test_histograms_hold_every_crop(played: list[Trajectory], tmp_path: Path) -> None:
    looks = Looks()
    nothing = torch.zeros(1)
    looks.add([Group(t.sample, (t,), {}, nothing, nothing) for t in played])
    logger = TensorBoardLogger(tmp_path, name="run")
    made = trainer(tmp_path, logger=logger, max_epochs=1)
    write_looks(made, "val", looks)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0, "images": 0}).Reload()
    boxes = torch.cat([shown(t) for t in played])
    assert len(boxes) > 3
    expected = {
        "val/boxes/area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "val/boxes/x": (boxes[:, 0] + boxes[:, 2]) / 2,
        "val/boxes/y": (boxes[:, 1] + boxes[:, 3]) / 2,
        "val/length": torch.tensor([float(t.sampled.sum()) for t in played]),
    }
    assert set(events.Tags()["histograms"]) == set(expected)
    for tag, values in expected.items():
        (histogram,) = (event.histogram_value for event in events.Histograms(tag))
        assert (histogram.num, histogram.sum) == (len(values), pytest.approx(float(values.double().sum())))
    assert events.Tags()["images"] == ["val/looks"]


def test_without_tensorboard_nothing_is_written(zooming: TimmLMBackbone, tmp_path: Path) -> None:
    made = trainer(tmp_path, Board(every_n_steps=1), logger=CSVLogger(tmp_path), max_epochs=1)
    made.fit(SFTModule(fresh(zooming)), Batches([SampleBatch(make_samples(1))]))
    assert made.global_step == 1


def test_a_timeline_keeps_the_first_the_latest_and_even_steps_between() -> None:
    timeline = Timeline()
    for step in range(0, 1000, 10):
        timeline.add(step, Image.new("RGB", (220, 200)))
    steps = [step for step, _ in timeline.cards]
    assert (len(steps), steps[0], steps[-1]) == (COLUMNS, 0, 990)
    gaps = np.diff(steps)
    assert gaps.max() <= 4 * gaps[:-1].min()  # the latest may be close to the one before it
    assert crowded([0, 10, 20, 100]) == 1
    timeline.add(500, Image.new("RGB", (220, 200)))  # a run that went back to an earlier checkpoint
    assert [step for step, _ in timeline.cards][-1] == 500
    assert all(step < 500 for step, _ in timeline.cards[:-1])


def test_a_timeline_survives_a_checkpoint(played: list[Trajectory], tmp_path: Path) -> None:
    nothing = torch.zeros(1)
    group = Group(played[0].sample, (played[0],), {"accuracy": torch.ones(1)}, nothing, nothing)
    logger, again = TrajectoryLogger(), TrajectoryLogger()
    timeline = logger._timelines.setdefault(2, Timeline())
    for step in (5, 10):
        timeline.add(step, draw_card(group, step))
    torch.save(logger.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    pictures = [np.asarray(each._timelines[2].draw(group.sample)) for each in (logger, again)]
    np.testing.assert_array_equal(*pictures)


def test_a_step_that_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match="`every_n_steps` to be at least 1, but got 0"):
        Board(every_n_steps=0)
