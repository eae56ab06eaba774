"""What a recipe holds out: no prompt of it is trained on, however its records are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_model, tiny_tokenizer
from tropism.algorithms import GRPO, SFT, AlgorithmConfig, RewardConditioned
from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.data.prompts import make_prompts
from tropism.data.split import train_eval_split
from tropism.errors import DataError
from tropism.recipe_data import demonstrations_of, prompts_of, scored_of
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling

WORDS = ("a cat", "the dog", "oh", "is it so", "we ran", "no", "you", "a big mat")
SCORED = [
    {"prompt": word, "completion": f" {verb}.", "reward": number + len(word) / 7, "row": f"{word}-{verb}"}
    for number, verb in enumerate(("sat", "ran", "is"))
    for word in WORDS
]
"""Three completions of each of eight prompts, those of one prompt far apart."""


def recipe_of(folder: Path, algorithm: AlgorithmConfig, records: Any, **changes: Any) -> Recipe:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    data = {"eval_fraction": 0.3, **changes.pop("data", {})}
    fields: dict[str, Any] = {
        "model": (tiny_model("llama", seed=3), tiny_tokenizer()),
        "algorithm": algorithm,
        "data": DataConfig(path=str(path), **data),
        "reward": RewardConfig.of("vader"),
        "sampling": Sampling(max_new_tokens=6),
        "seed": 5,
    }
    return Recipe(**{**fields, **changes})


def ids(text: str) -> tuple[int, ...]:
    return tuple(make_prompts([text], tiny_tokenizer())[0].ids)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", [RewardConditioned(), SFT()], ids=["scored", "demonstrations"])
def test_texts_and_prompts_come_from_one_split(tmp_path: Path, method: AlgorithmConfig, seed: int) -> None:
    recipe = recipe_of(tmp_path, method, SCORED, seed=seed)
    tokenizer: Any = tiny_tokenizer()
    read: Any = scored_of if method.reads == "scored" else demonstrations_of
    parts = read(recipe, tokenizer, context_length=None, **({"taken": 1} if method.reads == "scored" else {}))
    _, prompts = prompts_of(recipe, tokenizer, context_length=None)
    trained, kept = {t.prompt_ids for t in parts.train}, {t.prompt_ids for t in parts.held_out}
    assert trained and kept and not trained & kept
    assert len(parts.train) + len(parts.held_out) == 24
    asked = [prompt.ids for prompt in prompts]
    assert set(asked) == kept and len(asked) == len(kept) == 2  # 0.3 of 24 rows has room for two prompts of three
    # Each prompt once, in the order of the data, with the columns of its first record.
    assert [prompt.columns["row"] for prompt in prompts] == [
        record["row"] for record in SCORED[:8] if ids(str(record["prompt"])) in kept
    ]


def test_prompts_of_plain_data_are_parted_as_ever(tmp_path: Path) -> None:
    records = [{"prompt": record["prompt"]} for record in SCORED]
    recipe = recipe_of(tmp_path, GRPO(), records)
    every = make_prompts([str(record["prompt"]) for record in SCORED], tiny_tokenizer())
    expected = [[p.text for p in part] for part in train_eval_split(every, 0.3, seed=5)]
    parts = prompts_of(recipe, tiny_tokenizer(), context_length=None)
    assert [[p.text for p in part] for part in parts] == expected  # repeated ones stay repeated


def test_first_words_are_the_prompt_and_without_them_the_text_is(tmp_path: Path) -> None:
    openings = ("a cat", "the dog", "you and")
    records = [{"text": f"{a} {b} on", "reward": n + len(b)} for n, b in enumerate(("sat", "ran")) for a in openings]
    records = [{"text": "short", "reward": 1.0}, *records]
    recipe = recipe_of(tmp_path, RewardConditioned(), records, data={"first_words": 2})
    parts = scored_of(recipe, tiny_tokenizer(), context_length=None, taken=1)
    _, prompts = prompts_of(recipe, tiny_tokenizer(), context_length=None)
    assert len(prompts) == 1 and prompts[0].text in openings
    assert len(parts.held_out) == 2 and {t.prompt_ids for t in parts.held_out} == {prompts[0].ids}
    assert len(parts.train) == 4
    whole = recipe_of(tmp_path, RewardConditioned(), records)
    parts = scored_of(whole, tiny_tokenizer(), context_length=None, taken=1)
    _, prompts = prompts_of(whole, tiny_tokenizer(), context_length=None)
    kept = {(*t.prompt_ids, *t.completion_ids[:-1]) for t in parts.held_out}
    assert len(prompts) == 2 and {p.ids for p in prompts} == kept


def test_the_limit_counts_texts_before_they_are_parted(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, RewardConditioned(), SCORED, data={"limit": 10})
    parts = scored_of(recipe, tiny_tokenizer(), context_length=None, taken=1)
    assert len(parts.train) + len(parts.held_out) == 10
    assert {text.rewards[0] for text in (*parts.train, *parts.held_out)} == {r["reward"] for r in SCORED[:10]}


def test_chats_are_parted_before_their_answers(tmp_path: Path) -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for answer in ("yes", "no")
        for question in ("is it so", "a cat", "oh")
    ]
    recipe = recipe_of(tmp_path, SFT(), [{"messages": chat} for chat in chats])
    parts = demonstrations_of(recipe, tokenizer, context_length=None)
    _, prompts = prompts_of(recipe, tokenizer, context_length=None)
    assert len(prompts) == 1 and len(parts.held_out) == 2
    assert {text.prompt_ids for text in parts.held_out} == {prompts[0].ids}
    assert isinstance(prompts[0].text, list) and [m["role"] for m in prompts[0].text] == ["user"]


def test_columns_that_only_trained_records_have_are_there_in_every_prompt(tmp_path: Path) -> None:
    for seed in range(3):
        records = [{"prompt": w, "completion": " is.", "reward": len(w), **({"label": 1} if w == "oh" else {})}
                   for w in WORDS]  # fmt: skip
        recipe = recipe_of(tmp_path, RewardConditioned(), records, seed=seed)
        _, prompts = prompts_of(recipe, tiny_tokenizer(), context_length=None)
        assert all("label" in prompt.columns for prompt in prompts)


# ---- what is read as a prompt ----------------------------------------------------------------------------------------


def test_a_long_text_that_is_only_learned_does_not_end_the_run(tmp_path: Path) -> None:
    long = "the big dog sat on a mat and ran and ran and ran and ran"
    records = [{"text": text, "reward": len(text)} for text in (*WORDS, long)]
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "a cat"}\n{"prompt": "no"}\n{"prompt": "a cat"}')
    room: dict[str, Any] = {"context_length": len(ids(long)) + 3, "taken": 1}
    data = {"eval_fraction": 0.0}
    recipe = recipe_of(tmp_path, RewardConditioned(), records, data=data, eval_data=str(held))
    train, held_out = prompts_of(recipe, tiny_tokenizer(), **room)
    assert (train, [p.text for p in held_out]) == ([], ["a cat", "no"])
    alone = recipe_of(tmp_path, RewardConditioned(), records, data=data)
    train, held_out = prompts_of(alone, tiny_tokenizer(), **room, leave_out=True)
    assert [p.text for p in train] == list(WORDS) and held_out == []
    with pytest.raises(DataError, match=r"at most .* fit beside the completion"):
        prompts_of(alone, tiny_tokenizer(), **room)
    grpo = recipe_of(tmp_path, GRPO(), records, data=data)
    with pytest.raises(DataError, match=r"at most .* fit beside the completion"):
        prompts_of(grpo, tiny_tokenizer(), **room)


def test_held_out_rewards_may_all_be_equal_but_not_those_to_learn_from(tmp_path: Path) -> None:
    records = [{"prompt": w, "completion": " is.", "reward": 0.5 + len(w) / 10} for w in WORDS]
    recipe = recipe_of(tmp_path, RewardConditioned(), records, data={"eval_fraction": 0.01}, reward=None)
    assert len(scored_of(recipe, tiny_tokenizer(), context_length=None, taken=1).held_out) == 1
    same = tmp_path / "same.jsonl"
    same.write_text('{"prompt": "you", "completion": " ran.", "reward": 2}')
    recipe = recipe_of(
        tmp_path, RewardConditioned(), records, data={"eval_fraction": 0.0}, eval_data=str(same), reward=None
    )
    assert len(scored_of(recipe, tiny_tokenizer(), context_length=None, taken=1).held_out) == 1
    # The only reward that differs is held out, so that nothing is left to learn from.
    equal = [{"prompt": w, "completion": " is.", "reward": 1.0} for w in WORDS]
    recipe = recipe_of(tmp_path, RewardConditioned(), equal, reward=None, data={"eval_fraction": 0.01})
    out = scored_of(recipe_of(tmp_path, RewardConditioned(), records, reward=None, data={"eval_fraction": 0.01}),
                    tiny_tokenizer(), context_length=None, taken=1).held_out[0]  # fmt: skip
    odd = next(r for r in equal if ids(str(r["prompt"])) == out.prompt_ids)
    odd["reward"] = 3.0
    recipe = recipe_of(tmp_path, RewardConditioned(), equal, reward=None, data={"eval_fraction": 0.01})
    with pytest.raises(DataError, match=r"all 7 rewards of 'reward' are 1, so there is nothing to ask for"):
        scored_of(recipe, tiny_tokenizer(), context_length=None, taken=1)
