"""What a run said, as a file that a program can read, and at its end what it passed over."""

from __future__ import annotations

import json
import logging
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.faults import survived
from modules.policy import PolicyModule
from modules.trajectory import Group, SampleBatch

NAMED = 20  # rows that the summary spells out
logger = logging.getLogger(__name__)


class JsonLines(logging.Handler):
    """Log records as JSON, one a line; kept in memory until there is a file."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.warnings = 0
        self.about: dict[str, Any] = {}  # what stands in every line
        self._waiting: list[str] = []
        self._file: Path | None = None

    def open(self, file: Path) -> None:
        """Append what was said so far, and from now on all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._write(self._waiting)
        self._waiting = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; what cannot be formatted or written is said to the error output, and the run goes on."""
        self.warnings += record.levelno >= logging.WARNING
        try:
            self._emit(record)
        except Exception:  # a message's arguments, a full disk: no line of a log is worth a run
            self.handleError(record)

    def _emit(self, record: logging.LogRecord) -> None:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self.about,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        text = json.dumps(line)
        if self._file is None:
            self._waiting.append(text)
        else:
            self._write([text])

    def _write(self, lines: Iterable[str]) -> None:
        assert self._file is not None
        with self._file.open("a", encoding="utf-8") as file:  # opened each time: a line is there when it was said
            file.writelines(line + "\n" for line in lines)


class Summary(L.Callback):
    """Keeps a log a rank, and says at the end what was left out, refused, repeated or failed.

    ``log.rank<rank>.jsonl`` in the run's folder has a JSON object for every record that its logger lets through and
    that is at least ``info``: time, level, logger, rank, step and message (warnings and errors of the project, ``info``
    of Lightning too; not what Python's ``warnings`` says). ``summary.<command>.json`` counts, over all ranks and this
    attempt: rows and rationales, rewards, groups, boxes, trajectories that were cut, and what `Faults` survived. It is
    written at the end of fit, validation, test and prediction, also if an error or a signal ends them (then of this
    rank alone), and printed in short.
    """

    _attached: JsonLines | None = None  # of the latest run in this process

    def __init__(self) -> None:
        self.lines = JsonLines()
        self.counts: Counter[str] = Counter()
        Summary._attach(self.lines)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Open the log."""
        Summary._attach(self.lines)
        self.lines.about = {"rank": trainer.global_rank, "step": 0}
        self.lines.open(Path(trainer.default_root_dir) / f"log.rank{trainer.global_rank}.jsonl")
        self.counts = Counter()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the log."""
        Summary._attach(None)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: SampleBatch, batch_idx: int
    ) -> None:
        """Count."""
        self.lines.about["step"] = trainer.global_step
        self.counts.update(counted(batch.groups, trained=True))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: SampleBatch, *_: Any
    ) -> None:
        """Count."""
        self._evaluated(batch)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: SampleBatch, *_: Any
    ) -> None:
        """Count."""
        self._evaluated(batch)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: SampleBatch, *_: Any
    ) -> None:
        """Count."""
        self._evaluated(batch)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum up."""
        self._finish(trainer, pl_module, "finished")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum up, unless a fit goes on."""
        if trainer.state.fn == "validate":
            self._finish(trainer, pl_module, "finished")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum up."""
        self._finish(trainer, pl_module, "finished")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum up."""
        self._finish(trainer, pl_module, "finished")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Sum up what this rank knows, for the others may be elsewhere."""
        told = (type(exception), exception, exception.__traceback__)
        # to the log alone: the terminal shows it anyway
        self.lines.handle(logging.LogRecord(__name__, logging.ERROR, "", 0, "ended by %r", (exception,), told))
        try:
            self._finish(trainer, pl_module, f"{type(exception).__name__}: {exception}", alone=True)
        except Exception as error:  # a full disk, say: it must not hide what ended the run
            logger.warning("The summary could not be written: %r", error)
        Summary._attach(None)

    @classmethod
    def _attach(cls, log: JsonLines | None) -> None:
        """Listen to everything; to nothing any more of an earlier run."""
        root, lightning = logging.getLogger(), logging.getLogger("lightning.pytorch")
        for source in (root, lightning):
            for handler in (cls._attached, logging.lastResort):
                if handler is not None:
                    source.removeHandler(handler)
        if log is not None:
            if not root.handlers and logging.lastResort is not None:
                root.addHandler(logging.lastResort)  # warnings go to the terminal as they do where nobody listens
            root.addHandler(log)
            if not lightning.propagate:  # then its records do not reach the root
                lightning.addHandler(log)
        cls._attached = log

    def _evaluated(self, batch: SampleBatch) -> None:
        for groups in batch.evaluations.values():
            self.counts.update(counted(groups, trained=False))

    def _finish(self, trainer: L.Trainer, module: L.LightningModule, ended: str, alone: bool = False) -> None:
        assert isinstance(module, PolicyModule)
        rows = [*getattr(trainer.datamodule, "skipped", ()), *module.refused]  # type: ignore[attr-defined]
        own = {"rows": rows, "counts": {**self.counts, **survived(trainer, module), "warnings": self.lines.warnings}}
        told = [own] if alone else gathered(own, trainer.world_size)
        if not (alone or trainer.is_global_zero):
            return
        found = summed(told, trainer.global_step, ended)
        rank = f".rank{trainer.global_rank}" if alone and trainer.world_size > 1 else ""
        assert trainer.state.fn is not None
        file = Path(trainer.default_root_dir) / f"summary.{trainer.state.fn.value}{rank}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(spoken(found, file), flush=True)


def counted(groups: Sequence[Group], trained: bool) -> Counter[str]:
    """What is to be said of groups, by name; boxes by the reason of their refusal, rewards by component."""
    counts: Counter[str] = Counter()
    for group in groups:
        if trained:
            counts["groups"] += 1
            turns = getattr(group, "turn_advantages", None)
            counts["groups_without_advantage"] += not (group.advantages.any() or (turns is not None and turns.any()))
        counts.update({f"rewards_failed/{name}": int(v.isnan().sum()) for name, v in group.rewards.items()})
        for trajectory in group.trajectories:
            counts["trajectories"] += 1
            counts["trajectories_cut"] += trajectory.stop.truncated
            counts["crops"] += sum(turn.crop is not None for turn in trajectory.turns)
            counts.update(f"boxes_refused/{turn.fault}" for turn in trajectory.turns if turn.fault is not None)
    return counts


def gathered(own: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """What every rank knows; all ranks have to ask."""
    if world_size == 1:
        return [own]
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, own)
    return found


def summed(told: Sequence[dict[str, Any]], steps: int, ended: str) -> dict[str, Any]:
    """One summary of all ranks: a row that several left out is one."""
    rows = list(dict.fromkeys(row for each in told for row in each["rows"]))
    counts: Counter[str] = Counter()
    for each in told:
        counts.update(each["counts"])
    flat = {name: count for name, count in counts.items() if "/" not in name}
    nested: dict[str, dict[str, int]] = {"boxes_refused": {}, "rewards_failed": {}}
    for name, count in sorted(counts.items()):
        if "/" in name and count:
            group, _, part = name.partition("/")
            nested[group][part] = count
    return {"ended": ended, "steps": steps, "rows_left_out": len(rows), "rows": rows[:NAMED], **flat, **nested}


def spoken(found: dict[str, Any], file: Path) -> str:
    """The summary in a few lines; what did not happen is not said."""
    refused, failed = sum(found["boxes_refused"].values()), found["rewards_failed"]
    facts = [
        (found["rows_left_out"], "rows left out"),
        (refused, "boxes refused (" + ", ".join(f"{k} {n}" for k, n in found["boxes_refused"].items()) + ")"),
        (found.get("trajectories_cut", 0), f"of {found.get('trajectories', 0)} trajectories cut by a limit"),
        (
            found.get("groups_without_advantage", 0),
            f"of {found.get('groups', 0)} groups without an advantage",
        ),
        (sum(failed.values()), "rewards not judged (" + ", ".join(f"{k} {n}" for k, n in failed.items()) + ")"),
        (found["nonfinite_steps"], "steps left out, not finite"),
        (found["out_of_memory"], "rollouts halved for memory"),
        (found["worker_restarts"], "data workers died"),
    ]
    said = [f"{count} {what}" for count, what in facts if count]
    return f"summary       {'; '.join(said) or 'nothing was left out, refused or failed'}\n              {file}"
