"""DIALOCONAN's dialogues and CONAN's pairs: the records that are made, word by word, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from public_sets import DIALOGUE_COLUMNS, PAIR_COLUMNS, PAIRS, TURNS, write_dialogues, write_pairs
from tropism.data.counter_speech import conan, dialoconan, texts_by_dialogue
from tropism.errors import ConfigError, DataError

EXPECTED = [
    "User: Cats are no good.\nAssistant: Mine keeps me warm",
    "User: Cats are no good.\nAssistant: Mine keeps me warm\nUser: They scratch the chairs.\nAssistant: A post helps",
    "User: Dogs are too loud.\nAssistant: They are glad to see you",
]
"""RewardLM's texts of ``TURNS``, written out by hand."""


def turns(*changes: tuple[int, str, Any]) -> list[dict[str, Any]]:
    """``TURNS`` as records, with some values replaced: (row, column, value)."""
    rows = [dict(zip(DIALOGUE_COLUMNS, turn, strict=True)) for turn in TURNS]
    for row, column, value in changes:
        rows[row][column] = value
    return rows


def pairs() -> list[dict[str, Any]]:
    return [dict(zip(PAIR_COLUMNS, pair, strict=True)) for pair in PAIRS]


# ---- dialogues -------------------------------------------------------------------------------------------------------


def test_one_text_per_turn_with_all_turns_before_it(tmp_path: Path) -> None:
    data = dialoconan(write_dialogues(tmp_path / "dialogues.csv"))
    assert data.texts == EXPECTED
    assert data.records[1] == {"text": EXPECTED[1], "dialogue_id": "7", "turn": 1, "target": "CATS"}
    assert (data.read, data.kept, data.left_out, data.noun) == (6, 6, {}, "turns")
    assert texts_by_dialogue(data) == {"7": {0: EXPECTED[0], 1: EXPECTED[1]}, "3": {0: EXPECTED[2]}}
    assert dialoconan(turns(), text_only=True).records == [{"text": text} for text in EXPECTED]


def test_the_last_answer_can_be_deleted() -> None:
    data = dialoconan(turns(), delete_last_answer=True)
    assert data.texts == [
        "User: Cats are no good.\nAssistant: ",
        "User: Cats are no good.\nAssistant: Mine keeps me warm\nUser: They scratch the chairs.\nAssistant: ",
        "User: Dogs are too loud.\nAssistant: ",
    ]


def test_names_of_user_and_bot() -> None:
    data = dialoconan(turns(), user_name="<human>:", bot_name="<bot>:")
    assert data.texts[2] == "<human>: Dogs are too loud.\n<bot>: They are glad to see you"


def test_pairs_are_the_same_texts_in_two_parts() -> None:
    data = dialoconan(turns(), form="pairs")
    assert [record["prompt"] + record["completion"] for record in data.records] == EXPECTED
    assert data.records[2]["prompt"] == "User: Dogs are too loud.\nAssistant:"
    assert data.records[2]["completion"] == " They are glad to see you"
    prompts = dialoconan(turns(), form="pairs", delete_last_answer=True)
    assert prompts.texts == [record["prompt"] for record in data.records] and "completion" not in prompts.records[0]


def test_chats_are_messages() -> None:
    data = dialoconan(turns(), form="chats", text_only=True)
    assert data.records[1] == {
        "prompt": [
            {"role": "user", "content": "Cats are no good"},
            {"role": "assistant", "content": "Mine keeps me warm"},
            {"role": "user", "content": "They scratch the chairs"},
        ],
        "completion": [{"role": "assistant", "content": "A post helps"}],
    }
    assert dialoconan(turns(), form="chats", delete_last_answer=True, text_only=True).records[2] == {
        "prompt": [{"role": "user", "content": "Dogs are too loud"}]
    }
    with pytest.raises(DataError, match="chat messages, which have no one text"):
        _ = data.texts


def test_turns_are_taken_by_their_numbers() -> None:
    shuffled = [turns()[index] for index in (3, 5, 0, 2, 4, 1)]
    assert sorted(dialoconan(shuffled).texts) == sorted(EXPECTED)
    bare = [{"text": row["text"], "dialogue_id": row["dialogue_id"]} for row in turns()]
    assert dialoconan(bare).texts == EXPECTED and dialoconan(bare).records[0]["target"] is None


