"""Losses of value functions that learn from logged data."""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.ops.arguments import require_same_shape, upcast


def expectile_loss(values: Tensor, targets: Tensor, *, tau: float) -> Tensor:
    """Squared error that weighs targets above the value by tau and targets below it by 1 - tau.

    |tau - 1(target < value)| (target - value)^2      IQL, https://arxiv.org/abs/2110.06169

    Args:
        values: [B, T] (or any one shape) predictions.
        targets: same shape, what they should reach; detach them where they must not learn.
        tau: in (0, 1): 0.5 is half the squared error, towards 1 the prediction approaches the largest target.

    Returns:
        Same shape, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the shapes differ, or tau is outside (0, 1).
    """
    require_same_shape(values=values, targets=targets)
    if not 0 < tau < 1:
        raise ValueError(f"tau must be between 0 and 1, both excluded, not {tau}")
    error = upcast(targets) - upcast(values)
    return torch.where(error < 0, 1 - tau, tau) * error.square()
