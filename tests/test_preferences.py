"""Pairs and opinions as batches."""

from __future__ import annotations

import pytest
import torch
from torch import tensor

from tropism.preferences import Opinion, Pair, collate_opinions, collate_pairs, mismatched

PAIRS = [
    Pair(prompt_ids=(5, 6), chosen_ids=(8, 2), rejected_ids=(9, 9, 2)),
    Pair(prompt_ids=(7,), chosen_ids=(8, 2), rejected_ids=(2,), weight=2.0),
    Pair(prompt_ids=(4, 4, 4), chosen_ids=(2,), rejected_ids=(3,)),
]
OPINIONS = [
    Opinion(prompt_ids=(5, 6), completion_ids=(8, 2), liked=True),
    Opinion(prompt_ids=(7,), completion_ids=(9, 9, 9, 2), liked=False),
    Opinion(prompt_ids=(4, 4, 4), completion_ids=(2,), liked=True),
]


def test_pairs_are_laid_out_as_the_example_says() -> None:
    batch = collate_pairs(PAIRS[:2])
    assert batch.prompt_ids.tolist() == [[5, 6], [0, 7]] and batch.prompt_lengths.tolist() == [2, 1]
    assert batch.completion_ids.tolist() == [[[8, 2, 0], [9, 9, 2]], [[8, 2, 0], [2, 0, 0]]]
    assert batch.lengths.tolist() == [[2, 3], [2, 1]] and batch.weights.tolist() == [1.0, 2.0]
    assert batch.loss_mask.sum(1).tolist() == [5, 3] == batch.completion_lengths.tolist()
    assert batch.total_lengths.tolist() == [10, 6]  # two rows of 5, two of 3


def test_rows_and_sums_keep_both_completions_together() -> None:
    batch = collate_pairs(PAIRS[:2])
    rows = batch.rows
    assert rows.prompt_ids.tolist() == [[5, 6], [5, 6], [0, 7], [0, 7]]
    assert rows.completion_ids.tolist() == [[8, 2, 0], [9, 9, 2], [8, 2, 0], [2, 0, 0]]
    assert rows.completion_lengths.tolist() == [2, 3, 2, 1]
    logprobs = tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0], [-4.0, -1.0, 0.0], [-0.5, 0.0, 0.0]])
    assert batch.per_item(logprobs).tolist() == [[-3.0, -3.0], [-5.0, -0.5]]


def test_selected_pairs_are_those_of_a_batch_of_their_own() -> None:
    part, alone = collate_pairs(PAIRS).select(tensor([1, 0])), collate_pairs([PAIRS[1], PAIRS[0]])
    for name, value in alone.tensors().items():
        assert torch.equal(part.tensors()[name], value), name
    assert len(collate_pairs(PAIRS).select(torch.zeros(0, dtype=torch.long))) == 0


def test_an_emptied_batch_counts_nothing() -> None:
    pairs, opinions = collate_pairs(PAIRS).emptied(), collate_opinions(OPINIONS).emptied()
    assert not bool(pairs.loss_mask.any()) and float(pairs.weights.sum()) == 0.0 and len(pairs) == 3
    assert not bool(opinions.loss_mask.any()) and len(opinions) == 3


def test_opinions_keep_their_columns_when_selected() -> None:
    batch = collate_opinions(OPINIONS).select(tensor([1, 2]))
    assert batch.liked.tolist() == [False, True]
    assert batch.completion_ids.tolist() == [[9, 9, 9, 2], [2, 0, 0, 0]]
    assert batch.per_item(tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 0.0, 0.0, 0.0]])).tolist() == [10.0, 5.0]


def test_every_prompt_gets_the_completion_before_it() -> None:
    found = mismatched(OPINIONS, max_length=None)
    assert [(o.prompt_ids, o.completion_ids) for o in found] == [
        ((5, 6), (2,)),
        ((7,), (8, 2)),
        ((4, 4, 4), (9, 9, 9, 2)),
    ]
    cut = mismatched(OPINIONS, max_length=5)
    assert [o.completion_ids for o in cut] == [(2,), (8, 2), (9, 9)]
    with pytest.raises(ValueError, match="at least two"):
        mismatched(OPINIONS[:1], max_length=None)
