"""Tiny random reward models, around decoders and encoders, and a tokenizer that frames texts as encoders' do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from tiny_models import BOS_ID, EOS_ID, PAD_ID, VOCABULARY, tiny_model, tiny_tokenizer
from tropism.foreign.reward_facts import Normalised, RewardFacts
from tropism.models.loading import LoadedModel
from tropism.models.reward_files import load_reward_body
from tropism.models.reward_model import RewardModel
from tropism.types import pad_rows

DECODERS = ("gpt2", "gpt_neox", "opt", "bloom", "llama", "qwen2", "gemma2")

_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": PAD_ID,
}
_ENCODERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "bert": (BertConfig, _BERT),
    "roberta": (RobertaConfig, {**_BERT, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}),
    "distilbert": (
        DistilBertConfig,
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
            "pad_token_id": PAD_ID,
        },
    ),
    "deberta": (DebertaV2Config, {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
}
ENCODERS = tuple(_ENCODERS)
FAMILIES = (*DECODERS, *ENCODERS)

FACTS = RewardFacts(text="prompt+completion", max_length=None, gain=1.0, bias=0.0, offset=0.0, normalised=None)
NORMAL = Normalised(mean=0.0, std=1.0, samples=256, policy="demo")


def tiny_encoder(family: str, *, seed: int = 0, labels: int = 1, **overrides: Any) -> PreTrainedModel:
    """A random sequence classifier whose weights are wide enough for scores to differ."""
    kind, fields = _ENCODERS[family]
    config = kind(**{**fields, "num_labels": labels, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape)
                wide = 0.4 if "embeddings" in name else 1.5 / parameter.shape[-1] ** 0.5
                parameter.copy_(wide * noise) if parameter.dim() > 1 else parameter.add_(0.1 * noise)
    model.eval()
    return model


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, with a token before and one after every text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS_ID), ("<eos>", EOS_ID)]
    )
    return tokenizer


def tiny_body(family: str, *, seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None) -> LoadedModel:
    """A sequence classifier with one output, and its tokenizer."""
    if family in ENCODERS:
        return load_reward_body((tiny_encoder(family, seed=seed), tokenizer or encoder_tokenizer()), seed=seed)
    return load_reward_body((tiny_model(family, seed=seed), tokenizer or tiny_tokenizer()), seed=seed)


def tiny_reward_model(
    family: str,
    *,
    seed: int = 0,
    gain: float = 1.0,
    bias: float = 0.0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> tuple[RewardModel, Any]:
    """A reward model with a head of its own, and its tokenizer."""
    body = tiny_body(family, seed=seed, tokenizer=tokenizer)
    model = RewardModel(body.model)
    model.start_head(seed=seed + 1)
    if model.head.bias is not None:
        torch.nn.init.constant_(model.head.bias, 0.3)
    model.rescale(gain=gain, bias=bias)
    return model, body.tokenizer


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """What a reward model is called with: [N, longest] ids padded on the right, and their lengths [N]."""
    return pad_rows(rows), torch.tensor([len(row) for row in rows])
