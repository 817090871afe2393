"""What all benchmarks share: a row, a score, and which option a response names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class ScoreError(ValueError):
    """A file of predictions or annotations cannot be scored; the message names file and row."""


@dataclass(frozen=True)
class Row:
    """One prediction or annotation.

    Attributes:
        where: file and row, for messages.
        id: the question's id, if the file has one.
        fields: what the file holds for it.
        source: the data set that it is of, where the file says so (our own predictions do).
    """

    where: str
    id: str | None
    fields: Mapping[str, Any]
    source: str | None = None

    def value(self, *names: str) -> Any:
        """The first of these fields that is there.

        Raises:
            ScoreError: if none is.
        """
        for name in names:
            if name in self.fields:
                return self.fields[name]
        wanted = " or ".join(f"`{name}`" for name in names)
        raise ScoreError(f"Expected {self.where} to have {wanted}, but got {keys(self.fields)}.")

    def text(self, *names: str) -> str:
        """The same, as a text.

        Raises:
            ScoreError: if none is there, or the first is no text.
        """
        value = self.value(*names)
        if not isinstance(value, str):
            wanted = " or ".join(f"`{name}`" for name in names)
            raise ScoreError(f"Expected {wanted} of {self.where} to be a text, but got {value!r}.")
        return value

    def joined(self, annotation: Row) -> Row:
        """This row with the fields of the annotation, which count where both have one."""
        return Row(self.where, self.id, {**self.fields, **annotation.fields}, self.source)


@dataclass(frozen=True)
class Score:
    """What a benchmark reports.

    Attributes:
        n: questions.
        accuracy: share of them that is right.
        breakdown: further values by name; fractions unless the benchmark counts in points.
        extra: the main score where it is not an accuracy, and counts that belong beside the accuracy.
        values: what each prediction earned, 0 to 1, in the order of the predictions.
        measure: of what the mean of the values is: accuracy, or the name of one in ``extra``.
    """

    n: int
    accuracy: float
    breakdown: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    values: tuple[float, ...] = ()
    measure: str = "accuracy"


def keys(fields: Mapping[str, Any]) -> str:
    """The first field names, for messages."""
    names = ", ".join(list(fields)[:8])
    return f"only: {names}" if names else "nothing"


def earned(right: Iterable[bool]) -> tuple[float, ...]:
    """`Score.values` of a benchmark in which an answer is right or wrong."""
    return tuple(map(float, right))


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean, of truths their share; 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def shares(right: Sequence[float], groups: Sequence[Iterable[str]]) -> dict[str, float]:
    """Accuracy by group; a question may be in several."""
    members: dict[str, list[float]] = {}
    for correct, names in zip(right, groups, strict=True):
        for name in names:
            members.setdefault(name, []).append(correct)
    return {name: mean(values) for name, values in sorted(members.items())}


def by_id(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by id.

    Raises:
        ScoreError: if one has no id, or two have the same.
    """
    found: dict[str, Row] = {}
    for row in rows:
        if row.id is None:
            raise ScoreError(f"Expected {row.where} to have an id, but got {keys(row.fields)}.")
        if row.id in found:
            raise ScoreError(f"Expected every id once, but got {row.id!r} in {found[row.id].where} and in {row.where}.")
        found[row.id] = row
    return found


def annotated(predictions: Sequence[Row], annotations: Sequence[Row] | None) -> list[Row]:
    """Predictions with the fields of the annotation of the same id; as they are if there are no annotations.

    Raises:
        ScoreError: if an id is missing, is there twice, or is not annotated.
    """
    if annotations is None:
        if any(row.id is not None for row in predictions):
            by_id([row for row in predictions if row.id is not None])
        return list(predictions)
    known = by_id(annotations)
    joined = []
    for key, row in by_id(predictions).items():
        if key not in known:
            file = annotations[0].where.split(",")[0]
            raise ScoreError(f"Expected the question of {row.where} in the annotations {file}, but it is not there.")
        joined.append(row.joined(known[key]))
    return joined


_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_WHOLE = re.compile(r"\(?([A-Za-z])[).:]*")
_FRONT = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[).:](?=\s))\s*\S")
_SAID = re.compile(r"\b(?:answer|option)(?:\s+is)?\s*:?\s*(?:\(([A-Za-z])\)|([A-Z])(?![\w']))", re.IGNORECASE)
_OPTION = re.compile(r"(?:\(([A-Za-z])\)|(?:(?<=\n)|^)([A-Z])[.):])\s*", re.MULTILINE)


def options(text: str) -> list[str]:
    """Option texts of a question that lists them as "(A) rubber", or line by line as "A. rubber".

    A last line that says how to answer is not part of an option.
    """
    marks: list[re.Match[str]] = []
    for mark in _OPTION.finditer(text):
        place = ord((mark.group(1) or mark.group(2)).upper()) - ord("A")
        if place == 0:
            marks = [mark]
        elif place == len(marks):
            marks.append(mark)
    ends = [*(mark.start() for mark in marks[1:]), len(text)]  # one too many where there are no options
    spans = [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=False)]
    return [(span.splitlines() or [""])[0].strip() for span in spans]


def choice(response: str, choices: Sequence[str], count: int | None = None) -> int | None:
    """Which option a response names, from 0; None if none.

    In this order: the last ``<answer>`` alone counts, if there is one; a single letter; an option's exact text;
    a letter in front, as in "(B) red" or "B. red"; the last "the answer is B". A letter inside a word, or an
    article, is none.

    Args:
        response: what the model wrote.
        choices: texts of the options; may be empty if ``count`` is given.
        count: number of options, if not that of the texts.
    """
    count = len(choices) if count is None else count
    answers = _ANSWER.findall(response)
    text = (answers[-1] if answers else response).strip().replace("*", "").strip()
    if found := _WHOLE.fullmatch(text):
        return _index(found.group(1), count)
    plain = _plain(text)
    for index, option in enumerate(choices):
        if plain and plain == _plain(option):
            return index
    if found := _FRONT.match(text):
        return _index(found.group(1) or found.group(2), count)
    said = [match for match in _SAID.finditer(text) if match.group(1) or match.group(2).isupper()]
    return _index(said[-1].group(1) or said[-1].group(2), count) if said else None


def letter_index(label: str) -> int | None:
    """0 for "A", "a", "(a)" or "A."; None if it is no letter."""
    found = _WHOLE.fullmatch(label.strip())
    return _index(found.group(1), 26) if found else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _index(letter: str, count: int) -> int | None:
    index = ord(letter.upper()) - ord("A")
    return index if index < count else None
