"""GQA (arXiv 1902.09506; CC BY 4.0): compositional questions about scenes."""

from __future__ import annotations

from typing import Any

from datamodules.arrow import ArrowRows, load
from datamodules.pictures import ImageRef
from datamodules.sources.base import Parsed
from datamodules.sources.benchmark import Benchmark
from datamodules.sources.values import answer, identity
from datamodules.tables import Row
from datamodules.vlir.schema import Invalid, text
from modules.trajectory import Sample


class GQA(Benchmark):
    """Rows of lmms-lab/GQA, or of *_questions.json: an object by question id, images named by ``imageId``.

    On the hub the images are a configuration of their own, beside that of the questions: train_balanced_images beside
    train_balanced_instructions. Several questions share an image.

    Args:
        images: parquet file or folder of the images; if None they are the configuration beside the questions', or for a
            JSON file <imageId>.jpg below `root`, in ``images`` if there is such a folder.
        kwargs: see `Source`; ``config`` is that of the questions.
    """

    name = "gqa"
    hub = "lmms-lab/GQA"
    trains = True

    def __init__(self, *args: Any, images: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.images = images
        self._pictures: dict[str, ImageRef] | None = None

    def ask(self, row: Row) -> Parsed:
        """See `Benchmark.ask`."""
        image = identity(row, "imageId")
        sample = Sample(
            id=identity(row, "id"),
            question=text(row, "question"),
            answers=(answer(row, "answer"),) if row.get("answer") is not None else (),
            answer_kind="exact",
            meta={"image_id": image},
        )
        if self.images is None and self.is_text:
            return Parsed(sample, (self.file(f"{image}.jpg", "images"),))
        if image not in self.pictures:
            raise Invalid(f"key `imageId`: expected one of {len(self.pictures)} images, found {image!r}")
        return Parsed(sample, (self.pictures[image],))

    @property
    def pictures(self) -> dict[str, ImageRef]:
        """The images by id.

        Raises:
            DataError: they cannot be read.
        """
        if self._pictures is None:
            config = None if self.images or self.config is None else self.config.replace("_instructions", "_images")
            path = self.images or self.path
            name = ":".join(part for part in (path, config) if part)
            table = ArrowRows(load(path, config, self.split if self.images is None else None), name)
            rows = [entry.value for entry in table.entries() if isinstance(entry.value, dict)]
            self._pictures = {identity(row, "id"): self.image(row, "image") for row in rows}
        return self._pictures
