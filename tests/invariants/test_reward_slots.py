"""Reward slots stand right before the text, at position 0, once: in training, prefill and decode, in every family.

What is expected comes from the model's own forward on ``inputs_embeds`` that ``slots_by_hand`` lays side by side.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from slots_by_hand import Asked, completion_by_hand, logits_by_hand, policy_with, slot_vectors
from slow_sampling import greedy, keyed, log_softmax
from tiny_models import BOS_ID, EOS_ID, FAMILIES
from tropism.errors import ConfigError
from tropism.models import sampling_model
from tropism.models.conditioning import HIDDEN
from tropism.models.layout import Padding
from tropism.models.lora import LoRA, add_lora
from tropism.models.policy import Policy
from tropism.ops.slots import slot_id
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.types import Prompt, Rollouts, Tokens, pad_rows

PADDINGS: tuple[Padding, ...] = ("right", "left", "both")
ROWS: tuple[tuple[Asked, tuple[int, ...], tuple[int, ...]], ...] = (
    ((0.5, -2.0), (1, 9, 30, 8, 11, 7, 14), (8, 2)),
    ((None, 1.25), (6,), (3, 20, 31, 9, 4, 4, 10, 36)),
    ((-1.5, None), (12, 13, 14), ()),
    ((0.5, -2.0), (0, 2, 1, 17), (2, 0, 1)),
    ((0.5, -2.0), (), (5, 9, 2)),
)
"""What is asked for, text that is read, text that is learned: long and short, without completion, without any prompt,
and of special tokens alone. Two rows ask for the same."""


@cache
def policy_of(family: str, rewards: int) -> Policy:
    return policy_with(family, rewards=rewards)


def ids_of(asked: Asked, text: tuple[int, ...]) -> tuple[int, ...]:
    return (*(slot_id(k, value) for k, value in enumerate(asked)), *text)


def tokens(rows: Any = ROWS, *, rewards: int) -> Tokens:
    prompts = [ids_of(asked[:rewards], prompt) for asked, prompt, _ in rows]
    completions = [completion for _, _, completion in rows]
    return Tokens(
        prompt_ids=pad_rows(prompts, left=True),
        prompt_lengths=torch.tensor([len(ids) for ids in prompts]),
        completion_ids=pad_rows(completions),
        completion_lengths=torch.tensor([len(ids) for ids in completions]),
    )


@torch.no_grad()
def expected(policy: Policy, rows: Any, *, rewards: int) -> Tensor:
    """[B, T] log-probs of the completion tokens, row by row."""
    assert policy.conditioning is not None
    wanted = torch.zeros(len(rows), max(len(completion) for *_, completion in rows))
    for index, (asked, prompt, completion) in enumerate(rows):
        vectors = slot_vectors(policy.conditioning, policy.model, asked[:rewards])
        logits = logits_by_hand(policy.model, vectors, [*prompt, *completion])
        for t, token in enumerate(completion):
            wanted[index, t] = log_softmax(logits[rewards + len(prompt) + t - 1].tolist())[token]
    return wanted


@torch.no_grad()
def logprobs(policy: Policy, rows: Any = ROWS, *, rewards: int, padding: Padding = "right") -> Tensor:
    policy.padding = padding
    try:
        found: Tensor = policy(**tokens(rows, rewards=rewards).inputs).need("logprobs")
        return found
    finally:
        policy.padding = "right"


def close(value: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rewards", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_slots_stand_at_position_0_and_text_follows_under_any_padding_and_beside_any_neighbours(
    family: str, rewards: int
) -> None:
    policy = policy_of(family, rewards)
    wanted = expected(policy, ROWS, rewards=rewards)
    for padding in PADDINGS:
        close(logprobs(policy, rewards=rewards, padding=padding), wanted)
    rows_work = policy.rows.works
    try:
        policy.rows.works = False  # the same rows with their pads
        close(logprobs(policy, rewards=rewards), wanted)
    finally:
        policy.rows.works = rows_work
    for index, row in enumerate(ROWS):
        close(logprobs(policy, [row], rewards=rewards)[0], wanted[index, : len(row[2])])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_reaches_every_family(family: str) -> None:
    policy = policy_of(family, 1)
    low, high = (logprobs(policy, [((value,), (6, 9), (3, 20, 31))], rewards=1) for value in (-1.0, 1.0))
    assert float((low - high).abs().max()) > 1e-2


@pytest.mark.parametrize("mechanism", HIDDEN)
@pytest.mark.parametrize("family", ["gpt2", "gemma3", "opt", "llama"])
def test_every_mechanism_by_hand(family: str, mechanism: str) -> None:
    policy = policy_with(family, mechanism=mechanism, rewards=2)
    rows = [(((1.0, 3.0)), (6, 9), (3, 20, 31)), ((0.0, None), (7,), (8, 4)), ((None, 2.0), (12, 13, 14), (5,))]
    close(logprobs(policy, rows, rewards=2), expected(policy, rows, rewards=2))


# ---- generation ------------------------------------------------------------------------------------------------------


def generate(policy: Policy, rows: Any, *, rewards: int, n: int = 1, batch_size: int = 3, **settings: Any) -> Rollouts:
    prompts = [Prompt(text="", ids=ids_of(asked[:rewards], prompt)) for asked, prompt, _ in rows]
    sampling = Sampling(max_new_tokens=6, batch_size=batch_size, **settings)
    return EmbeddedSampler(None, (EOS_ID,)).generate(policy, prompts, sampling, n, key=StreamKey(seed=4))


def assert_as_by_hand(policy: Policy, rollouts: Rollouts, rows: Any, *, rewards: int, greedily: bool) -> None:
    temperature = 1.0 if greedily else 0.8
    per_prompt = len(rollouts) // len(rows)
    for index in range(len(rollouts)):
        asked, prompt, _ = rows[index // per_prompt]
        choose = greedy if greedily else keyed(4, index)
        ids, wanted = completion_by_hand(policy, asked[:rewards], prompt, choose, new=6, temperature=temperature)
        assert rollouts.completion_ids[index, : len(ids)].tolist() == ids
        assert rollouts.completion_lengths[index] == len(ids)
        close(rollouts.logprobs[index, : len(ids)].double(), torch.tensor(wanted, dtype=torch.double))


@pytest.mark.parametrize("fused", [True, False], ids=["", "unfused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_is_uncached_generation_is_one_forward_pass(
    family: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three cache rows for five prompts, so that rows enter, leave and have other widths beside them."""
    if not fused:
        monkeypatch.setattr(sampling_model, "FUSED", {})
    for rewards in (1, 2):
        policy = policy_of(family, rewards)
        rollouts = generate(policy, ROWS, rewards=rewards, temperature=0)
        assert_as_by_hand(policy, rollouts, ROWS, rewards=rewards, greedily=True)
        with torch.no_grad():
            trained = policy(**rollouts.inputs).need("logprobs")
        close(trained, rollouts.logprobs)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "gemma2"])
