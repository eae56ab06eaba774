"""Completions that were liked or not: their labels, token ids, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tiny_models import BOS_ID, EOS_ID, tiny_tokenizer
from tropism.data.config import DataConfig
from tropism.data.opinions import make_opinions, refuse_one_kind
from tropism.errors import DataError

TOKENIZER = tiny_tokenizer(chat=True)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.convert_tokens_to_ids(list(text)))


def opinions(*records: Any, limit: int | None = None) -> list[Any]:
    return make_opinions(list(records), TOKENIZER, max_length=limit)


def test_text_and_chat() -> None:
    text, chat = opinions(
        {"prompt": "so", "completion": " it is", "label": True},
        {"prompt": "so", "completion": " no", "label": False},
    )
    assert (text.prompt_ids, text.completion_ids, text.liked) == (ids("so"), (*ids(" it is"), EOS_ID), True)
    assert not chat.liked
    (chat,) = opinions(
        {
            "prompt": [{"role": "user", "content": "so?"}],
            "completion": [{"role": "assistant", "content": "no."}],
            "label": 0,
        }
    )
    marks = TOKENIZER.convert_tokens_to_ids(["<user>", "<assistant>"])
    assert chat.prompt_ids == (marks[0], *ids("so?"), marks[1]) and chat.completion_ids == (*ids("no."), EOS_ID)


@pytest.mark.parametrize(
    ("label", "liked"), [(True, True), (1, True), ("true", True), ("1", True), (0, False), (" False ", False)]
)
def test_labels(label: Any, liked: bool) -> None:
    (found,) = opinions({"prompt": "a", "completion": " b", "label": label})
    assert found.liked is liked


def test_wrong_labels_are_all_listed() -> None:
    with pytest.raises(DataError) as caught:
        opinions(
            {"prompt": "a", "completion": " b", "label": "good"},
            {"prompt": "a", "completion": " b", "label": True},
            {"prompt": "a", "completion": " b", "label": None},
            {"prompt": "a", "completion": " b", "labels": 1},
            {"prompt": "a", "chosen": " b", "rejected": " c"},
            {"prompt": "a", "completion": " b", "label": 0.5},
        )
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("5 of 6 records")
    reasons = ("label is 'good'", "label is null", "is it 'labels'?", "but a pair; learn from pairs with dpo", "is 0.5")
    for place, line, reason in zip((0, 2, 3, 4, 5), lines, reasons, strict=True):
        assert f"record {place}" in line and reason in line


def test_all_alike_teach_nothing() -> None:
    liked = opinions({"prompt": "a", "completion": " b", "label": 1}, {"prompt": "b", "completion": " b", "label": 1})
    with pytest.raises(DataError, match=r"all 2 labels to train on are true.*add completions with the label false"):
        refuse_one_kind(liked)
    disliked = opinions({"prompt": "a", "completion": " b", "label": 0})
    with pytest.raises(DataError, match="are false"):
        refuse_one_kind(disliked)
    refuse_one_kind([*liked, *disliked])


def test_first_words_part_labelled_texts() -> None:
    config = DataConfig(path="reviews.jsonl", prompt_column="text", first_words=2)
    records = [{"text": "it is so big", "label": 1}]
    (found,) = make_opinions(records, tiny_tokenizer(add_bos=True), config, max_length=None)
    assert found.prompt_ids == (BOS_ID, *ids("it is")) and found.completion_ids == (*ids(" so big"), EOS_ID)


def test_long_ones_lose_their_end() -> None:
    (found,) = opinions(
        {"prompt": "abc", "completion": " de", "label": 1},
        {"prompt": "abcde", "completion": " de", "label": 1},
        limit=5,
    )
    assert found.completion_ids == ids(" d")
