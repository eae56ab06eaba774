"""How a run trains: optimizer, precision, micro-batches, evaluation, checkpoints, tracking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tropism.errors import ConfigError
from tropism.rewards.config import RewardConfig

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]

IMPORTANCE_CAP = 2.0
"""Cap of importance weights where ``TrainerConfig.importance_cap`` is "auto" and sampling is not exact (verl's too)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (https://arxiv.org/abs/1711.05101)."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and below 1")
        if not self.eps > 0:
            raise ValueError("eps must be positive")
        if not self.weight_decay >= 0:
            raise ValueError("weight_decay must not be negative")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how held-out prompts are answered and scored."""

    every: int | None = None
    """Evaluate after this many steps; None: before the first and after the last step only."""
    sampling: tuple[dict[str, Any], ...] = ()
    """Changes to the recipe's sampling, such as ``{temperature: 0.7}``: the prompts are answered once more with each
    of them, by the same randomness."""
    gold: RewardConfig | None = None
    """A second reward that judges the held-out completions and trains nothing, in any form that a reward may have:
    logged as ``eval/gold``, it shows whether the reward is being gamed."""

    def __post_init__(self) -> None:
        if self.gold is not None:
            try:
                object.__setattr__(self, "gold", RewardConfig.of(self.gold))
            except ConfigError as error:
                raise ConfigError(f"gold: {error}") from error
        if self.every is not None and self.every < 1:
            raise ValueError("every must be at least 1, or None for before and after only")
        if not isinstance(self.sampling, (list, tuple)):
            raise ValueError("sampling must be a list of changes to the recipe's sampling: [{temperature: 0.7}]")
        object.__setattr__(self, "sampling", tuple(self.sampling))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run, and when it stops early."""

    every: int | None = None
    """Save after this many steps; None: at the end, on a signal and after an error only."""
    keep: int = 2
    """Newest checkpoints to keep; older ones are deleted."""
    best_metric: str | None = "eval/reward"
    """Metric of the evaluations whose best value keeps its weights under best/; None: keep no best."""
    best_mode: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""
    use_best: bool = False
    """Export the best weights to model/ at the end instead of the last."""
    patience: int | None = None
    """Stop after this many evaluations without a new best; None: never."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError("every must be at least 1, or None for the end only")
        if self.keep < 1:
            raise ValueError("keep must be at least 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError("patience must be at least 1 evaluation, or None")
        if self.best_metric is None and (self.use_best or self.patience is not None):
            raise ValueError("use_best and patience need a best_metric")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Everything about the optimization that no method decides."""

    learning_rate: float | None = None
    """Peak learning rate; None: by the size of what is trained (see docs/training.md), and logged."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate over the steps after warm-up; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; None: never."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW's numbers."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward: fp32, or bf16 autocast; auto: bf16 on GPUs that have it, else fp32."""
    micro_batch_tokens: int = 8192
    """Most tokens of a forward and backward pass; the result does not depend on it, memory does. Pads count where the
    family needs them; a prompt that completions share counts once."""
    micro_batch_size: int | None = None
    """Most rows of a forward and backward pass; None: as many as micro_batch_tokens allows."""
    recompute_logprobs: bool | None = None
    """Old log-probs from a training forward instead of from sampling; None: in bf16, where the two differ, and where
    importance_cap is a number."""
    importance_cap: float | Literal["auto"] | None = "auto"
    """Largest weight that corrects for the difference between sampling and training forward; auto: 2 in bf16, no
    weights in fp32; None: no weights."""
    preflight: bool = True
    """Check before the first update that KL is 0, the ratio 1, and cached and uncached passes agree."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints, the best one, early stop."""
    tracking: tuple[Tracker, ...] = ()
    """Experiment trackers to log to, beside metrics.jsonl."""
    progress: bool | None = None
    """Live progress on the terminal; None: where there is one."""

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError("learning_rate must be positive, or None for the default of the model's size")
        if self.warmup_steps < 0:
            raise ValueError("warmup_steps must not be negative")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError("max_grad_norm must be positive, or None to clip nothing")
        if self.micro_batch_tokens < 1 or (self.micro_batch_size is not None and self.micro_batch_size < 1):
            raise ValueError("micro_batch_tokens and micro_batch_size must be at least 1")
        if isinstance(self.importance_cap, (int, float)):
            if not self.importance_cap >= 1:
                raise ValueError("importance_cap must be at least 1: below, it would shrink weights that need no cap")
            if self.recompute_logprobs is False:
                raise ValueError("importance_cap needs recomputed log-probs: leave recompute_logprobs out")

    def correction(self, *, exact: bool) -> tuple[bool, float | None]:
        """Whether log-probs are computed anew after sampling, and the cap of importance weights (None: no weights).

        Args:
            exact: sampling and training forward agree, because both compute in fp32.
        """
        cap = self.importance_cap
        if cap == "auto":
            cap = None if exact or self.recompute_logprobs is False else IMPORTANCE_CAP
        recompute = self.recompute_logprobs
        return (not exact or cap is not None) if recompute is None else recompute, cap
