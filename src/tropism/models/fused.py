"""Decode steps for the commonest families without the overhead of their general code.

One step of a Hugging Face model calls hundreds of small operations that a single token does not need: masks of four
dimensions, copies of keys and values per query head, separate projections. A fused step computes the same numbers from
the same weights with few calls. Every family is compared with the model's own forward before its first use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tropism.models.packed import Dense, PackedWeights

logger = logging.getLogger("tropism")

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest difference of a fused step from the model's own, relative to its largest hidden state; 5e-2 in half
precision."""


class Slab(Protocol):
    """Keys and values of one layer, each [slots, kv heads, columns, head size]."""

    keys: Any
    values: Any


class KeyValues(Protocol):
    """What a step needs of the sampler's cache: rows end at ``cursor``, the column that the step writes."""

    @property
    def slabs(self) -> Sequence[Slab]: ...
    @property
    def cursor(self) -> int: ...
    @property
    def starts(self) -> Tensor: ...


class View(Protocol):
    """How one step looks at the cache."""

    @property
    def positions(self) -> Tensor:
        """[R] of the new token in its row."""
        ...

    def write(self, slab: Slab, keys: Tensor, values: Tensor) -> None:
        """Keys and values [R, K, D] of the new tokens into the column of the cursor."""
        ...

    def attend(self, query: Tensor, slab: Slab, scale: float, width: int | None = None) -> Tensor:
        """Attention of one query per row and head over the columns of its row.

        Args:
            query: [R, Q, D], Q query heads; consecutive heads share a head of keys and values.
            width: of a sliding window, in tokens; None where the layer sees everything.

        Returns:
            [R, Q * D].
        """
        ...


class FusedDecoder(Protocol):
    """One family's step. Raises ``UnsupportedError`` when built for a model whose configuration it does not cover."""

    def step(self, ids: Tensor, slabs: Sequence[Slab], view: View) -> Tensor:
        """[R] ids of the next token of every row -> [R, H]; writes their keys and values."""
        ...


class UnsupportedError(Exception):
    """A fused step does not cover this model; its own forward is used instead."""


Builder = Callable[[Any, PackedWeights, torch.dtype], FusedDecoder]


def need(weights: PackedWeights, modules: Sequence[nn.Module], dtype: torch.dtype) -> Dense:
    """The packed layers, or ``UnsupportedError``."""
    dense = weights.dense(modules, dtype)
    if dense is None:
        raise UnsupportedError(f"{type(modules[0]).__name__} has weights that cannot be packed")
    return dense


