"""From predictions to a table: accuracies with intervals that know that questions share images.

A test stage leaves ``predictions.jsonl`` (``predictions.<rank>.jsonl`` with several ranks), one line a
question and mode; a fit stage leaves ``fit.json``. `build` turns them into the contents of
``results.json``, `table` into text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modules.evaluation.statistics import Interval as Interval  # these names are this module's as well
from modules.evaluation.statistics import clipped
from modules.evaluation.statistics import mean as mean
from modules.evaluation.statistics import mean_ci95 as mean_ci95


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        test: test stage whose predictions are counted.
        mode: which of its predictions.
        sampled_mode: mode of ``sampled_accuracy``; null: not measured.
        seconds_from: fit stages that it took to get there; their seconds are added up.
    """

    test: str
    mode: str = "greedy"
    sampled_mode: str | None = None
    seconds_from: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What is reported.

    Args:
        rows: name -> line of the table.
        compare: name -> the two rows whose accuracies are subtracted, first minus second.
        by: key of a prediction, such as ``source``: each row is also given for every value that it has.
    """

    rows: dict[str, Row]
    compare: dict[str, tuple[str, str]] = field(default_factory=dict)
    by: str | None = None


@dataclass(frozen=True)
class Prediction:
    """What is counted of one line of ``predictions.jsonl``."""

    id: str
    image_id: str
    correct: float  # 0 or 1; of several draws the mean
    iou: float | None  # None: the question has no annotated region
    crops: int
    part: str = ""  # the value of the key that the report is broken down by


class ReportError(Exception):
    """A report that cannot be made: the message names the file and what it lacks."""


def build(report: Report, run_dir: Path) -> dict[str, Any]:
    """The contents of ``results.json``.

    Returns:
        Row name -> ``accuracy``, ``accuracy_ci95`` [low, high], ``sampled_accuracy``, ``mean_iou``,
        ``zoom_rate``, ``n``, ``seconds``, null where not measured, and with ``report.by`` under ``by``
        value -> the same without seconds; comparison name -> [low, high], the 95% interval of the paired
        difference of accuracies.

    Raises:
        ReportError: if a file is missing or broken, or two compared rows are not of the same questions.
    """
    predictions = {name: read_predictions(run_dir / row.test, row.mode, report.by) for name, row in report.rows.items()}
    results: dict[str, Any] = {
        name: measure(row, predictions[name], run_dir, report.by) for name, row in report.rows.items()
    }
    for name, (a, b) in report.compare.items():
        results[name] = difference_ci95(name, predictions[a], predictions[b])
    return results


def measure(row: Row, predictions: Sequence[Prediction], run_dir: Path, by: str | None = None) -> dict[str, Any]:
    """The numbers of one row."""
    sampled = read_predictions(run_dir / row.test, row.sampled_mode, by) if row.sampled_mode else []
    seconds = sum(read_seconds(run_dir / stage) for stage in row.seconds_from) if row.seconds_from else None
    numbers: dict[str, Any] = {**count(predictions, sampled), "seconds": seconds}
    if by is not None:
        numbers["by"] = {
            part: count([p for p in predictions if p.part == part], [p for p in sampled if p.part == part])
            for part in sorted({p.part for p in predictions})
        }
    return numbers


def count(predictions: Sequence[Prediction], sampled: Sequence[Prediction]) -> dict[str, Any]:
    """What some predictions come to, and those of the same questions in the sampled mode."""
    correct = [p.correct for p in predictions]
    ious = [p.iou for p in predictions if p.iou is not None]
    images = [p.image_id for p in predictions]
    return {
        "accuracy": mean(correct),
        "accuracy_ci95": clipped(mean_ci95(correct, images), 0.0),
        "sampled_accuracy": mean([p.correct for p in sampled]),
        "mean_iou": mean(ious),
        "zoom_rate": mean([float(p.crops > 0) for p in predictions]),
        "n": len(predictions),
    }


def difference_ci95(name: str, a: Sequence[Prediction], b: Sequence[Prediction]) -> list[float] | None:
    """The 95% interval of accuracy(a) - accuracy(b), paired by question, clustered by image.

    Raises:
        ReportError: if the two are not of the same questions.
    """
    first, second = {p.id: p for p in a}, {p.id: p for p in b}
    if lonely := sorted(set(first) ^ set(second)):
        raise ReportError(
            f"Expected both rows of {name!r} to answer the same questions, but {len(lonely)} are in one of them "
            f"alone, {lonely[0]!r} first."
        )
    for key in first:
        if first[key].image_id != second[key].image_id:
            raise ReportError(
                f"Expected question {key!r} of {name!r} to be about one image, but got "
                f"{first[key].image_id!r} and {second[key].image_id!r}."
            )
    differences = [first[key].correct - second[key].correct for key in first]
    return clipped(mean_ci95(differences, [p.image_id for p in a]), -1.0)


def read_predictions(folder: Path, mode: str, by: str | None = None) -> list[Prediction]:
    """The predictions of one mode that a test stage has left, of all ranks, one a question.

    `Prediction.part` is the value of ``by``.

    Raises:
        ReportError: if there are none, or a line is broken or there twice.
    """
    found: dict[str, list[Prediction]] = {}  # question -> its draws
    modes: set[str] = set()
    for where, line in drawn(folder):
        modes.add(line["mode"])
        if line["mode"] != mode or "correct" not in line:  # without it: the judgement failed
            continue
        if line["correct"] not in (0, 1):
            raise ReportError(f"{where}: expected `correct` to be 0 or 1, but got {line['correct']!r}.")
        if by is not None and by not in line:
            raise ReportError(f"{where}: lacks {by}, by which the report is broken down.")
        part = "" if by is None else str(line[by])
        draws = found.setdefault(line["id"], [])
        draws.append(Prediction(line["id"], line["image_id"], line["correct"], line["iou"], line["crops"], part))
    if not found:
        raise ReportError(f"Expected predictions of mode {mode!r} in {folder}, but found {sorted(modes) or 'none'}.")
    return [averaged(draws) for draws in found.values()]


def drawn(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``file:line`` and contents of every line that a test stage has left, of all ranks.

    Raises:
        ReportError: if there is no file, or a draw of a question is there twice in a mode; see `lines`.
    """
    files = sorted(folder.glob("predictions*.jsonl"))
    if not files:
        raise ReportError(f"Expected {folder}/predictions.jsonl, but the test stage left no predictions.")
    seen: set[tuple[str, str, int]] = set()
    for where, line in (each for file in files for each in lines(file)):
        key = (line["mode"], line["id"], line.get("draw", 0))
        if key in seen:
            raise ReportError(f"{where}: question {line['id']!r} is there twice in mode {line['mode']!r}.")
        seen.add(key)
        yield where, line


