"""CV-Bench, HR-Bench and MME-RealWorld as their own scripts count."""

from __future__ import annotations

from typing import Any

import pytest

from modules.evaluation.choices import cvbench, hrbench, mme_realworld, read_letter
from modules.evaluation.common import Row, ScoreError


def rows(*fields: dict[str, Any]) -> list[Row]:
    return [Row(f"row {k}", str(k), each) for k, each in enumerate(fields)]


def cv(source: str, said: str, **fields: Any) -> dict[str, Any]:
    known = {"choices": ["1", "2", "3"], "answer": "(B)", "task": "Count", "source": source, "response": said}
    return {**known, **fields}


def test_cvbench_weighs_sources_not_questions() -> None:
    # README of nyu-visionx/CV-Bench: 1/2 ((ADE + COCO) / 2 + Omni3D). ADE 3/4, COCO 0/1, Omni3D 1/1
    given = [cv("ADE20K", s) for s in ("B", "(B) 2", "2", "A")] + [cv("COCO", "C"), cv("Omni3D", "b", task="Depth")]
    scored = cvbench(rows(*given), None)
    assert scored.extra == {"score": 0.5 * ((0.75 + 0) / 2 + 1)}
    assert scored.breakdown == {
        **{"ADE20K": 0.75, "COCO": 0.0, "Omni3D": 1.0, "2D": 0.375, "3D": 1.0, "Count": 0.6, "Depth": 1.0}
    }
    assert scored.accuracy == pytest.approx(4 / 6)
    assert "score" not in cvbench(rows(cv("COCO", "B")), None).extra  # not of a part of the benchmark


def hr(cycle: int, category: str, said: str, answer: str = "A") -> dict[str, Any]:
    options = {"A": "red", "B": "blue", "C": "green", "D": "white"}
    return {**options, "answer": answer, "category": category, "cycle_category": cycle, "prediction": said}


def test_hrbench_is_the_mean_over_cycles() -> None:
    # report_acc_hrbench of DreamMr/HR-Bench: cycle 0: single 1/2, cross 1/1, all 2/3; cycle 1: single 0/1, all 0
    given = [hr(0, "single", "A"), hr(0, "single", "B"), hr(0, "cross", "red"), hr(1, "single", "D")]
    scored = hrbench(rows(*given), None)
    assert scored.extra["score"] == pytest.approx((2 / 3 + 0) / 2)
    assert scored.breakdown == {"single": 0.25, "cross": 0.5}
    assert scored.accuracy == 0.5


REALWORLD = {  # extract_characters_regex of yfzhang114/MME-RealWorld
    "The best answer is C": "C",
    "(D) a red car": "D",
    "Apple B": "A",  # the first capital from A to E, wherever it stands
    "a red car": "D",  # no capital: the option in which it stands
    "": "A",  # stands in every option, so the first
    "none of these words names any of the options at all, sorry": "",
    "no such thing": "",
}


@pytest.mark.parametrize("said", REALWORLD)
def test_mme_realworlds_reader(said: str) -> None:
    assert read_letter(said, ["(A) dog", "(B) cat", "(C) tree", "(D) A red car", "(E) none"]) == REALWORLD[said]


def real(task: str, said: str, category: str = "color") -> dict[str, Any]:
    named = {"Task": task, "Subtask": "OCR with Complex Context", "Category": category, "Output": said}
    return {**named, "Ground truth": "B", "Answer choices": ["(A) dog", "(B) cat"]}


def test_mme_realworlds_breakdown() -> None:
    given = [real("Perception", "B"), real("Perception", "A", "person/attribute/2"), real("Reasoning", "E")]
    scored = mme_realworld(rows(*given), None)
    assert scored.breakdown["Perception"] == 0.5
    assert scored.breakdown["Perception/OCR with Complex Context/person/attribute"] == 0.0
    assert scored.extra == {"unparsed": 0, "chose_E": 1}


def test_the_hubs_names_are_understood() -> None:
    hub = {"category": "Perception/OCR with Complex Context", "l2-category": "Color", "answer": "B", "response": "B"}
    scored = mme_realworld(rows({**hub, "multi-choice options": ["(A) dog", "(B) cat"]}), None)
    assert set(scored.breakdown) == {
        *("Perception", "Perception/OCR with Complex Context", "Perception/OCR with Complex Context/color")
    }


@pytest.mark.parametrize(
    ("score", "fields", "message"),
    [
        (cvbench, cv("COCO", "B", choices=[]), "`choices` of row 0 to be a list of options"),
        (cvbench, cv("KITTI", "B"), "`source` of row 0 to be one of"),
        (hrbench, hr(0, "single", "A", answer="red car"), "`answer` of row 0 to be an option's letter"),
        (mme_realworld, real("Planning", "B"), "`Task` of row 0 to be one of"),
    ],
)
def test_rows_of_something_else_are_named(score: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        score(rows(fields), None)
