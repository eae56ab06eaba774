"""A prefilled cache and the next tokens, for tests of single decode steps."""

from __future__ import annotations

import shutil

import pytest
import torch

from tropism.models.kernels import COMPILERS
from tropism.models.policy import Policy
from tropism.rollouts.kv_cache import SlabCache

FUSED = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
PROMPTS = torch.tensor([[3, 9, 4, 11, 6, 2, 8], [5, 7, 2, 3, 4, 9, 1], [8, 1, 3, 5, 5, 6, 7]])
NEW = torch.tensor([[4, 6, 9], [2, 2, 7], [11, 3, 5]])


def needs_compiler() -> None:
    """Skip where ``sampling.compile`` can compile nothing."""
    if not any(shutil.which(name) for name in COMPILERS):
        pytest.skip("this machine has no C compiler")


def prefilled(policy: Policy, starts: torch.Tensor) -> SlabCache:
    """A cache with the prompts in it; row r begins at column ``starts[r]``."""
    cache = SlabCache(layers=policy.config.num_hidden_layers, slots=4, columns=12, starts=starts)
    columns = torch.arange(PROMPTS.shape[1])[None, :]
    positions = (columns - starts[:, None]).clamp(min=0)
    policy.hidden_states(PROMPTS, cache.mask(PROMPTS.shape[1]), positions, cache)
    cache.advance(PROMPTS.shape[1])
    return cache
