"""Weights laid out for products with few rows, for passes without gradients.

A decode step multiplies a few rows with every weight of the model. On CPUs the plain product reaches a third to two
thirds of what the cores can do with a weight in oneDNN's own blocked layout. Adapters are merged into the packed copy,
so that a layer costs one product instead of three. Weights themselves are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tropism.models.kernels import Kernels
from tropism.models.modules import replaced_forward

Made = TypeVar("Made")

ROWS_HINT = 32
"""Rows that a packed layout is made for; it serves other numbers of rows as well."""
SMALLEST_PACKED = 2**18
"""Weights with fewer entries stay as they are: their product costs less than the call of the other kernel."""


class PackedProduct(Protocol):
    """x W^T + b with a weight laid out anew."""

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        ...

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """[N, in] and [N, out] -> [N, out]: the product added to ``residual``, all of one dtype."""
        ...


class InnerProduct:
    """By oneDNN, in its own blocked layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        binary = torch.ops.mkldnn._linear_pointwise.binary
        return binary(x, residual, self.weight, self.bias, "add")  # type: ignore[no-any-return]


class CompiledProduct:
    """By a compiled kernel, in panels of a few columns."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None) -> None:
        self.kernels, self.columns = kernels, weight.shape[0]
        self.weight = kernels.pack([weight])
        self.bias = None if bias is None else kernels.pack_biases([bias])

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.product(x, self.weight, self.bias, self.columns)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.kernels.product(x, self.weight, self.bias, self.columns, residual)


class GatedProduct:
    """silu(x W^T + b) (x V^T + c) by a compiled kernel."""

    def __init__(
        self, kernels: Kernels, weights: tuple[Tensor, Tensor], biases: tuple[Tensor | None, Tensor | None]
    ) -> None:
        self.kernels, self.columns = kernels, weights[0].shape[0]
        self.weights = kernels.pack([weight.float() for weight in weights])
        given = [
            torch.zeros_like(w[:, 0], dtype=torch.float32) if b is None else b.detach().float()
            for w, b in zip(weights, biases, strict=True)
        ]
        self.biases = None if biases == (None, None) else kernels.pack_biases(given)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        return self.kernels.product(x, self.weights, self.biases, self.columns)


class Dense:
    """x -> x W^T + b with fixed weights, without gradients.

    Args:
        weights: matrices [out_i, in]; the result has the columns of all of them side by side.
        biases: one per matrix, or None.
        dtype: of the arithmetic. bf16 on a CPU that cannot multiply in it is emulated: operands and results are
            rounded to bf16, products and sums are fp32, as bf16 units do it.
        kernels: compiled ones, for products in fp32 on the CPU.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        dtype: torch.dtype,
        kernels: Kernels | None = None,
    ) -> None:
        device = weights[0].device
        self.dtype = dtype
        self.emulated = device.type == "cpu" and dtype == torch.bfloat16 and not cpu_multiplies(dtype)
        stored = torch.float32 if self.emulated else dtype
        cast = [weight.detach().to(dtype) for weight in weights]
        some_bias = any(bias is not None for bias in biases)
        filled = [
            w.new_zeros(w.shape[0]) if b is None else b.detach().to(dtype) for w, b in zip(cast, biases, strict=True)
        ]
        self.parts: list[tuple[Tensor, Tensor | None]]
        if device.type == "cpu":  # one product; elsewhere the copy would cost memory that large models need
            joined = (cast[0] if len(cast) == 1 else torch.cat(cast)).to(stored)
            self.parts = [(joined, torch.cat(filled).to(stored) if some_bias else None)]
        else:
            self.parts = list(zip(cast, filled if some_bias else [None] * len(cast), strict=True))
        self.packed: PackedProduct | None = None
        weight, bias = self.parts[0]
        if kernels is not None and weight.dtype == torch.float32 and device.type == "cpu":
            self.packed = CompiledProduct(kernels, weight, bias)
        elif device.type == "cpu" and weight.numel() >= SMALLEST_PACKED and cpu_packs(stored):
            self.packed = InnerProduct(weight, bias)
        if self.packed is not None:
            self.parts = []  # a joined weight is a copy, and of no more use

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.emulated:
            return self._product(x.to(self.dtype).float()).to(self.dtype)
        return self._product(x.to(self.dtype))

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """[N, in] and [N, out] -> [N, out]: the product added to ``residual``."""
        if self.packed is not None and not self.emulated and x.dtype == residual.dtype == self.dtype:
            return self.packed.plus(x, residual)
        return residual + self(x)

    def _product(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        results = [nn.functional.linear(x, weight, bias) for weight, bias in self.parts]
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has units for products in ``dtype``."""
    if dtype != torch.bfloat16:
        return dtype in (torch.float32, torch.float64)
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


@cache
def cpu_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed products exist here and are right; torch calls them private, so they may go away."""
    try:
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(3, 40, generator=generator), torch.randn(24, 40, generator=generator))
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), ROWS_HINT)
        product = torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, None, "none", [], "").float()
        with torch.autocast("cpu", enabled=False):
            expected = x @ weight.T
    except (AttributeError, RuntimeError, TypeError):  # not built in, or this CPU cannot
        return False
    tolerance = 1e-3 if dtype == torch.float32 else 0.5
    return bool((product - expected).abs().max() < tolerance)


