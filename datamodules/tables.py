"""Files of rows, read one row at a time: JSON lines, JSON, CSV. Parquet and hub data sets: `datamodules.arrow`."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.pictures import StoredImage
from datamodules.vlir.schema import DataError, Invalid, describe

Row = dict[str, Any]
UTF16 = (b"\xff\xfe", b"\xfe\xff")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Entry(NamedTuple):
    """One row of a table, or why it is none."""

    at: int  # its place, for `Table.row` and `Table.cell`
    number: int  # 1-based, as people count: a line, an element
    value: object  # the row, of whatever type was found; Invalid if it cannot be read


class Table(ABC):
    """Rows on disk. Can be pickled.

    Args:
        name: the file or data set, for messages.
        base64: columns that hold images as base64 text; they are read when an image is needed.
    """

    def __init__(self, name: str, base64: Sequence[str] = ()) -> None:
        self.name = name
        self.base64 = tuple(base64)

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """All rows in order; embedded images as `StoredImage`.

        Raises:
            DataError: the file cannot be read or does not have the table's form.
        """

    @abstractmethod
    def row(self, at: int) -> object:
        """One row again, as `entries` gave it."""

    @abstractmethod
    def cell(self, at: int, column: str, index: int | None = None) -> object:
        """What stands in a row's column, or in one element of the list there."""

    def _deferred(self, value: object, at: int) -> object:
        """A row whose base64 texts are replaced by references."""
        if not self.base64 or not isinstance(value, dict):
            return value
        found = {
            key: StoredImage(self, at, key) for key in self.base64 if isinstance(value.get(key), str) and value[key]
        }
        return value | found


