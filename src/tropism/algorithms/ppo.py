"""PPO: a critic, generalised advantages, clipped policy and value losses, a KL penalty to the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tropism.algorithms.base import (
    CollectStats,
    OnPolicyAlgorithm,
    OnPolicyConfig,
    Ratios,
    RunFacts,
    Scorer,
    count_tokens,
    importance_weighted,
    inside,
    policy_outputs,
    policy_ratios,
    reference_logprobs,
)
from tropism.algorithms.kl_control import KLControl
from tropism.ops import (
    clipped_policy_loss,
    clipped_tokens,
    clipped_value_loss,
    explained_variance,
    gae,
    kl_k1,
    kl_k2,
    masked_mean,
    masked_sum,
    masked_whiten,
    penalised_rewards,
)
from tropism.types import Metrics, PolicyBatch, RewardBatch, Rollouts, Sums


@dataclass(frozen=True, kw_only=True)
class Critic:
    """How the value head is trained; it shares the policy's trunk."""

    coef: float = 0.1
    """Weight of the value loss."""
    clip: float | None = 0.2
    """Values move at most this far from the old ones before their loss stops falling; None: no clipping."""
    rate: float = 10.0
    """The head's learning rate as a multiple of the policy's: it starts from zero, the policy from a trained model."""
    bootstrap_truncated: bool = False
    """The critic's estimate stands for what would have followed a completion cut by the length limit."""


@dataclass(frozen=True, kw_only=True)
class MissingEos:
    """What a completion that was cut by the length limit loses."""

    penalty: float = 0.0
    """Subtracted from its reward (TRL)."""
    score: float | None = None
    """Replaces its reward (lm-human-preferences: -1); None: it keeps its reward."""


_SOURCE: dict[str, Any] = {"group_size": 1, "critic": Critic(rate=1.0), "missing_eos": MissingEos(score=-1.0)}
"""What the four tasks of lm-human-preferences share."""
_STYLE = _SOURCE | {"kl_coef": 0.15, "kl": KLControl(target=6.0, horizon=10_000), "whiten_rewards": True}


@dataclass(frozen=True, kw_only=True)
class PPO(OnPolicyConfig):
    """Proximal policy optimisation (https://arxiv.org/abs/1707.06347) as lm-human-preferences runs it."""

    name: ClassVar[str] = "ppo"
    needs_value_head: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "lm-human-preferences/sentiment": _STYLE,
        "lm-human-preferences/descriptiveness": _STYLE,
        "lm-human-preferences/cnndm": _SOURCE | {"kl_coef": 0.01},
        "lm-human-preferences/tldr": _SOURCE | {"kl_coef": 0.03},
        "trl": {"group_size": 1, "kl_coef": 0.05, "critic": Critic(rate=1.0)},
        "trlx": {"group_size": 1, "kl_coef": 0.001, "critic": Critic(coef=1.0, rate=1.0)},
    }

    group_size: int = 4
    """Completions sampled per prompt."""
    kl_coef: float = 0.02
    """Weight of the KL to the reference, in reward per nat of sequence KL; 0 trains without a reference."""
    num_epochs: int = 4
    """Passes over each collect's completions."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's mixing of one-step (0) and whole-completion (1) returns."""
    kl: KLControl = field(default_factory=KLControl)
    """Where the KL enters and whether its coefficient adapts."""
    critic: Critic = field(default_factory=Critic)
    """The value loss."""
    whiten_rewards: bool = False
    """Token rewards are divided by their standard deviation over the collect; their mean stays."""
    whiten_advantages: bool = True
    """Advantages get mean 0 and variance 1 over each minibatch."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    missing_eos: MissingEos = field(default_factory=MissingEos)
    """What completions without an end lose."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError("gamma and lam must lie between 0 and 1")
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError("clip_low and clip_high must not be negative")

    @property
    def head_rate(self) -> float:
        return self.critic.rate

    @property
    def score_without_end(self) -> float | None:
        return self.missing_eos.score

    def build(self, facts: RunFacts) -> PPOAlgorithm:
        return PPOAlgorithm(self, facts)


