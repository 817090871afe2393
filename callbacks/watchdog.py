"""A process that hangs says where, and ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: trying again may help


class Watchdog(L.Callback):
    """Ends a process in which nothing has happened for too long, after writing what each of its threads was doing.

    A rank that waits for one that died or fell behind waits for the process group's time-out (30 minutes in Lightning),
    or forever, as a rule without a word of where; ``timeout`` has to be below it to say so first. Every batch, of
    whatever stage, is a sign of life. Without one for ``timeout`` seconds, a thread writes the stacks of all threads to
    the error output and to ``hang.rank<rank>.txt`` in the run's folder, and ends the process with code 75; a launcher
    or SLURM then ends the others. A single batch has to be shorter than that, with its rollouts.

    Args:
        timeout: seconds; None: nothing is watched.

    Raises:
        ValueError: ``timeout`` is not above 0.
    """

    def __init__(self, timeout: float | None = 7200.0) -> None:
        if timeout is not None and timeout <= 0:
            raise ValueError(f"Expected `timeout` to be above 0, but got {timeout}.")
        self.timeout = timeout
        self.end: Callable[[int], Any] = os._exit  # the thread that hangs could not be told to end
        self._last = (0.0, "")  # time and name of the latest sign of life
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin to watch."""
        if self.timeout is None:
            return
        self._alive(f"the start of {stage}")
        self._done.clear()
        file = Path(trainer.default_root_dir) / f"hang.rank{trainer.global_rank}.txt"
        rank = f"rank {trainer.global_rank} of {trainer.world_size}"
        self._thread = threading.Thread(target=self._watch, args=(self.timeout, file, rank), daemon=True)
        self._thread.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._stop()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A sign of life, and so below."""
        self._alive(f"batch {batch_idx} of training, step {trainer.global_step}, began")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._alive(f"batch {batch_idx} of training, step {trainer.global_step}, ended")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._alive(f"batch {batch_idx} of validation began")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._alive("validation ended")

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._alive(f"batch {batch_idx} of the test began")

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._alive(f"batch {batch_idx} of prediction began")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._alive("a checkpoint was being saved")

    def _alive(self, what: str) -> None:
        self._last = (time.monotonic(), what)

    def _stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = None

    def _watch(self, timeout: float, file: Path, rank: str) -> None:
        while not self._done.wait(max(0.0, self._last[0] + timeout - time.monotonic())):
            since, what = self._last
            if time.monotonic() - since < timeout:
                continue
            message = (
                f"error: {rank} has hung: nothing happened for {timeout:g} s (`watchdog.timeout`) after {what}. "
                f"What its threads were doing is in {file}.\n"
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", encoding="utf-8") as stacks:
                stacks.write(message)
                stacks.flush()
                faulthandler.dump_traceback(stacks, all_threads=True)
            sys.stderr.write(message + file.read_text(encoding="utf-8").removeprefix(message))
            sys.stderr.flush()
            self.end(EXIT_CODE)
            return
