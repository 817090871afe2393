"""The data module that every source goes through: records in, `SampleBatch` out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.images import BadImage, load_image
from datamodules.sampler import EpochOrder, SampleLoader, group_indices
from datamodules.vlir.reader import Record, read_records
from datamodules.vlir.schema import BadRow, DataError, Invalid
from modules.trajectory import Sample, SampleBatch

logger = logging.getLogger(__name__)

NAMED = 5  # so many bad rows of a file are named in the log, the others counted
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ImageStore:
    """Decoded images, one tensor a path.

    Args:
        keep: whether images stay in memory; else each batch decodes its own, once.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._images: dict[Path, Tensor] = {}

    def load(self, paths: Sequence[Path], batch: dict[Path, Tensor]) -> tuple[Tensor, ...]:
        """The images of one sample, (3, H, W) uint8 each.

        Args:
            paths: what is wanted.
            batch: images of the batch that is being made; what is decoded is added to it.

        Raises:
            BadImage: one of them cannot be decoded.
        """
        known = self._images if self.keep else batch
        for path in paths:
            if path not in known:
                known[path] = load_image(path)
        return tuple(known[path] for path in paths)


class RecordDataset(Dataset[SampleBatch]):
    """Records with their images, a batch at a time."""

    def __init__(self, records: Sequence[Record], images: ImageStore) -> None:
        self.records = records
        self.images = images

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, indices: Sequence[int]) -> SampleBatch:
        """The batch of these records; what cannot be loaded is left out and named.

        Questions about one image share one tensor.
        """
        batch = SampleBatch(samples=[])
        decoded: dict[Path, Tensor] = {}
        for index in indices:
            record = self.records[index]
            try:
                batch.samples.append(self._sample(record, decoded))
            except (BadImage, Invalid) as error:
                batch.skipped.append(str(BadRow(record.file, record.row, str(error))))
        return batch

    def _sample(self, record: Record, decoded: dict[Path, Tensor]) -> Sample:
        return record.finish(replace(record.sample, images=self.images.load(record.image_paths, decoded)))


class VLIRDataModule(LightningDataModule):
    """Questions from VLIR files.

    Bad rows are left out, named in the log and counted (`skipped_total`); an image that turns out to be corrupt
    makes its batch smaller, down to an empty one.

    Args:
        train: file or files to train on.
        val: file or files to validate on, if at all.
        test: file or files to test on.
        predict: file or files to predict on.
        root: where image paths start; the folder of each file if None.
        batch_size: questions a training batch and rank.
        val_batch_size: questions a batch in validation, test and prediction; `batch_size` if None.
        group_by_image: whether the training questions of one image are kept adjacent.
        num_workers: processes that decode images; 0 decodes in the main one.
        seed: of the order of the training questions.
        cache_images: whether decoded images are kept in memory; needs `num_workers` 0.
        limit: read at most this many usable rows of each file.
    """

    def __init__(
        self,
        train: list[str] | str | None = None,
        val: list[str] | str | None = None,
        test: list[str] | str | None = None,
        predict: list[str] | str | None = None,
        root: str | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        group_by_image: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        cache_images: bool = False,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        at_least_one = {"batch_size": batch_size, "val_batch_size": val_batch_size, "limit": limit}
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1 but got {value}.")
        if cache_images and num_workers:  # workers live for one epoch, and their memory with them
            raise ValueError(
                f"`cache_images` keeps images in the main process only but `num_workers` is {num_workers}."
            )
        sources = {"train": train, "val": val, "test": test, "predict": predict}
        self.files = {name: _paths(source) for name, source in sources.items()}
        self.root = None if root is None else Path(root)
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.group_by_image = group_by_image
        self.num_workers = num_workers
        self.seed = seed
        self.limit = limit
        self.images = ImageStore(keep=cache_images)
        self.records: dict[str, list[Record]] = {}
        self._skipped: dict[str, None] = {}  # an ordered set of "file:row: why"

    @property
    def skipped(self) -> list[str]:
        """Every row left out so far, once each: "file:row: why"."""
        return list(self._skipped)

    @property
    def skipped_total(self) -> int:
        """How many rows were left out so far."""
        return len(self._skipped)

    def setup(self, stage: str) -> None:
        """Parse the files of a stage.

        Raises:
            DataError: a file that cannot be used, images that are all missing, or no file where one is needed.
        """
        for split in STAGES[stage]:
            if split not in self.records:
                self.records[split] = [record for path in self.files[split] for record in self._read(path)]
        needed = STAGES[stage][0]
        if not self.records[needed]:
            raise DataError(f"`{stage}` needs a file but the data's `{needed}` is not set.")

    def train_dataloader(self) -> SampleLoader:
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return self._loader("train", self.batch_size, shuffle=not overfit, grouped=self.group_by_image)

    def val_dataloader(self) -> list[SampleLoader]:
        return [self._loader("val", self.val_batch_size)] if self.records["val"] else []

    def test_dataloader(self) -> SampleLoader:
        return self._loader("test", self.val_batch_size)

    def predict_dataloader(self) -> SampleLoader:
        return self._loader("predict", self.val_batch_size)

    def transfer_batch_to_device(self, batch: SampleBatch, device: torch.device, dataloader_idx: int) -> SampleBatch:
        """The batch as it is: images stay at rest, and one object each, until they are computed with."""
        self._note(batch.skipped)
        return batch

    def read_file(self, path: Path) -> tuple[list[Record], list[BadRow]]:
        """The usable rows of one file and the others; subclasses read other forms.

        Raises:
            DataError: the file cannot be used.
        """
        return read_records(path, self.root, self.limit)

    def _read(self, path: Path) -> list[Record]:
        records, bad = self.read_file(path)
        self._note([str(error) for error in bad])
        if not any(all(image.exists() for image in record.image_paths) for record in records):
            first = records[0].image_paths[0]
            raise DataError(f"{path}: expected images under {self.root or path.parent}, found none (first {first}).")
        return records

    def _note(self, skipped: Sequence[str]) -> None:
        new = [name for name in skipped if name not in self._skipped]
        self._skipped |= dict.fromkeys(new)
        for name in new[:NAMED]:
            logger.warning("left out %s", name)
        if len(new) > NAMED:
            logger.warning("left out %d more rows", len(new) - NAMED)

    def _loader(self, split: str, batch_size: int, shuffle: bool = False, grouped: bool = False) -> SampleLoader:
        records = self.records[split]
        keys = [(record.image_paths or None) if grouped else None for record in records]
        order = EpochOrder(
            groups=group_indices(keys),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=self.trainer.world_size if self.trainer is not None else 1,
        )
        return SampleLoader(RecordDataset(records, self.images), order, self.num_workers)


def _paths(source: list[str] | str | None) -> list[Path]:
    return [Path(source)] if isinstance(source, str) else [Path(path) for path in source or ()]
