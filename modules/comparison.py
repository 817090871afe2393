"""What is compared of the members of a group, what their turns' tokens get, and the curves of both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.functional.credit import act_differences, of_sampled
from modules.trajectory import Group


def compared(group: Group) -> Tensor:
    """What the group compares: its totals, or with turns that are credited apart what these and the totals come to."""
    if group.turn_pay is None:
        return group.totals
    return act_differences(group.totals, group.turn_pay.whole, group.turn_pay.turns)


def of_turns(groups: Sequence[Group]) -> list[Tensor]:
    """(S,) for each trajectory, what its sampled tokens get as those of their turns."""
    nothing = torch.zeros(max((len(t.turns) for g in groups for t in g.trajectories), default=0))
    return [
        of_sampled(t, nothing if g.turn_advantages is None else g.turn_advantages[k])
        for g in groups
        for k, t in enumerate(g.trajectories)
    ]


def comparison_metrics(groups: Sequence[Group]) -> dict[str, Tensor | float]:
    """What is logged of rewards once something was taken off them; the advantages' curves are then of these."""
    if not groups:
        return {}
    return {"train/reward/penalised": torch.stack([g.totals for g in groups]).nanmean(), **advantage_metrics(groups)}


def advantage_metrics(groups: Sequence[Group]) -> dict[str, Tensor | float]:
    """What is logged of the advantages of trajectories, and of turns that are credited apart."""
    advantages = torch.stack([g.advantages for g in groups])
    silent = [
        not bool(g.advantages.any() or (g.turn_advantages is not None and g.turn_advantages.any())) for g in groups
    ]
    metrics: dict[str, Tensor | float] = {
        "train/advantage/mean": advantages.mean(),
        "train/advantage/std": advantages.std() if advantages.numel() > 1 else 0.0,
        "train/advantage/zero_groups": sum(silent) / len(silent),
    }
    looked = [
        g.turn_advantages[~g.turn_pay.turns.isnan().all(0) & ~g.totals.isnan()[:, None]]
        for g in groups
        if g.turn_pay is not None and g.turn_advantages is not None
    ]
    turns = torch.cat(looked) if looked else torch.zeros(0)
    if len(turns) > 1:
        metrics |= {"train/advantage/turn_mean": turns.mean(), "train/advantage/turn_std": turns.std()}
    return metrics
