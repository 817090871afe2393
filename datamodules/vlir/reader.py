"""Rows to records: everything about a question but its decoded images. And the reader of VLIR files."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, zip_longest
from pathlib import Path
from typing import overload

from datamodules.arrow import open_parquet
from datamodules.pictures import ImageFile, ImageRef
from datamodules.tables import JsonLines, Table
from datamodules.vlir.parquet import plain
from datamodules.vlir.schema import BadRow, DataError, Invalid, check_boxes, from_row
from modules.trajectory import Sample


@dataclass(frozen=True, eq=False)
class Record:
    """One question whose images are not decoded yet."""

    sample: Sample  # without images
    images: tuple[ImageRef, ...]  # where they are
    file: str
    row: int  # 1-based
    finish: Callable[[Sample], Sample] = check_boxes  # what has to see the images; raises Invalid


# of a row's number and what the table holds to its questions, mostly one; raises Invalid
Parse = Callable[[int, object], Sequence[Record]]


class Records(Sequence[Record]):
    """The usable rows of a table: their places only, each row is read and parsed when it is asked for.

    A hundred thousand questions with rationales would be half a gigabyte of objects.

    Args:
        table: where they lie.
        parse: makes records of a row; can be pickled.
    """

    def __init__(self, table: Table, parse: Parse) -> None:
        self.table = table
        self.parse = parse
        self.places, self.numbers, self.parts, self.keys = array("q"), array("q"), array("q"), array("q")

    def append(self, at: int, number: int, part: int, record: Record) -> None:
        """Note the `part`-th question of a row that was found to be usable."""
        self.places.append(at)
        self.numbers.append(number)
        self.parts.append(part)
        self.keys.append(hash(record.images) if record.images else 0)

    def image_keys(self) -> list[int | None]:
        """Equal for questions about the same images, None for those about none."""
        return [key or None for key in self.keys]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        return self.parse(self.numbers[index], self.table.row(self.places[index]))[self.parts[index]]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


class Joined(Sequence[Record]):
    """The records of several files, one after another."""

    def __init__(self, parts: Sequence[Sequence[Record]]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # of negative ones the place; IndexError beyond the end
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Record]:
        return (record for part in self.parts for record in part)


def image_keys(records: Sequence[Record]) -> list[Hashable | None]:
    """For each record, what is equal for questions about the same images; None if it has none."""
    if isinstance(records, Joined):
        return [key for part in records.parts for key in image_keys(part)]
    if isinstance(records, Records):
        return list(records.image_keys())
    return [hash(record.images) if record.images else None for record in records]


def index(table: Table, parse: Parse, limit: int | None, form: str) -> tuple[Records, list[BadRow]]:
    """Read and check every row of a table.

    Args:
        table: the rows.
        parse: see `Records`.
        limit: stop after this many usable rows.
        form: what the table should hold, for the message.

    Returns:
        The usable rows, and the others with the reason of each: also those that have the id of an earlier one.

    Raises:
        DataError: the file cannot be read, or has no usable row.
    """
    records = Records(table, parse)
    bad: list[BadRow] = []
    seen: dict[int, int] = {}  # hash of the id -> number: 64 bits of it keep a million ids apart
    for at, number, value in table.entries():
        try:
            if isinstance(value, Invalid):
                raise value
            found = parse(number, value)
            for record in found:
                first = seen.setdefault(hash(record.sample.id), number)
                if first != number:
                    raise Invalid(f"key `id`: expected one of its own, found {record.sample.id!r} of row {first}")
        except Invalid as error:
            bad.append(BadRow(table.name, number, str(error)))
            continue
        for part, record in enumerate(found):
            records.append(at, number, part, record)
            if len(records) == limit:
                break
        if len(records) == limit:
            break
    require_records(table.name, records, bad, form)
    return records, bad


def read_records(
    path: Path, root: Path | None = None, limit: int | None = None
) -> tuple[Sequence[Record], list[BadRow]]:
    """Read one VLIR file.

    Args:
        path: parquet if its name ends so, else JSON lines, UTF-8, with or without a byte order mark; blank lines are
            passed over.
        root: where image paths start; the file's folder if None.
        limit: stop after this many usable rows.

    Returns:
        The usable rows, and the others with the reason of each.

    Raises:
        DataError: the file cannot be read, is of another form, or has no usable row.
    """
    parquet = path.suffix.lower() == ".parquet"
    table = open_parquet(path) if parquet else JsonLines(path)
    parse = partial(parse_row, table.name, path.parent if root is None else root, parquet)
    return index(table, parse, limit, "VLIR rows" if parquet else "one JSON object a line")


def parse_row(file: str, root: Path, columns: bool, number: int, value: object) -> list[Record]:
    """A VLIR row as the one record that it is.

    Args:
        file: what it came from, for messages.
        root: where image paths start.
        columns: whether it is from parquet, where absent keys are null.
        number: which row it is.
        value: what the table holds.

    Raises:
        Invalid: it is a bad row.
    """
    return [Record(*question(value, root, columns), file, number)]


def question(row: object, root: Path, columns: bool) -> tuple[Sample, tuple[ImageRef, ...]]:
    """A VLIR row as a sample, and where its images are; arguments as of `parse_row`.

    Raises:
        Invalid: it is a bad row.
    """
    row, embedded = plain(row) if columns else (row, [])
    sample, paths = from_row(row)
    files = (ImageFile(root, path) for path in paths)
    return sample, tuple(stored or file for stored, file in zip_longest(embedded, files))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte order mark.

    Raises:
        DataError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x}.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None


def require_records(name: Path | str, records: Sequence[Record], bad: list[BadRow], form: str) -> None:
    """Raise DataError if a file has no usable row.

    Args:
        form: what the file should hold, for the message.
    """
    if records:
        return
    if not bad:
        raise DataError(f"{name}: expected {form}, found no rows.")
    reasons = "; ".join(f"row {error.row}: {error.why}" for error in islice(bad, 2))
    raise DataError(f"{name}: expected {form}, found no usable row among {len(bad)} ({reasons}).")
