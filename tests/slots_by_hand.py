"""Reward slots by hand: slot vectors and embedding rows side by side, one unpadded row, the model's own forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slow_sampling import Choose, log_softmax
from tiny_models import BOS_ID, EOS_ID, tiny_model
from tropism.models.conditioning import RewardSlots, make_slots
from tropism.models.policy import Policy

Asked = Sequence[float | None]
"""What the slots hold, in their order; None where a reward is left open."""


def policy_with(
    family: str, *, mechanism: str = "linear", rewards: int = 1, bins: int = 4, seed: int = 0, **config: Any
) -> Policy:
    """A tiny policy whose slots hold random numbers of the size of its embeddings."""
    model = tiny_model(family, **config)
    slots = make_slots(model, mechanism=mechanism, rewards=rewards, bins=bins, base_id=BOS_ID)
    slots.start(model.get_input_embeddings(), seed=seed, ones=False)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in slots.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return Policy(model, conditioning=slots)


def embedding_rows(model: Any, ids: Sequence[int]) -> Tensor:
    """[L, H] what the first layer reads of tokens: rows of the matrix, times the root of the width in Gemma."""
    rows: Tensor = model.get_input_embeddings().weight[list(ids)]
    scale = math.sqrt(model.config.hidden_size) if "gemma" in model.config.model_type else 1.0
    return rows * scale


def slot_vectors(slots: RewardSlots, model: Any, asked: Asked) -> Tensor:
    """[K, H] by the formulas of the mechanisms, slot by slot."""
    vectors = []
    for k, value in enumerate(asked):
        if value is None:
            vectors.append(slots.open[k])
        elif slots.mechanism == "linear":
            vectors.append(slots.weight[k] * value + slots.bias[k])
        elif slots.mechanism == "token":
            vectors.append(slots.table[k, int(value)])
        elif slots.mechanism == "replace":
            vectors.append(slots.direction[k] * value)
        else:
            vectors.append(embedding_rows(model, [slots.base_id])[0] + slots.direction[k] * value)
    return torch.stack(vectors)


def logits_by_hand(model: Any, vectors: Tensor, ids: Sequence[int]) -> Tensor:
    """[K + L, V] of one row: the slots at positions 0 to K - 1, the text from K on; no pads, no cache."""
    embeddings = torch.cat([vectors, embedding_rows(model, ids)])[None]
    length = embeddings.shape[1]
    positions = {} if model.config.model_type == "bloom" else {"position_ids": torch.arange(length)[None]}
    mask = torch.ones(1, length, dtype=torch.long)
    logits: Tensor = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False, **positions).logits[0]
    return logits.double()


@torch.no_grad()
def completion_by_hand(
    policy: Policy, asked: Asked, prompt: Sequence[int], choose: Choose, *, new: int, temperature: float = 1.0
) -> tuple[list[int], list[float]]:
    """Tokens and their log-probs, by a forward pass over the whole row for each token."""
    assert policy.conditioning is not None
    vectors = slot_vectors(policy.conditioning, policy.model, asked)
    ids: list[int] = []
    logprobs: list[float] = []
    while len(ids) < new and (not ids or ids[-1] != EOS_ID):
        row = log_softmax(logits_by_hand(policy.model, vectors, [*prompt, *ids])[-1].tolist(), temperature)
        token = choose(row, len(ids))
        ids.append(token)
        logprobs.append(row[token])
    return ids, logprobs
