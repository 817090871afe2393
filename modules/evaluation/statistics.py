"""How sure a number is: intervals that know what shares an image, pass@k, and two runs on the same questions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student

Interval = tuple[float, float]
RESAMPLES = 10_000


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def mean_ci95(values: Sequence[float], clusters: Sequence[str]) -> Interval | None:
    """The 95% interval of a mean whose values are correlated within clusters.

    ``mean ± t(0.975, G - 1) sqrt(V)`` with ``V = G / (G - 1) * sum_g (sum_{i in g} (y_i - mean))^2 / N^2``
    for N values in G clusters: the cluster-robust variance (Liang and Zeger 1986) of a regression on a
    constant alone, with the factor G / (G - 1) * (N - 1) / (N - 1) of CR1 and t quantiles of Cameron and
    Miller 2015, "A Practitioner's Guide to Cluster-Robust Inference". With clusters of one value it is
    the usual ``s^2 / N``. Where all values agree it has no width, however few they are.

    Args:
        values: N numbers.
        clusters: the cluster of each.

    Returns:
        (low, high); None for fewer than two clusters, which say nothing of the spread.
    """
    center = mean(values)
    residuals: dict[str, list[float]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster].append(value - center)  # type: ignore[operator]  # a mean of something
    groups = len(residuals)
    if center is None or groups < 2:
        return None
    variance = groups / (groups - 1) * math.fsum(math.fsum(each) ** 2 for each in residuals.values()) / len(values) ** 2
    half = float(student.ppf(0.975, groups - 1)) * math.sqrt(variance)
    return center - half, center + half


def clipped(interval: Interval | None, low: float) -> list[float] | None:
    """An interval without the values outside [low, 1], which no accuracy or difference can have."""
    return None if interval is None else [max(interval[0], low), min(interval[1], 1.0)]


def pass_at_k(draws: int, right: int, k: int) -> float:
    """The chance that of k answers at least one is right: ``1 - C(n - c, k) / C(n, k)``.

    Unbiased for n draws of which c are right (Chen et al., arXiv 2107.03374, equation 1).

    Args:
        draws: n.
        right: c.
        k: at most n.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= right <= draws and 1 <= k <= draws):
        raise ValueError(f"Expected 0 <= right <= draws and 1 <= k <= draws, but got {right=}, {draws=}, {k=}.")
    return 1 - math.comb(draws - right, k) / math.comb(draws, k)


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same questions, the first minus the second.

    Attributes:
        n: questions.
        difference: of their means.
        ci95: clustered, by `mean_ci95`; None for fewer than two clusters.
        bootstrap_ci95: percentiles of the difference over resampled clusters; None likewise.
        only_first: questions that the first alone has right, those that it earned more for.
        only_second: likewise.
        mcnemar_p: two-sided exact test that these two are equally likely; it takes questions as independent.
    """

    n: int
    difference: float
    ci95: list[float] | None
    bootstrap_ci95: list[float] | None
    only_first: int
    only_second: int
    mcnemar_p: float


def compare(first: Sequence[float], second: Sequence[float], clusters: Sequence[str], seed: int = 0) -> Comparison:
    """Compare what two runs earned for each question.

    Args:
        first: N numbers, 0 to 1.
        second: those of the other run, in the same order.
        clusters: of each question.
        seed: of the bootstrap.

    Raises:
        ValueError: if there is nothing to compare.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    center = mean(differences)
    if center is None:
        raise ValueError("Expected questions to compare, but got none.")
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Comparison(
        n=len(differences),
        difference=center,
        ci95=clipped(mean_ci95(differences, clusters), -1.0),
        bootstrap_ci95=bootstrap_ci95(differences, clusters, seed),
        only_first=better,
        only_second=worse,
        mcnemar_p=mcnemar(better, worse),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test: the binomial test of the discordant pairs; 1 without any."""
    total = only_first + only_second
    return float(binomtest(only_first, total, 0.5).pvalue) if total else 1.0


def bootstrap_ci95(
    values: Sequence[float], clusters: Sequence[str], seed: int = 0, resamples: int = RESAMPLES
) -> list[float] | None:
    """Percentile interval of a mean, whole clusters drawn with replacement; None for fewer than two clusters."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster][0] += value
        sums[cluster][1] += 1
    if len(sums) < 2:
        return None
    table = np.array(list(sums.values()))
    generator = np.random.default_rng(seed)
    chunks = [generator.integers(0, len(table), (n, len(table))) for n in _chunks(resamples)]
    totals = np.concatenate([table[chosen].sum(1) for chosen in chunks])
    means = totals[:, 0] / totals[:, 1]
    low, high = np.percentile(means, (2.5, 97.5))
    return [float(low), float(high)]


def _chunks(total: int, size: int = 100) -> list[int]:
    """``total`` in parts of at most ``size``, for memory."""
    return [min(size, total - start) for start in range(0, total, size)]
