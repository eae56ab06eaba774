"""Reward models in text: prompts and completions in, scores out; saved, and loaded from wherever they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tropism
from tiny_models import BOS_ID, CHARACTERS, EOS_ID, tiny_model, tiny_tokenizer
from tiny_reward_models import FACTS, NORMAL, padded, tiny_reward_model
from tropism import TextRewardModel
from tropism.errors import ConfigError, DataError, ModelError
from tropism.models.reward_model import RewardModel
from tropism.models.saving import save_plain
from tropism.rewards import RewardConfig, RewardHarness
from tropism.types import Messages, RewardInputs

PROMPTS = ["the cat", "oh", "is it so, my friend?"]
COMPLETIONS = [" sat on a mat.", " no!", ""]


def text_model(family: str = "llama", *, chat: bool = False, **facts: object) -> TextRewardModel:
    tokenizer = tiny_tokenizer(chat=True) if chat else None
    model, tokenizer = tiny_reward_model(family, gain=2.0, bias=-0.5, tokenizer=tokenizer)
    return TextRewardModel(model, tokenizer, replace(FACTS, **{"normalised": NORMAL, **facts}))  # type: ignore[arg-type]


def ids_of(text: str) -> list[int]:
    return [5 + CHARACTERS.index(letter) for letter in text]


@torch.no_grad()
def scores_of_rows(model: RewardModel, rows: list[list[int]]) -> list[float]:
    return [float(model(*padded([row]))) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_of_texts(batch_size: int) -> None:
    model = text_model()
    rows = [ids_of(prompt + completion) for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    found = model.score(PROMPTS, COMPLETIONS, batch_size=batch_size)
    assert found == pytest.approx(scores_of_rows(model.model, rows), abs=1e-5)
    assert all(isinstance(score, float) for score in found) and len(set(found)) == 3
    same = model.score("oh", [" no!", " yes"], batch_size=batch_size)
    assert same == pytest.approx(scores_of_rows(model.model, [ids_of("oh no!"), ids_of("oh yes")]), abs=1e-5)
    assert model.score([], []) == model.score("oh", []) == []


def test_it_reads_what_it_was_trained_to_read() -> None:
    alone = text_model("bert", text="completion", max_length=6)
    rows = [[BOS_ID, *ids_of(text), EOS_ID] for text in ("we r", "no")]
    assert alone.score("oh", ["we ran", "no"]) == pytest.approx(scores_of_rows(alone.model, rows), abs=1e-5)
    both = text_model(max_length=6)
    rows = [ids_of(text) for text in ("at ran", "we ran")]
    found = both.score(["a cat", "oh"], [" ran", "we ran and ran"])
    assert found == pytest.approx(scores_of_rows(both.model, rows), abs=1e-5)


def test_chat_messages() -> None:
    model = text_model(chat=True)
    prompt: Messages = [{"role": "user", "content": "oh"}]
    answers: list[Messages] = [[{"role": "assistant", "content": text}] for text in ("no", "we ran")]
    user, assistant = 3, 4
    rows = [[user, *ids_of("oh"), assistant, *ids_of(text), EOS_ID] for text in ("no", "we ran")]
    expected = scores_of_rows(model.model, rows)
    assert model.score(prompt, answers) == pytest.approx(expected, abs=1e-5)
    assert model.score([prompt, prompt], answers) == pytest.approx(expected, abs=1e-5)


def test_saved_and_loaded_from_a_run_a_folder_and_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model()
    expected = model.score(PROMPTS, COMPLETIONS)
    model.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.yaml").write_text("algorithm: {name: reward-model}\n")
    for source in (tmp_path / "run", str(tmp_path / "run" / "model")):
        loaded = TextRewardModel.from_pretrained(source, device="cpu")
        assert loaded.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
        assert loaded.facts.normalised == NORMAL and loaded.facts.text == "prompt+completion"
        assert (loaded.facts.gain, loaded.facts.bias, loaded.facts.offset) == (2.0, -0.5, -0.5)
    assert model.score(PROMPTS, COMPLETIONS) == expected
    from tropism.models import reward_files

    asked: list[tuple[str, str, str | None]] = []

    def cached_file(name: str, file: str, *, revision: str | None, **_: object) -> str:
        asked.append((name, file, revision))
        return str(tmp_path / "run" / "model" / file)

    monkeypatch.setattr(reward_files, "cached_file", cached_file)
    with pytest.raises(ModelError, match=r"someone/rm is no local folder, and loading it from the hub failed"):
        TextRewardModel.from_pretrained("someone/rm", revision="abc")
    assert asked == [("someone/rm", "reward_model.json", "abc")]


def test_it_is_what_a_reward_gives(tmp_path: Path) -> None:
    """By its folder, and from Python by its method."""
    model = text_model()
    model.save_pretrained(tmp_path / "model")
    inputs = RewardInputs(
        prompts=list(PROMPTS), completions=list(COMPLETIONS), completion_ids=[[1]] * 3, finish_reasons=["eos"] * 3
    )
    expected = model.score(PROMPTS, COMPLETIONS)
    for reward in (str(tmp_path / "model"), model.score):
        found = RewardHarness(RewardConfig.of(reward)).score(inputs).per_completion
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_what_is_refused(tmp_path: Path) -> None:
    model = text_model()
    with pytest.raises(ConfigError, match=r"expected a list of completions, not one text"):
        model.score("oh", " no!")
    with pytest.raises(ConfigError, match=r"2 prompts for 3 completions; give one for all, or one for each"):
        model.score(PROMPTS[:2], COMPLETIONS)
    with pytest.raises(ConfigError, match=r"batch_size: expected at least 1"):
        model.score("oh", [" no!"], batch_size=0)
    mute, tokenizer = tiny_reward_model("llama", tokenizer=tiny_tokenizer(eos=False))
    with pytest.raises(DataError, match=r"completion 1: it is empty"):
        TextRewardModel(mute, tokenizer, FACTS).score("", [" no!", ""])
    save_plain(tiny_model("llama"), tiny_tokenizer(), tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"was not trained as a reward model"):
        TextRewardModel.from_pretrained(tmp_path / "policy")
    with pytest.raises(ModelError, match=r"there is no folder .*polic; the closest is"):
        TextRewardModel.from_pretrained(tmp_path / "polic")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"has no model yet; finish it"):
        TextRewardModel.from_pretrained(tmp_path / "run")


def test_it_is_public() -> None:
    assert "TextRewardModel" in tropism.__all__ and tropism.TextRewardModel is TextRewardModel


def test_prompts_of_another_kind_are_refused() -> None:
    model, tokenizer = tiny_reward_model("llama")
    with pytest.raises(ConfigError, match="prompts: expected a text, chat messages or a list of them, not None"):
        TextRewardModel(model, tokenizer, FACTS).score(None, ["a"])  # type: ignore[arg-type]
