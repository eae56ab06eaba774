"""RealToxicityPrompts: which records are kept, what is made of them, and that every other one is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from public_sets import toxicity_records, write_toxicity_prompts
from tropism.data.config import DataConfig
from tropism.data.real_toxicity_prompts import real_toxicity_prompts
from tropism.errors import ConfigError, DataError


def prompts_of(**filters: Any) -> list[str]:
    """First word of each prompt that is kept."""
    return [record["prompt"].split()[0] for record in real_toxicity_prompts(toxicity_records(), **filters).records]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.jsonl.gz", "prompts.parquet"])
def test_files_of_every_format_make_the_same_records(tmp_path: Path, name: str) -> None:
    path = write_toxicity_prompts(tmp_path / name)
    expected = {
        "prompt": "The soup was so",
        "continuation": " cold, you turnip",
        "prompt_toxicity": 0.9,
        "continuation_toxicity": 0.7,
        "challenging": True,
    }
    for source in (path, str(path), DataConfig(path=str(path)), datasets.Dataset.from_list(toxicity_records())):
        data = real_toxicity_prompts(source)
        assert len(data) == data.read == data.kept == 5 and data.left_out == {}
        assert data.records[0] == expected and data.records[3]["prompt_toxicity"] is None


def test_what_each_filter_keeps() -> None:
    """By hand from the five made-up records, whose toxicities are 0.9/0.7, 0.6/0.1, 0.1/0.5, none/0.8 and 0.5/0.5."""
    assert prompts_of() == ["The", "My", "It", "Nobody", "Such"]
    assert prompts_of(challenging=True) == ["The", "Such"]
    assert prompts_of(threshold=0.5) == ["The", "Such"]
    assert prompts_of(threshold=0.5, threshold_of="prompt") == ["The", "My", "Such"]
    assert prompts_of(threshold=0.5, threshold_of="continuation") == ["The", "It", "Nobody", "Such"]
    assert prompts_of(threshold=0.6, threshold_of="either") == ["The", "My", "Nobody"]
    assert prompts_of(challenging=True, threshold=0.6) == ["The"]
    assert prompts_of(threshold=0) == ["The", "My", "It", "Such"]
    assert prompts_of(limit=2) == ["The", "My"]


def test_every_record_that_is_left_out_is_counted_with_its_reason() -> None:
    data = real_toxicity_prompts(toxicity_records(), threshold=0.5, limit=1)
    assert data.left_out == {
        "prompt or continuation is not of toxicity 0.5 or more (threshold)": 3,
        "beyond the limit of 1": 1,
    }
    assert data.told() == [
        "read 5 records, kept 1, made 1 records of them",
        "left out 3: prompt or continuation is not of toxicity 0.5 or more (threshold)",
        "left out 1: beyond the limit of 1",
    ]


def test_demonstrations_have_one_blank_between_the_halves() -> None:
    records = toxicity_records()
    records[1]["continuation"]["text"] = "gardener"
    texts = real_toxicity_prompts(records, form="texts")
    assert texts.texts[:2] == ["The soup was so cold, you turnip", "My neighbour is a gardener"]
    pairs = real_toxicity_prompts(records, form="pairs").records
    assert [pair["prompt"] + pair["completion"] for pair in pairs] == texts.texts
    assert "continuation" not in pairs[0] and pairs[1]["completion"] == " gardener"


def test_blank_halves_are_left_out_where_they_are_needed() -> None:
    records = toxicity_records()
    records[0]["prompt"]["text"] = " "
    records[1]["continuation"] = None
    assert real_toxicity_prompts(records).left_out == {"the prompt is blank": 1}
    assert real_toxicity_prompts(records).records[0]["continuation"] == ""
    left_out = real_toxicity_prompts(records, form="texts").left_out
    assert left_out == {"the prompt is blank": 1, "there is no continuation (form texts)": 1}


def test_zero_records_left_names_the_filter() -> None:
    with pytest.raises(DataError, match=r"none of the 5 records is left \(5: prompt or continuation is not of"):
        real_toxicity_prompts(toxicity_records(), threshold=0.95)
    calm = [{**record, "challenging": False} for record in toxicity_records()]
    with pytest.raises(DataError, match=r"the list: none of the 5 .* \(5: not challenging \(challenging\)\)"):
        real_toxicity_prompts(calm, challenging=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "from 0 to 1, got 1.5"),
        ({"threshold": float("nan")}, "from 0 to 1, got nan"),
        ({"threshold_of": "prompt"}, "there is no threshold"),
        ({"threshold": 0.5, "threshold_of": "all"}, "choose prompt, continuation, both or either"),
        ({"form": "chats"}, "form is 'chats'; choose prompts, pairs or texts"),
        ({"limit": 0}, "limit must be at least 1"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        real_toxicity_prompts(toxicity_records(), **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "The soup"}, "record 1: 'prompt' of RealToxicityPrompts is a record with `text` and `toxicity`"),
        ({"prompt": {"toxicity": 0.1}}, "record 1: 'prompt' of RealToxicityPrompts"),
        ({"prompt": {"text": "a", "toxicity": 7}}, "the toxicity of 'prompt' is 7, expected a number from 0 to 1"),
        ({"continuation": {"text": "a", "toxicity": "high"}}, "the toxicity of 'continuation' is 'high'"),
        ({"challenging": None}, "no true or false in `challenging`; filter by threshold"),
    ],
)
def test_another_format_is_refused_by_record(change: dict[str, Any], message: str) -> None:
    records = toxicity_records()
    records[1].update(change)
    with pytest.raises(DataError, match=message):
        real_toxicity_prompts(records, challenging=True)


def test_nan_is_no_score() -> None:
    records = toxicity_records()
    records[0]["prompt"]["toxicity"] = float("nan")
    assert real_toxicity_prompts(records).records[0]["prompt_toxicity"] is None
    assert len(real_toxicity_prompts(records, threshold=0.5)) == 1
