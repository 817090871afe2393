"""Cut boxes out of images and zoom them, differentiably in the image and in the box."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from kornia.geometry.transform import remap
from torch import Tensor, nn
from torch.nn import functional as F

from modules.functional.boxes import MAX_ASPECT, Fault, check, fit_to_grid, zoom_factor
from modules.trajectory import Box

AT_ONCE = 1 << 24  # source values that are floats at a time, so that no copy of a huge image is
ROUNDING = 1e-2  # pixels by which a box of one pixel may fall short of it as float32


class CropAndScale(nn.Module):
    """Crops of many boxes on images of many sizes; rollout, warm-up and evaluation all use this one.

    Sampling. An output pixel is the mean of the source pixels around its centre under a triangle
    whose half-width is one source pixel, or one output pixel where the crop shrinks: bilinear
    interpolation, antialiased. A source pixel counts by the share of it that lies inside the box, so
    that nothing is read from outside a box and the crop is continuous in the box, size fixed. For
    boxes of whole pixels this is torchvision's `resized_crop(..., antialias=True)`, shrinking included.

    Output size. Either every crop is `size`, or it follows the zoom rule of VLM-R3: both sides times
    `zoom_factor(box area / image area)`, or a factor chosen in its place, then fitted to the patch grid within the
    pixel limits.

    Args:
        size: (height, width) of every crop; give this or the next three.
        grid: side in pixels of the square that output sides must be multiples of (28 for Qwen2.5-VL).
        min_pixels: least area of a crop in output pixels.
        max_pixels: greatest area of a crop in output pixels.
    """

    def __init__(
        self,
        size: tuple[int, int] | None = None,
        grid: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__()
        self.size: tuple[int, int] | None = None
        self.zoom: tuple[int, int, int] | None = None  # grid, min_pixels, max_pixels
        if size is not None and grid is None and min_pixels is None and max_pixels is None:
            if len(size) != 2 or min(size) < 1:
                raise ValueError(f"Expected `size` to be two positive sides (height, width) but got {size}")
            self.size = (size[0], size[1])
        elif size is None and grid is not None and min_pixels is not None and max_pixels is not None:
            if grid < 1 or not 0 < min_pixels <= max_pixels:
                raise ValueError(
                    "Expected `grid` >= 1 and 0 < `min_pixels` <= `max_pixels` but got "
                    f"grid={grid}, min_pixels={min_pixels}, max_pixels={max_pixels}"
                )
            self.zoom = (grid, min_pixels, max_pixels)
        else:
            raise ValueError(
                "Expected either `size`, or `grid` with `min_pixels` and `max_pixels`, but got "
                f"size={size}, grid={grid}, min_pixels={min_pixels}, max_pixels={max_pixels}"
            )

    def output_size(self, box: Box, image_size: tuple[int, int], factor: float | None = None) -> tuple[int, int]:
        """The (height, width) that a crop of this box gets; without a factor, when `forward` is given no sizes.

        A strip more than 200 times as long as it is wide, which the grid fit refuses, is made wider
        until it is just that: it keeps its length, and with it what can be read along it.

        Args:
            box: xyxy in pixels of the image, a valid one.
            image_size: (height, width) of the image.
            factor: by how much both sides are enlarged before they are fitted; None: the zoom rule.

        Raises:
            ValueError: a factor where every crop has the same size, or one that is not positive and finite.
        """
        if factor is not None and (self.zoom is None or not 0 < factor < math.inf):
            raise ValueError(
                "Expected `factor` to be None where crops have a fixed size, else positive and finite, but got "
                f"{factor} with size={self.size}."
            )
        if self.zoom is None:
            assert self.size is not None
            return self.size
        grid, min_pixels, max_pixels = self.zoom
        width, height = box[2] - box[0], box[3] - box[1]
        if factor is None:
            factor = zoom_factor(width * height / (image_size[0] * image_size[1]))
        width, height = factor * width, factor * height
        least = math.nextafter(max(width, height) / MAX_ASPECT, math.inf)  # the quotient may have been rounded down
        return fit_to_grid(max(height, least), max(width, least), grid, min_pixels, max_pixels)

    def forward(
        self,
        images: Sequence[Tensor],
        boxes: Tensor,
        owner: Tensor | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[Tensor]:
        """Cut every box out of its image and scale it.

        Args:
            images: each (3, H, W), any H and W; uint8, or float32 or float64 in [0, 1].
            boxes: (N, 4) float32 or float64, xyxy in pixels of their images, x2 and y2 exclusive.
            owner: (N,) long, the index of the image that each box is on; default: box i on image i.
            sizes: (height, width) of each crop; default: the rule given to the constructor.

        Returns:
            N crops (3, h, w) in the order of the boxes, in [0, 1], on the device and in the dtype of
            their image (float32 for uint8). Crops that were computed together share memory.

        Raises:
            ValueError: arguments that do not fit together, or a box that is degenerate, not finite or
                outside its image. Callers that take boxes from a policy check them first.
        """
        owners = _owners(images, boxes, owner)
        corners: list[Box] = [(x1, y1, x2, y2) for x1, y1, x2, y2 in boxes.detach().tolist()]
        shapes = [(image.shape[-2], image.shape[-1]) for image in images]
        for index, (box, image) in enumerate(zip(corners, owners, strict=True)):
            fault = check(box, shapes[image], 0.0)
            if fault is Fault.SMALL and min(box[2] - box[0], box[3] - box[1]) > 1 - ROUNDING:
                fault = None
            if fault is not None:
                height, width = shapes[image]
                raise ValueError(
                    f"Expected valid boxes but box {index}, {box} on image {image} "
                    f"of height {height} and width {width}, is at fault: {fault.value}"
                )
        if sizes is None:
            sizes = [self.output_size(box, shapes[image]) for box, image in zip(corners, owners, strict=True)]
        elif len(sizes) != len(corners) or any(min(size) < 1 for size in sizes):
            raise ValueError(f"Expected `sizes` to be {len(corners)} pairs of positive sides but got {list(sizes)}")

        crops: dict[int, Tensor] = {}
        for group in _groups(images, corners, owners, sizes):
            where = [index for indices in group.values() for index in indices]
            batch = _crop(images, group, [corners[index] for index in where], boxes[where], sizes[where[0]])
            crops.update(zip(where, batch, strict=True))
        return [crops[index] for index in range(len(corners))]


def _owners(images: Sequence[Tensor], boxes: Tensor, owner: Tensor | None) -> list[int]:
    """Check what `forward` was given; the image of each box."""
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype not in (torch.uint8, torch.float32, torch.float64):
            raise ValueError(
                "Expected images to be (3, H, W) of uint8, float32 or float64 but "
                f"image {index} is {tuple(image.shape)} of {image.dtype}"
            )
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Expected `boxes` to be (N, 4) of float32 or float64 but got {tuple(boxes.shape)} of {boxes.dtype}"
        )
    owners = list(range(len(images))) if owner is None else owner.tolist()
    if len(owners) != len(boxes):
        raise ValueError(f"Expected one image for each of {len(boxes)} boxes but got {len(owners)}")
    if any(not 0 <= image < len(images) for image in owners):
        raise ValueError(f"Expected `owner` to index {len(images)} images but got {owners}")
    return owners


def _reach(box: Box, size: tuple[int, int]) -> tuple[float, float]:
    """Source pixels to an output pixel, down and across; a crop shrinks where it is above one."""
    return (box[3] - box[1]) / size[0], (box[2] - box[0]) / size[1]


def _groups(
    images: Sequence[Tensor], corners: Sequence[Box], owners: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> list[dict[int, list[int]]]:
    """Split the boxes into groups that one kernel call can do: each maps image -> its boxes.

    A group agrees in image shape, dtype and device, in output size, and in whether it shrinks; boxes
    that do not shrink are sampled image by image, so their images must have equally many of them.
    """
    by_image: dict[tuple[int, tuple[int, int], bool], list[int]] = defaultdict(list)
    for index, (box, image, (height, width)) in enumerate(zip(corners, owners, sizes, strict=True)):
        size = (height, width)
        by_image[image, size, max(_reach(box, size)) > 1].append(index)
    groups: dict[tuple[object, ...], dict[int, list[int]]] = defaultdict(dict)
    for (image, size, shrinks), indices in by_image.items():
        pixels = images[image]
        key = (pixels.shape, pixels.dtype, pixels.device, size, shrinks, None if shrinks else len(indices))
        groups[key][image] = indices
    return list(groups.values())


def _crop(
    images: Sequence[Tensor],
    group: dict[int, list[int]],
    corners: Sequence[Box],
    boxes: Tensor,
    size: tuple[int, int],
) -> Tensor:
    """The crops (N, 3, h, w) of one group, whose N boxes stand image after image."""
    left, top = (math.floor(min(box[side] for box in corners)) for side in (0, 1))
    right, bottom = (math.ceil(max(box[side] for box in corners)) for side in (2, 3))
    views = [images[image][:, top:bottom, left:right] for image in group]  # no more than the boxes need
    pixels = torch.stack(views) if len(views) > 1 else views[0][None]
    scale = 255.0 if pixels.dtype == torch.uint8 else 1.0
    dtype = torch.float32 if pixels.dtype == torch.uint8 else pixels.dtype

    x1, y1, x2, y2 = boxes.to(pixels.device).unbind(1)
    reach_down, reach_across = (max(reach) for reach in zip(*(_reach(box, size) for box in corners), strict=True))
    rows, row_weights = _triangle(y1 - top, y2 - top, size[0], reach_down)
    columns, column_weights = _triangle(x1 - left, x2 - left, size[1], reach_across)
    if max(reach_down, reach_across) > 1:
        counts = torch.tensor([len(indices) for indices in group.values()])
        image = torch.arange(len(views)).repeat_interleave(counts).to(pixels.device)
        crops = _reduce(pixels, image, rows, row_weights.to(dtype), columns, column_weights.to(dtype))
    else:
        # Of two neighbours, any weighted mean is the bilinear sample at the weighted mean of their places.
        x = (columns * column_weights).sum(-1).to(dtype)
        y = (rows * row_weights).sum(-1).to(dtype)
        crops = _interpolate(pixels.to(dtype), y, x)
    return crops / scale if scale != 1 else crops


def _triangle(start: Tensor, stop: Tensor, out: int, reach: float) -> tuple[Tensor, Tensor]:
    """Which source pixels make each of `out` output pixels along one axis, and with what weights.

    Args:
        start: (N,) where the boxes begin; pixel j covers [j, j + 1].
        stop: (N,) where they end.
        out: pixels along the output.
        reach: the greatest number of source pixels to an output pixel among the boxes.

    Returns:
        places: (N, out, K) indices of source pixels, as floats; those of no weight may lie outside.
        weights: (N, out, K), each K of them sum to one.
    """
    step = (stop - start)[:, None] / out
    radius = step.clamp(min=1)
    centre = start[:, None] + (torch.arange(out, device=start.device) + 0.5) * step
    first = torch.floor(centre.detach() - radius.detach() + 0.5)
    taps = torch.arange(math.ceil(2 * max(reach, 1.0)), device=start.device)
    places = first[..., None] + taps
    inside = torch.minimum(places + 1, stop[:, None, None]) - torch.maximum(places, start[:, None, None])
    distance = (places + 0.5 - centre[..., None]).abs()
    weights = (1 - distance / radius[..., None]).clamp(min=0) * inside.clamp(min=0)
    # Never zero: a centre lies inside its box and within half a pixel of the middle of its own pixel.
    return places, weights / weights.sum(-1, keepdim=True)


def _interpolate(pixels: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear samples of images (B, 3, H, W) at rows (B * M, h) and columns (B * M, w) -> (B * M, 3, h, w)."""
    batch, (boxes, height), width = len(pixels), y.shape, x.shape[1]
    # The maps of all boxes on an image stand under one another, so that the image is read in place.
    maps = (batch, boxes // batch * height, width)
    map_x = x[:, None, :].expand(boxes, height, width).reshape(maps)
    map_y = y[:, :, None].expand(boxes, height, width).reshape(maps)
    # align_corners: kornia's pixel maps count from the centre of the first pixel only with it.
    # border: rounding may put a sample a hair beyond the last one.
    crops = remap(pixels, map_x, map_y, padding_mode="border", align_corners=True)
    return crops.unflatten(2, (-1, height)).transpose(1, 2).flatten(0, 1)


def _reduce(
    pixels: Tensor, image: Tensor, rows: Tensor, row_weights: Tensor, columns: Tensor, column_weights: Tensor
) -> Tensor:
    """Weighted means of rows, then of columns: the antialiased samples of boxes that shrink.

    Resampling by a separable filter is a product with a banded matrix on either side. `embedding_bag`
    is that product, touching the band only; it is exact under autocast and TF32, and has gradients
    with respect to the table (the image) and the weights (the boxes).

    Args:
        pixels: (B, 3, H, W), uint8 or float.
        image: (N,) which of them each box is on.
        rows: (N, h, K) from `_triangle`, with `row_weights`.
        columns: (N, w, K') from `_triangle`, with `column_weights`.
    """
    batch, channels, source_height, source_width = pixels.shape
    number, height, width = len(rows), rows.shape[1], columns.shape[1]
    bands, weights = _bags(rows, image, source_height), row_weights.flatten(0, 1)
    reduced = []
    for strip in pixels.split(max(1, AT_ONCE // (batch * channels * source_height)), dim=3):
        # Laid out before it is converted: the other way round takes twenty times as long.
        table = strip.permute(0, 2, 1, 3).contiguous().to(weights.dtype).view(batch * source_height, -1)
        table = F.embedding_bag(bands, table, per_sample_weights=weights, mode="sum")
        reduced.append(table.view(number, height * channels, -1))
    whole = torch.cat(reduced, 2) if len(reduced) > 1 else reduced[0]
    table = whole.transpose(1, 2).reshape(number * source_width, -1)
    bands = _bags(columns, torch.arange(number, device=columns.device), source_width)
    table = F.embedding_bag(bands, table, per_sample_weights=column_weights.flatten(0, 1), mode="sum")
    return table.view(number, width, height, channels).permute(0, 3, 2, 1)


def _bags(places: Tensor, block: Tensor, length: int) -> Tensor:
    """Rows of a table of blocks of `length` rows: (N, out, K) places, (N,) blocks -> (N * out, K) long."""
    return (places.long().clamp(0, length - 1) + block[:, None, None] * length).flatten(0, 1)
