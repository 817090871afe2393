"""MMVP (arXiv 2401.06209; MIT): pairs of images that CLIP confuses, the same question on both."""

from __future__ import annotations

from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark
from datamodules.sources.values import whole
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, describe, required, text
from modules.evaluation.common import letter_index
from modules.evaluation.common import options as read_options
from modules.trajectory import Sample


class MMVP(Benchmark):
    """Rows of Questions.csv, images in ``MMVP Images`` beside it; or rows with an ``image`` and the same columns.

    Asked as in the benchmark's scripts: question, blank, options.
    """

    name = "mmvp"
    hub = "MMVP/MMVP"

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        index = whole(required(row, "Index"), "key `Index`")
        choices = tuple(read_options(text(row, "Options")))
        if len(choices) < 2:
            raise Invalid(f'key `Options`: expected options such as "(a) Open (b) Closed", found {row["Options"]!r}')
        right = letter_index(text(row, "Correct Answer"))
        if right is None or right >= len(choices):
            raise Invalid(f"key `Correct Answer`: expected an option's letter, found {describe(row['Correct Answer'])}")
        sample = Sample(
            id=str(index),
            question=f"{text(row, 'Question')} {text(row, 'Options')}",
            answers=(chr(ord("A") + right),),
            choices=choices,
            meta={"pair": str((index + 1) // 2), "image_id": str(index)},
        )
        image = row["image"] if row.get("image") is not None else f"MMVP Images/{index}.jpg"
        return Parsed(sample, (self.image_of(image, "key `image`"),))
