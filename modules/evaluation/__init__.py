"""Benchmarks scored as their authors score them: a reader of published outputs and a pure function each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.evaluation import hallusionbench, mathvista, mme, mmmu, options, pope, scienceqa
from modules.evaluation.common import Row, Score, ScoreError
from modules.evaluation.files import read_rows

__all__ = ["BENCHMARKS", "Benchmark", "Row", "Score", "ScoreError", "rescore"]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's files are read, and how rows are scored.

    Attributes:
        score: of predictions and, if there are some, annotations.
        read: a file of either.
    """

    score: Callable[[Sequence[Row], Sequence[Row] | None], Score]
    read: Callable[[Path], list[Row]] = read_rows


BENCHMARKS = {
    "scienceqa": Benchmark(scienceqa.score, scienceqa.read),
    "mathvista": Benchmark(mathvista.score),
    "vstar": Benchmark(options.vstar, options.read_vstar),
    "mmvp": Benchmark(options.mmvp, options.read_mmvp),
    "pope": Benchmark(pope.score),
    "mme": Benchmark(mme.score, mme.read),
    "mmmu": Benchmark(mmmu.score),
    "hallusionbench": Benchmark(hallusionbench.score),
}


def rescore(name: str, predictions: Path, annotations: Path | None = None) -> dict[str, Any]:
    """The values of a benchmark as ``train.py rescore`` prints them.

    Raises:
        ScoreError: if there is no such benchmark, or a file cannot be scored; it names file and row.
    """
    if name not in BENCHMARKS:
        raise ScoreError(f"Expected a benchmark out of {', '.join(BENCHMARKS)}, but got {name!r}.")
    benchmark = BENCHMARKS[name]
    rows = benchmark.read(predictions)
    if not rows:
        raise ScoreError(f"Expected {str(predictions)!r} to hold predictions, but it has no rows.")
    labels = None if annotations is None else benchmark.read(annotations)
    if labels is not None and not labels:
        raise ScoreError(f"Expected {str(annotations)!r} to hold annotations, but it has no rows.")
    score = benchmark.score(rows, labels)
    return {
        "benchmark": name,
        "n": score.n,
        "accuracy": score.accuracy,
        **score.extra,
        **missing(rows, labels),
        "breakdown": dict(score.breakdown),
    }


def missing(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> dict[str, int]:
    """How many annotated questions of the predictions' splits have none, if any."""
    if annotations is None or len({row.id for row in annotations}) < len(annotations):
        return {}
    predicted = {row.id for row in predictions}
    if None in predicted:  # rows that belong to annotations by their order: all are there
        return {}
    splits = {row.fields.get("split") for row in annotations if row.id in predicted}
    lacking = [row for row in annotations if row.id not in predicted and row.fields.get("split") in splits]
    return {"missing": len(lacking)} if lacking else {}
