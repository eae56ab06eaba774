"""Attribution of rewards: classifiers by their gradients, any other reward by leaving pieces out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_classifiers import save_bert
from tiny_models import tiny_tokenizer
from tiny_reward_models import FACTS, NORMAL, tiny_reward_model
from tropism.attribution import attribute_reward
from tropism.attribution.methods import gradient_x_input
from tropism.attribution.rewards import ClassifierFunction
from tropism.errors import ConfigError, RewardError
from tropism.models.reward_files import save_reward_model
from tropism.rewards import RewardConfig
from tropism.rewards.registry import make_reward

LABELS = {0: "dull", 1: "fine", 2: "grand"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    return save_bert(tmp_path_factory.mktemp("bert"), labels=LABELS, positions=24, pair=pair)


def of_bert(folder: Path, **args: Any) -> dict[str, Any]:
    return {"use": "classifier", "args": {"model": str(folder), "label": "grand", "device": "cpu", **args}}


# Classifiers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["completion", "prompt+completion", "pair"])
@pytest.mark.parametrize("output", ["probability", "log_odds", "logit"])
def test_a_classifier_by_integrated_gradients(bert: Path, text: str, output: str) -> None:
    config = of_bert(bert, text=text, output=output)
    found = attribute_reward(config, "the film", " was very good")
    assert found.method == "integrated_gradients" and found.baseline is not None
    score = make_reward("classifier", config["args"])
    assert found.value == pytest.approx(score(["the film"], [" was very good"])[0], abs=1e-5)
    assert sum(found.scores) == pytest.approx(found.value - found.baseline, abs=0.02 * abs(found.value) + 1e-4)
    words = [piece.strip() for piece, part in zip(found.pieces, found.parts, strict=True) if part == "completion"]
    assert words == ["was", "very", "good"]
    read = [piece.strip() for piece, part in zip(found.pieces, found.parts, strict=True) if part == "prompt"]
    assert read == ([] if text == "completion" else ["the", "film"])


def test_gradient_x_input_of_a_classifier_is_a_slope(bert: Path) -> None:
    reward = make_reward("classifier", of_bert(bert, output="log_odds")["args"])
    reward.model.double()
    function = ClassifierFunction(reward, "", "the film was good", weight=-2.0)
    scores = gradient_x_input(function).values[0]
    kept, step = torch.arange(6)[None], 1e-4
    for place in range(6):
        ends = []
        for sign in (1, -1):
            embeddings = function.embeddings.clone()
            embeddings[place] *= 1 + sign * step
            with torch.no_grad():
                ends.append(float(function(embeddings[None], kept)))
        assert float(scores[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-5)


def test_occlusion_of_a_classifier_leaves_its_tokens_out(bert: Path) -> None:
    """Special tokens stay; each other token is left out of what is read."""
    score = make_reward("classifier", of_bert(bert)["args"])
    full, without = score(["", ""], ["the film was good", "the was good"])
    found = attribute_reward(of_bert(bert), "", "the film was good", method="occlusion")
    assert found.parts == ("special", *["completion"] * 4, "special")
    assert found.scores[0] == found.scores[-1] == 0
    assert found.scores[2] == pytest.approx(full - without, abs=1e-5)


def test_the_weight_of_the_term_counts(bert: Path) -> None:
    one = attribute_reward(of_bert(bert), "", "the film was good", method="gradient_x_input")
    other = attribute_reward(of_bert(bert) | {"weight": -2.0}, "", "the film was good", method="gradient_x_input")
    assert other.value == pytest.approx(-2 * one.value)
    assert list(other.scores) == pytest.approx([-2 * score for score in one.scores], abs=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_reward_model(family: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_reward_model(family, seed=1, gain=2.0, bias=-0.5)
    save_reward_model(model, tokenizer, tmp_path / "rm", replace(FACTS, normalised=NORMAL))
    score = make_reward("reward-model", {"model": str(tmp_path / "rm"), "device": "cpu"})
    reward = RewardConfig.of({"use": "reward-model", "args": {"model": str(tmp_path / "rm"), "device": "cpu"}})
    found = attribute_reward(reward, "a cat", " sat on")
    assert found.value == pytest.approx(score(["a cat"], [" sat on"])[0], abs=1e-4)
    assert found.baseline is not None
    assert sum(found.scores) == pytest.approx(found.value - found.baseline, rel=0.03, abs=1e-3)
    assert "".join(piece for piece, part in zip(found.pieces, found.parts, strict=True) if part == "prompt") == "a cat"


# Any other reward ----------------------------------------------------------------------------------------------------


def points(prompts: list[str], completions: list[str]) -> list[float]:
    """3 for "good", -2 for "not", half a point for each word of the prompt."""
    return [
        3.0 * ("good" in completion) - 2.0 * ("not" in completion) + 0.5 * len(prompt.split())
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def test_words_by_hand() -> None:
    found = attribute_reward(points, "The film", " was not good.")
    assert found.pieces == ("The", " film", " was", " not", " good.")
    assert found.parts == ("prompt", "prompt", "completion", "completion", "completion")
    assert found.scores == (0.5, 0.5, 0.0, -2.0, 3.0)
    assert (found.value, found.method, found.unit, found.baseline) == (2.0, "occlusion", "reward", None)


def test_the_weighted_sum_is_explained() -> None:
    """Neither clipped nor scaled: 2 * points - letters."""

    def letters(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    terms = {"points": {"use": points, "weight": 2.0}, "letters": {"use": letters, "weight": -1.0}}
    reward = RewardConfig.of({"terms": terms, "clip": 0.1})
    found = attribute_reward(reward, "", "so good")
    assert found.scores == (-3.0, 2 * 3.0 - 5.0)  # "good" has 3 letters less, and "so" 5
    assert found.what == "reward points + letters"


def test_pieces_without_which_there_is_no_opinion() -> None:
    def picky(completions: list[str]) -> list[float | None]:
        return [1.0 if "a" in text else None for text in completions]

    found = attribute_reward(picky, "", "a b")
    assert math.isnan(found.scores[0]) and found.scores[1] == 0
    with pytest.raises(RewardError, match="no opinion"):
        attribute_reward(picky, "", "b")


def test_tokens_of_the_model() -> None:
    found = attribute_reward(points, "", "good", unit="token", tokenizer=tiny_tokenizer())
    assert found.pieces == ("g", "o", "o", "d") and found.scores == (3.0, 3.0, 3.0, 3.0)
    with pytest.raises(ConfigError, match="give its tokenizer"):
        attribute_reward(points, "", "good", unit="token")


def test_columns_and_ids_come_along() -> None:
    def right(completions: list[str], completion_ids: list[list[int]], answer: list[str]) -> list[float]:
        return [
            float(wanted in text) + len(ids) / 100
            for text, ids, wanted in zip(completions, completion_ids, answer, strict=True)
        ]

    options: dict[str, Any] = {"columns": {"answer": "b"}, "tokenizer": tiny_tokenizer()}
    found = attribute_reward(right, "", "a b", **options)
    assert list(found.scores) == pytest.approx([0.02, 1.02])
    with pytest.raises(ConfigError, match="completion_ids"):
        attribute_reward(right, "", "a b", columns={"answer": "b"})


def test_a_chat() -> None:
    def polite(prompts: list[Any], completions: list[Any]) -> list[float]:
        return [float("please" in prompt[-1]["content"]) + ("yes" in answer[-1]["content"])
                for prompt, answer in zip(prompts, completions, strict=True)]  # fmt: skip

    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "tell please"}]
    found = attribute_reward(polite, prompt, [{"role": "assistant", "content": "oh yes"}])
    assert found.pieces == ("tell", " please", "oh", " yes") and found.scores == (0.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "integrated_gradients"}, "needs a reward with gradients"),
        ({"method": "ocluded"}, "Did you mean 'occlusion'"),
        ({"unit": "words"}, "Did you mean 'word'"),
        ({"completion": ""}, "nothing to leave out"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attribute_reward(points, "", options.pop("completion", "good"), **options)
