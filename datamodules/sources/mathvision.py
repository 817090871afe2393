"""MathVision (arXiv 2402.14804; MIT): problems of mathematics competitions."""

from __future__ import annotations

import re

from datamodules.pictures import ImageRef
from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark, listed
from datamodules.sources.values import answer, identity, phrases
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, required, text
from modules.evaluation.common import letter_index
from modules.trajectory import Sample

LETTERS = ("A", "B", "C", "D", "E")
_MARK = re.compile(r"\s*<image\d+>")  # where the image belongs; it stands before the question


class MathVision(Benchmark):
    """Rows of MathLLMs/MathVision, or its test.jsonl; options that are letters only stand in the picture."""

    name = "mathvision"
    hub = "MathLLMs/MathVision"

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        right = answer(row, "answer")
        choices = phrases(row, "options") if required(row, "options") else ()
        index = letter_index(right) if choices else None
        if choices and (index is None or index >= len(choices)):
            raise Invalid(f"key `answer`: expected the letter of one of {len(choices)} options, found {right!r}")
        asked = _MARK.sub("", text(row, "question")).strip()
        if choices and choices != LETTERS:
            asked = f"{asked}\n{listed(choices)}"
        sample = Sample(identity(row, "id"), asked, answers=(right,), choices=choices)
        decoded = row.get("decoded_image")
        image = decoded if isinstance(decoded, ImageRef) else self.image(row, "image")
        return Parsed(sample, (image,))
