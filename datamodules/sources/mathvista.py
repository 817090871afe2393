"""MathVista (arXiv 2310.02255; CC BY-SA 4.0): mathematics in pictures, charts and diagrams."""

from __future__ import annotations

from datamodules.pictures import ImageRef
from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark, listed
from datamodules.sources.values import answer, identity, options
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, describe, required, text
from modules.trajectory import Sample


class MathVista(Benchmark):
    """Rows of AI4Math/MathVista, or testmini.json by problem id.

    The question is the benchmark's ``query``, which holds its hint, unit and choices; without one, question and
    choices.
    """

    name = "mathvista"
    hub = "AI4Math/MathVista"
    key = "pid"

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        several = required(row, "question_type") == "multi_choice"
        choices = options(row, "choices") if several else ()
        right = answer(row, "answer")
        if several and right not in choices:
            raise Invalid(f"key `answer`: expected one of the choices, found {describe(right)}")
        asked = text(row, "query") if row.get("query") else text(row, "question")
        if choices and not row.get("query"):
            asked = f"{asked}\n{listed(choices)}"
        sample = Sample(
            id=identity(row, "pid"),
            question=asked,
            answers=(right,),
            choices=choices,
            meta={"image_id": row["image"]} if isinstance(row.get("image"), str) else {},
        )
        decoded = row.get("decoded_image")
        image = decoded if isinstance(decoded, ImageRef) else self.image(row, "image")
        return Parsed(sample, (image,))
