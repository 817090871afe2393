"""What a teacher wrote, read as a rationale: leniently where only one thing can be meant, else refused with a reason.

Understood although it is not what was asked for: code fences, trailing commas, single quotes, a box in a list or in a
string, boxes written from 0 to 1 where pixels were asked for, reasoning without its tags, words behind the answer.
Refused, for it could mean two things: other than four numbers, corners in the wrong order, a box outside the image,
a zoom out of range, two answers, two boxes with no words between them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from modules.functional.boxes import BoxSpace, check, clip, to_original
from modules.functional.grammar import LEAST_ZOOM, MOST_ZOOM, Answer, BoxRequest, answer_spans, format_box, parse_turn
from modules.trajectory import Box, Region, Step

Size = tuple[int, int]  # (H, W)

_FENCE = re.compile(r"\A```\w*\s*\n(.*)\n\s*```\Z", re.DOTALL)
_BOX = re.compile(r"(?:```\w*\s*)?\[?\s*(\{[^{}]*bbox_2d[^{}]*\})\s*,?\s*\]?(?:\s*```)?")
_COORDS = re.compile(r"""bbox_2d["']?\s*:\s*(\[\s*\[[^][]*\]\s*\]|\[[^][]*\]|"[^"]*"|'[^']*')""")
_IMAGE = re.compile(r"""["']image["']\s*:\s*(\d{1,4})\b""")
_ZOOM = re.compile(r"""["']zoom["']\s*:\s*([^,}]*)""")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_TAG = re.compile(r"</?(?:think|answer)>")


class Reason(StrEnum):
    """Why a question or a draft did not become a sample; the word in ``rejected.jsonl`` and in the report."""

    BAD_ROW = "bad_row"  # the source's row cannot be read
    BAD_IMAGE = "bad_image"  # missing, damaged, or a box of the row lies outside it
    NO_IMAGE = "no_image"
    NO_ANSWER = "no_answer"  # no right answer is known
    DUPLICATE_QUESTION = "duplicate_question"  # the same question about the same image
    NEAR_DUPLICATE = "near_duplicate"  # of an image that came before
    CONTAMINATED = "contaminated"  # the image, or nearly, is in a benchmark
    NO_REPLY = "no_reply"  # an endpoint failed: another run asks again
    UNFINISHED = "unfinished"  # a limit ended it
    MALFORMED = "malformed"
    BAD_BOX = "bad_box"  # not four numbers, corners in the wrong order, outside the image
    BOX_SIZE = "box_size"  # too small to show anything, or nearly the whole image
    REPEATED_BOX = "repeated_box"
    FEW_CROPS = "few_crops"
    MANY_CROPS = "many_crops"
    WRONG_ANSWER = "wrong_answer"
    SEMANTIC_UNIT = "semantic_unit"  # nothing is recognised in a crop
    INCOHERENT = "incoherent"  # or redundant


class Rejected(Exception):
    """Something that does not become a sample: why, in a word and in a sentence, and what was written."""

    def __init__(self, reason: Reason, detail: str, text: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.text = text


@dataclass(frozen=True)
class Draft:
    """A rationale that has not been judged yet."""

    steps: tuple[Step, ...]  # boxes in original pixels
    answer: str
    text: str  # as it was written

    @property
    def regions(self) -> tuple[Region, ...]:
        """What is looked at, in order."""
        return tuple(step.region for step in self.steps if step.region is not None)


def read_draft(text: str, sizes: Sequence[Size], sent: Sequence[Size], space: BoxSpace) -> Draft:
    """Read what a teacher wrote.

    Args:
        text: reasoning with boxes in it, and an ``<answer>``.
        sizes: of the original images.
        sent: of the images as the teacher was shown them.
        space: the space that boxes were asked for in.

    Raises:
        Rejected: it cannot be read as one rationale.
    """
    body = text.strip()
    if fence := _FENCE.match(body):
        body = fence[1]
    pieces, requests = _cut(body)
    space = _space([request.coords for request in requests], space)
    return assemble(pieces, [_region(request, sizes, sent, space) for request in requests], text)


def assemble(pieces: Sequence[str], regions: Sequence[Region], text: str) -> Draft:
    """A draft from its pieces, tags still in them.

    Args:
        pieces: what stands between the boxes: one more than there are regions.
        regions: in original pixels.
        text: all that was written.

    Raises:
        Rejected: tags that are not where they belong; no words, or not one answer.
    """
    answer = _answer("".join(pieces))
    rounded = [
        replace(region, box=(round(x1, 2), round(y1, 2), round(x2, 2), round(y2, 2)))
        for region in regions
        for x1, y1, x2, y2 in [region.box]
    ]
    return Draft(steps_of(_reasoning(pieces), rounded, answer), answer, text)


def steps_of(words: Sequence[str], regions: Sequence[Region], answer: str) -> tuple[Step, ...]:
    """Steps in the one form that policies learn from: ``<think>words box words …</think><answer>…</answer>``.

    Args:
        words: one piece more than there are regions; the k-th region is looked at after the k-th piece.
        regions: in original pixels.
        answer: what is answered.

    Raises:
        Rejected: a piece has no words, or would be read as something else than it is.
    """
    pieces = [piece.strip() for piece in words]
    for k, piece in enumerate(pieces):
        if not re.search(r"\w", piece):
            what = f"box {k + 1}" if k < len(regions) else "the answer"
            raise Rejected(Reason.MALFORMED, f"expected words before {what}, found none")
    opened = ["<think>" + pieces[0], *pieces[1:]]
    looks = [Step(piece + " ", region) for piece, region in zip(opened, regions, strict=False)]
    for step in looks:
        assert step.region is not None
        read = parse_turn(step.text + format_box(step.region.box))
        if not isinstance(read, BoxRequest) or read.coords != step.region.box or parse_turn(step.text) is not None:
            raise Rejected(Reason.MALFORMED, f"{step.text[-60:]!r} would not be read as words before a box")
    final = f"{opened[-1]}</think><answer>{answer}</answer>"
    if parse_turn(final) != Answer(answer):
        raise Rejected(Reason.MALFORMED, f"the answer {answer[:60]!r} would not be read as it is")
    return (*looks, Step(final))


def _cut(body: str) -> tuple[list[str], list[BoxRequest]]:
    """The words between the boxes, and the boxes."""
    pieces, requests, start = [], [], 0
    for match in _BOX.finditer(body):
        pieces.append(body[start : match.start()])
        requests.append(_request(match[1]))
        start = match.end()
    pieces.append(body[start:])
    if stray := next((piece for piece in pieces if "bbox_2d" in piece), None):
        at = stray.index("bbox_2d")
        raise Rejected(Reason.MALFORMED, f"a box that cannot be read: {stray[max(0, at - 10) : at + 60]!r}")
    return pieces, requests


def _request(written: str) -> BoxRequest:
    """A box, with the slips that leave no doubt."""
    found = _COORDS.search(written)
    inside = found[1].strip("[]\"' \n\t") if found else ""
    numbers = [number for number in re.split(r"[\s,]+", inside) if number]
    if len(numbers) != 4 or not all(_NUMBER.fullmatch(number) for number in numbers):
        raise Rejected(Reason.BAD_BOX, f"expected four numbers, found {written[:100]!r}")
    x1, y1, x2, y2 = map(float, numbers)
    image = _IMAGE.search(written)
    return BoxRequest((x1, y1, x2, y2), int(image[1]) if image else 0, _zoom(written))


def _zoom(written: str) -> float | None:
    """By how much the box's crop is to be enlarged; None if that was not said."""
    if not (found := _ZOOM.search(written)):
        return None
    said = found[1].strip("\"' \n\t")
    if not _NUMBER.fullmatch(said) or not LEAST_ZOOM <= float(said) <= MOST_ZOOM:
        raise Rejected(Reason.BAD_BOX, f"expected a zoom from {LEAST_ZOOM:g} to {MOST_ZOOM:g}, found {written[:100]!r}")
    return float(said)


def _space(boxes: Sequence[Box], asked: BoxSpace) -> BoxSpace:
    """The space that all boxes of a reply were written in; no other takes fractions of one for a box of any size."""
    small = all(abs(c) <= 1 for box in boxes for c in box)
    return BoxSpace("unit") if boxes and small else asked


def _region(request: BoxRequest, sizes: Sequence[Size], sent: Sequence[Size], space: BoxSpace) -> Region:
    if request.image >= len(sizes):
        raise Rejected(Reason.BAD_BOX, f"expected one of {len(sizes)} images, found image {request.image}")
    size, shown = sizes[request.image], sent[request.image]
    box = to_original(request.coords, space, size, shown)
    fault = check(box, size, tolerance=max(size[0] / shown[0], size[1] / shown[1], 1.0))
    if fault is not None:
        raise Rejected(Reason.BAD_BOX, f"{list(request.coords)} ({space.kind}): {fault}")
    return Region(clip(box, size), request.image, request.zoom)


def _answer(body: str) -> str:
    spans = answer_spans(body)
    if len(spans) != 1 or not spans[0].strip():
        raise Rejected(Reason.MALFORMED, f"expected one answer in <answer></answer>, found {len(spans)}")
    return spans[0].strip()


def _reasoning(pieces: Sequence[str]) -> list[str]:
    """The words of each piece without tags.

    Raises:
        Rejected: tags that are not where they belong.
    """
    *before, last = pieces
    if any("answer>" in piece for piece in before):
        raise Rejected(Reason.MALFORMED, "expected the answer after the last box, found it before")
    last = last[: last.index("<answer>")]
    first = before[0] if before else last
    opened = first.lstrip().startswith("<think>")
    words = [*before, last]
    words[0] = words[0].lstrip().removeprefix("<think>") if opened else words[0]
    words[-1] = words[-1].rstrip().removesuffix("</think>")
    if stray := next((found for piece in words if (found := _TAG.search(piece))), None):
        raise Rejected(Reason.MALFORMED, f"expected no {stray[0]} in the middle of the reasoning")
    return words
