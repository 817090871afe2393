"""The VQA benchmark's normalisation, by its published rules; expectations worked out by hand."""

from __future__ import annotations

import pytest

from modules.functional.vqa import accuracy, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red  Car.", "red car"),
        ("A", ""),  # the benchmark drops every article
        ("an owl, a dog", "owl dog"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.50", "3.50"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("couldntve", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("hes here", "he's here"),
        ("joe's", "joe 's"),
        ("1/2", "1 2"),
        ("t-shirt", "t shirt"),
        ("t - shirt", "t shirt"),
        ("t -shirt-", "t shirt"),  # beside a space it is dropped, everywhere in the text
        ("well-known - man", "wellknown man"),
        ("yes\nsir\t!", "yes sir"),
        ("what?", "what"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    # of ten people k said it: k leave-one-outs see k - 1 agreeing others, 10 - k see k
    [(0, 0.0), (1, 9 / 10 / 3), (2, (2 * 1 + 8 * 2) / 30), (3, (3 * 2 + 7 * 3) / 30), (4, 1.0), (10, 1.0)],
)
def test_ten_people_are_counted_as_the_benchmark_does(agreeing: int, expected: float) -> None:
    answers = ["Stop."] * agreeing + [f"other {k}" for k in range(10 - agreeing)]
    assert accuracy("the STOP", answers) == pytest.approx(expected)


def test_fewer_are_alternatives() -> None:
    assert accuracy("two", ["2", "three"]) == 1
    assert accuracy("four", ["2", "three"]) == 0
    assert accuracy("", [""]) == 0
    assert accuracy("x", []) == 0
