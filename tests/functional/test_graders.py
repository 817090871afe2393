"""Which answer is how right, by kind. Every expectation is stated by hand."""

from __future__ import annotations

import time
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.functional.graders import MAX_LENGTH, Kind, anls, grade, kind_of, quantity

KINDS = [kind for kind in get_args(Kind) if kind != "math"]


@pytest.mark.parametrize(
    ("kind", "prediction", "answer", "expected"),
    [
        ("exact", "The red car.", "red car", 1),
        ("exact", "1,000", "1000.0", 1),
        ("exact", "3/4", "3/4", 1),
        ("exact", "3", "3/4", 0),
        ("exact", "12/05/2021", "12/05/2021", 1),
        ("exact", "12", "12/05/2021", 0),
        ("exact", "10.2", "10", 0),
        ("choice", "(B)", "B", 1),
        ("choice", "B. blue", "B", 1),
        ("choice", "b", "(B)", 1),
        ("choice", "A. red", "B", 0),
        ("choice", "Blue", "B", 0),
        ("choice", "blue", "blue", 1),
        ("vqa", "two dogs", "2 dogs", 1),
        ("vqa", "cant", "can't", 1),
        ("yesno", "Yes, it is.", "yes", 1),
        ("yesno", "no", "yes", 0),
        ("yesno", "False", "No", 1),
        ("yesno", "I think the answer is no", "no", 1),
        ("yesno", "it is yes or no", "yes", 0),  # does not say
        ("yesno", "No, I say yes", "yes", 0),  # the first word
        ("yesno", "nothing", "no", 0),
        ("yesno", "yes", "maybe", 0),
        ("list", "blue, red and green", "red, green, blue", 1),
        ("list", "red; green", "red, green", 1),
        ("list", "red", "red, green", 0),
        ("list", "red, red", "red, green", 0),
        ("list", "[1, 2, 3]", "[1,2,3]", 1),
        ("list", "1, 2.0, 3", "[1,2,3]", 1),
        ("list", "[2, 1, 3]", "[1, 2, 3]", 0),  # in brackets the order counts
        ("list", "1,000 and 2", "1000, 2", 1),
        ("list", "[100,200]", "[100, 200]", 1),
        ("list", "3/4, 1/2", "1/2, 3/4", 1),
        ("list", "3, 4", "3/4", 0),
        ("number", "10.5", "10", 1),
        ("number", "10.51", "10", 0),
        ("number", "9.5", "10", 1),
        ("number", "9.49", "10", 0),
        ("number", "-10", "10", 0),
        ("number", "-10", "\u221210", 1),
        ("number", "0", "0", 1),
        ("number", "0.01", "0", 0),
        ("number", "$1.5 million", "1,500,000", 1),
        ("number", "1.5 million dollars", "$1,500,000", 1),
        ("number", "5 cm", "5", 1),
        ("number", "5", "5 cm", 1),
        ("number", "5 centimetres", "5 cm", 1),
        ("number", "5 mm", "5 cm", 0),
        ("number", "€5", "$5", 0),
        ("number", "50%", "50", 1),
        ("number", "0.5", "50%", 1),
        ("number", "50 percent", "50%", 1),
        ("number", "5", "50%", 0),
        ("number", "3/4", "0.75", 1),
        ("number", "3", "3/4", 0),
        ("number", "1/0", "1/0", 1),  # no number: compared as text
        ("number", "12/05/2021", "12/05/2021", 1),
        ("number", "12/05/2020", "12/05/2021", 0),
        ("number", "2021-05-12", "2021-05-13", 0),
        ("number", "12:30", "12:31", 0),
        ("number", "red", "Red.", 1),
        ("number", "1e999", "10", 0),
        ("number", "7 of 10", "7", 0),
        ("anls", "Hello  World", "hello world", 1),
        ("anls", "hello worl", "hello world", 10 / 11),
        ("anls", "abcd", "abxy", 0.5),  # the threshold itself counts, as in the official script
        ("anls", "abc", "axy", 0),
        ("anls", "", "", 0),
    ],
)
def test_grades(kind: Kind, prediction: str, answer: str, expected: float) -> None:
    assert grade(kind, prediction, [answer]) == pytest.approx(expected)
    assert grade(kind, prediction, ["something else", answer]) == pytest.approx(expected)  # the best counts
    assert grade(kind, prediction, []) == 0


