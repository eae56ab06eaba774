"""Whether a plain encoder-decoder computes what a policy does: every logit of a completion, and greedy generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tropism.models.baked import compared_logits
from tropism.models.policy import Policy


@torch.no_grad()
def completion_logits(policy: Policy, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """[T, V] float32 logits that predict each token of a completion; the prompt may hold slots."""
    ids, tokens = (torch.tensor([[*row]], device=policy.device) for row in (prompt, completion))
    lengths = (torch.tensor([len(row)], device=policy.device) for row in (prompt, completion))
    output = policy(ids, next(lengths), tokens, next(lengths), want=frozenset({"hidden"}))
    return policy.logits(output.need("hidden")[0]).float()


@torch.no_grad()
def logits_difference(
    policy: Policy, plain: Any, asked: Sequence[int], baked: Sequence[int], completion: Sequence[int]
) -> tuple[float, float]:
    """Largest difference of logits between the policy and a plain model, and the largest logit.

    Args:
        asked: ids of a prompt with slots. baked: the same with rows of the vocabulary in their places.
        completion: any ids, of which the decoder reads all but the last.
    """
    expected = completion_logits(policy, asked, completion)
    prefix = policy.decoder_prefix
    assert prefix is not None
    row = torch.tensor([[*baked]], device=plain.device)
    read = torch.tensor([[*prefix, *completion[:-1]]], device=plain.device)
    whole = plain(input_ids=row, attention_mask=torch.ones_like(row), decoder_input_ids=read, use_cache=False).logits
    found = whole[0, len(prefix) - 1 :].float()
    return compared_logits(expected, found)


@torch.no_grad()
def greedy_gap(
    policy: Policy, plain: Any, asked: Sequence[int], encoded: Mapping[str, Tensor], *, new_tokens: int
) -> float:
    """How far the tokens of greedy generation of ``plain`` are from the policy's best ones, in logits; 0 where equal.

    Args:
        asked: ids of the prompt with slots. encoded: what the tokenizer of ``plain`` makes of its text, [1, L] each.
    """
    prefix = policy.decoder_prefix
    assert prefix is not None
    own: GenerationConfig = plain.generation_config
    suppressed = list(own.suppress_tokens or [])
    plain.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens + len(prefix) - 1,
        suppress_tokens=suppressed or None,
        decoder_start_token_id=prefix[0],
        forced_bos_token_id=prefix[1] if len(prefix) > 1 else None,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    try:
        whole = plain.generate(**{name: tensor.to(plain.device) for name, tensor in encoded.items()})
    finally:
        plain.generation_config = own
    chosen: list[int] = whole[0, len(prefix) :].tolist()
    if whole[0, : len(prefix)].tolist() != [*prefix] or not chosen:
        return float("inf")
    logits = completion_logits(policy, asked, chosen)
    logits[:, [i for i in suppressed if i < logits.shape[1]]] = -torch.inf
    if max(chosen) >= logits.shape[1]:
        return float("inf")
    return float((logits.max(dim=-1).values - logits[range(len(chosen)), chosen]).max())
