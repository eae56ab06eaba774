"""Resuming a run whose model, data, code or machine is not what it was, and one that has nothing left to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import PROMPTS, TEXTS, Setting, assemble, early_letters, execute, weights_of
from tropism.algorithms.base import RunFacts
from tropism.algorithms.sft import SFT, SFTAlgorithm
from tropism.build import Assembly
from tropism.data.config import DataConfig
from tropism.errors import ConfigError, DataError, ModelError, TropismError
from tropism.models.lora import LoRA
from tropism.recipe_identity import reward_sources, weights_fingerprint
from tropism.rewards import RewardConfig
from tropism.training.checkpoint import Checkpoint, list_checkpoints, read_checkpoint, write_checkpoint
from tropism.training.config import CheckpointConfig, EvaluationConfig

FULL, LORA = Setting("grpo", False, "llama"), Setting("grpo", True, "gpt2")
SFT_FULL, LAST = Setting("sft", False, "llama"), Setting("sft", False, "gpt2", train_layers=1)


def files(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def refused(setting: Setting, run: Path, kind: type[TropismError], match: str, **changes: Any) -> None:
    """The run cannot be resumed like this, and nothing of it is touched."""
    before = files(run)
    with pytest.raises(kind, match=match):
        assemble(setting, run, resume=True, **changes)
    assert files(run) == before


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [FULL, SFT_FULL], ids=str)
def test_other_items_are_refused(setting: Setting, tmp_path: Path) -> None:
    items = list(PROMPTS if setting is FULL else TEXTS)
    execute(assemble(setting, tmp_path / "run", data=items))
    for other in ([*items[:-1], "other"], items[::-1], items[:-1]):
        refused(setting, tmp_path / "run", DataError, "the data is not that of the run", data=other)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "label": 1}) + "\n" for text in PROMPTS))
    changes: dict[str, Any] = {"data": DataConfig(path=str(path))}
    execute(assemble(FULL, tmp_path / "run", **changes))
    path.write_text("".join(json.dumps({"prompt": text, "label": 2}) + "\n" for text in PROMPTS))
    refused(FULL, tmp_path / "run", DataError, "other texts, columns or token ids", **changes)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    execute(assemble(FULL, tmp_path / "run", data=list(PROMPTS)))
    model = (tiny_model("llama", seed=3), tiny_tokenizer(add_bos=True))
    refused(FULL, tmp_path / "run", DataError, "the data is not that of the run", model=model)


@pytest.mark.parametrize("setting", [FULL, SFT_FULL], ids=str)
def test_other_held_out_items_are_refused(setting: Setting, tmp_path: Path) -> None:
    execute(assemble(setting, tmp_path / "run", eval_data=TEXTS[:2]))
    for other in (TEXTS[1::-1], TEXTS[1:3]):
        refused(setting, tmp_path / "run", DataError, "the held-out data is not that of the run", eval_data=other)


# ---- model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [FULL, LORA, LAST], ids=str)
def test_other_weights_under_the_same_names_are_refused(setting: Setting, tmp_path: Path) -> None:
    execute(assemble(setting, tmp_path / "run"))
    other = (tiny_model(setting.family, seed=4), tiny_tokenizer())
    refused(
        setting, tmp_path / "run", ModelError, "weights of the model are not those that the run started", model=other
    )


def test_a_model_that_was_trained_in_place_is_no_reference(tmp_path: Path) -> None:
    """The second call in a notebook: the reference would be a copy of trained weights."""
    pair = (tiny_model("llama", seed=3), tiny_tokenizer())
    execute(assemble(FULL, tmp_path / "run", model=pair))
    refused(FULL, tmp_path / "run", ModelError, "has been trained since", model=pair)


def test_sft_without_a_reference_goes_on_with_a_model_trained_in_place(tmp_path: Path) -> None:
    pair = (tiny_model("llama", seed=3), tiny_tokenizer())
    whole = execute(assemble(SFT_FULL, tmp_path / "whole", total_steps=6))
    execute(assemble(SFT_FULL, tmp_path / "run", model=pair))
    resumed = execute(assemble(SFT_FULL, tmp_path / "run", resume=True, total_steps=6, model=pair))
    assert all(torch.equal(value, weights_of(resumed)[name]) for name, value in weights_of(whole).items())


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    execute(assemble(FULL, tmp_path / "run"))
    model = tiny_model("llama", seed=3, rms_norm_eps=1e-3)
    changes = {"model": (model, tiny_tokenizer())}
    path = tmp_path / "run" / "environment.json"
    environment = json.loads(path.read_text())
    path.write_text(json.dumps({**environment, "threads": 16}))
    refused(FULL, tmp_path / "run", ModelError, "configuration of the model", **changes)
    # Another transformers may describe the same model in other words.
    path.write_text(json.dumps({**environment, "versions": {**environment["versions"], "transformers": "5.3.0"}}))
    resumed = assemble(FULL, tmp_path / "run", resume=True, **changes)
    assert resumed.resumption is not None and "transformers 5.3.0 -> " in resumed.resumption.lines[-1]


def test_the_fingerprint_of_weights() -> None:
    weights = {"a": torch.arange(1000.0), "b": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.zeros(0)}
    assert weights_fingerprint(weights) == weights_fingerprint({name: w.clone() for name, w in weights.items()})
    others: list[Mapping[str, torch.Tensor]] = [
        {**weights, "a": torch.arange(1000.0) + 1e-3},
        {**weights, "a": torch.arange(1000.0).double()},
        {**weights, "b": torch.ones(3, 2, dtype=torch.bfloat16)},
        {**weights, "a": torch.cat([torch.arange(999.0), torch.tensor([0.0])])},
        {"a": weights["a"], "b": weights["b"]},
        {"x": weights["a"], "b": weights["b"], "c": weights["c"]},
    ]
    assert len({weights_fingerprint(other) for other in [weights, *others]}) == 7
    transposed = torch.arange(12.0).view(3, 4).t()
    assert weights_fingerprint({"a": transposed}) == weights_fingerprint({"a": transposed.contiguous()})


# ---- code and machine ------------------------------------------------------------------------------------------------


def defined(source: str, path: Path) -> Callable[..., Any]:
    """A function from a file of the user's, under the same name whatever its source."""
    path.write_text(source)
    space: dict[str, Any] = {"__name__": "users_rewards"}
    exec(compile(source, str(path), "exec"), space)
    found: Callable[..., Any] = space["mine"]
    return found


