"""Where a policy looks: boxes in shares of their image, and how often each place is shown.

Pure functions from the types of `modules.trajectory`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from PIL import Image
from torch import Tensor

from callbacks.layout import INK, MARGIN, MUTED, beside, page, paragraph, stack
from modules.trajectory import Region, Sample, Trajectory

GRID = 64  # cells a side
SIDE = 384  # of a map in pixels
# after matplotlib's `magma`: dark is rare, light is often, also in print
SHADES = ((0, 0, 4), (44, 17, 95), (114, 31, 129), (183, 55, 121), (241, 96, 93), (254, 176, 120), (252, 253, 191))


def shares(sample: Sample, regions: Iterable[Region]) -> Tensor:
    """(N, 4) boxes in shares of the width and height of the image that each is on."""
    rows = []
    for region in regions:
        height, width = sample.images[region.image].shape[-2:]
        x1, y1, x2, y2 = region.box
        rows.append((x1 / width, y1 / height, x2 / width, y2 / height))
    return torch.tensor(rows, dtype=torch.float64).view(-1, 4)


def shown(trajectory: Trajectory) -> Tensor:
    """(N, 4) boxes of the crops that a trajectory was shown, in shares of their image."""
    regions = [turn.region for turn in trajectory.turns if turn.crop is not None and turn.region is not None]
    return shares(trajectory.sample, regions)


def coverage(boxes: Tensor, grid: int = GRID) -> Tensor:
    """How often each cell of an image lies in a box.

    Args:
        boxes: (N, 4) xyxy in [0, 1].
        grid: cells a side.

    Returns:
        (grid, grid), rows from the top: the mean over boxes of the share of the cell that a box covers; 0 without any.
    """
    if not len(boxes):
        return torch.zeros(grid, grid, dtype=torch.float64)
    edges = torch.arange(grid + 1, dtype=torch.float64) / grid
    start, stop = boxes[:, :2, None], boxes[:, 2:, None]
    overlap = (torch.minimum(stop, edges[1:]) - torch.maximum(start, edges[:-1])).clamp(min=0) * grid  # (N, 2, grid)
    return torch.einsum("nx,ny->yx", overlap[:, 0], overlap[:, 1]) / len(boxes)


def draw_map(boxes: Tensor, title: str) -> Image.Image:
    """A map of `coverage` with its scale, `SIDE` pixels wide."""
    values = coverage(boxes)
    top = float(values.max())
    picture = Image.fromarray(colours(values / top if top else values).numpy())
    picture = picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    ramp = colours(torch.linspace(0, 1, SIDE)[None]).repeat(12, 1, 1)
    legend = f"black: in none of them   white: in {top:.0%}"
    return stack(
        [
            paragraph([(title, INK), (f"   {len(boxes)}", MUTED)], SIDE, 17),
            picture,
            Image.fromarray(ramp.numpy()),
            paragraph([(legend, MUTED)], SIDE, 13),
        ],
        SIDE,
        6,
    )


def draw_looks(looked: Tensor, annotated: Tensor) -> Image.Image:
    """Where a policy looked, and beside it what is annotated if anything is.

    Args:
        looked: (N, 4) boxes in shares of their image.
        annotated: (M, 4) likewise.
    """
    picture = draw_map(looked, "crops shown")
    if len(annotated):
        picture = beside(picture, draw_map(annotated, "annotated regions"), 28)
    return page([picture], picture.width + 2 * MARGIN)


def colours(values: Tensor) -> Tensor:
    """(H, W, 3) uint8 of (H, W) in [0, 1]; linear between `SHADES`."""
    table = torch.tensor(SHADES, dtype=torch.float64)
    place = values.double().clamp(0, 1) * (len(table) - 1)
    low = place.floor().long().clamp(max=len(table) - 2)
    part = (place - low)[..., None]
    return (table[low] * (1 - part) + table[low + 1] * part).round().byte()
