"""Q heads: what they start as, how targets follow, and their outputs against whole tables of values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_models import VOCABULARY, tiny_model
from tropism.errors import ModelError
from tropism.models.policy import Policy
from tropism.models.q_heads import QHeads
from tropism.training.config import TrainerConfig
from tropism.training.optimizer import build_optimizer
from tropism.training.state import load_trainable_state, trainable_state
from valued_policies import by_hand, last_hidden, random_heads, valued_policy

PROMPTS, COMPLETIONS = [[5, 9, 11], [7]], [[8, 30, 2], [12, 13, 14, 15, 2]]
EVERYTHING = frozenset({"logprobs", "state_values", "q", "q_logsumexp", "target_q"})


def inputs() -> dict[str, Tensor]:
    return {
        "prompt_ids": torch.tensor([[5, 9, 11], [0, 0, 7]]),
        "prompt_lengths": torch.tensor([3, 1]),
        "completion_ids": torch.tensor([[8, 30, 2, 0, 0], [12, 13, 14, 15, 2]]),
        "completion_lengths": torch.tensor([3, 5]),
    }


def test_everything_is_worth_nothing_before_training() -> None:
    heads = QHeads(8, 5)
    heads.start(seed=1)
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(heads.advantages(hidden), torch.zeros(3, 5))
    assert torch.equal(heads.value(hidden), torch.zeros(3, 1))
    first, second = (head.inner.weight for head in heads.q)
    assert not torch.equal(first, second) and float(first.detach().abs().max()) <= 8**-0.5
    for own, target in zip(heads.q.parameters(), heads.targets.parameters(), strict=True):
        assert torch.equal(own, target) and own.data_ptr() != target.data_ptr()
        assert own.requires_grad and not target.requires_grad
    again, other = QHeads(8, 5), QHeads(8, 5)
    state = torch.random.get_rng_state()
    again.start(seed=1)
    other.start(seed=2)
    assert torch.equal(again.q[0].inner.weight, first) and not torch.equal(other.q[0].inner.weight, first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sync_moves_the_targets_by_alpha() -> None:
    heads = QHeads(2, 3, count=1)
    with torch.no_grad():
        for own, target in zip(heads.q.parameters(), heads.targets.parameters(), strict=True):
            own.fill_(5.0)
            target.fill_(1.0)
    heads.sync(0.25)  # 0.25 * 5 + 0.75 * 1
    assert all(torch.equal(target, torch.full_like(target, 2.0)) for target in heads.targets.parameters())
    assert all(torch.equal(own, torch.full_like(own, 5.0)) for own in heads.q.parameters())
    heads.sync(1.0)
    assert all(torch.equal(target, torch.full_like(target, 5.0)) for target in heads.targets.parameters())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_outputs_are_those_of_the_whole_table(family: str, count: int) -> None:
    policy = valued_policy(family, count=count, chunk_size=3)
    output = policy(**inputs(), want=EVERYTHING)
    heads = policy.q_heads
    assert heads is not None
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        hidden = last_hidden(policy, prompt + completion)
        for place, token in enumerate(completion):
            state = hidden[len(prompt) + place - 1]
            values = [by_hand(head, state) for head in heads.q]
            targets = [by_hand(head, state) for head in heads.targets]
            torch.testing.assert_close(
                output.q[row, place], torch.stack([q[token] for q in values]), rtol=1e-4, atol=1e-4
            )
            totals = torch.stack([q.exp().sum().log() for q in values])
            torch.testing.assert_close(output.q_logsumexp[row, place], totals, rtol=1e-4, atol=1e-4)
            least = min(q[token].item() for q in targets)
            assert float(output.target_q[row, place]) == pytest.approx(least, abs=1e-4)
            value = float(by_hand(heads.value, state)[0])
            assert float(output.state_values[row, place]) == pytest.approx(value, abs=1e-4)
            advantages = torch.stack(targets).amin(0) - value
            torch.testing.assert_close(heads.advantages(state), advantages, rtol=1e-4, atol=1e-4)
    assert output.q.shape == output.q_logsumexp.shape == (2, 5, count)
    assert not output.target_q.requires_grad
    for values in (output.q, output.q_logsumexp, output.target_q, output.state_values):
        assert not bool(values[0, 3:].any())


def test_without_logsumexp_the_values_are_the_same() -> None:
    policy = valued_policy()
    whole = policy(**inputs(), want=frozenset({"q", "q_logsumexp"}))
    alone = policy(**inputs(), want=frozenset({"q"}))
    assert alone.q_logsumexp is None and alone.logprobs is None and whole.state_values is None
    torch.testing.assert_close(alone.q, whole.q)


def test_values_are_computed_at_masked_tokens_alone() -> None:
    policy = valued_policy()
    mask = torch.tensor([[True, False, True, False, False], [False, True, False, False, True]])
    part, whole = (policy(**inputs(), want=EVERYTHING, mask=m) for m in (mask, None))
    for name in ("q", "q_logsumexp", "target_q", "state_values"):
        one, other = getattr(part, name), getattr(whole, name)
        torch.testing.assert_close(one[mask], other[mask])
        assert not bool(one[~mask].any())


@pytest.mark.parametrize("asked", [frozenset({"q", "q_logsumexp", "state_values"}), frozenset({"q", "state_values"})])
def test_gradients_are_those_of_the_whole_table(asked: Any) -> None:
    policy = valued_policy(chunk_size=2)
    heads = policy.q_heads
    assert heads is not None
    output = policy(**inputs(), want=asked)
    found = output.q.square().sum() + output.state_values.pow(3).sum()
    if "q_logsumexp" in asked:
        found = found + (output.q_logsumexp * output.q_logsumexp.detach()).sum()
    expected = torch.zeros(())
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        hidden = last_hidden(policy, prompt + completion)[len(prompt) - 1 : -1]
        for head in heads.q:
            values = by_hand(head, hidden)
            for place, token in enumerate(completion):
                expected = expected + values[place, token] ** 2
                if "q_logsumexp" in asked:
                    total = values[place].logsumexp(-1)
                    expected = expected + total * total.detach()
        expected = expected + by_hand(heads.value, hidden).pow(3).sum()
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad and "embed_tokens" not in name}
    pairs = zip(
        torch.autograd.grad(found, list(trained.values()), allow_unused=True),
        torch.autograd.grad(expected, list(trained.values()), allow_unused=True),
        strict=True,
    )
    reached = 0
    for name, (one, other) in zip(trained, pairs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:
            reached += 1
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()), msg=name)
    assert reached > 10  # the trunk learns from the heads


@contextmanager
def largest_tensor() -> Iterator[list[int]]:
    """The number of entries of the largest tensor with a row per token that is made inside the block."""
    seen = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                # The transposed matrix of the last layer is as wide; 8 tokens make at most 8 rows.
                if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,) and tensor.shape[0] <= 8:
                    seen[0] = max(seen[0], tensor.numel())
            return result

    with Watch():
        yield seen


def test_values_of_all_tokens_exist_for_a_chunk_at_a_time() -> None:
    policy = valued_policy(chunk_size=2)
    with largest_tensor() as seen:
        output = policy(**inputs(), want=EVERYTHING - {"logprobs"})
        (output.q_logsumexp.sum() + output.q.sum()).backward()
    assert seen == [2 * VOCABULARY]


def test_targets_are_state_and_never_the_optimizers() -> None:
    policy = valued_policy()
    optimizer = build_optimizer(policy, TrainerConfig(), head_rate=3.0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    heads = policy.q_heads
    assert heads is not None
    assert not held & {id(p) for p in heads.targets.parameters()}
    rated = {id(p) for group in optimizer.param_groups if group["rate"] == 3.0 for p in group["params"]}
    assert rated == {id(p) for p in (*heads.q.parameters(), *heads.value.parameters())}
    saved = {name: tensor.clone() for name, tensor in trainable_state(policy).items()}
    assert {name for name in saved if name.startswith("q_heads.targets.")} == policy.followers
    assert len(policy.followers) == 8
    with torch.no_grad():
        for target in heads.targets.parameters():
            target.zero_()
    load_trainable_state(policy, saved)
    assert float(heads.targets[0].outer.weight.abs().max()) > 0


def test_a_policy_without_heads_says_so() -> None:
    policy = Policy(tiny_model("llama"))
    assert policy.followers == frozenset()
    with pytest.raises(ModelError, match="without Q heads"):
        policy(**inputs(), want=frozenset({"q"}))


def test_heads_compute_in_fp32_under_autocast() -> None:
    heads = random_heads(8, 5)
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = heads.at_tokens(hidden, torch.tensor([0, 1, 2, 3]), {"q", "q_logsumexp", "state_values"}, chunk_size=2)
        advantages = heads.advantages(hidden)
    expected = heads.at_tokens(hidden, torch.tensor([0, 1, 2, 3]), {"q", "q_logsumexp", "state_values"}, chunk_size=4)
    for name, values in found.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected[name])
    torch.testing.assert_close(advantages, heads.advantages(hidden))
