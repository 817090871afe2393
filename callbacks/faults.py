"""What goes wrong in a run and does not end it: steps without finite gradients, memory, data workers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.rollout import RolloutCallback
from modules.policy import PolicyError, PolicyModule
from modules.trajectory import Group, Sample, SampleBatch, Trajectory

FOLDER = "faults"
VERSION = 1  # of a dump
logger = logging.getLogger(__name__)


class Faults(L.Callback):
    """Counts what was survived, keeps the batches of steps that were left out, and ends a run that does not recover.

    A step whose loss or gradient is not finite is left out by the policy module. Its batch is written to
    ``faults/step<step>-batch<batch>-rank<rank>.pt`` in the run's folder, which ``train.py postmortem`` reads.
    Logged of training: ``health/nonfinite_steps``, ``health/out_of_memory`` (times that a rollout was halved) and
    ``health/worker_restarts`` (data workers that died), all so far in this process, on the first rank.

    Args:
        max_nonfinite: so many steps in a row may be left out; one more ends the run. Of a batch that makes several
            (``inner_epochs``, ``mini_batches``), the first that is left out counts, and the others are not taken.
        dumps: so many batches are kept at most.

    Raises:
        ValueError: either is negative.
    """

    def __init__(self, max_nonfinite: int = 5, dumps: int = 3) -> None:
        for name, value in (("max_nonfinite", max_nonfinite), ("dumps", dumps)):
            if value < 0:
                raise ValueError(f"Expected `{name}` to be at least 0, but got {value}.")
        self.max_nonfinite = max_nonfinite
        self.dumps = dumps
        self._dumped = 0
        self._seen = 0  # steps that had been left out before this batch

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        assert isinstance(pl_module, PolicyModule)
        self._seen = pl_module.nonfinite

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: SampleBatch, batch_idx: int
    ) -> None:
        """Keep what went wrong with this batch; end the run if it has for too long.

        Raises:
            PolicyError: more than ``max_nonfinite`` steps in a row were left out.
        """
        assert isinstance(pl_module, PolicyModule)
        if pl_module.nonfinite > self._seen:
            self._seen = pl_module.nonfinite
            self._keep(trainer, pl_module, batch, batch_idx)
        counts = survived(trainer, pl_module)
        pl_module.log_now(lambda: {f"health/{name}": float(count) for name, count in counts.items()}, 1)

    def _keep(self, trainer: L.Trainer, module: PolicyModule, batch: SampleBatch, batch_idx: int) -> None:
        details = module.nonfinite_details
        where = "not kept"
        if self._dumped < self.dumps:
            self._dumped += 1
            name = f"step{trainer.global_step}-batch{batch_idx}-rank{trainer.global_rank}.pt"
            file = Path(trainer.default_root_dir) / FOLDER / name
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(dump(trainer, batch, batch_idx, details), file)
            where = f"kept in {file}"
        message = (
            f"step {trainer.global_step}: loss {details['loss']:g}, gradient norm {details['grad_norm']:g}; the step "
            f"is left out, its batch {where}"
        )
        logger.warning(message)
        if module.nonfinite_in_a_row > self.max_nonfinite:
            raise PolicyError(
                f"Expected at most {self.max_nonfinite} steps in a row without a finite loss and gradient "
                f"(`faults.max_nonfinite`), but got {module.nonfinite_in_a_row}; the last: {message}. "
                "`train.py postmortem FILE` says what is in it."
            )


def survived(trainer: L.Trainer, module: PolicyModule) -> dict[str, int]:
    """How often something went wrong so far in this process, on this rank, by name."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    rollouts = [callback for callback in callbacks if isinstance(callback, RolloutCallback)]
    return {
        "nonfinite_steps": module.nonfinite,
        "out_of_memory": sum(getattr(rollout.engine, "halved", 0) for rollout in rollouts),
        "worker_restarts": getattr(trainer.train_dataloader, "restarts", 0),
    }


def dump(trainer: L.Trainer, batch: SampleBatch, batch_idx: int, details: Mapping[str, Any]) -> dict[str, Any]:
    """A batch and what was wrong with its step, in types that ``torch.load`` reads with ``weights_only``."""
    images: dict[int, torch.Tensor] = {id(image): image for sample in batch.samples for image in sample.images}
    places = {key: place for place, key in enumerate(images)}
    return {
        "version": VERSION,
        "step": trainer.global_step,
        "batch": batch_idx,
        "rank": trainer.global_rank,
        "details": dict(details),
        "images": list(images.values()),
        "samples": [_sample(sample, [places[id(image)] for image in sample.images]) for sample in batch.samples],
        "groups": [_group(group) for group in batch.groups],
    }


def _sample(sample: Sample, images: list[int]) -> dict[str, Any]:
    return {
        "id": sample.id,
        "question": sample.question,
        "answers": list(sample.answers),
        "images": images,
        "rationale": [
            {"text": step.text, "box": list(step.region.box) if step.region else None} for step in sample.rationale
        ],
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "id": group.sample.id,
        "rewards": dict(group.rewards),
        "totals": group.totals,
        "advantages": group.advantages,
        "turn_advantages": group.turn_advantages,  # (G, K), or None
        "trajectories": [_trajectory(trajectory) for trajectory in group.trajectories],
    }


def _trajectory(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "text": trajectory.text,
        "stop": trajectory.stop.value,
        "answer": trajectory.answer,
        "boxes": [list(region.box) for region in trajectory.regions],
        "prompt_ids": trajectory.prompt_ids,
        "completion_ids": trajectory.completion_ids,
        "sampled": trajectory.sampled,
        "log_probs": trajectory.log_probs,
    }
