"""Which questions make which batch: a pure function of (seed, epoch), sharded by rank, resumable anywhere."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)


def group_indices(keys: Iterable[Hashable | None]) -> list[list[int]]:
    """Indices with equal keys together, in order of first appearance; None groups with nothing.

    >>> group_indices(["a", "b", "a", None, None])
    [[0, 2], [1], [3], [4]]
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(("alone", index) if key is None else ("key", key), []).append(index)
    return list(groups.values())


def epoch_batches(groups: Sequence[Sequence[int]], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Shuffle the groups and cut their concatenation into batches; the last one may be smaller.

    A group stays adjacent; it is split between two batches only where a batch is full.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(len(groups), generator=generator).tolist()
    return cut_batches([groups[index] for index in order], batch_size)


def cut_batches(groups: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Concatenate the groups and cut the row of indices into batches; the last one may be smaller."""
    flat = [index for group in groups for index in group]
    return [flat[start : start + batch_size] for start in range(0, len(flat), batch_size)]


def shard(batches: Sequence[list[int]], rank: int, world_size: int) -> list[list[int]]:
    """The batches of one rank. All ranks get equally many: where they run out, an empty one.

    Every index is on exactly one rank, so that nothing is counted twice in an evaluation.
    """
    count = ceil(len(batches) / world_size)
    own = list(batches[rank::world_size])
    return own + [[] for _ in range(count - len(own))]


class Order(Protocol):
    """Which indices make which batch of the current epoch on this rank."""

    epoch: int

    def __len__(self) -> int:
        """How many batches there are."""

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch."""

    def batches(self) -> list[list[int]]:
        """The batches of the epoch."""


@dataclass
class EpochOrder:
    """The batches of the current epoch on this rank."""

    groups: list[list[int]]
    batch_size: int
    shuffle: bool
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    epoch: int = field(default=0, init=False)

    @property
    def sampler(self) -> EpochOrder:
        """Itself: Lightning looks for `set_epoch` at a batch sampler's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        questions = sum(len(group) for group in self.groups)
        return ceil(questions / (self.batch_size * self.world_size))

    def batches(self) -> list[list[int]]:
        if self.shuffle:
            whole = epoch_batches(self.groups, self.batch_size, self.seed, self.epoch)
        else:
            whole = cut_batches(self.groups, self.batch_size)
        return shard(whole, self.rank, self.world_size)


class SampleLoader:
    """Batches of an epoch in their `Order`, resumable in its middle.

    Lightning keeps `state_dict` in its checkpoints and hands it back before the first batch. This is not a
    `torch.utils.data.DataLoader` on purpose: Lightning rebuilds those (with a distributed sampler of its own, in
    prediction, under `overfit_batches`), and so changes which questions come. Where a worker dies (killed for its
    memory, say), the epoch goes on with new ones, from the batch that is missing; twice at the same batch is an error.

    Args:
        dataset: has `__getitems__(indices)`, which makes a whole batch, also of no indices.
        order: which indices make which batch.
        num_workers: processes that make batches; 0 makes them in the main one.
    """

    def __init__(self, dataset: Dataset[Any], order: Order, num_workers: int = 0) -> None:
        self.samples = dataset  # not `dataset`: where Lightning finds that name, it puts in its own sampler
        self.batch_sampler = order  # the name by which Lightning finds `set_epoch`
        self.num_workers = num_workers
        self._epoch = 0  # of the position
        self._position = 0  # batches handed on in that epoch
        self.restarts = 0  # times that a worker died

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing below runs before the first batch is asked for, when Lightning has set the epoch.
        epoch = self.batch_sampler.epoch
        start = self._position if self._epoch == epoch else 0
        if start >= len(self):
            start = 0
        batches = self.batch_sampler.batches()
        position, failed_at = start, -1
        while position < len(batches):
            try:
                for batch in self._loader(batches[position:]):
                    position += 1
                    self._epoch, self._position = epoch, position
                    yield batch
            except RuntimeError as error:
                # twice at the same batch: it is not an accident; other errors are those of the code
                if "DataLoader worker (pid" not in str(error) or position == failed_at:
                    raise
                failed_at = position
                self.restarts += 1
                logger.warning("%s. Its batch is made anew by other workers.", str(error).rstrip(". "))

    def _loader(self, batches: list[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            self.samples,
            batch_sampler=batches,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # its own, so that iterating draws nothing from the global one
        )

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position, "length": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["length"] != len(self):
            logger.warning(
                "The checkpoint was written with %d batches an epoch and rank, now there are %d: "
                "the rest of this epoch will not be the same questions.",
                state["length"],
                len(self),
            )
        self._epoch, self._position = state["epoch"], state["position"]


def _as_is(batch: Any) -> Any:
    return batch
