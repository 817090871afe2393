"""Advantages against the standard library's statistics, and the cases that divide by nothing."""

import math
import statistics

import pytest
import torch

from modules.functional.advantages import Baseline, group_advantages, zero_variance

NAN = math.nan
GROUPS = torch.tensor([[1.0, 0.0, 0.5, 0.25, 1.0], [0.2, 1.7, 0.3, 0.0, -4.0]], dtype=torch.float64)


def by_hand(totals: list[float], epsilon: float | None) -> list[float]:
    mean, std = statistics.mean(totals), statistics.stdev(totals)
    return [(r - mean) / (1 if epsilon is None else std + epsilon) for r in totals]


@pytest.mark.parametrize("epsilon", [None, 0.0, 1e-4, 0.5])
def test_equals_standard_library(epsilon: float | None) -> None:
    expected = torch.tensor([by_hand(row, epsilon) for row in GROUPS.tolist()], dtype=torch.float64)
    got = group_advantages(GROUPS, scale_by_std=epsilon is not None, epsilon=epsilon or 0.0)
    torch.testing.assert_close(got, expected)


def test_one_group_is_a_row() -> None:
    alone = group_advantages(GROUPS[1], scale_by_std=True, epsilon=1e-4)
    assert torch.equal(alone, group_advantages(GROUPS, scale_by_std=True, epsilon=1e-4)[1])


@pytest.mark.parametrize("epsilon", [None, 1e-4])
def test_leave_one_out_compares_with_the_others(epsilon: float | None) -> None:
    expected = []
    for row in GROUPS.tolist():
        divisor = 1.0 if epsilon is None else statistics.stdev(row) + epsilon
        expected.append([(r - statistics.mean(row[:k] + row[k + 1 :])) / divisor for k, r in enumerate(row)])
    got = group_advantages(GROUPS, scale_by_std=epsilon is not None, epsilon=epsilon or 0.0, baseline="leave_one_out")
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    totals = torch.tensor([1.0, NAN, 0.0, 0.5], dtype=torch.float64)
    got = group_advantages(totals, scale_by_std=False, epsilon=0.0, baseline="leave_one_out")
    assert got.tolist() == pytest.approx([1 - 0.25, 0, 0 - 0.75, 0.5 - 0.5])  # the unjudged is no other


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale_by_std", [True, False])
def test_order_in_the_group_does_not_matter(scale_by_std: bool, baseline: Baseline) -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(
        group_advantages(GROUPS[:, order], scale_by_std=scale_by_std, epsilon=0.0, baseline=baseline),
        group_advantages(GROUPS, scale_by_std=scale_by_std, epsilon=0.0, baseline=baseline)[:, order],
    )


def test_scale_and_offset_of_rewards_do_not_matter_when_scaled() -> None:
    torch.testing.assert_close(
        group_advantages(3 * GROUPS + 7, scale_by_std=True, epsilon=0.0),
        group_advantages(GROUPS, scale_by_std=True, epsilon=0.0),
    )


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
@pytest.mark.parametrize(
    "totals",
    [
        [1.7],  # a group of one
        [0.0, 0.0, 0.0],
        [0.7] * 8,  # whose float32 mean is not 0.7: rounding must not become an advantage
        [NAN, NAN],
        [NAN, 0.4, NAN],
    ],
)
def test_nothing_to_compare_is_exactly_zero(
    totals: list[float], epsilon: float, scale_by_std: bool, baseline: Baseline
) -> None:
    got = group_advantages(torch.tensor(totals), scale_by_std=scale_by_std, epsilon=epsilon, baseline=baseline)
    assert torch.equal(got, torch.zeros(len(totals)))


def test_failed_judgements_stay_out() -> None:
    totals = torch.tensor([[1.0, NAN, 0.0, 0.5], [0.3, 0.1, 0.2, 0.9]], dtype=torch.float64)
    got = group_advantages(totals, scale_by_std=True, epsilon=1e-4)
    a, b, c = by_hand([1.0, 0.0, 0.5], 1e-4)
    expected = torch.tensor([[a, 0.0, b, c], by_hand([0.3, 0.1, 0.2, 0.9], 1e-4)], dtype=torch.float64)
    torch.testing.assert_close(got, expected)


def test_zero_variance() -> None:
    totals = torch.tensor(
        [
            [0.5, 0.5, 0.5],
            [0.5, 0.5, 0.501],
            [NAN, 1.0, 1.0],
            [NAN, 1.0, 0.0],
            [NAN, NAN, 1.0],
            [NAN, NAN, NAN],
        ]
    )
    assert zero_variance(totals).tolist() == [True, False, True, False, True, True]
    assert zero_variance(totals, tolerance=0.01).tolist() == [True, True, True, False, True, True]
    assert zero_variance(totals, tolerance=0.0).tolist() == zero_variance(totals).tolist()
    assert zero_variance(totals[3]).shape == ()
    assert not zero_variance(totals[3])


@pytest.mark.parametrize("totals", [torch.zeros(2, 3, 4), torch.tensor([0, 1]), torch.zeros(2, 0), torch.tensor(1.0)])
def test_wrong_totals(totals: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Expected `totals` to be a float tensor"):
        group_advantages(totals, scale_by_std=True, epsilon=0.0)
    with pytest.raises(ValueError, match="Expected `totals` to be a float tensor"):
        zero_variance(totals)


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="`epsilon` to be at least 0 but got -1"):
        group_advantages(GROUPS, scale_by_std=True, epsilon=-1.0)
    with pytest.raises(ValueError, match="`baseline` to be mean or leave_one_out but got 'median'"):
        group_advantages(GROUPS, scale_by_std=True, epsilon=0.0, baseline="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`tolerance` to be at least 0 but got -1"):
        zero_variance(GROUPS, tolerance=-1.0)
