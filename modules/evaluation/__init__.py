"""Benchmarks scored as their authors score them: what brings the questions, what scores, what the authors' tools take.

One entry of `BENCHMARKS` is one benchmark. Scorers are pure functions of rows; `rescore` applies them to files that
anyone saved, `modules.evaluation.results` to what a run of ours answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.evaluation import (
    choices,
    formats,
    hallusionbench,
    mathvision,
    mathvista,
    mme,
    mmmu,
    options,
    pope,
    scienceqa,
    vqa,
)
from modules.evaluation.common import Row, Score, ScoreError
from modules.evaluation.files import read_rows
from modules.evaluation.formats import Files

__all__ = ["BENCHMARKS", "Benchmark", "Row", "Score", "ScoreError", "rescore"]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark's questions are found, its files are read and written, and its rows scored.

    Attributes:
        source: the class of `datamodules.sources` that brings its questions.
        score: of predictions and, if there are some, annotations.
        write: what the benchmark's own repository or server takes, of our own rows.
        read: a file of predictions or annotations.
        cluster: what the intervals take for one draw: questions about one image, or what the benchmark groups; the
            name of the key of `Sample.meta`.
    """

    source: str
    score: Callable[[Sequence[Row], Sequence[Row] | None], Score]
    write: Callable[[Sequence[Row]], Files]
    read: Callable[[Path], list[Row]] = read_rows
    cluster: str = "image_id"


BENCHMARKS = {
    "scienceqa": Benchmark("ScienceQA", scienceqa.score, formats.scienceqa_results, scienceqa.read),
    "mathvista": Benchmark("MathVista", mathvista.score, formats.mathvista_output),
    "mathvision": Benchmark("MathVision", mathvision.score, formats.mathvision_lines),
    "mmmu": Benchmark("MMMU", mmmu.score, formats.mmmu_predictions),
    "hallusionbench": Benchmark(
        "HallusionBench", hallusionbench.score, formats.hallusionbench_list, cluster="set_of_figures"
    ),
    "mme": Benchmark("MME", mme.score, formats.mme_tables, mme.read),
    "mme_realworld": Benchmark("MMERealWorld", choices.mme_realworld, formats.mme_realworld_list),
    "pope": Benchmark("POPE", pope.score, formats.pope_lines),
    "vstar": Benchmark("VStar", options.vstar, formats.vstar_lines, options.read_vstar),
    "mmvp": Benchmark("MMVP", options.mmvp, formats.mmvp_lines, options.read_mmvp, cluster="pair"),
    "cvbench": Benchmark("CVBench", choices.cvbench, formats.cvbench_table),
    "hrbench": Benchmark("HRBench", choices.hrbench, formats.hrbench_table),
    "textvqa": Benchmark("TextVQA", vqa.textvqa, formats.textvqa_list),
    "docvqa": Benchmark("DocVQA", vqa.docvqa, formats.docvqa_list),
}


def rescore(name: str, predictions: Path, annotations: Path | None = None) -> dict[str, Any]:
    """The values of a benchmark as ``train.py rescore`` prints them.

    Raises:
        ScoreError: if there is no such benchmark, or a file cannot be scored; it names file and row.
    """
    if name not in BENCHMARKS:
        raise ScoreError(f"Expected a benchmark out of {', '.join(BENCHMARKS)}, but got {name!r}.")
    benchmark = BENCHMARKS[name]
    rows = of(name, benchmark.read(predictions), predictions)
    if not rows:
        raise ScoreError(f"Expected {str(predictions)!r} to hold predictions, but it has no rows.")
    labels = None if annotations is None else benchmark.read(annotations)
    if labels is not None and not labels:
        raise ScoreError(f"Expected {str(annotations)!r} to hold annotations, but it has no rows.")
    score = benchmark.score(rows, labels)
    return {"benchmark": name, **told(score), **missing(rows, labels), "breakdown": dict(score.breakdown)}


def told(score: Score) -> dict[str, Any]:
    """Everything but the breakdown, flat."""
    return {"n": score.n, "accuracy": score.accuracy, **score.extra}


def of(name: str, rows: Sequence[Row], path: Path) -> list[Row]:
    """The rows of this benchmark: a run's predictions may be of several.

    Raises:
        ScoreError: if all are of another.
    """
    kept = [row for row in rows if row.source is None or row.source == name or row.source not in BENCHMARKS]
    if rows and not kept:
        raise ScoreError(f"Expected {str(path)!r} to hold predictions of {name}, but they are of {rows[0].source}.")
    return kept


def missing(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> dict[str, int]:
    """How many annotated questions of the predictions' splits have none, if any."""
    if annotations is None or len({row.id for row in annotations}) < len(annotations):
        return {}
    predicted = {row.id for row in predictions}
    if None in predicted:  # rows that belong to annotations by their order: all are there
        return {}
    splits = {str(row.fields.get("split")) for row in annotations if row.id in predicted}
    lacking = [row for row in annotations if row.id not in predicted and str(row.fields.get("split")) in splits]
    return {"missing": len(lacking)} if lacking else {}
