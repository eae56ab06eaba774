"""RFT: what is kept of the pool by hand numbers and slow loops, when it grows, what is learned, and resuming."""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import enumerable_task
from tiny_runs import (
    PROMPTS,
    Setting,
    assemble,
    assert_same,
    early_letters,
    execute,
    logged,
    stop_after,
    weights_of,
)
from tropism.algorithms import RFT
from tropism.algorithms.base import RunFacts
from tropism.algorithms.pool import PooledText
from tropism.algorithms.rft import RFTAlgorithm, threshold_of
from tropism.build import Assembly
from tropism.config import Recipe, algorithm_from
from tropism.errors import ConfigError, ModelError, TropismError
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.training.config import TrainerConfig
from tropism.training.interrupt import Interrupted
from tropism.training.pool import PoolSource
from tropism.training.sources import Collected
from tropism.types import Batch

SETTING = Setting("rft", False, "llama")
RISING = RFT(start_percentile=0.2, end_percentile=0.7, improve_steps=2, group_size=4, batch_size=3)


def rft(**fields: Any) -> RFTAlgorithm:
    return RFTAlgorithm(RFT(**fields), RunFacts(total_steps=10, max_new_tokens=8))


def texts_of(*rows: tuple[int, float] | tuple[int, float, int]) -> list[PooledText]:
    """Texts from (prompt, score) or (prompt, score, completion); completions not named are all different."""
    return [
        PooledText(
            prompt_ids=(1, row[0] + 2),
            completion_ids=(row[2] if len(row) == 3 else 100 + place,),
            rewards=(row[1],),
            prompt=row[0],
            growth=0,
        )
        for place, row in enumerate(rows)
    ]


# ---- percentiles and thresholds --------------------------------------------------------------------------------------


def test_pitfall_35_the_end_percentile_is_reached_in_the_last_step_before_sampling_anew() -> None:
    config = RFT.preset("trlx")
    assert [config.percentile(step) for step in range(8)] == pytest.approx([0.7, 0.78333333, 0.86666667, 0.95] * 2)
    assert config.percentile(3) == config.percentile(7) == 0.95, "exactly"
    assert [RFT.preset("trlx/example").percentile(step) for step in range(3)] == [0.95] * 3
    assert [RFT(improve_steps=2).percentile(step) for step in range(4)] == [0.7, 0.95, 0.7, 0.95]


@pytest.mark.parametrize(
    ("scores", "percentile", "threshold"),
    [
        ([3.0, 1.0, 2.0, 5.0, 4.0], 0.5, 3.0),
        ([3.0, 1.0, 2.0, 5.0, 4.0], 0.7, 3.8),
        ([3.0, 1.0, 2.0, 5.0, 4.0], 1.0, 5.0),
        ([3.0, 1.0, 2.0, 5.0, 4.0], 0.0, 1.0),
        ([-1.0, 2.0], 0.25, -0.25),
        ([7.0], 0.9, 7.0),
        ([0.1] * 3, 0.7, 0.1),
    ],
)
def test_thresholds_by_hand(scores: list[float], percentile: float, threshold: float) -> None:
    assert threshold_of(scores, percentile) == pytest.approx(threshold, abs=1e-12)


def test_thresholds_are_numpys_quantiles_and_never_above_the_best() -> None:
    drawn = random.Random(0)
    for _ in range(200):
        scores = [drawn.choice([drawn.gauss(0, 3), 0.1, 1 / 3]) for _ in range(drawn.randint(1, 40))]
        percentile = drawn.choice([drawn.random(), 0.95, 1.0])
        found = threshold_of(scores, percentile)
        assert found == pytest.approx(float(np.quantile(scores, percentile)), abs=1e-8)
        assert min(scores) <= found <= max(scores)


