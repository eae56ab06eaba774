"""What every function of this package does with its tensors before the maths: check their shapes, widen their type."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors of different shapes, which would broadcast to a silently wrong result.

    Args:
        tensors: any number of tensors by the name under which the caller knows them.

    Raises:
        ValueError: the shapes differ; the message gives each name with its shape.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        raise ValueError(f"these tensors must have one shape and are never broadcast: {describe_shapes(**tensors)}")


def require_rank(rank: int, **tensors: Tensor) -> None:
    """Refuse tensors that do not have ``rank`` dimensions.

    Args:
        rank: number of dimensions.
        tensors: any number of tensors by name.

    Raises:
        ValueError: a tensor has another rank; the message gives each name with its shape.
    """
    if any(tensor.dim() != rank for tensor in tensors.values()):
        raise ValueError(f"these tensors must have {rank} dimension(s): {describe_shapes(**tensors)}")


def require_bool(**masks: Tensor) -> None:
    """Refuse masks of another type than bool: a mask of 0 and 1 or of weights would be read in a way nobody meant.

    Args:
        masks: any number of masks by name.

    Raises:
        ValueError: a mask is not bool; the message gives its name, shape and type.
    """
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} {list(mask.shape)} must be bool, not {mask.dtype}; pass {name}.bool()")


def require_number(name: str, value: float, *, low: float, high: float = math.inf) -> None:
    """Refuse a number outside ``low <= value <= high``, NaN included.

    Args:
        name: how the caller calls it.
        value: the number.
        low: smallest allowed value.
        high: largest allowed value.

    Raises:
        ValueError: the number is out of range.
    """
    if not low <= value <= high:
        allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {allowed}, not {value}")


def require_positive(name: str, value: float) -> None:
    """Refuse a number that is not positive and finite.

    Args:
        name: how the caller calls it.
        value: the number.

    Raises:
        ValueError: the number is zero, negative, infinite or NaN.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {value}")


def describe_shapes(**tensors: Tensor) -> str:
    """``name [shape]`` of each tensor, for messages."""
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())


def upcast(tensor: Tensor) -> Tensor:
    """The tensor in fp32 (fp64 stays): sums and exponentials in half precision lose what the losses are about."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
