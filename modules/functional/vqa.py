"""The VQA benchmark's own normalisation of short answers, and its accuracy over ten people's answers.

As in the evaluation of VQA (Antol et al., arXiv 1505.00468) and TextVQA (EvalAI), whose quirks are kept, for scores
are compared with those of others: "/" becomes a space, "none" is 0, a missing apostrophe is put back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'  # the benchmark's; commas and question marks have gone before
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset({"a", "an", "the"})
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_WORDS)}
_CONTRACTIONS = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "might've",
    "mightn't",
    "mightn't've",
    "must've",
    "mustn't",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'd've",
    "y'all'll",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]


def _spellings(contraction: str) -> list[str]:
    """The contraction without one or more of its apostrophes."""
    first, *rest = contraction.split("'")
    marks = product(("'", ""), repeat=len(rest))
    spelt = [first + "".join(mark + part for mark, part in zip(kept, rest, strict=True)) for kept in marks]
    return [spelling for spelling in spelt if spelling != contraction]


_APOSTROPHES = {spelling: whole for whole in _CONTRACTIONS for spelling in _spellings(whole)}
PEOPLE = 10  # so many answers to a question, one a person; fewer are alternatives


def normalise(text: str) -> str:
    """Lower case, digits for zero to ten, no articles or punctuation, apostrophes in contractions, single spaces."""
    plain = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").replace("\n", " ").replace("\t", " ")
    plain = plain.strip()
    bare = plain
    for mark in _PUNCTUATION:
        beside_a_space = mark + " " in plain or " " + mark in plain
        bare = bare.replace(mark, "" if beside_a_space else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", bare).split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How many people gave this answer, as the benchmark counts it.

    Args:
        prediction: what was answered.
        answers: ten or more are one a person: the mean, over each person left out, of ``min(1, agreeing others / 3)``.
            Fewer are alternatives, each of them right: 1 if one is equal.
    """
    said = normalise(prediction)
    agree = [normalise(answer) == said for answer in answers]
    if not said:
        return 0.0
    if len(answers) < PEOPLE:
        return float(any(agree))
    total = sum(agree)
    return sum(min(1.0, (total - mine) / 3) for mine in agree) / len(agree)
