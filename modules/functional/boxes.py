"""Boxes: the spaces that they are written in, what is wrong with one, overlap, and the zoom rule.

Conventions:

- A box is ``(x1, y1, x2, y2)``, float, origin top-left, x2 and y2 exclusive, in original pixels.
  In another space it is called ``coords``.
- A size is ``(height, width)`` in pixels. x runs to the width, y to the height.
- Nothing is rounded here: whoever writes a box as text decides how many digits it gets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from modules.trajectory import Box

SpaceKind = Literal["pixels", "resized", "unit", "thousand"]
MAX_ASPECT = 200  # Qwen's processors refuse longer images


@dataclass(frozen=True)
class BoxSpace:
    """The space in which a backbone writes boxes.

    ``pixels``: of the original image. ``resized``: pixels of the image as the backbone resized it
    (Qwen2.5-VL). ``unit``: 0 to 1. ``thousand``: 0 to 1000 (Qwen3-VL).
    """

    kind: SpaceKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(SpaceKind):
            raise ValueError(f"Expected `kind` to be one of {get_args(SpaceKind)}, but got {self.kind!r}.")


class Fault(StrEnum):
    """Why a box cannot be shown."""

    NOT_FINITE = "not_finite"  # a coordinate is NaN or infinite
    ORDER = "order"  # x2 <= x1 or y2 <= y1
    OUTSIDE = "outside"  # a coordinate lies beyond the image by more than the tolerance
    SMALL = "small"  # less than a pixel a side once clipped to the image


def _scales(space: BoxSpace, original: tuple[int, int], resized: tuple[int, int]) -> tuple[float, float]:
    """Original pixels per unit of ``space``, along x and along y."""
    height, width = original
    match space.kind:
        case "pixels":
            return 1.0, 1.0
        case "resized":
            return width / resized[1], height / resized[0]
        case "unit":
            return float(width), float(height)
        case "thousand":
            return width / 1000, height / 1000


def to_original(coords: Box, space: BoxSpace, original: tuple[int, int], resized: tuple[int, int]) -> Box:
    """Coordinates in ``space`` as a box in original pixels; inverse of `from_original`.

    Args:
        coords: (x1, y1, x2, y2) in ``space``.
        space: the space that they are in.
        original: (H, W) of the original image.
        resized: (H, W) of the image as the backbone resized it; only ``resized`` looks at it.
    """
    sx, sy = _scales(space, original, resized)
    x1, y1, x2, y2 = coords
    return x1 * sx, y1 * sy, x2 * sx, y2 * sy


def from_original(box: Box, space: BoxSpace, original: tuple[int, int], resized: tuple[int, int]) -> Box:
    """A box in original pixels as unrounded coordinates in ``space``; inverse of `to_original`."""
    sx, sy = _scales(space, original, resized)
    x1, y1, x2, y2 = box
    return x1 / sx, y1 / sy, x2 / sx, y2 / sy


def clip(box: Box, size: tuple[int, int]) -> Box:
    """The box with every coordinate moved into an image of ``size`` (H, W)."""
    height, width = (float(side) for side in size)
    x1, y1, x2, y2 = box
    return (
        min(max(x1, 0.0), width),
        min(max(y1, 0.0), height),
        min(max(x2, 0.0), width),
        min(max(y2, 0.0), height),
    )


def check(box: Box, size: tuple[int, int], tolerance: float) -> Fault | None:
    """What is wrong with a box, or None.

    Args:
        box: in original pixels.
        size: (H, W) of the original image.
        tolerance: how many original pixels a coordinate may lie beyond the image; `clip` it after.
    """
    if not all(math.isfinite(c) for c in box):
        return Fault.NOT_FINITE
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return Fault.ORDER
    height, width = size
    if min(x1, y1) < -tolerance or x2 > width + tolerance or y2 > height + tolerance:
        return Fault.OUTSIDE
    x1, y1, x2, y2 = clip(box, size)
    if x2 - x1 < 1 or y2 - y1 < 1:
        return Fault.SMALL
    return None


def _check_tensor(name: str, boxes: Tensor) -> None:
    if boxes.ndim != 2 or boxes.shape[-1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"Expected `{name}` to be float of shape (N, 4), but got {boxes.dtype} {tuple(boxes.shape)}.")


def area(boxes: Tensor) -> Tensor:
    """Areas (N,) of boxes (N, 4); 0 where a box has no inside."""
    _check_tensor("boxes", boxes)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    return sides[:, 0] * sides[:, 1]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Their quotient, and 0 (with gradient 0) where the denominator is not positive."""
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1), 0)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas (N,) of the intersections and of the unions."""
    _check_tensor("a", a)
    _check_tensor("b", b)
    if a.shape != b.shape:
        raise ValueError(f"Expected as many boxes in `a` as in `b`, but got {len(a)} and {len(b)}.")
    intersection = area(torch.cat([torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])], dim=1))
    return intersection, area(a) + area(b) - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of ``a[i]`` with ``b[i]``: elementwise, not every box with every other.

    Args:
        a: (N, 4) float.
        b: (N, 4) float, in the same space.

    Returns:
        (N,) in [0, 1]; 0, never NaN, where both boxes are empty.
    """
    return _ratio(*_overlap(a, b))


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of ``a[i]`` with ``b[i]`` (Rezatofighi et al., 2019), elementwise.

    ``iou - (hull - union) / hull``, where hull is the area of the smallest box around both.

    Args:
        a: (N, 4) float.
        b: (N, 4) float, in the same space.

    Returns:
        (N,) in (-1, 1] for boxes, -1 to 1 with empty ones among them; 0, never NaN, where the hull is empty.
    """
    intersection, union = _overlap(a, b)
    hull = area(torch.cat([torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:])], dim=1))
    return _ratio(intersection, union) - _ratio(hull - union, hull)


@overload
def zoom_factor(area_ratio: float) -> float: ...
@overload
def zoom_factor(area_ratio: Tensor) -> Tensor: ...
def zoom_factor(area_ratio: float | Tensor) -> float | Tensor:
    """How much each side of a crop is enlarged: the zoom rule of VLM-R3 (arXiv 2505.16192).

    2 below an eighth of the image, 1 from half of it on, and linear in between.

    Args:
        area_ratio: crop area over image area; any shape.
    """
    factor = 2 - (area_ratio - 0.125) / 0.375
    if isinstance(factor, Tensor):
        return factor.clamp(1, 2)
    return min(max(factor, 1.0), 2.0)


def fit_to_grid(height: float, width: float, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) on a patch grid that is nearest to a wanted size: Qwen's ``smart_resize``.

    Both sides become multiples of ``factor``. If their product is out of [min_pixels, max_pixels],
    both are scaled alike and rounded towards the limit. A very long image may still miss the limits,
    for no side is shorter than ``factor``.

    Raises:
        ValueError: a side that is not positive, limits that contradict each other, or sides more
            than 200 to 1.
    """
    if not (0 < height < math.inf and 0 < width < math.inf):
        raise ValueError(f"Expected `height` and `width` to be positive and finite, but got {height} and {width}.")
    if not (factor >= 1 and 1 <= min_pixels <= max_pixels):
        raise ValueError(
            "Expected `factor` >= 1 and 1 <= `min_pixels` <= `max_pixels`, "
            f"but got {factor}, {min_pixels} and {max_pixels}."
        )
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        raise ValueError(f"Expected an aspect ratio of at most {MAX_ASPECT}, but got {aspect:.1f}: {height} x {width}.")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        # The divisions stay in this order: the last bit decides at exact multiples.
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor
