"""Logit filters, what they see, and rows of several streams that share the sampled token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from slow_sampling import PROMPTS, log_softmax, own_logits, policy_of, slow_draw, slow_uniform
from tiny_models import EOS_ID, FAMILIES
from tropism.errors import ConfigError
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.protocol import FilterContext, LogitFilter
from tropism.rollouts.randomness import StreamKey
from tropism.types import Prompt, Rollouts

STRENGTH = 1.5
NEGATIVES = ((8, 30), (6, 7, 9, 10, 11), (4,), (15, 16), (3, 3, 3), (9,) * 12)
"""The other stream of each of PROMPTS: shorter, longer, with equal prompts apart."""


def guide(logits: Tensor, context: FilterContext) -> Tensor:
    """Classifier-free guidance: away from the second stream."""
    own, other = context.stream_logits[:, 0].log_softmax(-1), context.stream_logits[:, 1].log_softmax(-1)
    return other + STRENGTH * (own - other)


def sample(
    family: str, filters: Sequence[LogitFilter], *, streams: Any = None, n: int = 1, **settings: Any
) -> Rollouts:
    prompts = [Prompt(text="", ids=ids) for ids in PROMPTS]
    sampler = EmbeddedSampler(None, (EOS_ID,))
    key = StreamKey(seed=2)
    return sampler.generate(
        policy_of(family), prompts, Sampling(**settings), n, key=key, filters=filters, streams=streams
    )


def completions(rollouts: Rollouts) -> list[list[int]]:
    rows = zip(rollouts.completion_ids, rollouts.completion_lengths, strict=True)
    return [row[:length].tolist() for row, length in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_by_a_second_stream_equals_a_loop_of_two_forward_passes(family: str) -> None:
    """Five cache rows hold two rows of two streams, so rows enter and leave."""
    streams = [[ids] for ids in NEGATIVES]
    rollouts = sample(family, [guide], streams=streams, n=2, max_new_tokens=6, temperature=0.9, batch_size=5)
    model = policy_of(family).model
    for row, ids in enumerate(completions(rollouts)):
        prompt, negative = PROMPTS[row // 2], NEGATIVES[row // 2]
        for t, token in enumerate(ids):
            raw = own_logits(model, [*prompt, *ids[:t]])[-1].tolist()
            own, other = log_softmax(raw), log_softmax(own_logits(model, [*negative, *ids[:t]])[-1].tolist())
            guided = log_softmax([b + STRENGTH * (a - b) for a, b in zip(own, other, strict=True)], 0.9)
            assert token == slow_draw([math.exp(x) for x in guided], slow_uniform(2, "training", 0, row, t))
            assert float(rollouts.logprobs[row, t]) == pytest.approx(log_softmax(raw, 0.9)[token], abs=1e-5)
            assert float(rollouts.behaviour_logprobs[row, t]) == pytest.approx(guided[token], abs=2e-5)
        assert len(ids) == 6 or ids[-1] == EOS_ID


def test_a_second_stream_that_no_filter_reads_changes_nothing() -> None:
    plain = sample("mistral", [], n=2, max_new_tokens=8)
    beside = sample("mistral", [], streams=[[ids, (5, 5)] for ids in NEGATIVES], n=2, max_new_tokens=8, batch_size=4)
    assert completions(beside) == completions(plain)
    torch.testing.assert_close(beside.logprobs, plain.logprobs, rtol=0, atol=1e-5)


def test_a_filter_sees_logits_hidden_states_ids_and_a_state_that_lives_with_its_row() -> None:
    policy = policy_of("llama")
    model: Any = policy.model
    checked: list[int] = []

    def check(logits: Tensor, context: FilterContext) -> Tensor:
        rows = len(context.ids)
        assert context.stream_logits.shape == (rows, 1, 37) and context.hidden.shape == (rows, 1, 32)
        torch.testing.assert_close(model.lm_head(context.hidden), context.stream_logits)
        assert torch.equal(context.stream_logits[:, 0], logits)
        for i, (ids, length, state) in enumerate(
            zip(context.ids, context.prompt_lengths, context.row_state, strict=True)
        ):
            assert tuple(ids[:length]) in PROMPTS
            assert state.setdefault("prompt", tuple(ids[:length])) == tuple(ids[:length])
            assert state.get("calls", 0) == len(ids) - length
            assert list(ids[length : len(ids) - 1]) == list(state.get("ids", []))[: max(0, len(ids) - 1 - length)]
            state["calls"], state["ids"] = state.get("calls", 0) + 1, list(ids[length:])
            torch.testing.assert_close(logits[i].double(), own_logits(model, ids)[-1], rtol=0, atol=1e-5)
            checked.append(len(ids))
        return logits

    rollouts = sample("llama", [check], n=3, max_new_tokens=6, batch_size=4)
    assert len(checked) == int(rollouts.completion_lengths.sum())
    assert completions(rollouts) == completions(sample("llama", [], n=3, max_new_tokens=6))


def test_filters_run_in_order_on_raw_logits_before_penalty_temperature_and_truncation() -> None:
    model = policy_of("gpt2").model

    def shift(logits: Tensor, context: FilterContext) -> Tensor:
        torch.testing.assert_close(logits[0].double(), own_logits(model, context.ids[0])[-1], rtol=0, atol=1e-5)
        return logits + 2.0

    def only_two(logits: Tensor, context: FilterContext) -> Tensor:
        torch.testing.assert_close(logits, context.stream_logits[:, 0] + 2.0)
        kept = torch.full_like(logits, -torch.inf)
        kept[:, 5], kept[:, 9] = 1.0, 2.0
        return kept

    rollouts = sample("gpt2", [shift, only_two], max_new_tokens=5, temperature=0.5, repetition_penalty=4.0)
    assert set(rollouts.completion_ids.flatten().tolist()) == {5, 9}
    for row, ids in enumerate(completions(rollouts)):
        seen = set(PROMPTS[row])
        for t, token in enumerate(ids):
            logits = {5: 1.0 / (4 if 5 in seen else 1) / 0.5, 9: 2.0 / (4 if 9 in seen else 1) / 0.5}
            wanted = logits[token] - math.log(sum(math.exp(x) for x in logits.values()))
            assert float(rollouts.behaviour_logprobs[row, t]) == pytest.approx(wanted, abs=1e-5)
            seen.add(token)


def test_every_stream_needs_tokens_and_room_and_every_prompt_as_many_streams() -> None:
    with pytest.raises(ConfigError, match="same number of streams"):
        sample("llama", [guide], streams=[[(5,)], [(5,)], [(5,)], [(5,)], [(5,)], []])
    with pytest.raises(ConfigError, match="prompt 5 has no tokens"):
        sample("llama", [guide], streams=[[(5,)]] * 5 + [[()]], max_new_tokens=4)
    with pytest.raises(ConfigError, match="prompt 2 has 62 tokens"):
        sample("llama", [guide], streams=[[(5,)]] * 2 + [[(5,) * 62]] + [[(5,)]] * 3, max_new_tokens=4)
