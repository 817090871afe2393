"""The order of an epoch: complete, grouped, sharded, and the same when asked for again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from datamodules.sampler import EpochOrder, SampleLoader, epoch_batches, group_indices, shard


class Echo(Dataset[Any]):
    """A batch is the list of its indices."""

    def __getitems__(self, indices: Sequence[int]) -> list[int]:
        return list(indices)


def _singles(count: int) -> list[list[int]]:
    return [[index] for index in range(count)]


def test_group_indices() -> None:
    assert group_indices(["a", "b", "a", None, None]) == [[0, 2], [1], [3], [4]]


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.integers(0, 6), max_size=40),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_question_comes_once_and_ranks_agree_on_the_length(
    keys: list[int], batch_size: int, world_size: int, epoch: int
) -> None:
    groups = group_indices(keys)
    whole = epoch_batches(groups, batch_size, seed=1, epoch=epoch)
    assert sorted(chain.from_iterable(whole)) == list(range(len(keys)))
    assert all(len(batch) == batch_size for batch in whole[:-1])
    row = [keys[index] for batch in whole for index in batch]
    changes = sum(a != b for a, b in pairwise(row))
    assert changes == max(0, len(set(keys)) - 1)  # equal keys are adjacent
    orders = [EpochOrder(groups, batch_size, True, 1, rank, world_size) for rank in range(world_size)]
    for order in orders:
        order.set_epoch(epoch)
        assert len(order) == len(order.batches())
    assert sorted(chain.from_iterable(chain.from_iterable(order.batches() for order in orders))) == list(
        range(len(keys))
    )
    assert len({len(order) for order in orders}) == 1


def test_shard_pads_with_empty_batches() -> None:
    assert [shard([[0], [1], [2]], rank, 2) for rank in range(2)] == [[[0], [2]], [[1], []]]


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): tuple(chain.from_iterable(epoch_batches(_singles(50), 5, seed, epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    assert orders[1, 2] == tuple(chain.from_iterable(epoch_batches(_singles(50), 5, 1, 2)))
    unshuffled = EpochOrder(_singles(7), 3, shuffle=False)
    assert unshuffled.batches() == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_resumes_after_any_batch(workers: int) -> None:
    def loader() -> SampleLoader:
        return SampleLoader(Echo(), EpochOrder(_singles(11), 3, shuffle=True, seed=4), workers)

    first = loader()
    first.batch_sampler.set_epoch(2)
    expected = list(first)
    assert first.state_dict() == {"epoch": 2, "position": 4, "length": 4}
    for position in range(1, 4) if workers == 0 else [2]:
        interrupted = loader()
        interrupted.batch_sampler.set_epoch(2)
        batches = iter(interrupted)
        for _ in range(position):
            next(batches)
        resumed = loader()
        resumed.load_state_dict(interrupted.state_dict())
        iterator = iter(resumed)  # Lightning asks for it before it sets the epoch
        resumed.batch_sampler.set_epoch(2)
        assert list(iterator) == expected[position:]
        assert list(resumed) == expected  # the next pass is whole again


def test_iterating_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(SampleLoader(Echo(), EpochOrder(_singles(5), 2, shuffle=True)))
    assert torch.equal(torch.get_rng_state(), state)


def test_another_length_is_said(caplog: pytest.LogCaptureFixture) -> None:
    loader = SampleLoader(Echo(), EpochOrder(_singles(8), 2, shuffle=True))
    loader.load_state_dict({"epoch": 0, "position": 1, "length": 8})
    assert "8 batches" in caplog.text
    assert len(list(loader)) == 3
