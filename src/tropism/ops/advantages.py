"""From rewards to advantages: with a critic (GAE), or against the other completions of the same prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tropism.ops.arguments import (
    describe_shapes,
    require_bool,
    require_number,
    require_rank,
    require_same_shape,
    upcast,
)
from tropism.ops.masking import masked_deviations

GROUP_STD_EPSILON = 1e-4
"""Added to the standard deviation of the rewards before dividing by it (TRL uses 1e-4, verl 1e-6)."""


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> Tensor:
    """Generalised advantage estimates: exponentially weighted sums of the critic's errors.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  V after the last token = bootstrap
    https://arxiv.org/abs/1506.02438

    Args:
        rewards: [B, T] reward of token t.
        values: [B, T] the critic before token t.
        mask: [B, T] bool, true at real tokens; each row is true up to its length and false after it.
        gamma: discount in [0, 1].
        lam: weight of longer sums in [0, 1].
        bootstrap: [B] value after the last real token; None means 0, the completion has ended.

    Returns:
        [B, T] fp32 advantages (fp64 for fp64 inputs), 0 at masked entries. Returns are ``advantages + values``.

    Raises:
        ValueError: the tensors are not of these shapes, the mask is not bool or not padded on the right, or gamma or
            lam is outside [0, 1].
    """
    require_rank(2, rewards=rewards, values=values, mask=mask)
    require_same_shape(rewards=rewards, values=values, mask=mask)
    require_bool(mask=mask)
    require_number("gamma", gamma, low=0.0, high=1.0)
    require_number("lam", lam, low=0.0, high=1.0)
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(f"mask {list(mask.shape)} has real tokens after masked ones; pad on the right")
    rewards, values = upcast(rewards), upcast(values)
    advantage = values.new_zeros(values.shape[0])
    next_value = advantage if bootstrap is None else upcast(bootstrap)
    if next_value.shape != advantage.shape:
        raise ValueError(f"bootstrap must be [B]: {describe_shapes(bootstrap=next_value, values=values)}")
    columns = []
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(real, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(real, values[:, t], next_value)
        columns.append(advantage)
    return torch.stack(columns[::-1], dim=1) if columns else torch.zeros_like(values)


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    scored: Tensor | None = None,
) -> Tensor:
    """Advantage of each completion over the mean reward of its group, in standard deviations.

    A_i = (r_i - mean(r of the group)) / (std + 1e-4), unbiased std of the group's rewards ("group"), of all scored
    rewards ("batch"), or no division ("none")
    GRPO, https://arxiv.org/abs/2402.03300; without division Dr. GRPO, https://arxiv.org/abs/2503.20783

    Args:
        rewards: [P * G] one reward per completion, groups contiguous.
        group_size: G >= 2 completions per prompt.
        scale: what the difference is divided by.
        scored: [P * G] bool; false leaves a completion out of means and deviations. None means all are scored.

    Returns:
        [P * G] fp32 advantages (fp64 for fp64 rewards); exactly 0 for unscored completions, for the only scored one of
        a group, and in a group of equal rewards.

    Raises:
        ValueError: ``rewards`` is not one-dimensional, its length is no multiple of ``group_size``, ``group_size`` < 2,
            ``scored`` has another shape or is not bool, or ``scale`` is unknown.
    """
    require_rank(1, rewards=rewards)
    return group_advantages_per_token(rewards[:, None], group_size, scale=scale, scored=scored).squeeze(-1)


def group_advantages_per_token(
    rewards_to_go: Tensor,
    group_size: int,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    scored: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Advantage of each token over what its group still earns on average from the same place on.

    A_it = (G_it - mean(G_t of the group)) / (std + 1e-4), std the largest over t of the standard deviations of
    G_t, each over the group ("group") or all scored completions ("batch"); the mean depends on the place alone,
    so that it is a baseline. Rewards of whole completions have G_it = r_i for all t, which is GRPO; with rewards of
    steps this is its process supervision (https://arxiv.org/abs/2402.03300, 4.1.3) with a baseline for each place.

    Args:
        rewards_to_go: [P * G, T] what token t and all that follow it earn, groups contiguous; see ``rewards_to_go``.
        group_size: G >= 2 completions per prompt.
        scale: what the difference is divided by. Deviations by place would be 0 where only the ends differ, hence one.
        scored: [P * G] bool; false leaves a completion out of means and deviations. None means all are scored.
        mask: [P * G, T] bool, real tokens; places where no member has one have no part in the deviation. None: all are.

    Returns:
        [P * G, T] fp32 advantages (fp64 for fp64 rewards); exactly 0 for unscored completions, for the only scored one
        of a group, and where the members of a group do not differ. Entries beyond the end of a completion are no
        advantages of anything: mask them.

    Raises:
        ValueError: ``rewards_to_go`` is not two-dimensional, its length is no multiple of ``group_size``,
            ``group_size`` < 2, ``scored`` or ``mask`` has another shape or is not bool, or ``scale`` is unknown.
    """
    require_rank(2, rewards_to_go=rewards_to_go)
    if mask is not None and (mask.shape != rewards_to_go.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool: {describe_shapes(rewards_to_go=rewards_to_go, mask=mask)}")
    _, scored_groups = _groups(rewards_to_go.sum(-1), group_size, scored)
    places = upcast(rewards_to_go).T  # [T, P * G]
    members = scored_groups.expand(len(places), -1, -1)
    deviations = masked_deviations(places.unflatten(-1, scored_groups.shape), members)
    real = members if mask is None else mask.T.unflatten(-1, scored_groups.shape) & members
    match scale:
        case "group":
            by_place = _std(deviations, members) * real.any(-1, keepdim=True)
            deviations = deviations / (_largest(by_place) + GROUP_STD_EPSILON)
        case "batch":
            everyone = members.flatten(1)
            by_place = _std(masked_deviations(places, everyone), everyone) * real.flatten(1).any(-1, keepdim=True)
            deviations = deviations / (_largest(by_place) + GROUP_STD_EPSILON)
        case "none":
            pass
        case _:
            raise ValueError(f"scale must be 'group', 'batch' or 'none', not {scale!r}")
    return deviations.flatten(1).T


def rewards_to_go(rewards: Tensor, token_rewards: Tensor) -> Tensor:
    """What each token and all that follow it earn, with the reward of the whole completion.

    G_it = r_i + sum_{s >= t} r_is

    Args:
        rewards: [B] of whole completions.
        token_rewards: [B, T], 0 beyond the end.

    Returns:
        [B, T] fp32 (fp64 for fp64 rewards).

    Raises:
        ValueError: the tensors are not of these shapes.
    """
    require_rank(1, rewards=rewards)
    require_rank(2, token_rewards=token_rewards)
    if len(rewards) != len(token_rewards):
        raise ValueError(f"rewards must be [B]: {describe_shapes(rewards=rewards, token_rewards=token_rewards)}")
    return upcast(rewards)[:, None] + upcast(token_rewards).flip(-1).cumsum(-1).flip(-1)


def leave_one_out_advantages(rewards: Tensor, group_size: int, *, scored: Tensor | None = None) -> Tensor:
    """Advantage of each completion over the mean reward of its siblings.

    A_i = r_i - mean(r_j, j != i within the group)      RLOO, https://arxiv.org/abs/2402.14740

    Args:
        rewards: [P * G] one reward per completion, groups contiguous.
        group_size: G >= 2 completions per prompt.
        scored: [P * G] bool; false leaves a completion out of the means. None means all are scored.

    Returns:
        [P * G] fp32 advantages (fp64 for fp64 rewards); each group sums to zero. Exactly 0 for unscored completions,
        for the only scored one of a group, and in a group of equal rewards.

    Raises:
        ValueError: ``rewards`` is not one-dimensional, its length is no multiple of ``group_size``, ``group_size`` < 2,
            or ``scored`` has another shape or is not bool.
    """
    groups, scored_groups = _groups(rewards, group_size, scored)
    count = scored_groups.sum(-1, keepdim=True)
    # r_i - (sum - r_i) / (n - 1) is n / (n - 1) times the deviation from the mean of all n.
    return (masked_deviations(groups, scored_groups) * count / (count - 1).clamp_min(1)).flatten()


def _groups(rewards: Tensor, group_size: int, scored: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rewards and which of them count, both [P, G], checked."""
    require_rank(1, rewards=rewards)
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, not {group_size}: one completion has no siblings")
    if rewards.shape[0] % group_size:
        raise ValueError(f"{describe_shapes(rewards=rewards)} is no whole number of groups of {group_size}")
    if scored is None:
        scored = torch.ones_like(rewards, dtype=torch.bool)
    require_same_shape(rewards=rewards, scored=scored)
    require_bool(scored=scored)
    return upcast(rewards).view(-1, group_size), scored.view(-1, group_size)


def _largest(deviations: Tensor) -> Tensor:
    """[1, ...] the largest over the first dimension; 0 where it has no entries."""
    return deviations.amax(0, keepdim=True) if len(deviations) else deviations.new_zeros((1, *deviations.shape[1:]))


def _std(deviations: Tensor, scored: Tensor) -> Tensor:
    """Unbiased standard deviation over the last dimension [..., 1] of deviations that are 0 where not scored."""
    if deviations.shape[-1] == 0:
        return deviations.new_zeros((*deviations.shape[:-1], 1))
    # Relative to the largest one, so that the squares of rewards like 1e30 do not overflow.
    largest = deviations.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(deviations.dtype).tiny)
    squares = (deviations / largest).square().sum(-1, keepdim=True)
    return largest * (squares / (scored.sum(-1, keepdim=True) - 1).clamp_min(1)).sqrt()
