"""Training in one call: stop strings, metrics of the user, and several ways to sample in evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import METHODS, Setting, assemble, assert_same, early_letters, execute, logged, weights_of
from tropism.errors import ConfigError, DataError, RewardError
from tropism.evaluation.run_folder import RunData
from tropism.training.config import EvaluationConfig

HELD_OUT = ["a cat", "the dog ran", "oh"]
GRPO = Setting("grpo", False, "llama")


def letters(completions: list[str]) -> list[int]:
    return [len(text) for text in completions]


def named(completions: list[str], prompts: list[str]) -> dict[str, list[float]]:
    return {"shorter": [float(len(c) < len(p)) for c, p in zip(completions, prompts, strict=True)]}


def train(run: Path, algorithm: Any, data: Any, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "reward": early_letters,
        "eval_data": HELD_OUT,
        "run": run,
        "total_steps": 1,
        "prompts_per_step": 2,
        "sampling": tropism.Sampling(max_new_tokens=6),
        "trainer": tropism.TrainerConfig(progress=False, learning_rate=1e-3),
    }
    return tropism.train((tiny_model("llama", seed=3), tiny_tokenizer()), algorithm, data=data, **{**fields, **changes})


def table(run: Path, step: int) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = pq.read_table(run / "evaluations" / f"step-{step:06d}.parquet").to_pydict()
    return columns


# ---- stop ------------------------------------------------------------------------------------------------------------


def test_stop_strings_end_completions(tmp_path: Path) -> None:
    result = train(tmp_path / "run", tropism.GRPO(group_size=2), ["a cat", "oh"], stop=list("bcdtlrn"))
    assert result.policy.sampling.stop == tuple("bcdtlrn")
    completions = [text for step in (0, 1) for text in table(tmp_path / "run", step)["completion"]]
    assert not any(set(text) & set("bcdtlrn") for text in completions)
    assert "stop" in table(tmp_path / "run", 0)["finish_reason"]


def test_one_string_is_one_stop_and_not_its_letters(tmp_path: Path) -> None:
    result = train(tmp_path / "run", tropism.GRPO(group_size=2), ["a cat", "oh"], stop="the end")
    assert result.policy.sampling.stop == ("the end",)


def test_two_places_that_say_where_completions_end_are_refused(tmp_path: Path) -> None:
    sampling = tropism.Sampling(max_new_tokens=6, stop=("!",))
    with pytest.raises(ConfigError, match=r"stop is \['\.'\], and sampling\.stop is \['!'\].*Give one"):
        train(tmp_path / "run", tropism.GRPO(group_size=2), ["a cat", "oh"], stop=["."], sampling=sampling)
    with pytest.raises(ConfigError, match="stop: expected strings"):
        train(tmp_path / "run", tropism.GRPO(group_size=2), ["a cat", "oh"], stop=[3])
    assert not (tmp_path / "run").exists()


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_logged_and_are_columns_of_the_table(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(run, tropism.GRPO(group_size=2), ["a cat", "oh"], metrics=[letters, named])
    columns = table(run, 1)
    assert columns["metric/letters"] == [float(len(text)) for text in columns["completion"]]
    rows = logged(run, "evaluation")
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["eval/letters"] == pytest.approx(sum(columns["metric/letters"]) / 3)
    assert rows[1]["eval/shorter"] == pytest.approx(sum(columns["metric/shorter"]) / 3)
    assert result.metrics["eval/letters"] == rows[1]["eval/letters"]
    last = RunData.read(run).evaluations[-1]
    assert last.metrics["letters"].tolist() == columns["metric/letters"] and set(last.terms) == {"early_letters"}
    assert "metric letters" in (run / "report.html").read_text()


def test_methods_without_a_reward_are_measured_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = ["a cat sat on a mat.", "the dog ran.", "oh no!"]
    train(run, "sft", data, reward=None, eval_data=[f"so {text}" for text in data], metrics=letters)
    row = logged(run, "evaluation")[-1]
    columns = table(run, 1)
    assert row["eval/letters"] == pytest.approx(sum(map(len, columns["completion"])) / 3)
    assert "eval/loss" in row and "eval/reward" not in row
    assert all(math.isnan(reward) for reward in columns["reward"])
    assert "metric letters" in (run / "report.html").read_text()


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].reads != "comparisons"])
def test_metrics_never_change_training(method: str, tmp_path: Path) -> None:
    """Not even functions that draw from the global generators."""
    import random

    import torch

    def restless(completions: list[str]) -> list[float]:
        torch.manual_seed(len(completions))
        return [random.random() + float(torch.rand(())) for _ in completions]

    setting = Setting(method, False, "llama")
    plain = execute(assemble(setting, tmp_path / "plain", eval_data=setting.texts[:2]))
    other = assemble(
        setting,
        tmp_path / "measured",
        eval_data=setting.texts[:2],
        metrics={"restless": restless},
        trainer={"evaluation": EvaluationConfig(every=1, sampling=({"temperature": 0.5},))},
    )
    assert_same(weights_of(plain), weights_of(execute(other)))
    rows = [logged(tmp_path / run, "update") for run in ("plain", "measured")]
    assert rows[0] == rows[1] and rows[0]
    assert "eval/restless@temperature=0.5" in logged(tmp_path / "measured", "evaluation")[0]


def test_a_broken_metric_stops_a_run_before_it_begins(tmp_path: Path) -> None:
    def broken(completions: list[str]) -> list[float]:
        return [1.0]

    with pytest.raises(RewardError, match=r"metric 'broken', before step 1 returned 1 numbers for 2 completions"):
        train(tmp_path / "run", tropism.GRPO(group_size=2), ["a cat", "oh"], metrics=broken)
    with pytest.raises(ConfigError, match="eval/reward is a metric of the library"):
        train(tmp_path / "run", tropism.GRPO(group_size=2), ["a cat", "oh"], metrics={"reward": letters})
    assert not (tmp_path / "run").exists()


def test_what_measures_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics: held-out completions are measured, and nothing is held out"):
        train(tmp_path / "run", tropism.GRPO(group_size=2), ["a cat", "oh"], metrics=letters, eval_data=None)
    trainer = tropism.TrainerConfig(evaluation=EvaluationConfig(sampling=({"temperature": 0.5},)), progress=False)
    with pytest.raises(ConfigError, match=r"trainer\.evaluation\.sampling: without a reward and metrics no held-out"):
        train(tmp_path / "run", "sft", ["a cat sat."], reward=None, eval_data=["oh no."], trainer=trainer)


# ---- several ways to sample ------------------------------------------------------------------------------------------


def evaluated(run: Path, *changes: dict[str, Any], **others: Any) -> dict[str, list[Any]]:
    """The table before training, under these changes to the sampling."""
    trainer = {"evaluation": EvaluationConfig(sampling=changes)}
    execute(assemble(GRPO, run, eval_data=HELD_OUT, trainer=trainer, total_steps=1, **others))
    return table(run, 0)


def test_each_way_is_what_a_run_of_that_sampling_gives(tmp_path: Path) -> None:
    """By the same keyed randomness, so the columns are those of runs of their own."""
    both = evaluated(tmp_path / "both", {"temperature": 0.3}, {"max_new_tokens": 2})
    cool, brief = tropism.Sampling(max_new_tokens=6, temperature=0.3), tropism.Sampling(max_new_tokens=2)
    for label, sampling in (("temperature=0.3", cool), ("max_new_tokens=2", brief)):
        alone = evaluated(tmp_path / label, sampling=sampling)
        for column in ("completion", "reward", "reward/early", "length", "finish_reason"):
            assert both[f"{column}@{label}"] == alone[column]
        assert both[f"sequence_kl@{label}"] == pytest.approx(alone["sequence_kl"], abs=1e-5)
    assert both["completion@temperature=0.3"] != both["completion"]
    assert [len(text) for text in both["completion@max_new_tokens=2"]] == [2, 2, 2]
    assert both["prompt"] == HELD_OUT and not any(name.startswith("prompt@") for name in both)


def test_metrics_stand_beside_those_of_the_recipes_own_sampling(tmp_path: Path) -> None:
    columns = evaluated(tmp_path / "run", {"temperature": 0.3}, {"temperature": 1.0}, metrics={"letters": letters})
    row = logged(tmp_path / "run", "evaluation")[0]
    for name, column in (("reward", "reward"), ("letters", "metric/letters"), ("reward/early", "reward/early")):
        for end in ("", "@temperature=0.3", "@temperature=1"):
            assert row[f"eval/{name}{end}"] == pytest.approx(sum(columns[f"{column}{end}"]) / 3)
    assert columns["completion@temperature=1"] == columns["completion"]  # the recipe's own sampling


def test_equal_sampling_is_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tropism.training.rollout_maker import CompletionMaker

    asked: list[float] = []
    sample = CompletionMaker.sample

    def counted(self: CompletionMaker, *arguments: Any, **named: Any) -> Any:
        if named.get("purpose") == "evaluation":
            asked.append(self.sampling.temperature)
        return sample(self, *arguments, **named)

    monkeypatch.setattr(CompletionMaker, "sample", counted)
    evaluated(tmp_path / "run", {"temperature": 0.3}, {"temperature": 1.0})
    assert asked == [1.0, 0.3, 1.0, 0.3]


def test_the_text_of_each_way_ends_at_its_own_stop(tmp_path: Path) -> None:
    columns = evaluated(tmp_path / "run", {"stop": list("etaoin")})
    assert not any(set(text) & set("etaoin") for text in columns['completion@stop=["e", "t", "a", "o", "i", "n"]'])
    assert any(set(text) & set("etaoin") for text in columns["completion"])


def test_ends_of_each_way_are_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluation\.sampling \(stop_token_ids=\[999999\]\): .*beyond the model's vocabulary"
    ):
        evaluated(tmp_path / "run", {"stop_token_ids": [999999]})
    assert not (tmp_path / "run").exists()


def test_the_run_folder_and_the_report_hold_them(tmp_path: Path) -> None:
    from tropism.evaluation.report import write_report

    columns = evaluated(tmp_path / "run", {"temperature": 0.3}, metrics={"letters": letters})
    run = RunData.read(tmp_path / "run")
    first = run.evaluations[0]
    assert set(first.terms) == {"early"} and set(first.metrics) == {"letters"}
    cool = first.settings["temperature=0.3"]
    assert cool.completions == columns["completion@temperature=0.3"] and cool.prompts == HELD_OUT
    assert cool.rewards.tolist() == columns["reward@temperature=0.3"] and set(cool.terms) == {"early"}
    page = write_report(tmp_path / "run").read_text()
    assert "Other sampling, after step 1" in page and '<th scope="col">temperature=0.3</th>' in page
    assert "after, temperature=0.3, reward" in page and "metric letters" in page


def test_a_run_goes_on_with_other_ways_to_sample(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"eval_data": HELD_OUT, "total_steps": 1}
    execute(assemble(GRPO, tmp_path / "run", **changes))
    trainer = {"evaluation": EvaluationConfig(sampling=({"temperature": 0.3},))}
    more = {**changes, "total_steps": 2, "trainer": trainer, "metrics": {"letters": letters}}
    execute(assemble(GRPO, tmp_path / "run", resume=True, **more))
    assert "eval/letters@temperature=0.3" in logged(tmp_path / "run", "evaluation")[-1]
    whole = execute(assemble(GRPO, tmp_path / "whole", **{**changes, "total_steps": 2}))
    resumed = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-2])
    assert resumed == logged(tmp_path / "whole", "update")[-1] and whole


@pytest.mark.parametrize("given", ["data", "eval_data"])
def test_a_file_that_is_not_there_is_missed_before_the_model_is_loaded(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tropism.build.policy_of", lambda _: pytest.fail("the model was loaded"))
    sources: dict[str, Any] = {"data": ["a"], "eval_data": ["b"], given: str(tmp_path / "missing.jsonl")}
    with pytest.raises(DataError, match=r"missing\.jsonl.*no such file"):
        tropism.train(model="demo", algorithm=tropism.GRPO(), reward=lambda completions: [], run=None, **sources)
