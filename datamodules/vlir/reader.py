"""VLIR files to records: everything about a question but its decoded images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from datamodules.vlir.schema import BadRow, DataError, Invalid, check_boxes, from_row
from modules.trajectory import Sample


@dataclass(frozen=True, eq=False)
class Record:
    """One question whose images are not decoded yet."""

    sample: Sample  # without images
    image_paths: tuple[Path, ...]
    file: str
    row: int  # 1-based
    finish: Callable[[Sample], Sample] = check_boxes  # what has to see the images; raises Invalid


def read_records(path: Path, root: Path | None = None, limit: int | None = None) -> tuple[list[Record], list[BadRow]]:
    """Read one VLIR file.

    Args:
        path: JSON lines, UTF-8, with or without a byte order mark; blank lines are passed over.
        root: where image paths start; the file's folder if None.
        limit: stop after this many usable rows.

    Returns:
        The usable rows, and the others with the reason of each.

    Raises:
        DataError: the file cannot be read, is not JSON lines, or has no usable row.
    """
    root = path.parent if root is None else root
    records: list[Record] = []
    bad: list[BadRow] = []
    numbered = ((number, line) for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip())
    for number, line in numbered:
        try:
            sample, paths = from_row(_parse(line))
        except Invalid as error:
            bad.append(BadRow(str(path), number, str(error)))
        else:
            records.append(Record(sample, tuple(root / relative for relative in paths), str(path), number))
        if limit is not None and len(records) == limit:
            break
    require_records(path, records, bad, "one JSON object a line")
    return records, bad


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


def require_records(path: Path, records: list[Record], bad: list[BadRow], form: str) -> None:
    """Raise DataError if a file has no usable row.

    Args:
        form: what the file should hold, for the message.
    """
    if records:
        return
    if not bad:
        raise DataError(f"{path}: expected {form}, found no rows.")
    reasons = "; ".join(f"row {error.row}: {error.why}" for error in islice(bad, 2))
    raise DataError(f"{path}: expected {form}, found no usable row among {len(bad)} ({reasons}).")


def _parse(line: str) -> object:
    try:
        value: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise Invalid(f"not JSON ({error.msg} at column {error.colno}): {line.strip()[:60]!r}") from None
    return value
