"""HR-Bench (arXiv 2408.15556; Apache-2.0): photographs of 4K and 8K, each question with its options turned."""

from __future__ import annotations

from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark, listed
from datamodules.sources.values import answer, identity
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, required, text
from modules.evaluation.common import letter_index
from modules.trajectory import Sample


class HRBench(Benchmark):
    """Rows of DreamMr/HR-Bench (hr_bench_4k, hr_bench_8k) or of its .tsv; images are base64 text.

    Asked as VLMEvalKit does. The cycles of a question are about one image.
    """

    name = "hrbench"
    hub = "DreamMr/HR-Bench"
    base64 = ("image",)

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        choices = tuple(answer(row, letter) for letter in "ABCD" if row.get(letter) not in (None, ""))
        right = text(row, "answer")
        index = letter_index(right)
        if len(choices) < 2 or index is None or index >= len(choices):
            raise Invalid(f"key `answer`: expected the letter of one of {len(choices)} options, found {right!r}")
        asked = f"Question: {text(row, 'question')}\nOptions:\n{listed(choices, '{}. {}')}"
        required(row, "cycle_category")
        meta = {"image_id": "|".join((text(row, "question"), *sorted(choices)))}
        sample = Sample(identity(row, "index"), asked, answers=(right,), choices=choices, meta=meta)
        return Parsed(sample, (self.image(row, "image"),))
