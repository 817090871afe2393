"""Where the boxes and the answer of a trajectory stand, token by token, and where its boxes should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from modules.backbones.base import Backbone
from modules.functional.boxes import clip, giou, to_original
from modules.functional.grammar import ANSWER, END_ANSWER
from modules.functional.soft_boxes import Shapes, WrittenBox, bin_box, digit_box, digit_shapes
from modules.trajectory import Box, Region, Trajectory, Turn

Aim = Callable[[Trajectory, int], Box | None]  # where the box of a turn, given by its number, should be
NEAR = 1e-3  # original pixels between what the tokens say and what the environment read


@dataclass(frozen=True, eq=False)
class Looked:
    """A valid box that a trajectory wrote."""

    owner: int  # index of the trajectory
    turn: Turn
    region: Region
    written: WrittenBox  # positions are of the trajectory's completion
    scale: Box  # original pixels per unit of the space that it is written in
    size: tuple[int, int]  # of the original image
    target: Box | None  # where it should be, original pixels


@dataclass(frozen=True, eq=False)
class Located:
    """What stands where in the trajectories of a micro-batch: known before any pass."""

    trajectories: Sequence[Trajectory]
    boxes: Sequence[Looked]
    answers: Mapping[int, Tensor]  # trajectory -> (a,) long, the places of its answer's tokens in the completion
    left_out: int  # boxes whose numbers were not found token by token
    per_box: float = 0.0  # what a box with a target counts for, and
    per_answer: float = 0.0  # an answer: see `share`

    @property
    def targets(self) -> int:
        """How many boxes have one."""
        return sum(box.target is not None for box in self.boxes)


def share(located: Sequence[Located], count: float, total: Callable[[float], float]) -> list[Located]:
    """Micro-batches that know what their boxes and answers count for in a loss that is divided by ``count``.

    Args:
        located: this rank's micro-batches of an optimizer step.
        count: what this rank contributes to the number that the step's loss is divided by.
        total: sums over ranks; called three times, whatever this rank has.
    """
    divisor, targets, answers = (
        total(float(n)) for n in (count, sum(x.targets for x in located), sum(len(x.answers) for x in located))
    )
    per_box, per_answer = (divisor / n if n else 0.0 for n in (targets, answers))
    return [replace(x, per_box=per_box, per_answer=per_answer) for x in located]


def step_box(trajectory: Trajectory, turn: int) -> Box | None:
    """The region of the teacher's own step, unrounded, for trajectories that replay a rationale."""
    region = trajectory.sample.rationale[turn].region
    return None if region is None else region.box


def annotated_box(trajectory: Trajectory, turn: int) -> Box | None:
    """The annotated region that a box is nearest to, by GIoU; None if there is none on its image."""
    region = trajectory.turns[turn].region
    assert region is not None
    known = [other.box for other in trajectory.sample.regions if other.image == region.image]
    if not known:
        return None
    others = torch.tensor(known, dtype=torch.float64)
    return known[int(giou(torch.tensor([region.box] * len(known), dtype=torch.float64), others).argmax())]


class Locator:
    """Finds boxes and answers from the tokens and turns as they are; nothing is tokenized again.

    Args:
        backbone: whose words they are.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    @cached_property
    def texts(self) -> list[str]:
        """The text of every id; a special token has none."""
        rows = len(self.backbone.banned)
        known = len(self.backbone.tokenizer)
        read = self.backbone.tokenizer.batch_decode([[k] for k in range(known)], skip_special_tokens=True)
        return [*read[:rows], *[""] * (rows - known)]

    @cached_property
    def _shapes(self) -> Shapes:
        return digit_shapes(self.texts, (~self.backbone.banned.cpu()).tolist())

    @cached_property
    def _bins(self) -> Tensor | None:
        return None if self.backbone.coordinate_bins is None else self.backbone.coordinate_bins.cpu()

    def __call__(self, trajectories: Sequence[Trajectory], aim: Aim | None, right: Sequence[bool]) -> Located:
        """Find the boxes that the trajectories of a micro-batch wrote, and their answers.

        Args:
            trajectories: N of them.
            aim: None: no box has a target.
            right: N, whose answers are wanted; only of those that were shown a crop.
        """
        boxes: list[Looked] = []
        answers: dict[int, Tensor] = {}
        left_out = 0
        for owner, trajectory in enumerate(trajectories):
            before = len(boxes)
            for number, turn in enumerate(trajectory.turns):
                if turn.region is None:
                    continue
                found = self._box(trajectory, owner, turn, turn.region, aim and aim(trajectory, number))
                boxes += [] if found is None else [found]
                left_out += found is None
            if right[owner] and any(box.turn.crop is not None for box in boxes[before:]):
                places = self._answer(trajectory)
                if len(places):
                    answers[owner] = places
        return Located(trajectories, boxes, answers, left_out)

    def _box(self, trajectory: Trajectory, owner: int, turn: Turn, region: Region, target: Box | None) -> Looked | None:
        """A turn's box, if its numbers are found, and are the ones that the environment read."""
        ids = trajectory.completion_ids[turn.start : turn.stop]
        if self._bins is not None:
            written = bin_box(ids, self._bins, self.backbone.bin_size)
        else:
            written = digit_box(ids, self.texts, self._shapes)
        if written is None:
            return None
        sample = trajectory.sample
        height, width = sample.images[region.image].shape[-2:]
        own = sample.prompt_visuals - len(sample.images)  # behind what examples show
        resized = trajectory.visuals[own + region.image].pixels.shape[-2:]
        space, sizes = self.backbone.box_space, ((height, width), (resized[0], resized[1]))
        read = clip(to_original(written.coords, space, *sizes), (height, width))
        written = replace(written, positions=written.positions + turn.start)
        if any(abs(a - b) > NEAR for a, b in zip(read, region.box, strict=True)) or not bool(
            trajectory.sampled[written.positions].all()
        ):
            return None
        return Looked(owner, turn, region, written, to_original((1, 1, 1, 1), space, *sizes), (height, width), target)

    def _answer(self, trajectory: Trajectory) -> Tensor:
        """(a,) places in the completion of the tokens between the tags of the last turn's answer."""
        turn = trajectory.turns[-1]
        pieces = [self.texts[k] for k in trajectory.completion_ids[turn.start : turn.stop].tolist()]
        text = "".join(pieces)
        stop = text.rfind(END_ANSWER)
        start = text.rfind(ANSWER, 0, max(stop, 0))
        if start < 0:
            return torch.zeros(0, dtype=torch.long)
        answer = text[start + len(ANSWER) : stop]
        first = start + len(ANSWER) + len(answer) - len(answer.lstrip())
        last = first + len(answer.strip())
        places, at = [], 0
        for k, piece in enumerate(pieces, start=turn.start):
            if at < last and at + len(piece) > first:
                places.append(k)
            at += len(piece)
        return torch.tensor(places if last > first else [], dtype=torch.long)
