"""What a reward is, and how the named components add up."""

from __future__ import annotations

import logging
import math
import numbers
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from modules.policy import PolicyError, PolicyModule
from modules.trajectory import Trajectory

T = TypeVar("T")
logger = logging.getLogger(__name__)

RESERVED = frozenset({"total", "failed", "group_std", "penalised"})  # curves beside those of the components
_LARGEST = torch.finfo(torch.float32).max
_REPORTED: set[tuple[str, str]] = set()  # failures are named once each, and counted always


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

    def batch(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """The values of many trajectories, in their order: for rewards that are faster at many at once."""
        return [self(trajectory) for trajectory in trajectories]

    def setup(self, policy: PolicyModule) -> None:  # noqa: B027  # most need nothing
        """Called once before the first rollout that is judged: say what is missing before anything is spent.

        Args:
            policy: whose trajectories are judged, for rewards that ask it.

        Raises:
            PolicyError: if the reward cannot be computed here.
        """


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

    A component that raises, or gives anything but a finite number, is named in the log (once for each way of failing)
    and is NaN there: its trajectory is left out wherever it counts.

    Returns:
        components: name -> (N,) float32, unweighted and not gated; NaN where one could not be judged.
        totals: (N,) float32, ``sum of weight * value`` over the components whose gate is open; NaN
            where a component that counts could not be judged.
    """
    components = {
        name: torch.tensor(judged(name, reward, trajectories), dtype=torch.float32) for name, reward in rewards.items()
    }
    return components, summed(rewards, components, len(trajectories))


def summed(rewards: Mapping[str, Reward], components: Mapping[str, Tensor], count: int) -> Tensor:
    """(N,) the totals of the components of ``count`` trajectories; see `score`."""
    totals = torch.zeros(count)
    for name, reward in rewards.items():
        if reward.weight != 0:  # watched only: 0 * NaN would be NaN
            totals = totals + paid(reward, components[name], components)
    return totals


def paid(reward: Reward, values: Tensor, components: Mapping[str, Tensor]) -> Tensor:
    """What a reward pays for values (N, ...): weighted, 0 where its gate is closed, NaN where the gate is."""
    pays = reward.weight * values
    if reward.requires is None:
        return pays
    gate = components[reward.requires].view(-1, *[1] * (values.dim() - 1))
    return torch.where(gate.isnan(), math.nan, torch.where(gate > 0, pays, 0.0))


def check_failures(
    rewards: Mapping[str, Reward], components: Mapping[str, Tensor], totals: Tensor, most: float
) -> None:
    """Raise PolicyError if more than a share of the trajectories could not be judged.

    Args:
        rewards: by name; the sentence leaves out those that are only watched.
        components: name -> (N,), as `score` gives them.
        totals: (N,), NaN where a trajectory could not be judged.
        most: largest share that is put up with.
    """
    failed = float(totals.isnan().float().mean())
    if failed > most:
        gates = {reward.requires for reward in rewards.values() if reward.weight != 0}
        counts = {
            name: int(components[name].isnan().sum()) for name in rewards if rewards[name].weight or name in gates
        }
        raise PolicyError(
            f"Expected at most {most:.0%} of the trajectories to go unjudged (`rollout.max_failed`), "
            f"but got {failed:.0%} of {len(totals)}: {', '.join(f'{name} {n}' for name, n in counts.items() if n)}."
        )


def judged(name: str, reward: Reward, trajectories: Sequence[Trajectory]) -> list[float]:
    """What one component says of each trajectory; NaN where it fails."""
    if type(reward).batch is Reward.batch:  # one by one, so that one failure is one trajectory's
        return [guarded(name, lambda t=t: number(reward(t)), math.nan) for t in trajectories]  # type: ignore[misc]
    failed = [math.nan] * len(trajectories)
    values = guarded(name, lambda: as_many(reward.batch(trajectories), len(trajectories)), failed)
    return [guarded(name, lambda v=v: number(v), math.nan) for v in values]  # type: ignore[misc]


def guarded(name: str, compute: Callable[[], T], failed: T) -> T:
    """What is computed, or ``failed`` if that raises."""
    try:
        return compute()
    except Exception as error:
        _report(name, error)
        return failed


def number(value: object) -> float:
    """The value as a float; NaN passes, for it is how a reward says that it does not know."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"Expected a reward to be a number, but got {type(value).__name__}")
    found = float(value)
    if abs(found) > _LARGEST:
        raise ValueError(f"Expected a reward to be finite, but got {found}")
    return found


def as_many(values: object, count: int, of: str = "batch") -> list[Any]:
    """What the method ``of`` returned, as many as it has to be."""
    if not isinstance(values, Sequence | Tensor) or isinstance(values, str) or len(values) != count:
        raise ValueError(f"Expected `{of}` to return a list of {count} numbers, but got {_described(values)}")
    return list(values)


def _described(values: object) -> str:
    return f"{len(values)} of them" if isinstance(values, Sequence | Tensor) else type(values).__name__


def _report(name: str, error: Exception) -> None:
    """Name a failure once, with the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    why = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    kind = f"{type(error).__name__} {frame.filename}:{frame.lineno}"
    if (name, kind) not in _REPORTED:
        _REPORTED.add((name, kind))
        logger.warning(
            "reward `%s` failed: %s. Such trajectories are left out, and counted in reward/failed/%s", name, why, name
        )
