"""Adapters start as nothing, from their own seed, on the layers they should be on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tiny_models import FAMILIES, VOCABULARY
from tropism.errors import ModelError
from tropism.models.lora import LoRA, add_lora, add_reference_adapter

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    output: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return output


def in_dtype(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    model.to(dtype)
    assert isinstance(model, PreTrainedModel)
    return model


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_and_a_disabled_one_equal_the_base_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    expected = logits(in_dtype(FAMILIES[family](), dtype))
    model = add_lora(in_dtype(FAMILIES[family](), dtype), LoRA(rank=4), seed=0)
    assert torch.equal(logits(model), expected)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_trains_and_it_is_float32_on_every_block_but_not_on_the_output(family: str) -> None:
    model = add_lora(in_dtype(FAMILIES[family](), torch.bfloat16), LoRA(rank=4), seed=0)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    layers = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trainable}
    assert not any("lm_head" in name or "embed_out" in name for name in layers)
    linear = {
        name.replace(".base_layer", "")
        for name, module in model.get_base_model().named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "lora_" not in name
    }
    assert layers == linear - {"lm_head", "embed_out"}
    assert not any(module.training for module in model.modules())


def test_the_seed_alone_decides() -> None:
    weights = []
    for global_seed, seed in [(0, 5), (1, 5), (0, 6)]:
        torch.manual_seed(global_seed)
        weights.append(adapter_weights(add_lora(FAMILIES["llama"](), LoRA(rank=4), seed=seed)))
    first, same, other = weights
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_global_random_state_does_not_move() -> None:
    model = FAMILIES["llama"]()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    add_reference_adapter(add_lora(model, LoRA(rank=4), seed=1))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (8.0, 2.0), (2.0, 0.5), (3.0, 0.75)])
def test_alpha_over_rank_scales_the_product(alpha: float | None, scale: float) -> None:
    model = add_lora(FAMILIES["llama"](), LoRA(rank=4, alpha=alpha, targets="q_proj"), seed=0)
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 32)
    with torch.no_grad():
        low = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
        torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * low)


def test_targets_may_be_named() -> None:
    model = add_lora(FAMILIES["llama"](), LoRA(targets=("q_proj", "layers.1.mlp.up_proj")), seed=0)
    adapted = {name.split(".lora_")[0].split("layers.")[1] for name in adapter_weights(model)}
    assert adapted == {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}


def test_an_unknown_target_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ModelError, match=r"'q_prj'.*c_attn, c_fc, c_proj"):
        add_lora(FAMILIES["gpt2"](), LoRA(targets="q_prj"), seed=0)
    with pytest.raises(ModelError, match=r"did you mean 'q_proj'"):
        add_lora(FAMILIES["llama"](), LoRA(targets=("v_proj", "q_prj")), seed=0)
    with pytest.raises(ModelError, match="output embedding"):
        add_lora(FAMILIES["llama"](), LoRA(targets="lm_head"), seed=0)


@pytest.mark.parametrize(
    ("fields", "message"), [({"rank": 0}, "rank is 0"), ({"alpha": -1.0}, "alpha is -1.0"), ({"targets": ()}, "empty")]
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        LoRA(**fields)


def test_a_second_adapter_on_top_is_refused() -> None:
    model: Any = add_lora(FAMILIES["llama"](), LoRA(rank=2), seed=0)
    with pytest.raises(ModelError, match="has an adapter already"):
        add_lora(model, LoRA(rank=2), seed=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_reference_adapter_is_a_frozen_copy(family: str) -> None:
    model = add_lora(FAMILIES[family](), LoRA(rank=4), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    start = logits(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}

    add_reference_adapter(model)

    assert model.active_adapter == "default"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(logits(model), start)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(logits(model), start)
    model.set_adapter("reference", inference_mode=True)
    assert torch.equal(logits(model), start)
    with pytest.raises(ModelError, match="already"):
        add_reference_adapter(model)