class PackedWeights:
    """Packed copies of the layers of one model. Those of frozen layers are kept from one use to the next.

    Args:
        kernels: compiled ones, which then multiply in fp32 on the CPU; None: torch multiplies.
    """

    def __init__(self, kernels: Kernels | None = None) -> None:
        self.kernels = kernels
        self._kept: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def dense(self, modules: Sequence[nn.Module], dtype: torch.dtype) -> Dense | None:
        """These layers, which share their input, as one; None where a layer is of a kind that cannot be packed."""
        kernels = self.kernels
        return self._made("dense", modules, dtype, lambda weights, biases: Dense(weights, biases, dtype, kernels))

    def gated(self, gate: nn.Module, up: nn.Module) -> GatedProduct | None:
        """silu(gate(x)) up(x) in fp32 on the CPU; None where a layer cannot be packed, or nothing is compiled."""
        kernels = self.kernels
        if kernels is None:
            return None
        return self._made(
            "gated",
            [gate, up],
            torch.float32,
            lambda weights, biases: GatedProduct(kernels, (weights[0], weights[1]), (biases[0], biases[1])),
        )

    def _made(
        self,
        kind: str,
        modules: Sequence[nn.Module],
        dtype: torch.dtype,
        make: Callable[[Sequence[Tensor], Sequence[Tensor | None]], Made],
    ) -> Made | None:
        key = (kind, *(id(module) for module in modules))
        stamp = _stamp(modules, dtype)
        if stamp is not None and key in self._kept and self._kept[key][0] == stamp:
            return self._kept[key][1]  # type: ignore[no-any-return]
        found = [effective_weight(module) for module in modules]
        weights = [weight for weight, _ in found if weight is not None]
        if len(weights) < len(found):
            return None
        made = make(weights, [bias for _, bias in found])
        self._kept.pop(key, None)
        if stamp is not None:
            self._kept[key] = (stamp, made)
        return made


def _stamp(modules: Sequence[nn.Module], dtype: torch.dtype) -> Any:
    """What changes when weights change, for frozen layers; None for layers in training, which change all the time."""
    parameters = [p for module in modules for p in module.parameters()]
    if any(p.requires_grad for p in parameters):
        return None
    adapters = [(m.disable_adapters, tuple(m.active_adapters)) for m in modules if isinstance(m, LoraLayer)]
    return dtype, adapters, [(p.data_ptr(), p._version) for p in parameters]


def effective_weight(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight [out, in] and bias of a layer with its active adapters merged; weight None for other kinds of layers."""
    layer: Any = module
    base, weight = layer, None
    if isinstance(module, LoraLayer):
        base = layer.get_base_layer()
    if type(base) is nn.Linear:
        weight = base.weight
    elif type(base) is Conv1D:
        weight = base.weight.T
    if weight is None or not weight.is_floating_point():
        return None, None
    if isinstance(module, LoraLayer) and not layer.disable_adapters and not layer.merged:
        for adapter in layer.active_adapters:
            delta = layer.get_delta_weight(adapter).to(weight.dtype)
            weight = weight + (delta.T if type(base) is Conv1D else delta)
    return weight.detach(), base.bias


def layers_with_weights(model: nn.Module) -> list[nn.Module]:
    """Every layer that ``effective_weight`` may know: adapters count as one with what they adapt."""
    inside = {id(child) for m in model.modules() if isinstance(m, LoraLayer) for child in m.modules()}
    return [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer) or (type(module) in (nn.Linear, Conv1D) and id(module) not in inside)
    ]


@torch.no_grad()
def pack(layers: Sequence[nn.Module], weights: PackedWeights, dtype: torch.dtype) -> list[tuple[Any, Dense]]:
    """Those of these layers that can be packed, each with its copy."""
    found = [(layer, weights.dense([layer], dtype)) for layer in layers]
    return [(layer, dense) for layer, dense in found if dense is not None]


@contextmanager
def computing_with(packed: Sequence[tuple[Any, Dense]]) -> Iterator[None]:
    """Inside the block these layers compute with their packed weights. No gradient passes through them."""
    with ExitStack() as block:
        for layer, dense in packed:
            block.enter_context(replaced_forward(layer, _forward_of(dense)))
        yield


@contextmanager
def packed_layers(layers: Sequence[nn.Module], weights: PackedWeights, dtype: torch.dtype) -> Iterator[None]:
    """``computing_with`` what ``pack`` makes of these layers."""
    with computing_with(pack(layers, weights, dtype)):
        yield


def _forward_of(dense: Dense) -> Any:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return dense(x)

    return forward
