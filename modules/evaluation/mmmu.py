"""MMMU: accuracy over questions, by subject and discipline.

Rule: eval/main_eval_only.py and eval/eval_utils.py of MMMU-Benchmark/MMMU. A multiple-choice prediction is right if it
is the letter. Of an open one, key phrases and numbers are read out; a number is right if it is equal to two decimals, a
text if the answer stands in it. Raw responses (``output.json``) are read as by parse_multi_choice_response there, which
guesses where it finds no option; here that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from modules.evaluation.common import Row, Score, ScoreError, annotated, choice, earned, mean, shares

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
DISCIPLINE = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # thousands separated by commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def normalise(text: str) -> list[str | float]:
    """A number rounded to two decimals, or the text in lower case; a single character only with a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def parse_open(response: str) -> list[str | float]:
    """What an open response may mean: the tail behind "is", "answer", "=" and the like, and the numbers in it."""
    response = response.strip().strip(".").lower()
    parts = response.split("\n")  # sentences end at a capital letter, of which none is left
    tails = []
    for number, part in enumerate(parts, 1):
        indicators = (*_INDICATORS, "=") if number == len(parts) else _INDICATORS
        found = [part.split(indicator)[-1].strip() for indicator in indicators if indicator in part]
        shortest = _shortest(found)
        if shortest and shortest not in _TRIVIAL:
            tails.append(shortest)
    tails = tails or [response]
    numbers = [match for tail in tails for pattern in _NUMBERS for match in pattern.findall(tail)]
    return [value for text in (*tails, *numbers) for value in normalise(text)]


def right_open(answers: Sequence[str], response: str) -> bool:
    """Whether an open response is right."""
    wanted = [value for answer in answers for value in normalise(answer)]
    for value in parse_open(response):
        if isinstance(value, float) and value in wanted:
            return True
        if isinstance(value, str) and any(isinstance(answer, str) and answer in value for answer in wanted):
            return True
    return False


def score(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> Score:
    """Score ``{id: prediction}`` with answer_dict_val.json, or our own predictions with it."""
    if annotations is None and any("question_type" not in row.fields for row in predictions):
        raise ScoreError("Expected --annotations with MMMU's answer_dict_val.json, for predictions hold no answers.")
    rows = annotated(predictions, annotations)
    subjects = [_subject(row) for row in rows]
    right = [_right(row) for row in rows]
    return Score(
        len(rows), mean(right), shares(right, [(name, DISCIPLINE[name]) for name in subjects]), values=earned(right)
    )


def _shortest(found: Sequence[str]) -> str:
    """The first of the shortest; an empty one gives way to the next, as in the official loop."""
    best = ""
    for text in found:
        if not best or len(text) < len(best):
            best = text
    return best


def _right(row: Row) -> bool:
    answers = _answers(row)
    kind = row.text("question_type")
    if kind != "multiple-choice":
        return right_open(answers, row.text("prediction", "response"))
    return letter(row) in answers


def letter(row: Row) -> str:
    """The option that a multiple-choice prediction names; empty if none.

    A ``prediction`` is the letter. A raw ``response`` with ``all_choices`` and ``index2ans`` is read by the official
    `parse_choice`, any other by `common.choice`.
    """
    if "prediction" in row.fields:
        return row.text("prediction")
    if "index2ans" in row.fields:
        texts = row.value("index2ans")
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise ScoreError(f"Expected `index2ans` of {row.where} to be option texts by letter, but got {texts!r}.")
        return parse_choice(row.text("response"), texts)
    options = row.fields.get("options")
    texts = options if isinstance(options, list) else ()
    pick = choice(row.text("response"), texts, count=len(texts) or 26)
    return "" if pick is None else chr(ord("A") + pick)


def parse_choice(response: str, texts: Mapping[str, str]) -> str:
    """The option that a raw response names; empty where the official reader guesses at random.

    The last letter in parentheses, else the last letter between blanks, else, of more than five words, the option
    whose text stands last.
    """
    for mark in ",.!?;:'":
        response = response.strip(mark)
    padded = f" {response} "
    for form in ("({})", " {} "):
        found = {name: padded.rfind(form.format(name)) for name in texts if form.format(name) in padded}
        if found:
            return max(found, key=lambda name: found[name])
    if len(padded.split()) <= 5:
        return ""
    places = {name: padded.lower().rfind(text.lower()) for name, text in texts.items()}
    named = {name: place for name, place in places.items() if place >= 0}
    return max(named, key=lambda name: named[name]) if named else ""


def _answers(row: Row) -> list[str]:
    truth = row.value("ground_truth", "answer")
    answers = truth if isinstance(truth, list) else [truth]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ScoreError(f"Expected `ground_truth` of {row.where} to be a text or a list of them, but got {truth!r}.")
    return answers


def _subject(row: Row) -> str:
    subject = "_".join(str(row.id).split("_")[1:-1])
    if subject not in DISCIPLINE:
        raise ScoreError(f"Expected an id such as validation_Accounting_1 in {row.where}, but got {row.id!r}.")
    return subject
