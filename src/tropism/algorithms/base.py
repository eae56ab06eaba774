"""What a method is: a few hooks with exact call times, and nothing about loops, devices or reduction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.ops import LOG_RATIO_LIMIT, kl_k1, kl_k3, masked_sum
from tropism.targets.conditioner import Conditioner, Targets
from tropism.targets.config import Conditioning
from tropism.types import Batch, Filtering, Metrics, PolicyBatch, RewardBatch, Rollouts, Sums, Tokens

Ratios = dict[str, tuple[Tensor, Tensor]]
"""Numbers for the log as (sum, count), so that the trainer can add them up over micro-batches and processes."""


Reads = Literal["prompts", "demonstrations", "scored", "comparisons", "pairs", "opinions", "episodes"]
"""Prompts to sample completions of, texts to imitate, texts with their rewards, what people said about completions (for
a reward model), pairs of a chosen and a rejected completion, completions that were liked or not, or texts of one or
several turns with rewards."""


class Signal(Enum):
    """What ``after_step`` asks of the trainer."""

    CONTINUE = "continue"
    END_COLLECT = "end collect"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a method may know about its run beside its own configuration."""

    total_steps: int
    max_new_tokens: int
    conditioner: Conditioner | None = None
    """What stands before prompts that ask for a reward; None where the method's ``conditioning`` is None."""