def test_a_score_that_is_the_quantile_is_not_below_it_by_rounding() -> None:
    scores = [number / 7 for number in range(101)]
    assert 0.07 * 100 > 7, "in floating point"
    assert threshold_of(scores, 0.07) == scores[7]


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_pitfall_35_thresholds_are_per_prompt() -> None:
    """One prompt's rewards lie far above the other's: both keep their own best, as no threshold over both would."""
    texts = texts_of((0, 0.0), (1, 100.0), (0, 1.0), (1, 101.0), (0, 2.0), (1, 102.0), (0, 3.0), (1, 103.0))
    algorithm = rft(start_percentile=0.5, end_percentile=0.9, improve_steps=2)
    assert algorithm.choose(texts, 0) == [4, 5, 6, 7]  # 1.5 and 101.5
    assert algorithm.noted["pool/threshold"] == pytest.approx(51.5)
    assert algorithm.choose(texts, 1) == [6, 7]  # 2.7 and 102.7
    assert algorithm.noted["pool/percentile"] == 0.9
    assert algorithm.noted["pool/threshold"] == pytest.approx(52.7)
    assert (algorithm.noted["pool/kept"], algorithm.noted["pool/kept_reward"]) == (2.0, 53.0)
    assert algorithm.noted["pool/kept_prompts"] == 1.0


def test_the_worst_of_a_prompt_are_never_kept_however_many_share_their_score() -> None:
    """Right or wrong answers: the median is 0, and what reaches it would be all of them."""
    texts = texts_of(*((0, score) for score in (0.0, 0.0, 0.0, 1.0, 0.0, 1.0)))
    assert rft(start_percentile=0.0, end_percentile=0.5, improve_steps=2).choose(texts, 0) == [3, 5]


def test_a_prompt_whose_completions_all_score_the_same_is_left_out() -> None:
    texts = texts_of((0, 1.0), (1, 0.0), (0, 1.0), (1, 1.0), (2, 5.0), (0, 1.0))
    algorithm = rft(start_percentile=0.0, end_percentile=0.0, improve_steps=1)
    assert algorithm.choose(texts, 0) == [3]
    assert algorithm.noted["pool/kept_prompts"] == pytest.approx(1 / 3)
    assert algorithm.noted["pool/threshold"] == 0.0, "of prompts of which something is kept"


def test_nothing_is_kept_where_nothing_is_better() -> None:
    algorithm = rft()
    assert algorithm.choose(texts_of((0, 1.0), (0, 1.0), (1, 0.0), (1, 0.0)), 0) == []
    assert algorithm.noted == {"pool/kept": 0.0, "pool/kept_prompts": 0.0, "pool/percentile": 0.7}


def test_equal_completions_of_a_prompt_are_learned_once() -> None:
    texts = texts_of((0, 2.0, 7), (0, 2.0, 7), (1, 2.0, 7), (0, 0.0, 8), (0, 2.0, 9), (1, 0.0, 9), (1, 3.0, 7))
    algorithm = rft(start_percentile=0.0, end_percentile=0.5, improve_steps=2)
    assert algorithm.choose(texts, 0) == [0, 2, 4], "the first of each; other prompts may have the same"


def test_best_keeps_one_of_each_prompt_the_first_of_equals() -> None:
    texts = texts_of((0, 1.0), (1, 5.0), (0, 3.0), (0, 3.0), (1, 5.0), (2, -1.0))
    algorithm = rft(**RFT.presets["best-of-n"])
    assert algorithm.choose(texts, 0) == [1, 2, 5]
    assert algorithm.noted["pool/kept_reward"] == pytest.approx(7 / 3)
    assert "pool/threshold" not in algorithm.noted


