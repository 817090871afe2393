"""Groups of a policy's own trajectories, rewards to learn from, and one iteration of R-GRPO on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from callbacks.rollout import RolloutCallback
from modules.backbones.timm_lm import TimmLMBackbone
from modules.engine import Decoding, GroupSampler, LocalEngine
from modules.rewards import Reward
from modules.rgrpo import Objective, RGRPOModule
from modules.trajectory import Group, SampleBatch, Trajectory
from tests.conftest import make_samples
from tests.fitting import fit, fresh, weights

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.AdamW, lr=3e-3)
LIMITS: dict[str, int] = {"max_turns": 3, "max_turn_tokens": 10}


class Writes(Reward):
    """Pays for one token, whatever was asked."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def __call__(self, trajectory: Trajectory) -> float:
        return float((trajectory.completion_ids[trajectory.sampled] == self.token).any())


class Wordiness(Reward):
    """Differs between nearly all trajectories."""

    def __call__(self, trajectory: Trajectory) -> float:
        return float(trajectory.sampled.sum()) + float(trajectory.log_probs.sum()) / 100


def rolled(reward: Reward | None = None, group: int = 4, **decoding: Any) -> RolloutCallback:
    return RolloutCallback(
        sampler=GroupSampler(group), rewards={"reward": reward or Wordiness()}, decoding=Decoding(**LIMITS, **decoding)
    )


def groups(
    backbone: TimmLMBackbone, totals: Sequence[Sequence[float]], temperature: float = 1.0, std: bool = True
) -> list[Group]:
    """Groups of the policy's own trajectories, one a row, with these rewards."""
    size = len(totals[0])
    samples = make_samples(len(totals))
    requests = GroupSampler(size).requests(samples, seed=11)
    played = LocalEngine().rollout(backbone, requests, Decoding(temperature, **LIMITS))
    made = []
    for n, (sample, row) in enumerate(zip(samples, totals, strict=True)):
        values = torch.tensor(row)
        deviations = values - values.mean()
        advantages = deviations / (values.std() + 1e-4) if std else deviations
        advantages = advantages if deviations.any() else torch.zeros(size)
        made.append(Group(sample, tuple(played[n * size : (n + 1) * size]), {}, values, advantages))
    return made


def permuted(group: Group, order: list[int]) -> Group:
    """The group with its members in another order."""
    return replace(
        group,
        trajectories=tuple(group.trajectories[k] for k in order),
        totals=group.totals[order],
        advantages=group.advantages[order],
    )


TOTALS = [[0.0, 1.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 1.0]]


def step(
    backbone: TimmLMBackbone, made: list[Group], objective: Objective = Objective(), **options: Any
) -> dict[str, Tensor]:
    """The weights after one iteration of plain gradient descent."""
    module = RGRPOModule(fresh(backbone), **{"optimizer": SGD, "clip_norm": 1e9, "objective": objective, **options})
    fit(module, [SampleBatch([g.sample for g in made], groups=made)])
    return weights(module.backbone)
