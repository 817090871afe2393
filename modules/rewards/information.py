"""Rewards that ask the policy itself what its crops told it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from modules.counterfactual import Replacement, likelihood_gaps
from modules.policy import PolicyError, PolicyModule
from modules.rewards.base import Reward
from modules.trajectory import Trajectory


class InformationGain(Reward):
    """Log-likelihood (nats) of the right answer with the crops minus with others in their place.

    Two more passes over every trajectory that looked. 0 where nothing was looked at; NaN where no answer is known
    and where ``swap`` finds no second image.

    Args:
        instead: what is shown in place of the crops; see `modules.counterfactual.replace_crops`.
        cap: largest gain or loss that counts.
        weight: see `Reward`.
        requires: see `Reward`.
    """

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

    def batch(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """See `Reward.batch`."""
        if self.policy is None:
            raise PolicyError("Expected `setup` to have named the policy that InformationGain asks, but it has not.")
        policy = self.policy
        was_training = policy.backbone.training
        policy.backbone.eval()
        size = policy.micro_batch or max(len(trajectories), 1)
        try:
            gaps = likelihood_gaps(
                policy.backbone, trajectories, self.instead, size, policy.row_tokens, policy.head_chunk
            ).tolist()
        finally:
            policy.backbone.train(was_training)
        return [self._value(t, gap) for t, gap in zip(trajectories, gaps, strict=True)]

    def _value(self, trajectory: Trajectory, gap: float) -> float:
        looked = any(turn.crop is not None for turn in trajectory.turns)
        if trajectory.sample.answers and not looked:
            return 0.0
        return gap if math.isnan(gap) else min(max(gap, -self.cap), self.cap)
