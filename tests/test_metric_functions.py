"""Metrics of the user: forms they may be given in, how they are called, and errors that name them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tropism.config import Recipe
from tropism.errors import ConfigError, RewardError
from tropism.metric_functions import RESERVED, MetricFunctions, MetricTerm, metrics_of
from tropism.types import RewardInputs

DOCS = Path(__file__).resolve().parents[1] / "docs"


def inputs(*completions: str, step: int = 3, **columns: list[Any]) -> RewardInputs:
    return RewardInputs(
        prompts=[f"prompt {row}" for row in range(len(completions))],
        completions=list(completions),
        completion_ids=[[1] * len(text) for text in completions],
        finish_reasons=["eos"] * len(completions),
        columns=columns,
        trainer_state={"step": step},
    )


def letters(completions: list[str]) -> list[int]:
    return [len(text) for text in completions]


def of_label(completions: list[str], label: list[str]) -> list[bool]:
    return [text == wanted for text, wanted in zip(completions, label, strict=True)]


def several(completions: list[str], prompts: list[str]) -> dict[str, Any]:
    """As trlX's metric functions return them."""
    return {"letters": [len(text) for text in completions], "shouted": torch.tensor([t.isupper() for t in completions])}


def measured(metrics: Any, given: RewardInputs) -> dict[str, list[float | None]]:
    return MetricFunctions(metrics_of(metrics)).evaluate(given)


def test_a_function_gives_one_number_per_completion() -> None:
    assert measured(letters, inputs("a", "abc", "")) == {"letters": [1.0, 3.0, 0.0]}


def test_columns_of_the_data_come_by_name() -> None:
    assert measured({"right": of_label}, inputs("a", "b", label=["a", "c"])) == {"right": [1.0, 0.0]}


def test_a_function_may_return_several_by_name() -> None:
    given = inputs("A", "abc")
    assert measured(several, given) == {"letters": [1.0, 3.0], "shouted": [1.0, 0.0]}
    assert measured({"any": several, "more": letters}, given).keys() == {"letters", "shouted", "more"}


def test_a_list_a_name_and_async_functions() -> None:
    async def slow(completions: list[str]) -> list[float]:
        return [0.5] * len(completions)

    found = measured([letters, "repetition", slow], inputs("one two three", "one"))
    assert found["letters"] == [13.0, 3.0] and found["slow"] == [0.5, 0.5]
    assert found.keys() == {"letters", "repetition", "slow"}


def test_no_opinion_is_none_and_no_rows_call_nothing() -> None:
    assert measured({"x": lambda completions: [None, 2]}, inputs("a", "b")) == {"x": [None, 2.0]}
    assert measured({"x": lambda completions: 1 / 0}, inputs()) == {}


def test_arguments_are_bound_as_those_of_rewards() -> None:
    def least(completions: list[str], n: int) -> list[bool]:
        return [len(text) >= n for text in completions]

    assert measured({"long": {"use": least, "args": {"n": 2}}}, inputs("a", "abc")) == {"long": [0.0, 1.0]}


def test_what_a_function_does_to_its_lists_stays_with_it() -> None:
    def greedy(completions: list[str], completion_ids: list[list[int]]) -> list[int]:
        completions.clear()
        return [len(ids.copy() or ids.clear() or []) for ids in completion_ids]

    given = inputs("abc")
    assert measured([greedy, letters], given)["letters"] == [3.0]


ERRORS: list[tuple[Any, str]] = [
    (lambda completions: [1 / 0], r"^metric 'm', after step 3 raised ZeroDivisionError: .* at .*test_metric"),
    (lambda completions: [1.0], r"^metric 'm', after step 3 returned 1 numbers for 2 completions"),
    (lambda completions: None, r"returned None; return a list with one number per completion"),
    (lambda completions: 0.5, r"returned a single float; return a list with one number per completion"),
    (lambda completions: [0.5, math.nan], r"for row 1 \(prompt 'prompt 1'\): returned NaN"),
    (lambda completions: [[0.5], 1.0], r"for row 0 .*returned a list of 1 for one completion; return one number"),
    (lambda completions: {"a": [1.0]}, r"^metric 'm', after step 3, as 'a', returned 1 numbers for 2 completions"),
    (lambda nothing: [1.0, 2.0], r"needs the argument 'nothing', which is not there; available: prompts"),
]


