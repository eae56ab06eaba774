"""From values to recipes, and what is refused before the first trial."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from stub_sweeps import RATES, make_config
from tropism.errors import ConfigError
from tropism.sweeps.space import check_space, recipe_of, with_values


def check(base: dict[str, Any], *, allow_code: bool = False, **settings: Any) -> None:
    check_space(base, make_config(**settings), where="sweep.yaml", allow_code=allow_code)


def listed(*values: Any) -> dict[str, Any]:
    return {"strategy": "choice", "values": list(values)}


def test_values_reach_the_recipe_with_their_types(base: dict[str, Any]) -> None:
    values = {
        "trainer.learning_rate": 3.217e-05,
        "lora.rank": 8,
        "sampling.stop": ["\n", "ä'\"#: "],
        "train_layers": None,
        "algorithm.kl_coef": 0.0,
        "trainer.preflight": False,
    }
    recipe = recipe_of(base, values, run="runs/x")
    assert recipe.trainer.learning_rate == 3.217e-05
    assert recipe.lora is not None and recipe.lora.rank == 8
    assert list(recipe.sampling.stop) == ["\n", "ä'\"#: "]
    assert recipe.train_layers is None and recipe.trainer.preflight is False
    assert recipe.algorithm.name == "grpo" and recipe.algorithm.group_size == 4  # type: ignore[attr-defined]
    assert recipe.run == "runs/x"


def test_a_method_is_set_before_its_fields(base: dict[str, Any]) -> None:
    base["algorithm"]["group_size"] = 6
    for values in ({"algorithm.kl_coef": 0.5, "algorithm": "rloo"}, {"algorithm": "rloo", "algorithm.kl_coef": 0.5}):
        recipe = recipe_of(base, values, run=None)
        assert recipe.algorithm.name == "rloo" and recipe.algorithm.kl_coef == 0.5  # type: ignore[attr-defined]
        assert recipe.algorithm.group_size != 6  # type: ignore[attr-defined]  # nothing of the recipe's method stays
    whole = recipe_of(base, {"algorithm": {"name": "ppo", "group_size": 1}}, run=None)
    assert whole.algorithm.name == "ppo"


def test_seeds_are_added_to_the_recipes(base: dict[str, Any]) -> None:
    assert [recipe_of(base, {}, run=None, seed=seed).seed for seed in range(3)] == [10, 11, 12]


def test_trust_that_the_command_line_gave_stays(base: dict[str, Any]) -> None:
    trusting = base | {"model": {"name": "x", "trust_remote_code": True}}
    assert with_values(trusting, {"model": "y"})["model"] == {"name": "y", "trust_remote_code": True}
    assert with_values(trusting, {"seed": 3})["model"] == {"name": "x", "trust_remote_code": True}


def test_a_typo_in_a_key_names_the_closest_field(base: dict[str, Any]) -> None:
    parameters = {"trainer.learning_rate": RATES, "algorithm.kl_coeff": {"strategy": "uniform", "values": [0, 1]}}
    with pytest.raises(ConfigError) as caught:
        check(base, parameters=parameters)
    assert str(caught.value).startswith("sweep.yaml: parameters.algorithm.kl_coeff, with 0: ")
    assert "did you mean 'kl_coef'?" in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"trainer.learning_rate": {"strategy": "uniform", "values": [-0.1, 0.1]}}, "learning_rate must be positive"),
        ({"algorithm": listed("grpo", "rlo")}, 'parameters.algorithm, with "rlo": algorithm: there is no method'),
        ({"sampling.temperature": listed(0.7, "hot")}, "sampling.temperature: expected a number"),
        ({"lora.rank": {"strategy": "int", "values": [0, 8]}}, "rank"),
        ({"total_steps.x": listed(1)}, "not a mapping"),
        ({"nonsense": listed(1)}, "nonsense: unknown key"),
        ({"model": listed("hf_" + "a1b2" * 6)}, "looks like"),
    ],
)
def test_values_that_no_recipe_takes_are_refused(
    base: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.yaml: ") as caught:
        check(base, parameters=parameters)
    assert message in str(caught.value)


def test_combinations_that_do_not_fit_are_told_and_left_to_fail(
    base: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "tropism")
    parameters = {"lora": listed(None, {"rank": 4}), "train_layers": listed(None, 2)}
    check(base, parameters=parameters)
    assert "of 4 combinations of values 1 cannot be built" in caplog.text
    assert "lora and train_layers cannot go together" in caplog.text


def test_many_parameters_are_checked_one_value_at_a_time(base: dict[str, Any]) -> None:
    rates = [f"trainer.optimizer.{name}" for name in ("eps", "weight_decay")]
    keys = [*rates, "trainer.learning_rate", "algorithm.kl_coef", "sampling.temperature", "trainer.max_grad_norm"]
    whole = ["total_steps", "prompts_per_step", "seed", "trainer.warmup_steps"]
    parameters = {key: {"strategy": "loguniform", "values": [0.1, 0.5]} for key in keys}
    parameters |= {key: {"strategy": "int", "values": [1, 9]} for key in whole}
    check(base, parameters=parameters)
    with pytest.raises(ConfigError, match=r"parameters\.trainer\.schedule"):
        check(base, parameters={**parameters, "trainer.schedule": listed("constant", "cosinus")})


def test_a_metric_of_held_out_data_needs_some(base: dict[str, Any]) -> None:
    del base["eval_data"]
    with pytest.raises(ConfigError, match="holds out none: give it eval_data"):
        check(base)
    check(base | {"data": {"path": "prompts.txt", "eval_fraction": 0.2}})
    check(base, metric="reward/mean")


def test_a_reward_metric_needs_a_reward(base: dict[str, Any]) -> None:
    sft = base | {"algorithm": "sft", "reward": None}
    with pytest.raises(ConfigError, match="take eval/loss"):
        check(sft)
    check(sft, metric="eval/loss", mode="min")


def test_a_pruner_needs_evaluations_on_the_way(base: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"set trainer\.evaluation\.every"):
        check(base, pruner="median")
    check(base | {"trainer": {"evaluation": {"every": 1}}}, pruner="median")


def test_code_needs_to_be_allowed(base: dict[str, Any]) -> None:
    own = base | {"reward": "rewards.py:mine"}
    with pytest.raises(ConfigError, match="--allow-code"):
        check(own)
    check(own, allow_code=True)
    with pytest.raises(ConfigError, match="--allow-code"):
        check(base, parameters={"reward": listed("vader", "rewards.py:mine")})
    with pytest.raises(ConfigError, match="--allow-code"):
        check(base | {"metrics": {"length": "measures.py:length"}})


def test_a_reward_model_is_not_trained_in_every_trial(base: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"train it once \(tropism train judge.yaml"):
        check(base | {"reward": "judge.yaml"})
