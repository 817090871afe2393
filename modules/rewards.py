"""Rewards: named objects, each with a weight and a gate, swapped by config and logged alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from modules.functional import grammar
from modules.functional.answers import matches
from modules.trajectory import Trajectory


class Reward(ABC):
    """One component.

    Args:
        weight: of the component in the sum.
        requires: name of another component; this one pays only where that one is above zero.
    """

    def __init__(self, weight: float = 1.0, requires: str | None = None) -> None:
        self.weight = weight
        self.requires = requires

    @abstractmethod
    def __call__(self, trajectory: Trajectory) -> float:
        """The unweighted value; NaN where it could not be judged (excluded, never scored)."""


class Accuracy(Reward):
    """1 if the last answer matches one of the sample's answers, else 0; NaN where none is known."""

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        sample = trajectory.sample
        if not sample.answers:
            return math.nan  # unknown is not wrong
        return float(trajectory.answer is not None and matches(trajectory.answer, sample.answers, sample.choices))


class Format(Reward):
    """1 if the text has the form asked for.

    Args:
        form: ``tags``: thinking and answer tags in order, once each (paper); ``final_answer``: the
            text ends in exactly one answer span (the authors' code).
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def __init__(
        self, form: Literal["tags", "final_answer"] = "tags", weight: float = 1.0, requires: str | None = None
    ) -> None:
        super().__init__(weight, requires)
        self.form = form

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        check = grammar.well_formed if self.form == "tags" else grammar.ends_in_one_answer
        return float(check(trajectory.text))


class RegionValidity(Reward):
    """1 if the policy looked somewhere valid.

    Args:
        rule: ``any_valid``: at least one box was shown (the paper's 0.5 a valid box, at most 0.5);
            ``all_valid``: at least one, and none was refused (the authors' code, which asks only
            that they parse; ours asks for order and bounds too).
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def __init__(
        self,
        rule: Literal["any_valid", "all_valid"] = "any_valid",
        weight: float = 1.0,
        requires: str | None = None,
    ) -> None:
        super().__init__(weight, requires)
        self.rule = rule

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        refused = any(turn.fault is not None for turn in trajectory.turns)
        shown = any(turn.crop is not None for turn in trajectory.turns)
        return float(shown and not (refused and self.rule == "all_valid"))


class Length(Reward):
    """Pays for characters of reasoning, up to a cap.

    Args:
        per_character: 0.001 in the paper, 0.01 in the authors' code.
        cap: 0.25 in the paper, 0.10 in the authors' code.
        of: ``text``: all that was written (paper); ``shortest_segment``: the shortest piece of text
            between boxes (code).
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def __init__(
        self,
        per_character: float,
        cap: float,
        of: Literal["text", "shortest_segment"] = "text",
        weight: float = 1.0,
        requires: str | None = None,
    ) -> None:
        super().__init__(weight, requires)
        self.per_character, self.cap, self.of = per_character, cap, of

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        text = trajectory.text
        segments = [text] if self.of == "text" else grammar.segments_between_boxes(text)
        return min(self.per_character * min(map(len, segments), default=0), self.cap)


RESERVED = frozenset({"total", "failed", "group_std"})  # curves beside those of the components


def check_gates(rewards: Mapping[str, Reward]) -> None:
    """Raise ValueError if a component requires one that is not there."""
    for name, reward in rewards.items():
        if name in RESERVED:
            raise ValueError(
                f"Expected `rewards` to have names of their own, but got {name!r}, which names a statistic."
            )
        if reward.requires is not None and reward.requires not in rewards:
            raise ValueError(
                f"Expected `rewards.{name}.requires` to be one of {sorted(rewards)}, but got {reward.requires!r}."
            )


def score(rewards: Mapping[str, Reward], trajectories: Sequence[Trajectory]) -> tuple[dict[str, Tensor], Tensor]:
    """Judge trajectories.

    Returns:
        components: name -> (N,) float32, unweighted and not gated.
        totals: (N,) float32, ``sum of weight * value`` over the components whose gate is open; NaN
            where a component that counts could not be judged.
    """
    components = {
        name: torch.tensor([float(reward(t)) for t in trajectories], dtype=torch.float32)
        for name, reward in rewards.items()
    }
    totals = torch.zeros(len(trajectories))
    for name, reward in rewards.items():
        if reward.weight == 0:  # watched only: 0 * NaN would be NaN
            continue
        paid = reward.weight * components[name]
        if reward.requires is not None:
            gate = components[reward.requires]
            paid = torch.where(gate.isnan(), math.nan, torch.where(gate > 0, paid, 0.0))
        totals = totals + paid
    return components, totals
