"""MME against calculation.py of the benchmark's eval_tool."""

from __future__ import annotations

from pathlib import Path

import pytest

from modules.evaluation import ScoreError, rescore
from modules.evaluation.mme import COGNITION, PERCEPTION, says


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("Yes", "yes"), ("YES!", "yes"), ("  no", "no"), ("Not at all", "no"), ("I don't know", "other"),
        ("Ye", "other"), (" Yes", "yes"), ("  Yes", "other"),  # four characters, of which the word needs three
        ("unknown", "other"), ("", "other"),
    ],
)  # fmt: skip
def test_only_the_first_four_characters_count(response: str, said: str) -> None:
    assert says(response) == said


def lines(*pairs: tuple[str, str]) -> str:
    return "".join(f"{n // 2}.jpg\tIs it? Please answer yes or no.\t{a}\t{b}\n" for n, (a, b) in enumerate(pairs))


def test_a_folder_of_categories(tmp_path: Path) -> None:
    """Two lines an image; a category's score is accuracy and accuracy+ in percent, added."""
    good = lines(("Yes", "yes"), ("No", "no"))
    for name in (*PERCEPTION, *COGNITION):
        (tmp_path / f"{name}.txt").write_text(good)
    half = lines(("Yes", "Yes, it is"), ("No", "Yes"), ("Yes", "yes"), ("No", "No."))
    (tmp_path / "count.txt").write_text(half)
    (tmp_path / "code_reasoning.txt").write_text(lines(("Yes", "perhaps"), ("No", "no")))

    score = rescore("mme", tmp_path)

    assert score["n"] == 12 * 2 + 4 + 2
    assert score["accuracy"] == (12 * 2 + 3 + 1) / 30
    breakdown = score["breakdown"]
    assert (breakdown["count/accuracy"], breakdown["count/accuracy_plus"]) == (3 / 4, 1 / 2)
    assert breakdown["count/score"] == 75 + 50
    assert breakdown["code_reasoning/score"] == 50 + 0
    assert (breakdown["perception"], breakdown["cognition"]) == (9 * 200 + 125, 3 * 200 + 50)
    assert score["score"] == breakdown["perception"] + breakdown["cognition"]
    assert score["other"] == 1
    assert "categories_missing" not in score


def test_one_category_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "OCR.txt").write_text(lines(("Yes", "yes"), ("No", "yes")).replace("\n", "\r\n"))

    score = rescore("mme", tmp_path / "OCR.txt")

    assert (score["accuracy"], score["score"], score["breakdown"]["OCR/accuracy_plus"]) == (1 / 2, 50, 0)
    assert len(score["categories_missing"]) == 13


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("count.txt", lines(("Yes", "yes")), "two questions an image, .*after row 1"),
        ("count.txt", "a.jpg\tIs it?\tYes\n", "row 1 to be image, question"),
        ("count.txt", lines(("Yes", "yes"), ("Maybe", "yes")), r"row 2 to be Yes or No, but got 'maybe'"),
        ("answers.txt", lines(("Yes", "yes"), ("No", "no")), "named as its category"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ScoreError, match=words):
        rescore("mme", tmp_path / name)


def test_a_folder_without_categories(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match=r"existence\.txt"):
        rescore("mme", tmp_path)
