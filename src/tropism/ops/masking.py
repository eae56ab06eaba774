"""Sums, means and whitening over the real entries of padded tensors."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tropism.ops.arguments import require_bool, require_same_shape, upcast

WHITEN_EPSILON = 1e-8
"""Added to the variance before its root in whitening, as OpenAI's lm-human-preferences does."""


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the unmasked entries; whatever stands at the others, NaN and inf included, has no influence.

    sum(x_i, i in mask)

    Args:
        values: [...] numbers or bools.
        mask: [...] bool, true at the entries that count.

    Returns:
        [] fp32 sum (fp64 for fp64 values), 0 when nothing is unmasked.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.
    """
    require_same_shape(values=values, mask=mask)
    require_bool(mask=mask)
    values = upcast(values)
    return torch.where(mask, values, values.new_zeros(())).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the unmasked entries.

    sum(x_i, i in mask) / |mask|

    Args:
        values: [...] numbers or bools.
        mask: [...] bool, true at the entries that count.

    Returns:
        [] fp32 mean (fp64 for fp64 values), 0 when nothing is unmasked.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.
    """
    return masked_sum(values, mask) / mask.sum().clamp_min(1)


def masked_deviations(values: Tensor, mask: Tensor) -> Tensor:
    """Difference of each unmasked entry from the mean of the unmasked entries of its row.

    d_i = x_i - mean(x_j, j in mask)      over the last dimension

    Equal entries have deviations of exactly 0: the largest entry of a row is taken off before its mean is, because the
    mean of n copies of x, rounded, need not be x, and dividing that rounding error by a tiny deviation makes a signal.

    Args:
        values: [..., N] numbers.
        mask: [..., N] bool, true at the entries that count.

    Returns:
        [..., N] fp32 deviations (fp64 for fp64 values), 0 at masked entries.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.
    """
    require_same_shape(values=values, mask=mask)
    require_bool(mask=mask)
    values = upcast(values)
    if values.shape[-1] == 0:
        return values
    largest = values.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    shifted = torch.where(mask, values - largest, values.new_zeros(()))
    mean = shifted.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(mask, shifted - mean, values.new_zeros(()))


def masked_whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale the unmasked entries to variance 1 and, with ``shift_mean``, shift them to mean 0.

    (x - mean) / sqrt(var + 1e-8), var over the population; + mean without ``shift_mean``
    https://arxiv.org/abs/1909.08593 (its code, lm-human-preferences)

    Args:
        values: [...] numbers.
        mask: [...] bool, true at the entries that count.
        shift_mean: whether the mean is removed.

    Returns:
        [...] fp32 (fp64 for fp64 values), 0 at masked entries. Zeros, with a warning, when fewer than two entries are
        unmasked: they have no variance to scale to.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.
    """
    require_same_shape(values=values, mask=mask)
    require_bool(mask=mask)
    values = upcast(values)
    if int(mask.sum()) < 2:
        warnings.warn("fewer than two unmasked entries cannot be whitened: zeros stand in for them", stacklevel=2)
        return torch.zeros_like(values)
    deviations = masked_deviations(values.flatten(), mask.flatten()).view_as(values)
    whitened = deviations * torch.rsqrt(masked_mean(deviations.square(), mask) + WHITEN_EPSILON)
    if shift_mean:
        return whitened
    return torch.where(mask, whitened + masked_mean(values, mask), values.new_zeros(()))
