"""Rolls the policy out: groups to train on, and single trajectories to measure it by."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, cast

import lightning as L
import torch
from torch import Tensor

from modules.engine import Decoding, GroupSampler, LocalEngine, Request, RolloutEngine
from modules.metrics import MEASURED, Tally, measure
from modules.policy import PolicyError, PolicyModule
from modules.rewards import Reward, check_failures, check_gates, score
from modules.rgrpo import RGRPOModule
from modules.trajectory import Group, Sample, SampleBatch, StopReason, Trajectory


class RolloutCallback(L.Callback):
    """R-GRPO's rollouts before every training step; trajectories for validation, test and prediction.

    Args:
        engine: what generates.
        sampler: how questions become groups.
        rewards: components by name; the name is the metric's (``train/reward/<name>``). One that is
            called ``accuracy`` is also the metric ``val/accuracy``.
        decoding: of training rollouts.
        evaluations: decodings of validation and test by name. Metrics of the one called ``greedy`` are
            ``val/<metric>``, of the others ``val/<name>/<metric>``.
        seed: of the rollouts.
        max_failed: share of an iteration's trajectories on this rank that may go unjudged; more ends the run.
    """

    def __init__(
        self,
        engine: RolloutEngine | None = None,
        sampler: GroupSampler = GroupSampler(),
        rewards: dict[str, Reward] | None = None,
        decoding: Decoding = Decoding(),
        evaluations: dict[str, Decoding] | None = None,
        seed: int = 0,
        max_failed: float = 1.0,
    ) -> None:
        self.engine = engine or LocalEngine()
        self.sampler = sampler
        self.rewards = rewards or {}
        check_gates(self.rewards)
        self.decoding = decoding
        self.evaluations = evaluations or {"greedy": replace(self.decoding, temperature=0.0)}
        self.seed = seed
        if not 0 <= max_failed <= 1:
            raise ValueError(f"Expected `max_failed` to be a share, from 0 to 1, but got {max_failed}.")
        self.max_failed = max_failed
        self.iteration = 0
        self._predictions: TextIO | None = None
        self._tallies: dict[str, Tally] = {}

    def state_dict(self) -> dict[str, Any]:
        """The seed of the next rollout depends on the iteration."""
        return {"iteration": self.iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.iteration = state_dict["iteration"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """A service that a reward needs is missed now, not after the first rollout; predictions are not judged."""
        for reward in self.rewards.values() if stage != "predict" else ():
            reward.setup(cast(PolicyModule, pl_module))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """R-GRPO learns from rewards only."""
        if isinstance(pl_module, RGRPOModule) and not any(reward.weight for reward in self.rewards.values()):
            raise PolicyError("Expected `rollout.rewards` to hold a reward with a weight, for R-GRPO learns from them.")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, batch_idx: int
    ) -> None:
        """Roll out, judge and compare the groups of this iteration."""
        if not isinstance(pl_module, RGRPOModule):
            return
        seed = (self.seed * 1_000_003 + self.iteration) * trainer.world_size + trainer.global_rank
        self.iteration += 1  # on every rank alike, whatever it has: checkpoints hold one rank's count
        if not batch.samples:
            return
        requests = self.sampler.requests(batch.samples, seed)
        trajectories = self._rollout(trainer, pl_module, requests, self.decoding)
        with trainer.precision_plugin.forward_context():  # some rewards ask the policy
            components, totals = score(self.rewards, trajectories)
        check_failures(self.rewards, components, totals, self.max_failed)
        size = self.sampler.size
        for n, sample in enumerate(batch.samples):
            members = slice(n * size, (n + 1) * size)
            batch.groups.append(
                Group(
                    sample=sample,
                    trajectories=tuple(trajectories[members]),
                    rewards={name: values[members] for name, values in components.items()},
                    totals=totals[members],
                    advantages=pl_module.advantages(totals[members]),
                )
            )
        pl_module.log_now(lambda: training_metrics(batch.groups), len(trajectories))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._begin()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means."""
        self._log(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._begin()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means."""
        self._log(trainer, pl_module, "test")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, *_: Any
    ) -> None:
        """Measure the policy."""
        self._evaluate(trainer, pl_module, batch)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predictions are saved as they come."""
        self._open(trainer)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, *_: Any
    ) -> None:
        """Measure the policy and save what it wrote."""
        self._evaluate(trainer, pl_module, batch)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the file of predictions."""
        self._close()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predictions are saved as they come."""
        self._tallies = {}
        self._open(trainer)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, *_: Any
    ) -> None:
        """Write trajectories for questions without answers."""
        self._evaluate(trainer, pl_module, batch)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the file of predictions."""
        self._close()

    def _rollout(
        self, trainer: L.Trainer, pl_module: L.LightningModule, requests: list[Request], decoding: Decoding
    ) -> list[Trajectory]:
        assert isinstance(pl_module, PolicyModule)
        # callback hooks run outside autocast; the learner's pass runs inside
        with trainer.precision_plugin.forward_context(), casts_kept():
            return self.engine.rollout(pl_module.backbone, requests, decoding)

    def _begin(self) -> None:
        self._tallies = {mode: Tally([*MEASURED, *map(curve, self.rewards)]) for mode in self.evaluations}

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for mode, tally in self._tallies.items():
            prefix = stage if mode == "greedy" else f"{stage}/{mode}"
            # one reduction, of the same names on every rank
            means = tally.means(lambda sums: trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum"))
            pl_module.log_dict({f"{prefix}/{name}": value for name, value in means.items()})

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch) -> None:
        if not batch.samples:
            return
        for mode, decoding in self.evaluations.items():
            # the same noise for a question in every evaluation, whatever batch it comes in
            requests = [Request(s, _stable_seed(s, self.seed)) for s in batch.samples]
            trajectories = self._rollout(trainer, pl_module, requests, decoding)
            with trainer.precision_plugin.forward_context():
                rewards = self.rewards if self._tallies else {}  # predictions are not judged
                components, totals = score(rewards, trajectories)
            batch.evaluations[mode] = [
                Group(
                    sample=t.sample,
                    trajectories=(t,),
                    rewards={name: values[k : k + 1] for name, values in components.items()},
                    totals=totals[k : k + 1],
                    advantages=torch.zeros(1),
                )
                for k, t in enumerate(trajectories)
            ]
            if mode in self._tallies:  # not in prediction
                self._tallies[mode].add(map(numbers, batch.evaluations[mode]))
            if self._predictions is not None:
                for group in batch.evaluations[mode]:
                    self._predictions.write(json.dumps(prediction(mode, group)) + "\n")
                self._predictions.flush()

    def _open(self, trainer: L.Trainer) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions.{trainer.global_rank}.jsonl"
        self._predictions = (folder / name).open("w", encoding="utf-8")

    def _close(self) -> None:
        if self._predictions is not None:
            self._predictions.close()
            self._predictions = None


@contextmanager
def casts_kept() -> Iterator[None]:
    """Let autocast keep the weights that it has cast, which Lightning forbids; nothing steps during a rollout, and
    casting all weights for every token would take longer than computing with them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(before)


