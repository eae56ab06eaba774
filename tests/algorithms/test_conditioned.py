"""Reward-conditioned training: what texts are told, which tokens are learned, and what is asked for online."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from given_numbers import Numbers
from slots_by_hand import logits_by_hand, policy_with, slot_vectors
from slow_sampling import log_softmax
from tropism.algorithms import ALGORITHMS, Online, RewardConditioned
from tropism.algorithms.base import RunFacts
from tropism.algorithms.conditioned import RewardConditionedAlgorithm, WeightedBatch
from tropism.algorithms.pool import PoolPlan
from tropism.errors import ConfigError
from tropism.ops.slots import slot_id
from tropism.targets.conditioner import Conditioner
from tropism.types import ScoredText

BOS = 1
TEXTS = [
    ScoredText(prompt_ids=(BOS, 7, 8), completion_ids=(9, 10, 2), rewards=(0.5,)),
    ScoredText(prompt_ids=(11,), completion_ids=(12, 2), rewards=(-1.0,)),
    ScoredText(prompt_ids=(), completion_ids=(13, 14, 15, 2), rewards=(2.0,)),
    ScoredText(prompt_ids=(BOS,), completion_ids=(16,), rewards=(0.0,)),
]
"""After a bos, without one, a plain text without a prompt, and a plain text after its bos."""

Row = tuple[list[int], list[int], list[float]]
"""Prompt, completion, weights of the completion's tokens."""


def method(texts: Sequence[ScoredText] = TEXTS, **fields: Any) -> RewardConditionedAlgorithm:
    """The method with the rewards of these texts, which slots hold as they are."""
    config = RewardConditioned(**{"scaler": "none", "target_dropout": 0.0, **fields})
    conditioner = Conditioner(config.conditioning, encode=lambda text: [ord(c) for c in text], bos_id=BOS)
    built = config.build(RunFacts(total_steps=10, max_new_tokens=4, conditioner=conditioner))
    built.take_scores([text.rewards for text in texts])
    return built


def batch_of(built: RewardConditionedAlgorithm, texts: Sequence[ScoredText] = TEXTS, uniform: float = 1.0) -> Any:
    uniforms = torch.full((len(texts), len(texts[0].rewards)), uniform)
    return built.make_batch(texts, range(len(texts)), uniforms, None)


def rows_of(batch: WeightedBatch) -> list[Row]:
    rows = []
    wide = batch.prompt_ids.shape[1]
    for index in range(len(batch)):
        prompt, completion = int(batch.prompt_lengths[index]), int(batch.completion_lengths[index])
        assert not batch.loss_mask[index, completion:].any()
        rows.append(
            (
                batch.prompt_ids[index, wide - prompt :].tolist(),
                batch.completion_ids[index, :completion].tolist(),
                batch.token_weights[index, :completion].tolist(),
            )
        )
    return rows


def slot(value: float | None, reward: int = 0) -> int:
    return slot_id(reward, value)


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_each_text_is_told_its_reward_and_its_completion_is_learned() -> None:
    assert rows_of(batch_of(method())) == [
        ([slot(0.5), BOS, 7, 8], [9, 10, 2], [1, 1, 1]),
        ([slot(-1.0), 11], [12, 2], [1, 1]),
        ([slot(2.0)], [13, 14, 15, 2], [1, 1, 1, 1]),
        ([slot(0.0), BOS], [16], [1]),
    ]


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_prompts_are_learned_as_much_as_asked_for_but_not_their_bos(weight: float) -> None:
    w = weight
    assert rows_of(batch_of(method(prompt_loss_weight=weight))) == [
        ([slot(0.5), BOS], [7, 8, 9, 10, 2], [w, w, 1, 1, 1]),
        ([slot(-1.0)], [11, 12, 2], [w, 1, 1]),
        ([slot(2.0)], [13, 14, 15, 2], [1, 1, 1, 1]),
        ([slot(0.0), BOS], [16], [1]),
    ]


def test_written_rewards_are_not_learned() -> None:
    w = 0.5
    assert rows_of(batch_of(method(mechanism="text", prompt_loss_weight=w))) == [
        ([BOS, *map(ord, "reward: 0.50\n")], [7, 8, 9, 10, 2], [w, w, 1, 1, 1]),
        ([*map(ord, "reward: -1.00\n")], [11, 12, 2], [w, 1, 1]),
        ([*map(ord, "reward: 2.00\n")], [13, 14, 15, 2], [1, 1, 1, 1]),
        ([BOS, *map(ord, "reward: 0.00\n")], [16], [1]),
    ]


def test_a_text_that_nothing_stands_before_is_read_from_its_first_token() -> None:
    """Where the reward is written, and left out."""
    built = method(mechanism="text", target_dropout=0.9)
    assert rows_of(batch_of(built, TEXTS, 0.0)) == [
        ([BOS, 7, 8], [9, 10, 2], [1, 1, 1]),
        ([11], [12, 2], [1, 1]),
        ([13], [14, 15, 2], [1, 1, 1]),
        ([BOS], [16], [1]),
    ]
    alone = [ScoredText(prompt_ids=(), completion_ids=(5,), rewards=(1.0,)), TEXTS[0]]
    assert rows_of(batch_of(built, alone, 0.0))[0] == ([5], [], [])


