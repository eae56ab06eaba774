"""Value-guided decoding against the formula by hand, and the order of what changes logits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import EOS_ID, tiny_model, tiny_tokenizer
from tropism.errors import ConfigError
from tropism.models.policy import Policy
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.value_guidance import ValueGuidance
from tropism.types import Prompt, Rollouts
from valued_policies import by_hand, last_hidden, text_policy, valued_policy

PROMPTS = [(5, 9, 11), (7,), (20, 21)]
KEY = StreamKey(seed=3, purpose="checks")


def sampled(policy: Policy, *, n: int = 4, **settings: Any) -> Rollouts:
    sampling = Sampling(**{"max_new_tokens": 5, **settings})
    prompts = [Prompt(text="", ids=ids) for ids in PROMPTS]
    return EmbeddedSampler(tiny_tokenizer(), (EOS_ID,)).generate(policy, prompts, sampling, n, key=KEY)


def guided_logits(policy: Policy, ids: list[int], beta: float) -> tuple[Tensor, Tensor]:
    """[V] log-probs of the next token, and the same plus beta times the advantages, from whole tables of values."""
    heads: Any = policy.q_heads
    state = last_hidden(policy, ids)[-1]
    worth = torch.stack([by_hand(head, state) for head in heads.targets]).min(0).values
    advantages = worth - by_hand(heads.value, state)[0]
    plain = policy.logits(state).log_softmax(-1)
    return plain.detach(), (plain + beta * advantages).detach()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_distribution_is_that_of_the_formula(family: str, count: int) -> None:
    """Each sampled token's recorded log-probs: of the model as it is, and of what was sampled from."""
    policy = valued_policy(family, count=count)
    rollouts = sampled(policy, beta=2.0)
    apart = 0.0
    for row in range(len(rollouts)):
        prompt = list(PROMPTS[row // 4])
        completion = rollouts.completion_ids[row, : rollouts.completion_lengths[row]].tolist()
        for place, token in enumerate(completion):
            plain, guided = guided_logits(policy, prompt + completion[:place], 2.0)
            assert float(rollouts.logprobs[row, place]) == pytest.approx(float(plain[token]), abs=1e-4)
            chance = float(guided.log_softmax(-1)[token])
            assert float(rollouts.behaviour_logprobs[row, place]) == pytest.approx(chance, abs=1e-4)
            apart = max(apart, abs(chance - float(plain[token])))
    assert apart > 0.5


def test_the_filter_by_hand() -> None:
    class Context:
        hidden = torch.zeros(1, 1, 2)

    changed = ValueGuidance(2.0, lambda hidden: torch.tensor([[1.0, -1.0, 0.5]]))(torch.zeros(1, 3), Context())  # type: ignore[arg-type]
    assert changed.tolist() == [[2.0, -2.0, 1.0]]


def test_filters_come_before_top_k_and_temperature() -> None:
    """Only the two tokens with the largest guided logits are sampled, with their logits over the temperature."""
    policy = valued_policy()
    rollouts = sampled(policy, beta=3.0, top_k=2, temperature=0.5, max_new_tokens=1, n=30)
    for row in range(len(rollouts)):
        _, guided = guided_logits(policy, list(PROMPTS[row // 30]), 3.0)
        best = guided.topk(2)
        token = int(rollouts.completion_ids[row, 0])
        assert token in best.indices.tolist()
        scores = [math.exp(float(value) / 0.5) for value in best.values]
        chance = math.exp(float(guided[token]) / 0.5) / sum(scores)
        assert float(rollouts.behaviour_logprobs[row, 0]) == pytest.approx(math.log(chance), abs=1e-3)


def test_temperature_zero_takes_the_largest_guided_logit() -> None:
    policy = valued_policy()
    rollouts = sampled(policy, beta=5.0, temperature=0.0, max_new_tokens=1, n=1)
    plain = sampled(policy, temperature=0.0, max_new_tokens=1, n=1)
    expected = [int(guided_logits(policy, list(ids), 5.0)[1].argmax()) for ids in PROMPTS]
    assert rollouts.completion_ids[:, 0].tolist() == expected
    assert plain.completion_ids[:, 0].tolist() != expected


def test_beta_zero_is_plain_sampling_bit_for_bit() -> None:
    policy = valued_policy()
    heads, policy.q_heads = policy.q_heads, None
    without = sampled(policy)
    policy.q_heads = heads
    guided = sampled(policy, beta=0.0)
    for name, tensor in without.tensors().items():
        assert torch.equal(tensor, guided.tensors()[name]), name
    assert torch.equal(guided.logprobs, guided.behaviour_logprobs)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    policy = valued_policy()
    whole, narrow = sampled(policy, beta=2.0), sampled(policy, beta=2.0, batch_size=2)
    assert torch.equal(whole.completion_ids, narrow.completion_ids)


def test_a_model_without_heads_is_refused() -> None:
    policy = Policy(tiny_model("llama"))
    with pytest.raises(
        ConfigError, match=r"sampling.beta is 4, .* this model has none; train one with algorithm: ilql"
    ):
        sampled(policy, beta=4.0)
    with pytest.raises(ConfigError, match="this model has none"):
        text_policy(policy).generate("a cat", beta=4.0)


@pytest.mark.parametrize("beta", [-1.0, math.inf, math.nan])
def test_beta_must_be_positive_and_finite(beta: float) -> None:
    with pytest.raises(ValueError, match="beta"):
        Sampling(beta=beta)
    with pytest.raises(ConfigError, match="beta is"):
        ValueGuidance(beta, lambda hidden: hidden)


def test_text_in_text_out(tmp_path: Path) -> None:
    """From Python: an argument of ``generate``, or a setting of the policy."""
    model = text_policy(valued_policy())
    plain = model.generate("a cat", n=6, max_new_tokens=6)
    guided = model.generate("a cat", n=6, max_new_tokens=6, beta=20.0)
    assert plain != guided
    model.sampling = replace(model.sampling, beta=20.0)
    assert model.generate("a cat", n=6, max_new_tokens=6) == guided
