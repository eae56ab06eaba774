from __future__ import annotations

import itertools
import math

import pytest
import torch

from tropism.ops import effective_sample_size, truncated_importance_weights

MASK = torch.tensor([[True, True, True], [True, True, False]])
SAMPLED = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 7.0]])
RATIOS = [[0.5, 4.0, 1.0], [1.5, 0.2, 1.0]]
LOGPROBS = SAMPLED + torch.tensor(RATIOS).log()


@pytest.mark.parametrize(
    ("cap", "expected"),
    [
        (2.0, [[0.5, 2.0, 1.0], [1.5, 0.2, 0.0]]),
        (1.0, [[0.5, 1.0, 1.0], [1.0, 0.2, 0.0]]),
        (math.inf, [[0.5, 4.0, 1.0], [1.5, 0.2, 0.0]]),
    ],
)
def test_weights_per_token(cap: float, expected: list[list[float]]) -> None:
    torch.testing.assert_close(
        truncated_importance_weights(LOGPROBS, SAMPLED, MASK, cap=cap), torch.tensor(expected), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("cap", "first"), [(math.inf, 2.0), (1.5, 1.5)])
def test_weights_per_sequence_are_products(cap: float, first: float) -> None:
    weights = truncated_importance_weights(LOGPROBS, SAMPLED, MASK, cap=cap, level="sequence")
    # 0.5 * 4 * 1, and 1.5 * 0.2: the cap acts on the product, not on its factors.
    torch.testing.assert_close(weights, torch.tensor([[first] * 3, [0.3, 0.3, 0.0]]), rtol=1e-5, atol=0)


def test_weights_of_equal_logprobs_are_exactly_one() -> None:
    for level in ("token", "sequence"):
        weights = truncated_importance_weights(SAMPLED, SAMPLED, MASK, cap=2.0, level=level)
        assert torch.equal(weights, MASK.float())


def test_weights_carry_no_gradient_and_survive_extremes() -> None:
    logprobs = torch.tensor([[-500.0, -1.0, torch.nan]], requires_grad=True)
    sampled = torch.tensor([[-1.0, -500.0, -1.0]])
    mask = torch.tensor([[True, True, False]])
    weights = truncated_importance_weights(logprobs, sampled, mask, cap=math.inf)
    assert not weights.requires_grad
    assert weights[0].tolist() == pytest.approx([math.exp(-20), math.exp(20), 0.0])


def test_half_precision_is_widened() -> None:
    weights = truncated_importance_weights(LOGPROBS.bfloat16(), SAMPLED.bfloat16(), MASK, cap=2.0)
    assert weights.dtype == torch.float32
    assert truncated_importance_weights(LOGPROBS.double(), SAMPLED.double(), MASK, cap=2.0).dtype == torch.float64


def test_uncapped_weights_turn_an_expectation_into_the_other() -> None:
    """Over all 27 sequences of three tokens: a function of the whole sequence needs the weight of the sequence."""
    generator = torch.Generator().manual_seed(2)
    pi, mu = (torch.randn(3, 3, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    value = torch.randn(27, generator=generator, dtype=torch.float64)
    sequences = torch.tensor(list(itertools.product(range(3), repeat=3)))
    places = torch.arange(3)
    logprobs, sampled = pi[places, sequences], mu[places, sequences]
    wanted = 0.0
    for y, v in zip(sequences, value, strict=True):
        wanted += math.prod(math.exp(pi[t, y[t]]) for t in range(3)) * float(v)
    mask = torch.ones(27, 3, dtype=torch.bool)
    chance = [math.prod(math.exp(mu[t, y[t]]) for t in range(3)) for y in sequences]
    for level, right in (("sequence", True), ("token", False)):
        weights = truncated_importance_weights(logprobs, sampled, mask, cap=math.inf, level=level)  # type: ignore[arg-type]
        found = sum(p * float(w) * float(v) for p, w, v in zip(chance, weights[:, 0], value, strict=True))
        assert (found == pytest.approx(wanted, abs=1e-12)) is right


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], 1.0),
        ([3.0, 3.0, 3.0, 3.0], 1.0),
        ([1.0, 0.0, 0.0, 0.0], 0.25),
        ([1.0, 2.0, 3.0, 4.0], 100 / 120),
        ([1e30, 1e30, 0.0, 0.0], 0.5),
        ([1e-30, 1e-30, 0.0, 0.0], 0.5),
    ],
)
def test_effective_sample_size(weights: list[float], expected: float) -> None:
    found = effective_sample_size(torch.tensor(weights), torch.ones(4, dtype=torch.bool))
    assert float(found) == pytest.approx(expected)


def test_effective_sample_size_counts_unmasked_entries_alone() -> None:
    weights = torch.tensor([[1.0, 3.0, 9.0], [torch.nan, 7.0, 5.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert float(effective_sample_size(weights, mask)) == pytest.approx(16 / 20)
    for nothing in (torch.zeros_like(mask), torch.zeros(0, 3, dtype=torch.bool)):
        assert float(effective_sample_size(torch.ones(nothing.shape), nothing)) == 1.0


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="cap must be at least 1"):
        truncated_importance_weights(LOGPROBS, SAMPLED, MASK, cap=0.5)
    with pytest.raises(ValueError, match="cap"):
        truncated_importance_weights(LOGPROBS, SAMPLED, MASK, cap=math.nan)
    with pytest.raises(ValueError, match="one shape"):
        truncated_importance_weights(LOGPROBS, SAMPLED[:1], MASK, cap=2.0)
    with pytest.raises(ValueError, match="bool"):
        truncated_importance_weights(LOGPROBS, SAMPLED, MASK.float(), cap=2.0)
    with pytest.raises(ValueError, match="bool"):
        effective_sample_size(LOGPROBS, MASK.float())
    with pytest.raises(ValueError, match="one shape"):
        effective_sample_size(LOGPROBS, MASK[:1])
