"""A run that was interrupted after any update and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import (
    ON_POLICY,
    PARTIAL_SETTINGS,
    PROMPTS,
    SEQ2SEQ_SETTINGS,
    SETTINGS,
    TEXTS,
    Setting,
    assemble,
    assert_same,
    early_letters,
    execute,
    make_recipe,
    stop_after,
    weights_of,
)
from tropism.build import Assembly, assembly_for
from tropism.data.config import DataConfig
from tropism.models.lora import LoRA, add_lora
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.training.checkpoint import list_checkpoints, read_checkpoint
from tropism.training.config import CheckpointConfig, EvaluationConfig
from tropism.training.interrupt import Interrupted
from tropism.training.sources import Collected
from tropism.training.state import optimizer_state

TWO_HALVES = [s for s in SEQ2SEQ_SETTINGS if s.method in ("sft", "ppo", "grpo", "conditioned", "quark", "ilql")]
"""Encoder-decoders by a method of every kind."""

LLAMA = {name: Setting(name, False, "llama") for name in ("sft", *ON_POLICY)}

UPDATES = {"ppo": 8, "grpo": 8, "rloo": 8, "conditioned-online": 8, "quark": 8, "rft": 8, "sft": 4, "conditioned": 4}
UPDATES |= {"dpo": 4, "kto": 4, "ilql": 4, "reward-model": 4}
"""One per step where nothing is sampled; else two steps of two epochs of two minibatches, or of four batches."""


def assert_same_run(one: Assembly, other: Assembly) -> None:
    """Weights, moments, the bytes of logs and tables, the best weights, and everything else that a checkpoint holds."""
    assert_same(weights_of(one), weights_of(other))
    assert_same(
        optimizer_state(one.policy, one.trainer.optimizer), optimizer_state(other.policy, other.trainer.optimizer)
    )
    assert_same_files(one.folder.path, other.folder.path)
    last, same = (read_checkpoint(list_checkpoints(a.folder.path / "checkpoints")[-1]) for a in (one, other))
    ignored = {"logs"}  # sizes; those of timings.jsonl differ, as seconds do
    assert {k: v for k, v in last.state.items() if k not in ignored} == {
        k: v for k, v in same.state.items() if k not in ignored
    }
    for name, tensors in last.tensors.items():
        assert_same(dict(tensors), dict(same.tensors[name]))


def kept_files(run: Path) -> dict[str, bytes]:
    """Content of every file of a run folder but checkpoints, and what seconds and machines stand in."""
    parts = ("metrics.jsonl", "warnings.jsonl", "rollouts", "evaluations", "best", "model")
    files = [path for path in run.rglob("*") if path.is_file() and path.relative_to(run).parts[0] in parts]
    # A log that was cut back to nothing is as good as none.
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.stat().st_size}


def assert_same_files(one: Path, other: Path) -> None:
    """No file is missing, left over from before an interruption, or other than in the other run."""
    first, second = kept_files(one), kept_files(other)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def interrupted(setting: Setting, run: Path, updates: int, *, resume: bool = False, **changes: Any) -> None:
    """A run that is stopped by a signal after that many updates."""
    stopped = assemble(setting, run, resume=resume, **changes)
    stop_after(stopped, updates, signal.SIGTERM)
    with pytest.raises(Interrupted):
        execute(stopped)
    assert stopped.trainer.counts.updates == updates


@pytest.mark.parametrize("setting", SETTINGS + PARTIAL_SETTINGS + TWO_HALVES, ids=str)
def test_interrupted_after_any_update(setting: Setting, tmp_path: Path) -> None:
    whole = execute(assemble(setting, tmp_path / "whole"))
    assert whole.trainer.counts.updates == UPDATES[setting.method]
    for updates in range(1, UPDATES[setting.method]):
        run = tmp_path / f"stopped-{updates}"
        interrupted(setting, run, updates)
        assert_same_run(whole, execute(assemble(setting, run, resume=True)))


@pytest.mark.parametrize("method", ON_POLICY)
def test_signal_during_a_rollout_abandons_it(method: str, tmp_path: Path) -> None:
    setting, armed = Setting(method, False, "llama"), [False]

    def interrupting(completions: list[str], trainer_state: dict[str, int]) -> list[float]:
        if trainer_state["step"] == 1 and armed[0]:
            armed[0] = False
            os.kill(os.getpid(), signal.SIGINT)
        return early_letters(completions)

    changes: dict[str, Any] = {
        "reward": RewardConfig.of({"terms": {"early": {"use": interrupting}}, "scale": "running"})
    }
    whole = execute(assemble(setting, tmp_path / "whole", **changes))
    armed[0] = True
    stopped = assemble(setting, tmp_path / "stopped", **changes)
    with pytest.raises(Interrupted) as caught:
        execute(stopped)
    assert caught.value.signal_number == signal.SIGINT
    assert stopped.trainer.counts.steps == 1
    assert_same_run(whole, execute(assemble(setting, tmp_path / "stopped", resume=True, **changes)))


@pytest.mark.parametrize("method", ON_POLICY)
def test_signal_while_a_collect_is_logged_does_not_log_it_twice(method: str, tmp_path: Path) -> None:
    setting = Setting(method, False, "llama")
    whole = execute(assemble(setting, tmp_path / "whole"))
    stopped = assemble(setting, tmp_path / "stopped")
    source: Any = stopped.trainer.source
    log = source.on_collect

    def interrupted(collected: Collected) -> None:
        log(collected)
        if collected.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    source.on_collect = interrupted
    with pytest.raises(Interrupted):
        execute(stopped)
    assert_same_run(whole, execute(assemble(setting, tmp_path / "stopped", resume=True)))


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[3]], ids=str)
def test_stopped_twice(setting: Setting, tmp_path: Path) -> None:
    whole = execute(assemble(setting, tmp_path / "whole"))
    run = tmp_path / "stopped"
    for updates in (1, 3):
        interrupted(setting, run, updates, resume=updates > 1)
    assert_same_run(whole, execute(assemble(setting, run, resume=True)))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_saving_every_step_changes_nothing(setting: Setting, tmp_path: Path) -> None:
    often: dict[str, Any] = {"trainer": {"checkpoints": CheckpointConfig(every=1, keep=100)}}
    never = execute(assemble(setting, tmp_path / "never"))
    saved = execute(assemble(setting, tmp_path / "often", **often))
    assert len(list_checkpoints(tmp_path / "often" / "checkpoints")) == saved.recipe.total_steps
    assert_same_run(never, saved)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_same_seed_same_run_and_another_seed_another(setting: Setting, tmp_path: Path) -> None:
    first = execute(assemble(setting, tmp_path / "first"))
    torch.manual_seed(99)  # the global random states have no influence
    random.seed(99)
    np.random.seed(99)
    assert_same_run(first, execute(assemble(setting, tmp_path / "again")))
    other = execute(assemble(setting, tmp_path / "other", seed=8))
    assert (tmp_path / "first" / "metrics.jsonl").read_bytes() != (tmp_path / "other" / "metrics.jsonl").read_bytes()
    assert any(not torch.equal(value, weights_of(other)[name]) for name, value in weights_of(first).items())


# ---- everything that can be set --------------------------------------------------------------------------------------


def adapter_that_goes_on() -> Any:
    """A model whose adapter does something already: the reference is a frozen second adapter."""
    model = add_lora(tiny_model("llama", seed=3), LoRA(rank=2), seed=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, tiny_tokenizer()


def reward_of(**settings: Any) -> RewardConfig:
    return RewardConfig.of({"terms": {"early": {"use": early_letters}}, **settings})


EVERY_STEP = EvaluationConfig(every=1)

VARIANTS: dict[str, tuple[Setting, Callable[[], dict[str, Any]]]] = {
    "from an adapter": (LLAMA["grpo"], lambda: {"model": adapter_that_goes_on()}),
    "normalised reward": (LLAMA["ppo"], lambda: {"reward": reward_of(normalise=True, clip=0.5)}),
    "reference scale": (LLAMA["rloo"], lambda: {"reward": reward_of(scale="reference")}),
    "cosine with warm-up": (LLAMA["rloo"], lambda: {"trainer": {"schedule": "cosine", "warmup_steps": 1}}),
    "linear": (LLAMA["sft"], lambda: {"trainer": {"schedule": "linear"}}),
    "best, evaluated every step": (
        LLAMA["grpo"],
        lambda: {
            "eval_data": PROMPTS[:3],
            "trainer": {"evaluation": EVERY_STEP, "checkpoints": CheckpointConfig(use_best=True, patience=2)},
        },
    ),
    "best loss": (
        LLAMA["sft"],
        lambda: {
            "eval_data": TEXTS[:2],
            "trainer": {
                "evaluation": EVERY_STEP,
                "checkpoints": CheckpointConfig(best_metric="eval/loss", best_mode="min", use_best=True),
            },
        },
    ),
    "bf16 with importance weights": (LLAMA["ppo"], lambda: {"trainer": {"precision": "bf16"}}),
    "recomputed log-probs": (LLAMA["grpo"], lambda: {"trainer": {"recompute_logprobs": True}}),
    "capped importance": (LLAMA["rloo"], lambda: {"trainer": {"importance_cap": 1.5}}),
    "stop strings": (LLAMA["ppo"], lambda: {"sampling": Sampling(max_new_tokens=8, stop=("a", "th"), top_k=20)}),
    "micro-batches": (LLAMA["grpo"], lambda: {"trainer": {"micro_batch_size": 1}}),
    "held-out share": (LLAMA["rloo"], lambda: {"data": DataConfig(path="prompts.txt", limit=5, eval_fraction=0.4)}),
    "in order": (LLAMA["sft"], lambda: {"algorithm": LLAMA["sft"].with_algorithm(shuffle=False)}),
    "early end of a collect": (LLAMA["grpo"], lambda: {"algorithm": LLAMA["grpo"].with_algorithm(target_kl=1e-9)}),
}
"""Name -> setting and changes, made anew for every run, because a model from Python is trained in place."""


@pytest.mark.parametrize("name", VARIANTS)
def test_interrupted_with_any_setting(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    setting, changes = VARIANTS[name]
    whole = execute(assemble(setting, tmp_path / "whole", **changes()))
    last = whole.trainer.counts.updates
    for updates in {1, last // 2, last - 1}:
        run = tmp_path / f"stopped-{updates}"
        interrupted(setting, run, updates, **changes())
        resumed = execute(assemble(setting, run, resume=True, **changes()))
        assert_same_run(whole, resumed)
        latest, same = (
            {k: v for k, v in each.run.recent.items() if not k.startswith(("time/", "throughput/"))}
            for each in (whole, resumed)
        )
        assert same == pytest.approx(latest, rel=0, abs=0, nan_ok=True)


OFTEN = {"checkpoints": CheckpointConfig(every=1, keep=100), "evaluation": EVERY_STEP}


def go_back(run: Path, saved: int) -> None:
    """The run as it was right after its ``saved``-th checkpoint, with all that it wrote later still lying about."""
    for path in list_checkpoints(run / "checkpoints")[saved:]:
        shutil.rmtree(path)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_from_any_saved_step(setting: Setting, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"trainer": OFTEN, "eval_data": setting.texts[:2], "total_steps": 3}
    whole = execute(assemble(setting, tmp_path / "whole", **changes), export=True)
    for saved in range(1, 4):
        run = tmp_path / f"back-{saved}"
        shutil.copytree(tmp_path / "whole", run)
        go_back(run, saved)
        resumed = assemble(setting, run, resume=True, **changes)
        assert resumed.checkpoint is not None and resumed.checkpoint.state["counts"]["steps"] == saved
        assert_same_run(whole, execute(resumed, export=True))


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[3], SETTINGS[4]], ids=str)
def test_with_more_and_with_fewer_steps(setting: Setting, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"trainer": OFTEN, "eval_data": TEXTS[:2]}
    short = execute(assemble(setting, tmp_path / "short", total_steps=2, **changes))
    whole = execute(assemble(setting, tmp_path / "whole", total_steps=4, **changes))
    shutil.copytree(tmp_path / "short", tmp_path / "longer")
    assert_same_run(whole, execute(assemble(setting, tmp_path / "longer", resume=True, total_steps=4, **changes)))
    shutil.copytree(tmp_path / "whole", tmp_path / "shorter")
    go_back(tmp_path / "shorter", 1)
    assert_same_run(short, execute(assemble(setting, tmp_path / "shorter", resume=True, total_steps=2, **changes)))


def test_a_run_that_patience_stopped_stays_stopped(tmp_path: Path) -> None:
    """Not even a checkpoint that was written right before the end lets it go on."""
    still: dict[str, Any] = {
        "total_steps": 4,
        "eval_data": PROMPTS[:2],
        "trainer": {
            "learning_rate": 1e-12,
            "evaluation": EVERY_STEP,
            "checkpoints": CheckpointConfig(every=1, keep=100, patience=2),
        },
    }
    whole = execute(assemble(LLAMA["grpo"], tmp_path / "whole", **still))
    assert whole.trainer.counts.steps == 2
    for saved in (1, 2):
        run = tmp_path / f"back-{saved}"
        shutil.copytree(tmp_path / "whole", run)
        go_back(run, saved)
        assert_same_run(whole, execute(assemble(LLAMA["grpo"], run, resume=True, **still)))
    more = {**still["trainer"], "checkpoints": CheckpointConfig(every=1, keep=100, patience=3)}
    longer = execute(assemble(LLAMA["grpo"], tmp_path / "whole", resume=True, **{**still, "trainer": more}))
    assert longer.trainer.counts.steps == 3


@pytest.mark.parametrize("setting", [Setting("ppo", False, "llama"), Setting("grpo", True, "gpt2")], ids=str)
def test_the_exported_model_of_an_interrupted_run(setting: Setting, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "eval_data": PROMPTS[:3],
        "total_steps": 3,
        "trainer": {"evaluation": EVERY_STEP, "checkpoints": CheckpointConfig(use_best=True)},
    }
    whole = execute(assemble(setting, tmp_path / "whole", **changes), export=True)
    interrupted(setting, tmp_path / "stopped", 7, **changes)
    resumed = execute(assemble(setting, tmp_path / "stopped", resume=True, **changes), export=True)
    assert_same_run(whole, resumed)
    assert any(name.startswith("model/") for name in kept_files(tmp_path / "whole"))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_global_random_states_stay_as_they_are(setting: Setting, tmp_path: Path) -> None:
    recipe = make_recipe(setting, tmp_path / "run", eval_data=setting.texts[:2])  # with a model, for which torch draws
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    execute(assembly_for(recipe)(recipe), export=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), repr(np.random.get_state())) == before[1:]
