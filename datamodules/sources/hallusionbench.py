"""HallusionBench (arXiv 2310.14566; BSD-3-Clause): yes or no, with figures that contradict what one knows."""

from __future__ import annotations

from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark
from datamodules.sources.values import answer
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, describe, text
from modules.trajectory import Sample

PARTS = ("category", "subcategory", "set_id", "figure_id", "question_id")
ANSWERS = {"0": "No", "1": "Yes"}


class HallusionBench(Benchmark):
    """Rows of HallusionBench.json, or of lmms-lab/HallusionBench; some questions have no figure."""

    name = "hallusionbench"
    hub = "lmms-lab/HallusionBench"

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        parts = [answer(row, name) for name in PARTS]
        right = answer(row, "gt_answer")
        if right not in ANSWERS:
            raise Invalid(f"key `gt_answer`: expected 0 or 1, found {describe(row['gt_answer'])}")
        key = "image" if row.get("image") is not None else "filename"
        figure = row.get(key)
        images = () if figure is None else (self.image_of(_without_dot(figure), f"key `{key}`"),)
        meta = {"set_of_figures": "_".join(parts[:3])}
        sample = Sample(
            "_".join(parts), text(row, "question"), answers=(ANSWERS[right],), answer_kind="yesno", meta=meta
        )
        return Parsed(sample, images)


def _without_dot(value: object) -> object:
    """The published paths begin with "./"."""
    return value.removeprefix("./") if isinstance(value, str) else value
