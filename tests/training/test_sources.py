from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_runs import PROMPTS, Setting, assemble, early_letters
from tropism.algorithms import RLOO
from tropism.build import Assembly
from tropism.data.demonstrations import Demonstration
from tropism.errors import ConfigError, DataError, RewardError
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.training.interrupt import Interrupted
from tropism.training.sources import Collected, DemonstrationSource, collect_metrics
from tropism.types import PolicyBatch, RewardBatch, Rollouts

SETTING = Setting("rloo", False, "llama")


def started(folder: Path, **changes: Any) -> tuple[Assembly, Any, list[Collected]]:
    """A run that only samples."""
    assembly = assemble(SETTING, folder / "run", **changes)
    source: Any = assembly.trainer.source
    collected: list[Collected] = []
    source.on_collect = collected.append
    return assembly, source, collected


def key(batch: PolicyBatch) -> list[tuple[int, ...]]:
    return [tuple(row[:n].tolist()) for row, n in zip(batch.completion_ids, batch.completion_lengths, strict=True)]


def test_minibatches_of_every_epoch_cover_the_collect_in_different_orders(tmp_path: Path) -> None:
    _, source, collected = started(tmp_path)
    batches = []
    for batch in source.collect(None):
        batches.append(batch)
        assert source.done is (len(batches) == 4)
    (rows,) = (sorted(key(c.batch)) for c in collected)
    first, second = (key(batches[0]) + key(batches[1])), (key(batches[2]) + key(batches[3]))
    assert sorted(first) == sorted(second) == rows
    assert first != second
    stats = source.finish()
    assert stats.samples == 8 and stats.tokens == int(collected[0].batch.completion_lengths.sum())


def test_groups_are_contiguous_and_prompts_move_on(tmp_path: Path) -> None:
    _, source, collected = started(tmp_path)
    for _ in range(3):
        list(source.collect(None))
        source.finish()
    prompts = [prompt for c in collected for prompt in c.inputs.prompts]
    assert all(prompts[i] == prompts[i + 1] for i in range(0, 24, 2))
    # Twelve prompts are two passes over all six.
    assert sorted(prompts[0:12:2]) == sorted(prompts[12::2]) == sorted(PROMPTS)
    assert [c.step for c in collected] == [1, 2, 3]


def test_collects_differ_and_do_not_depend_on_batching(tmp_path: Path) -> None:
    keys = []
    for size in (64, 3):
        sampling = Sampling(max_new_tokens=6, batch_size=size)
        assembly, source, collected = started(tmp_path / str(size), data=["a cat"] * 4, sampling=sampling)
        for _ in range(2):
            list(source.collect(None))
            source.finish()
        keys.append([key(c.batch) for c in collected])
        assert assembly.trainer.counts.updates == 0
    assert keys[0] == keys[1]
    assert keys[0][0] != keys[0][1]


def test_an_interrupted_or_failed_collect_has_not_begun(tmp_path: Path) -> None:
    assembly, source, collected = started(tmp_path)
    before = json.dumps(source.state_dict()[0])
    assembly.run.interrupts.received = 15
    with pytest.raises(Interrupted):
        next(iter(source.collect(None)))
    assert json.dumps(source.state_dict()[0]) == before and source.state_dict()[1] == {} and collected == []
    assembly.run.interrupts.received = None

    def broken(completions: list[str]) -> list[float]:
        raise OSError("no answer")

    term = source.maker.harness.terms["early"]
    works, term.function = term.function, broken
    with pytest.raises(RewardError, match="no answer"):
        next(iter(source.collect(None)))
    assert json.dumps(source.state_dict()[0]) == before
    term.function = works
    assert next(iter(source.collect(None))) is not None


def test_state_holds_the_batch_in_use_and_the_place_in_it(tmp_path: Path) -> None:
    _, source, _ = started(tmp_path / "one")
    rest = iter(source.collect(None))
    next(rest)
    values, tensors = source.state_dict()
    values = json.loads(json.dumps(values))
    _, other, collected = started(tmp_path / "other")
    other.load_state_dict(values, tensors)
    for mine, theirs in zip(rest, other.collect(None), strict=True):
        assert mine.tensors().keys() == theirs.tensors().keys()
        assert all(torch.equal(value, theirs.tensors()[name]) for name, value in mine.tensors().items())
        assert mine.temperature == theirs.temperature
    assert collected == [], "nothing was sampled anew"


