"""Completions by both ways: the same for every batch, and beams where they belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tiny_models import EOS_ID, PAD_ID, tiny_model, tiny_tokenizer
from tropism import GRPO, Recipe, Sampling
from tropism.errors import ConfigError, NoRoomError
from tropism.generation import TextPolicy
from tropism.toxicity.generating import (
    HuggingFaceGeneration,
    generation_of,
    generator_of,
    is_random,
    plain_settings,
)
from tropism.types import Prompt

TEXTS = ["a", "the cat sat", "no, sir", "we go on and on"]


def policy_of(family: str) -> TextPolicy:
    seq2seq = family in ("t5", "bart")
    return TextPolicy.load((tiny_model(family), tiny_tokenizer(add_eos=seq2seq)))


def prompts_of(policy: TextPolicy, texts: list[str]) -> list[Prompt]:
    return [Prompt(text=text, ids=tuple(policy.tokenizer(text)["input_ids"])) for text in texts]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "t5"])
@pytest.mark.parametrize("beams", [1, 4])
def test_a_padded_batch_is_each_prompt_alone(family: str, beams: int) -> None:
    policy = policy_of(family)
    prompts = prompts_of(policy, TEXTS)
    config = GenerationConfig(max_new_tokens=6, num_beams=beams, do_sample=False)
    found = HuggingFaceGeneration(policy, config, seed=0)(prompts, 1, first_index=0)
    model: Any = policy.policy.model
    for prompt, ids in zip(prompts, found.completion_ids, strict=True):
        start = 1 if family == "t5" else len(prompt.ids)
        alone = model.generate(
            torch.tensor([prompt.ids]), max_new_tokens=6, num_beams=beams, do_sample=False, pad_token_id=PAD_ID
        )[0, start:].tolist()
        assert alone[: len(ids)] == ids and set(alone[len(ids) :]) <= {PAD_ID}


def test_samples_depend_on_their_place_alone() -> None:
    policy = policy_of("llama")
    prompts = prompts_of(policy, TEXTS)
    generate = HuggingFaceGeneration(policy, GenerationConfig(max_new_tokens=6, do_sample=True), seed=3)
    torch.manual_seed(1)
    first = generate(prompts, 2, first_index=8).completions
    before = torch.random.get_rng_state()
    assert generate(prompts, 2, first_index=8).completions == first
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's randomness stays its own
    assert generate(prompts, 2, first_index=16).completions != first
    other = HuggingFaceGeneration(policy, GenerationConfig(max_new_tokens=6, do_sample=True), seed=4)
    assert other(prompts, 2, first_index=8).completions != first
    assert len({text for text in first if text}) > 2


def test_settings_that_came_with_a_model_do_not_creep_in() -> None:
    policy = policy_of("llama")
    model: Any = policy.policy.model
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    prompts = prompts_of(policy, TEXTS)
    plain = HuggingFaceGeneration(policy, config, seed=0)(prompts, 1, first_index=0).completions
    own = GenerationConfig(repetition_penalty=50.0, num_beams=3, eos_token_id=EOS_ID)
    model.generation_config = own
    assert HuggingFaceGeneration(policy, config, seed=0)(prompts, 1, first_index=0).completions == plain
    assert model.generation_config is own


def test_where_a_completion_ends() -> None:
    policy = policy_of("llama")
    generate = HuggingFaceGeneration(policy, GenerationConfig(max_new_tokens=4), seed=0)
    assert generate._ended([7, 8, EOS_ID, PAD_ID]) == ([7, 8, EOS_ID], "eos")
    assert generate._ended([7, 8, 9, 10]) == ([7, 8, 9, 10], "length")
    stopping = HuggingFaceGeneration(policy, GenerationConfig(max_new_tokens=4, stop_strings=["b"]), seed=0)
    assert stopping._ended([7, 6, PAD_ID, PAD_ID]) == ([7, 6], "stop")
    found = stopping(prompts_of(policy, TEXTS), 1, first_index=0)
    assert not any("b" in text for text in found.completions)


def test_the_own_sampler_gives_the_same_whatever_the_batch() -> None:
    policy = policy_of("llama")
    prompts = prompts_of(policy, TEXTS)
    generate = generator_of(policy, Sampling(max_new_tokens=6), seed=1, target_reward=None)
    whole = generate(prompts, 2, first_index=0).completions
    parts = [*generate(prompts[:3], 2, first_index=0).completions, *generate(prompts[3:], 2, first_index=6).completions]
    assert parts == whole


def test_what_settings_are(tmp_path: Path) -> None:
    assert generation_of(None) == Sampling(max_new_tokens=20)
    assert generation_of({"max_new_tokens": 5, "temperature": 0.5}) == Sampling(max_new_tokens=5, temperature=0.5)
    beams = generation_of({"max_new_tokens": 5, "num_beams": 3})
    assert isinstance(beams, GenerationConfig) and beams.num_beams == 3 and not is_random(beams)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"max_new_tokens": 7, "do_sample": True, "top_k": 5, "transformers_version": "5.3.0"}))
    read = generation_of(path)
    assert isinstance(read, GenerationConfig) and (read.top_k, is_random(read)) == (5, True)
    assert not is_random(Sampling(temperature=0.0))
    own = {"max_new_tokens": 5, "temperature": 0.5}  # names of both
    assert isinstance(generation_of({**own, "transformers_version": "5.3.0"}), GenerationConfig)
    path.write_text(json.dumps(own))
    assert isinstance(generation_of(path, whole=True), GenerationConfig) and isinstance(generation_of(path), Sampling)


def test_settings_hold_the_defaults_that_generate_fills_in() -> None:
    given = GenerationConfig(max_new_tokens=5, do_sample=True)
    shown = plain_settings(given)
    assert {"engine": "transformers", "top_k": 50, "top_p": 1.0, "temperature": 1.0}.items() <= shown.items()
    assert plain_settings(GenerationConfig(max_new_tokens=5, do_sample=True, top_k=9))["top_k"] == 9
    assert "max_length" not in shown and given.top_k is None


def test_no_room_for_a_batch_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("llama")
    model: Any = policy.policy.model

    def full(**arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    generate = HuggingFaceGeneration(policy, GenerationConfig(max_new_tokens=4), seed=0)
    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(NoRoomError, match=r"no room for 8 completions.*CUDA out of memory.*batch_size"):
        generate(prompts_of(policy, TEXTS), 2, first_index=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beam": 3, "max_new_tokens": 4}, "num_beams"),
        ({"num_beams": 3}, "max_new_tokens"),
        ({"num_beams": 3, "max_new_tokens": 4, "num_return_sequences": 3}, "samples_per_prompt"),
        ({"num_beams": 3, "max_new_tokens": -4}, "max_new_tokens"),
        (7, "expected Sampling"),
    ],
)
def test_settings_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generation_of(given)


def test_what_generate_refuses_is_a_clear_error() -> None:
    policy = policy_of("llama")
    config = GenerationConfig(max_new_tokens=4, num_beams=2, num_beam_groups=2, diversity_penalty=1.0)
    with pytest.raises(ConfigError, match="generate refuses"):
        HuggingFaceGeneration(policy, config, seed=0)(prompts_of(policy, TEXTS), 1, first_index=0)


def test_pitfall_23_training_refuses_beams_with_the_reason() -> None:
    recipe = {"model": "demo", "data": "x.txt", "algorithm": "ppo", "reward": "vader"}
    for name, value in (("num_beams", 5), ("early_stopping", True)):
        with pytest.raises(ConfigError, match=f"sampling.{name}: .* no sample of the policy"):
            Recipe.from_mapping({**recipe, "sampling": {name: value}})
        with pytest.raises(ConfigError, match="no sample of the policy"):
            Sampling(**{name: value})
    with pytest.raises(ConfigError, match="no sample of the policy"):
        Recipe.from_mapping({**recipe, "trainer": {"evaluation": {"sampling": [{"num_beams": 2}]}}})
    with pytest.raises(TypeError, match="unexpected"):
        Sampling(no_such_field=1)  # type: ignore[call-arg]
    assert GRPO() and Sampling(temperature=0.9).temperature == 0.9
