"""Shares of several data sets: exact, seeded, without repetition before all have come."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.mixture import MixtureOrder, endless, quotas
from datamodules.sampler import SampleLoader
from tests.datamodules.conftest import Numbers


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 1000))
def test_quotas_add_up_and_are_next_to_the_exact_share(weights: list[float], size: int) -> None:
    counts = quotas(weights, size)
    assert sum(counts) == size
    exact = [weight * size / sum(weights) for weight in weights]
    assert all(abs(count - share) < 1 + 1e-9 for count, share in zip(counts, exact, strict=True))


def test_quotas_of_a_worked_example() -> None:
    assert quotas([1, 1, 1], 10) == [4, 3, 3]
    assert quotas([2, 1, 1], 10) == [5, 3, 2]  # 5, 2.5, 2.5: the remainder goes to the first of equals


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 60))
def test_endless_order_is_a_window_of_whole_passes(length: int, start: int, count: int) -> None:
    whole = endless(length, 0, 200, seed=3, source=1).tolist()
    assert endless(length, start, count, seed=3, source=1).tolist() == whole[start : start + count]
    for first in range(0, 200 - length, length):
        assert sorted(whole[first : first + length]) == list(range(length))


def order(**changes: object) -> MixtureOrder:
    settings = {"lengths": [10, 100], "quotas": [15, 15], "batch_size": 4, "seed": 0}
    return MixtureOrder(**(settings | changes))  # type: ignore[arg-type]


def drawn(mixture: MixtureOrder, epoch: int) -> list[int]:
    mixture.set_epoch(epoch)
    return [index for batch in mixture.batches() for index in batch]


def test_each_epoch_has_the_shares_and_epochs_go_on_where_the_last_one_ended() -> None:
    mixture = order()
    epochs = [drawn(mixture, epoch) for epoch in range(7)]
    assert all(sum(index < 10 for index in epoch) == 15 for epoch in epochs)
    large = [index for epoch in epochs for index in epoch if index >= 10]
    assert sorted(large[:90]) == sorted(set(large[:90]))  # six epochs of 15: none of the 100 came twice
    small = Counter(index for epoch in epochs[:2] for index in epoch if index < 10)
    assert set(small.values()) == {3}  # 30 draws of 10
    assert drawn(order(), 3) == epochs[3]  # a function of seed and epoch
    assert drawn(order(seed=1), 3) != epochs[3]
    assert len({tuple(epoch) for epoch in epochs}) == 7


def test_ranks_share_an_epoch_without_overlap() -> None:
    whole = sorted(drawn(order(), 2))
    for world in (2, 3):
        ranks = [order(rank=rank, world_size=world) for rank in range(world)]
        assert sorted(index for rank in ranks for index in drawn(rank, 2)) == whole
        assert {len(rank.batches()) for rank in ranks} == {len(ranks[0])}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 3, 8])
def test_a_loader_resumes_with_the_very_next_batch(workers: int, stop: int) -> None:
    def loader() -> SampleLoader:
        return SampleLoader(Numbers(), order(), workers)

    whole = list(loader())
    first = loader()
    batches = iter(first)
    seen = [next(batches) for _ in range(stop)]
    rest = loader()
    rest.load_state_dict(first.state_dict())
    assert seen + (list(rest) if stop < len(whole) else []) == whole
