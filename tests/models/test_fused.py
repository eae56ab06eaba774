"""Fused decode steps against the models' own forward passes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from decode_steps import FUSED, NEW, PROMPTS, needs_compiler, prefilled
from tiny_models import FAMILIES, tiny_model
from tropism.errors import ConfigError
from tropism.models import packed, sampling_model
from tropism.models.compiled_llama import CompiledLlamaDecoder
from tropism.models.fused_llama import LlamaDecoder
from tropism.models.lora import LoRA, add_lora
from tropism.models.policy import Policy
from tropism.models.sampling_model import check_compiled


@pytest.mark.parametrize("smallest", [0, 2**30, None], ids=["packed", "plain", "compiled"])
@pytest.mark.parametrize("starts", [[0, 0, 0], [2, 2, 2], [0, 4, 1]], ids=["full", "even", "uneven"])
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_each_step_is_the_last_column_of_a_full_forward_pass(
    family: str, lora: bool, starts: list[int], smallest: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps, across the end of a sliding window of 4 in the families that have one."""
    if smallest is None:
        needs_compiler()
    else:
        monkeypatch.setattr(packed, "SMALLEST_PACKED", smallest)
    model: Any = tiny_model(family)
    if lora:
        model = add_lora(model, LoRA(rank=2), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    policy = Policy(model)
    begins = torch.tensor(starts)
    cache = prefilled(policy, begins)
    with policy.for_sampling(compiled=smallest is None) as sampling:
        assert sampling.decoder is not None
        assert isinstance(sampling.decoder, CompiledLlamaDecoder) == (smallest is None and family != "gpt2")
        for step in range(3):
            ours = sampling.decode(NEW[:, step], cache)
            cache.advance(1)
            for row, begin in enumerate(starts):
                ids = torch.cat([PROMPTS[row, begin:], NEW[row, : step + 1]])[None]
                own = policy.hidden_states(
                    ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(ids.shape[1])[None]
                )
                torch.testing.assert_close(ours[row], own[0, -1], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in FUSED])
@torch.no_grad()
def test_other_families_take_their_own_forward(family: str) -> None:
    with Policy(tiny_model(family)).for_sampling() as sampling:
        assert sampling.decoder is None


@torch.no_grad()
def test_a_step_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_model, "agrees", lambda *_: False)
    policy = Policy(tiny_model("llama"))
    for _ in range(2):
        with policy.for_sampling() as sampling:
            assert sampling.decoder is None


@torch.no_grad()
def test_an_unknown_variant_is_told_and_not_used(caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(tiny_model("llama", hidden_act="gelu"))
    with caplog.at_level(logging.INFO, logger="tropism"), policy.for_sampling() as sampling:
        assert sampling.decoder is None
    assert "gelu" in caplog.text


@torch.no_grad()
def test_a_policy_may_be_compiled_and_not_in_turns() -> None:
    """Copies of frozen layers are kept from one use to the next, and belong to one kind of kernel."""
    needs_compiler()
    policy = Policy(tiny_model("llama").requires_grad_(False))
    starts = torch.tensor([0, 4, 1])
    found = []
    for compiled in (False, True, True, False):
        with policy.for_sampling(compiled=compiled) as sampling:
            found.append(sampling.decode(NEW[:, 0], prefilled(policy, starts)))
    assert torch.equal(found[0], found[3]) and torch.equal(found[1], found[2])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_what_cannot_be_compiled_whole_is_fused(frozen: bool) -> None:
    """The packed gate of the compiled step is not taken for the joint layer of the fused one."""
    needs_compiler()
    model: Any = tiny_model("llama").requires_grad_(not frozen)
    model.model.layers[-1].post_attention_layernorm.variance_epsilon *= 2
    policy, starts = Policy(model), torch.tensor([0, 4, 1])
    with policy.for_sampling() as sampling:
        expected = sampling.decode(NEW[:, 0], prefilled(policy, starts))
    with policy.for_sampling(compiled=True) as sampling:
        assert isinstance(sampling.decoder, LlamaDecoder)
        found = sampling.decode(NEW[:, 0], prefilled(policy, starts))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@torch.no_grad()
def test_a_window_that_is_too_narrow_to_compare_takes_the_models_own_forward(compiled: bool) -> None:
    if compiled:
        needs_compiler()
    with Policy(tiny_model("mistral", sliding_window=2)).for_sampling(compiled=compiled) as sampling:
        assert sampling.decoder is None


def test_compiled_kernels_are_for_cpus() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.compile .* for CPUs, and the model is on cuda"):
        check_compiled("cuda")


@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_bf16_stays_near_fp32(family: str) -> None:
    """Autocast steps against fp32 ones; the tolerance is that of eight bits, over the layers of a tiny model."""
    policy = Policy(tiny_model(family))
    starts = torch.zeros(3, dtype=torch.long)
    with policy.for_sampling() as sampling:
        exact = sampling.decode(NEW[:, 0], prefilled(policy, starts))
    with torch.autocast("cpu", dtype=torch.bfloat16), policy.for_sampling() as sampling:
        assert sampling.decoder is not None
        reduced = sampling.decode(NEW[:, 0], prefilled(policy, starts))
    assert 0 < (reduced.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FUSED)
@torch.no_grad()
def test_weights_of_other_types(family: str, dtype: torch.dtype, compiled: bool) -> None:
    """Fused, compiled or neither, a step is near the fp32 one."""
    if compiled:
        needs_compiler()
    starts = torch.zeros(3, dtype=torch.long)
    found = []
    for kind in (torch.float32, dtype):
        policy = Policy(tiny_model(family).to(kind))
        with policy.for_sampling(compiled=compiled) as sampling:
            found.append(sampling.decode(NEW[:, 0], prefilled(policy, starts)).float())
    assert (found[1] - found[0]).abs().max() < 0.1 * found[0].abs().max()