def test_what_is_kept_against_a_slow_loop() -> None:
    drawn = random.Random(3)
    for trial in range(60):
        rows = [(drawn.randint(0, 4), drawn.choice([drawn.random(), 0.5]), drawn.randint(0, 5)) for _ in range(60)]
        percentile = drawn.random()
        expected: list[int] = []
        for prompt in range(5):
            mine = [place for place, row in enumerate(rows) if row[0] == prompt]
            limit = float(np.quantile([rows[place][1] for place in mine], percentile))
            lowest = sorted(rows[place][1] for place in mine)[0]
            seen = []
            for place in mine:
                _, score, completion = rows[place]
                if score > limit - 1e-9 and score != lowest and completion not in seen:
                    seen.append(completion)
                    expected.append(place)
        algorithm = rft(start_percentile=percentile, end_percentile=1.0, improve_steps=3)
        assert algorithm.choose(texts_of(*rows), 3 * trial) == sorted(expected)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_pitfall_35_the_loss_is_that_of_completion_tokens_alone(tmp_path: Path) -> None:
    """Against log-probs from the model's own logits, one text at a time; prompts and pads add nothing."""
    assembly = assemble(SETTING, tmp_path / "run")
    rows = [((5, 6, 7, 8, 9), (10, 11)), ((5,), (12, 13, 14, 2)), ((7, 6), (9,))]
    texts = [
        PooledText(prompt_ids=prompt, completion_ids=completion, rewards=(0.0,), prompt=0, growth=0)
        for prompt, completion in rows
    ]
    batch = assembly.algorithm.make_batch(texts, [0, 1, 2], torch.zeros(3, 0), None)
    assert batch.loss_mask.sum(1).tolist() == [2, 4, 1]
    expected = 0.0
    for prompt, completion in rows:
        with torch.no_grad():
            logits = assembly.policy.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        for place, token in enumerate(completion):
            expected -= float(logits[len(prompt) - 1 + place, token])
    sums, _ = assembly.algorithm.loss(assembly.policy, batch)
    assert float(sums["nll"].detach()) == pytest.approx(expected, rel=1e-5)
    assert assembly.algorithm.weight(batch) == {"nll": 7.0}


# ---- the pool in a run -----------------------------------------------------------------------------------------------


def run_of(run: Path, algorithm: RFT = RISING, **changes: Any) -> Assembly:
    return assemble(SETTING, run, algorithm=algorithm, **{"total_steps": 4, **changes})


def source_of(assembly: Assembly) -> tuple[PoolSource, list[Collected]]:
    source: Any = assembly.trainer.source
    assert isinstance(source, PoolSource)
    seen: list[Collected] = []
    source.on_collect = seen.append
    return source, seen


def step(source: PoolSource) -> list[Batch]:
    """All batches of one step, as the trainer takes them."""
    batches = []
    for batch in source.collect(None):
        batches.append(batch)
        if source.done:
            break
    source.finish()
    return batches


