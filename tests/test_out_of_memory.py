"""Where memory runs out batches are halved, the result stays what it was, and the run says so."""

from __future__ import annotations

import errno
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from tiny_classifiers import save_bert
from tiny_models import tiny_model, tiny_tokenizer
from tiny_reward_models import FACTS, tiny_reward_model
from tiny_runs import PROMPTS, Setting, assemble, execute, logged, weights_of
from tropism.data.prompts import make_prompts
from tropism.errors import ConfigError, NoRoomError
from tropism.models.policy import Policy
from tropism.models.reward_model import RewardModel
from tropism.models.sampling_model import SamplingModel
from tropism.models.trunk import Features, FrozenTrunk
from tropism.out_of_memory import BatchSize, is_out_of_memory, warnings_to
from tropism.rewards.classifier import ClassifierReward
from tropism.rewards.registry import make_reward
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.text_reward_model import TextRewardModel
from tropism.training.fitting import Fitting
from tropism.training.processes import Processes, plan_micro_batches, plan_shared_micro_batches
from tropism.training.scoring import ModelScorer
from tropism.types import Batch, Rollouts, Tokens

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1.1 GiB is free"
CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


class OutOfMemoryError(Exception):
    """As libraries with an allocator of their own (CuPy) call theirs."""


# Telling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        RuntimeError(CUDA),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError(CPU),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes"),
        RuntimeError("std::bad_alloc"),
        MemoryError("std::bad_alloc: out_of_memory: RMM failure"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OutOfMemoryError("pool exhausted"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:24]}",
)
def test_memory_that_ran_out(error: Exception) -> None:
    assert is_out_of_memory(error)


def test_what_a_library_raises_on_this_machine() -> None:
    with pytest.raises(RuntimeError) as on_torch:
        torch.empty(2**61, dtype=torch.uint8)
    with pytest.raises(MemoryError) as on_numpy:
        np.empty(2**61, dtype=np.uint8)
    assert is_out_of_memory(on_torch.value) and is_out_of_memory(on_numpy.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in strides"),
        ValueError("out of memory"),
        NoRoomError(f"out of memory: not even the smallest part of the work fits ({CUDA})"),
        ConfigError("the run cannot fit into memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt("out of memory"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:24]}",
)
def test_other_errors(error: BaseException) -> None:
    assert not is_out_of_memory(error)


# Parts ---------------------------------------------------------------------------------------------------------------


def batch_size() -> BatchSize:
    return BatchSize("texts scored at once", setting="batch_size", advice="Take shorter texts")


def full_above(most: int, tried: list[int]) -> Any:
    """Squares of numbers; batches above ``most`` do not fit."""

    def compute(part: Sequence[int]) -> list[int]:
        tried.append(len(part))
        if len(part) > most:
            raise torch.OutOfMemoryError(CUDA)
        return [number * number for number in part]

    return compute


def test_parts_halve_and_stay_small(caplog: pytest.LogCaptureFixture) -> None:
    size, tried = batch_size(), list[int]()
    with caplog.at_level(logging.WARNING, logger="tropism"):
        found = [n for _, squares in size.parts(range(11), full_above(3, tried), size=8) for n in squares]
        again = [n for _, squares in size.parts(range(5), full_above(3, tried), size=8) for n in squares]
    assert found == [0, 1, 4, 9, 16, 25, 36, 49, 64, 81, 100] and again == [0, 1, 4, 9, 16]
    # 8 and 4 fail once each, and are never tried again.
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1, 2, 2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        f"memory ran out with up to {before} texts scored at once (CUDA out of memory); from now on at most {after}, "
        f"with the same result in more time. Set batch_size to {after} to avoid the failed attempts"
        for before, after in ((8, 4), (4, 2))
    ]


def test_a_smaller_batch_than_the_last_that_fit_is_kept() -> None:
    size, tried = batch_size(), list[int]()
    list(size.parts(range(6), full_above(1, tried), size=2))
    list(size.parts(range(2), full_above(1, tried), size=16))
    assert tried == [2, 1, 1, 1, 1, 1, 1, 1, 1] and size.at_most(16) == 1


def test_one_item_that_does_not_fit_is_the_error_with_advice() -> None:
    with pytest.raises(NoRoomError, match=r"CUDA out of memory.*Take shorter texts") as caught:
        list(batch_size().parts(range(4), full_above(0, []), size=4))
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_pass() -> None:
    def broken(part: Sequence[int]) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        list(batch_size().parts(range(4), broken, size=4))


# Micro-batches -------------------------------------------------------------------------------------------------------


