"""Scored texts and pools of completions: what is in them, in which order it is used, and what a resume finds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slow_sampling import slow_uniform
from tiny_runs import PROMPTS, SCORED, Setting, assemble, assert_same, early_letters, execute, logged
from tropism.algorithms import Online, RewardConditioned
from tropism.build import Assembly
from tropism.data.order import epoch_order
from tropism.errors import ConfigError, TropismError
from tropism.ops.slots import read_slots
from tropism.rewards import RewardConfig
from tropism.training.pool import PoolSource, ScoredSource, uniforms
from tropism.training.sources import Collected
from tropism.types import Batch, ScoredText

ONLINE = Setting("conditioned-online", False, "llama")
OFFLINE = Setting("conditioned", False, "llama")
OWN = RewardConditioned(samples_per_prompt=2, target_dropout=0.3)

Text = tuple[tuple[int, ...], tuple[int, ...]]
Told = tuple[Text, tuple[float | None, ...]]


def pool_of(run: Path, **changes: Any) -> tuple[Assembly, PoolSource, list[Collected]]:
    assembly = assemble(ONLINE, run, **changes)
    source: Any = assembly.trainer.source
    assert isinstance(source, PoolSource)
    seen: list[Collected] = []
    source.on_collect = seen.append
    return assembly, source, seen


def told(batch: Batch) -> list[Told]:
    """Each text of a batch without its slots, and what its slots say."""
    rows: list[Told] = []
    for index in range(len(batch)):
        ids = batch.prompt_ids[index, batch.prompt_ids.shape[1] - int(batch.prompt_lengths[index]) :]
        completion = batch.completion_ids[index, : int(batch.completion_lengths[index])].tolist()
        _, values, absent = read_slots(ids[ids < 0])
        said = tuple(None if gone else value for gone, value in zip(absent.tolist(), values.tolist(), strict=True))
        rows.append(((tuple(ids[ids >= 0].tolist()), tuple(completion)), said))
    return rows


def step(source: Any) -> list[Batch]:
    """All batches of one step, as the trainer takes them."""
    batches = []
    for batch in source.collect(None):
        batches.append(batch)
        if source.done:
            break
    source.finish()
    return batches


def as_saved(source: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values, tensors = source.state_dict()
    return json.loads(json.dumps(values)), {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same_batches(one: Sequence[Batch], other: Sequence[Batch]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert_same(first.tensors(), second.tensors())


# ---- the pool --------------------------------------------------------------------------------------------------------


def test_the_pool_holds_every_completion_after_its_plain_prompt_with_its_reward(tmp_path: Path) -> None:
    _, source, seen = pool_of(tmp_path / "run")
    for number in (1, 2, 3):
        step(source)
        assert len(source.pool) == 8 * number
        collected = seen[-1]
        assert collected.step == number
        rewards = early_letters([str(text) for text in collected.inputs.completions])
        for text, completion, reward in zip(source.pool[-8:], collected.inputs.completion_ids, rewards, strict=True):
            assert list(text.completion_ids) == completion
            assert all(i >= 0 for i in text.prompt_ids)
            assert text.rewards == pytest.approx((reward,), abs=1e-7)
        asked = (collected.rollouts.prompt_ids < 0).sum(-1)
        assert asked.tolist() == [0 if number == 1 else 1] * 8, "nothing is asked for before there is a pool"
    assert seen[-1].metrics["pool/size"] == 24.0
    mean = sum(text.rewards[0] for text in source.pool) / 24
    assert seen[-1].metrics["pool/reward"] == pytest.approx(mean, abs=1e-6)


def test_targets_come_from_the_upper_end_of_the_pool(tmp_path: Path) -> None:
    changes = {"algorithm": RewardConditioned(scaler="none", online=Online(group_size=2, updates=1, top=0.25))}
    _, source, seen = pool_of(tmp_path / "run", **changes)
    for _ in range(4):
        before = sorted((text.rewards[0] for text in source.pool), reverse=True)
        step(source)
        ids = seen[-1].rollouts.prompt_ids
        values = read_slots(ids[ids < 0])[1]
        assert len(values) == (8 if before else 0)
        top = torch.tensor(before[: len(before) // 4])
        assert all(bool(torch.isclose(top, value, atol=1e-6).any()) for value in values)


def test_completions_without_a_reward_or_without_tokens_are_left_out(tmp_path: Path) -> None:
    def silent_on_some(completions: list[str]) -> list[float | None]:
        return [None if i % 3 == 0 else float(i) for i, _ in enumerate(completions)]

    _, source, seen = pool_of(tmp_path / "run", reward=RewardConfig.of(silent_on_some))
    generate: Any = source.maker.sampler.generate

    def emptied(*arguments: Any, **named: Any) -> Any:
        rollouts = generate(*arguments, **named)
        rollouts.completion_lengths[1] = 0
        return rollouts

    source.maker.sampler.generate = emptied  # type: ignore[method-assign]
    step(source)
    assert [text.rewards for text in source.pool] == [(2.0,), (4.0,), (5.0,), (7.0,)]
    assert len(seen[0].rollouts) == 8, "they are in the table of rollouts all the same"


def test_a_pool_without_any_reward_is_refused(tmp_path: Path) -> None:
    def silent(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    _, source, _ = pool_of(tmp_path / "run", reward=RewardConfig.of(silent))
    with pytest.raises(ConfigError, match="no completion got a reward"):
        step(source)


def test_terms_by_name_and_their_total(tmp_path: Path) -> None:
    def length(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    terms = {"early": {"use": early_letters, "weight": 2.0}, "length": {"use": length, "weight": 0.5}}
    reward = RewardConfig.of({"terms": terms, "scale": "running", "clip": 0.1})
    algorithm = RewardConditioned(targets=("length", "reward", "early"), online=Online(group_size=2, updates=1))
    _, source, seen = pool_of(tmp_path / "run", algorithm=algorithm, reward=reward)
    step(source)
    texts = seen[0].inputs.completions
    for text, rewards in zip(texts, (text.rewards for text in source.pool), strict=True):
        early = early_letters([str(text)])[0]
        assert rewards == pytest.approx((len(text), 2 * early + 0.5 * len(text), early), abs=1e-5), "unscaled, uncut"


def test_the_total_is_the_total_also_where_a_term_has_its_name(tmp_path: Path) -> None:
    terms = {"reward": {"use": early_letters}, "twice": {"use": early_letters, "weight": 2}}
    reward = RewardConfig.of({"terms": terms})
    _, source, _ = pool_of(tmp_path / "run", reward=reward)
    list(source.collect(None))
    _, plain, _ = pool_of(tmp_path / "plain", reward=RewardConfig.of(early_letters))
    list(plain.collect(None))
    assert [text.rewards[0] for text in source.pool] == pytest.approx([3 * text.rewards[0] for text in plain.pool])


def test_a_name_that_no_term_has_is_refused_before_the_run(tmp_path: Path) -> None:
    algorithm = RewardConditioned(targets=("late",), online=Online())
    with pytest.raises(ConfigError, match=r"algorithm.targets names 'late'.*its terms are early"):
        pool_of(tmp_path / "run", algorithm=algorithm)
    assert not (tmp_path / "run").exists()


# ---- order -----------------------------------------------------------------------------------------------------------


def texts_of(source: PoolSource) -> list[Text]:
    return [(text.prompt_ids, text.completion_ids) for text in source.pool]


def test_the_batches_of_a_step_go_through_the_whole_pool_in_a_keyed_order(tmp_path: Path) -> None:
    algorithm = RewardConditioned(online=Online(group_size=2, updates=5, batch_size=4), target_dropout=0.0)
    _, source, _ = pool_of(tmp_path / "run", algorithm=algorithm)
    for collect in range(2):
        drawn = [text for batch in step(source) for text, _ in told(batch)]
        texts, count = texts_of(source), len(source.pool)
        orders = [epoch_order(count, seed=7, epoch=collect * 1000 + epoch) for epoch in range(3)]
        assert drawn == [texts[i] for i in (i for order in orders for i in order)][:20]
        assert Counter(drawn[:count]) == Counter(texts[: max(count, 0)] if count <= 20 else drawn)


def test_own_samples_are_drawn_once_and_used_epoch_after_epoch(tmp_path: Path) -> None:
    _, source, seen = pool_of(tmp_path / "run", algorithm=OWN, total_steps=8)
    drawn = [text for _ in range(8) for batch in step(source) for text, _ in told(batch)]
    assert len(seen) == 1 and len(source.pool) == 2 * len(PROMPTS) == 12
    assert Counter(drawn[:12]) == Counter(texts_of(source)) == Counter(drawn[12:24])
    assert drawn[:12] != drawn[12:24]
    assert source.collects == 8


def test_what_a_text_is_told_is_drawn_anew_every_time_it_is_used(tmp_path: Path) -> None:
    _, source, _ = pool_of(tmp_path / "run", algorithm=OWN)
    said: dict[Text, set[bool]] = {}
    dropped = 0
    for _ in range(60):
        for text, values in told(step(source)[0]):
            said.setdefault(text, set()).add(values[0] is None)
            dropped += values[0] is None
    assert all(kinds == {True, False} for kinds in said.values())
    assert dropped / 240 == pytest.approx(0.3, abs=0.09)  # three standard deviations


def test_statistics_count_what_was_sampled(tmp_path: Path) -> None:
    _, source, seen = pool_of(tmp_path / "run", algorithm=OWN)
    next(iter(source.collect(None)))
    stats = source.finish()
    assert (stats.samples, stats.tokens) == (12, int(seen[0].rollouts.completion_lengths.sum()))
    next(iter(source.collect(None)))
    assert source.finish().samples == 0


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [None, OWN], ids=["online", "own"])
@pytest.mark.parametrize("taken", range(1, 9))
def test_pool_and_order_survive_a_resume_in_a_step_and_between_steps(
    taken: int, algorithm: Any, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {} if algorithm is None else {"algorithm": algorithm}

    def batches(source: PoolSource, from_batch: int, stop: Callable[[int], bool]) -> list[Batch]:
        found: list[Batch] = []
        while True:
            for batch in source.collect(None):
                found.append(batch)
                ended = source.done
                if ended:
                    source.finish()
                if stop(from_batch + len(found)):
                    return found
                if ended:
                    break

    assembly, source, _ = pool_of(tmp_path / "whole", **changes)
    batches(source, 0, lambda number: number == taken)
    values, tensors = as_saved(source)
    state = json.loads(json.dumps(assembly.algorithm.state_dict()))
    assert values["collecting"] == (algorithm is None and taken % 4 != 0)
    rest = batches(source, taken, lambda number: number == 12)
    other_assembly, other, seen = pool_of(tmp_path / "resumed", **changes)
    other.load_state_dict(values, tensors)
    other_assembly.algorithm.load_state_dict(state)
    assert_same_batches(batches(other, taken, lambda number: number == 12), rest)
    assert other.pool == source.pool and as_saved(other)[0] == as_saved(source)[0]
    assert_same(as_saved(other)[1], as_saved(source)[1])
    assert len(seen) == (3 - -(-taken // 4) if algorithm is None else 0)
    assert other_assembly.algorithm.state_dict() == assembly.algorithm.state_dict()


@pytest.mark.parametrize("algorithm", [None, OWN], ids=["online", "own"])
@pytest.mark.parametrize("where", ["sampling", "reward"])
def test_an_interrupted_collect_leaves_nothing(where: str, algorithm: Any, tmp_path: Path) -> None:
    broken = [False]

    def reward(completions: list[str]) -> list[float]:
        if broken[0] and where == "reward":
            raise KeyboardInterrupt
        return early_letters(completions)

    changes: dict[str, Any] = {"reward": RewardConfig.of({"terms": {"early": {"use": reward}}})}
    changes |= {} if algorithm is None else {"algorithm": algorithm}
    assembly, source, seen = pool_of(tmp_path / "run", **changes)
    whole = pool_of(tmp_path / "whole", **changes)[1]
    if algorithm is None:
        step(source), step(whole)
    before = as_saved(source)
    sample: Any = source.maker.sampler.generate
    collected = len(seen)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if broken[0] and where == "sampling":
            raise KeyboardInterrupt
        return sample(*arguments, **named)

    source.maker.sampler.generate = interrupted  # type: ignore[method-assign]
    broken[0] = True
    with pytest.raises((KeyboardInterrupt, TropismError)):
        step(source)
    assert as_saved(source)[0] == before[0]
    assert_same(as_saved(source)[1], before[1])
    assert len(seen) == collected and len(logged_collects(assembly)) == 0
    broken[0] = False
    assert_same_batches(step(source), step(whole))


def logged_collects(assembly: Assembly) -> list[Any]:
    path = assembly.folder.path / "metrics.jsonl"
    return logged(assembly.folder.path, "collect") if path.exists() else []


# ---- texts that come with rewards ------------------------------------------------------------------------------------


def test_scored_texts_are_gone_through_epoch_by_epoch_and_told_their_rewards(tmp_path: Path) -> None:
    assembly = assemble(OFFLINE, tmp_path / "run", algorithm=RewardConditioned(scaler="none", target_dropout=0.0))
    source: Any = assembly.trainer.source
    assert isinstance(source, ScoredSource)
    rewards = {tuple(text.prompt_ids): text.rewards[0] for text in source.stream.items}
    assert sorted(rewards.values()) == sorted(float(record["reward"]) for record in SCORED)  # type: ignore[arg-type]
    rows = [row for _ in range(3) for batch in source.collect(None) for row in told(batch)]
    assert len(rows) == 12
    assert all(said == pytest.approx((rewards[text[0]],), abs=1e-7) for text, said in rows)
    assert Counter(text for text, _ in rows[:6]) == Counter(text for text, _ in rows[6:])
    assert source.finish().samples == 4


def test_scored_texts_go_on_where_they_stood(tmp_path: Path) -> None:
    source: Any = assemble(OFFLINE, tmp_path / "whole").trainer.source
    batches = [batch for _ in range(5) for batch in source.collect(None)]
    other: Any = assemble(OFFLINE, tmp_path / "other").trainer.source
    for _ in range(2):
        next(iter(other.collect(None)))
    values, tensors = as_saved(other)
    assert values["collecting"] is False and tensors == {}
    third: Any = assemble(OFFLINE, tmp_path / "third").trainer.source
    third.load_state_dict(values, tensors)
    assert_same_batches([batch for _ in range(3) for batch in third.collect(None)], batches[2:])


def test_a_batch_may_be_larger_than_the_data(tmp_path: Path) -> None:
    assembly = assemble(OFFLINE, tmp_path / "run", prompts_per_step=15)
    (batch,) = assembly.trainer.source.collect(None)
    assert len(batch) == 15


def test_every_epoch_leaves_others_out(tmp_path: Path) -> None:
    assembly = assemble(OFFLINE, tmp_path / "run", algorithm=RewardConditioned(target_dropout=0.25), prompts_per_step=6)
    source: Any = assembly.trainer.source
    epochs = [{text: said[0] is None for text, said in told(next(iter(source.collect(None))))} for _ in range(50)]
    assert len({tuple(sorted(epoch.items())) for epoch in epochs}) > 10
    share = sum(sum(epoch.values()) for epoch in epochs) / 300
    assert share == pytest.approx(0.25, abs=0.075)


def test_numbers_depend_on_seed_purpose_row_and_column_alone() -> None:
    whole = uniforms(5, "dropout", 0, 8, 3)
    assert torch.equal(whole[3:6], uniforms(5, "dropout", 3, 3, 3))
    assert torch.equal(whole[:, :1], uniforms(5, "dropout", 0, 8, 1))
    assert not bool((whole == uniforms(5, "targets", 0, 8, 3)).any())
    assert not bool((whole == uniforms(6, "dropout", 0, 8, 3)).any())
    assert float(whole[4, 2]) == slow_uniform(5, "dropout", 0, 4, 2)
    assert bool((whole >= 0).all()) and bool((whole < 1).all())


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [OWN, None], ids=["own", "online"])
def test_a_run_writes_what_it_sampled(algorithm: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {} if algorithm is None else {"algorithm": algorithm, "total_steps": 3}
    assembly = execute(assemble(ONLINE, tmp_path / "run", eval_data=PROMPTS[:2], **changes))
    collects = logged(tmp_path / "run", "collect")
    assert len(collects) == (1 if algorithm is not None else 2)
    assert [row["pool/size"] for row in collects] == ([12.0] if algorithm is not None else [8.0, 16.0])
    assert len(list((tmp_path / "run" / "rollouts").iterdir())) == len(collects)
    assert all("eval/sequence_kl" in row for row in logged(tmp_path / "run", "evaluation"))
    assert assembly.trainer.counts.samples == (12 if algorithm is not None else 16)
    texts: Sequence[ScoredText] = assembly.trainer.source.pool  # type: ignore[attr-defined]
    assert all(text.completion_ids for text in texts)
