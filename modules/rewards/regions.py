"""Rewards of where the policy looked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from modules.functional.boxes import iou
from modules.rewards.base import Reward
from modules.rewards.turns import TurnReward
from modules.trajectory import Region, Sample, Trajectory


def looks(trajectory: Trajectory) -> list[Region]:
    """The regions that the policy was shown, in order."""
    return [turn.region for turn in trajectory.turns if turn.crop is not None and turn.region is not None]


def best_iou(region: Region, others: Sequence[Region]) -> float:
    """The largest IoU of a region with others of the same image; 0 if there are none."""
    same = [other.box for other in others if other.image == region.image]
    if not same:
        return 0.0
    boxes = torch.tensor([region.box] * len(same), dtype=torch.float64)
    return float(iou(boxes, torch.tensor(same, dtype=torch.float64)).max())


class RegionValidity(TurnReward):
    """1 if the policy looked somewhere valid; of a turn, 1 if its box is valid, 0 if it is not or was refused.

    The environment refuses boxes of the wrong arity, order or bounds. What more a valid box has to be is said here;
    by default nothing, as in the presets.

    Args:
        rule: ``any_valid``: at least one valid box was shown (the paper's 0.5 a valid box, at most 0.5);
            ``all_valid``: at least one, and none was refused or is not valid (the authors' code, which asks only
            that they parse; ours asks for order and bounds too).
        min_side: original pixels that the shorter side has at least.
        min_area: share of the image that it covers at least.
        max_area: share of the image that it covers at most; below 1, the whole image is no region.
        max_overlap: IoU with an earlier one at most; below 1, the same box does not count twice.
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def __init__(
        self,
        rule: Literal["any_valid", "all_valid"] = "any_valid",
        min_side: float = 0.0,
        min_area: float = 0.0,
        max_area: float = 1.0,
        max_overlap: float = 1.0,
        weight: float = 1.0,
        requires: str | None = None,
    ) -> None:
        super().__init__(weight, requires)
        if not min_side >= 0:
            raise ValueError(f"Expected `min_side` to be at least 0, but got {min_side}.")
        if not 0 <= min_area < max_area <= 1:
            raise ValueError(f"Expected 0 <= `min_area` < `max_area` <= 1, but got {min_area} and {max_area}.")
        if not 0 <= max_overlap <= 1:
            raise ValueError(f"Expected `max_overlap` to be from 0 to 1, but got {max_overlap}.")
        self.rule = rule
        self.min_side, self.min_area, self.max_area, self.max_overlap = min_side, min_area, max_area, max_overlap

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        valid = [value for value in self.turns(trajectory) if not math.isnan(value)]
        return float(any(valid) if self.rule == "any_valid" else bool(valid) and all(valid))

    def turns(self, trajectory: Trajectory) -> list[float]:
        """See `TurnReward`."""
        values: list[float] = []
        earlier: list[Region] = []
        for turn in trajectory.turns:
            if turn.crop is not None and turn.region is not None:
                values.append(float(self._valid(turn.region, earlier, trajectory.sample)))
                earlier.append(turn.region)
            else:  # the environment refused it, or was not asked, or ended there
                values.append(math.nan if turn.fault is None else 0.0)
        return values

    def _valid(self, region: Region, earlier: Sequence[Region], sample: Sample) -> bool:
        x1, y1, x2, y2 = region.box
        height, width = sample.images[region.image].shape[-2:]
        share = (x2 - x1) * (y2 - y1) / (height * width)
        large_enough = min(x2 - x1, y2 - y1) >= self.min_side and share >= self.min_area
        # a box of the whole image may come out a rounding above it
        return large_enough and share <= self.max_area + 1e-9 and best_iou(region, earlier) <= self.max_overlap + 1e-9


class IoU(TurnReward):
    """How well the regions that the policy looked at match the annotated ones; NaN where none is annotated.

    Each look counts with the annotated region that it matches best, and is the value of its turn; without a look it
    is 0.

    Args:
        of: ``best``: the best look; ``mean``: the mean over the looks; ``last``: the last one.
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def __init__(
        self, of: Literal["best", "mean", "last"] = "best", weight: float = 1.0, requires: str | None = None
    ) -> None:
        super().__init__(weight, requires)
        self.of = of

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        if not trajectory.sample.regions:
            return math.nan
        values = [value for value in self.turns(trajectory) if not math.isnan(value)]
        if not values:
            return 0.0
        return {"best": max(values), "mean": sum(values) / len(values), "last": values[-1]}[self.of]

    def turns(self, trajectory: Trajectory) -> list[float]:
        """See `TurnReward`."""
        annotated = trajectory.sample.regions
        return [
            best_iou(turn.region, annotated) if annotated and turn.crop is not None and turn.region else math.nan
            for turn in trajectory.turns
        ]


class CropCost(Reward):
    """Minus the number of crops that the policy was shown; the weight is what one costs."""

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        return -float(len(looks(trajectory)))
