"""Reward models in folders: as plain classifiers, back again, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from models.test_gguf import write_gguf
from tiny_models import EOS_ID, PAD_ID, VOCABULARY, tiny_model, tiny_tokenizer
from tiny_reward_models import (
    DECODERS,
    FACTS,
    FAMILIES,
    NORMAL,
    encoder_tokenizer,
    padded,
    tiny_body,
    tiny_encoder,
    tiny_reward_model,
)
from tropism.errors import ModelError
from tropism.foreign.reward_facts import FILE, OFFSET, RewardFacts
from tropism.models.loading import ModelConfig, load_model
from tropism.models.lora import LoRA, add_lora
from tropism.models.reward_files import PAD, is_reward_model, load_reward_body, load_reward_model, save_reward_model
from tropism.models.reward_model import RewardModel
from tropism.models.saving import save_adapter, save_plain

ROWS = [[5, 6, 7, 30], [8, 9, 10, 11, 12, 13, 14], [30], [7, 7, EOS_ID]]


@torch.no_grad()
def scores(model: RewardModel) -> Tensor:
    found: Tensor = model(*padded(ROWS))
    return found


@torch.no_grad()
def plain_logits(folder: Path) -> Tensor:
    """Of a batch that the folder's own tokenizer pads, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer.pad({"input_ids": ROWS}, return_tensors="pt")
    assert batch["input_ids"].shape == (4, 7)
    output: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert output.shape == (4, 1)
    return output[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_a_plain_classifier_with_the_same_scores(family: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_reward_model(family, gain=2.5, bias=-0.75)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    expected = scores(model)
    facts = save_reward_model(model, tokenizer, tmp_path / "model", replace(FACTS, normalised=NORMAL))
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())

    has_bias = family not in DECODERS
    assert facts.offset == (0.0 if has_bias else -0.75) and (facts.gain, facts.bias) == (2.5, -0.75)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config[OFFSET] == facts.offset and config["id2label"] == {"0": "reward"}
    assert config["pad_token_id"] == PAD_ID != EOS_ID
    torch.testing.assert_close(plain_logits(tmp_path / "model") + config[OFFSET], expected, atol=1e-5, rtol=0)

    again, _, read = load_reward_model(tmp_path / "model")
    assert read == facts and facts.normalised == NORMAL
    torch.testing.assert_close(scores(again), expected, atol=1e-5, rtol=0)
    written = save_reward_model(again, tokenizer, tmp_path / "twice", read)
    torch.testing.assert_close(plain_logits(tmp_path / "twice") + written.offset, expected, atol=1e-5, rtol=0)
    assert written.offset == facts.offset


@pytest.mark.parametrize("special", ["none", "eos", "left"])
def test_the_exported_pad_is_no_token_of_a_text(special: str, tmp_path: Path) -> None:
    """Plain classifiers read the token before the first pad: with eos as pad they would read the wrong one."""
    tokenizer = tiny_tokenizer(pad=special == "left")
    if special == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    if special == "left":  # as the tokenizers of many chat models are saved
        tokenizer.save_pretrained(tmp_path / "left")
        settings = tmp_path / "left" / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "padding_side": "left"}))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "left")
        assert tokenizer.padding_side == "left"
    model, tokenizer = tiny_reward_model("gpt2", gain=2.0, tokenizer=tokenizer)
    expected = scores(model)
    save_reward_model(model, tokenizer, tmp_path / "model", FACTS)
    saved = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved.pad_token == ("<pad>" if special == "left" else PAD)
    assert saved.pad_token_id == config["pad_token_id"] != saved.eos_token_id
    assert config["vocab_size"] == VOCABULARY + (special != "left")
    torch.testing.assert_close(plain_logits(tmp_path / "model"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("taken", ["bos", "unk"])
def test_a_pad_that_texts_hold_is_replaced(taken: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = getattr(tokenizer, f"{taken}_token")
    body = tiny_body("llama", tokenizer=tokenizer)
    assert body.tokenizer.pad_token == PAD and body.model.config.pad_token_id == VOCABULARY
    embeddings: Any = body.model.get_input_embeddings()
    assert embeddings.weight.shape[0] == VOCABULARY + 1 and not embeddings.weight[VOCABULARY].any()


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "roberta", "distilbert"])
def test_an_adapter_is_merged(family: str, tmp_path: Path) -> None:
    start, tokenizer = tiny_reward_model(family)
    before = scores(start)
    adapted = add_lora(start.classifier, LoRA(rank=2), seed=3, task=None, but=start.head_name)
    model = RewardModel(adapted)
    model.head.weight.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter is model.head.weight for parameter in trained) and model.gain.requires_grad
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(3):
        loss = (model(*padded(ROWS)) - torch.tensor([1.0, -1.0, 2.0, 0.0])).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = scores(model)
    assert float((expected - before).abs().max()) > 0.1
    facts = save_reward_model(model, tokenizer, tmp_path / "model", FACTS)
    assert facts.gain != 1.0 and facts.bias != 0.0
    torch.testing.assert_close(plain_logits(tmp_path / "model") + facts.offset, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores(load_reward_model(tmp_path / "model")[0]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores(model), expected)  # the live adapter stays


def test_the_body_may_come_from_anywhere(tmp_path: Path) -> None:
    language_model = tiny_model("llama", seed=5)
    save_plain(language_model, tiny_tokenizer(), tmp_path / "policy")
    save_plain(tiny_encoder("bert", seed=5), encoder_tokenizer(), tmp_path / "encoder")
    with torch.no_grad():
        ids = torch.tensor([ROWS[1]])
        wanted = language_model.base_model(input_ids=ids).last_hidden_state
    sources = (
        str(tmp_path / "policy"),
        tmp_path / "policy",
        ModelConfig(name=str(tmp_path / "policy"), device="cpu"),
        load_model(str(tmp_path / "policy")),
        (language_model, tiny_tokenizer()),
    )
    for source in sources:
        body = load_reward_body(source, seed=2)
        assert type(body.model).__name__ == "LlamaForSequenceClassification"
        with torch.no_grad():
            found = body.model.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert type(load_reward_body(tmp_path / "encoder", seed=2).model).__name__ == "BertForSequenceClassification"


def test_a_gguf_file_as_body(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = write_gguf(tmp_path / "tiny.gguf")
    body = load_reward_body(str(tmp_path / "tiny.gguf"), seed=2)
    ids = torch.tensor([ROWS[1]])
    with torch.no_grad():
        wanted = expected.base_model(input_ids=ids).last_hidden_state
        found = body.model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    model = RewardModel(body.model)
    model.start_head(seed=3)
    save_reward_model(model, body.tokenizer, tmp_path / "model", FACTS)
    torch.testing.assert_close(plain_logits(tmp_path / "model"), scores(model), atol=1e-5, rtol=0)


def test_what_the_files_lack_depends_on_the_seed_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config: Any = tiny_encoder("bert").config
    masked = BertForMaskedLM(config)
    masked.save_pretrained(tmp_path)
    encoder_tokenizer().save_pretrained(tmp_path)
    found = []
    for global_seed, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        body: Any = load_reward_body(tmp_path, seed=seed).model.base_model
        found.append(body.pooler.dense.weight)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    with caplog.at_level(logging.WARNING, logger="tropism"):
        load_reward_body(tmp_path, seed=7)
    assert "has no pooler, so that it starts from random weights" in caplog.text


def test_bodies_that_cannot_be(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    ids: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": PAD_ID, "decoder_start_token_id": PAD_ID}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, **ids))
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(t5\); a reward model is an encoder or a causal LM"):
        load_reward_body((t5, tiny_tokenizer()), seed=0)
    t5.save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(t5\)"):
        load_reward_body(tmp_path / "t5", seed=0)

    adapted = add_lora(tiny_model("llama"), LoRA(rank=2), seed=0)
    with pytest.raises(ModelError, match=r"cannot start from an adapter; merge it"):
        load_reward_body((adapted, tiny_tokenizer()), seed=0)
    save_adapter(adapted, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"adapter is an adapter; .*merge it"):
        load_reward_body(tmp_path / "adapter", seed=0)

    save_plain(tiny_encoder("bert", labels=3), encoder_tokenizer(), tmp_path / "three")
    with pytest.raises(ModelError, match=r"classifier with 3 labels, and a reward model has one score"):
        load_reward_body(tmp_path / "three", seed=0)
    with pytest.raises(ModelError, match=r"starts from a hub id, a folder.*not \('bert', None\)"):
        load_reward_body(("bert", None), seed=0)
    with pytest.raises(ModelError, match=r"leave trust_remote_code out"):
        load_reward_body(ModelConfig(name=str(tmp_path / "three"), trust_remote_code=True), seed=0)


def test_folders_that_are_no_reward_model(tmp_path: Path) -> None:
    save_plain(tiny_model("llama"), tiny_tokenizer(), tmp_path / "policy")
    assert not is_reward_model(tmp_path / "policy") and not is_reward_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"policy holds no reward model \(reward_model.json\)"):
        load_reward_model(tmp_path / "policy")
    with pytest.raises(ModelError, match=r"there is no folder .*polic; the closest is .*policy"):
        load_reward_model(tmp_path / "polic")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model, tokenizer = tiny_reward_model("llama")
    save_reward_model(model, tokenizer, folder, replace(FACTS, normalised=NORMAL))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bias", float("nan"), "NaN is no setting"),
        ("gain", float("inf"), "inf is no finite number"),
        ("gain", True, "True is no finite number"),
        ("offset", "0", "'0' is no finite number"),
        ("offset", None, "None is no finite number"),
        ("text", "prompt", "text is 'prompt'"),
        ("text", ["completion"], "text is"),
        ("max_length", float("inf"), "inf is no whole number above 0"),
        ("max_length", -3, "-3 is no whole number"),
        ("max_length", 2.5, "2.5 is no whole number"),
        ("normalised", [], "indices must be integers"),
        ("normalised", {"mean": 0.0}, "'std'"),
        ("normalised", {"mean": 0.0, "std": 1.0, "samples": float("inf"), "policy": "x"}, "inf is no whole number"),
        ("normalised", "yes", "string indices"),
    ],
)
def test_hostile_facts(saved: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    content = json.loads((saved / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**content, key: value}))
    with pytest.raises(ModelError, match=rf"reward_model.json is (damaged|no valid JSON): .*{message}"):
        RewardFacts.read(tmp_path)
    del content[key]
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"is damaged: '{key}'"):
        RewardFacts.read(tmp_path)


def test_facts_that_are_no_object(tmp_path: Path) -> None:
    for text in ("[]", "3", "{", "\x00" * 20):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ModelError, match=r"reward_model.json (is no valid JSON|holds no JSON object)"):
            RewardFacts.read(tmp_path)


def test_a_reward_model_without_its_head_is_refused(saved: Path, tmp_path: Path) -> None:
    """A fresh one would give random scores."""
    shutil.copytree(saved, tmp_path / "model")
    weights = load_file(saved / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is damaged: it has no weights for score.weight"):
        load_reward_model(tmp_path / "model")


def test_a_policy_is_not_started_from_a_reward_model(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification; a causal LM is needed"):
        load_model(str(saved))
