"""A run that is asked to end does so between two steps, with a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from callbacks.requeue import NOTICE, SIGNAL, PutBack, job_name, leave_to_us
from callbacks.rollout import RolloutCallback
from modules.rgrpo import RGRPOModule

ASKED = (signal.SIGTERM, signal.SIGINT)


class CleanStop(L.Callback):
    """On SIGTERM or Ctrl-C, ends the fit behind the batch (and the validation that is due there) or the
    validation that runs, and saves ``last.ckpt`` there.

    Lightning would interrupt a step on Ctrl-C, and on SIGTERM ends without a checkpoint. All ranks stop at the same
    batch, whichever of them was asked; where groups wait for further batches (``objective.resample``), behind the step
    that they wait for. The process exits with 128 plus the signal's number, as shells have it. A second Ctrl-C ends at
    once, without a checkpoint. Handlers are taken over while a fit runs, in the main thread only; a Ctrl-C that
    the process was started to ignore, as a job in the background, stays ignored.

    In a SLURM job, SIGUSR1 and SIGTERM end the run in the same way with `PutBack`, whose code is 0: whoever runs the
    command line then puts the job back into the queue. SIGUSR1 is heeded as soon as this callback exists, and by all
    runs of the process after it: it also ends a test that can be gone on with (``rollout.resume``), behind its batch.
    A test that cannot is ended only where another run came before it in this process, for it would never get further.
    """

    def __init__(self) -> None:
        NOTICE.listen()
        self.asked: int | None = None  # the signal
        self._before: dict[int, Any] = {}
        self._process = 0  # whose handlers they are

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have nobody else requeue; count the runs of this process; come behind all callbacks that the checkpoint has
        to find with this batch in their state. Those that save are last in any case."""
        leave_to_us(trainer)
        NOTICE.runs += 1
        trainer.callbacks = sorted(  # type: ignore[attr-defined]
            trainer.callbacks,  # type: ignore[attr-defined]
            key=lambda callback: (isinstance(callback, Checkpoint), callback is self),
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over: now, for Lightning has only just taken them, and would add itself to earlier handlers.

        (Its handler speaks to other ranks at once, in the middle of whatever they are doing.)
        """
        self.asked = None
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            heeded = [number for number in ASKED if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._ask) for number in heeded}
        if trainer.is_global_zero and (job := job_name(os.environ)) is not None:
            restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
            print(f"SLURM job {job}, restarts {restarts}: training begins at step {trainer.global_step}", flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End, if any rank was asked to, and no group waits for a step; behind the validation, if one is due here: from
        a checkpoint before it, the run would go on without it.

        Raises:
            SystemExit: it was.
        """
        if waits(pl_module) or not self._asked(trainer):
            return
        if not trainer.strategy.reduce_boolean_decision(validates(trainer), all=True):
            trainer._logger_connector.update_train_step_metrics()  # Lightning would write them behind this hook
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

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """End a test, each rank by itself: they may have different numbers of batches, and all lines are on disk.

        Raises:
            PutBack: SLURM has announced the end.
        """
        resumes = any(isinstance(c, RolloutCallback) and c.resume for c in trainer.callbacks)  # type: ignore[attr-defined]
        if NOTICE.came and (resumes or NOTICE.runs > 1) and (job := job_name(os.environ)) is not None:
            kept = "what the test has answered is kept" if resumes else "the test begins anew"
            raise PutBack(job, SIGNAL, kept, trainer.is_global_zero)

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
        return trainer.strategy.reduce_boolean_decision(self.asked is not None or NOTICE.came, all=False)

    def _stop(self, trainer: L.Trainer) -> NoReturn:
        file = None
        checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        if checkpoint is not None and checkpoint.dirpath is not None:
            file = Path(checkpoint.dirpath) / "last.ckpt"
            trainer.save_checkpoint(file, weights_only=False)  # with the optimizer
        where = "no checkpoint is configured" if file is None else f"`--ckpt_path=last` goes on from {file}"
        if trainer.is_global_zero:
            print(f"stopped behind step {trainer.global_step}; {where}", flush=True)
        number = self.asked or (SIGNAL if NOTICE.came else signal.SIGTERM)
        by_slurm = NOTICE.came or self.asked == signal.SIGTERM  # not by Ctrl-C
        job = job_name(os.environ)
        if job is not None and trainer.strategy.reduce_boolean_decision(by_slurm, all=False):
            if signal.SIGTERM in self._before:  # which comes as soon as the first rank has put the job back
                self._before[signal.SIGTERM] = signal.SIG_IGN
            raise PutBack(job, number, where, trainer.is_global_zero)
        raise SystemExit(128 + number)

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


def validates(trainer: L.Trainer) -> bool:
    """Whether a validation is due behind the batch that ends."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if fetcher is None or not loop._should_check_val_fx(fetcher):
        return False
    loop.val_loop.setup_data()  # as it does at the first validation, to know how many batches there are
    return not loop.val_loop.skip
