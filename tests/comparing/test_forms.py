"""What methods make of the same scored completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_tokenizer
from tropism.comparing.forms import form_of, write_form
from tropism.data.demonstrations import make_demonstrations
from tropism.data.opinions import make_opinions
from tropism.data.pairs import make_pairs
from tropism.errors import DataError


def row(prompt: int, completion: str, reward: float | None, end: str = "eos") -> dict[str, Any]:
    return {
        "prompt_index": prompt,
        "prompt": ["a cat", "the dog"][prompt],
        "completion": completion,
        "finish_reason": end,
        "reward": reward,
        "terms": {"early": reward},
        "tokens": 3,
        "seconds": 0.1,
    }


POOL = [
    row(0, " sat.", 0.1),
    row(0, " ran", 0.9, "length"),
    row(1, " is", 0.4),
    row(1, " so", 0.4),
    row(0, " no", 0.5),
    row(0, " oh", None),
    row(0, " we", 0.3),
]


def texts(records: list[dict[str, Any]]) -> list[str]:
    return [record["completion"] for record in records]


def test_demonstrations_are_the_better_part_of_each_prompt() -> None:
    assert texts(form_of(POOL, "demonstrations", keep=0.5, where="pool")) == [" ran", " no", " is"]
    assert texts(form_of(POOL, "demonstrations", keep=0.01, where="pool")) == [" ran", " is"]


def test_pairs_are_best_against_worst_and_equal_ones_are_none() -> None:
    (pair,) = form_of(POOL, "pairs", keep=0.5, where="pool")
    assert (pair["chosen"], pair["rejected"]) == (" ran", " sat.")
    assert (pair["chosen_finish_reason"], pair["rejected_finish_reason"]) == ("length", "eos")
    many = [row(0, f" {'na' * place}", float(place)) for place in range(1, 17)]
    assert len(form_of(many, "pairs", keep=0.5, where="pool")) == 2


def test_opinions_are_about_the_mean_of_the_prompt() -> None:
    """0.1, 0.9, 0.5 and 0.3 have the mean 0.45; where all are equal nobody has one."""
    made = form_of(POOL, "opinions", keep=0.5, where="pool")
    assert [(one["completion"], one["label"]) for one in made] == [
        (" sat.", False),
        (" ran", True),
        (" no", True),
        (" we", False),
    ]


def test_scored_texts_are_all_that_have_a_reward() -> None:
    made = form_of(POOL, "scored", keep=0.5, where="pool")
    assert len(made) == 6 and made[0]["reward"] == 0.1 and made[0]["early"] == 0.1


def test_nothing_to_learn_is_an_error_that_says_why() -> None:
    with pytest.raises(DataError, match="the same reward"):
        form_of([row(1, " is", 0.4), row(1, " so", 0.4)], "pairs", keep=0.5, where="the pool of seed 0")
    with pytest.raises(DataError, match="none of them has a reward"):
        form_of([row(1, " is", None)], "scored", keep=0.5, where="the pool of seed 0")


def test_what_was_cut_has_no_end_to_learn_in_any_form(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id

    def data(form: Any) -> Any:
        return write_form(form_of(POOL, form, keep=0.25, where="pool"), tmp_path / f"{form}.jsonl")

    cut = make_demonstrations(data("demonstrations"), tokenizer, max_length=None)[0]
    assert eos not in cut.completion_ids
    liked = make_opinions(data("opinions"), tokenizer, max_length=None)
    assert [one.completion_ids[-1] == eos for one in liked] == [True, False, True, True]
    (pair,) = make_pairs(data("pairs"), tokenizer, max_length=None)
    assert eos not in pair.chosen_ids and pair.rejected_ids[-1] == eos


def test_several_completions_say_how_each_ended() -> None:
    tokenizer = tiny_tokenizer()
    record = {"prompt": "a", "completions": [" cat", " dog", " so"], "choice": 1}
    ends = {"finish_reasons": ["eos", "length", "length"]}
    first, second = make_pairs([record | ends], tokenizer, max_length=None)
    eos = tokenizer.eos_token_id
    assert [ids[-1] == eos for ids in (first.chosen_ids, first.rejected_ids, second.rejected_ids)] == [
        False,
        True,
        False,
    ]
    with pytest.raises(DataError, match="finish_reasons must be a list with one for each of 3"):
        make_pairs([record | {"finish_reasons": ["eos"]}], tokenizer, max_length=None)