class Scorer(Protocol):
    """A model without gradients, over whole rollout batches (micro-batching and processes are its own business)."""

    def logprobs(self, tokens: Tokens, *, temperature: float, filtering: Filtering | None = None) -> Tensor:
        """[B, T] log-probs of the completion tokens; -inf of those that ``filtering`` leaves out."""
        ...

    def values(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """[B, T] values before each completion token, and [B] after the last one."""
        ...

    def hidden_states(self, tokens: Tokens) -> Tensor:
        """[B, T, H] what the vocabulary projection reads to predict each completion token."""
        ...


@dataclass(frozen=True, kw_only=True)
class CollectStats:
    """What ``after_collect`` learns about the collect that just ended."""

    samples: int
    """Completions sampled, or demonstrations seen."""
    tokens: int
    """Their completion tokens."""
    sequence_kl: float = 0.0
    """Mean over completions of sum_t (old_logprobs - ref_logprobs), in nats; 0 for methods that do not sample."""
    timings: Metrics = field(default_factory=dict)
    """Seconds of the stages before the update, as ``time/<stage>``, where the source has not logged them itself."""


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """What one step of a method that samples takes."""

    prompts: int
    """Sampled at once."""
    completions: int
    """Of all of them."""
    batch: int
    """Texts of an optimizer step."""
    every: int = 1
    """It samples in every so many-th step, the first included."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig(ABC):
    """All there is to set about a method. One configuration serves many runs: ``build`` makes each its state."""

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    needs_value_head: ClassVar[bool] = False
    needs_q_heads: ClassVar[bool] = False
    learns_from: ClassVar[str] = "its own completions, rewarded"

    @property
    def reads(self) -> Reads:
        """What its data is."""
        return "prompts"

    @property
    def on_policy(self) -> bool:
        """Whether it samples in its steps; a step is then a collect, and otherwise one update."""
        return self.reads == "prompts"

    @property
    def conditioning(self) -> Conditioning | None:
        """How the model is told which reward to reach; None where it is not told."""
        return None

    @property
    def evaluated_at(self) -> Targets:
        """What held-out evaluation asks a model for that is told rewards; None: for much."""
        return None

    @property
    def leaves_open(self) -> bool:
        """Whether the model learns what to make of rewards that are left open."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of the reference enter the batch."""
        return False

    @property
    def needs_exact_kl(self) -> bool:
        """Whether its loss has the KL to the reference over the whole vocabulary (``Policy.reference_logits``)."""
        return False

    @property
    def learns_filtered(self) -> bool:
        """Whether it can train what filters leave of the distribution (``Sampling.policy_distribution``)."""
        return False

    @property
    def score_without_end(self) -> float | None:
        """What replaces the reward of completions that the length limit cut; None: they keep it."""
        return None

    @property
    def q_head_count(self) -> int:
        """Q heads, where it needs some."""
        return 2

    @property
    def head_rate(self) -> float:
        """Learning rate of the method's heads, as a multiple of the language model's."""
        return 1.0

    def step_size(self, prompts_per_step: int, prompts: int) -> StepSize:
        """What a step takes.

        Args:
            prompts_per_step: the recipe's. prompts: all there are.
        """
        return StepSize(prompts=0, completions=0, batch=prompts_per_step)

    @abstractmethod
    def build(self, facts: RunFacts) -> Algorithm[Any]:
        """The method with fresh state for one run."""

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The numbers of a paper or library, by name; ``changes`` override single fields."""
        if name not in cls.presets:
            known = ", ".join(sorted(cls.presets)) or "none"
            raise ConfigError(f"{cls.name} has no preset {name!r}; its presets are: {known}")
        return cls(**{**cls.presets[name], **changes})


C = TypeVar("C", bound=AlgorithmConfig)


class Algorithm(ABC, Generic[C]):
    """A method in a run: its configuration, its state, and the hooks the trainer calls."""

    def __init__(self, config: C, facts: RunFacts) -> None:
        self.config = config
        self.facts = facts

    def prepare(self, batch: Any) -> Any:
        """Once per optimizer step, no gradient, on the whole batch before it is split; returns the batch to use."""
        return batch

    @abstractmethod
    def loss(self, policy: Any, batch: Any) -> tuple[Sums, Ratios]:
        """Per micro-batch: named sums over its items, and numbers for the log."""

    @abstractmethod
    def weight(self, batch: Any) -> dict[str, float]:
        """Once per optimizer step, on the whole batch: what each named sum is divided by."""

    def idle(self, batch: Any) -> Tensor:
        """[B] bool, once per optimizer step: items whose gradient is exactly zero, so that nothing computes them."""
        idle: Tensor = ~batch.loss_mask.any(dim=1)
        return idle

    def after_step(self, policy: Any, metrics: Metrics) -> Signal:
        """Exactly once per optimizer step, with the metrics of that step over all processes; may end the collect."""
        return Signal.CONTINUE

    def after_collect(self, stats: CollectStats) -> Metrics:
        """Exactly once per collect; returns what it wants logged."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of ``state_dict``."""


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(AlgorithmConfig):
    """Fields that every method has which samples its own data."""

    group_size: int = 1
    """Completions sampled per prompt."""
    num_epochs: int = 1
    """Passes over each collect's completions."""
    minibatch_size: int | None = None
    """Completions per optimizer step; None: all of the collect. Must divide them evenly."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference; 0 trains without a reference."""
    target_kl: float | None = None
    """End the collect's updates once the mean KL of the sampling policy to the current one (k3) exceeds this."""

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError("group_size must be at least 1")
        if self.num_epochs < 1:
            raise ValueError("num_epochs must be at least 1")
        if self.minibatch_size is not None and self.minibatch_size < 1:
            raise ValueError("minibatch_size must be at least 1, or None for the whole collect")
        if self.kl_coef < 0:
            raise ValueError("kl_coef must not be negative: it is a penalty")

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def learns_filtered(self) -> bool:
        return True

    def step_size(self, prompts_per_step: int, prompts: int) -> StepSize:
        completions = prompts_per_step * self.group_size
        batch = self.minibatch_size or completions
        return StepSize(prompts=prompts_per_step, completions=completions, batch=batch)

    @property
    def action(self) -> Literal["token", "sequence"]:
        """What one probability ratio of the loss is about; importance weights are about the same."""
        return "token"


P = TypeVar("P", bound=OnPolicyConfig)


class OnPolicyAlgorithm(Algorithm[P], Generic[P]):
    """A method that learns from completions the policy itself has just sampled."""

    @abstractmethod
    def make_batch(
        self, policy: Scorer, reference: Scorer | None, rollouts: Rollouts, rewards: RewardBatch
    ) -> PolicyBatch:
        """Once per collect, no gradient: everything the updates compare against.

        Args:
            policy: the policy as it sampled.
            reference: None where ``needs_reference`` is false.
            rollouts: the completions of all prompts of the collect; a group is contiguous.
            rewards: aligned with ``rollouts``.
        """

    def collect_metrics(self, batch: PolicyBatch) -> Metrics:
        """Once per collect, right after ``make_batch``: numbers about it for the log."""
        return {}

    def after_step(self, policy: Any, metrics: Metrics) -> Signal:
        limit = self.config.target_kl
        if limit is not None and metrics.get("policy/approx_kl", 0.0) > limit:
            return Signal.END_COLLECT
        return Signal.CONTINUE


def reference_logprobs(reference: Scorer | None, rollouts: Rollouts) -> Tensor:
    """[B, T] under the reference at the rollouts' temperature; the rollouts' own where there is no reference.

    Of filtered distributions a token that is outside the reference's set counts with -20 nats there: by the letter its
    KL is infinite.
    """
    if reference is None:
        return rollouts.logprobs
    logprobs = reference.logprobs(rollouts, temperature=rollouts.temperature, filtering=rollouts.filtering)
    return logprobs if rollouts.filtering is None else logprobs.clamp(min=-LOG_RATIO_LIMIT)


def inside(logprobs: Tensor, batch: PolicyBatch, *, outside: Tensor) -> Tensor:
    """[B, T] log-probs, but ``outside`` at tokens that have left the filtered set since they were sampled.

    The policy does not sample such tokens any more, so they are no part of its KL, which would be infinite by them.
    """
    return logprobs if batch.filtering is None else torch.where(logprobs.isneginf(), outside, logprobs)


def count_tokens(batch: Batch) -> float:
    """Trained tokens of a batch."""
    return float(batch.loss_mask.sum())


def count_sequences(batch: Batch) -> float:
    """Completions of a batch with at least one trained token."""
    return float(batch.loss_mask.any(dim=1).sum())


def importance_weighted(values: Tensor, batch: PolicyBatch) -> Tensor:
    """[B, T] losses or advantages of sampled tokens, corrected for what sampled them."""
    return values if batch.importance_weights is None else values * batch.importance_weights


def policy_outputs(policy: Any, batch: PolicyBatch, want: Collection[str], *, entropy_gradient: bool = False) -> Any:
    """One forward pass of a micro-batch at its trained tokens and temperature."""
    return policy(
        **batch.inputs,
        mask=batch.loss_mask,
        temperature=batch.temperature,
        want=frozenset(want),
        entropy_gradient=entropy_gradient,
        filtering=batch.filtering,
    )


@torch.no_grad()
def policy_ratios(logprobs: Tensor, entropy: Tensor, clipped: Tensor, batch: PolicyBatch) -> Ratios:
    """The numbers that every policy-gradient method logs, per trained token; of a filtered policy per token inside."""
    left: Ratios = {}
    mask = batch.loss_mask
    if batch.filtering is not None:
        gone = mask & logprobs.isneginf()
        left = {"policy/outside_fraction": (gone.sum(), mask.sum())}
        mask = mask & ~gone
        logprobs = inside(logprobs, batch, outside=batch.old_logprobs)
    count = mask.sum()

    def per_token(values: Tensor) -> tuple[Tensor, Tensor]:
        return masked_sum(values, mask), count

    return {
        "policy/approx_kl": per_token(kl_k3(batch.old_logprobs, logprobs)),
        "policy/ratio": per_token((logprobs - batch.old_logprobs).exp()),
        "policy/clip_fraction": per_token(clipped.to(logprobs.dtype)),
        "policy/entropy": per_token(entropy),
        "policy/ref_kl": per_token(kl_k1(logprobs, batch.ref_logprobs)),
        "policy/ref_kl_k3": per_token(kl_k3(logprobs, batch.ref_logprobs)),
        **left,
    }
