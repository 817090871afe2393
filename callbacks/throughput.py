"""How fast training goes, and how long it took."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from modules.trajectory import SampleBatch


class Stopwatch:
    """Adds up the seconds between `start` and `stop`."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """The total so far."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._before + running

    def start(self) -> None:
        """Go on counting."""
        self.stop()
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Pause."""
        self._before, self._started = self.seconds, None

    def set(self, seconds: float) -> None:
        """Stop at a total."""
        self._before, self._started = seconds, None


class Throughput(Callback):
    """Logs trajectories and tokens per second and the length of a step; keeps the seconds of training.

    The clock runs from the start of training to its end, waiting for data and rollouts included, and stands
    still while validation runs. (A checkpoint that is saved between two batches counts: there is no hook for
    its end.) The total goes into checkpoints, so that it goes on after a resume, and at the end of the fit
    into ``<default_root_dir>/fit.json`` as ``{"seconds": ..., "steps": ...}``, steps as `trainer.global_step`.

    Logged whenever the trainer writes its logs, as means since the last time:

    - ``train/step_seconds``: a batch, the validation in between not counted;
    - ``train/trajectories_per_second``: all ranks together; rolled out, or read for supervised training;
    - ``train/tokens_per_second``: prompts and completions that were trained, all ranks together: the
      ``tokens`` that the training step returned, or else of all that was rolled out; with neither, not logged.
    """

    def __init__(self) -> None:
        self._watch = Stopwatch()
        self._last = 0.0  # the watch when the window began
        self._batches = 0
        self._trajectories = 0
        self._tokens: int | None = 0  # None: some batch did not tell

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._watch.start()
        self._begin_window()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: SampleBatch, batch_idx: int
    ) -> None:
        """Count the batch; log when the trainer is about to write."""
        self._batches += 1
        self._trajectories += sum(len(group.trajectories) for group in batch.groups) or len(batch.samples)
        tokens = count_tokens(batch, outputs)
        self._tokens = None if tokens is None or self._tokens is None else self._tokens + tokens
        if not trainer._logger_connector.should_update_logs:
            return
        seconds = self._watch.seconds - self._last
        rates = {"train/trajectories_per_second": self._trajectories / seconds}
        if self._tokens is not None:
            rates["train/tokens_per_second"] = self._tokens / seconds
        pl_module.log("train/step_seconds", seconds / self._batches, on_step=True, on_epoch=False)
        pl_module.log_dict(rates, on_step=True, on_epoch=False, sync_dist=True, reduce_fx="sum")
        self._begin_window()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause the clock."""
        self._watch.stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the clock go on, unless validation is all that runs."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._watch.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._watch.stop()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``fit.json``, whole or not at all."""
        if not trainer.is_global_zero:
            return
        target = Path(trainer.default_root_dir) / "fit.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".json.tmp")
        unfinished.write_text(json.dumps({"seconds": self._watch.seconds, "steps": trainer.global_step}) + "\n")
        os.replace(unfinished, target)

    def state_dict(self) -> dict[str, Any]:
        """The seconds of training so far."""
        return {"seconds": self._watch.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the seconds of a checkpoint."""
        self._watch.set(float(state_dict["seconds"]))

    def _begin_window(self) -> None:
        self._last = self._watch.seconds
        self._batches = self._trajectories = 0
        self._tokens = 0


def count_tokens(batch: SampleBatch, outputs: Any) -> int | None:
    """Tokens of the prompts and completions of a training batch; None where nothing tells.

    Args:
        batch: with its rollouts, or without any in supervised training.
        outputs: what the training step returned; its ``tokens`` (those that were trained) come first.
    """
    if isinstance(outputs, dict) and "tokens" in outputs:
        return int(outputs["tokens"])
    if batch.groups:
        trajectories = [t for group in batch.groups for t in group.trajectories]
        return sum(t.prompt_ids.numel() + t.completion_ids.numel() for t in trajectories)
    return None
