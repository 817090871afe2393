"""Trajectories as pictures and text in TensorBoard: what the numbers are made of."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

from callbacks.drawing import draw_group, draw_trajectory, looks, member_rewards
from callbacks.timeline import Timeline, draw_card
from callbacks.writers import add_image, batches_done, writers
from modules.trajectory import Group, SampleBatch, Trajectory


class TrajectoryLogger(Callback):
    """Shows the most instructive training group now and then, and the same validation samples every time.

    In training, of the batch's groups the one whose rewards differ most is taken: ``train/trajectory/group``
    shows all of it, ``train/trajectory/0``, ``/1``, ... its best, its worst, its second best member and so
    on, and ``train/trajectory_text`` the same members in words. Validation writes the first samples of the
    first dataloader as ``val/trajectory/<i>``, and as ``val/over_time/<i>`` what became of each since the run began;
    they stay the same as long as that dataloader is not shuffled.
    Loggers whose experiment takes no images or no text are left out; with none, nothing is drawn.

    Args:
        every_n_steps: batches between two training pictures; the first batch is shown.
        max_per_step: members of the training group that get a picture of their own.
        validation_samples: how many validation samples are followed; 0 for none.
    """

    def __init__(self, every_n_steps: int = 50, max_per_step: int = 2, validation_samples: int = 4) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("max_per_step", max_per_step, 0),
            ("validation_samples", validation_samples, 0),
        ):
            if value < least:
                raise ValueError(f"Expected `{name}` to be at least {least} but got {value}")
        self.every_n_steps = every_n_steps
        self.max_per_step = max_per_step
        self.validation_samples = validation_samples
        self._validated = 0  # samples of this validation that were seen so far
        self._timelines: dict[int, Timeline] = {}

    def state_dict(self) -> dict[str, Any]:
        """What the followed samples did so far."""
        return {"timelines": {place: timeline.state_dict() for place, timeline in self._timelines.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        for place, state in state_dict["timelines"].items():
            self._timelines.setdefault(place, Timeline()).load_state_dict(state)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: SampleBatch, batch_idx: int
    ) -> None:
        """Write the group of this batch that says most."""
        step = batches_done(trainer)
        if step % self.every_n_steps or not batch.groups:
            return
        pictures, texts = writers(trainer, "add_image"), writers(trainer, "add_text")
        if not pictures and not texts:
            return
        index, why = most_instructive(batch.groups)
        group = batch.groups[index]
        members = best_and_worst(group.totals)[: self.max_per_step]
        if pictures:
            add_image(pictures, "train/trajectory/group", draw_group(group), step)
        for place, member in enumerate(members):
            if pictures:
                add_image(pictures, f"train/trajectory/{place}", _drawn(group, member, in_group=True), step)
        heading = f"Group {index + 1} of {len(batch.groups)}: {why}."
        text = "\n\n".join([heading, *(describe(group, member) for member in members)])
        for writer in texts:
            writer.add_text("train/trajectory_text", text, step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the first sample again."""
        self._validated = 0

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: SampleBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write those of the followed samples that are in this batch."""
        first, self._validated = self._validated, self._validated + len(batch.samples)
        if trainer.sanity_checking or dataloader_idx > 0 or first >= self.validation_samples or not batch.evaluations:
            return
        pictures, step = writers(trainer, "add_image"), batches_done(trainer)
        if not pictures:
            return
        groups = batch.evaluations.get("greedy") or next(iter(batch.evaluations.values()))
        for place, group in enumerate(groups[: self.validation_samples - first], start=first):
            add_image(pictures, f"val/trajectory/{place}", _drawn(group, 0, in_group=False), step)
            timeline = self._timelines.setdefault(place, Timeline())
            timeline.add(step, draw_card(group, step))
            add_image(pictures, f"val/over_time/{place}", timeline.draw(group.sample), step)


def most_instructive(groups: list[Group]) -> tuple[int, str]:
    """The group whose rewards differ most, and why it was taken in words.

    Args:
        groups: at least one; totals that are NaN are left out of account.

    Returns:
        Its index (the first of equals) and the reason.
    """
    spreads = [_spread(group.totals) for group in groups]
    index = max(range(len(groups)), key=spreads.__getitem__)
    if spreads[index] == 0:
        return index, "no group's rewards differ, so it is the first"
    return index, f"its rewards differ most (standard deviation {spreads[index]:.3f})"


def best_and_worst(totals: torch.Tensor) -> list[int]:
    """The members of a group from the outside in: best, worst, second best, second worst, ...

    Args:
        totals: (G,); NaN counts as worst.
    """
    order = torch.argsort(totals.nan_to_num(nan=-torch.inf), descending=True, stable=True).tolist()
    return [order[k // 2] if k % 2 == 0 else order[-1 - k // 2] for k in range(len(order))]


def describe(group: Group, member: int) -> str:
    """One trajectory of a group as markdown for TensorBoard, everything written by a model shown literally."""
    trajectory = group.trajectories[member]
    rewards = {**member_rewards(group, member), "total": float(group.totals[member])}
    rows = [
        ("question", trajectory.sample.question),
        ("written", written(trajectory)),
        ("answer", "none" if trajectory.answer is None else trajectory.answer),
        ("right answer", " | ".join(trajectory.sample.answers) or "not known"),
        ("ended", trajectory.stop.value),
        ("rewards", ", ".join(f"{name} {value:.3f}" for name, value in rewards.items())),
        ("advantage", f"{float(group.advantages[member]):+.3f}"),
    ]
    table = "\n".join(f"| {name} | {literal(value)} |" for name, value in rows)
    place = f"#{member + 1} of {len(group.trajectories)}"
    return f"| {literal(place)} | {literal(trajectory.sample.id)} |\n|---|---|\n{table}"


def written(trajectory: Trajectory) -> str:
    """The text as written, with ``[crop k]`` and ``[refused: ...]`` where the environment answered."""
    numbers = {id(look.turn): look.number for look in looks(trajectory)}
    parts: list[str] = []
    for turn in trajectory.turns:
        parts.append(turn.text)
        if turn.crop is not None:
            parts.append(f"[crop {numbers[id(turn)]}]\n")
        elif turn.fault is not None:
            parts.append(f"[refused: {turn.fault}]\n")
    return "".join(parts)


def literal(text: str) -> str:
    """Text for a cell of a markdown table, shown as it is by TensorBoard.

    A code fence would do the same, but in it a line of reasoning is not wrapped.
    """
    shown = "".join(c if c.isalnum() or c == " " else "<br>" if c == "\n" else f"&#{ord(c)};" for c in text.strip())
    return shown.replace("  ", " &#160;")


def _spread(totals: torch.Tensor) -> float:
    finite = totals[totals.isfinite()].double()
    return float(finite.std(correction=0)) if len(finite) > 1 else 0.0


def _drawn(group: Group, member: int, *, in_group: bool) -> Image.Image:
    return draw_trajectory(
        group.trajectories[member],
        member_rewards(group, member),
        total=float(group.totals[member]),
        advantage=float(group.advantages[member]) if in_group else None,
    )
