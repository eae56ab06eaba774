"""Pairs of completions: which records make them, their token ids, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from tiny_models import BOS_ID, EOS_ID, tiny_tokenizer
from tropism.data.config import DataConfig
from tropism.data.pairs import make_pairs, read_pairs
from tropism.errors import ConfigError, DataError

TOKENIZER = tiny_tokenizer(chat=True)


def ids(text: str) -> tuple[int, ...]:
    """One id per character."""
    return tuple(TOKENIZER.convert_tokens_to_ids(list(text)))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pairs(*records: Any, limit: int | None = None, **settings: Any) -> list[Any]:
    config = DataConfig(path="pairs.jsonl", **settings) if settings else None
    return make_pairs(list(records), TOKENIZER, config, max_length=limit)


def test_text_is_encoded_with_one_eos_at_either_end() -> None:
    (pair,) = pairs({"prompt": "so", "chosen": " it is", "rejected": " no"})
    assert pair.prompt_ids == ids("so")
    assert pair.chosen_ids == (*ids(" it is"), EOS_ID) and pair.rejected_ids == (*ids(" no"), EOS_ID)
    assert pair.weight == 1.0


def test_an_eos_that_is_written_out_is_not_doubled() -> None:
    (pair,) = pairs({"prompt": "so", "chosen": " it<eos>", "rejected": " no"})
    assert pair.chosen_ids == (*ids(" it"), EOS_ID)


def test_what_chats_have_in_common_is_the_prompt() -> None:
    begin = [user("is it?"), assistant("yes"), user("so?")]
    (pair,) = pairs({"chosen": [*begin, assistant("so.")], "rejected": [*begin, assistant("no.")]})
    marks = TOKENIZER.convert_tokens_to_ids(["<user>", "<assistant>"])
    prompt = (marks[0], *ids("is it?"), marks[1], *ids("yes"), EOS_ID, marks[0], *ids("so?"), marks[1])
    assert pair.prompt_ids == prompt
    assert pair.chosen_ids == (*ids("so."), EOS_ID) and pair.rejected_ids == (*ids("no."), EOS_ID)


def test_a_prompt_as_chat_and_text_sent_as_chat_are_the_same() -> None:
    (chat,) = pairs({"prompt": [user("so?")], "chosen": [assistant("so.")], "rejected": [assistant("no.")]})
    (sent,) = pairs({"prompt": "so?", "chosen": "so.", "rejected": "no."}, chat=True)
    assert chat == sent


def test_the_chosen_one_of_several_is_paired_with_each_of_the_others() -> None:
    found = pairs({"prompt": "a", "completions": [" b", " c", " d"], "choice": 1})
    assert [(p.chosen_ids[:-1], p.rejected_ids[:-1]) for p in found] == [
        (ids(" c"), ids(" b")),
        (ids(" c"), ids(" d")),
    ]


def test_ties_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tropism"):
        found = pairs(
            {"prompt": "a", "chosen": " b", "rejected": " c", "tie": True},
            {"prompt": "a", "chosen": " b", "rejected": " c", "tie": False},
        )
        found += pairs(
            {"prompt": "a", "completions": [" b", " c"], "choice": "tie"},
            {"prompt": "b", "completions": [" b", " c"], "choice": 0},
        )
    assert len(found) == 2 and caplog.text.count("left out 1 ties") == 2
    with pytest.raises(DataError, match="no pair is left of 1 records: 1 are ties"):
        pairs({"prompt": "a", "chosen": " b", "rejected": " c", "tie": True})


def test_weights_of_records_count_and_margins_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tropism"):
        (pair,) = pairs({"prompt": "a", "chosen": " b", "rejected": " c", "weight": 0.5, "margin": 1})
    assert pair.weight == 0.5 and "which are not read: margin" in caplog.text


def test_an_empty_prompt_is_the_bos() -> None:
    (pair,) = pairs({"chosen": "it is", "rejected": "is it"})
    assert pair.prompt_ids == (BOS_ID,)
    assert pair.chosen_ids == (*ids("it is"), EOS_ID) and pair.rejected_ids == (*ids("is it"), EOS_ID)
    with pytest.raises(DataError, match=r"^record 0: the prompt is empty and the tokenizer has no BOS"):
        make_pairs([{"chosen": "it", "rejected": "is"}], tiny_tokenizer(bos=False), max_length=None)


def test_a_bos_that_the_tokenizer_adds_stands_there_once() -> None:
    record = {"prompt": "so", "chosen": " it", "rejected": " no"}
    (pair,) = make_pairs([record], tiny_tokenizer(add_bos=True), max_length=None)
    assert pair.prompt_ids == (BOS_ID, *ids("so")) and pair.chosen_ids == (*ids(" it"), EOS_ID)


def test_long_pairs_lose_their_end_and_those_with_nothing_to_tell_apart_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="tropism"):
        found = pairs(
            {"prompt": "abcde", "chosen": " b", "rejected": " c"},  # the prompt fills it
            {"prompt": "abcd", "chosen": " b", "rejected": " c"},  # both are a space within it
            {"prompt": "ab", "chosen": " bcd", "rejected": "c"},
            limit=5,
        )
    (pair,) = found
    assert (pair.chosen_ids, pair.rejected_ids) == (ids(" bc"), (*ids("c"), EOS_ID))
    assert "left out 1 pairs whose prompt alone" in caplog.text
    assert "left out 1 pairs whose completions are the same within max_length" in caplog.text
    with pytest.raises(DataError, match=r"no pair is left of 1 records: .*prompts of 1 fill"):
        pairs({"prompt": "abcde", "chosen": " b", "rejected": " c"}, limit=5)


def test_wrong_records_are_all_listed_by_place(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    records = [
        {"prompt": "a", "chosen": " b", "rejected": " c"},
        {"prompt": "a", "chosen": " b", "rejected": " b"},
        {"prompt": "a", "chosen": " b", "rejected": ""},
        {"prompt": "a", "completion": " b", "rating": 3},
        {"prompt": "a", "completions": [" b", " c", " b"], "choice": 0},
        {"prompt": "a", "text": " b"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError) as caught:
        make_pairs(path, TOKENIZER, max_length=None)
    first, *lines = str(caught.value).splitlines()
    assert first == "5 of 6 records cannot be used:"
    for number, (line, reason) in enumerate(
        zip(
            lines,
            (
                "the chosen completion and the rejected one are the same",
                "rejected is empty",
                "do not say which completion was preferred",
                "the chosen completion and completion 2 are the same",
                "no judgement in the columns",
            ),
            strict=True,
        ),
        start=2,
    ):
        assert f"pairs.jsonl:{number}" in line or f"line {number}" in line
        assert reason in line


def test_completions_that_are_messages_need_a_prompt() -> None:
    with pytest.raises(DataError, match="messages without a prompt"):
        pairs({"chosen": [assistant("so.")], "rejected": [assistant("no.")]})


@pytest.mark.parametrize(
    ("setting", "value"), [("first_words", 2), ("completion_column", "chosen"), ("prompt_column", "text")]
)
def test_settings_that_mean_nothing_are_refused(setting: str, value: Any) -> None:
    with pytest.raises((ConfigError, DataError), match=setting if setting != "prompt_column" else "text"):
        pairs({"prompt": "a", "chosen": " b", "rejected": " c"}, **{setting: value})


def test_the_record_of_a_pair_holds_its_prompt() -> None:
    """However it was found, so that prompts to sample from are the same."""
    begin = [user("is it?")]
    records = [{"chosen": [*begin, assistant("so.")], "rejected": [*begin, assistant("no.")]}]
    ((record, _),) = read_pairs(records, TOKENIZER, max_length=None)
    assert record.columns["prompt"] == begin


def test_limit_counts_records() -> None:
    records = [{"prompt": "a", "chosen": f" {letter}", "rejected": " z"} for letter in "abc"]
    assert len(pairs(*records)) == 3
    config = DataConfig(path="pairs.jsonl", limit=2)
    assert len(make_pairs(records, TOKENIZER, config, max_length=None)) == 2


def test_both_completions_begin_where_the_first_departs_from_the_prompt() -> None:
    """A tokenizer that joins letters to words, in which one of the completions grows into the prompt's last word."""
    core = Tokenizer(WordLevel({word: place for place, word in enumerate(("?", "so", "song", "ng", "!", "$"))}, "?"))
    core.pre_tokenizer = Split(Regex("song|so|ng|!|\\$"), "isolated")
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", eos_token="$")
    record = {"prompt": "so", "chosen": "!", "rejected": "ng"}
    (pair,) = make_pairs([{**record, "prompt": "!so"}], words, max_length=None)
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ((4,), (1, 4, 5), (2, 5))
    with pytest.raises(DataError, match="no BOS to begin with"):  # nothing is left of the prompt
        make_pairs([record], words, max_length=None)
