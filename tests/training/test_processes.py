from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tropism.training.processes import GATHERED, Processes, plan_micro_batches, plan_shared_micro_batches
from tropism.types import Tokens, pad_rows


def processes(rank: int, count: int) -> Processes:
    accelerator: Any = SimpleNamespace(process_index=rank, num_processes=count)
    return Processes(accelerator)


@given(items=st.integers(0, 20), count=st.integers(1, 5))
def test_shares_are_contiguous_even_and_cover_everything(items: int, count: int) -> None:
    shares = [processes(rank, count).share(range(items)) for rank in range(count)]
    assert [item for _, share in shares for item in share] == list(range(items))
    assert all(not len(share) or share[0] == first for first, share in shares)
    sizes = [len(share) for _, share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_is_local() -> None:
    alone = processes(0, 1)
    assert alone.is_main and not processes(1, 2).is_main
    items = [object()]
    assert alone.gather(items) is items
    assert alone.from_main(3) == 3 and alone.maximum(4) == 4 and alone.signal_anywhere() is None
    assert alone.together(lambda: 5) == [5]
    tensor = torch.ones(2)
    assert alone.sum(tensor) is tensor


@given(
    lengths=st.lists(st.integers(0, 30), max_size=25),
    max_tokens=st.integers(1, 60),
    max_rows=st.one_of(st.none(), st.integers(1, 5)),
)
def test_micro_batches_cover_every_row_once_within_the_limits(
    lengths: list[int], max_tokens: int, max_rows: int | None
) -> None:
    plan = plan_micro_batches(torch.tensor(lengths, dtype=torch.long), max_tokens=max_tokens, max_rows=max_rows)
    assert sorted(row for rows in plan for row in rows.tolist()) == list(range(len(lengths)))
    for rows in plan:
        padded = len(rows) * max(1, max(lengths[row] for row in rows.tolist()))
        assert padded <= max_tokens or len(rows) == 1
        assert max_rows is None or len(rows) <= max_rows
    ordered = [lengths[row] for rows in plan for row in rows.tolist()]
    assert ordered == sorted(lengths, reverse=True)


def test_rows_of_similar_length_go_together() -> None:
    plan = plan_micro_batches(torch.tensor([2, 10, 3, 9]), max_tokens=20)
    assert [rows.tolist() for rows in plan] == [[1, 3], [2, 0]]


def test_no_rows_make_no_micro_batch() -> None:
    assert plan_micro_batches(torch.zeros(0, dtype=torch.long), max_tokens=5) == []


def test_equal_lengths_keep_their_order() -> None:
    plan = plan_micro_batches(torch.full((5,), 4), max_tokens=8)
    assert [rows.tolist() for rows in plan] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("count", [2, 3])
def test_the_first_of_more_processes_is_main(count: int) -> None:
    assert [processes(rank, count).is_main for rank in range(count)] == [True] + [False] * (count - 1)


def rows_of(prompts: list[list[int]], completion_lengths: list[int]) -> Tokens:
    return Tokens(
        prompt_ids=pad_rows(prompts, left=True),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long),
        completion_ids=torch.zeros(len(prompts), max(completion_lengths, default=0), dtype=torch.long),
        completion_lengths=torch.tensor(completion_lengths, dtype=torch.long),
    )


@given(
    rows=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=25),
    max_tokens=st.integers(1, 60),
    max_rows=st.one_of(st.none(), st.integers(1, 5)),
)
def test_shared_micro_batches_cover_every_row_once_and_count_each_prompt_once(
    rows: list[tuple[int, int]], max_tokens: int, max_rows: int | None
) -> None:
    prompts = [[kind] * (3 * kind) for kind, _ in rows]
    plan = plan_shared_micro_batches(
        rows_of(prompts, [length for _, length in rows]), max_tokens=max_tokens, max_rows=max_rows
    )
    assert sorted(row for part in plan for row in part.tolist()) == list(range(len(rows)))
    for part in plan:
        members = [rows[row] for row in part.tolist()]
        tokens = sum(3 * kind for kind in {kind for kind, _ in members}) + sum(length for _, length in members)
        assert tokens <= max_tokens or len(members) == 1
        gathered = len(members) * max(3 * kind + length for kind, length in members)
        assert gathered <= GATHERED * max_tokens or len(members) == 1
        assert max_rows is None or len(members) <= max_rows


def test_completions_of_one_prompt_stay_together() -> None:
    """By hand: [7, 7] has rows 0, 2 and 3 (2 + 3 + 1 + 1 tokens), [9] rows 1 and 4 (1 + 6 + 2)."""
    tokens = rows_of([[7, 7], [9], [7, 7], [7, 7], [9]], [3, 6, 1, 1, 2])
    assert [part.tolist() for part in plan_shared_micro_batches(tokens, max_tokens=16)] == [[1, 4, 0, 2, 3]]
    assert [part.tolist() for part in plan_shared_micro_batches(tokens, max_tokens=9)] == [[1, 4], [0, 2, 3]]
    assert [part.tolist() for part in plan_shared_micro_batches(tokens, max_tokens=6)] == [[1], [4], [0, 2], [3]]
