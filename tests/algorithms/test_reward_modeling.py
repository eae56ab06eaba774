"""Reward modelling: losses against loops over single judgements, gradients, and what is logged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from given_numbers import built, ratio_of
from tiny_reward_models import tiny_reward_model
from tropism.algorithms import ALGORITHMS
from tropism.algorithms.reward_modeling import RewardModeling, RewardModelingAlgorithm, scores_of
from tropism.judgements import Comparison, ComparisonBatch, Kind, collate_comparisons


class Lookup(nn.Module):
    """Scores by the first token of a row, so that each completion has the score it is given."""

    def __init__(self, scores: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor([0.0, *(score for item in scores for score in item)]))

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        assert ids.dim() == 2 and lengths.shape == ids.shape[:1] and bool((lengths > 0).all())
        return self.table[ids[:, 0]]


def judged(scores: list[list[float]], said: list[dict[str, Any]], kind: Kind) -> tuple[Lookup, ComparisonBatch]:
    """Items whose rows begin with a token of their own."""
    items, token = [], 1
    for item, fields in zip(scores, said, strict=True):
        rows = tuple((token + k, *[0] * k) for k in range(len(item)))
        token += len(item)
        items.append(Comparison(ids=rows, prompt="", completions=("",) * len(item), **fields))
    return Lookup(scores), collate_comparisons(items, kind=kind)


def log_softmax(scores: list[float], k: int, margin: float) -> float:
    """Of the one that was chosen, whose score is less by the margin."""
    shifted = [score - (margin if place == k else 0.0) for place, score in enumerate(scores)]
    return shifted[k] - math.log(sum(math.exp(score) for score in shifted))


def loss_of(config: RewardModeling, model: nn.Module, batch: ComparisonBatch) -> tuple[float, dict[str, Any]]:
    sums, ratios = built(config).loss(model, batch)
    assert set(sums) == {batch.kind}
    return sums[batch.kind].item(), ratios


SCORES = [[0.5, -1.0, 2.0, 0.25], [1.0, -0.5], [0.1, 0.3, -2.0], [3.0, 2.0], [0.0, 40.0]]
CHOICES: list[dict[str, Any]] = [
    {"choice": 2},
    {"choice": 1, "margin": 0.75, "weight": 3.0},
    {"choice": 0, "weight": 0.5},
    {},  # a tie
    {"choice": 0, "margin": 1.0},
]


@pytest.mark.parametrize("margin", [0.0, 0.4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_choices_among_different_numbers_of_completions(smoothing: float, margin: float) -> None:
    expected, weights = 0.0, 0.0
    for scores, said in zip(SCORES, CHOICES, strict=True):
        weight, lead = said.get("weight", 1.0), margin + said.get("margin", 0.0)
        if "choice" not in said:
            loss = -0.5 * log_softmax(scores, 0, 0.0) - 0.5 * log_softmax(scores, 1, 0.0)
        else:
            loss = 0.0
            for k in range(len(scores)):
                share = 1 - smoothing if k == said["choice"] else smoothing / (len(scores) - 1)
                loss -= share * log_softmax(scores, k, lead)
        expected, weights = expected + weight * loss, weights + weight
    model, batch = judged(SCORES, CHOICES, "choice")
    config = RewardModeling(label_smoothing=smoothing, margin=margin, varied_k=True)
    assert loss_of(config, model, batch)[0] == pytest.approx(expected, rel=1e-5)
    assert built(config).weight(batch) == {"choice": weights} == {"choice": 6.5}


def test_items_do_not_depend_on_their_neighbours() -> None:
    """A pair has the loss of a pair, also beside an item of four; ties among them, too."""
    model, batch = judged(SCORES, CHOICES, "choice")
    config = RewardModeling(label_smoothing=0.2, margin=0.3, varied_k=True)
    together = loss_of(config, model, batch)[0]
    alone = 0.0
    for scores, said in zip(SCORES, CHOICES, strict=True):
        alone += loss_of(config, *judged([scores], [said], "choice"))[0]
    assert together == pytest.approx(alone, rel=1e-5)
    parts = [loss_of(config, model, batch.select(torch.tensor(rows)))[0] for rows in ([0, 3], [1], [2, 4])]
    assert together == pytest.approx(sum(parts), rel=1e-5)


def test_pairs_by_hand() -> None:
    model, batch = judged([[2.0, 1.0], [0.0, 3.0]], [{"choice": 0}, {"choice": 0}], "choice")
    expected = math.log1p(math.exp(-1.0)) + math.log1p(math.exp(3.0))
    assert loss_of(RewardModeling(), model, batch)[0] == pytest.approx(expected, rel=1e-6)


def test_ties_pull_scores_together() -> None:
    model, batch = judged([[2.0, -1.0]], [{}], "choice")
    sums, _ = built(RewardModeling(margin=5.0)).loss(model, batch)
    (gradient,) = torch.autograd.grad(sums["choice"], model.table)
    half = 1 / (1 + math.exp(-3.0)) - 0.5
    assert gradient.tolist() == pytest.approx([0.0, half, -half], abs=1e-6)
    assert sums["choice"].item() == pytest.approx(1.5 + math.log1p(math.exp(-3.0)))


def test_ratings_and_differences() -> None:
    model, batch = judged(
        [[0.5], [2.0], [-1.0]], [{"target": 1.0}, {"target": 0.0, "weight": 2.0}, {"target": -1.0}], "rating"
    )
    assert loss_of(RewardModeling(), model, batch)[0] == pytest.approx(0.25 + 2 * 4.0)
    assert built(RewardModeling()).weight(batch) == {"rating": 4.0}
    # The second is better than the first by what was said, less what the scores say.
    model, batch = judged([[1.0, 3.0], [0.0, -0.5]], [{"target": 0.5}, {"target": 1.0, "weight": 0.5}], "difference")
    assert loss_of(RewardModeling(), model, batch)[0] == pytest.approx((0.5 - 2.0) ** 2 + 0.5 * 1.5**2)


def test_what_is_logged() -> None:
    said: list[dict[str, Any]] = [*CHOICES[:4], {"choice": 1}]
    model, batch = judged(SCORES, said, "choice")
    ratios = loss_of(RewardModeling(varied_k=True), model, batch)[1]
    mean = sum(score for item in SCORES for score in item) / 13
    assert ratio_of(ratios, "score/mean") == pytest.approx(mean)
    assert ratio_of(ratios, "choice/accuracy") == 0.5  # the first and the last of four; the tie is none
    assert set(loss_of(RewardModeling(), *judged([[1.0]], [{"target": 2.0}], "rating"))[1]) == {"score/mean"}


def test_emptied_items_add_nothing() -> None:
    model, batch = judged(SCORES, CHOICES, "choice")
    method = built(RewardModeling(varied_k=True))
    sums, ratios = method.loss(model, batch.emptied())
    (gradient,) = torch.autograd.grad(sums["choice"], model.table)
    assert sums["choice"].item() == 0.0 and not gradient.any() and method.weight(batch.emptied()) == {"choice": 0.0}
    assert all(float(count) == 0 for _, count in ratios.values())


def test_scores_of_completions_that_are_not_there() -> None:
    model, batch = judged(SCORES, CHOICES, "choice")
    found = scores_of(model, batch)
    for row, item in zip(found.tolist(), SCORES, strict=True):
        assert row == pytest.approx(item + [-math.inf] * (4 - len(item)))


def test_pitfall_48_choices_give_the_bias_no_gradient_and_the_gain_one() -> None:
    """A choice does not change when all scores are shifted; ratings do."""
    model, _ = tiny_reward_model("llama", gain=2.0, bias=0.5)
    rows = [[[5, 6, 7], [5, 9], [5, 8, 8, 8]], [[6, 4], [6, 10, 11]]]

    def gradients(items: list[Comparison], kind: Kind) -> tuple[float, float]:
        model.zero_grad()
        sums, _ = built(RewardModeling(label_smoothing=0.1, margin=0.2)).loss(
            model, collate_comparisons(items, kind=kind)
        )
        sums[kind].backward()
        assert model.bias.grad is not None and model.gain.grad is not None and model.head.weight.grad is not None
        assert float(model.head.weight.grad.abs().sum()) > 0
        return float(model.gain.grad), float(model.bias.grad)

    def item(ids: list[list[int]], **fields: Any) -> Comparison:
        return Comparison(ids=tuple(map(tuple, ids)), prompt="", completions=("",) * len(ids), **fields)

    gain, bias = gradients([item(rows[0], choice=1), item(rows[1], choice=0)], "choice")
    assert abs(bias) < 1e-6 < 1e-2 < abs(gain)
    gain, bias = gradients([item(rows[1], target=1.0)], "difference")
    assert abs(bias) < 1e-6 < 1e-2 < abs(gain)
    gain, bias = gradients([item(rows[1][:1], target=9.0)], "rating")
    assert abs(bias) > 1e-2


def test_its_configuration() -> None:
    assert ALGORITHMS["reward-model"] is RewardModeling
    assert RewardModeling().reads == "comparisons" and isinstance(built(RewardModeling()), RewardModelingAlgorithm)
    for fields, message in (
        ({"label_smoothing": 0.6}, "label_smoothing must lie between 0 and 0.5"),
        ({"text": "prompt"}, "text must be prompt\\+completion or completion, not 'prompt'"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"annotator_weights": {"a": 0.0}}, "'a' has 0.0; give a number above 0"),
        ({"annotator_weights": {"a": True}}, "'a' has True"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardModeling(**fields)