def test_the_budget_shrinks_until_the_batch_that_failed_is_split() -> None:
    """40 tokens in all under a budget of 8192: half of the budget would change nothing."""
    fitting, lengths, tried = Fitting(Processes(Accelerator(cpu=True)), of="the update"), [10] * 4, list[int]()

    def work(parts: Any) -> int:
        rows = 0
        for part in parts:
            tried.append(len(part))
            if len(part) > 1:
                raise RuntimeError(CPU)
            rows += len(part)
        return rows

    heard: list[str] = []
    with warnings_to(heard.append):
        plan = lambda budget: plan_micro_batches(torch.tensor(lengths), max_tokens=budget)  # noqa: E731
        assert fitting.together(plan, list, work, budget=8192) == [4]
    assert tried == [4, 3, 1, 1, 1, 1]
    assert len(heard) == 2 and "up to 8192 tokens in a micro-batch of the update" in heard[0]
    assert "(DefaultCPUAllocator: can't allocate memory: you tried to allocate)" in heard[0]
    assert "Set trainer.micro_batch_tokens to 32" in heard[0] and "to 16" in heard[1]


def test_prompts_that_rows_share_do_not_keep_them_together() -> None:
    """Eight rows of one prompt of 100 tokens and completions of 1 count 108 tokens, and half of 8 * 101 is more."""
    ids = torch.arange(100).repeat(8, 1)
    tokens = Tokens(
        prompt_ids=ids,
        prompt_lengths=torch.full((8,), 100),
        completion_ids=torch.ones(8, 1, dtype=torch.long),
        completion_lengths=torch.ones(8, dtype=torch.long),
    )
    tried: list[int] = []

    def work(parts: Any) -> None:
        for part in parts:
            tried.append(len(part))
            if len(part) > 4:
                raise RuntimeError(CPU)

    fitting = Fitting(Processes(Accelerator(cpu=True)), of="the update")
    fitting.together(lambda budget: plan_shared_micro_batches(tokens, max_tokens=budget), list, work, budget=8192)
    assert tried == [8, 5, *[1] * 8]


# Whole runs ----------------------------------------------------------------------------------------------------------