def test_a_minibatch_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"minibatch_size=3 does not divide the 8 completions .*4 prompts x 2"):
        assemble(SETTING, tmp_path / "run", algorithm=RLOO(group_size=2, minibatch_size=3))


def test_recomputed_logprobs_replace_those_of_sampling(tmp_path: Path) -> None:
    _, source, collected = started(tmp_path, trainer={"recompute_logprobs": True})
    list(source.collect(None))
    assert 0 <= collected[0].metrics["rollout/logprob_mismatch"] < 1e-5
    expected = source.scorer.logprobs(collected[0].rollouts, temperature=1.0)
    assert torch.equal(collected[0].batch.old_logprobs, expected)


@pytest.mark.parametrize(("precision", "cap"), [("fp32", None), ("bf16", 2.0)])
def test_importance_weights_are_the_default_in_bf16_alone(precision: str, cap: float | None, tmp_path: Path) -> None:
    _, source, collected = started(tmp_path, trainer={"precision": precision})
    list(source.collect(None))
    assert source.importance_cap == cap and source.recompute_logprobs is (cap is not None)
    weights = collected[0].batch.importance_weights
    assert (weights is not None) is (cap is not None)
    names = {"rollout/logprob_mismatch", "rollout/effective_sample_size", "rollout/sequence_effective_sample_size"}
    assert collected[0].metrics.keys() >= names if cap else not collected[0].metrics.keys() & names


def test_importance_weights_are_about_what_was_sampled(tmp_path: Path) -> None:
    """Also with top-k: what it leaves out is no error of sampling."""
    sampling = Sampling(max_new_tokens=6, top_k=5)
    _, source, collected = started(tmp_path, trainer={"importance_cap": 4.0}, sampling=sampling)
    sampled: list[Rollouts] = []
    generate = source.maker.sampler.generate

    def noisy(*arguments: Any, **options: Any) -> Rollouts:
        rollouts = generate(*arguments, **options)
        noise = 0.3 * torch.randn(rollouts.logprobs.shape, generator=torch.Generator().manual_seed(0))
        sampled.append(replace(rollouts, logprobs=rollouts.logprobs + noise * rollouts.completion_mask))
        return sampled[0]

    source.maker.sampler.generate = noisy
    list(source.collect(None))
    batch, mask = collected[0].batch, sampled[0].completion_mask
    assert float((sampled[0].behaviour_logprobs - sampled[0].logprobs)[mask].mean()) > 0.1, "top-k has an effect"
    assert batch.importance_weights is not None
    for row, length in enumerate(batch.completion_lengths.tolist()):
        summed = sum(float(batch.old_logprobs[row, t] - sampled[0].logprobs[row, t]) for t in range(length))
        wanted = torch.full((length,), min(4.0, math.exp(summed)))
        torch.testing.assert_close(batch.importance_weights[row, :length], wanted, rtol=1e-4, atol=0)
        assert not bool(batch.importance_weights[row, length:].any())
    size = collected[0].metrics["rollout/effective_sample_size"]
    assert 0.8 < size < 0.98


def test_importance_weights_travel_with_minibatches_and_checkpoints(tmp_path: Path) -> None:
    trainer = {"importance_cap": 2.0}
    _, source, collected = started(tmp_path / "one", trainer=trainer)
    rest = iter(source.collect(None))
    first = next(rest)
    order = source._order(0)[: len(first)]
    width = first.completion_ids.shape[1]
    whole = collected[0].batch.importance_weights
    assert whole is not None and torch.equal(first.importance_weights, whole[order, :width])
    values, tensors = source.state_dict()
    _, other, _ = started(tmp_path / "other", trainer=trainer)
    other.load_state_dict(json.loads(json.dumps(values)), tensors)
    for mine, theirs in zip(rest, other.collect(None), strict=True):
        assert torch.equal(mine.importance_weights, theirs.importance_weights)


