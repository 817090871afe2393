"""MathVista: accuracy over normalised extractions, by every field of the metadata.

Rule: evaluation/calculate_score.py of lupantech/MathVista, with its default options. The extraction is taken as it
is in the file; our own predictions bring their answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from modules.evaluation.common import Row, Score, ScoreError, annotated, earned, mean, shares

FIELDS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")

_LETTER = re.compile(r"\(([a-zA-Z])\)")


def normalise(
    extraction: Any, choices: Sequence[str] | None, question_type: str, answer_type: str, precision: float | None
) -> Any:
    """What is compared with the answer; None if an extraction cannot be a number of the wanted kind.

    Multiple choice: the first letter in parentheses, else a capital letter that is all there is, else the most
    similar option, the first of equals. An empty extraction is most similar to the shortest option.
    """
    if question_type == "multi_choice":
        return _option(extraction.strip() if isinstance(extraction, str) else str(extraction), choices or ())
    try:
        if answer_type == "integer":
            return str(int(float(extraction)))  # 2.9 becomes 2
        if answer_type == "float":
            return str(round(float(extraction), int(precision)))  # type: ignore[arg-type]  # None is caught
    except (TypeError, ValueError, OverflowError):
        return None
    return str(extraction) if answer_type == "list" else extraction


def distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions from one text to the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def score(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows by problem id with ``extraction``; answers and metadata may be in either file."""
    rows = annotated(predictions, annotations)
    right = [_right(row) for row in rows]
    return Score(len(rows), mean(right), shares(right, [_groups(row) for row in rows]), values=earned(right))


def _option(extraction: str, choices: Sequence[str]) -> str:
    letters = _LETTER.findall(extraction)
    letter = letters[0].upper() if letters else extraction
    index = ord(letter) - ord("A") if len(letter) == 1 else -1
    if 0 <= index < len(choices):
        return choices[index]
    return min(choices, key=lambda option: distance(letter, option))


def _right(row: Row) -> bool:
    answer, kind, choices = row.text("answer"), row.text("question_type"), row.value("choices")
    texts = isinstance(choices, list) and choices and all(isinstance(option, str) for option in choices)
    if kind == "multi_choice" and not texts:
        raise ScoreError(f"Expected `choices` of {row.where} to be a list of options, but got {choices!r}.")
    extraction, precision = row.value("extraction"), row.value("precision")
    return bool(normalise(extraction, choices, kind, row.text("answer_type"), precision) == answer)


def _groups(row: Row) -> list[str]:
    metadata = row.value("metadata")
    if not isinstance(metadata, dict):
        raise ScoreError(f"Expected `metadata` of {row.where} to be an object, but got {metadata!r}.")
    fields = {**row.fields, **metadata}
    names = []
    for name in FIELDS:
        value = fields.get(name)
        names += [f"{name}/{entry}" for entry in (value if isinstance(value, list) else [value]) if entry is not None]
    return names
