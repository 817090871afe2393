"""What a corpus consists of, to be looked at: ``report.html``, and the same figures for TensorBoard."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from datamodules.images import BadImage
from datamodules.vlir.html import document
from datamodules.vlir.pictures import Drawn, draw, page
from datamodules.vlir.schema import DataError, Invalid
from datamodules.vlir.statistics import Corpus, Entry, crops_of, numbers, read_corpus

logger = logging.getLogger(__name__)

EXAMPLES = 2  # of each reason of a rejection
PICTURES = 8  # in TensorBoard, which keeps them as PNG


def report(data: str, out: str | None = None, samples: int = 24, title: str | None = None) -> Path:
    """Write the report of a corpus.

    Args:
        data: the folder of a corpus, or a VLIR file with rationales.
        out: where ``report.html`` and ``tensorboard/`` go; the corpus's own folder if None.
        samples: how many are shown, evenly from all sources.
        title: of the page; the name of the data if None.

    Returns:
        The page.

    Raises:
        DataError: there is no corpus, or the report cannot be written.
    """
    corpus = read_corpus(Path(data))
    folder = (Path(data) if Path(data).is_dir() else Path(data).parent) if out is None else Path(out)
    shown = drawn(spread(corpus.entries, samples))
    html = document(title or Path(data).resolve().name, corpus, shown, examples(corpus.rejected))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "report.html.part"
        part.write_text(html, encoding="utf-8")
        os.replace(part, folder / "report.html")
        curves(folder / "tensorboard", corpus, shown)
    except OSError as error:
        raise DataError(f"{folder}: the report cannot be written ({error}).") from error
    return folder / "report.html"


def spread(entries: Sequence[Entry], count: int) -> list[Entry]:
    """So many entries, one of each source after another, and from each source evenly."""
    by_source: dict[str, list[Entry]] = {}
    for entry in entries:
        by_source.setdefault(entry.sample.source, []).append(entry)
    share = math.ceil(count / max(1, len(by_source)))
    picked = [each[:: max(1, len(each) // share)] for _, each in sorted(by_source.items())]
    turns = (entry for turn in zip_longest(*picked) for entry in turn if entry is not None)
    return list(turns)[:count]


def drawn(entries: Sequence[Entry]) -> list[tuple[Entry, Drawn]]:
    """Entries with their pictures; those whose images cannot be decoded are left out."""
    found = []
    for entry in entries:
        try:
            found.append((entry, draw(entry)))
        except (BadImage, Invalid) as error:
            logger.warning("not shown: %s", error)
    return found


def examples(rejected: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first few of each reason, reason by reason."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rejected:
        found.setdefault(row["reason"], []).append(row)
    return [row for _, rows in sorted(found.items()) for row in rows[:EXAMPLES]]


def curves(folder: Path, corpus: Corpus, shown: Sequence[tuple[Entry, Drawn]]) -> None:
    """The figures of the page for TensorBoard; those of an earlier report are replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    writer = SummaryWriter(str(folder))
    for name, value in numbers(corpus).items():
        if math.isfinite(value):
            writer.add_scalar(f"vlir/{name}", value, 0)
    crops = crops_of(corpus.entries)
    values = {
        "crops_per_sample": [len(entry.regions) for entry in corpus.entries],
        "words_per_sample": [entry.words for entry in corpus.entries],
        "crop_area_share": [crop.share for crop in crops],
        "crop_width": [crop.width for crop in crops],
        "crop_height": [crop.height for crop in crops],
    }
    for name, each in values.items():
        if each:
            writer.add_histogram(f"vlir/{name}", np.array(each, dtype=np.float64), 0)
    for k, (entry, pictures) in enumerate(shown[:PICTURES]):
        writer.add_image(f"vlir/sample/{k:02}", np.asarray(page(entry, pictures)), 0, dataformats="HWC")
        writer.add_text(f"vlir/sample/{k:02}", _literal(entry), 0)
    writer.close()


def _literal(entry: Entry) -> str:
    """The words of a sample, as a block that TensorBoard does not read as Markdown."""
    words = [
        entry.sample.question,
        "".join(step.text + ("[look]\n" if step.region else "") for step in entry.sample.rationale),
    ]
    return "\n".join("    " + line for text in words for line in text.splitlines())
