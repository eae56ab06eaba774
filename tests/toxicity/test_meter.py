"""A whole measurement: what is scored, what is written, and what happens when it is stopped or changed."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tropism
from tiny_classifiers import save_bert
from toxicity.stand_ins import PROMPTS, brief, letter
from tropism import Sampling, ToxicityMeter
from tropism.errors import ConfigError, DataError, RewardError
from tropism.generation import TextPolicy
from tropism.toxicity.files import GrowingRows
from tropism.toxicity.result import ToxicityResult
from tropism.toxicity.scorers import Scorers

SHORT = Sampling(max_new_tokens=5)
SPLIT = [{"prompt": {"text": text, "toxicity": number / 8}} for number, text in enumerate(PROMPTS)]
FILES = {"responses.parquet", "responses.csv", "toxicity.json", "report.html", "plots"}


def meter_of(model: Any, scorers: Any = letter, **changes: Any) -> ToxicityMeter:
    return ToxicityMeter(model, scorers, **{"sampling": SHORT, "samples_per_prompt": 3, "batch_size": 6, **changes})


def test_the_numbers_are_those_of_the_responses(model: Any) -> None:
    result = meter_of(model).measure(SPLIT)
    by_hand = [1.0 if "a" in text else 0.25 for text in result.responses]
    assert result.scores["letter"].ravel().tolist() == by_hand
    groups = [by_hand[begin : begin + 3] for begin in range(0, 24, 3)]
    metrics = result.metrics["letter"]["all"]
    assert metrics.mean_toxicity is not None and metrics.toxicity_probability is not None
    assert metrics.mean_toxicity.mean == pytest.approx(sum(by_hand) / 24)
    assert metrics.toxicity_probability.mean == pytest.approx(sum(1.0 in group for group in groups) / 8)
    toxic = result.metrics["letter"]["toxic"]  # of 0.5 and more: the last four prompts
    assert toxic.prompts == 4 and toxic.expected_max_toxicity is not None
    assert toxic.expected_max_toxicity.mean == pytest.approx(sum(max(group) for group in groups[4:]) / 4)
    assert result.metrics["letter"]["non-toxic"].prompts == 4


def test_pitfall_22_the_response_is_scored_and_not_the_prompt(model: Any, tmp_path: Path) -> None:
    """The original wrote ``responses = prompts``, so that both columns held the prompt's score."""
    seen: list[list[str]] = []

    def noting(completions: list[str]) -> list[float]:
        seen.append(list(completions))
        return [len(text) / 100 for text in completions]

    result = meter_of(model, {"length": noting}).measure(PROMPTS, tmp_path)
    rows = pq.read_table(tmp_path / "responses.parquet").to_pylist()
    assert [row["responses"] for row in rows] == list(result.responses)
    assert not set(result.responses) & set(PROMPTS)
    for row in rows:
        assert row["response_score"] == pytest.approx(len(row["responses"]) / 100)
        assert row["prompt_score"] == pytest.approx(len(row["prompts"]) / 100)
    assert any(row["response_score"] != row["prompt_score"] for row in rows)
    # Each is judged by itself, never behind its prompt: a batch of responses, then their prompts.
    assert [text for batch in seen[::2] for text in batch] == list(result.responses)
    assert [text for batch in seen[1::2] for text in batch] == PROMPTS


def test_prompts_split_by_the_scorer_where_the_data_says_nothing(model: Any) -> None:
    result = meter_of(model).measure(PROMPTS)
    assert result.split_by == "letter"
    assert result.groups["toxic"].tolist() == ["a" in prompt for prompt in PROMPTS]
    assert meter_of(model, score_prompts=False).measure(PROMPTS).groups.keys() == {"all"}
    half = [*SPLIT[:2], *PROMPTS[2:]]
    with pytest.raises(DataError):  # one form of records, not two
        meter_of(model).measure(half)


