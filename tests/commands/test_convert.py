"""tropism convert: its kinds, and what it says of a conversion."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from openai_gpt2 import CHECKPOINTS
from tropism.cli import main
from tropism.commands.convert import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_explains_itself(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", kind, "--help"]) == 0
    assert f"usage: tropism convert {kind}" in capsys.readouterr().out


def test_help_names_the_kinds_and_loads_no_library() -> None:
    code = "import sys, tropism.cli; tropism.cli.main(['convert', '--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(kind in result.stdout for kind in KINDS)


def test_an_unknown_kind_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "openai-chekpoint", "x"]) == 2
    assert "did you mean 'openai-checkpoint'" in capsys.readouterr().err


def test_a_reward_model_is_converted_and_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = CHECKPOINTS / "run" / "reward_model", tmp_path / "reward"
    words = ["convert", "openai-checkpoint", str(source), "--out", str(out)]
    assert main(words) == 2
    assert "--encoding FOLDER" in capsys.readouterr().err and not out.exists()
    assert main([*words, "--encoding", str(CHECKPOINTS / "gpt2")]) == 0
    shown = capsys.readouterr().out
    assert "reward model (AutoModelForSequenceClassification): 1,497 numbers in 32 tensors" in shown
    assert "the logit + 0.25" in shown and "normalised on 512 samples of 124M" in shown
    assert "left out: counters (global_step)" in shown
    assert "left out: ref_policy (28 tensors, ref_policy/model/h0/attn/c_attn/b to ref_policy/model/wte)" in shown
    assert f"written: {out}" in shown and (out / "model.safetensors").is_file()


def test_a_policy_is_converted_without_its_value_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = CHECKPOINTS / "run" / "policy", tmp_path / "policy"
    words = ["convert", "openai-checkpoint", str(source), "--out", str(out), "--encoding", str(CHECKPOINTS / "gpt2")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "trained policy (AutoModelForCausalLM)" in shown
    assert "left out: value head (policy/model/heads/value/b, policy/model/heads/value/w)" in shown
    assert main([*words, "--scope", "reward_model"]) == 2
    assert "is there already" in capsys.readouterr().err
