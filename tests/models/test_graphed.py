"""Steps of fixed shape against steps of growing shape; their capture needs a GPU."""

from __future__ import annotations

import pytest
import torch

from decode_steps import FUSED, NEW, prefilled
from tiny_models import tiny_model
from tropism.models.graphed import FixedStep, GraphedSteps
from tropism.models.policy import Policy


@pytest.mark.parametrize("starts", [[0, 0, 0], [0, 4, 1]], ids=["even", "uneven"])
@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_fixed_steps_are_growing_steps(family: str, starts: list[int]) -> None:
    """Four slots, three rows in use, one of which leaves before the last step."""
    policy = Policy(tiny_model(family))
    ours, own = (prefilled(policy, torch.tensor(starts)) for _ in range(2))
    with policy.for_sampling() as sampling:
        assert sampling.decoder is not None
        fixed = FixedStep(sampling.decoder, ours)
        for step in range(3):
            ids = NEW[:, step] if step < 2 else NEW[[0, 2], step]
            if step == 2:
                for cache in (ours, own):
                    cache.keep(torch.tensor([0, 2]))
            fixed.place(ids, ours)
            out = fixed.run()
            torch.testing.assert_close(out[: len(ids)], sampling.decode(ids, own), rtol=1e-4, atol=2e-5)
            for cache in (ours, own):
                cache.advance(1)


@torch.no_grad()
def test_without_cuda_graphs_the_steps_go_on(caplog: pytest.LogCaptureFixture) -> None:
    """What fails to capture is told once, and every step is computed as before."""
    if torch.cuda.is_available():
        pytest.skip("captures where there is a GPU")
    policy = Policy(tiny_model("llama"))
    starts = torch.zeros(3, dtype=torch.long)
    ours, own = prefilled(policy, starts), prefilled(policy, starts)
    with policy.for_sampling() as sampling:
        assert sampling.decoder is not None and sampling.graphed is None
        graphed = GraphedSteps(sampling.decoder, torch.float32)
        for step in (0, 1, 2, 0):
            assert torch.equal(graphed.step(NEW[:, step], ours), sampling.decode(NEW[:, step], own))
            for cache in (ours, own):
                cache.advance(1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