def test_a_last_turn_without_answer_makes_a_prompt_and_no_demonstration() -> None:
    odd = turns()[:5]
    data = dialoconan(odd)
    assert data.texts == EXPECTED[:2] and data.left_out == {"last turns without an answer": 1}
    assert (data.read, data.kept) == (5, 4)
    prompts = dialoconan(odd, delete_last_answer=True)
    assert prompts.texts[2] == "User: Dogs are too loud.\nAssistant: " and prompts.left_out == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((2, "turn_id", 1), "turns of a dialogue that numbers two of them alike"),
        ((2, "text", " \n"), "turns of a dialogue with a blank turn"),
        ((2, "type", "CN"), "turns of a dialogue that is not HS and CN in turns"),
    ],
)
def test_a_dialogue_that_would_teach_the_wrong_side_is_left_out_and_counted(
    change: tuple[int, str, Any], reason: str
) -> None:
    data = dialoconan(turns(change))
    assert data.texts == EXPECTED[2:] and data.left_out == {reason: 4} and data.kept == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "turn": 1}], "DIALOCONAN has a column dialogue_id; here there are: text, turn"),
        ([{"words": "a", "dialogue_id": 1}], "DIALOCONAN has a column text"),
        ([{"text": 5, "dialogue_id": 1}], "the column 'text' holds 5, expected text"),
        ([{"text": "a", "dialogue_id": 1, "turn_id": "first"}], "turn_id is 'first', expected a number"),
        ([{"text": "a", "dialogue_id": " "}], "there is no dialogue_id"),
        ([{"text": "a", "dialogue_id": 1}], r"none of the 1 turns is left \(1: last turns without an answer\)"),
    ],
)
def test_other_tables_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dialoconan(rows)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_stay_as_they_are(tmp_path: Path) -> None:
    data = conan(write_pairs(tmp_path / "pairs.csv"))
    assert data.records == [
        {"prompt": "Cats are no good", "completion": "Mine keeps me warm", "target": "CATS"},
        {"prompt": "Cats are no good", "completion": "They only seem aloof", "target": "CATS"},
        {"prompt": "Dogs are too loud", "completion": "They are glad to see you", "target": "DOGS"},
    ]
    assert (data.read, data.kept, data.noun) == (3, 3, "pairs")


@pytest.mark.parametrize(
    "columns", [("hateSpeech", "counterSpeech", "hsType"), ("hate_speech", "counter_narrative", "target")]
)
def test_every_set_of_the_family_is_known(columns: tuple[str, str, str]) -> None:
    row = dict(zip(columns, ("Cats are no good", "Mine keeps me warm", "CATS"), strict=True))
    assert conan([row]).records == conan(pairs()[:1]).records


def test_prompts_are_kept_once() -> None:
    data = conan(pairs(), delete_last_answer=True, text_only=True)
    assert data.records == [{"prompt": "Cats are no good"}, {"prompt": "Dogs are too loud"}]
    assert data.left_out == {"prompts that were there already": 1}


def test_texts_and_chats_are_those_of_a_dialogue_of_two_turns() -> None:
    assert conan(pairs(), form="texts").texts[2] == EXPECTED[2]
    assert conan(pairs(), form="chats", text_only=True).records[2] == {
        "prompt": [{"role": "user", "content": "Dogs are too loud"}],
        "completion": [{"role": "assistant", "content": "They are glad to see you"}],
    }


def test_targets_are_chosen_and_must_occur() -> None:
    data = conan(pairs(), targets=["DOGS"])
    assert len(data) == 1 and data.left_out == {"not about DOGS (targets)": 2}
    with pytest.raises(DataError, match="no pair is about 'BIRDS'; there are: CATS, DOGS"):
        conan(pairs(), targets=["DOGS", "BIRDS"])
    with pytest.raises(ConfigError, match=r"pass a list of them: \['DOGS'\]"):
        conan(pairs(), targets="DOGS")


def test_blank_sides_are_left_out_and_other_columns_refused() -> None:
    blank = [{**pairs()[0], "COUNTER_NARRATIVE": None}, pairs()[2]]
    assert conan(blank).left_out == {"pairs with a blank side": 1}
    assert len(conan(blank, delete_last_answer=True)) == 2
    with pytest.raises(DataError, match="has a column HATE_SPEECH or hateSpeech or hate_speech; here there are: a"):
        conan([{"a": "b"}])
    with pytest.raises(ConfigError, match="form is 'prompts'; choose texts, pairs or chats"):
        conan(pairs(), form="prompts")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the records have no dialogue_id"):
        texts_by_dialogue(conan(pairs()))
