"""The sampler's KV cache: allocated once, rows leave and enter, every row contiguous and ending at one cursor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlabLayer(CacheLayerMixin):
    """Keys and values of one transformer layer in slabs of fixed size ``[slots, heads, columns, head size]``.

    Sliding-window layers keep all columns too; the model's own mask hides what is outside the window.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, slots: int, columns: int, dtype: torch.dtype | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots, self.columns, self.wanted_dtype = slots, columns, dtype
        self.rows = self.cursor = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def slab(states: Tensor) -> Tensor:
            shape = (self.slots, states.shape[1], self.columns, states.shape[3])
            return states.new_zeros(shape, dtype=self.wanted_dtype)

        self.keys, self.values = slab(key_states), slab(value_states)
        self.dtype, self.device = self.keys.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.cursor + key_states.shape[2]
        self.keys[: self.rows, :, self.cursor : end] = key_states
        self.values[: self.rows, :, self.cursor : end] = value_states
        return self.keys[: self.rows, :, :end], self.values[: self.rows, :, :end]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # Before version 5.4 (or so) transformers gave the new columns' indices here, and not their number.
        queries = query_length if isinstance(query_length, int) else len(query_length)
        return self.cursor + queries, 0

    def get_seq_length(self) -> int:
        return self.cursor

    def get_max_length(self) -> int:
        return self.columns

    get_max_cache_shape = get_max_length
    """The same under its older name."""


class SlabCache(Cache):
    """A cache of ``slots`` rows and ``columns`` columns for all layers of a model.

    Rows ``[0, rows)`` are in use. A row with ``n`` tokens so far fills columns ``[cursor - n, cursor)``: all rows
    end at the cursor, so a decode step writes one column and every row stays contiguous (what sliding windows and ALiBi
    count by). ``starts`` [rows] holds each row's first column.

    Args:
        dtype: of keys and values; None takes that of the first ones written.
    """

    def __init__(
        self, *, layers: int, slots: int, columns: int, starts: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        self.slabs = [SlabLayer(slots, columns, dtype) for _ in range(layers)]
        super().__init__(layers=list(self.slabs))
        self.columns = columns
        self.starts = starts
        self.cursor = 0
        self._place(len(starts), 0)

    @property
    def rows(self) -> int:
        return self.starts.shape[0]

    def mask(self, new: int) -> Tensor:
        """[rows, cursor + new] bool: which columns are real once ``new`` columns were written."""
        return torch.arange(self.cursor + new, device=self.starts.device)[None, :] >= self.starts[:, None]

    def advance(self, new: int) -> None:
        """To be called after a forward pass that wrote ``new`` columns."""
        self._place(self.rows, self.cursor + new)

    def _place(self, rows: int, cursor: int) -> None:
        self.cursor = cursor
        for slab in self.slabs:
            slab.rows, slab.cursor = rows, cursor

    def keep(self, rows: Tensor) -> None:
        """Only these rows (index [K], each at most once) stay, in this order, in the first K slots."""
        goal = torch.arange(len(rows), device=rows.device)
        moved = goal != rows
        source, goal = rows[moved], goal[moved]
        if len(source):
            first = int(self.starts[source].min())
            for states in self._states():
                states[goal, :, first : self.cursor] = states[source, :, first : self.cursor]
        self.starts = self.starts[rows]
        self._place(len(rows), self.cursor)

    def _states(self) -> Iterator[Tensor]:
        """Keys and values of every layer that was written to."""
        for slab in self.slabs:
            if slab.is_initialized:
                assert slab.keys is not None and slab.values is not None
                yield slab.keys
                yield slab.values

    def shift(self, columns: int) -> None:
        """Move every row by ``columns`` to the right (negative: to the left)."""
        if columns == 0:
            return
        if self.rows:
            first = int(self.starts.min())
            for states in self._states():
                # A copy, because where rows move by less than their length, source and goal overlap.
                moved = states[: self.rows, :, first : self.cursor].clone()
                states[: self.rows, :, first + columns : self.cursor + columns] = moved
        self.starts = self.starts + columns
        self._place(self.rows, self.cursor + columns)

    def make_room(self, width: int) -> None:
        """Shift rows so that a new row of ``width`` tokens can end at the cursor and one more column can be written."""
        if self.cursor < width:
            self.shift(width - self.cursor)
        elif self.cursor >= self.columns:
            self.shift(-int(self.starts.min()) if self.rows else -self.cursor)
            if self.cursor < width:
                self.shift(width - self.cursor)

    def append(self, other: SlabCache, rows: Tensor) -> None:
        """Add rows of another cache (index [K], repeats allowed) behind the rows in use; ``make_room`` comes first."""
        old, new = self.rows, len(rows)
        width = int((other.cursor - other.starts[rows]).max())
        for slab, source in zip(self.slabs, other.slabs, strict=True):
            assert source.keys is not None and source.values is not None
            if not slab.is_initialized:
                slab.lazy_initialization(source.keys, source.values)
            assert slab.keys is not None and slab.values is not None
            for states, given in ((slab.keys, source.keys), (slab.values, source.values)):
                part = given[rows, :, other.cursor - width : other.cursor]
                states[old : old + new, :, self.cursor - width : self.cursor] = part
        self.starts = torch.cat([self.starts, other.starts[rows] + (self.cursor - other.cursor)])
        self._place(old + new, self.cursor)
