from __future__ import annotations

import json

import pytest

from tropism.training.monitor import LOW_SAMPLE_SIZE, LOW_SEQUENCE_SAMPLE_SIZE, PATIENCE, Monitor
from tropism.types import Metrics

HEALTHY: Metrics = {
    "reward/mean": 0.3,
    "reward/std": 0.4,
    "reward/unscored": 0.0,
    "reward/zero_variance_groups": 0.2,
    "rollout/truncated_fraction": 0.5,
    "rollout/empty_fraction": 0.0,
    "rollout/distinct": 1.0,
    "policy/sequence_kl": 2.0,
    "rollout/effective_sample_size": LOW_SAMPLE_SIZE,
    "rollout/sequence_effective_sample_size": LOW_SEQUENCE_SAMPLE_SIZE,
}


def test_a_healthy_run_is_left_alone() -> None:
    monitor = Monitor()
    assert all(monitor.check(HEALTHY) == [] for _ in range(30))
    assert monitor.check({}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rollout/truncated_fraction": 1.0}, ["cut by the length limit", "max_new_tokens"]),
        ({"reward/std": 0.0, "reward/mean": 0.25}, ["same reward (0.25)", "temperature"]),
        ({"policy/sequence_kl": 12.3}, ["12.3 nats", "kl_coef"]),
        ({"policy/sequence_kl": -7.0}, ["-7 nats", "top_k"]),
        ({"rollout/distinct": 0.1}, ["0.1 of the completions", "temperature"]),
        ({"rollout/empty_fraction": 0.75}, ["empty or one token", "min_new_tokens"]),
        ({"rollout/effective_sample_size": 0.8, "rollout/logprob_mismatch": 0.4}, ["0.4 nats", "0.8 of", "precision"]),
        ({"rollout/sequence_effective_sample_size": 0.2}, ["0.2 of their number", "importance_cap"]),
        ({"reward/unscored": 1.0}, ["no opinion"]),
        ({"reward/judge/skipped": 3.0}, ["3 completions", "'judge'", "error/judge"]),
    ],
)
def test_each_trouble_is_named_once_with_its_mend(change: Metrics, words: list[str]) -> None:
    monitor = Monitor()
    (message,) = monitor.check(HEALTHY | change)
    assert all(word in message for word in words)
    assert "{" not in message
    assert monitor.check(HEALTHY | change) == []


def test_exploded_kl_is_told_after_high_kl() -> None:
    monitor = Monitor()
    assert len(monitor.check(HEALTHY | {"policy/sequence_kl": 20.0})) == 1
    (message,) = monitor.check(HEALTHY | {"policy/sequence_kl": 80.0})
    assert "exploded" in message


def test_zero_variance_is_told_after_ten_steps_in_a_row() -> None:
    monitor, flat = Monitor(), HEALTHY | {"reward/zero_variance_groups": 1.0}
    for _ in range(PATIENCE - 1):
        assert monitor.check(flat) == []
    assert monitor.check(HEALTHY) == []  # the streak breaks
    for _ in range(PATIENCE - 1):
        assert monitor.check(flat) == []
    (message,) = monitor.check(flat)
    assert "in every group" in message


def test_a_resumed_monitor_neither_repeats_nor_forgets() -> None:
    monitor, flat = Monitor(), HEALTHY | {"reward/zero_variance_groups": 1.0, "rollout/distinct": 0.1}
    assert len(monitor.check(flat)) == 1
    for _ in range(PATIENCE - 2):
        monitor.check(flat)
    resumed = Monitor()
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    (message,) = resumed.check(flat)
    assert "in every group" in message
