from __future__ import annotations

import math

import numpy as np
import pytest

from enumerable_task import BETA, REWARD, SEQUENCES, model, objective, optimum, sequence_logprobs
from tropism.evaluation.best_of import best_of_probabilities, kl_divergence
from tropism.evaluation.frontier import optimal_frontier


def test_two_outcomes_by_hand() -> None:
    """pi*(1) = e / (1 + e) = 0.7311 at beta 1; its KL to one half each is 0.1110 nats."""
    (point,) = optimal_frontier([0.0, 1.0], [math.log(0.5)] * 2, [1.0])
    assert point.reward == pytest.approx(0.73106, abs=1e-5)
    assert point.kl == pytest.approx(0.11094, abs=1e-5)


def test_both_ends() -> None:
    logprobs = np.log([0.7, 0.2, 0.1])
    near, far = optimal_frontier([0.0, 1.0, 3.0], logprobs, [1e6, 1e-3])
    assert near.reward == pytest.approx(0.5, abs=1e-4)  # the reference's mean
    assert near.kl == pytest.approx(0.0, abs=1e-9)
    assert far.reward == pytest.approx(3.0)
    assert far.kl == pytest.approx(-math.log(0.1))


def test_the_optimum_of_the_enumerable_task() -> None:
    """The point at the task's beta reaches its maximum, which was found in closed form."""
    reference = sequence_logprobs(model())
    rewards = [REWARD[ids] for ids in SEQUENCES]
    (point,) = optimal_frontier(rewards, np.array(reference) - math.log(sum(map(math.exp, reference))), [BETA])
    assert point.reward - BETA * point.kl == pytest.approx(optimum(reference), abs=1e-5)
    assert optimum(reference) >= objective(reference, reference)


def test_no_policy_lies_above_the_curve() -> None:
    """Random policies, and the best of n exactly: at the KL of each the curve has at least its reward."""
    rng = np.random.default_rng(0)
    p, rewards = rng.dirichlet(np.ones(8)), rng.normal(size=8)
    curve = optimal_frontier(rewards, np.log(p), np.geomspace(100, 0.005, 2000))
    kls, means = np.array([point.kl for point in curve]), np.array([point.reward for point in curve])
    assert (np.diff(kls) >= -1e-12).all()
    policies = [rng.dirichlet(np.ones(8) * scale) for scale in (0.1, 1.0, 5.0) for _ in range(200)]
    policies += [np.array(best_of_probabilities(p, rewards, n)) for n in (2, 4, 16, 64)]
    for policy in policies:
        kl, reward = kl_divergence(policy.tolist(), p.tolist()), float(policy @ rewards)
        assert reward <= np.interp(kl, kls, means) + 1e-4


def test_prompts_share_the_price_of_a_nat() -> None:
    one = optimal_frontier([0.0, 1.0], np.log([0.5, 0.5]), [0.5])[0]
    other = optimal_frontier([0.0, 2.0, 1.0], np.log([0.2, 0.3, 0.5]), [0.5])[0]
    both = optimal_frontier([[0.0, 1.0], [0.0, 2.0, 1.0]], [np.log([0.5, 0.5]), np.log([0.2, 0.3, 0.5])], [0.5])[0]
    assert both.kl == pytest.approx((one.kl + other.kl) / 2)
    assert both.reward == pytest.approx((one.reward + other.reward) / 2)


def test_impossible_completions_do_not_matter() -> None:
    (point,) = optimal_frontier([0.0, 1.0, 99.0], [math.log(0.5), math.log(0.5), -math.inf], [1.0])
    assert point.reward == pytest.approx(0.73106, abs=1e-5)


@pytest.mark.parametrize(
    ("rewards", "logprobs", "beta", "message"),
    [
        ([0.0, 1.0], [math.log(0.5)] * 2, 0.0, "beta must be positive"),
        ([0.0, 1.0], [math.log(0.4)] * 2, 1.0, r"add up to 1, not to 0\.8"),
        ([0.0], [math.log(0.5)] * 2, 1.0, "one reward for each log-prob"),
        ([0.0, math.nan], [math.log(0.5)] * 2, 1.0, "a reward that is not finite"),
        ([], [], 1.0, "add up to 1, not to 0"),
    ],
)
def test_what_cannot_be_is_refused(rewards: list[float], logprobs: list[float], beta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimal_frontier(rewards, logprobs, [beta])
