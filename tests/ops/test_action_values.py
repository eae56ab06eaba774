"""The value of taken actions and the logsumexp over all, against the whole table of values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor

from tropism.ops import taken_and_logsumexp

ROWS, WIDTH, ACTIONS = 7, 5, 11


def table() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    ids = torch.randint(0, ACTIONS, (ROWS,), generator=generator)
    return draw(ROWS, WIDTH), draw(ACTIONS, WIDTH), draw(ACTIONS), ids


def test_by_hand() -> None:
    hidden, weight, bias = tensor([[2.0]]), tensor([[1.0], [0.5]]), tensor([0.0, 1.0])
    taken, total = taken_and_logsumexp(hidden, weight, bias, tensor([1]))
    assert taken.item() == 2.0
    assert total.item() == pytest.approx(2.0 + 0.6931472)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_numbers_and_gradients_are_those_of_the_whole_table(chunk_size: int) -> None:
    hidden, weight, bias, ids = table()
    weights = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    values = hidden @ weight.T + bias
    expected_taken = torch.stack([values[row, action] for row, action in enumerate(ids.tolist())])
    expected_total = torch.log(torch.exp(values).sum(-1))
    expected = torch.autograd.grad(
        (weights * expected_taken).sum() + (weights.square() * expected_total).sum(), (hidden, weight, bias)
    )
    taken, total = taken_and_logsumexp(hidden, weight, bias, ids, chunk_size=chunk_size)
    torch.testing.assert_close(taken, expected_taken)
    torch.testing.assert_close(total, expected_total)
    found = torch.autograd.grad((weights * taken).sum() + (weights.square() * total).sum(), (hidden, weight, bias))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_large_values_stay_finite() -> None:
    hidden = tensor([[1000.0], [-1000.0]], requires_grad=True)
    taken, total = taken_and_logsumexp(hidden, tensor([[1.0], [-1.0]]), torch.zeros(2), tensor([0, 0]), chunk_size=1)
    assert taken.tolist() == [1000.0, -1000.0] and total.tolist() == [1000.0, 1000.0]
    total.sum().backward()
    assert hidden.grad is not None and hidden.grad.tolist() == [[1.0], [-1.0]]


def test_no_rows() -> None:
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    taken, total = taken_and_logsumexp(hidden, torch.ones(ACTIONS, WIDTH), torch.ones(ACTIONS), tensor([]).long())
    assert taken.shape == total.shape == (0,)
    (taken.sum() + total.sum()).backward()


def test_refusals() -> None:
    hidden, weight, bias, ids = table()
    for wrong in (
        (hidden[0], weight, bias, ids),
        (hidden, weight[:, :2], bias, ids),
        (hidden, weight, bias[:2], ids),
        (hidden, weight, bias, ids[:2]),
    ):
        with pytest.raises(ValueError, match=r"hidden \[N, H\], weight \[V, H\], bias \[V\] and ids \[N\] are needed"):
            taken_and_logsumexp(*wrong)
