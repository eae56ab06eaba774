"""Every form in which a user may give a reward."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest

from tropism.errors import ConfigError
from tropism.rewards import RewardConfig, RewardTerm


def short(completions: list[str]) -> list[float]:
    return [-float(len(completion)) for completion in completions]


class Judge:
    def __call__(self, completions: list[str]) -> list[float]:
        return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (short, ["short"]),
        (lambda completions: [], ["reward"]),
        (functools.partial(short), ["short"]),
        (Judge(), ["Judge"]),
        ("vader", ["vader"]),
        ("package.module:function", ["function"]),
        ("rewards/mine.py:warm", ["warm"]),
        (RewardTerm(use="vader"), ["vader"]),
        ({"warmth": "vader"}, ["warmth"]),
        ({"warmth": "vader", "short": (short, 0.1)}, ["warmth", "short"]),
        ({"warmth": {"use": "vader", "weight": 2}}, ["warmth"]),
        ({"use": "vader", "args": {"score": "pos"}}, ["vader"]),
        ({"terms": {"warmth": {"use": "vader", "weight": 1.0, "args": {}}}, "clip": 10}, ["warmth"]),
    ],
)
def test_forms(value: Any, names: list[str]) -> None:
    config = RewardConfig.of(value)
    assert list(config.terms) == names
    assert RewardConfig.of(config) is config


def test_values_arrive_where_they_belong() -> None:
    config = RewardConfig.of({"warmth": ("vader", 2.0), "short": [short, -0.5]})
    assert config.terms["warmth"] == RewardTerm(use="vader", weight=2.0)
    assert config.terms["short"] == RewardTerm(use=short, weight=-0.5)
    config = RewardConfig.of({"use": "length", "args": {"target": 5}, "weight": 3, "clip": 10, "scale": "running"})
    assert config.terms == {"length": RewardTerm(use="length", weight=3, args={"target": 5})}
    assert (config.clip, config.scale, config.normalise, config.on_error) == (10, "running", False, "raise")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "at least one term"),
        ({"terms": {}}, "at least one term"),
        (3, "not int"),
        (None, "not NoneType"),
        ([short, "vader"], "Several rewards are given as"),
        ("", "registered name"),
        ({"a": 3}, "reward term 'a'.*not 3"),
        ({"a": (short, 1.0, 2.0)}, "reward term 'a'.*not 3 values"),
        ({"a": (short, "1")}, "reward term 'a': weight.*'1'"),
        ({"a": (short, float("nan"))}, "finite number"),
        ({"a": (short, True)}, "finite number"),
        ({"a": (short, 0.0)}, "weight 0"),
        ({"a": {"weight": 1.0}}, "needs `use`"),
        ({"a": {"use": short, "wieght": 1.0}}, "unknown key 'wieght'.*Did you mean 'weight'"),
        ({"a": {"use": short, "args": [1]}}, "args"),
        ({"use": "vader", "clipp": 3}, "unknown key 'clipp'.*Did you mean 'clip'"),
        ({"terms": {"a": short}, "scael": "running"}, "unknown key 'scael'.*Did you mean 'scale'"),
        ({"terms": {"a": short}, "scale": "runing"}, "scale: unknown value 'runing'. Did you mean 'running'"),
        ({"terms": {"a": short}, "on_error": "skpi"}, "Did you mean 'skip'"),
        ({"terms": {"a": short}, "clip": 0}, "clip: expected a positive number"),
        ({"terms": {"a": short}, "clip": float("inf")}, "clip"),
        ({"terms": {"a": short}, "normalise": True, "scale": "running"}, "normalise already divides"),
        ({"mean": short}, "taken by the metric reward/mean"),
        ({"a/b": short}, "without '/'"),
        ({3: short}, "printable text"),
    ],
)
def test_bad_values_are_named(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardConfig.of(value)


def test_the_mapping_of_a_config_gives_it_back() -> None:
    value = {
        "terms": {"warmth": {"use": "vader", "weight": 2.0, "args": {"score": "pos"}}},
        "clip": 10.0,
        "scale": "running",
    }
    config = RewardConfig.of(value)
    assert RewardConfig.of(config.to_mapping()) == config
    how = {"timeout": None, "retries": 0, "rows_per_call": None, "concurrency": 1, "cache": None}
    terms = {"warmth": {**value["terms"]["warmth"], **how}}  # type: ignore[index]
    assert config.to_mapping() == {**value, "terms": terms, "normalise": False, "on_error": "raise", "timeout": None}


def test_python_callables_are_written_as_references() -> None:
    mapping = RewardConfig.of({"a": short, "b": Judge()}).to_mapping()
    assert mapping["terms"]["a"]["use"] == f"{__name__}:short"
    assert mapping["terms"]["b"]["use"] == f"{__name__}:Judge"


def test_configuration_needs_no_torch() -> None:
    code = (
        "import sys, tropism.rewards as r; r.RewardConfig.of({'a': ('vader', 1.0)}); "
        "from tropism.rewards.registry import make_reward; make_reward('length', {'target': 3}); "
        "assert 'torch' not in sys.modules; r.RewardHarness; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