@pytest.mark.parametrize(("function", "message"), ERRORS)
def test_errors_name_the_metric_the_step_and_the_row(function: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        measured({"m": function}, inputs("a", "b"))


def test_the_function_is_named_where_its_name_is_another() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("label")

    with pytest.raises(RewardError, match=r"^metric 'm' \(broken\), before step 1 raised KeyError: 'label'"):
        measured({"m": broken}, inputs("a", step=0))


def test_rows_of_a_share_are_counted_over_all_processes() -> None:
    with pytest.raises(RewardError, match="for row 7 "):
        MetricFunctions(metrics_of({"m": lambda completions: [1.0, "x"]})).evaluate(inputs("a", "b"), first_row=6)


REFUSED: list[tuple[Any, str]] = [
    ({"reward": letters}, r"eval/reward is a metric of the library; give yours another name: \{'my_reward': \.\.\.\}"),
    ({"loss": letters}, "eval/loss is a metric of the library"),
    ({"a/b": letters}, "must be printable text without '/' and '@'"),
    ({"a@b": letters}, "must be printable text without '/' and '@'"),
    ([letters, letters], "two are called 'letters'"),
    ([3], "give a function, a name, a list of these, or a mapping"),
    (3, "give a function, a name, a list of these, or a mapping"),
    ({"m": {"use": letters, "weight": 2.0}}, r"metrics\.m: the key 'weight' belongs to rewards; leave it out"),
    ({"m": {"uses": letters}}, r"metrics\.m: the key 'uses' is unknown. Did you mean 'use'\?"),
    ({"m": {"args": {}}}, r"metrics\.m: a metric needs `use`"),
    ({"m": {"use": ""}}, r"metrics\.m: use: expected"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_cannot_be_a_metric_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        metrics_of(given)


def test_names_that_a_function_returns_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="metric 'm', after step 3: metrics: eval/reward is a metric of the library"):
        measured({"m": lambda completions: {"reward": [1.0]}}, inputs("a"))
    with pytest.raises(ConfigError, match="returned 'other', as another metric is called"):
        measured({"m": lambda completions: {"other": [1.0]}, "other": letters}, inputs("a"))
    with pytest.raises(ConfigError, match="returned 'letters', as another metric is called"):
        measured({"m": several, "n": several}, inputs("a"))


def test_code_that_a_recipe_names_needs_permission(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def size(completions):\n    return [len(c) for c in completions]\n")
    recipe = Recipe.from_mapping(
        {
            "model": "demo",
            "algorithm": "sft",
            "data": "texts.txt",
            "metrics": {"size": {"use": f"{file}:size"}},
        }
    )
    assert recipe.metrics == {"size": MetricTerm(use=f"{file}:size")}
    with pytest.raises(ConfigError, match=r"the metric 'size' \(.*mine\.py:size\) runs code .* --allow-code"):
        MetricFunctions(recipe.metrics)
    found = MetricFunctions(recipe.metrics, allow_code=True).evaluate(inputs("abc"))
    assert found == {"size": [3.0]}


def test_a_recipe_takes_every_form_and_writes_it_in_full() -> None:
    plain: dict[str, Any] = {"model": "demo", "algorithm": "grpo", "data": "p.txt", "reward": "vader"}
    recipe = Recipe.from_mapping({**plain, "metrics": "length"})
    assert recipe.metrics == {"length": MetricTerm(use="length")}
    assert "metrics:\n  length:\n    use: length\n    args: {}\n" in recipe.to_yaml()
    assert Recipe.from_mapping({**plain, "metrics": {"n": "length"}}).metrics == {"n": MetricTerm(use="length")}
    assert Recipe.from_mapping({**plain, "metrics": None}).metrics == {}


def test_all_names_of_the_library_are_reserved() -> None:
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    names = {name.split("/")[0] for name in re.findall(r"^\| `eval/([^`<]+)` \|", text, re.MULTILINE)}
    assert {"reward", "loss", "accuracy"} <= names
    assert names <= RESERVED
