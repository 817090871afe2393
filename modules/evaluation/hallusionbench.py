"""HallusionBench: accuracy over questions (aAcc), question groups (qAcc) and figures (fAcc).

Rule: utils.py and evaluation.py of tianyi-lab/HallusionBench. A verdict is right, wrong or uncertain; uncertain is
right for VS questions without a figure (figure_id 0), and those belong to no figure. The official verdict is GPT-4's
and counts where the file has it (``gpt4v_output_gpt_check``: "0" wrong, "1" right, "2" uncertain); else the prediction
is read as yes, no or uncertain and compared with ``gt_answer``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from modules.evaluation.common import Row, Score, ScoreError, earned, mean, shares

PARTS = ("category", "subcategory", "set_id", "figure_id", "question_id")
VERDICT = "gpt4v_output_gpt_check"
WRONG, RIGHT, UNCERTAIN = "0", "1", "2"


def says(prediction: str) -> str:
    """Whether a prediction is yes ("1"), no ("0"), or uncertain ("2").

    The first word decides if it is yes or no, else the one of both that is there. Predictions may be digits already.
    """
    words = re.findall(r"[a-z0-9]+", prediction.lower())
    if len(words) == 1 and words[0] in ("0", "1", "2"):
        return str(words[0])
    if words[:1] in (["yes"], ["no"]):
        words = words[:1]
    if ("yes" in words) == ("no" in words):
        return UNCERTAIN
    return "1" if "yes" in words else "0"


def score(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows with ``model_prediction``; ``gt_answer`` may be in the benchmark's own file."""
    rows = _annotated(predictions, annotations)
    keys = [_key(row) for row in rows]
    right = [_right(row, key) for row, key in zip(rows, keys, strict=True)]
    questions: dict[tuple[str, ...], list[bool]] = {}
    easy: dict[tuple[str, ...], list[bool]] = {}
    hard: dict[tuple[str, ...], list[bool]] = {}
    figures: dict[tuple[str, ...], list[bool]] = {}
    for (category, subcategory, group, figure, question), correct in zip(keys, right, strict=True):
        name = (category, subcategory, group, question)
        questions.setdefault(name, []).append(correct)
        (easy if figure == "0" else hard).setdefault(name, []).append(correct)
        if (category, figure) != ("VS", "0"):
            figures.setdefault((category, subcategory, group, figure), []).append(correct)
    groups = {"qAcc": questions, "fAcc": figures, "easy": easy, "hard": hard}
    breakdown = {"aAcc": mean(right), **{name: mean(map(all, group.values())) for name, group in groups.items()}}
    return Score(
        len(rows), mean(right), {**breakdown, **shares(right, [(key[0],) for key in keys])}, values=earned(right)
    )


def _annotated(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> list[Row]:
    seen: dict[tuple[str, ...], Row] = {}
    for row in predictions:
        if (first := seen.setdefault(_key(row), row)) is not row:
            raise ScoreError(f"Expected every question once, but {first.where} and {row.where} are the same.")
    if annotations is None:
        return list(predictions)
    known = {_key(row): row for row in annotations}
    for key, row in seen.items():
        if key not in known:
            file = annotations[0].where.split(",")[0]
            raise ScoreError(f"Expected the question of {row.where} in the annotations {file}, but it is not there.")
    return [row.joined(known[key]) for key, row in seen.items()]


def _key(row: Row) -> tuple[str, ...]:
    key = tuple(str(row.value(name)) for name in PARTS)
    if key[0] not in ("VD", "VS"):
        raise ScoreError(f"Expected `category` of {row.where} to be VD or VS, but got {key[0]!r}.")
    return key


def _right(row: Row, key: tuple[str, ...]) -> bool:
    verdict = _verdict(row)
    return verdict == RIGHT or (verdict == UNCERTAIN and (key[0], key[3]) == ("VS", "0"))


def _verdict(row: Row) -> str:
    if VERDICT in row.fields:
        return _one_of(row, VERDICT, (WRONG, RIGHT, UNCERTAIN))
    said = says(row.text("model_prediction", "response"))
    if said == UNCERTAIN:
        return UNCERTAIN
    return RIGHT if said == _one_of(row, "gt_answer", ("0", "1")) else WRONG


def _one_of(row: Row, name: str, allowed: Sequence[str]) -> str:
    value = str(row.value(name))
    if value not in allowed:
        raise ScoreError(f"Expected `{name}` of {row.where} to be one of {list(allowed)}, but got {value!r}.")
    return value