def test_prompts_of_unknown_toxicity_count_under_all_alone(model: Any) -> None:
    unknown = [{"prompt": {"text": "why", "toxicity": None}}]
    result = meter_of(model).measure([*SPLIT, *unknown])
    assert [metrics.prompts for metrics in result.metrics["letter"].values()] == [9, 4, 4]
    assert any("1 prompts are" in note for note in result.cautions)


def test_what_is_written(model: Any, tmp_path: Path) -> None:
    result = meter_of(model, [letter, brief], threshold={"brief": -20}).measure(SPLIT, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    rows = pq.read_table(tmp_path / "out" / "responses.parquet").to_pylist()
    names = ["prompts", "responses", "prompt_score", "response_score"]  # of the source, in its order
    assert list(rows[0])[:4] == names
    assert {"sample", "finish_reason", "response_score/letter", "response_score/brief"} <= set(rows[0])
    assert [row["sample"] for row in rows] == [0, 1, 2] * 8
    with open(tmp_path / "out" / "responses.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:4] == names
    assert [line["responses"] for line in table] == [row["responses"] for row in rows]
    assert [float(line["response_score"]) for line in table] == [row["response_score"] for row in rows]
    summary = json.loads((tmp_path / "out" / "toxicity.json").read_text())
    metrics = result.metrics["letter"]["all"].mean_toxicity
    assert metrics is not None
    assert summary["metrics"]["letter"]["all"]["mean_toxicity"] == {
        "value": metrics.mean,
        "low": metrics.low,
        "high": metrics.high,
    }
    assert summary["settings"]["sampling"]["engine"] == "tropism" and summary["versions"]["tropism"]
    loaded = ToxicityResult.load(tmp_path / "out")
    assert loaded.metrics == result.metrics and loaded.responses == result.responses
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<details>" in page and "toxicity probability" in page


def test_a_stopped_measurement_goes_on(model: Any, tmp_path: Path) -> None:
    whole = meter_of(model).measure(PROMPTS)
    calls = tmp_path.with_name(f"{tmp_path.name}-calls")  # outside of the function, whose own state makes it another
    calls.write_text("")

    def failing(completions: list[str]) -> list[float]:
        calls.write_text(calls.read_text() + "x")
        if len(calls.read_text()) == 4:  # prompts and responses of a batch are two calls
            raise OSError("no more")
        return letter(completions)

    config = {"use": failing}
    with pytest.raises(RewardError, match=r"could not be scored .*--no-prompt-scores.*no more"):
        meter_of(model, {"letter": config}).measure(PROMPTS, tmp_path)
    assert not (tmp_path / "toxicity.json").exists()
    steps: list[tuple[int, int]] = []
    result = meter_of(model, {"letter": config}).measure(
        PROMPTS, tmp_path, on_progress=lambda *numbers: steps.append(numbers)
    )
    assert steps[0] == (6, 24) and steps[-1] == (24, 24)
    assert result.responses == whole.responses
    assert result.scores["letter"].tolist() == whole.scores["letter"].tolist()
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_a_finished_measurement_is_read_and_another_is_refused(model: Any, tmp_path: Path) -> None:
    first = meter_of(model).measure(PROMPTS, tmp_path)
    before = (tmp_path / "responses.parquet").stat().st_mtime_ns
    again = meter_of(model).measure(PROMPTS, tmp_path)
    assert again.responses == first.responses
    assert (tmp_path / "responses.parquet").stat().st_mtime_ns == before
    other: list[tuple[dict[str, Any], Any, str]] = [
        ({"seed": 1}, PROMPTS, "settings"),
        ({"custom_prompt": "so {prompt}"}, PROMPTS, "settings"),
        ({"sampling": Sampling(max_new_tokens=4)}, PROMPTS, "settings"),
        ({}, PROMPTS[1:], "prompts"),
        ({"scorers": brief, "threshold": -5.0}, PROMPTS, "scorers"),
    ]
    for changes, prompts, what in other:
        with pytest.raises(ConfigError, match=f"another .*{what}"):
            meter_of(model, **changes).measure(prompts, tmp_path)
    meter_of(model, seed=1).measure(PROMPTS, tmp_path, overwrite=True)
    assert ToxicityResult.load(tmp_path).settings["seed"] == 1


def test_another_threshold_is_judged_from_the_same_responses(model: Any, tmp_path: Path) -> None:
    meter_of(model).measure(PROMPTS, tmp_path)
    result = meter_of(model, threshold=0.1).measure(PROMPTS, tmp_path)
    share = result.metrics["letter"]["all"].toxic_share
    assert share is not None and share.mean == 1.0
    assert json.loads((tmp_path / "toxicity.json").read_text())["thresholds"] == {"letter": 0.1}


def test_an_old_measurement_stays_until_the_new_one_is_whole(model: Any, tmp_path: Path) -> None:
    first = meter_of(model).measure(PROMPTS, tmp_path)

    def broken(completions: list[str]) -> list[float]:
        raise OSError("stopped")

    with pytest.raises(RewardError):
        meter_of(model, broken).measure(PROMPTS, tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} >= FILES
    assert ToxicityResult.load(tmp_path).metrics == first.metrics
    assert meter_of(model).measure(PROMPTS, tmp_path).responses == first.responses
    meter_of(model, brief, threshold=-3.0).measure(PROMPTS, tmp_path, overwrite=True)
    assert ToxicityResult.load(tmp_path).scorers == ("brief",)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_no_old_summary_beside_new_data(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while the new files are written, the old responses are gone, and the new ones are kept."""
    meter_of(model).measure(PROMPTS, tmp_path)

    def stopped(*arguments: Any) -> None:
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("tropism.toxicity.files.write_summary", stopped)
        with pytest.raises(OSError, match="stopped"):
            meter_of(model, seed=1).measure(PROMPTS, tmp_path, overwrite=True)
    assert not {"toxicity.json", "responses.parquet"} & {path.name for path in tmp_path.iterdir()}
    steps: list[tuple[int, int]] = []
    meter_of(model, seed=1).measure(PROMPTS, tmp_path, on_progress=lambda *numbers: steps.append(numbers))
    assert steps == [(24, 24)] and ToxicityResult.load(tmp_path).settings["seed"] == 1


def test_other_columns_are_other_prompts(model: Any, tmp_path: Path) -> None:
    """A scorer may read them."""

    def by_column(completions: list[str], bonus: list[float]) -> list[float]:
        return list(bonus)

    def records(bonus: float) -> list[dict[str, Any]]:
        return [{"prompt": text, "bonus": bonus} for text in PROMPTS]

    meter_of(model, by_column).measure(records(0.25), tmp_path)
    with pytest.raises(ConfigError, match="another prompts"):
        meter_of(model, by_column).measure(records(0.5), tmp_path)


def test_a_stored_threshold_stays_unless_another_is_given(model: Any, tmp_path: Path) -> None:
    meter_of(model, brief, threshold=-3.0).measure(PROMPTS, tmp_path)
    before = (tmp_path / "toxicity.json").read_bytes()
    assert meter_of(model, brief).measure(PROMPTS, tmp_path).thresholds == {"brief": -3.0}
    assert (tmp_path / "toxicity.json").read_bytes() == before


def test_kept_rows_are_checked_against_the_threshold_before_going_on(model: Any, tmp_path: Path) -> None:
    steps: list[int] = []

    def stop(done: int, total: int) -> None:
        steps.append(done)
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        meter_of(model, brief, threshold=-3.0).measure(PROMPTS, tmp_path, on_progress=stop)
    with pytest.raises(ConfigError, match="no probability"):
        meter_of(model, brief).measure(PROMPTS, tmp_path, on_progress=lambda done, total: steps.append(done))
    assert steps == [0, 6, 12]  # nothing was sampled


def test_scorers_have_their_own_threshold() -> None:
    for given in ({"threshold": 0.3}, {"allow_code": True}):
        with pytest.raises(ConfigError, match=f"their own {next(iter(given))}"):
            ToxicityMeter("no-such-model", Scorers({"letter": letter}), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["recipe.yaml", "comparison.json"])
def test_a_folder_that_holds_something_else_is_refused(model: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    (tmp_path / "report.html").write_text("another report")
    with pytest.raises(ConfigError, match=f"holds .*{name}.*name another folder"):
        meter_of("no-such-model").measure(PROMPTS, tmp_path)
    assert (tmp_path / "report.html").read_text() == "another report"


def test_a_prompt_that_a_classifier_cannot_read_stops_before_sampling(model: Any, tmp_path: Path) -> None:
    save_bert(tmp_path / "judge", labels={0: "calm", 1: "rude"})
    args = {"model": str(tmp_path / "judge"), "label": "rude", "device": "cpu", "max_length": 6}
    scorers = {"judge": {"use": "classifier", "args": args}}
    prompts = ["short", "a long prompt that has many words"]
    steps: list[int] = []
    short = Sampling(max_new_tokens=2)

    def tell(done: int, total: int) -> None:
        steps.append(done)

    with pytest.raises(DataError, match=r"record 1: the prompt 'a long .* the 6 tokens.*--no-prompt-scores.*cut_comp"):
        meter_of(model, scorers, sampling=short).measure(prompts, on_progress=tell)
    assert steps == []
    meter_of(model, scorers, sampling=short, score_prompts=False).measure(prompts)
    scorers["judge"]["args"] = {**args, "cut_completion": True}
    meter_of(model, scorers, sampling=short).measure(prompts)


def test_growing_rows_of_another_measurement_are_refused(tmp_path: Path) -> None:
    rows = GrowingRows(tmp_path)
    rows.begin({"model": "1"}, total=4, group=2)
    rows.append([{"x": 1}, {"x": 2}])
    again = GrowingRows(tmp_path)
    assert again.begin({"model": "1"}, total=4, group=2) == 2 and again.rows() == [{"x": 1}, {"x": 2}]
    with pytest.raises(ConfigError, match="another model"):
        GrowingRows(tmp_path).begin({"model": "2"}, total=4, group=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        GrowingRows(tmp_path / "file")


def test_scorers_without_an_opinion_and_empty_responses(model: Any) -> None:
    """Neither stops a measurement: the original died of, or skipped, whatever had fewer than four tokens."""

    def picky(completions: list[str]) -> list[float | None]:
        return [None if len(text) < 2 else 0.5 for text in completions]

    result = meter_of(model, picky, sampling=Sampling(max_new_tokens=1)).measure(PROMPTS)
    short = sum(len(text) < 2 for text in result.responses)
    assert short == 24  # a token is one letter, or none
    assert result.metrics["picky"]["all"].unscored == 24
    assert result.metrics["picky"]["all"].mean_toxicity is None
    assert any("no opinion on 24" in note for note in result.cautions)
    assert result.empty == sum(not text.strip() for text in result.responses)


def test_scores_that_are_no_probabilities_need_a_threshold(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'brief' gave -[0-9.]+, which is no probability.*--threshold brief"):
        meter_of(model, brief).measure(PROMPTS, tmp_path)
    result = meter_of(model, brief, threshold=-3.0).measure(PROMPTS, tmp_path)
    mean = result.metrics["brief"]["all"].mean_toxicity
    assert mean is not None and mean.mean < 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"custom_prompt": "no place"}, "{prompt}"),
        ({"scorers": "profanty"}, "profanity"),
        ({"scorers": []}, "no scorer"),
        ({"scorers": [letter, letter]}, "two scorers are called 'letter'"),
        ({"scorers": {"letter": (letter, 2.0)}}, "has a weight"),
        ({"threshold": {"other": 0.5}}, "threshold names 'other'"),
        ({"threshold": math.nan}, "give a number"),
        ({"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"batch_size": 0}, "batch_size"),
        ({"sampling": Sampling(temperature=0.0)}, "the same way every time"),
        ({"sampling": {"num_beams": 3, "max_new_tokens": 4}}, "the same way every time"),
    ],
)
def test_wrong_settings_are_refused_before_a_model_is_loaded(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        meter_of("no-such-model", **changes)


def test_what_cannot_be_asked_of_a_model(model: Any) -> None:
    with pytest.raises(ConfigError, match="target_reward"):
        meter_of(model, target_reward=1.0).measure(PROMPTS)
    with pytest.raises(ConfigError, match="no room"):
        meter_of(model, sampling=Sampling(max_new_tokens=64)).measure(PROMPTS)


def test_pitfall_27_all_of_the_data_is_measured(model: Any) -> None:
    """The original kept the first 85 % of its texts, and said nothing."""
    texts = [f"text number {'abcdefghij'[number % 10]}" for number in range(100)]
    result = meter_of(model, samples_per_prompt=1, batch_size=64).measure(texts)
    assert list(result.prompts) == texts and len(result.responses) == 100
    assert result.settings["prompts"] | {"source": ""} == {
        "source": "",
        "records": 100,
        "after_filter": 100,
        "used": 100,
        "left_out_too_long": 0,
        "prompt_column": None,
        "challenging": False,
        "skip": 0,
        "limit": None,
        "overlong": "error",
        "toxicity_column": None,
    }


def test_pitfall_27_prompts_are_completed_in_batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not one at a time."""
    policy = TextPolicy.load(model)
    sizes: list[int] = []
    generate = policy.sampler.generate

    def counted(policy_: Any, prompts: Any, *others: Any, **named: Any) -> Any:
        sizes.append(len(prompts))
        return generate(policy_, prompts, *others, **named)

    monkeypatch.setattr(policy.sampler, "generate", counted)
    meter_of(policy, samples_per_prompt=1, batch_size=5).measure(PROMPTS)
    assert sizes == [5, 3]


def test_pitfall_27_the_given_scorer_is_the_one_that_is_used(model: Any) -> None:
    """The original took a reward manager and ignored it."""
    result = meter_of(model, {"mine": lambda completions: [0.125 for _ in completions]}).measure(PROMPTS)
    assert set(result.scores["mine"].ravel()) == {0.125}


def test_pitfall_27_a_prompt_needs_no_template(model: Any) -> None:
    """The original's README used a custom_prompt that was never defined."""
    meter = ToxicityMeter(model, letter, sampling=SHORT)
    assert meter.framing.custom_prompt == "{prompt}" and len(meter.measure(PROMPTS).prompts) == 8


def test_pitfall_27_what_is_returned_and_kept(model: Any, tmp_path: Path) -> None:
    """The original announced another type than it returned, threw decoded texts away, and saved nothing at the end."""
    result = meter_of(model).measure(PROMPTS, tmp_path)
    assert isinstance(result, ToxicityResult) and all(isinstance(text, str) for text in result.responses)
    assert len(pq.read_table(tmp_path / "responses.parquet")) == 24


def test_beams_measure(model: Any, tmp_path: Path) -> None:
    beams = {"num_beams": 3, "max_new_tokens": 5}
    result = meter_of(model, sampling=beams, samples_per_prompt=1).measure(PROMPTS, tmp_path)
    assert result.settings["sampling"].items() >= {"engine": "transformers", **beams}.items()
    one = meter_of(model, sampling=beams, samples_per_prompt=1, batch_size=1).measure(PROMPTS)
    assert one.responses == result.responses


def test_public_names() -> None:
    assert tropism.ToxicityMeter is ToxicityMeter
    assert tropism.compare_toxicity.__module__ == "tropism.toxicity.result"
