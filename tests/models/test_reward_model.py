"""Reward models around every family: scores against the classifiers' own forward, whatever the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from tiny_models import EOS_ID, PAD_ID, VOCABULARY, tiny_model, tiny_tokenizer
from tiny_reward_models import DECODERS, FAMILIES, padded, tiny_body, tiny_encoder, tiny_reward_model
from tropism.errors import ModelError
from tropism.models.lora import LoRA, add_lora
from tropism.models.reward_files import load_reward_body
from tropism.models.reward_model import RewardModel

ROWS = [[5, 6, 7, 30], [8, 9, 10, 11, 12, 13, 14], [30], [7, 7, EOS_ID]]


@torch.no_grad()
def own_logits(model: RewardModel, rows: list[list[int]] = ROWS) -> list[float]:
    """The classifier's forward on one row at a time, which is all real tokens."""
    classifier = model.classifier
    out = []
    for row in rows:
        ids = tensor([row])
        out.append(float(classifier(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]))
    return out


@torch.no_grad()
def scores(model: RewardModel, ids: Tensor, lengths: Tensor) -> list[float]:
    found: Tensor = model(ids, lengths)
    assert found.dtype == torch.float32 and found.shape == lengths.shape
    return found.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_classifiers_own_times_gain_plus_bias(family: str) -> None:
    model, _ = tiny_reward_model(family)
    own = own_logits(model)
    assert max(own) - min(own) > 0.1
    assert scores(model, *padded(ROWS)) == pytest.approx(own, abs=1e-5)
    model.rescale(gain=-2.5, bias=0.75)
    assert scores(model, *padded(ROWS)) == pytest.approx([-2.5 * value + 0.75 for value in own], abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_pitfall_40_padding_changes_no_score(family: str) -> None:
    """Neither what pads are nor how many there are. Those within labels: tests/data/test_label_files.py."""
    model, _ = tiny_reward_model(family, gain=1.5, bias=-0.25)
    expected = [1.5 * value - 0.25 for value in own_logits(model)]
    lengths = tensor([len(row) for row in ROWS])
    for content in (PAD_ID, EOS_ID, VOCABULARY + 2, -100):  # the labels of the 2019 paper pad with n_vocab + 2
        ids = torch.full((len(ROWS), 12), content)
        for place, row in enumerate(ROWS):
            ids[place, : len(row)] = tensor(row)
        assert scores(model, ids, lengths) == pytest.approx(expected, abs=1e-5)


def test_a_text_may_hold_the_pad_token() -> None:
    """Lengths say what is real."""
    model, _ = tiny_reward_model("llama")
    row = [8, PAD_ID, 9, 10]
    ids = tensor([row])
    with torch.no_grad():
        hidden = model.classifier.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        expected = float(hidden[0, 3] @ model.head.weight[0])
    assert scores(model, *padded([row])) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_is_read_gets_a_gradient(family: str) -> None:
    model, _ = tiny_reward_model(family, gain=2.0)
    ids, lengths = padded(ROWS)
    model(ids, lengths).sum().backward()
    assert model.bias.grad is not None and float(model.bias.grad) == len(ROWS)
    assert model.gain.grad is not None
    assert float(model.gain.grad) == pytest.approx(sum(own_logits(model)), abs=1e-4)
    table = model.classifier.get_input_embeddings().weight.grad
    read = sorted({token for row in ROWS for token in row})
    assert all(float(table[token].abs().sum()) > 0 for token in read)


@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
def test_the_head_is_drawn_from_its_seed_alone(family: str) -> None:
    model, _ = tiny_reward_model(family)
    narrow = torch.nn.Linear(3, 1, bias=model.head.bias is not None)
    parent, _, name = model.head_name.rpartition(".")
    setattr(model.classifier.get_submodule(parent), name, narrow)
    state = torch.get_rng_state()
    drawn = []
    for seed in range(1000):
        model.start_head(seed=seed)
        drawn.append(narrow.weight.detach().clone())
    assert torch.equal(torch.get_rng_state(), state)
    # N(0, 1 / (H + 1)): within four standard errors, s / sqrt(2 n) of a deviation and s / sqrt(n) of a mean.
    weights = torch.cat(drawn)
    assert float(weights.std()) == pytest.approx(0.5, rel=4 / (2 * 3000) ** 0.5)
    assert abs(float(weights.mean())) < 4 * 0.5 / 3000**0.5
    if narrow.bias is not None:
        assert narrow.bias.tolist() == [0.0]
    assert len({tuple(row.flatten().tolist()) for row in drawn}) == 1000
    torch.manual_seed(99)
    model.start_head(seed=4)
    assert torch.equal(narrow.weight, drawn[4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [2, 5])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_weights_of_half_precision(family: str, seed: int, dtype: torch.dtype) -> None:
    """The classifiers' own heads round their logits to that precision, and ours does not."""
    model, _ = tiny_reward_model(family, seed=seed)
    exact = scores(model, *padded(ROWS))
    half = RewardModel(model.classifier.to(dtype))
    assert scores(half, *padded(ROWS)) == pytest.approx(exact, abs=0.3)
    assert half.dtype == dtype and half.gain.dtype == torch.float32


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("family", ["gpt2", "llama", "roberta", "distilbert"])
def test_an_adapter_leaves_the_head_alone(family: str, rank: int) -> None:
    """Also one of rank 1, whose layers have one output, too."""
    model, _ = tiny_reward_model(family, gain=1.5)
    before, head = scores(model, *padded(ROWS)), model.head
    adapted = RewardModel(add_lora(model.classifier, LoRA(rank=rank), seed=3, task=None, but=model.head_name))
    adapted.rescale(gain=1.5, bias=0.0)
    assert adapted.head is head and adapted.head_name == model.head_name
    assert scores(adapted, *padded(ROWS)) == pytest.approx(before, abs=1e-6)
    assert any(".lora_B." in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize("family", DECODERS)
def test_the_body_of_a_language_model_is_not_moved(family: str) -> None:
    """What is trained as a reward model is a copy, as the language model may be the policy."""
    language_model = tiny_model(family)
    before = {name: value.clone() for name, value in language_model.state_dict().items()}
    body = load_reward_body((language_model, tiny_tokenizer()), seed=0)
    with torch.no_grad():
        for parameter in body.model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in language_model.state_dict().items())


def test_a_body_without_one_score_is_refused() -> None:
    with pytest.raises(ModelError, match=r"BertForSequenceClassification has 0 heads with one output.*num_labels to 1"):
        RewardModel(tiny_encoder("bert", labels=3))
    body: Any = tiny_body("llama").model
    with pytest.raises(ModelError, match=r"LlamaModel has 0 heads"):
        RewardModel(body.base_model)
    body.config.pad_token_id = None
    with pytest.raises(ModelError, match=r"no pad token; set config.pad_token_id"):
        RewardModel(body)


def test_a_family_that_scores_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_reward_model("llama")
    kind: Any = type(model.classifier)
    own = kind.forward

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        output = own(self, *args, **named)
        output.logits = output.logits + 0.1
        return output

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(ModelError, match=r"in a way tropism does not know"):
        RewardModel(model.model)
