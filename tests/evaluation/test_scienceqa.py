"""ScienceQA against tools/evaluate_acc.py and models/run_gpt3.py of its authors, and LLaVA's eval_science_qa.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modules.evaluation import rescore
from modules.evaluation.scienceqa import UNPARSED, parse


@pytest.mark.parametrize(
    ("output", "choices", "index"),
    [
        ("B", 4, 1),  # LLaVA: the letter alone
        ("B. a magnet", 4, 1),  # LLaVA: "X. " in front
        ("B.", 4, UNPARSED),  # two characters are neither
        ("b", 4, UNPARSED),
        ("The answer is C.", 4, 2),  # run_gpt3.py: exactly one
        ("The answer is C. BECAUSE: it is. The answer is C.", 4, UNPARSED),  # twice, although the same
        ("The answer is C", 4, UNPARSED),  # the pattern's full stop is any character, but there has to be one
        ("The answer is C,", 4, 2),
        ("the answer is C.", 4, UNPARSED),
        ("A. so The answer is B.", 4, 0),  # the letter in front goes first
        ("F. The answer is B.", 4, 1),  # F is none of A to E, so that the text is searched
        ("D", 3, UNPARSED),  # no such choice
        ("Because of Dogs.", 4, UNPARSED),  # a letter inside a word
        ("", 4, UNPARSED),
    ],
)
def test_an_answer_is_read_out_of_text_as_officially(output: str, choices: int, index: int) -> None:
    assert parse(output, choices) == index


def problem(answer: int, subject: str, grade: int, hint: str = "", image: str | None = None) -> dict[str, Any]:
    return {
        "question": "Which?", "choices": ["x", "y", "z"], "answer": answer, "hint": hint, "image": image,
        "task": "closed choice", "grade": f"grade{grade}", "subject": subject, "topic": "t", "category": "c",
        "skill": "s", "lecture": "", "solution": "", "split": "test",
    }  # fmt: skip


PROBLEMS = {
    "4": problem(0, "natural science", 2, hint="look", image="image.png"),  # TXT and IMG
    "5": problem(1, "natural science", 6, image="image.png"),
    "11": problem(2, "social science", 7, hint="look"),
    "15": problem(0, "language science", 12),  # NO
    "22": problem(1, "language science", 3),
    "23": {**problem(1, "language science", 3), "split": "train"},  # not asked
}


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    file = tmp_path / "problems.json"
    file.write_text(json.dumps(PROBLEMS))
    return file


def test_results_by_problem_id(tmp_path: Path, problems: Path) -> None:
    results = {"4": 0, "5": 0, "11": 2, "15": 0, "22": -1}
    # the outputs say otherwise: where there are results, they count
    value = {"acc": 60.0, "correct": 3, "count": 5, "results": results, "outputs": dict.fromkeys(results, "B")}
    (tmp_path / "p.json").write_text(json.dumps(value, indent=2))

    score = rescore("scienceqa", tmp_path / "p.json", problems)

    right = {pid: results[pid] == PROBLEMS[pid]["answer"] for pid in results}

    def share(*pids: str) -> float:
        return sum(right[pid] for pid in pids) / len(pids)

    assert score["accuracy"] == share(*results) == 3 / 5
    assert (score["benchmark"], score["n"], score["unparsed"]) == ("scienceqa", 5, 1)
    assert score["breakdown"] == {
        "NAT": share("4", "5"), "SOC": share("11"), "LAN": share("15", "22"),
        "TXT": share("4", "11"), "IMG": share("4", "5"), "NO": share("15", "22"),
        "G1-6": share("4", "5", "22"), "G7-12": share("11", "15"),
    }  # fmt: skip
    assert "missing" not in score


def test_outputs_are_read_where_there_are_no_results(tmp_path: Path, problems: Path) -> None:
    outputs = {"4": "The answer is A.", "5": "B. y", "11": "I do not know", "15": "A"}
    (tmp_path / "p.json").write_text(json.dumps({"outputs": outputs}))

    score = rescore("scienceqa", tmp_path / "p.json", problems)

    assert (score["accuracy"], score["unparsed"], score["missing"]) == (3 / 4, 1, 1)  # 22 is of the same split


def test_llava_rows_and_our_own_predictions_say_the_same(tmp_path: Path, problems: Path) -> None:
    said = {"4": "A", "5": "C", "11": "C"}
    (tmp_path / "llava.jsonl").write_text("\n".join(json.dumps({"question_id": k, "text": v}) for k, v in said.items()))
    own = [
        {"id": key, "mode": mode, "question": "Which?", "answers": ["A"], "answer": answer, "text": "…", "stop": "end"}
        for key, value in said.items()
        for mode, answer in (("greedy", value), ("sampled", None))
    ]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, own)))

    llava = rescore("scienceqa", tmp_path / "llava.jsonl", problems)

    assert llava["accuracy"] == 2 / 3
    assert rescore("scienceqa", tmp_path / "predictions.jsonl", problems) == llava
