"""A gold reward: forms, values by hand, what is refused, and runs that are measured by it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from tiny_runs import PAIRED, PROMPTS, Setting, assemble, assert_same, early_letters, execute, logged, weights_of
from tropism.config import Recipe
from tropism.errors import ConfigError, RewardError
from tropism.foreign.reward_facts import FILE
from tropism.gold_reward import GoldReward, check_gold, measurements_of
from tropism.metric_functions import metrics_of
from tropism.rewards import RewardConfig
from tropism.training.config import CheckpointConfig, EvaluationConfig
from tropism.types import RewardInputs

GRPO = Setting("grpo", False, "llama")


def brief(completions: list[str]) -> list[float]:
    return [-float(len(text)) for text in completions]


def asks(completions: list[str]) -> list[float | None]:
    return [None if text == "" else float(text.count("?")) for text in completions]


def inputs(*completions: str) -> RewardInputs:
    return RewardInputs(
        prompts=["a prompt"] * len(completions),
        completions=list(completions),
        completion_ids=[[5] * len(text) for text in completions],
        finish_reasons=["eos"] * len(completions),
        trainer_state={"step": 3},
    )


# Values --------------------------------------------------------------------------------------------------------------


def test_one_term() -> None:
    assert GoldReward(RewardConfig.of(brief)).evaluate(inputs("ab", "")) == {"gold": [-2.0, 0.0]}


def test_several_terms_are_weighed_and_named() -> None:
    """2 * -len + 3 * questions; where a term has no opinion the others stand."""
    gold = GoldReward(RewardConfig.of({"brief": (brief, 2.0), "asks": (asks, 3.0)}))
    found = gold.evaluate(inputs("a?", "abc", ""))
    assert found == {"gold": [-1.0, -6.0, 0.0], "gold/brief": [-2.0, -3.0, 0.0], "gold/asks": [1.0, 0.0, None]}


def test_it_is_neither_clipped_nor_scaled() -> None:
    config = RewardConfig.of({"terms": {"brief": {"use": brief}}, "clip": 1.0, "scale": "running"})
    assert GoldReward(config).evaluate(inputs("abcd", "ab")) == {"gold": [-4.0, -2.0]}


def test_no_opinion_is_none() -> None:
    assert GoldReward(RewardConfig.of(asks)).evaluate(inputs("", "?")) == {"gold": [None, 1.0]}


def test_an_error_names_the_setting() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("missing")

    with pytest.raises(RewardError, match=r"trainer\.evaluation\.gold: reward 'broken'.*missing"):
        GoldReward(RewardConfig.of(broken)).evaluate(inputs("a"))


def test_code_needs_permission() -> None:
    config = RewardConfig.of("mine.py:judge")
    with pytest.raises(ConfigError, match=r"trainer\.evaluation\.gold: .*allow"):
        GoldReward(config)


def test_metrics_stand_beside_it() -> None:
    both = measurements_of(metrics_of({"asks": asks}), RewardConfig.of(brief), allow_code=False)
    assert both is not None
    assert both.evaluate(inputs("a?")) == {"asks": [1.0], "gold": [-2.0]}
    assert measurements_of({}, None, allow_code=False) is None
    with pytest.raises(ConfigError, match="eval/gold is a metric of the library"):
        metrics_of({"gold": asks})


# Settings ------------------------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {"model": "demo", "algorithm": "grpo", "data": "prompts.txt", "reward": "vader"}


def recipe_with(gold: Any, **fields: Any) -> Recipe:
    return Recipe.from_mapping({**RECIPE, "trainer": {"evaluation": {"gold": gold}}, **fields})


@pytest.mark.parametrize(
    ("given", "terms"),
    [
        ("length", ["length"]),
        ({"use": "words", "args": {"words": {"good": 1.0}}}, ["words"]),
        ({"brief": "length", "mild": {"use": "repetition", "weight": -1}}, ["brief", "mild"]),
        ({"terms": {"brief": {"use": "length"}}, "on_error": "skip"}, ["brief"]),
        ("checks.py:judge", ["judge"]),
    ],
)
def test_every_form_of_a_reward(given: Any, terms: list[str]) -> None:
    gold = recipe_with(given).trainer.evaluation.gold
    assert gold is not None and list(gold.terms) == terms
    assert EvaluationConfig(gold=given).gold == gold


def test_it_is_written_into_the_recipe_and_read_back() -> None:
    import yaml

    recipe = recipe_with({"brief": ("length", 0.5)})
    assert Recipe.from_mapping(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("vader", "vader is what the run is trained by"),
        ({"other_name": "vader"}, "is what the run is trained by"),
        ({"use": "vader", "weight": 2}, "is what the run is trained by"),
        ({"terms": {}}, "trainer.evaluation.gold"),
        (3, "trainer.evaluation.gold: reward: expected a callable"),
        ("judge.yaml", "train it first"),
    ],
)
def test_what_is_no_gold_reward(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_with(given)


def test_a_path_in_other_words_is_the_same_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="trained by"):
        recipe_with(f"{tmp_path}/mine.py:judge", reward="./mine.py:judge")


SPELLINGS: list[tuple[Any, Any]] = [
    ("runs/rm", {"use": "reward-model", "args": {"model": "runs/rm"}}),
    ("runs/rm", "runs/rm/model"),
    ("runs/rm", "./runs/../runs/rm/"),
    ("runs/rm", {"use": "reward-model", "args": {"model": "runs/rm/model", "batch_size": 2, "device": "cpu"}}),
    ("runs/later", {"use": "reward-model", "args": {"model": "./runs/later"}}),
    (
        {"use": "classifier", "args": {"model": "judge", "batch_size": 4}},
        {"use": "classifier", "args": {"model": "./judge", "dtype": "float32"}},
    ),
]


@pytest.mark.parametrize(("reward", "gold"), SPELLINGS)
def test_the_same_judge_in_other_words(reward: Any, gold: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "rm" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "rm" / "recipe.yaml").write_text("algorithm: reward-model\n")
    (tmp_path / "runs" / "rm" / "model" / FILE).write_text("{}")
    (tmp_path / "judge").mkdir()
    monkeypatch.chdir(tmp_path)
    for one, other in ((reward, gold), (gold, reward)):
        with pytest.raises(ConfigError, match="trained by"):
            check_gold(RewardConfig.of(one), RewardConfig.of(other))
    check_gold(RewardConfig.of(gold), RewardConfig.of("runs/another"))


def test_other_arguments_make_another_judge() -> None:
    one, other = ({"use": "words", "args": {"words": {word: 1.0}}} for word in ("good", "kind"))
    check_gold(RewardConfig.of(one), RewardConfig.of(other))


def test_a_function_is_known_by_the_place_of_its_code() -> None:
    with pytest.raises(ConfigError, match="trained by"):
        check_gold(RewardConfig.of(f"{__file__}:brief"), RewardConfig.of(brief))
    check_gold(RewardConfig.of(f"{__file__}:brief"), RewardConfig.of(asks))


def test_a_shared_term_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tropism"):
        recipe_with({"mood": "vader", "brief": "length"})
    assert "shares 'mood' with the training reward" in caplog.text


def test_the_best_by_a_gold_reward_needs_one() -> None:
    with pytest.raises(ConfigError, match="best_metric is eval/gold, and there is no gold reward"):
        Recipe.from_mapping({**RECIPE, "trainer": {"checkpoints": {"best_metric": "eval/gold"}}})


def test_a_reward_model_takes_none() -> None:
    with pytest.raises(ConfigError, match=r"reward-model takes no trainer\.evaluation\.gold"):
        recipe_with("length", algorithm="reward-model", reward=None)


# Runs ----------------------------------------------------------------------------------------------------------------


def table(run: Path, step: int) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = pyarrow.parquet.read_table(
        run / "evaluations" / f"step-{step:06d}.parquet"
    ).to_pydict()
    return found


def test_a_run_measures_it_and_trains_as_without(tmp_path: Path) -> None:
    with_gold = EvaluationConfig(every=1, gold=RewardConfig.of(brief))
    one = execute(assemble(GRPO, tmp_path / "one", eval_data=PROMPTS[:3], trainer={"evaluation": with_gold}))
    plain = replace(with_gold, gold=None)
    other = execute(assemble(GRPO, tmp_path / "other", eval_data=PROMPTS[:3], trainer={"evaluation": plain}))
    assert_same(weights_of(one), weights_of(other))
    lines = logged(tmp_path / "one", "evaluation")
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        found = table(tmp_path / "one", line["step"])
        lengths = [-float(len(text)) for text in found["completion"]]
        assert found["metric/gold"] == lengths
        assert line["eval/gold"] == pytest.approx(sum(lengths) / 3)
    assert "metric/gold" not in table(tmp_path / "other", 0)


def test_the_best_weights_can_be_those_by_gold(tmp_path: Path) -> None:
    """The gold reward of this run falls at every evaluation, so that the first is the best and patience ends it."""
    calls = []

    def falling(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        return [-float(len(calls))] * len(completions)

    trainer = {
        "evaluation": EvaluationConfig(every=1, gold=RewardConfig.of(falling)),
        "checkpoints": CheckpointConfig(best_metric="eval/gold", patience=2),
    }
    run = execute(assemble(GRPO, tmp_path / "run", eval_data=PROMPTS[:3], total_steps=9, trainer=trainer))
    assert run.run.best.step == 0
    assert [line["step"] for line in logged(tmp_path / "run", "evaluation")] == [0, 1, 2]


def test_a_method_without_a_reward_can_be_judged(tmp_path: Path) -> None:
    trainer = {"evaluation": EvaluationConfig(gold=RewardConfig.of(brief))}
    execute(assemble(Setting("dpo", False, "llama"), tmp_path / "run", eval_data=PAIRED[:2], trainer=trainer))
    assert all("eval/gold" in line for line in logged(tmp_path / "run", "evaluation"))


def test_a_gold_reward_that_measures_nothing_is_refused(tmp_path: Path) -> None:
    trainer = {"evaluation": EvaluationConfig(gold=RewardConfig.of(brief))}
    with pytest.raises(ConfigError, match=r"trainer\.evaluation\.gold: held-out completions are measured"):
        assemble(GRPO, tmp_path / "run", trainer=trainer)


def test_a_broken_gold_reward_fails_before_training(tmp_path: Path) -> None:
    def broken(completions: list[str]) -> list[float]:
        return [0.0]

    trainer = {"evaluation": EvaluationConfig(gold=RewardConfig.of(broken))}
    with pytest.raises(RewardError, match=r"trainer\.evaluation\.gold"):
        assemble(GRPO, tmp_path / "run", eval_data=PROMPTS[:3], trainer=trainer).check()
    assert not (tmp_path / "run").exists()


def test_a_parting_is_warned_of_while_the_run_goes_on(tmp_path: Path) -> None:
    """Training and gold reward of 12 held-out prompts are told the step: one rises, the other falls from step 1 on."""

    def rising(completions: list[str], trainer_state: Any) -> list[float]:
        return [index / 100 + float(trainer_state["step"]) for index in range(len(completions))]

    def falling(completions: list[str], trainer_state: Any) -> list[float]:
        step = float(trainer_state["step"])
        return [index / 100 + (step if step < 2 else 2 - step) for index in range(len(completions))]

    trainer = {"evaluation": EvaluationConfig(every=1, gold=RewardConfig.of(falling))}
    run = tmp_path / "run"
    held_out = [f"{prompt} {end}" for prompt in PROMPTS for end in "ab"]
    execute(assemble(GRPO, run, eval_data=held_out, total_steps=4, reward=RewardConfig.of(rising), trainer=trainer))
    warnings = [json.loads(line)["message"] for line in (run / "warnings.jsonl").read_text().splitlines()]
    advice = [message for message in warnings if message.startswith("stop advice")]
    assert len(advice) == 1 and "part after step 1" in advice[0] and "weights of step 1" in advice[0]


def test_early_letters_is_not_gold(tmp_path: Path) -> None:
    """The function that a run of Python is trained by is known again."""
    trainer = {"evaluation": EvaluationConfig(gold=RewardConfig.of(early_letters))}
    with pytest.raises(ConfigError, match="trained by"):
        assemble(GRPO, tmp_path / "run", eval_data=PROMPTS[:3], trainer=trainer)
