"""What a classifier reward reads: pairs, long texts and empty ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from tiny_classifiers import WORDS, bert_logits, ids_of, letter_classifier, save_bert, save_tokenizer
from tropism.errors import ConfigError, RewardError
from tropism.rewards.raw import RowError
from tropism.rewards.registry import make_reward
from tropism.rewards.reward_model import RewardModelReward

LABELS = {0: "clean", 1: "toxic"}
BERT_PAIR = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
PROMPTS = ["the film was", "i saw it .", "the", "", "the film"]
COMPLETIONS = ["very very good .", "a film", "", "bad", "it was bad"]


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("paired"), labels=LABELS, pair=BERT_PAIR)


def logits_of(folder: Path, prompts: list[Any], completions: list[Any], **args: Any) -> list[float | None]:
    wanted = {"model": str(folder), "label": 1, "output": "logit", "device": "cpu", "text": "pair", **args}
    return list(make_reward("classifier", wanted)(prompts=prompts, completions=completions))


def by_hand(folder: Path, first: str, second: str) -> float:
    """The logit of [CLS] first [SEP] second [SEP], with the segments 0 0 0 1 1."""
    one, two = ids_of(first), ids_of(second)[1:]
    return float(bert_logits(folder, one + two, [0] * len(one) + [1] * len(two))[1])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_pair_has_the_tokenizers_separator_and_segments(paired: Path, batch_size: int) -> None:
    expected = [by_hand(paired, prompt, completion) for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert logits_of(paired, PROMPTS, COMPLETIONS, batch_size=batch_size) == pytest.approx(expected, abs=1e-5)
    one_text = [float(bert_logits(paired, ids_of(f"{PROMPTS[0]} {COMPLETIONS[0]}"))[1])]
    assert one_text != pytest.approx(expected[:1], abs=1e-3)
    unmarked = float(bert_logits(paired, ids_of(PROMPTS[0]) + ids_of(COMPLETIONS[0])[1:])[1])
    assert unmarked != pytest.approx(expected[0], abs=1e-3)


@pytest.mark.parametrize("pair", [BERT_PAIR, "[CLS] $A [SEP] [SEP] $B [SEP]", "$A:0 [SEP]:0 $B:1 [CLS]:2"])
def test_the_ids_of_a_pair_are_the_tokenizers_own(pair: str, tmp_path: Path) -> None:
    """Of BERT, of RoBERTa, which has no segments, and of XLNet, whose special tokens come last."""
    folder = save_bert(tmp_path, labels=LABELS, pair=pair)
    inputs: Any = make_reward("classifier", {"model": str(folder), "label": 1, "device": "cpu", "text": "pair"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        if not completion:
            continue  # transformers takes an empty second text for none, and the first for what is judged
        entry = inputs.inputs.read(prompt, completion)
        own = tokenizer(prompt, completion)
        assert (entry.ids, entry.segments) == (own["input_ids"], own["token_type_ids"])


def test_the_prompt_of_a_pair_gives_way_and_the_completion_stays_whole(paired: Path) -> None:
    got = logits_of(paired, ["i saw it . the film was"] * 3, ["very bad .", "bad", "very " * 5], max_length=8)
    expected = [by_hand(paired, "film was", "very bad ."), by_hand(paired, ". the film was", "bad")]
    assert got == pytest.approx([*expected, by_hand(paired, "", "very " * 5)], abs=1e-5)
    with pytest.raises(RowError, match=r"completion has 6 tokens and the classifier takes 5; .*cut_completion"):
        logits_of(paired, ["the", "the"], ["bad", "very " * 6], max_length=8)
    got = logits_of(paired, ["the film"], ["very " * 6], max_length=8, cut_completion=True)
    assert got == pytest.approx([by_hand(paired, "", "very " * 5)], abs=1e-5)


def test_a_pair_of_chat_messages_is_of_their_contents(paired: Path) -> None:
    prompt = [{"role": "user", "content": "the film"}, {"role": "user", "content": "was it good"}]
    got = logits_of(paired, [prompt], [[{"role": "assistant", "content": "very"}]])
    assert got == pytest.approx([by_hand(paired, "the film was it good", "very")], abs=1e-5)


def test_a_tokenizer_without_a_separator_makes_no_pairs(tmp_path: Path) -> None:
    GPT2ForSequenceClassification(
        GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=1, n_positions=16, id2label=LABELS)
    ).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, special=False, eos_token="[SEP]", pad_token="[PAD]")
    with pytest.raises(ConfigError, match=r"nothing between the texts of a pair; use 'prompt\+completion'"):
        logits_of(tmp_path, ["the"], ["bad"])
    folder = save_bert(tmp_path / "bert", labels=LABELS, pair=BERT_PAIR)
    with pytest.raises(ConfigError, match=r"max_length: 3 leaves no room"):
        logits_of(folder, ["the"], ["bad"], max_length=3)


def test_a_model_without_segments_is_given_none(tmp_path: Path) -> None:
    """GPT-2 would add the embeddings of tokens 0 and 1; a tokenizer that does not declare them has its reasons."""
    config = GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=1, n_positions=16, id2label=LABELS)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    save_tokenizer(tmp_path, pair=BERT_PAIR, model_input_names=names, eos_token="[SEP]", pad_token="[PAD]")
    undeclared = save_bert(tmp_path / "bert", labels=LABELS)
    save_tokenizer(undeclared, pair=BERT_PAIR, pad_token="[PAD]")
    for folder in (tmp_path, undeclared):
        reward: Any = make_reward("classifier", {"model": str(folder), "label": 1, "device": "cpu", "text": "pair"})
        assert reward.inputs.read("the", "bad").segments is None
        assert len(reward(["the"], ["bad"])) == 1


@pytest.mark.parametrize("text", ["completion", "prompt+completion", "pair"])
def test_pitfall_24_a_long_completion_after_a_short_first_prompt_is_read_to_its_end(tmp_path: Path, text: str) -> None:
    """RewardLM cuts every response to the token length of the first prompt."""
    folder = save_bert(tmp_path, labels=LABELS, positions=64, pair=BERT_PAIR)
    prompts = ["the", "i saw the film . it was very very good ."]
    long = "very " * 20 + "good ."
    changed = "very " * 20 + "bad ."
    for batch_size in (1, 16):
        args: dict[str, Any] = {"text": text, "batch_size": batch_size}
        both = logits_of(folder, prompts * 2, [long, long, changed, changed], **args)
        assert both[0] != pytest.approx(both[2], abs=1e-4) and both[1] != pytest.approx(both[3], abs=1e-4)
        alone = [logits_of(folder, prompts[1:], [completion], **args)[0] for completion in (long, changed)]
        assert [both[1], both[3]] == pytest.approx(alone, abs=1e-5)
    expected = float(bert_logits(folder, ids_of(long))[1])
    assert logits_of(folder, prompts[:1], [long], text="completion") == pytest.approx([expected], abs=1e-5)


def test_pitfall_24_no_letter_of_what_is_judged_is_lost() -> None:
    """The last letter of a long completion counts as the first does, whatever the prompts' lengths."""
    reward = letter_classifier({"z": 1.0}, label="toxic", output="log_odds", positions=600)
    completions = ["z" + "a" * 400, "a" * 400 + "z", "a" * 401, "az" * 200]
    assert reward(["a", "b" * 300, "", "c" * 9], completions) == [1.0, 1.0, 0.0, 200.0]
    both = letter_classifier({"z": 1.0}, label="toxic", output="log_odds", positions=10, text="prompt+completion")
    assert both(["z" * 5 + "bb", "zzzz"], ["cccccccz", "cccc"]) == [1.0, 4.0]
    assert both(["z" * 50], ["zcccc"]) == [6.0]  # five of the prompt's letters still fit


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, [0.0, 0.0, 1.0]),
        ({"eos": False}, [None, 0.0, 1.0]),
        ({"empty": None}, [None, None, 1.0]),
        ({"empty": -3}, [-3, -3, 1.0]),
    ],
    ids=str,
)
def test_empty_completions(args: dict[str, Any], expected: list[float | None]) -> None:
    reward = letter_classifier({"z": 1.0}, label="toxic", output="log_odds", **args)
    assert reward(["p", "z", "p"], ["", " ", "z"]) == expected
    chat = [{"role": "assistant", "content": None}]
    assert reward(["p"], [chat]) == expected[:1]
    assert reward([], []) == []


def test_a_trained_reward_model_has_no_opinion_of_what_it_cannot_read() -> None:
    reward = RewardModelReward(letter_classifier({"z": 1.0}, label="toxic", output="log_odds", eos=False), 0.5)
    assert reward(["p", "p"], ["", "z"]) == [None, 1.5]


def test_an_empty_completion_after_a_prompt() -> None:
    """Read with its prompt, unless it is told what it earns."""
    args: dict[str, Any] = {"label": "toxic", "output": "log_odds", "text": "prompt+completion"}
    assert letter_classifier({"z": 1.0}, **args)(["zz"], [""]) == [2.0]
    assert letter_classifier({"z": 1.0}, empty=0.5, **args)(["zz"], [""]) == [0.5]


def test_a_completion_that_is_too_long_stops_with_its_row() -> None:
    reward = letter_classifier({"z": 1.0}, label="toxic", positions=8)
    with pytest.raises(RewardError, match=r"completion has 9 tokens and the classifier takes 8") as caught:
        reward(["a", "a"], ["b", "z" * 9])
    assert isinstance(caught.value, RowError) and caught.value.row == 1
