"""One question over the course of a run: what the policy did at a few steps, side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from callbacks.drawing import BAD, GOOD, draw_boxes, looks
from callbacks.layout import GAP, INK, MARGIN, MUTED, beside, fitted, page, paragraph, shortened, stack
from modules.trajectory import Group, Sample

CARD = 220  # pixels wide
COLUMNS = 6


class Timeline:
    """At most `COLUMNS` moments of one question: the first, the latest, and some evenly spread between them."""

    def __init__(self) -> None:
        self.cards: list[tuple[int, Image.Image]] = []  # step, picture

    def add(self, step: int, card: Image.Image) -> None:
        """Remember a moment; one that is in the way of even steps is forgotten."""
        self.cards = [(at, kept) for at, kept in self.cards if at < step]  # a run that is resumed tells it anew
        self.cards.append((step, card))
        if len(self.cards) > COLUMNS:
            steps = [at for at, _ in self.cards]
            del self.cards[crowded(steps)]

    def draw(self, sample: Sample) -> Image.Image:
        """The question, and under it the moments from left to right."""
        row = self.cards[0][1]
        for _, card in self.cards[1:]:
            row = beside(row, card, GAP)
        width = max(row.width, 3 * CARD)
        return page([paragraph([(sample.question, INK)], width, 17, max_lines=4), row], width + 2 * MARGIN)

    def state_dict(self) -> list[tuple[int, Tensor]]:
        """Steps and PNG files, each (bytes,) uint8: plain enough for a checkpoint."""
        return [(step, encoded(card)) for step, card in self.cards]

    def load_state_dict(self, state: Sequence[tuple[int, Tensor]]) -> None:
        """See `state_dict`."""
        self.cards = [(step, Image.open(io.BytesIO(png.numpy().tobytes())).convert("RGB")) for step, png in state]


def crowded(steps: Sequence[int]) -> int:
    """Of three or more growing steps, which of those between first and last has the closest neighbours."""
    return min(range(1, len(steps) - 1), key=lambda k: steps[k + 1] - steps[k - 1])


def draw_card(group: Group, step: int) -> Image.Image:
    """What the only trajectory of an evaluated question did: where it looked, what it answered."""
    trajectory = group.trajectories[0]
    blocks = [paragraph([(f"step {step}", MUTED)], CARD, 13)]
    if trajectory.sample.images:
        panels = looks(trajectory)
        first = next((look.turn.region for look in panels if look.turn.region is not None), None)
        index = 0 if first is None else first.image
        image = trajectory.sample.images[index]
        chosen = [
            (look.number, look.turn.region.box)
            for look in panels
            if look.number is not None and look.turn.region is not None and look.turn.region.image == index
        ]
        annotated = [region.box for region in trajectory.sample.regions if region.image == index]
        size = fitted(image.shape[2], image.shape[1], (CARD, CARD))
        blocks.append(draw_boxes(image, size, chosen, annotated))
    accuracy = float(group.rewards["accuracy"][0]) if "accuracy" in group.rewards else math.nan
    colour = INK if math.isnan(accuracy) else GOOD if accuracy > 0.5 else BAD
    answer = "none" if trajectory.answer is None else shortened(trajectory.answer, 60)
    blocks.append(paragraph([("answer ", MUTED), (answer, colour)], CARD, 15, max_lines=3))
    return stack(blocks, CARD, 4)


def encoded(picture: Image.Image) -> Tensor:
    """A PNG file as (bytes,) uint8."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
