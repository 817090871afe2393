"""Data sets that are read as they come, without end: for what fits neither memory nor disk.

Each process that makes batches (a worker of a rank) reads its own share of every data set: of a data set of the hub or
of parquet the files that `datasets` assigns to it (each n-th row where there are fewer files than processes), of a text
file each n-th row. Rows are shuffled in blocks. After the last one the share is read anew, in another order.

The state of a share is the place where its current block begins and how much of that was handed on, so that reading
goes on at the very next question without reading from the start.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from datamodules.arrow import load, undecoded
from datamodules.pictures import ImageBytes
from datamodules.sources.base import Source
from datamodules.tables import Table
from datamodules.vlir.reader import Record
from datamodules.vlir.schema import BadRow, DataError, Invalid

State = dict[str, Any]  # plain values: it goes into checkpoints
Numbered = tuple[int, object]  # a row's number, and the row or why it is none


class Rows(Protocol):
    """One pass over a share of a data set, from any place on."""

    def blocks(self, size: int) -> Iterator[list[Numbered]]:
        """The rows from the current place on, so many at a time."""

    def state(self) -> State:
        """The place behind the block that was read last."""


class TextRows:
    """A share of a text file: each n-th row.

    Args:
        table: the file.
        share: which one, and of how many.
        state: where to go on.
    """

    def __init__(self, table: Table, share: tuple[int, int], state: State | None) -> None:
        self.table, self.share = table, share
        self.place: int = state["place"] if state else 0

    def blocks(self, size: int) -> Iterator[list[Numbered]]:
        """See `Rows`."""
        part, parts = self.share
        start = self.place
        places = enumerate(self.table.entries())
        own = ((place, entry) for place, entry in places if place >= start and place % parts == part)
        while block := list(islice(own, size)):
            self.place = block[-1][0] + 1
            yield [(entry.number, entry.value) for _, entry in block]

    def state(self) -> State:
        """See `Rows`."""
        return {"place": self.place}


class HubRows:
    """A share of a data set that `datasets` streams; rows are numbered as they come.

    Args:
        source: which data set.
        share: which part, and of how many.
        epoch: which pass it is: the order of files depends on it.
        state: where to go on.
    """

    def __init__(self, source: Source, share: tuple[int, int], epoch: int, state: State | None) -> None:
        from datasets.distributed import split_dataset_by_node

        found = undecoded(load(source.path, source.config, source.split, streaming=True))
        self.dataset = split_dataset_by_node(found, rank=share[0], world_size=share[1])
        self.dataset.set_epoch(epoch)
        self.number: int = state["number"] if state else 0
        if state:
            self.dataset.load_state_dict(state["dataset"])

    def blocks(self, size: int) -> Iterator[list[Numbered]]:
        """See `Rows`."""
        # not `for row in dataset`, which would divide its files by worker once more
        for batch in self.dataset.iter(batch_size=size):
            columns = {key: [_referenced(value, key) for value in values] for key, values in batch.items()}
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            first, self.number = self.number + 1, self.number + len(rows)
            yield list(enumerate(rows, start=first))

    def state(self) -> State:
        """See `Rows`."""
        return {"number": self.number, "dataset": self.dataset.state_dict()}


@dataclass
class Stream:
    """The questions of one share of one data set, without end.

    Args:
        source: which data set.
        share: which part, and of how many.
        buffer: rows that are read at a time and shuffled.
        seed: of the order.
    """

    source: Source
    share: tuple[int, int]
    buffer: int
    seed: str
    place: State = field(default_factory=lambda: {"pass": 0, "block": 0, "rows": None, "offset": 0, "part": 0})

    def read(self) -> Iterator[Record | BadRow]:
        """The questions from the current place on, bad rows among them.

        Raises:
            DataError: the data cannot be read, or a whole pass has no usable row.
        """
        file = self.name
        while True:
            usable = self.place["block"] > 0 or self.place["offset"] > 0
            rows = open_rows(self.source, self.share, self.place["pass"], self.place["rows"])
            reason = "no rows"
            for block in rows.blocks(self.buffer):
                after = rows.state()
                order = list(range(len(block)))
                random.Random(f"{self.seed}:{self.place['pass']}:{self.place['block']}").shuffle(order)
                for offset in range(self.place["offset"], len(block)):
                    number, value = block[order[offset]]
                    done = self.place["part"] if offset == self.place["offset"] else 0
                    self.place |= {"offset": offset, "part": done}
                    try:
                        if isinstance(value, Invalid):
                            raise value
                        found = self.source.records(file, number, value)
                    except Invalid as error:
                        reason = f"row {number}: {error}"
                        self.place |= {"offset": offset + 1, "part": 0}
                        yield BadRow(file, number, str(error))
                        continue
                    for part in range(done, len(found)):
                        usable = True
                        self.place["part"] = part + 1
                        yield found[part]
                self.place |= {"block": self.place["block"] + 1, "rows": after, "offset": 0, "part": 0}
            if not usable:
                raise DataError(f"{file}: expected rows of {type(self.source).__name__}, found none usable ({reason}).")
            self.place |= {"pass": self.place["pass"] + 1, "block": 0, "rows": None}

    @property
    def name(self) -> str:
        """What messages call it."""
        part, parts = self.share
        return self.source.path if parts == 1 else f"{self.source.path} (part {part + 1} of {parts})"


@dataclass
class MixedStream:
    """Batches of one share of several data sets, drawn by weight.

    Args:
        streams: the data sets.
        weights: of each.
        batch_size: questions a batch; those whose images cannot be loaded are missing in it.
        seed: of the draws.
    """

    streams: Sequence[Stream]
    weights: Sequence[float]
    batch_size: int
    seed: str
    drawn: int = 0

    def batches(self) -> Iterator[tuple[list[Record], list[str], State]]:
        """Batches without end: questions, the bad rows between them, and the place behind them."""
        readers = [stream.read() for stream in self.streams]
        records: list[Record] = []
        skipped: list[str] = []
        while True:
            chosen = random.Random(f"{self.seed}:{self.drawn}").choices(range(len(readers)), self.weights)[0]
            while isinstance(found := next(readers[chosen]), BadRow):
                skipped.append(str(found))
            self.drawn += 1
            records.append(found)
            if len(records) == self.batch_size:
                yield records, skipped, self.state()
                records, skipped = [], []

    def state(self) -> State:
        """The place behind the last batch."""
        return {"drawn": self.drawn, "places": [dict(stream.place) for stream in self.streams]}

    def load(self, state: State) -> None:
        """Go to a place."""
        self.drawn = state["drawn"]
        for stream, place in zip(self.streams, state["places"], strict=True):
            stream.place = dict(place)


def open_rows(source: Source, share: tuple[int, int], epoch: int, state: State | None) -> Rows:
    """A pass over a share of a data set.

    Raises:
        DataError: it cannot be read, or is one whose images are base64 text.
    """
    if source.is_text:
        return TextRows(source.open(), share, state)
    if source.base64:
        raise DataError(f"{source.path}: images in base64 text cannot be streamed.")
    return HubRows(source, share, epoch, state)


def _referenced(value: Any, name: str) -> Any:
    """A value in which embedded images are references."""
    if isinstance(value, list):
        return [_referenced(item, name) for item in value]
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["path"] if value["bytes"] is None else ImageBytes(value["bytes"], value["path"] or name)
    return ImageBytes(value, name) if isinstance(value, bytes) else value
