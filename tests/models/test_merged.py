"""Sampling with merged adapters computes what the adapters compute, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from tiny_models import FAMILIES, tiny_model
from tropism.models.lora import LoRA, add_lora
from tropism.models.merged import merged_adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_adapter(family: str) -> None:
    model = add_lora(tiny_model(family), LoRA(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        own = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        with merged_adapter(model):
            merged = model(ids).logits
        again = model(ids).logits
    assert (own - base).abs().max() > 1e-2
    torch.testing.assert_close(merged, own, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, own)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_products_of_the_adapter_are_not_computed_again_inside() -> None:
    model = add_lora(tiny_model("llama"), LoRA(rank=2), seed=0)
    calls = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[5, 9]])
    with torch.no_grad(), merged_adapter(model):
        model(ids)
    assert not calls
    with torch.no_grad(), pytest.raises(RuntimeError), merged_adapter(model):
        raise RuntimeError
    model(ids)
    assert calls