def test_the_reward_is_called_once_per_collect_with_every_column(tmp_path: Path) -> None:
    calls: list[Any] = []

    def watched(
        prompts: list[str], completions: list[str], answer: list[int], trainer_state: dict[str, int]
    ) -> list[float]:
        calls.append((len(prompts), answer, dict(trainer_state)))
        return early_letters(completions)

    data = [{"prompt": prompt, "answer": index} for index, prompt in enumerate(PROMPTS)]
    _, source, collected = started(tmp_path, data=data, reward=RewardConfig.of(watched))
    list(source.collect(None))
    ((count, answers, state),) = calls
    assert count == 8 and state == {"step": 0, "total_steps": 2}
    assert answers == [PROMPTS.index(str(prompt)) for prompt in collected[0].inputs.prompts]


def test_metrics_of_a_collect_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-1.0, 0.0], [-3.0, -1.0], [-3.0, -1.0]])
    rollouts = Rollouts(
        prompt_ids=torch.ones(4, 1, dtype=torch.long),
        prompt_lengths=torch.ones(4, dtype=torch.long),
        completion_ids=torch.tensor([[5, 2], [2, 0], [7, 8], [7, 8]]),
        completion_lengths=torch.tensor([2, 1, 2, 2]),
        logprobs=logprobs,
        behaviour_logprobs=logprobs,
        finish_reasons=("eos", "eos", "length", "length"),
    )
    rewards = RewardBatch(
        per_completion=torch.tensor([1.0, 0.0, 0.5, 0.5]), per_token=None, scored=torch.ones(4, dtype=torch.bool)
    )
    batch = PolicyBatch.of(rollouts, ref_logprobs=logprobs - rollouts.completion_mask * 0.5)
    metrics = collect_metrics(rollouts, rewards, batch, 2)
    expected = {
        "rollout/length_mean": 1.75,
        "rollout/tokens": 7.0,
        "rollout/eos_fraction": 0.5,
        "rollout/truncated_fraction": 0.5,
        "rollout/empty_fraction": 0.25,
        "rollout/distinct": 0.75,
        "policy/sequence_kl": 0.5 * 7 / 4,
        "policy/sequence_entropy": (3.0 + 1.0 + 4.0 + 4.0) / 4,
        "reward/zero_variance_groups": 0.5,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


DEMONSTRATIONS = [
    Demonstration(prompt_ids=(1,), completion_ids=(number, 2), loss_mask=(True, True)) for number in range(3, 8)
]


def test_demonstrations_come_in_order_or_shuffled_and_go_round() -> None:
    source = DemonstrationSource(DEMONSTRATIONS, batch_size=2, seed=0, shuffle=False)
    taken = []
    for _ in range(4):
        (batch,) = source.collect(None)
        assert source.done
        taken += batch.completion_ids[:, 0].tolist()
        assert (source.finish().samples, source.finish().tokens) == (2, 4)
    assert taken == [3, 4, 5, 6, 7, 3, 4, 5]
    shuffled = DemonstrationSource(DEMONSTRATIONS, batch_size=5, seed=0)
    first, second = (next(iter(shuffled.collect(None))).completion_ids[:, 0].tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == [3, 4, 5, 6, 7] and first != second


def test_demonstrations_go_on_from_their_place() -> None:
    source = DemonstrationSource(DEMONSTRATIONS, batch_size=2, seed=3)
    next(iter(source.collect(None)))
    values, tensors = source.state_dict()
    other = DemonstrationSource(DEMONSTRATIONS, batch_size=2, seed=3)
    other.load_state_dict(json.loads(json.dumps(values)), tensors)
    mine, theirs = next(iter(source.collect(None))), next(iter(other.collect(None)))
    assert torch.equal(mine.completion_ids, theirs.completion_ids)


def test_no_demonstrations_are_refused() -> None:
    with pytest.raises(DataError):
        DemonstrationSource([], batch_size=2, seed=0)
