"""What a draft has to be before anybody is paid to judge it: sane boxes, few of them, the right answer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from datamodules.pictures import ImageRef
from datamodules.vlir.draft import Draft, Reason, Rejected
from datamodules.vlir.fingerprints import Fingerprint
from modules.functional.boxes import iou
from modules.functional.graders import Kind, grade, kind_of
from modules.rewards.mathematics import WORKER, MathWorkerError
from modules.trajectory import Region, Sample


@dataclass(frozen=True, eq=False)
class Question:
    """A question that a rationale is wanted for."""

    sample: Sample  # without images
    images: tuple[ImageRef, ...]
    prints: tuple[Fingerprint, ...]  # of the images
    file: str
    row: int

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(H, W) of each image."""
        return tuple(fingerprint.size for fingerprint in self.prints)


@dataclass(frozen=True)
class BoxRules:
    """Which boxes are sane.

    Args:
        min_crops: fewest looks.
        max_crops: most looks. In the corpus of the paper nearly all samples have one, a few three or more.
        min_side: shortest side in original pixels.
        max_share: largest share of the image's area; what shows nearly all of it is no closer look.
        max_overlap: largest intersection over union with an earlier look at the same image.
    """

    min_crops: int = 1
    max_crops: int = 4
    min_side: float = 8.0
    max_share: float = 0.9
    max_overlap: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.min_crops <= self.max_crops:
            raise ValueError(
                f"Expected 0 <= `min_crops` <= `max_crops`, but got {self.min_crops} and {self.max_crops}."
            )
        for name in ("max_share", "max_overlap"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Expected `{name}` to be in (0, 1], but got {getattr(self, name)}.")

    def check(self, question: Question, draft: Draft) -> None:
        """Whether the boxes of a draft are sane.

        Raises:
            Rejected: if not.
        """
        regions = draft.regions
        if len(regions) < self.min_crops:
            raise Rejected(Reason.FEW_CROPS, f"{len(regions)} looks, at least {self.min_crops}")
        if len(regions) > self.max_crops:
            raise Rejected(Reason.MANY_CROPS, f"{len(regions)} looks, at most {self.max_crops}")
        for region in regions:
            self._size(region, question.sizes[region.image])
        for a, b in itertools.combinations(regions, 2):
            if a.image == b.image and (overlap := float(iou(*(torch.tensor([r.box]) for r in (a, b))))) > (
                self.max_overlap
            ):
                raise Rejected(Reason.REPEATED_BOX, f"{a.box} and {b.box}: IoU {overlap:.2f}")

    def _size(self, region: Region, size: tuple[int, int]) -> None:
        x1, y1, x2, y2 = region.box
        if (side := min(x2 - x1, y2 - y1)) < self.min_side:
            raise Rejected(Reason.BOX_SIZE, f"{region.box}: {side:.1f} pixels, at least {self.min_side:g}")
        if (share := (x2 - x1) * (y2 - y1) / (size[0] * size[1])) > self.max_share:
            raise Rejected(Reason.BOX_SIZE, f"{region.box}: {share:.0%} of the image, at most {self.max_share:.0%}")


@dataclass(frozen=True)
class AnswerRule:
    """Which answers are right.

    Args:
        least: grade from which an answer is right; the kinds that know no half-right are 0 or 1.
        by_source: how the answers of some data sets are compared, by their name, whose case does not count; others
            by the row's own kind, else see `modules.functional.graders.kind_of`.
        tolerance: of numbers, relative to the right one.
    """

    least: float = 0.5
    by_source: dict[str, Kind] = field(default_factory=dict)
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise ValueError(f"Expected `least` to be in (0, 1], but got {self.least}.")

    def check(self, question: Question, draft: Draft) -> None:
        """Whether the answer of a draft is right.

        Raises:
            Rejected: if not.
        """
        sample = question.sample
        kind = self._kind(sample)
        if kind == "math":
            value = _by_algebra(draft.answer, sample.answers)
        else:
            value = grade(kind, draft.answer, sample.answers, sample.choices, self.tolerance)
        if value < self.least:
            right = " | ".join(sample.answers)
            raise Rejected(Reason.WRONG_ANSWER, f"{draft.answer!r} is {value:g} by {kind}, right is {right!r}")

    def _kind(self, sample: Sample) -> Kind:
        chosen = {name.lower(): kind for name, kind in self.by_source.items()}.get(sample.source.lower())
        own: Kind | None = sample.answer_kind  # type: ignore[assignment]  # the schema lets no other through
        return chosen or own or kind_of(sample.source, sample.answers, sample.choices)


def _by_algebra(said: str, answers: tuple[str, ...]) -> float:
    try:
        return float(any(WORKER.equal(said, answer) for answer in answers))
    except (MathWorkerError, OSError) as error:
        raise Rejected(Reason.WRONG_ANSWER, f"{said!r} could not be compared: {error}") from error
