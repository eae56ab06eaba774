"""Packed layers compute what the layers compute, notice changed weights, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tiny_models import FAMILIES, tiny_model
from tropism.models import packed
from tropism.models.lora import LoRA, add_lora
from tropism.models.packed import Dense, PackedWeights, layers_with_weights, packed_layers


@pytest.fixture(autouse=True)
def _packs_small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALLEST_PACKED", 2**12)


def adapted(family: str) -> nn.Module:
    model = add_lora(tiny_model(family), LoRA(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("smallest", [0, 2**30], ids=["packed", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_adapter(family: str, smallest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALLEST_PACKED", smallest)
    model = adapted(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        own = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        with packed_layers(layers_with_weights(model), PackedWeights(), torch.float32):
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
    layers, weights = layers_with_weights(model), PackedWeights()
    with torch.no_grad(), packed_layers(layers, weights, torch.float32):
        model(ids)
    assert not calls
    with torch.no_grad(), pytest.raises(RuntimeError), packed_layers(layers, weights, torch.float32):
        raise RuntimeError
    model(ids)
    assert calls


@pytest.mark.parametrize("shape", [(300, 200), (3, 5)], ids=["packed", "too small to pack"])
def test_layers_side_by_side(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    wide, into = shape
    first, second = nn.Linear(into, wide), nn.Linear(into, 7, bias=False)
    x = torch.randn(2, 3, into, generator=generator)
    dense = PackedWeights().dense([first, second], torch.float32)
    assert dense is not None
    with torch.no_grad():
        torch.testing.assert_close(dense(x), torch.cat([first(x), second(x)], dim=-1), rtol=1e-5, atol=1e-5)


def test_conv1d_is_a_transposed_linear() -> None:
    layer = Conv1D(150, 200)
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    dense = PackedWeights().dense([layer], torch.float32)
    assert dense is not None
    with torch.no_grad():
        torch.testing.assert_close(dense(x), layer(x), rtol=1e-5, atol=1e-5)


def test_frozen_layers_are_packed_once_until_their_weights_change() -> None:
    layer = nn.Linear(200, 100).requires_grad_(False)
    weights = PackedWeights()
    first = weights.dense([layer], torch.float32)
    assert weights.dense([layer], torch.float32) is first
    layer.weight.mul_(2.0)
    second = weights.dense([layer], torch.float32)
    assert second is not None and second is not first
    x = torch.ones(1, 200)
    torch.testing.assert_close(second(x), layer(x), rtol=1e-5, atol=1e-5)
    assert weights.dense([layer], torch.bfloat16) is not second


def test_layers_in_training_are_packed_anew_each_time_even_if_changed_behind_autograd() -> None:
    layer = nn.Linear(200, 100)
    weights = PackedWeights()
    weights.dense([layer], torch.float32)
    layer.weight.data.mul_(3.0)  # leaves the version counter as it was
    dense = weights.dense([layer], torch.float32)
    assert dense is not None
    x = torch.ones(1, 200)
    torch.testing.assert_close(dense(x), layer(x).detach(), rtol=1e-5, atol=1e-5)


def test_other_kinds_of_layers_are_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert PackedWeights().dense([Scaled(8, 8)], torch.float32) is None


def test_bf16_rounds_operands_and_results() -> None:
    """By hand: 1 + 2^-9 rounds to 1 in bf16, and 257 rounds to 256."""
    weight = torch.full((256, 257), 1 + 2**-9)
    dense = Dense([weight], [None], torch.bfloat16)
    result = dense(torch.ones(1, 257))
    assert result.dtype == torch.bfloat16
    assert torch.equal(result.float(), torch.full((1, 256), 256.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_added_to_a_residual(dtype: torch.dtype) -> None:
    """Packed or emulated; by hand: a row of 200 ones times ones is 200, and 200 + 3 is 203."""
    dense = Dense([torch.ones(100, 200)], [None], dtype)
    out = dense.plus(torch.ones(2, 200, dtype=dtype), torch.full((2, 100), 3.0, dtype=dtype))
    assert out.dtype == dtype
    assert torch.equal(out.float(), torch.full((2, 100), 203.0))


def test_without_the_private_kernels_the_plain_product_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "cpu_packs", lambda dtype: False)
    layer = nn.Linear(200, 100)
    dense = PackedWeights().dense([layer], torch.float32)
    assert dense is not None and dense.packed is None
    x = torch.ones(2, 200)
    torch.testing.assert_close(dense(x), layer(x).detach(), rtol=1e-6, atol=1e-6)


def test_asking_under_autocast_gives_the_same_answer() -> None:
    packed.cpu_packs.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = packed.cpu_packs(torch.float32)
    packed.cpu_packs.cache_clear()
    assert under == packed.cpu_packs(torch.float32)
