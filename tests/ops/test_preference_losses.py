"""Losses on choices between completions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from tropism.ops import best_of_k_loss, bradley_terry_loss, dpo_loss

SOFTPLUS = {x: math.log1p(math.exp(x)) for x in (-2.0, -1.0, 0.0, 1.0, 2.0)}


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = tensor([2.0, 0.0]), tensor([1.0, 1.0])
    expected = tensor([SOFTPLUS[-1.0], SOFTPLUS[1.0]])
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), expected)
    with_margin = tensor([SOFTPLUS[0.0], SOFTPLUS[2.0]])
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, margin=1.0), with_margin)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, margin=tensor([1.0, 1.0])), with_margin)


def test_bradley_terry_smoothing_is_the_mean_over_flipped_labels() -> None:
    chosen, rejected = tensor([2.0]), tensor([1.0])
    found = bradley_terry_loss(chosen, rejected, margin=1.0, label_smoothing=0.1)
    torch.testing.assert_close(found, tensor([0.9 * SOFTPLUS[0.0] + 0.1 * SOFTPLUS[2.0]]))


def test_bradley_terry_far_apart_is_finite() -> None:
    chosen = tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry_loss(chosen, -chosen.detach())
    assert loss.tolist() == [2e4, 0.0]
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    assert gradient.tolist() == [-1.0, 0.0]


def test_best_of_k_by_hand() -> None:
    scores = tensor([[math.log(1.0), math.log(2.0), math.log(5.0)], [0.0, 0.0, 0.0]])
    found = best_of_k_loss(scores, tensor([1, 2]))
    torch.testing.assert_close(found, tensor([math.log(4), math.log(3)]))


def test_best_of_two_is_bradley_terry() -> None:
    scores = torch.randn(5, 2, generator=torch.Generator().manual_seed(6))
    second_wins = best_of_k_loss(scores, torch.ones(5, dtype=torch.long))
    torch.testing.assert_close(second_wins, bradley_terry_loss(scores[:, 1], scores[:, 0]))


def test_dpo_by_hand() -> None:
    # The chosen gained 3 nats on the reference and the rejected 1: h = 2.
    sums = (tensor([-10.0]), tensor([-20.0]), tensor([-13.0]), tensor([-21.0]))
    torch.testing.assert_close(dpo_loss(*sums, beta=0.5), tensor([SOFTPLUS[-1.0]]))
    smooth = dpo_loss(*sums, beta=0.5, label_smoothing=0.1)
    torch.testing.assert_close(smooth, tensor([0.9 * SOFTPLUS[-1.0] + 0.1 * SOFTPLUS[1.0]]))
    torch.testing.assert_close(dpo_loss(*sums, beta=0.5, variant="ipo"), tensor([1.0]))
    torch.testing.assert_close(dpo_loss(*sums, beta=0.25, variant="hinge"), tensor([0.5]))
    torch.testing.assert_close(dpo_loss(*sums, beta=2.0, variant="hinge"), tensor([0.0]))


def test_dpo_at_the_reference_is_log_two_and_raises_the_chosen() -> None:
    chosen, rejected = tensor([-10.0], requires_grad=True), tensor([-20.0], requires_grad=True)
    loss = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1)
    assert loss.item() == pytest.approx(math.log(2))
    up, down = torch.autograd.grad(loss, (chosen, rejected))
    assert up.item() == pytest.approx(-0.05)
    assert down.item() == pytest.approx(0.05)


def test_ipo_is_least_at_its_target_lead() -> None:
    lead = torch.linspace(0, 10, 101)
    zeros = torch.zeros(101)
    loss = dpo_loss(lead, zeros, zeros, zeros, beta=0.1, variant="ipo")
    assert lead[loss.argmin()].item() == pytest.approx(1 / (2 * 0.1))


def test_refusals_of_shapes() -> None:
    row, column = torch.zeros(4), torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"chosen \[4\], rejected \[4, 1\]"):
        bradley_terry_loss(row, column)
    with pytest.raises(ValueError, match=r"1 dimension"):
        bradley_terry_loss(column, column)
    with pytest.raises(ValueError, match=r"chosen \[4\], margin \[4, 1\]"):
        bradley_terry_loss(row, row, margin=column)
    with pytest.raises(ValueError, match=r"choices \[4, 1\]"):
        best_of_k_loss(torch.zeros(4, 3), column.long())
    with pytest.raises(ValueError, match=r"scores \[4, 3\], choices \[3\]"):
        best_of_k_loss(torch.zeros(4, 3), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"scores \[4, 1\]"):
        best_of_k_loss(column, row.long())
    for position in range(4):
        arguments = [column if i == position else row for i in range(4)]
        with pytest.raises(ValueError, match=r"\[4, 1\]"):
            dpo_loss(*arguments, beta=0.1)


def test_refusals_of_values() -> None:
    row = torch.zeros(4)
    for smoothing in (-0.1, 0.6, math.nan):
        with pytest.raises(ValueError, match=r"label_smoothing must be between 0 and 0\.5"):
            bradley_terry_loss(row, row, label_smoothing=smoothing)
    for choice in (-100, -1, 3):
        with pytest.raises(ValueError, match="choices must be between 0 and 2"):
            best_of_k_loss(torch.zeros(1, 3), tensor([choice]))
    with pytest.raises(ValueError, match="beta must be positive"):
        dpo_loss(row, row, row, row, beta=0.0)
    with pytest.raises(ValueError, match="variant must be"):
        dpo_loss(row, row, row, row, beta=0.1, variant="kto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"label_smoothing 0\.1 has no meaning in the variant 'ipo'"):
        dpo_loss(row, row, row, row, beta=0.1, variant="ipo", label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing 0\.1 has no meaning in the variant 'hinge'"):
        dpo_loss(row, row, row, row, beta=0.1, variant="hinge", label_smoothing=0.1)
