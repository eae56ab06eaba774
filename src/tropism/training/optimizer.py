"""The optimizer and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tropism.errors import ModelError
from tropism.training.config import TrainerConfig

FULL_RATE_AT = (1e-5, 135e6)
"""Learning rate for training all of that many weights; ``default_learning_rate`` scales it."""
ADAPTER_FACTOR = 20.0
MAX_RATE = 1e-3


def default_learning_rate(weights: int, *, adapters: bool) -> float:
    """A learning rate for a model of ``weights`` parameters.

    rate = 1e-5 * sqrt(135e6 / weights), twenty times that for adapters, at most 1e-3. Adam's step is a fixed size per
    weight, and what a step does to the output grows with the width of the layers, hence the root.
    """
    rate = FULL_RATE_AT[0] * math.sqrt(FULL_RATE_AT[1] / max(1, weights))
    return min(MAX_RATE, rate * (ADAPTER_FACTOR if adapters else 1.0))


def build_optimizer(policy: nn.Module, config: TrainerConfig, *, head_rate: float = 1.0) -> torch.optim.AdamW:
    """AdamW over everything trainable, in groups whose ``rate`` multiplies the learning rate that the trainer sets.

    Weight decay acts on the language model's matrices alone, not on biases, norms and heads. One fused kernel does the
    step where there is one (``can_fuse``); the result is the same up to rounding.

    Args:
        head_rate: learning rate of the heads as a multiple of the language model's.

    Raises:
        ModelError: nothing is trainable, so that training would change nothing.
    """
    named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    if not named:
        raise ModelError(
            "no weight of the model is trainable, so training would change nothing: set lora to train an adapter, "
            "leave train_layers out, or switch gradients on where the model comes from Python (requires_grad_)"
        )
    heads = [p for name, p in named if not name.startswith("model.")]
    model = [p for name, p in named if name.startswith("model.")]
    decay = config.optimizer.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model if p.dim() >= 2], "weight_decay": decay, "rate": 1.0},
        {"params": [p for p in model if p.dim() < 2], "weight_decay": 0.0, "rate": 1.0},
        {"params": heads, "weight_decay": 0.0, "rate": head_rate},
    ]
    groups = [group for group in groups if group["params"]]
    fused = can_fuse(p for _, p in named)
    numbers = config.optimizer
    # None, not False: torch then still takes its second best where it has one.
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=numbers.betas, eps=numbers.eps, fused=fused or None)
    if fused:
        optimizer.register_step_post_hook(_note_change)
    return optimizer


def can_fuse(weights: Iterable[Tensor]) -> bool:
    """Whether torch's fused AdamW steps all of these: fp32 on a CPU, any floating type on CUDA."""
    kinds = {(weight.device.type, weight.dtype) for weight in weights}
    return bool(kinds) and all(
        device == "cuda" or (device == "cpu" and dtype == torch.float32) for device, dtype in kinds
    )


def _note_change(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The fused kernel leaves version counters as they are, by which packed copies of the weights notice a change."""
    stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch.autograd.graph.increment_version(stepped)


def rate_factor(config: TrainerConfig, *, step: int, total_steps: int) -> float:
    """Share of the peak learning rate during ``step`` (from 0) of ``total_steps``; all updates of a step share it."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
