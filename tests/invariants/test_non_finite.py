"""A number that is not finite is refused where it appears, by name; weights and the last checkpoint stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import METHODS, ON_POLICY, Setting, assemble, assert_same, execute, weights_of
from tropism.build import Assembly
from tropism.errors import NumericsError
from tropism.rewards import RewardHarness
from tropism.rollouts.engine import EmbeddedSampler
from tropism.training.checkpoint import checkpoint_name, list_checkpoints, read_checkpoint
from tropism.training.config import CheckpointConfig
from tropism.training.state import trainable_state
from tropism.types import RewardBatch, Rollouts

NAN, INF = float("nan"), float("inf")


def poisoned(tensor: torch.Tensor, value: float = NAN) -> torch.Tensor:
    """The tensor with one number that is not finite, in its second row."""
    changed = tensor.clone()
    changed[(1, *[0] * (tensor.dim() - 1))] = value
    return changed


def refused(assembly: Assembly, message: str) -> None:
    """The run stops with the message, weights and moments as they were; so they are saved."""
    before = weights_of(assembly)
    with pytest.raises(NumericsError, match=message):
        execute(assembly)
    assert_same(before, weights_of(assembly))
    assert assembly.trainer.counts.updates == 0
    (saved,) = list_checkpoints(assembly.folder.path / "checkpoints")
    assert saved.name == checkpoint_name(steps=0, updates=0)
    assert_same(dict(read_checkpoint(saved).tensors["policy"]), trainable_state(assembly.policy))


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_weight_is_named_before_anything_begins(method: str, tmp_path: Path) -> None:
    model = tiny_model("llama", seed=3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = NAN
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj\.weight of the loaded model"):
        assemble(Setting(method, False, "llama"), tmp_path / "run", model=(model, tiny_tokenizer()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("method", ON_POLICY)
def test_sampling_names_the_weight(method: str, value: float, tmp_path: Path) -> None:
    assembly = assemble(Setting(method, False, "llama"), tmp_path / "run")
    assembly.check()
    with torch.no_grad():
        assembly.policy.language_model.model.layers[0].self_attn.v_proj.weight[0, 0] = value
    with pytest.raises(NumericsError, match=r"the first weight that is not is .*layers\.0\.self_attn\.v_proj\.weight"):
        assembly.run.execute(2, resumed=None)


@pytest.mark.parametrize(
    ("field", "name"), [("logprobs", "the log-prob while sampling"), ("values", "the value")], ids=str
)
def test_what_sampling_gives(field: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assemble(Setting("ppo", False, "llama"), tmp_path / "run")
    generate = EmbeddedSampler.generate

    def broken(*arguments: Any, **named: Any) -> Rollouts:
        rollouts = generate(*arguments, **named)
        if named["key"].purpose != "training":
            return rollouts
        changes: dict[str, Any] = {field: poisoned(getattr(rollouts, field))}
        return replace(rollouts, **changes)

    monkeypatch.setattr(EmbeddedSampler, "generate", broken)
    refused(assembly, f"^{name} of completion 1, token 0 is nan at step 1, before its first update; the weights")


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("method", ON_POLICY)
def test_rewards(method: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    combine = RewardHarness.combine

    def broken(*arguments: Any, **named: Any) -> RewardBatch:
        rewards = combine(*arguments, **named)
        return replace(rewards, per_completion=poisoned(rewards.per_completion, value))

    monkeypatch.setattr(RewardHarness, "combine", broken)
    assembly = assemble(Setting(method, False, "llama"), tmp_path / "run")
    refused(assembly, rf"^the reward of completion 1 is {value} at step 1, before its first update")


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("ref_logprobs", "the log-prob under the reference"),
        ("old_values", "the value"),
        ("returns", "the return"),
        ("advantages", "the advantage"),
    ],
)
@pytest.mark.parametrize("method", ON_POLICY)
def test_what_the_method_makes_of_them(method: str, field: str, name: str, tmp_path: Path) -> None:
    assembly = assemble(Setting(method, False, "llama"), tmp_path / "run")
    make_batch = assembly.algorithm.make_batch

    def broken(*arguments: Any) -> Any:
        batch = make_batch(*arguments)
        return replace(batch, **{field: poisoned(getattr(batch, field))})

    assembly.algorithm.make_batch = broken
    refused(assembly, f"^{name} of completion 1, token 0 is nan at step 1, before its first update")


@pytest.mark.parametrize("part", ["weight", "moment"])
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_never_holds_them(method: str, part: str, tmp_path: Path) -> None:
    """Should a step ever leave one, the next checkpoint is not written, nor is the model; the one before stays."""
    run = tmp_path / "run"
    setting = Setting(method, False, "llama")
    assembly = assemble(setting, run, trainer={"checkpoints": CheckpointConfig(every=1, keep=5)})
    assembly.run.export = lambda: pytest.fail("exported")
    step, steps = assembly.trainer.optimizer.step, 0
    name, parameter = next((n, p) for n, p in assembly.policy.named_parameters() if p.requires_grad and p.numel() > 5)
    per_step = 4 if METHODS[method].on_policy else 1

    def broken(*arguments: Any, **named: Any) -> Any:
        nonlocal steps
        result = step(*arguments, **named)
        steps += 1
        if steps == 2 * per_step:  # the last of the second step
            state = assembly.trainer.optimizer.state[parameter]
            with torch.no_grad():
                (parameter if part == "weight" else state["exp_avg_sq"]).view(-1)[5] = INF
        return result

    assembly.trainer.optimizer.step = broken  # type: ignore[method-assign]
    what = f"the weight {name}" if part == "weight" else f"the optimizer's {name}::exp_avg_sq"
    with pytest.raises(NumericsError) as caught:
        execute(assembly, export=True)
    assert str(caught.value).startswith(f"{what} is not finite after update {2 * per_step} (step 2)")
    (kept,) = list_checkpoints(run / "checkpoints")
    assert kept.name.startswith("step-000001-")
    tensors = read_checkpoint(kept).tensors
    assert all(bool(t.isfinite().all()) for part in ("policy", "optimizer") for t in tensors[part].values())
