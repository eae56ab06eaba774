"""Truncation of the distribution against slow loops and transformers, and the draw against the plain inverse CDF."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from slow_sampling import slow_draw
from tropism.ops import truncation
from tropism.rollouts.config import Sampling
from tropism.rollouts.distribution import BLOCK, draw, penalise_repetition, truncate

INF = torch.inf
UNUSED: Any = None


def random_logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def kept(logits: Tensor) -> list[list[int]]:
    return [[token for token, x in enumerate(row) if x > -INF] for row in logits.tolist()]


def test_top_k_keeps_all_ties_at_the_border() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 1.0, 0.0]])
    assert kept(truncate(logits, Sampling(top_k=2))) == [[1, 2, 3], [0, 1, 2]]
    assert kept(truncate(logits, Sampling(top_k=1))) == [[1], [0, 1, 2]]
    for off in (0, 5, 900):
        assert torch.equal(truncate(logits, Sampling(top_k=off)), logits)


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()
    by_hand = {0.4: [1], 0.6: [1, 2], 0.7: [1, 2], 0.8: [0, 1, 2, 3], 0.01: [1], 0.999: [0, 1, 2, 3]}
    for top_p, tokens in by_hand.items():
        # 0.8 needs one of the two tied tokens; equal tokens are treated alike, so both stay.
        assert kept(truncate(logits, Sampling(top_p=top_p))) == [tokens]
    assert torch.equal(truncate(logits, Sampling(top_p=1.0)), logits)


def test_min_p_is_a_share_of_the_most_likely() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert kept(truncate(logits, Sampling(min_p=0.5))) == [[0, 1]]
    assert kept(truncate(logits, Sampling(min_p=0.2))) == [[0, 1, 2]]
    assert kept(truncate(logits, Sampling(min_p=1.0))) == [[0]]


def slow_nucleus(row: list[float], top_p: float) -> list[int]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    total, gathered, tokens = math.fsum(weights), 0.0, []
    for token in sorted(range(len(row)), key=lambda v: -row[v]):
        if gathered >= top_p * total:
            break
        gathered += weights[token]
        tokens.append(token)
    return sorted(tokens)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("head", [4, 1024])
def test_top_p_is_a_slow_sort_also_where_the_head_does_not_hold_the_nucleus(
    top_p: float, head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truncation, "NUCLEUS_HEAD", head)
    logits = torch.cat([random_logits(20, 61), random_logits(4, 61, scale=0.01), random_logits(4, 61, scale=30.0)])
    wanted = [slow_nucleus(row, top_p) for row in logits.tolist()]
    assert kept(truncate(logits, Sampling(top_p=top_p))) == wanted


@pytest.mark.parametrize(
    ("settings", "warper"),
    [
        ({"top_k": 7}, lambda: TopKLogitsWarper(top_k=7)),
        ({"top_p": 0.3}, lambda: TopPLogitsWarper(top_p=0.3)),
        ({"top_p": 0.95}, lambda: TopPLogitsWarper(top_p=0.95)),
        ({"min_p": 0.07}, lambda: MinPLogitsWarper(min_p=0.07)),
    ],
)
def test_truncation_is_that_of_transformers(settings: dict[str, Any], warper: Callable[[], Any]) -> None:
    logits = random_logits(40, 300)
    assert torch.equal(truncate(logits, Sampling(**settings)), warper()(UNUSED, logits))


def test_all_three_together_apply_in_the_order_of_transformers() -> None:
    logits = random_logits(40, 300, scale=1.5)
    wanted = logits
    for warper in (TopKLogitsWarper(top_k=40), TopPLogitsWarper(top_p=0.8), MinPLogitsWarper(min_p=0.1)):
        wanted = warper(UNUSED, wanted)
    found = truncate(logits, Sampling(top_k=40, top_p=0.8, min_p=0.1))
    assert torch.equal(found, wanted)
    assert all(1 < len(tokens) < 40 for tokens in kept(found))


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(3, 50)
    ids = [[3, 7, 7, 3, 49], [0, 1, 2, 3, 4], [9, 9, 9, 9, 9]]
    for penalty in (1.3, 0.5):
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(ids), logits.clone())
        assert torch.equal(penalise_repetition(logits, ids, penalty), wanted)


def test_the_repetition_penalty_by_hand_on_rows_of_different_length() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, -INF], [2.0, -2.0, 1.0, 4.0]])
    before = logits.clone()
    found = penalise_repetition(logits, [[0, 1, 2, 3, 0], [3]], 2.0)
    assert found.tolist() == [[1.0, -4.0, 0.0, -INF], [2.0, -2.0, 1.0, 2.0]]
    assert torch.equal(logits, before)


# The draw -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77])
def test_the_draw_is_the_plain_inverse_cdf(vocabulary: int) -> None:
    logits = random_logits(200, vocabulary, scale=1.0)
    uniforms = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = draw(logits, uniforms)
    torch.testing.assert_close(logprobs, logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0].float())
    assert tokens.shape == (200,) and tokens.dtype == torch.long
    for row, u, token in zip(logits, uniforms.tolist(), tokens.tolist(), strict=True):
        weights = (row - row.max()).exp().tolist()
        assert token == slow_draw(weights, u)


def test_frequencies_are_the_probabilities() -> None:
    """Over a grid of uniforms each token's count is its probability, to one step of the grid per border."""
    logits = random_logits(1, 600, scale=1.0)
    grid = 20_000
    uniforms = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    counts = torch.bincount(draw(logits.expand(grid, -1), uniforms)[0], minlength=600)
    assert (counts - logits[0].double().softmax(-1) * grid).abs().max() <= 1.001
    drawn = torch.rand(grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few = random_logits(1, 20, scale=1.0)
    expected = few[0].double().softmax(-1) * grid
    counts = torch.bincount(draw(few.expand(grid, -1), drawn)[0], minlength=20)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Chi-square with 19 degrees of freedom: mean 19, standard deviation 6.2.
    assert statistic < 19 + 5 * 6.2


@pytest.mark.parametrize("u", [0.0, 5e-324, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(u: float) -> None:
    width = 2 * BLOCK + 9
    allowed_sets = [
        [0],
        [1],
        [BLOCK - 1],
        [BLOCK],
        [width - 1],
        [3, 4],
        [BLOCK - 1, BLOCK],
        [5, width - 2],
        [7, 300, 520],
    ]
    logits = torch.full((len(allowed_sets), width), -INF)
    for row, allowed in enumerate(allowed_sets):
        logits[row, allowed] = torch.linspace(-2, 2, len(allowed))
    tokens = draw(logits, torch.full((len(allowed_sets),), u, dtype=torch.float64))[0].tolist()
    assert all(token in allowed for token, allowed in zip(tokens, allowed_sets, strict=True))
    if u == 0.0:
        assert tokens == [allowed[0] for allowed in allowed_sets]
    if u > 0.99:
        assert tokens == [allowed[-1] for allowed in allowed_sets]


def test_each_token_owns_the_interval_that_begins_at_its_border() -> None:
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75], dtype=torch.float64)
    assert draw(torch.zeros(6, 4), uniforms)[0].tolist() == [0, 0, 1, 2, 2, 3]


def test_extreme_logits_are_drawn_without_overflow() -> None:
    logits = torch.tensor([[1e30, 0.0, -1e30], [-1e30, -1e30, -1e30], [88.0, 90.0, -200.0], [3e38, 3e38, -INF]])
    assert draw(logits, torch.tensor([0.3, 0.5, 0.0, 0.9], dtype=torch.float64))[0].tolist() == [0, 1, 0, 1]
    half = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    assert draw(half, torch.tensor([0.95], dtype=torch.float64))[0].tolist() == [2]


def test_neighbours_in_the_batch_do_not_change_a_draw() -> None:
    logits, uniforms = random_logits(30, 700), torch.linspace(0, 0.999, 30, dtype=torch.float64)
    whole = draw(logits, uniforms)[0]
    single = torch.cat([draw(row[None], u[None])[0] for row, u in zip(logits, uniforms, strict=True)])
    assert torch.equal(whole, single)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("min_new_tokens", 65),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("stop", ("a", "")),
        ("batch_size", 0),
    ],
)
def test_settings_out_of_range_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field.split("_")[0]):
        Sampling(**{field: value})
    assert Sampling(temperature=0).softmax_temperature == 1.0
    assert Sampling(temperature=0.4).softmax_temperature == 0.4
