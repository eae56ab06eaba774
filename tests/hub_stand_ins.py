"""Tiny stand-ins, in folders named as their hub ids, for models that pages and notebooks name."""

from __future__ import annotations

from pathlib import Path

from tiny_reward_models import encoder_tokenizer, tiny_encoder

HATE_SPEECH = "facebook/roberta-hate-speech-dynabench-r4-target"
SENTIMENT = "lvwerra/distilbert-imdb"
LABELS = {HATE_SPEECH: ("nothate", "hate"), SENTIMENT: ("NEGATIVE", "POSITIVE")}
"""What the classifiers of the hub call their labels."""


def save_classifier(folder: Path, labels: tuple[str, ...], *, seed: int = 5) -> None:
    """A random encoder of 128 positions with these labels, and its tokenizer of characters."""
    model = tiny_encoder("bert", seed=seed, labels=len(labels), max_position_embeddings=128)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    model.save_pretrained(folder)
    tokenizer = encoder_tokenizer()
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)


def save_classifiers(working_directory: Path) -> None:
    """Every one of ``LABELS``, where a relative path of that name finds it."""
    for name, labels in LABELS.items():
        save_classifier(working_directory / name, labels)
