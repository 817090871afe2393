"""Answers to one's own questions: told while they are written, and kept as a picture and a page each."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from PIL import Image

from callbacks.crop_audit import rollout_of
from callbacks.drawing import draw_trajectory
from callbacks.webpage import printable, trajectory_page
from modules.engine import LocalEngine, Request
from modules.functional.confidence import confidence
from modules.policy import PolicyModule
from modules.trajectory import SampleBatch, Trajectory, Turn

FOLDER = "answers"


class Answers(L.Callback):
    """Makes a prediction worth looking at; the rollout callback writes ``predictions.jsonl`` besides.

    Of ``rollout.evaluations`` only ``greedy`` is run, or the first where there is none of that name. The first rank
    prints each question's reasoning as it comes. Each question gets ``answers/<n>-<id>.png`` and ``.html`` in the
    run's folder. No progress bar is drawn.
    """

    def __init__(self) -> None:
        self.answered = 0
        self.left_out = 0
        self._seen = self._unread = 0
        self._teller: Teller | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prepare the rollouts."""
        if stage != "predict":
            return
        rollout = rollout_of(trainer)
        mode = "greedy" if "greedy" in rollout.evaluations else next(iter(rollout.evaluations))
        rollout.evaluations = {mode: rollout.evaluations[mode]}
        if isinstance(trainer.progress_bar_callback, ProgressBar):
            trainer.progress_bar_callback.disable()
        if trainer.is_global_zero:
            self._teller = Teller()
            if isinstance(rollout.engine, LocalEngine):
                rollout.engine.listener = self._teller

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rows of a file that no rank could read."""
        self._unread = getattr(trainer.datamodule, "skipped_total", 0)  # type: ignore[attr-defined]

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: SampleBatch, *_: Any
    ) -> None:
        """Tell what was not told yet, and write."""
        assert isinstance(pl_module, PolicyModule)
        self.left_out += len(batch.skipped)
        folder = Path(trainer.default_root_dir) / FOLDER
        for group in (group for groups in batch.evaluations.values() for group in groups):
            trajectory = group.trajectories[0]
            sure = confidence(trajectory, pl_module.backbone.detokenize)
            number = self._seen * trainer.world_size + trainer.global_rank + 1
            self._seen += 1
            page = write_answer(trajectory, sure, folder, f"{number:04d}-{file_name(trajectory.sample.id)}")
            self.answered += 1
            if self._teller is not None:
                self._teller.finish(trajectory, sure, page)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how many there were."""
        counts = torch.tensor([self.answered, self.left_out], device=pl_module.device)
        self.answered, self.left_out = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self.left_out += self._unread
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            print(f"{self.answered} answered, {self.left_out} left out; written to {folder}", flush=True)


class Teller:
    """Prints trajectories one after another: the first of those in flight as it is written, the others when it has
    ended."""

    def __init__(self) -> None:
        self._of: object = None  # the sample that is being told
        self._said = ""

    def __call__(self, request: Request, turns: Sequence[Turn], writing: str) -> None:
        """Go on, if it is of the question that is being told."""
        if self._of is None:
            self._begin(request.sample.id, request.sample.question, request.sample)
        if request.sample is self._of:
            # what ends in U+FFFD may be half a character
            self._go_on(told(turns, writing.rstrip("\ufffd")))

    def finish(self, trajectory: Trajectory, sure: float | None, page: Path) -> None:
        """Tell the rest of a trajectory, or all of it, and what came of it."""
        sample = trajectory.sample
        if self._of is not sample:
            self._begin(sample.id, sample.question, sample)
        self._go_on(told(trajectory.turns, ""))
        answer = "none" if trajectory.answer is None else printable(trajectory.answer)
        probability = "" if sure is None else f"   (probability of its tokens {sure:.3f})"
        print(f"\n\nanswer: {answer}{probability}\n{page}\n", flush=True)
        self._of = None

    def _begin(self, name: str, question: str, sample: object) -> None:
        print(f"--- {printable(name)}: {printable(question)}", flush=True)
        self._of, self._said = sample, ""

    def _go_on(self, text: str) -> None:
        if len(text) <= len(self._said):  # half a character is taken back while it is written
            return
        sys.stdout.write(printable(text[len(self._said) :]))
        sys.stdout.flush()
        self._said = text


def told(turns: Sequence[Turn], writing: str) -> str:
    """What was written so far, with what the environment gave back; only ever grows at its end."""
    parts: list[str] = []
    number = 0
    for turn in turns:
        parts.append(turn.text)
        if turn.region is not None:
            number += 1
            x1, y1, x2, y2 = turn.region.box
            shown = "" if turn.crop is not None else ", not shown"
            parts.append(f" [crop {number}: {x2 - x1:.0f} x {y2 - y1:.0f} at {x1:.0f}, {y1:.0f}{shown}]\n")
        elif turn.fault is not None:
            parts.append(f" [refused: {turn.fault}]\n")
    return "".join([*parts, writing])


def write_answer(trajectory: Trajectory, sure: float | None, folder: Path, name: str) -> Path:
    """A trajectory as ``<name>.png`` and ``<name>.html``; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {} if sure is None else {"probability of the answer's tokens": sure}
    draw_trajectory(trajectory, scores).save(folder / f"{name}.png")
    page = folder / f"{name}.html"
    page.write_text(trajectory_page(trajectory, sure), encoding="utf-8")
    return page


def file_name(text: str) -> str:
    """An id as part of a file's name: plain characters, not too many, without the ending of an image's name."""
    path = Path(text)
    text = path.stem if path.suffix.lower() in Image.registered_extensions() else text
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:80].strip(".") or "question"
