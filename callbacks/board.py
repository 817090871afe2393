"""TensorBoard for whoever asks how a run goes: one page of charts, where the policy looks, runs compared."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks.crop_audit import CropAudit
from callbacks.heatmap import draw_looks, shares, shown
from callbacks.monitors import Monitors
from callbacks.rollout import RolloutCallback
from callbacks.writers import add_image, batches_done, writers
from modules.policy import PolicyModule
from modules.rgrpo import RGRPOModule
from modules.sft import SFTModule
from modules.trajectory import Group, SampleBatch

# group -> chart -> what is in it: regular expressions of whole names (docs/curves.md)
CHARTS: dict[str, dict[str, list[str]]] = {
    "Rewards": {
        "accuracy": [r"val(/\w+)?/accuracy", "train/reward/accuracy"],
        "components": [r"train/reward/(?!failed$|total$|group_std$|penalised$)[^/]+"],
        "total, and its spread within a group": [r"train/reward/(total|group_std|penalised)"],
        "components in validation": [r"val(/\w+)?/reward/[^/]+"],
        "advantage": [r"train/advantage/(mean|std|turn_mean|turn_std)"],
        "groups that teach nothing": ["train/advantage/zero_groups"],
        "correlation of rewards": [r"train/correlation/.+"],
    },
    "Regions": {
        "share that looked": [r"(train|val(/\w+)?)/zoom_rate"],
        "crops, turns": [r"(train|val(/\w+)?)/(crops|turns)"],
        "share of the image that a crop covers": [r"(train|val(/\w+)?)/crop_area"],
        "enlarged by": [r"(train|val(/\w+)?)/(zoom_factor|zoom_chosen)"],
        "IoU with the annotated region": [r"(train|val(/\w+)?)/iou"],
        "whole-image, repeated and refused boxes": [r"(train|val(/\w+)?)/(whole_image|duplicates|invalid)"],
        "differentiable grounding": [r"train/grounding/\w+"],
        "does the crop matter? (audit)": [r"val/audit/.+"],
    },
    "Optimisation": {
        "loss": [r"train/loss(/\w+)?"],
        "gradient norm": ["train/grad_norm"],
        "learning rate": ["train/learning_rate"],
        "entropy, surprisal": [r"train/(entropy|surprisal)(/\w+)?"],
        "ratio": ["train/ratio"],
        "clipped": [r"train/(clip_low|clip_high|clip_fraction)"],
        "KL": [r"train/(kl|sampler_kl)"],
    },
    "Throughput": {
        "seconds a step": ["train/step_seconds"],
        "trajectories a second": ["train/trajectories_per_second"],
        "tokens a second": ["train/tokens_per_second"],
        "tokens a trajectory": [r"(train|val(/\w+)?)/tokens"],
    },
    "Health": {
        "rows left out": ["data/skipped"],
        "steps left out, memory, workers": [r"health/.+"],
        "rewards that failed": [r"train/reward/failed(/.+)?"],
        "how trajectories end": [r"train/stop/.+"],
        "cut, out of room": [r"(train|val(/\w+)?)/(truncated|faults|refused_context)"],
        "monitors": [r"train/monitor/.+"],
        "learner against sampler": [r"train/(sampler_gap|sampler_correction|sampler_correction_capped)"],
        "batches a step": ["train/batches_per_step"],
    },
}
FINAL = re.compile(r"val/(\w+/)?accuracy|val/(iou|zoom_rate|crop_area)|train/(loss|reward/total)")
ROLLED = {  # charts that are empty where training does not roll out
    *("components", "total, and its spread within a group", "advantage", "groups that teach nothing"),
    *("correlation of rewards", "ratio", "clipped", "KL", "rewards that failed", "how trajectories end"),
    *("learner against sampler", "batches a step", "entropy, surprisal"),
}


@dataclass
class Looks:
    """What is kept of trajectories until it is written, without their images."""

    boxes: list[Tensor] = field(default_factory=list)  # (N, 4) of a trajectory's crops, in shares of the image
    annotated: list[Tensor] = field(default_factory=list)  # (M, 4) of a question
    lengths: list[float] = field(default_factory=list)  # tokens that a trajectory wrote

    def add(self, groups: Sequence[Group]) -> None:
        """Count the trajectories of groups."""
        self.boxes += [shown(t) for group in groups for t in group.trajectories]
        self.annotated += [shares(group.sample, group.sample.regions) for group in groups]
        self.lengths += [float(t.sampled.sum()) for group in groups for t in group.trajectories]


class Board(L.Callback):
    """Writes what scalars alone do not show; with loggers that take none of it, it does nothing.

    - when a run starts, a layout for TensorBoard's custom scalars (`CHARTS`);
    - in training, now and then, of all trajectories since the last time: ``train/boxes/area``, ``/x``, ``/y``
      (histograms: the area of the crops that were shown and where their centres are, in shares of the image),
      ``train/length`` (a histogram: tokens that a trajectory wrote), ``train/looks`` (an image: how often each
      place was shown, and how often it is annotated);
    - the same of every validation, below ``val/``;
    - when a fit ends, its settings (`settings`) and latest metrics, as ``final/<name>``, for TensorBoard's HParams.

    On several ranks it is the first one's trajectories.

    Args:
        every_n_steps: batches between two histograms of training.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` to be at least 1, but got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._trained, self._validated = Looks(), Looks()
        self._told: dict[str, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the layout."""
        for writer in writers(trainer, "add_custom_scalars"):
            writer.add_custom_scalars(layout(empty_charts(trainer, pl_module)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember what the run was told, before anything changes it."""
        assert isinstance(pl_module, PolicyModule)
        self._told = settings(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: SampleBatch, batch_idx: int
    ) -> None:
        """Collect; write when it is time."""
        if not writers(trainer, "add_histogram"):
            return
        self._trained.add(batch.groups)
        if batches_done(trainer) % self.every_n_steps == 0 and self._trained.lengths:
            write_looks(trainer, "train", self._trained)
            self._trained = Looks()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._validated = Looks()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: SampleBatch, *_: Any
    ) -> None:
        """Collect."""
        if trainer.sanity_checking or not batch.evaluations or not writers(trainer, "add_histogram"):
            return
        self._validated.add(batch.evaluations.get("greedy") or next(iter(batch.evaluations.values())))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write."""
        if self._validated.lengths:
            write_looks(trainer, "val", self._validated)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what the run was and what came of it."""
        if not self._told:  # there was nothing left to train
            return
        metrics = {f"final/{k}": float(v) for k, v in trainer.callback_metrics.items() if FINAL.fullmatch(k)}
        metrics["final/steps"] = float(trainer.global_step)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self._told, metrics, batches_done(trainer))


def layout(without: Collection[str] = ()) -> dict[str, dict[str, list[Any]]]:
    """`CHARTS` as TensorBoard takes them, but for those of these titles."""
    return {
        group: {
            chart: ["Multiline", [f"{n}$" for n in names]] for chart, names in charts.items() if chart not in without
        }
        for group, charts in CHARTS.items()
    }


def empty_charts(trainer: L.Trainer, module: L.LightningModule) -> set[str]:
    """Titles of the charts that this run will write nothing for."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    empty = set() if isinstance(module, RGRPOModule) else set(ROLLED)
    if not any(isinstance(callback, Monitors) for callback in callbacks):
        empty |= {"correlation of rewards", "monitors"}
    if not any(isinstance(callback, CropAudit) for callback in callbacks):
        empty.add("does the crop matter? (audit)")
    if all(set(each.rewards) <= {"accuracy"} for each in callbacks if isinstance(each, RolloutCallback)):
        empty.add("components in validation")
    if getattr(module, "grounder", None) is None:
        empty.add("differentiable grounding")
    return empty


def write_looks(trainer: L.Trainer, stage: str, looks: Looks) -> None:
    """Histograms and the map of where trajectories looked."""
    boxes, annotated = torch.cat(looks.boxes), torch.cat(looks.annotated)
    sizes, centres = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    spreads = {"boxes/area": sizes.prod(1), "boxes/x": centres[:, 0], "boxes/y": centres[:, 1]}
    step = batches_done(trainer)
    for writer in writers(trainer, "add_histogram"):
        for name, values in {**spreads, "length": torch.tensor(looks.lengths)}.items():
            if len(values):
                writer.add_histogram(f"{stage}/{name}", values, step)
    add_image(writers(trainer, "add_image"), f"{stage}/looks", draw_looks(boxes, annotated), step)


def settings(trainer: L.Trainer, module: PolicyModule) -> dict[str, Any]:
    """What a run was told, as far as runs are compared by it: plain values by name."""
    data: Any = getattr(trainer, "datamodule", None)
    found: dict[str, Any] = {
        "stage": type(module).__name__,
        "backbone": type(module.backbone).__name__,
        "trained_parameters": sum(p.numel() for p in module.backbone.parameters() if p.requires_grad),
        "optimizer": type(trainer.optimizers[0]).__name__ if trainer.optimizers else "none",
        "learning_rate": peak_learning_rate(trainer),
        "schedule": module.schedule.name,
        "warmup": module.schedule.warmup,
        "clip_norm": module.clip_norm,
        "micro_batch": module.micro_batch or 0,
        "lora_rank": module.lora.rank,
        "init_from": module.init_from or "",
        "batch_size": getattr(data, "batch_size", 0),
        "max_steps": trainer.max_steps,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "seed": os.environ.get("PL_GLOBAL_SEED", ""),
    }
    if isinstance(module, SFTModule):
        found |= {"sigma": module.sigma or 0.0, "grounding_weight": module.grounding_weight}
    if isinstance(module, RGRPOModule):
        found |= {f"objective/{name}": value for name, value in asdict(module.objective).items()}
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for rollout in (each for each in callbacks if isinstance(each, RolloutCallback)):
            found |= {"group_size": rollout.sampler.size}
            found |= {f"decoding/{name}": value for name, value in asdict(rollout.decoding).items()}
            found |= {f"weight/{name}": reward.weight for name, reward in rollout.rewards.items()}
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in found.items()}


def peak_learning_rate(trainer: L.Trainer) -> float:
    """What the schedule scales."""
    group = trainer.optimizers[0].param_groups[0] if trainer.optimizers else {}
    return float(group.get("initial_lr", group.get("lr", 0.0)))
