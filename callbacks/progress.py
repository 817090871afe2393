"""The few numbers that matter while a run goes on, on a terminal and in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from callbacks.rollout import RolloutCallback
from modules.engine import LocalEngine

TRAIN_NAMES = {  # metric -> its name on the bar, in this order
    "train/reward/total": "reward",
    "train/loss": "loss",  # only where there are no rewards
    "train/reward/accuracy": "acc",
    "train/zoom_rate": "zoom",
    "train/trajectories_per_second": "traj/s",
}
VAL_NAMES = {"val/accuracy": "acc", "val/zoom_rate": "zoom"}


class RunProgressBar(TQDMProgressBar):
    """Lightning's bar with short names on a terminal; a plain line now and then where there is none.

    A bar redraws itself with carriage returns, which a log file keeps all of. So where stdout is no terminal
    the bars are off, and every ``line_seconds`` a line tells the step, the time used and left until
    ``max_steps`` or ``max_epochs``, the rate and the numbers of the bar. Each validation within a fit gets one.
    A rollout that takes longer than that tells how many of its trajectories have ended, behind the bar or in lines.
    After fit, validate and test, a table of the ``val/`` or ``test/`` metrics follows in both cases; it takes
    the place of Lightning's own.

    Args:
        refresh_rate: batches between two updates of a bar on a terminal; 0 turns bars and lines off.
        line_seconds: seconds between two lines where there is no terminal.
    """

    def __init__(self, refresh_rate: int = 1, line_seconds: float = 12.0) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.line_seconds = line_seconds
        self._plain = False
        self._due = 0.0  # when the next line is
        self._started = 0.0  # when the fit started, and what was done by then
        self._first_step = 0
        self._first_fraction = 0.0
        self._stage_started = 0.0
        self._table_wanted = True
        self._rollout_bar: Tqdm | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether bars are drawn."""
        return super().is_enabled and not self._plain

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See whether somebody looks on."""
        super().setup(trainer, pl_module, stage)
        self._plain = not sys.stdout.isatty()
        self._due = 0.0
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RolloutCallback) and isinstance(callback.engine, LocalEngine):
                callback.engine.watcher = self._rolled_out

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print without breaking the bar; `LightningModule.print` ends up here."""
        if self._plain:
            self._say(sep.join(map(str, args)))
        else:
            super().print(*args, sep=sep, **kwargs)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands behind the bar: short name -> number as text."""
        metrics = trainer.callback_metrics
        shown = {short: f"{float(metrics[name]):.3g}" for name, short in TRAIN_NAMES.items() if name in metrics}
        if "reward" in shown:
            shown.pop("loss", None)
        if trainer.optimizers:
            shown["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.1e}"
        if "val/accuracy" in metrics:
            shown["val acc"] = f"{float(metrics['val/accuracy']):.3g}"
        return shown

    def on_train_start(self, *args: Any) -> None:
        """Remember where this fit begins, for the rate and the time left."""
        super().on_train_start(*args)
        self._started = time.monotonic()
        self._first_step = self.trainer.global_step
        self._first_fraction = fraction_done(self.trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Redraw the bar, or write a line if one is due."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._is_due():
            self._train_line(trainer, pl_module)

    def on_train_end(self, *args: Any) -> None:
        """Close the bar, or write the last line."""
        super().on_train_end(*args)
        if self._speaks():
            self._train_line(self.trainer, self.trainer.lightning_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The table of the last validation."""
        self._table(trainer, "val/")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar; when validation is all that runs, silence Lightning's table for ours."""
        super().on_validation_start(trainer, pl_module)
        self._stage_started = time.monotonic()
        if trainer.state.fn == "validate":
            loop = trainer.validate_loop
            self._table_wanted, loop.verbose = loop.verbose, False

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Redraw the bar, or write a line if one is due."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if not trainer.sanity_checking and self._is_due():
            self._stage_line("validation", batch_idx, self.total_val_batches_current_dataloader)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Within a fit the result in a line, else the table."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "validate":
            self._table(trainer, "val/")
        elif self._speaks() and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            shown = {short: f"{float(metrics[name]):.3g}" for name, short in VAL_NAMES.items() if name in metrics}
            took = clock(time.monotonic() - self._stage_started)
            self._say(f"step {trainer.global_step}  validation took {took} | {spaced(shown)}")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar; silence Lightning's table for ours."""
        super().on_test_start(trainer, pl_module)
        self._stage_started = time.monotonic()
        loop = trainer.test_loop
        self._table_wanted, loop.verbose = loop.verbose, False

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Redraw the bar, or write a line if one is due."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._is_due():
            self._stage_line("test", batch_idx, self.total_test_batches_current_dataloader)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The table."""
        super().on_test_end(trainer, pl_module)
        self._table(trainer, "test/")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        super().on_predict_start(trainer, pl_module)
        self._stage_started = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Redraw the bar, or write a line if one is due."""
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._is_due():
            self._stage_line("predict", batch_idx, self.total_predict_batches_current_dataloader)

    def _rolled_out(self, ended: int, total: int, seconds: float) -> None:
        """A bar of its own for a rollout that takes long, or a line now and then."""
        if self._rollout_bar is None and (seconds < self.line_seconds or ended == total):
            return
        if self._plain:
            if self._is_due():
                left = clock(seconds * (total - ended) / ended)
                self._say(f"rollout  {ended}/{total} trajectories  {clock(seconds)} + {left} left")
                self._due = time.monotonic() + self.line_seconds
        elif self.is_enabled:
            if self._rollout_bar is None:
                bar = {"desc": "rollout", "unit": "trajectory", "leave": False, "position": 2}
                self._rollout_bar = Tqdm(total=total, initial=ended, **bar)
            self._rollout_bar.update(ended - self._rollout_bar.n)
            if ended == total:
                self._rollout_bar.close()
                self._rollout_bar = None

    def _speaks(self) -> bool:
        """Whether lines are written: no terminal, rank zero, not turned off."""
        return self._plain and super().is_enabled

    def _is_due(self) -> bool:
        return self._speaks() and time.monotonic() >= self._due

    def _say(self, line: str) -> None:
        if self.trainer.is_global_zero:
            print(line, flush=True)

    def _train_line(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        elapsed = time.monotonic() - self._started
        fraction = fraction_done(trainer)
        last = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        parts = [f"step {trainer.global_step}{last}", f"epoch {trainer.current_epoch}"]
        if fraction > self._first_fraction:
            left = elapsed * (1 - fraction) / (fraction - self._first_fraction)
            parts += [f"{fraction:.0%}", f"{clock(elapsed)} + {clock(left)} left"]
        else:
            parts.append(clock(elapsed))
        parts.append(pace(trainer.global_step - self._first_step, elapsed))
        self._say(f"{'  '.join(parts)} | {spaced(self.get_metrics(trainer, pl_module))}")
        self._due = time.monotonic() + self.line_seconds

    def _stage_line(self, stage: str, batch_idx: int, total: float) -> None:
        elapsed, done = time.monotonic() - self._stage_started, batch_idx + 1
        left = f" + {clock(elapsed * (total - done) / done)} left" if total < float("inf") else ""
        self._say(f"{stage}  batch {done}/{total}  {clock(elapsed)}{left}  {pace(done, elapsed, 'batch')}")
        self._due = time.monotonic() + self.line_seconds

    def _table(self, trainer: pl.Trainer, prefix: str) -> None:
        wanted, self._table_wanted = self._table_wanted, True
        table = metric_table({name: float(value) for name, value in trainer.callback_metrics.items()}, prefix)
        if table and wanted:
            self._say(f"\n{table}\n")


def fraction_done(trainer: pl.Trainer) -> float:
    """How much of a fit is done: of ``max_steps`` or ``max_epochs``, whichever comes first; 0 without limits."""
    steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    batches = (trainer.max_epochs or 0) * trainer.num_training_batches
    epochs = (trainer.fit_loop.total_batch_idx + 1) / batches if 0 < batches < float("inf") else 0.0
    return min(max(steps, epochs), 1.0)


def metric_table(metrics: Mapping[str, float], prefix: str) -> str:
    """The metrics that begin with ``prefix``, one a line, sorted and aligned; empty if there are none."""
    chosen = {name: f"{value:.4f}" for name, value in sorted(metrics.items()) if name.startswith(prefix)}
    if not chosen:
        return ""
    width, digits = max(map(len, chosen)), max(map(len, chosen.values()))
    return "\n".join(f"{name:<{width}}  {value:>{digits}}" for name, value in chosen.items())


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def pace(count: int, seconds: float, unit: str = "step") -> str:
    """Units per second, or seconds per unit where that is the larger number."""
    if count == 0 or seconds == 0:
        return f"- {unit}/s"
    return f"{count / seconds:.2f} {unit}/s" if count >= seconds else f"{seconds / count:.2f} s/{unit}"


def spaced(metrics: Mapping[str, str]) -> str:
    """Names and numbers in a row."""
    return "  ".join(f"{name} {value}" for name, value in metrics.items())
