"""ILQL: its four terms against a loop over tokens, its targets, and a task whose values are known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_runs import EPISODES, Setting, assemble, execute, logged, make_recipe
from tropism.algorithms import ALGORITHMS, ILQL
from tropism.algorithms.base import RunFacts
from tropism.algorithms.ilql import ILQLAlgorithm
from tropism.build import Assembly, run_recipe
from tropism.episodes import Episode, EpisodeBatch, collate_episodes
from tropism.models.policy import Policy
from valued_policies import by_hand, last_hidden, valued_policy

EPISODE = {
    "several turns": Episode(
        prompt_ids=(5, 9, 11),
        completion_ids=(8, 30, 12, 13, 14, 2),
        loss_mask=(True, True, False, False, True, True),
        rewards=(0.5, -1.0, 0.0, 0.0, 0.25, 2.0),
    ),
    "one turn": Episode(
        prompt_ids=(7,), completion_ids=(20, 21, 22, 2), loss_mask=(True,) * 4, rewards=(0.0, 0.0, 0.0, -1.5)
    ),
    "one action": Episode(prompt_ids=(6, 6), completion_ids=(2,), loss_mask=(True,), rewards=(3.0,)),
}


def method(**fields: Any) -> ILQLAlgorithm:
    return ILQL(**fields).build(RunFacts(total_steps=10, max_new_tokens=4))


def by_loop(policy: Policy, episodes: list[Episode], config: ILQL) -> dict[str, Tensor]:
    """The sums of the four terms, token by token, from whole tables of values."""
    heads: Any = policy.q_heads
    zero = torch.zeros(())
    sums = {"q": zero, "v": zero, "cql": zero, "awac": zero}
    for episode in episodes:
        hidden = last_hidden(policy, [*episode.prompt_ids, *episode.completion_ids])
        actions = [place for place, action in enumerate(episode.loss_mask) if action]
        for number, place in enumerate(actions):
            token = episode.completion_ids[place]
            state = hidden[len(episode.prompt_ids) + place - 1]
            goal = torch.tensor(episode.rewards[place])
            if number + 1 < len(actions):
                after = hidden[len(episode.prompt_ids) + actions[number + 1] - 1]
                goal = goal + config.gamma * by_hand(heads.value, after)[0].detach()
            value = by_hand(heads.value, state)[0]
            best = torch.stack([by_hand(head, state)[token].detach() for head in heads.targets]).min()
            for head in heads.q:
                values = by_hand(head, state)
                sums["q"] = sums["q"] + (values[token] - goal) ** 2
                chance = values.exp()[token] / values.exp().sum()
                sums["cql"] = sums["cql"] - config.cql_scale * chance.log()
            share = config.tau if float(best) >= float(value.detach()) else 1 - config.tau
            sums["v"] = sums["v"] + share * (best - value) ** 2
            weight = math.exp(config.awac_beta * float(best - value.detach()))
            if config.awac_max_weight is not None:
                weight = min(weight, config.awac_max_weight)
            logprob = policy.logits(state).log_softmax(-1)[token]
            sums["awac"] = sums["awac"] - config.awac_scale * weight * logprob
    return sums


CONFIGS = {
    "defaults": ILQL(),
    "weighed": ILQL(tau=0.9, gamma=0.5, cql_scale=0.7, awac_scale=0.3, awac_beta=1.5, awac_max_weight=2.0),
    "without limit": ILQL(awac_beta=0.7, awac_max_weight=None, gamma=1.0),
    "one head": ILQL(two_qs=False, tau=0.2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_terms_and_gradients_are_those_of_a_loop(name: str) -> None:
    config = CONFIGS[name]
    policy = valued_policy(count=config.q_head_count, chunk_size=2)
    episodes = list(EPISODE.values())
    built = config.build(RunFacts(total_steps=10, max_new_tokens=4))
    batch = collate_episodes(episodes)
    sums, _ = built.loss(policy, batch)
    expected = by_loop(policy, episodes, config)
    assert sums.keys() == expected.keys() == built.weight(batch).keys()
    trained = [p for p in policy.parameters() if p.requires_grad]
    for term, value in sums.items():
        torch.testing.assert_close(value, expected[term], rtol=1e-4, atol=1e-4, msg=term)
        pairs = zip(
            torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True),
            torch.autograd.grad(expected[term], trained, retain_graph=True, allow_unused=True),
            strict=True,
        )
        reached = 0
        for parameter, gradients in zip(trained, pairs, strict=True):
            one, other = (torch.zeros_like(parameter) if g is None else g for g in gradients)
            reached += bool(other.any())
            scale = max(1.0, float(other.abs().max()))
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale, msg=term)
        assert reached > 10


def test_terms_by_hand() -> None:
    """One action with both heads at 2 and 3, targets at 1 and 4, value 0.5, reward 3: all from five numbers."""

    class Given:
        def __call__(self, **_: Any) -> Any:
            one = torch.tensor
            return type(
                "Output",
                (),
                {
                    "q": one([[[2.0, 3.0]]]),
                    "q_logsumexp": one([[[2.5, 4.5]]]),
                    "target_q": one([[1.0]]),
                    "state_values": one([[0.5]]),
                    "logprobs": one([[-2.0]]),
                },
            )

    config: dict[str, Any] = {"tau": 0.75, "cql_scale": 0.5, "awac_scale": 2.0, "awac_beta": 2.0}
    sums, ratios = method(**config).loss(Given(), collate_episodes([EPISODE["one action"]]))
    assert float(sums["q"]) == 1.0  # (2 - 3)^2 + (3 - 3)^2
    assert float(sums["v"]) == 0.75 * 0.25
    assert float(sums["cql"]) == 0.5 * (0.5 + 1.5)
    assert float(sums["awac"]) == pytest.approx(2 * 2 * math.e)
    means = {name: float(total) / float(count) for name, (total, count) in ratios.items()}
    assert means == {"q/mean": 2.0, "q/target": 1.0, "q/value": 0.5, "q/advantage": 0.5}


def test_what_has_no_weight_is_not_computed() -> None:
    asked: list[frozenset[str]] = []
    policy = valued_policy()

    def watching(**arguments: Any) -> Any:
        asked.append(arguments["want"])
        return policy(**arguments)

    sums, _ = method(cql_scale=0.0, awac_scale=0.0).loss(watching, collate_episodes([EPISODE["one turn"]]))
    assert sums.keys() == {"q", "v"}
    assert asked == [frozenset({"q", "target_q", "state_values"})]


def test_every_term_is_per_action() -> None:
    batch: EpisodeBatch = collate_episodes(list(EPISODE.values()))
    assert method().weight(batch) == {"q": 9.0, "v": 9.0, "cql": 9.0, "awac": 9.0}


# Targets --------------------------------------------------------------------------------------------------------------

SETTING = Setting("ilql", False, "llama")


def watched(assembly: Assembly) -> list[tuple[int, float]]:
    """(optimizer steps so far, alpha) of every sync."""
    syncs: list[tuple[int, float]] = []
    steps = [0]
    heads: Any = assembly.policy.q_heads
    sync = heads.sync

    def count(*_: object) -> None:
        steps[0] += 1

    def watch(alpha: float) -> None:
        syncs.append((steps[0], alpha))
        sync(alpha)

    assembly.trainer.optimizer.register_step_post_hook(count)
    heads.sync = watch
    return syncs


@pytest.mark.parametrize(("every", "expected"), [(1, range(1, 8)), (3, [3, 6]), (5, [5]), (8, [])])
def test_pitfall_36_targets_sync_after_every_nth_optimizer_step(
    every: int, expected: list[int], tmp_path: Path
) -> None:
    algorithm = SETTING.with_algorithm(target_sync_every=every, alpha=0.5)
    assembly = assemble(SETTING, tmp_path / "run", algorithm=algorithm, total_steps=7)
    syncs = watched(assembly)
    execute(assembly)
    assert syncs == [(step, 0.5) for step in expected]


def test_pitfall_36_targets_move_towards_the_heads_of_after_the_step(tmp_path: Path) -> None:
    """Against what alpha makes of the old targets and the new heads; heads of before the step would differ."""
    algorithm = SETTING.with_algorithm(target_sync_every=1, alpha=0.25)
    assembly = assemble(SETTING, tmp_path / "run", algorithm=algorithm, total_steps=2)
    heads: Any = assembly.policy.q_heads
    states: list[tuple[Tensor, Tensor]] = []

    def note(metrics: dict[str, float], ended: bool) -> bool:
        states.append((heads.q[0].outer.weight.detach().clone(), heads.targets[0].outer.weight.clone()))
        return keep_books(metrics, ended)

    keep_books, assembly.trainer.after_update = assembly.trainer.after_update, note
    execute(assembly)
    (first, target), (second, moved) = states
    torch.testing.assert_close(target, 0.25 * first)  # they all begin at zero
    torch.testing.assert_close(moved, 0.25 * second + 0.75 * target)
    assert float((first - second).abs().max()) > 1e-4


def test_pitfall_36_syncs_go_on_where_a_run_was_interrupted(tmp_path: Path) -> None:
    built = method(target_sync_every=3)

    class Heads:
        syncs = 0

        def sync(self, alpha: float) -> None:
            self.syncs += 1

    policy = type("Policy", (), {"q_heads": Heads()})()
    built.after_step(policy, {})
    built.after_step(policy, {})
    again = method(target_sync_every=3)
    again.load_state_dict(built.state_dict())
    assert policy.q_heads.syncs == 0
    again.after_step(policy, {})
    assert policy.q_heads.syncs == 1


def test_pitfall_36_episodes_without_rewards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)record.*reward"):
        assemble(SETTING, tmp_path / "run", data=[{"turns": item["turns"]} for item in EPISODES])


def test_pitfall_36b_terms_do_not_depend_on_micro_batches(tmp_path: Path) -> None:
    """Named here for the list of pitfalls; every method is split in many ways in tests/invariants."""
    losses = []
    for rows in (None, 1):
        run = tmp_path / f"run-{rows}"
        execute(assemble(SETTING, run, trainer={"micro_batch_size": rows}, total_steps=3))
        losses.append([[row[f"loss/{name}"] for name in ("q", "v", "cql", "awac")] for row in logged(run, "update")])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-6)


# A task whose values are known ----------------------------------------------------------------------------------------


ARMS = [{"prompt": "a", "completion": "b", "reward": -1.0}] * 18 + [
    {"prompt": "a", "completion": "c", "reward": 1.0}
] * 2
"""After a, b in nine of ten texts and c in one; then the eos, where the reward is paid."""


@pytest.fixture(scope="module")
def two_arms(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """ILQL on the arms, with nothing but what makes the solution exact: all texts in a step, no conservative term."""
    algorithm = ILQL(
        tau=0.9, gamma=0.9, cql_scale=0.0, alpha=0.3, target_sync_every=1, normalise_returns=False, q_rate=1.0
    )
    recipe = make_recipe(
        SETTING,
        tmp_path_factory.mktemp("arms") / "run",
        algorithm=algorithm,
        data=ARMS,
        total_steps=150,
        prompts_per_step=20,
        trainer={"learning_rate": 5e-3},
    )
    return run_recipe(recipe)


def test_values_of_two_arms_are_the_exact_ones(two_arms: Any) -> None:
    """The eos is worth the reward, -1 or 1, and so is the state before it. An arm is worth 0.9 of that. The state
    before the arms is worth the expectile 0.9 of a tenth at 0.9 and the rest at -0.9:
    0.9 * 0.1 * (0.9 - V) = 0.1 * 0.9 * (V + 0.9), that is V = 0."""
    trained = two_arms.policy
    a, b, c, eos = (*trained.tokenizer("abc")["input_ids"], 2)
    rows = [
        Episode(prompt_ids=(a,), completion_ids=(arm, eos), loss_mask=(True, True), rewards=(0, 0)) for arm in (b, c)
    ]
    with torch.no_grad():
        output = trained.policy(
            **collate_episodes(rows).inputs, want=frozenset({"q", "target_q", "state_values", "logprobs"})
        )
    torch.testing.assert_close(output.target_q, torch.tensor([[-0.9, -1.0], [0.9, 1.0]]), rtol=0, atol=0.1)
    torch.testing.assert_close(output.q[..., 0], output.target_q, rtol=0, atol=0.1)
    torch.testing.assert_close(output.state_values, torch.tensor([[0.0, -1.0], [0.0, 1.0]]), rtol=0, atol=0.1)
    assert output.logprobs[:, 0].exp().tolist() == pytest.approx([0.9, 0.1], abs=0.03)


def test_guidance_takes_the_better_arm_that_the_data_rarely_has(two_arms: Any) -> None:
    """c overtakes b where beta * 1.8 exceeds log 9, at beta = 1.22."""
    trained = two_arms.policy
    greedy: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0.0}
    assert trained.generate("a", **greedy) == trained.generate("a", beta=0.8, **greedy) == ["b"]
    assert trained.generate("a", beta=1.7, **greedy) == trained.generate("a", beta=100.0, **greedy) == ["c"]
    shares = {beta: trained.generate("a", n=400, beta=beta, max_new_tokens=1).count("c") / 400 for beta in (0.0, 1.22)}
    # Tokens that the data never has keep advantages near 0 without the conservative term, and little probability.
    assert shares[0.0] == pytest.approx(0.1, abs=0.05)
    assert shares[1.22] == pytest.approx(0.5, abs=0.12)


def test_without_syncs_the_better_arm_is_not_found(tmp_path: Path) -> None:
    """What the original does: targets that stay as they began. Guidance by them finds nothing."""
    algorithm = ILQL(tau=0.9, gamma=0.9, cql_scale=0.0, target_sync_every=1000, normalise_returns=False, q_rate=1.0)
    changes: dict[str, Any] = {"total_steps": 60, "prompts_per_step": 20, "trainer": {"learning_rate": 5e-3}}
    result = run_recipe(make_recipe(SETTING, tmp_path / "run", algorithm=algorithm, data=ARMS, **changes))
    assert result.policy.generate("a", beta=100.0, max_new_tokens=1, temperature=0.0) == ["b"]


# Fields ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": ""}, "target must name a column"),
        ({"tau": 1.0}, "tau must lie in"),
        ({"tau": math.nan}, "tau must lie in"),
        ({"gamma": 1.5}, "gamma must lie in"),
        ({"cql_scale": -1.0}, "cql_scale must not be negative"),
        ({"awac_scale": -1.0}, "awac_scale must not be negative"),
        ({"awac_beta": -1.0}, "awac_beta must not be negative"),
        ({"awac_max_weight": 0.0}, "awac_max_weight must be positive"),
        ({"alpha": 0.0}, "alpha must lie in"),
        ({"target_sync_every": 0}, "target_sync_every must be at least 1"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"q_rate": 0.0}, "q_rate must be positive"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ILQL(**fields)


def test_presets_hold_the_numbers_of_the_source() -> None:
    numbers = {"tau": 0.7, "gamma": 0.99, "cql_scale": 0.1, "awac_scale": 1.0, "awac_beta": 0.0, "alpha": 0.001}
    source = ILQL(**numbers, target_sync_every=5, two_qs=True, awac_max_weight=None, q_rate=1.0)
    assert ILQL.preset("trlx") == source
    assert ILQL.preset("trlx/randomwalks") == replace(source, tau=0.8, alpha=0.1)
    assert ALGORITHMS["ilql"] is ILQL and ILQL().reads == "episodes" and not ILQL().on_policy
