"""What the policy's text means: a box request, an answer, or neither yet.

Conventions:

- A box is ``{"bbox_2d": [x1, y1, x2, y2]}``, in whatever space the backbone speaks. Further keys may
  follow or precede: ``"image": k`` names an image, counted from 0; ``"zoom": z`` says by how much each
  side of the crop is enlarged, in place of the zoom rule; all others are ignored.
- The INNERMOST object around a ``bbox_2d`` counts, for it is the first one to close. So Qwen's list
  style, a fenced ``[{"bbox_2d": [...], "label": "..."}, ...]``, ends its turn at the first
  object: the crop follows it, before list and fence are closed.
- Reasoning stands in ``<think></think>``, the answer in ``<answer></answer>``. A span is an
  ``<answer>`` and the ``</answer>`` after it with no other answer tag between them.
- A box inside ``<answer>`` is a request like any other.

Every function takes any text without raising, in time linear in its length.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"

LEAST_ZOOM, MOST_ZOOM = 0.25, 8.0  # below 1 a crop is shrunk: a cheap look at something large

# One token may close a box and go on: Qwen has "]}</", "}}" and "},{". So many characters, none of
# them a letter or digit, may stand behind what ends a turn.
_TAIL = 8

_TAG = re.compile(r"</?(?:think|answer)>")
_KEY = re.compile(r"bbox_2d[\"']?\s*:")  # sloppy quotes count: such a box is refused rather than overlooked
_BRACE_OR_QUOTE = re.compile(r'["{}]')
_ESCAPE_OR_QUOTE = re.compile(r'\\.|"', re.DOTALL)
_FLAT_OBJECT = re.compile(r"\{[^{}]*\}")


class RequestFault(StrEnum):
    """Why a box request cannot be understood."""

    JSON = "json"  # the braces match, but what they hold is no JSON
    ARITY = "arity"  # not a list of exactly four
    NUMBER = "number"  # one of the four is no finite number
    IMAGE = "image"  # "image" is no whole number from 0 on
    ZOOM = "zoom"  # "zoom" is no number from LEAST_ZOOM to MOST_ZOOM


@dataclass(frozen=True)
class BoxRequest:
    """The policy wants to look at a region."""

    coords: tuple[float, float, float, float]  # as written; order and bounds are not checked
    image: int = 0
    zoom: float | None = None  # None: not said


@dataclass(frozen=True)
class BadRequest:
    """The policy closed a box that cannot be understood."""

    reason: RequestFault


@dataclass(frozen=True)
class Answer:
    """The policy answered."""

    text: str  # stripped


def may_end_turn(token_text: str) -> bool:
    """Whether a token with this text can complete a box or an answer, so that `parse_turn` is worth a call."""
    return any(token_text[end] == "}" or _may_close_answer(token_text, end) for end in _ends(token_text))


def _may_close_answer(text: str, end: int) -> bool:
    """Whether ``text[end]`` may be the last character of `END_ANSWER`, which may have begun before this text."""
    start = text.rfind("<", 0, end)
    return text[end] == ">" and (start < 0 or text[start : end + 1] == END_ANSWER)


def _ends(text: str) -> range:
    """Places of what may have ended a turn: nothing but `_TAIL` characters that are no letter or digit follows."""
    stop = len(text.rstrip())
    start = stop
    while start > max(0, stop - _TAIL - 1) and not text[start - 1].isalnum():
        start -= 1
    return range(start, stop)


def parse_turn(text: str) -> BoxRequest | BadRequest | Answer | None:
    """Whether the turn ends here, and with what.

    It ends where the text ends in a closed object with the key ``bbox_2d`` or in a closed
    ``<answer>`` span; white space and up to eight characters that are neither letter nor digit may
    follow, since they can belong to the closing token. Braces in a label's string do not
    close anything; a string without its closing quote leaves its object open.

    Args:
        text: everything that the policy wrote in this turn so far.

    Returns:
        None while the turn goes on.
    """
    has_box, has_answer = "bbox_2d" in text, END_ANSWER in text
    if not (has_box or has_answer):
        return None
    for end in _ends(text):
        found: BoxRequest | BadRequest | Answer | None = None
        if has_box and text[end] == "}":
            found = _request_closing_at(text, end)
        elif has_answer and text[end] == ">":
            found = _answer_closing_at(text, end)
        if found is not None:
            return found
    return None


def _answer_closing_at(text: str, end: int) -> Answer | None:
    """The answer whose last character is ``text[end]``."""
    close = end + 1 - len(END_ANSWER)
    if close < 0 or not text.startswith(END_ANSWER, close):
        return None
    start = text.rfind(ANSWER, 0, close)
    if start < 0 or text.find(END_ANSWER, start, close) >= 0:
        return None
    return Answer(text[start + len(ANSWER) : close].strip())


def _request_closing_at(text: str, end: int) -> BoxRequest | BadRequest | None:
    """The request whose closing brace is ``text[end]``."""
    # JSON's strings may hold braces. In what is not quite JSON (an apostrophe, an inch sign) quotes
    # mislead, and plain counting of braces finds the object.
    spans = [_object_closing_at(text, end, strings=True), _object_closing_at(text, end, strings=False)]
    closed = False
    for span in spans:
        if span is None or not _KEY.search(span):
            continue
        try:
            content = _JSON.decode(span)
        except (ValueError, RecursionError):
            closed = closed or _strings_closed(span)
            continue
        return _request(content) if "bbox_2d" in content else None
    return BadRequest(RequestFault.JSON) if closed else None


def _object_closing_at(text: str, end: int, strings: bool) -> str | None:
    """The text from the brace that ``text[end]`` closes up to it; braces in strings are skipped on demand.

    Read backwards, so that quotes and braces in the prose before the object play no part.
    """
    depth, quoted = 0, False
    for match in _BRACE_OR_QUOTE.finditer(text[end::-1]):
        at = end - match.start()
        if text[at] == '"':
            if strings and not _escaped(text, at):
                quoted = not quoted
        elif not quoted:
            depth += 1 if text[at] == "}" else -1
            if depth == 0:
                return text[at : end + 1]
    return None


def _escaped(text: str, at: int) -> bool:
    """Whether an odd number of backslashes stands before a character."""
    start = at
    while start > 0 and text[start - 1] == "\\":
        start -= 1
    return (at - start) % 2 == 1


def _strings_closed(span: str) -> bool:
    """Whether every quote has its partner."""
    return sum(match.group() == '"' for match in _ESCAPE_OR_QUOTE.finditer(span)) % 2 == 0


def _parse_int(digits: str) -> int | float:
    """An integer; a float if it is so long that Python may refuse it."""
    return int(digits) if len(digits) < 20 else float(digits)


_JSON = json.JSONDecoder(parse_int=_parse_int)  # made once: that takes as long as reading a box


def _request(content: dict[str, Any]) -> BoxRequest | BadRequest:
    """The request that a JSON object with the key ``bbox_2d`` makes."""
    coords = content["bbox_2d"]
    if not isinstance(coords, list) or len(coords) != 4:
        return BadRequest(RequestFault.ARITY)
    # bool is an int to isinstance; json.loads lets NaN and Infinity pass.
    if any(type(c) not in (int, float) or not math.isfinite(c) for c in coords):
        return BadRequest(RequestFault.NUMBER)
    image = content.get("image", 0)
    if type(image) is not int or image < 0:
        return BadRequest(RequestFault.IMAGE)
    zoom = content.get("zoom", 1)
    if type(zoom) not in (int, float) or not LEAST_ZOOM <= zoom <= MOST_ZOOM:
        return BadRequest(RequestFault.ZOOM)
    x1, y1, x2, y2 = map(float, coords)
    return BoxRequest((x1, y1, x2, y2), image, float(zoom) if "zoom" in content else None)


def format_box(coords: Sequence[float], image: int | None = None, zoom: float | None = None) -> str:
    """A box as the policy writes it; `parse_turn` gives back the same coordinates.

    Args:
        coords: (x1, y1, x2, y2) in the backbone's space; whole numbers are written without decimals.
        image: which image, counted from 0; None leaves it out, which means the first.
        zoom: by how much each side is enlarged; None leaves it out, which means the zoom rule.

    Raises:
        ValueError: not four finite coordinates, or a zoom that `parse_turn` would not take.
    """
    if len(coords) != 4 or not all(math.isfinite(c) for c in coords):
        raise ValueError(f"Expected `coords` to be four finite numbers, but got {list(coords)}.")
    if zoom is not None and not LEAST_ZOOM <= zoom <= MOST_ZOOM:
        raise ValueError(f"Expected `zoom` to be from {LEAST_ZOOM:g} to {MOST_ZOOM:g}, but got {zoom}.")
    inside = f'"bbox_2d": [{", ".join(map(format_number, coords))}]'
    inside += "" if image is None else f', "image": {image}'
    inside += "" if zoom is None else f', "zoom": {format_number(zoom)}'
    return f"{{{inside}}}"


def format_number(value: float) -> str:
    """A finite number as it stands in a box: without decimals where it is whole."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _spans(text: str) -> list[tuple[int, int]]:
    """Start and stop of what stands between the tags of each answer span."""
    spans, start = [], None
    for tag in _TAG.finditer(text):
        if tag.group() == ANSWER:
            start = tag.end()
        elif tag.group() == END_ANSWER and start is not None:
            spans.append((start, tag.start()))
            start = None
    return spans


