"""What the environment answers: every refusal, the right image, every box space, the border."""

from __future__ import annotations

import pytest
import torch

from modules.environment import REFUSALS, Done, Look, Refuse, respond
from modules.functional.boxes import BoxSpace, SpaceKind
from modules.functional.grammar import format_box, may_end_turn
from modules.trajectory import Box, Region, Sample, Visual


def shown(*sizes: tuple[tuple[int, int], tuple[int, int]]) -> tuple[Sample, tuple[Visual, ...]]:
    """Images of so many pixels (H, W), and how the policy sees them."""
    images = tuple(torch.zeros(3, *original, dtype=torch.uint8) for original, _ in sizes)
    visuals = tuple(Visual(torch.zeros(3, *resized), 1) for _, resized in sizes)
    return Sample("s", "?", images), visuals


ONE = shown(((200, 400), (100, 100)))  # a pixel that the policy sees is 2 rows and 4 columns of the original
RESIZED, PIXELS = BoxSpace("resized"), BoxSpace("pixels")

REFUSED = {
    "json": ['{"bbox_2d": [1, 2, 3, 4}', "{'bbox_2d': [1, 2, 3, 4]}", '{"bbox_2d": [1 2 3 4]}'],
    "arity": ['{"bbox_2d": [1, 2, 3]}', '{"bbox_2d": [[1, 2, 3, 4]]}', '{"bbox_2d": 7}'],
    "number": ['{"bbox_2d": [1, 2, "3", 4]}', '{"bbox_2d": [1, 2, NaN, 4]}', '{"bbox_2d": [1, 2, true, 4]}'],
    "image": [
        '{"bbox_2d": [1, 2, 30, 40], "image": 1}',  # there is only image 0
        '{"bbox_2d": [1, 2, 30, 40], "image": -1}',
        '{"bbox_2d": [1, 2, 30, 40], "image": "0"}',
    ],
    "zoom": ['{"bbox_2d": [1, 2, 30, 40], "zoom": 0}', '{"bbox_2d": [1, 2, 30, 40], "zoom": 8.01}'],
    "order": ['{"bbox_2d": [30, 2, 1, 40]}', '{"bbox_2d": [1, 40, 30, 2]}', '{"bbox_2d": [1, 2, 1, 40]}'],
    "outside": ['{"bbox_2d": [-5, 2, 30, 40]}', '{"bbox_2d": [1, 2, 30, 140]}', '{"bbox_2d": [900, 2, 901, 40]}'],
    "small": ['{"bbox_2d": [1, 2, 1.1, 40]}', '{"bbox_2d": [100, 2, 100.5, 40]}'],
    "not_finite": ['{"bbox_2d": [1, 2, 1e308, 4]}'],  # as an original pixel, four times as much
}


@pytest.mark.parametrize(("fault", "text"), [(fault, text) for fault, texts in REFUSED.items() for text in texts])
def test_a_box_that_cannot_be_shown_is_refused(fault: str, text: str) -> None:
    assert respond(f"<think>I zoom in on {text}", *ONE, RESIZED) == Refuse(fault)


def test_every_refusal_is_tested_and_has_words() -> None:
    own = {"context", "zoom_fixed"}  # the engine's to refuse; see below
    assert {*REFUSED, *own} == set(REFUSALS)


def test_a_zoom_is_handed_on_where_crops_can_obey_it() -> None:
    text = format_box((10, 10, 20, 40), zoom=2.5)
    reply = respond(text, *ONE, RESIZED)
    assert isinstance(reply, Look)
    assert reply.region == Region((40.0, 20.0, 80.0, 80.0), zoom=2.5)
    assert respond(text, *ONE, RESIZED, zooms=False) == Refuse("zoom_fixed")
    unsaid = respond(format_box((10, 10, 20, 40)), *ONE, RESIZED, zooms=False)
    assert unsaid == Look(Region((40.0, 20.0, 80.0, 80.0)))


@pytest.mark.parametrize("words", REFUSALS.values())
def test_what_the_environment_says_ends_no_turn(words: str) -> None:
    assert not may_end_turn(words)
    assert respond(words, *ONE, RESIZED) is None


