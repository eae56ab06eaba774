"""The classifier reward on tiny random models, against their own forward, one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from tiny_classifiers import WORDS, bert_logits, ids_of, save_bert, save_tokenizer
from tropism.errors import ConfigError, ModelError, RewardError
from tropism.rewards import RewardConfig, RewardHarness
from tropism.rewards.registry import make_reward
from tropism.types import RewardInputs

PROMPTS = ["the film was", "i saw it .", "the", ""]
COMPLETIONS = ["very very good .", "a film", "", "bad"]


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"), labels={0: "negative", 1: "neutral", 2: "positive"})


def reward_of(
    folder: Path, prompts: list[Any] = PROMPTS, completions: list[Any] = COMPLETIONS, **args: Any
) -> list[float]:
    reward = make_reward("classifier", {"model": str(folder), "device": "cpu", **args})
    return list(reward(prompts=prompts, completions=completions))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_probability_of_a_softmax_head(sentiment: Path, batch_size: int) -> None:
    expected = []
    for completion in COMPLETIONS:
        scores = bert_logits(sentiment, ids_of(completion)).exp()
        expected.append(float(scores[2] / scores.sum()))
    assert len({round(value, 4) for value in expected}) == 4
    assert reward_of(sentiment, label="positive", batch_size=batch_size) == pytest.approx(expected, abs=1e-6)


def test_other_outputs_and_labels(sentiment: Path) -> None:
    logits = torch.stack([bert_logits(sentiment, ids_of(completion)) for completion in COMPLETIONS])
    assert reward_of(sentiment, label=0, output="logit") == pytest.approx(logits[:, 0].tolist(), abs=1e-5)
    p = reward_of(sentiment, label="Neutral")
    odds = [float(torch.tensor(value).logit()) for value in p]
    assert reward_of(sentiment, label="neutral", output="log_odds") == pytest.approx(odds, abs=1e-4)


def test_prompt_and_completion_together(sentiment: Path) -> None:
    texts = [f"{prompt} {completion}" for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = [float(bert_logits(sentiment, ids_of(text))[1]) for text in texts]
    spaced = [f"{prompt} " for prompt in PROMPTS]
    got = reward_of(sentiment, prompts=spaced, label=1, output="logit", text="prompt+completion")
    assert got == pytest.approx(expected, abs=1e-5)


def test_a_long_prompt_loses_its_beginning_and_the_completion_stays_whole(sentiment: Path) -> None:
    got = reward_of(
        sentiment,
        ["i saw it the film was "],
        ["very bad ."],
        label=1,
        output="logit",
        text="prompt+completion",
        max_length=7,
    )
    assert got == pytest.approx([float(bert_logits(sentiment, ids_of("film was very bad ."))[1])], abs=1e-5)
    got = reward_of(
        sentiment, ["i saw it "], ["very bad ."], label=1, output="logit", text="prompt+completion", max_length=5
    )
    assert got == pytest.approx([float(bert_logits(sentiment, ids_of("very bad ."))[1])], abs=1e-5)


@pytest.mark.parametrize("text", ["completion", "prompt+completion"])
def test_a_completion_that_does_not_fit_is_an_error_unless_cutting_is_allowed(sentiment: Path, text: str) -> None:
    long = "very " * 11
    with pytest.raises(RewardError, match=r"completion has 11 tokens and the classifier takes 10; .*cut_completion"):
        reward_of(sentiment, ["the ", "the "], ["good", long], label=1, text=text)
    got = reward_of(sentiment, ["the "], [long], label=1, text=text, cut_completion=True, output="logit")
    assert got == pytest.approx([float(bert_logits(sentiment, ids_of("very " * 10))[1])], abs=1e-5)


def test_multi_label_head(tmp_path: Path) -> None:
    folder = save_bert(tmp_path, labels={0: "toxic", 1: "insult"}, problem_type="multi_label_classification")
    logits = [float(bert_logits(folder, ids_of(completion))[1]) for completion in COMPLETIONS]
    expected = [1 / (1 + 2.718281828459045**-value) for value in logits]
    assert reward_of(folder, label="insult") == pytest.approx(expected, abs=1e-6)
    assert reward_of(folder, label="insult", output="log_odds") == pytest.approx(logits, abs=1e-5)


def test_regression_head(tmp_path: Path) -> None:
    folder = save_bert(tmp_path, labels={0: "score"})
    expected = [float(bert_logits(folder, ids_of(completion))[0]) for completion in COMPLETIONS]
    assert reward_of(folder) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match=r"regression without probabilities; use 'logit'"):
        reward_of(folder, output="probability")


@pytest.mark.parametrize("settings", [{}, {"pad_token": "[SEP]"}, {"pad_token": "[PAD]"}], ids=str)
def test_decoder_with_and_without_a_pad_token(settings: dict[str, str], tmp_path: Path) -> None:
    """The last token's logits, also where the text ends with the eos token and eos is the pad token."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        initializer_range=0.5,
        id2label={0: "score"},
    )
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, special=False, eos_token="[SEP]", **settings)
    completions = ["very good .", "a film was bad", "it", "i saw the", "very good [SEP]"]
    expected = []
    for text in completions:
        ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
        with torch.no_grad():
            expected.append(float(model.score(model.transformer(input_ids=ids).last_hidden_state)[0, -1, 0]))
    assert reward_of(tmp_path, completions, completions) == pytest.approx(expected, abs=1e-5)
    assert len(reward_of(tmp_path, ["the"], [""])) == 1


