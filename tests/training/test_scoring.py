from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from tiny_models import tiny_model
from tropism.models.heads import ValueHead
from tropism.models.policy import Policy
from tropism.training.processes import Processes
from tropism.training.scoring import ModelScorer
from tropism.types import Tokens

TOKENS = Tokens(
    prompt_ids=torch.tensor([[0, 0, 5], [6, 7, 8], [0, 9, 9], [0, 0, 4]]),
    prompt_lengths=torch.tensor([1, 3, 2, 1]),
    completion_ids=torch.tensor([[8, 9, 2, 0], [9, 0, 0, 0], [5, 6, 7, 8], [0, 0, 0, 0]]),
    completion_lengths=torch.tensor([3, 1, 4, 0]),
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    head = ValueHead(32)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    return Policy(tiny_model("llama"), value_head=head).eval()


def scorer(policy: Policy, *, tokens: int = 8192, rows: int | None = None) -> ModelScorer:
    return ModelScorer(lambda: nullcontext(policy), Processes(Accelerator(cpu=True)), max_tokens=tokens, max_rows=rows)


@torch.no_grad()
def slow_logprobs(policy: Policy, temperature: float) -> Tensor:
    """Row by row, token by token, from the model's own logits."""
    result = torch.zeros(4, 4)
    for row in range(4):
        prompt = TOKENS.prompt_ids[row, 3 - int(TOKENS.prompt_lengths[row]) :].tolist()
        ids = TOKENS.completion_ids[row, : int(TOKENS.completion_lengths[row])].tolist()
        for t, token in enumerate(ids):
            logits = policy.model(input_ids=torch.tensor([prompt + ids[:t]])).logits[0, -1]
            result[row, t] = (logits / temperature).log_softmax(-1)[token]
    return result


@pytest.mark.parametrize(("tokens", "rows"), [(8192, None), (8192, 1), (8192, 3), (10, None)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_against_one_forward_pass_per_token(
    policy: Policy, tokens: int, rows: int | None, temperature: float
) -> None:
    found = scorer(policy, tokens=tokens, rows=rows).logprobs(TOKENS, temperature=temperature)
    torch.testing.assert_close(found, slow_logprobs(policy, temperature), rtol=0, atol=1e-5)
    assert not found.requires_grad


def test_values_stand_before_each_token_and_after_the_last(policy: Policy) -> None:
    values, after = scorer(policy, rows=2).values(TOKENS)
    assert values.shape == (4, 4) and after.shape == (4,)
    assert policy.value_head is not None
    for row in range(4):
        prompt = TOKENS.prompt_ids[row, 3 - int(TOKENS.prompt_lengths[row]) :].tolist()
        ids = TOKENS.completion_ids[row, : int(TOKENS.completion_lengths[row])].tolist()
        for t in range(len(ids) + 1):
            with torch.no_grad():
                hidden = policy.body(input_ids=torch.tensor([prompt + ids[:t]])).last_hidden_state[0, -1]
                expected = float(policy.value_head(hidden))
            found = values[row, t] if t < len(ids) else after[row]
            assert float(found) == pytest.approx(expected, abs=1e-5)
        assert not bool(values[row, len(ids) :].any())


def test_shares_of_two_processes_make_the_whole(policy: Policy) -> None:
    whole = scorer(policy).logprobs(TOKENS, temperature=1.0)
    parts = []
    for rank in (0, 1):
        half = scorer(policy)
        half.processes.rank, half.processes.count = rank, 2
        half.processes.sum = lambda tensor: tensor  # type: ignore[method-assign]
        parts.append(half.logprobs(TOKENS, temperature=1.0))
    assert not bool(parts[0][1::2].any()) and not bool(parts[1][0::2].any())
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=0, atol=1e-5)


def test_no_rows(policy: Policy) -> None:
    empty = replace(TOKENS, **{name: value[:0] for name, value in TOKENS.tensors().items()})
    assert scorer(policy).logprobs(empty, temperature=1.0).shape == (0, 4)


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_hidden_states_predict_each_token(policy: Policy, rows: int | None) -> None:
    hidden = scorer(policy, rows=rows).hidden_states(TOKENS)
    assert hidden.shape == (4, 4, 32) and not hidden.requires_grad
    logprobs = policy.logits(hidden).log_softmax(-1).gather(-1, TOKENS.completion_ids[:, :, None]).squeeze(-1)
    found = logprobs * TOKENS.completion_mask
    torch.testing.assert_close(found, slow_logprobs(policy, 1.0), rtol=0, atol=1e-5)
    assert not bool(hidden[~TOKENS.completion_mask].any())