def averaged(draws: Sequence[Prediction]) -> Prediction:
    """Several draws of one question as one: what they earn on average; boxes and crops are the first's."""
    return draws[0] if len(draws) == 1 else replace(draws[0], correct=mean([p.correct for p in draws]) or 0.0)


def lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``file:line`` and contents of every line.

    Raises:
        ReportError: if a line is no JSON object or lacks a key.
    """
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{file}:{number}"
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ReportError(f"{where}: not valid JSON: {error}.") from error
        if missing := [key for key in ("id", "image_id", "mode", "iou", "crops") if key not in line]:
            raise ReportError(f"{where}: lacks {', '.join(missing)}.")
        yield where, line


def read_seconds(folder: Path) -> float:
    """Seconds of training of a fit stage.

    Raises:
        ReportError: if the stage has not ended.
    """
    file = folder / "fit.json"
    if not file.is_file():
        raise ReportError(f"Expected {file}, which a fit stage writes at its end.")
    return float(json.loads(file.read_text(encoding="utf-8"))["seconds"])


def table(report: Report, results: dict[str, Any]) -> str:
    """Results as aligned text."""
    head = ("", "accuracy", "95% interval", "sampled", "mean IoU", "zoom rate", "n", "seconds")
    named = [(name, results[name]) for name in report.rows]
    named += [(f"{name}: {part}", of) for name in report.rows for part, of in results[name].get("by", {}).items()]
    body: list[tuple[str, ...]] = [
        (
            name,
            number(of["accuracy"]),
            interval(of["accuracy_ci95"]),
            number(of["sampled_accuracy"]),
            number(of["mean_iou"]),
            number(of["zoom_rate"]),
            str(of["n"]),
            number(of.get("seconds"), 0),
        )
        for name, of in named
    ]
    body += [
        (name, number(results[a]["accuracy"] - results[b]["accuracy"], sign="+"), interval(results[name], "+"))
        + ("",) * (len(head) - 3)
        for name, (a, b) in report.compare.items()
    ]
    widths = [max(len(row[k]) for row in (head, *body)) for k in range(len(head))]
    rows = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *body)]
    return "\n".join("  ".join([row[0].strip().ljust(widths[0]), *row[1:]]).rstrip() for row in rows)


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A number, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def interval(value: Sequence[float] | None, sign: str = "") -> str:
    """An interval, or a dash where nothing was measured."""
    return "-" if value is None else f"[{number(value[0], sign=sign)}, {number(value[1], sign=sign)}]"
