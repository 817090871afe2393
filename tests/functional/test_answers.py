"""Which answers count as equal. Every expectation is stated by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.functional.answers import matches, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The Red   Car. ", "red car"),
        ("a dog and an owl", "dog and owl"),
        ("Anna", "anna"),  # no article inside a word
        ("A", "a"),  # a name, not an article
        ("A, B", "a b"),
        ("Two dogs", "2 dogs"),
        ("someone", "someone"),
        ("TEN", "10"),
        ("1,234,567", "1234567"),
        ("1,23", "1 23"),  # no thousands
        ("1,234, and 5", "1234 and 5"),
        ("3.50", "3.50"),
        ("3.", "3"),
        ("\u22125", "-5"),
        ("t-shirt", "t shirt"),
        ("don't!", "dont"),
        ("U.S.A.", "usa"),
        ('"stop"', "stop"),
        ("1/2", "1/2"),
        ("x+1", "x+1"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        ("The red car.", ["blue car", "red car"], True),
        ("red", ["red car"], False),
        ("red car", [], False),
        ("", [""], False),
        ("!", ["?"], False),
        ("5.0", ["5"], True),
        ("five", ["5.00"], True),
        ("1,000", ["1000"], True),
        (".5", ["0.5"], True),
        ("+3", ["3"], True),
        ("-3", ["3"], False),
        ("0.30000000000000001", ["0.3"], False),  # decimals, not binary floats
        ("5 cm", ["5"], False),
        ("50%", ["50"], False),
        ("3/4", ["3/4"], True),
        ("3", ["3/4"], False),  # a fraction is no list of alternatives
        ("12/05/2021", ["12/05/2021"], True),
        ("2021", ["12/05/2021"], False),
        ("x1", ["x+1"], False),
        ("A", ["B"], False),
        ("A, B", ["B"], False),
    ],
)
def test_matches_without_choices(prediction, answers, right):
    assert matches(prediction, answers) is right


COLOURS = ("red", "blue", "A dark green", "10")


@pytest.mark.parametrize("answer", ["B", "(B)", "b", "blue", "B. blue"])
@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("B", True),
        ("b", True),
        (" (B) ", True),
        ("(B).", True),
        ("B.", True),
        ("B)", True),
        ("B:", True),
        ("B. blue", True),
        ("(B) blue", True),
        ("(B)blue", True),
        ("B) blue, I think", True),
        ("Blue.", True),
        ("A", False),
        ("E", False),
        ("red", False),
        ("Blueish", False),
        ("Because", False),
        ("B.C.", False),
        ("a dark green", False),
        ("", False),
    ],
)
def test_matches_with_choices(prediction, answer, right):
    assert matches(prediction, [answer], COLOURS) is right


@pytest.mark.parametrize(
    ("prediction", "answers", "choices", "right"),
    [
        ("dark green", ["C"], COLOURS, True),
        ("A dark green", ["C"], COLOURS, True),  # no letter A
        ("ten", ["D"], COLOURS, True),
        ("A. Lincoln", ["B"], ("G. Washington", "A. Lincoln"), True),  # the exact option before its initial
        ("A", ["C"], ("C", "B", "A"), False),  # a single letter is a letter, also where options are letters
        ("A", ["A"], ("C", "B", "A"), True),
        ("B blue", ["B"], COLOURS, False),  # no delimiter: the letter could be a word
        ("crimson", ["A", "crimson"], COLOURS, True),  # an alternative that is no option
        ("C", ["A", "C"], COLOURS, True),
        ("J", ["ten"], tuple("0123456789"), False),
    ],
)
def test_choices_that_mislead(prediction, answers, choices, right):
    assert matches(prediction, answers, choices) is right


@given(st.text(max_size=40), st.lists(st.text(max_size=5), max_size=4))
@settings(max_examples=100, deadline=None)
def test_no_text_breaks_it(text, choices):
    assert matches(text, [text], choices) is (text.strip() != "")
