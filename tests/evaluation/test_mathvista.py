"""MathVista against evaluation/calculate_score.py of lupantech/MathVista."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modules.evaluation import ScoreError, rescore
from modules.evaluation.mathvista import distance, normalise

CHOICES = ["135°", "140°", "145°", "150°"]


@pytest.mark.parametrize(
    ("extraction", "choices", "chosen"),
    [
        ("C", CHOICES, "145°"),
        ("(C) 145°", CHOICES, "145°"),
        ("(c)", CHOICES, "145°"),  # letters in parentheses may be small
        ("c", ["see", "cat"], "cat"),  # a bare small letter is text: one edit nearer to cat (2) than to see (3)
        (" B ", CHOICES, "140°"),  # stripped
        ("(B) or (C)", CHOICES, "140°"),  # the first one
        ("E", CHOICES, "135°"),  # no such option: the most similar, the first of equals
        ("(Z) 150°", CHOICES, "135°"),  # the letter replaces the text, and is as far from all
        ("92.5", ["97", "102", "107", "122"], "97"),  # Bard's problem 5, published as right
        ("I can't process this file.", ["Yes", "No"], "Yes"),  # Bard's problem 997, published prediction "Yes"
        ("", ["long option", "no"], "no"),  # nothing is most similar to the shortest
        (None, ["Yes", "None of these"], "Yes"),  # "None": 4 edits to Yes, 9 to the other
        (97, ["97", "102"], "97"),  # numbers are made texts
    ],
)
def test_multiple_choice_falls_back_to_the_most_similar(extraction: Any, choices: list[str], chosen: str) -> None:
    assert normalise(extraction, choices, "multi_choice", "text", None) == chosen


@pytest.mark.parametrize(
    ("extraction", "kind", "precision", "value"),
    [
        ("2.9", "integer", None, "2"),  # int(float()) cuts
        ("-0.5", "integer", None, "0"),
        ("1e3", "integer", None, "1000"),
        ("1,000", "integer", None, None),  # no thousands separators
        ("14 cm", "integer", None, None),
        ("inf", "integer", None, None),
        (None, "integer", None, None),
        (7, "integer", None, "7"),
        ("0.11", "float", 1, "0.1"),  # Bard's problem 1, published prediction "0.1"
        ("2", "float", 1, "2.0"),
        ("1.25", "float", 1.0, "1.2"),  # the Hugging Face precision is 1.0; binary halves round to even
        ("1.25", "float", None, None),
        ("[1, 2]", "list", None, "[1, 2]"),
        ([1, 2], "list", None, "[1, 2]"),
    ],
)
def test_free_form_is_normalised_by_answer_type(extraction: Any, kind: str, precision: Any, value: str | None) -> None:
    assert normalise(extraction, None, "free_form", kind, precision) == value


def test_distance_is_levenshteins() -> None:
    assert [distance(*pair.split("|")) for pair in ("kitten|sitting", "|abc", "abc|", "flaw|lawn", "a|a")] == [
        3,
        3,
        3,
        2,
        0,
    ]


def entry(pid: str, extraction: Any, answer: str, kind: str, source: str, skills: list[str]) -> dict[str, Any]:
    choices = CHOICES if kind == "text" else None
    return {
        "question": "?", "image": f"images/{pid}.jpg", "choices": choices, "unit": None,
        "precision": 1 if kind == "float" else None, "answer": answer, "answer_type": kind, "pid": pid,
        "question_type": "multi_choice" if choices else "free_form",
        "metadata": {
            "split": "testmini", "language": "english", "img_width": 1, "img_height": 1, "source": source,
            "category": "general-vqa", "task": "t", "context": "c", "grade": "college", "skills": skills,
        },
        "query": "Hint …", "response": "…", "extraction": extraction, "true_false": False, "prediction": "stale",
    }  # fmt: skip


OUTPUT = {
    "1": entry("1", "0.11", "1.2", "float", "SciBench", ["scientific reasoning"]),
    "2": entry("2", "1000.0", "1000", "integer", "TextVQA", ["numeric commonsense", "arithmetic reasoning"]),
    "3": entry("3", "C", "145°", "text", "GeoQA+", ["arithmetic reasoning"]),
    "10": entry("10", "[1, 2]", "[1,2]", "list", "SciBench", ["arithmetic reasoning"]),  # lists are compared as text
}


def test_published_output(tmp_path: Path) -> None:
    (tmp_path / "output_model.json").write_text(json.dumps(OUTPUT, indent=4))

    score = rescore("mathvista", tmp_path / "output_model.json")

    assert (score["n"], score["accuracy"]) == (4, 2 / 4)  # right: 2 and 3; what the file calls true_false is not read
    breakdown = score["breakdown"]
    assert breakdown["skills/arithmetic reasoning"] == 2 / 3
    assert breakdown["skills/scientific reasoning"] == 0
    assert breakdown["question_type/free_form"] == 1 / 3
    assert breakdown["source/SciBench"] == 0
    assert breakdown["answer_type/text"] == breakdown["source/GeoQA+"] == 1
    assert {name.split("/")[0] for name in breakdown} == {
        "question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills",
    }  # fmt: skip


def test_answers_from_the_annotations(tmp_path: Path) -> None:
    bare = {pid: {"pid": pid, "extraction": row["extraction"]} for pid, row in OUTPUT.items() if pid != "10"}
    own = [
        {"id": pid, "mode": "greedy", "question": "?", "answers": [], "answer": row["extraction"], "stop": "end"}
        for pid, row in bare.items()
    ]
    (tmp_path / "testmini.json").write_text(json.dumps(OUTPUT))
    (tmp_path / "output.json").write_text(json.dumps(bare))
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, own)))

    score = rescore("mathvista", tmp_path / "output.json", tmp_path / "testmini.json")

    assert (score["n"], score["accuracy"]) == (3, 2 / 3)
    assert rescore("mathvista", tmp_path / "predictions.jsonl", tmp_path / "testmini.json")["accuracy"] == 2 / 3


@pytest.mark.parametrize(
    ("change", "words"),
    [({"choices": []}, "`choices`"), ({"answer": 145}, "`answer`"), ({"metadata": None}, "`metadata`")],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    (tmp_path / "o.json").write_text(json.dumps({**OUTPUT, "3": {**OUTPUT["3"], **change}}))

    with pytest.raises(ScoreError, match=rf"{words} of .*o\.json', row '3'"):
        rescore("mathvista", tmp_path / "o.json")