def test_tolerance_and_threshold_act() -> None:
    assert [grade("number", "10.5", ["10"], tolerance=t) for t in (0.0, 0.04, 0.06)] == [0, 0, 1]
    assert grade("number", "10.0", ["10"], tolerance=0.0) == 1
    assert [grade("anls", "abcd", ["abxy"], threshold=t) for t in (0.4, 0.6)] == [0.5, 0]


def test_choices_are_compared_as_options() -> None:
    assert grade("choice", "B", ["blue"], ("red", "blue")) == 1
    assert grade("choice", "A", ["blue"], ("red", "blue")) == 0


@pytest.mark.parametrize(
    ("source", "answers", "choices", "kind"),
    [
        ("MMK12", ["B"], ("red", "blue"), "choice"),  # options come first
        ("MMK12", ["12"], (), "math"),
        ("TextVQA", ["stop"], (), "vqa"),
        ("DocVQA", ["May 5"], (), "anls"),
        ("ChartQA", ["12"], (), "number"),
        ("POPE", ["yes"], (), "yesno"),
        ("cards", ["stop"] * 10, (), "vqa"),
        ("cards", ["B"], (), "choice"),
        ("cards", ["(B)"], (), "choice"),
        ("cards", ["b"], (), "exact"),
        ("cards", ["Yes"], (), "yesno"),
        ("cards", ["yes", "sure"], (), "exact"),
        ("cards", [r"\frac{1}{2}"], (), "math"),
        ("cards", ["x^2"], (), "math"),
        ("cards", ["$5$"], (), "math"),
        ("cards", ["$5"], (), "exact"),
        ("cards", ["file_name"], (), "exact"),
        ("cards", ["[1, 2]"], (), "list"),
        ("cards", ["7"], (), "exact"),
        ("cards", ["1/2"], (), "exact"),
        ("cards", ["12/05/2021"], (), "exact"),
        ("cards", ["red car"], (), "exact"),
        ("", [], (), "exact"),
    ],
)
def test_the_kind_is_decided_by_the_sample(
    source: str, answers: list[str], choices: tuple[str, ...], kind: Kind
) -> None:
    assert kind_of(source, answers, choices) == kind


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$1,234.5", (1234.5, "$")),
        ("1.5 billion", (1.5e9, "")),
        ("3 / 4 cups", (0.75, "cups")),
        ("30°", (30.0, "°")),
        (".5", (0.5, "")),
        ("1,23", None),
        ("", None),
        ("$", None),
        ("12 May 2021", None),
        ("5-6", None),
    ],
)
def test_quantities(text: str, expected: tuple[float, str] | None) -> None:
    assert quantity(text) == expected


def test_anls_is_symmetric_and_agrees_with_a_distance_by_recursion() -> None:
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    for a, b in [("kitten", "sitting"), ("abc", "cab"), ("flaw", "lawn"), ("same", "same")]:
        assert anls(a, b, 0.0) == anls(b, a, 0.0) == pytest.approx(1 - distance(a, b) / max(len(a), len(b)))


@given(st.sampled_from(KINDS), st.text(max_size=60), st.lists(st.text(max_size=20), max_size=11))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_a_grader(kind: Kind, prediction: str, answers: list[str]) -> None:
    assert 0 <= grade(kind, prediction, answers) <= 1
    assert kind_of("", answers, ()) in get_args(Kind)


FIGURES = st.text("0123456789.,-+/e%$ []()\n\u0663\u2212andYesno\\^{}", max_size=60)


@given(st.sampled_from(KINDS), FIGURES, FIGURES)
@settings(max_examples=300, deadline=None)
def test_no_figures_break_a_grader(kind: Kind, prediction: str, answer: str) -> None:
    assert 0 <= grade(kind, prediction, [answer]) <= 1


@pytest.mark.parametrize("unit", ["9", ",", "1,", "a ", "[", "no ", " ", "\n", "and ", "1,000", "((", "e", "\\"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "anls"])
def test_no_long_text_takes_long(kind: Kind, unit: str) -> None:
    check_long(kind, unit)


def test_a_long_text_has_a_distance_in_a_second() -> None:
    check_long("anls", "no ")


def check_long(kind: Kind, unit: str) -> None:
    begin = time.process_time()
    text = unit * (MAX_LENGTH // len(unit))
    assert 0 <= grade(kind, text, [text[:-1], "7"]) <= 1
    assert grade(kind, unit * MAX_LENGTH + "7", ["7"]) == 0
    kind_of("", [text], ())
    assert time.process_time() - begin < 5
