"""Emulated bf16 against torch's own bf16 kernels."""

from __future__ import annotations

import pytest
import torch

from tiny_models import FAMILIES, tiny_model
from tropism.models import emulation
from tropism.models.emulation import emulated_linear
from tropism.models.policy import Policy

IDS = torch.tensor([[5, 9, 3, 7], [4, 4, 8, 2]])


def test_a_product_and_its_gradients_are_those_of_the_bf16_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((3, 5, 20), (7, 20), (7,)))
    upstream = torch.randn(3, 5, 7, generator=generator)
    found = []
    for emulated in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        if emulated:
            out = emulated_linear(*leaves)
        else:
            out = torch.nn.functional.linear(*(leaf.bfloat16() for leaf in leaves))
        assert out.dtype == torch.bfloat16
        out.backward(upstream.bfloat16())
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, own in zip(*found, strict=True):
        torch.testing.assert_close(ours.float(), own.float(), rtol=1e-2, atol=1e-2)
    assert torch.equal(found[0][1], found[0][1].bfloat16().float())


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_under_autocast(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to fp32 as the bf16 kernels are."""
    policy = Policy(tiny_model(family))
    mask, positions = torch.ones_like(IDS, dtype=torch.bool), torch.arange(4)[None].expand(2, -1)
    found = {}
    for name, units in (("emulated", False), ("own", True)):
        monkeypatch.setattr(emulation, "cpu_multiplies", lambda dtype, units=units: units)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[name] = policy.hidden_states(IDS, mask, positions).float()
    exact = policy.hidden_states(IDS, mask, positions)
    errors = {name: float((hidden - exact).abs().mean()) for name, hidden in found.items()}
    assert 0 < errors["emulated"] < 2 * errors["own"]


def test_without_autocast_nothing_changes() -> None:
    assert not emulation.emulates(torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.float16):
        assert not emulation.emulates(torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_forward_has_gradients_for_every_weight(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "cpu_multiplies", lambda dtype: False)
    policy = Policy(tiny_model(family))
    batch = {
        "prompt_ids": IDS[:, :2],
        "prompt_lengths": torch.tensor([2, 2]),
        "completion_ids": IDS[:, 2:],
        "completion_lengths": torch.tensor([2, 2]),
    }
    found = []
    for reduced in (True, False):
        policy.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=reduced):
            loss = policy(**batch).logprobs.sum()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert found[0].shape == found[1].shape
    assert float(torch.nn.functional.cosine_similarity(*found, dim=0)) > 0.99
