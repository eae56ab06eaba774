"""``tropism.scoring.score``: what rewards see of records, and completions that a model gives."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conditioned_policies import conditioned_policy
from tiny_models import tiny_model, tiny_tokenizer
from tropism.data.config import DataConfig, Preparation
from tropism.errors import ConfigError, DataError, RewardError
from tropism.generation import TextPolicy
from tropism.models.policy import Policy
from tropism.rollouts.config import Sampling
from tropism.scoring import _Sampled, score
from tropism.targets.config import Mechanism


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def policy() -> TextPolicy:
    return TextPolicy.load((tiny_model("llama"), tiny_tokenizer(add_bos=True)))


def read(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def seen_by(data: Any, **options: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Prompts, completions and the column ``id`` that a reward is given."""
    seen: tuple[list[Any], list[Any], list[Any]] = ([], [], [])

    def reward(prompts: list[Any], completions: list[Any], id: list[Any] | None = None) -> list[float]:
        for part, values in zip(seen, (prompts, completions, id or []), strict=True):
            part.extend(values)
        return [0.0] * len(prompts)

    score(data, reward, out="seen.jsonl", overwrite=True, **options)
    return seen


# ---- texts of the data -----------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "which?"}]
ANSWER = [{"role": "assistant", "content": "that"}]


@pytest.mark.parametrize(
    ("record", "config", "prompt", "completion"),
    [
        ({"text": "one two three"}, {}, "", "one two three"),
        ({"text": "one two three"}, {"first_words": 2}, "one two", " three"),
        ({"prompt": "one", "completion": " two"}, {}, "one", " two"),
        ({"q": "one", "a": " two"}, {"template": "Q: {q}", "completion_column": "a"}, "Q: one", " two"),
        ({"messages": QUESTION + ANSWER}, {}, QUESTION, ANSWER),
        ({"prompt": "which?", "completion": "that"}, {"chat": True}, QUESTION, ANSWER),
    ],
)
def test_the_reward_sees_the_completion_given_its_prompt(
    record: dict[str, Any], config: dict[str, Any], prompt: Any, completion: Any
) -> None:
    seen = seen_by([{**record, "id": 7}], config=DataConfig(path="unused", **config))
    assert seen == ([prompt], [completion], [7])
    assert read("seen.jsonl") == [{**record, "id": 7, "reward": 0}]


def test_texts_with_too_few_words_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(path="unused", first_words=1, limit=2)
    assert seen_by(["a", "a b", "c", "c d", "e f"], config=config)[1] == [" b", " d"]
    assert "left out 2 texts with too few words" in caplog.text
    with pytest.raises(DataError, match="none of the 1 texts has more words than first_words"):
        seen_by(["a"], config=config)


def test_parquet_keeps_what_json_cannot_hold() -> None:
    day = datetime.date(2024, 5, 1)
    pq.write_table(pa.table({"text": ["a", "b"], "day": [day, None]}), "data.parquet")
    score("data.parquet", lambda completions: [0.1, 0.2], out="out.parquet")
    assert pq.read_table("out.parquet").to_pylist() == [
        {"text": "a", "day": day, "reward": 0.1},
        {"text": "b", "day": None, "reward": 0.2},
    ]
    with pytest.raises(DataError, match=r"record 0: the column 'day' cannot be written as JSON .*write a .parquet"):
        score("data.parquet", lambda completions: [0.1, 0.2], out="out.jsonl")
    assert not Path("out.jsonl.state.json").exists()


# ---- completions of a model ------------------------------------------------------------------------------------------

PROMPTS = [{"prompt": text, "id": index} for index, text in enumerate(["a cat", "the dog", "oh"])]
SHORT = Sampling(max_new_tokens=5)


def test_completions_of_a_model_are_those_of_generate(policy: TextPolicy) -> None:
    score(PROMPTS, lambda completions, id: id, out="out.jsonl", model=policy, n=2, sampling=SHORT, seed=3)
    rows = read()
    completions = policy.generate(["a cat", "the dog", "oh"], n=2, seed=3, max_new_tokens=5)
    assert [row["completion"] for row in rows] == completions and len(set(completions)) > 3
    assert [(row["prompt"], row["id"], row["reward"]) for row in rows[::2]] == [
        ("a cat", 0, 0),
        ("the dog", 1, 1),
        ("oh", 2, 2),
    ]
    assert {row["finish_reason"] for row in rows} <= {"eos", "length"}
    assert list(rows[0]) == ["id", "prompt", "completion", "finish_reason", "reward"]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_samples_depend_neither_on_the_batch_nor_on_a_stop(policy: TextPolicy, batch_size: int) -> None:
    def counts(prompts: list[str], completion_ids: list[list[int]]) -> list[float]:
        if "oh" in prompts and Path("stop").exists():
            raise ValueError("told to stop")
        return [float(len(ids)) for ids in completion_ids]

    def sampled(out: str, batch_size: int) -> bytes:
        score(PROMPTS, counts, out=out, model=policy, n=2, sampling=SHORT, batch_size=batch_size)
        return Path(out).read_bytes()

    whole = sampled("whole.jsonl", 64)
    Path("stop").touch()
    with pytest.raises(RewardError, match="told to stop"):
        sampled("out.jsonl", 2)
    Path("stop").unlink()
    lines = Path("out.jsonl.partial").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    Path("out.jsonl.partial").write_bytes(b"".join(lines[:3]))  # a prompt with one of its two completions
    assert sampled("out.jsonl", batch_size) == whole