def learned(batches: list[Batch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and learned tokens of every text of some batches."""
    return [
        (
            tuple(batch.prompt_ids[row, batch.prompt_ids.shape[1] - int(batch.prompt_lengths[row]) :].tolist()),
            tuple(batch.completion_ids[row][batch.loss_mask[row]].tolist()),
        )
        for batch in batches
        for row in range(len(batch))
    ]


def test_it_grows_in_every_so_many_th_step_by_plain_prompts_of_the_data(tmp_path: Path) -> None:
    assembly = run_of(tmp_path / "run")
    source, seen = source_of(assembly)
    for number in range(5):
        step(source)
        assert len(seen) == 1 + number // 2 and len(source.pool) == 16 * len(seen)
    assert [collected.step for collected in seen] == [1, 3, 5]
    data = [tuple(prompt.ids) for prompt in assembly.prompts]
    for growth, collected in enumerate(seen):
        part = source.pool[16 * growth : 16 * (growth + 1)]
        rewards = early_letters([str(text) for text in collected.inputs.completions])
        for text, ids, reward in zip(part, collected.inputs.completion_ids, rewards, strict=True):
            assert (text.growth, list(text.completion_ids)) == (growth, ids)
            assert text.prompt_ids == data[text.prompt]
            assert text.rewards == pytest.approx((reward,), abs=1e-6), "neither clipped nor scaled"
        firsts = Counter(text.prompt for text in part[::4])  # the data may begin anew within a growth
        assert Counter(text.prompt for text in part) == {prompt: 4 * times for prompt, times in firsts.items()}
    assert len({text.prompt for text in source.pool}) == len(PROMPTS)


def test_a_growth_over_all_prompts(tmp_path: Path) -> None:
    source, _ = source_of(run_of(tmp_path / "run", prompts_per_step=len(PROMPTS)))
    step(source), step(source), step(source)
    assert Counter(text.prompt for text in source.pool) == dict.fromkeys(range(len(PROMPTS)), 8)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_step_goes_through_what_is_kept_so_many_times_in_batches_of_even_size(epochs: int, tmp_path: Path) -> None:
    source, _ = source_of(run_of(tmp_path / "run", replace(RISING, epochs=epochs)))
    for _ in range(4):
        batches = step(source)
        kept = [(source.pool[place].prompt_ids, source.pool[place].completion_ids) for place in source.chosen]
        assert Counter(learned(batches)) == {text: epochs * count for text, count in Counter(kept).items()}
        assert len(batches) == math.ceil(epochs * len(kept) / 3)
        sizes = {len(batch) for batch in batches}
        assert max(sizes) <= 3 and max(sizes) - min(sizes) <= 1


def test_updates_take_the_place_of_passes(tmp_path: Path) -> None:
    source, _ = source_of(run_of(tmp_path / "run", replace(RISING, updates=5)))
    for _ in range(2):
        batches = step(source)
        assert [len(batch) for batch in batches] == [3] * 5
        times = Counter(learned(batches))
        assert max(times.values()) - min(times.values() if len(times) == len(source.chosen) else [0]) <= 1


def test_the_pool_forgets_what_is_older_than_its_memory(tmp_path: Path) -> None:
    source, _ = source_of(run_of(tmp_path / "run", replace(RISING, memory=2)))
    sizes = []
    for _ in range(7):
        step(source)
        sizes.append((len(source.pool), sorted({text.growth for text in source.pool})))
    assert sizes == [(16, [0]), (16, [0]), (32, [0, 1]), (32, [0, 1]), (32, [1, 2]), (32, [1, 2]), (32, [2, 3])]


def test_what_is_logged(tmp_path: Path) -> None:
    execute(run_of(tmp_path / "run"))
    assert [row["step"] for row in logged(tmp_path / "run", "collect")] == [1, 3]
    assert [row["pool/size"] for row in logged(tmp_path / "run", "collect")] == [16.0, 32.0]
    ends = {row["step"]: row for row in logged(tmp_path / "run", "update") if "pool/percentile" in row}
    assert [ends[number]["pool/percentile"] for number in (1, 2, 3, 4)] == [0.2, 0.7, 0.2, 0.7]
    assert ends[1]["pool/kept"] > ends[2]["pool/kept"]
    assert ends[2]["pool/kept_reward"] > ends[1]["pool/kept_reward"]
    assert [row["samples"] for row in ends.values()] == [16, 16, 32, 32]


def test_pitfall_35_rewards_get_what_they_get_everywhere(tmp_path: Path) -> None:
    """Prompts, completions, ids, reasons, columns of the data and the trainer's state, in growth after growth."""
    seen: list[dict[str, Any]] = []

    def reward(completions: list[str], **named: Any) -> list[float]:
        seen.append({"completions": completions, **named})
        return early_letters(completions)

    data = [{"prompt": prompt, "answer": f"answer to {prompt}", "level": len(prompt)} for prompt in PROMPTS]
    assembly = run_of(tmp_path / "run", data=data, reward=RewardConfig.of(reward))
    source, _ = source_of(assembly)
    step(source), step(source), step(source)
    assert len(seen) == 2
    for call, number in zip(seen, (0, 2), strict=True):
        assert {"prompts", "completion_ids", "finish_reasons", "answer", "level", "trainer_state"} <= call.keys()
        assert call["answer"] == [f"answer to {prompt}" for prompt in call["prompts"]]
        assert call["level"] == [len(prompt) for prompt in call["prompts"]]
        assert call["trainer_state"]["step"] == number and len(call["completions"]) == 16


def test_pitfall_35_no_tracker_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    assembly = execute(run_of(tmp_path / "run", total_steps=2))
    assert assembly.trainer.counts.steps == 2 and logged(tmp_path / "run", "update")


@pytest.mark.parametrize("updates", [None, 3])
def test_a_step_in_which_nothing_is_better_makes_no_update(updates: int | None, tmp_path: Path) -> None:
    """Rewards of the first growth are all the same; those of the second are not, and the run goes on by itself."""

    def reward(completions: list[str], trainer_state: dict[str, int]) -> list[float]:
        return early_letters(completions) if trainer_state["step"] else [0.0] * len(completions)

    assembly = run_of(tmp_path / "run", replace(RISING, updates=updates), reward=RewardConfig.of(reward))
    before, now = weights_of(assembly), []
    step_of_optimizer = assembly.trainer.optimizer.step
    assembly.trainer.optimizer.step = lambda *a, **k: (now.append(1), step_of_optimizer(*a, **k))[1]  # type: ignore
    execute(assembly)
    rows = logged(tmp_path / "run", "update")
    for number, kept in ((1, False), (2, False), (3, True), (4, True)):
        mine = [row for row in rows if row["step"] == number]
        assert [row["optim/skipped"] for row in mine] == ([0.0] * len(mine) if kept else [1.0])
        assert (mine[-1]["pool/kept"] > 0) == kept
    assert len(now) == sum(row["optim/skipped"] == 0.0 for row in rows)
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(assembly).items())
    first, second = logged(tmp_path / "run", "collect")
    assert first["reward/zero_variance_groups"] == 1.0 > second["reward/zero_variance_groups"]


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"memory": 1, "epochs": 2}, {"updates": 3}], ids=str)
def test_resumed_after_any_update_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    algorithm = replace(RISING, **changes)
    whole = execute(run_of(tmp_path / "whole", algorithm))
    total = whole.trainer.counts.updates
    assert total > 6
    for updates in range(1, total, 2 if not changes else 5):
        run = tmp_path / f"stopped-{updates}"
        stopped = run_of(run, algorithm)
        stop_after(stopped, updates, signal.SIGTERM)
        with pytest.raises(Interrupted):
            execute(stopped)
        resumed = execute(run_of(run, algorithm, resume=True))
        assert_same(weights_of(whole), weights_of(resumed))
        assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
        source, other = source_of(whole)[0], source_of(resumed)[0]
        assert source.pool == other.pool


