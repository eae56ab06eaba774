"""Tiny random sequence classifiers over a handful of words, in folders as transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

from tiny_models import tiny_tokenizer
from tropism.rewards.classifier import ClassifierReward
from tropism.rewards.label_score import LabelScore

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "film", "was", "good", "bad", "very", "a", ".", "i", "saw", "it"]


def save_tokenizer(
    folder: Path, *, special: bool = True, template: str | None = None, pair: str | None = None, **settings: Any
) -> None:
    """A tokenizer with one token per word of ``WORDS``.

    Args:
        special: [CLS] before every text and [SEP] behind it.
        pair: how it joins two texts, such as "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1".
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **settings)
    fast.chat_template = template
    fast.save_pretrained(folder)


def save_bert(
    folder: Path,
    *,
    labels: dict[int, str],
    problem_type: Any = None,
    positions: int = 12,
    pair: str | None = None,
    bias: list[float] | None = None,
) -> Path:
    """A classifier and its tokenizer.

    Args:
        labels: names by index; the number of outputs.
        pair: as of ``save_tokenizer``.
        bias: of the head; with it, the head reads nothing else, so these are the logits of every text.
    """
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        initializer_range=0.5,
        id2label=labels,
        label2id={name: i for i, name in labels.items()},
        problem_type=problem_type,
    )
    model = BertForSequenceClassification(config)
    if bias is not None:
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor(bias))
    model.save_pretrained(folder)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    save_tokenizer(folder, pair=pair, model_input_names=names, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    return folder


def ids_of(text: str) -> list[int]:
    """Ids of one text, written by hand: words between blanks."""
    return [1, *(WORDS.index(word) for word in text.split()), 2]


@torch.no_grad()
def bert_logits(folder: Path, ids: list[int], segments: list[int] | None = None) -> torch.Tensor:
    """[labels] of one text, by the model's own forward pass."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    types = None if segments is None else torch.tensor([segments])
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), token_type_ids=types).logits
    return logits[0]


class KnownLogits(torch.nn.Module):
    """A classifier with the labels `clean` and `toxic` whose logits are known by hand: minus and plus half of the sum
    of its tokens' weights, which is so the log-odds of `toxic`.

    Args:
        weights: token id -> what it adds; others add nothing.
    """

    device = torch.device("cpu")

    def __init__(self, weights: dict[int, float], *, problem_type: str | None = None, positions: int = 512) -> None:
        super().__init__()
        self.config = BertConfig(
            max_position_embeddings=positions,
            type_vocab_size=1,
            id2label={0: "clean", 1: "toxic"},
            label2id={"clean": 0, "toxic": 1},
            problem_type=problem_type,
        )
        self.weights = weights

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        sums = [
            sum(self.weights.get(token, 0.0) for token, real in zip(ids, mask, strict=True) if real)
            for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
        ]
        half = torch.tensor(sums) / 2
        return SequenceClassifierOutput(logits=torch.stack([-half, half], dim=-1))  # type: ignore[arg-type]


def letter_classifier(
    weights: dict[str, float], *, positions: int = 512, eos: bool = True, **args: Any
) -> ClassifierReward:
    """The reward of a ``KnownLogits`` that weighs letters, read by the tokenizer of the tiny models.

    Args:
        eos: whether that has an eos token, which stands for an empty text.
        args: of ``LabelScore.for_model`` and of ``ClassifierReward``.
    """
    tokenizer = tiny_tokenizer(bos=eos, eos=eos)
    ids: Any = {tokenizer.convert_tokens_to_ids(letter): weight for letter, weight in weights.items()}
    model = KnownLogits(ids, positions=positions)
    score = {name: args.pop(name) for name in ("label", "output", "complement", "head") if name in args}
    return ClassifierReward(model, tokenizer, score=LabelScore.for_model(model.config, **score), **args)
