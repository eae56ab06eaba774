"""A fused decode step for Llama and its relatives: SmolLM2, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropism.models.fused import Slab, UnsupportedError, View, need
from tropism.models.packed import Dense, PackedWeights

FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


@dataclass(frozen=True)
class _Layer:
    into: Dense
    """Queries, keys and values from one product."""
    out: Dense
    gate_up: Dense
    down: Dense
    before_attention: Any
    before_mlp: Any
    query_norm: Any
    key_norm: Any
    scale: float
    window: int | None


class LlamaDecoder:
    """See ``FusedDecoder``.

    Args:
        model: the causal LM, adapters included.
    """

    def __init__(self, model: Any, weights: PackedWeights, dtype: torch.dtype) -> None:
        body, config = model.base_model, model.config
        if config.hidden_act != "silu":
            raise UnsupportedError(f"activation {config.hidden_act}")
        self.embed, self.norm, self.rotary = body.embed_tokens, body.norm, body.rotary_emb
        self.size = body.layers[0].self_attn.head_dim
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.dtype = dtype
        self.layers = [self._layer(layer, weights) for layer in body.layers]

    def _layer(self, layer: Any, weights: PackedWeights) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        return _Layer(
            into=need(weights, projections, self.dtype),
            out=need(weights, [attention.o_proj], self.dtype),
            gate_up=need(weights, [mlp.gate_proj, mlp.up_proj], self.dtype),
            down=need(weights, [mlp.down_proj], self.dtype),
            before_attention=layer.input_layernorm,
            before_mlp=layer.post_attention_layernorm,
            query_norm=getattr(attention, "q_norm", None),
            key_norm=getattr(attention, "k_norm", None),
            scale=attention.scaling,
            window=_window(attention),
        )

    def step(self, ids: Tensor, slabs: Sequence[Slab], view: View) -> Tensor:
        hidden = self.embed(ids)
        cos, sin = self.rotary(hidden, position_ids=view.positions[:, None])
        half = self.size // 2
        sin = sin[..., :half]
        queries, both = self.heads * self.size, (self.heads + self.shared) * self.size
        for layer, slab in zip(self.layers, slabs, strict=True):
            joint = layer.into(_rms_norm(hidden, layer.before_attention))
            if layer.query_norm is not None:
                query = _rms_norm(joint[:, :queries].unflatten(-1, (-1, self.size)), layer.query_norm)
                key = _rms_norm(joint[:, queries:both].unflatten(-1, (-1, self.size)), layer.key_norm)
                rotating = torch.cat([query, key], dim=1)
            else:
                rotating = joint[:, :both].unflatten(-1, (-1, self.size))
            rotating = rotating.to(cos.dtype)
            turned = rotating * cos
            turned[..., :half].addcmul_(rotating[..., half:], sin, value=-1)
            turned[..., half:].addcmul_(rotating[..., :half], sin)
            values = joint[:, both:].unflatten(-1, (-1, self.size))
            view.write(slab, turned[:, self.heads :], values)
            seen = view.attend(turned[:, : self.heads], slab, layer.scale, layer.window)
            hidden = hidden + layer.out(seen)
            gate, up = layer.gate_up(_rms_norm(hidden, layer.before_mlp)).chunk(2, dim=-1)
            hidden = hidden + layer.down(torch.nn.functional.silu(gate).mul_(up))
        return _rms_norm(hidden, self.norm)


def _window(attention: Any) -> int | None:
    width = getattr(attention, "sliding_window", None)
    if width is None and attention.config.model_type == "mistral":
        width = attention.config.sliding_window
    return width


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    return torch.nn.functional.rms_norm(x.to(norm.weight.dtype), x.shape[-1:], norm.weight, norm.variance_epsilon)
