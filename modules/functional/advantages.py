"""From the rewards of a group to the advantages of its trajectories.

A total is NaN where a judgement failed (a service that did not answer). It is neither good nor bad:
it stays out of the group's statistics, and its trajectory gets advantage 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["mean", "leave_one_out"]


def group_advantages(totals: Tensor, *, scale_by_std: bool, epsilon: float, baseline: Baseline = "mean") -> Tensor:
    """How much better than its group each trajectory did.

    ``A_i = (r_i - b_i) / (std(r) + epsilon)``, std unbiased (divides by G - 1), over the G judged members of the
    group; without ``scale_by_std``: ``A_i = r_i - b_i``. The baseline b_i is the mean of all of them, or, with
    "leave_one_out", of the others, which makes r_i - b_i G / (G - 1) times as large. Exactly 0 for a group of equal
    totals, whatever epsilon, for a group with one judged member, and for members with NaN.

    Source: GRPO, DeepSeekMath (arXiv 2402.03300) section 4.1.2; without the std: Dr. GRPO (arXiv 2503.20783); leave
    one out: RLOO (arXiv 2402.14740).

    Args:
        totals: (G,) or (N, G) float, each row the rewards of one group; NaN where a judgement failed.
        scale_by_std: whether to divide by the standard deviation.
        epsilon: added to the standard deviation, >= 0.
        baseline: see above.

    Returns:
        Advantages, of the same shape, without NaN.

    Raises:
        ValueError: wrong shape or type, a negative epsilon, or an unknown baseline.
    """
    _check(totals)
    if not epsilon >= 0:
        raise ValueError(f"Expected `epsilon` to be at least 0 but got {epsilon}")
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"Expected `baseline` to be mean or leave_one_out but got {baseline!r}")
    judged = ~totals.isnan()
    count = judged.sum(dim=-1, keepdim=True)
    lowest, _ = _range(totals)
    # From the lowest total upwards: equal totals then differ from their mean by exactly nothing, where rounding of
    # the mean would otherwise be blown up by a standard deviation that is rounding too.
    above = torch.where(judged, totals - lowest, 0.0)
    deviations = torch.where(judged, above - above.sum(dim=-1, keepdim=True) / count.clamp(min=1), 0.0)
    others = (count - 1).clamp(min=1)
    advantages = deviations * count / others if baseline == "leave_one_out" else deviations
    if not scale_by_std:
        return advantages
    std = (deviations.square().sum(dim=-1, keepdim=True) / others).sqrt()
    return torch.where(std > 0, advantages / (std + epsilon), 0.0)


def zero_variance(totals: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Groups that teach nothing: their judged totals span no more than ``tolerance``, in units of reward.

    A tolerance as large as the smallest component (a length reward) also finds the groups whose only difference
    is that component, which `group_advantages` with ``scale_by_std`` turns into full-size advantages.

    Args:
        totals: (G,) or (N, G) float; NaN where a judgement failed.
        tolerance: largest span that counts as none, >= 0.

    Returns:
        (N,) bool, or a scalar for (G,). True for groups with fewer than two judged members.

    Raises:
        ValueError: wrong shape or type, or a negative tolerance.
    """
    _check(totals)
    if not tolerance >= 0:
        raise ValueError(f"Expected `tolerance` to be at least 0 but got {tolerance}")
    lowest, highest = _range(totals)
    # no judged member: lowest inf, highest -inf, span -inf
    return (highest - lowest <= tolerance).squeeze(-1)


def _range(totals: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 1) lowest and highest judged total; inf and -inf where none was judged."""
    judged = ~totals.isnan()
    lowest = torch.where(judged, totals, torch.inf).amin(dim=-1, keepdim=True)
    highest = torch.where(judged, totals, -torch.inf).amax(dim=-1, keepdim=True)
    return lowest, highest


def _check(totals: Tensor) -> None:
    if totals.dim() not in (1, 2) or not totals.is_floating_point() or totals.shape[-1] == 0:
        raise ValueError(
            f"Expected `totals` to be a float tensor of shape (G,) or (N, G) with G >= 1 but got {totals.dtype} "
            f"of shape {tuple(totals.shape)}"
        )
