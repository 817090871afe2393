"""DocVQA and InfographicVQA (arXiv 2007.00398, 2104.12756; for research): questions about pages and infographics."""

from __future__ import annotations

from datamodules.pictures import ImageRef
from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark
from datamodules.sources.values import identity, phrases
from datamodules.tables import Row
from datamodules.vlir.schema import text
from modules.trajectory import Sample


class DocVQA(Benchmark):
    """Rows of lmms-lab/DocVQA (configuration DocVQA), or of the challenge's *_v1.0.json with its ``image`` paths.

    The test split has no answers.
    """

    name = "docvqa"
    hub = "lmms-lab/DocVQA"
    trains = True
    image_ids = ("docId", "image")  # the first that a row has tells its image from others

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        found = next((row[key] for key in self.image_ids if isinstance(row.get(key), str | int)), None)
        sample = Sample(
            id=identity(row, "questionId"),
            question=text(row, "question"),
            answers=phrases(row, "answers") if row.get("answers") else (),
            answer_kind="anls",
            meta={} if found is None else {"image_id": str(found)},
        )
        return Parsed(sample, (self.picture(row),))

    def picture(self, row: Row) -> ImageRef:
        """Where the page is."""
        return self.image(row, "image")


class InfographicVQA(DocVQA):
    """Rows of lmms-lab/DocVQA (configuration InfographicVQA), or of infographicsVQA_*_v1.0.json.

    The images of the latter are named by ``image_local_name``, in ``infographicsvqa_images`` if there is such a folder.
    """

    name = "infographicvqa"
    image_ids = ("image_url", "image_local_name")

    def picture(self, row: Row) -> ImageRef:
        """Where the infographic is."""
        if "image" in row:
            return self.image(row, "image")
        return self.file(text(row, "image_local_name"), "infographicsvqa_images")
