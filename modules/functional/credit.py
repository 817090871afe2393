"""Who gets the credit: what a turn did apart from what its trajectory did; `docs/method.md` has the formulas.

A reward that belongs to turns is compared over *looks*: the turns that have a value, and, for a trajectory that has
none, that trajectory as a whole. So not looking is compared with looking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.functional.advantages import Baseline
from modules.functional.checks import check_tensor
from modules.trajectory import Trajectory

_ROUNDING = 1e-6  # of a float32 total, relative to the largest


def turn_advantages(
    totals: Tensor, whole: Tensor, turns: Tensor, *, scale_by_std: bool, epsilon: float, baseline: Baseline = "mean"
) -> tuple[Tensor, Tensor]:
    """Advantages of the trajectories of a group, and what the tokens of each turn get in addition.

    ``A_i = (o_i - b_i + sum over c of (p_ci - b_ci)) / s``, the sum over the turn rewards c by which no turn of i has
    a value; ``A_ik = sum over c of (u_cik - b_ci) / s``, over those by which turn k has one. o is what of the totals
    no turn reward pays. b is the mean over the trajectories, of a turn reward over its looks; with "leave_one_out" over
    those of the other trajectories. Each *act*, a turn with a value or else a trajectory without, differs by
    ``d = A_i + A_ik`` before division from the means; s is ``sqrt(sum of d^2 / (acts - 1)) + epsilon``, or 1 without
    ``scale_by_std``. With at most one look a trajectory d is ``r_i - mean(r)``, s the standard deviation of
    `group_advantages`, and the tokens of the look get just what `group_advantages` gives.

    What a turn reward pays may cancel what others pay, so that s is smaller than either: with ``scale_by_std`` all are
    then divided once more, so that no A_i exceeds the largest advantage of an act. All are exactly 0 where the acts do
    not differ, and for trajectories with NaN.

    Args:
        totals: (G,) float; NaN where a judgement failed.
        whole: (C, G) float, what of them each turn reward pays: weighted and gated.
        turns: (C, G, K) float, what it pays each turn; NaN where a turn has no value.
        scale_by_std: see above.
        epsilon: see above, >= 0.
        baseline: see above.

    Returns:
        trajectory: (G,) A_i.
        turn: (G, K) A_ik, 0 where no reward has a value.

    Raises:
        ValueError: wrong shape or type, or a negative epsilon.
    """
    if not epsilon >= 0:
        raise ValueError(f"Expected `epsilon` to be at least 0 but got {epsilon}")
    pay = _Pay.of(totals, whole, turns)
    centred, differences = pay.compared("mean"), pay.differences()
    own, extra = centred if baseline == "mean" else pay.compared(baseline)
    if not pay.differ(differences):
        return torch.zeros_like(totals), torch.zeros_like(extra, dtype=totals.dtype)
    if scale_by_std:
        s = (differences.square().sum() / (len(differences) - 1)).sqrt() + epsilon
        own, extra = own / s, extra / s
        # one divisor for all: cutting off single ones would leave advantages that do not add up to 0
        excess = own.abs().max() / pay.acts(own, extra).abs().max()
        own, extra = own / excess.clamp(min=1), extra / excess.clamp(min=1)
    return own.to(totals.dtype), extra.to(totals.dtype)


def act_differences(totals: Tensor, whole: Tensor, turns: Tensor) -> Tensor:
    """(n,) float64: by how much each act of a group differs from the means; see `turn_advantages`, as the arguments.

    What `zero_variance` is asked about a group with turn rewards: with one look a trajectory its span is that of the
    totals. NaN alone where nothing was judged.
    """
    found = _Pay.of(totals, whole, turns).differences()
    return found if len(found) else found.new_tensor([torch.nan])


@dataclass(frozen=True, eq=False)
class _Pay:
    """A group's rewards in parts, float64, 0 where there is none."""

    judged: Tensor  # (G,) bool
    rest: Tensor  # (G,) what no turn reward pays
    whole: Tensor  # (C, G) what is paid where no turn has a value
    alone: Tensor  # (C, G) bool, where that is
    turns: Tensor  # (C, G, K)
    has: Tensor  # (C, G, K) bool
    largest: float  # of all that was given

    @staticmethod
    def of(totals: Tensor, whole: Tensor, turns: Tensor) -> _Pay:
        check_tensor("totals", totals, ("G",), "float")
        check_tensor("whole", whole, (whole.shape[0], totals.shape[0]), "float")
        check_tensor("turns", turns, (*whole.shape, "K"), "float")
        judged = ~totals.isnan()
        has = ~turns.isnan() & judged[:, None]
        alone = judged & ~has.any(-1)
        paid = torch.where(judged, whole, 0.0).double()
        total = torch.where(judged, totals, 0.0).double()
        values = torch.where(has, turns, 0.0).double()
        largest = max(float(x.abs().amax()) for x in (total, paid, values) if x.numel())
        return _Pay(judged, total - paid.sum(0), torch.where(alone, paid, 0.0), alone, values, has, largest)

    @property
    def looked(self) -> Tensor:
        """(G, K) bool: turns with a value."""
        return self.has.any(0)

    def compared(self, baseline: Baseline) -> tuple[Tensor, Tensor]:
        """(G,) and (G, K): the trajectory's and the turns' own, over the baseline."""
        rest = self.rest - _means(self.rest, self.judged.double(), baseline)
        looks = self.has.sum(-1) + self.alone
        base = _means(self.turns.sum(-1) + self.whole, looks.double(), baseline)  # (C, G)
        own = torch.where(self.judged, rest, 0.0) + torch.where(self.alone, self.whole - base, 0.0).sum(0)
        extra = torch.where(self.has, self.turns - base[..., None], 0.0).sum(0)
        if baseline == "leave_one_out" and int(self.judged.sum()) < 2:  # there are no others
            return torch.zeros_like(own), torch.zeros_like(extra)
        return own, extra

    def acts(self, own: Tensor, extra: Tensor) -> Tensor:
        """(n,) the sum of both for each act."""
        return torch.cat([(own[:, None] + extra)[self.looked], own[self.judged & ~self.looked.any(-1)]])

    def differences(self) -> Tensor:
        """(n,) by how much each act differs from the means."""
        return self.acts(*self.compared("mean"))

    def differ(self, differences: Tensor) -> bool:
        """Whether acts differ by more than what float32 totals are rounded by."""
        return len(differences) > 1 and float(differences.max() - differences.min()) > _ROUNDING * self.largest


