"""Differentiable grounding: the box that a policy is expected to write, pulled to a region and to a better answer.

`docs/grounding.md` has the formulas. A term of this file is beside another loss in the same optimizer step, and is
divided by a count of its own, over all micro-batches and ranks: see `modules.located.share`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from modules.backbones.base import Backbone
from modules.functional.losses import in_chunks, selected_log_probs
from modules.functional.soft_boxes import (
    box_distance,
    box_losses,
    expectation,
    fit_boxes,
    pad,
    teacher_forced_expectation,
)
from modules.located import Aim, Located, Locator, Looked
from modules.scoring import collate, predicting
from modules.trajectory import Trajectory, Visual

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grounding:
    """Weights of the losses of the expected box; 0: that loss is not computed.

    Args:
        l1: mean absolute difference from the region, as a share of the image's sides; a mean over boxes.
        giou: 1 - generalised IoU with the region; a mean over boxes.
        answer: cross-entropy of the answer, read from the crop at the expected box; a mean over answers of the mean
            over an answer's tokens. Its gradient goes into the box alone.
    """

    l1: float = 0.0
    giou: float = 0.0
    answer: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"Expected `grounding.{field.name}` to be 0 or above, but got {value}.")

    @property
    def active(self) -> bool:
        """Whether any of it acts."""
        return self.l1 > 0 or self.giou > 0 or self.answer > 0


UNGROUNDED = Grounding()


class Grounder:
    """Finds the boxes in trajectories, and makes losses of what they are expected to be.

    Args:
        backbone: the policy.
        weights: of the losses.
        row_tokens: see `modules.policy.PolicyModule`.
        head_chunk: likewise.

    Raises:
        ValueError: if ``answer`` has a weight, but no gradient comes from what the backbone sees back to the box.
    """

    def __init__(self, backbone: Backbone, weights: Grounding, row_tokens: int, head_chunk: int) -> None:
        self.backbone, self.weights = backbone, weights
        self.row_tokens, self.head_chunk = row_tokens, head_chunk
        self.locator = Locator(backbone)
        self.supervised = weights.l1 > 0 or weights.giou > 0
        self._told = False  # that boxes have no region
        if weights.answer:
            check_gradient(backbone)

    def locate(self, trajectories: Sequence[Trajectory], aim: Aim, right: Sequence[bool]) -> Located:
        """Find what the losses are of.

        Args:
            trajectories: of a micro-batch.
            aim: where a box should be.
            right: whose answers count.
        """
        supervised = self.supervised
        found = self.locator(
            trajectories, aim if supervised else None, right if self.weights.answer else [False] * len(trajectories)
        )
        if supervised and found.boxes and not found.targets and not self._told:
            self._told = True
            logger.warning(
                "Boxes without an annotated region: `grounding.l1` and `grounding.giou` do nothing for them."
            )
        return found

    def loss(self, hidden: Tensor, located: Located, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses of a micro-batch, scaled to be divided like the loss that it is beside.

        Args:
            hidden: (T, D) of the sampled tokens' predictors, with gradient.
            located: of the same trajectories, after `share`.
            temperature: of the distribution that is trained.

        Returns:
            The loss, and sums to be added up; see `grounding_metrics`.
        """
        boxes, weights = located.boxes, self.weights
        counts = {"boxes": len(boxes), "left_out": located.left_out}
        if self.supervised:
            counts["without_region"] = len(boxes) - located.targets
        if weights.answer:
            counts |= {"answers": len(located.answers), "clamped": 0}
        sums: dict[str, Tensor] = {}
        loss = torch.zeros((), device=hidden.device)
        if boxes:
            expected = self._expected(hidden, located, temperature)
            sizes = expected.new_tensor([box.size for box in boxes])
            written = expected.new_tensor([box.region.box for box in boxes])
            sums["distance"] = box_distance(expected, written, sizes).sum()
            aimed = [k for k, box in enumerate(boxes) if box.target is not None]
            if aimed:
                targets = expected.new_tensor([boxes[k].target for k in aimed])
                l1, overlap = box_losses(expected[aimed], targets, sizes[aimed])
                sums["l1"], sums["giou"] = l1.sum(), overlap.sum()
                loss = loss + located.per_box * (weights.l1 * sums["l1"] + weights.giou * sums["giou"])
            if located.answers:
                sums["answer"], counts["clamped"] = self._answer(expected, sizes, located, temperature)
                loss = loss + located.per_answer * weights.answer * sums["answer"]
        sums |= {name: torch.tensor(float(n), device=hidden.device) for name, n in counts.items()}
        return loss, {f"grounding/{name}": value.detach() for name, value in sums.items()}

    def _expected(self, hidden: Tensor, located: Located, temperature: float) -> Tensor:
        """(N, 4) expected boxes in original pixels."""
        boxes, device = located.boxes, hidden.device
        rows = token_rows(located.trajectories)
        at = torch.cat([rows[box.owner][box.written.positions] for box in boxes]).to(device)
        tokens = torch.tensor([len(box.written.positions) for box in boxes])
        choices = pad([box.written.choices for box in boxes], -1).to(device)
        values = pad([box.written.values for box in boxes], 0).to(device)

        def expect(h: Tensor, choices: Tensor, values: Tensor) -> tuple[Tensor]:
            return (expectation(self.backbone.head(h), choices, values, temperature),)

        (added,) = in_chunks(expect, hidden[at], choices, values, size=self.head_chunk)
        axes = torch.cat([box.written.axes for box in boxes]).to(device)
        owners = torch.repeat_interleave(tokens).to(device)
        coords = teacher_forced_expectation(added, owners, axes, len(boxes))
        return coords * coords.new_tensor([box.scale for box in boxes])

    def _answer(self, expected: Tensor, sizes: Tensor, located: Located, temperature: float) -> tuple[Tensor, int]:
        """The answers' cross-entropy with the crops at the expected boxes, and how many of these were no valid ones.

        Its gradient is taken here, with respect to the boxes only: nothing of the second pass is kept for the
        backward pass of the first, and no weight of the reader learns from it.
        """
        shown = [k for k, b in enumerate(located.boxes) if b.owner in located.answers and b.turn.crop is not None]
        leaf = expected.detach()[shown].requires_grad_()
        if not leaf.isfinite().all():  # nothing to cut out: the step is left out, as any that is not finite
            return expected.sum() * torch.nan, 0
        with torch.enable_grad():
            fitted, changed = fit_boxes(leaf, sizes[shown])
            losses = self._read(fitted, [located.boxes[k] for k in shown], located, temperature)
            (gradient,) = torch.autograd.grad(losses, leaf)
        moved = expected[shown]
        return losses.detach() + (gradient * (moved - moved.detach())).sum(), int(changed.sum())

    def _read(self, fitted: Tensor, boxes: Sequence[Looked], located: Located, temperature: float) -> Tensor:
        """The sum of the answers' mean cross-entropies when these crops are in the place of those that were shown."""
        backbone = self.backbone
        images = [located.trajectories[box.owner].sample.images[box.region.image] for box in boxes]
        distinct = {id(image): image.to(backbone.device) for image in images}
        place = {key: k for k, key in enumerate(distinct)}
        crops = [box.turn.crop for box in boxes]
        pixels = backbone.crop_scaler(
            list(distinct.values()),
            fitted,
            torch.tensor([place[id(image)] for image in images]),
            [(crop.pixels.shape[-2], crop.pixels.shape[-1]) for crop in crops if crop is not None],
        )
        new = {id(c): Visual(p, c.tokens, c.role) for c, p in zip(crops, pixels, strict=True) if c is not None}
        again = [
            replace(t, visuals=tuple(new.get(id(v), v) for v in t.visuals))
            for k, t in enumerate(located.trajectories)
            if k in located.answers
        ]
        batch = collate(backbone, again, self.row_tokens)
        rows = token_rows(again)
        places = [rows[n][at] for n, at in enumerate(located.answers[k] for k in sorted(located.answers))]
        at = torch.cat(places).to(batch.targets.device)
        hidden = predicting(backbone, batch)[at]

        def select(h: Tensor, targets: Tensor) -> tuple[Tensor]:
            return (selected_log_probs(backbone.head(h), targets, temperature, backbone.banned)[0],)

        (log_probs,) = in_chunks(select, hidden, batch.targets[at], size=self.head_chunk)
        weights = torch.cat([torch.full((len(p),), 1 / len(p)) for p in places])
        return -(log_probs * weights.to(log_probs)).sum()


