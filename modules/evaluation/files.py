"""Reads files of predictions and annotations: JSON by id, lists and lines, tables, parquet, and our own predictions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.evaluation.common import Row, ScoreError

IDS = ("question_id", "questionId", "Question_id", "pid", "id", "idx", "index", "Index")
PIXELS = {"decoded_image", "image_preview"}  # columns beside ``image`` that hold pictures
OWN = {"id", "mode", "answers", "answer", "stop"}  # a line of `callbacks.rollout.prediction` has all of these


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        ScoreError: if it cannot be read, is empty, or is not UTF-8 without a byte order mark.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ScoreError(f"Expected a file at {str(path)!r}, but got: {error.strerror}.") from error
    if not data.strip():
        raise ScoreError(f"Expected {str(path)!r} to hold predictions or annotations, but it is empty.")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ScoreError(f"Expected {str(path)!r} in UTF-8 without a byte order mark, but row 1 begins with one.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ScoreError(f"Expected {str(path)!r} in UTF-8, but row {line} is not.") from error


def read_json(path: Path) -> Any:
    """A JSON value, or a list of those of JSON lines.

    Raises:
        ScoreError: as `read_text`, or if it is no JSON, or an object has a key twice.
    """
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    # the first line of JSON lines is a value of its own
    if _is_object(lines[0][1]) and (path.suffix == ".jsonl" or len(lines) > 1):
        return [_parse(line, path, number) for number, line in lines]
    return _parse(text, path, 1)


def read_rows(path: Path) -> list[Row]:
    """Rows of an object by id (of objects, or of predictions), a list of objects, JSON lines, a table or parquet.

    An object whose ``data`` is a list is that list, as TextVQA and DocVQA have it.

    Raises:
        ScoreError: as `read_json`, or if it is none of these.
    """
    if path.suffix in (".csv", ".tsv"):
        return read_csv(path, "\t" if path.suffix == ".tsv" else ",")
    if path.suffix == ".parquet" or (path.is_dir() and sorted(path.glob("*.parquet"))):
        return read_parquet(path)
    value = read_json(path)
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    return rows_of(value, path)


def read_parquet(path: Path) -> list[Row]:
    """Rows of a parquet file, or of those of a folder in the order of their names; images are left where they are.

    Raises:
        ScoreError: if pyarrow is not installed, or a file cannot be read.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ScoreError(f"Expected pyarrow to read {str(path)!r}, but it is not installed.") from error
    rows = []
    for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        try:
            table = parquet.ParquetFile(file)
            kept = [field.name for field in table.schema_arrow if field.name not in PIXELS and not _binary(field.type)]
            found = table.read(columns=kept).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise ScoreError(f"Expected parquet in {str(file)!r}, but got: {error}.") from error
        rows += [_row(fields, f"{str(file)!r}, row {number}") for number, fields in enumerate(found, 1)]
    return rows


def _binary(kind: Any) -> bool:
    """Whether a column holds images: structs with bytes, or lists of them."""
    return "binary" in str(kind)


def rows_of(value: Any, path: Path) -> list[Row]:
    """See `read_rows`; ``value`` is what the file holds."""
    if isinstance(value, list):
        rows = [_row(fields, f"{str(path)!r}, row {number}") for number, fields in enumerate(value, 1)]
        return own(rows) if rows and rows[0].fields.keys() >= OWN else rows
    if not isinstance(value, dict):
        raise ScoreError(f"Expected {str(path)!r} to hold rows, or an object by id, but got {value!r}.")
    nested = [isinstance(fields, dict) for fields in value.values()]
    if nested and all(nested):
        return [Row(f"{str(path)!r}, row {key!r}", key, fields) for key, fields in value.items()]
    if value.keys() & {"question", "text", "answer", "response"}:  # one row of JSON lines
        return [_row(value, f"{str(path)!r}, row 1")]
    return [Row(f"{str(path)!r}, row {key!r}", key, {"prediction": entry}) for key, entry in value.items()]


def read_csv(path: Path, delimiter: str = ",") -> list[Row]:
    """Rows of a table with a header.

    Raises:
        ScoreError: as `read_text`, or if a row has more cells than the header.
    """
    rows = []
    table = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    for number, fields in enumerate(table, 2):
        if None in fields:
            raise ScoreError(f"Expected {str(path)!r}, row {number} to have as many cells as the header.")
        rows.append(_row(fields, f"{str(path)!r}, row {number}"))
    return rows


def own(rows: Sequence[Row]) -> list[Row]:
    """Lines of our ``predictions.jsonl``: the greedy ones, or those of the only mode; of several draws the first.

    Raises:
        ScoreError: if there are several modes, and none is greedy.
    """
    modes = sorted({str(row.value("mode")) for row in rows})
    mode = modes[0] if len(modes) == 1 else "greedy"
    if mode not in modes:
        raise ScoreError(f"Expected {rows[0].where.split(',')[0]} to hold one mode or `greedy`, but got {modes}.")
    return [own_row(row) for row in rows if row.value("mode") == mode and row.fields.get("draw", 0) == 0]


def own_row(row: Row) -> Row:
    """The final answer under the names that the scorers know, beside what the run kept of the benchmark's own row."""
    answers, answer, annotation = row.value("answers"), row.value("answer") or "", row.fields.get("annotation") or {}
    if not isinstance(answers, list):
        raise ScoreError(f"Expected `answers` of {row.where} to be a list, but got {answers!r}.")
    if not isinstance(annotation, Mapping):
        raise ScoreError(f"Expected `annotation` of {row.where} to be an object, but got {annotation!r}.")
    fields: dict[str, Any] = {"text": row.value("question")}
    if answers:
        fields["label"] = answers[0]
    fields |= annotation
    source = row.fields.get("source")
    if not isinstance(source, str | None):
        raise ScoreError(f"Expected `source` of {row.where} to be a text, but got {source!r}.")
    return Row(row.where, row.id, fields | {"response": answer, "extraction": answer}, source or None)


def _row(fields: Any, where: str) -> Row:
    if not isinstance(fields, Mapping):
        raise ScoreError(f"Expected {where} to be an object, but got {fields!r}.")
    found = next((fields[name] for name in IDS if name in fields), None)
    if isinstance(found, bool) or not isinstance(found, (str, int, type(None))):
        raise ScoreError(f"Expected the id of {where} to be a text or a whole number, but got {found!r}.")
    return Row(where, None if found is None else str(found), fields)


def _parse(text: str, path: Path, first: int) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ScoreError(f"Expected every key once in {str(path)!r}, row {key!r}, but it is there twice.")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        row = first + error.lineno - 1
        raise ScoreError(f"Expected JSON in {str(path)!r}, but row {row} has none: {error.msg}.") from error
    except RecursionError as error:
        raise ScoreError(f"Expected JSON in {str(path)!r}, but row {first} is nested too deeply.") from error
    except ScoreError:
        raise
    except ValueError as error:
        raise ScoreError(f"Expected JSON in {str(path)!r}, but row {first} has a number of too many digits.") from error


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
