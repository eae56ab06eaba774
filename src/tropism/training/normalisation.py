"""Putting the scores of a reward model on a scale: mean and standard deviation over samples of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropism.errors import ConfigError, NumericsError


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Gain and bias of a reward model such that its scores of a policy's samples have a known mean and deviation.

    Before training the scores of K-way choices get mean 0 and deviation 1, those of ratings the mean and deviation of
    the ratings, those of differences the mean and deviation of half of them; after training all get mean 0 and
    deviation 1 (https://arxiv.org/abs/1909.08593).
    """

    policy: Any = None
    """The language model whose completions are scored, as in `model`; None: the reward model's own body as it was
    before training, which must be a causal language model then."""
    data: Any = None
    """Its prompts, as in `data` of methods that sample; None: the prompts of the judgements."""
    samples: int = 256
    """Completions that are scored."""
    before: bool = True
    """Also before training, so that it starts on the scale of the targets."""
    after: bool = True
    """After training; without it the model is no use to methods that add penalties to its scores."""
    check: int = 0
    """So many fresh completions are scored afterwards, and their mean and deviation logged; 0: none."""

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ConfigError(f"normalise.samples is {self.samples}; a deviation needs at least 2 completions")
        if self.check < 0 or self.check == 1:
            raise ConfigError(f"normalise.check is {self.check}; give 0 for none, or at least 2 completions")
        if not (self.before or self.after):
            raise ConfigError("normalise: neither before nor after training; leave it out instead")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Mean and standard deviation of scores."""

    mean: float
    std: float


def measured(scores: Tensor) -> Scale:
    """The scale of scores [N]: mean, and population deviation sqrt(E s^2 - (E s)^2).

    Raises:
        NumericsError: a score is not finite.
    """
    exact = scores.double()
    if not bool(exact.isfinite().all()):
        raise NumericsError("a score of the reward model is not finite; lower the learning rate, or check its weights")
    return Scale(mean=float(exact.mean()), std=float(exact.var(unbiased=False).sqrt()))


def rescaling(raw: Scale, wanted: Scale) -> tuple[float, float]:
    """Gain and bias that put raw scores (gain 1, bias 0) on a scale.

    gain = wanted deviation / raw deviation;  bias = wanted mean - gain * raw mean

    Raises:
        NumericsError: the raw scores do not differ.
    """
    if raw.std < 1e-6 * max(1.0, abs(raw.mean)):
        raise NumericsError(
            f"the reward model gives every sample the score {raw.mean:.4g}, so there is no scale to put it on; sample "
            "with a higher temperature, or give more prompts"
        )
    gain = wanted.std / raw.std
    return gain, wanted.mean - gain * raw.mean


def target_scale(kind: str, targets: Sequence[float]) -> Scale:
    """The scale before training, from what people said.

    Args:
        kind: choice, rating or difference. targets: the ratings or differences.

    Raises:
        ConfigError: they do not differ.
    """
    if kind == "choice":
        return Scale(mean=0.0, std=1.0)
    values = torch.tensor(targets, dtype=torch.float64)
    if not bool(values.isfinite().all()):
        raise ConfigError(f"one of the {kind}s is no finite number; correct it, or leave its record out")
    if min(targets) == max(targets):
        raise ConfigError(
            f"all {kind}s to train on are {targets[0]:g}, so that there is no scale to put scores on before training; "
            "set normalise.before to false"
        )
    return measured(values if kind == "rating" else values / 2)
