"""Losses on choices between completions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from tropism.ops import best_of_k_loss, bradley_terry_loss, dpo_loss, kto_loss

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


def negative_log_softmax(scores: list[float], k: int, margin: float = 0.0) -> float:
    """-log of the share of one score, less the margin, among all."""
    shares = [math.exp(score - (margin if place == k else 0.0)) for place, score in enumerate(scores)]
    return -math.log(shares[k] / sum(shares))


def test_best_of_k_with_a_margin_by_hand() -> None:
    scores = tensor([[math.log(2.0), math.log(2.0), math.log(4.0)], [0.0, 0.0, 0.0]])
    # exp(-margin) = 1 / 2 turns the chosen share 4 of 8 into 2 of 6, and 1 of 3 into 1/4 of 2.25.
    found = best_of_k_loss(scores, tensor([2, 0]), margin=tensor([math.log(2), math.log(4)]))
    torch.testing.assert_close(found, tensor([math.log(3), math.log(9)]))


@pytest.mark.parametrize("margin", [0.0, 0.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 0.5])
def test_best_of_k_smoothing_is_the_mean_over_where_the_choice_may_have_fallen(smoothing: float, margin: float) -> None:
    rows, choices = [[0.5, -1.0, 2.0, 0.25], [1.0, 3.0, -2.0, 0.0]], [2, 3]
    expected = []
    for scores, choice in zip(rows, choices, strict=True):
        shares = [1 - smoothing if k == choice else smoothing / 3 for k in range(4)]
        expected.append(sum(share * negative_log_softmax(scores, k, margin) for k, share in enumerate(shares)))
    found = best_of_k_loss(tensor(rows), tensor(choices), margin=tensor([margin] * 2), label_smoothing=smoothing)
    torch.testing.assert_close(found, tensor(expected))
    if margin == 0:
        torch.testing.assert_close(
            best_of_k_loss(tensor(rows), tensor(choices), label_smoothing=smoothing), tensor(expected)
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_best_of_two_is_bradley_terry_with_margin_and_smoothing(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(7)
    scores, margin = 3 * torch.randn(6, 2, generator=generator), torch.rand(6, generator=generator)
    choices = tensor([0, 1, 1, 0, 1, 0])
    chosen, rejected = scores[torch.arange(6), choices], scores[torch.arange(6), 1 - choices]
    found = best_of_k_loss(scores, choices, margin=margin, label_smoothing=smoothing)
    torch.testing.assert_close(found, bradley_terry_loss(chosen, rejected, margin=margin, label_smoothing=smoothing))
    wider = torch.cat([scores, torch.full((6, 2), 1e30)], dim=1)  # two more that are not there
    present = tensor([[True, True, False, False]] * 6)
    found = best_of_k_loss(wider, choices, margin=margin, label_smoothing=smoothing, present=present)
    torch.testing.assert_close(found, bradley_terry_loss(chosen, rejected, margin=margin, label_smoothing=smoothing))


@pytest.mark.parametrize("absent", [-math.inf, math.inf, math.nan, 0.0, 5.0])
@pytest.mark.parametrize("settings", ["plain", "margin", "smoothing", "both"])
def test_best_of_k_does_not_see_what_is_not_there(settings: str, absent: float) -> None:
    present = tensor([[True, True, True], [True, False, True]])
    scores = tensor([[0.5, -1.0, 2.0], [1.0, absent, 3.0]], requires_grad=True)
    margin = tensor([0.5, 0.25]) if settings in ("margin", "both") else None
    smoothing = 0.2 if settings in ("smoothing", "both") else 0.0
    found = best_of_k_loss(scores, tensor([1, 0]), margin=margin, label_smoothing=smoothing, present=present)
    leads = (0.0, 0.0) if margin is None else (0.5, 0.25)
    first = [negative_log_softmax([0.5, -1.0, 2.0], k, leads[0]) for k in range(3)]
    second = [negative_log_softmax([1.0, 3.0], k, leads[1]) for k in range(2)]
    s = smoothing
    expected = [(1 - s) * first[1] + s / 2 * (first[0] + first[2]), (1 - s) * second[0] + s * second[1]]
    torch.testing.assert_close(found, tensor(expected))
    (gradient,) = torch.autograd.grad(found.sum(), scores)
    assert bool(gradient.isfinite().all()) and gradient[1, 1] == 0
    torch.testing.assert_close(
        gradient.sum(1), torch.zeros(2), atol=1e-6, rtol=0
    )  # shifting all scores changes nothing


def test_best_of_k_far_apart_is_finite() -> None:
    scores = tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    loss = best_of_k_loss(scores, tensor([0]), margin=tensor([1.0]), label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert loss.item() == pytest.approx(0.9 * 20001 + 0.05 * 10001, rel=1e-6) and bool(gradient.isfinite().all())


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
    with pytest.raises(ValueError, match=r"scores \[4, 3\], present \[4, 2\]"):
        best_of_k_loss(torch.zeros(4, 3), row.long(), present=torch.ones(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"choices \[4\], margin \[4, 1\]"):
        best_of_k_loss(torch.zeros(4, 3), row.long(), margin=column)
    with pytest.raises(ValueError, match=r"present .*bool"):
        best_of_k_loss(torch.zeros(4, 3), row.long(), present=torch.ones(4, 3))
    for position in range(4):
        arguments = [column if i == position else row for i in range(4)]
        with pytest.raises(ValueError, match=r"\[4, 1\]"):
            dpo_loss(*arguments, beta=0.1)


def test_refusals_of_values() -> None:
    row = torch.zeros(4)
    for smoothing in (-0.1, 0.6, math.nan):
        with pytest.raises(ValueError, match=r"label_smoothing must be between 0 and 0\.5"):
            bradley_terry_loss(row, row, label_smoothing=smoothing)
        with pytest.raises(ValueError, match=r"label_smoothing must be between 0 and 0\.5"):
            best_of_k_loss(torch.zeros(4, 3), row.long(), label_smoothing=smoothing)
    with pytest.raises(ValueError, match=r"a chosen completion is not present: choices \[1\]"):
        best_of_k_loss(torch.zeros(1, 3), tensor([1]), present=tensor([[True, False, True]]))
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


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_kto_by_hand() -> None:
    own, ref = tensor([-3.0, -5.0, -2.0, -2.0]), tensor([-5.0, -4.0, -2.0, -6.0])
    liked = tensor([True, False, True, False])
    found = kto_loss(
        own,
        ref,
        liked,
        reference_points=torch.full((4,), 1.0),
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    # Log-ratios 2, -1, 0 and 4, of which 1 is taken off.
    expected = [2 * (1 - sigmoid(0.5)), 3 * (1 - sigmoid(1.0)), 2 * (1 - sigmoid(-0.5)), 3 * (1 - sigmoid(-1.5))]
    torch.testing.assert_close(found, tensor(expected))


def test_kto_far_out_is_finite_and_the_reference_point_has_no_gradient() -> None:
    own = tensor([1e4, -1e4, 30.0], requires_grad=True)
    points = torch.zeros(3, requires_grad=True)
    loss = kto_loss(own, torch.zeros(3), tensor([True, True, True]), reference_points=points, beta=1.0)
    assert loss.tolist() == pytest.approx([0.0, 1.0, math.exp(-30.0)], rel=1e-5)
    loss.sum().backward()
    assert points.grad is None and own.grad is not None and bool(own.grad.isfinite().all())
    # Nothing of the slope is lost where the loss is nearly 0.
    assert float(own.grad[2]) == pytest.approx(-math.exp(-30.0), rel=1e-5)


def test_kto_refuses_what_it_cannot_read() -> None:
    columns = tensor([0.0, 0.0]), tensor([0.0, 0.0])
    liked = tensor([True, False])
    with pytest.raises(ValueError, match="never broadcast"):
        kto_loss(*columns, liked, reference_points=tensor([0.0]), beta=0.1)
    with pytest.raises(ValueError, match="liked"):
        kto_loss(*columns, tensor([1, 0]), reference_points=tensor([0.0, 0.0]), beta=0.1)
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        with pytest.raises(ValueError, match=name):
            kto_loss(*columns, liked, reference_points=tensor([0.0, 0.0]), **{"beta": 0.1, name: 0.0})