def test_chat_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    folder = save_bert(tmp_path, labels={0: "score"})
    each = "{% for m in messages %}[CLS] {{ m['content'] }} [SEP] {% endfor %}"
    template = each + "{% if add_generation_prompt %}[CLS] {% endif %}"
    prompt = [{"role": "user", "content": "was it good"}]
    completion = [{"role": "assistant", "content": "very"}]
    plain = reward_of(folder, [prompt], [completion], text="prompt+completion")
    assert plain == pytest.approx([float(bert_logits(folder, ids_of("was it good very"))[0])], abs=1e-5)
    save_tokenizer(folder, template=template, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    ids = [*ids_of("was it good"), *ids_of("very")]
    got = reward_of(folder, [prompt], [completion], text="prompt+completion")
    assert got == pytest.approx([float(bert_logits(folder, ids)[0])], abs=1e-5)
    got = reward_of(folder, [prompt], [completion], text="prompt+completion", max_length=5)
    assert got == pytest.approx([float(bert_logits(folder, [*ids_of("good")[1:], *ids_of("very")])[0])], abs=1e-5)


def test_roberta_positions_leave_room_for_padding(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        pad_token_id=1,
        id2label={0: "score"},
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="[CLS]", eos_token="[SEP]")
    assert len(reward_of(tmp_path, ["x"], ["very " * 8])) == 1  # 8 words and 2 special tokens: positions 2 to 11
    with pytest.raises(RewardError, match=r"takes 8"):
        reward_of(tmp_path, ["x"], ["very " * 9])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_model_that_judges_by_the_last_place_is_given_no_pads(tmp_path: Path, batch_size: int) -> None:
    """XLNet would judge by a pad; a batch holds texts of one length then."""
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=len(WORDS), d_model=16, n_layer=2, n_head=2, d_inner=32, initializer_range=0.5, id2label={0: "score"}
    )
    model = XLNetForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="[PAD]")
    expected = []
    for text in COMPLETIONS:
        with torch.no_grad():
            expected.append(float(model(input_ids=torch.tensor([ids_of(text)])).logits))
    assert reward_of(tmp_path, batch_size=batch_size) == pytest.approx(expected, abs=1e-5)


def test_in_the_harness(sentiment: Path) -> None:
    reward = {"use": "classifier", "args": {"model": str(sentiment), "label": "positive", "device": "cpu"}}
    inputs = RewardInputs(
        prompts=list(PROMPTS), completions=list(COMPLETIONS), completion_ids=[[1]] * 4, finish_reasons=["eos"] * 4
    )
    batch = RewardHarness(RewardConfig.of({"terms": {"warm": reward}})).score(inputs)
    assert batch.per_completion.tolist() == pytest.approx(reward_of(sentiment, label="positive"))
    assert not batch.per_completion.requires_grad


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "choose one of: 0 negative, 1 neutral, 2 positive"),
        ({"label": "positiv"}, "Did you mean 'positive'"),
        ({"label": 3}, "no label 3"),
        ({"label": -1}, "no label -1"),
        ({"label": 0, "output": "prob"}, "Did you mean 'probability'"),
        ({"label": 0, "text": "both"}, "unknown value 'both'"),
        ({"label": 0, "batch_size": 0}, "batch_size"),
        ({"label": 0, "max_length": 2}, "leaves no room"),
    ],
)
def test_bad_arguments(sentiment: Path, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reward_of(sentiment, **args)


def test_a_model_that_is_not_there_or_has_no_head(tmp_path: Path, sentiment: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load the classifier .*missing"):
        reward_of(tmp_path / "missing")
    BertModel(BertConfig.from_pretrained(sentiment)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pad_token="[PAD]")
    with pytest.raises(ModelError, match=r"is no sequence classifier: it has no weights for classifier.bias"):
        reward_of(tmp_path, label=0)
