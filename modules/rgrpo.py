"""R-GRPO: group-relative policy optimisation over trajectories that look again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.functional.advantages import group_advantages, zero_variance
from modules.functional.losses import Normalisation, RatioTo, rgrpo_loss, token_weights
from modules.policy import PolicyModule
from modules.reference import ReferenceModule
from modules.scoring import collate, token_log_probs
from modules.trajectory import Group, SampleBatch, TrajectoryBatch


@dataclass(frozen=True)
class Objective:
    """What is optimised (arXiv 2505.16192; the choices are those of GRPO and its successors).

    Args:
        scale_by_std: divide advantages by the standard deviation of their group.
        epsilon: added to that deviation.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above.
        ratio_to: denominator of the ratio: the sampler, or the reference (the paper's formula).
        beta: weight of the KL divergence from the reference.
        unbiased_kl: weigh its estimate by the ratio, which makes the gradient that of the divergence.
        normalisation: the loss is a mean over sequences, over tokens, or a sum over a constant.
        constant: with ``normalisation: constant``, tokens that a trajectory counts for.
        drop_zero_variance: leave out groups whose rewards are all the same.
        min_spread: rewards that span no more than this count as the same; above the length reward's cap, ties in
            accuracy do not become full-size advantages.
        mask_truncated: trajectories that a limit ended carry no loss.
        inner_epochs: passes over the trajectories of an iteration.
        mini_batches: optimizer steps in each pass.
    """

    scale_by_std: bool = True
    epsilon: float = 1e-4
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_to: RatioTo = "sampler"
    beta: float = 0.0
    unbiased_kl: bool = False
    normalisation: Normalisation = "sequence"
    constant: int | None = None
    drop_zero_variance: bool = True
    min_spread: float = 1e-6
    mask_truncated: bool = False
    inner_epochs: int = 1
    mini_batches: int = 1

    def __post_init__(self) -> None:
        for name in ("inner_epochs", "mini_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected `objective.{name}` to be at least 1, but got {getattr(self, name)}.")

    @property
    def needs_reference(self) -> bool:
        """Whether anything uses the reference policy."""
        return self.beta > 0 or self.ratio_to == "reference"


@dataclass(eq=False)
class _Part:
    """A micro-batch, and what is computed of it once for all inner epochs."""

    batch: TrajectoryBatch
    advantages: Tensor  # (T,)
    weights: Tensor  # (T,)
    count: float
    reference: Tensor | None


class RGRPOModule(PolicyModule):
    """Updates the policy on the groups that the rollout callback has put into the batch.

    Args:
        objective: what is optimised.
        kwargs: see `PolicyModule`; ``init_from`` is the SFT checkpoint.
    """

    def __init__(self, *args: Any, objective: Objective = Objective(), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.reference = ReferenceModule(self.backbone) if self.objective.needs_reference else None

    @property
    def steps_per_batch(self) -> int:
        """See `PolicyModule.steps_per_batch`; fewer where groups are dropped."""
        return self.objective.inner_epochs * self.objective.mini_batches

    def advantages(self, totals: Tensor) -> Tensor:
        """(G,) or (N, G) advantages of rewards."""
        return group_advantages(totals, scale_by_std=self.objective.scale_by_std, epsilon=self.objective.epsilon)

    def training_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, int]:
        """All optimizer steps of one iteration."""
        self.backbone.learn()
        groups = batch.groups
        if self.objective.drop_zero_variance:
            groups = [g for g in groups if not bool(zero_variance(g.totals, self.objective.min_spread))]
        steps = [self._parts(mini) for mini in split(groups, self.objective.mini_batches)]
        history = [
            self.update(parts, self._loss, sum(part.count for part in parts))
            for _ in range(self.objective.inner_epochs)
            for parts in steps
        ]
        self.log_now(lambda: self._metrics([h for h in history if "tokens" in h]), len(batch.groups))
        return {"tokens": sum(len(t.prompt_ids) + len(t.completion_ids) for g in batch.groups for t in g.trajectories)}

    def _parts(self, groups: Sequence[Group]) -> list[_Part]:
        trajectories = [t for g in groups for t in g.trajectories]
        advantages = torch.cat([g.advantages for g in groups]) if groups else torch.zeros(0)
        size = self.micro_batch or max(len(trajectories), 1)
        parts = []
        for start in range(0, len(trajectories), size):
            batch = collate(self.backbone, trajectories[start : start + size], self.row_tokens)
            whole = torch.tensor([not t.stop.truncated for t in trajectories[start : start + size]])
            weights, count = token_weights(
                batch.owners,
                batch.num_trajectories,
                self.objective.normalisation,
                self.objective.constant,
                include=whole.to(batch.owners.device) if self.objective.mask_truncated else None,
            )
            per_token = advantages[start : start + size].to(batch.owners.device)[batch.owners]
            reference = self.reference(batch, self.head_chunk) if self.reference is not None else None
            parts.append(_Part(batch, per_token, weights, count, reference))
        return parts

    def _loss(self, part: _Part) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs, entropy = token_log_probs(self.backbone, part.batch, self.head_chunk)
        loss, metrics = rgrpo_loss(
            log_probs,
            part.batch.log_probs,
            part.advantages,
            part.weights,
            clip_low=self.objective.clip_low,
            clip_high=self.objective.clip_high,
            beta=self.objective.beta,
            unbiased_kl=self.objective.unbiased_kl,
            reference_log_probs=part.reference,
            ratio_to=self.objective.ratio_to,
        )
        gap = (log_probs.detach() - part.batch.log_probs).abs()
        return loss, {
            **metrics,
            "entropy": entropy.sum(),
            "sampler_gap": gap.sum(),
            "tokens": torch.ones_like(gap).sum(),
        }

    def _metrics(self, history: Sequence[dict[str, Tensor]]) -> dict[str, Tensor | float]:
        metrics: dict[str, Tensor | float] = {"train/learning_rate": self.learning_rate, "data/skipped": self.skipped}
        if not history:  # every group was dropped, or this rank has none
            return metrics
        tokens = torch.stack([h["tokens"] for h in history]).sum()
        for name in ("ratio", "clip_low", "clip_high", "sampler_kl", "kl", "entropy", "sampler_gap"):
            if name in history[0]:
                metrics[f"train/{name}"] = torch.stack([h[name] for h in history]).sum() / tokens
        metrics["train/clip_fraction"] = metrics["train/clip_low"] + metrics["train/clip_high"]
        metrics["train/loss"] = torch.stack([h["loss"] for h in history]).mean()
        metrics["train/grad_norm"] = torch.stack([h["grad_norm"] for h in history]).mean()
        return metrics


def split(groups: Sequence[Group], parts: int) -> list[Sequence[Group]]:
    """Cut groups into at most ``parts`` runs of nearly equal length; groups stay whole."""
    bounds = [round(k * len(groups) / parts) for k in range(parts + 1)]
    return [groups[a:b] for a, b in itertools.pairwise(bounds)]
