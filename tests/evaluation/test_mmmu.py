"""MMMU against eval/eval_utils.py and eval/main_eval_only.py of MMMU-Benchmark/MMMU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modules.evaluation import Row, ScoreError, rescore
from modules.evaluation.mmmu import normalise, parse_choice, parse_open, right_open, score


def test_normalised_values() -> None:
    assert normalise(" 1,234.567 ") == [1234.57]
    assert normalise("Newton") == ["newton"]
    assert normalise("N") == [" n", "n "]  # a single character is looked for with a blank beside it


@pytest.mark.parametrize(
    ("response", "values"),
    [
        # the shortest tail behind a mark; the plain pattern finds 060.5 behind the comma, as it does officially
        ("The answer is 1,060.5 kg.", {"1,060.5 kg", 1060.0, 60.5}),
        ("Paris", {"paris"}),  # no mark: the whole response
        ("x = 3\ny = 4", {4.0}),  # "=" is a mark in the last line only, and the first has no other
        ("So it is 2e3", {2000.0, 3.0}),
        ("The result is :", {"the result is :"}),  # a tail of punctuation is none
    ],
)
def test_open_responses_are_searched(response: str, values: set[str | float]) -> None:
    assert set(parse_open(response)) == values


@pytest.mark.parametrize(
    ("answers", "response", "right"),
    [
        (["1.06"], "The ratio is 1.0599", True),  # equal to two decimals
        (["1.06"], "The ratio is 1.07", False),
        (["Newton"], "It is Isaac Newton.", True),  # the answer stands in the tail
        (["Isaac Newton"], "Newton", False),  # not the other way round
        (["a", "beta"], "It could be beta", True),  # one of several
        (["12"], "112", False),  # numbers are compared, not searched
    ],
)
def test_open_questions(answers: list[str], response: str, right: bool) -> None:
    assert right_open(answers, response) is right


ANSWERS = {
    "validation_Accounting_1": {"question_type": "multiple-choice", "ground_truth": "B"},
    "validation_Accounting_2": {"question_type": "multiple-choice", "ground_truth": ["C", "D"]},
    "validation_Art_Theory_1": {"question_type": "multiple-choice", "ground_truth": "A"},
    "validation_Finance_3": {"question_type": "short-answer", "ground_truth": "1.06"},
    "validation_Math_9": {"question_type": "multiple-choice", "ground_truth": "A"},
}


def test_predictions_by_id(tmp_path: Path) -> None:
    said = dict(zip(ANSWERS, ("B", "D", "(A)", "The answer is 1.06."), strict=False))
    own = [
        {"id": key, "mode": "greedy", "question": "?", "answers": ["?"], "answer": value, "stop": "end"}
        for key, value in said.items()
    ]
    (tmp_path / "answer_dict_val.json").write_text(json.dumps(ANSWERS))
    (tmp_path / "total_val_output.json").write_text(json.dumps(said))
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, own)))

    score = rescore("mmmu", tmp_path / "total_val_output.json", tmp_path / "answer_dict_val.json")

    assert (score["n"], score["accuracy"], score["missing"]) == (4, 3 / 4, 1)  # "(A)" is not the letter
    assert score["breakdown"] == {
        "Accounting": 1, "Finance": 1, "Business": 1, "Art_Theory": 0, "Art and Design": 0,
    }  # fmt: skip
    # our own answers are not parsed yet: "(A)" names the option
    assert rescore("mmmu", tmp_path / "predictions.jsonl", tmp_path / "answer_dict_val.json")["accuracy"] == 1


def test_a_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ANSWERS))
    (tmp_path / "p.json").write_text(json.dumps({"validation_Finance_3": 1.06}))
    with pytest.raises(ScoreError, match=r"`prediction` or `response` of .*'validation_Finance_3' to be a text"):
        rescore("mmmu", tmp_path / "p.json", tmp_path / "a.json")


RAW = {  # parse_multi_choice_response of eval_utils.py; options red, blue, green
    "(A) or (B): I say (B).": "B",  # the last in parentheses
    "It is C": "C",
    "A and then B ": "B",  # the last between blanks
    "I think that it must be the green one": "C",  # more than five words: the option whose text stands last
    "green": "",  # too short for that; officially a guess
    "No idea at all about this question": "",
}


@pytest.mark.parametrize("response", RAW)
def test_raw_responses_are_read_as_officially_but_never_guessed(response: str) -> None:
    assert parse_choice(response, {"A": "red", "B": "blue", "C": "green"}) == RAW[response]


def test_the_raw_output_is_scored() -> None:
    fields = {"question_type": "multiple-choice", "answer": "B", "all_choices": ["A", "B"]}
    raw = {**fields, "index2ans": {"A": "red", "B": "blue"}, "response": "So the answer is (B)."}
    made = [Row("row 1", "validation_Art_1", raw), Row("row 2", "validation_Art_2", {**raw, "response": "(A)"})]
    assert score(made, None).values == (1.0, 0.0)
    with pytest.raises(ScoreError, match="`index2ans` of row 1 to be option texts by letter"):
        score([Row("row 1", "validation_Art_1", {**raw, "index2ans": ["red"]})], None)
