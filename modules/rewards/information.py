"""Rewards that ask the policy itself what its crops told it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from modules.counterfactual import Replacement, likelihood_gaps, look_gaps, reasoning_gaps
from modules.policy import PolicyError, PolicyModule
from modules.rewards.turns import TurnReward
from modules.trajectory import Trajectory

T = TypeVar("T")


class _Counterfactual(TurnReward):
    """What the policy makes of its crops, and of others in their place."""

    def __init__(
        self, instead: Replacement = "blank", cap: float = 5.0, weight: float = 1.0, requires: str | None = None
    ) -> None:
        super().__init__(weight, requires)
        if not cap > 0:
            raise ValueError(f"Expected `cap` to be above 0, but got {cap}.")
        self.instead = instead
        self.cap = cap
        self.policy: PolicyModule | None = None

    def setup(self, policy: PolicyModule) -> None:
        """Remember whom to ask."""
        self.policy = policy

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        return self.batch([trajectory])[0]

    def turns(self, trajectory: Trajectory) -> list[float]:
        """See `TurnReward`."""
        ((_, turns),) = self.batch_turns([trajectory])
        return turns

    def _ask(self, gaps: Callable[..., T], trajectories: Sequence[Trajectory]) -> T:
        """What one of the functions of `modules.counterfactual` says."""
        if self.policy is None:
            name = type(self).__name__
            raise PolicyError(f"Expected `setup` to have named the policy that {name} asks, but it has not.")
        policy = self.policy
        size = policy.micro_batch or max(len(trajectories), 1)
        with _evaluating(policy):
            return gaps(policy.backbone, trajectories, self.instead, size, policy.row_tokens, policy.head_chunk)

    def _capped(self, gap: float) -> float:
        return gap if math.isnan(gap) else min(max(gap, -self.cap), self.cap)


class InformationGain(_Counterfactual):
    """Log-likelihood (nats) of the right answer with the crops minus with others in their place.

    Two more passes over every trajectory that looked. 0 where nothing was looked at; NaN where no answer is known
    and where ``swap`` finds no second image. Of a turn that was shown a crop: the same with that crop alone replaced,
    which for a trajectory with one crop is the trajectory's value; two or more take a pass for each and one.

    Args:
        instead: what is shown in place of the crops; see `modules.counterfactual.replace_crops`.
        cap: largest gain or loss that counts, of a trajectory and of a turn.
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def batch(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """See `Reward.batch`."""
        gaps = self._ask(likelihood_gaps, trajectories).tolist()
        return [self._value(t, gap) for t, gap in zip(trajectories, gaps, strict=True)]

    def batch_turns(self, trajectories: Sequence[Trajectory]) -> list[tuple[float, list[float]]]:
        """See `TurnReward`."""
        values = self.batch(trajectories)
        found = []
        for t, value, alone in zip(trajectories, values, self._ask(look_gaps, trajectories), strict=True):
            shown = [turn.crop is not None for turn in t.turns]
            only = [value if yes else math.nan for yes in shown]
            found.append((value, [self._capped(gap) for gap in alone] if sum(shown) > 1 else only))
        return found

    def _value(self, trajectory: Trajectory, gap: float) -> float:
        looked = any(turn.crop is not None for turn in trajectory.turns)
        if trajectory.sample.answers and not looked:
            return 0.0
        return self._capped(gap)


class Integration(_Counterfactual):
    """How much likelier (nats a token) the policy's reasoning behind the crops is with them than with others instead.

    Its text behind the first crop: neither boxes nor the answer span. 0 where nothing was looked at or nothing was
    reasoned afterwards; NaN where ``swap`` finds no second image. Of a turn: the same over the text of that turn, so
    that who is credited is who wrote it, and the trajectory's value is the mean over the turns, by tokens. Two more
    passes over every trajectory that reasoned behind a crop, and none for its turns.

    Args:
        instead: what is shown in place of the crops; see `modules.counterfactual.replace_crops`.
        cap: largest gain or loss that counts, of a trajectory and of a turn.
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def __init__(
        self, instead: Replacement = "blank", cap: float = 1.0, weight: float = 1.0, requires: str | None = None
    ) -> None:
        super().__init__(instead, cap, weight, requires)

    def batch(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """See `Reward.batch`."""
        return [value for value, _ in self.batch_turns(trajectories)]

    def batch_turns(self, trajectories: Sequence[Trajectory]) -> list[tuple[float, list[float]]]:
        """See `TurnReward`."""
        found = []
        for turns in self._ask(reasoning_gaps, trajectories):
            gap, tokens = sum(gap for gap, _ in turns), sum(n for _, n in turns)
            each = [self._capped(gap / n) if n else math.nan for gap, n in turns]
            found.append((self._capped(gap / tokens) if tokens else 0.0, each))
        return found


@contextmanager
def _evaluating(policy: PolicyModule) -> Iterator[None]:
    """Without dropout, as the sampler."""
    was_training = policy.backbone.training
    policy.backbone.eval()
    try:
        yield
    finally:
        policy.backbone.train(was_training)
