"""What the benchmarks have in common beside `Source`: the row itself comes along, for the official scorers read it."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from datamodules.pictures import ImageFile, ImageRef
from datamodules.sources.base import Parsed, Source
from datamodules.tables import Row
from modules.trajectory import Sample

SIDE = 256  # pixels of each side that tell one image from another


class Benchmark(Source):
    """A data set to evaluate on.

    ``Sample.meta`` holds ``annotation``, the row without its pixels, and ``image_id``, equal for questions about one
    image: what the benchmark calls it, its path, or a digest of its pixels.
    """

    trains = False  # but where a data set says otherwise

    def parse(self, row: Row) -> Parsed | list[Parsed]:
        """See `Source.parse`."""
        sample, images, finish = self.ask(row)
        meta = {"annotation": without_images(row)} | sample.meta
        if "image_id" not in meta and images and all(isinstance(image, ImageFile) for image in images):
            meta["image_id"] = ":".join(image.path for image in images if isinstance(image, ImageFile))
        if "image_id" not in meta and images:
            finish = partial(identified, finish=finish)
        return Parsed(replace(sample, meta=meta), images, finish)

    @abstractmethod
    def ask(self, row: Row) -> Parsed:
        """The question of a row, with the images it is about.

        Raises:
            Invalid: a value is missing or not as expected.
        """


def identified(sample: Sample, finish: Callable[[Sample], Sample]) -> Sample:
    """The finished sample, named after what its images show."""
    digest = hashlib.blake2b(digest_size=8)
    for image in sample.images:
        step = max(1, max(image.shape[-2:]) // SIDE)
        digest.update(str(tuple(image.shape)).encode() + image[:, ::step, ::step].contiguous().numpy().tobytes())
    return replace(finish(sample), meta=sample.meta | {"image_id": digest.hexdigest()})


def without_images(row: Row) -> dict[str, Any]:
    """The row as JSON can hold it: of images where they are, for some scorers ask whether there is one."""
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, ImageRef) else value


def listed(choices: Sequence[str], form: str = "({}) {}") -> str:
    """Options with their letters, one a line."""
    return "\n".join(form.format(chr(ord("A") + k), choice) for k, choice in enumerate(choices))
