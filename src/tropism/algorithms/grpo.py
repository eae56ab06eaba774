"""GRPO: advantages from the rewards of a prompt's other completions, no critic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tropism.algorithms.base import (
    OnPolicyAlgorithm,
    OnPolicyConfig,
    Ratios,
    RunFacts,
    Scorer,
    count_sequences,
    count_tokens,
    importance_weighted,
    inside,
    policy_outputs,
    policy_ratios,
    reference_logprobs,
)
from tropism.ops import (
    cispo_policy_loss,
    clipped_policy_loss,
    clipped_tokens,
    group_advantages_per_token,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_sum,
    rewards_to_go,
    sequence_log_ratio,
    sequence_policy_loss,
)
from tropism.types import PolicyBatch, RewardBatch, Rollouts, Sums


@dataclass(frozen=True, kw_only=True)
class GRPO(OnPolicyConfig):
    """Group-relative policy optimisation (https://arxiv.org/abs/2402.03300), its published variants as fields."""

    name: ClassVar[str] = "grpo"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # https://arxiv.org/abs/2402.03300
        "deepseekmath": {"group_size": 64, "kl_coef": 0.04, "normalisation": "sequence"},
        # https://arxiv.org/abs/2503.20783
        "dr_grpo": {"scale": "none", "normalisation": "constant", "kl_coef": 0.0},
        # https://arxiv.org/abs/2503.14476
        "dapo": {"clip_low": 0.2, "clip_high": 0.28, "normalisation": "token", "kl_coef": 0.0, "mask_truncated": True},
        # https://arxiv.org/abs/2507.18071
        "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "normalisation": "sequence", "kl_coef": 0.0},
        # https://arxiv.org/abs/2506.13585
        "cispo": {"ratio": "cispo", "clip_high": 5.0, "normalisation": "token", "kl_coef": 0.0},
        "trl": {"group_size": 8, "kl_coef": 0.0, "normalisation": "token", "clip_low": 0.2, "clip_high": 0.2},
    }

    group_size: int = 8
    """Completions per prompt that are compared with each other; at least 2."""
    scale: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the standard deviation of the group's rewards, of the whole batch's, or not at all."""
    credit: Literal["token", "completion"] = "token"
    """Rewards per token count for the token that they are paid at and those before it, or for the whole completion.
    Without any, and with ratio sequence, all tokens of a completion have one advantage."""
    normalisation: Literal["token", "sequence", "constant"] = "token"
    """The loss is a mean over all tokens, over completions of their token means, or a sum over max_new_tokens."""
    ratio: Literal["token", "sequence", "cispo"] = "token"
    """Importance ratio per token (GRPO), per completion (GSPO), or clipped and detached (CISPO)."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high (larger than clip_low: clip-higher)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL penalty: k2 and k3 stand in the loss, token by token (k3's gradient is that of
    KL(reference || policy), k2's of KL(policy || reference), each without its effect on later tokens); k1 stands in the
    reward, per completion, which gives the gradient of the sequence KL; in a loss its expected gradient is zero."""
    mask_truncated: bool = False
    """Completions cut by the length limit contribute no loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(
                "group_size must be at least 2: GRPO compares the completions of one prompt with each other"
            )
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError("clip_low and clip_high must not be negative")

    @property
    def action(self) -> Literal["token", "sequence"]:
        return "sequence" if self.ratio == "sequence" else "token"

    @property
    def learns_filtered(self) -> bool:
        return self.ratio != "cispo"  # whose loss is the log-prob itself, -inf outside the set

    def build(self, facts: RunFacts) -> GRPOAlgorithm:
        return GRPOAlgorithm(self, facts)


