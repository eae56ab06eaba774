"""Agreement with TRL where it has a function of its own for the same quantity."""

from __future__ import annotations

import pytest
import torch

from tropism.ops import entropy, token_logprobs

trl = pytest.importorskip("trl.trainer.utils")

pytestmark = pytest.mark.parity


def test_token_logprobs_and_entropy() -> None:
    logits = 4 * torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(7))
    ids = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(token_logprobs(logits, ids), trl.selective_log_softmax(logits, ids))
    torch.testing.assert_close(entropy(logits), trl.entropy_from_logits(logits))
