"""A fused decode step for GPT-2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from tropism.models.fused import Slab, UnsupportedError, View, need
from tropism.models.packed import Dense, PackedWeights

FAMILIES = frozenset({"GPT2LMHeadModel"})


@dataclass(frozen=True)
class _Layer:
    into: Dense
    """Queries, keys and values from one product."""
    out: Dense
    up: Dense
    down: Dense
    act: Any
    before_attention: Any
    before_mlp: Any
    scale: float


class GPT2Decoder:
    """See ``FusedDecoder``.

    Args:
        model: the causal LM, adapters included.
    """

    def __init__(self, model: Any, weights: PackedWeights, dtype: torch.dtype) -> None:
        body, config = model.base_model, model.config
        if config.add_cross_attention or config.reorder_and_upcast_attn:
            raise UnsupportedError("cross attention, or attention in another order")
        self.tokens, self.places, self.norm = body.wte, body.wpe, body.ln_f
        self.heads, self.dtype = config.num_attention_heads, dtype
        self.layers = [
            _Layer(
                into=need(weights, [block.attn.c_attn], dtype),
                out=need(weights, [block.attn.c_proj], dtype),
                up=need(weights, [block.mlp.c_fc], dtype),
                down=need(weights, [block.mlp.c_proj], dtype),
                act=block.mlp.act,
                before_attention=block.ln_1,
                before_mlp=block.ln_2,
                scale=block.attn.scaling,
            )
            for block in body.h
        ]

    def step(self, ids: Tensor, slabs: Sequence[Slab], view: View) -> Tensor:
        hidden = self.tokens(ids) + self.places(view.positions)
        for layer, slab in zip(self.layers, slabs, strict=True):
            joint = layer.into(_layer_norm(hidden, layer.before_attention))
            query, key, value = joint.unflatten(-1, (3, self.heads, -1)).unbind(1)
            view.write(slab, key, value)
            hidden = layer.out.plus(view.attend(query, slab, layer.scale), hidden)
            hidden = layer.down.plus(layer.act(layer.up(_layer_norm(hidden, layer.before_mlp))), hidden)
        return _layer_norm(hidden, self.norm)


def _layer_norm(x: Tensor, norm: Any) -> Tensor:
    return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
