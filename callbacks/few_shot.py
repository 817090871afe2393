"""Solved examples before every question that is evaluated."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import torch

from modules.policy import PolicyError
from modules.trajectory import Sample, SampleBatch

logger = logging.getLogger(__name__)


class FewShot(L.Callback):
    """Draws examples once and puts them before every question of validation and test, with their images and crops.

    They are the same for all questions, in the same order, so that their part of the prompt is computed once a batch.
    An example whose id, or an image of it, is in the evaluated split is refused, and another drawn: images are
    compared byte by byte before the run, and pixel by pixel as questions come.

    Args:
        pool: data whose training split the examples are drawn from; what it needs of ``train`` has to be set.
        count: of examples.
        seed: of the draw.

    Raises:
        ValueError: if ``count`` is below 1.
    """

    def __init__(self, pool: L.LightningDataModule, count: int = 4, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"Expected `count` to be at least 1, but got {count}.")
        self.pool: Any = pool
        self.count = count
        self.seed = seed
        self.examples: tuple[Sample, ...] = ()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the examples.

        Raises:
            PolicyError: if there are not enough that may be used.
        """
        self._draw(trainer, "test")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See `on_test_start`."""
        self._draw(trainer, "val")

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, *_: Any
    ) -> None:
        """Put them before the questions of a batch."""
        self._attach(batch)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: SampleBatch, *_: Any
    ) -> None:
        """See `on_test_batch_start`."""
        self._attach(batch)

    def _draw(self, trainer: L.Trainer, split: str) -> None:
        if self.examples:
            return
        if trainer.is_global_zero:
            self.pool.prepare_data()
        trainer.strategy.barrier("examples")
        self.pool.setup("fit")
        dataset = self.pool.train_dataloader().samples
        asked = getattr(trainer, "datamodule").records[split]  # noqa: B009  # of whatever class
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed)).tolist()
        found: list[Sample] = []
        refused: list[str] = []
        while len(found) < self.count and order:
            taken, order = order[: self.count - len(found)], order[self.count - len(found) :]
            seen = in_split([self.pool.records["train"][k] for k in taken], asked)
            refused += [f"{record.sample.id} ({why})" for record, why in seen]
            known = {record.sample.id for record, _ in seen}
            samples = dataset.__getitems__(taken).samples
            found += [sample for sample in samples if sample.id not in known and (sample.rationale or sample.answers)]
        if len(found) < self.count:
            raise PolicyError(
                f"Expected {self.count} examples in the pool that are not in the evaluated split and can be shown, but "
                f"got {len(found)} of {len(dataset)}{'; refused: ' + ', '.join(refused[:3]) if refused else ''}."
            )
        if refused and trainer.is_global_zero:
            logger.warning("%d examples were refused and others drawn: %s", len(refused), ", ".join(refused[:3]))
        self.examples = tuple(replace(sample, examples=()) for sample in found)

    def _attach(self, batch: SampleBatch) -> None:
        shown = [(example, image) for example in self.examples for image in example.images]
        for sample in batch.samples:
            for image in sample.images:
                for example, other in shown:
                    if image.shape == other.shape and torch.equal(image, other):
                        raise PolicyError(
                            f"Expected examples without images of the evaluated split, but {example.id!r} shows that "
                            f"of {sample.id!r}: leave it out of the pool, or take another `seed`."
                        )
        batch.samples[:] = [replace(sample, examples=self.examples) for sample in batch.samples]


def in_split(records: Sequence[Any], asked: Iterable[Any]) -> list[tuple[Any, str]]:
    """Which records of a pool are in a split as well, and by what."""
    contents = {id(record): [content(image) for image in record.images] for record in records}
    sizes = {len(data) for found in contents.values() for data in found}
    ids: set[str] = set()
    images: set[bytes] = set()
    references: set[Any] = set()
    for record in asked:
        ids.add(record.sample.id)
        references.update(record.images)
    for image in references:
        if size(image) in sizes:
            images.add(content(image))
    found = []
    for record in records:
        if record.sample.id in ids:
            found.append((record, "its id"))
        elif any(data in images for data in contents[id(record)]):
            found.append((record, "its image"))
    return found


def size(image: Any) -> int:
    """Bytes of an image's file; 0 if there is none."""
    opened: Path | BytesIO = image.open()
    if isinstance(opened, Path):
        return opened.stat().st_size if opened.exists() else 0
    return opened.getbuffer().nbytes


def content(image: Any) -> bytes:
    """The bytes of an image's file; none if there is none."""
    opened: Path | BytesIO = image.open()
    if isinstance(opened, Path):
        return opened.read_bytes() if opened.exists() else b""
    return opened.getvalue()
