"""What a sweep's file may say, and what it is told when it says something else."""

from __future__ import annotations

from typing import Any

import pytest

from stub_sweeps import RATES, make_config
from tropism.errors import ConfigError
from tropism.sweeps.config import Parameter, SweepConfig, sweep_from_mapping


def refused(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(**settings)
    assert str(caught.value).startswith("sweep.yaml: ")
    return str(caught.value)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "typo in a setting": ({"smapler": "tpe"}, "did you mean 'sampler'?"),
    "typo in a choice": ({"sampler": "tpr"}, "did you mean 'tpe'?"),
    "typo in a strategy": ({"parameters": {"seed": {"strategy": "loguniforn", "values": [1, 2]}}}, "'loguniform'"),
    "typo beside the strategy": (
        {"parameters": {"seed": {"strategy": "choice", "value": [1]}}},
        "parameters.seed.value: unknown key; did you mean 'values'?",
    ),
    "no parameters": ({"parameters": {}}, "name at least one dotted key"),
    "a list of parameters": ({"parameters": ["seed"]}, "expected a mapping"),
    "a bare value": ({"trainer.learning_rate": 1e-3}, "needs a mapping of strategy and values"),
    "range the wrong way": (
        {"parameters": {"seed": {"strategy": "int", "values": [5, 2]}}},
        "parameters.seed: int: low 5 must be below high 2",
    ),
    "one end": ({"parameters": {"seed": {"strategy": "uniform", "values": [5]}}}, "[low, high]"),
    "step left out": ({"parameters": {"seed": {"strategy": "quniform", "values": [0, 1]}}}, "[low, high, step]"),
    "step that misses the end": (
        {"parameters": {"sampling.temperature": {"strategy": "quniform", "values": [0, 1, 0.3]}}},
        "do not end at 1",
    ),
    "logarithm of 0": ({"parameters": {"seed": {"strategy": "loguniform", "values": [0, 1]}}}, "must be above 0"),
    "text for a number": (
        {"parameters": {"seed": {"strategy": "uniform", "values": ["1e-5x", 1]}}},
        "takes numbers, not '1e-5x'",
    ),
    "broken whole number": ({"parameters": {"seed": {"strategy": "int", "values": [1, 2.5]}}}, "whole numbers"),
    "a truth value for a number": ({"parameters": {"seed": {"strategy": "int", "values": [True, 3]}}}, "whole numbers"),
    "no value": ({"parameters": {"seed": {"strategy": "choice", "values": []}}}, "at least one value"),
    "one value twice": ({"parameters": {"seed": {"strategy": "choice", "values": [1, "1"]}}}, "'1' stands among"),
    "values that are no list": ({"parameters": {"seed": {"strategy": "choice", "values": 3}}}, "expected a list"),
    "no trials": ({"trials": 0}, "trials must be at least 1"),
    "no seeds": ({"seeds": 0}, "seeds must be at least 1"),
    "endless grid": ({"sampler": "grid"}, "a grid needs values that can be listed"),
    "CMA-ES on a line": ({"sampler": "cmaes"}, "two ranges of numbers or more"),
    "its own run folder": ({"parameters": {"run": {"strategy": "choice", "values": ["a"]}}}, "--out"),
    "seeds twice": (
        {"seeds": 2, "parameters": {"seed": {"strategy": "choice", "values": [1, 2]}}},
        "with seeds: 2 each setting runs with several seeds already",
    ),
    "code of a model": (
        {"parameters": {"model.trust_remote_code": {"strategy": "choice", "values": [True]}}},
        "only the command line",
    ),
    "code of a model, inside": (
        {"parameters": {"model": {"strategy": "choice", "values": [{"name": "x", "trust_remote_code": True}]}}},
        "a file cannot allow a model's code to run",
    ),
    "an odd key": ({"parameters": {"trainer..learning_rate": RATES}}, "names between its dots"),
    "a key with an equals sign": ({"parameters": {"seed=1": RATES}}, "equals signs"),
    "a pruner on Ray": ({"pruner": "median", "backend": "ray"}, "pruner: none"),
    "no room on Ray": ({"backend": "ray", "ray": {"cpus": 0}}, "not both 0"),
    "an empty metric": ({"metric": " "}, "metric is empty"),
    "a secret": (
        {"parameters": {"model": {"strategy": "choice", "values": ["hf_" + "a1" * 12]}}},
        "looks like a Hugging Face token",
    ),
    "a huge grid": (
        {"parameters": {k: {"strategy": "grid", "values": list(range(200))} for k in ("seed", "total_steps")} | {
            "prompts_per_step": {"strategy": "grid", "values": [1, 2]}}},
        "more than 10,000 cells",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_refused_by_name(name: str) -> None:
    settings, message = WRONG[name]
    assert message in refused(**settings)


def test_the_source_form_is_read() -> None:
    """``configs/sweeps/ppo_sweep.yml`` of trlX, with this library's keys."""
    config = sweep_from_mapping(
        {
            "tune_config": {
                "mode": "max",
                "metric": "reward/mean",
                "search_alg": "random",
                "scheduler": "fifo",
                "num_samples": 32,
            },
            "trainer.learning_rate": {"strategy": "loguniform", "values": [0.000001, 0.001]},
            "algorithm.kl_coef": {"strategy": "loguniform", "values": [0.0001, 0.2]},
            "train_layers": {"strategy": "choice", "values": [None, 2, 6]},
        },
        "ppo_sweep.yml",
    )
    assert (config.metric, config.mode, config.trials) == ("reward/mean", "max", 32)
    assert (config.sampler, config.pruner) == ("random", "none")
    assert list(config.parameters) == ["trainer.learning_rate", "algorithm.kl_coef", "train_layers"]
    assert config.parameters["train_layers"].values == (None, 2, 6)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"metric": "reward/mean", "search_alg": "bohb"}, "tune_config.search_alg: 'bohb' is not offered"),
        ({"metric": "reward/mean", "scheduler": "hyperband"}, "tune_config.scheduler: 'hyperband' is not offered"),
        ({"metric": "reward/mean", "num_sample": 3}, "tune_config.num_sample: unknown key"),
        ("max", "tune_config: expected a mapping"),
    ],
)
def test_what_the_source_has_and_this_has_not_is_said(tune: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_from_mapping({"tune_config": tune, "trainer.learning_rate": RATES}, "s.yml")


def test_a_setting_may_not_stand_in_two_places() -> None:
    with pytest.raises(ConfigError, match="metric: given in tune_config and beside it"):
        sweep_from_mapping({"metric": "a", "tune_config": {"metric": "b"}, "seed": RATES}, "s.yml")
    with pytest.raises(ConfigError, match="seed: given under parameters and beside them"):
        sweep_from_mapping({"metric": "a", "parameters": {"seed": RATES}, "seed": RATES}, "s.yml")


def test_ends_and_cells_of_the_strategies() -> None:
    def cells(strategy: Any, *values: Any) -> Any:
        return Parameter(strategy=strategy, values=values).cells

    assert cells("int", 2, 5) == (2, 3, 4, 5)
    assert cells("randint", 2, 5) == (2, 3, 4)  # the source leaves out the high end
    assert cells("quniform", 0.1, 0.5, 0.1) == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert cells("choice", "a", None) == ("a", None)
    assert cells("uniform", 0, 1) is None
    assert Parameter(strategy="lograndint", values=(1, 9)).ends == (1, 8)


def test_trials_default_to_the_grid_or_to_twenty() -> None:
    grid = {"a": {"strategy": "grid", "values": [1, 2, 3]}, "b": {"strategy": "int", "values": [1, 4]}}
    assert make_config(trials=None).total == 20
    assert make_config(trials=None, sampler="grid", parameters=grid).total == 12
    mixed: SweepConfig = make_config(trials=None, parameters=grid)
    assert mixed.total == 3 and mixed.grid == [{"a": 1}, {"a": 2}, {"a": 3}]
