"""Several ways to sample held-out completions: their labels, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tropism.algorithms import GRPO
from tropism.config import Recipe
from tropism.errors import ConfigError
from tropism.evaluation.sampling_settings import label_of, refuse_ambiguous_names, sampling_settings
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling, Truncation
from tropism.training.config import EvaluationConfig, TrainerConfig

OWN = Sampling(max_new_tokens=8, temperature=1.0, truncation=Truncation(token=".", after=2))


def recipe(**changes: Any) -> dict[str, Any]:
    return {"model": "demo", "algorithm": "grpo", "data": "prompts.txt", "reward": "vader", **changes}


def test_each_way_is_the_own_sampling_but_for_its_changes() -> None:
    settings = sampling_settings(OWN, [{"temperature": 0.7}, {"temperature": 2, "top_k": 5}, {"truncation": None}])
    assert list(settings) == ["temperature=0.7", "temperature=2,top_k=5", "truncation=none"]
    assert settings["temperature=0.7"] == Sampling(
        max_new_tokens=8, temperature=0.7, truncation=Truncation(token=".", after=2)
    )
    assert settings["temperature=2,top_k=5"].top_k == 5
    assert settings["truncation=none"].truncation is None


def test_fields_of_a_nested_setting_change_one_by_one() -> None:
    settings = sampling_settings(OWN, [{"truncation": {"after": 3}}])
    assert settings["truncation.after=3"].truncation == Truncation(token=".", after=3)


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"temperature": 100}, "temperature=100"),
        ({"temperature": 0.25}, "temperature=0.25"),
        ({"stop": ["\n", "."]}, 'stop=["\\n", "."]'),
        (
            {"truncation": Truncation(token="!", after=1)},
            "truncation.token=!,truncation.after=1,truncation.beyond=stop",
        ),
    ],
)
def test_labels_are_one_line(change: dict[str, Any], label: str) -> None:
    (made,) = sampling_settings(OWN, [change]).values()
    assert label_of(made, change) == label


REFUSED: list[tuple[list[dict[str, Any]], str]] = [
    (
        [{"temperature": 0.5}, {"temperatur": 0.7}],
        r"^trainer\.evaluation\.sampling\[1\]\.temperatur: unknown key; did you mean 'temperature'\?",
    ),
    ([{"temperature": -1}], r"sampling\[0\]: temperature must be 0 \(greedy\) or positive"),
    ([{"temperature": "warm"}], r"sampling\[0\]\.temperature: expected a number, got the text 'warm'"),
    ([{"temperature": [0.7, 1.0]}], r"sampling\[0\]: one value of each field, and one entry for each value"),
    ([{"temperature": 0.7}, {"temperature": 0.7}], r"sampling\[1\]: temperature=0.7 samples as temperature=0.7 does"),
    ([{"temperature": 0.7}, {"temperature": 0.7, "top_k": 0}], r"sampling\[1\]: .* samples as temperature=0.7 does"),
    ([{"max_new_tokens": 9}], r"sampling\[0\]\.max_new_tokens: 9 is more than sampling\.max_new_tokens=8"),
    ([{"batch_size": 2}], r"sampling\[0\]\.batch_size: it says how completions are computed"),
    ([{}], r"sampling\[0\]: expected changes to the sampling, such as \{temperature: 0\.7\}"),
    ([{"stop": ["x" * 100]}], r"sampling\[0\]: stop=.* would be a part of the names"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_is_refused_with_its_place(changes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampling_settings(OWN, changes)


def test_a_recipe_is_refused_before_anything_is_loaded() -> None:
    trainer = {"evaluation": {"sampling": [{"temperature": 0.5}, {"temperatur": 0.7}]}}
    with pytest.raises(ConfigError, match=r"trainer\.evaluation\.sampling\[1\]\.temperatur: .*'temperature'"):
        Recipe.from_mapping(recipe(trainer=trainer))
    with pytest.raises(ValueError, match=r"sampling must be a list"):
        EvaluationConfig(sampling={"temperature": 0.5})  # type: ignore[arg-type]
    config = TrainerConfig(evaluation=EvaluationConfig(sampling=[{"top_p": 2}]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"sampling\[0\]: top_p must lie in"):
        Recipe(model="demo", algorithm=GRPO(), data="prompts.txt", reward=RewardConfig.of("vader"), trainer=config)


def test_a_list_in_training_says_where_lists_go() -> None:
    message = (
        r"sampling\.temperature is a list, and a run samples with one value.*"
        r"sampling: \[\{temperature: 0\.7\}, \{temperature: 1\.0\}\]"
    )
    with pytest.raises(ConfigError, match=message):
        Recipe.from_mapping(recipe(sampling={"temperature": [0.7, 1.0]}))
    with pytest.raises(ValueError, match=message):
        Sampling(temperature=[0.7, 1.0])  # type: ignore[arg-type]


def test_names_of_terms_that_could_be_a_column_of_another_way_are_refused() -> None:
    settings = sampling_settings(OWN, [{"temperature": 0.7}])
    refuse_ambiguous_names(settings, ["warm", "warm@home"])
    with pytest.raises(ConfigError, match=r"'warm@temperature=0\.7' is called as temperature=0\.7 of trainer"):
        refuse_ambiguous_names(settings, ["warm@temperature=0.7"])


def test_a_reward_model_samples_nothing() -> None:
    trainer = {"evaluation": {"sampling": [{"temperature": 0.5}]}}
    with pytest.raises(ConfigError, match=r"reward-model takes no trainer\.evaluation\.sampling"):
        Recipe.from_mapping({**recipe(algorithm="reward-model", trainer=trainer), "reward": None})
    with pytest.raises(ConfigError, match="reward-model takes no metrics"):
        Recipe.from_mapping({**recipe(algorithm="reward-model", metrics="length"), "reward": None})
