"""ScienceQA (arXiv 2209.09513; CC BY-NC-SA 4.0): questions of school science, about half of them with an image."""

from __future__ import annotations

from datamodules.pictures import ImageRef
from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark, listed
from datamodules.sources.values import identity, options, whole
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, required, text
from modules.trajectory import Sample


class ScienceQA(Benchmark):
    """Rows of derek-thomas/ScienceQA, or problems.json: an object by problem id.

    In the latter, rows of other splits than `split` are passed over, and "image.png" is <split>/<id>/image.png below
    `root` (in ``images`` if there is such a folder). Rows of the hub have no id.
    """

    name = "scienceqa"
    hub = "derek-thomas/ScienceQA"
    trains = True

    def wants(self, row: Row) -> bool:
        """See `Source.wants`."""
        return self.split is None or row.get("split", self.split) == self.split

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        choices = options(row, "choices")
        right = whole(required(row, "answer"), "key `answer`")
        if not 0 <= right < len(choices):
            raise Invalid(f"key `answer`: expected the index of one of {len(choices)} options, found {right}")
        hint = row.get("hint") or ""
        asked = f"Context: {hint}\n{text(row, 'question')}" if hint.strip() else text(row, "question")
        image = self._picture(row)
        sample = Sample(
            id=identity(row, "id") if "id" in row else "",
            question=f"{asked}\n{listed(choices)}",
            answers=(chr(ord("A") + right),),
            choices=choices,
            answer_kind="choice",
            meta={key: row[key] for key in ("subject", "grade", "topic", "category", "skill") if row.get(key)},
        )
        return Parsed(sample, () if image is None else (image,))

    def _picture(self, row: Row) -> ImageRef | None:
        image = row.get("image")
        if not image:
            return None
        if isinstance(image, str) and "split" in row:
            return self.file(f"{text(row, 'split')}/{identity(row, 'id')}/{image}", "images")
        return self.image(row, "image")
