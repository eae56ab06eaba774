"""A policy prepared for sampling: packed weights, and a fused decode step where its family has one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tropism.errors import ConfigError, ModelError
from tropism.models import fused_gpt2, fused_llama
from tropism.models.compiled_llama import CompiledLlamaDecoder
from tropism.models.fused import Builder, FusedDecoder, GrowingView, UnsupportedError, agrees
from tropism.models.graphed import GraphedSteps
from tropism.models.kernels import Kernels, decode_kernels
from tropism.models.packed import Dense, PackedWeights, computing_with, cpu_multiplies, layers_with_weights, pack
from tropism.models.sharding import is_sharded
from tropism.out_of_memory import is_out_of_memory

logger = logging.getLogger("tropism")

SOME = 16
"""About so many numbers of a weight are compared where its version counter may not tell of a change."""

FUSED: dict[str, Builder] = {
    **dict.fromkeys(fused_llama.FAMILIES, fused_llama.LlamaDecoder),
    **dict.fromkeys(fused_gpt2.FAMILIES, fused_gpt2.GPT2Decoder),
}
COMPILED: dict[str, Builder] = dict.fromkeys(fused_llama.FAMILIES, CompiledLlamaDecoder)
"""Families whose whole step is compiled. Of the others the products alone are."""


NOT_FUSED = (UnsupportedError, AttributeError, TypeError, ValueError, IndexError, RuntimeError)
"""What a step says of a model that it does not cover, or whose code has changed."""


class SamplingModel:
    """What the embedded sampler computes with, while the weights stand still.

    Args:
        policy: a ``Policy``.
        decoder: None where the model's own forward takes the steps.
        dtype: of keys and values in the cache.
    """

    def __init__(self, policy: Any, decoder: FusedDecoder | None, dtype: torch.dtype) -> None:
        self.policy, self.decoder = policy, decoder
        self.cache_dtype = dtype
        graphs = decoder is not None and policy.device.type == "cuda"
        self.graphed = GraphedSteps(decoder, dtype) if graphs and decoder is not None else None

    def hidden_states(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """[B, L] ids -> [B, L, H], see ``Policy.hidden_states``; of an encoder-decoder those of its decoder."""
        if self.policy.halves is not None:
            return self.policy.halves.decode(ids, mask, positions, *cache.encoder_states(), cache)  # type: ignore[no-any-return]
        return self.policy.hidden_states(ids, mask, positions, cache)  # type: ignore[no-any-return]

    def encode(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """[B, P] ids of prompts -> [B, P, H] states of an encoder-decoder's encoder."""
        return self.policy.halves.encode(ids, mask, positions)  # type: ignore[no-any-return]

    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        """[R] ids of the next token of every row -> [R, H]; their keys and values go to the column of the cursor."""
        if self.decoder is not None:
            with torch.autocast(ids.device.type, enabled=False):
                if self.graphed is not None:
                    return self.graphed.step(ids, cache)
                return self.decoder.step(ids, cache.slabs, GrowingView(cache))
        positions = (cache.cursor - cache.starts)[:, None]
        return self.hidden_states(ids[:, None], cache.mask(1), positions, cache)[:, -1]

    def values(self, hidden: Tensor) -> Tensor | None:
        """[..., H] -> [...] of the value head; None where the policy has none."""
        head = self.policy.value_head
        return None if head is None else head(hidden)

    @property
    def values_actions(self) -> bool:
        """Whether the policy has Q heads."""
        return self.policy.q_heads is not None

    def advantages(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V] of the Q heads; the policy must have some."""
        return self.policy.q_heads.advantages(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        return self.policy.logits(hidden)  # type: ignore[no-any-return]


class PreparedSampling:
    """A ``SamplingModel`` and the packed layers that belong to it, as of the moment when they were made.

    Between passes nothing of it is in force: the model computes and trains as ever.
    """

    def __init__(self, model: SamplingModel, packed: Sequence[tuple[Any, Dense]]) -> None:
        self.model = model
        self._packed = packed
        self._modules = list(model.policy.model.modules())
        self._adapted = [module for module in self._modules if isinstance(module, LoraLayer)]
        self._stamp = self._stamp_now()

    def computing(self) -> AbstractContextManager[None]:
        """A block of passes with ``model``, without gradients; nothing may train inside."""
        return computing_with(self._packed)

    @property
    def up_to_date(self) -> bool:
        """Whether weights and active adapters are still those of the moment when this was made."""
        return self._stamp_now() == self._stamp

    def some_numbers(self) -> Tensor:
        """A few numbers of every weight as they are now.

        They differ where a change is not noticed by ``up_to_date``: fused optimizers of torch, and whoever writes to
        ``weight.data``, leave version counters as they are.
        """
        weights = [weight for module in self._modules for weight in module._parameters.values() if weight is not None]
        few = [weight.detach().flatten()[:: max(1, weight.numel() // SOME)].float().cpu() for weight in weights]
        return torch.cat([torch.zeros(0), *few])

    def _stamp_now(self) -> tuple[Any, ...]:
        """What changes when weights are replaced or written to, or other adapters become active."""
        weights = [
            (id(weight), weight.data_ptr(), weight._version)
            for module in self._modules
            for weight in module._parameters.values()
            if weight is not None
        ]
        return weights, [(layer.disable_adapters, tuple(layer.active_adapters)) for layer in self._adapted]


class SamplingModels:
    """Makes a policy's ``SamplingModel`` anew whenever it samples, and remembers what does not change."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.weights = PackedWeights()
        self._fits: dict[tuple[Builder, torch.dtype, bool], bool] = {}

    @contextmanager
    def ready(self, *, compiled: bool = False) -> Iterator[SamplingModel]:
        """The policy with the weights of this moment; nothing may train inside the block.

        Args:
            compiled: see ``prepare``.

        Raises:
            ModelError: the weights are sharded at this moment.
            ConfigError: nothing can be compiled here.
        """
        try:
            prepared = self.prepare(compiled=compiled)
            with prepared.computing():
                yield prepared.model
        finally:
            if isinstance(self.policy, FSDPModule):  # copies must not outlive the whole weights they are made of
                self.weights = PackedWeights()

    def prepare(self, *, fused: bool = True, compiled: bool = False) -> PreparedSampling:
        """What ``ready`` computes with, for a caller who takes one pass at a time and trains in between.

        Args:
            fused: let the family's fused step take decode steps; the model's own forward does otherwise.
            compiled: compute with the compiled kernels of ``models/kernels.py``, in fp32 on the CPU.

        Raises:
            ModelError: the weights are sharded at this moment.
            ConfigError: nothing can be compiled here.
        """
        if is_sharded(self.policy):
            raise ModelError(
                "the weights are sharded over processes, and a process that samples needs them whole; enter "
                "policy.whole() on all processes before any of them samples"
            )
        device = self.policy.device.type
        kernels = None
        if compiled:
            kernels = check_compiled(device)
        if self.weights.kernels is not kernels:
            self.weights = PackedWeights(kernels)
        reduced = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if reduced else self.policy.dtype
        # Products are emulated in fp32 there; a model whose own weights are bf16 still attends in bf16.
        cached = torch.float32 if reduced and device == "cpu" and not cpu_multiplies(dtype) else dtype
        decoder = self._decoder(dtype) if fused else None
        head = self.policy.language_model.get_output_embeddings()
        layers = [head] if decoder is not None else layers_with_weights(self.policy.model)
        packed = pack(layers, self.weights, dtype)
        return PreparedSampling(SamplingModel(self.policy, decoder, cached), packed)

    def _decoder(self, dtype: torch.dtype) -> FusedDecoder | None:
        """The family's fused step, or None; one that disagrees with the model is never used again."""
        model = self.policy.language_model
        family = type(model).__name__
        builders = [FUSED.get(family)]
        if self.weights.kernels is not None:
            builders.insert(0, COMPILED.get(family))
        for builder in filter(None, builders):
            kind = (builder, dtype, self.weights.kernels is not None)
            if not self._fits.get(kind, True):
                continue
            try:
                decoder = builder(model, self.weights, dtype)
                if kind not in self._fits:
                    self._fits[kind] = agrees(decoder, self.policy, dtype)
            except NOT_FUSED as error:
                if is_out_of_memory(error):
                    raise
                logger.info("no %s for this %s: %s", builder.__name__, family, error)
                self._fits[kind] = False
            if self._fits[kind]:
                return decoder
        return None


def check_compiled(device: str) -> Kernels:
    """The compiled kernels, built if need be.

    Args:
        device: type of the one that the model is on.

    Raises:
        ConfigError: it is no CPU, or nothing can be compiled here.
    """
    if device != "cpu":
        raise ConfigError(
            f"sampling.compile builds decode kernels for CPUs, and the model is on {device}: leave it out (on CUDA "
            "decode steps are captured in a graph as they are)"
        )
    return decode_kernels()
