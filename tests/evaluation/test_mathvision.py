"""MathVision's rules, as evaluation/evaluate.py and evaluation/utils.py of github.com/mathllm/MATH-V have them."""

from __future__ import annotations

from typing import Any

import pytest

from modules.evaluation.common import Row, ScoreError
from modules.evaluation.mathvision import equal, extract, score, value

SAID = {  # what `evaluate` makes of a response before it compares
    "B": "b",
    "(B)\nbecause": "b",  # startswith "(B)\n"
    "I choose (C).": "c",  # endswith " (C)."
    "So the answer is D.": "d",  # endswith " D."
    "the result is 12.": "12",  # a number behind the last "is "
    "The answer is 3x. It is clear": "3x",  # up to the next sentence
    "first \\boxed{1}, then \\boxed{\\frac{3}{4}}": "\\frac{3}{4}",  # the last box
    "\\boxed{x = 7}": "7",  # behind the equals sign
    "\\boxed{12^\\circ}": "12",
    "\\boxed{5 \\text{ km}}": "5",  # units go
    "0.5": "\\frac{1}{2}",
    "3/4": "\\frac{3}{4}",
    ".5": "\\frac{1}{2}",
    ".25": "0.25",
    "\\boxed{2\\sqrt3}": "2\\sqrt{3}",
}


@pytest.mark.parametrize("response", SAID)
def test_the_answer_is_read_out_as_officially(response: str) -> None:
    assert extract(response) == SAID[response]


EQUAL = [
    ("B", "b", True),
    ("12", "12.0", True),  # numbers to two decimals
    ("0.333", "\\frac{1}{3}", True),
    ("0.34", "\\frac{1}{3}", False),
    ("2\\sqrt{3}", "3.4641", True),
    ("(1,2)", "(1,\\frac{4}{2})", True),  # tuples element by element
    ("(1,2)", "(1.0,2.0)", False),  # as text, once they are computed
    ("(1,2)", "(2,1)", False),
    ("12", "", False),
    ("a", "b", False),  # letters are no numbers
    ("x+1", "x+1", True),
    ("x+1", "1+x", False),  # expressions with unknowns are compared as text
]


@pytest.mark.parametrize(("right", "said", "same"), EQUAL)
def test_answers_are_compared_as_officially(right: str, said: str, same: bool) -> None:
    assert equal(right, said) is same


@pytest.mark.parametrize("bomb", ["9^{9^{9^{9}}}", "10^{100000000}", "99999!", "(" * 150 + "1" + ")" * 150])
def test_what_would_not_end_is_no_number(bomb: str) -> None:
    assert value(bomb) is None


def row(said: str, **fields: Any) -> Row:
    known = {"answer": "A", "options": ["red", "blue"], "level": 2, "subject": "graph theory", "response": said}
    return Row(f"row of {said!r}", said, {**known, **fields})


def test_the_letter_or_the_text_of_the_right_option_is_right() -> None:
    rows = [row("A"), row("red"), row("B"), row("3", answer="3.00", options=[], level=4)]
    scored = score(rows, None)
    assert scored.values == (1.0, 1.0, 0.0, 1.0)
    assert scored.breakdown == {"graph theory": 0.75, "level2": pytest.approx(2 / 3), "level4": 1.0}


def test_a_label_that_is_no_option_is_named() -> None:
    with pytest.raises(ScoreError, match="`answer` of row of 'A' to be an option's letter, but got 'F'"):
        score([row("A", answer="F")], None)
