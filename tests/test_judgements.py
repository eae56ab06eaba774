"""Comparisons as batches: padding, choosing items, and what counts."""

from __future__ import annotations

import torch

from tropism.judgements import Comparison, ComparisonBatch, collate_comparisons


def comparison(*rows: list[int], **fields: object) -> Comparison:
    texts = tuple(str(row) for row in rows)
    return Comparison(ids=tuple(tuple(row) for row in rows), prompt="", completions=texts, **fields)  # type: ignore[arg-type]


def batch() -> ComparisonBatch:
    return collate_comparisons(
        [
            comparison([5, 8], [5, 9, 3], [5], choice=2, margin=0.5, weight=2.0),
            comparison([6, 4, 1, 2], [6], choice=0),
            comparison([7], [7, 7]),
        ],
        kind="choice",
    )


def test_collated_by_hand() -> None:
    made = batch()
    assert made.ids.tolist() == [
        [[5, 8, 0, 0], [5, 9, 3, 0], [5, 0, 0, 0]],
        [[6, 4, 1, 2], [6, 0, 0, 0], [0, 0, 0, 0]],
        [[7, 0, 0, 0], [7, 7, 0, 0], [0, 0, 0, 0]],
    ]
    assert made.lengths.tolist() == [[2, 3, 1], [4, 1, 0], [1, 2, 0]]
    assert made.choices.tolist() == [2, 0, -1] and made.choices.dtype == torch.long
    assert made.margins.tolist() == [0.5, 0.0, 0.0] and made.weights.tolist() == [2.0, 1.0, 1.0]
    assert made.targets.tolist() == [0.0] * 3 and made.targets.dtype == torch.float32
    assert made.present.tolist() == [[True, True, True], [True, True, False], [True, True, False]]
    assert len(made) == 3 and made.kind == "choice"


def test_numbers_that_people_gave() -> None:
    ratings = collate_comparisons([comparison([5], target=-1.5), comparison([6], target=0.0)], kind="rating")
    assert ratings.targets.tolist() == [-1.5, 0.0] and ratings.choices.tolist() == [-1, -1]
    assert ratings.kind == "rating" and ratings.ids.shape == (2, 1, 1)


def test_what_is_read_and_what_it_takes() -> None:
    made = batch()
    assert made.total_lengths.tolist() == [9, 8, 4]  # three rows of 3, two of 4, two of 2
    read = [
        [1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0],
    ]
    assert made.loss_mask.int().tolist() == read
    weighed = collate_comparisons([comparison([5, 8], [5])], kind="choice").emptied()
    assert not weighed.loss_mask.any()


def test_selected_items_are_trimmed_to_their_longest_text() -> None:
    made = batch()
    chosen = made.select(torch.tensor([2, 0]))
    assert chosen.ids.tolist() == [[[7, 0, 0], [7, 7, 0], [0, 0, 0]], [[5, 8, 0], [5, 9, 3], [5, 0, 0]]]
    assert chosen.lengths.tolist() == [[1, 2, 0], [2, 3, 1]]
    assert (chosen.choices.tolist(), chosen.margins.tolist()) == ([-1, 2], [0.0, 0.5])
    assert (chosen.weights.tolist(), chosen.kind) == ([1.0, 2.0], "choice")
    nothing = made.select(torch.zeros(0, dtype=torch.long))
    assert len(nothing) == 0 and nothing.ids.shape == (0, 3, 0)
    assert made.ids.shape == (3, 3, 4)


def test_emptied_keeps_the_rows_and_learns_nothing() -> None:
    made = batch()
    emptied = made.emptied()
    assert torch.equal(emptied.ids, made.ids) and emptied.weights.tolist() == [0.0] * 3
    assert made.weights.tolist() == [2.0, 1.0, 1.0]


def test_moved_to_a_device() -> None:
    moved = batch().to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"} and moved.kind == "choice"
    assert set(moved.tensors()) == {"ids", "lengths", "choices", "targets", "margins", "weights"}
