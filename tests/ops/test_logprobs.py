"""Log-probs of tokens and entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor
from torch.distributions import Categorical

from tropism.ops import entropy, tempered, token_logprobs


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 3


def test_token_logprobs_by_hand() -> None:
    logits = tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]])
    assert token_logprobs(logits, tensor([1])).item() == pytest.approx(math.log(2 / 8))
    # At temperature 1/2 the probabilities are squared: 1, 4, 25.
    assert token_logprobs(logits, tensor([1]), temperature=0.5).item() == pytest.approx(math.log(4 / 30))


def test_token_logprobs_by_a_loop(logits: Tensor) -> None:
    ids = tensor([[0, 4, 2], [3, 3, 1]])
    found = token_logprobs(logits, ids, temperature=1.7)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(x / 1.7) for x in logits[b, t].tolist()]
            assert found[b, t].item() == pytest.approx(math.log(weights[int(ids[b, t])] / sum(weights)), abs=1e-5)


def test_half_precision_logits_are_upcast_first(logits: Tensor) -> None:
    ids = tensor([[0, 4, 2], [3, 3, 1]])
    half = logits.bfloat16()
    found = token_logprobs(half, ids)
    assert found.dtype == torch.float32
    expected = Categorical(logits=half.double()).log_prob(ids)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert entropy(half).dtype == torch.float32


def test_forbidden_tokens() -> None:
    logits = tensor([[0.0, -math.inf, 0.0]]).expand(2, 3).clone().requires_grad_()
    found = token_logprobs(logits, tensor([0, 1]))
    assert found.tolist() == [pytest.approx(-math.log(2)), -math.inf]
    found[0].backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, tensor([[0.5, 0.0, -0.5], [0.0, 0.0, 0.0]]))


def test_large_logits_do_not_overflow() -> None:
    assert token_logprobs(tensor([1e4, 0.0]), tensor(0)).item() == 0.0
    assert token_logprobs(tensor([1e4, 0.0]), tensor(1)).item() == -1e4


def test_entropy_equals_torch_distributions(logits: Tensor) -> None:
    torch.testing.assert_close(entropy(logits), Categorical(logits=logits).entropy())
    torch.testing.assert_close(entropy(logits, temperature=0.3), Categorical(logits=logits / 0.3).entropy())


def test_entropy_of_uniform_and_certain() -> None:
    assert entropy(torch.zeros(4)).item() == pytest.approx(math.log(4))
    assert entropy(tensor([0.0, -math.inf])).item() == 0.0
    assert entropy(tensor([500.0, 0.0])).item() == 0.0


def test_entropy_with_forbidden_tokens_is_that_of_the_others() -> None:
    logits = tensor([1.0, -math.inf, 2.0, -math.inf], requires_grad=True)
    others = tensor([1.0, 2.0], requires_grad=True)
    found, expected = entropy(logits), Categorical(logits=others).entropy()
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    assert logits.grad is not None
    assert others.grad is not None
    torch.testing.assert_close(logits.grad, tensor([others.grad[0], 0.0, others.grad[1], 0.0]))


def test_gradients(logits: Tensor) -> None:
    double = logits.double().requires_grad_()
    ids = tensor([[0, 4, 2], [3, 3, 1]])
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids, temperature=0.7), (double,))
    assert torch.autograd.gradcheck(lambda x: entropy(x, temperature=0.7), (double,))


def test_no_positions() -> None:
    assert token_logprobs(torch.empty(2, 0, 5), torch.empty(2, 0, dtype=torch.long)).shape == (2, 0)
    assert entropy(torch.empty(2, 0, 5)).shape == (2, 0)


def test_tempered_at_one_does_not_copy(logits: Tensor) -> None:
    assert tempered(logits, 1.0) is logits
    torch.testing.assert_close(tempered(logits, 2.0), 0.5 * logits)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"logits \[2, 3, 5\], ids \[2, 3, 1\]"):
        token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"ids \[2\] must be integers, not torch.float32"):
        token_logprobs(torch.zeros(2, 5), torch.zeros(2))
    with pytest.raises(ValueError, match=r"logits \[\]"):
        entropy(tensor(1.0))
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            entropy(torch.zeros(3), temperature=temperature)
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            token_logprobs(torch.zeros(3), tensor(0), temperature=temperature)
