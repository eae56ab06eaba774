"""Two processes that shard the weights do what one does, and save what one saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distributed.sharded import CASES, LAUNCHED, STOPPED, assembled, interrupted, run_cases, whole_weights
from tiny_models import tiny_model
from tiny_runs import assert_same, execute, logged
from tropism.errors import ConfigError
from tropism.models.policy import Policy
from tropism.models.sharding import shard
from tropism.recipe_processes import sharding
from two_started import start_two

SCRIPT = Path(__file__).with_name("sharded.py")
distributed = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the runs of one process, and of two that shard the weights."""
    folder = tmp_path_factory.mktemp("sharded")
    one, two = folder / "one", folder / "two"
    one.mkdir()
    two.mkdir()
    run_cases(one)
    for case in STOPPED:
        interrupted(case, one / f"{case}-stopped")
    start_two(SCRIPT, folder, settings=LAUNCHED)
    return one, two


def weights(folder: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}-rank-{rank}.safetensors")


def report(folder: Path, case: str, rank: int = 0) -> Any:
    return json.loads((folder / f"{case}-rank-{rank}.json").read_text())


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.shape == two[name].shape and value.dtype == two[name].dtype
        difference = (value - two[name]).abs()
        if "c_attn.bias" in name and value.dim() == 1:  # a key's bias changes nothing, and Adam makes steps of rounding
            queries, _, values = difference.chunk(3)
            difference = torch.cat([queries, values])
        assert float(difference.max()) < 1e-5, name


@distributed
@pytest.mark.parametrize("case", CASES)
def test_losses_gradients_and_weights_are_those_of_one_process(case: str, runs: tuple[Path, Path]) -> None:
    for kind in ("update", "collect", "evaluation"):
        one, two = (logged(folder / case, kind) for folder in runs)
        assert len(one) == len(two)
        for single, double in zip(one, two, strict=True):
            assert single.keys() == double.keys()
            assert (double["step"], double["samples"], double["tokens"]) == (
                single["step"],
                single["samples"],
                single["tokens"],
            )
            for name, value in single.items():
                if name == "optim/grad_norm":
                    assert double[name] == pytest.approx(value, rel=1e-5)
                elif name.startswith(("loss/", "eval/", "reward/")) and value is not None:
                    # Where advantages cancel, a loss is a difference of numbers around one: hence the absolute part.
                    assert double[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name
    assert_close(weights(runs[0], case), weights(runs[1], case))
    assert_same(weights(runs[1], case), weights(runs[1], case, rank=1))


@distributed
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("sft", "ilql", "dpo", "kto")])
def test_the_same_samples(case: str, runs: tuple[Path, Path]) -> None:
    one, two = (
        pq.read_table(folder / case / "rollouts" / f"step-{CASES[case][1]['total_steps']:06d}.parquet").to_pydict()
        for folder in runs
    )
    for column in ("prompt", "completion_ids", "finish_reason"):
        assert one[column] == two[column]


