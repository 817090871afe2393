"""What every data set that others published has in common: where its rows lie, and how one becomes a question.

A data set is one small file with one class, which says how a row is read. `Source` does the rest: hub name, parquet
file or folder, or the data set's own JSON, JSON lines or CSV; bad rows; images; limits.

    class TextVQA(Source):
        \"\"\"TextVQA (arXiv 1904.08920; CC BY 4.0): reading text in photographs.\"\"\"

        name = "textvqa"      # becomes `Sample.source`
        hub = "lmms-lab/textvqa"

        def parse(self, row: Row) -> Parsed:
            sample = Sample(
                id=identity(row, "question_id"),            # a string or a whole number
                question=text(row, "question"),             # a string that is not blank
                answers=phrases(row, "answers"),            # strings or numbers
                answer_kind="vqa",                          # how `Accuracy` compares
            )
            return Parsed(sample, (self.image(row, "image"),))

    records, bad = TextVQA("data/textvqa", split="validation").read()

Helpers for values are in `datamodules.vlir.schema` and `datamodules.sources.values`; each raises `Invalid`, which
makes the row a bad one: `read` returns it with file, row and reason. In `row`, an embedded image is already a reference
(`StoredImage`), also in lists; base64 texts are, if the class names their columns in `base64`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

from datamodules.arrow import ArrowRows, load, open_parquet
from datamodules.pictures import ImageFile, ImageRef
from datamodules.tables import Row, Table, open_table
from datamodules.vlir.reader import Record, Records, index
from datamodules.vlir.schema import BadRow, Invalid, check_boxes, describe, expect, relative_path, required
from modules.trajectory import Sample

TEXT_FILES = (".json", ".jsonl", ".csv", ".tsv")


class Parsed(NamedTuple):
    """A row as a question."""

    sample: Sample  # without images, source and provenance: these are added, an id too if it is empty
    images: tuple[ImageRef, ...] = ()
    finish: Callable[[Sample], Sample] = check_boxes  # what has to see the images; raises Invalid; can be pickled


class Source(ABC):
    """One data set.

    Args:
        path: a parquet file or a folder of such, a .json, .jsonl, .csv or .tsv file in the data set's own form, or its
            name on the hub.
        split: which split of a folder or hub data set that has several.
        root: where image paths start, which they may not leave; the folder of `path` if None.
        config: which configuration of a folder or hub data set that has several.
        limit: read at most this many usable rows.
    """

    name: ClassVar[str]  # of the data set: `Sample.source`
    hub: ClassVar[str] = ""  # where it is published
    key: ClassVar[str] = "id"  # in JSON that is an object of rows by id: the name under which a row gets its id
    base64: ClassVar[tuple[str, ...]] = ()  # columns that hold images as base64 text
    trains: ClassVar[bool] = True  # False: for evaluation only, and refused as a training source

    def __init__(
        self,
        path: str,
        split: str | None = None,
        root: str | None = None,
        config: str | None = None,
        limit: int | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"Expected `limit` to be at least 1 but got {limit}.")
        self.path = path
        self.split = split
        self.config = config
        self.limit = limit
        self._folders: dict[str, bool] = {}
        self.root = _root(Path(path)) if root is None else Path(root)

    @abstractmethod
    def parse(self, row: Row) -> Parsed | list[Parsed]:
        """Make a question of a row, or several.

        Args:
            row: its values by column; of JSON and CSV as they are there.

        Raises:
            Invalid: a value is missing or not as expected.
        """

    def wants(self, row: Row) -> bool:
        """Whether a row belongs to the split; for files that hold several."""
        return True

    def read(self) -> tuple[Records, list[BadRow]]:
        """Read and check every row.

        Returns:
            The usable rows, which are parsed anew from disk whenever one is asked for, and the others with the
            reason of each.

        Raises:
            DataError: the data cannot be read, or there is no usable row.
        """
        table = self.open()
        return index(table, partial(self.records, table.name), self.limit, f"rows of {type(self).__name__}")

    def open(self) -> Table:
        """The data set's rows as they lie on disk.

        Raises:
            DataError: it cannot be read.
        """
        if self.is_text:
            return open_table(Path(self.path), self.key, self.base64)
        if Path(self.path).is_file():
            return open_parquet(Path(self.path), self.base64)
        return ArrowRows(load(self.path, self.config, self.split), self._called, self.base64)

    def records(self, file: str, number: int, value: object) -> list[Record]:
        """The questions of a row as records.

        Args:
            file: what it came from, for messages.
            number: which row it is.
            value: what the table holds.

        Raises:
            Invalid: it is a bad row.
        """
        row = expect(value, dict, "the row", "an object")
        if not self.wants(row):
            return []
        found = self.parse(row)
        origin: dict[str, Any] = {"dataset": self.hub or self.name, "file": file, "row": number}
        origin |= {} if self.split is None else {"split": self.split}
        return [
            Record(self._completed(sample, number, origin), images, file, number, finish)
            for sample, images, finish in (found if isinstance(found, list) else [found])
        ]

    def _completed(self, sample: Sample, number: int, origin: dict[str, Any]) -> Sample:
        return replace(
            sample,
            id=sample.id or f"{Path(self.path).stem}-{number}",
            source=sample.source or self.name,
            provenance=sample.provenance or origin,
        )

    def image(self, row: Row, key: str) -> ImageRef:
        """The image of a column: embedded, or a path below the root.

        Raises:
            Invalid: there is none, or its path leaves the root.
        """
        return self.image_of(required(row, key), f"key `{key}`")

    def image_of(self, value: object, name: str) -> ImageRef:
        """As `image`, of a value that was taken out of a row; `name` is what messages call it."""
        if isinstance(value, ImageRef):
            return value
        if isinstance(value, str):
            return ImageFile(self.root, relative_path(value, name))
        raise Invalid(f"{name}: expected an image or its path, found {describe(value)}")

    def file(self, name: str, *folders: str) -> ImageFile:
        """An image that the data set names without its folder: in the first of `folders` that is there, else the root.

        Raises:
            Invalid: its name leads out of the root.
        """
        folder = next((folder for folder in folders if self._has(folder)), "")
        return ImageFile(self.root, str(PurePosixPath(folder, relative_path(name, "the image's name"))))

    def _has(self, folder: str) -> bool:
        if folder not in self._folders:
            self._folders[folder] = (self.root / folder).is_dir()
        return self._folders[folder]

    @property
    def is_text(self) -> bool:
        """Whether it is a file of JSON or CSV, rather than parquet or of the hub."""
        return Path(self.path).suffix.lower() in TEXT_FILES

    @property
    def _called(self) -> str:
        return ":".join(part for part in (self.path, self.config, self.split) if part)


def _root(path: Path) -> Path:
    return path.parent if path.suffix.lower() in (*TEXT_FILES, ".parquet") else path