def test_drawn_completions_are_those_of_a_slow_loop(family: str) -> None:
    policy = policy_of(family, 1)
    rollouts = generate(policy, ROWS[:3], rewards=1, n=2, temperature=0.8)
    assert_as_by_hand(policy, rollouts, ROWS[:3], rewards=1, greedily=False)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_slot_is_computed_once_per_prompt_and_target(family: str) -> None:
    policy = policy_with(family, rewards=2)
    assert policy.conditioning is not None
    seen: list[int] = []
    policy.conditioning.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    generate(policy, [*ROWS, ROWS[0]], rewards=2, n=4, batch_size=32)
    assert sum(seen) == 2 * len(ROWS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_prompt_that_fills_the_context_with_its_slots_is_refused(family: str) -> None:
    policy = policy_of(family, 2)
    fits = ((1.0, 2.0), (7,) * (64 - 6 - 2), ())
    assert len(generate(policy, [fits], rewards=2)) == 1
    with pytest.raises(ConfigError, match=r"prompt 0 has 59 tokens.*context of 64"):
        generate(policy, [((1.0, 2.0), (7,) * 57, ())], rewards=2)


def test_slots_are_refused_by_a_model_that_has_none() -> None:
    with pytest.raises(ConfigError, match="beyond the model's vocabulary"):
        generate(Policy(FAMILIES["gpt2"]()), ROWS[:1], rewards=1)


def test_slots_may_not_stand_inside_the_text() -> None:
    prompt = Prompt(text="", ids=(5, slot_id(0, 1.0), 6))
    with pytest.raises(ConfigError, match="prompt 0: a reward slot stands behind text"):
        EmbeddedSampler(None, (EOS_ID,)).generate(
            policy_of("gpt2", 1), [prompt], Sampling(max_new_tokens=2), 1, key=StreamKey(seed=0)
        )


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(policy: Policy) -> dict[str, Tensor]:
    policy.zero_grad()
    (-policy(**tokens(rewards=2).inputs).need("logprobs").sum()).backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


LEARNED = {"linear": ("weight", "bias", "open"), "token": ("table", "open"), "add": ("open",), "replace": ("open",)}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mechanism", HIDDEN)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_slots_get_the_gradients_of_the_sum_by_hand(mechanism: str, tied: bool, adapter: bool) -> None:
    """Against autograd through ``inputs_embeds``; tokens that do not occur get none by way of a slot."""
    policy = policy_with("llama", mechanism=mechanism, rewards=2, tie_word_embeddings=tied)
    if adapter:
        policy = Policy(add_lora(policy.language_model, LoRA(rank=2), seed=0), conditioning=policy.conditioning)
    slots, model = policy.conditioning, policy.language_model
    assert slots is not None
    asked = {"token": (2.0, 1.0)}.get(mechanism, (0.5, -2.0))
    rows = [(asked, (9, 30), (8, 11, 7)), ((None, asked[1]), (5,), (4, 3))]
    policy.zero_grad()
    (-policy(**tokens(rows, rewards=2).inputs).need("logprobs").sum()).backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    for targets, prompt, completion in rows:
        logits = logits_by_hand(model, slot_vectors(slots, model, targets), [*prompt, *completion])
        chosen = logits[1 + len(prompt) : -1].log_softmax(-1)
        (-chosen[range(len(completion)), list(completion)].sum()).backward()
    wanted = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    for name in LEARNED[mechanism]:
        assert float(found[f"conditioning.{name}"].abs().max()) > 1e-3
    # A parameter that no slot reads has a gradient of zero, or none.
    for name, gradient in found.items():
        other = wanted.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=2e-5)
    assert any(name.startswith("conditioning") for name in found) and wanted.keys() <= found.keys()
    if adapter:
        assert all("lora_" in name or name.startswith("conditioning") for name in found)


@pytest.mark.parametrize("mechanism", HIDDEN)
def test_only_add_moves_an_embedding_by_its_slots_and_only_that_of_the_base_token(mechanism: str) -> None:
    policy = policy_with("llama", mechanism=mechanism, tie_word_embeddings=False)
    asked = (2.0,)
    rows = [(asked, (9, 30), (8, 11, 7))]
    policy.zero_grad()
    (-policy(**tokens(rows, rewards=1).inputs).need("logprobs").sum()).backward()
    moved = policy.input_embedding.weight.grad.abs().amax(-1).nonzero().flatten().tolist()
    assert moved == sorted({9, 30, 8, 11} | ({BOS_ID} if mechanism == "add" else set()))


def test_the_embedding_is_as_before_after_every_pass() -> None:
    policy = policy_of("llama", 1)
    before = policy.input_embedding.forward
    logprobs(policy, rewards=1)
    assert policy.input_embedding.forward == before
    with pytest.raises(IndexError):
        logprobs(policy, [((1.0,), (10_000,), (1,))], rewards=1)
    assert "forward" not in vars(policy.input_embedding)
    with pytest.raises(IndexError):
        policy.model(input_ids=torch.tensor([[slot_id(0, 1.0), 3]]))
