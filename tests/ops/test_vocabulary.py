"""Log-probs from hidden states, against the graph that autograd builds of the definition."""

from __future__ import annotations

import math

import pytest
import torch

from tropism.ops import linear_logprobs, vocabulary


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(11, 5, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.tensor([0, 10, 3, 3, 7, 1, 9])


def test_by_hand() -> None:
    """Logits ln 3 and 0 at temperature 1: probabilities 3/4 and 1/4."""
    hidden, weight = torch.tensor([[math.log(3.0)]]), torch.tensor([[1.0], [0.0]])
    logprobs, entropies = linear_logprobs(hidden, weight, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(math.log(0.25))
    assert entropies.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


@pytest.mark.parametrize("kept", [0, 2**20], ids=["computed again", "kept"])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(kept: int, chunk_size: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "KEPT_BYTES", kept)
    hidden, weight, ids = inputs()
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64)
    logprobs, entropies = linear_logprobs(hidden, weight, ids, temperature=temperature, chunk_size=chunk_size)
    (logprobs * upstream).sum().backward()
    given = hidden.grad, weight.grad
    hidden.grad = weight.grad = None

    table = ((hidden @ weight.T) / temperature).log_softmax(-1)
    (table[torch.arange(7), ids] * upstream).sum().backward()
    torch.testing.assert_close(logprobs, table[torch.arange(7), ids])
    torch.testing.assert_close(entropies, -(table.exp() * table).sum(-1))
    torch.testing.assert_close(given[0], hidden.grad)
    torch.testing.assert_close(given[1], weight.grad)
    assert not entropies.requires_grad


def test_a_second_backward_pass_gives_the_same_gradient() -> None:
    hidden, weight, ids = inputs()
    logprobs, _ = linear_logprobs(hidden, weight, ids)
    first = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0]
    second = torch.autograd.grad(logprobs.sum(), hidden)[0]
    torch.testing.assert_close(first, second)


def test_frozen_weights_get_no_gradient_and_nothing_is_kept_without_one() -> None:
    hidden, weight, ids = inputs()
    linear_logprobs(hidden, weight.detach(), ids)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert linear_logprobs(hidden, weight, ids)[0].grad_fn is None


def test_half_precision_sums_in_fp32() -> None:
    hidden, weight, ids = (value.detach() for value in inputs())
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    logprobs, entropies = linear_logprobs(hidden, weight, ids)
    assert logprobs.dtype == entropies.dtype == torch.float32
    logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_no_rows() -> None:
    hidden, weight, ids = inputs()
    logprobs, _ = linear_logprobs(hidden[:0], weight, ids[:0])
    logprobs.sum().backward()
    assert logprobs.shape == (0,)


def test_shapes_are_checked() -> None:
    hidden, weight, ids = inputs()
    with pytest.raises(ValueError, match=r"hidden \[7, 5\]"):
        linear_logprobs(hidden, weight, ids[:3])
    with pytest.raises(ValueError, match="temperature"):
        linear_logprobs(hidden, weight, ids, temperature=0.0)


@pytest.mark.parametrize("count", [1, 3, 8, 15, 40])
def test_where_the_weights_lie_in_memory_changes_no_bit(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(count, 32, generator=generator), torch.randn(97, 32, generator=generator)
    ids = torch.arange(count)
    expected = linear_logprobs(hidden, weight, ids)
    for offset in (1, 2, 8):
        buffer = torch.empty(weight.numel() + offset)[offset:].view_as(weight).copy_(weight)
        for found, same in zip(linear_logprobs(hidden, buffer, ids), expected, strict=True):
            assert torch.equal(found, same)
