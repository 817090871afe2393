"""What is measured of trajectories, in training and in evaluation, under the same names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from modules.functional.boxes import iou
from modules.trajectory import Region, Trajectory, Turn

MEASURED = (
    "zoom_rate",
    "crops",
    "crop_area",
    "zoom_factor",
    "zoom_chosen",
    "whole_image",
    "duplicates",
    "invalid",
    "faults",
    "refused_context",
    "turns",
    "tokens",
    "truncated",
    "iou",
)


def measure(trajectory: Trajectory) -> dict[str, float]:
    """Numbers of one trajectory; NaN where one does not apply.

    ``zoom_rate`` 1 if it was shown a crop; ``crops``; ``crop_area`` mean share of the image that its
    crops cover; ``zoom_factor`` mean factor by which they are enlarged, as shown (both sides' geometric mean);
    ``zoom_chosen`` share of its crops whose factor it chose itself; ``whole_image`` share of its crops that
    cover 90% or more; ``duplicates`` share of its crops whose IoU with an earlier one is above 0.9;
    ``invalid`` share of its requests that were refused;
    ``faults`` refused boxes; ``refused_context`` those of them whose crop did not fit into the context;
    ``turns``; ``tokens`` that it wrote; ``truncated``; ``iou`` of the last region that it looked at with the
    best annotated one (0 if it looked nowhere, NaN if nothing is annotated).
    """
    shown = [turn.region for turn in trajectory.turns if turn.crop is not None and turn.region is not None]
    areas = [_share(trajectory, region) for region in shown]
    factors = [enlargement(turn) for turn in trajectory.turns if turn.crop is not None and turn.region is not None]
    requests = [turn for turn in trajectory.turns if turn.region is not None or turn.fault is not None]
    faults = sum(turn.fault is not None for turn in requests)
    return {
        "zoom_rate": float(bool(shown)),
        "crops": float(len(shown)),
        "crop_area": sum(areas) / len(areas) if areas else math.nan,
        "zoom_factor": sum(factors) / len(factors) if factors else math.nan,
        "zoom_chosen": sum(r.zoom is not None for r in shown) / len(shown) if shown else math.nan,
        "whole_image": sum(a >= 0.9 for a in areas) / len(areas) if areas else math.nan,
        "duplicates": duplicates(shown) / len(shown) if shown else math.nan,
        "invalid": faults / len(requests) if requests else math.nan,
        "faults": float(faults),
        "refused_context": float(sum(turn.fault == "context" for turn in trajectory.turns)),
        "turns": float(len(trajectory.turns)),
        "tokens": float(trajectory.sampled.sum()),
        "truncated": float(trajectory.stop.truncated),
        "iou": last_iou(shown, trajectory.sample.regions),
    }


def enlargement(turn: Turn) -> float:
    """Pixels that a crop was shown in, over the original pixels of its region, as a factor of each side."""
    assert turn.crop is not None
    assert turn.region is not None
    x1, y1, x2, y2 = turn.region.box
    return math.sqrt(turn.crop.pixels.shape[-2] * turn.crop.pixels.shape[-1] / ((x2 - x1) * (y2 - y1)))


def last_iou(shown: list[Region], annotated: tuple[Region, ...]) -> float:
    """IoU of the last of ``shown`` with the best of ``annotated`` on the same image."""
    if not annotated:
        return math.nan
    if not shown:
        return 0.0
    same = [r.box for r in annotated if r.image == shown[-1].image]
    if not same:
        return 0.0
    looked = torch.tensor([shown[-1].box] * len(same), dtype=torch.float32)
    return float(iou(looked, torch.tensor(same, dtype=torch.float32)).max())


def duplicates(shown: Sequence[Region]) -> int:
    """How many regions nearly equal (IoU above 0.9) an earlier one of the same image."""
    count = 0
    for k, region in enumerate(shown):
        earlier = [r.box for r in shown[:k] if r.image == region.image]
        again = torch.tensor([region.box] * len(earlier), dtype=torch.float32).view(-1, 4)
        count += bool((iou(again, torch.tensor(earlier, dtype=torch.float32).view(-1, 4)) > 0.9).any())
    return count


class Tally:
    """Means over everything that was counted, on all ranks; NaN is not counted.

    Names are fixed from the start, so that ranks with nothing to count have as much to add up as the others.

    Args:
        names: of the numbers.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.sums = torch.zeros(2, len(self.names), dtype=torch.float32)  # values, counts

    def add(self, rows: Iterable[Mapping[str, float]]) -> Tally:
        """Count rows of numbers by name."""
        table = torch.tensor([[row[name] for name in self.names] for row in rows], dtype=torch.float32)
        if len(table):
            self.sums += torch.stack([table.nansum(0), (~table.isnan()).sum(0)])
        return self

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """By name; names that were never counted are left out.

        Args:
            reduce: adds up (2, N) sums over ranks.
        """
        values, counts = reduce(self.sums).tolist()
        return {name: v / n for name, v, n in zip(self.names, values, counts, strict=True) if n}


def _share(trajectory: Trajectory, region: Region) -> float:
    x1, y1, x2, y2 = region.box
    height, width = trajectory.sample.images[region.image].shape[-2:]
    return (x2 - x1) * (y2 - y1) / (height * width)