@contextmanager
def rows_at_most(monkeypatch: pytest.MonkeyPatch, *, gradients: int, without: int, sampled: int) -> Iterator[list[str]]:
    """A machine on which passes over more rows than that do not fit; lists what failed."""
    failed: list[str] = []
    forward, decode, scored = Policy.forward, SamplingModel.decode, RewardModel.forward

    def limited(self: Any, prompt_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        most, what = (gradients, "update") if torch.is_grad_enabled() else (without, "score")
        if len(prompt_ids) > most:
            failed.append(what)
            raise torch.OutOfMemoryError(CUDA)
        return forward(self, prompt_ids, *args, **kwargs)

    def limited_decode(self: Any, ids: Tensor, cache: Any) -> Tensor:
        if len(ids) > sampled:
            failed.append("sample")
            raise torch.OutOfMemoryError(CUDA)
        return decode(self, ids, cache)

    def limited_scores(self: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(ids) > (gradients if torch.is_grad_enabled() else without):
            failed.append("update" if torch.is_grad_enabled() else "score")
            raise torch.OutOfMemoryError(CUDA)
        return scored(self, ids, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "forward", limited)
        patch.setattr(SamplingModel, "decode", limited_decode)
        patch.setattr(RewardModel, "forward", limited_scores)
        yield failed


# No GPT-2: the true gradient of its keys' biases is zero, and Adam makes whole steps of the rounding there.
RUNS = [
    Setting("sft", False, "llama"),
    Setting("grpo", True, "llama"),
    Setting("ppo", False, "llama"),
    Setting("dpo", True, "llama"),
    Setting("quark", False, "llama"),
    Setting("ilql", False, "llama"),
    Setting("reward-model", False, "llama"),
    Setting("rloo", False, "llama", train_layers=1),
    Setting("rloo", False, "t5"),
]


@pytest.mark.parametrize("setting", RUNS, ids=str)
def test_a_run_that_runs_out_of_memory_learns_the_same(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"trainer": {"learning_rate": 1e-4, "preflight": False}}
    plain = execute(assemble(setting, tmp_path / "plain", **changes))
    tight = assemble(setting, tmp_path / "tight", **changes)
    least = 8 if setting.method in ("dpo", "reward-model") else 1  # a pair, or set, is never split
    with rows_at_most(monkeypatch, gradients=max(2, least), without=max(3, least), sampled=3) as failed:
        execute(tight)
    expected = {"update"} if least == 1 else set()
    expected |= {"sample", "score"} if setting.on_policy else set()
    assert expected <= set(failed)
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(weights_of(tight)[name], value, rtol=0, atol=1e-5, msg=name)
    for kind in ("collect", "update", "evaluation"):
        for one, other in zip(logged(plain.run.folder.path, kind), logged(tight.run.folder.path, kind), strict=True):
            assert one.keys() == other.keys()
            for name in one:
                if name.startswith("loss/") or name in ("optim/grad_norm", "reward/mean"):
                    assert other[name] == pytest.approx(one[name], rel=1e-5, abs=2e-5), (kind, name)


@pytest.mark.parametrize("whole", [True, False], ids=["the kept states", "every pass that keeps"])
def test_frozen_blocks_that_cannot_be_kept_are_computed_in_every_pass(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run learns the same, and its own micro-batches are as large as before."""
    setting, changes = Setting("rloo", False, "llama", train_layers=1), {"trainer": {"learning_rate": 1e-4}}
    plain = execute(assemble(setting, tmp_path / "plain", **changes))
    tight = assemble(setting, tmp_path / "tight", **changes)
    allocate = Tensor.new_zeros

    def full(self: Tensor, *size: Any, **options: Any) -> Tensor:
        if sys._getframe(1).f_code is Features.write.__code__:
            raise torch.OutOfMemoryError(CUDA)
        return allocate(self, *size, **options)

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="tropism"):
        if whole:
            patch.setattr(Tensor, "new_zeros", full)
        else:
            patch.setattr(FrozenTrunk, "_reach", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError(CUDA)))
        execute(tight)
    told = [record.getMessage() for record in caplog.records if "computed in every pass" in record.getMessage()]
    assert len(told) == 1 and "memory ran out while" in told[0] and "CUDA out of memory" in told[0]
    assert tight.scorer.fitting.size.limit is None and tight.trainer.fitting.size.limit is None
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(weights_of(tight)[name], value, rtol=0, atol=1e-5, msg=name)


def test_parts_reach_the_device_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without room for one more part fails inside of what is tried again."""
    assembly = assemble(Setting("sft", False, "llama"), tmp_path / "run")
    moved: list[int] = []
    move = Batch.to

    def limited(self: Batch, device: Any) -> Batch:
        moved.append(len(self))
        if len(self) > 2:
            raise torch.OutOfMemoryError(CUDA)
        return move(self, device)

    monkeypatch.setattr(Batch, "to", limited)
    execute(assembly)
    assert max(moved) > 2 and assembly.trainer.fitting.size.limit is not None


def test_it_is_told_once_per_halving_and_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assemble(Setting("grpo", True, "llama"), tmp_path / "run", total_steps=3)
    with rows_at_most(monkeypatch, gradients=1, without=2, sampled=2) as failed:
        execute(assembly)
    lines = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    told = [line["message"] for line in lines if line["message"].startswith("memory ran out")]
    assert len(told) == len(failed) > 3 and len(set(told)) == len(told)
    assert {line["step"] for line in lines if line["message"] in told} == {1}
    named = ("trainer.micro_batch_tokens", "sampling.batch_size")
    assert all(any(f"Set {name} to " in message for message in told) for name in named)


def test_the_setting_that_it_names_avoids_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("sft", False, "llama")
    first = assemble(setting, tmp_path / "first")
    with rows_at_most(monkeypatch, gradients=2, without=99, sampled=99):
        execute(first)
        limit = first.trainer.fitting.size.limit
        assert limit is not None
        second = assemble(setting, tmp_path / "second", trainer={"micro_batch_tokens": limit})
        execute(second)
    assert second.trainer.fitting.size.limit is None


def test_a_row_that_does_not_fit_ends_the_run_with_weights_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = assemble(Setting("sft", False, "llama"), tmp_path / "run")
    before = weights_of(assembly)
    with (
        rows_at_most(monkeypatch, gradients=0, without=99, sampled=99),
        pytest.raises(NoRoomError, match=r"CUDA out of memory.*gradient_checkpointing"),
    ):
        execute(assembly)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(assembly).items())
    assert all(parameter.grad is None for parameter in assembly.policy.parameters())


def test_an_error_that_is_not_about_memory_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assemble(Setting("sft", False, "llama"), tmp_path / "run")
    monkeypatch.setattr(Policy, "forward", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        execute(assembly)
    assert assembly.trainer.fitting.size.limit is None


# Sampling and scoring by themselves ----------------------------------------------------------------------------------


def completions(policy: Policy, sampler: EmbeddedSampler, **settings: Any) -> Rollouts:
    prompts = make_prompts(PROMPTS, tiny_tokenizer(), max_length=None)
    sampling = Sampling(**{"max_new_tokens": 12, "batch_size": 8, **settings})
    return sampler.generate(policy, prompts, sampling, 3, key=StreamKey(seed=4, purpose="checks"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "repetition_penalty": 1.3}, {"temperature": 0.0}], ids=str)
def test_the_same_completions(family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_model(family, seed=1)).eval()
    expected = completions(policy, EmbeddedSampler(tiny_tokenizer(), (2,)), **settings)
    sampler = EmbeddedSampler(tiny_tokenizer(), (2,))
    with rows_at_most(monkeypatch, gradients=99, without=99, sampled=3) as failed:
        found = completions(policy, sampler, **settings)
        again = completions(policy, sampler, **settings)
    assert failed == ["sample"] * 2 and sampler.size.limit == 2
    for other in (found, again):
        assert torch.equal(other.completion_ids, expected.completion_ids)
        assert other.finish_reasons == expected.finish_reasons
        torch.testing.assert_close(other.logprobs, expected.logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.behaviour_logprobs, expected.behaviour_logprobs, rtol=0, atol=1e-5)


def test_rows_that_had_ended_are_not_sampled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out late, as keys and values grow."""
    policy = Policy(tiny_model("llama", seed=1)).eval()
    expected = completions(policy, EmbeddedSampler(tiny_tokenizer(), (2,)), batch_size=2)
    decode, steps, rows = SamplingModel.decode, 0, 0

    def late(self: Any, ids: Tensor, cache: Any) -> Tensor:
        nonlocal steps, rows
        steps, rows = steps + 1, rows + len(ids)
        if steps == 60:
            raise RuntimeError(CPU)
        return decode(self, ids, cache)

    monkeypatch.setattr(SamplingModel, "decode", late)
    found = completions(policy, EmbeddedSampler(tiny_tokenizer(), (2,)), batch_size=2)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    # Two rows at most are begun again; all but the last token of each row takes a step.
    lengths = expected.completion_lengths
    assert rows <= int((lengths - 1).sum()) + 2 * int(lengths.max())


def test_a_completion_that_does_not_fit_is_told_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_model("llama", seed=1)).eval()
    with (
        rows_at_most(monkeypatch, gradients=99, without=99, sampled=0),
        pytest.raises(NoRoomError, match=r"max_new_tokens"),
    ):
        completions(policy, EmbeddedSampler(tiny_tokenizer(), (2,)))


@pytest.mark.parametrize("most", [1, 2])
def test_the_same_log_probs_and_values(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_model("llama", seed=1)).eval()
    tokens = completions(policy, EmbeddedSampler(tiny_tokenizer(), (2,)))

    def scorer() -> ModelScorer:
        processes = Processes(Accelerator(cpu=True))
        return ModelScorer(lambda: nullcontext(policy), processes, max_tokens=8192, max_rows=None)

    expected, limited = scorer().logprobs(tokens, temperature=1.0), scorer()
    with rows_at_most(monkeypatch, gradients=99, without=most, sampled=99):
        found = limited.logprobs(tokens, temperature=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert limited.fitting.size.limit is not None


def test_the_same_scores_of_a_reward_model(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = TextRewardModel(*tiny_reward_model("llama"), replace(FACTS))
    texts = ["a cat sat.", "oh", "we ran and ran", "no", "is it so?"]
    expected = judge.score("so: ", texts)
    with rows_at_most(monkeypatch, gradients=99, without=2, sampled=99) as failed:
        found = judge.score("so: ", texts, batch_size=5)
        judge.score("so: ", texts, batch_size=5)
    assert found == pytest.approx(expected, abs=1e-5) and failed == ["score"]


@pytest.mark.parametrize("term", [{}, {"text": "prompt+completion", "batch_size": 3}], ids=str)
def test_the_same_rewards_of_a_classifier(
    term: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_bert(tmp_path / "bert", labels={0: "bad", 1: "good"})
    prompts, completions = ["the film was", "i saw it .", "the", "a", "the"], ["very good .", "a", "bad", "it", "film"]
    args = {"model": str(folder), "label": "good", "device": "cpu", **term}
    expected = make_reward("classifier", args)(prompts=prompts, completions=completions)
    reward, logits, tried = make_reward("classifier", args), ClassifierReward._logits, list[int]()

    def limited(self: Any, entries: Sequence[Any]) -> Tensor:
        tried.append(len(entries))
        if len(entries) > 1:
            raise torch.OutOfMemoryError(CUDA)
        return logits(self, entries)

    monkeypatch.setattr(ClassifierReward, "_logits", limited)
    with caplog.at_level(logging.WARNING, logger="tropism"):
        for _ in range(2):
            assert list(reward(prompts=prompts, completions=completions)) == pytest.approx(list(expected), abs=1e-5)
    assert tried == ([3, 1] if term else [5, 2, 1]) + [1] * 9
    assert "the term's args.batch_size to 1" in caplog.text