def token_rows(trajectories: Sequence[Trajectory]) -> list[Tensor]:
    """For each trajectory (C,) long: the place of each of its sampled tokens among the flat tokens of their batch."""
    rows, before = [], 0
    for trajectory in trajectories:
        rows.append(trajectory.sampled.long().cumsum(0) - 1 + before)
        before += int(trajectory.sampled.sum())
    return rows


def grounding_metrics(history: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor | float]:
    """What is logged of the sums of one or more optimizer steps: means over boxes and answers, and counts a step.

    ``l1``, ``giou``, ``answer`` the losses, unweighted; ``distance`` `box_distance` of the expected box from the one
    that was written; ``boxes`` that were found; ``left_out`` those whose numbers were not; ``without_region`` those of
    ``boxes`` without anything to be compared with; ``answers`` read again; ``clamped`` boxes that were moved for it.
    """
    names = {name for sums in history for name in sums if name.startswith("grounding/")}
    total = {name: torch.stack([h[name] for h in history if name in h]).sum() for name in names}
    boxes, counts = total.get("grounding/boxes"), {"boxes", "left_out", "without_region", "answers", "clamped"}
    metrics: dict[str, Tensor | float] = {
        f"train/{name}": value / len(history) for name, value in total.items() if name.split("/")[1] in counts
    }
    of = {"distance": boxes, "answer": total.get("grounding/answers")}
    if boxes is not None:
        of |= dict.fromkeys(("l1", "giou"), boxes - total.get("grounding/without_region", 0))
    for name, number in of.items():
        if f"grounding/{name}" in total and number is not None:
            metrics[f"train/grounding/{name}"] = total[f"grounding/{name}"] / number
    return metrics