@pytest.mark.parametrize("where", ["sampling", "reward", "choosing"])
def test_an_interrupted_growth_leaves_nothing(where: str, tmp_path: Path) -> None:
    broken = [False]

    def reward(completions: list[str]) -> list[float]:
        if broken[0] and where == "reward":
            raise KeyboardInterrupt
        return early_letters(completions)

    changes = {"reward": RewardConfig.of(reward)}
    source, _ = source_of(run_of(tmp_path / "run", **changes))
    whole, _ = source_of(run_of(tmp_path / "whole", **changes))
    for _ in range(2):
        step(source), step(whole)
    before = json.dumps(source.state_dict()[0])
    sample: Any = source.maker.sampler.generate

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if broken[0] and where == "sampling":
            raise KeyboardInterrupt
        return sample(*arguments, **named)

    choose = source.algorithm.choose

    def choosing(*arguments: Any) -> Any:
        if broken[0] and where == "choosing":
            raise KeyboardInterrupt
        return choose(*arguments)

    source.algorithm.choose = choosing  # type: ignore[method-assign]
    source.maker.sampler.generate = interrupted  # type: ignore[method-assign]
    broken[0] = True
    with pytest.raises((KeyboardInterrupt, TropismError)):
        step(source)
    assert json.dumps(source.state_dict()[0]) == before and len(source.pool) == 16
    broken[0] = False
    assert learned(step(source)) == learned(step(whole))


def test_a_pool_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    source, _ = source_of(run_of(tmp_path / "run"))
    step(source)
    values, tensors = source.state_dict()
    earlier = {name: tensor for name, tensor in tensors.items() if name not in ("prompts", "growths")}
    with pytest.raises(ModelError, match="earlier version"):
        source_of(run_of(tmp_path / "other"))[0].load_state_dict(values, earlier)


# ---- what it learns --------------------------------------------------------------------------------------------------


def first_token(assembly: Assembly) -> list[float]:
    """The probabilities of the one token that follows the prompt "a"."""
    with torch.no_grad():
        logits: torch.Tensor = assembly.policy.model(input_ids=torch.tensor([[0]])).logits[0, -1]
    probabilities: list[float] = logits.double().softmax(-1).tolist()
    return probabilities


