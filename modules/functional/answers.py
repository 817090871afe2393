"""Normalise and match short answers, for training rewards; benchmarks bring their own scorers.

"/" is never split: it stands in fractions and dates. Where a data set separates alternatives by
it, whoever reads that data set splits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_WORDS)}
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b")

_DASHES = str.maketrans("\u2010\u2011\u2012\u2013\u2212", "-----")  # typographic hyphens, en dash, minus sign
_ARTICLE = re.compile(r"\b(?:an?|the)\s+(?=\w)")  # "A" alone, or before a comma, is a name
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_DROPPED = re.compile(r"['\u2018\u2019]|\.(?!\d)")  # apostrophes; full stops, but not decimal points
_SPACED = re.compile(r"[,;:!?\"\u201c\u201d`()\[\]{}]|-(?!\d)")  # a hyphen before a digit may be a minus
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)")

_LETTER = re.compile(r"\(?([A-Za-z])[).:]?\.?")
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[).:]\s)\s*\S")


def normalise(text: str) -> str:
    """Lower case, digits for zero to ten, no articles, thousands separators or prose punctuation, single spaces.

    What changes the meaning of a number or formula stays: decimal points, minus signs before
    digits, "/", "%", "+", "=" and the like. A text of nothing but punctuation stays as it is.
    """
    plain = text.strip().lower().translate(_DASHES)
    bare = _ARTICLE.sub("", plain)
    bare = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), bare)
    bare = _SPACED.sub(" ", _DROPPED.sub("", bare))
    bare = _NUMBER_WORD.sub(lambda match: _NUMBER_WORDS[match.group()], bare)
    return " ".join(bare.split()) or plain


def same(a: str, b: str) -> bool:
    """Whether two texts are equal once normalised: numbers as numbers, all else as text."""
    a, b = normalise(a), normalise(b)
    if _NUMBER.fullmatch(a) and _NUMBER.fullmatch(b):
        return Decimal(a) == Decimal(b)
    return a == b and a != ""


def option(text: str, choices: Sequence[str]) -> int | None:
    """Which option a text names: "B", "(B)", "B.", the option's exact text, or "B. text"; None if none."""
    text = text.strip()
    letter = _LETTER.fullmatch(text)
    if letter is not None and (index := _letter_index(letter.group(1))) < len(choices):
        return index
    for index, choice in enumerate(choices):
        if same(text, choice):
            return index
    # Only now, for an option may itself look like "A. Lincoln".
    letter = _LETTER_AND_TEXT.match(text)
    if letter is not None and (index := _letter_index(letter.group(1) or letter.group(2))) < len(choices):
        return index
    return None


def option_letter(text: str) -> str | None:
    """The option's letter that a text begins with or is, in upper case: of "B", "(b)", "B." and "B. text"."""
    found = _LETTER.fullmatch(text.strip()) or _LETTER_AND_TEXT.match(text.strip())
    return None if found is None else next(group for group in found.groups() if group).upper()


def _letter_index(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def matches(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> bool:
    """Whether a prediction is one of the right answers.

    Args:
        prediction: what the policy answered.
        answers: alternatives, each of them right. With ``choices``, letters or option texts.
        choices: the options of a multiple-choice question, A first. A prediction that names one of
            them is right if an answer names the same; one that names none is compared as text.
    """
    picked = option(prediction, choices)
    if picked is not None:
        return any(option(answer, choices) == picked for answer in answers)
    return any(same(prediction, answer) for answer in answers)
