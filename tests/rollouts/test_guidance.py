"""Targets and guidance while generating: one per prompt, several completions each, and the push between two targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slots_by_hand import completion_by_hand, logits_by_hand, policy_with, slot_vectors
from slow_sampling import log_softmax, slow_draw, slow_mix, slow_uniform
from tiny_models import EOS_ID, tiny_model, tiny_tokenizer
from tropism.errors import ConfigError, DataError
from tropism.generation import TextPolicy, make_conditioner
from tropism.models.loading import LoadedModel
from tropism.models.special_tokens import special_tokens
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.guidance import RewardGuidance
from tropism.targets.config import Conditioning
from tropism.types import Rollouts

PROMPTS = ["a cat", "oh", "is it so"]


def conditioned(
    family: str = "gpt2", *, targets: tuple[str, ...] = ("reward",), mechanism: Any = "linear"
) -> TextPolicy:
    """A model whose rewards lie between 0 and 1, and are told as they are."""
    policy = policy_with(family, rewards=len(targets)) if mechanism != "text" else policy_with(family)
    if mechanism == "text":
        policy.conditioning = None
    tokenizer = tiny_tokenizer()
    model: Any = policy.model
    loaded = LoadedModel(model=model, tokenizer=tokenizer, tokens=special_tokens(model, tokenizer), source="tiny")
    conditioner = make_conditioner(Conditioning(targets=targets, scaler="none", mechanism=mechanism), loaded)
    conditioner.fit([(0.0,) * len(targets), (1.0,) * len(targets)])
    conditioner.knows_open = True
    return TextPolicy(policy, loaded, Sampling(max_new_tokens=6), conditioner=conditioner)


def ids_of(model: TextPolicy, text: str) -> list[int]:
    return list(model.tokenizer(text)["input_ids"])


def rollouts_of(model: TextPolicy, *arguments: Any, **named: Any) -> tuple[list[str], Rollouts]:
    """What ``generate`` returns, and the rollouts it came from."""
    caught: list[Rollouts] = []
    generate = model.sampler.generate

    def catching(*given: Any, **others: Any) -> Rollouts:
        caught.append(generate(*given, **others))
        return caught[0]

    model.sampler = SimpleNamespace(generate=catching)  # type: ignore[assignment]
    try:
        return model.generate(*arguments, **named), caught[0]
    finally:
        model.sampler = EmbeddedSampler(model.tokenizer, (EOS_ID,))


def uniform(sample: int, token: int, seed: int = 0) -> float:
    """Of the purpose ``generate``, whose number is 4."""
    state = 0
    for word in (seed, 4, 0, sample, token):
        state = slow_mix(state, word % 2**64)
    return (state >> 11) / 2**53


def drawn(sample: int) -> Any:
    return lambda row, index: slow_draw([math.exp(x) for x in row], uniform(sample, index))


def test_the_slow_uniforms_are_those_of_generate() -> None:
    assert uniform(3, 2) == slow_uniform(0, "generate", 0, 3, 2)


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        (0.75, [(0.75,)] * 3),
        ([0.25, 0.5, 1.0], [(0.25,), (0.5,), (1.0,)]),
        ([0.25, None, {"reward": 1}], [(0.25,), (None,), (1.0,)]),
        ({"reward": 0.5}, [(0.5,)] * 3),
        (None, [(None,)] * 3),
        ({}, [(None,)] * 3),
    ],
    ids=str,
)
def test_each_prompt_is_told_its_target(asked: Any, held: Sequence[tuple[float | None, ...]]) -> None:
    model = conditioned()
    texts, rollouts = rollouts_of(model, PROMPTS, target_reward=asked)
    for row, (prompt, values) in enumerate(zip(PROMPTS, held, strict=True)):
        ids, logprobs = completion_by_hand(model.policy, values, ids_of(model, prompt), drawn(row), new=6)
        assert rollouts.completion_ids[row, : len(ids)].tolist() == ids
        torch.testing.assert_close(rollouts.logprobs[row, : len(ids)], torch.tensor(logprobs), rtol=0, atol=1e-5)
        assert texts[row] == model.tokenizer.decode([i for i in ids if i != EOS_ID], skip_special_tokens=True)


def test_several_completions_of_each_prompt_share_its_target() -> None:
    model = conditioned("llama", targets=("mood", "length"))
    asked = [{"mood": 0.2}, {"length": 1.0}, {"mood": 0.9, "length": 0.1}]
    held = [(0.2, None), (None, 1.0), (0.9, 0.1)]
    texts, rollouts = rollouts_of(model, PROMPTS, target_reward=asked, n=3)
    assert len(texts) == 9
    for row in range(9):
        ids, _ = completion_by_hand(model.policy, held[row // 3], ids_of(model, PROMPTS[row // 3]), drawn(row), new=6)
        assert rollouts.completion_ids[row, : len(ids)].tolist() == ids


def test_one_prompt_alone_and_one_target() -> None:
    model = conditioned()
    assert model.generate("a cat", target_reward=0.5) == model.generate(["a cat"], target_reward=[0.5])
    assert model.generate("a cat", target_reward=0.1) != model.generate("a cat", target_reward=0.9)
    assert model.generate("a cat", target_reward=0.5, seed=1) != model.generate("a cat", target_reward=0.5)


# ---- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [None, 0.1])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_guidance_is_that_of_a_loop_of_two_forward_passes(family: str, other: float | None) -> None:
    """Log-probs stay those of the stream that is asked; what is sampled from is l + s (l - l_other)."""
    model, strength = conditioned(family), 1.5
    policy: Any = model.policy
    _, rollouts = rollouts_of(
        model, PROMPTS, target_reward=[0.9, 0.5, 1.0], guidance=strength, guidance_from=other, n=2, temperature=0.8
    )
    with torch.no_grad():
        for row in range(6):
            text, target = ids_of(model, PROMPTS[row // 2]), (0.9, 0.5, 1.0)[row // 2]
            length = int(rollouts.completion_lengths[row])
            ids = rollouts.completion_ids[row, :length].tolist()
            for t, token in enumerate(ids):
                vectors = [slot_vectors(policy.conditioning, policy.model, (value,)) for value in (target, other)]
                own, low = (logits_by_hand(policy.model, vector, text + ids[:t])[-1] for vector in vectors)
                guided = log_softmax((own + strength * (own - low)).tolist(), 0.8)
                assert token == slow_draw([math.exp(x) for x in guided], uniform(row, t))
                plain = log_softmax(own.tolist(), 0.8)[token]
                assert float(rollouts.logprobs[row, t]) == pytest.approx(plain, abs=1e-5)
                assert float(rollouts.behaviour_logprobs[row, t]) == pytest.approx(guided[token], abs=3e-5)


@pytest.mark.parametrize("mechanism", ["linear", "text"])
def test_guidance_of_nothing_is_none(mechanism: Any) -> None:
    model = conditioned(mechanism=mechanism)
    plain = model.generate(PROMPTS, target_reward=0.9, n=2)
    assert model.generate(PROMPTS, target_reward=0.9, guidance=0.0, n=2) == plain
    same = model.generate(PROMPTS, target_reward=0.9, guidance=2.0, guidance_from=0.9, n=2)
    assert same == plain
    other = model.generate(PROMPTS, target_reward=0.9, guidance=2.0, guidance_from={}, n=2)
    assert other != plain


def test_guidance_by_hand() -> None:
    asked, other = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[0.0, 3.0, -1.0]])
    context: Any = SimpleNamespace(stream_logits=torch.stack([asked, other], dim=1))
    changed: Tensor = RewardGuidance(2.0)(asked.clone(), context)
    assert changed.tolist() == [[3.0, 0.0, -1.0]]
    assert torch.equal(RewardGuidance(0.0)(asked.clone(), context), asked)
    # What filters before it have done to the logits stays.
    assert RewardGuidance(2.0)(asked + 10.0, context).tolist() == [[13.0, 10.0, 9.0]]


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"target_reward": "high"}, "'high'; give a finite number"),
        ({"target_reward": float("nan")}, "finite number"),
        ({"target_reward": {"rewards": 0.5}}, "did you mean 'reward'"),
        ({"target_reward": [0.5]}, "1 targets for 3 prompts"),
        ({"target_reward": [0.5] * 4}, "4 targets for 3 prompts"),
        ({"target_reward": 0.5, "guidance": -1.0}, "guidance is -1.0"),
        ({"target_reward": 0.5, "guidance": float("nan")}, "guidance is nan"),
        ({"guidance": 1.0}, "guidance pushes towards target_reward"),
        ({"target_reward": 0.5, "guidance": 1.0, "guidance_from": {"x": 1}}, "knows no reward 'x'"),
        ({"target_reward": 0.5, "guidance": 1.0, "guidance_from": [0.1]}, "1 targets for 3 prompts"),
        ({"target_reward": 0.5, "guidance_from": 0.1}, "give guidance a strength"),
        ({"target_reward": 0.5, "guidance": float("inf")}, "guidance is inf"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(named: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        conditioned().generate(PROMPTS, **named)


@pytest.mark.parametrize("named", [{"target_reward": 0.5}, {"guidance": 1.0}, {"target_reward": {"reward": 0.5}}])
def test_a_plain_model_is_not_asked(named: dict[str, Any]) -> None:
    model = TextPolicy.load((tiny_model("gpt2"), tiny_tokenizer()))
    with pytest.raises(ConfigError, match="was not trained to be asked for a reward"):
        model.generate("a cat", max_new_tokens=4, **named)


@pytest.mark.parametrize("targets", [("reward",), ("mood", "length")])
def test_the_context_has_room_for_the_slots(targets: tuple[str, ...]) -> None:
    model = conditioned(targets=targets)
    asked = dict.fromkeys(targets, 0.5)
    room = 64 - 6 - len(targets)
    assert len(model.generate("a" * room, target_reward=asked)) == 1
    with pytest.raises(DataError, match=f"has {room + 1} tokens, but at most {room} fit"):
        model.generate("a" * (room + 1), target_reward=asked)
    with pytest.raises(ConfigError, match=rf"max_new_tokens=63 and {len(targets)} for what.*leave no room"):
        model.generate("a", target_reward=asked, max_new_tokens=63)


def test_guidance_away_from_what_was_never_left_open_is_refused() -> None:
    model = conditioned()
    assert model.conditioner is not None
    model.conditioner.knows_open = False
    with pytest.raises(ConfigError, match="give guidance_from, a low target"):
        model.generate(PROMPTS, target_reward=0.9, guidance=1.0)
    model.generate(PROMPTS, target_reward=0.9, guidance=1.0, guidance_from=0.1)
