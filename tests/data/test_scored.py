"""Scored texts against ids written out by hand, and every refusal before training."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tropism.data.config import DataConfig
from tropism.data.demonstrations import make_demonstrations
from tropism.data.scored import make_scored, refuse_equal
from tropism.errors import DataError
from tropism.types import ScoredText

MakeTokenizer = Callable[..., Any]
Ids = Callable[[str], tuple[int, ...]]

BOS = {"bos": "<s>", "adds": "<s> $A"}
QUESTION = [{"role": "user", "content": "I saw it"}]
ANSWER = [{"role": "assistant", "content": "good film"}]


def settings(**changes: Any) -> DataConfig:
    return DataConfig(path="unused", **changes)


def scored(records: Any, tokenizer: Any, config: DataConfig | None = None, **changes: Any) -> list[ScoredText]:
    return make_scored(records, tokenizer, config, **{"targets": ("reward",), "max_length": None, **changes})


def two(**columns: Any) -> list[dict[str, Any]]:
    """A record twice, with rewards that differ."""
    return [{**columns, "reward": 0.25}, {**columns, "reward": -1}]


def parts(text: ScoredText) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return text.prompt_ids, text.completion_ids


# ---- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text", "prompt", "completion"),
    [
        (BOS, "the film", "<s>", "the film </s>"),
        ({}, "the film", "", "the film </s>"),  # the first token is learned: a slot stands before it
        ({"pad": "</s>"}, "the film", "", "the film </s>"),  # the eos is learned where it is the pad token
        ({"bos": "</s>", "adds": "</s> $A"}, "the film", "</s>", "the film </s>"),  # bos == eos
        ({}, "the film </s>", "", "the film </s>"),  # an eos that is spelled out is not doubled
        ({}, "", "", "</s>"),
    ],
)
def test_a_plain_text_is_learned_from_its_first_token_to_the_eos(
    make_tokenizer: MakeTokenizer, ids_of: Ids, options: dict[str, Any], text: str, prompt: str, completion: str
) -> None:
    for one in scored(two(text=text), make_tokenizer(**options)):
        assert parts(one) == (ids_of(prompt), ids_of(completion))


@pytest.mark.parametrize(
    ("record", "config", "prompt", "completion"),
    [
        ({"prompt": "I saw", "completion": " the film"}, None, "<s> I saw", "the film </s>"),
        ({"prompt": "", "completion": "the film"}, None, "<s>", "the film </s>"),
        ({"text": "the film was good"}, settings(first_words=2), "<s> the film", "was good </s>"),
        ({"q": "I saw", "a": " it"}, settings(template="{q}", completion_column="a"), "<s> I saw", "it </s>"),
    ],
)
def test_records_are_read_as_demonstrations_are(
    make_tokenizer: MakeTokenizer,
    ids_of: Ids,
    record: dict[str, Any],
    config: DataConfig | None,
    prompt: str,
    completion: str,
) -> None:
    tokenizer = make_tokenizer(**BOS)
    texts = scored(two(**record), tokenizer, config)
    assert [parts(text) for text in texts] == [(ids_of(prompt), ids_of(completion))] * 2
    assert [text.rewards for text in texts] == [(0.25,), (-1.0,)]
    (demonstration,) = make_demonstrations([record], tokenizer, config, max_length=None)
    assert (demonstration.prompt_ids, demonstration.completion_ids) == parts(texts[0])


def test_of_a_chat_the_last_answer_is_learned(chat_tokenizer: Any, ids_of: Ids) -> None:
    wanted = (ids_of("<|im_start|> user I saw it <|im_end|> <|im_start|> assistant"), ids_of("good film <|im_end|>"))
    for columns in ({"messages": QUESTION + ANSWER}, {"prompt": QUESTION, "completion": ANSWER}):
        assert parts(scored(two(**columns), chat_tokenizer)[0]) == wanted


def test_a_completion_that_was_cut_while_sampled_has_no_eos_to_learn(
    make_tokenizer: MakeTokenizer, ids_of: Ids
) -> None:
    records = [
        {"prompt": "I saw", "completion": " it", "finish_reason": reason, "reward": index}
        for index, reason in enumerate(("eos", "length", "stop"))
    ]
    assert [text.completion_ids for text in scored(records, make_tokenizer())] == [
        ids_of("it </s>"),
        ids_of("it"),
        ids_of("it </s>"),
    ]


# ---- lengths -------------------------------------------------------------------------------------------------------


def test_what_is_too_long_loses_its_end_and_full_prompts_are_left_out(
    make_tokenizer: MakeTokenizer, ids_of: Ids, caplog: pytest.LogCaptureFixture
) -> None:
    records = [
        {"prompt": "I saw", "completion": " the film", "reward": 1},
        {"prompt": "I saw the film", "completion": " it", "reward": None},  # left out, so its reward is not looked at
        {"prompt": "", "completion": "the film was good", "reward": 2},
    ]
    with caplog.at_level(logging.WARNING):
        texts = scored(records, make_tokenizer(), max_length=3)
    assert [parts(text) for text in texts] == [(ids_of("I saw"), ids_of("the")), ((), ids_of("the film was"))]
    assert "left out 1 scored texts whose prompt alone fills max_length" in caplog.text
    with pytest.raises(DataError, match=r"none of the 1 records is left: .* prompts of 1 fill max_length \(2\) alone"):
        scored(records[:1], make_tokenizer(), max_length=2)


def test_the_limit_counts_texts_and_skips_short_ones(make_tokenizer: MakeTokenizer) -> None:
    records = [{"text": text, "reward": index} for index, text in enumerate(["the", "the film was", "it was", "I saw"])]
    texts = scored(records, make_tokenizer(), settings(first_words=1, limit=2))
    assert [text.rewards for text in texts] == [(1.0,), (2.0,)]


# ---- rewards -------------------------------------------------------------------------------------------------------


def test_rewards_stand_in_the_order_of_the_targets(make_tokenizer: MakeTokenizer) -> None:
    records = [
        {"text": "the", "length": 7, "warmth": {"vader": 0.5}},
        {"text": "it", "length": np.int64(3), "warmth": {"vader": Decimal("-0.25")}},
    ]
    texts = scored(records, make_tokenizer(), targets=("warmth.vader", "length"))
    assert [text.rewards for text in texts] == [(0.5, 7.0), (-0.25, 3.0)]
    assert {type(reward) for text in texts for reward in text.rewards} == {float}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"'reward' is null.*--drop-unscored"),
        ("0.5", r"'reward' holds the text '0.5'; store the reward as a number, without quotes"),
        ("good", r"'reward' holds the text 'good'"),
        (True, r"'reward' is bool True, not a number"),
        (np.bool_(True), r"'reward' is bool.* not a number"),
        ([0.5], r"'reward' is list \[0.5\], not a number"),
        (math.nan, r"'reward' is NaN"),
        (Decimal("sNaN"), r"'reward' is NaN"),
        (math.inf, r"'reward' is inf, too large"),
        (-math.inf, r"'reward' is -inf, too large"),
        (1e39, r"'reward' is 1e\+39, too large"),
        (10**400, r"'reward' is 1000.* too large"),
    ],
)
def test_what_is_no_reward_is_refused_by_record(make_tokenizer: MakeTokenizer, value: Any, message: str) -> None:
    records = [{"text": "the", "reward": 1.0}, {"text": "it", "reward": value}]
    with pytest.raises(DataError, match=rf"^record 1: the column {message}"):
        scored(records, make_tokenizer())


def test_a_missing_column_names_the_closest_and_where_it_is_missing(
    make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in two(text="the")))
    with pytest.raises(
        DataError, match=r"data.jsonl:1: there is no column 'rewad' .*did you mean 'reward'\? there are: text, reward\."
    ):
        scored(DataConfig(path=str(path)), make_tokenizer(), targets=("rewad",))
    with pytest.raises(DataError, match=r"no column 'zzz' with a reward; there are: text, reward\. .*tropism score"):
        scored(DataConfig(path=str(path)), make_tokenizer(), targets=("reward", "zzz"))
    with pytest.raises(DataError, match=r"no column 'reward.x'; there are"):
        scored(DataConfig(path=str(path)), make_tokenizer(), targets=("reward.x",))


def test_a_table_holds_text_and_says_so(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,reward\nthe film,0.5\n")
    with pytest.raises(DataError, match=r"data.csv:2: .* holds the text '0.5'.* use .jsonl or .parquet"):
        scored(str(tmp_path / "data.csv"), make_tokenizer())


def test_equal_rewards_leave_nothing_to_ask_for(make_tokenizer: MakeTokenizer) -> None:
    records = [{"text": "the", "reward": 0.5, "length": 1}, {"text": "it", "reward": 0.5, "length": 2}]
    texts = scored(records, make_tokenizer(), targets=("length", "reward"))
    with pytest.raises(DataError, match=r"all 2 rewards of 'reward' are 0.5, so there is nothing to ask for"):
        refuse_equal(texts, ("length", "reward"))
    refuse_equal(scored(records, make_tokenizer(), targets=("length",)), ("length",))
