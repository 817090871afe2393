"""ScienceQA: accuracy by subject, context and grade.

Breakdown: tools/evaluate_acc.py of lupantech/ScienceQA. Reading an answer out of text: models/run_gpt3.py there,
and llava/eval/eval_science_qa.py of haotian-liu/LLaVA, which also takes a letter alone or in front; what cannot be
read is wrong, where run_gpt3.py guesses at random.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from modules.evaluation.common import Row, Score, ScoreError, annotated, earned, mean, shares
from modules.evaluation.files import read_json, rows_of

LETTERS = "ABCDE"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
UNPARSED = -1

# the full stop is any character in the official pattern, so that one has to follow
_SAID = re.compile(r"The answer is ([A-Z]).")


def read(path: Path) -> list[Row]:
    """A results file (``results`` and ``outputs`` by problem id), problems by id, or our own predictions."""
    value = read_json(path)
    if not isinstance(value, dict) or not value.keys() & {"results", "outputs"}:
        return rows_of(value, path)
    rows: dict[str, dict[str, object]] = {}
    for name in ("results", "outputs"):
        part = value.get(name, {})
        if not isinstance(part, dict):
            raise ScoreError(
                f"Expected `{name}` of {str(path)!r} to be an object by problem id, but got {str(part)[:60]}."
            )
        for key, entry in part.items():
            rows.setdefault(key, {})[name] = entry
    return [Row(f"{str(path)!r}, row {key!r}", key, fields) for key, fields in rows.items()]


def parse(output: str, choices: int) -> int:
    """The option that a text names, from 0, or `UNPARSED`.

    The letter alone, "X. " in front, or exactly one "The answer is X" with something behind it.
    """
    if output and output[0] in LETTERS and (len(output) == 1 or output[1:3] == ". "):
        letter = output[0]
    else:
        said = _SAID.findall(output)
        letter = said[0] if len(said) == 1 else "none"
    index = LETTERS.find(letter)
    return index if index < choices else UNPARSED


def score(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows of `read`; ``results`` count where there are any, else ``outputs`` are read."""
    if annotations is None and any("choices" not in row.fields for row in predictions):
        raise ScoreError("Expected --annotations with ScienceQA's problems.json, for results hold no answers.")
    rows = annotated(predictions, annotations)
    picks = [_pick(row) for row in rows]
    right = [pick == _answer(row) for pick, row in zip(picks, rows, strict=True)]
    groups = [_groups(row) for row in rows]
    return Score(len(rows), mean(right), shares(right, groups), {"unparsed": picks.count(UNPARSED)}, earned(right))


def _pick(row: Row) -> int:
    choices = row.value("choices")
    if not isinstance(choices, list) or not choices:
        raise ScoreError(f"Expected `choices` of {row.where} to be a list of options, but got {choices!r}.")
    if "results" not in row.fields:
        return parse(row.text("outputs", "response", "prediction", "text"), len(choices))
    try:
        return int(row.value("results"))
    except (TypeError, ValueError, OverflowError) as error:
        got = row.value("results")
        raise ScoreError(f"Expected `results` of {row.where} to be an option's index, but got {got!r}.") from error


def _answer(row: Row) -> int:
    answer = row.value("answer")
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise ScoreError(f"Expected `answer` of {row.where} to be an option's index, but got {answer!r}.")
    return answer


def _groups(row: Row) -> list[str]:
    subject, grade = row.text("subject"), row.text("grade")
    if subject not in SUBJECTS or not grade.removeprefix("grade").isdecimal():
        raise ScoreError(f"Expected a subject and a grade of ScienceQA in {row.where}, but got {subject!r}, {grade!r}.")
    hint, image = bool(row.value("hint")), bool(row.value("image"))
    context = [name for name, there in (("TXT", hint), ("IMG", image), ("NO", not hint and not image)) if there]
    return [SUBJECTS[subject], *context, "G1-6" if int(grade.removeprefix("grade")) <= 6 else "G7-12"]
