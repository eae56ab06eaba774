"""The three estimates of the KL divergence and the exact one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.distributions import Categorical, kl_divergence

from tropism.ops import LOG_RATIO_LIMIT, clamped_fraction, full_kl, kl_k1, kl_k2, kl_k3


def test_by_hand() -> None:
    logprobs, ref_logprobs = tensor([[-1.0, -2.0]]), tensor([[-3.0, -1.0]])
    assert kl_k1(logprobs, ref_logprobs).tolist() == [[2.0, -1.0]]
    assert kl_k2(logprobs, ref_logprobs).tolist() == [[2.0, 0.5]]
    expected = tensor([[math.exp(-2) + 2 - 1, math.e - 1 - 1]])
    torch.testing.assert_close(kl_k3(logprobs, ref_logprobs), expected)


def test_expectation_of_k1_and_k3_is_the_exact_kl() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, ref_logits = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    policy, reference = Categorical(logits=logits), Categorical(logits=ref_logits)
    exact = kl_divergence(policy, reference)
    for estimate in (kl_k1, kl_k3):
        every_token = estimate(policy.logits, reference.logits)
        torch.testing.assert_close((policy.probs * every_token).sum(), exact)
    torch.testing.assert_close(full_kl(logits, ref_logits), exact)


def test_equal_distributions_have_exactly_no_divergence() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    logprobs = logits.log_softmax(-1)
    for estimate in (kl_k1, kl_k2, kl_k3):
        assert estimate(logprobs, logprobs.clone()).eq(0).all()
    assert full_kl(logits, logits.clone()).eq(0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=20), st.floats(-2, 2, width=32))
def test_k2_and_k3_are_never_negative(logprobs: list[float], shift: float) -> None:
    ours = tensor(logprobs)
    for theirs in (ours + shift, ours + 1e-4 * shift, ours + 1e-30 * shift):
        assert kl_k2(ours, theirs).ge(0).all()
        assert kl_k3(ours, theirs).ge(0).all()


def test_k3_of_small_ratios_keeps_its_digits() -> None:
    ratio = tensor([1e-3, -1e-3], dtype=torch.float32)
    expected = [math.expm1(d) - d for d in ratio.double().tolist()]
    assert kl_k3(torch.zeros(2), ratio).tolist() == [pytest.approx(e, rel=1e-3) for e in expected]


def test_k3_far_off_is_finite_and_has_no_gradient() -> None:
    logprobs = tensor([[-100.0, 0.0, -1.0]], requires_grad=True)
    kl = kl_k3(logprobs, tensor([[0.0, -100.0, -2.0]]))
    expected = tensor([[math.exp(20) - 21, math.exp(-20) + 19, math.exp(-1)]])
    torch.testing.assert_close(kl, expected)
    kl.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, tensor([[0.0, 0.0, 1 - math.exp(-1)]]))


def test_clamped_fraction() -> None:
    assert LOG_RATIO_LIMIT == 20.0
    logprobs = tensor([[-25.0, -20.0, 0.0, -1.0, -90.0]])
    ref_logprobs = tensor([[0.0, 0.0, -20.5, -1.0, math.nan]])
    mask = tensor([[True, True, True, True, False]])
    assert clamped_fraction(logprobs, ref_logprobs, mask).item() == 0.5
    assert clamped_fraction(logprobs, ref_logprobs, torch.zeros_like(mask)).item() == 0.0


def test_full_kl_by_a_loop() -> None:
    logits, ref_logits = tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -3.0]]), tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = full_kl(logits, ref_logits, temperature=2.0)
    for row in range(2):
        weights = [math.exp(x / 2) for x in logits[row].tolist()]
        ref_weights = [math.exp(x / 2) for x in ref_logits[row].tolist()]
        total = 0.0
        for weight, ref_weight in zip(weights, ref_weights, strict=True):
            p, q = weight / sum(weights), ref_weight / sum(ref_weights)
            total += p * math.log(p / q)
        assert found[row].item() == pytest.approx(total, rel=1e-5)


def test_full_kl_with_forbidden_tokens() -> None:
    ours = tensor([0.0, -math.inf, 0.0], requires_grad=True)
    same = full_kl(ours, tensor([0.0, -math.inf, math.log(3)]))
    wider = full_kl(ours, tensor([0.0, 0.0, 0.0]))
    # p = 1/2, 1/2 against 1/4, 3/4, and against thirds.
    torch.testing.assert_close(same, tensor(0.5 * math.log(2) + 0.5 * math.log(2 / 3)))
    torch.testing.assert_close(wider, tensor(math.log(3 / 2)))
    (same + wider).backward()
    assert ours.grad is not None
    assert ours.grad.isfinite().all()
    assert full_kl(torch.zeros(2), tensor([0.0, -math.inf])).item() == math.inf
    assert full_kl(tensor([0.0, -300.0]), tensor([0.0, -math.inf])).item() == 0.0


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for function in (kl_k1, kl_k2, kl_k3, full_kl):
        assert torch.autograd.gradcheck(function, (a, b))


def test_refusals() -> None:
    column, row = torch.zeros(4, 1), torch.zeros(4)
    for function in (kl_k1, kl_k2, kl_k3, full_kl):
        with pytest.raises(ValueError, match=r"\[4\].*\[4, 1\]"):
            function(row, column)
    with pytest.raises(ValueError, match=r"mask \[4, 1\]"):
        clamped_fraction(row, row, torch.ones(4, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="temperature"):
        full_kl(row, row, temperature=0.0)
