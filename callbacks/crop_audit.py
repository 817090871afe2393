"""Does the crop matter? Questions asked again with other crops, trajectories retold with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import lightning as L

from callbacks.rollout import RolloutCallback
from modules.counterfactual import Replacement, images_of, likelihood_gaps
from modules.engine import Request
from modules.metrics import Tally
from modules.policy import PolicyModule
from modules.trajectory import Group, SampleBatch


class CropAudit(L.Callback):
    """Compares what the policy says with what it says when it is shown something else in place of each crop.

    For every kind of replacement, below ``val/audit/`` or ``test/audit/``:

    - ``<kind>/accuracy``: of rollouts in which every crop is replaced, greedy;
    - ``<kind>/accuracy_gap``: accuracy with the crops minus that, on the same questions;
    - ``<kind>/log_likelihood_gap``: log-likelihood (nats) of the right answer behind the crops minus behind their
      replacements, in the policy's own trajectories that looked; a policy that ignores its crops has exactly 0.

    Args:
        share: of the evaluated questions, evenly spaced in every batch.
        replacements: kinds; see `modules.counterfactual.replace_crops`.
        mode: which of ``rollout.evaluations`` is audited.

    Raises:
        ValueError: a share that is not in (0, 1], or a kind that there is not.
    """

    def __init__(
        self, share: float = 0.25, replacements: Sequence[str] = get_args(Replacement), mode: str = "greedy"
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"Expected `share` to be in (0, 1], but got {share}.")
        unknown = sorted(set(replacements) - set(get_args(Replacement)))
        if unknown or not replacements:
            raise ValueError(f"Expected `replacements` to be of {get_args(Replacement)}, but got {list(replacements)}.")
        self.share = share
        self.replacements: tuple[Replacement, ...] = tuple(r for r in get_args(Replacement) if r in replacements)
        self.mode = mode
        self._tally = Tally(())

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say at once what cannot be audited.

        Raises:
            ValueError: the rollouts have no such mode, or no reward that is called ``accuracy``.
        """
        rollout = rollout_of(trainer)
        if self.mode not in rollout.evaluations:
            raise ValueError(
                f"Expected `mode` to be one of `rollout.evaluations` {sorted(rollout.evaluations)}, "
                f"but got {self.mode!r}."
            )
        if "accuracy" not in rollout.rewards:
            raise ValueError("Expected `rollout.rewards` to hold `accuracy`, for an audit compares it.")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._begin()

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._begin()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: SampleBatch, *_: Any
    ) -> None:
        """Audit a share of what was rolled out."""
        self._audit(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: SampleBatch, *_: Any
    ) -> None:
        """Audit a share of what was rolled out."""
        self._audit(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means."""
        self._log(trainer, pl_module, "test")

    def _begin(self) -> None:
        self._tally = Tally(f"{how}/{name}" for how in self.replacements for name in MEASURED)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        means = self._tally.means(lambda sums: trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum"))
        pl_module.log_dict({f"{stage}/audit/{name}": value for name, value in means.items()})

    def _audit(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch) -> None:
        assert isinstance(pl_module, PolicyModule)
        groups = evenly(batch.evaluations.get(self.mode, []), self.share)
        if not groups:
            return
        rollout = rollout_of(trainer)
        rows: list[dict[str, float]] = [{} for _ in groups]
        images = images_of(group.sample for group in groups)
        with trainer.precision_plugin.forward_context():
            for how in self.replacements:
                possible = how != "swap" or len(images) > 1
                found = compare(pl_module, rollout, groups, self.mode, how) if possible else [NOTHING] * len(groups)
                for row, numbers in zip(rows, found, strict=True):
                    row.update({f"{how}/{name}": value for name, value in numbers.items()})
        self._tally.add(rows)


MEASURED = ("accuracy", "accuracy_gap", "log_likelihood_gap")
NOTHING = dict.fromkeys(MEASURED, math.nan)


def rollout_of(trainer: L.Trainer) -> RolloutCallback:
    """The callback that rolls out.

    Raises:
        ValueError: there is none.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = next((callback for callback in callbacks if isinstance(callback, RolloutCallback)), None)
    if found is None:
        raise ValueError("Expected a RolloutCallback beside CropAudit, for it audits rollouts, but there is none.")
    return found


def evenly(groups: Sequence[Group], share: float) -> list[Group]:
    """A share of them, at least one, evenly spaced."""
    if not groups:
        return []
    count = max(1, round(share * len(groups)))
    return [groups[k * len(groups) // count] for k in range(count)]


def compare(
    module: PolicyModule, rollout: RolloutCallback, groups: Sequence[Group], mode: str, how: Replacement
) -> list[dict[str, float]]:
    """`MEASURED` for each question."""
    decoding = replace(rollout.evaluations[mode], crops=how)
    requests = [Request(group.sample, k) for k, group in enumerate(groups)]
    again = rollout.engine.rollout(module.backbone, requests, decoding)
    judged = [float(rollout.rewards["accuracy"](trajectory)) for trajectory in again]
    before = [float(group.rewards["accuracy"][0]) for group in groups]
    told = [group.trajectories[0] for group in groups]
    size = module.micro_batch or len(told)
    gaps = likelihood_gaps(module.backbone, told, how, size, module.row_tokens, module.head_chunk).tolist()
    return [
        {"accuracy": a, "accuracy_gap": b - a, "log_likelihood_gap": gap}
        for a, b, gap in zip(judged, before, gaps, strict=True)
    ]
