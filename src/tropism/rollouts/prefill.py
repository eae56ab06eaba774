"""What a batch of sampled rows starts from: room for keys and values, and the pass over the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tropism.rollouts.encoded_cache import EncodedCache
from tropism.rollouts.kv_cache import SlabCache
from tropism.rollouts.protocol import GeneratingPolicy, SamplingModel
from tropism.types import pad_rows

RowCache = SlabCache | EncodedCache
"""Keys and values of rows that come and go; of an encoder-decoder those of the prompts beside them."""


def room_for(policy: GeneratingPolicy, model: SamplingModel, *, rows: int, longest: int, new: int) -> RowCache:
    """An empty cache for ``rows`` rows.

    Args:
        longest: tokens of the longest prompt. new: further columns that rows may take.
    """
    none = torch.zeros(0, dtype=torch.long, device=policy.device)
    if policy.decoder_prefix is None:
        return _slabs(policy, model, slots=rows, columns=longest + new, starts=none)
    return EncodedCache(
        layers=policy.cached_layers,
        slots=rows,
        columns=len(policy.decoder_prefix) + new,
        prompt_columns=longest,
        starts=none,
        prompt_starts=none,
        dtype=model.cache_dtype,
    )


def prefill(
    policy: GeneratingPolicy, model: SamplingModel, prompts: Sequence[Sequence[int]]
) -> tuple[RowCache, Tensor]:
    """One pass over prompts, padded on the left: the cache that holds them, and [R, H] at the last token of each.

    An encoder-decoder encodes the prompts, and the decoder reads its prefix.
    """
    ids = pad_rows(prompts, left=True).to(policy.device)
    width = ids.shape[1]
    starts = torch.tensor([width - len(row) for row in prompts], device=ids.device)
    columns = torch.arange(width, device=ids.device)[None, :]
    positions = (columns - starts[:, None]).clamp(min=0)
    if policy.decoder_prefix is None:
        cache: RowCache = _slabs(policy, model, slots=len(prompts), columns=width, starts=starts)
    else:
        encoded = model.encode(ids, columns >= starts[:, None], positions)
        ids = torch.tensor(policy.decoder_prefix, device=ids.device).expand(len(prompts), -1)
        width = ids.shape[1]
        positions = torch.arange(width, device=ids.device).expand(len(prompts), -1)
        cache = EncodedCache(
            layers=policy.cached_layers,
            slots=len(prompts),
            columns=width,
            prompt_columns=encoded.shape[1],
            starts=torch.zeros_like(starts),
            prompt_starts=starts,
            encoded=encoded,
            dtype=model.cache_dtype,
        )
    hidden = model.hidden_states(ids, cache.mask(width), positions, cache)[:, -1]
    cache.advance(width)
    return cache, hidden


def _slabs(policy: GeneratingPolicy, model: SamplingModel, **sizes: Any) -> SlabCache:
    return SlabCache(layers=int(policy.config.num_hidden_layers), dtype=model.cache_dtype, **sizes)
