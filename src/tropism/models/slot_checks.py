"""Whether a model sees its reward slots at all."""

from __future__ import annotations

from typing import Any

import torch

from tropism.errors import ModelError
from tropism.models.policy import Policy
from tropism.ops.slots import slot_id

LEAST = {torch.float32: 1e-5, torch.float64: 1e-5}
"""Of the largest logit: a target that moves no logit by more has no way to the output; 5e-2 in half precision, where
rounding alone moves some."""


@torch.no_grad()
def probe_slots(policy: Policy, conditioner: Any) -> None:
    """See whether targets that differ make logits differ, for mechanisms whose embeddings are not learned.

    A constant added to every dimension of an embedding is taken off by LayerNorm, so ``add`` and ``replace`` with
    ``direction: ones`` cannot work on models that have it. Learned embeddings are probed by what they will learn:
    any difference at all.

    Args:
        conditioner: a ``Conditioner``, or None where nothing is asked for.

    Raises:
        ModelError: they do not; says what to choose instead.
    """
    slots = policy.conditioning
    if slots is None or conditioner is None:
        return
    low, high = (torch.tensor([[slot_id(0, value), 1, 0]], device=policy.device) for value in (0.0, 1.0))
    with policy.whole():
        logits = [policy.logits(_last_hidden(policy, ids)).float() for ids in (low, high)]
        open_slot = torch.tensor([[slot_id(0, None), 1, 0]], device=policy.device)
        logits.append(policy.logits(_last_hidden(policy, open_slot)).float())
        plain = policy.logits(_last_hidden(policy, low[:, 1:])).float()
    least = LEAST.get(policy.dtype, 5e-2) * float(plain.abs().max().clamp(min=1.0))
    family = type(policy.language_model).__name__
    if slots.mechanism in ("add", "replace") and float((logits[0] - logits[1]).abs().max()) <= least:
        raise ModelError(
            f"the target moves no logit of this {family} with mechanism {slots.mechanism} and this direction: what is "
            "added to every dimension alike is removed by LayerNorm. Set algorithm.direction to random, or choose the "
            "mechanism linear"
        )
    if max(float((one - plain).abs().max()) for one in logits) <= least:
        raise ModelError(
            f"a reward slot before the text moves no logit of this {family}: the family does not read it, and is not "
            "supported with slots. Choose the mechanism text, or add the family (docs/extending.md)"
        )


def _last_hidden(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    """[1, H] what predicts the first token after a prompt."""
    if policy.encoder_decoder:
        one = torch.ones(1, dtype=torch.long, device=ids.device)
        output = policy(
            ids, one * ids.shape[1], completion_ids=one[None] - 1, completion_lengths=one, want=frozenset({"hidden"})
        )
        return output.need("hidden")[:, 0]  # type: ignore[no-any-return]
    mask = torch.ones_like(ids, dtype=torch.bool)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return policy.hidden_states(ids, mask, positions)[:, -1]