class GrowingView:
    """Looks at the columns in use alone; for devices where the shapes of a step may change."""

    def __init__(self, cache: KeyValues) -> None:
        first, last = (int(value) for value in cache.starts.aminmax())
        self.first, self.cursor, self.even = first, cache.cursor, first == last
        self.starts, self.dtype = cache.starts, cache.slabs[0].keys.dtype
        self.positions = cache.cursor - cache.starts
        self._masks: dict[int | None, Tensor | None] = {}

    def write(self, slab: Slab, keys: Tensor, values: Tensor) -> None:
        rows = keys.shape[0]
        slab.keys[:rows, :, self.cursor] = keys
        slab.values[:rows, :, self.cursor] = values

    def attend(self, query: Tensor, slab: Slab, scale: float, width: int | None = None) -> Tensor:
        rows, heads, size = query.shape
        shared, end = slab.keys.shape[1], self.cursor + 1
        # Rows and heads side by side: a product per pair, without copying keys for every query head.
        query = query.to(slab.keys.dtype).reshape(rows * shared, heads // shared, size)
        keys = slab.keys[:rows, :, self.first : end].flatten(0, 1)
        values = slab.values[:rows, :, self.first : end].flatten(0, 1)
        mask = self._mask(width)
        if mask is None:
            scores = torch.baddbmm(query.new_empty(1, 1, 1), query, keys.transpose(1, 2), beta=0, alpha=scale)
        else:
            over_heads = mask.expand(-1, shared, -1).reshape(rows * shared, 1, -1)
            scores = torch.baddbmm(over_heads, query, keys.transpose(1, 2), alpha=scale)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(weights, values).view(rows, heads * size)

    def _mask(self, width: int | None) -> Tensor | None:
        """[R, 1, columns] to add to attention scores, or None where every row sees every column."""
        end = self.cursor + 1
        if width is not None and width >= end - self.first:
            width = None
        if width not in self._masks:
            if self.even and width is None:
                self._masks[width] = None
            else:
                begin = self.starts if width is None else self.starts.clamp(min=end - width)
                hidden = torch.arange(self.first, end, device=begin.device)[None, :] < begin[:, None]
                mask = torch.zeros(hidden.shape, dtype=self.dtype, device=begin.device)
                self._masks[width] = mask.masked_fill_(hidden, -torch.inf)[:, None, :]
        return self._masks[width]


class FixedView:
    """Looks at all slots and columns through a mask, so that every step has the same shapes and addresses.

    Args:
        starts: [slots]. cursor: [1] long; both are read when the step runs, not when it is built.
        columns: of the cache.
    """

    def __init__(self, starts: Tensor, cursor: Tensor, columns: int) -> None:
        self.starts, self.cursor = starts, cursor
        self.positions = cursor - starts
        self.columns = torch.arange(columns, device=starts.device)
        self._seen: dict[int | None, Tensor] = {}

    def write(self, slab: Slab, keys: Tensor, values: Tensor) -> None:
        slab.keys.index_copy_(2, self.cursor, keys[:, :, None].to(slab.keys.dtype))
        slab.values.index_copy_(2, self.cursor, values[:, :, None].to(slab.values.dtype))

    def attend(self, query: Tensor, slab: Slab, scale: float, width: int | None = None) -> Tensor:
        rows, heads, size = query.shape
        shared = slab.keys.shape[1]
        if width not in self._seen:
            begin = self.starts if width is None else torch.maximum(self.starts, self.cursor + 1 - width)
            seen = (self.columns[None, :] >= begin[:, None]) & (self.columns <= self.cursor)[None, :]
            self._seen[width] = seen[:, None, None, :]
        grouped = query.to(slab.keys.dtype).reshape(rows, shared, heads // shared, size)
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, slab.keys, slab.values, attn_mask=self._seen[width], scale=scale
        )
        return out.reshape(rows, heads * size)


class _Probe:
    """A cache of one row that the model's own keys and values are copied to."""

    def __init__(self, own: Any, tokens: int, device: torch.device) -> None:
        self.cursor, self.starts = tokens, torch.zeros(1, dtype=torch.long, device=device)
        self.slabs: list[Any] = []
        for layer in own.layers:
            slab = nn.Module()
            for name in ("keys", "values"):
                states = getattr(layer, name)
                if states.shape[2] < tokens:
                    raise UnsupportedError("the model's own cache keeps fewer tokens than are compared")
                room = states.new_zeros(*states.shape[:2], 1, states.shape[3])
                setattr(slab, name, torch.cat([states, room], dim=2))
            self.slabs.append(slab)


@torch.no_grad()
def agrees(decoder: FusedDecoder, policy: Any, dtype: torch.dtype) -> bool:
    """Whether a fused step after two tokens gives the model's own hidden state of the third."""
    ids = torch.tensor([[1, 0, 1]], device=policy.device)
    mask, positions = torch.ones_like(ids, dtype=torch.bool), torch.arange(3, device=policy.device)[None]
    own = policy.hidden_states(ids, mask, positions)[:, -1].float()
    body = policy.body(input_ids=ids[:, :2], use_cache=True)
    cache = _Probe(body.past_key_values, 2, policy.device)
    ours = decoder.step(ids[0, 2:], cache.slabs, GrowingView(cache)).float()
    return bool((ours - own).abs().max() <= TOLERANCE.get(dtype, 5e-2) * own.abs().max().clamp(min=1.0))
