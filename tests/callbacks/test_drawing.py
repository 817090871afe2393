"""Pictures of trajectories: where the boxes land, and that nothing odd breaks the page."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.drawing import ANNOTATED, BAD, CHOSEN, draw_boxes, draw_group, draw_trajectory, looks
from modules.trajectory import Box, Group, Region, Sample, StopReason, Trajectory, Turn, Visual

NONE = torch.zeros(0, dtype=torch.long)
GROUND = (250, 240, 10)  # occurs nowhere else on the page


def flat(height: int, width: int) -> torch.Tensor:
    return torch.tensor(GROUND, dtype=torch.uint8)[:, None, None].expand(3, height, width).contiguous()


def trajectory(sample: Sample, *turns: Turn, answer: str | None = "7") -> Trajectory:
    text = "".join(turn.text for turn in turns)
    stop = StopReason.ANSWER if answer is not None else StopReason.MAX_TURNS
    return Trajectory(sample, NONE, NONE, NONE.bool(), NONE.float(), NONE.float(), (), turns, stop, answer, text)


def look(box: Box, image: int = 0, colour: float = 0.5) -> Turn:
    crop = Visual(torch.full((3, 28, 56), colour), 2, "crop")
    return Turn('See {"bbox_2d": [1, 2, 3, 4]}', 0, 1, region=Region(box, image), crop=crop)


def is_colour(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(picture) == np.array(colour)).all(-1)


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of a mask, the end exclusive."""
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def test_draw_boxes_puts_frames_where_the_scaled_boxes_are() -> None:
    # 100 x 50 drawn at 300 x 150: every coordinate times three
    picture = draw_boxes(flat(50, 100), (300, 150), chosen=[(1, (60, 20, 90, 40))], annotated=[(5, 10, 25, 45)])
    assert picture.size == (300, 150)
    assert extent(is_colour(picture, ANNOTATED)) == (15, 30, 75, 135)
    frame = is_colour(picture, CHOSEN[0])
    assert extent(frame) == (180, 40, 270, 120)  # its number stands in the 20 pixels above 60
    assert frame[119, 180:270].all()  # bottom edge
    assert frame[60:120, 269].all()  # right edge
    assert is_colour(picture, GROUND)[70:110, 190:260].all()  # nothing inside


def test_a_box_that_was_chosen_exactly_as_annotated_shows_both() -> None:
    picture = draw_boxes(flat(50, 50), (200, 200), chosen=[(1, (10, 10, 30, 30))], annotated=[(10, 10, 30, 30)])
    assert is_colour(picture, ANNOTATED).sum() > 100
    assert is_colour(picture, CHOSEN[0]).sum() > 100


