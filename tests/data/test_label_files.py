"""Label files as texts: what survives of the ids, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_models import tiny_tokenizer
from tropism.data.label_files import PADDING, convert_labels, vocabulary_of
from tropism.errors import DataError

P = 50259
A, B, C, SPACE = 5, 6, 7, 31
"""Ids of "a", "b", "c" and " " in the tiny tokenizer: five special tokens, then the letters, then the space."""


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as GPT-2's, whose only merge makes one token of "a" and "b"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "ab"])}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=True)


def best(**changes: Any) -> dict[str, Any]:
    return {"query": [P, A, B], "sample0": [C, P], "sample1": [P, A], "sample2": [B, SPACE, P], "best": 1, **changes}


def test_the_padding_is_the_source_s() -> None:
    assert PADDING == 50257 + 2


def test_the_best_of_several() -> None:
    found = convert_labels([best(), best(best=0, annotator="ann", weight=2, ratings=[1, 0, 0])], tiny_tokenizer())
    plain = {"prompt": "ab", "completions": ["c", "a", "b "], "choice": 1}
    assert found.rows == [plain, {**plain, "choice": 0, "annotator": "ann", "weight": 2.0, "ratings": [1.0, 0.0, 0.0]}]
    assert (found.kind, found.changed) == ("choice", 0)


def test_a_number_each() -> None:
    found = convert_labels([{"query": [P, P], "sample": [A, P, B], "score": 0.5}], tiny_tokenizer())
    assert found.rows == [{"prompt": "", "completion": "ab", "rating": 0.5}] and found.kind == "rating"
    found = convert_labels([{"query": [A], "sample0": [B], "sample1": [C], "difference": -2}], tiny_tokenizer())
    assert found.rows == [{"prompt": "a", "completions": ["b", "c"], "difference": -2.0}]
    assert found.kind == "difference"


def test_text_is_exact_where_decoding_would_tidy_it(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    tidy = tiny_tokenizer()
    tidy.clean_up_tokenization_spaces = True
    for tokenizer, text in ((tidy, "a , b 's  c ."), (byte_tokenizer, "so , n't . \n\n x ?")):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = convert_labels([{"query": ids, "sample": ids, "score": 1}], tokenizer)
        assert found.rows[0]["prompt"] == found.rows[0]["completion"] == text
        assert found.changed == 0


def test_records_that_are_encoded_otherwise_are_counted(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = byte_tokenizer.get_vocab()
    a, b, ab, euro = vocabulary["a"], vocabulary["b"], vocabulary["ab"], byte_tokenizer("€")["input_ids"]
    assert len(euro) == 3
    labels = [
        {"query": [b], "sample0": [ab], "sample1": [b], "best": 0},
        {"query": [b], "sample0": [a, b], "sample1": [ab], "best": 0},  # sampled as two tokens
        {"query": [a], "sample0": [a], "sample1": [b], "best": 0},  # merges with the end of the prompt
        {"query": [b], "sample0": euro, "sample1": [a], "best": 0},
        {"query": [b], "sample0": euro[:2], "sample1": [a], "best": 0},  # ends within a character
    ]
    found = convert_labels(labels, byte_tokenizer)
    assert found.changed == 3
    assert found.rows[3]["completions"][0] == "€" and "\ufffd" in found.rows[4]["completions"][0]


def test_wrong_labels_are_listed_by_line(tmp_path: Path) -> None:
    file = tmp_path / "labels.json.gz"
    rows = [best(), best(best=3), {"prompt": "a"}, best(sample0=[37]), best(query="text"), best(weight=float(10**300))]
    file.write_bytes(gzip.compress(("[" + ",\n".join(json.dumps(row) for row in rows) + "]").encode()))
    with pytest.raises(DataError) as caught:
        convert_labels(file, tiny_tokenizer())
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 of 6 records cannot be used:"
    expected = [
        "best is 3, but there are 3 completions",
        "no label",
        "sample0 holds the id 37",
        "no label",
        "weight is 1e+300, too large",
    ]
    for number, (line, reason) in enumerate(zip(lines[1:], expected, strict=True), start=2):
        assert line.strip().startswith(f"{file}:{number}: ") and reason in line


def test_labels_of_two_kinds() -> None:
    rating = {"query": [A], "sample": [B], "score": 1}
    with pytest.raises(
        DataError, match="record 1: a label of the kind rating, but that of record 0 is of the kind choice"
    ):
        convert_labels([best(), rating], tiny_tokenizer())


def test_the_vocabulary_counts_every_id() -> None:
    assert vocabulary_of(tiny_tokenizer()) == 37
