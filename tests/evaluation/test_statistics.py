"""Intervals, pass@k and comparisons, against closed forms and exhaustive counts."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from modules.evaluation.statistics import bootstrap_ci95, compare, mcnemar, mean_ci95, pass_at_k


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k_draws_with_a_right_one(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = [True] * right + [False] * (n - right)
    chosen = list(combinations(draws, k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_pass_at_k_is_chen_et_als_product() -> None:
    # arXiv 2107.03374, figure 3: 1 - prod_{i = n-c+1}^{n} (1 - k / i)
    for n, c, k in ((10, 3, 5), (200, 7, 100), (5, 5, 2)):
        product = math.prod(1 - k / i for i in range(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(1 - product)
    assert pass_at_k(4, 1, 1) == 0.25
    with pytest.raises(ValueError, match="k <= draws"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 12), (9, 9), (30, 11)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    # statsmodels' mcnemar(exact=True): min(1, 2 * P(X <= min(b, c))), X ~ Binomial(b + c, 1/2)
    expected = min(1.0, 2 * stats.binom.cdf(min(b, c), b + c, 0.5)) if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected)


def test_without_clusters_the_interval_is_students() -> None:
    values = np.random.default_rng(0).random(40)
    expected = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert mean_ci95(list(values), [str(k) for k in range(40)]) == pytest.approx(expected)


def test_equal_answers_about_one_image_count_once() -> None:
    values = np.random.default_rng(1).random(30)
    once = mean_ci95(list(values), [str(k) for k in range(30)])
    thrice = mean_ci95(list(np.repeat(values, 3)), [str(k // 3) for k in range(90)])
    assert thrice == pytest.approx(once)


def test_the_bootstrap_agrees_with_the_clustered_interval() -> None:
    random = np.random.default_rng(2)
    effect = random.normal(0, 1, 200)
    values = [effect[k // 4] + random.normal(0, 0.5) for k in range(800)]
    clusters = [str(k // 4) for k in range(800)]
    low, high = bootstrap_ci95(values, clusters, seed=3, resamples=4000) or (0, 0)
    analytic = mean_ci95(values, clusters)
    assert analytic is not None
    width = analytic[1] - analytic[0]
    assert abs(low - analytic[0]) < 0.1 * width
    assert abs(high - analytic[1]) < 0.1 * width
    alone = mean_ci95(values, [str(k) for k in range(800)])  # what it would be if the images did not count
    assert alone is not None
    assert alone[1] - alone[0] < 0.7 * width
    assert bootstrap_ci95(values, ["one"] * 800) is None


def test_a_comparison() -> None:
    a, b = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    found = compare(a, b, list("uvwxyz"))
    assert (found.n, found.only_first, found.only_second) == (6, 3, 1)
    assert found.difference == pytest.approx(2 / 6)
    assert found.mcnemar_p == pytest.approx(2 * (1 + 4) / 16)  # P(X <= 1) of 4 is 5/16
    swapped = compare(b, a, list("uvwxyz"))
    assert swapped.difference == -found.difference
    assert swapped.mcnemar_p == found.mcnemar_p
    assert found.bootstrap_ci95 == compare(a, b, list("uvwxyz")).bootstrap_ci95
    with pytest.raises(ValueError, match="questions to compare"):
        compare([], [], [])