class GRPOAlgorithm(OnPolicyAlgorithm[GRPO]):
    """GRPO in a run; it has no state of its own."""

    def make_batch(
        self, policy: Scorer, reference: Scorer | None, rollouts: Rollouts, rewards: RewardBatch
    ) -> PolicyBatch:
        config = self.config
        ref_logprobs = reference_logprobs(reference, rollouts)
        mask = rollouts.completion_mask
        changed = rewards.per_completion
        if config.kl_estimator == "k1":
            changed = changed - config.kl_coef * (kl_k1(rollouts.logprobs, ref_logprobs) * mask).sum(-1)
        token_rewards = torch.zeros_like(rollouts.logprobs) if rewards.per_token is None else rewards.per_token
        to_go = rewards_to_go(changed, token_rewards)
        if config.credit == "completion" or config.ratio == "sequence":
            to_go = to_go[:, :1]
        real = mask[:, : to_go.shape[1]].clone()
        real[:, :1] = True  # a completion without a token has its reward, too
        advantages = group_advantages_per_token(
            to_go, config.group_size, scale=config.scale, scored=rewards.scored, mask=real
        )
        loss_mask = mask & rewards.scored[:, None]
        if config.mask_truncated:
            loss_mask = loss_mask & ~rollouts.truncated[:, None]
        return PolicyBatch.of(
            rollouts, loss_mask=loss_mask, ref_logprobs=ref_logprobs, advantages=advantages * loss_mask
        )

    def loss(self, policy: Any, batch: PolicyBatch) -> tuple[Sums, Ratios]:
        config, mask = self.config, batch.loss_mask
        output = policy_outputs(policy, batch, {"logprobs", "entropy"})
        logprobs, old = output.logprobs, batch.old_logprobs
        clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
        if config.ratio == "token":
            surrogate = clipped_policy_loss(logprobs, old, batch.advantages, **clip)
            clipped = clipped_tokens(logprobs, old, batch.advantages, **clip)
        elif config.ratio == "sequence":
            surrogate = sequence_policy_loss(logprobs, old, batch.advantages, mask, **clip)
            log_ratio = sequence_log_ratio(logprobs, old, mask)
            clipped = clipped_tokens(log_ratio, torch.zeros_like(log_ratio), batch.advantages, **clip)
        else:
            surrogate = cispo_policy_loss(logprobs, old, batch.advantages, clip_high=config.clip_high)
            # The weight is capped whatever the sign of the advantage.
            clipped = clipped_tokens(logprobs, old, torch.ones_like(batch.advantages), **clip)
        sums = {"policy": self._sum(surrogate, batch)}
        if self._kl_in_loss:
            estimator = kl_k2 if config.kl_estimator == "k2" else kl_k3
            kept = inside(logprobs, batch, outside=batch.ref_logprobs)
            sums["kl"] = config.kl_coef * self._sum(estimator(kept, batch.ref_logprobs), batch)
        return sums, policy_ratios(logprobs, output.entropy, clipped, batch)

    @property
    def _kl_in_loss(self) -> bool:
        return self.config.kl_coef > 0 and self.config.kl_estimator != "k1"

    def idle(self, batch: PolicyBatch) -> Tensor:
        """Completions of groups with equal rewards too, where no KL stands in the loss."""
        idle = super().idle(batch)
        return idle if self._kl_in_loss else idle | (batch.advantages == 0).all(dim=1)

    def _sum(self, values: Tensor, batch: PolicyBatch) -> Tensor:
        """Sum of per-token losses, in the unit that ``weight`` counts."""
        values = importance_weighted(values, batch)
        if self.config.normalisation == "sequence":
            values = values / batch.loss_mask.sum(-1, keepdim=True).clamp(min=1)
        return masked_sum(values, batch.loss_mask)

    def weight(self, batch: PolicyBatch) -> dict[str, float]:
        if self.config.normalisation == "token":
            count = count_tokens(batch)
        elif self.config.normalisation == "sequence":
            count = count_sequences(batch)
        else:
            count = count_sequences(batch) * self.facts.max_new_tokens
        return {"policy": count, "kl": count}
