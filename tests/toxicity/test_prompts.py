"""Which prompts are measured: every form of data, all of it, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tropism.data.config import DataConfig
from tropism.errors import ConfigError, DataError
from tropism.toxicity.prompts import Choice, Framing, Selection, choose, encode

RECORDS = [
    {
        "filename": f"{number}.txt",
        "challenging": number == 2,
        "prompt": {"text": text, "toxicity": toxicity, "insult": 0.1},
        "continuation": {"text": " and so on", "toxicity": 0.1},
    }
    for number, (text, toxicity) in enumerate([("the cat", 0.2), ("you", 0.5), ("he said", 0.9), ("why", None)])
]
"""The format of RealToxicityPrompts."""


def texts(choice: Choice) -> list[Any]:
    return [one.text for one in choice.prompts]


def test_real_toxicity_prompts_bring_their_toxicity(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, RECORDS)).encode()))
    choice = choose(str(path), Selection())
    assert texts(choice) == ["the cat", "you", "he said", "why"]
    assert [one.toxicity for one in choice.prompts[:3]] == [0.2, 0.5, 0.9]
    assert math.isnan(choice.prompts[3].toxicity)
    assert choice.prompts[2].columns["filename"] == "2.txt"


def test_what_tropism_data_makes_of_them_is_read_the_same() -> None:
    choice = choose([{"prompt": "you", "prompt_toxicity": 0.5, "continuation": " all"}], Selection())
    assert texts(choice) == ["you"] and choice.prompts[0].toxicity == 0.5


def test_plain_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line\nanother\n")
    (tmp_path / "b.csv").write_text("text,toxicity\none,0.25\ntwo,\n")
    assert texts(choose(str(tmp_path / "a.txt"), Selection())) == ["one line", "another"]
    table = choose(str(tmp_path / "b.csv"), Selection())
    assert texts(table) == ["one", "two"]
    assert table.prompts[0].toxicity == 0.25 and math.isnan(table.prompts[1].toxicity)


def test_parquet_and_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(RECORDS)
    assert texts(choose(data, Selection())) == ["the cat", "you", "he said", "why"]
    data.to_parquet(tmp_path / "p.parquet")
    assert len(choose(str(tmp_path / "p.parquet"), Selection()).prompts) == 4


def test_nothing_is_cut_unless_asked_for() -> None:
    many = [f"prompt {number}" for number in range(200)]
    assert texts(choose(many, Selection())) == many
    part = choose(many, Selection(skip=10, limit=5))
    assert texts(part) == many[10:15] and part.records == 200


def test_challenging_only() -> None:
    choice = choose(RECORDS, Selection(challenging=True))
    assert texts(choice) == ["he said"] and (choice.records, choice.filtered) == (4, 1)
    with pytest.raises(DataError, match="challenging"):
        choose(["a text"], Selection(challenging=True))


def test_no_prompt_left_is_an_error_that_names_the_filters() -> None:
    calm = [{**record, "challenging": False} for record in RECORDS]
    with pytest.raises(DataError, match="none of the 4 prompts is left: challenging keeps 0"):
        choose(calm, Selection(challenging=True))
    with pytest.raises(DataError, match="skip leaves out 9"):
        choose(RECORDS, Selection(skip=9))


def test_a_template_without_the_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not hold \{prompt\}"):
        Framing(custom_prompt="User: \nAssistant:")


def test_the_template_and_other_braces(model: tuple[Any, Any]) -> None:
    framing = Framing(custom_prompt="user, {prompt}, {name}? ")
    assert framing.applied("a {b} c", "") == "user, a {b} c, {name}? "
    (asked,) = encode(
        choose(["hi"], Selection()), model[1], Framing(custom_prompt="so {prompt}!"), room=None, overlong="error"
    )
    assert asked.text == "hi" and asked.prompt.text == "so hi!"
    assert model[1].decode(asked.prompt.ids) == "so hi!"


def test_chat(model: tuple[Any, Any]) -> None:
    (asked,) = encode(choose(["hi"], Selection()), model[1], Framing(chat=True), room=None, overlong="error")
    assert model[1].decode(asked.prompt.ids) == "<user>hi<assistant>"
    messages = [[{"role": "user", "content": "hi"}]]
    (asked,) = encode(choose(messages, Selection()), model[1], Framing(), room=None, overlong="error")
    assert asked.text == "hi" and model[1].decode(asked.prompt.ids) == "<user>hi<assistant>"
    with pytest.raises(ConfigError, match="list of chat messages"):
        encode(
            choose(messages, Selection()), model[1], Framing(custom_prompt="x {prompt}"), room=None, overlong="error"
        )
    with pytest.raises(ConfigError, match="--chat"):
        Framing(system_prompt="be kind")


def test_pitfall_27_a_prompt_is_never_cut_by_a_count_of_characters(model: tuple[Any, Any]) -> None:
    """The original cut at 128 tokens and the characters of the template; here all is read, or it is an error."""
    long = "a b " * 100
    (asked,) = encode(choose([long], Selection()), model[1], Framing(), room=400, overlong="error")
    assert model[1].decode(asked.prompt.ids) == long
    choice = choose([long, "short"], Selection())
    with pytest.raises(DataError, match="record 0: the prompt has 400 tokens"):
        encode(choice, model[1], Framing(), room=50, overlong="error")
    assert [one.text for one in encode(choice, model[1], Framing(), room=50, overlong="leave_out")] == ["short"]
    cut = encode(choice, model[1], Framing(), room=50, overlong="truncate_left")
    assert [len(one.prompt.ids) for one in cut] == [50, 5]
    with pytest.raises(DataError, match="none of the 2 prompts is left"):
        encode(choice, model[1], Framing(), room=3, overlong="leave_out")


def test_a_data_config_says_which_column(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"a": "one", "b": "two"}\n{"a": "three", "b": "four"}\n')
    assert texts(choose(DataConfig(path=str(path), prompt_column="b", limit=1), Selection())) == ["two"]
    with pytest.raises(ConfigError, match=r"data\.template"):
        choose(DataConfig(path=str(path), template="{a}"), Selection())


@pytest.mark.parametrize("value", [1.5, -0.1, "high"])
def test_a_toxicity_that_is_none(value: Any) -> None:
    with pytest.raises(DataError, match="from 0 to 1"):
        choose([{"prompt": {"text": "a", "toxicity": value}}], Selection())


def test_the_column_of_the_toxicity_can_be_named() -> None:
    records = [{"text": "a", "toxicity": "high", "judged": {"by_people": 0.5}}]
    with pytest.raises(DataError, match=r"toxicity is 'high'.*toxicity_column, --toxicity-column"):
        choose(records, Selection())
    assert math.isnan(choose(records, Selection(prompt_column="text", toxicity_column="none")).prompts[0].toxicity)
    named = Selection(prompt_column="text", toxicity_column="judged.by_people")
    assert choose(records, named).prompts[0].toxicity == 0.5
    with pytest.raises(DataError, match="Did you mean 'toxicity'"):
        choose(records, Selection(toxicity_column="toxcity"))


@pytest.mark.parametrize("wrong", [{"skip": -1}, {"limit": 0}, {"overlong": "cut"}])
def test_wrong_selections(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Selection(**wrong)


def test_the_real_thing(shared: Path) -> None:
    """5,000 records, all of which are measured."""
    path = shared / "data" / "real_toxicity_prompts" / "sample_5000.jsonl.gz"
    choice = choose(str(path), Selection())
    assert len(choice.prompts) == choice.records == 5000
    with gzip.open(path, "rt") as file:
        own = [json.loads(line)["prompt"] for line in file]
    assert texts(choice) == [prompt["text"] for prompt in own]
    assert sum(one.toxicity >= 0.5 for one in choice.prompts) == 1249
    assert sum(math.isnan(one.toxicity) for one in choice.prompts) == 19
    assert len(choose(str(path), Selection(challenging=True)).prompts) == 49
