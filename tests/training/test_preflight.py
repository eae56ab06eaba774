"""The checks before the first update: silent on every family, and loud on each thing that can be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import EOS_ID, FAMILIES
from tropism.errors import NumericsError
from tropism.models.lora import LoRA, add_lora
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.training.preflight import PreflightReport, preflight, sample_rows
from tropism.types import Prompt, Rollouts

PROMPTS = [Prompt(text="", ids=ids) for ids in ((5, 9, 30, 8, 11, 7, 14), (6,), (12, 13, 4), (20,) * 5)]
SAMPLING = Sampling(max_new_tokens=32, temperature=0.8, top_k=20)


def rows(policy: Policy, prompts: Sequence[Prompt] = PROMPTS, sampling: Sampling = SAMPLING) -> Rollouts:
    _, rollouts = sample_rows(policy, EmbeddedSampler(None, (EOS_ID,)), prompts, sampling=sampling, seed=4)
    return rollouts


def check(policy: Policy, rollouts: Rollouts, reference: Reference | None = None, **settings: Any) -> PreflightReport:
    return preflight(policy, reference, rollouts, **{"exact": True, "fresh": True, **settings})


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str, lora: bool) -> None:
    model: Any = FAMILIES[family]()
    policy = Policy(add_lora(model, LoRA(rank=2), seed=0) if lora else model)
    report = check(policy, rows(policy), Reference(policy))
    assert report.sampler_mismatch < 1e-5
    assert report.padding_mismatch < 1e-5
    assert report.reference_kl == 0.0
    assert policy.padding == "right"


def test_the_sample_is_small_short_and_of_different_lengths() -> None:
    policy = Policy(FAMILIES["llama"]())
    sampler = EmbeddedSampler(None, ())
    chosen, rollouts = sample_rows(policy, sampler, PROMPTS, sampling=replace(SAMPLING, min_new_tokens=20), seed=4)
    assert [prompt.ids for prompt in chosen] == [(6,), (20,) * 5]
    assert rollouts.prompt_lengths.tolist() == [1, 5]
    assert rollouts.completion_lengths.tolist() == [8, 8]
    assert rollouts.temperature == 0.8
    single, one = sample_rows(policy, sampler, PROMPTS[:1], sampling=SAMPLING, seed=4)
    assert single == PROMPTS[:1] and len(one) == 1
    brief = sample_rows(policy, sampler, PROMPTS, sampling=Sampling(max_new_tokens=2), seed=4)[1]
    assert brief.completion_lengths.tolist() == [2, 2]
    again = sample_rows(policy, sampler, PROMPTS, sampling=replace(SAMPLING, min_new_tokens=20), seed=4)[1]
    assert torch.equal(again.completion_ids, rollouts.completion_ids)
    key = StreamKey(seed=4, purpose="checks")
    direct = sampler.generate(policy, chosen, replace(SAMPLING, max_new_tokens=8), key=key)
    assert torch.equal(direct.completion_ids, rollouts.completion_ids)


def break_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions by column, as a model that is given none assumes: wrong wherever pads come first."""
    whole = Policy.hidden_states

    def by_column(self: Policy, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        begin = mask.shape[1] - ids.shape[1]
        columns = torch.arange(begin, mask.shape[1])[None, :].expand_as(ids)
        return whole(self, ids, mask, columns, cache)

    monkeypatch.setattr(Policy, "hidden_states", by_column)


def test_positions_by_column_fail_against_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler pads prompts on the left, the training forward on the right."""
    policy = Policy(FAMILIES["gpt2"]())
    break_positions(monkeypatch)
    with pytest.raises(NumericsError, match=r"log-probs of sampling .* differ by .* positions"):
        check(policy, rows(policy))


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [PROMPTS[1]] * 3])
def test_positions_by_column_fail_under_left_padding_also_where_all_prompts_are_equally_long(
    prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(FAMILIES["gpt2"]())
    rollouts = rows(policy, prompts)
    break_positions(monkeypatch)
    with pytest.raises(NumericsError, match=r"change by .* padded on the left .* attention masks or positions"):
        check(policy, rollouts)
    assert policy.padding == "right"


def test_a_mask_that_is_ignored_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(FAMILIES["llama"]())
    rollouts = rows(policy)
    whole = Policy.hidden_states

    def unmasked(self: Policy, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        return whole(self, ids, torch.ones_like(mask), positions, cache)

    monkeypatch.setattr(Policy, "hidden_states", unmasked)
    with pytest.raises(NumericsError, match="padded on the left"):
        check(policy, rollouts)


def test_a_reference_that_differs_fails_only_where_it_must_not() -> None:
    policy = Policy(FAMILIES["llama"]())
    reference = Reference(policy)
    rollouts = rows(policy)
    with torch.no_grad():
        reference.frozen.language_model.lm_head.weight[5] += 1e-4
    with pytest.raises(NumericsError, match=r"policy and reference differ by .* must be equal"):
        check(policy, rollouts, reference)
    report = check(policy, rollouts, reference, fresh=False)
    assert report.reference_kl is not None and 0 < report.reference_kl < 1e-2
    assert check(policy, rollouts, None).reference_kl is None


@pytest.mark.parametrize("wrong", [0.02, -0.3, float("nan")])
def test_logprobs_of_sampling_that_are_off_at_one_token_fail(wrong: float) -> None:
    policy = Policy(FAMILIES["qwen2"]())
    rollouts = rows(policy)
    logprobs = rollouts.logprobs.clone()
    logprobs[0, 0] += wrong
    with pytest.raises(NumericsError, match="log-probs of sampling and of the training forward differ"):
        check(policy, replace(rollouts, logprobs=logprobs))


def test_reduced_precision_is_allowed_more_and_exact_arithmetic_is_not() -> None:
    policy = Policy(FAMILIES["qwen2"]())
    rollouts = rows(policy)
    off = replace(rollouts, logprobs=rollouts.logprobs - 0.1 * rollouts.completion_mask)
    assert check(policy, off, exact=False).sampler_mismatch == pytest.approx(0.1, abs=1e-4)
    with pytest.raises(NumericsError, match=r"limit 0\.01"):
        check(policy, off)
    with pytest.raises(NumericsError, match=r"limit 0\.5"):
        check(policy, replace(rollouts, logprobs=rollouts.logprobs - 1.0), exact=False)


def test_dropout_that_is_left_on_fails() -> None:
    model: Any = FAMILIES["gpt2"]()
    policy = Policy(model)
    rollouts = rows(policy)
    policy.train()
    with pytest.raises(NumericsError, match="dropout"):
        check(policy, rollouts)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_an_eos_that_is_masked_fails_and_one_that_is_the_pad_does_not(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(FAMILIES[family]())
    rollouts = rows(policy, [*PROMPTS, Prompt(text="", ids=(EOS_ID, 5))])
    for eos_id in (EOS_ID, 0):  # 0 is the tiny models' pad token
        check(policy, rollouts, eos_ids=(eos_id,))
    whole = Policy.forward

    def masks_eos(self: Policy, **settings: Any) -> Any:
        return whole(self, mask=settings["completion_ids"] != EOS_ID, **settings)

    without = replace(rollouts, logprobs=rollouts.logprobs * (rollouts.completion_ids != EOS_ID))
    monkeypatch.setattr(Policy, "forward", masks_eos)
    with pytest.raises(NumericsError, match=r"eos token 2 .* is masked"):
        check(policy, without, eos_ids=(EOS_ID,))
