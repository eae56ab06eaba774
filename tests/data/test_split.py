from __future__ import annotations

import pytest

from tropism.data.config import DataConfig, Preparation
from tropism.data.demonstrations import Demonstration, read_demonstrations
from tropism.data.prompts import make_prompts
from tropism.data.readers import locate_records
from tropism.data.split import PromptsOfTexts, prompt_key, train_eval_split
from tropism.errors import ConfigError, DataError
from tropism.types import Prompt


def prompts(texts):
    return [Prompt(text=text, ids=(index,)) for index, text in enumerate(texts)]


def test_split_is_deterministic_by_seed_and_keeps_the_order():
    items = [f"text {index}" for index in range(100)]
    train, held_out = train_eval_split(items, 0.1, seed=3)
    assert (train, held_out) == train_eval_split(items, 0.1, seed=3)
    assert held_out != train_eval_split(items, 0.1, seed=4)[1]
    assert len(held_out) == 10 and sorted(train + held_out) == sorted(items)
    assert [item for item in items if item in train] == train
    assert [item for item in items if item in held_out] == held_out


def test_what_is_held_out_does_not_depend_on_the_order():
    items = [f"text {index}" for index in range(30)]
    forward, backward = train_eval_split(items, 0.2, seed=0), train_eval_split(items[::-1], 0.2, seed=0)
    assert set(forward[1]) == set(backward[1])


@pytest.mark.parametrize("seed", range(5))
def test_equal_prompts_stay_together(seed):
    items = prompts([f"text {index % 7}" for index in range(40)])
    train, held_out = train_eval_split(items, 0.3, seed=seed)
    assert train and held_out
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert len(train) + len(held_out) == 40


def test_equal_chats_stay_together():
    chat = [{"role": "user", "content": "hi"}]
    train, held_out = train_eval_split(prompts([chat, "a", list(chat)]), 0.3, seed=0)
    assert [p.text for p in train].count(chat) in (0, 2)
    assert len(held_out) == 1


def test_a_large_group_is_not_held_out_where_a_smaller_one_will_do():
    for seed in range(10):
        _, held_out = train_eval_split(prompts(["same"] * 50 + ["other", "third"]), 0.05, seed=seed)
        assert {p.text for p in held_out} <= {"other", "third"}
        _, held_out = train_eval_split(prompts(["same"] * 50 + ["other"] * 9), 0.05, seed=seed)
        assert {p.text for p in held_out} == {"other"}


def test_demonstrations_of_one_prompt_stay_together_and_plain_texts_part():
    def demonstration(prompt, completion):
        return Demonstration(prompt_ids=prompt, completion_ids=completion, loss_mask=(True,) * len(completion))

    pairs = [demonstration((1, p), (c,)) for p in (5, 6, 7) for c in (8, 9)]
    train, held_out = train_eval_split(pairs, 0.3, seed=0)
    assert len(held_out) == 2 and len({d.prompt_ids for d in held_out}) == 1
    texts = [demonstration((1,), (c,)) for c in range(10)]
    train, held_out = train_eval_split(texts, 0.2, seed=0)
    assert len(train) == 8 and len(held_out) == 2


def test_prompts_that_are_equal_once_prepared_stay_together_as_prompts_and_as_texts(make_tokenizer):
    """Eight raw prompts, of which the start and the length leave four."""
    tokenizer = make_tokenizer()
    config = DataConfig(path="unused", prepare=Preparation(start_text="saw", length=2))
    raw = [
        f"{who} saw the {what} {end}"
        for what in ("red", "blue", "film", "good")
        for who, end in (("I", "it"), ("it", "I"))
    ]
    rows = [{"prompt": prompt, "completion": "bad"} for prompt in [*raw, "I was bad"]]
    records = locate_records(rows)
    texts = PromptsOfTexts(records, config, tokenizer)
    pairs = read_demonstrations(records, tokenizer, config, max_length=None)
    assert len(pairs) == 8
    for seed in range(4):
        train, held_out = train_eval_split(pairs, 0.25, seed=seed, key=lambda pair: texts.key(pair[0]))
        assert len(held_out) == 2 and len({pair[1].prompt_ids for pair in held_out}) == 1
        assert not {pair[1].prompt_ids for pair in held_out} & {pair[1].prompt_ids for pair in train}
        prompts = make_prompts(*texts.readable(record for record, _ in held_out)[:1], tokenizer, config)
        kept = train_eval_split(make_prompts(rows, tokenizer, config), 0.25, seed=seed)[1]
        assert [p.ids for p in prompts] == [p.ids for p in kept] == [pair[1].prompt_ids for pair in held_out]
        assert [texts.key(record) for record, _ in held_out] == [prompt_key(p) for p in prompts]


def test_refusals():
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="above 0 and below 1"):
            train_eval_split(["a", "b"], fraction, seed=0)
    for items in ([], ["a"], ["a", "a"]):
        with pytest.raises(DataError, match="different prompts cannot be parted"):
            train_eval_split(items, 0.5, seed=0)
    assert [len(part) for part in train_eval_split(["a", "b"], 0.99, seed=0)] == [1, 1]
    assert [len(part) for part in train_eval_split(["a", "b"], 0.01, seed=0)] == [1, 1]
