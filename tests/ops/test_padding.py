"""More padding never changes a result, whatever stands in it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tropism import ops

CLIPS = {"clip_low": 0.2, "clip_high": 0.2}

# Each takes three [B, T] columns and a mask, and returns a scalar or [B, T].
FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "masked_sum": lambda a, b, c, m: ops.masked_sum(a, m),
    "masked_mean": lambda a, b, c, m: ops.masked_mean(a, m),
    "masked_whiten": lambda a, b, c, m: ops.masked_whiten(a, m),
    "masked_whiten unshifted": lambda a, b, c, m: ops.masked_whiten(a, m, shift_mean=False),
    "masked_deviations": lambda a, b, c, m: ops.masked_deviations(a, m),
    "clamped_fraction": lambda a, b, c, m: ops.clamped_fraction(a, b, m),
    "gae": lambda a, b, c, m: ops.gae(a, b, m, gamma=0.9, lam=0.8, bootstrap=torch.arange(len(a)).float()),
    "penalised_rewards": lambda a, b, c, m: ops.penalised_rewards(a, b, m, kl_coef=0.3),
    "score_at_last_token": lambda a, b, c, m: ops.score_at_last_token(torch.ones(len(a)), m.sum(-1), m.shape[1]),
    "sequence_log_ratio": lambda a, b, c, m: ops.sequence_log_ratio(a, b, m),
    "sequence_policy_loss": lambda a, b, c, m: ops.sequence_policy_loss(a, b, c, m, **CLIPS),
    "explained_variance": lambda a, b, c, m: ops.explained_variance(a, b, m),
    "sum of clipped_policy_loss": lambda a, b, c, m: ops.masked_sum(ops.clipped_policy_loss(a, b, c, **CLIPS), m),
    "mean of clipped_tokens": lambda a, b, c, m: ops.masked_mean(ops.clipped_tokens(a, b, c, **CLIPS), m),
    "sum of cispo_policy_loss": lambda a, b, c, m: ops.masked_sum(ops.cispo_policy_loss(a, b, c, clip_high=0.2), m),
    "sum of clipped_value_loss": lambda a, b, c, m: ops.masked_sum(ops.clipped_value_loss(a, b, c, clip=0.2), m),
    "sum of kl_k3": lambda a, b, c, m: ops.masked_sum(ops.kl_k3(a, b), m),
    "sum of expectile_loss": lambda a, b, c, m: ops.masked_sum(ops.expectile_loss(a, b, tau=0.7), m),
}


@pytest.mark.filterwarnings("ignore:fewer than two")
@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    extra=st.integers(1, 3),
    junk=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]),
    seed=st.integers(0, 2**31),
)
def test_padding_never_changes_a_result(name: str, lengths: list[int], extra: int, junk: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    a, b, c = (torch.randn(len(lengths), width, generator=generator) for _ in range(3))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    expected = FUNCTIONS[name](a, b, c, mask)
    padded_mask = torch.nn.functional.pad(mask, (0, extra), value=False)
    a, b, c = (torch.nn.functional.pad(x, (0, extra)).masked_fill(~padded_mask, junk) for x in (a, b, c))
    found = FUNCTIONS[name](a, b, c, padded_mask)
    if expected.dim() == 2:
        assert found[:, width:].eq(0).all()
        found, expected = found[:, :width], expected.masked_fill(~mask, 0.0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
