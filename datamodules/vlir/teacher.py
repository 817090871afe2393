"""Who writes the rationales: a model behind an endpoint, which is shown the image and told what is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from string import Template

import torch

from datamodules.vlir.draft import Draft, Reason, Rejected, Size, read_draft
from datamodules.vlir.endpoint import Caller, Endpoint, Picture
from datamodules.vlir.rules import Question
from modules.chat import read_template
from modules.crop import CropAndScale
from modules.functional.boxes import BoxSpace, SpaceKind, from_original
from modules.functional.grammar import format_box

FIELDS = ("question", "choices", "answers", "boxes", "space", "size")
SPACES: dict[SpaceKind, str] = {
    "pixels": "pixels of the original image, counted from its top left corner",
    "resized": "pixels of the image, counted from its top left corner",
    "thousand": "thousandths of the image's width and height, from 0 to 1000, counted from its top left corner",
    "unit": "shares of the image's width and height, from 0 to 1, counted from its top left corner",
}

Attempts = Iterator[Draft | Rejected]  # one after another, each written only when it is asked for


class Teacher(ABC):
    """Writes rationales."""

    name: str  # under which the samples name it

    @abstractmethod
    def open(self, folder: Path) -> Caller | None:
        """Be ready; what was paid for is kept under ``folder``. Returns who pays, if anybody does."""

    @abstractmethod
    def works(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Attempts]]:
        """Every question, and the attempts at it, which are drawn in another thread.

        Drawing an attempt raises Unpaid or Fatal if there is nobody to write it.
        """


class ChatTeacher(Teacher):
    """A vision-language model behind an endpoint: one request is one rationale.

    Args:
        endpoint: who writes.
        prompt: a text file with the placeholders ``$question``, ``$choices``, ``$answers`` (the right ones), ``$boxes``
            (annotated regions to start from), ``$space`` (what coordinates count) and ``$size`` (of the images as they
            are shown). The reply is reasoning with ``{"bbox_2d": [x1, y1, x2, y2]}`` in it and
            ``<answer></answer>`` at its end; see `datamodules.vlir.draft`.
        box_space: the space that boxes are asked for in; ``resized``: pixels of the image as it is shown.
        drafts: attempts at a question, until one passes; the sampling temperature has to make them differ.
        grid: sides of the shown image are multiples of it, so that Qwen2.5-VL does not resize it once more.
        min_pixels: least area of the shown image.
        max_pixels: greatest area.

    Raises:
        ValueError: an argument has no meaning, or the prompt lacks a placeholder.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        prompt: str,
        box_space: SpaceKind = "resized",
        drafts: int = 1,
        grid: int = 28,
        min_pixels: int = 4 * 28**2,
        max_pixels: int = 2048 * 28**2,
    ) -> None:
        if box_space == "pixels":
            raise ValueError(
                "Expected `box_space` to be one that the teacher can know, but it never sees the original."
            )
        if drafts < 1:
            raise ValueError(f"Expected `drafts` to be at least 1, but got {drafts}.")
        if drafts > 1 and endpoint.options.get("temperature") == 0:
            raise ValueError("At temperature 0 all `drafts` of a question would be the same.")
        self.endpoint = endpoint
        self.name = endpoint.model
        self.template = read_template(Path(prompt), FIELDS, ("question", "space", "size"))
        self.box_space = BoxSpace(box_space)
        self.drafts = drafts
        self.scaler = CropAndScale(grid=grid, min_pixels=min_pixels, max_pixels=max_pixels)
        self.caller: Caller | None = None

    def open(self, folder: Path) -> Caller:
        """See `Teacher.open`."""
        self.caller = Caller(self.endpoint, folder / "teacher")
        return self.caller

    def works(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Attempts]]:
        """See `Teacher.works`."""
        return ((question, self._attempts(question)) for question in questions)

    def _attempts(self, question: Question) -> Attempts:
        assert self.caller is not None
        sent = [self.scaler.output_size((0, 0, w, h), (h, w)) for h, w in question.sizes]
        prompt = fill(self.template, question, self.box_space, sent)
        pictures = [self._picture(question, k, size) for k, size in enumerate(sent)]
        for nth in range(self.drafts):
            reply = self.caller.ask(prompt, pictures, nth)
            if reply.finish == "length":
                yield Rejected(Reason.UNFINISHED, "the limit of new tokens cut it", reply.text)
                continue
            try:
                yield read_draft(reply.text, question.sizes, sent, self.box_space)
            except Rejected as error:
                yield Rejected(error.reason, error.detail, reply.text)

    def _picture(self, question: Question, k: int, size: Size) -> Picture:
        identity = f"{question.prints[k].digest} {size[0]}x{size[1]}"
        return Picture(identity, size, partial(_shown, question, k, self.scaler))


def fill(template: Template, question: Question, space: BoxSpace, sent: list[Size]) -> str:
    """The prompt about a question.

    Args:
        template: as `read_template` returns it.
        question: what it is about.
        space: in which boxes are written.
        sent: (h, w) of its images as they are shown.
    """
    sample = question.sample
    shown = [f"{w} pixels wide and {h} pixels high" for h, w in sent]
    size = f"The image is {shown[0]}."
    if len(shown) > 1:
        size = " ".join(f"Image {k} is {one}." for k, one in enumerate(shown))
        size += ' A box on another image than the first names it: {"bbox_2d": [...], "image": 1}.'
    boxes = []
    for region in sample.regions:
        coords = from_original(region.box, space, question.sizes[region.image], sent[region.image])
        rounded = [round(c, 3) if space.kind == "unit" else round(c) for c in coords]
        line = format_box(rounded, region.image if len(sent) > 1 else None)
        boxes.append(f"{line} {region.why}".strip())
    return template.substitute(
        question=sample.question,
        choices="; ".join(sample.choices) or "none",
        answers=" | ".join(dict.fromkeys(sample.answers)),
        boxes="\n".join(boxes) or "none",
        space=SPACES[space.kind],
        size=size,
    )


def _shown(question: Question, k: int, scaler: CropAndScale) -> torch.Tensor:
    image = question.images[k].load()
    height, width = image.shape[-2:]
    return scaler([image], torch.tensor([[0.0, 0.0, width, height]]))[0]
