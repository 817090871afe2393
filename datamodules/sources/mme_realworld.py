"""MME-RealWorld (arXiv 2408.13257; research only): very large images, five options, the last one "not there"."""

from __future__ import annotations

from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark
from datamodules.sources.values import answer, identity, phrases
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, text
from modules.evaluation.common import letter_index
from modules.trajectory import Sample


class MMERealWorld(Benchmark):
    """Rows of the published parquet (``bytes`` is base64), or of MME_RealWorld.json.

    Asked as in the benchmark's script, up to the choices.
    """

    name = "mme_realworld"
    hub = "yifanzhang114/MME-RealWorld-Base64"
    base64 = ("bytes",)

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        published = "Text" not in row
        question, listed, right, number, image = (
            ("question", "multi-choice options", "answer", "index", "bytes")
            if published
            else ("Text", "Answer choices", "Ground truth", "Question_id", "Image")
        )
        choices, letter = phrases(row, listed), answer(row, right)
        index = letter_index(letter)
        if index is None or index >= len(choices):
            raise Invalid(f"key `{right}`: expected the letter of one of {len(choices)} options, found {letter!r}")
        asked = f"{text(row, question)} The choices are listed below:\n" + "\n".join(choices)
        sample = Sample(identity(row, number), asked, answers=(letter,), choices=choices)
        return Parsed(sample, (self.image(row, image),))
