"""The data module that every source goes through: records in, `SampleBatch` out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.images import BadImage
from datamodules.pictures import ImageRef
from datamodules.sampler import EpochOrder, SampleLoader, group_indices
from datamodules.vlir.reader import Joined, Record, image_keys, read_records
from datamodules.vlir.schema import BadRow, DataError, Invalid
from modules.trajectory import SampleBatch

logger = logging.getLogger(__name__)

NAMED = 5  # so many bad rows of a file are named in the log, the others counted
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class ImageStore:
    """Decoded images, one tensor a reference.

    Args:
        keep: whether images stay in memory; else each batch decodes its own, once.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._images: dict[ImageRef, Tensor] = {}

    def load(self, images: Sequence[ImageRef], batch: dict[ImageRef, Tensor]) -> tuple[Tensor, ...]:
        """The images of one sample, (3, H, W) uint8 each.

        Args:
            images: what is wanted.
            batch: images of the batch that is being made; what is decoded is added to it.

        Raises:
            BadImage: one of them cannot be decoded.
            Invalid: one of them leaves its folder.
        """
        known = self._images if self.keep else batch
        for image in images:
            if image not in known:
                known[image] = image.load()
        return tuple(known[image] for image in images)


class RecordDataset(Dataset[SampleBatch]):
    """Records with their images, a batch at a time."""

    def __init__(self, records: Sequence[Record], images: ImageStore) -> None:
        self.records = records
        self.images = images

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, indices: Sequence[int]) -> SampleBatch:
        """See `decoded_batch`."""
        return decoded_batch((self.records[index] for index in indices), self.images)


def decoded_batch(records: Iterable[Record], images: ImageStore) -> SampleBatch:
    """The batch of these records; what cannot be loaded is left out and named.

    Questions about one image share one tensor.
    """
    batch = SampleBatch(samples=[])
    decoded: dict[ImageRef, Tensor] = {}
    for record in records:
        try:
            sample = replace(record.sample, images=images.load(record.images, decoded))
            batch.samples.append(record.finish(sample))
        except (BadImage, Invalid) as error:
            batch.skipped.append(str(BadRow(record.file, record.row, str(error))))
    return batch


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
        self.records: dict[str, Sequence[Record]] = {}
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
                self.records[split] = Joined(list(self.read_split(split)))
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

    def read_split(self, split: str) -> Iterator[Sequence[Record]]:
        """The usable rows of each file of a split; bad ones are noted.

        Raises:
            DataError: a file cannot be used, or none of its images is there.
        """
        for path in self.files[split]:
            yield self.noted(*self.read_file(path), path, self.root or path.parent)

    def read_file(self, path: Path) -> tuple[Sequence[Record], list[BadRow]]:
        """The usable rows of one file and the others; subclasses read other forms.

        Raises:
            DataError: the file cannot be used.
        """
        return read_records(path, self.root, self.limit)

    def noted(self, records: Sequence[Record], bad: Sequence[BadRow], name: Path | str, root: Path) -> Sequence[Record]:
        """The records themselves; the bad rows are named and counted.

        Raises:
            DataError: none of the images is there.
        """
        self._note([str(error) for error in bad])
        if not any(all(image.exists() for image in record.images) for record in records):
            raise DataError(f"{name}: expected images under {root}, found none (first {records[0].images[0]}).")
        return records

    def _note(self, skipped: Sequence[str]) -> None:
        new = [name for name in skipped if name not in self._skipped]
        self._skipped |= dict.fromkeys(new)
        for name in new[:NAMED]:
            logger.warning("left out %s", name)
        if len(new) > NAMED:
            logger.warning("left out %d more rows", len(new) - NAMED)

    @property
    def ranks(self) -> tuple[int, int]:
        """This process's rank, and how many there are."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, split: str, batch_size: int, shuffle: bool = False, grouped: bool = False) -> SampleLoader:
        records = self.records[split]
        keys = image_keys(records) if grouped else [None] * len(records)
        rank, world_size = self.ranks
        order = EpochOrder(group_indices(keys), batch_size, shuffle, self.seed, rank, world_size)
        return SampleLoader(RecordDataset(records, self.images), order, self.num_workers)


def _paths(source: list[str] | str | None) -> list[Path]:
    return [Path(source)] if isinstance(source, str) else [Path(path) for path in source or ()]
