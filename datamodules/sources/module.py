"""A data module of sources: mixed by weight, read once or streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from datamodules.mixture import MixtureOrder, quotas
from datamodules.module import STAGES, RecordDataset, VLIRDataModule
from datamodules.sampler import SampleLoader
from datamodules.sources.base import Source
from datamodules.stream_loader import StreamLoader
from datamodules.streaming import MixedStream, Stream
from datamodules.vlir.reader import Joined, Record
from datamodules.vlir.schema import DataError

PEEKED = 64  # questions of a stream that are looked at before a run


@dataclass(frozen=True)
class Weighted:
    """A data set to train on.

    Args:
        source: which one.
        weight: how many of the questions are its, relative to the weights of the others; the number of its questions
            if None, so that each question of each such data set comes equally often.
    """

    source: Source
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"Expected `weight` to be more than 0 but got {self.weight}.")
        if not self.source.trains:
            raise ValueError(f"{type(self.source).__name__} is for evaluation only but got to be trained on.")


class SourcesDataModule(VLIRDataModule):
    """Questions from published data sets, several mixed if there are several.

    Bad rows and corrupt images are left out as in `VLIRDataModule`.

    Args:
        train: what is trained on, and in what shares.
        val: what is validated on, one after another, if at all.
        test: what is tested on.
        predict: what is predicted on.
        batch_size: questions a training batch and rank.
        val_batch_size: questions a batch in validation, test and prediction; `batch_size` if None.
        epoch_size: training questions an epoch, over all ranks; if None as many as the data sets have together.
            A stream needs it.
        stream: whether the training data sets are read as they come, without reading them as a whole before. Rows are
            then drawn by weight one by one.
        buffer: rows of a stream that each worker reads at a time, and shuffles.
        num_workers: processes that read and decode images; 0 does so in the main one.
        seed: of the order of the training questions, and of what is drawn from which.
        cache_images: whether decoded images are kept in memory; needs `num_workers` 0, does not act on a stream.
    """

    def __init__(
        self,
        train: list[Weighted] | None = None,
        val: list[Source] | None = None,
        test: list[Source] | None = None,
        predict: list[Source] | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        epoch_size: int | None = None,
        stream: bool = False,
        buffer: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        cache_images: bool = False,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
            cache_images=cache_images,
        )
        for name, value in (("epoch_size", epoch_size), ("buffer", buffer)):
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1 but got {value}.")
        if stream and epoch_size is None:
            raise ValueError("`stream` needs `epoch_size`: how many questions there are is not known beforehand.")
        self.train = list(train or ())
        if len({weighted.weight is None for weighted in self.train}) > 1 or (
            stream and len(self.train) > 1 and self.train[0].weight is None
        ):
            raise ValueError("Expected a `weight` for each training source, or for none of them if they do not stream.")
        chosen = [weighted.source for weighted in self.train]
        self.sources = {"train": chosen, "val": val or [], "test": test or [], "predict": predict or []}
        self.epoch_size = epoch_size
        self.stream = stream
        self.buffer = buffer

    def setup(self, stage: str) -> None:
        """Read the data sets of a stage; of a stream its first rows.

        Raises:
            DataError: a data set that cannot be used, images that are all missing, or none where one is needed.
        """
        if not self.sources[STAGES[stage][0]]:
            raise DataError(f"`{stage}` needs a source but the data's `{STAGES[stage][0]}` is not set.")
        super().setup(stage)

    def read_split(self, split: str) -> Iterator[Sequence[Record]]:
        """See `VLIRDataModule.read_split`."""
        for source in self.sources[split]:
            if split == "train" and self.stream:
                found = list(islice(Stream(source, (0, 1), self.buffer, "").read(), PEEKED))
                records: Sequence[Record] = [each for each in found if isinstance(each, Record)]
                yield self.noted(records, [], source.path, source.root)
            else:
                yield self.noted(*source.read(), source.path, source.root)

    def train_dataloader(self) -> SampleLoader | StreamLoader:  # type: ignore[override]
        """Batches of the mixture."""
        rank, world_size = self.ranks
        if self.stream:
            assert self.epoch_size is not None
            opened = partial(open_share, tuple(self.train), self.buffer, self.batch_size, self.seed)
            return StreamLoader(opened, self.epoch_size, self.batch_size, self.num_workers, rank, world_size)
        if self.trainer is not None and self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            return super().train_dataloader()
        records = self.records["train"]
        assert isinstance(records, Joined)
        lengths = [len(part) for part in records.parts]
        weights = [weighted.weight or length for weighted, length in zip(self.train, lengths, strict=True)]
        shares = quotas(weights, self.epoch_size or sum(lengths))
        if not all(shares):
            raise DataError(
                f"{self.train[shares.index(0)].source.path}: its weight comes to no question in an epoch of "
                f"{sum(shares)}; raise `weight` or `epoch_size`."
            )
        order = MixtureOrder(lengths, shares, self.batch_size, self.seed, rank, world_size)
        return SampleLoader(RecordDataset(records, self.images), order, self.num_workers)


def open_share(
    train: Sequence[Weighted], buffer: int, batch_size: int, seed: int, share: tuple[int, int]
) -> MixedStream:
    """One share of all training data sets, from its beginning."""
    streams = [Stream(weighted.source, share, buffer, f"{seed}:{k}:{share}") for k, weighted in enumerate(train)]
    return MixedStream(streams, [weighted.weight or 1.0 for weighted in train], batch_size, f"{seed}:{share}")