def test_a_reward_whose_source_has_changed_goes_on_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = defined("def mine(completions):\n    return [float(len(c)) for c in completions]\n", tmp_path / "first.py")
    execute(assemble(FULL, tmp_path / "run", reward=RewardConfig.of(first)))
    second = defined("def mine(completions):\n    return [0.0 for c in completions]\n", tmp_path / "second.py")
    execute(assemble(FULL, tmp_path / "run", resume=True, total_steps=3, reward=RewardConfig.of(first)))
    assert "the code of the reward" not in capsys.readouterr().err
    execute(assemble(FULL, tmp_path / "run", resume=True, total_steps=4, reward=RewardConfig.of(second)))
    assert "the code of the reward 'mine' has changed" in capsys.readouterr().err
    resumed = json.loads((tmp_path / "run" / "environment.json").read_text())["resumed"]
    assert [entry["step"] for entry in resumed] == [2, 3]
    assert resumed[0]["differs"] == ["total_steps: 2 -> 3"]
    assert "the code of the reward 'mine' has changed" in resumed[1]["differs"][1]


def test_a_gold_reward_whose_source_has_changed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = defined("def mine(completions):\n    return [float(len(c)) for c in completions]\n", tmp_path / "first.py")
    second = defined("def mine(completions):\n    return [0.0 for c in completions]\n", tmp_path / "second.py")
    for steps, judge in ((2, first), (3, second)):  # a run that goes on with another judge
        trainer = {"evaluation": EvaluationConfig(gold=RewardConfig.of(judge))}
        changes = {"trainer": trainer, "eval_data": PROMPTS[:2], "total_steps": steps}
        execute(assemble(FULL, tmp_path / "run", resume=steps == 3, **changes))
    assert "the code of the gold reward 'mine' has changed" in capsys.readouterr().err


