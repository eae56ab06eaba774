"""Data of the wrong kind: one error with the expected record, the first one that there is, and whose it would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from tiny_runs import METHODS, SCORED, Setting, make_recipe
from tropism.algorithms import ALGORITHMS
from tropism.algorithms.base import Reads
from tropism.build import assembly_for
from tropism.data.expected_records import EXAMPLES, LEARN_FROM, fits, rewards_of, shortened
from tropism.data.readers import Record
from tropism.errors import DataError, TropismError

RECORDS: dict[str, dict[str, Any]] = {
    "a text": {"text": "a cat sat."},
    "a demonstration": {"prompt": "a cat", "completion": " sat."},
    "a scored text": {"prompt": "a cat", "completion": " sat.", "reward": 0.5},
    "a pair": {"prompt": "a cat", "chosen": " sat.", "rejected": " ran."},
    "an opinion": {"prompt": "a cat", "completion": " sat.", "label": True},
    "choices": {"prompt": "a cat", "completions": [" sat.", " ran."], "choice": 0},
    "a question": {"question": "a cat?", "answer": "no"},
}

WRONG: list[tuple[str, str, str]] = [
    ("dpo", "a text", "dpo learns from pairs; expected records such as"),
    ("dpo", "a text", "(this is data for sft)"),
    ("dpo", "an opinion", "(this is data for kto)"),
    ("dpo", "a scored text", "(this is data for ilql and conditioned)"),
    ("kto", "a pair", "(this is data for dpo and reward-model)"),
    ("kto", "a demonstration", "(this is data for sft)"),
    ("kto", "a text", 'such as {"prompt": "The film was", "completion": " a joy.", "label": true}'),
    ("ilql", "a demonstration", "(this is data for sft)"),
    ("ilql", "a pair", "(this is data for dpo and reward-model)"),
    ("conditioned", "a demonstration", "conditioned learns from texts with rewards; expected records such as"),
    ("conditioned", "an opinion", "(this is data for kto)"),
    ("reward-model", "a demonstration", "reward-model learns from judgements; expected records such as"),
    ("reward-model", "a scored text", "(this is data for ilql and conditioned)"),
    ("sft", "a pair", 'sft learns from demonstrations; expected records such as {"prompt": "The film was", "comp'),
    ("sft", "choices", "(this is data for dpo and reward-model)"),
    ("sft", "a question", 'is {"question": "a cat?", "answer": "no"}. '),
    ("grpo", "a question", 'grpo learns from prompts that it completes; expected records such as {"prompt": "The fi'),
]


def train(method: str, data: Any, run: Path, **changes: Any) -> None:
    setting = Setting(method, False, "llama")
    recipe = make_recipe(setting, run, data=data, **changes)
    assembly_for(recipe)(recipe)


@pytest.mark.parametrize(("method", "record", "part"), WRONG)
def test_one_error_says_what_is_expected_what_is_there_and_whose_it_is(
    method: str, record: str, part: str, tmp_path: Path
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(RECORDS[record]) + "\n" for _ in range(3)))
    with pytest.raises(DataError) as caught:
        train(method, str(file), tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(f"{method} learns from ") and part in message
    assert f"{file}:1 is {json.dumps(RECORDS[record])}" in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


def test_the_first_record_of_a_list_is_shown_short_and_without_secrets(tmp_path: Path) -> None:
    token = "hf_" + "abcdefghij" * 4
    data = [{"text": f"{token} " + "long " * 100, "tags": ["a", "b", "c", "d"], "more": {"a": {"b": {"c": 1}}}}]
    with pytest.raises(DataError) as caught:
        train("dpo", data, tmp_path / "run")
    message = str(caught.value)
    assert "record 0 is {" in message and token[:20] not in message and len(message) < 700
    assert '"tags": ["a", "b", "..."]' in message


def test_values_of_every_kind_are_shown() -> None:
    assert shortened({"a": 1.5, "b": None, "c": b"x"}) == '{"a": 1.5, "b": null, "c": "<bytes>"}'
    assert shortened({"a": "x" * 50}) == json.dumps({"a": "x" * 37 + "..."})
    assert shortened({str(n): n for n in range(20)}).endswith('"7": 7, ...}')
    assert shortened({"a": 10**5000}) == '{"a": "a very large number"}'
    assert shortened({"a": [[[[1]]]], "b": "\x1b[31m"}) == '{"a": [["[...]"]], "b": "\\u001b[31m"}'


RIGHT_KIND: list[tuple[str, list[Any], str]] = [
    ("conditioned", [*SCORED, {"prompt": "a", "completion": " b"}], r"^record 6: .*reward"),
    ("conditioned", [{**SCORED[0], "reward": "0.5"}], r"^record 0: the column 'reward' holds the text"),
    ("dpo", [{"prompt": "a", "chosen": "", "rejected": "b"}], r"chosen is empty"),
    ("grpo", [{"prompt": None}], r"^record 0: the column 'prompt' is null"),
    ("sft", [{"messages": [{"role": "user", "content": "a"}]}], r"^record 0: the chat must end with an assistant"),
]


@pytest.mark.parametrize(("method", "data", "message"), RIGHT_KIND)
def test_errors_about_values_stay_as_they_are(method: str, data: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        train(method, data, tmp_path / "run")
    assert "learns from" not in str(caught.value)


def test_targets_of_other_names_stand_in_the_expected_record(tmp_path: Path) -> None:
    config = Setting("conditioned", False, "llama").with_algorithm(targets=("warm", "brief"))
    with pytest.raises(DataError, match=r'such as \{"prompt".*"warm": 0\.8, "brief": 0\.8\}; record 0 is'):
        train("conditioned", [*SCORED], tmp_path / "run", algorithm=config)


def test_held_out_data_is_told_apart(tmp_path: Path) -> None:
    data = Setting("sft", False, "llama").texts
    with pytest.raises(DataError, match=r"^sft learns from demonstrations;.*\(this is data for dpo and reward-model\)"):
        train("sft", data, tmp_path / "run", eval_data=[RECORDS["a pair"]])
    with pytest.raises(DataError, match=r"^record 0: .*null"):
        train("sft", data, tmp_path / "run", eval_data=[{"prompt": None, "text": None}])


def test_records_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tropism.data import readers

    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(RECORDS["a text"]) + "\n")
    opened: list[Path] = []
    read = readers.read_file
    monkeypatch.setattr(readers, "read_file", lambda path: opened.append(path) or read(path))
    with pytest.raises(DataError, match="dpo learns from pairs"):
        train("dpo", str(file), tmp_path / "run")
    assert opened == [file]


def test_every_kind_has_an_example_that_fits_and_methods_that_learn_from_it() -> None:
    kinds = set(get_args(Reads))
    assert set(EXAMPLES) == set(LEARN_FROM) == kinds
    for kind, (_, example) in EXAMPLES.items():
        assert fits(kind, Record(where="", columns=example), None, ("reward",))
    for name, config in METHODS.items():
        record = Record(where="", columns=_record(Setting(name, False, "llama").texts[0]))
        assert fits(config.reads, record, None, rewards_of(config)), name
    for kind, methods in LEARN_FROM.items():
        named = [name for name in methods.replace(",", "").split() if name in ALGORITHMS]
        assert named
        reads = {config.reads for name in named for config in METHODS.values() if config.name == name}
        assert kind in reads or kind in ("comparisons", "pairs", "episodes", "scored")


def _record(text: Any) -> dict[str, Any]:
    return {"text": text} if isinstance(text, str) else text


def test_errors_of_other_causes_pass(tmp_path: Path) -> None:
    with pytest.raises(TropismError, match="no such file"):
        train("dpo", str(tmp_path / "nothing.jsonl"), tmp_path / "run")