def check_gradient(backbone: Backbone) -> None:
    """Try whether a gradient comes from what the backbone sees of a crop back to the crop's box.

    Raises:
        ValueError: if not; says why.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 64, 64, generator=generator).to(backbone.device)
    box = torch.tensor([[10.3, 12.6, 50.2, 48.7]], device=backbone.device, requires_grad=True)
    size = backbone.crop_scaler.output_size((10.3, 12.6, 50.2, 48.7), (64, 64))
    training = backbone.training
    backbone.eval()
    try:
        with torch.enable_grad():
            (pixels,) = backbone.crop_scaler([image], box, None, [size])
            tokens = int((backbone.visual_ids(*size) == backbone.image_token_id).sum())
            (features,) = backbone.encode([Visual(pixels, tokens, "crop")])
            weights = torch.randn(features.shape, generator=generator).to(features)
            (gradient,) = torch.autograd.grad((features * weights).sum(), box)
        problem = "" if bool(gradient.isfinite().all() and gradient.any()) else f"it is {gradient.tolist()}"
    except RuntimeError as error:
        problem = str(error).strip().split("\n")[0]
    finally:
        backbone.train(training)
    if problem:
        raise ValueError(
            f"Expected `grounding.answer` to be 0 for {type(backbone).__name__}, of which no gradient comes from the "
            f"features of a crop back to its box: {problem}."
        )
