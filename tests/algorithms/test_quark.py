"""Quark: which token stands before which text, and a loss that agrees with slow sums over the whole vocabulary."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model
from tiny_runs import PROMPTS, Setting, assemble, assert_same, early_letters, execute, logged, stop_after, weights_of
from tropism.algorithms import Quark
from tropism.algorithms.base import RunFacts
from tropism.algorithms.quark import QuarkAlgorithm, QuarkBatch, quantiles_of
from tropism.build import Assembly
from tropism.errors import ConfigError
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.ops.slots import slot_id
from tropism.recipe_processes import prepared
from tropism.rewards import RewardConfig
from tropism.targets.conditioner import Conditioner
from tropism.training.config import EvaluationConfig
from tropism.training.interrupt import Interrupted
from tropism.training.pool import PoolSource
from tropism.types import ScoredText, Tokens, pad_rows

SMALL = Quark(quantiles=3, group_size=2, updates=3, batch_size=5)
"""Three updates between two samplings of eight completions."""
TEXTS = [
    ScoredText(prompt_ids=(5, 6), completion_ids=(8, 9, 2), rewards=(0.25,)),
    ScoredText(prompt_ids=(7,), completion_ids=(20, 31), rewards=(0.75,)),
    ScoredText(prompt_ids=(12, 13, 14), completion_ids=(3,), rewards=(0.5,)),
]
TOKENS_OF_TEXTS = [0.0, 2.0, 1.0]
"""What the slots before them hold: 2 is that of the best of three quantiles."""


class Hearing:
    """A scorer that keeps what it is asked about."""

    def __init__(self) -> None:
        self.heard: list[Tokens] = []

    def hidden_states(self, tokens: Tokens) -> Tensor:
        self.heard.append(tokens)
        return torch.zeros(*tokens.completion_ids.shape, 4)


def built(config: Quark = SMALL) -> QuarkAlgorithm:
    conditioner = Conditioner(config.conditioning)
    return config.build(RunFacts(total_steps=10, max_new_tokens=4, conditioner=conditioner))


def batch_of(method: QuarkAlgorithm, reference: Any = None) -> QuarkBatch:
    method.take_scores([text.rewards for text in TEXTS])
    return method.make_batch(TEXTS, range(len(TEXTS)), torch.zeros(len(TEXTS), 1), reference)


def run_of(path: Path, *, adapter: bool = False, resume: bool = False, **changes: Any) -> Assembly:
    setting = Setting("quark", adapter, "gpt2" if adapter else "llama")
    return assemble(setting, path, resume=resume, **{"algorithm": SMALL, **changes})


# Quantiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([3.0, 9.0, 1.0, 7.0, 5.0, 2.0, 8.0], 5, [4, 0, 4, 2, 3, 4, 1]),  # one each, and what is left over to the worst
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3, [2, 2, 1, 1, 0, 0]),
        ([0.0, 5.0, 5.0, 0.0, 5.0, 0.0, 0.0], 3, [1, 0, 0, 2, 1, 2, 2]),  # of equal ones the older are better
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 0, 1, 1]),
        ([-1.5, -0.5], 2, [1, 0]),
    ],
)
def test_quantiles_by_hand(scores: list[float], count: int, expected: list[int]) -> None:
    assert quantiles_of(torch.tensor(scores), count).tolist() == expected


@pytest.mark.parametrize(("shape", "count"), [((4,), 5), ((4,), 1), ((2, 2), 2)])
def test_scores_that_fill_no_quantiles_are_refused(shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(ValueError, match="quantiles need"):
        quantiles_of(torch.zeros(shape), count)


def test_the_whole_pool_is_ranked_anew_when_it_grows() -> None:
    method = built()
    assert method.take_scores([(0.5,), (0.1,), (0.9,)]) == {
        "pool/quantile_0": pytest.approx(0.9),
        "pool/quantile_1": pytest.approx(0.5),
        "pool/quantile_2": pytest.approx(0.1),
    }
    assert method.quantiles == [1, 2, 0] and method.conditioner.default == 0.9
    noted = method.take_scores([(0.5,), (0.1,), (0.9,), (0.7,), (1.0,), (0.6,), (0.2,)])
    assert method.quantiles == [2, 2, 0, 1, 0, 1, 2] and method.conditioner.default == 1.0
    assert noted["pool/quantile_2"] == pytest.approx((0.5 + 0.1 + 0.2) / 3)
    assert method.conditioner.seen[0].range == (0.1, 1.0)


def test_a_step_that_cannot_fill_the_quantiles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"4 x 1 completions, which do not fill 5 quantiles; raise prompts_per_step"):
        run_of(tmp_path / "run", algorithm=Quark(group_size=1))
    with pytest.raises(ConfigError, match="only 2 completions got a reward"):
        built().take_scores([(0.5,), (0.1,)])
    with pytest.raises(ConfigError, match="all 3 training rewards"):
        built().take_scores([(0.5,)] * 3)


# Tokens --------------------------------------------------------------------------------------------------------------


def test_the_first_sampling_has_no_token_and_all_others_the_best() -> None:
    method = built()
    assert method.ask(torch.rand(3)) == [()] * 3
    method.take_scores([text.rewards for text in TEXTS])
    assert method.ask(torch.rand(3)) == [(slot_id(0, 2.0),)] * 3
    # The same in the saved model, where nothing is asked for.
    assert method.conditioner.prefix(None) == (slot_id(0, 2.0),)


def test_each_text_stands_after_the_token_of_its_own_quantile_and_the_reference_sees_none() -> None:
    method, reference = built(), Hearing()
    method.take_scores([text.rewards for text in TEXTS])
    batch = method.make_batch([TEXTS[1], TEXTS[0]], [1, 0], torch.zeros(2, 1), reference)  # type: ignore[arg-type]
    assert batch.prompt_ids.tolist() == [[0, slot_id(0, 2.0), 7], [slot_id(0, 0.0), 5, 6]]
    assert batch.prompt_lengths.tolist() == [2, 3]
    assert batch.completion_ids.tolist() == [[20, 31, 0], [8, 9, 2]]
    assert batch.loss_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.reference_hidden is not None and batch.reference_hidden.shape == (2, 3, 4)
    (heard,) = reference.heard
    assert heard.prompt_ids.tolist() == [[0, 7], [5, 6]] and heard.prompt_lengths.tolist() == [1, 2]
    assert torch.equal(heard.completion_ids, batch.completion_ids)
    assert batch_of(built(replace(SMALL, kl_coef=0.0))).reference_hidden is None


@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_samples_as_it_learns(adapter: bool, tmp_path: Path) -> None:
    """Round by round: what is sampled from, what is learned after what, and what evaluation asks for."""

    def only_the_best(completions: list[str]) -> list[float]:
        """1 for a single completion, so that the 95th percentile of the pool is no reward of the best quantile."""
        values = early_letters(completions)
        return [float(place == values.index(max(values))) for place in range(len(values))]

    assembly = run_of(
        tmp_path / "run",
        adapter=adapter,
        reward=RewardConfig.of({"terms": {"rare": {"use": only_the_best}}}),
        data=PROMPTS * 10,
        prompts_per_step=40,
        eval_data=PROMPTS[:3],
        trainer={"evaluation": EvaluationConfig(every=1)},
    )
    maker: Any = assembly.maker
    asked: list[tuple[str, set[int]]] = []
    whole = type(maker).sample

    def sample(self: Any, prompts: Sequence[Any], n: int = 1, **key: Any) -> Any:
        asked.append((key.get("purpose", "training"), {prompt.ids[0] for prompt in prompts if prompt.ids[0] < 0}))
        assert all(min(prompt.ids[1:], default=0) >= 0 for prompt in prompts)
        return whole(self, prompts, n, **key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(maker), "sample", sample)
        execute(assembly)
    best = {slot_id(0, 2.0)}
    assert asked == [
        ("evaluation", set()),
        ("training", set()),
        ("evaluation", best),
        ("training", best),
        ("evaluation", best),
    ]
    assert assembly.conditioner is not None and assembly.conditioner.seen[0].quantile(0.95) == 0.0
    updates = logged(tmp_path / "run", "update")
    assert len(updates) == 6
    for update in updates:
        parts = update["loss/kl"], update["loss/entropy"]
        assert parts == pytest.approx((0.05 * update["policy/ref_kl"], -0.06 * update["policy/entropy"]), rel=1e-5)
        assert update["policy/ref_kl"] > 0 and update["policy/entropy"] > 0
    collects = logged(tmp_path / "run", "collect")
    assert [row["pool/size"] for row in collects] == [80.0, 160.0]
    assert all(row["pool/quantile_0"] > row["pool/quantile_2"] for row in collects)


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_before_the_first_update_the_kl_of_texts_without_a_token_is_nothing(adapter: bool, tmp_path: Path) -> None:
    assembly = run_of(tmp_path / "run", adapter=adapter)
    assembly.run.begin()
    batch: QuarkBatch = next(iter(assembly.trainer.source.collect(assembly.policy)))
    told, _ = assembly.algorithm.loss(assembly.policy, batch)
    assert float(told["kl"].detach()) > 1e-3
    rows = [row[-n + 1 :].tolist() for row, n in zip(batch.prompt_ids, batch.prompt_lengths.tolist(), strict=True)]
    assert all(min(row) >= 0 for row in rows)
    plain = replace(batch, prompt_ids=pad_rows(rows, left=True), prompt_lengths=batch.prompt_lengths - 1)
    sums, _ = assembly.algorithm.loss(assembly.policy, plain)
    assert abs(float(sums["kl"].detach())) < 1e-6


def test_the_entropy_bonus_raises_the_entropy_and_the_kl_pulls_back(tmp_path: Path) -> None:
    """One update by each part alone, told from one by the likelihood alone."""
    after: dict[str, dict[str, float]] = {}
    for name, coefs in {"nll": (0.0, 0.0), "kl": (50.0, 0.0), "entropy": (0.0, 50.0)}.items():
        config = replace(SMALL, kl_coef=coefs[0] or 1e-9, entropy_coef=coefs[1], updates=15, batch_size=8)
        run = tmp_path / name
        execute(run_of(run, algorithm=config, total_steps=1))
        after[name] = logged(run, "update")[-1]
    assert after["entropy"]["policy/entropy"] > after["nll"]["policy/entropy"] + 0.3
    assert after["kl"]["policy/ref_kl"] < 0.3 * after["nll"]["policy/ref_kl"]


def test_a_resumed_run_has_the_same_pool_quantiles_and_scale(tmp_path: Path) -> None:
    """After the last update of a step, and in the middle of the next."""
    whole = execute(run_of(tmp_path / "whole"))
    assert whole.conditioner is not None
    for updates in (3, 4):
        stopped = run_of(tmp_path / f"stopped-{updates}")
        stop_after(stopped, updates, signal.SIGTERM)
        with pytest.raises(Interrupted):
            execute(stopped)
        resumed = run_of(tmp_path / f"stopped-{updates}", resume=True)
        assert len(resumed.algorithm.quantiles) == (8 if updates == 3 else 16)
        execute(resumed)
        source, other = whole.trainer.source, resumed.trainer.source
        assert isinstance(source, PoolSource) and isinstance(other, PoolSource)
        assert len(source.pool) == 16 and other.pool == source.pool
        assert resumed.algorithm.quantiles == whole.algorithm.quantiles
        assert resumed.conditioner is not None and resumed.conditioner.to_dict() == whole.conditioner.to_dict()
        assert_same(weights_of(whole), weights_of(resumed))


@pytest.mark.learning
def test_the_held_out_reward_rises(tmp_path: Path) -> None:
    execute(
        run_of(
            tmp_path / "run",
            algorithm=Quark(group_size=8, updates=10, batch_size=24, kl_coef=0.01, entropy_coef=0.01),
            reward=RewardConfig.of(early_letters),
            eval_data=PROMPTS * 8,
            total_steps=8,
            trainer={"learning_rate": 6e-3},
        )
    )
    before, after = (row["eval/reward"] for row in logged(tmp_path / "run", "evaluation"))
    assert after > before + 0.25


# Settings ------------------------------------------------------------------------------------------------------------


def test_the_paper_preset_holds_the_numbers_of_its_source() -> None:
    paper = Quark.preset("paper")
    assert (paper.quantiles, paper.updates, paper.batch_size) == (5, 500, 128)
    assert (paper.kl_coef, paper.entropy_coef) == (0.05, 0.06)
    assert paper.needs_reference and paper.needs_exact_kl and not replace(paper, kl_coef=0.0).needs_reference
    assert (paper.conditioning.mechanism, paper.conditioning.bins) == ("token", 5)
    plan = paper.plan(8)
    assert (plan.once, plan.updates, plan.batch_size, plan.per_prompt) == (False, 500, 128, 1)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"quantiles": 1}, "quantiles"),
        ({"group_size": 0}, "group_size"),
        ({"updates": 0}, "updates"),
        ({"batch_size": 0}, "batch_size"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"entropy_coef": -0.1}, "entropy_coef"),
        ({"slot_rate": 0.0}, "slot_rate"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Quark(**wrong)


def test_sharded_weights_with_a_copied_reference_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_model("gpt2"))
    reference = Reference(policy)
    policy.reference_logits = reference.projection()
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    monkeypatch.setattr("tropism.recipe_processes.sharding", lambda: plugin)
    monkeypatch.setattr("tropism.recipe_processes.shard", lambda *_, **__: None)
    accelerator: Any = SimpleNamespace(num_processes=2)
    with pytest.raises(ConfigError, match="train an adapter"):
        prepared(policy, reference, accelerator)
    policy.reference_logits = None
    assert prepared(policy, reference, accelerator) is policy
