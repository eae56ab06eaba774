"""Judgements of every format against ids written out by hand, and every refusal before training."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz_budget import HUGE, enlarged, examples, within
from tiny_models import CHARACTERS, SPECIAL_TOKENS, tiny_tokenizer
from tropism.classifier_inputs import ClassifierInputs
from tropism.data.comparisons import comparison_key, read_comparisons
from tropism.data.config import DataConfig
from tropism.data.split import train_eval_split
from tropism.errors import ConfigError, DataError, TropismError
from tropism.judgements import Comparison

PAD = 50259
USER, ASSISTANT, EOS = 3, 4, 2
IDS = {character: len(SPECIAL_TOKENS) + index for index, character in enumerate(CHARACTERS)}

QUESTION = [{"role": "user", "content": "hi"}]
FILM, PLAY = {"role": "assistant", "content": "film"}, {"role": "assistant", "content": "play"}


def ids(text: str) -> tuple[int, ...]:
    """One id per character, looked up one by one."""
    return tuple(IDS[character] for character in text)


def inputs(*, chat: bool = False, longest: int = 1000, **changes: Any) -> ClassifierInputs:
    """For a body without a table of positions; a row without special tokens."""
    config = SimpleNamespace(max_position_embeddings=longest, get_text_config=lambda: config)
    body = SimpleNamespace(config=config, named_modules=list)
    return ClassifierInputs(body, tiny_tokenizer(chat=chat), **{"text": "prompt+completion", **changes})


def settings(**changes: Any) -> DataConfig:
    return DataConfig(path="unused", **changes)


def read(records: Any, config: DataConfig | None = None, *, chat: bool = False, **changes: Any) -> list[Comparison]:
    return read_comparisons(records, inputs(chat=chat), config, **changes)[1]


def refused(records: Any, config: DataConfig | None = None, *, chat: bool = False, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(records, config, chat=chat, **changes)
    return str(caught.value)


def choice(**changes: Any) -> dict[str, Any]:
    return {"prompt": "the ", "completions": ["cat", "dog", "cow"], "choice": 1, **changes}


# ---- choices -------------------------------------------------------------------------------------------------------


def test_the_best_of_several() -> None:
    kind, (item,) = read_comparisons([choice()], inputs())
    assert kind == "choice"
    assert item == Comparison(
        ids=(ids("the cat"), ids("the dog"), ids("the cow")),
        prompt="the ",
        completions=("cat", "dog", "cow"),
        choice=1,
    )


def test_aliases_ratings_and_no_prompt() -> None:
    (item,) = read([{"samples": ["a", "b", "c", "d"], "best": 3, "ratings": [0, 0.5, -1, 2]}])
    assert item.ids == (ids("a"), ids("b"), ids("c"), ids("d"))
    assert (item.prompt, item.choice, item.ratings) == ("", 3, (0.0, 0.5, -1.0, 2.0))


@pytest.mark.parametrize(("said", "meant"), [(1, 1), ("1", 1), (1.0, 1), ("tie", None), (" Tie ", None)])
def test_a_choice_of_two(said: Any, meant: int | None) -> None:
    assert read([choice(completions=["cat", "dog"], choice=said)])[0].choice == meant


def test_messages_to_choose_from() -> None:
    expected = tuple((USER, *ids("hi"), ASSISTANT, *ids(text), EOS) for text in ("film", "play"))
    for completions in (["film", "play"], [FILM, PLAY], [[FILM], [PLAY]]):
        (item,) = read([{"prompt": QUESTION, "completions": completions, "choice": 0}], chat=True)
        assert item.ids == expected
        assert (item.prompt, item.completions) == ("hi", ("film", "play"))
    (item,) = read([{"prompt": "hi", "completions": ["film", "play"], "choice": 0}], settings(chat=True), chat=True)
    assert item.ids == expected


def test_the_number_of_completions_may_vary_only_where_it_is_said() -> None:
    records = [choice(), choice(completions=["cat", "dog"]), choice()]
    message = refused(records)
    assert message.startswith("record 1: it has 2 completions, but the first record has 3") and "varied_k" in message
    assert [len(item.ids) for item in read(records, varied_k=True)] == [3, 2, 3]


# ---- pairs ---------------------------------------------------------------------------------------------------------


def test_pairs_of_texts() -> None:
    first, second = read(
        [
            {"prompt": "the ", "chosen": "cat", "rejected": "dog", "margin": 0.5},
            {"prompt": "a ", "chosen": "cat", "rejected": "dog", "tie": True},
        ]
    )
    assert first.ids == (ids("the cat"), ids("the dog"))
    assert (first.choice, first.margin) == (0, 0.5)
    assert (second.choice, second.margin, second.prompt) == (None, 0.0, "a ")


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [*QUESTION, FILM], "rejected": [*QUESTION, PLAY]},  # the implicit prompt of TRL
        {"prompt": QUESTION, "chosen": [FILM], "rejected": [PLAY]},  # the explicit one
        {"prompt": QUESTION, "chosen": [*QUESTION, FILM], "rejected": [*QUESTION, PLAY]},
        {"prompt": "hi", "chosen": [*QUESTION, FILM], "rejected": [*QUESTION, PLAY]},  # as in ultrafeedback_binarized
    ],
)
def test_pairs_of_chats(record: dict[str, Any]) -> None:
    (item,) = read([record], chat=True)
    assert item.ids == (
        (USER, *ids("hi"), ASSISTANT, *ids("film"), EOS),
        (USER, *ids("hi"), ASSISTANT, *ids("play"), EOS),
    )
    assert (item.prompt, item.completions, item.choice) == ("hi", ("film", "play"), 0)


def test_the_common_messages_of_long_chats_are_the_prompt() -> None:
    begin = [*QUESTION, FILM, {"role": "user", "content": "so"}]
    (item,) = read([{"chosen": [*begin, PLAY], "rejected": [*begin, FILM]}], chat=True)
    assert (item.prompt, item.completions) == ("hi\nfilm\nso", ("play", "film"))
    equal = {"chosen": [*begin, PLAY], "rejected": [*begin, PLAY], "tie": True}
    (item, _) = read([equal, {"chosen": [FILM], "rejected": [PLAY]}], chat=True)
    assert (item.prompt, item.completions, item.choice) == ("hi\nfilm\nso", ("play", "play"), None)


def test_dialogues_as_text_are_parted_at_the_last_turn_in_common() -> None:
    """The layout of Anthropic/hh-rlhf, of which the line ends and capitals have no token here."""
    begin = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: so\n\nAssistant:"
    first, plain = read(
        [
            {"chosen": begin + " film\n\nAssistant: oh", "rejected": begin + " play"},
            {"chosen": "i saw it", "rejected": "i saw"},
        ]
    )
    assert (first.prompt, first.completions) == (begin, (" film\n\nAssistant: oh", " play"))
    assert (plain.prompt, plain.completions) == ("", ("i saw it", "i saw"))


# ---- ratings and differences ---------------------------------------------------------------------------------------


def test_ratings() -> None:
    kind, items = read_comparisons(
        [{"prompt": "a ", "completion": "cat", "rating": -1.5}, {"prompt": "a ", "completion": "dog", "rating": 2}],
        inputs(),
    )
    assert kind == "rating"
    assert [(item.ids, item.target, item.choice) for item in items] == [
        ((ids("a cat"),), -1.5, None),
        ((ids("a dog"),), 2.0, None),
    ]


def test_differences() -> None:
    kind, (item,) = read_comparisons([{"completions": ["cat", "dog"], "difference": 0.25}], inputs())
    assert kind == "difference"
    assert (item.ids, item.target, item.choice) == ((ids("cat"), ids("dog")), 0.25, None)


# ---- label files ---------------------------------------------------------------------------------------------------


def test_labels_of_the_best() -> None:
    a, b, c, d = ids("abcd")
    record = {"query": [PAD, a, PAD, b], "sample0": [c, PAD, PAD], "sample1": [PAD, d, c], "sample2": [a], "best": 2}
    kind, (item,) = read_comparisons([record], inputs())
    assert kind == "choice"
    assert item.ids == ((a, b, c), (a, b, d, c), (a, b, a))
    assert (item.prompt, item.completions, item.choice) == ("ab", ("c", "dc", "a"), 2)


def test_labels_with_numbers() -> None:
    a, b, c = ids("abc")
    kind, items = read_comparisons(
        [{"query": [a], "sample": [b], "score": 1}, {"query": [a], "sample": [c, PAD], "score": 2.5}], inputs()
    )
    assert (kind, [(item.ids, item.target) for item in items]) == ("rating", [(((a, b),), 1.0), (((a, c),), 2.5)])
    kind, (item,) = read_comparisons([{"query": [a], "sample0": [b], "sample1": [c], "difference": -2}], inputs())
    assert (kind, item.ids, item.target) == ("difference", ((a, b), (a, c)), -2.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sample1": [5, 37]}, "sample1 holds the id 37, but those of the tokenizer are 0 to 36"),
        ({"query": [-1]}, "query holds the id -1"),
        ({"query": [PAD + 1]}, "query holds the id 50260"),
        ({"sample0": [PAD, PAD]}, "sample0 is empty"),
        ({"sample0": "text"}, "sample0 is no list of token ids"),
        ({"sample0": [True]}, "sample0 is no list of token ids"),
        ({"sample2": [5], "sample1": None}, "expected sample0, sample1; there are: sample0, sample2"),
        ({"best": 2}, "best is 2, but there are 2 completions, numbered from 0 to 1"),
        ({"best": "tie"}, "best is the text 'tie', not a number"),
        ({"score": 1}, "this has best and score"),
        ({"best": None}, "this has none of them"),
    ],
)
def test_wrong_labels(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    file = tmp_path / "offline_5k.json"
    good = {"query": [5], "sample0": [6], "sample1": [7], "best": 0}
    file.write_text("[" + json.dumps(good) + ",\n" + json.dumps({**good, **changes}) + "]")
    assert refused(str(file)) == f"{file}:2: {reason}" or refused(str(file)).startswith(f"{file}:2: ")
    assert reason in refused(str(file))


def test_labels_need_a_tokenizer_without_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = inputs()
    monkeypatch.setattr(reads.tokenizer, "get_vocab", lambda: {"a": 128_000})
    with pytest.raises(DataError, match="128,001 tokens, so that 50259"):
        read_comparisons([{"query": [5], "sample0": [6], "sample1": [7], "best": 0}], reads)


# ---- weights -------------------------------------------------------------------------------------------------------


def test_weights_of_records_and_annotators_are_multiplied() -> None:
    records = [choice(annotator="ann", weight=3), choice(annotator="bob"), choice(annotator=7, weight="0.5")]
    assert [item.weight for item in read(records)] == [3.0, 1.0, 0.5]
    assert [item.weight for item in read(records, annotator_weights={"ann": 0.5, "bob": 2, "7": 4})] == [1.5, 2.0, 2.0]


def test_an_unknown_annotator_is_named() -> None:
    records = [choice(annotator="bob"), choice()]
    message = refused(records, annotator_weights={"ann": 1.0, "eve": 1.0})
    assert "record 0: the annotator 'bob' is not known; annotator_weights has: ann, eve" in message
    assert "record 1: there is no annotator" in message


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), True, "2"])
def test_wrong_factors_of_annotators(factor: Any) -> None:
    with pytest.raises(ConfigError, match="'ann' has"):
        read([choice(annotator="ann")], annotator_weights={"ann": factor})


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (choice(choice=3), "choice is 3, but there are 3 completions, numbered from 0 to 2"),
        (choice(choice=-1), "choice is -1, but"),
        (choice(choice=0.5), "choice is 0.5, but"),
        (choice(choice=True), "choice is bool True, not a number; it is the index of the best completion, 0 to 2"),
        (choice(choice="second"), "choice is the text 'second', not a number"),
        (choice(choice="tie"), "choice is a tie of 3 completions"),
        (choice(choice=None), "the column 'choice' is null"),
        (choice(completions=["a"]), "completions holds 1, and at least two are needed"),
        (choice(completions="abc"), "completions is str 'abc', not a list"),
        (choice(completions=["a", " \n", "b"]), "completion 1 is empty"),
        (choice(completions=["a", "", "b"]), "completion 1 is empty"),
        (choice(completions=["a", 3, "b"]), "'completions[1]' is int"),
        (choice(completions=["a", None, "b"]), "'completions[1]' is null"),
        (choice(completions=["a", {"role": "assistant", "content": [{"text": 1}]}, "b"]), "a part whose text is int 1"),
        (choice(prompt=None), "the column 'prompt' is null"),
        (choice(ratings=[1, 2]), "not a list of 3 numbers"),
        (choice(ratings=[1, 2, float("nan")]), "rating 2 is NaN"),
        (choice(margin="far"), "margin is the text 'far', not a number"),
        (choice(margin=float("inf")), "margin is inf, too large"),
        (choice(weight=0), "weight is 0; it must be above 0"),
        (choice(weight=-1), "weight is -1; it must be above 0"),
        (choice(weight=1e-60), "weight is 1e-60; it must be above 0"),
        (choice(weight=10**5000), "weight is (int), too large"),
    ],
)
def test_wrong_choices(record: dict[str, Any], reason: str) -> None:
    message = refused([choice(), record])
    assert message.startswith("record 1: ") and reason in message


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "a", "rejected": " "}, "rejected is empty"),
        ({"chosen": "a", "rejected": None}, "the column 'rejected' is null"),
        ({"chosen": "a", "rejected": [FILM]}, "one of chosen and rejected is text"),
        ({"chosen": "a", "rejected": "b", "tie": "maybe"}, "tie is 'maybe'; write true or false"),
        ({"prompt": "hi", "chosen": [FILM], "rejected": [PLAY]}, "set chat: true"),
        ({"chosen": [*QUESTION, FILM], "rejected": [{"role": "user", "content": "so"}, PLAY]}, "role user"),
    ],
)
def test_wrong_pairs(record: dict[str, Any], reason: str) -> None:
    assert reason in refused([record])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"completion": "a", "rating": float("nan")}, "rating is NaN"),
        ({"completion": "a", "rating": "nan"}, "rating is NaN"),
        ({"completion": "a", "rating": "good"}, "rating is the text 'good'"),
        ({"completion": "a", "rating": None}, "the column 'rating' is null"),
        ({"completion": "", "rating": 1}, "completion is empty"),
        ({"completions": ["a", "b", "c"], "difference": 1}, "completions holds 3, and exactly two are needed"),
        ({"completions": ["a", "b"], "difference": float("-inf")}, "difference is -inf, too large"),
    ],
)
def test_wrong_numbers(record: dict[str, Any], reason: str) -> None:
    assert reason in refused([record])


def test_all_wrong_records_are_listed_by_line(tmp_path: Path) -> None:
    file = tmp_path / "choices.jsonl"
    wrong = {2: choice(choice=9), 3: choice(completions=["a", "b"]), 5: {"completions": ["a", "b", "c"]}}
    file.write_text("".join(json.dumps(wrong.get(line, choice())) + "\n" for line in range(1, 7)))
    lines = refused(str(file)).splitlines()
    assert lines[0] == "3 of 6 records cannot be used:"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [f"{file}:{line}" for line in wrong]
    assert "no judgement in the columns completions" in lines[3]


def test_twenty_are_listed_and_the_others_counted() -> None:
    lines = refused([choice(), *[choice(choice=9)] * 23]).splitlines()
    assert lines[0] == "23 of 24 records cannot be used:"
    assert lines[-2].strip().startswith("record 20: ") and lines[-1].strip() == "and 3 more"
    assert len(lines) == 22


def test_a_completion_that_does_not_fit_is_listed() -> None:
    records = [choice(), choice(completions=["a", "a very long text", "b"])]
    with pytest.raises(
        DataError, match="record 1: completion 1: the completion has 16 tokens and the classifier takes 8"
    ):
        read_comparisons(records, inputs(longest=8))
    _, items = read_comparisons(records, inputs(longest=8, cut_completion=True))
    assert items[1].ids[1] == ids("a very l")


def test_one_format_per_data_set() -> None:
    pair = {"chosen": "a", "rejected": "b"}
    assert refused([choice(), choice(choice=9), pair]).startswith(
        "record 2: one of the pairs (chosen and rejected), but record 0 is one of the choices (completions and choice)"
    )
    assert "record 1: one of the rating labels" in refused([pair, {"query": [5], "sample": [6], "score": 1}])
    both = {**choice(), "chosen": "a", "rejected": "b"}
    assert "can be read as choices (completions and choice) as well as pairs" in refused([both])


def test_columns_that_are_null_make_no_format() -> None:
    """Tables have every column in every row."""
    nulls = {"completions": None, "choice": None, "samples": None, "completion": None, "rating": None}
    assert read([{**nulls, "chosen": "a", "rejected": "b"}])[0].completions == ("a", "b")
    assert read([{**nulls, "samples": ["a", "b"], "choice": 1}])[0].choice == 1


def test_without_judgement_the_formats_and_close_names_are_told() -> None:
    message = refused([{"prompt": "a", "Completions": ["a", "b"], "choise": 1}] * 3)
    for words in (
        "'choise' for chosen or choice",
        "'Completions' for completion",
        "pairs (chosen and rejected)",
        "label files",
    ):
        assert words in message
    assert "ratings (completion and rating)" in message and "2 more records" in message


def test_a_misspelt_optional_column_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read([choice(anotator="ann")])
        assert "'anotator' is not read; if it is to be, call it 'annotator'" in caplog.text
        caplog.clear()
        read([choice(annotator="ann", topic="films", id=3)])
    assert not caplog.records


@pytest.mark.parametrize(
    "records",
    [
        [{"completion": "a", "rating": 2}, {"completion": "b", "rating": 2.0}],
        [{"completions": ["a", "b"], "difference": 0}, {"completions": ["b", "a"], "difference": 0.0}],
        [{"chosen": "a", "rejected": "a"}],
    ],
)
def test_judgements_that_say_nothing(records: list[dict[str, Any]]) -> None:
    assert "nothing to learn" in refused(records)


def test_differences_that_are_equal_still_say_which_is_better() -> None:
    assert len(read([{"completions": ["a", "b"], "difference": 1}, {"completions": ["c", "d"], "difference": 1}])) == 2


# ---- settings ------------------------------------------------------------------------------------------------------


def test_settings_of_the_prompt() -> None:
    record = {"q": {"text": "the "}, "who": "ann", "chosen": "cat", "rejected": "dog"}
    assert read([record], settings(prompt_column="q.text"))[0].ids[0] == ids("the cat")
    assert read([record], settings(template="{who}, "))[0].ids[1] == ids("ann, dog")
    assert "there is no column 'prompts'" in refused([record], settings(prompt_column="prompts"))


def test_a_system_prompt_stands_before_chats() -> None:
    record = {"chosen": [*QUESTION, FILM], "rejected": [*QUESTION, PLAY]}
    (item,) = read([record], settings(system_prompt="oh"), chat=True)
    assert item.prompt == "oh\nhi"
    for config in (settings(chat=True), settings(system_prompt="oh")):
        with pytest.raises(ConfigError, match="there is none"):
            read([{"chosen": "a", "rejected": "b"}], config)


def test_the_limit_leaves_the_rest_unread() -> None:
    assert len(read([choice(), choice(), choice(choice=9)], settings(limit=2))) == 2


@pytest.mark.parametrize("changes", [{"completion_column": "completions"}, {"first_words": 3}])
def test_settings_that_mean_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(changes))} means nothing for judgements"):
        read([choice()], settings(**changes))


@pytest.mark.parametrize("changes", [{"prompt_column": "query"}, {"template": "{query}"}, {"chat": True}])
def test_settings_that_mean_nothing_for_label_files(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(changes))} means nothing for label files"):
        read([{"query": [5], "sample0": [6], "sample1": [7], "best": 0}], settings(**changes))


# ---- files ---------------------------------------------------------------------------------------------------------


def test_the_same_pairs_from_every_kind_of_file(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": "the ", "chosen": "cat", "rejected": "dog", "margin": 0.5, "tie": False, "weight": 2.0},
        {"prompt": "a ", "chosen": "cow", "rejected": "dog", "margin": None, "tie": True, "weight": None},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    first, second = read(rows)
    assert (first.margin, first.choice, first.weight) == (0.5, 0, 2.0)
    assert (second.margin, second.choice, second.weight) == (0.0, None, 1.0)
    for name in ("a.parquet", "a.jsonl.gz", "a.csv"):
        assert read(DataConfig(path=str(tmp_path / name))) == [first, second]


def test_chats_from_parquet_and_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"chosen": [*QUESTION, FILM], "rejected": [*QUESTION, PLAY]}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert read(str(tmp_path / "saved"), chat=True) == read(rows, chat=True)


def test_the_examples_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    section = page.split("## Judgements")[1].split("\n## ")[0]
    blocks = [block.split("```")[0] for block in section.split("```json\n")[1:]]
    *texts, labels = [[json.loads(line) for line in block.splitlines()] for block in blocks]
    kinds = [read_comparisons(records, inputs(chat=True))[0] for records in texts]
    assert kinds == ["choice", "choice", "choice", "rating", "difference"]
    assert "query holds the id 464" in refused(labels[0])  # of GPT-2's vocabulary


# ---- the held-out part ---------------------------------------------------------------------------------------------


def test_what_must_stay_together() -> None:
    same = read([choice(), choice(prompt="the\n", completions=["x", "y", "z"]), choice(prompt="a ")])
    assert comparison_key(same[0]) == comparison_key(same[1]) != comparison_key(same[2])
    bare = read(
        [{"samples": ["a", "b"], "best": 0}, {"samples": ["b", " a"], "best": 0}, {"samples": ["a", "c"], "best": 0}]
    )
    assert comparison_key(bare[0]) == comparison_key(bare[1]) != comparison_key(bare[2])


def test_a_split_never_parts_a_prompt() -> None:
    items = read([choice(prompt=f"{'abcde'[k % 5]} ", choice=k % 3) for k in range(30)])
    train, held_out = train_eval_split(items, 0.2, seed=1, key=comparison_key)
    assert len(train) == 24 and len(held_out) == 6
    assert not {item.prompt for item in train} & {item.prompt for item in held_out}


# ---- whatever the records hold -------------------------------------------------------------------------------------

NASTY = st.sampled_from(["", " ", "a", "film", "\0", "\ud800", "tie", "1", "nan", "1e999", "<eos>", "\u2028", HUGE])
NUMBERS = st.integers(-2, 4) | st.floats() | st.just(10**400)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | NASTY | st.just(b"\xff"),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.sampled_from(["", "a", "text"]), value, max_size=2),
    max_leaves=5,
)
CHATS = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system"]) | VALUES,
            "content": NASTY
            | VALUES
            | st.lists(st.dictionaries(st.sampled_from(["text", "type"]), VALUES), max_size=2),
        }
    ),
    max_size=3,
)
TEXT = NASTY | CHATS | VALUES
TOKENS = st.lists(st.integers(5, 36) | st.just(PAD) | VALUES, max_size=3)
COMPLETIONS = st.lists(st.sampled_from(["a", "film"]) | TEXT, max_size=3) | VALUES
OPTIONAL = {"prompt": TEXT, "margin": VALUES, "annotator": VALUES, "weight": VALUES, "ratings": VALUES, "tie": VALUES}
FORMATS = [
    {"completions": COMPLETIONS, "choice": VALUES},
    {"samples": COMPLETIONS, "best": NUMBERS},
    {"chosen": TEXT, "rejected": TEXT},
    {"chosen": CHATS, "rejected": CHATS},
    {"completion": TEXT, "rating": VALUES},
    {"completions": COMPLETIONS, "difference": VALUES},
    {"query": TOKENS, "sample0": TOKENS, "sample1": TOKENS, "best": VALUES},
    {"query": TOKENS, "sample": TOKENS, "score": VALUES},
]
RECORDS = st.one_of(
    *(st.lists(st.fixed_dictionaries(dict(form), optional=dict(OPTIONAL)), min_size=1, max_size=3) for form in FORMATS),
    st.lists(
        st.dictionaries(
            st.sampled_from(["prompt", "chosen", "rejected", "choice", "samples", "query", "sample", "x"]), TEXT
        ),
        max_size=3,
    ),
)
PARTS = [{"role": "assistant", "content": [{"text": HUGE}]}]
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "prompt_column": st.sampled_from(["prompt", "x", "prompt.a"]),
        "template": st.sampled_from(["{x}", "{prompt}"]),
        "limit": st.integers(1, 3),
        "chat": st.booleans(),
        "system_prompt": st.none() | st.just("be"),
    },
)
READS = {chat: inputs(chat=chat, longest=24) for chat in (False, True)}


@examples(100)
@example(records=[{"chosen": PARTS, "rejected": PARTS}], fields={}, chat=True, varied=False, weighed=False)
@given(records=RECORDS, fields=CONFIGS, chat=st.booleans(), varied=st.booleans(), weighed=st.booleans())
def test_any_records_become_comparisons_or_are_refused(
    records: list[Any], fields: dict[str, Any], chat: bool, varied: bool, weighed: bool
) -> None:
    weights = {"a": 2.0, "1": 0.5} if weighed else None
    try:
        with within(20.0):
            config = DataConfig(path="unused", **fields)
            kind, items = read_comparisons(
                enlarged(records), READS[chat], config, varied_k=varied, annotator_weights=weights
            )
    except TropismError as error:
        reason = str(error)
    else:
        check_comparisons(kind, items)
        return
    assert 0 < len(reason) < 6000


def check_comparisons(kind: str, items: list[Comparison]) -> None:
    assert items
    for item in items:
        assert all(0 < len(row) <= 24 and max(row) < 37 for row in item.ids)
        assert len(item.ids) == len(item.completions) and 0 < item.weight < float("inf")
        assert (item.target is None) == (kind == "choice")
        assert item.choice is None or 0 <= item.choice < len(item.ids)
