"""Rewards that belong to turns, so that the tokens of a turn can be credited with what that turn did."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modules.rewards.base import Reward, as_many, guarded, judged, number, paid, summed
from modules.trajectory import Trajectory, TurnPay


class TurnReward(Reward):
    """A component that has a value for each turn; see `Reward` for the arguments.

    With ``objective.credit: trajectory`` only its value of the trajectory counts, as that of any other reward.
    """

    @abstractmethod
    def turns(self, trajectory: Trajectory) -> list[float]:
        """The unweighted value of each turn, in order; NaN where a turn did nothing that this reward is about."""

    def __call__(self, trajectory: Trajectory) -> float:
        """The mean over the turns that have a value; 0 if none has."""
        return mean_known(self.turns(trajectory))

    def batch_turns(self, trajectories: Sequence[Trajectory]) -> list[tuple[float, list[float]]]:
        """The value of each trajectory with those of its turns: for rewards that are faster at many, or at both."""
        return [(self(trajectory), self.turns(trajectory)) for trajectory in trajectories]


def mean_known(values: Sequence[float]) -> float:
    """The mean of those that are not NaN; 0 if all are."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else 0.0


def credited_by_turn(rewards: Mapping[str, Reward]) -> list[str]:
    """Names of the turn rewards that have a weight."""
    return [name for name, reward in rewards.items() if isinstance(reward, TurnReward) and reward.weight]


def score_turns(
    rewards: Mapping[str, Reward], trajectories: Sequence[Trajectory]
) -> tuple[dict[str, Tensor], Tensor, TurnPay]:
    """Judge trajectories and their turns; see `score`, whose components and totals these are.

    A turn reward whose turns cannot be judged fails as a whole there.

    Returns:
        components, totals: as `score`.
        pay: of the turn rewards that have a weight, over all N trajectories and as many turns as the longest has.
    """
    names, most = credited_by_turn(rewards), max((len(t.turns) for t in trajectories), default=0)
    components, turns = {}, {}
    for name, reward in rewards.items():
        if name in names:
            assert isinstance(reward, TurnReward)
            found = _judged(name, reward, trajectories)
            components[name] = torch.tensor([value for value, _ in found], dtype=torch.float32)
            rows = [[*own, *[math.nan] * (most - len(own))] for _, own in found]
            turns[name] = torch.tensor(rows, dtype=torch.float32).view(len(trajectories), most)
        else:
            components[name] = torch.tensor(judged(name, reward, trajectories), dtype=torch.float32)
    whole = [paid(rewards[name], components[name], components) for name in names]
    # a gate that is closed pays a turn nothing, but does not give one a value that has none
    each = [paid(rewards[name], turns[name], components).where(~turns[name].isnan(), math.nan) for name in names]
    pay = TurnPay(
        whole=torch.stack(whole) if names else torch.zeros(0, len(trajectories)),
        turns=torch.stack(each) if names else torch.zeros(0, len(trajectories), most),
    )
    return components, summed(rewards, components, len(trajectories)), pay


def _judged(name: str, reward: TurnReward, trajectories: Sequence[Trajectory]) -> list[tuple[float, list[float]]]:
    """What a turn reward says of each trajectory and its turns; NaN where it fails."""
    failed = [(math.nan, [math.nan] * len(t.turns)) for t in trajectories]

    def checked(trajectory: Trajectory, value: object, turns: object) -> tuple[float, list[float]]:
        own = as_many(turns, len(trajectory.turns), "turns")
        return number(value), [number(v) for v in own]

    if type(reward).batch_turns is TurnReward.batch_turns:  # one by one, so that one failure is one trajectory's
        return [
            guarded(name, lambda t=t: checked(t, reward(t), reward.turns(t)), nothing)  # type: ignore[misc]
            for t, nothing in zip(trajectories, failed, strict=True)
        ]
    pairs = guarded(name, lambda: as_many(reward.batch_turns(trajectories), len(trajectories), "batch_turns"), failed)
    return [
        guarded(name, lambda t=t, pair=pair: checked(t, *pair), nothing)  # type: ignore[misc]
        for t, pair, nothing in zip(trajectories, pairs, failed, strict=True)
    ]
