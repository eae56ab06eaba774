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
    before_attention: _RMSNorm
    before_mlp: _RMSNorm
    query_norm: _RMSNorm | None
    key_norm: _RMSNorm | None
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
        self.embed, self.norm, self.rotary = body.embed_tokens, _RMSNorm(body.norm), body.rotary_emb
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
            before_attention=_RMSNorm(layer.input_layernorm),
            before_mlp=_RMSNorm(layer.post_attention_layernorm),
            query_norm=_RMSNorm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_RMSNorm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            scale=attention.scaling,
            window=sliding_window(attention),
        )

    def step(self, ids: Tensor, slabs: Sequence[Slab], view: View) -> Tensor:
        hidden = self.embed(ids)
        cos, sin = self.rotary(hidden, position_ids=view.positions[:, None])
        half = self.size // 2
        sin = sin[..., :half]
        both = self.heads + self.shared
        for layer, slab in zip(self.layers, slabs, strict=True):
            joint = layer.into(layer.before_attention(hidden)).unflatten(-1, (-1, self.size))
            rotating, values = joint[:, :both], joint[:, both:]
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = layer.query_norm(joint[:, : self.heads]), layer.key_norm(joint[:, self.heads : both])
                rotating = torch.cat([query, key], dim=1)
            rotating = rotating.to(cos.dtype)
            turned = rotating * cos
            turned[..., :half].addcmul_(rotating[..., half:], sin, value=-1)
            turned[..., half:].addcmul_(rotating[..., :half], sin)
            view.write(slab, turned[:, self.heads :], values)
            seen = view.attend(turned[:, : self.heads], slab, layer.scale, layer.window)
            hidden = layer.out.plus(seen, hidden)
            gate, up = layer.gate_up(layer.before_mlp(hidden)).chunk(2, dim=-1)
            hidden = layer.down.plus(torch.nn.functional.silu(gate).mul_(up), hidden)
        return self.norm(hidden)


def sliding_window(attention: Any) -> int | None:
    """Tokens that a layer sees; None where it sees all."""
    width = getattr(attention, "sliding_window", None)
    if width is None and attention.config.model_type == "mistral":
        width = attention.config.sliding_window
    return width


class _RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight, in few operations.

    sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(n eps)) / sqrt(n) for x of length n.

    Args:
        norm: the model's module.
    """

    def __init__(self, norm: Any) -> None:
        size = norm.weight.shape[0]
        self.dtype = norm.weight.dtype
        self.weight = norm.weight.detach().float() * size**0.5
        self.floor = torch.tensor((size * norm.variance_epsilon) ** 0.5, device=norm.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        x = x.float()
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scaled: Tensor = (x * self.weight).div_(torch.hypot(length, self.floor))
        return scaled.to(self.dtype)
