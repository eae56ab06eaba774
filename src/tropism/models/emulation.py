"""bf16 arithmetic on CPUs without bf16 units: rounded operands, fp32 products and sums, rounded results.

That is what the units compute. torch's own bf16 kernels for such CPUs are several times slower than their fp32 ones;
here a product costs what it costs in fp32, plus the rounding.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tropism.models.packed import cpu_multiplies

BF16 = torch.bfloat16
PRODUCTS = frozenset(
    {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm, scaled_dot_product_attention}
)
"""What autocast computes in bf16 beside products with weights."""


def emulates(device: torch.device) -> bool:
    """Whether autocast to bf16 is on here and the device has no units for it."""
    if device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    return torch.get_autocast_dtype("cpu") == BF16 and not cpu_multiplies(BF16)


def emulation(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which bf16 products are emulated where ``emulates``; else nothing changes."""
    return _Emulation() if emulates(device) else nullcontext()


def rounded(tensor: Tensor) -> Tensor:
    """The nearest bf16 numbers, as fp32."""
    return tensor.to(BF16).float()


class _Emulation(TorchFunctionMode):
    """Takes the place of autocast for products; everything else stays autocast's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            return emulated_linear(*args, **kwargs)
        if func is torch.addmm and not kwargs:  # GPT-2's Conv1D: bias, input, weight
            return emulated_linear(args[1], args[2].T, args[0])
        if func in PRODUCTS:
            with torch.autocast("cpu", enabled=False):
                args = [rounded(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
                mask = kwargs.get("attn_mask")
                if mask is not None and mask.is_floating_point():
                    kwargs = {**kwargs, "attn_mask": mask.float()}
                return func(*args, **kwargs).to(BF16)
        return func(*args, **kwargs)


def emulated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b as bf16 units compute it, gradients included; activations are kept in bf16.

    Args:
        x: [..., in]. weight: [out, in]. bias: [out].

    Returns:
        [..., out] bf16.
    """
    out: Tensor = _EmulatedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _EmulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            low = x.to(BF16)
            ctx.save_for_backward(low, weight)
            ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
            return linear(low.float(), rounded(weight), None if bias is None else rounded(bias)).to(BF16)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        low, weight = ctx.saved_tensors
        into = gradients[0].to(BF16).float()
        flat = into.reshape(-1, into.shape[-1])
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = (into @ rounded(weight)).to(BF16).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            to_weight = (flat.T @ low.reshape(-1, low.shape[-1]).float()).to(BF16).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            to_bias = flat.sum(0).to(BF16).to(ctx.dtypes[2])
        return to_x, to_weight, to_bias
