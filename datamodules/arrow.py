"""Rows of parquet files, folders of these, and data sets of the hub: on disk, one at a time.

A parquet file without embedded images, in groups of not too many rows, is read where it lies. All others go through
`datasets`, which keeps a copy in its cache in which an image can be reached without reading its neighbours.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.pictures import StoredImage
from datamodules.tables import Entry, Row, Table
from datamodules.vlir.schema import DataError

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK = 1_000  # rows that are converted at a time
GROUP = 2_000  # rows of a parquet file's group, beyond which one of them takes too long to reach
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ArrowRows(Table):
    """A data set that lies on disk, mapped into memory.

    Images (structs of ``bytes`` and ``path``, or plain bytes) are references until they are needed; an image of which
    the file has the path only is that path.

    Args:
        dataset: of Hugging Face.
        name: the file or data set, for messages.
    """

    def __init__(self, dataset: Dataset, name: str, base64: Sequence[str] = ()) -> None:
        super().__init__(name, base64)
        self.dataset = undecoded(dataset).with_format("arrow")

    def chunks(self) -> Iterator[Any]:
        """All rows in order, as Arrow tables."""
        yield from self.dataset.iter(batch_size=CHUNK)

    def chunk(self, at: int) -> Any:
        """One row, as an Arrow table."""
        return self.dataset[[at]]

    def entries(self) -> Iterator[Entry]:
        """See `Table.entries`."""
        at = 0
        for chunk in self.chunks():
            for row in self._rows(chunk, at):
                yield Entry(at, at + 1, row)
                at += 1

    def row(self, at: int) -> object:
        """See `Table.row`."""
        return self._rows(self.chunk(at), at)[0]

    def cell(self, at: int, column: str, index: int | None = None) -> object:
        """See `Table.cell`."""
        scalar = self.chunk(at).column(column)[0]
        value = (scalar if index is None else scalar[index]).as_py()
        return value["bytes"] if isinstance(value, dict) else value

    def _rows(self, chunk: Any, start: int) -> list[Row]:
        columns = {name: self._column(chunk.column(name).combine_chunks(), name, start) for name in chunk.column_names}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _column(self, values: Any, name: str, start: int) -> list[Any]:
        """A column's values, without reading an image's bytes."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kind = values.type
        if pa.types.is_list(kind) and is_image(kind.value_type):
            paths = _paths(values.flatten())
            places = _places(pc.list_value_length(values).to_pylist())
            return [
                None if place is None else [self._image(paths[k], start + row, name, k - place.start) for k in place]
                for row, place in enumerate(places)
            ]
        if is_image(kind):
            return [self._image(path, start + row, name, None) for row, path in enumerate(_paths(values))]
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or name in self.base64:
            there = pc.is_valid(values).to_pylist()
            return [StoredImage(self, start + row, name) if found else None for row, found in enumerate(there)]
        found: list[Any] = values.to_pylist()
        return found

    def _image(self, path: object, at: int, name: str, index: int | None) -> object:
        return StoredImage(self, at, name, index) if path is _EMBEDDED else path


class ParquetRows(ArrowRows):
    """A parquet file whose rows are all small; see `open_parquet`.

    Args:
        path: the file.
        base64: see `Table`.
    """

    def __init__(self, path: Path, base64: Sequence[str] = ()) -> None:
        import pyarrow.parquet as pq

        Table.__init__(self, str(path), base64)
        self.path = path
        self._file: Any = None  # open, for its footer takes longer to read than a group
        found = pq.read_metadata(path)
        self.starts = [0, *accumulate(found.row_group(k).num_rows for k in range(found.num_row_groups))]
        self._last: tuple[int, Any] | None = None  # the group that was read last, and its rows

    def chunks(self) -> Iterator[Any]:
        """See `ArrowRows.chunks`."""
        for group in range(len(self.starts) - 1):
            yield self._group(group)

    def chunk(self, at: int) -> Any:
        """See `ArrowRows.chunk`."""
        group = bisect_right(self.starts, at) - 1
        if self._last is None or self._last[0] != group:
            self._last = group, self._group(group)
        return self._last[1].slice(at - self.starts[group], 1)

    def _group(self, group: int) -> Any:
        import pyarrow.parquet as pq

        self._file = self._file or pq.ParquetFile(self.path)
        return self._file.read_row_group(group, use_threads=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None, "_file": None}


