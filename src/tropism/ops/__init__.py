"""Pure tensor functions: no state, no model, no configuration, nothing but torch.

Tensors are ``[B, T]`` with index t about completion token t, right-padded; masks are bool and come from lengths.
Everything after the tensors is keyword-only. Losses are per token or per sequence, never a mean: who knows the whole
batch divides. Shapes are checked, never broadcast; a mistake is a ``ValueError`` that gives the shapes.
"""

from __future__ import annotations

from tropism.ops.action_values import taken_and_logsumexp
from tropism.ops.advantages import (
    GROUP_STD_EPSILON,
    gae,
    group_advantages,
    group_advantages_per_token,
    leave_one_out_advantages,
    rewards_to_go,
)
from tropism.ops.divergences import LOG_RATIO_LIMIT, clamped_fraction, full_kl, kl_k1, kl_k2, kl_k3
from tropism.ops.importance import effective_sample_size, truncated_importance_weights
from tropism.ops.logprobs import entropy, tempered, token_logprobs
from tropism.ops.masking import WHITEN_EPSILON, masked_deviations, masked_mean, masked_sum, masked_whiten
from tropism.ops.offline_losses import (
    advantage_weighted_loss,
    conservative_loss,
    expectile_loss,
    next_action_values,
    td_targets,
)
from tropism.ops.policy_losses import (
    cispo_policy_loss,
    clipped_policy_loss,
    clipped_tokens,
    clipped_value_loss,
    explained_variance,
    sequence_log_ratio,
    sequence_policy_loss,
)
from tropism.ops.preference_losses import best_of_k_loss, bradley_terry_loss, dpo_loss, kto_loss
from tropism.ops.rewards import penalised_rewards, score_at_last_token
from tropism.ops.slots import read_slots, slot_id, without_slots
from tropism.ops.truncation import penalised, truncated
from tropism.ops.vocabulary import linear_logprobs

__all__ = [
    "GROUP_STD_EPSILON",
    "LOG_RATIO_LIMIT",
    "WHITEN_EPSILON",
    "advantage_weighted_loss",
    "best_of_k_loss",
    "bradley_terry_loss",
    "cispo_policy_loss",
    "clamped_fraction",
    "clipped_policy_loss",
    "clipped_tokens",
    "clipped_value_loss",
    "conservative_loss",
    "dpo_loss",
    "effective_sample_size",
    "entropy",
    "expectile_loss",
    "explained_variance",
    "full_kl",
    "gae",
    "group_advantages",
    "group_advantages_per_token",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kto_loss",
    "leave_one_out_advantages",
    "linear_logprobs",
    "masked_deviations",
    "masked_mean",
    "masked_sum",
    "masked_whiten",
    "next_action_values",
    "penalised",
    "penalised_rewards",
    "read_slots",
    "rewards_to_go",
    "score_at_last_token",
    "sequence_log_ratio",
    "sequence_policy_loss",
    "slot_id",
    "taken_and_logsumexp",
    "td_targets",
    "tempered",
    "token_logprobs",
    "truncated",
    "truncated_importance_weights",
    "without_slots",
]
