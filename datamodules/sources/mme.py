"""MME (arXiv 2306.13394; research only): fourteen categories of yes or no, two questions an image."""

from __future__ import annotations

from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark
from datamodules.sources.values import identity
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, describe, text
from modules.trajectory import Sample


class MME(Benchmark):
    """Rows of lmms-lab/MME: ``question_id`` names the image, and the two questions on it differ by their answer."""

    name = "mme"
    hub = "lmms-lab/MME"

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        image, right = identity(row, "question_id"), text(row, "answer").strip()
        if right.lower() not in ("yes", "no"):
            raise Invalid(f"key `answer`: expected Yes or No, found {describe(row['answer'])}")
        sample = Sample(
            id=f"{text(row, 'category')}/{image}/{right.lower()}",
            question=text(row, "question"),
            answers=(right,),
            answer_kind="yesno",
            meta={"image_id": f"{row['category']}/{image}"},
        )
        return Parsed(sample, (self.image(row, "image"),))
