"""Whether the answer is right, by kind of answer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

from modules.functional.graders import Kind, grade, kind_of
from modules.policy import PolicyModule
from modules.rewards.base import Reward
from modules.rewards.judge import Judge
from modules.rewards.mathematics import WORKER, MathWorkerError, check_installed
from modules.trajectory import Sample, Trajectory

logger = logging.getLogger(__name__)


class Accuracy(Reward):
    """How right the last answer is, 0 to 1; NaN where no right answer is known.

    How it is compared is said by the first of these that says it: ``by_source`` for the sample's data set, the
    sample's own ``answer_kind``, ``kind``.

    Args:
        kind: how answers are compared; ``auto`` decides by the sample, see `modules.functional.graders.kind_of`.
        by_source: kinds of the samples of some data sets, by their `source`, whose case does not count.
        tolerance: of ``number``, relative to the right answer; 0.05 is ChartQA's.
        threshold: of ``anls``, below which a similarity is 0.
        judge: asked about answers that are not right by these rules, unless their source is in ``by_source``: its
            verdict then counts, and where it fails the answer is unjudged. Its own weight and gate do not act here.
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def __init__(
        self,
        kind: Literal["auto", "choice", "exact", "vqa", "anls", "number", "math", "list", "yesno"] = "auto",
        by_source: dict[str, Kind] | None = None,
        tolerance: float = 0.05,
        threshold: float = 0.5,
        judge: Judge | None = None,
        weight: float = 1.0,
        requires: str | None = None,
    ) -> None:
        super().__init__(weight, requires)
        if not tolerance >= 0:
            raise ValueError(f"Expected `tolerance` to be at least 0, but got {tolerance}.")
        if not 0 <= threshold <= 1:
            raise ValueError(f"Expected `threshold` to be from 0 to 1, but got {threshold}.")
        self.kind = kind
        self.by_source: Mapping[str, Kind] = {name.lower(): chosen for name, chosen in (by_source or {}).items()}
        self.tolerance, self.threshold, self.judge = tolerance, threshold, judge

    def setup(self, policy: PolicyModule) -> None:
        """See `Reward`."""
        if self.kind in ("auto", "math") or "math" in self.by_source.values():
            check_installed()
        if self.judge is not None:
            self.judge.setup(policy)

    def kind_of(self, sample: Sample) -> Kind:
        """How the answers of a sample are compared."""
        chosen = self.by_source.get(sample.source.lower()) or sample.answer_kind
        if chosen is not None:
            return cast(Kind, chosen)
        return kind_of(sample.source, sample.answers, sample.choices) if self.kind == "auto" else self.kind

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        return self.batch([trajectory])[0]

    def batch(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """See `Reward`."""
        values = [self._by_rule(trajectory) for trajectory in trajectories]
        if self.judge is None:
            return values
        asked = [k for k, value in enumerate(values) if value < 1 and self._open_to_judgement(trajectories[k])]
        for k, verdict in zip(asked, self.judge.batch([trajectories[k] for k in asked]), strict=True):
            values[k] = verdict
        return values

    def _by_rule(self, trajectory: Trajectory) -> float:
        sample, said = trajectory.sample, trajectory.answer
        if not sample.answers:
            return math.nan  # unknown is not wrong
        if said is None:
            return 0.0
        kind = self.kind_of(sample)
        if kind == "math":
            return _by_algebra(said, sample.answers)
        return grade(kind, said, sample.answers, sample.choices, self.tolerance, self.threshold)

    def _open_to_judgement(self, trajectory: Trajectory) -> bool:
        return bool(trajectory.answer) and trajectory.sample.source.lower() not in self.by_source


def _by_algebra(said: str, answers: Sequence[str]) -> float:
    """1 if math-verify finds one of the answers equal, else 0; NaN if it does not run."""
    try:
        return float(any(WORKER.equal(said, answer) for answer in answers))
    except (MathWorkerError, OSError) as error:  # OSError: no memory or file handle for another process
        logger.warning("a mathematical answer goes unjudged: %s", error)
        return math.nan
