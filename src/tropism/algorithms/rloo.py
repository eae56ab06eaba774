"""RLOO: REINFORCE with the mean reward of a completion's siblings as its baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from tropism.algorithms.base import (
    OnPolicyAlgorithm,
    OnPolicyConfig,
    Ratios,
    RunFacts,
    Scorer,
    count_sequences,
    importance_weighted,
    policy_outputs,
    policy_ratios,
    reference_logprobs,
)
from tropism.ops import clipped_policy_loss, clipped_tokens, kl_k1, leave_one_out_advantages
from tropism.types import PolicyBatch, RewardBatch, Rollouts, Sums


@dataclass(frozen=True, kw_only=True)
class RLOO(OnPolicyConfig):
    """REINFORCE leave-one-out (https://arxiv.org/abs/2402.14740): a completion is one action.

    Its reward is the reward minus kl_coef times its sequence KL; the loss is a mean over completions of their sums over
    tokens, so the gradient is an unbiased estimate of that of E[reward] - kl_coef * KL.
    """

    name: ClassVar[str] = "rloo"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"group_size": 4, "kl_coef": 0.03},
        "trl": {"group_size": 2, "kl_coef": 0.05, "clip_low": 0.2, "clip_high": 0.2},
    }

    group_size: int = 4
    """Completions per prompt; at least 2."""
    kl_coef: float = 0.02
    """Weight of the KL to the reference, in reward per nat of sequence KL; 0 trains without a reference."""
    clip_low: float = 0.2
    """The ratio of a completion's probabilities is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio of a completion's probabilities is clipped above at 1 + clip_high."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError("group_size must be at least 2: the baseline is the mean reward of the other completions")
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError("clip_low and clip_high must not be negative")

    @property
    def action(self) -> Literal["token", "sequence"]:
        return "sequence"

    def build(self, facts: RunFacts) -> RLOOAlgorithm:
        return RLOOAlgorithm(self, facts)


class RLOOAlgorithm(OnPolicyAlgorithm[RLOO]):
    """RLOO in a run; it has no state of its own."""

    def make_batch(
        self, policy: Scorer, reference: Scorer | None, rollouts: Rollouts, rewards: RewardBatch
    ) -> PolicyBatch:
        ref_logprobs = reference_logprobs(reference, rollouts)
        mask = rollouts.completion_mask
        sequence_kl = (kl_k1(rollouts.logprobs, ref_logprobs) * mask).sum(-1)
        totals = rewards.totals - self.config.kl_coef * sequence_kl
        advantages = leave_one_out_advantages(totals, self.config.group_size, scored=rewards.scored)
        loss_mask = mask & rewards.scored[:, None]
        return PolicyBatch.of(
            rollouts, loss_mask=loss_mask, ref_logprobs=ref_logprobs, advantages=advantages[:, None] * loss_mask
        )

    def loss(self, policy: Any, batch: PolicyBatch) -> tuple[Sums, Ratios]:
        mask = batch.loss_mask
        output = policy_outputs(policy, batch, {"logprobs", "entropy"})
        logprobs, old = (output.logprobs * mask).sum(-1), (batch.old_logprobs * mask).sum(-1)
        # A completion is one action: its advantage stands at its every token, its log-prob is their sum.
        weighted = importance_weighted(batch.advantages, batch)
        advantages = (weighted * mask).sum(-1) / mask.sum(-1).clamp(min=1)
        clip = (self.config.clip_low, self.config.clip_high)
        action = (logprobs[:, None], old[:, None], advantages[:, None])
        surrogate = clipped_policy_loss(*action, clip_low=clip[0], clip_high=clip[1])
        clipped = clipped_tokens(*action, clip_low=clip[0], clip_high=clip[1]).expand_as(mask)
        return {"policy": surrogate.sum()}, policy_ratios(output.logprobs, output.entropy, clipped, batch)

    def idle(self, batch: PolicyBatch) -> Tensor:
        """Completions whose reward, KL included, is that of their siblings, too."""
        return super().idle(batch) | (batch.advantages == 0).all(dim=1)

    def weight(self, batch: PolicyBatch) -> dict[str, float]:
        return {"policy": count_sequences(batch)}
