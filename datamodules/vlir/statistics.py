"""What a corpus consists of, in numbers: of any VLIR files, and of what a build left beside them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.pictures import ImageRef
from datamodules.vlir.corpus import read_manifest
from datamodules.vlir.reader import read_records
from datamodules.vlir.schema import DataError
from modules.trajectory import Box, Region, Sample

TURNED = (5, 6, 7, 8)  # EXIF orientations in which width and height change places


@dataclass(frozen=True, eq=False)
class Entry:
    """One sample of a corpus."""

    split: str
    sample: Sample  # without images
    images: tuple[ImageRef, ...]
    sizes: tuple[tuple[int, int], ...]  # (H, W), upright

    @property
    def regions(self) -> tuple[Region, ...]:
        """What its rationale looks at."""
        return tuple(step.region for step in self.sample.rationale if step.region is not None)

    @property
    def words(self) -> int:
        """Of the whole rationale."""
        return sum(len(step.text.split()) for step in self.sample.rationale)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A corpus as it lies on disk."""

    entries: tuple[Entry, ...]
    rejected: tuple[dict[str, Any], ...] = ()  # rows of rejected.jsonl
    manifest: dict[str, Any] = field(default_factory=dict)  # empty, if it was not built here


@dataclass(frozen=True)
class Crop:
    """The size of one crop."""

    share: float  # of the image's area
    width: float  # original pixels
    height: float


def read_corpus(path: Path) -> Corpus:
    """The corpus of a folder that a build wrote, or of one VLIR file.

    Raises:
        DataError: there is none.
    """
    if path.is_file():
        return Corpus(tuple(_entries(path)))
    manifest = read_manifest(path)
    if not manifest:
        raise DataError(f"{path}: expected a VLIR file, or a folder with the corpus.json of a complete build.")
    full = [name for name, rows in manifest["splits"].items() if rows]
    entries = tuple(entry for name in full for entry in _entries(path / f"{name}.jsonl"))
    lines = (path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return Corpus(entries, tuple(json.loads(line) for line in lines), manifest)


def crops_of(entries: Sequence[Entry]) -> list[Crop]:
    """The sizes of all crops."""
    return [crop_of(region.box, entry.sizes[region.image]) for entry in entries for region in entry.regions]


def crop_of(box: Box, size: tuple[int, int]) -> Crop:
    """The size of a box on an image of (H, W)."""
    x1, y1, x2, y2 = box
    return Crop((x2 - x1) * (y2 - y1) / (size[0] * size[1]), x2 - x1, y2 - y1)


def by_source(corpus: Corpus) -> dict[str, dict[str, int]]:
    """By data set: its samples by split, and its questions that came to nothing."""
    found: dict[str, Counter[str]] = {}
    for entry in corpus.entries:
        found.setdefault(entry.sample.source, Counter())[entry.split] += 1
    lost = {(row["source"], row["id"], row["file"], row["row"]) for row in corpus.rejected if not row["passed_later"]}
    for source, *_ in sorted(lost):
        found.setdefault(source or "(unread)", Counter())["rejected"] += 1
    return {source: dict(counts) for source, counts in sorted(found.items())}


def reasons(corpus: Corpus) -> dict[str, int]:
    """How often each reason was given, to rows and to attempts; the most frequent first."""
    return dict(Counter(row["reason"] for row in corpus.rejected).most_common())


def numbers(corpus: Corpus) -> dict[str, float]:
    """One number a name, as they stand in TensorBoard."""
    entries, crops = corpus.entries, crops_of(corpus.entries)
    found: dict[str, float] = {
        "samples": len(entries),
        "images": len({image for entry in entries for image in entry.images}),
        "crops_per_sample": mean([len(entry.regions) for entry in entries]),
        "words_per_sample": mean([entry.words for entry in entries]),
        "crop_area_share": mean([crop.share for crop in crops]),
    }
    for source, counts in by_source(corpus).items():
        found[f"samples/{source}"] = sum(n for name, n in counts.items() if name != "rejected")
    found |= {f"rejected/{reason}": n for reason, n in reasons(corpus).items()}
    if corpus.manifest:
        asked = corpus.manifest["questions"]
        found["yield"] = corpus.manifest["kept"] / asked if asked else 0.0
        found["cost"] = sum(each["cost"] for each in corpus.manifest["cost"].values())
        found |= {f"cost/{name}": each["cost"] for name, each in corpus.manifest["cost"].items()}
    return found


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")


def _entries(path: Path) -> list[Entry]:
    return [
        Entry(path.stem, record.sample, record.images, tuple(_size(image) for image in record.images))
        for record in read_records(path)[0]
    ]


def _size(image: ImageRef) -> tuple[int, int]:
    """(H, W) of an image, upright, read from its head."""
    try:
        with Image.open(image.open()) as opened:
            width, height = opened.size
            turned = opened.getexif().get(0x0112) in TURNED
    except OSError as error:
        raise DataError(f"{image}: cannot be read ({error}).") from None
    return (width, height) if turned else (height, width)