@distributed
@pytest.mark.parametrize("case", CASES)
def test_each_process_holds_its_part_of_every_weight(case: str, runs: tuple[Path, Path]) -> None:
    whole = report(runs[0], case)["shares"]
    parts = [report(runs[1], case, rank)["shares"] for rank in (0, 1)]
    assert whole.keys() == parts[0].keys() == parts[1].keys()
    for name, shape in whole.items():
        rows = [part[name][0] for part in parts]
        assert rows == [-(-shape[0] // 2), shape[0] // 2], name


@distributed
@pytest.mark.parametrize("case", CASES)
def test_the_memory_estimate_counts_parts(case: str, runs: tuple[Path, Path]) -> None:
    one, two = (report(folder, case)["memory"]["lasting"] for folder in runs)
    for name in ("weights", "optimizer"):
        assert 0.4 * one[name] < two[name] < 0.7 * one[name]
    if case != "layers":  # where the copy of one process shares what is frozen with the policy
        assert two["reference"] <= 0.7 * one["reference"]


@distributed
@pytest.mark.parametrize("case", CASES)
def test_both_processes_make_the_same_number_of_passes(case: str, runs: tuple[Path, Path]) -> None:
    first, second = (report(runs[1], case, rank)["passes"] for rank in (0, 1))
    assert first == second
    assert first["policy, update"] > 0
    alone = report(runs[0], case)["passes"]
    assert first["policy, update"] < alone["policy, update"]
    if case == "grpo":
        # A step: four minibatches of three rows one by one, so two passes each; six rows to score, so three.
        assert first["policy, update"] == 20 * 4 * 2
        # The checks before training make two passes, and each of two evaluations one on a single row.
        assert first["reference, scoring"] - alone["reference, scoring"] == -20 * 3
        assert first["reference, scoring"] >= 20 * 3


@distributed
@pytest.mark.parametrize("case", STOPPED)
def test_interrupted_and_resumed_is_the_uninterrupted_run(case: str, runs: tuple[Path, Path]) -> None:
    two = runs[1]
    for rank in (0, 1):
        assert_same(weights(two, case), weights(two, f"{case}-resumed", rank))
    for log in ("metrics.jsonl",):
        assert (two / case / log).read_bytes() == (two / f"{case}-stopped" / log).read_bytes()
    last = sorted((two / case / "checkpoints").iterdir())[-1].name
    for file in ("policy.safetensors", "optimizer.safetensors"):
        one, other = (load_file(two / run / "checkpoints" / last / file) for run in (case, f"{case}-stopped"))
        assert one and one.keys() == other.keys()
        assert_same(one, other)


@distributed
@pytest.mark.parametrize("case", STOPPED)
def test_checkpoints_are_those_of_one_process(case: str, runs: tuple[Path, Path]) -> None:
    last = sorted((runs[0] / case / "checkpoints").iterdir())[-1].name
    for file in ("policy.safetensors", "optimizer.safetensors"):
        one, two = (load_file(folder / case / "checkpoints" / last / file) for folder in runs)
        assert_close(one, two)


@distributed
@pytest.mark.parametrize("case", STOPPED)
def test_runs_go_on_with_another_number_of_processes(case: str, runs: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = runs
    assert_close(weights(one, case), weights(two, f"{case}-taken-over"))
    shutil.copytree(two / f"{case}-handed-over", tmp_path / "run")
    assert_close(weights(one, case), whole_weights(execute(assembled(case, tmp_path / "run", resume=True))))


@distributed
@pytest.mark.parametrize("case", ["sft", "adapter"])
def test_the_exported_model_is_the_trained_one(case: str, runs: tuple[Path, Path]) -> None:
    ids = torch.arange(12).view(2, 6)
    models = [AutoModelForCausalLM.from_pretrained(folder / case / "model") for folder in runs]
    one, two = (model(input_ids=ids).logits for model in models)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    if case == "sft":  # the best weights, which were the last ones
        trained = weights(runs[1], case)
        best = load_file(runs[1] / case / "best" / "policy.safetensors")
        assert_same(best, trained)
        loaded = {f"model.{name}": value.detach() for name, value in models[1].named_parameters()}
        assert_same(loaded, trained)


@distributed
@pytest.mark.parametrize("case", CASES)
def test_the_first_process_can_generate_alone_at_the_end(case: str, runs: tuple[Path, Path]) -> None:
    assert report(runs[1], case)["texts"] == report(runs[0], case)["texts"]


@pytest.mark.parametrize(
    ("variable", "value", "mend"),
    [
        ("FSDP_VERSION", "1", "add --fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params: leave it out"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "--fsdp_reshard_after_forward false: leave it out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "set model.gradient_checkpointing instead"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "use TRANSFORMER_BASED_WRAP"),
        ("FSDP_IGNORED_MODULES", "lm_head", "leave them out"),
        ("FSDP_AUTO_WRAP_POLICY", "NONSENSE", "accelerate cannot use the FSDP options"),
    ],
)
def test_other_ways_to_shard_are_refused(variable: str, value: str, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, usual in (LAUNCHED | {variable: value}).items():
        monkeypatch.setenv(name, usual)
    with pytest.raises(ConfigError, match=mend):
        sharding()


def test_nothing_is_sharded_without_being_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert sharding() is None


def test_models_that_cannot_be_sharded_are_refused() -> None:
    policy = Policy(tiny_model("llama"))
    with pytest.raises(ConfigError, match=r"no module of class T5Block.*leave out --fsdp_transformer_layer_cls"):
        shard(policy, classes=["T5Block"])
    policy.language_model.lm_head.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"one type, and these have bfloat16, float32; set model\.dtype"):
        shard(policy)
    policy.language_model.is_quantized = True
    with pytest.raises(ConfigError, match="quantised weights cannot be sharded"):
        shard(policy)
