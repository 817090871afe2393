"""What a model has to judge: is there something in every crop, and does the reasoning hold (the paper's filters).

The paper (arXiv 2505.16192, on VLIR) has a smaller vision-language model look at every crop, and a language model that
sees text alone read the reasoning.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path

import torch

from datamodules.vlir.draft import Draft, Reason, Rejected
from datamodules.vlir.endpoint import Caller, Endpoint, Picture
from datamodules.vlir.rules import Question
from modules.chat import read_template
from modules.crop import CropAndScale
from modules.rewards.judge import verdict
from modules.trajectory import Region

TRIES = 2  # for a reply that ends in a verdict


class Check(ABC):
    """A judgement that is asked for.

    Args:
        endpoint: who judges.
        prompt: a text file; the last line of a reply to it has to be a number from 0 to 1, yes or no.
        least: verdict from which a draft passes.
    """

    name: str  # of its folder of replies, and in the report
    reason: Reason
    fields: tuple[str, ...]  # of the prompt
    needed: tuple[str, ...] = ()

    def __init__(self, endpoint: Endpoint, prompt: str, least: float = 0.5) -> None:
        if not 0 < least <= 1:
            raise ValueError(f"Expected `least` to be in (0, 1], but got {least}.")
        self.endpoint = endpoint
        self.template = read_template(Path(prompt), self.fields, self.needed)
        self.least = least
        self.caller: Caller | None = None

    def open(self, folder: Path) -> Caller:
        """Be ready; what is paid for is kept under ``folder``."""
        self.caller = Caller(self.endpoint, folder / self.name)
        return self.caller

    @abstractmethod
    def check(self, question: Question, draft: Draft) -> None:
        """Whether a draft passes.

        Raises:
            Rejected: if not.
            Unpaid: nobody judged.
        """

    def judge(self, prompt: str, about: str, pictures: tuple[Picture, ...] = ()) -> None:
        """Ask for a verdict.

        Raises:
            Rejected: it is less than `least`, or there is none.
        """
        assert self.caller is not None
        for nth in range(TRIES):
            reply = self.caller.ask(prompt, pictures, nth).text
            value = verdict(reply)
            if not math.isnan(value):
                break
        if not value >= self.least:
            raise Rejected(self.reason, f"{about}: {reply.strip()[-500:]!r}")


class SemanticUnits(Check):
    """Every crop shows something that a small vision-language model recognises.

    Args:
        endpoint: a small vision-language model.
        prompt: a text file; ``$width`` and ``$height`` are those of the crop in original pixels.
        least: verdict from which a crop passes.
        min_pixels: least area of a crop as it is shown; smaller ones are enlarged.
        max_pixels: greatest area.
    """

    name = "semantic_units"
    reason = Reason.SEMANTIC_UNIT
    fields = ("width", "height")

    def __init__(
        self,
        endpoint: Endpoint,
        prompt: str,
        least: float = 0.5,
        min_pixels: int = 16 * 28**2,
        max_pixels: int = 1024 * 28**2,
    ) -> None:
        super().__init__(endpoint, prompt, least)
        self.scaler = CropAndScale(grid=28, min_pixels=min_pixels, max_pixels=max_pixels)

    def check(self, question: Question, draft: Draft) -> None:
        """See `Check.check`."""
        for k, region in enumerate(draft.regions, start=1):
            x1, y1, x2, y2 = region.box
            prompt = self.template.substitute(width=round(x2 - x1), height=round(y2 - y1))
            self.judge(prompt, f"crop {k}", (crop_of(question, region, self.scaler),))


class Coherence(Check):
    """The reasoning follows, step by step, and says nothing twice: read by a language model that sees no image.

    Args:
        endpoint: a language model.
        prompt: a text file; ``$question``, ``$choices``, ``$answers`` (the right ones), and ``$text``: the reasoning,
            with ``[crop k]`` where the k-th crop is looked at.
        least: verdict from which a draft passes.
    """

    name = "coherence"
    reason = Reason.INCOHERENT
    fields = ("question", "choices", "answers", "text")
    needed = ("text",)

    def check(self, question: Question, draft: Draft) -> None:
        """See `Check.check`."""
        sample = question.sample
        prompt = self.template.substitute(
            question=sample.question,
            choices="; ".join(sample.choices) or "none",
            answers="; ".join(sample.answers),
            text=marked(draft),
        )
        self.judge(prompt, "the reasoning")


def marked(draft: Draft) -> str:
    """The reasoning with a mark in place of each crop."""
    return "".join(
        step.text + ("" if step.region is None else f"[crop {k}]\n") for k, step in enumerate(draft.steps, start=1)
    )


def crop_of(question: Question, region: Region, scaler: CropAndScale) -> Picture:
    """A crop as a policy would be shown it, cut from the original image."""
    fingerprint = question.prints[region.image]
    size = scaler.output_size(region.box, fingerprint.size, region.zoom)
    return Picture(
        f"{fingerprint.digest} {list(region.box)} {size[0]}x{size[1]}",
        size,
        partial(_cut, question, region, scaler, size),
    )


def _cut(question: Question, region: Region, scaler: CropAndScale, size: tuple[int, int]) -> torch.Tensor:
    box = torch.tensor([region.box], dtype=torch.float64)
    return scaler([question.images[region.image].load()], box, sizes=[size])[0]