def test_trajectory_shows_each_box_in_its_colour_at_its_place() -> None:
    boxes: list[Box] = [(10, 40, 30, 60), (50, 120, 120, 150)]
    sample = Sample("id", "Where?", (flat(192, 192),), ("7",), regions=(Region((130, 20, 180, 70)),))
    done = Turn("<answer>7</answer>", 1, 2)
    picture = draw_trajectory(trajectory(sample, look(boxes[0]), look(boxes[1]), done), {"accuracy": 1.0}, width=800)
    assert picture.width == 800
    left, top, right, bottom = extent(is_colour(picture, GROUND))
    assert right - left == bottom - top  # the image's shape is kept
    assert right - left > 2 * 192  # a small image is enlarged
    scale = (right - left) / 192
    image = picture.crop((left, top, right, bottom))
    for (x1, y1, x2, y2), colour in zip(boxes, CHOSEN, strict=False):
        frame = is_colour(image, colour)
        for x, y in ((x1 + 1, (y1 + y2) / 2), (x2 - 1, (y1 + y2) / 2), ((x1 + x2) / 2, y2 - 1)):
            near = frame[round(y * scale) - 3 : round(y * scale) + 4, round(x * scale) - 3 : round(x * scale) + 4]
            assert near.any(), (x, y, colour)
        # the crop beside the image has a border of the same colour
        assert is_colour(picture.crop((right, top, 800, bottom)), colour).sum() > 200
    crops = is_colour(picture, (128, 128, 128))  # 0.5 of 255: both crops, 56 x 28 each, one under the other
    x1, _, x2, _ = extent(crops)
    assert crops[:, (x1 + x2) // 2].sum() == pytest.approx(2 * (x2 - x1) / 2, abs=2)
    expected = [round(v * scale) for v in (130, 20, 180, 70)]
    assert extent(is_colour(image, ANNOTATED)) == pytest.approx(expected, abs=1)


def test_a_chosen_zoom_is_told_beside_the_crop() -> None:
    sample = Sample("id", "Where?", (flat(192, 192),))
    plain = look((10, 40, 30, 60))
    chosen = replace(plain, region=Region((10, 40, 30, 60), zoom=2.5))
    (before, after) = (np.asarray(draw_trajectory(trajectory(sample, turn), {})) for turn in (plain, chosen))
    assert before.shape == after.shape
    rows, columns = np.where((before != after).any(-1))
    _, top, right, _ = extent(is_colour(Image.fromarray(before), GROUND))
    assert len(rows) > 20  # a few letters
    assert columns.min() > right  # in the caption of the crop, and nowhere else
    assert rows.max() < top + 20


def test_a_box_is_drawn_on_the_image_it_names() -> None:
    dark = torch.zeros(3, 64, 64, dtype=torch.uint8)
    sample = Sample("id", "Which?", (flat(64, 64), dark))
    picture = draw_trajectory(trajectory(sample, look((8, 24, 56, 56), image=1)), {})
    first = extent(is_colour(picture, GROUND))
    second = extent(is_colour(picture, (0, 0, 0)))
    assert is_colour(picture.crop(second), CHOSEN[0]).any()
    assert not is_colour(picture.crop(first), CHOSEN[0]).any()


def test_refused_boxes_are_told_but_not_numbered() -> None:
    refused = Turn('{"bbox_2d": [1, 2, 3]}', 0, 1, fault="arity")
    rolled = trajectory(Sample("id", "?", (flat(64, 64),)), refused, look((1, 1, 20, 20)), answer=None)
    assert [shown.number for shown in looks(rolled)] == [None, 1]
    picture = draw_trajectory(rolled, {})
    assert is_colour(picture, BAD).sum() > 100
    assert is_colour(picture, CHOSEN[0]).any()
    assert not is_colour(picture, CHOSEN[1]).any()


@pytest.mark.parametrize(
    ("images", "turns"),
    [
        pytest.param((), (Turn("<think>" + "word " * 5000 + "</think>", 0, 1),), id="text only, very long"),
        pytest.param((), (Turn("x" * 3000 + " é→中\x00\t", 0, 1),), id="no spaces, odd characters"),
        pytest.param((), (), id="nothing at all"),
        pytest.param(((20, 2000),), (look((5, 5, 1500, 15)),), id="very wide"),
        pytest.param(((3000, 4),), (look((0, 5, 4, 15)),), id="very tall"),
        pytest.param(((6, 6),), (look((0.2, 0.2, 0.4, 0.4)),), id="tiny"),
        pytest.param(((64, 64),), tuple(look((k, k, k + 9.5, k + 7.5)) for k in range(12)), id="many crops"),
        pytest.param(((64, 64), (30, 90), (90, 30), (8, 8)), (look((0, 0, 9, 9), image=2),), id="several images"),
        pytest.param(((64, 64),), (Turn("a", 0, 1, region=Region((0, 0, 9, 9))),), id="valid box, no crop"),
    ],
)
def test_anything_can_be_drawn(images: tuple[tuple[int, int], ...], turns: tuple[Turn, ...]) -> None:
    sample = Sample("id", "Question? " * 30, tuple(flat(*size) for size in images), choices=("a", "b" * 200))
    picture = draw_trajectory(trajectory(sample, *turns), {"accuracy": float("nan")}, total=1.0, advantage=-1.0)
    assert picture.mode == "RGB"
    assert picture.width == 900
    assert picture.height < 2000


def test_group_shows_every_member_once() -> None:
    sample = Sample("id", "Where?", (flat(100, 100),), ("7",))
    members = tuple(trajectory(sample, look((10, 40, 30, 60)), Turn("7", 1, 2)) for _ in range(5))
    zeros = torch.zeros(5)
    picture = draw_group(Group(sample, members, {"accuracy": zeros}, zeros, zeros), width=1000)
    assert picture.width == 1000
    ground = is_colour(picture, GROUND)
    rows = np.where(np.diff(ground.any(1).astype(int), prepend=0) == 1)[0]  # the first line of each row of images
    images = [int((np.diff(ground[row].astype(int), prepend=0) == 1).sum()) for row in rows]
    assert images == [3, 2]
    frames = is_colour(picture, CHOSEN[0])
    below = [
        int((np.diff(frames[row:end].any(0).astype(int), prepend=0) == 1).sum())
        for row, end in ((rows[0], rows[1]), (rows[1], None))
    ]
    assert below == [3, 2]  # each with its box


def test_group_of_text_only_questions() -> None:
    sample = Sample("id", "1 + 1?")
    members = (trajectory(sample, Turn("<answer>2</answer>", 0, 1), answer="2"), trajectory(sample, answer=None))
    two = torch.tensor([1.0, float("nan")])
    assert draw_group(Group(sample, members, {"accuracy": two}, two, torch.zeros(2))).width == 1000
