"""Callbacks of a benchmark: take turns with something else within one run, and see what was rolled out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L

from modules.trajectory import SampleBatch


class Alternating(L.Callback):
    """Runs the other side before every batch of a fit, and times both.

    Ours is everything from there to the next batch: rollout, update, what every other callback does, logging, loading
    of data. It has to stand first among the callbacks.

    Args:
        other: one step of the other side.
        warm_up: how many steps of each side are run first, and not counted.
        together: how many steps make one figure: as many as lie between two logs, where logs are part of a run's cost.
    """

    def __init__(self, other: Callable[[], object], warm_up: int = 1, together: int = 1) -> None:
        self.other = other
        self.warm_up = warm_up
        self.together = together
        self.laps: dict[str, list[float]] = {"ours": [], "other": []}
        self._started: float | None = None

    @property
    def seconds(self) -> dict[str, list[float]]:
        """Of each side, ``ours`` and ``other``, the mean seconds of each ``together`` steps that count."""
        found = {}
        for side, laps in self.laps.items():
            starts = range(self.warm_up, len(laps) - self.together + 1, self.together)
            found[side] = [sum(laps[k : k + self.together]) / self.together for k in starts]
        return found

    def on_train_batch_start(self, *_: Any) -> None:
        """Our step before has ended; the other side's turn."""
        self._end()
        start = time.perf_counter()
        self.other()
        self._started = time.perf_counter()
        self.laps["other"].append(self._started - start)

    def on_train_end(self, *_: Any) -> None:
        """Our last step has ended."""
        self._end()

    def _end(self) -> None:
        if self._started is not None:
            self.laps["ours"].append(time.perf_counter() - self._started)
        self._started = None


class RolledOut(L.Callback):
    """What each batch's trajectories came to."""

    def __init__(self) -> None:
        self.trajectories: list[int] = []
        self.crops: list[float] = []  # a trajectory
        self.sampled: list[float] = []  # tokens a trajectory

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: SampleBatch, batch_idx: int
    ) -> None:
        """Count."""
        rolled = [t for group in batch.groups for t in group.trajectories]
        self.trajectories.append(len(rolled))
        self.crops.append(statistics.mean(sum(turn.crop is not None for turn in t.turns) for t in rolled))
        self.sampled.append(statistics.mean(int(t.sampled.sum()) for t in rolled))
