"""Episodes against ids and rewards written out by hand, and every refusal before training."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from tiny_models import BOS_ID, EOS_ID, tiny_tokenizer
from tropism.data.config import DataConfig
from tropism.data.demonstrations import make_demonstrations
from tropism.data.episodes import ReturnScale, first_turns, read_episodes
from tropism.data.readers import locate_records
from tropism.episodes import Episode, collate_episodes
from tropism.errors import DataError

TOKENIZER = tiny_tokenizer(add_bos=True, chat=True)
USER, ASSISTANT = 3, 4


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def read(
    records: Any, config: DataConfig | None = None, *, tokenizer: Any = TOKENIZER, **changes: Any
) -> list[Episode]:
    found = read_episodes(records, tokenizer, config, **{"target": "reward", "max_length": None, **changes})
    return [episode for _, episode in found]


def one(record: dict[str, Any], **changes: Any) -> Episode:
    (episode,) = read([record], **changes)
    return episode


def actions(episode: Episode) -> list[int]:
    return [token for token, action in zip(episode.completion_ids, episode.loss_mask, strict=True) if action]


# Texts ----------------------------------------------------------------------------------------------------------------


def test_a_text_alone_is_an_output_after_the_bos() -> None:
    episode = one({"text": "no", "reward": 0.5})
    assert episode.prompt_ids == (BOS_ID,)
    assert episode.completion_ids == (*ids("no"), EOS_ID)
    assert episode.loss_mask == (True, True, True)
    assert episode.rewards == (0.0, 0.0, 0.5)


def test_a_prompt_with_a_completion() -> None:
    episode = one({"prompt": "a", "completion": "cat", "reward": -1})
    assert episode.prompt_ids == (BOS_ID, *ids("a"))
    assert episode.completion_ids == (*ids("cat"), EOS_ID)
    assert episode.rewards == (0.0, 0.0, 0.0, -1.0)


def test_ids_of_one_output_are_those_of_demonstrations() -> None:
    records: list[dict[str, Any]] = [
        {"prompt": "a", "completion": " cat.", "reward": 1.0},
        {"prompt": "", "completion": "oh", "reward": 1.0},
    ]
    learned = make_demonstrations(records, TOKENIZER, max_length=None)
    for episode, demonstration in zip(read(records), learned, strict=True):
        assert episode.prompt_ids == demonstration.prompt_ids
        assert episode.completion_ids == demonstration.completion_ids


def test_turns_alternate_between_what_is_read_and_what_is_learned() -> None:
    episode = one({"turns": ["a", "b!", "c?", "d"], "reward": 2})
    assert episode.prompt_ids == (BOS_ID, *ids("a"))
    assert episode.completion_ids == (*ids("b!c?d"), EOS_ID)
    assert episode.loss_mask == (True, True, False, False, True, True)
    assert episode.rewards == (0.0,) * 5 + (2.0,)


def test_empty_turns() -> None:
    """The first prompt may be empty where there is a BOS, one between two outputs always, and the last output."""
    episode = one({"turns": ["", "a", "", ""], "reward": 1})
    assert episode.prompt_ids == (BOS_ID,)
    assert episode.completion_ids == (*ids("a"), EOS_ID)
    with pytest.raises(DataError, match="record 0: output 0 of turns is empty"):
        one({"turns": ["a", "", "b", "c"], "reward": 1})
    with pytest.raises(DataError, match="the first prompt is empty, and the tokenizer has no BOS"):
        one({"turns": ["", "a"], "reward": 1}, tokenizer=tiny_tokenizer(bos=False))


def test_an_eos_that_is_spelled_out_is_not_doubled() -> None:
    assert one({"turns": ["a", "b<eos>"], "reward": 1}).completion_ids == (*ids("b"), EOS_ID)


@pytest.mark.parametrize("record", [{"turns": ["a", "bc"]}, {"prompt": "a", "completion": "bc"}])
def test_what_was_cut_while_it_was_sampled_has_no_eos(record: dict[str, Any]) -> None:
    episode = one({**record, "reward": 1, "finish_reason": "length"})
    assert episode.completion_ids == ids("bc")
    assert episode.rewards == (0.0, 1.0)


CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "bc"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]


@pytest.mark.parametrize("reward", [1.5, [0.5, 1.0]])
def test_every_answer_of_a_chat_is_an_output(reward: Any) -> None:
    episode = one({"messages": CHAT, "reward": reward})
    assert episode.prompt_ids == (USER, *ids("a"), ASSISTANT)
    assert episode.completion_ids == (*ids("bc"), EOS_ID, USER, *ids("d"), ASSISTANT, *ids("e"), EOS_ID)
    assert episode.loss_mask == (True, True, True, False, False, False, True, True)
    first = 0.0 if reward == 1.5 else 0.5
    assert episode.rewards == (0.0, 0.0, first, 0.0, 0.0, 0.0, 0.0, 1.5 - first)


def test_what_a_template_writes_behind_an_answer_is_read_only(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<eos> ")
    episode = one({"messages": CHAT, "reward": 1}, tokenizer=tokenizer)
    assert actions(episode) == [*ids("bc"), EOS_ID, *ids("e"), EOS_ID]
    assert episode.completion_ids[-1] == EOS_ID and episode.rewards[-1] == 1.0
    assert "cut" not in caplog.text


def test_a_system_prompt_is_read() -> None:
    config = DataConfig(path="unused", system_prompt="s")
    assert one({"messages": CHAT, "reward": 1}, config=config).prompt_ids[:1] == (ASSISTANT,)  # as the template has it


def test_chats_that_have_no_answer_are_refused() -> None:
    for chat in (CHAT[:3], CHAT[1:]):
        with pytest.raises(DataError, match="must end with the assistant's answer, and begin with something else"):
            one({"messages": chat, "reward": 1})
    with pytest.raises(DataError, match=r"record 1: .*is text, but other records have chats"):
        read([{"messages": CHAT, "reward": 1}, {"messages": "a", "reward": 1}])


def test_a_template_that_changes_what_came_before_is_refused() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="writes the messages before answer 1 otherwise"):
        one({"messages": CHAT, "reward": 1}, tokenizer=tokenizer)


# Rewards --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewards", [[1, 2, 3, 4], [1, 2, 3]])
def test_a_list_of_a_text_with_one_output_is_one_per_token(rewards: list[float]) -> None:
    """The eos may be left out, and is then paid nothing."""
    expected = tuple(float(r) for r in rewards) + (0.0,) * (4 - len(rewards))
    assert one({"prompt": "a", "completion": "cat", "reward": rewards}).rewards == expected
    assert one({"text": "cat", "reward": rewards}).rewards == expected


def test_a_list_of_turns_is_one_per_output_or_one_list_per_output() -> None:
    turns = ["a", "bc", "d", "e"]
    assert one({"turns": turns, "reward": [1, 2]}).rewards == (0.0, 1.0, 0.0, 0.0, 2.0)
    assert one({"turns": turns, "reward": [[1, 2], [3, 4]]}).rewards == (1.0, 2.0, 0.0, 3.0, 4.0)
    assert one({"turns": turns, "reward": [7, [3]]}).rewards == (0.0, 7.0, 0.0, 3.0, 0.0)
    assert one({"turns": ["a", "bc"], "reward": [5]}).rewards == (0.0, 0.0, 5.0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "cat", "reward": [1, 2]}, r"2 rewards for an output of 4 tokens \(or 3, without its eos\)"),
        ({"text": "cat", "reward": [1, 2, 3, 4, 5]}, "5 rewards for an output of 4 tokens"),
        ({"text": "cat", "reward": []}, "0 rewards for an output of 4 tokens"),
        (
            {"turns": ["a", "b", "c", "d"], "reward": [1]},
            "has 1 rewards, and the text has 2 outputs; give one for each",
        ),
        (
            {"turns": ["a", "b", "c", "d"], "reward": [[1, 2], 3]},
            "output 0 has 2 rewards for an output of 1 tokens; give",
        ),
        ({"text": "cat", "reward": [1, None, 2]}, "token 1 is NoneType None, not a number"),
        ({"text": "cat", "reward": [1, math.nan, 2]}, "token 1 is NaN"),
        ({"turns": ["a", "b"], "reward": [True]}, "output 0 is bool True, not a number"),
        ({"text": "cat", "reward": math.nan}, "the column 'reward' is NaN"),
        ({"text": "cat", "reward": math.inf}, "is inf, too large"),
        ({"text": "cat", "reward": "1"}, "holds the text '1'"),
        ({"text": "cat", "reward": None}, "the column 'reward' is null"),
        ({"text": "cat", "rewards": 1}, "no column 'reward' .*did you mean 'rewards'.*`target`"),
        ({"turns": ["a"], "reward": 1}, "turns has 1 texts; prompts and outputs take turns"),
        ({"turns": "a", "reward": 1}, "turns is 'a', not a list of texts"),
        ({"turns": ["a", 2], "reward": 1}, "not a list of texts"),
    ],
)
def test_wrong_records_name_the_place_and_the_reason(record: dict[str, Any], message: str) -> None:
    good = {key: value for key, value in record.items() if key not in ("reward", "rewards")} | {"reward": 1.0}
    records = [record] if "turns" in record and not isinstance(record["turns"], list) else [good, record]
    if "turns" in good and (len(good["turns"]) % 2 or not all(isinstance(t, str) for t in good["turns"])):
        records = [record]
    with pytest.raises(DataError, match=f"record {len(records) - 1}: .*{message}"):
        read(records)


def test_all_wrong_records_are_listed() -> None:
    records = [
        {"turns": ["a"], "reward": 1},
        {"turns": ["a", "b"], "reward": 1},
        {"turns": ["a", "b"], "reward": math.nan},
    ]
    with pytest.raises(DataError, match=r"(?s)record 0: turns has 1 texts.*record 2: the column 'reward' is NaN"):
        read(records)


def test_rewards_in_nested_records() -> None:
    assert one({"text": "a", "scores": {"fun": 3}}, target="scores.fun").rewards == (0.0, 3.0)


# Length ---------------------------------------------------------------------------------------------------------------


def test_what_is_cut_off_is_paid_at_the_last_action_that_is_left(caplog: pytest.LogCaptureFixture) -> None:
    record = {"turns": ["a", "bc", "d", "ef"], "reward": [[1, 2], [4, 8, 16]]}
    with caplog.at_level(logging.WARNING):
        shorter = one(record, max_length=6)
    assert "1 episodes were cut to max_length" in caplog.text
    assert shorter.completion_ids == ids("bcde")[:4] and shorter.rewards == (1.0, 2.0, 0.0, 28.0)
    between = one(record, max_length=5)  # what is only read at the end goes, too
    assert between.completion_ids == ids("bc") and between.rewards == (1.0, 30.0)
    assert one(record, max_length=100).total == shorter.total == between.total == 31.0


def test_a_prompt_that_fills_the_length_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    long = {"turns": ["a" * 9, "b"], "reward": 1}
    with caplog.at_level(logging.WARNING):
        assert len(read([long, {"turns": ["a", "b"], "reward": 2}], max_length=10)) == 1
    assert "left out 1 episodes whose first prompt alone fills max_length" in caplog.text
    with pytest.raises(DataError, match="none of the 1 episodes is left"):
        read([long], max_length=10)


def test_limit_takes_the_first() -> None:
    records = [{"turns": ["a", "b"], "reward": float(number)} for number in range(4)]
    assert [e.total for e in read(records, DataConfig(path="unused", limit=2))] == [0.0, 1.0]


def test_settings_for_other_records_are_refused() -> None:
    record = {"turns": ["a", "b"], "reward": 1}
    for name, value in (("prompt_column", "x"), ("first_words", 2), ("chat", True), ("system_prompt", "s")):
        with pytest.raises(DataError, match=f"{name} is not for records with turns"):
            one(record, config=DataConfig(path="unused", **{name: value}))
    with pytest.raises(DataError, match="record 1: there is no column 'turns', as other records have"):
        read([record, {"text": "a", "reward": 1}])


# Scale ----------------------------------------------------------------------------------------------------------------


def totals(*values: float) -> list[Episode]:
    return read([{"text": "ab", "reward": value} for value in values])


def test_returns_are_brought_to_mean_0_and_deviation_1() -> None:
    """Returns 1, 2 and 6: mean 3, variance (4 + 1 + 9) / 3."""
    episodes = totals(1, 2, 6)
    scale = ReturnScale.of(episodes)
    assert (scale.mean, scale.std) == (3.0, pytest.approx(math.sqrt(14 / 3)))
    scaled = [episode.total for episode in scale.apply(episodes)]
    assert scaled == pytest.approx([(value - 3) / math.sqrt(14 / 3) for value in (1, 2, 6)])


def test_rewards_along_the_text_are_scaled_where_they_stand() -> None:
    episodes = read([{"text": "ab", "reward": [2, 0, 4]}, {"text": "a", "reward": [0, 2]}])
    scale = ReturnScale.of(episodes)  # returns 6 and 2
    assert (scale.mean, scale.std) == (4.0, 2.0)
    first, second = scale.apply(episodes)
    assert first.rewards == (1.0, 0.0, 0.0)  # 4 / 2 - 4 / 2 at the last action
    assert second.rewards == (0.0, -1.0)


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.1, 0.1, 0.1), (7.0,), (1e6, 1e6 + 0.01), (0.3, 0.1 + 0.2)])
def test_pitfall_36_equal_returns_never_explode(values: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match=f"all {len(values)} episodes have the return .*normalise_returns to false"):
        ReturnScale.of(totals(*values))


def test_small_returns_that_differ_are_fine() -> None:
    scaled = [e.total for e in ReturnScale.of(totals(1e-6, 3e-6)).apply(totals(1e-6, 3e-6))]
    assert scaled == pytest.approx([-1.0, 1.0])


# First turns ----------------------------------------------------------------------------------------------------------


def test_first_turns_are_prompts_with_their_columns() -> None:
    records = locate_records([{"turns": ["a", "b", "c", "d"], "reward": 1, "more": 5}])
    (record,), config = first_turns(records, DataConfig(path="unused"))
    assert record.columns == {"prompt": "a", "completion": "b", "reward": 1, "more": 5} and config is not None
    assert config.prompt_column == "prompt"
    chats = locate_records([{"messages": CHAT, "reward": 1}])
    (record,), _ = first_turns(chats, None)
    assert record.columns["prompt"] == CHAT[:1] and record.columns["completion"] == "bc"
    texts = locate_records([{"text": "a", "reward": 1}])
    assert first_turns(texts, None) == (texts, None)


def test_a_batch_by_hand() -> None:
    turns = {"turns": ["a", "b", "c", "d"], "reward": [1, 2]}
    batch = collate_episodes([one(turns), one({"text": "x", "reward": 3})])
    assert batch.prompt_ids.tolist() == [[BOS_ID, *ids("a")], [0, BOS_ID]]
    assert batch.completion_ids.tolist() == [[*ids("bcd"), EOS_ID], [*ids("x"), EOS_ID, 0, 0]]
    assert batch.loss_mask.tolist() == [[True, False, True, True], [True, True, False, False]]
    assert batch.rewards.tolist() == [[1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 0.0, 0.0]]
    assert batch.completion_lengths.tolist() == [4, 2]
    with pytest.raises(ValueError, match="no episodes"):
        collate_episodes([])
