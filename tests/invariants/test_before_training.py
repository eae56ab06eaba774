"""Before the first update the policy is its own reference: KL and log-ratio are 0, not nearly 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_runs import ALL_SETTINGS, PARTIAL_SETTINGS, SEQ2SEQ_SETTINGS, Setting, assemble, execute, logged, sample
from tropism.models.reference import Reference
from tropism.rewards import RewardConfig

ON_POLICY_SETTINGS = [s for s in ALL_SETTINGS + SEQ2SEQ_SETTINGS if s.on_policy]
EVERY_SETTING = [s for s in ALL_SETTINGS + PARTIAL_SETTINGS + SEQ2SEQ_SETTINGS if s.trains_policy]


@pytest.mark.parametrize("setting", EVERY_SETTING, ids=str)
def test_policy_and_reference_agree_bit_for_bit(setting: Setting, tmp_path: Path) -> None:
    assembly = assemble(setting, tmp_path / "run")
    rollouts = sample(assembly)
    reference = assembly.reference or Reference(assembly.policy)
    with torch.no_grad():
        own = assembly.policy(**rollouts.inputs).logprobs
        with reference.active() as model:
            other = model(**rollouts.inputs).logprobs
    assert float(own.abs().sum()) > 0
    assert torch.equal(own, other)


def in_order(completions: list[str]) -> list[float]:
    """A reward that is another one for every completion."""
    return [float(index) for index in range(len(completions))]


@pytest.mark.parametrize("setting", ON_POLICY_SETTINGS, ids=str)
def test_first_update_logs_ratio_one_and_no_kl(setting: Setting, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"algorithm": setting.with_algorithm(num_epochs=1, minibatch_size=None)}
    if setting.two_sided:  # rows of equal rewards would be left out, and products have other sizes
        changes["reward"] = RewardConfig.of(in_order)
    execute(assemble(setting, tmp_path / "run", trainer={"recompute_logprobs": True}, **changes))
    first = logged(tmp_path / "run", "update")[0]
    assert first["policy/ratio"] == 1.0
    assert first["policy/approx_kl"] == 0.0
    assert first["policy/ref_kl"] == 0.0
    assert first["policy/ref_kl_k3"] == 0.0
    assert first["policy/clip_fraction"] == 0.0
    assert logged(tmp_path / "run", "collect")[0]["policy/sequence_kl"] == 0.0


@pytest.mark.parametrize("setting", ON_POLICY_SETTINGS, ids=str)
def test_logprobs_of_sampling_are_those_of_training(setting: Setting, tmp_path: Path) -> None:
    """Against generation, not against a second identical forward pass, which hides wrong positions on both sides."""
    assembly = assemble(setting, tmp_path / "run")
    rollouts = sample(assembly)
    mask = rollouts.completion_mask
    for padding in ("right", "left", "both"):
        assembly.policy.padding = padding
        with torch.no_grad():
            logprobs = assembly.policy(**rollouts.inputs).logprobs
        assert float((logprobs - rollouts.logprobs)[mask].abs().max()) < 1e-5
    for row in range(len(rollouts)):
        alone = rollouts.select(torch.tensor([row]))
        with torch.no_grad():
            logprobs = assembly.policy(**alone.inputs).logprobs
        assert float((logprobs - alone.logprobs).abs().max()) < 1e-5
