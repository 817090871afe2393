"""POPE against evaluate.py of AoiDragon/POPE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modules.evaluation import ScoreError, rescore
from modules.evaluation.pope import says_yes


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("no", False), ("No, there is none.", False), ("There is not a bird.", False),
        ("Yes. No doubt.", True),  # only the first sentence counts
        ("yes, no doubt", False),  # any "no" in it counts
        ("NO", True), ("No\n", True), ("nothing", True), ("", True),  # words are what blanks separate, as written
    ],
)  # fmt: skip
def test_yes_is_what_is_not_no(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


LABELS = ["yes", "yes", "yes", "no", "no"]
ANSWERS = ["Yes", "No, it is not.", "It is.", "Yes, there is.", "no"]


def test_answers_belong_to_questions_by_order_or_id(tmp_path: Path) -> None:
    questions = [
        {"question_id": n, "image": "i.jpg", "text": f"Is there a {n} in the image?", "label": label}
        for n, label in enumerate(LABELS, 1)
    ]
    ordered = [{"question": q["text"], "answer": a} for q, a in zip(questions, ANSWERS, strict=True)]
    llava = [{"question_id": n, "prompt": "…", "text": a} for n, a in enumerate(ANSWERS, 1)][::-1]
    own = [
        {"id": str(n), "mode": "greedy", "question": "…", "answers": ["?"], "answer": a, "stop": "end"}
        for n, a in enumerate(ANSWERS, 1)
    ]
    alone = [{**q, "answer": a, "category": "random"} for q, a in zip(questions, ANSWERS, strict=True)]
    for name, lines in {"q": questions, "ordered": ordered, "llava": llava, "own": own, "alone": alone}.items():
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, lines)))

    scores = [rescore("pope", tmp_path / f"{name}.json", tmp_path / "q.json") for name in ("ordered", "llava", "own")]
    single = rescore("pope", tmp_path / "alone.json")

    yes = [True, False, True, True, False]  # what ANSWERS mean
    tp = sum(y and label == "yes" for y, label in zip(yes, LABELS, strict=True))
    precision, recall = tp / sum(yes), tp / LABELS.count("yes")
    for score in (*scores, single):
        assert (score["n"], score["accuracy"]) == (5, 3 / 5)
        assert (score["TP"], score["FP"], score["TN"], score["FN"]) == (2, 1, 1, 1)
        breakdown = score["breakdown"]
        assert (breakdown["precision"], breakdown["recall"], breakdown["yes_ratio"]) == (precision, recall, 3 / 5)
        assert breakdown["f1"] == score["score"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert single["breakdown"]["random"] == 3 / 5


def test_answers_to_other_questions_are_named(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "Is there a cat?", "label": "no"}')
    (tmp_path / "a.jsonl").write_text('{"question": "Is there a dog?", "answer": "no"}')
    with pytest.raises(ScoreError, match=r"a\.jsonl', row 1 to answer 'Is there a cat\?'"):
        rescore("pope", tmp_path / "a.jsonl", tmp_path / "q.jsonl")
    (tmp_path / "a.jsonl").write_text('{"question": "Is there a cat?", "answer": "no"}\n' * 2)
    with pytest.raises(ScoreError, match="each of 1 questions"):
        rescore("pope", tmp_path / "a.jsonl", tmp_path / "q.jsonl")
