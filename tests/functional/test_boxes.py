"""Conventions and arithmetic of boxes, against torchvision, transformers and numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_area, box_iou, generalized_box_iou
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from modules.functional.boxes import (
    BoxSpace,
    Fault,
    area,
    check,
    clip,
    fit_to_grid,
    from_original,
    giou,
    iou,
    to_original,
    zoom_factor,
)

IMAGE = (428, 640)  # (H, W): the image of the published Qwen example
BOX = (146.0, 137.0, 615.0, 415.0)


# Qwen's published arithmetic for this box: 0-1000 in Qwen3-VL, resized pixels in Qwen2.5-VL.
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("pixels", (146, 137, 615, 415)), ("thousand", (228, 320, 961, 970)), ("resized", (147, 134, 619, 407))],
)
def test_qwen_example(kind, expected):
    resized = fit_to_grid(*IMAGE, 28, 4 * 28**2, 4096 * 28**2)
    assert resized == (420, 644)
    coords = from_original(BOX, BoxSpace(kind), IMAGE, resized)
    assert tuple(round(c) for c in coords) == expected


def test_convention_x_goes_with_width():
    coords = from_original((10.0, 10.0, 20.0, 20.0), BoxSpace("unit"), (100, 200), (1, 1))
    assert coords == pytest.approx((0.05, 0.1, 0.1, 0.2))
    assert to_original((10.0, 10.0, 20.0, 20.0), BoxSpace("resized"), (100, 200), (50, 50)) == (40.0, 20.0, 80.0, 40.0)


coordinate = st.floats(-1e4, 1e4)
side = st.integers(1, 5000)
size = st.tuples(side, side)


@given(st.tuples(*[coordinate] * 4), st.sampled_from(["pixels", "resized", "unit", "thousand"]), size, size)
@settings(max_examples=60, deadline=None)
def test_spaces_round_trip(box, kind, original, resized):
    space = BoxSpace(kind)
    there = from_original(box, space, original, resized)
    assert to_original(there, space, original, resized) == pytest.approx(box, rel=1e-12, abs=1e-12)


def test_unknown_space():
    with pytest.raises(ValueError, match="'bins'"):
        BoxSpace("bins")


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ((0, 0, 640, 428), None),  # x2 and y2 are exclusive: the whole image
        ((0, 0, 428, 640), Fault.OUTSIDE),  # height and width swapped
        ((-2, -2, 642, 430), None),  # exactly the tolerance
        ((-2.1, 0, 640, 428), Fault.OUTSIDE),
        ((0, -2.1, 640, 428), Fault.OUTSIDE),
        ((0, 0, 642.1, 428), Fault.OUTSIDE),
        ((0, 0, 640, 430.1), Fault.OUTSIDE),
        ((700, 10, 720, 20), Fault.OUTSIDE),
        ((20, 10, 20, 30), Fault.ORDER),
        ((10, 30, 20, 20), Fault.ORDER),
        ((10, 10, 11, 11), None),
        ((10, 10, 10.9, 20), Fault.SMALL),
        ((-1.5, 10, 0.5, 20), Fault.SMALL),  # 2 wide, half a pixel of it inside
        ((640.5, 10, 641.5, 20), Fault.SMALL),  # within the tolerance, yet nothing of it inside
        ((math.nan, 0, 1, 1), Fault.NOT_FINITE),
        ((0, 0, math.inf, 1), Fault.NOT_FINITE),
    ],
)
def test_check(box, fault):
    assert check(box, IMAGE, tolerance=2) is fault


def test_clip():
    assert clip((-3, 5, 700, 500), IMAGE) == (0, 5, 640, 428)
    assert clip(BOX, IMAGE) == BOX


def random_boxes(n, seed):
    corners = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 100
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


def test_overlap_equals_torchvision():
    a, b = random_boxes(300, 0), random_boxes(300, 1)
    torch.testing.assert_close(area(a), box_area(a))
    torch.testing.assert_close(iou(a, b), box_iou(a, b).diagonal())
    torch.testing.assert_close(giou(a, b), generalized_box_iou(a, b).diagonal())
    assert (iou(a, b) == 0).any()
    assert (iou(a, b) > 0.1).any()


def test_overlap_by_hand():
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]])
    b = torch.tensor([[1.0, 1, 3, 3], [3, 0, 4, 1]])
    # First: 1 shared of 7, hull 9. Second: apart, union 2, hull 4.
    torch.testing.assert_close(iou(a, b), torch.tensor([1 / 7, 0]))
    torch.testing.assert_close(giou(a, b), torch.tensor([1 / 7 - 2 / 9, -0.5]))


@given(st.lists(st.tuples(*[st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0])] * 8), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_overlap_of_degenerate_boxes_is_finite(rows):
    a, b = torch.tensor(rows).split(4, dim=1)
    a.requires_grad_()
    values = torch.stack([iou(a, b), giou(a, b)])
    values.sum().backward()
    assert values.isfinite().all()
    assert values.min() >= -1
    assert values.max() <= 1
    assert a.grad.isfinite().all()


def test_overlap_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(N, 4\)"):
        area(torch.zeros(4))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        area(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="2 and 1"):
        iou(torch.zeros(2, 4), torch.zeros(1, 4))


def test_zoom_rule():
    # 2 - (0.3125 - 0.125) / 0.375 = 1.5 halfway; both ends join without a jump.
    expected = {0.0: 2, 0.1: 2, 0.125: 2, 0.3125: 1.5, 0.5: 1, 0.7: 1, 1.0: 1}
    for ratio, factor in expected.items():
        assert zoom_factor(ratio) == pytest.approx(factor)
    torch.testing.assert_close(
        zoom_factor(torch.tensor(list(expected))), torch.tensor(list(expected.values()), dtype=torch.float)
    )


@given(
    st.integers(1, 6000),
    st.integers(1, 6000),
    st.sampled_from([14, 28, 32]),
    st.sampled_from([(4, 1024), (4, 2048), (4, 4096), (32, 4096), (32, 8192), (1, 1)]),
)
@settings(max_examples=300, deadline=None)
def test_grid_equals_transformers(height, width, factor, limits):
    limits = [units * factor**2 for units in limits]
    try:
        expected = smart_resize(height, width, factor, *limits)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio"):
            fit_to_grid(height, width, factor, *limits)
    else:
        assert fit_to_grid(height, width, factor, *limits) == expected


def test_grid_limits():
    assert fit_to_grid(200, 1, 28, 784, 784) == smart_resize(200, 1, 28, 784, 784)  # 200 : 1 is the longest
    with pytest.raises(ValueError, match="aspect ratio"):
        fit_to_grid(201, 1, 28, 784, 784)
    # A zoomed crop has fractional sides, and the fraction decides: 70 / 28 = 2.5 rounds to even.
    assert fit_to_grid(70.0, 112.0, 28, 784, 78400) == (56, 112)
    assert fit_to_grid(70.1, 112.0, 28, 784, 78400) == (84, 112)
    for sides in [(0, 10), (10, -1), (math.nan, 10), (math.inf, 10)]:
        with pytest.raises(ValueError, match="positive and finite"):
            fit_to_grid(*sides, 28, 784, 78400)
    with pytest.raises(ValueError, match="min_pixels"):
        fit_to_grid(10, 10, 28, 785, 784)
