"""The questions of a corpus: read, and rid of everything that nobody should be paid for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path

import torch

from datamodules.pictures import ImageRef
from datamodules.sources.base import Source
from datamodules.vlir.corpus import Refusal
from datamodules.vlir.draft import Reason, Rejected
from datamodules.vlir.fingerprints import Bits, Fingerprint, benchmark_images, fingerprints
from datamodules.vlir.reader import Record
from datamodules.vlir.rules import Question
from datamodules.vlir.schema import DataError, Invalid
from modules.trajectory import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images:
    """Which images are left out.

    Args:
        near_duplicate: perceptual hashes of 256 bits that differ in so many at most are one image; the questions about
            all but the first are left out. Copies, byte for byte, are one image and stay. None: not looked at.
        benchmarks: data sets whose images the corpus may not contain.
        benchmark_folders: folders of images, however deep, that it may not contain either.
        contaminated: as ``near_duplicate``, between the corpus and the benchmarks.
        workers: threads that decode.
    """

    near_duplicate: int | None = 40
    benchmarks: list[Source] = field(default_factory=list)
    benchmark_folders: list[str] = field(default_factory=list)
    contaminated: int = 40
    workers: int = 4


def collect(
    folder: Path, sources: Sequence[Source], images: Images, limit: int | None
) -> tuple[list[Question], list[Refusal]]:
    """The questions that are worth a teacher's time, and the others with the reason of each.

    Args:
        folder: of the corpus; fingerprints are remembered in it.
        sources: of questions with answers.
        images: which images are left out.
        limit: read at most so many rows.

    Raises:
        DataError: a source or a benchmark cannot be read, or no question is left.
    """
    records, refusals = _read(sources, limit)
    prints = fingerprints(
        [image for record in records for image in record.images], folder / "images.json", images.workers
    )
    benchmarks = _benchmarks(folder, images)
    seen, digests, asked = Bits(), dict[str, str](), dict[object, str]()
    questions = []
    for record in records:
        try:
            question = _question(record, prints)
            for image, fingerprint in zip(question.images, question.prints, strict=True):
                _new(str(image), fingerprint, seen, digests, benchmarks, images)
            key = (record.sample.question.strip().lower(), *(f.digest for f in question.prints))
            if key in asked:
                raise Rejected(Reason.DUPLICATE_QUESTION, f"of {asked[key]}")
            asked[key] = record.sample.id
        except Rejected as error:
            sample = record.sample
            refusals.append(Refusal(sample.id, sample.source, record.file, record.row, 0, error))
        else:
            questions.append(question)
    if not questions:
        raise DataError(
            f"Expected questions to write rationales for, but none of {len(records)} is left: {refusals[0].error}."
        )
    return questions, refusals


def _benchmarks(folder: Path, images: Images) -> Bits:
    """The perceptual hashes of what the corpus may not contain."""
    known = benchmark_images(images.benchmarks, images.benchmark_folders)
    found = fingerprints(known, folder / "benchmarks.json", images.workers)
    bits = Bits()
    for image, fingerprint in found.items():
        if isinstance(fingerprint, Fingerprint):
            bits.add(fingerprint.bits, str(image))
    if unread := [why for why in found.values() if isinstance(why, str)]:
        logger.warning("%d images of benchmarks could not be compared with, the first: %s", len(unread), unread[0])
    return bits


def _read(sources: Sequence[Source], limit: int | None) -> tuple[list[Record], list[Refusal]]:
    records: list[Record] = []
    refusals: list[Refusal] = []
    for source in sources:
        rows, bad = source.read()
        records += rows
        refusals += [
            Refusal(f"row {b.row}", source.name, b.file, b.row, 0, Rejected(Reason.BAD_ROW, b.why)) for b in bad
        ]
    return _named(records[:limit]), refusals


def _named(records: Sequence[Record]) -> list[Record]:
    """The records with an id of its own for each; data sets know nothing of each other's."""
    seen: set[str] = set()
    named = []
    for record in records:
        sample = record.sample
        wished = chain(
            [sample.id, f"{sample.source}-{sample.id}"], (f"{sample.source}-{sample.id}-{k}" for k in count(2))
        )
        found = next(name for name in wished if name not in seen)
        seen.add(found)
        named.append(record if found == sample.id else replace(record, sample=replace(sample, id=found)))
    return named


def _question(record: Record, prints: Mapping[ImageRef, Fingerprint | str]) -> Question:
    """A record whose images are known to be good.

    Raises:
        Rejected: they are not, or there is nothing to ask.
    """
    if not record.images:
        raise Rejected(Reason.NO_IMAGE, "there is nothing to look at")
    if not any(answer.strip() for answer in record.sample.answers):
        raise Rejected(Reason.NO_ANSWER, "no right answer is known")
    found = []
    for image in record.images:
        fingerprint = prints[image]
        if isinstance(fingerprint, str):
            raise Rejected(Reason.BAD_IMAGE, fingerprint)
        found.append(fingerprint)
    sample = _placed(record, [fingerprint.size for fingerprint in found])
    return Question(sample, record.images, tuple(found), record.file, record.row)


def _placed(record: Record, sizes: Sequence[tuple[int, int]]) -> Sample:
    """The sample with the boxes that its reader gives it once it sees the images; it needs their sizes alone."""
    blank = tuple(torch.empty(1, dtype=torch.uint8).expand(3, *size) for size in sizes)
    try:
        return replace(record.finish(replace(record.sample, images=blank)), images=(), rationale=())
    except Invalid as error:
        raise Rejected(Reason.BAD_IMAGE, str(error)) from None


def _new(
    name: str, fingerprint: Fingerprint, seen: Bits, digests: dict[str, str], benchmarks: Bits, images: Images
) -> None:
    """Take an image into the corpus.

    Raises:
        Rejected: it is in a benchmark, or nearly the same as one before.
    """
    if fingerprint.digest in digests:
        return
    near = benchmarks.nearest(fingerprint.bits)
    if near is not None and near[1] <= images.contaminated:
        raise Rejected(Reason.CONTAMINATED, f"{name}: {near[1]} of 256 bits differ from {near[0]}")
    near = seen.nearest(fingerprint.bits)
    if near is not None and images.near_duplicate is not None and near[1] <= images.near_duplicate:
        raise Rejected(Reason.NEAR_DUPLICATE, f"{name}: {near[1]} of 256 bits differ from {near[0]}")
    seen.add(fingerprint.bits, name)
    digests[fingerprint.digest] = name
