"""Truncation of logits of any rank, by hand and against transformers; the repetition penalty and its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tropism.ops import penalised, truncated

UNUSED: Any = None


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3)])
def test_pitfall_20_truncation_works_on_any_rank(shape: tuple[int, ...]) -> None:
    logits = 3 * torch.randn(*shape, 41, generator=torch.Generator().manual_seed(1))
    rows = logits.reshape(-1, 41)
    for settings, warper in (
        ({"top_k": 5}, TopKLogitsWarper(top_k=5)),
        ({"top_p": 0.7}, TopPLogitsWarper(top_p=0.7)),
        ({"min_p": 0.1}, MinPLogitsWarper(min_p=0.1)),
    ):
        found = truncated(logits, **settings)  # type: ignore[arg-type]
        assert found.shape == logits.shape
        assert torch.equal(found.reshape(-1, 41), warper(UNUSED, rows))


def test_a_scalar_has_no_vocabulary() -> None:
    with pytest.raises(ValueError, match="logits need a last dimension V"):
        truncated(torch.tensor(1.0), top_k=1)


def test_what_is_left_has_the_gradient_of_a_smaller_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], requires_grad=True)
    truncated(logits, top_k=2).log_softmax(-1)[1].backward()
    share = torch.tensor(1.0).sigmoid().item()  # of the first of the two that stay
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-share, share, 0.0, 0.0])


def test_the_penalty_by_hand() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0], [4.0, -1.0, -3.0]], requires_grad=True)
    seen = torch.tensor([[True, True, False], [False, False, True]])
    found = penalised(logits, seen, penalty=2.0)
    assert found.tolist() == [[1.0, -4.0, 1.0], [4.0, -1.0, -6.0]]
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.5, 2.0, 1.0], [1.0, 1.0, 2.0]]
    with pytest.raises(ValueError, match="bool"):
        penalised(logits, seen.long(), penalty=2.0)
    with pytest.raises(ValueError, match="penalty"):
        penalised(logits, seen, penalty=0.0)
