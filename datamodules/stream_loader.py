"""Batches of streams: over workers and ranks, resumable at the very next batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from datamodules.module import ImageStore, decoded_batch
from datamodules.streaming import MixedStream, State
from modules.trajectory import SampleBatch

logger = logging.getLogger(__name__)

Open = Callable[[tuple[int, int]], MixedStream]  # of (share, how many there are)


class StreamLoader:
    """A fixed number of batches an epoch from streams without end; the next epoch goes on where the last one ended.

    Every worker reads a share of its own, and batches come from them in turn. What was handed on is known for each, so
    that a resumed run misses and repeats nothing.

    Args:
        open_stream: opens one share; can be pickled if there are workers that are spawned.
        epoch_size: questions an epoch, over all ranks.
        batch_size: questions a batch.
        num_workers: processes that read and decode; 0 does so in the main one.
        rank: of this process.
        world_size: how many there are.
    """

    def __init__(
        self, open_stream: Open, epoch_size: int, batch_size: int, num_workers: int, rank: int, world_size: int
    ) -> None:
        self.open_stream = open_stream
        self.length = ceil(epoch_size / (batch_size * world_size))
        self.num_workers = num_workers
        self.rank, self.world_size = rank, world_size
        self._position = 0  # batches handed on in the current epoch
        self._turn = 0  # whose batch is next
        self._places: list[State | None] = [None] * max(1, num_workers)  # of each worker's share

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[SampleBatch]:
        start = self._position if self._position < self.length else 0
        parts = len(self._places)
        shares = [(self._turn + k) % parts for k in range(parts)]  # the first worker is asked first
        shares_of = _Shares(self.open_stream, shares, self.rank * parts, parts * self.world_size, self._places)
        # a generator of its own, so that iterating draws nothing from the global one
        loader = DataLoader(shares_of, batch_size=None, num_workers=self.num_workers, generator=torch.Generator())
        for position, (share, batch, place) in enumerate(loader, start=start + 1):
            self._places[share], self._turn, self._position = place, (share + 1) % parts, position
            yield batch
            if position == self.length:
                return

    def state_dict(self) -> dict[str, Any]:
        """The place of every share of every rank; all ranks have to ask for it, as they do for a checkpoint."""
        places: list[Any] = [self._places]
        if self.world_size > 1 and torch.distributed.is_initialized():
            places = [None] * self.world_size
            torch.distributed.all_gather_object(places, self._places)
        return {"position": self._position, "turn": self._turn, "places": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place; a warning says so where another number of shares makes that impossible."""
        shape = (len(state["places"]), len(state["places"][0]))
        if shape != (self.world_size, len(self._places)):
            logger.warning(
                "The checkpoint was written by %d ranks of %d workers, now there are %d of %d: "
                "the streams begin anew, and questions come again.",
                *(*shape, self.world_size, len(self._places)),
            )
            return
        self._position, self._turn = state["position"], state["turn"]
        self._places = list(state["places"][self.rank])


class _Shares(IterableDataset[tuple[int, SampleBatch, State]]):
    """What each worker reads: batches of its share, with the place behind each.

    Args:
        open_stream: opens one share.
        shares: of this rank's shares, the one that each worker reads; the first worker's batch comes first.
        first: number of this rank's first share.
        total: how many shares there are.
        places: where each of this rank's shares goes on.
    """

    def __init__(
        self, open_stream: Open, shares: list[int], first: int, total: int, places: list[State | None]
    ) -> None:
        self.open_stream = open_stream
        self.shares, self.first, self.total = shares, first, total
        self.places = list(places)

    def __iter__(self) -> Iterator[tuple[int, SampleBatch, State]]:
        worker = get_worker_info()
        share = self.shares[worker.id if worker is not None else 0]
        stream = self.open_stream((self.first + share, self.total))
        place = self.places[share]
        if place is not None:
            stream.load(place)
        for records, skipped, after in stream.batches():
            batch = decoded_batch(records, ImageStore(keep=False))
            batch.skipped = skipped + batch.skipped
            yield share, batch, after