class PPOAlgorithm(OnPolicyAlgorithm[PPO]):
    """PPO in a run; its state is the KL coefficient."""

    def __init__(self, config: PPO, facts: RunFacts) -> None:
        super().__init__(config, facts)
        self.kl_coef = config.kl_coef
        self.objective: Metrics = {}
        """What the last batch was made of, for ``collect_metrics``."""

    def make_batch(
        self, policy: Scorer, reference: Scorer | None, rollouts: Rollouts, rewards: RewardBatch
    ) -> PolicyBatch:
        config, mask = self.config, rollouts.completion_mask
        ref_logprobs = reference_logprobs(reference, rollouts)
        values, after = self._values(policy, rollouts)
        token_rewards = self._token_rewards(rollouts, rewards)
        kl = kl_k1(rollouts.logprobs, ref_logprobs)
        self.objective = self._objective(token_rewards, kl * mask, rewards.scored)
        if config.kl.place == "reward":
            token_rewards = penalised_rewards(token_rewards, kl, mask, kl_coef=self.kl_coef)
        loss_mask = mask & rewards.scored[:, None]
        if config.whiten_rewards and bool(loss_mask.any()):
            token_rewards = masked_whiten(token_rewards, loss_mask, shift_mean=False)
        bootstrap = after * rollouts.truncated if config.critic.bootstrap_truncated else None
        advantages = gae(token_rewards, values, mask, gamma=config.gamma, lam=config.lam, bootstrap=bootstrap)
        return PolicyBatch.of(
            rollouts,
            loss_mask=loss_mask,
            ref_logprobs=ref_logprobs,
            advantages=advantages,
            returns=(advantages + values) * mask,
            old_values=values,
        )

    def _values(self, policy: Scorer, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """[B, T] before each token and [B] after the last; a forward pass only where sampling left them out."""
        if rollouts.values is None or self.config.critic.bootstrap_truncated:
            return policy.values(rollouts)
        return rollouts.values, torch.zeros(len(rollouts))

    def _token_rewards(self, rollouts: Rollouts, rewards: RewardBatch) -> Tensor:
        """[B, T] rewards with the stated loss for completions that did not end."""
        eos, cut = self.config.missing_eos, rollouts.truncated
        completion = rewards.per_completion - eos.penalty * cut
        per_token = rewards.per_token
        if eos.score is not None:
            completion = torch.where(cut, torch.full_like(completion, eos.score), completion)
            per_token = None if per_token is None else per_token * ~cut[:, None]
        changed = replace(rewards, per_completion=completion, per_token=per_token)
        return changed.by_token(rollouts.completion_lengths, rollouts.completion_ids.shape[1])

    def _objective(self, token_rewards: Tensor, kl: Tensor, scored: Tensor) -> Metrics:
        """What is maximised, over the scored completions, with the coefficient that this collect pays."""
        metrics = {"policy/kl_coef_used": self.kl_coef}
        if bool(scored.any()):
            reward, paid = float(token_rewards[scored].sum(-1).mean()), float(kl[scored].sum(-1).mean())
            metrics |= {"reward/effective": reward, "reward/net": reward - self.kl_coef * paid}
        return metrics

    def prepare(self, batch: PolicyBatch) -> PolicyBatch:
        if not self.config.whiten_advantages or not bool(batch.loss_mask.any()):
            return batch
        return replace(batch, advantages=masked_whiten(batch.advantages, batch.loss_mask))

    def loss(self, policy: Any, batch: PolicyBatch) -> tuple[Sums, Ratios]:
        config, mask = self.config, batch.loss_mask
        wanted = {"logprobs", "entropy", "values"}
        output = policy_outputs(policy, batch, wanted, entropy_gradient=config.entropy_coef > 0)
        clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
        surrogate = clipped_policy_loss(output.logprobs, batch.old_logprobs, batch.advantages, **clip)
        surrogate = importance_weighted(surrogate, batch)
        value_loss = clipped_value_loss(output.values, batch.old_values, batch.returns, clip=config.critic.clip)
        sums = {"policy": masked_sum(surrogate, mask), "value": config.critic.coef * masked_sum(value_loss, mask)}
        if config.kl.place == "loss" and self.kl_coef > 0:
            kept = inside(output.logprobs, batch, outside=batch.ref_logprobs)
            kl = importance_weighted(kl_k2(kept, batch.ref_logprobs), batch)
            sums["kl"] = self.kl_coef * masked_sum(kl, mask)
        if config.entropy_coef > 0:
            sums["entropy"] = -config.entropy_coef * masked_sum(output.entropy, mask)
        clipped = clipped_tokens(output.logprobs, batch.old_logprobs, batch.advantages, **clip)
        ratios = policy_ratios(output.logprobs, output.entropy, clipped, batch)
        drift = kl_k2(batch.old_logprobs, inside(output.logprobs.detach(), batch, outside=batch.old_logprobs))
        ratios["policy/approx_kl_k2"] = (masked_sum(drift, mask), mask.sum())
        ratios["loss/total"] = (torch.stack([value.detach() for value in sums.values()]).sum(), mask.sum())
        return sums, ratios | self._critic_ratios(output.values.detach(), value_loss.detach(), batch)

    @staticmethod
    def _critic_ratios(values: Tensor, value_loss: Tensor, batch: PolicyBatch) -> Ratios:
        mask, error = batch.loss_mask, (values - batch.returns) ** 2
        numbers = {"value/mean": values, "value/error": error, "value/clip_fraction": 2 * value_loss > error}
        return {name: (masked_sum(number, mask), mask.sum()) for name, number in numbers.items()}

    def weight(self, batch: PolicyBatch) -> dict[str, float]:
        return dict.fromkeys(("policy", "value", "kl", "entropy"), count_tokens(batch))

    def collect_metrics(self, batch: PolicyBatch) -> Metrics:
        mask = batch.loss_mask
        explained = float(explained_variance(batch.old_values, batch.returns, mask))
        metrics = {**self.objective, "value/explained_variance": explained}
        metrics["value/return_mean"], metrics["value/return_var"] = _moments(batch.returns, mask)
        metrics["value/old_mean"], metrics["value/old_var"] = _moments(batch.old_values, mask)
        return metrics

    def after_collect(self, stats: CollectStats) -> Metrics:
        self.kl_coef = self.config.kl.next_coefficient(
            self.kl_coef, sequence_kl=stats.sequence_kl, samples=stats.samples
        )
        return {"policy/kl_coef": self.kl_coef}

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kl_coef = float(state["kl_coef"])


def _moments(values: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean and population variance of the unmasked entries."""
    mean = masked_mean(values, mask)
    return float(mean), float(masked_mean((values - mean) ** 2, mask))
