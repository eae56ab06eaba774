"""What makes a scorer another one, and where that cannot be told."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_classifiers import save_bert
from toxicity.stand_ins import PROMPTS
from tropism import Sampling, ToxicityMeter
from tropism.errors import ConfigError
from tropism.toxicity import scorer_identity
from tropism.toxicity.scorers import Scorers

Scorer = Callable[..., list[float]]


def identity(scorer: Any) -> str:
    scorers = Scorers({"one": scorer})
    assert not scorers.unknown
    return scorers.identity


def enclosing(value: Any) -> Scorer:
    return lambda completions: [0.5 if value in text else 0.1 for text in completions]


def with_default(word: str) -> Scorer:
    def scorer(completions: list[str], word: str = word) -> list[float]:
        return [0.5 if word in text else 0.1 for text in completions]

    return scorer


def bound(completions: list[str], word: str) -> list[float]:
    return [0.5 if word in text else 0.1 for text in completions]


class Instance:
    def __init__(self, word: Any) -> None:
        self.word = word

    def __call__(self, completions: list[str]) -> list[float]:
        return [0.5 if self.word in text else 0.1 for text in completions]


MAKERS: list[Callable[[Any], Any]] = [
    enclosing,
    with_default,
    lambda word: functools.partial(bound, word=word),
    Instance,
    lambda word: Instance(word).__call__,
    lambda word: {"use": bound, "args": {"word": word}},
    lambda word: Instance({word, "other"}),
    lambda word: Instance(torch.tensor([float(ord(word))])),
]


@pytest.mark.parametrize("make", MAKERS)
def test_what_a_scorer_holds_makes_it_another(make: Callable[[Any], Any]) -> None:
    assert identity(make("a")) == identity(make("a")) != identity(make("b"))


def test_two_functions_of_one_line_and_helpers_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    # fmt: off
    one, other = (lambda completions: [0.1] * len(completions)), (lambda completions: [0.2] * len(completions))
    # fmt: on
    assert identity(one) != identity(other)
    monkeypatch.setitem(globals(), "HELD", 0.1)
    before = identity(reads_a_global)
    monkeypatch.setitem(globals(), "HELD", 0.2)
    assert identity(reads_a_global) != before


HELD = 0.1


def reads_a_global(completions: list[str]) -> list[float]:
    return [HELD for _ in completions]


def test_a_changed_classifier_is_another_scorer(tmp_path: Path) -> None:
    save_bert(tmp_path / "judge", labels={0: "calm", 1: "rude"})
    term = {"use": "classifier", "args": {"model": str(tmp_path / "judge"), "label": "rude", "device": "cpu"}}
    before = identity(term)
    assert identity(term) == before
    weights = tmp_path / "judge" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1  # one weight
    weights.write_bytes(content)
    assert identity(term) != before


def test_the_packages_of_profanity_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("profanity_check")
    before, real = identity("profanity"), scorer_identity._version
    for package in ("alt-profanity-check", "scikit-learn"):
        monkeypatch.setattr(scorer_identity, "_version", lambda name, one=package: "9" if name == one else real(name))
        assert identity("profanity") != before
        monkeypatch.undo()


def test_a_folder_of_a_scorer_with_hidden_state_is_not_gone_on_with(model: Any, tmp_path: Path) -> None:
    def meter() -> ToxicityMeter:
        lock = threading.Lock()

        def guarded(completions: list[str]) -> list[float]:
            with lock:
                return [0.1 for _ in completions]

        return ToxicityMeter(model, guarded, sampling=Sampling(max_new_tokens=3))

    assert meter().measure(PROMPTS).scorers == ("guarded",)
    assert meter().measure(PROMPTS, tmp_path / "fresh").scorers == ("guarded",)
    with pytest.raises(ConfigError, match=r"scorer guarded cannot be told.* it holds a _thread.lock"):
        meter().measure(PROMPTS, tmp_path / "fresh")
    meter().measure(PROMPTS, tmp_path / "fresh", overwrite=True)
