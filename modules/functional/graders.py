"""Kinds of answers, and how each is compared with what is right.

Every grader takes any text without raising, in bounded time, and is 0 for texts longer than `MAX_LENGTH`. None splits
at "/", which stands in fractions and dates. What is right is given as alternatives: the best of them counts.
Mathematical expressions need a computer algebra system and are compared in `modules.rewards.mathematics`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

from modules.functional import vqa
from modules.functional.answers import matches, normalise, option_letter, same

Kind = Literal["choice", "exact", "vqa", "anls", "number", "math", "list", "yesno"]
MAX_LENGTH = 1_000  # characters; an answer is a phrase, and no grader may take long

SOURCES: dict[str, Kind] = {  # lower case; how the benchmarks made of these data sets are scored
    "mmk12": "math",
    "textvqa": "vqa",
    "vqav2": "vqa",
    "okvqa": "vqa",
    "docvqa": "anls",
    "infographicsvqa": "anls",
    "infographicvqa": "anls",
    "infovqa": "anls",
    "chartqa": "number",
    "pope": "yesno",
    "mme": "yesno",
}

_LATEX = re.compile(r"\\[a-zA-Z]+|\$[^$]+\$|\^\{?\w|_\{")  # "$5" and "file_name" are none
_LETTER = re.compile(r"\(?[A-Z][).]?")
_LISTED = re.compile(r"[\[(]\s*(.*?)\s*[\])]", re.DOTALL)
_EVERY_COMMA = re.compile(r"\s*[,;\n]\s*(?:and\s+)?|\s+and\s+")
_SPACED_COMMA = re.compile(r"\s*(?:;|\n|,\s)\s*(?:and\s+)?|\s+and\s+")
_YES, _NO = frozenset({"yes", "true"}), frozenset({"no", "false"})

_VALUE = r"[+-]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:e[+-]?\d+)?"
_QUANTITY = re.compile(rf"([$€£¥])?\s*({_VALUE})(?:\s*/\s*({_VALUE}))?\s*(.{{0,40}})", re.DOTALL)
_SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_UNITS = {
    spelling: unit
    for unit, spellings in {
        "%": "percent percentage",
        "$": "dollar dollars usd",
        "€": "euro euros eur",
        "£": "pound pounds gbp",
        "mm": "millimeter millimeters millimetre millimetres",
        "cm": "centimeter centimeters centimetre centimetres",
        "m": "meter meters metre metres",
        "km": "kilometer kilometers kilometre kilometres",
        "g": "gram grams",
        "kg": "kilogram kilograms",
        "s": "sec secs second seconds",
        "min": "mins minute minutes",
        "h": "hr hrs hour hours",
        "°": "deg degree degrees",
    }.items()
    for spelling in spellings.split()
}


def kind_of(source: str, answers: Sequence[str], choices: Sequence[str]) -> Kind:
    """How a question's answers are compared where nobody says how.

    The first that fits: it has options (``choice``); its ``source`` is one of `SOURCES`; it has ten answers, one a
    person (``vqa``); all answers are a capital letter, as options are named in the question's text (``choice``), yes
    or no (``yesno``), LaTeX (``math``), or bracketed lists (``list``). Else ``exact``, numbers too: a tolerance is
    for whoever knows that the answer was read off a chart.
    """
    if choices:
        return "choice"
    if source.lower() in SOURCES:
        return SOURCES[source.lower()]
    if len(answers) >= vqa.PEOPLE:
        return "vqa"
    forms: tuple[tuple[Kind, Callable[[str], object]], ...] = (
        ("choice", _LETTER.fullmatch),
        ("yesno", lambda answer: normalise(answer) in _YES | _NO),
        ("math", _LATEX.search),
        ("list", lambda answer: answer.startswith("[") and answer.endswith("]")),
    )
    return next((kind for kind, fits in forms if answers and all(fits(a.strip()) for a in answers)), "exact")


def grade(
    kind: Kind,
    prediction: str,
    answers: Sequence[str],
    choices: Sequence[str] = (),
    tolerance: float = 0.05,
    threshold: float = 0.5,
) -> float:
    """How right a prediction is, 0 to 1.

    Args:
        kind: how it is compared; all but ``math``.
        prediction: what was answered.
        answers: alternatives, each of them right; for ``vqa`` see `modules.functional.vqa.accuracy`.
        choices: the options of a multiple-choice question.
        tolerance: of ``number``, relative to the right one.
        threshold: of ``anls``, below which a similarity is 0.

    Raises:
        ValueError: if the kind is none of these.
    """
    if len(prediction) > MAX_LENGTH:
        return 0.0
    match kind:
        case "choice":
            return float(choice(prediction, answers, choices))
        case "exact":
            return float(matches(prediction, answers))
        case "vqa":
            return vqa.accuracy(prediction, answers)
        case "anls":
            return max((anls(prediction, answer, threshold) for answer in answers), default=0.0)
        case "number":
            return float(any(number(prediction, answer, tolerance) for answer in answers))
        case "list":
            return float(any(same_list(prediction, answer) for answer in answers))
        case "yesno":
            return float(
                any(yes_or_no(prediction) == verdict for a in answers if (verdict := yes_or_no(a)) is not None)
            )
    raise ValueError(f"Expected `kind` to be one that `grade` knows, but got {kind!r}.")


def choice(prediction: str, answers: Sequence[str], choices: Sequence[str]) -> bool:
    """Whether a prediction names the right option, by its letter or its text.

    Where the options stand in the question only, letters are compared: "(B)" and "B. blue" name B.
    """
    if choices:
        return matches(prediction, answers, choices)
    said = option_letter(prediction)
    named = said is not None and any(said == option_letter(answer) for answer in answers)
    return named or matches(prediction, answers)


def anls(prediction: str, answer: str, threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity, and 0 below a threshold (DocVQA; arXiv 1907.00490).

    Case and runs of white space do not count. Both lengths are those of the texts that are compared.
    """
    a, b = (" ".join(text.lower().split()) for text in (prediction, answer[:MAX_LENGTH]))
    longest = max(len(a), len(b))
    if longest == 0 or min(len(a), len(b)) < threshold * longest:  # the distance is at least the difference in length
        return 0.0
    similarity = 1 - _levenshtein(a, b) / longest
    return similarity if similarity >= threshold else 0.0


