"""Several data sets in shares: which question of which comes when, a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np
from numpy.typing import NDArray

from datamodules.sampler import cut_batches, shard

ORDER, MIXING = 0, 1  # what random numbers are drawn for


def quotas(weights: Sequence[float], size: int) -> list[int]:
    """How many of `size` questions each data set gives, by its weight; what is left goes to the largest remainders.

    >>> quotas([2, 1, 1], 10)
    [5, 3, 2]
    """
    exact = [weight * size / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])
    for k in by_remainder[: size - sum(counts)]:
        counts[k] += 1
    return counts


def endless(length: int, start: int, count: int, seed: int, source: int) -> NDArray[np.int64]:
    """(count,) indices: part of a data set that is read over and over, in another order each time.

    So no question comes twice before all others of its data set have come once.

    Args:
        length: questions of the data set.
        start: how many were read before.
        count: how many are wanted.
        seed: of the order.
        source: which data set it is.
    """
    passes = range(start // length, ceil((start + count) / length))
    flat = [_random(seed, ORDER, source, number).permutation(length) for number in passes]
    offset = start - passes.start * length
    return np.concatenate([np.empty(0, dtype=np.int64), *flat])[offset : offset + count]


@dataclass
class MixtureOrder:
    """The batches of the current epoch on this rank; indices count through all data sets, one after another."""

    lengths: list[int]  # questions of each data set
    quotas: list[int]  # of these, questions an epoch
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    epoch: int = field(default=0, init=False)

    @property
    def sampler(self) -> MixtureOrder:
        """Itself: Lightning looks for `set_epoch` at a batch sampler's sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return ceil(sum(self.quotas) / (self.batch_size * self.world_size))

    def batches(self) -> list[list[int]]:
        """The batches of the epoch: of each data set its share, all of them shuffled."""
        first = np.cumsum([0, *self.lengths])
        parts = [
            first[k] + endless(length, self.epoch * quota, quota, self.seed, k)
            for k, (length, quota) in enumerate(zip(self.lengths, self.quotas, strict=True))
        ]
        drawn = _random(self.seed, MIXING, self.epoch, 0).permutation(np.concatenate(parts))
        return shard(cut_batches([drawn.tolist()], self.batch_size), self.rank, self.world_size)


def _random(seed: int, *purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=purpose)))
