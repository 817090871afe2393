"""HallusionBench against utils.py of tianyi-lab/HallusionBench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modules.evaluation import ScoreError, rescore
from modules.evaluation.hallusionbench import says


@pytest.mark.parametrize(
    ("prediction", "said"),
    [
        ("Yes, the circles are equal.", "1"), ("No.", "0"), ("1", "1"), ("2", "2"),
        ("Yes, there is no doubt.", "1"),  # the first word decides
        ("I would say no", "0"), ("yes or no? I cannot tell", "1"), ("It is yes or no", "2"),
        ("Nobody knows", "2"), ("", "2"),
    ],
)  # fmt: skip
def test_yes_no_and_uncertain(prediction: str, said: str) -> None:
    assert says(prediction) == said


def row(category: str, set_id: int, figure: int, question: int, truth: int, said: str) -> dict[str, Any]:
    return {
        "category": category, "subcategory": "chart", "visual_input": "1" if figure else "0", "set_id": str(set_id),
        "figure_id": str(figure), "question_id": str(question), "question": "Is it?", "gt_answer": str(truth),
        "gt_answer_details": "…", "filename": None, "sample_note": "", "model_prediction": said,
    }  # fmt: skip


ROWS = [
    row("VS", 0, 0, 0, 1, "I am uncertain"),  # right: uncertain, VS, no figure
    row("VS", 0, 1, 0, 1, "Yes"),
    row("VS", 0, 1, 1, 0, "Perhaps"),  # uncertain before a figure is wrong
    row("VD", 0, 0, 0, 1, "I am uncertain"),  # wrong: VD has a figure 0
    row("VD", 0, 1, 0, 0, "No"),
    row("VD", 1, 0, 0, 1, "No"),
]
RIGHT = [True, True, False, False, True, False]


def test_accuracy_by_question_group_and_figure(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(ROWS))

    score = rescore("hallusionbench", tmp_path / "result.json")

    assert (score["n"], score["accuracy"]) == (6, 3 / 6)
    assert score["breakdown"] == {
        "aAcc": 3 / 6,
        "qAcc": 1 / 4,  # groups: VS 0/0 both right; VS 0/1, VD 0/0, VD 1/0 not
        "fAcc": 1 / 4,  # figures: VS 0/1 not, VD 0/0 not, VD 0/1 right, VD 1/0 not; VS without a figure is none
        "easy": 1 / 3,  # figure 0: VS 0/0 right, VD 0/0 not, VD 1/0 not
        "hard": 2 / 3,  # others: VS 0/0 right, VS 0/1 not, VD 0/0 right
        "VS": 2 / 3,
        "VD": 1 / 3,
    }


def test_the_judges_verdict_counts_where_there_is_one(tmp_path: Path) -> None:
    verdicts = ["2", "1", "2", "2", "1", "0"]
    judged = [{**r, "model_prediction": "No", "gpt4v_output_gpt_check": v} for r, v in zip(ROWS, verdicts, strict=True)]
    (tmp_path / "judged.json").write_text(json.dumps(judged))
    (tmp_path / "plain.json").write_text(json.dumps(ROWS))

    assert (
        rescore("hallusionbench", tmp_path / "judged.json")["breakdown"]
        == (rescore("hallusionbench", tmp_path / "plain.json")["breakdown"])
    )


def test_answers_from_the_benchmarks_file(tmp_path: Path) -> None:
    bare = [{k: v for k, v in r.items() if k != "gt_answer"} for r in ROWS]
    (tmp_path / "result.json").write_text(json.dumps(bare[:3]))
    (tmp_path / "HallusionBench.json").write_text(json.dumps(ROWS))

    score = rescore("hallusionbench", tmp_path / "result.json", tmp_path / "HallusionBench.json")

    assert (score["n"], score["accuracy"]) == (3, sum(RIGHT[:3]) / 3)
    with pytest.raises(ScoreError, match=r"row 2 to have `gt_answer`"):
        rescore("hallusionbench", tmp_path / "result.json")


def test_a_question_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps([*ROWS, ROWS[0]]))
    with pytest.raises(ScoreError, match=r"row 1 and .*row 7 are the same"):
        rescore("hallusionbench", tmp_path / "result.json")