def answer_spans(text: str) -> list[str]:
    """What stands in each ``<answer>`` span, unstripped, in order."""
    return [text[start:stop] for start, stop in _spans(text)]


def last_answer(text: str) -> str | None:
    """The last answer span, else the last line that is not empty, else None; stripped."""
    spans = answer_spans(text)
    if spans:
        return spans[-1].strip()
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def ends_in_one_answer(text: str) -> bool:
    """Whether there is exactly one answer span and the text ends in it: the format reward of the authors' code."""
    spans = _spans(text)
    return len(spans) == 1 and spans[0][1] + len(END_ANSWER) == len(text.rstrip())


def well_formed(text: str) -> bool:
    """Whether the text is ``<think>…</think><answer>…</answer>`` and nothing else: the paper's format reward.

    Each tag occurs once, in this order; only white space stands outside.
    """
    tags = list(_TAG.finditer(text))
    if [tag.group() for tag in tags] != [THINK, END_THINK, ANSWER, END_ANSWER]:
        return False
    outside = text[: tags[0].start()] + text[tags[1].end() : tags[2].start()] + text[tags[3].end() :]
    return not outside.strip()


def segments_between_boxes(text: str) -> list[str]:
    """The text before, between and after the boxes, valid or not: one more than there are boxes.

    Unlike in `parse_turn`, boxes with braces inside (a nested object, a brace in a label) are text.
    """
    segments, start = [], 0
    for match in _FLAT_OBJECT.finditer(text):
        if _KEY.search(match.group()):
            segments.append(text[start : match.start()])
            start = match.end()
    return [*segments, text[start:]]
