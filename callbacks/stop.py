"""A run that is asked to end does so between two steps, with a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from modules.rgrpo import RGRPOModule

ASKED = (signal.SIGTERM, signal.SIGINT)


class CleanStop(L.Callback):
    """On SIGTERM or Ctrl-C, ends the fit behind the batch or the validation that runs, and saves ``last.ckpt`` there.

    Lightning would interrupt a step on Ctrl-C, and on SIGTERM ends without a checkpoint. All ranks stop at the same
    batch, whichever of them was asked; where groups wait for further batches (``objective.resample``), behind the step
    that they wait for. The process exits with 128 plus the signal's number, as shells have it. A second Ctrl-C ends at
    once, without a checkpoint. Handlers are taken over while a fit runs, in the main thread only; a Ctrl-C that
    the process was started to ignore, as a job in the background, stays ignored.
    """

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal
        self._before: dict[int, Any] = {}
        self._process = 0  # whose handlers they are

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over: now, for Lightning has only just taken them, and would add itself to earlier handlers.

        (Its handler speaks to other ranks at once, in the middle of whatever they are doing.)
        """
        self.asked = None
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            heeded = [number for number in ASKED if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._ask) for number in heeded}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End, if any rank was asked to, and no group waits for a step.

        Raises:
            SystemExit: it was.
        """
        if not waits(pl_module) and self._asked(trainer):
            self._stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same behind a validation.

        Raises:
            SystemExit: it was.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking or waits(pl_module) or not self._asked(trainer):
            return
        for checkpoint in trainer.checkpoint_callbacks:
            checkpoint.on_validation_end(trainer, pl_module)  # they come behind this, and what was measured is theirs
        self._stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same behind all, for what comes after a fit would begin; else give the signals back.

        Raises:
            SystemExit: it was.
        """
        if self._asked(trainer):
            self._stop(trainer)
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _asked(self, trainer: L.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self.asked is not None, all=False)

    def _stop(self, trainer: L.Trainer) -> NoReturn:
        file = None
        checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        if checkpoint is not None and checkpoint.dirpath is not None:
            file = Path(checkpoint.dirpath) / "last.ckpt"
            trainer.save_checkpoint(file, weights_only=False)  # with the optimizer
        if trainer.is_global_zero:
            where = "no checkpoint is configured" if file is None else f"`--ckpt_path=last` goes on from {file}"
            print(f"stopped behind step {trainer.global_step}; {where}", flush=True)
        raise SystemExit(128 + (self.asked or signal.SIGTERM))

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork: Ctrl-C reaches the whole group, and the step still needs its batch
            if number == signal.SIGTERM:  # somebody ends this very process
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
        name = signal.Signals(number).name
        print(f"{name}: the run stops behind this step; Ctrl-C (again) ends it at once", flush=True)


def waits(module: L.LightningModule) -> bool:
    """Whether groups were rolled out that no step has learned from yet, on all ranks alike; no checkpoint has them."""
    return isinstance(module, RGRPOModule) and module.waiting.batches > 0
