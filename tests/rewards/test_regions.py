"""Rewards of where the policy looked, of repetition and of crops, by numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from modules.rewards import CropCost, IoU, RegionValidity, Repetition
from modules.trajectory import Region, Trajectory, Turn
from tests.test_rewards import BOX, look, refused, say, trajectory

SMALL = (10.0, 10.0, 14.0, 50.0)  # 4 x 40 of 64 x 64: 160 / 4096 = 0.039
HALF = (0.0, 0.0, 64.0, 32.0)
WHOLE = (0.0, 0.0, 64.0, 64.0)
SHIFTED = (0.0, 4.0, 64.0, 36.0)  # IoU with HALF: 28 / 36


def looked(*boxes: tuple[float, float, float, float], annotated: tuple[Region, ...] = ()) -> Trajectory:
    played = trajectory(*(look("", box) for box in boxes), say("<answer>7</answer>"))
    return replace(played, sample=replace(played.sample, regions=annotated))


@pytest.mark.parametrize(
    ("options", "boxes", "any_valid", "all_valid"),
    [
        ({}, [], 0, 0),
        ({}, [WHOLE], 1, 1),
        ({}, [HALF, HALF], 1, 1),
        ({"max_area": 0.9}, [WHOLE], 0, 0),
        ({"max_area": 0.9}, [WHOLE, HALF], 1, 0),
        ({"max_area": 0.5}, [HALF], 1, 1),  # the limit itself is allowed
        ({"max_area": 0.49}, [HALF], 0, 0),
        ({"min_side": 4.0}, [SMALL], 1, 1),
        ({"min_side": 4.5}, [SMALL], 0, 0),
        ({"min_area": 0.039}, [SMALL], 1, 1),
        ({"min_area": 0.04}, [SMALL], 0, 0),
        ({"max_overlap": 0.9}, [HALF, HALF], 1, 0),
        ({"max_overlap": 0.9}, [HALF, SMALL, HALF], 1, 0),  # any earlier one, not only the last
        ({"max_overlap": 0.78}, [HALF, SHIFTED], 1, 1),
        ({"max_overlap": 0.77}, [HALF, SHIFTED], 1, 0),
    ],
)
def test_what_is_a_valid_region(options: dict[str, float], boxes: list[Any], any_valid: int, all_valid: int) -> None:
    played = looked(*boxes)
    assert RegionValidity("any_valid", **options)(played) == any_valid  # type: ignore[arg-type]
    assert RegionValidity("all_valid", **options)(played) == all_valid  # type: ignore[arg-type]


def test_the_same_box_on_another_image_is_another_region() -> None:
    played = looked(HALF)
    turn = replace(played.turns[0], region=Region(HALF, 1))
    sample = replace(played.sample, images=played.sample.images * 2)
    both = replace(played, sample=sample, turns=(played.turns[0], turn))
    assert RegionValidity("all_valid", max_overlap=0.5)(both) == 1


@pytest.mark.parametrize(
    "options", [{"min_side": -1}, {"min_area": 0.5, "max_area": 0.4}, {"max_area": 1.5}, {"max_overlap": 1.1}]
)
def test_meaningless_limits_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RegionValidity(**options)  # type: ignore[arg-type]


def test_iou_with_annotated_regions() -> None:
    known = (Region(HALF), Region(SMALL))
    assert math.isnan(IoU()(looked(HALF)))
    assert IoU()(looked(annotated=known)) == 0
    both = looked(SHIFTED, WHOLE, SMALL, annotated=known[:1])
    overlap = 4 * (32 - 10) / (160 + 2048 - 88)
    assert IoU()(both) == pytest.approx(28 / 36)
    assert IoU("mean")(both) == pytest.approx((28 / 36 + 0.5 + overlap) / 3)
    assert IoU("last")(both) == pytest.approx(overlap)
    assert IoU("last")(looked(HALF, SMALL, annotated=known)) == 1  # with the one that it matches best
    assert IoU()(looked(HALF, annotated=(Region(HALF, 1),))) == 0  # another image


def test_what_was_asked_for_and_not_shown_counts_as_no_look() -> None:
    played = trajectory(Turn(BOX, 0, 0, region=Region(HALF)))
    played = replace(played, sample=replace(played.sample, regions=(Region(HALF),)))
    assert (RegionValidity()(played), IoU()(played), CropCost()(played)) == (0, 0, 0)


def test_crops_cost_what_was_shown() -> None:
    assert CropCost()(looked()) == 0
    assert CropCost()(looked(HALF, HALF, SMALL)) == -3
    assert CropCost()(trajectory(refused(BOX), look(BOX), say(""))) == -1


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("one two three four", 2, 0),
        ("One two one, two", 2, 2 / 3 - 1),  # one-two, two-one, one-two
        ("a a a a a", 1, 1 / 5 - 1),
        ("a a a a a", 4, 1 / 2 - 1),
        ("a b c", 4, 0),  # too short to repeat itself
        ("", 1, 0),
        ("I see" + BOX + "I see" + BOX + "I see", 2, 2 / 5 - 1),  # boxes are no text
        ("红红红红", 2, 1 / 3 - 1),
    ],
)
def test_repetition(text: str, n: int, expected: float) -> None:
    assert Repetition(n)(trajectory(say(text))) == pytest.approx(expected)


def test_an_n_gram_has_a_word() -> None:
    with pytest.raises(ValueError, match="`n`"):
        Repetition(0)
