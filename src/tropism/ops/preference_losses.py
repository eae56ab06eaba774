"""Losses on what people preferred: reward models (pairs and best of K), DPO, and KTO."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tropism.ops.arguments import (
    describe_shapes,
    require_bool,
    require_number,
    require_positive,
    require_rank,
    require_same_shape,
    upcast,
)
from tropism.ops.logprobs import token_logprobs


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, *, margin: float | Tensor = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """Negative log-likelihood of the observed preference when scores are log-odds.

    L(c, r) = -log sigmoid(c - r - margin);  (1 - s) L(chosen, rejected) + s L(rejected, chosen)
    https://arxiv.org/abs/1706.03741; margin: https://arxiv.org/abs/2307.09288

    Args:
        chosen: [N] scores of the preferred completions.
        rejected: [N] scores of the others.
        margin: by how much the preferred one should lead: one number, or [N].
        label_smoothing: s in [0, 0.5], the assumed probability that a label is flipped.

    Returns:
        [N] fp32 losses (fp64 for fp64 scores).

    Raises:
        ValueError: the tensors are not of one shape [N], or ``label_smoothing`` is outside [0, 0.5].
    """
    require_rank(1, chosen=chosen, rejected=rejected)
    require_same_shape(chosen=chosen, rejected=rejected)
    require_number("label_smoothing", label_smoothing, low=0.0, high=0.5)
    if isinstance(margin, Tensor):
        require_same_shape(chosen=chosen, margin=margin)
    lead = upcast(chosen) - upcast(rejected)
    return -(1 - label_smoothing) * logsigmoid(lead - margin) - label_smoothing * logsigmoid(-lead - margin)


def best_of_k_loss(
    scores: Tensor,
    choices: Tensor,
    *,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    present: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of the chosen one of K completions when scores are log-odds.

    L(c) = -log softmax(scores, that of c less the margin)[c];
    (1 - s) L(choice) + s / (K - 1) sum of L(k) over the others      https://arxiv.org/abs/1909.08593

    For K = 2 it is ``bradley_terry_loss``.

    Args:
        scores: [N, K] scores of the K >= 2 completions of each prompt.
        choices: [N] integer index of the preferred one, 0..K-1.
        margin: [N] by how much the preferred one should lead; None: 0.
        label_smoothing: s in [0, 0.5], the assumed probability that a choice fell on one of the others.
        present: [N, K] bool, where there is a completion; None: everywhere. Other scores do not matter.

    Returns:
        [N] fp32 losses (fp64 for fp64 scores).

    Raises:
        ValueError: the tensors are not of these shapes, K < 2, a choice is no integer in 0..K-1 or not present, or
            ``label_smoothing`` is outside [0, 0.5].
    """
    require_rank(2, scores=scores)
    require_rank(1, choices=choices)
    require_number("label_smoothing", label_smoothing, low=0.0, high=0.5)
    if scores.shape[1] < 2:
        raise ValueError(f"a choice needs at least two completions: {describe_shapes(scores=scores)}")
    if choices.shape[0] != scores.shape[0]:
        raise ValueError(f"each row of scores has one choice: {describe_shapes(scores=scores, choices=choices)}")
    if bool(((choices < 0) | (choices >= scores.shape[1])).any()):
        shapes = describe_shapes(scores=scores, choices=choices)
        raise ValueError(f"choices must be between 0 and {scores.shape[1] - 1}, not {choices.tolist()} ({shapes})")
    if present is None:
        present = torch.ones_like(scores, dtype=torch.bool)
    require_same_shape(scores=scores, present=present)
    require_bool(present=present)
    if not bool(present.gather(1, choices[:, None]).all()):
        raise ValueError(f"a chosen completion is not present: choices {choices.tolist()}")
    masked = upcast(scores).masked_fill(~present, -torch.inf)
    if label_smoothing == 0 and margin is None:
        return -token_logprobs(masked, choices)
    lead = torch.zeros_like(masked[:, 0]) if margin is None else upcast(margin)
    require_same_shape(choices=choices, margin=lead)
    # [N, K, K]: row c holds the scores as they are if c was chosen, its own less the margin.
    as_chosen = masked[:, None, :] - torch.diag_embed(lead[:, None].expand(-1, scores.shape[1]))
    losses = -as_chosen.log_softmax(-1).diagonal(dim1=1, dim2=2)
    others = present.scatter(1, choices[:, None], False)
    share = label_smoothing / others.sum(1).clamp(min=1)
    told = losses.gather(1, choices[:, None]).squeeze(1)
    return (1 - label_smoothing) * told + share * losses.masked_fill(~others, 0.0).sum(1)


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float,
    variant: Literal["sigmoid", "ipo", "hinge"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Preference loss in which the reward is the policy's log-ratio to the reference.

    h = (log pi - log ref)(chosen) - (log pi - log ref)(rejected)
    sigmoid: -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)      https://arxiv.org/abs/2305.18290
    (smoothing s: https://ericmitchell.ai/cdpo.pdf);  ipo: (h - 1 / (2 beta))^2      https://arxiv.org/abs/2310.12036
    hinge: max(0, 1 - beta h)      https://arxiv.org/abs/2305.10425

    Args:
        chosen_logprobs: [N] log-prob in nats of each preferred completion, summed over its tokens.
        rejected_logprobs: [N] of the other completion.
        ref_chosen_logprobs: [N] the preferred one under the reference.
        ref_rejected_logprobs: [N] the other one under the reference.
        beta: > 0, how strongly the reference holds.
        variant: which of the three losses.
        label_smoothing: s in [0, 0.5], only for "sigmoid".

    Returns:
        [N] fp32 losses (fp64 for fp64 inputs).

    Raises:
        ValueError: the tensors are not of one shape [N], beta is not positive, ``variant`` is unknown, or
            ``label_smoothing`` is outside [0, 0.5] or given with another variant than "sigmoid".
    """
    columns = {
        "chosen_logprobs": chosen_logprobs,
        "rejected_logprobs": rejected_logprobs,
        "ref_chosen_logprobs": ref_chosen_logprobs,
        "ref_rejected_logprobs": ref_rejected_logprobs,
    }
    require_rank(1, **columns)
    require_same_shape(**columns)
    require_positive("beta", beta)
    require_number("label_smoothing", label_smoothing, low=0.0, high=0.5)
    if label_smoothing and variant != "sigmoid":
        raise ValueError(f"label_smoothing {label_smoothing} has no meaning in the variant {variant!r}; set it to 0")
    chosen_ratio = upcast(chosen_logprobs) - upcast(ref_chosen_logprobs)
    rejected_ratio = upcast(rejected_logprobs) - upcast(ref_rejected_logprobs)
    lead = chosen_ratio - rejected_ratio
    match variant:
        case "sigmoid":
            return -(1 - label_smoothing) * logsigmoid(beta * lead) - label_smoothing * logsigmoid(-beta * lead)
        case "ipo":
            return (lead - 1 / (2 * beta)).square()
        case "hinge":
            return (1 - beta * lead).relu()
        case _:
            raise ValueError(f"variant must be 'sigmoid', 'ipo' or 'hinge', not {variant!r}")


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    liked: Tensor,
    *,
    reference_points: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Loss of single completions that were liked or not, by how people value gains and losses.

    r = log pi - log ref
    liked: w_d (1 - sigmoid(beta (r - z)));  otherwise: w_u (1 - sigmoid(beta (z - r)))  https://arxiv.org/abs/2402.01306

    Args:
        logprobs: [N] log-prob in nats of each completion, summed over its tokens.
        ref_logprobs: [N] under the reference.
        liked: [N] bool.
        reference_points: [N] z in nats, from which on a completion counts as gained. No gradient goes there.
        beta: > 0, how strongly the reference holds.
        desirable_weight: w_d > 0.
        undesirable_weight: w_u > 0.

    Returns:
        [N] fp32 losses (fp64 for fp64 inputs), each between 0 and its weight.

    Raises:
        ValueError: the tensors are not of one shape [N], ``liked`` is not bool, or a number is not positive.
    """
    columns = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "liked": liked, "reference_points": reference_points}
    require_rank(1, **columns)
    require_same_shape(**columns)
    require_bool(liked=liked)
    numbers = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    for name, value in numbers.items():
        require_positive(name, value)
    ahead = upcast(logprobs) - upcast(ref_logprobs) - upcast(reference_points.detach())
    # 1 - sigmoid(x) = sigmoid(-x), which does not round to 0.
    gained, lost = desirable_weight * (-beta * ahead).sigmoid(), undesirable_weight * (beta * ahead).sigmoid()
    return torch.where(liked, gained, lost)
