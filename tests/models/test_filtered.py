"""Log-probs of what filters leave, against a slow loop over tokens with transformers' own processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tiny_models import EOS_ID, tiny_model, tiny_tokenizer
from tropism.data.prompts import make_prompts
from tropism.models.policy import Policy
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.types import Filtering, Tokens

ROWS = Tokens(
    prompt_ids=torch.tensor([[0, 5, 9], [12, 13, 30]]),
    prompt_lengths=torch.tensor([2, 3]),
    completion_ids=torch.tensor([[8, 5, 0], [12, 20, 31]]),
    completion_lengths=torch.tensor([2, 3]),
)
ALL = Filtering(repetition_penalty=1.7, top_k=12, top_p=0.9, min_p=0.01)
SETTINGS = [ALL, Filtering(repetition_penalty=3.0), Filtering(top_k=5), Filtering(top_p=0.6), Filtering(min_p=0.2)]


def slow(policy: Policy, filtering: Filtering, temperature: float) -> tuple[list[list[float]], list[list[float]]]:
    """Log-probs and entropies, token by token, of rows without any padding."""
    warpers: list[Any] = []
    if filtering.repetition_penalty != 1:
        warpers.append(RepetitionPenaltyLogitsProcessor(filtering.repetition_penalty))
    warpers.append(TemperatureLogitsWarper(temperature))
    warpers += [TopKLogitsWarper(filtering.top_k)] if filtering.top_k else []
    warpers += [TopPLogitsWarper(filtering.top_p)] if filtering.top_p < 1 else []
    warpers += [MinPLogitsWarper(filtering.min_p)] if filtering.min_p else []
    logprobs: list[list[float]] = []
    entropies: list[list[float]] = []
    for row in range(2):
        ids = ROWS.prompt_ids[row, 3 - int(ROWS.prompt_lengths[row]) :].tolist()
        logprobs.append([])
        entropies.append([])
        for token in ROWS.completion_ids[row, : int(ROWS.completion_lengths[row])].tolist():
            before = torch.tensor([ids])
            with torch.no_grad():
                logits = policy.language_model(input_ids=before).logits[:, -1]
            for warper in warpers:
                logits = warper(before, logits)
            p = logits[0].double().softmax(-1)
            logprobs[-1].append(float(p[token].log()))
            entropies[-1].append(-sum(x * x.log() for x in p[p > 0]).item())  # type: ignore[union-attr]
            ids.append(token)
    return logprobs, entropies


@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize("filtering", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_they_are_those_of_a_slow_loop(family: str, filtering: Filtering, chunk_size: int) -> None:
    policy = Policy(tiny_model(family), chunk_size=chunk_size)
    output = policy(**ROWS.inputs, want={"logprobs", "entropy"}, temperature=0.8, filtering=filtering)
    logprobs, entropies = slow(policy, filtering, 0.8)
    outside = 0
    for row in range(2):
        count = int(ROWS.completion_lengths[row])
        assert output.need("logprobs")[row, :count].tolist() == pytest.approx(logprobs[row], abs=1e-5)
        assert output.need("entropy")[row, :count].tolist() == pytest.approx(entropies[row], abs=1e-5)
        outside += sum(value == -torch.inf for value in logprobs[row])
    if filtering.repetition_penalty == 1:
        assert outside, "no token lies outside of the set"


def gradients(policy: Policy, chosen: Tensor, filtering: Filtering, **options: Any) -> list[Tensor]:
    policy.zero_grad()
    output = policy(**ROWS.inputs, want={"logprobs", "entropy"}, filtering=filtering, **options)
    (output.need("logprobs")[chosen].sum() + 0.3 * output.need("entropy")[chosen].sum()).backward()
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


def test_gradients_do_not_depend_on_chunks_and_are_those_of_autograd() -> None:
    whole, chunked = (Policy(tiny_model("gpt2"), chunk_size=size) for size in (100, 2))
    filtering = Filtering(repetition_penalty=1.7, top_k=30)
    inside = whole(**ROWS.inputs, filtering=filtering).need("logprobs").isfinite() & ROWS.completion_mask
    assert inside.any()
    found, expected = (gradients(p, inside, filtering, entropy_gradient=True) for p in (chunked, whole))
    assert all(torch.allclose(f, e, atol=1e-5) for f, e in zip(found, expected, strict=True))
    whole.zero_grad()
    rows, tokens = inside.nonzero(as_tuple=True)
    for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
        prompt = ROWS.prompt_ids[row, 3 - int(ROWS.prompt_lengths[row]) :]
        ids = torch.cat([prompt, ROWS.completion_ids[row, :token]])
        logits = whole.language_model(input_ids=ids[None]).logits[0, -1]
        seen = torch.isin(torch.arange(37), ids)
        logits = torch.where(seen, torch.where(logits > 0, logits / 1.7, logits * 1.7), logits)
        logits = logits[logits >= logits.topk(30).values[-1]], logits[ROWS.completion_ids[row, token]]
        loss = logits[1] - logits[0].logsumexp(-1)
        loss = loss - 0.3 * (logits[0].softmax(-1) * logits[0].log_softmax(-1)).sum()
        loss.backward()
    slow_gradients = [p.grad for p in whole.parameters() if p.grad is not None]
    assert all(torch.allclose(f, e, atol=1e-4) for f, e in zip(found, slow_gradients, strict=True))


def test_pitfall_17_a_token_outside_has_no_log_prob_and_no_gradient() -> None:
    policy = Policy(tiny_model("gpt2"))
    tempered = policy(**ROWS.inputs).need("logprobs")
    found = policy(**ROWS.inputs, filtering=Filtering(top_k=2)).need("logprobs")
    outside = found.isneginf()
    assert outside.any() and not found.isnan().any() and bool((tempered > -torch.inf).all())
    ratio = (found - tempered.detach()).clamp(-20, 20).exp()
    ratio[outside].sum().backward()
    assert all(bool((p.grad == 0).all()) for p in policy.parameters() if p.grad is not None)


@pytest.mark.parametrize("filtering", SETTINGS, ids=str)
def test_what_the_sampler_says_is_what_the_forward_pass_says(filtering: Filtering) -> None:
    policy, tokenizer = Policy(tiny_model("llama")), tiny_tokenizer()
    settings = {name: getattr(filtering, name) for name in ("repetition_penalty", "top_k", "top_p", "min_p")}
    sampling = Sampling(max_new_tokens=8, temperature=0.7, policy_distribution="filtered", **settings)
    assert Filtering.of(sampling) == filtering
    sampler = EmbeddedSampler(tokenizer, (EOS_ID,))
    prompts = make_prompts(["a cat", "oh no"], tokenizer, max_length=None)
    rollouts = sampler.generate(policy, prompts, sampling, 4, key=StreamKey(seed=3, purpose="checks"))
    with torch.no_grad():
        found = policy(**rollouts.inputs, temperature=0.7, filtering=filtering).need("logprobs")
    assert torch.allclose(found, rollouts.behaviour_logprobs, rtol=0, atol=1e-5)