def _means(sums: Tensor, counts: Tensor, baseline: Baseline) -> Tensor:
    """(..., G) the mean of what the members of a group add up to, or of what all but each one do."""
    total, count = sums.sum(-1, keepdim=True), counts.sum(-1, keepdim=True)
    if baseline == "leave_one_out":
        total, count = total - sums, count - counts
    return (total / count.clamp(min=1)).expand_as(sums)


def of_sampled(trajectory: Trajectory, turns: Tensor) -> Tensor:
    """(S,) of each sampled token what its turn has, of (K,) numbers, one a turn; 0 for a token of none."""
    values = torch.zeros(len(trajectory.sampled), dtype=turns.dtype)
    for k, turn in enumerate(trajectory.turns):
        values[turn.start : turn.stop] = turns[k]
    return values[trajectory.sampled]


def laid_out(values: Sequence[Tensor], owners: Tensor) -> Tensor:
    """(T,) what belongs to the tokens of a batch, from what belongs to the sampled tokens of each trajectory.

    Args:
        values: N tensors (S_i,), in the order in which the trajectories were given.
        owners: (T,) long, the trajectory of each token; those of one trajectory are in its order.
    """
    order = owners.argsort(stable=True)
    joined = torch.cat(list(values)).to(owners.device)
    return torch.empty_like(joined).index_copy_(0, order, joined)
