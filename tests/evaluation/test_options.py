"""V* and MMVP, and which option a response names (the rules of the data sets' prompts)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modules.evaluation import ScoreError, rescore
from modules.evaluation.common import choice, options

GLOVE = "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
PROMPT = "Answer with the option's letter from the given choices directly."
COLOURS = ["rubber", "cotton", "kevlar", "leather"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (GLOVE + PROMPT, COLOURS),  # V*: the last line is no option
        ("Are the wings open? (a) Open (b) Closed", ["Open", "Closed"]),  # MMVP: on one line
        ("Which is in (A)?\n(A) this\n(B) that", ["this", "that"]),
        ("Which?\nA. this\nB. that", ["this", "that"]),
        ("Which cat?", []),
    ],
)
def test_options_of_a_question(text: str, found: list[str]) -> None:
    assert options(text) == found


@pytest.mark.parametrize(
    ("response", "index"),
    [
        ("B", 1), ("(B)", 1), ("b", 1), ("B.", 1), ("**B**", 1), (" (b).\n", 1),
        ("B. cotton", 1), ("(b) cotton", 1), ("Cotton.", 1),
        ("The answer is (B).", 1), ("Answer: B", 1), ("The answer is A? No, the answer is B.", 1),
        ("<answer>A</answer> wait <answer>B</answer>", 1),  # the last <answer> counts
        ("The answer is A. <answer>cotton", 1),  # even if it is cut off
        ("<answer>cottonwood</answer> B", None),  # it counts alone
        ("A cotton glove", None),  # an article is no letter
        ("Because", None),  # a letter inside a word is none
        ("E", None),  # no such option
        ("the answer is a guess", None),
        ("", None),
    ],
)  # fmt: skip
def test_which_option_is_named(response: str, index: int | None) -> None:
    assert choice(response, COLOURS) == index


def rows(*pairs: tuple[str, str, str]) -> list[dict[str, Any]]:
    return [
        {"index": n, "image": f"{n}.jpg", "text": GLOVE + PROMPT, "label": label, "category": kind, "response": said}
        for n, (label, kind, said) in enumerate(pairs)
    ]


def test_vstar_rows(tmp_path: Path) -> None:
    answers = [("A", "direct_attributes", "A"), ("B", "direct_attributes", "cotton"), ("C", "direct_attributes", "Hm")]
    answers.append(("D", "relative_position", "(A) rubber"))
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows(*answers))))

    score = rescore("vstar", tmp_path / "v.jsonl")

    assert (score["n"], score["accuracy"], score["unparsed"]) == (4, 2 / 4, 1)
    assert score["breakdown"] == {"direct_attributes": 2 / 3, "relative_position": 0.0}


def test_vstar_original_results(tmp_path: Path) -> None:
    """vstar_bench_eval.py: the first option is right."""
    chosen = {"direct_attributes": [0, 2, 0], "relative_position": [1, 0]}
    value = {name: [{"image": "i.jpg", "option_chosen": k} for k in picks] for name, picks in chosen.items()}
    (tmp_path / "eval_result.json").write_text(json.dumps(value))

    score = rescore("vstar", tmp_path / "eval_result.json")

    assert (score["n"], score["accuracy"]) == (5, 3 / 5)
    assert score["breakdown"] == {"direct_attributes": 2 / 3, "relative_position": 1 / 2}


MMVP = [("(a)", "(a)"), ("(b)", "(b)"), ("(a)", "Open"), ("(b)", "(a) Open"), ("(a)", "b"), ("(b)", "A")]


@pytest.mark.parametrize("first", [0, 1])  # Questions.csv counts from 1, dumps of a loop from 0
def test_mmvp_pairs_go_by_index(tmp_path: Path, first: int) -> None:
    """scripts/gpt_grader.py: rows 1 and 2 are a pair, 3 and 4, ...; both have to be right."""
    lines = [
        {"index": n, "image": f"{n}.jpg", "text": "Open? (a) Open (b) Closed", "label": label, "response": said}
        for n, (label, said) in enumerate(MMVP, first)
    ]
    shuffled = [lines[n] for n in (3, 0, 5, 1, 4, 2)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, shuffled)))

    score = rescore("mmvp", tmp_path / "m.jsonl")

    assert (score["n"], score["accuracy"]) == (6, 3 / 6)
    assert score["pair_accuracy"] == score["score"] == 1 / 3


def test_mmvp_official_rows_and_table(tmp_path: Path) -> None:
    """Rows of scripts/evaluate_mllm.py; and our own predictions with Questions.csv."""
    question = "Open? (a) Open (b) Closed"
    official = [
        {"question_id": n, "prompt": question, "answer": label, "response": said}
        for n, (label, said) in enumerate(MMVP, 1)
    ]
    own = [
        {"id": str(n), "mode": "greedy", "question": "Open?", "answers": ["x"], "answer": said, "stop": "end"}
        for n, (_, said) in enumerate(MMVP, 1)
    ]
    table = ["Index,Question,Options,Correct Answer"]
    table += [f'{n},"Open, or not?",(a) Open (b) Closed,{label}' for n, (label, _) in enumerate(MMVP, 1)]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, official)))
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, own)))
    (tmp_path / "Questions.csv").write_text("\n".join(table))

    for score in (
        rescore("mmvp", tmp_path / "answers.jsonl"),
        rescore("mmvp", tmp_path / "predictions.jsonl", tmp_path / "Questions.csv"),
    ):
        assert (score["accuracy"], score["pair_accuracy"]) == (3 / 6, 1 / 3)


def test_a_question_without_its_partner_is_named(tmp_path: Path) -> None:
    lines = [{"index": n, "text": "? (a) x (b) y", "label": "(a)", "response": "a"} for n in (1, 2, 4, 5)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ScoreError, match=r"row 2 is followed by .*row 3"):
        rescore("mmvp", tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines[:1])))
    with pytest.raises(ScoreError, match="1 rows"):
        rescore("mmvp", tmp_path / "m.jsonl")


def test_a_wrong_category_is_named(tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text(json.dumps(rows(("A", "existence", "A"))[0]))
    with pytest.raises(ScoreError, match=r"`category` of .*v\.jsonl', row 1"):
        rescore("vstar", tmp_path / "v.jsonl")
