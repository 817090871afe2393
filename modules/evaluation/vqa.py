"""TextVQA: VQA accuracy over ten people's answers. DocVQA and InfographicVQA: ANLS.

TextVQA's rule: EvalAIAnswerProcessor and TextVQAAccuracyEvaluator of facebookresearch/mmf
(mmf/utils/m4c_evaluators.py). DocVQA's: evaluation.py of the Robust Reading Competition's task 17 (arXiv 1907.00490);
case and runs of white space do not count, both lengths are those of the compared texts, a similarity below 0.5 is 0,
and the best answer counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from modules.evaluation.common import Row, Score, ScoreError, annotated, mean
from modules.functional.graders import anls
from modules.functional.vqa import accuracy


def textvqa(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows with ``answer`` (or ``response``); the ten ``answers`` may be in either file."""
    rows = _joined(predictions, annotations)
    values = tuple(accuracy(_said(row), _answers(row)) for row in rows)
    return Score(len(rows), mean(values), values=values)


def docvqa(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows with ``answer`` (or ``response``); ``answers`` may be in either file. Accuracy is what is exact."""
    rows = _joined(predictions, annotations)
    values = tuple(max(anls(_said(row), answer) for answer in _answers(row)) for row in rows)
    kinds = [row.fields.get("question_types") for row in rows]
    by_kind = [[str(kind) for kind in found] if isinstance(found, list) else [] for found in kinds]
    breakdown: dict[str, float] = {}
    for name in sorted({name for names in by_kind for name in names}):
        breakdown[name] = mean(v for v, names in zip(values, by_kind, strict=True) if name in names)
    extra = {"anls": mean(values), "score": mean(values)}
    return Score(len(rows), mean(v == 1 for v in values), breakdown, extra, values, measure="anls")


def _joined(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> list[Row]:
    """Predictions with answers; what was answered stays, whatever the annotations call ``answer``."""
    said = [Row(row.where, row.id, {**row.fields, "response": _said(row)}, row.source) for row in predictions]
    return annotated(said, annotations)


def _said(row: Row) -> str:
    return row.text("response", "answer")


def _answers(row: Row) -> list[str]:
    answers = row.value("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ScoreError(f"Expected `answers` of {row.where} to be a list of texts, but got {answers!r}.")
    return answers
