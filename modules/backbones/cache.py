"""A key-value cache whose rows have lengths of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class RaggedCache(Cache):
    """Keys and values of B rows; row b holds ``lengths[b]`` tokens, without holes.

    A forward pass appends a right-padded chunk: call `prepare` with the number of real tokens a row,
    run the model with the mask it returns, then `commit`. What a padding token writes lies behind
    the row's end, is masked, and is overwritten by the next chunk. Buffers grow by doubling, so
    that appending token by token copies each token a constant number of times.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths = torch.zeros(0, dtype=torch.long)  # (B,)
        self.keys: list[Tensor] = []  # a layer: (B, heads, capacity, head dimension)
        self.values: list[Tensor] = []
        self._slots = torch.zeros(0, 0, dtype=torch.long)  # (B, n) where the chunk in flight goes
        self._start: int | None = None  # the common first slot, where all rows have one length
        self._end = 0

    def prepare(self, counts: Tensor, width: int, blocks: Tensor | None = None) -> Tensor:
        """Make room for a chunk of ``width`` columns, ``counts`` (B,) of them real in each row.

        Args:
            counts: (B,) long.
            width: columns of the chunk, padding included.
            blocks: (B, width) long; tokens of the chunk that share a number >= 0 attend to each other
                in both directions.

        Returns:
            (B, 1, width, end) bool, True where a query may attend: to all that its row holds, and
            causally to the chunk itself.
        """
        if len(self.lengths) == 0:
            self.lengths = torch.zeros_like(counts)
        longest = int(self.lengths.max())
        self._start = longest if int(self.lengths.min()) == longest else None
        self._end = longest + width
        self._slots = self.lengths[:, None] + torch.arange(width, device=counts.device)
        self._counts = counts
        mask = torch.arange(self._end, device=counts.device) <= self._slots[..., None]
        if blocks is not None:
            of_key = torch.full((len(counts), self._end), -1, device=counts.device).scatter(1, self._slots, blocks)
            mask = mask | ((blocks[:, :, None] == of_key[:, None, :]) & (blocks >= 0)[:, :, None])
        return mask[:, None]

    def commit(self) -> None:
        """Count the chunk that was appended."""
        self.lengths = self.lengths + self._counts

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention layers: append (B, heads, n, d), return all that may be seen."""
        if layer_idx == len(self.keys):
            self.keys.append(self._buffer(key_states))
            self.values.append(self._buffer(value_states))
        for buffers, states in ((self.keys, key_states), (self.values, value_states)):
            if buffers[layer_idx].shape[2] < self._end:
                grown = self._buffer(states)
                grown[:, :, : buffers[layer_idx].shape[2]] = buffers[layer_idx]
                buffers[layer_idx] = grown
            if self._start is not None:
                buffers[layer_idx][:, :, self._start : self._end] = states
            else:
                rows = torch.arange(states.shape[0], device=states.device)[:, None]
                buffers[layer_idx][rows, :, self._slots] = states.transpose(1, 2)
        return self.keys[layer_idx][:, :, : self._end], self.values[layer_idx][:, :, : self._end]

    def _buffer(self, states: Tensor) -> Tensor:
        capacity = max(64, 1 << (self._end - 1).bit_length())
        # zeros: a masked slot has weight 0, and 0 times the NaN of uninitialised memory is NaN
        return states.new_zeros(states.shape[0], states.shape[1], capacity, states.shape[3])

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given ``rows`` (B',) long, in that order."""
        self.lengths = self.lengths[rows]
        for layer in range(len(self.keys)):  # one at a time: not all of the old ones live beside all of the new ones
            self.keys[layer] = self.keys[layer][rows]
            self.values[layer] = self.values[layer][rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row's length."""
        return int(self.lengths.max()) if len(self.lengths) else 0