def open_parquet(path: Path, base64: Sequence[str] = ()) -> ArrowRows:
    """The rows of one parquet file.

    Raises:
        DataError: there is none, or it is no parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_metadata(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder.") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as a data set ({_first(error)}).") from None
    groups = [found.row_group(k) for k in range(found.num_row_groups)]
    binary = [k for k in range(found.num_columns) if _is_binary(found.schema.column(k))]
    if not base64 and all(group.num_rows <= GROUP and not _holds(group, binary) for group in groups):
        return ParquetRows(path, base64)
    return ArrowRows(load(str(path)), str(path), base64)


def _is_binary(column: Any) -> bool:
    """Whether a parquet column is bytes that are no text."""
    return column.physical_type == "BYTE_ARRAY" and column.logical_type.type not in ("STRING", "JSON", "ENUM")


def _holds(group: Any, columns: list[int]) -> bool:
    """Whether a parquet file's group may have values in one of these columns."""
    known = [group.column(k) for k in columns]
    return any(
        column.statistics is None
        or not column.statistics.has_null_count
        or column.statistics.null_count < column.num_values
        for column in known
    )


_EMBEDDED = object()


def is_image(kind: Any) -> bool:
    """Whether an Arrow type is a struct of ``bytes`` and ``path``, as Hugging Face stores images."""
    import pyarrow as pa

    return pa.types.is_struct(kind) and {kind.field(k).name for k in range(kind.num_fields)} == {"bytes", "path"}


def _paths(images: Any) -> list[object]:
    """Of a column of image structs: `_EMBEDDED` where there are bytes, else the path, else None."""
    import pyarrow.compute as pc

    there = pc.is_valid(pc.struct_field(images, "bytes")).to_pylist()
    paths = pc.struct_field(images, "path").to_pylist()
    return [_EMBEDDED if found else path for found, path in zip(there, paths, strict=True)]


def _places(lengths: list[int | None]) -> list[range | None]:
    """Where each list's elements stand in the flattened column; None where there is no list."""
    places: list[range | None] = []
    start = 0
    for length in lengths:
        places.append(None if length is None else range(start, start + length))
        start += length or 0
    return places


def undecoded(dataset: Any) -> Any:
    """The data set with its images as bytes and paths: decoding is this project's own."""
    from datasets import Image, List

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def load(path: str, config: str | None = None, split: str | None = None, streaming: bool = False) -> Any:
    """A parquet file, a folder of such, a saved data set, or a data set of the hub.

    Args:
        path: where it lies, or its name on the hub.
        config: which of its configurations, if it has several.
        split: which of its splits, if it has several.
        streaming: whether to read it as it comes, an `IterableDataset`, instead of having it on disk.

    Raises:
        DataError: there is none, it cannot be read, or it has several splits and none was named.
    """
    import datasets
    import pyarrow as pa
    from datasets.exceptions import DatasetNotFoundError

    datasets.disable_progress_bars()
    where = Path(path)
    if not where.exists() and (where.suffix == ".parquet" or not HUB_NAME.fullmatch(path)):
        raise DataError(f"{path}: no such file or folder.")
    try:
        if where.is_file():
            return datasets.load_dataset("parquet", data_files=str(where), split="train", streaming=streaming)
        if (where / "state.json").is_file():
            saved = datasets.load_from_disk(path)
            return saved.to_iterable_dataset() if streaming else saved
        if config is not None and (where / config).is_dir():
            path, where, config = str(where / config), where / config, None
        if where.is_dir() and not any(where.rglob("*.parquet")):
            raise DataError(f"{path}: expected parquet files in the folder, found none.")
        if split is None:
            found = datasets.get_dataset_split_names(path, config)
            if len(found) != 1:
                raise DataError(f"{path}: it has the splits {', '.join(found)}: say which by `split`.")
            split = found[0]
        return datasets.load_dataset(path, config, split=split, streaming=streaming)
    except DatasetNotFoundError:
        raise DataError(f"{path}: no such file or folder, and no such data set on the hub.") from None
    except (ConnectionError, TimeoutError) as error:
        raise DataError(f"{path}: no such file or folder, and the hub cannot be reached ({_first(error)}).") from None
    except (OSError, ValueError, RuntimeError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as a data set ({_first(error.__cause__ or error)}).") from None


def _first(error: BaseException) -> str:
    """The first line of a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
