"""The files that the authors of VLM-R3 published, read as they are.

Supervised warm-up: a JSON list of ``image_path``, ``question``, ``response_list`` (text segments), ``img_crop_list``
(paths of cut crops; crop i follows segment i). The crops are not opened: each is cut anew, from the original image,
by the box that its segment ends in. That box is in pixels of the image as Qwen2.5-VL resized it.

R-GRPO: a JSON list of ``image_path``, ``question``, ``answer``, ``source``. Some sources separate alternative
answers by "/"; in others (mathematics, dates) it is part of the answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from datamodules.module import VLIRDataModule
from datamodules.pictures import ImageFile
from datamodules.tables import loads
from datamodules.vlir.reader import Record, read_text, require_records
from datamodules.vlir.schema import (
    BadRow,
    DataError,
    Invalid,
    describe,
    expect,
    is_number,
    relative_path,
    required,
    strings,
    text,
)
from modules.functional.boxes import BoxSpace, check, clip, fit_to_grid, to_original
from modules.functional.grammar import BoxRequest, answer_spans, parse_turn
from modules.trajectory import Region, Sample, Step

PATCH = 28  # of Qwen2.5-VL: patches of 14 pixels, merged two by two
SFT_MIN_PIXELS = 4 * PATCH**2  # the limits that the authors' warm-up resized its images within
SFT_MAX_PIXELS = 2048 * PATCH**2

Parse = Callable[[dict[str, Any]], tuple[Sample, Callable[[Sample], Sample]]]


def read_sft(
    path: Path,
    root: Path | None = None,
    limit: int | None = None,
    min_pixels: int = SFT_MIN_PIXELS,
    max_pixels: int = SFT_MAX_PIXELS,
) -> tuple[list[Record], list[BadRow]]:
    """Read a warm-up file: questions with rationales.

    Args:
        path: the JSON file.
        root: where image paths start; the file's folder if None.
        limit: stop after this many usable rows.
        min_pixels: least area of the resized images that the boxes were written on.
        max_pixels: greatest area of these.

    Returns:
        The usable rows, and the others with the reason of each.

    Raises:
        DataError: the file cannot be read, is not a JSON list, or has no usable row.
    """
    return _read(path, root, limit, partial(_sft, min_pixels=min_pixels, max_pixels=max_pixels))


def read_rgrpo(
    path: Path, root: Path | None = None, limit: int | None = None, alternatives: Sequence[str] = ("textvqa",)
) -> tuple[list[Record], list[BadRow]]:
    """Read an R-GRPO file: questions with answers.

    Args:
        path: the JSON file.
        root: where image paths start; the file's folder if None.
        limit: stop after this many usable rows.
        alternatives: sources whose answers are alternatives separated by "/".

    Returns:
        The usable rows, and the others with the reason of each.

    Raises:
        DataError: the file cannot be read, is not a JSON list, or has no usable row.
    """
    return _read(path, root, limit, partial(_rgrpo, alternatives=tuple(alternatives)))


def split_segment(segment: str) -> tuple[str, BoxRequest, str] | None:
    """A segment that ends in a box: what stands before the box, the box, what stands after it.

    Returns:
        None if the segment does not end in a valid box.
    """
    request = parse_turn(segment)
    if not isinstance(request, BoxRequest):
        return None
    opened = (at for at in range(len(segment) - 1, -1, -1) if segment[at] == "{")
    start = next(at for at in opened if parse_turn(segment[at:]) == request)  # not a brace in a label
    closed = (at + 1 for at in range(start, len(segment)) if segment[at] == "}")
    end = next(at for at in closed if parse_turn(segment[start:at]) == request)
    return segment[:start], request, segment[end:]


class AuthorsDataModule(VLIRDataModule):
    """Questions from the authors' files.

    Several files are joined by ":". Bad rows and corrupt images are left out as in `VLIRDataModule`.

    Args:
        train: file or files to train on.
        kind: which of the two forms all files have.
        root: where image paths start; the folder of each file if None. Absolute paths must lie under it.
        val: file or files to validate on, if at all.
        test: file or files to test on.
        predict: file or files to predict on.
        batch_size: questions a training batch and rank.
        val_batch_size: questions a batch in validation, test and prediction; `batch_size` if None.
        group_by_image: whether the training questions of one image are kept adjacent.
        num_workers: processes that decode images; 0 decodes in the main one.
        seed: of the order of the training questions.
        cache_images: whether decoded images are kept in memory; needs `num_workers` 0.
        limit: read at most this many usable rows of each file.
        min_pixels: least area of the resized images that the boxes of `sft` files were written on.
        max_pixels: greatest area of these.
        alternatives: sources of `rgrpo` files whose answers are alternatives separated by "/".
    """

    def __init__(
        self,
        train: str | None,
        kind: Literal["sft", "rgrpo"],
        root: str | None = None,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        group_by_image: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        cache_images: bool = False,
        limit: int | None = None,
        min_pixels: int = SFT_MIN_PIXELS,
        max_pixels: int = SFT_MAX_PIXELS,
        alternatives: Sequence[str] = ("textvqa",),
    ) -> None:
        super().__init__(
            train=_files(train),
            val=_files(val),
            test=_files(test),
            predict=_files(predict),
            root=root,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            group_by_image=group_by_image,
            num_workers=num_workers,
            seed=seed,
            cache_images=cache_images,
            limit=limit,
        )
        self.kind = kind
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.alternatives = tuple(alternatives)

    def read_file(self, path: Path) -> tuple[list[Record], list[BadRow]]:
        if self.kind == "sft":
            return read_sft(path, self.root, self.limit, self.min_pixels, self.max_pixels)
        return read_rgrpo(path, self.root, self.limit, self.alternatives)


def _files(joined: str | None) -> list[str]:
    return [] if joined is None else [path for path in joined.split(":") if path]


def _read(path: Path, root: Path | None, limit: int | None, parse: Parse) -> tuple[list[Record], list[BadRow]]:
    try:
        rows = loads(read_text(path))
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise DataError(f"{path}: expected a JSON list of objects, found no JSON ({where}).") from None
    except Invalid as error:
        raise DataError(f"{path}: expected a JSON list of objects, found no JSON ({error}).") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of objects, found {describe(rows)}.")
    root = path.parent if root is None else root
    records: list[Record] = []
    bad: list[BadRow] = []
    for number, row in enumerate(rows, start=1):
        try:
            row = expect(row, dict, "the row", "an object")
            image = ImageFile(root, _under(root, text(row, "image_path")))
            sample, finish = parse(row)
        except Invalid as error:
            bad.append(BadRow(str(path), number, str(error)))
        else:
            named = replace(sample, id=f"{path.stem}-{number}")
            records.append(Record(named, (image,), str(path), number, finish))
        if limit is not None and len(records) == limit:
            break
    require_records(path, records, bad, "a JSON list of objects")
    return records, bad


def _under(root: Path, path: str) -> str:
    """The path relative to the root; it may be written absolute, if it lies under it."""
    written = PurePosixPath(path)
    inside = written.is_absolute() and written.is_relative_to(root)
    return relative_path(str(written.relative_to(root)) if inside else path, "key `image_path`")


def _rgrpo(row: dict[str, Any], alternatives: tuple[str, ...]) -> tuple[Sample, Callable[[Sample], Sample]]:
    source, answer = text(row, "source"), _answer(required(row, "answer"))
    split = source.lower() in (name.lower() for name in alternatives)
    pieces = [piece.strip() for piece in answer.split("/")] if split else [answer]
    answers = tuple(dict.fromkeys(piece for piece in pieces if piece)) or (answer,)
    return Sample(id="", question=text(row, "question"), answers=answers, source=source), _as_is


def _answer(value: object) -> str:
    """Numbers are taken as their text: the published files have both."""
    if is_number(value):
        return str(value)
    answer = expect(value, str, "key `answer`", "a string or a number").strip()
    if not answer:
        raise Invalid("key `answer`: expected an answer, found a blank string")
    return answer


def _sft(row: dict[str, Any], min_pixels: int, max_pixels: int) -> tuple[Sample, Callable[[Sample], Sample]]:
    question, segments, crops = text(row, "question"), strings(row, "response_list"), strings(row, "img_crop_list")
    if len(segments) != len(crops) + 1:
        raise Invalid(
            f"key `response_list`: expected one segment more than there are crops ({len(crops)}), found {len(segments)}"
        )
    texts: list[str] = []
    requests: list[BoxRequest] = []
    carried = ""  # what closes the box's surroundings (a list, a fence) comes after the crop, as in a rollout
    for i, segment in enumerate(segments[:-1]):
        parts = split_segment(segment)
        if parts is None:
            raise Invalid(f"key `response_list[{i}]`: expected it to end in a box, found {segment[-60:]!r}")
        before, request, after = parts
        if request.image != 0:
            raise Invalid(f"key `response_list[{i}]`: expected a box on the only image, found image {request.image}")
        texts.append(carried + before)
        requests.append(request)
        carried = after.strip()
    last = segments[-1].rstrip()
    if isinstance(parse_turn(last), BoxRequest):
        raise Invalid(f"key `response_list[{len(crops)}]`: expected no box where no crop follows, found {last[-60:]!r}")
    sample = Sample(id="", question=question, answers=_spans(last), source="vlir")
    finish = partial(
        _place, texts=(*texts, carried + last), requests=tuple(requests), min_pixels=min_pixels, max_pixels=max_pixels
    )
    return sample, finish


def _spans(segment: str) -> tuple[str, ...]:
    spans = answer_spans(segment)
    return (spans[-1].strip(),) if spans else ()


def _place(
    sample: Sample, texts: tuple[str, ...], requests: tuple[BoxRequest, ...], min_pixels: int, max_pixels: int
) -> Sample:
    """The sample with its rationale, the boxes mapped from resized to original pixels.

    Raises:
        Invalid: a box that is degenerate or reaches outside, an image too long to be resized.
    """
    height, width = sample.images[0].shape[-2:]
    try:
        resized = fit_to_grid(height, width, PATCH, min_pixels, max_pixels)
    except ValueError as error:
        raise Invalid(f"key `image_path`: {error}") from None
    regions = []
    for i, request in enumerate(requests):
        box = to_original(request.coords, BoxSpace("resized"), (height, width), resized)
        # One unit of what was written may round beyond the border; more is a wrong box.
        fault = check(box, (height, width), tolerance=max(height / resized[0], width / resized[1], 1.0))
        if fault is not None:
            raise Invalid(
                f"key `response_list[{i}]`: expected a box inside the {resized[1]} x {resized[0]} resized image, "
                f"found {list(request.coords)} ({fault.value})"
            )
        regions.append(Region(clip(box, (height, width)), zoom=request.zoom))
    *steps, last = texts
    looks = [Step(words, region) for words, region in zip(steps, regions, strict=True)]
    return replace(sample, rationale=(*looks, Step(last)))


def _as_is(sample: Sample) -> Sample:
    return sample
