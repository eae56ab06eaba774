"""Policies with Q heads that say something: their last layers, zero by themselves, are drawn at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny_models import tiny_model, tiny_tokenizer
from tropism.generation import TextPolicy
from tropism.models.loading import LoadedModel
from tropism.models.policy import Policy
from tropism.models.q_heads import QHeads
from tropism.models.special_tokens import special_tokens
from tropism.rollouts.config import Sampling


def random_heads(hidden_size: int, vocabulary: int, *, count: int = 2, scale: float = 0.3) -> QHeads:
    """Heads of which every weight is random, the targets other than the Q heads."""
    heads = QHeads(hidden_size, vocabulary, count=count)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return heads


def valued_policy(family: str = "llama", *, count: int = 2, seed: int = 0, **options: Any) -> Policy:
    """A tiny model with such heads."""
    model = tiny_model(family, seed=seed)
    vocabulary, width = model.get_output_embeddings().weight.shape
    return Policy(model, q_heads=random_heads(width, vocabulary, count=count), **options)


def text_policy(policy: Policy, **sampling: Any) -> TextPolicy:
    """The policy with the tiny tokenizer."""
    model: Any = policy.model
    tokenizer = tiny_tokenizer()
    loaded = LoadedModel(model=model, tokenizer=tokenizer, tokens=special_tokens(model, tokenizer), source="tiny")
    return TextPolicy(policy, loaded, Sampling(**{"max_new_tokens": 8, **sampling}))


def by_hand(layers: Any, hidden: Tensor) -> Tensor:
    """A head's outputs, from its four tensors alone."""
    inner = (hidden @ layers.inner.weight.T + layers.inner.bias).clamp(min=0)
    found: Tensor = inner @ layers.outer.weight.T + layers.outer.bias
    return found


def last_hidden(policy: Policy, ids: list[int]) -> Tensor:
    """[L, H] of one row without any padding, from the model's own forward."""
    output: Any = policy.body(input_ids=torch.tensor([ids]))
    found: Tensor = output.last_hidden_state[0]
    return found