@pytest.mark.parametrize(
    "text",
    ["", "<think>I zoom", '{"bbox_2d": [1, 2, 30, 40', r"the set \{[1, 2]} and then", "<answer>7", "7</answer>"],
)
def test_a_turn_goes_on(text: str) -> None:
    assert respond(text, *ONE, RESIZED) is None


def test_an_answer_is_the_end() -> None:
    assert respond("<think>.</think><answer> 7 </answer>", *ONE, RESIZED) == Done("7")


def test_a_question_without_images_has_nothing_to_look_at() -> None:
    assert respond('{"bbox_2d": [1, 2, 30, 40]}', Sample("s", "?"), (), RESIZED) == Refuse("image")


def test_the_box_is_on_the_image_that_it_names() -> None:
    sample, visuals = shown(((200, 400), (100, 100)), ((50, 50), (100, 100)), ((300, 200), (100, 100)))
    for image, box in enumerate([(40.0, 20.0, 80.0, 80.0), (5.0, 5.0, 10.0, 20.0), (20.0, 30.0, 40.0, 120.0)]):
        text = format_box((10, 10, 20, 40), image)
        reply = respond(text, sample, visuals, RESIZED)
        assert isinstance(reply, Look)
        assert reply.region.image == image
        assert reply.region.box == pytest.approx(box)
    unnamed = respond(format_box((10, 10, 20, 40)), sample, visuals, RESIZED)
    assert isinstance(unnamed, Look)
    assert unnamed.region.image == 0
    assert respond(format_box((10, 10, 20, 40), 3), sample, visuals, RESIZED) == Refuse("image")


def test_the_bounds_are_those_of_the_named_image() -> None:
    sample, visuals = shown(((200, 400), (200, 400)), ((50, 50), (50, 50)))
    assert isinstance(respond(format_box((100, 60, 300, 190), 0), sample, visuals, PIXELS), Look)
    assert respond(format_box((100, 60, 300, 190), 1), sample, visuals, PIXELS) == Refuse("outside")


@pytest.mark.parametrize(
    ("space", "written"),
    [
        ("pixels", (40, 50, 200, 150)),
        ("resized", (10, 25, 50, 75)),
        ("unit", (0.1, 0.25, 0.5, 0.75)),
        ("thousand", (100, 250, 500, 750)),
    ],
)
def test_the_same_region_in_every_space(space: SpaceKind, written: Box) -> None:
    reply = respond(format_box(written), *ONE, BoxSpace(space))
    assert isinstance(reply, Look)
    assert reply.region.box == pytest.approx((40.0, 50.0, 200.0, 150.0))


@pytest.mark.parametrize(
    ("written", "box"),
    [
        ((-1, -1, 101, 51), (0.0, 0.0, 400.0, 102.0)),
        ((50, 50, 101, 101), (200.0, 100.0, 400.0, 200.0)),
        ((0, 0, 100, 100), (0.0, 0.0, 400.0, 200.0)),
    ],
)
def test_one_unit_beyond_the_border_is_clipped(written: Box, box: Box) -> None:
    reply = respond(format_box(written), *ONE, RESIZED)
    assert isinstance(reply, Look)
    assert reply.region.box == box


@pytest.mark.parametrize("written", [(-1.1, 0, 50, 50), (0, -2.1, 50, 50), (0, 0, 101.1, 50), (0, 0, 50, 102.1)])
def test_more_than_a_unit_beyond_the_border_is_outside(written: Box) -> None:
    """The unit is the longer side of what the policy sees as a pixel: here 4 columns, which are two units of rows."""
    assert respond(format_box(written), *ONE, RESIZED) == Refuse("outside")


def test_an_enlarged_image_has_a_tolerance_of_one_original_pixel() -> None:
    sample, visuals = shown(((50, 50), (100, 100)))
    assert isinstance(respond(format_box((0, 0, 51, 50)), sample, visuals, PIXELS), Look)
    assert respond(format_box((0, 0, 51.5, 50)), sample, visuals, PIXELS) == Refuse("outside")
