"""CV-Bench (arXiv 2406.16860; Apache-2.0): counting, relations, depth and distance."""

from __future__ import annotations

from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark
from datamodules.sources.values import identity, options
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, describe, text
from modules.evaluation.common import letter_index
from modules.trajectory import Sample


class CVBench(Benchmark):
    """Rows of nyu-visionx/CV-Bench, or test_2d.jsonl and test_3d.jsonl with images below ``img``.

    The question is the benchmark's ``prompt``, which holds the choices.
    """

    name = "cvbench"
    hub = "nyu-visionx/CV-Bench"

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        choices, index = options(row, "choices"), letter_index(text(row, "answer"))
        if index is None or index >= len(choices):
            raise Invalid(f"key `answer`: expected the letter of one of the choices, found {describe(row['answer'])}")
        name = row.get("filename")
        sample = Sample(
            id=identity(row, "idx"),
            question=text(row, "prompt"),
            answers=(chr(ord("A") + index),),
            choices=choices,
            meta={"image_id": name} if isinstance(name, str) else {},
        )
        image = row["image"] if row.get("image") is not None else f"img/{text(row, 'filename')}"
        return Parsed(sample, (self.image_of(image, "key `image`"),))