class JsonLines(Table):
    """One JSON value a line, UTF-8, with or without a byte order mark; blank lines are passed over.

    A line that is no JSON or not UTF-8 is a bad row, the others are read.
    """

    def __init__(self, path: Path, base64: Sequence[str] = ()) -> None:
        super().__init__(str(path), base64)
        self.path = path

    def entries(self) -> Iterator[Entry]:
        at = 0
        with open_bytes(self.path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and line.strip() != b"\xef\xbb\xbf":
                    yield Entry(at, number, self._value(line, at))
                at += len(line)

    def row(self, at: int) -> object:
        with self.path.open("rb") as file:
            file.seek(at)
            return self._value(file.readline(), at)

    def cell(self, at: int, column: str, index: int | None = None) -> object:
        with self.path.open("rb") as file:
            file.seek(at)
            return _element(parse_line(file.readline()), column, index)

    def _value(self, line: bytes, at: int) -> object:
        try:
            return self._deferred(parse_line(line), at)
        except Invalid as error:
            return error


class JsonRows(Table):
    """A JSON file as a whole: a list, an object with a list under ``data``, or an object of objects by id.

    It is kept in memory, parsed.

    Args:
        path: the file.
        key: the name under which a row of an object by id gets its id, if it has no such key.
    """

    def __init__(self, path: Path, key: str = "id", base64: Sequence[str] = ()) -> None:
        super().__init__(str(path), base64)
        self.values = _rows_of(parse_json(path), path, key)

    def entries(self) -> Iterator[Entry]:
        for at, value in enumerate(self.values):
            yield Entry(at, at + 1, self._deferred(value, at))

    def row(self, at: int) -> object:
        return self._deferred(self.values[at], at)

    def cell(self, at: int, column: str, index: int | None = None) -> object:
        return _element(self.values[at], column, index)


class CsvRows(Table):
    """A table of comma- or tab-separated values with a header, UTF-8; every value is a string.

    Rows are numbered by the line that they begin on; the header stands on line 1.
    """

    def __init__(self, path: Path, base64: Sequence[str] = ()) -> None:
        super().__init__(str(path), base64)
        self.path = path
        self.delimiter = DELIMITERS[path.suffix.lower()]
        csv.field_size_limit(2**31 - 1)  # an image in base64 is longer than the default allows
        with open_bytes(path) as file:
            lines = _Lines(file)
            self.header = next(self._records(lines), [])
            self.first = lines.at
            self.first_number = lines.number + 1
        if not any(name.strip() for name in self.header):
            raise DataError(f"{path}: expected a header and rows, found neither.")

    def entries(self) -> Iterator[Entry]:
        with open_bytes(self.path) as file:
            file.seek(self.first)
            lines = _Lines(file, self.first, self.first_number - 1)
            records = self._records(lines)
            while True:
                at, number = lines.at, lines.number + 1
                try:
                    cells = next(records, None)
                    if cells is None:
                        return
                    if cells:
                        yield Entry(at, number, self._deferred(self._named(cells), at))
                except (Invalid, csv.Error) as error:
                    yield Entry(at, number, Invalid(str(error)))

    def row(self, at: int) -> object:
        return self._deferred(self._raw(at), at)

    def cell(self, at: int, column: str, index: int | None = None) -> object:
        return _element(self._raw(at), column, index)

    def _raw(self, at: int) -> Row:
        with self.path.open("rb") as file:
            file.seek(at)
            return self._named(next(self._records(_Lines(file, at))))

    def _records(self, lines: _Lines) -> Iterator[list[str]]:
        return csv.reader(lines, delimiter=self.delimiter)

    def _named(self, cells: list[str]) -> Row:
        if len(cells) != len(self.header):
            raise Invalid(f"the row: expected {len(self.header)} cells as in the header, found {len(cells)}")
        return dict(zip(self.header, cells, strict=True))


class _Lines:
    """Decoded lines of a file, and where the next one begins."""

    def __init__(self, file: Any, at: int = 0, number: int = 0) -> None:
        self.file, self.at, self.number = file, at, number

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        first = self.at == 0
        self.at += len(line)
        self.number += 1
        return decode(line, first)


def open_table(path: Path, key: str = "id", base64: Sequence[str] = ()) -> Table:
    """The table that a file of text is, by its ending: .jsonl, .json (either form), .csv or .tsv.

    Raises:
        DataError: another ending, or a file that cannot be read.
    """
    ending = path.suffix.lower()
    if ending in DELIMITERS:
        return CsvRows(path, base64)
    if ending == ".jsonl" or (ending == ".json" and _is_lines(path)):
        return JsonLines(path, base64)
    if ending == ".json":
        return JsonRows(path, key, base64)
    raise DataError(f"{path}: expected a file that ends in .parquet, .json, .jsonl, .csv or .tsv.")


def open_bytes(path: Path) -> Any:
    """A file of text, opened for its bytes.

    Raises:
        DataError: it cannot be read, is empty, or is UTF-16.
    """
    try:
        file = path.open("rb")
        head = file.read(2)
        file.seek(0)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    if not head or head in UTF16:
        file.close()
        raise DataError(f"{path}: " + ("expected UTF-8 text, found UTF-16." if head else "found no rows, it is empty."))
    return file


def decode(line: bytes, first: bool = False) -> str:
    """A line's text; a byte order mark before the first one does not belong to it.

    Raises:
        Invalid: it is not UTF-8.
    """
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise Invalid(f"not UTF-8 (byte {line[error.start]:#04x} at position {error.start})") from None


def loads(text: str) -> object:
    """The JSON value of a text.

    Raises:
        json.JSONDecodeError: it is no JSON.
        Invalid: it is, but Python does not read it: nested too deeply, or a number of thousands of digits.
    """
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise Invalid("nested too deeply") from None
    except ValueError:
        raise Invalid("a whole number of too many digits") from None
    return value


def parse_line(line: bytes) -> object:
    """The JSON value of a line.

    Raises:
        Invalid: it is no JSON, or not UTF-8.
    """
    text = decode(line, first=True)
    try:
        return loads(text)
    except json.JSONDecodeError as error:
        raise Invalid(f"not JSON ({error.msg} at column {error.colno}): {text.strip()[:60]!r}") from None
    except Invalid as error:
        raise Invalid(f"not JSON ({error})") from None


def parse_json(path: Path) -> object:
    """The JSON value of a file.

    Raises:
        DataError: it cannot be read, is no JSON, or not UTF-8.
    """
    with open_bytes(path) as file:
        data = file.read()
    try:
        return loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found byte {data[error.start]:#04x}.") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno} column {error.colno}"
        raise DataError(f"{path}: expected JSON, found none ({where}).") from None
    except Invalid as error:
        raise DataError(f"{path}: expected JSON, found none ({error}).") from None


def _rows_of(value: object, path: Path, key: str) -> list[object]:
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
        return [{key: name} | row for name, row in value.items()]
    raise DataError(f"{path}: expected a list of rows, or rows by id, found {describe(value)}.")


def _is_lines(path: Path) -> bool:
    """Whether a .json file holds JSON lines: its first line is an object, and it is not the only one."""
    with open_bytes(path) as file:
        first = next((line for line in file if line.strip()), b"")
        more = any(line.strip() for line in file)
    try:
        return more and isinstance(parse_line(first), dict)
    except Invalid:
        return False


def _element(row: object, column: str, index: int | None) -> object:
    value = row.get(column) if isinstance(row, dict) else None
    if index is None:
        return value
    return value[index] if isinstance(value, list) and index < len(value) else None
