"""LoRA layers as one matrix each, for passes without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@contextmanager
def merged_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the block every LoRA layer of ``model`` computes x (W + s B A) instead of x W + s (x A) B.

    A decode step then costs one product per layer instead of three. The merged matrices are copies, as large as the
    adapted weights; weights and adapters themselves are not touched. Results differ by rounding alone. Layers whose
    base is quantised keep their own way.
    """
    changed: list[nn.Module] = []
    try:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, LoraLayer) and (forward := _merged_forward(module)) is not None:
                    assert isinstance(module, nn.Module)
                    module.forward = forward
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _merged_forward(layer: Any) -> Callable[..., Tensor] | None:
    base = layer.get_base_layer()
    if type(base) not in (nn.Linear, Conv1D) or layer.disable_adapters or layer.merged:
        return None
    weight = base.weight
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    weight = weight.detach()
    if isinstance(base, Conv1D):
        weight = weight.T
    bias = base.bias

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    return forward
