"""R-GRPO: group-relative policy optimisation over trajectories that look again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modules.comparison import compared, comparison_metrics, of_turns
from modules.functional.advantages import group_advantages, zero_variance
from modules.functional.credit import laid_out, turn_advantages
from modules.functional.kinds import KINDS, by_kind, kinds_of_sampled
from modules.functional.kl import kl_estimate, per_trajectory
from modules.functional.losses import token_weights
from modules.functional.policy_gradient import rgrpo_loss
from modules.grounding import UNGROUNDED, Grounder, Grounding, grounding_metrics
from modules.located import Located, annotated_box, share
from modules.objective import GRPO, Objective
from modules.policy import PolicyError, PolicyModule
from modules.reference import ReferenceModule
from modules.scoring import collate, predicting, token_log_probs, token_loss
from modules.sharding import scatter
from modules.trajectory import Group, SampleBatch, Trajectory, TrajectoryBatch

__all__ = ["Objective", "RGRPOModule", "split"]


@dataclass(eq=False)
class _Part:
    """A micro-batch, and what is computed of it once for all inner epochs."""

    batch: TrajectoryBatch
    advantages: Tensor  # (T,)
    weights: Tensor  # (T,)
    count: float
    reference: Tensor | None  # (T,) log-probabilities
    learner: Tensor | None  # (T,) log-probabilities before the first step, where it matters which step it is
    kinds: Tensor | None  # (T,) long, places in KINDS, where it is logged
    located: Located | None = None  # its boxes and answers, where they have losses of their own


@dataclass(eq=False)
class _Waiting:
    """Groups that an optimizer step is waiting with until there are enough."""

    groups: list[Group] = field(default_factory=list)
    batches: int = 0  # rolled out for this step so far
    wanted: int = 0  # groups: as many as the largest of these batches had questions


class RGRPOModule(PolicyModule):
    """Updates the policy on the groups that the rollout callback has put into the batch.

    Args:
        objective: what is optimised.
        grounding: weights of losses beside it, of the boxes that the policy is expected to write: against the
            annotated region that is nearest to the box that was written, and of the answers that were right.
        kwargs: see `PolicyModule`; ``init_from`` is the SFT checkpoint.

    Raises:
        PolicyError: if a reference that is the policy without its adapters is to be synchronised.
        ValueError: see `Grounder`.
    """

    def __init__(
        self, *args: Any, objective: Objective = GRPO, grounding: Grounding = UNGROUNDED, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if objective.sync_reference is not None and self.lora.rank:
            raise PolicyError(
                f"Expected `objective.sync_reference` to be None with `lora`, but got {objective.sync_reference}: the "
                "reference is the policy without its adapters, and cannot become the policy with them."
            )
        self.objective = objective
        self.reference = ReferenceModule(self.backbone) if self.objective.needs_reference else None
        self.waiting = _Waiting()
        self.grounder = (
            Grounder(self.backbone, grounding, self.row_tokens, self.head_chunk) if grounding.active else None
        )

    @property
    def steps_per_batch(self) -> int:
        """See `PolicyModule.steps_per_batch`; fewer where groups are dropped, or batches put together."""
        return self.objective.inner_epochs * self.objective.mini_batches

    @property
    def learns_from_answers(self) -> bool:
        """Whether answers that were right have a loss of their own."""
        return self.grounder is not None and self.grounder.weights.answer > 0

    def advantages(self, totals: Tensor) -> Tensor:
        """(G,) or (N, G) advantages of rewards."""
        objective = self.objective
        return group_advantages(
            totals, scale_by_std=objective.scale_by_std, epsilon=objective.epsilon, baseline=objective.baseline
        )

    def credited(self, group: Group) -> Group:
        """The group with the advantages of its turns, if they are credited apart."""
        objective, pay = self.objective, group.turn_pay
        if pay is None:
            return group
        own, extra = turn_advantages(
            group.totals,
            pay.whole,
            pay.turns,
            scale_by_std=objective.scale_by_std,
            epsilon=objective.epsilon,
            baseline=objective.baseline,
        )
        return replace(group, advantages=own, turn_advantages=extra)

    def on_train_start(self) -> None:
        """Groups that an earlier fit left over are of another policy."""
        super().on_train_start()
        self.waiting = _Waiting()

    def training_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, int]:
        """All optimizer steps of one iteration, or none as long as groups are collected for it."""
        self.backbone.learn()
        if self.objective.changes_rewards:
            batch.groups[:] = self.penalised(batch.groups)
        groups = self._ready(batch.groups)
        if groups is not None:
            self._learn(groups, len(batch.groups))
        return {"tokens": sum(len(t.prompt_ids) + len(t.completion_ids) for g in batch.groups for t in g.trajectories)}

    def penalised(self, groups: Sequence[Group]) -> list[Group]:
        """Groups with what the objective takes off their rewards, and the advantages that follow."""
        objective = self.objective
        trajectories = [t for g in groups for t in g.trajectories]
        penalties = objective.truncation_penalty * torch.tensor([float(t.stop.truncated) for t in trajectories])
        if objective.kl_in == "reward":
            penalties = penalties + objective.beta * self._divergences(trajectories)
        sizes = [len(g.trajectories) for g in groups]
        made = []
        for group, penalty in zip(groups, penalties.split(sizes), strict=True):
            totals = group.totals - penalty.to(group.totals)
            made.append(self.credited(replace(group, totals=totals, advantages=self.advantages(totals))))
        self.log_now(lambda: comparison_metrics(made), len(trajectories))
        return made

    def _divergences(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """(n,) estimated KL divergences from the reference, of the policy that sampled these trajectories."""
        assert self.reference is not None
        found, tokens = [torch.zeros(0)], 0
        for some in self._micro_batches(trajectories):
            batch = collate(self.backbone, some, self.row_tokens)
            estimates = kl_estimate(batch.log_probs, self.reference(batch, self.head_chunk), self.objective.kl)
            found.append(per_trajectory(estimates, batch.owners, batch.num_trajectories).cpu())
            tokens += len(estimates)
        divergences = torch.cat(found)
        self.log_now(lambda: {"train/kl": divergences.sum() / tokens} if tokens else {}, len(trajectories))
        return divergences

    def _ready(self, groups: Sequence[Group]) -> list[Group] | None:
        """The groups to learn from; None while further batches are rolled out for them, on all ranks alike."""
        objective, waiting = self.objective, self.waiting
        waiting.batches += 1
        waiting.wanted = max(waiting.wanted, len(groups))
        waiting.groups += [
            g
            for g in groups
            if not (objective.drop_zero_variance and bool(zero_variance(compared(g), objective.min_spread)))
        ]
        # every rank has seen as many batches, and reduces at the same ones
        if waiting.batches < objective.resample and self._sum_over_ranks(waiting.wanted - len(waiting.groups)) > 0:
            return None
        self.waiting = _Waiting()
        self.log_now(lambda: {"train/batches_per_step": float(waiting.batches)}, len(groups))
        return waiting.groups

    def _learn(self, groups: Sequence[Group], size: int) -> None:
        before = self.trainer.global_step
        steps = [self._parts(mini) for mini in split(groups, self.objective.mini_batches)]
        history: list[dict[str, Tensor]] = []
        left_out = self.nonfinite
        for parts in steps * self.objective.inner_epochs:
            history.append(self.update(parts, self._loss, sum(part.count for part in parts)))
            if self.nonfinite > left_out:  # on all ranks alike; a batch counts once, however many steps it makes
                break
        every = self.objective.sync_reference
        if self.reference is not None and every and self.trainer.global_step // every > before // every:
            scatter(self)  # what an optimizer step changed is the shares
            self.reference.synchronise(self.backbone)
        self.log_now(lambda: self._metrics([h for h in history if "tokens" in h]), size)

    def _micro_batches(self, trajectories: Sequence[Trajectory]) -> list[Sequence[Trajectory]]:
        size = self.micro_batch or max(len(trajectories), 1)
        return [trajectories[start : start + size] for start in range(0, len(trajectories), size)]

    def _parts(self, groups: Sequence[Group]) -> list[_Part]:
        objective = self.objective
        micro_batches = self._micro_batches([t for g in groups for t in g.trajectories])
        advantages = torch.cat([g.advantages for g in groups] or [torch.zeros(0)])
        extra = iter(of_turns(groups) if objective.credit == "turn" else ())
        parts = []
        for some, own in zip(micro_batches, advantages.split([len(m) for m in micro_batches]), strict=True):
            batch = collate(self.backbone, some, self.row_tokens)
            whole = torch.tensor([not t.stop.truncated for t in some])
            weights, count = token_weights(
                batch.owners,
                batch.num_trajectories,
                objective.normalisation,
                objective.constant,
                include=whole.to(batch.owners.device) if objective.mask_truncated else None,
            )
            per_token = own.to(batch.owners.device)[batch.owners]
            if objective.credit == "turn":
                per_token = per_token + laid_out([next(extra) for _ in some], batch.owners)
            kinds = None
            if self.trainer._logger_connector.should_update_logs:
                kinds = laid_out([kinds_of_sampled(t, self.backbone.detokenize) for t in some], batch.owners)
            reference = learner = None
            if self.reference is not None and objective.reference_in_loss:
                reference = self.reference(batch, self.head_chunk)
            if objective.sampler_correction is not None and self.steps_per_batch > 1:
                with torch.no_grad():
                    learner, _ = token_log_probs(self.backbone, batch, self.head_chunk)
            parts.append(_Part(batch, per_token, weights, count, reference, learner, kinds))
        if self.grounder is not None:
            right = iter(rightly_answered(groups) if self.learns_from_answers else itertools.repeat(False))
            found = [self.grounder.locate(some, annotated_box, [next(right) for _ in some]) for some in micro_batches]
            shared = share(found, sum(part.count for part in parts), self._sum_over_ranks)
            parts = [replace(part, located=located) for part, located in zip(parts, shared, strict=True)]
        return parts

    def _loss(self, part: _Part) -> tuple[Tensor, dict[str, Tensor]]:
        objective, batch = self.objective, part.batch
        exploring = objective.entropy_bonus > 0
        hidden = predicting(self.backbone, batch)
        metrics: dict[str, Tensor] = {}

        def terms(log_probs: Tensor, entropy: Tensor, own: slice) -> Tensor:
            loss, sums = rgrpo_loss(
                log_probs,
                batch.log_probs[own],
                part.advantages[own],
                part.weights[own],
                batch.owners[own],
                batch.num_trajectories,
                clip_low=objective.clip_low,
                clip_high=objective.clip_high,
                ratio_to=objective.ratio_to,
                ratio_level=objective.ratio_level,
                beta=objective.beta if objective.kl_in == "loss" else 0.0,
                kl=objective.kl,
                unbiased_kl=objective.unbiased_kl,
                reference_log_probs=None if part.reference is None else part.reference[own],
                correction_cap=objective.sampler_correction,
                learner_log_probs=None if part.learner is None else part.learner[own],
                entropy_bonus=objective.entropy_bonus,
                entropy=entropy if exploring else None,
            )
            for name, value in sums.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + value
            return loss

        whole = objective.ratio_level == "sequence"  # such a ratio is of all tokens of a trajectory
        loss, log_probs, entropy = token_loss(
            self.backbone, batch, self.head_chunk, terms, exploring, hidden, whole=whole
        )
        if self.grounder is not None and part.located is not None:
            grounding, sums = self.grounder.loss(hidden, part.located, batch.temperature)
            loss, metrics = loss + grounding, metrics | sums
        gap = (log_probs - batch.log_probs).abs()
        return loss, {
            **metrics,
            **({} if part.kinds is None else {"entropy/kinds": by_kind(entropy, part.kinds)}),
            "entropy": entropy.sum(),
            "sampler_gap": gap.sum(),
            "tokens": torch.ones_like(gap).sum(),
        }

    def _metrics(self, history: Sequence[dict[str, Tensor]]) -> dict[str, Tensor | float]:
        metrics: dict[str, Tensor | float] = {"train/learning_rate": self.learning_rate, "data/skipped": self.skipped}
        if not history:  # every group was dropped, or this rank has none
            return metrics
        tokens = torch.stack([h["tokens"] for h in history]).sum()
        for name in PER_TOKEN:
            if name in history[0]:
                metrics[f"train/{name}"] = torch.stack([h[name] for h in history]).sum() / tokens
        if "entropy/kinds" in history[0]:
            sums, counts = torch.stack([h["entropy/kinds"] for h in history]).sum(0)
            named = zip(KINDS, sums, counts, strict=True)
            metrics |= {f"train/entropy/{kind}": total / n for kind, total, n in named if n}
        metrics |= grounding_metrics(history)
        metrics["train/clip_fraction"] = metrics["train/clip_low"] + metrics["train/clip_high"]
        metrics["train/loss"] = torch.stack([h["loss"] for h in history]).mean()
        metrics["train/grad_norm"] = torch.stack([h["grad_norm"] for h in history]).mean()
        return metrics


PER_TOKEN = (
    "ratio",
    "clip_low",
    "clip_high",
    "sampler_kl",
    "sampler_gap",
    "sampler_correction",
    "sampler_correction_capped",
    "kl",
    "entropy",
)


def rightly_answered(groups: Sequence[Group]) -> list[bool]:
    """Whether each trajectory's answer was right, by the reward called ``accuracy``."""
    return [value > 0 for group in groups for value in group.rewards["accuracy"].tolist()]


def split(groups: Sequence[Group], parts: int) -> list[Sequence[Group]]:
    """Cut groups into at most ``parts`` runs of nearly equal length; groups stay whole."""
    bounds = [round(k * len(groups) / parts) for k in range(parts + 1)]
    return [groups[a:b] for a, b in itertools.pairwise(bounds)]
