"""Rows without padding: real tokens side by side in one sequence, equal prompts once, attention row by row.

A padded batch computes every layer for pads, and once per completion for a prompt that several completions share. Here
each real token goes through the layers once; only attention gathers them into rows again, where a row of a shared
prompt reads the same keys and values. The numbers are those of the padded batch.

The attention function of a Hugging Face model is exchangeable; ours is used for the length of one forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

logger = logging.getLogger("tropism")

NAME = "tropism_rows"
STANDARD = ("sdpa", "eager")
"""Attention implementations that compute what ours computes; any other was chosen for a reason and stays."""
KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
TOLERANCE = {torch.float32: 1e-4}
"""Largest difference from the padded forward, relative to its largest hidden state; 5e-2 in half precision."""


@dataclass(frozen=True)
class Rows:
    """Where the tokens of padded rows [R, L] lie in one flat sequence of N tokens."""

    ids: Tensor
    """[1, N]."""
    positions: Tensor
    """[1, N] of each token in its row."""
    place: Tensor
    """[R, L] index into the flat sequence of each token of each row; pads point to token 0."""
    source: Tensor
    """[N] index into the flattened [R * L] of (one of) the rows that hold the token."""
    aligned: bool
    """Whether the flat sequence is the rows themselves: no pads and nothing shared."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.place.shape[0], self.place.shape[1]


def lay_out(ids: Tensor, mask: Tensor, prompt_lengths: Tensor, same: Tensor) -> Rows:
    """Rows padded on the right -> one flat sequence.

    Args:
        ids: [R, L]. mask: [R, L] real tokens.
        same: [R] index of the first row whose prompt equals that of this row.
    """
    rows, width = ids.shape
    columns = torch.arange(width, device=ids.device)[None, :]
    first = same == torch.arange(rows, device=ids.device)
    own = mask & (first[:, None] | (columns >= prompt_lengths[:, None]))
    number = (own.flatten().cumsum(0) - 1).view(rows, width)
    place = torch.where(columns < prompt_lengths[:, None], number[same], number)
    source = own.flatten().nonzero().squeeze(-1)
    return Rows(
        ids=ids.flatten()[source][None],
        positions=columns.expand(rows, -1).flatten()[source][None],
        place=place * mask,
        source=source,
        aligned=len(source) == rows * width,
    )


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    tropism_rows: Rows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each row over its own tokens; transformers' signature of an attention function.

    Args:
        query: [1, Q, N, D] of the flat sequence. key, value: [1, K, N, D].

    Returns:
        [1, N, Q, D], and no weights.
    """
    if tropism_rows is None:
        raise RuntimeError("this model's layers do not pass on where the rows lie")
    changed = [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]
    if changed:
        raise RuntimeError(f"attention with {changed[0]} is not known here")
    rows = tropism_rows
    wide, width = rows.shape

    def padded(states: Tensor) -> Tensor:
        flat = states[0].transpose(0, 1)
        if not rows.aligned:
            flat = flat.index_select(0, rows.place.flatten())
        return flat.reshape(wide, width, *flat.shape[1:]).transpose(1, 2)

    band = None
    if sliding_window is not None and sliding_window < width:
        distance = torch.arange(width, device=query.device)[:, None] - torch.arange(width, device=query.device)[None, :]
        band = (distance >= 0) & (distance < sliding_window)
    out = scaled_dot_product_attention(
        padded(query),
        padded(key),
        padded(value),
        attn_mask=band,
        is_causal=band is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out = out.transpose(1, 2).flatten(0, 1)
    return (out if rows.aligned else out.index_select(0, rows.source))[None], None


AttentionInterface.register(NAME, rows_attention)


@contextmanager
def _attending_by_rows(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


class RowsForward:
    """The body of a policy on flat rows, where its family allows that.

    Args:
        policy: a ``Policy``.
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.works = self._eligible() and self._agrees()

    @property
    def usable(self) -> bool:
        """Whether to use it now. Recomputed activations read the attention function when the pass is over."""
        return self.works and not self.policy.recomputes_activations

    def hidden_states(self, rows: Rows) -> Tensor:
        """[N, H], the input of the vocabulary projection at every token of the flat sequence."""
        with _attending_by_rows(self.policy.config):
            hidden: Tensor = self.policy.run_body(
                input_ids=rows.ids, position_ids=rows.positions, use_cache=False, tropism_rows=rows
            )
        return hidden[0]

    def _eligible(self) -> bool:
        config = self.policy.config
        kinds = set(getattr(config, "layer_types", None) or ())
        return (
            self.policy.takes_positions
            and getattr(config, "_attn_implementation", None) in STANDARD
            and kinds <= KNOWN_LAYERS
            and getattr(config, "attention_chunk_size", None) is None
        )

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Three rows, two of them with the same prompt, against the padded forward."""
        device = self.policy.device
        ids = torch.tensor([[1, 0, 2, 0], [1, 0, 0, 1], [2, 1, 1, 0]], device=device)
        lengths = torch.tensor([4, 4, 3], device=device)
        columns = torch.arange(4, device=device)[None, :]
        mask = columns < lengths[:, None]
        same = torch.tensor([0, 0, 2], device=device)
        rows = lay_out(ids, mask, torch.tensor([2, 2, 1], device=device), same)
        try:
            flat = self.hidden_states(rows)
        except Exception as error:  # whatever a family does with what it does not expect
            logger.info("rows of %s stay padded: %s", type(self.policy.language_model).__name__, error)
            return False
        own = self.policy.hidden_states(ids, mask, columns * mask)
        difference = (flat[rows.place] - own)[mask].float().abs().max()
        return bool(difference <= TOLERANCE.get(own.dtype, 5e-2) * own.float().abs().max().clamp(min=1.0))
