"""MMMU and MMMU-Pro (arXiv 2311.16502, 2409.02813; Apache-2.0): questions of university courses."""

from __future__ import annotations

import ast

from datamodules.pictures import ImageRef
from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark, listed
from datamodules.sources.values import answer, identity, options, phrases
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, required, text
from modules.evaluation.common import letter_index
from modules.trajectory import Sample

IMAGES = 7
OPEN = "open"


class MMMU(Benchmark):
    """Rows of MMMU/MMMU; up to seven images, which the question names as <image 1>, <image 2>, ….

    They stand before the question, in this order. Options may be a list or its text.
    """

    name = "mmmu"
    hub = "MMMU/MMMU"

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        is_open = required(row, "question_type") == OPEN
        choices = () if is_open else options(row, "options")
        answers = _alternatives(row) if is_open else (answer(row, "answer"),)
        index = letter_index(answers[0]) if choices else None
        if choices and (index is None or index >= len(choices)):
            raise Invalid(f"key `answer`: expected the letter of one of {len(choices)} options, found {answers[0]!r}")
        asked = text(row, "question") + (f"\n{listed(choices)}" if choices else "")
        images = [row.get(f"image_{k}") for k in range(1, IMAGES + 1)]
        annotation = {"options": list(choices), "question_type": row["question_type"], "answer": list(answers)}
        sample = Sample(identity(row, "id"), asked, answers=answers, choices=choices, meta={"annotation": annotation})
        return Parsed(sample, tuple(image for image in images if isinstance(image, ImageRef)))


def _alternatives(row: Row) -> tuple[str, ...]:
    """Answers of an open question: one, or the text of a list of them."""
    right = answer(row, "answer") if not isinstance(row.get("answer"), list) else row["answer"]
    if isinstance(right, str) and right.startswith("["):
        try:
            right = ast.literal_eval(right)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return (right,)
    return phrases({"answer": right}, "answer") if isinstance(right, list) else (right,)