def test_other_sampling_or_another_model_does_not_go_on(policy: TextPolicy) -> None:
    def stops(prompts: list[str]) -> list[float]:
        if "oh" in prompts:
            raise ValueError("told to stop")
        return [0.0 for _ in prompts]

    options: dict[str, Any] = {"out": "out.jsonl", "model": policy, "n": 1, "sampling": SHORT, "batch_size": 1}
    with pytest.raises(RewardError, match="told to stop"):
        score(PROMPTS, stops, **options)
    other = (tiny_model("llama", seed=1), tiny_tokenizer(add_bos=True))
    for change in ({"seed": 1}, {"sampling": Sampling(max_new_tokens=6)}, {"model": other}):
        with pytest.raises(ConfigError, match="begun with another data"):
            score(PROMPTS, stops, **{**options, **change})


def test_a_column_of_the_data_may_not_become_a_completion(policy: TextPolicy) -> None:
    with pytest.raises(ConfigError, match="the column 'completion' cannot be added: the data has such a column"):
        score([{"prompt": "a", "completion": "b"}], len, out="out.jsonl", model=policy)
    prepared = DataConfig(path="unused", prepare=Preparation(length=3))
    with pytest.raises(ConfigError, match="prepare cuts prompts by tokens of a model; give the model to sample from"):
        score([{"prompt": "a", "completion": "b"}], len, out="out.jsonl", config=prepared)
    with pytest.raises(ConfigError, match="a model brings its own tokenizer"):
        score(["a"], "vader", out="out.jsonl", model=policy, tokenizer=policy.tokenizer)
    with pytest.raises(ConfigError, match="n must be at least 1"):
        score(["a"], "vader", out="out.jsonl", model=policy, n=0)


def test_progress_counts_records() -> None:
    told: list[tuple[int, int]] = []
    score(
        list("abcdefg"),
        lambda completions: [0.0] * len(completions),
        out="out.jsonl",
        batch_size=3,
        on_progress=(lambda done, total: told.append((done, total))),
    )
    assert told == [(0, 7), (3, 7), (6, 7), (7, 7)]


# ---- models that are asked for a reward ------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["linear", "text"])
def test_a_conditioned_model_is_asked_for_the_target(mechanism: Mechanism) -> None:
    asked = conditioned_policy("llama", mechanism)
    told: dict[float, list[str]] = {}
    for target in (0.0, 1.0):
        seen: list[list[str]] = []

        def note(prompts: list[str], seen: list[list[str]] = seen) -> list[float]:
            seen.append(prompts)
            return [0.0] * len(prompts)

        out = f"{target}.jsonl"
        score(PROMPTS, note, out=out, model=asked, n=2, sampling=SHORT, seed=3, target_reward=target)
        told[target] = [row["completion"] for row in read(out)]
        texts = [str(row["prompt"]) for row in PROMPTS]
        assert told[target] == asked.generate(texts, n=2, seed=3, max_new_tokens=5, target_reward=target)
        assert [text for batch in seen for text in batch] == [text for text in texts for _ in range(2)]
    left_open = asked.generate([str(row["prompt"]) for row in PROMPTS], n=2, seed=3, max_new_tokens=5)
    assert left_open not in told.values()


def test_whoever_is_to_be_asked_must_be_told_for_what(policy: TextPolicy) -> None:
    asked = conditioned_policy()
    assert asked.conditioner is not None
    with pytest.raises(ConfigError, match=r"asked for a reward \(reward\); say for which: --target-reward reward=NUMB"):
        score(PROMPTS, len, out="out.jsonl", model=asked, sampling=SHORT)
    with pytest.raises(ConfigError, match="not trained to be asked for a reward"):
        score(PROMPTS, len, out="out.jsonl", model=policy, sampling=SHORT, target_reward=1.0)
    with pytest.raises(ConfigError, match="target_reward is what a model is asked for"):
        score(PROMPTS, len, out="out.jsonl", target_reward=1.0)
    with pytest.raises(ConfigError, match="knows no reward 'x'"):
        score(PROMPTS, len, out="out.jsonl", model=asked, sampling=SHORT, target_reward={"x": 1.0})
    asked.conditioner.default = 1.0  # as Quark sets it
    score(PROMPTS, "vader", out="default.jsonl", model=asked, n=1, sampling=SHORT)
    score(PROMPTS, "vader", out="asked.jsonl", model=asked, n=1, sampling=SHORT, target_reward=1.0)
    assert Path("default.jsonl").read_bytes() == Path("asked.jsonl").read_bytes()


def test_another_target_does_not_go_on_with_a_file() -> None:
    asked = conditioned_policy("llama", "token")
    options: dict[str, Any] = {"sampling": SHORT, "n": 1, "seed": 0}
    low, high, same = (
        _Sampled(PROMPTS, None, asked, **options, target_reward=target).identity for target in (0.0, 1.0, 0.0)
    )
    assert low == same != high


def test_what_asks_takes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = conditioned_policy(targets=("one", "two"))
    monkeypatch.setattr(Policy, "context_length", 5 + 2 + 5)
    fits = _Sampled(["a cat"], None, asked, sampling=SHORT, n=1, seed=0, target_reward={"one": 1.0})
    assert [len(prompt.ids) for prompt in fits.prompts] == [5] and [len(p.ids) for p in fits.asked] == [7]
    monkeypatch.setattr(Policy, "context_length", 5 + 1 + 5)
    with pytest.raises(DataError, match="at most 4 fit"):
        _Sampled(["a cat"], None, asked, sampling=SHORT, n=1, seed=0, target_reward={"one": 1.0})
