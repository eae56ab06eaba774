"""Padding, joining and packing of any rows keep every token, its position and its numbers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiny_models import tiny_model
from tropism.models.layout import Padding, join
from tropism.models.policy import Policy
from tropism.models.rows import lay_out
from tropism.types import Tokens, first_with_same_prompt, pad_rows

Pair = tuple[list[int], list[int]]
"""Prompt and completion."""

IDS = st.integers(0, 5)  # few, so that prompts repeat and pads look like tokens
PAIRS = st.lists(st.tuples(st.lists(IDS, min_size=1, max_size=4), st.lists(IDS, max_size=5)), min_size=1, max_size=6)


def tokens_of(pairs: list[Pair]) -> Tokens:
    prompts, completions = [list(prompt) for prompt, _ in pairs], [list(completion) for _, completion in pairs]
    return Tokens(
        prompt_ids=pad_rows(prompts, left=True),
        prompt_lengths=torch.tensor([len(row) for row in prompts]),
        completion_ids=pad_rows(completions),
        completion_lengths=torch.tensor([len(row) for row in completions]),
    )


def pairs_of(tokens: Tokens) -> list[Pair]:
    """The rows as lists, read by their lengths alone."""
    wide = tokens.prompt_ids.shape[1]
    return [
        (prompt[wide - p :], completion[:c])
        for prompt, p, completion, c in zip(
            tokens.prompt_ids.tolist(),
            tokens.prompt_lengths.tolist(),
            tokens.completion_ids.tolist(),
            tokens.completion_lengths.tolist(),
            strict=True,
        )
    ]


@settings(max_examples=60, deadline=None)
@given(pairs=PAIRS, data=st.data())
def test_selecting_and_joining_batches_keeps_the_rows(pairs: list[Pair], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(pairs) - 1), max_size=6))
    selected = tokens_of(pairs).select(torch.tensor(chosen, dtype=torch.long))
    assert pairs_of(selected) == [(list(pairs[i][0]), list(pairs[i][1])) for i in chosen]
    assert selected.completion_ids.shape[1] == max((len(pairs[i][1]) for i in chosen), default=0)
    cut = data.draw(st.integers(0, len(pairs)))
    parts = [tokens_of(part) for part in (pairs[:cut], pairs[cut:]) if part]
    assert pairs_of(Tokens.concat(parts)) == [(list(p), list(c)) for p, c in pairs]


def rows_of(values: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(values, mask, strict=True)]


@pytest.mark.parametrize("padding", ["left", "right", "both"])
@settings(max_examples=40, deadline=None)
@given(pairs=PAIRS)
def test_joined_rows_hold_the_tokens_in_order_at_positions_from_zero(padding: Padding, pairs: list[Pair]) -> None:
    ids, mask, positions, first = join(**tokens_of(pairs).inputs, padding=padding)
    assert rows_of(ids, mask) == [[*prompt, *completion] for prompt, completion in pairs]
    assert rows_of(positions, mask) == [list(range(len(p) + len(c))) for p, c in pairs]
    for row, (prompt, completion) in enumerate(pairs):
        begin = int(first[row])
        assert ids[row, begin : begin + len(completion)].tolist() == completion
        assert ids[row, begin - len(prompt) : begin].tolist() == prompt
    real = torch.nonzero(mask)
    gaps = real[1:, 1] - real[:-1, 1]
    assert bool((gaps[real[1:, 0] == real[:-1, 0]] == 1).all()), "the tokens of a row lie side by side"


@settings(max_examples=60, deadline=None)
@given(pairs=PAIRS)
def test_packed_rows_hold_every_token_once_and_shared_prompts_once(pairs: list[Pair]) -> None:
    tokens = tokens_of(pairs)
    ids, mask, positions, _ = join(**tokens.inputs, padding="right")
    same = first_with_same_prompt(tokens.prompt_ids, tokens.prompt_lengths)
    rows = lay_out(ids, mask, tokens.prompt_lengths, same)
    assert rows_of(rows.ids[0][rows.place], mask) == rows_of(ids, mask)
    assert rows_of(rows.positions[0][rows.place], mask) == rows_of(positions, mask)
    prompts = {tuple(prompt) for prompt, _ in pairs}
    assert rows.ids.numel() == sum(map(len, prompts)) + sum(len(completion) for _, completion in pairs)
    assert torch.equal(ids.flatten()[rows.source], rows.ids[0])
    used = set(rows.place[mask].tolist())
    assert used == set(range(rows.ids.numel()))
    assert not rows.aligned or torch.equal(rows.place.flatten(), torch.arange(rows.ids.numel()))


@cache
def tiny_policy(family: str) -> Policy:
    return Policy(tiny_model(family, seed=3))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@settings(max_examples=12, deadline=None)
@given(pairs=PAIRS, padding=st.sampled_from(["left", "right", "both"]))
def test_logprobs_of_a_row_are_those_it_has_alone(family: str, pairs: list[Pair], padding: Padding) -> None:
    policy = tiny_policy(family)
    policy.padding = padding
    with torch.no_grad():
        together = policy(**tokens_of(pairs).inputs).need("logprobs")
        for row, pair in enumerate(pairs):
            if pair[1]:
                alone = policy(**tokens_of([pair]).inputs).need("logprobs")[0]
                torch.testing.assert_close(together[row, : len(pair[1])], alone, atol=1e-5, rtol=0)
        assert bool((together[~tokens_of(pairs).completion_mask] == 0).all())
