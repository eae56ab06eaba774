"""Masked sums, means and whitening."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import tensor

from tropism.ops import masked_deviations, masked_mean, masked_sum, masked_whiten

MASK = tensor([[True, True, False], [True, False, False]])
VALUES = tensor([[1.0, 2.0, math.nan], [6.0, math.inf, -math.inf]])


def test_sum_and_mean_skip_what_is_masked() -> None:
    assert masked_sum(VALUES, MASK).item() == 9.0
    assert masked_mean(VALUES, MASK).item() == 3.0


def test_masked_nan_leaves_the_gradient_finite() -> None:
    values = VALUES.clone().requires_grad_()
    masked_mean(values, MASK).backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, tensor([[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]]))


def test_nothing_unmasked_gives_zero() -> None:
    nothing = torch.zeros_like(MASK)
    assert masked_sum(VALUES, nothing).item() == 0.0
    assert masked_mean(VALUES, nothing).item() == 0.0
    assert masked_mean(torch.empty(2, 0), torch.empty(2, 0, dtype=torch.bool)).item() == 0.0


def test_mean_of_flags_is_a_fraction() -> None:
    flags, mask = tensor([True, False, True, True]), tensor([True, True, True, False])
    assert masked_mean(flags, mask).item() == pytest.approx(2 / 3)


def test_half_precision_is_summed_in_fp32() -> None:
    ones = torch.ones(3000, dtype=torch.bfloat16)  # bf16 has no number between 2992 and 3008
    assert masked_sum(ones, torch.ones(3000, dtype=torch.bool)).item() == 3000.0


def test_whitening_matches_the_golden_numbers_of_openai() -> None:
    everything = torch.ones(2, 3, dtype=torch.bool)
    advantages = tensor([[0.73175, 0.665, 0.7], [-0.8385, -0.83, -1.4]])
    expected = tensor([[1.013846, 0.938123, 0.977828], [-0.767487, -0.757844, -1.404467]])
    torch.testing.assert_close(masked_whiten(advantages, everything), expected, atol=1.5e-6, rtol=0)
    rewards = tensor([[0.0, -0.1, 1.0], [0.05, 0.0, -1.0]])
    expected = tensor([[0.006057, -0.166627, 1.732899], [0.092399, 0.006057, -1.720785]])
    torch.testing.assert_close(masked_whiten(rewards, everything, shift_mean=False), expected, atol=1.5e-6, rtol=0)


def test_whitening_uses_the_population_of_unmasked_entries() -> None:
    # Entries 1, 2, 6: mean 3, population variance (4 + 1 + 9) / 3 = 14 / 3.
    root = math.sqrt(14 / 3)
    expected = tensor([[-2 / root, -1 / root, 0], [3 / root, 0, 0]])
    torch.testing.assert_close(masked_whiten(VALUES, MASK), expected)
    shifted = tensor([[3 - 2 / root, 3 - 1 / root, 0], [3 + 3 / root, 0, 0]])
    torch.testing.assert_close(masked_whiten(VALUES, MASK, shift_mean=False), shifted)


def test_whitening_equal_entries_gives_exact_zeros() -> None:
    mask = torch.ones(7, dtype=torch.bool)
    assert masked_whiten(torch.full((7,), 0.1), mask).eq(0).all()


@pytest.mark.parametrize("unmasked", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_fewer_than_two_entries_warns_and_gives_zeros(unmasked: int, shift_mean: bool) -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, :unmasked] = True
    with pytest.warns(UserWarning, match="fewer than two") as caught:
        whitened = masked_whiten(VALUES, mask, shift_mean=shift_mean)
    assert torch.equal(whitened, torch.zeros(2, 3))
    assert caught[0].filename == __file__


def test_whitening_two_entries_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(masked_whiten(tensor([4.0, 2.0]), tensor([True, True])), tensor([1.0, -1.0]))


def test_deviations_are_by_row() -> None:
    values = tensor([[1.0, 3.0, math.nan], [5.0, math.inf, 7.0], [9.0, 9.0, 9.0]])
    mask = tensor([[True, True, False], [True, False, True], [False, False, False]])
    expected = tensor([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert torch.equal(masked_deviations(values, mask), expected)
    assert masked_deviations(torch.empty(2, 0), torch.empty(2, 0, dtype=torch.bool)).shape == (2, 0)


def test_gradient_of_deviations() -> None:
    values = tensor([1.0, 3.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    mask = tensor([True, True, False, True])
    assert torch.autograd.gradcheck(lambda x: masked_deviations(x, mask), (values,))


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_whiten, masked_deviations])
def test_refusals(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=r"values \[4\], mask \[4, 1\]"):
        function(torch.zeros(4), torch.ones(4, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask \[4\] must be bool, not torch.float32; pass mask.bool\(\)"):
        function(torch.zeros(4), torch.ones(4))
