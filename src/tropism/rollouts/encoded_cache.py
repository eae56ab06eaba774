"""The sampler's cache of an encoder-decoder: keys and values of the decoder's tokens, and of the encoded prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from tropism.rollouts.kv_cache import SlabCache, SlabLayer


class EncodedLayer(CacheLayerMixin):
    """What one decoder layer reads of the encoded prompts: ``keys`` and ``values`` of the rows in use."""

    is_sliding = False
    is_compileable = False

    def __init__(self, slab: SlabLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slab = slab

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.slab.lazy_initialization(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.slab.update(key_states, value_states)

    def show(self, first: int) -> None:
        """Let the layer read the columns from ``first`` on of the rows in use."""
        if self.slab.is_initialized:
            assert self.slab.keys is not None and self.slab.values is not None
            self.keys = self.slab.keys[: self.slab.rows, :, first : self.slab.cursor]
            self.values = self.slab.values[: self.slab.rows, :, first : self.slab.cursor]
            self.is_initialized = True

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self.slab.cursor, 0

    def get_seq_length(self) -> int:
        return self.slab.cursor

    def get_max_length(self) -> int:
        return self.slab.columns

    get_max_cache_shape = get_max_length
    """The same under its older name."""


class EncodedCache(EncoderDecoderCache):
    """Two slab caches whose rows come and go together: ``decoded`` tokens, and ``prompts`` as the encoder left them.

    To the sampler it is a ``SlabCache`` of the decoder's columns. The prompts of all rows end at the last column.

    Args:
        layers: of the decoder. slots: most rows.
        columns: of the decoder's rows. prompt_columns: of the longest prompt.
        starts: [rows] first column of each decoder row. prompt_starts: [rows] of each prompt.
        encoded: [rows, prompt_columns, H] states of the encoder, for the pass that fills the cache; None where rows are
            only appended from such caches.
        dtype: of keys and values.
    """

    def __init__(
        self,
        *,
        layers: int,
        slots: int,
        columns: int,
        prompt_columns: int,
        starts: Tensor,
        prompt_starts: Tensor,
        encoded: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.decoded = SlabCache(layers=layers, slots=slots, columns=columns, starts=starts, dtype=dtype)
        self.prompts = SlabCache(layers=layers, slots=slots, columns=prompt_columns, starts=prompt_starts, dtype=dtype)
        self.reading = [EncodedLayer(slab) for slab in self.prompts.slabs]
        super().__init__(self.decoded, Cache(layers=list(self.reading)))
        self.encoded = encoded
        self.is_updated = dict.fromkeys(range(layers), encoded is None)
        if encoded is None:
            self.prompts.advance(prompt_columns)
        self._first = 0

    @property
    def rows(self) -> int:
        return self.decoded.rows

    @property
    def cursor(self) -> int:
        return self.decoded.cursor

    @property
    def starts(self) -> Tensor:
        return self.decoded.starts

    @property
    def slabs(self) -> list[SlabLayer]:
        return self.decoded.slabs

    def mask(self, new: int) -> Tensor:
        """[rows, cursor + new] of the decoder's columns, see ``SlabCache.mask``."""
        return self.decoded.mask(new)

    def encoder_states(self) -> tuple[Tensor, Tensor]:
        """[rows, P, H] and [rows, P] mask of the prompts; H is 1 and all are 0 once their keys and values are held."""
        if self.encoded is not None:
            columns = torch.arange(self.encoded.shape[1], device=self.starts.device)
            return self.encoded, columns[None, :] >= self.prompts.starts[:, None]
        mask = self.prompts.mask(0)[:, self._first :]
        return torch.zeros(1, device=mask.device).expand(*mask.shape, 1), mask

    def advance(self, new: int) -> None:
        """See ``SlabCache.advance``. The first pass has written the prompts, too."""
        self.decoded.advance(new)
        if self.encoded is not None:
            self.prompts.advance(self.encoded.shape[1])
            self.encoded = None
        self._show()

    def keep(self, rows: Tensor) -> None:
        """See ``SlabCache.keep``."""
        self.decoded.keep(rows)
        self.prompts.keep(rows)
        self._show()

    def make_room(self, width: int) -> None:
        """See ``SlabCache.make_room``; prompts need none, since all end at one column."""
        self.decoded.make_room(width)

    def append(self, other: EncodedCache, rows: Tensor) -> None:
        """See ``SlabCache.append``."""
        self.decoded.append(other.decoded, rows)
        self.prompts.append(other.prompts, rows)
        self._show()

    def _show(self) -> None:
        starts = self.prompts.starts
        self._first = int(starts.min()) if len(starts) else self.prompts.cursor
        for layer in self.reading:
            layer.show(self._first)