def test_distilling_the_best_of_n_gives_the_distribution_of_the_best_of_n(tmp_path: Path) -> None:
    """One token out of four, of which one is rewarded: it comes with 1 - (1 - p)^n, each other with p_y (1 - p)^(n-1),
    as enumerating all n-tuples gives."""
    n, records, arm = 4, 400, 1
    recipe = Recipe(
        model=(enumerable_task.model(), enumerable_task.tokenizer()),
        algorithm=RFT.preset("best-of-n", group_size=n, updates=100, batch_size=records),
        data=["a"] * records,
        reward=RewardConfig.of(lambda completion_ids: [float(ids[0] == arm) for ids in completion_ids]),
        run=str(tmp_path / "run"),
        total_steps=1,
        prompts_per_step=records,
        sampling=Sampling(max_new_tokens=1, batch_size=1024),
        trainer=TrainerConfig(learning_rate=0.01, micro_batch_tokens=10_000, progress=False),
    )
    assembly = Assembly(recipe)
    source, _ = source_of(assembly)
    assembly.trainer.after_update = lambda metrics, ended: False
    before = first_token(assembly)
    assembly.trainer.fit(1)
    after = first_token(assembly)
    expected = [0.0] * 4
    for drawn in itertools.product(range(4), repeat=n):
        expected[arm if arm in drawn else drawn[0]] += math.prod(before[token] for token in drawn)
    assert expected[arm] == pytest.approx(1 - (1 - before[arm]) ** n)
    assert expected[arm] > 3 * before[arm], "there is something to be learned"
    kept = Counter(source.pool[place].completion_ids[0] for place in source.chosen)
    for token in range(4):
        assert after[token] == pytest.approx(kept[token] / records, abs=0.01), "it has learned what was kept"
        deviation = math.sqrt(expected[token] * (1 - expected[token]) / records)
        assert abs(kept[token] / records - expected[token]) < 4 * deviation, "what was kept is the best of n"


@pytest.mark.learning
@pytest.mark.parametrize("algorithm", [RISING, RFT.preset("best-of-n")], ids=["rft", "best-of-n"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_held_out_reward_rises(algorithm: RFT, adapter: bool, tmp_path: Path) -> None:
    execute(
        assemble(
            Setting("rft", adapter, "gpt2" if adapter else "llama"),
            tmp_path / "run",
            algorithm=replace(algorithm, group_size=8, epochs=2, batch_size=8),
            reward=RewardConfig.of(early_letters),
            eval_data=PROMPTS * 8,
            total_steps=10,
            trainer={"learning_rate": 2e-2 if adapter else 5e-3},
        )
    )
    before, after = (row["eval/reward"] for row in logged(tmp_path / "run", "evaluation"))
    assert after > before + 0.25


# ---- settings --------------------------------------------------------------------------------------------------------


def test_presets_hold_the_numbers_of_their_source() -> None:
    trlx, example = RFT.preset("trlx"), RFT.preset("trlx/example")
    assert (trlx.start_percentile, trlx.end_percentile, trlx.improve_steps, trlx.group_size) == (0.7, 0.95, 4, 32)
    assert (example.start_percentile, example.end_percentile) == (0.9, 0.95)
    assert (example.improve_steps, example.group_size) == (1, 4)
    assert not trlx.needs_reference and trlx.on_policy and trlx.conditioning is None
    size = trlx.step_size(5, 20)
    assert (size.prompts, size.completions, size.every) == (5, 160, 4)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"start_percentile": -0.1}, "start_percentile"),
        ({"end_percentile": 1.1}, "end_percentile"),
        ({"start_percentile": 0.96}, "the end not below the start"),
        ({"improve_steps": 0}, "improve_steps"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 1, "memory": 1}, "group_size must be at least 2"),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"memory": 0}, "memory"),
        ({"updates": 0}, "updates"),
        ({"updates": 2, "epochs": 2}, "takes the place of epochs"),
        ({"keep": "best"}, "preset best-of-n"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RFT(**wrong)


@pytest.mark.parametrize("given", ["best-of-n", {"name": "best-of-n", "n": 4}])
def test_training_by_best_of_n_says_what_to_call_instead(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"best-of-n trains nothing.*policy\.best_of.*--best-of.*preset: best-of-n"):
        algorithm_from(given)
