"""V* and MMVP: multiple choice, the option named by the response.

V*: accuracy, by category. penghao-wu/vstar picks the likeliest option (vstar_bench_eval.py: the first is right); its
published results are read as well. For text there is no official reader; the data set asks for the option's letter.

MMVP: single accuracy, and the benchmark's own: pairs of questions with both right, pairs being rows 1 and 2, 3 and 4,
and so on (scripts/gpt_grader.py of tsb0601/MMVP, where GPT-4 compares; here the option is read by rule).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from modules.evaluation.common import (
    Row,
    Score,
    ScoreError,
    annotated,
    choice,
    earned,
    letter_index,
    mean,
    options,
    shares,
)
from modules.evaluation.files import read_csv, read_json, read_rows, rows_of

CATEGORIES = ("direct_attributes", "relative_position")


def read_vstar(path: Path) -> list[Row]:
    """JSON lines with ``response``, or the original results: lists by category with ``option_chosen``."""
    value = read_json(path)
    if not isinstance(value, dict) or not value or not set(value) <= set(CATEGORIES):
        return rows_of(value, path)
    rows = []
    for category, results in value.items():
        if not isinstance(results, list):
            raise ScoreError(f"Expected `{category}` of {str(path)!r} to be a list, but got {str(results)[:80]}.")
        for number, fields in enumerate(results, 1):
            where = f"{str(path)!r}, row {category} {number}"
            if not isinstance(fields, dict):
                raise ScoreError(f"Expected {where} to be an object, but got {fields!r}.")
            rows.append(Row(where, None, {"category": category, **fields}))
    return rows


def read_mmvp(path: Path) -> list[Row]:
    """JSON lines, or the benchmark's own table Questions.csv."""
    return read_csv(path) if path.suffix == ".csv" else read_rows(path)


def vstar(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows with ``text``, ``label``, ``category`` and ``response``, or with ``option_chosen``."""
    rows = annotated(predictions, annotations)
    picks = [_vstar_pick(row) for row in rows]
    labels = [0 if "option_chosen" in row.fields else _label(row) for row in rows]
    right = [pick == label for pick, label in zip(picks, labels, strict=True)]
    return Score(
        len(rows), mean(right), shares(right, [_category(row) for row in rows]), _unparsed(picks), earned(right)
    )


def mmvp(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows with ``text``, ``label`` and ``response``; the official score is ``pair_accuracy``."""
    rows = _in_order(annotated(predictions, annotations))
    picks = [_pick(row) for row in rows]
    right = [pick == _label(row) for pick, row in zip(picks, rows, strict=True)]
    pairs = mean(a and b for a, b in zip(right[::2], right[1::2], strict=True))
    by_row = {row.where: correct for row, correct in zip(rows, right, strict=True)}
    extra = {"pair_accuracy": pairs, "score": pairs, **_unparsed(picks)}
    return Score(len(rows), mean(right), {}, extra, earned(by_row[row.where] for row in predictions))


def _vstar_pick(row: Row) -> int | None:
    if "option_chosen" not in row.fields:
        return _pick(row)
    index = row.value("option_chosen")
    if isinstance(index, bool) or not isinstance(index, int):
        raise ScoreError(f"Expected `option_chosen` of {row.where} to be an option's index, but got {index!r}.")
    return index


def _pick(row: Row) -> int | None:
    texts = options(row.text("Options", "text", "prompt", "question"))
    if len(texts) < 2:
        raise ScoreError(f'Expected the question of {row.where} to list options as "(A) red", but got {len(texts)}.')
    return choice(row.text("response"), texts)


def _label(row: Row) -> int:
    label = row.text("Correct Answer", "label", "answer")
    index = letter_index(label)
    if index is None:
        raise ScoreError(f"Expected `label` of {row.where} to be an option's letter, but got {label!r}.")
    return index


def _category(row: Row) -> list[str]:
    if "category" not in row.fields:  # our own predictions without annotations
        return []
    category = row.text("category")
    if category not in CATEGORIES:
        raise ScoreError(f"Expected `category` of {row.where} to be one of {list(CATEGORIES)}, but got {category!r}.")
    return [category]


def _in_order(rows: list[Row]) -> list[Row]:
    """Rows by index, so that pairs are neighbours; in the file's order if they have none."""
    if all(row.id is not None and row.id.isdecimal() for row in rows):
        rows = sorted(rows, key=_number)
        for before, row in pairwise(rows):
            if _number(row) != _number(before) + 1:
                raise ScoreError(
                    f"Expected pairs of questions without gaps, but {before.where} is followed by {row.where}."
                )
    if len(rows) % 2:
        raise ScoreError(f"Expected pairs of questions, but got {len(rows)} rows, the last is {rows[-1].where}.")
    return rows


def _number(row: Row) -> int:
    return int(row.id or 0)


def _unparsed(picks: Sequence[int | None]) -> dict[str, int]:
    return {"unparsed": sum(pick is None for pick in picks)}
