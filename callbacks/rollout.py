"""Rolls the policy out: groups to train on, and single trajectories to measure it by."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch
from torch import Tensor

from modules.engine import Decoding, GroupSampler, LocalEngine, Request, RolloutEngine
from modules.metrics import mean, measure
from modules.policy import PolicyModule
from modules.rewards import Reward, check_gates, score
from modules.rgrpo import RGRPOModule
from modules.trajectory import Group, Sample, SampleBatch, Trajectory


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
    """

    def __init__(
        self,
        engine: RolloutEngine | None = None,
        sampler: GroupSampler = GroupSampler(),
        rewards: dict[str, Reward] | None = None,
        decoding: Decoding = Decoding(),
        evaluations: dict[str, Decoding] | None = None,
        seed: int = 0,
    ) -> None:
        self.engine = engine or LocalEngine()
        self.sampler = sampler
        self.rewards = rewards or {}
        check_gates(self.rewards)
        self.decoding = decoding
        self.evaluations = evaluations or {"greedy": replace(self.decoding, temperature=0.0)}
        self.seed = seed
        self.iteration = 0
        self._predictions: TextIO | None = None

    def state_dict(self) -> dict[str, Any]:
        """The seed of the next rollout depends on the iteration."""
        return {"iteration": self.iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.iteration = state_dict["iteration"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, batch_idx: int
    ) -> None:
        """Roll out, judge and compare the groups of this iteration."""
        if not isinstance(pl_module, RGRPOModule) or not batch.samples:
            return
        seed = (self.seed * 1_000_003 + self.iteration) * trainer.world_size + trainer.global_rank
        requests = self.sampler.requests(batch.samples, seed)
        trajectories = self._rollout(trainer, pl_module, requests, self.decoding)
        self.iteration += 1
        components, totals = score(self.rewards, trajectories)
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

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, *_: Any
    ) -> None:
        """Measure the policy."""
        self._evaluate(trainer, pl_module, batch, "val")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predictions are saved as they come."""
        self._open(trainer)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, *_: Any
    ) -> None:
        """Measure the policy and save what it wrote."""
        self._evaluate(trainer, pl_module, batch, "test")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the file of predictions."""
        self._close()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Predictions are saved as they come."""
        self._open(trainer)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, *_: Any
    ) -> None:
        """Write trajectories for questions without answers."""
        self._evaluate(trainer, pl_module, batch, None)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the file of predictions."""
        self._close()

    def _rollout(
        self, trainer: L.Trainer, pl_module: L.LightningModule, requests: list[Request], decoding: Decoding
    ) -> list[Trajectory]:
        assert isinstance(pl_module, PolicyModule)
        # callback hooks run outside autocast; the learner's pass runs inside
        with trainer.precision_plugin.forward_context():
            return self.engine.rollout(pl_module.backbone, requests, decoding)

    def _evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, stage: str | None
    ) -> None:
        if not batch.samples:
            return
        for mode, decoding in self.evaluations.items():
            # the same noise for a question in every evaluation, whatever batch it comes in
            requests = [Request(s, _stable_seed(s, self.seed)) for s in batch.samples]
            trajectories = self._rollout(trainer, pl_module, requests, decoding)
            components, totals = score(self.rewards, trajectories) if stage else ({}, torch.zeros(len(trajectories)))
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
            if stage is not None:
                prefix = stage if mode == "greedy" else f"{stage}/{mode}"
                for name, (value, count) in evaluation_metrics(batch.evaluations[mode]).items():
                    pl_module.log(
                        f"{prefix}/{name}", value, on_step=False, on_epoch=True, batch_size=count, sync_dist=True
                    )
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


def training_metrics(groups: list[Group]) -> dict[str, Tensor | float]:
    """Everything worth a curve about the groups of one iteration."""
    trajectories = [t for g in groups for t in g.trajectories]
    metrics: dict[str, Tensor | float] = {
        f"train/{name}": value for name, (value, _) in mean([measure(t) for t in trajectories]).items()
    }
    for name in groups[0].rewards:
        values = torch.cat([g.rewards[name] for g in groups])
        metrics[f"train/reward/{name}"] = float(values.nanmean())
    totals = torch.stack([g.totals for g in groups])
    advantages = torch.stack([g.advantages for g in groups])
    metrics["train/reward/total"] = float(totals.nanmean())
    metrics["train/reward/failed"] = float(totals.isnan().float().mean())
    metrics["train/reward/group_std"] = float(totals.std(-1).nanmean()) if totals.shape[1] > 1 else 0.0
    metrics["train/advantage/mean"] = float(advantages.mean())
    metrics["train/advantage/std"] = float(advantages.std()) if advantages.numel() > 1 else 0.0
    metrics["train/advantage/zero_groups"] = float((advantages == 0).all(-1).float().mean())
    return metrics


def evaluation_metrics(groups: list[Group]) -> dict[str, tuple[float, int]]:
    """Mean and count by name: accuracy, the other components, and what is measured of the trajectories."""
    rows = []
    for group in groups:
        row = measure(group.trajectories[0])
        for name, value in group.rewards.items():
            row["accuracy" if name == "accuracy" else f"reward/{name}"] = float(value[0])
        rows.append(row)
    return mean(rows)


def prediction(mode: str, group: Group) -> dict[str, Any]:
    """One line of ``predictions.jsonl``."""
    trajectory = group.trajectories[0]
    sample: Sample = trajectory.sample
    numbers = measure(trajectory)
    line: dict[str, Any] = {
        "id": sample.id,
        "image_id": str(sample.meta.get("image_id", sample.id)),
        "mode": mode,
        "question": sample.question,
        "answers": list(sample.answers),
        "answer": trajectory.answer,
        "text": trajectory.text,
        "boxes": [list(region.box) for region in trajectory.regions],
        "crops": int(numbers["crops"]),
        "iou": None if math.isnan(numbers["iou"]) else numbers["iou"],
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
