"""POPE: accuracy, precision, recall, F1 and share of yes.

Rule: evaluate.py of AoiDragon/POPE. Only the first sentence counts, words are what blanks separate once commas are
gone, and "No", "no" or "not" among them means no; everything else, an empty answer too, means yes.
"""

from __future__ import annotations

from collections.abc import Sequence

from modules.evaluation.common import Row, Score, ScoreError, by_id, earned, mean, shares


def says_yes(answer: str) -> bool:
    """Whether an answer counts as yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def score(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score rows with ``answer`` (or ``text``); labels come from the question file, or from the rows.

    Answers belong to questions by ``question_id``, or by their order if the answers have none.
    """
    labelled = _labelled(predictions, annotations)
    yes = [says_yes(_answer(row, annotations is None)) for row, _ in labelled]
    truth = [_truth(label) for _, label in labelled]
    cells = list(zip(yes, truth, strict=True))
    tp, fp = cells.count((True, True)), cells.count((True, False))
    fn, tn = cells.count((False, True)), cells.count((False, False))
    f1 = 2 * tp / (2 * tp + fp + fn) if tp else 0.0
    breakdown = {
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "f1": f1,
        "yes_ratio": mean(yes),
    }
    right = [a == b for a, b in cells]
    groups = [[label.text("category")] if "category" in label.fields else [] for _, label in labelled]
    counts = {"TP": tp, "FP": fp, "TN": tn, "FN": fn}
    return Score(
        len(cells), mean(right), {**breakdown, **shares(right, groups)}, {"score": f1, **counts}, earned(right)
    )


def _labelled(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> list[tuple[Row, Row]]:
    if annotations is None:
        return [(row, row) for row in predictions]
    if all(row.id is None for row in predictions):
        if len(predictions) != len(annotations):
            raise ScoreError(
                f"Expected an answer to each of {len(annotations)} questions, for answers without `question_id` belong"
                f" to them by their order, but got {len(predictions)}; the last is {predictions[-1].where}."
            )
        pairs = list(zip(predictions, annotations, strict=True))
    else:
        pairs = _joined(predictions, annotations)
    for row, label in pairs:
        asked, question = row.fields.get("question"), label.text("text", "question")
        if isinstance(asked, str) and question.casefold() not in asked.casefold():
            raise ScoreError(f"Expected {row.where} to answer {question!r} of {label.where}, but it answers {asked!r}.")
    return pairs


def _joined(predictions: Sequence[Row], annotations: Sequence[Row]) -> list[tuple[Row, Row]]:
    known, pairs = by_id(annotations), []
    for key, row in by_id(predictions).items():
        if key not in known:
            file = annotations[0].where.split(",")[0]
            raise ScoreError(f"Expected the question of {row.where} in the annotations {file}, but it is not there.")
        pairs.append((row, known[key]))
    return pairs


def _answer(row: Row, alone: bool) -> str:
    # in a file of its own, `text` is the question
    return row.text("response", "answer") if alone else row.text("response", "answer", "text")


def _truth(label: Row) -> bool:
    text = label.text("label", "answer")
    if text.lower() not in ("yes", "no"):
        raise ScoreError(f"Expected `label` of {label.where} to be yes or no, but got {text!r}.")
    return text.lower() == "yes"
