"""A run that is asked to end does so between two steps, with a checkpoint to go on from."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

ASKED = (signal.SIGTERM, signal.SIGINT)


class CleanStop(L.Callback):
    """On SIGTERM or Ctrl-C, ends the fit behind the batch that is being trained, and saves ``last.ckpt`` there.

    Lightning would interrupt a step on Ctrl-C, and on SIGTERM ends without a checkpoint. All ranks stop at the same
    batch, whichever of them was asked. The process exits with 128 plus the signal's number, as shells have it. A second
    Ctrl-C ends at once, without a checkpoint. Handlers are taken over while a fit runs, in the main thread only.
    """

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over: now, for Lightning has only just taken them, and would add itself to earlier handlers.

        (Its handler speaks to other ranks at once, in the middle of whatever they are doing.)
        """
        self.asked = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in ASKED}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """End, if any rank was asked to.

        Raises:
            SystemExit: it was.
        """
        if not trainer.strategy.reduce_boolean_decision(self.asked is not None, all=False):
            return
        file = None
        checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        if checkpoint is not None and checkpoint.dirpath is not None:
            file = Path(checkpoint.dirpath) / "last.ckpt"
            trainer.save_checkpoint(file, weights_only=False)  # with the optimizer
        if trainer.is_global_zero:
            where = "no checkpoint is configured" if file is None else f"`--ckpt_path=last` goes on from {file}"
            print(f"stopped behind step {trainer.global_step}; {where}", flush=True)
        raise SystemExit(128 + (self.asked or signal.SIGTERM))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
        name = signal.Signals(number).name
        print(f"{name}: the run stops behind this step; Ctrl-C (again) ends it at once", flush=True)