@pytest.mark.parametrize("mechanism", ["linear", "add", "replace", "token", "text"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_no_slot_is_ever_learned(mechanism: Any, weight: float) -> None:
    for uniform in (0.0, 1.0):
        built = method(mechanism=mechanism, prompt_loss_weight=weight, target_dropout=0.5)
        batch = batch_of(built, TEXTS, uniform)
        assert bool((batch.completion_ids >= 0).all())
        assert torch.equal(batch.loss_mask, batch.token_weights > 0)
        assert bool((batch.loss_mask <= batch.completion_mask).all())


def test_several_rewards_are_dropped_each_by_itself() -> None:
    texts = [dataclasses.replace(text, rewards=(text.rewards[0], 10.0 * i)) for i, text in enumerate(TEXTS)]
    built = method(texts, targets=("a", "b"), target_dropout=0.25)
    uniforms = torch.tensor([[0.1, 0.9], [0.25, 0.2], [0.0, 0.1], [0.3, 0.9]])
    batch = built.make_batch(texts, range(4), uniforms, None)
    slots = [row[0][:2] for row in rows_of(batch)]
    assert slots == [
        [slot(None), slot(0.0, 1)],
        [slot(-1.0), slot(None, 1)],
        [slot(None), slot(None, 1)],
        [slot(0.0), slot(30.0, 1)],
    ]


# ---- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_is_that_of_a_slow_loop(family: str, weight: float) -> None:
    policy = policy_with(family)
    built = method(prompt_loss_weight=weight)
    batch = batch_of(built)
    total = weights = 0.0
    assert policy.conditioning is not None
    with torch.no_grad():
        sums, ratios = built.loss(policy, batch)
        for text in TEXTS:
            vectors = slot_vectors(policy.conditioning, policy.model, text.rewards)
            ids = [*text.prompt_ids, *text.completion_ids]
            logits = logits_by_hand(policy.model, vectors, ids)
            for t, token in enumerate(ids):
                if t < len(text.prompt_ids):
                    w = 0.0 if token == BOS else weight
                else:
                    w = 1.0
                total -= w * log_softmax(logits[t].tolist())[token]  # one slot stands before token t
                weights += w
    assert float(sums["nll"]) == pytest.approx(total, rel=1e-5)
    assert built.weight(batch) == {"nll": pytest.approx(weights)}
    assert ratios == {}


def test_the_loss_asks_for_learned_tokens_alone() -> None:
    built = method()
    batch = batch_of(built)
    answers = torch.arange(16.0).view(4, 4)
    numbers = Numbers(-answers)
    sums, _ = built.loss(numbers, batch)
    assert torch.equal(numbers.asked["mask"], batch.loss_mask)
    assert float(sums["nll"]) == (0 + 1 + 2) + (4 + 5) + (8 + 9 + 10 + 11) + 12


# ---- what is asked for -----------------------------------------------------------------------------------------------


def test_the_upper_end_of_the_pool_is_asked_for() -> None:
    texts = [dataclasses.replace(TEXTS[1], rewards=(float(n),)) for n in (3, 9, 1, 7, 8, 0, 2, 5, 4, 6)]
    built = method(texts, online=Online(top=0.3))
    drawn = built.ask(torch.tensor([0.0, 0.33, 0.34, 0.66, 0.67, 0.999]))
    assert drawn == [(slot(9.0),), (slot(9.0),), (slot(8.0),), (slot(8.0),), (slot(7.0),), (slot(7.0),)]
    best = method(texts, online=Online(top=0.001)).ask(torch.rand(20, generator=torch.Generator().manual_seed(0)))
    assert set(best) == {(slot(9.0),)}


def test_of_several_rewards_those_of_one_text_are_asked_for_together() -> None:
    """Ranks over both: a text that is good in both beats one that is the best in one."""
    pairs = [(0.0, 300.0), (1.0, 100.0), (0.9, 200.0), (0.5, 150.0), (0.1, 0.0)]
    texts = [dataclasses.replace(TEXTS[1], rewards=pair) for pair in pairs]
    built = method(texts, targets=("a", "b"), online=Online(top=0.2))
    assert built.ask(torch.tensor([0.0, 0.99])) == [(slot(0.9), slot(200.0, 1))] * 2


def test_nothing_is_asked_for_while_there_is_no_pool() -> None:
    config = RewardConditioned(online=Online())
    built = config.build(RunFacts(total_steps=1, max_new_tokens=4, conditioner=Conditioner(config.conditioning)))
    assert built.ask(torch.tensor([0.1, 0.5])) == [(), ()]


def test_what_was_seen_grows_with_the_pool_and_the_scale_stays() -> None:
    built = method(scaler="min_max", online=Online())
    assert built.conditioner.seen[0].range == (-1.0, 2.0)
    scaler = built.conditioner.scalers
    built.take_scores([*(text.rewards for text in TEXTS), (5.0,)])
    assert built.conditioner.seen[0].range == (-1.0, 5.0)
    assert built.conditioner.scalers == scaler
    other = method(TEXTS[:2], scaler="min_max", online=Online())
    other.load_state_dict(built.state_dict())
    assert other.conditioner.to_dict() == built.conditioner.to_dict()


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_what_it_reads_and_what_a_step_is() -> None:
    offline, own, online = (
        RewardConditioned(),
        RewardConditioned(samples_per_prompt=3),
        RewardConditioned(online=Online(group_size=5, updates=7, batch_size=11)),
    )
    assert [config.reads for config in (offline, own, online)] == ["scored", "prompts", "prompts"]
    assert [config.on_policy for config in (offline, own, online)] == [False, False, True]
    assert own.plan(4) == PoolPlan(per_prompt=3, once=True, updates=1, batch_size=4)
    assert online.plan(4) == PoolPlan(per_prompt=5, once=False, updates=7, batch_size=11)
    assert [(s.prompts, s.completions, s.batch) for s in (own.step_size(4, 100), online.step_size(4, 100))] == [
        (100, 300, 4),
        (4, 20, 11),
    ]
    assert ALGORITHMS["conditioned"] is RewardConditioned
    assert offline.head_rate == 3.0 and not offline.needs_reference


def test_the_preset_is_the_original() -> None:
    config = RewardConditioned.preset("conditionme")
    assert (config.scaler, config.prompt_loss_weight, config.target_dropout, config.mechanism) == (
        "none",
        1.0,
        0.0,
        "linear",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mechanism": "liner"}, "mechanism is 'liner'; choose one of linear, add, replace, token, text"),
        ({"scaler": "z"}, "scaler is 'z'"),
        ({"direction": "up"}, "direction is 'up'"),
        ({"bins": 1}, "bins must be at least 2"),
        ({"targets": ()}, "at least one reward"),
        ({"targets": ("a", "a")}, "names a reward twice"),
        ({"targets": ("a", " ")}, "none of them empty"),
        ({"target_dropout": 1.0}, "target_dropout"),
        ({"target_dropout": -0.1}, "target_dropout"),
        ({"prompt_loss_weight": -1.0}, "prompt_loss_weight"),
        ({"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"samples_per_prompt": 1, "online": Online()}, "leave one of them out"),
        ({"max_length": 2}, "max_length"),
        ({"slot_rate": 0.0}, "slot_rate"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConditioned(**fields)


@pytest.mark.parametrize("fields", [{"group_size": 0}, {"updates": 0}, {"batch_size": 0}, {"top": 0.0}, {"top": 1.1}])
def test_wrong_online_settings_are_refused(fields: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        Online(**fields)


def test_scores_that_are_all_equal_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"all 2 training rewards of 'reward' are 0\.5"):
        method([TEXTS[0], TEXTS[0]])


def test_before_there_is_a_pool_an_earlier_run_says_what_to_ask_for() -> None:
    config = RewardConditioned(scaler="none", online=Online(top=0.5))
    conditioner = Conditioner(config.conditioning, bos_id=BOS)
    built = config.build(RunFacts(total_steps=10, max_new_tokens=4, conditioner=conditioner))
    uniforms = torch.tensor([0.0, 0.5, 1.0])
    assert built.ask(uniforms) == [(), (), ()]
    conditioner.fit([(float(number),) for number in range(101)])
    assert built.ask(uniforms) == [(slot(50.0),), (slot(75.0),), (slot(100.0),)]


@pytest.mark.parametrize(("mechanism", "follows"), [("token", True), ("linear", False)])
def test_tokens_follow_an_online_pool_and_scales_stay(mechanism: Any, follows: bool) -> None:
    config = RewardConditioned(mechanism=mechanism, bins=2, online=Online())
    conditioner = Conditioner(config.conditioning, bos_id=BOS)
    built = config.build(RunFacts(total_steps=10, max_new_tokens=4, conditioner=conditioner))
    built.take_scores([(0.0,), (1.0,), (2.0,), (3.0,)])
    before = conditioner.prefix(3.5, warn=False)
    built.take_scores([(0.0,), (1.0,), (2.0,), (3.0,), *[(float(n),) for n in range(4, 12)]])
    assert (conditioner.prefix(3.5, warn=False) != before) is follows
    assert conditioner.seen[0].range == (0.0, 11.0)


def test_names_are_a_list() -> None:
    assert RewardConditioned(targets=["a", "b"]).targets == ("a", "b")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"targets is the text 'score'; give a list of names: \[score\]"):
        RewardConditioned(targets="score")  # type: ignore[arg-type]
