"""The decode step of Llama and its relatives by compiled kernels: seven calls a layer, in fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropism.models.fused import GrowingView, Slab, UnsupportedError, View, need
from tropism.models.fused_llama import sliding_window
from tropism.models.kernels import Kernels
from tropism.models.packed import Dense, GatedProduct, PackedWeights


@dataclass(frozen=True)
class _Layer:
    into: Dense
    """Queries, keys and values from one product."""
    out: Dense
    gated: GatedProduct
    down: Dense
    before_attention: Tensor
    before_mlp: Tensor
    norms: tuple[Tensor | None, Tensor | None]
    """Of queries and keys."""
    scale: float
    window: int | None


class CompiledLlamaDecoder:
    """See ``FusedDecoder``.

    Args:
        model: the causal LM, adapters included.
        weights: with kernels.
    """

    def __init__(self, model: Any, weights: PackedWeights, dtype: torch.dtype) -> None:
        body, config = model.base_model, model.config
        if config.hidden_act != "silu":
            raise UnsupportedError(f"activation {config.hidden_act}")
        whole = all(parameter.dtype == torch.float32 for parameter in body.parameters())
        if weights.kernels is None or dtype != torch.float32 or not whole:
            raise UnsupportedError("compiled steps are in float32")
        self.kernels: Kernels = weights.kernels
        self.embed, self.norm, self.rotary = body.embed_tokens, body.norm.weight.detach(), body.rotary_emb
        self.epsilon = float(body.norm.variance_epsilon)
        self.size = body.layers[0].self_attn.head_dim
        self.layers = [self._layer(layer, weights) for layer in body.layers]

    def _layer(self, layer: Any, weights: PackedWeights) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        gated = weights.gated(mlp.gate_proj, mlp.up_proj)
        if gated is None:
            raise UnsupportedError(f"{type(mlp.gate_proj).__name__} has weights that cannot be packed")
        normed = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, *normed):
            if norm is not None and norm.variance_epsilon != self.epsilon:
                raise UnsupportedError("norms with different epsilons")
        query_norm, key_norm = (None if norm is None else norm.weight.detach() for norm in normed)
        return _Layer(
            into=need(weights, [attention.q_proj, attention.k_proj, attention.v_proj], torch.float32),
            out=need(weights, [attention.o_proj], torch.float32),
            gated=gated,
            down=need(weights, [mlp.down_proj], torch.float32),
            before_attention=layer.input_layernorm.weight.detach(),
            before_mlp=layer.post_attention_layernorm.weight.detach(),
            norms=(query_norm, key_norm),
            scale=attention.scaling,
            window=sliding_window(attention),
        )

    def step(self, ids: Tensor, slabs: Sequence[Slab], view: View) -> Tensor:
        hidden = self.embed(ids)
        cosines, sines = self.rotary(hidden, position_ids=view.positions[:, None])
        angles = cosines[:, 0].contiguous(), sines[:, 0].contiguous()
        assert isinstance(view, GrowingView)  # on CPUs; the other kind of view is for captured steps
        norm, starts = self.kernels.rms_norm, view.starts.contiguous()
        for layer, slab in zip(self.layers, slabs, strict=True):
            joint = layer.into(norm(hidden, layer.before_attention, self.epsilon)).unflatten(-1, (-1, self.size))
            seen = self.kernels.attend(
                joint,
                angles,
                layer.norms,
                self.epsilon,
                slab.keys,
                slab.values,
                starts,
                cursor=view.cursor,
                window=layer.window,
                scale=layer.scale,
            )
            hidden = layer.out.plus(seen, hidden)
            hidden = layer.down.plus(layer.gated(norm(hidden, layer.before_mlp, self.epsilon)), hidden)
        return norm(hidden, self.norm, self.epsilon)