def _levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and substitutions from one text to the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def quantity(text: str) -> tuple[float, str] | None:
    """The number that a text is, and its unit ("" if none); None if it is none.

    Thousands separators, fractions, "million" and the like, and a currency before or a unit behind are understood:
    "$1.5 million" is (1500000.0, "$"). Dates and words behind a number that are no unit of one word are not.
    """
    found = _QUANTITY.fullmatch(text.strip().lower().translate(_MINUS))
    if found is None:
        return None
    currency, top, bottom, rest = found.groups()
    words = rest.strip().rstrip(".").split()
    scale = _SCALES.get(words[0]) if words else None
    words = words[1:] if scale else words
    if not top or len(words) > 1 or any(word[0].isdigit() or word[0] in "/.,-+" for word in words):
        return None
    unit = _UNITS.get(words[0], words[0]) if words else currency or ""
    return _finite(top, bottom, scale or 1.0, unit)


_MINUS = str.maketrans("\u2012\u2013\u2212", "---")


def _finite(top: str, bottom: str | None, scale: float, unit: str) -> tuple[float, str] | None:
    try:
        value = float(top.replace(",", "")) * scale
        value = value if bottom is None else value / float(bottom.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
    return (value, unit) if math.isfinite(value) else None


def number(prediction: str, answer: str, tolerance: float = 0.05) -> bool:
    """Whether two numbers differ by no more than ``tolerance`` times the right one, and no unit contradicts.

    ChartQA's relaxed accuracy (arXiv 2203.10244) is 0.05. Units are compared where both have one; a percentage may
    be written as a share. What is no number is compared as text.
    """
    said, right = quantity(prediction), quantity(answer)
    if said is None or right is None:
        return same(prediction, answer)
    if said[1] and right[1] and said[1] != right[1]:
        return False
    readings = [said[0]]
    if (said[1] == "%") != (right[1] == "%"):
        readings.append(said[0] / 100 if said[1] == "%" else said[0] * 100)
    return any(abs(value - right[0]) <= tolerance * abs(right[0]) + 1e-9 * abs(right[0]) for value in readings)


def same_list(prediction: str, answer: str) -> bool:
    """Whether two lists hold the same; in brackets the order counts, else it does not.

    A comma without a space may separate elements or thousands: both readings are tried.
    """
    return any(_same_elements(prediction, answer, separator) for separator in (_EVERY_COMMA, _SPACED_COMMA))


def _same_elements(prediction: str, answer: str, separator: re.Pattern[str]) -> bool:
    listed = _LISTED.fullmatch(answer.strip())
    said, right = (_elements(text, separator) for text in (prediction, answer[:MAX_LENGTH]))
    if len(said) != len(right) or not right:
        return False
    if listed is None:
        said, right = sorted(said), sorted(right)
    return all(a == b for a, b in zip(said, right, strict=True))


def _elements(text: str, separator: re.Pattern[str]) -> list[str]:
    """The normalised elements of a list; numbers in one spelling, empty ones left out."""
    bare = text.strip()
    listed = _LISTED.fullmatch(bare)
    parts = (normalise(part) for part in separator.split(listed.group(1) if listed else bare))
    return [_spelt(part) for part in parts if part]


def _spelt(text: str) -> str:
    found = quantity(text)
    return text if found is None or found[1] else repr(found[0])


def yes_or_no(text: str) -> bool | None:
    """What a text says: by its first word, else by the only one of yes and no in it; None if it does not say.

    "true" is yes, "false" is no.
    """
    words = normalise(text).split()
    if words and words[0] in _YES | _NO:
        return words[0] in _YES
    found = {word in _YES for word in words if word in _YES | _NO}
    return found.pop() if len(found) == 1 else None
