"""What holds in fp32 to rounding holds in bf16 too, to the rounding of bf16. Tolerances are stated here (and, for the
size of micro-batches, in test_micro_batches).

bf16 keeps 8 bits: one operation is off by up to 0.4 %. The tiny models have wide weights, so their logits, and with
them the errors of log-probs, are larger than those of trained models.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_runs import ALL_SETTINGS, SETTINGS, Setting, assemble, assert_same, execute, logged, sample, weights_of
from tropism.build import Assembly
from tropism.models.reference import Reference

BF16 = {"precision": "bf16"}

MISMATCH = 0.05
"""Most nats per token, on average, between log-probs of sampling and of the training forward."""
SAMPLE_SIZE = 0.99
"""Least effective share of the sampled tokens."""

ON_POLICY_SETTINGS = [s for s in ALL_SETTINGS if s.on_policy]
every_policy_setting = pytest.mark.parametrize("setting", [s for s in ALL_SETTINGS if s.trains_policy], ids=str)
every_sampling_setting = pytest.mark.parametrize("setting", ON_POLICY_SETTINGS, ids=str)


def bf16(setting: Setting, run: Path, **changes: Any) -> Assembly:
    assembly = assemble(setting, run, **{"trainer": BF16, **changes})
    assert assembly.processes.accelerator.mixed_precision == "bf16"
    return assembly


@every_sampling_setting
def test_sampling_and_training_forward_are_close(setting: Setting, tmp_path: Path) -> None:
    assembly = bf16(setting, tmp_path / "run")
    with assembly.processes.accelerator.autocast():
        rollouts = sample(assembly, group=4)
        with torch.no_grad():
            logprobs = assembly.policy(**rollouts.inputs).logprobs
    mask = rollouts.completion_mask
    difference = (logprobs.float() - rollouts.logprobs)[mask].abs()
    assert 0 < float(difference.mean()) < MISMATCH
    assert logprobs.dtype == torch.float32, "sums over the vocabulary are not rounded to bf16"


@every_policy_setting
def test_policy_and_reference_agree_bit_for_bit(setting: Setting, tmp_path: Path) -> None:
    assembly = bf16(setting, tmp_path / "run")
    reference = assembly.reference or Reference(assembly.policy)
    with assembly.processes.accelerator.autocast(), torch.no_grad():
        rollouts = sample(assembly)
        own = assembly.policy(**rollouts.inputs).logprobs
        with reference.active() as model:
            other = model(**rollouts.inputs).logprobs
    assert float(own.abs().sum()) > 0 and torch.equal(own, other)


@every_sampling_setting
def test_a_run_starts_from_ratio_one_and_logs_its_correction(setting: Setting, tmp_path: Path) -> None:
    algorithm = setting.with_algorithm(num_epochs=1, minibatch_size=None)
    execute(bf16(setting, tmp_path / "run", algorithm=algorithm))
    first = logged(tmp_path / "run", "update")[0]
    assert first["policy/ratio"] == 1.0
    assert [first[f"policy/{name}"] for name in ("approx_kl", "ref_kl", "ref_kl_k3", "clip_fraction")] == [0.0] * 4
    collects = logged(tmp_path / "run", "collect")
    assert collects[0]["policy/sequence_kl"] == 0.0
    for collect in collects:
        assert 0 < collect["rollout/logprob_mismatch"] < MISMATCH
        assert SAMPLE_SIZE < collect["rollout/effective_sample_size"] < 1
        assert collect["rollout/capped_fraction"] < 0.05


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_run_is_repeatable_and_its_weights_stay_fp32(setting: Setting, tmp_path: Path) -> None:
    one, other = (execute(bf16(setting, tmp_path / name)) for name in ("one", "other"))
    before = weights_of(assemble(setting, tmp_path / "before"))
    assert_same(weights_of(one), weights_of(other))
    trained = {name: p for name, p in one.policy.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert any(not torch.equal(p, before[name]) for name, p in trained.items())


@pytest.mark.parametrize(
    ("precision", "multiplies", "warned", "chosen"),
    [
        ("bf16", False, True, "bf16"),
        ("bf16", True, False, "bf16"),
        ("auto", False, False, "no"),
        ("fp32", False, False, "no"),
    ],
)
def test_bf16_that_a_cpu_must_emulate_is_warned_of_once(
    precision: str,
    multiplies: bool,
    warned: bool,
    chosen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("tropism.recipe_processes.cpu_multiplies", lambda dtype: multiplies)
    with caplog.at_level(logging.WARNING, logger="tropism"):
        assembly = assemble(ALL_SETTINGS[0], tmp_path / "run", trainer={"precision": precision})
    if assembly.policy.device.type != "cpu":
        pytest.skip("on a GPU bf16 is its own")
    assert assembly.processes.accelerator.mixed_precision == chosen
    messages = [record.getMessage() for record in caplog.records if "emulated" in record.getMessage()]
    assert len(messages) == int(warned)
    assert all("no bf16 arithmetic" in message and "precision at auto" in message for message in messages)