def test_the_sources_of_rewards(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("LIMIT = 3\ndef mine(completions):\n    return [LIMIT] * len(completions)\n")
    config = RewardConfig.of(
        {"own": early_letters, "file": f"{tmp_path / 'mine.py'}:mine", "named": "vader", "typed": eval("lambda c: [0]")}
    )
    sources = reward_sources(config)
    assert sources.keys() == {"own", "file"}
    (tmp_path / "mine.py").write_text("LIMIT = 4\ndef mine(completions):\n    return [LIMIT] * len(completions)\n")
    assert reward_sources(config)["file"] != sources["file"] and reward_sources(config)["own"] == sources["own"]


def test_another_machine_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(assemble(SFT_FULL, tmp_path / "run"))
    path = tmp_path / "run" / "environment.json"
    environment = json.loads(path.read_text())
    environment["threads"], environment["versions"]["torch"] = 16, "2.0.0"
    path.write_text(json.dumps(environment))
    execute(assemble(SFT_FULL, tmp_path / "run", resume=True, total_steps=5))
    said = capsys.readouterr().err
    assert f"threads 16 -> {torch.get_num_threads()}, torch 2.0.0 -> {torch.__version__}" in said
    assert "not necessarily to the same bits" in said
    path.write_text("{")
    resumed = execute(assemble(SFT_FULL, tmp_path / "run", resume=True, total_steps=6))
    assert resumed.trainer.counts.steps == 6


# ---- what is written, and when nothing is ----------------------------------------------------------------------------


def test_the_recipe_is_written_anew_where_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "run" / "recipe.yaml"
    execute(assemble(SFT_FULL, tmp_path / "run"))
    first = path.read_text()
    execute(assemble(SFT_FULL, tmp_path / "run", resume=True))
    assert path.read_text() == first and "resumed" not in (tmp_path / "run" / "environment.json").read_text()
    execute(assemble(SFT_FULL, tmp_path / "run", resume=True, total_steps=6))
    assert path.read_text() == first.replace("total_steps: 4", "total_steps: 6")


def test_a_run_whose_checkpoints_are_of_another_version(tmp_path: Path) -> None:
    execute(assemble(SFT_FULL, tmp_path / "run"))
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    saved = read_checkpoint(newest)
    state = {name: value for name, value in saved.state.items() if name != "identity"}
    write_checkpoint(newest, Checkpoint(state=state, tensors=saved.tensors))
    refused(SFT_FULL, tmp_path / "run", ConfigError, "another version of tropism")


def test_python_has_to_name_the_run() -> None:
    with pytest.raises(ConfigError, match="to resume, name the run: run='runs/<name>'"):
        tropism.train("demo", "sft", data=TEXTS, resume=True)


def trained(run: Path, **changes: Any) -> Any:
    """``tropism.train`` of four steps, anew or resumed."""
    fields: dict[str, Any] = {"total_steps": 4, "prompts_per_step": 2, "eval_data": PROMPTS[:2], **changes}
    fields.setdefault("trainer", tropism.TrainerConfig(learning_rate=1e-3, progress=False))
    pair = (tiny_model("llama", seed=3), tiny_tokenizer())
    algorithm = tropism.GRPO(group_size=2)
    sampling = tropism.Sampling(max_new_tokens=5)
    return tropism.train(
        pair, algorithm, data=PROMPTS, reward=early_letters, run=run, sampling=sampling, lora=LoRA(rank=2), **fields
    )


def test_a_finished_run_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(tmp_path / "run")
    before = files(tmp_path / "run")
    again = trained(tmp_path / "run", resume=True)
    assert "is finished after step 4 of 4: nothing is left to do. Raise total_steps" in capsys.readouterr().err
    assert files(tmp_path / "run") == before
    assert again.policy.generate(["a cat"], n=2) == first.policy.generate(["a cat"], n=2)
    steady = {name: value for name, value in first.metrics.items() if not name.startswith(("time/", "throughput/"))}
    assert again.metrics == pytest.approx(steady, rel=0, abs=0, nan_ok=True) and "eval/reward" in steady


def test_what_a_finished_run_lacks_is_made_up_for(tmp_path: Path) -> None:
    """A run that was killed between its last checkpoint and the end of its export."""
    trained(tmp_path / "run")
    model = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    for path in (tmp_path / "run" / "model").iterdir():
        path.unlink()
    trained(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == model


def test_a_model_of_an_earlier_end_is_not_taken_for_the_last(tmp_path: Path) -> None:
    """A run that ended, went on, and was killed after its last checkpoint, before it was exported again."""
    trained(tmp_path / "run", total_steps=2)
    changes: dict[str, Any] = {"total_steps": 4, "trainer": tropism.TrainerConfig(learning_rate=1e-3, progress=False)}
    early = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Assembly, "_export", lambda self: None)
        trained(tmp_path / "run", resume=True, **changes)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == early
    trained(tmp_path / "run", resume=True, **changes)
    trained(tmp_path / "whole", **changes)
    last = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert last == (tmp_path / "whole" / "model" / "model.safetensors").read_bytes() != early


def test_a_run_that_patience_stopped_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tropism.TrainerConfig(
        learning_rate=1e-12,
        progress=False,
        evaluation=EvaluationConfig(every=1),
        checkpoints=CheckpointConfig(patience=1),
    )
    trained(tmp_path / "run", trainer=trainer)
    before = files(tmp_path / "run")
    trained(tmp_path / "run", trainer=trainer, resume=True)
    said = capsys.readouterr().err
    assert "was stopped after step 1 of 4" in said and "Raise trainer.checkpoints.patience" in said
    assert files(tmp_path / "run") == before


def test_best_weights_of_a_later_step_are_not_exported(tmp_path: Path) -> None:
    """A run that went back, with fewer steps, finds in best/ what a later step had written."""
    often = CheckpointConfig(every=1, keep=100, use_best=True)
    steps = EvaluationConfig(every=1)
    rising = {"early": lambda completions, trainer_state: [float(trainer_state["step"])] * len(completions)}
    changes: dict[str, Any] = {
        "reward": RewardConfig.of(rising),
        "eval_data": TEXTS[:2],
        "trainer": {"checkpoints": often, "evaluation": steps},
    }
    execute(assemble(FULL, tmp_path / "run", total_steps=3, **changes))
    for path in list_checkpoints(tmp_path / "run" / "checkpoints")[2:]:
        shutil.rmtree(path)
    with pytest.raises(ModelError, match=r"holds the weights after step 3, but the best were those after step 2"):
        execute(assemble(FULL, tmp_path / "run", resume=True, total_steps=2, **changes))
    changes["trainer"] = {"checkpoints": CheckpointConfig(every=1, keep=100), "evaluation": steps}
    execute(assemble(FULL, tmp_path / "run", resume=True, total_steps=2, **changes))


# ---- methods that know the total -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Counting(SFT):
    """SFT that asks for the number of steps, when its first update is over or never."""

    name: ClassVar[str] = "counting"
    asks: bool = True

    def build(self, facts: RunFacts) -> SFTAlgorithm:
        return CountingAlgorithm(self, facts)


class CountingAlgorithm(SFTAlgorithm):
    def after_step(self, policy: Any, metrics: Any) -> Any:
        if self.config.asks and self.facts.total_steps > 0:  # type: ignore[attr-defined]
            metrics["left"] = 1.0
        return super().after_step(policy, metrics)


@pytest.mark.parametrize("asks", [True, False])
def test_a_method_that_asks_for_the_total_cannot_get_another(asks: bool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"algorithm": Counting(asks=asks)}
    execute(assemble(SFT_FULL, tmp_path / "run", **changes))
    saved = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert saved.state["identity"]["total_steps_read"] is asks
    if asks:
        match = "the method depends on the total"
        refused(SFT_FULL, tmp_path / "run", ConfigError, match, total_steps=6, **changes)
        resumed = execute(assemble(SFT_FULL, tmp_path / "run", resume=True, **changes))
    else:
        resumed = execute(assemble(SFT_FULL, tmp_path / "run", resume=True, total_steps=6, **changes))
    newest = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert newest.state["identity"]["total_steps_read"] is asks
    assert resumed.trainer.counts.steps == (4 if asks else 6)
