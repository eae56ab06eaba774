"""What travels between the parts, by hand numbers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tropism.types import (
    DemonstrationBatch,
    PolicyBatch,
    RewardBatch,
    RewardInputs,
    Rollouts,
    Tokens,
    length_mask,
    pad_rows,
)


def rollouts() -> Rollouts:
    """Three completions: of two, three and no tokens."""
    return Rollouts(
        prompt_ids=torch.tensor([[5, 6], [0, 7], [8, 9]]),
        prompt_lengths=torch.tensor([2, 1, 2]),
        completion_ids=torch.tensor([[8, 2, 0], [9, 8, 9], [0, 0, 0]]),
        completion_lengths=torch.tensor([2, 3, 0]),
        logprobs=torch.tensor([[-1.5, -0.5, 0.0], [-0.75, -2.0, -0.25], [0.0, 0.0, 0.0]]),
        behaviour_logprobs=torch.tensor([[-1.0, -0.5, 0.0], [-0.5, -2.0, -0.25], [0.0, 0.0, 0.0]]),
        finish_reasons=("eos", "length", "stop"),
        temperature=0.5,
    )


def test_rows_are_padded_on_the_side_that_is_asked_for() -> None:
    assert pad_rows([[1], [2, 3], []]).tolist() == [[1, 0], [2, 3], [0, 0]]
    assert pad_rows([[1], [2, 3], []], left=True, value=9).tolist() == [[9, 1], [2, 3], [9, 9]]
    assert pad_rows([[0.5], []], dtype=torch.float32, value=-1.0).tolist() == [[0.5], [-1.0]]
    assert pad_rows([]).shape == (0, 0) and pad_rows([[], []]).shape == (2, 0)
    assert pad_rows([[2**40]]).tolist() == [[2**40]]


def test_masks_and_lengths() -> None:
    batch = rollouts()
    assert length_mask(torch.tensor([0, 2]), 2).tolist() == [[False, False], [True, True]]
    assert batch.completion_mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert batch.total_lengths.tolist() == [4, 4, 2]
    assert batch.truncated.tolist() == [False, True, False]
    assert len(batch) == 3
    assert set(batch.inputs) == {"prompt_ids", "prompt_lengths", "completion_ids", "completion_lengths"}
    assert set(batch.tensors()) == {*batch.inputs, "logprobs", "behaviour_logprobs"}


def test_selected_rows_keep_all_their_columns_and_lose_only_padding() -> None:
    chosen = rollouts().select(torch.tensor([2, 0]))
    assert isinstance(chosen, Rollouts)
    assert chosen.prompt_ids.tolist() == [[8, 9], [5, 6]]
    assert chosen.completion_ids.tolist() == [[0, 0], [8, 2]]
    assert chosen.logprobs.tolist() == [[0.0, 0.0], [-1.5, -0.5]]
    assert chosen.finish_reasons == ("stop", "eos")
    assert chosen.temperature == 0.5
    single = rollouts().select(torch.tensor([1]))
    assert single.prompt_ids.tolist() == [[7]]
    assert single.completion_ids.tolist() == [[9, 8, 9]]
    twice = rollouts().select(torch.tensor([1, 1]))
    assert twice.finish_reasons == ("length", "length")
    none = rollouts().select(torch.tensor([], dtype=torch.long))
    assert len(none) == 0 and none.completion_ids.shape == (0, 0) and none.finish_reasons == ()
    empty = rollouts().select(torch.tensor([2]))
    assert empty.completion_ids.shape == empty.logprobs.shape == (1, 0)


def test_trimming_a_batch_that_is_tight_already_returns_it() -> None:
    batch = rollouts()
    assert batch.trimmed() is batch


def test_joined_batches_are_the_rows_in_order_padded_to_the_longest() -> None:
    whole = rollouts()
    parts = [whole.select(torch.tensor([i])) for i in range(3)]
    joined = Rollouts.concat(parts)
    for name, value in whole.tensors().items():
        real = torch.where(whole.completion_mask, value, 0) if value.shape == whole.logprobs.shape else value
        assert torch.equal(joined.tensors()[name], real), name
    assert joined.finish_reasons == whole.finish_reasons and joined.temperature == 0.5
    assert Rollouts.concat([whole]) is whole
    other = Rollouts(**{**whole.tensors(), "finish_reasons": whole.finish_reasons, "temperature": 1.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'temperature': \[0\.5, 1\.0\]"):
        Rollouts.concat([whole, other])


def test_masks_are_joined_as_masks() -> None:
    def batch(mask: list[list[bool]]) -> DemonstrationBatch:
        width = len(mask[0])
        return DemonstrationBatch(
            prompt_ids=torch.tensor([[1]]),
            prompt_lengths=torch.tensor([1]),
            completion_ids=torch.ones(1, width, dtype=torch.long),
            completion_lengths=torch.tensor([width]),
            loss_mask=torch.tensor(mask),
        )

    joined = DemonstrationBatch.concat([batch([[True]]), batch([[False, True]])])
    assert joined.loss_mask.dtype == torch.bool
    assert joined.loss_mask.tolist() == [[True, False], [False, True]]


def test_a_subclass_with_columns_of_its_own_is_handled_alike() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Weighted(Tokens):
        weights: Tensor
        per_token: Tensor
        states: Tensor
        names: tuple[str, ...]

    batch = Weighted(
        **rollouts().inputs,
        weights=torch.tensor([1.0, 2.0, 3.0]),
        per_token=torch.arange(9).view(3, 3),
        states=torch.arange(18).view(3, 3, 2),
        names=("a", "b", "c"),
    )
    chosen = batch.select(torch.tensor([2, 0]))
    assert chosen.weights.tolist() == [3.0, 1.0]
    assert chosen.per_token.tolist() == [[6, 7], [0, 1]]
    assert chosen.states.tolist() == [[[12, 13], [14, 15]], [[0, 1], [2, 3]]]
    assert chosen.names == ("c", "a")
    joined = Weighted.concat([chosen, batch.select(torch.tensor([1]))])
    assert joined.per_token.tolist() == [[6, 7, 0], [0, 1, 0], [3, 4, 5]]
    assert joined.states[:, :, 0].tolist() == [[12, 14, 0], [0, 2, 0], [6, 8, 10]]
    assert joined.states[2].tolist() == [[6, 7], [8, 9], [10, 11]]
    assert joined.prompt_ids.tolist() == [[8, 9], [5, 6], [0, 7]]


def test_all_tensors_move_together() -> None:
    moved = rollouts().to("meta")
    assert all(value.is_meta for value in moved.tensors().values())
    assert moved.finish_reasons == ("eos", "length", "stop")
    assert rollouts().to("cpu").logprobs.device.type == "cpu"


def test_a_policy_batch_of_rollouts_fills_in_what_is_not_given() -> None:
    batch = rollouts()
    made = PolicyBatch.of(batch)
    assert torch.equal(made.old_logprobs, batch.logprobs)
    assert torch.equal(made.ref_logprobs, batch.logprobs)
    for column in (made.advantages, made.returns, made.old_values):
        assert torch.equal(column, torch.zeros(3, 3))
    assert torch.equal(made.loss_mask, batch.completion_mask)
    assert made.temperature == 0.5

    mask = torch.tensor([[True, False, False]] * 3)
    given = PolicyBatch.of(batch, loss_mask=mask, old_logprobs=torch.full((3, 3), -3.0), advantages=torch.ones(3, 3))
    assert torch.equal(given.loss_mask, mask)
    assert torch.equal(given.old_logprobs, torch.full((3, 3), -3.0))
    assert torch.equal(given.ref_logprobs, given.old_logprobs)
    assert torch.equal(given.advantages, torch.ones(3, 3))
    apart = PolicyBatch.of(batch, ref_logprobs=torch.full((3, 3), -4.0))
    assert torch.equal(apart.old_logprobs, batch.logprobs)
    assert torch.equal(apart.ref_logprobs, torch.full((3, 3), -4.0))


def test_rewards_by_token_put_the_whole_reward_on_the_last_real_token() -> None:
    rewards = RewardBatch(
        per_completion=torch.tensor([1.0, -2.0, 5.0]),
        per_token=None,
        scored=torch.ones(3, dtype=torch.bool),
    )
    lengths = torch.tensor([2, 3, 0])
    # A completion of no tokens has none to carry its reward.
    assert rewards.by_token(lengths, 3).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, -2.0], [0.0, 0.0, 0.0]]
    assert rewards.totals.tolist() == [1.0, -2.0, 5.0]

    both = RewardBatch(
        per_completion=torch.tensor([1.0, -2.0]),
        per_token=torch.tensor([[0.5, 0.25, 0.0], [1.0, 2.0, 4.0]]),
        scored=torch.ones(2, dtype=torch.bool),
    )
    assert both.by_token(lengths[:2], 3).tolist() == [[0.5, 1.25, 0.0], [1.0, 2.0, 2.0]]
    assert both.totals.tolist() == [1.75, 5.0]
    assert both.per_token is not None
    assert both.per_token.tolist() == [[0.5, 0.25, 0.0], [1.0, 2.0, 4.0]]


def test_reward_inputs_are_cut_by_rows() -> None:
    inputs = RewardInputs(
        prompts=["a", "b", "c"],
        completions=["x", "y", "z"],
        completion_ids=[[1], [2, 3], []],
        finish_reasons=["eos", "length", "stop"],
        columns={"label": [7, 8, 9]},
        trainer_state={"step": 1},
    )
    part = inputs.rows(1, 3)
    assert (part.prompts, part.completions) == (["b", "c"], ["y", "z"])
    assert (part.completion_ids, part.finish_reasons) == ([[2, 3], []], ["length", "stop"])
    assert part.columns == {"label": [8, 9]} and part.trainer_state == {"step": 1}
    assert len(part) == 2
