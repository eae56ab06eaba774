"""Tiny models that can be asked for rewards, without training: their slots hold random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tiny_models import tiny_model, tiny_tokenizer
from tropism.generation import TextPolicy, make_conditioner, slots_for
from tropism.models.loading import load_model
from tropism.models.policy import Policy
from tropism.targets.config import Conditioning, Mechanism

REWARDS = tuple(number / 10 for number in range(11))
"""The training rewards, 0 to 1 in tenths: with 5 control tokens, 0.5 is in the third and 1 in the last."""


def conditioned_policy(
    family: str = "llama",
    mechanism: Mechanism = "linear",
    *,
    targets: Sequence[str] = ("reward",),
    tokenizer: Any = None,
    model: Any = None,
    **config: Any,
) -> TextPolicy:
    """A policy whose slots hold targets as they are (scaler none).

    Args:
        config: changes to the configuration of the model; ``vocab_size`` above 37 leaves rows that no token has.
    """
    model = tiny_model(family, **config) if model is None else model
    loaded = load_model((model, tokenizer or tiny_tokenizer()))
    told = Conditioning(mechanism=mechanism, targets=tuple(targets), scaler="none", bins=5)
    conditioner = make_conditioner(told, loaded)
    conditioner.fit([[reward] * len(targets) for reward in REWARDS])
    conditioner.knows_open = True
    if mechanism == "text":
        return TextPolicy(Policy(loaded.model), loaded, conditioner=conditioner)
    slots = slots_for(told, loaded)
    slots.start(loaded.model.get_input_embeddings(), seed=0, ones=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in slots.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return TextPolicy(Policy(loaded.model, conditioning=slots), loaded, conditioner=conditioner)
