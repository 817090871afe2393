"""POPE (arXiv 2305.10355; MIT): is there such an object in the image?"""

from __future__ import annotations

from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark
from datamodules.sources.values import identity
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, describe, text
from modules.trajectory import Sample


class POPE(Benchmark):
    """Rows of lmms-lab/POPE, or coco_pope_random.json and its kin (``text``, ``label``; images below ``root``)."""

    name = "pope"
    hub = "lmms-lab/POPE"

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        key = "label" if "label" in row else "answer"
        right = text(row, key).strip()
        if right.lower() not in ("yes", "no"):
            raise Invalid(f"key `{key}`: expected yes or no, found {describe(row[key])}")
        category = row.get("category")
        number = identity(row, "question_id")
        name = row.get("image_source") or row.get("image")
        sample = Sample(
            id=f"{category}-{number}" if category else number,
            question=text(row, "text" if "text" in row else "question"),
            answers=(right,),
            answer_kind="yesno",
            meta={"image_id": name} if isinstance(name, str) else {},
        )
        return Parsed(sample, (self.image(row, "image"),))
