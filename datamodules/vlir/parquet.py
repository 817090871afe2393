"""VLIR rows in parquet: the same keys as in JSON lines, an absent one is null.

`images` is a list of Hugging Face images, each with its bytes, its path, or both; `meta` and `provenance`, which may
hold anything, are JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.pictures import ImageFile, ImageRef
from datamodules.vlir.schema import Invalid, describe, expect

if TYPE_CHECKING:
    from datasets import Features

JSON_COLUMNS = ("meta", "provenance")
EMBEDDED = "embedded"  # stands for the path of an image that the row itself holds
ROW_GROUP = 100  # rows that are written at a time where they hold images, as `datasets` does
ROW_GROUP_WITHOUT = 250


def features() -> Features:
    """The columns and their types."""
    from datasets import Features, Image, List, Value

    region = {"box": List(Value("float64")), "image": Value("int64"), "why": Value("string"), "zoom": Value("float64")}
    return Features(
        {
            "id": Value("string"),
            "images": List(Image()),
            "question": Value("string"),
            "answers": List(Value("string")),
            "source": Value("string"),
            "choices": List(Value("string")),
            "answer_kind": Value("string"),
            "regions": List(region),
            "rationale": List({"text": Value("string"), "region": region}),
            "meta": Value("string"),
            "provenance": Value("string"),
        }
    )


def write_parquet(path: Path, rows: Iterable[dict[str, Any]], embed: Path | None = None) -> None:
    """Write VLIR rows, a group at a time.

    Args:
        path: the file.
        rows: as in JSON lines; see `datamodules.vlir.schema.to_row`.
        embed: the folder that their image paths start at, to write the images' bytes into the file as well; else the
            paths alone are written.

    Raises:
        Invalid: an image path that leaves its folder.
        OSError: an image that cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = features().arrow_schema
    rest, size = iter(rows), ROW_GROUP_WITHOUT if embed is None else ROW_GROUP
    with pq.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(rest, size)):
            writer.write_table(pa.Table.from_pylist([_stored(row, embed) for row in chunk], schema=schema))


def plain(value: object) -> tuple[object, list[ImageRef | None]]:
    """A parquet row in the form that it has in JSON lines.

    Returns:
        The row; and for each image where it is embedded, or None if the row holds its path only.

    Raises:
        Invalid: ``meta`` or ``provenance`` is no JSON.
    """
    row = {key: _without_nulls(item) for key, item in expect(value, dict, "the row", "an object").items()}
    row = {key: item for key, item in row.items() if item is not None}
    for key in JSON_COLUMNS:
        if isinstance(row.get(key), str):
            try:
                row[key] = json.loads(row[key])
            except (ValueError, RecursionError):
                raise Invalid(f"key `{key}`: expected an object as JSON text, found {describe(row[key])}") from None
    found = [row["image"]] if "image" in row else row.get("images", [])
    if not isinstance(found, list):
        return row, []  # which is refused where the row is read
    embedded = [image if isinstance(image, ImageRef) else None for image in found]
    paths = [EMBEDDED if isinstance(image, ImageRef) else image for image in found]
    return row | ({"image": paths[0]} if "image" in row else {"images": paths}), embedded


def _without_nulls(value: Any) -> Any:
    """Regions and steps without the keys that are null, for columns have every key."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _stored(row: dict[str, Any], embed: Path | None) -> dict[str, Any]:
    paths = [row["image"]] if "image" in row else row.get("images", [])
    images = [
        {"path": path, "bytes": None if embed is None else ImageFile(embed, path).open().read_bytes()} for path in paths
    ]
    texts = {key: json.dumps(row[key], ensure_ascii=False) for key in JSON_COLUMNS if key in row}
    return {key: value for key, value in row.items() if key != "image"} | {"images": images} | texts
