"""A data set made on the spot: coloured cards, each with a small real handwritten digit on it.

The question names a colour; the digit is too small to be read in a small global view, so that the policy has
to look again. Digits are those of scikit-learn's `load_digits` (UCI, 1,797 scans of 8 x 8), split by scan: those
used for training are never seen in evaluation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from datamodules.module import VLIRDataModule
from datamodules.vlir.schema import to_row
from modules.trajectory import Box, Region, Sample, Step

VERSION = 1  # of pixels and texts: raise it when either changes, so that data on disk are made anew

SIZE = 192  # of the image, pixels
GRID = 4  # cells a side
CELL = SIZE // GRID
CARD = 36
PLATE = 14
CARDS = 4  # an image
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 1.0, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (1.0, 1.0, 0.1),
    "magenta": (1.0, 0.1, 1.0),
    "cyan": (0.1, 1.0, 1.0),
}
NOISE = 16  # the background is grey noise in so many blocks a side: flat blocks keep PNGs small and quick
HELD_OUT = 5  # every fifth scan

Pool = Literal["train", "heldout"]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class CardSplit:
    """What one split of the cards consists of.

    Two splits with equal `seed` and `digits` show the same images, whatever their rationales.
    """

    images: int  # four questions each
    seed: int
    digits: Pool = "train"  # which scans the digits are drawn from
    rationale: Literal["none", "box", "glance"] = "none"  # what is written: nothing, a zoom, an answer without one
    loose_size: float = 0.0  # boxes of the rationale are made larger by up to this share of their size
    loose_shift: float = 0.0  # and moved by up to this share of it, each way
    regions: bool = False  # whether the true box comes along as annotated evidence, where one is needed
    places: bool = False  # whether two of an image's four questions ask for a place instead of a digit
    glances: float = 0.0  # share of the rationales for places that answer without a zoom

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"Expected `images` to be at least 1 but got {self.images}.")
        if self.seed < 0:
            raise ValueError(f"Expected `seed` to be at least 0 but got {self.seed}.")
        if self.loose_size < 0:
            raise ValueError(f"Expected `loose_size` to be at least 0 but got {self.loose_size}.")
        if not 0 <= self.loose_shift <= 0.5:  # beyond, a box could miss the image
            raise ValueError(f"Expected `loose_shift` to be between 0 and 0.5 but got {self.loose_shift}.")
        if (self.loose_size or self.loose_shift) and self.rationale != "box":
            raise ValueError(f"`loose_size` and `loose_shift` act on rationale 'box' only but got {self.rationale!r}.")
        if not 0 <= self.glances <= 1:
            raise ValueError(f"Expected `glances` to be a share, from 0 to 1, but got {self.glances}.")
        if self.glances and not (self.places and self.rationale == "box"):
            raise ValueError(
                "`glances` acts with `places` on rationale 'box' only but got "
                f"places={self.places} and {self.rationale!r}."
            )

    @property
    def fingerprint(self) -> str:
        """The name of the folder that holds this split."""
        settings = json.dumps([VERSION, asdict(self)], sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
        return f"{self.digits}-{self.rationale}-{self.images}-{digest}"


@dataclass(frozen=True)
class Card:
    """One card of an image."""

    colour: str
    digit: int
    scan: int  # index into load_digits
    box: Box  # whole pixels


@dataclass(frozen=True, eq=False)
class CardImage:
    """A generated image and what is on it."""

    pixels: Pixels  # (SIZE, SIZE, 3)
    cards: tuple[Card, ...]


def draw_image(seed: int, pool: Pool, index: int) -> CardImage:
    """Make image `index` of a split, independently of all others."""
    random = _generator(seed, pool, index, purpose=0)
    scans, labels, plates = _digits(pool)
    cells = random.permutation(GRID * GRID)[:CARDS]
    jitter = random.integers(0, CELL - CARD + 1, size=(CARDS, 2))
    colours = random.permutation(len(COLOURS))[:CARDS]
    brightness = random.uniform(0.75, 1.0, size=CARDS)
    chosen = random.integers(0, len(scans), size=CARDS)
    noise = random.integers(0, 90, size=(NOISE, NOISE), dtype=np.uint8)  # up to 0.35 of full brightness
    grey = noise.repeat(SIZE // NOISE, axis=0).repeat(SIZE // NOISE, axis=1)
    pixels = np.broadcast_to(grey[..., None], (SIZE, SIZE, 3)).copy()

    names, shades = list(COLOURS), np.array(list(COLOURS.values()))
    margin = (CARD - PLATE) // 2
    cards = []
    for k in range(CARDS):
        x, y = (int(cells[k]) % GRID) * CELL + int(jitter[k, 0]), (int(cells[k]) // GRID) * CELL + int(jitter[k, 1])
        pixels[y : y + CARD, x : x + CARD] = (shades[colours[k]] * brightness[k] * 255).round()
        top, left = y + margin, x + margin
        pixels[top : top + PLATE, left : left + PLATE] = plates[chosen[k], :, :, None]
        box = (float(x), float(y), float(x + CARD), float(y + CARD))
        cards.append(Card(names[colours[k]], int(labels[chosen[k]]), int(scans[chosen[k]]), box))
    return CardImage(pixels, tuple(cards))


def loosen(box: Box, size: float, shift: float, random: np.random.Generator) -> Box:
    """An imperfect annotation of `box`: larger by up to `size`, then moved by up to `shift` of the new size.

    Clipped to the image and rounded to whole pixels.
    """
    x1, y1, x2, y2 = box
    scale = 1 + random.uniform(0, size)
    width, height = (x2 - x1) * scale, (y2 - y1) * scale
    dx, dy = random.uniform(-shift, shift, size=2)
    left, top = (x1 + x2 - width) / 2 + dx * width, (y1 + y2 - height) / 2 + dy * height
    edges = np.clip(np.round([left, top, left + width, top + height]), 0, SIZE)
    return float(edges[0]), float(edges[1]), float(edges[2]), float(edges[3])


def questions(image: CardImage, split: CardSplit, index: int) -> list[Sample]:
    """The questions about image `index` of a split, one a card; samples without images.

    Their `source` tells their kinds apart: ``cards`` asks for a digit, ``card_places`` for a place.
    """
    random = _generator(split.seed, split.digits, index, purpose=1)  # the pictures do not depend on the rationales
    kinds = _generator(split.seed, split.digits, index, purpose=2)
    by_place = set(kinds.permutation(CARDS)[: CARDS // 2].tolist()) if split.places else set()
    name = f"{index:06d}"
    return [
        Sample(
            id=f"{name}-{card.colour}",
            question=f"{'Where is' if k in by_place else 'Which digit is on'} the {card.colour} card?",
            answers=(_answer(card, k in by_place),),
            source="card_places" if k in by_place else "cards",
            regions=(Region(card.box),) if split.regions and k not in by_place else (),
            rationale=_rationale(card, k in by_place, split, random, kinds),
            meta={"image_id": name},
        )
        for k, card in enumerate(image.cards)
    ]


def write_split(split: CardSplit, root: Path) -> Path:
    """Make sure that a split is on disk.

    It appears as a whole or not at all, also when several processes write it at once.

    Returns:
        Its VLIR file, ``<root>/<fingerprint>/data.jsonl``.
    """
    folder = root / split.fingerprint
    if folder.exists():
        return folder / "data.jsonl"
    partial = root / f".{split.fingerprint}-{uuid.uuid4().hex}"
    try:
        (partial / "images").mkdir(parents=True)
        with (partial / "data.jsonl").open("w", encoding="utf-8") as file:
            for index in range(split.images):
                image = draw_image(split.seed, split.digits, index)
                path = f"images/{index:06d}.png"
                Image.fromarray(image.pixels).save(partial / path, compress_level=1)
                file.writelines(json.dumps(to_row(q, [path])) + "\n" for q in questions(image, split, index))
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / "data.jsonl"


class CardsDataModule(VLIRDataModule):
    """Cards with handwritten digits, generated once and read as VLIR files ever after.

    Args:
        root: where the splits are kept, one folder each.
        train: what is trained on.
        val: what is validated on, if at all.
        test: what is tested and predicted on, if at all.
        batch_size: questions a training batch and rank.
        val_batch_size: questions a batch in validation, test and prediction; `batch_size` if None.
        group_by_image: whether the four questions of an image are kept adjacent.
        num_workers: processes that decode images; 0 decodes in the main one.
        seed: of the order of the training questions.
        cache_images: whether decoded images are kept in memory, 110 kB each; needs `num_workers` 0.
    """

    def __init__(
        self,
        root: str,
        train: CardSplit,
        val: CardSplit | None = None,
        test: CardSplit | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        group_by_image: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        cache_images: bool = True,
    ) -> None:
        paths = [None if split is None else str(Path(root) / split.fingerprint / "data.jsonl") for split in (val, test)]
        super().__init__(
            train=str(Path(root) / train.fingerprint / "data.jsonl"),
            val=paths[0],
            test=paths[1],
            predict=paths[1],
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            group_by_image=group_by_image,
            num_workers=num_workers,
            seed=seed,
            cache_images=cache_images,
        )
        self.card_root = Path(root)
        self.splits = [split for split in (train, val, test) if split is not None]

    def prepare_data(self) -> None:
        for split in self.splits:
            write_split(split, self.card_root)


def _generator(seed: int, pool: Pool, index: int, purpose: int) -> np.random.Generator:
    key = (0 if pool == "train" else 1, index, purpose)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def _answer(card: Card, by_place: bool) -> str:
    """The digit on a card, or the quarter of the image that it lies in; no card lies in two."""
    if not by_place:
        return str(card.digit)
    return f"{'top' if card.box[1] < SIZE / 2 else 'bottom'} {'left' if card.box[0] < SIZE / 2 else 'right'}"


def _rationale(
    card: Card, by_place: bool, split: CardSplit, boxes: np.random.Generator, glances: np.random.Generator
) -> tuple[Step, ...]:
    if split.rationale == "none":
        return ()
    answer = f"</think><answer>{_answer(card, by_place)}</answer>"
    if split.rationale == "glance" or (by_place and glances.random() < split.glances):
        return (Step(f"<think>I answer at a glance.{answer}"),)
    box = loosen(card.box, split.loose_size, split.loose_shift, boxes)
    seen = "I can see it now." if by_place else "I can read it now."
    return (Step(f"<think>I zoom in on {card.colour} ", Region(box)), Step(f"{seen}{answer}"))


@cache
def _digits(pool: Pool) -> tuple[NDArray[np.int64], NDArray[np.int64], Pixels]:
    """The scans of a pool: indices (D,), labels (D,), and plates (D, PLATE, PLATE), white on black."""
    data = load_digits()
    held_out = np.arange(len(data.target)) % HELD_OUT == 0
    scans = np.flatnonzero(held_out if pool == "heldout" else ~held_out)
    lines = _interpolation(data.images.shape[-1], PLATE)
    plates = lines @ (data.images[scans] / 16 * 255) @ lines.T
    return scans, data.target[scans], plates.round().astype(np.uint8)


@cache
def _interpolation(size: int, out: int) -> NDArray[np.float64]:
    """(out, size): linear interpolation between pixel centres, as torch's `interpolate` with align_corners=False."""
    centres = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    return np.maximum(0.0, 1.0 - np.abs(centres[:, None] - np.arange(size)))
