"""How far sampling was from the training forward, and the importance weights that make up for it."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from tropism.ops import effective_sample_size, masked_mean, truncated_importance_weights
from tropism.types import Metrics, Rollouts


def sampling_correction(
    rollouts: Rollouts, sampled: Tensor, *, action: Literal["token", "sequence"], cap: float | None
) -> tuple[Metrics, Tensor | None]:
    """Numbers about the difference, and importance weights where they are asked for.

    With old log-probs from the training forward the clipped ratio is about the update alone; the weights are about
    what sampled (decoupled PPO, https://arxiv.org/abs/2110.00641). Both log-probs are tempered and unfiltered: what
    top-k, top-p and the like leave out is the user's choice, and no weight can bring it back.

    Args:
        rollouts: with the log-probs of the training forward.
        sampled: [B, T] log-probs of the same tokens out of sampling.
        action: what the method's ratio is about, token or whole completion; so are the weights.
        cap: largest weight; None: no weights.

    Returns:
        Metrics ``rollout/...``, and [B, T] weights or None.
    """
    mask = rollouts.completion_mask
    ratios = truncated_importance_weights(rollouts.logprobs, sampled, mask, cap=math.inf)
    metrics: Metrics = {
        "rollout/logprob_mismatch": float(masked_mean((rollouts.logprobs - sampled).abs(), mask)),
        "rollout/effective_sample_size": float(effective_sample_size(ratios, mask)),
    }
    if action == "sequence":
        ratios = truncated_importance_weights(rollouts.logprobs, sampled, mask, cap=math.inf, level="sequence")
        if mask.shape[1]:
            share = effective_sample_size(ratios[:, 0], mask[:, 0])
            metrics["rollout/sequence_effective_sample_size"] = float(share)
    if cap is None:
        return metrics, None
    metrics["rollout/capped_fraction"] = float(masked_mean(ratios > cap, mask))
    return metrics, truncated_importance_weights(rollouts.logprobs, sampled, mask, cap=cap, level=action)
