"""Metrics of trajectories against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from modules.backbones.scaling import ScalerConfig
from modules.engine import Decoding, LocalEngine, Request
from modules.environment import REFUSALS
from modules.metrics import MEASURED, Tally, last_iou, measure
from modules.trajectory import Box, Region, Sample, StopReason, Trajectory, Turn, Visual
from tests.conftest import make_samples, scripted

CROP = Visual(torch.zeros(3, 8, 8), 1, "crop")
ANSWER = Turn("<answer>7</answer>", 0, 0)


def look(*box: float, image: int = 0) -> Turn:
    return Turn("", 0, 0, region=Region((box[0], box[1], box[2], box[3]), image), crop=CROP)


def trajectory(
    *turns: Turn, annotated: tuple[Region, ...] = (), stop: StopReason = StopReason.ANSWER, written: int = 3
) -> Trajectory:
    """On an image of 40 rows and 100 columns, and one of 10 by 10."""
    images = (torch.zeros(3, 40, 100, dtype=torch.uint8), torch.zeros(3, 10, 10, dtype=torch.uint8))
    ids = torch.zeros(written + 4, dtype=torch.long)
    sampled = torch.arange(written + 4) < written
    nothing = torch.zeros(len(ids))
    return Trajectory(
        Sample("s", "?", images, regions=annotated), ids, ids, sampled, nothing, nothing, (), turns, stop, "7", ""
    )


def test_two_crops_and_a_refusal() -> None:
    turns = (look(0, 0, 50, 20), Turn("", 0, 0, fault="order"), look(0, 0, 10, 9, image=1), ANSWER)
    assert measure(trajectory(*turns)) == pytest.approx(
        {
            "zoom_rate": 1.0,
            "crops": 2.0,
            "crop_area": (0.25 + 0.9) / 2,  # each of its own image
            "zoom_factor": ((8 * 8 / (50 * 20)) ** 0.5 + (8 * 8 / (10 * 9)) ** 0.5) / 2,  # shown as 8 x 8
            "zoom_chosen": 0.0,
            "whole_image": 0.5,  # 0.9 is whole already
            "duplicates": 0.0,
            "invalid": 1 / 3,
            "faults": 1.0,
            "refused_context": 0.0,
            "turns": 4.0,
            "tokens": 3.0,  # sampled ones, not what the environment put in
            "truncated": 0.0,
            "iou": math.nan,
        },
        nan_ok=True,
    )


@pytest.mark.parametrize(("context", "refused"), [(45, 1.0), (65, 0.0)])
def test_crops_that_the_context_has_no_room_for_are_counted(context: int, refused: float) -> None:
    """The prompt is 7 tokens, a box 5, a crop 16: behind the first, 33 and 16 more do not fit into 45."""
    box, answer = 'red {"bbox_2d": [8, 8, 24, 24]}', "I can read it now.</think><answer>7</answer>"
    backbone = scripted([box + box + answer], crop=ScalerConfig(size=(32, 32)), context_length=context)
    decoding = Decoding(0.0, max_turns=3, max_turn_tokens=12)
    (rolled,) = LocalEngine().rollout(backbone, [Request(make_samples(1)[0], 0)], decoding)
    numbers = measure(rolled)
    assert numbers["refused_context"] == numbers["faults"] == refused
    assert numbers["crops"] == 2 - refused
    assert numbers["invalid"] == refused / 2
    # only what was shown can be shown again
    assert numbers["duplicates"] == (0.0 if refused else 0.5)
    assert rolled.stop is StopReason.ANSWER  # nothing breaks
    assert (REFUSALS["context"] in backbone.detokenize(rolled.completion_ids)) == bool(refused)
    assert Tally(MEASURED).add([numbers]).means()["refused_context"] == refused  # what callbacks log


def test_a_refusal_without_room_is_counted_too() -> None:
    turns = (look(0, 0, 50, 20), Turn("", 0, 0, fault="order"), Turn("", 0, 0, fault="context"))
    numbers = measure(trajectory(*turns, stop=StopReason.CONTEXT))
    assert (numbers["faults"], numbers["refused_context"], numbers["invalid"]) == (2.0, 1.0, pytest.approx(2 / 3))


def test_without_crops_their_sizes_are_unknown() -> None:
    asked = Turn("", 0, 0, region=Region((0, 0, 50, 20)))  # after the last turn: not shown
    numbers = measure(trajectory(asked, stop=StopReason.MAX_TURNS, annotated=(Region((0, 0, 50, 20)),)))
    assert (numbers["zoom_rate"], numbers["crops"], numbers["truncated"]) == (0, 0, 1)
    assert math.isnan(numbers["crop_area"])
    assert math.isnan(numbers["whole_image"])
    assert math.isnan(numbers["duplicates"])
    assert numbers["invalid"] == 0  # what it asked for is there
    assert math.isnan(measure(trajectory(ANSWER))["invalid"])  # nothing was asked for
    assert numbers["iou"] == 0  # it looked nowhere


@pytest.mark.parametrize("stop", StopReason)
def test_truncated_is_what_a_limit_ended(stop: StopReason) -> None:
    limits = {StopReason.TURN_LENGTH, StopReason.MAX_TURNS, StopReason.CONTEXT}
    assert measure(trajectory(ANSWER, stop=stop))["truncated"] == float(stop in limits)


@pytest.mark.parametrize(("box", "whole"), [((0, 0, 100, 40), 1), ((0, 0, 90, 40), 1), ((0, 0, 89, 40), 0)])
def test_whole_image(box: Box, whole: float) -> None:
    assert measure(trajectory(look(*box), ANSWER))["whole_image"] == whole


@pytest.mark.parametrize(
    ("turns", "again"),
    [
        ([look(0, 0, 10, 10), look(0, 0, 10, 10), look(0, 0, 10, 10)], 2 / 3),  # the first is the first
        ([look(0, 0, 10, 10), look(50, 0, 60, 10), look(0, 0, 10, 10)], 1 / 3),  # not only the one just before
        ([look(0, 0, 100, 10), look(0, 0, 91, 10)], 1 / 2),  # IoU 0.91
        ([look(0, 0, 100, 10), look(0, 0, 90, 10)], 0),  # IoU 0.9
        ([look(0, 0, 10, 10), look(0, 0, 10, 10, image=1)], 0),  # of another image
        ([Turn("", 0, 0, region=Region((0, 0, 10, 10))), look(0, 0, 10, 10)], 0),  # the first was not shown
    ],
)
def test_duplicates(turns: list[Turn], again: float) -> None:
    assert measure(trajectory(*turns, ANSWER))["duplicates"] == pytest.approx(again)


def test_iou_is_that_of_the_last_look_with_the_best_annotation() -> None:
    annotated = (Region((0, 0, 20, 20)), Region((60, 0, 80, 20)), Region((0, 0, 10, 10), image=1))
    last = look(60, 0, 80, 10)  # half of the second one
    assert measure(trajectory(look(0, 0, 20, 20), last, ANSWER, annotated=annotated))["iou"] == pytest.approx(0.5)


def test_last_iou() -> None:
    first, second = Region((0, 0, 10, 10)), Region((0, 0, 10, 10), image=1)
    assert math.isnan(last_iou([first], ()))
    assert last_iou([], (first,)) == 0
    assert last_iou([first], (first,)) == 1
    assert last_iou([second], (first,)) == 0  # the same box, of another image
    assert last_iou([first, Region((20, 20, 30, 30))], (first,)) == 0
    # 5 x 10 in common; 100 + 100 - 50 in all
    assert last_iou([Region((5, 0, 15, 10))], (first, Region((50, 50, 60, 60)))) == pytest.approx(1 / 3)


def test_means_are_over_what_is_known() -> None:
    rows = [{"a": 1.0, "b": math.nan, "c": math.nan}, {"a": 2.0, "b": 5.0, "c": math.nan}]
    tally = Tally("abc").add(rows)
    assert tally.means() == {"a": 1.5, "b": 5.0}
    assert tally.add(rows[:1]).means() == {"a": pytest.approx(4 / 3), "b": 5.0}
    assert Tally("ab").add([]).means() == {}
    # two ranks, one of them with nothing to count
    assert tally.means(lambda sums: sums + Tally("abc").sums) == tally.means()
