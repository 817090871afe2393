"""TextVQA's accuracy over ten people, and DocVQA's ANLS."""

from __future__ import annotations

import pytest

from modules.evaluation.common import Row, ScoreError
from modules.evaluation.vqa import docvqa, textvqa


def row(number: int, **fields: object) -> Row:
    return Row(f"row {number}", str(number), fields)


def test_textvqa_leaves_each_person_out_once() -> None:
    # m4c_evaluators.py of mmf: 2 of 10 agree: the 2 have one other that does (1/3), the 8 have two (2/3)
    people = ["Stop!", "stop"] + [f"other {k}" for k in "abcdefgh"]
    scored = textvqa([row(1, answer="the stop")], [row(1, answers=people)])
    assert scored.accuracy == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert textvqa([row(1, answer="STOP")], [row(1, answers=["stop"] * 4 + ["go"] * 6)]).values == (pytest.approx(1.0),)


def test_docvqa_is_a_similarity_with_a_threshold() -> None:
    # one of 5 characters differs: 0.8; 3 of 5 differ: 0.4, below 0.5, so 0; the best alternative counts
    said = [row(1, answer="Pages"), row(2, answer="pxxxs"), row(3, answer="12  May"), row(4, answer="")]
    known = [
        *(row(1, answers=["page1", "book"]), row(2, answers=["pages"]), row(3, answers=["12 may"])),
        row(4, answers=["x"]),
    ]
    scored = docvqa(said, known)
    assert scored.values == (pytest.approx(0.8), 0.0, 1.0, 0.0)
    assert scored.measure == "anls"
    assert scored.extra["anls"] == pytest.approx(0.45)
    assert scored.accuracy == 0.25


def test_anls_by_kind_of_question() -> None:
    kinds = [["table/list"], ["table/list", "form"]]
    said = [row(k, answer=("yes", "no")[k], answers=["yes"], question_types=kinds[k]) for k in range(2)]
    assert docvqa(said, None).breakdown == {"table/list": 0.5, "form": 0.0}


def test_what_was_answered_is_not_replaced_by_the_annotation() -> None:
    assert docvqa([row(1, answer="no")], [row(1, answer="yes", answers=["yes"])]).values == (0.0,)


@pytest.mark.parametrize("answers", [[], "yes", [1]])
def test_answers_that_are_none_are_named(answers: object) -> None:
    with pytest.raises(ScoreError, match="`answers` of row 1 to be a list of texts"):
        textvqa([row(1, answer="yes", answers=answers)], None)
