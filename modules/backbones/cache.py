"""A key-value cache whose rows have lengths of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class RaggedCache(Cache):
    """Keys and values of B rows; row b holds ``lengths[b]`` tokens, without holes.

    A forward pass appends a right-padded chunk, to all rows or to some: call `prepare` with the number of real tokens
    a row, run the model with the mask it returns, then `commit`. What a padding token writes lies behind the row's end,
    is masked, and is overwritten by the next chunk. Buffers grow by doubling, so that appending token by token copies
    each token a constant number of times; they may have more rows than are in use.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths = torch.zeros(0, dtype=torch.long)  # (B,)
        self.keys: list[Tensor] = []  # a layer: (B or more, heads, capacity, head dimension)
        self.values: list[Tensor] = []
        self._rows: Tensor | None = None  # (n,) which rows the chunk in flight goes to; None: all
        self._counts = self.lengths  # (n,) its real tokens
        self._slots = torch.zeros(0, 0, dtype=torch.long)  # (n, width) where it goes
        self._start: int | None = None  # the common first slot, where all rows have one length
        self._end = 0

    def prepare(self, counts: Tensor, width: int, blocks: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Make room for a chunk of ``width`` columns, ``counts`` of them real in each of n rows.

        Args:
            counts: (n,) long.
            width: columns of the chunk, padding included.
            blocks: (n, width) long; tokens of the chunk that share a number >= 0 attend to each other
                in both directions.
            rows: (n,) long, distinct: which rows the chunk goes to; None: all. A part of them is copied to be read.

        Returns:
            (n, 1, width, end) bool, True where a query may attend: to all that its row holds, and
            causally to the chunk itself.
        """
        if len(self.lengths) == 0:
            self.lengths = torch.zeros_like(counts)
        self._rows, self._counts = rows, counts
        lengths = self.lengths if rows is None else self.lengths[rows]
        longest = int(lengths.max())
        self._start = longest if rows is None and int(lengths.min()) == longest else None
        self._end = longest + width
        self._slots = lengths[:, None] + torch.arange(width, device=counts.device)
        mask = torch.arange(self._end, device=counts.device) <= self._slots[..., None]
        if blocks is not None:
            of_key = torch.full((len(counts), self._end), -1, device=counts.device).scatter(1, self._slots, blocks)
            mask = mask | ((blocks[:, :, None] == of_key[:, None, :]) & (blocks >= 0)[:, :, None])
        return mask[:, None]

    def commit(self) -> None:
        """Count the chunk that was appended."""
        if self._rows is None:
            self.lengths = self.lengths + self._counts
        else:
            self.lengths = self.lengths.index_add(0, self._rows, self._counts)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention layers: append (n, heads, width, d), return all that may be seen."""
        return self._write(self.keys, layer_idx, key_states), self._write(self.values, layer_idx, value_states)

    def _write(self, buffers: list[Tensor], layer: int, states: Tensor) -> Tensor:
        if layer == len(buffers):
            buffers.append(states[:0, :, :0])
        count = len(self.lengths)
        buffer = buffers[layer] = _grown(buffers[layer], states, count, self._end)
        if self._start is not None:
            buffer[:count, :, self._start : self._end] = states
        else:
            rows = torch.arange(count, device=states.device) if self._rows is None else self._rows
            buffer[rows[:, None], :, self._slots] = states.transpose(1, 2)
        held = buffer[:, :, : self._end]
        return held[:count] if self._rows is None else held[self._rows]

    def append(self, parts: Sequence[tuple[RaggedCache, Tensor]], release: bool = False) -> None:
        """Put copies of rows of other caches behind the own ones.

        Args:
            parts: caches of the same layers, and which of their rows (n,) long, repeats included.
            release: give theirs up, layer by layer, so that not all of it exists twice at a time.
        """
        before = len(self.lengths)
        added = torch.cat([other.lengths[rows] for other, rows in parts])
        self.lengths = torch.cat([self.lengths.to(added.device), added])
        count, longest = len(self.lengths), int(self.lengths.max())
        for layer in range(len(parts[0][0].keys)):
            for name in ("keys", "values"):
                buffers: list[Tensor] = getattr(self, name)
                if layer == len(buffers):
                    buffers.append(getattr(parts[0][0], name)[layer][:0, :, :0])
                start = before
                for other, rows in parts:
                    theirs: list[Tensor] = getattr(other, name)
                    buffer = buffers[layer] = _grown(buffers[layer], theirs[layer], count, longest)
                    width, stop = min(theirs[layer].shape[2], longest), start + len(rows)
                    buffer[start:stop, :, :width] = theirs[layer][:, :, :width][rows]
                    buffer[start:stop, :, width:] = 0  # what is left there by another row may be NaN: see `_grown`
                    start = stop
                    if release:
                        theirs[layer] = theirs[layer][:0, :, :0].clone()

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given ``rows`` (B',) long, in that order; rows that stay where they are cost nothing."""
        count = len(rows)
        moved = (rows != torch.arange(count, device=rows.device)).nonzero()[:, 0]
        self.lengths = self.lengths[rows]
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):  # one at a time: not all of the old ones live beside the new
                if count > len(buffer):
                    buffers[layer] = buffer[rows]
                elif len(moved):
                    buffer[moved] = buffer[rows[moved]]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row's length."""
        return int(self.lengths.max()) if len(self.lengths) else 0


def _grown(buffer: Tensor, like: Tensor, rows: int, end: int) -> Tensor:
    """The same buffer if it has so many rows and slots, else a larger one with the same in its beginning."""
    if rows <= buffer.shape[0] and end <= buffer.shape[2]:
        return buffer
    capacity = buffer.shape[2] if end <= buffer.shape[2] else max(64, 1 << (end - 1).bit_length())
    # zeros: a masked slot has weight 0, and 0 times the NaN of uninitialised memory is NaN
    grown = like.new_zeros(rows, like.shape[1], capacity, like.shape[3])
    kept = min(rows, len(buffer))
    grown[:kept, :, : buffer.shape[2]] = buffer[:kept]
    return grown
