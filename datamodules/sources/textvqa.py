"""TextVQA (arXiv 1904.08920; CC BY 4.0): questions about text in photographs."""

from __future__ import annotations

from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark
from datamodules.sources.values import identity
from datamodules.tables import Row
from datamodules.vlir.schema import strings, text
from modules.trajectory import Sample


class TextVQA(Benchmark):
    """Rows of lmms-lab/textvqa, or of TextVQA_0.5.1_*.json, whose images are named by ``image_id``.

    Ten people answered each question, and all of them are kept: a blank one is a person as well. Those of the test
    split are blank or missing altogether, which is no answer.
    """

    name = "textvqa"
    hub = "lmms-lab/textvqa"
    trains = True

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        answers = strings(row, "answers") if row.get("answers") is not None else ()
        sample = Sample(
            id=identity(row, "question_id"),
            question=text(row, "question"),
            answers=answers if any(answer.strip() for answer in answers) else (),
            answer_kind="vqa",
            meta={"image_id": identity(row, "image_id")} if "image_id" in row else {},
        )
        if "image" in row:
            return Parsed(sample, (self.image(row, "image"),))
        folder = "test_images" if row.get("set_name") == "test" else "train_images"
        return Parsed(sample, (self.file(f"{identity(row, 'image_id')}.jpg", folder),))