def training_metrics(groups: list[Group]) -> dict[str, Tensor | float]:
    """Everything worth a curve about the groups of one iteration."""
    trajectories = [t for g in groups for t in g.trajectories]
    means = Tally(MEASURED).add(map(measure, trajectories)).means()
    metrics: dict[str, Tensor | float] = {f"train/{name}": value for name, value in means.items()}
    for name in groups[0].rewards:
        values = torch.cat([g.rewards[name] for g in groups])
        metrics[f"train/reward/{name}"] = float(values.nanmean())
        metrics[f"train/reward/failed/{name}"] = float(values.isnan().float().mean())
    totals = torch.stack([g.totals for g in groups])
    advantages = torch.stack([g.advantages for g in groups])
    metrics["train/reward/total"] = float(totals.nanmean())
    metrics["train/reward/failed"] = float(totals.isnan().float().mean())
    spreads = [t[~t.isnan()].std() for t in totals if int((~t.isnan()).sum()) > 1]
    metrics["train/reward/group_std"] = float(torch.stack(spreads).mean()) if spreads else 0.0
    for reason in StopReason:
        metrics[f"train/stop/{reason.value}"] = sum(t.stop is reason for t in trajectories) / len(trajectories)
    metrics["train/advantage/mean"] = float(advantages.mean())
    metrics["train/advantage/std"] = float(advantages.std()) if advantages.numel() > 1 else 0.0
    metrics["train/advantage/zero_groups"] = float((advantages == 0).all(-1).float().mean())
    return metrics


def curve(reward: str) -> str:
    """The name of a component's curve in evaluation, below ``val/`` or ``test/``."""
    return "accuracy" if reward == "accuracy" else f"reward/{reward}"


def numbers(group: Group) -> dict[str, float]:
    """What is counted of one evaluated trajectory: the components, and what `measure` tells."""
    rewards = {curve(name): float(value[0]) for name, value in group.rewards.items()}
    return {**measure(group.trajectories[0]), **rewards}


def prediction(mode: str, group: Group) -> dict[str, Any]:
    """One line of ``predictions.jsonl``."""
    trajectory = group.trajectories[0]
    sample: Sample = trajectory.sample
    measured = measure(trajectory)
    line: dict[str, Any] = {
        "id": sample.id,
        "image_id": str(sample.meta.get("image_id", sample.id)),
        "mode": mode,
        "question": sample.question,
        "answers": list(sample.answers),
        "answer": trajectory.answer,
        "text": trajectory.text,
        "boxes": [list(region.box) for region in trajectory.regions],
        "crops": int(measured["crops"]),
        "iou": None if math.isnan(measured["iou"]) else measured["iou"],
        "stop": trajectory.stop.value,
    }
    rewards = {name: float(value[0]) for name, value in group.rewards.items()}
    line["rewards"] = {name: None if math.isnan(value) else value for name, value in rewards.items()}
    if not math.isnan(rewards.get("accuracy", math.nan)):  # a failed judgement is neither right nor wrong
        line["correct"] = int(rewards["accuracy"] > 0)
    return line


def _stable_seed(sample: Sample, seed: int) -> int:
    """A seed that depends on the question and on nothing else that changes between runs."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample.id}".encode()).digest()[:7], "big")
