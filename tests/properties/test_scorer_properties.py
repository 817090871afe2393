"""Whatever a model answered, whatever stands in a file: a share of what is right, or a sentence that names the file."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modules.evaluation import (
    BENCHMARKS,
    ScoreError,
    choices,
    hallusionbench,
    mathvision,
    mathvista,
    mme,
    mmmu,
    rescore,
)
from modules.evaluation import options as lettered
from modules.evaluation.common import Row, choice, letter_index
from modules.evaluation.files import rows_of
from modules.functional.graders import Kind, grade
from modules.functional.vqa import accuracy
from tests.properties.hostile import almost, dumped, quick, texts

ROWS: dict[str, dict[str, Any]] = {
    "scienceqa": {"id": "1", "choices": ["a", "b"], "answer": 0, "subject": "natural science", "grade": "grade4"}
    | {"hint": "", "image": None, "response": "A"},
    "mathvista": {"pid": "1", "answer": "b", "question_type": "multi_choice", "answer_type": "text"}
    | {"choices": ["a", "b"], "precision": None, "extraction": "B", "metadata": {"source": "x", "skills": ["s"]}},
    "mathvision": {"id": "1", "answer": "B", "options": ["1", "2"], "level": 3, "subject": "algebra", "response": "B"},
    "mmmu": {"id": "validation_Accounting_1", "question_type": "multiple-choice", "answer": "A", "options": ["x", "y"]}
    | {"response": "(A)"},
    "hallusionbench": {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": "1", "question_id": "0"}
    | {"gt_answer": "1", "model_prediction": "Yes"},
    "mme": {"category": "existence", "question_id": "a.png", "question": "?", "answer": "Yes", "response": "Yes"},
    "mme_realworld": {"Question_id": "1", "Answer choices": ["(A) x", "(B) y"], "Ground truth": "A", "Output": "A"}
    | {"Task": "Perception", "Subtask": "OCR", "Category": "attribute/x"},
    "pope": {"question_id": 1, "question": "Is it?", "answer": "yes", "label": "yes", "category": "adversarial"},
    "vstar": {"question_id": "1", "text": "Which? (A) red (B) blue", "label": "A", "category": "direct_attributes"}
    | {"response": "A"},
    "mmvp": {"Index": "1", "Question": "Which?", "Options": "(a) x (b) y", "Correct Answer": "(a)", "response": "(a)"},
    "cvbench": {"idx": 1, "source": "COCO", "task": "Count", "choices": ["1", "2"], "answer": "(A)", "response": "A"},
    "hrbench": {"index": 1, "A": "x", "B": "y", "answer": "A", "category": "single", "cycle_category": "0"}
    | {"prediction": "A"},
    "textvqa": {"question_id": 1, "answers": ["a"] * 10, "answer": "a"},
    "docvqa": {"questionId": 1, "answers": ["a"], "answer": "a", "question_types": ["form"]},
}
OWN = {"id": "1", "mode": "greedy", "answers": ["a"], "answer": "a", "stop": "answer", "question": "?", "draw": 0}
OWN |= {"source": "textvqa", "annotation": {"answers": ["a"] * 10}}
PAIRED = {"mme", "mmvp"}
SECOND = {"mmvp": {"Index": "2"}}


def test_every_benchmark_has_a_row() -> None:
    assert ROWS.keys() == BENCHMARKS.keys()
    for name, row in ROWS.items():
        rows = [row, row | SECOND.get(name, {})] if name in PAIRED else [row]
        assert scored(name, rows) is not None, f"the row of {name} is not one that is scored"


def scored(name: str, rows: list[Any]) -> dict[str, Any] | None:
    """What `rescore` gives for a file with these rows; None if it refuses the file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        path.write_text("\n".join(map(dumped, rows)))
        try:
            return rescore(name, path)
        except ScoreError as error:
            refusal = str(error)
    assert "predictions.jsonl" in refusal or "--annotations" in refusal, refusal
    return None


@example(("scienceqa", ROWS["scienceqa"] | {"grade": "grade\u00b2"}))
@example(("mmvp", ROWS["mmvp"] | {"Index": "\u00b2"}))
@given(st.sampled_from(sorted(ROWS)).flatmap(lambda name: st.tuples(st.just(name), almost(ROWS[name]))))
@quick(150)
def test_almost_right_predictions_are_scored_or_refused(drawn: tuple[str, Any]) -> None:
    name, row = drawn
    found = scored(name, [row, ROWS[name] | SECOND.get(name, {})] if name in PAIRED else [row])
    assert found is None or 0 <= found["accuracy"] <= 1


@given(almost(OWN))
@quick(80)
@example(OWN | {"answers": {"a": 1}})
@example(OWN | {"source": []})
@example("@huge")
def test_almost_right_predictions_of_our_own_are_scored_or_refused(row: Any) -> None:
    found = scored("textvqa", [OWN | {"id": "0"}, row])
    assert found is None or 0 <= found["accuracy"] <= 1


@given(texts, texts, st.lists(texts, max_size=5))
@quick(150)
def test_any_answer_is_read(said: str, right: str, offered: list[str]) -> None:
    picked = choice(said, offered)
    assert picked is None or 0 <= picked < len(offered)
    index = letter_index(said)
    assert index is None or 0 <= index < 26
    assert choices.read_letter(said, offered) in {"", *"ABCDE", *(option[1:2] for option in offered)}
    assert hallusionbench.says(said) in "012"
    assert mme.says(said) in ("yes", "no", "other")
    assert isinstance(mmmu.right_open([right], said), bool)
    assert lettered.options(said) is not None
    assert 0 <= accuracy(said, offered) <= 1
    for kind in get_args(Kind):
        if kind != "math":
            assert 0 <= grade(kind, said, [right, *offered]) <= 1
            assert kind == "choice" or grade(kind, right, [right]) in (0.0, 1.0)
    for question_type in ("multi_choice", "free_form"):
        for answer_type in ("integer", "float", "list", "text"):
            # the distance to an option takes the product of both lengths, as in the official script
            mathvista.normalise(said[:500], [text[:500] for text in offered] or ["a"], question_type, answer_type, 2)


@given(texts, texts)
@quick(20)
def test_any_formula_is_compared(said: str, right: str) -> None:
    assert isinstance(mathvision.equal(right, mathvision.extract(said)), bool)


@pytest.mark.parametrize("rows", [[], {}, [{}], {"a": {}}, {"1": "a"}])
def test_the_smallest_files_have_rows_or_a_reason(rows: Any) -> None:
    assert all(isinstance(row, Row) for row in rows_of(rows, Path("a.json")))
