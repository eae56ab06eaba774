"""The facade's agent: what it stores, what it learns of it, and that the learning is this library's PPO."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch

from examples import ppo_loop
from tiny_models import EOS_ID, tiny_model, tiny_tokenizer
from tiny_textrl import ITEMS, LettersEnv, make_actor, make_env, play_episode
from tropism.algorithms.base import RunFacts
from tropism.envs.textrl import TextRLEnv
from tropism.envs.textrl_learning import FeatureValueHead, StepSource
from tropism.errors import ConfigError, NumericsError, RewardError
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.types import PolicyBatch, RewardBatch, Rollouts

A_ID = tiny_tokenizer().convert_tokens_to_ids("a")


class FirstEnv(TextRLEnv):
    """The first sample alone earns something: 1 per token."""

    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
        return [1.0] + [0.0] * (len(predicted_list) - 1)


class EqualEnv(TextRLEnv):
    """Whatever is written is worth 1."""

    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
        return 1


class LikesOne(TextRLEnv):
    """One token is worth 1 wherever it stands: the fourth most likely one after "a cat"."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        logits = self.model(input_ids=torch.tensor([self.tokenizer("a cat")["input_ids"]])).logits[0, -1]
        self.liked = self.actions[int(logits.topk(4).indices[-1])]

    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
        return [float(tokens[-1] == self.liked) for tokens in predicted_list]


def stored(env: TextRLEnv, **settings: Any) -> Any:
    """An agent with one episode that waits for an update."""
    agent = make_actor(env, **settings).agent_ppo(update_interval=1000)
    play_episode(agent, env)
    return agent


# What is stored -------------------------------------------------------------------------------------------------------


def test_log_probs_are_tempered_and_unfiltered_and_those_of_the_training_forward() -> None:
    env = make_env(max_length=8)
    agent = stored(env, temperature=1.7, top_k=3, repetition_penalty=1.5)
    rollouts = agent.learner.episodes[0].rollouts
    assert rollouts.temperature == 1.7
    for i, ids in enumerate(env.completions):
        whole = torch.tensor([[*env.prompt_ids, *ids]])
        logits = env.model(input_ids=whole).logits[0, len(env.prompt_ids) - 1 : -1]
        expected = (logits / 1.7).log_softmax(-1)[range(len(ids)), ids]
        assert torch.allclose(rollouts.logprobs[i, : len(ids)], expected, atol=1e-4)
        assert bool((rollouts.behaviour_logprobs[i, : len(ids)] > rollouts.logprobs[i, : len(ids)]).all())


def test_behaviour_log_probs_are_of_what_was_sampled_from() -> None:
    """Penalty on the completion's own tokens, then temperature, then top-k, by hand."""
    env = make_env(max_length=4, compare_sample=1)
    agent = stored(env, temperature=1.3, top_k=4, repetition_penalty=1.5)
    rollouts, (ids,) = agent.learner.episodes[0].rollouts, env.completions
    logits = env.model(input_ids=torch.tensor([[*env.prompt_ids, *ids]])).logits[0, len(env.prompt_ids) - 1 : -1]
    for t, token in enumerate(ids):
        row = logits[t].tolist()
        for seen in set(ids[:t]):
            row[seen] = row[seen] / 1.5 if row[seen] > 0 else row[seen] * 1.5
        row = [value / 1.3 for value in row]
        kept = sorted(row)[-4:]
        expected = row[token] - math.log(sum(math.exp(value) for value in kept))
        assert token in [i for i, value in enumerate(row) if value >= kept[0]]
        assert float(rollouts.behaviour_logprobs[0, t]) == pytest.approx(expected, abs=1e-4)


def test_values_are_those_of_the_training_forward() -> None:
    env = make_env(max_length=5)
    actor = make_actor(env)
    agent = actor.agent_ppo(update_interval=1000)
    torch.nn.init.normal_(env.policy.value_head.linear.weight, generator=torch.Generator().manual_seed(0))
    play_episode(agent, env)
    rollouts = agent.learner.episodes[0].rollouts
    expected = env.policy(**rollouts.inputs, want={"values"}).need("values")
    assert torch.allclose(rollouts.values, expected, atol=1e-4) and expected.abs().max() > 0.1


def test_draws_are_keyed_by_the_seed() -> None:
    def completions(seed: int) -> list[list[int]]:
        env = make_env()
        agent = make_actor(env).agent_ppo(update_interval=1000, seed=seed)
        found = []
        for _ in range(2):
            play_episode(agent, env, "a cat")
            found += env.completions
        return found

    assert completions(0) == completions(0) != completions(1)


def test_pitfall_15_each_sample_gets_the_credit_of_its_own_rewards() -> None:
    env = make_env(FirstEnv, max_length=3, compare_sample=3)
    agent = make_actor(env).agent_ppo(update_interval=1000, gamma=0.5, kl_coef=0.0, standardize_advantages=False)
    env.reset("a cat")
    obs = env.observation
    for _ in range(3):
        agent.act(obs)
        agent._pending[1].tokens[:] = A_ID  # so that no sample ends early
        obs, reward, done, _ = env.step(agent._pending[1].tokens)
        assert reward.tolist() == [1.0, 0.0, 0.0]
        agent.observe(obs, reward, done, False)
    batch, _ = agent.learner.make_batch()
    # The critic begins at 0, lambda is 1: an advantage is the discounted sum of the sample's own rewards.
    assert batch.returns.tolist() == [[1.75, 1.5, 1.0], [0.0] * 3, [0.0] * 3]
    assert batch.advantages.tolist() == batch.returns.tolist()


def test_what_an_early_ended_sample_earns_at_the_end_counts_for_its_last_token() -> None:
    env = make_env(LettersEnv, max_length=3, compare_sample=2)
    agent = make_actor(env).agent_ppo(update_interval=1000)
    obs = env.reset("a cat")
    for tokens in ([EOS_ID, A_ID], [A_ID + 1] * 2, [A_ID + 1] * 2):  # the first sample ends at once
        agent.act(obs)
        agent._pending[1].tokens[:] = torch.tensor(tokens)
        obs, reward, done, _ = env.step(torch.tensor(tokens))
        agent.observe(obs, reward, done, False)
    assert agent.learner.episodes[0].rewards == [[10.0], [1.0, 0.0, 0.0]]
    assert agent.learner.episodes[0].steps == 3


def test_an_episode_that_is_left_is_worth_what_the_critic_says_of_what_follows() -> None:
    env = make_env(FirstEnv, max_length=6, compare_sample=2)
    agent = make_actor(env).agent_ppo(
        update_interval=1000, gamma=0.5, kl_coef=0.0, standardize_advantages=False, lambd=1.0
    )
    torch.nn.init.normal_(env.policy.value_head.linear.weight, generator=torch.Generator().manual_seed(0))
    play_episode(agent, env, "a cat", most=2)
    after = env.policy.value_head(env.observation).tolist()
    assert agent.learner.episodes[0].cut == (True, True)
    batch, _ = agent.learner.make_batch()
    expected = [[1 + 0.5 * 1 + 0.25 * after[0], 1 + 0.5 * after[0]], [0.25 * after[1], 0.5 * after[1]]]
    assert torch.allclose(batch.returns, torch.tensor(expected), atol=1e-4)


def test_an_episode_that_ends_by_its_length_is_over() -> None:
    env = make_env(FirstEnv, max_length=2, compare_sample=1)
    agent = make_actor(env).agent_ppo(update_interval=1000, gamma=0.5, kl_coef=0.0, standardize_advantages=False)
    torch.nn.init.normal_(env.policy.value_head.linear.weight, generator=torch.Generator().manual_seed(0))
    _, steps = play_episode(agent, env, "a cat")
    assert agent.learner.episodes[0].cut == (False,)
    batch, _ = agent.learner.make_batch()
    assert torch.allclose(batch.returns, torch.tensor([[1.5, 1.0][-steps:]]), atol=1e-5)


# Updates --------------------------------------------------------------------------------------------------------------


def test_an_update_comes_at_the_end_of_the_episode_by_which_enough_is_stored() -> None:
    env = make_env(max_length=3)
    agent = make_actor(env).agent_ppo(update_interval=7, epochs=1)
    lengths = [play_episode(agent, env)[1] for _ in range(8)]
    expected, stored_steps = 0, 0
    for length in lengths:
        stored_steps += length
        if stored_steps >= 7:
            expected, stored_steps = expected + 1, 0
    assert dict(agent.get_statistics())["n_updates"] == expected > 1
    assert agent.learner.stored_steps == stored_steps


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_update_is_that_of_the_example_loop(family: str, layers: int) -> None:
    """examples/ppo_loop.py, which has no trainer, on the same rollouts: the same losses and the same weights."""
    env = make_env(family=family, max_length=7, compare_sample=3)
    actor = make_actor(env, optimizer="sgd", unfreeze_layer_from_past=layers, temperature=1.3, top_k=8)
    # Learning rates are large enough for the second episode's KL, values and ratios to be far from where they began.
    agent = actor.agent_ppo(
        update_interval=1000, epochs=3, lr=0.03, gamma=0.9, lambd=0.8, clip_eps=0.1, clip_eps_vf=0.3,
        value_func_coef=0.7, kl_coef=0.3, max_grad_norm=1.0,
    )  # fmt: skip
    twin = copy.deepcopy(env.model)
    policy = Policy(twin, value_head=FeatureValueHead(32))
    reference = Reference(policy)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.03)
    for _ in range(2):
        play_episode(agent, env, ITEMS[0])
        episode = agent.learner.episodes[0]
        width = episode.rollouts.completion_ids.shape[1]
        per_token = torch.tensor([row + [0.0] * (width - len(row)) for row in episode.rewards])
        rewards = RewardBatch(
            per_completion=torch.zeros(3), per_token=per_token, scored=torch.ones(3, dtype=torch.bool)
        )
        batch = ppo_loop.make_batch(policy, reference, episode.rollouts, rewards, kl_coef=0.3, gamma=0.9, lam=0.8)
        losses = [
            by_value_clip(policy, optimizer, batch, clip=0.1, value_clip=0.3, value_coef=2 * 0.7) for _ in range(3)
        ]
        agent._update()
        assert agent.learner.metrics["loss/total"] == pytest.approx(losses[-1], rel=1e-4)
        ours, theirs = dict(env.policy.named_parameters()), dict(policy.named_parameters())
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            assert torch.allclose(weight, theirs[name], atol=2e-6), name
    assert max(abs(loss) for loss in losses) > 1e-3


def by_value_clip(
    policy: Policy, optimizer: Any, batch: PolicyBatch, *, clip: float, value_clip: float, value_coef: float
) -> float:
    """One optimizer step of PPO, written out: clipped surrogate, clipped squared error of the critic, token mean."""
    output = policy(**batch.inputs, temperature=batch.temperature, want={"logprobs", "values"})
    mask = batch.loss_mask
    ratio = (output.need("logprobs") - batch.old_logprobs).exp()
    surrogate = -torch.minimum(ratio * batch.advantages, ratio.clamp(1 - clip, 1 + clip) * batch.advantages)
    values = output.need("values")
    near = batch.old_values + (values - batch.old_values).clamp(-value_clip, value_clip)
    critic = 0.5 * torch.maximum((values - batch.returns) ** 2, (near - batch.returns) ** 2)
    loss = (surrogate + value_coef * critic)[mask].mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def test_frozen_blocks_are_computed_once_per_update() -> None:
    env = make_env(max_length=6)
    agent = make_actor(env).agent_ppo(update_interval=1000, epochs=5)
    play_episode(agent, env)
    calls = []
    env.model.transformer.h[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    agent.learner.update()
    assert agent.learner.trainer.counts.updates == 5 and len(calls) == 1


def test_models_in_other_precisions_are_corrected_for_the_difference_of_their_passes() -> None:
    model = tiny_model("gpt2").to(torch.float64)  # stands for bf16, which not every CPU computes in
    agent = stored(LettersEnv(model, tiny_tokenizer(), ITEMS, max_length=6))
    acted = agent.learner.episodes[0].rollouts.logprobs
    acted[0, 0] -= 0.5  # as if sampling had seen another log-prob
    batch, metrics = agent.learner.make_batch()
    assert batch.old_logprobs[0, 0] == pytest.approx(float(acted[0, 0]) + 0.5, abs=1e-4)
    assert batch.importance_weights[0, :2].tolist() == pytest.approx([math.exp(0.5), 1.0], abs=1e-3)
    assert 0.5 < metrics["rollout/effective_sample_size"] < 1
    agent.learner.update()
    exact = stored(make_env(max_length=3)).learner.make_batch()[0]
    assert exact.importance_weights is None


def test_the_critic_moves_nothing_but_itself() -> None:
    """As in TextRL, where it is a network of its own: rewards that are all equal leave the model as it is."""
    env = make_env(EqualEnv, compare_sample=2, max_length=1)
    agent = make_actor(env, unfreeze_layer_from_past=1).agent_ppo(update_interval=1, epochs=3, lr=0.1, kl_coef=0.0)
    before = copy.deepcopy(env.model.state_dict())
    play_episode(agent, env)
    assert all(torch.equal(value, before[name]) for name, value in env.model.state_dict().items())
    assert env.policy.value_head.linear.bias.item() > 0.01


def test_pitfall_17_the_reference_holds_the_model_back() -> None:
    def distance(kl_coef: float) -> float:
        env = make_env(LikesOne, max_length=6, compare_sample=6)
        settings: dict[str, Any] = {"update_interval": 1, "epochs": 3, "lr": 0.005, "gamma": 1.0}
        agent = make_actor(env, optimizer="adamw").agent_ppo(kl_coef=kl_coef, **settings)
        for _ in range(12):
            play_episode(agent, env, "a cat")
        return agent.learner.metrics["policy/sequence_kl"]

    assert distance(1.0) < 0.5 * distance(0.001)
    assert make_actor(make_env()).agent_ppo().learner.settings.kl_coef == 0.02
    assert make_actor(make_env()).agent_ppo(kl_coef=0.0).learner.reference is None


def test_pitfall_17_a_token_outside_of_the_filter_keeps_its_gradient() -> None:
    """The ratio is of the tempered distribution, so top-k changes neither it nor what can be learned."""
    env = make_env(max_length=6)
    agent = stored(env, top_k=1)
    agent.learner.update()
    assert agent.learner.losses[0]["policy/ratio"] == pytest.approx(1.0, abs=1e-4)
    assert math.isfinite(agent.learner.losses[-1]["policy/entropy"])
    assert agent.learner.losses[0]["policy/entropy"] > 0.1  # of top-1 it would be 0


def test_minibatches_go_through_every_step_once_per_epoch() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    batch = batch_of(mask)
    source = StepSource(minibatch_size=3, epochs=2, seed=0)
    source.put(batch, torch.tensor([0, 0, 1]))  # the first two rows take their steps together: 3 + 4 steps
    parts = list(source.collect(None))
    assert len(parts) == 6 and source.done
    assert [int(part.loss_mask.any(0).sum() >= 1) for part in parts] == [1] * 6
    for epoch in (parts[:3], parts[3:]):
        assert torch.equal(torch.stack([part.loss_mask for part in epoch]).sum(0), mask.long())
        assert sorted(steps_in(part) for part in epoch) == [1, 3, 3]
    assert any(not torch.equal(parts[i].loss_mask, parts[i + 3].loss_mask) for i in range(3))
    # A step is a token of each sample: row 1 has one with row 0's first.
    assert all(bool(part.loss_mask[0, 0]) == bool(part.loss_mask[1, 0]) for part in parts)
    assert source.finish().tokens == 8


def test_advantages_are_whitened_over_what_is_stored_and_not_over_a_minibatch() -> None:
    """Over a minibatch of one step nothing would be left."""
    env = make_env(FirstEnv, max_length=4, compare_sample=1)
    agent = make_actor(env).agent_ppo(update_interval=1000, minibatch_size=1, epochs=1, kl_coef=0.0)
    _, steps = play_episode(agent, env, "a cat")
    agent.learner.update()
    losses = [metrics["loss/policy"] for metrics in agent.learner.losses]
    assert len(losses) == steps > 1 and all(abs(loss) > 0.1 for loss in losses)
    assert sum(losses) == pytest.approx(0.0, abs=1e-3)


def steps_in(batch: PolicyBatch) -> int:
    first = batch.loss_mask[0] | batch.loss_mask[1]
    return int(first.sum() + batch.loss_mask[2].sum())


def batch_of(mask: torch.Tensor) -> PolicyBatch:
    lengths = mask.sum(-1)
    zeros = torch.zeros(mask.shape)
    rollouts = Rollouts(
        prompt_ids=torch.ones(len(mask), 1, dtype=torch.long),
        prompt_lengths=torch.ones(len(mask), dtype=torch.long),
        completion_ids=torch.full(mask.shape, 5),
        completion_lengths=lengths,
        logprobs=zeros,
        behaviour_logprobs=zeros,
        finish_reasons=("eos",) * len(mask),
    )
    return PolicyBatch.of(rollouts)


def test_the_settings_are_tropisms_ppo_under_other_names() -> None:
    settings = make_actor(make_env()).agent_ppo().learner.settings
    algorithm = settings.algorithm
    assert (settings.update_interval, settings.minibatch_size, settings.lr) == (10, 3000, 3e-6)
    assert (algorithm.gamma, algorithm.lam, algorithm.num_epochs) == (0.95, 1.0, 20)
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.critic.clip) == (0.2, 0.2, None)
    assert algorithm.critic.coef == 2.0  # of half the squared error
    assert algorithm.build(RunFacts(total_steps=1, max_new_tokens=1)).kl_coef == 0.02


@pytest.mark.learning
def test_a_liked_token_comes_more_often() -> None:
    env = make_env(LikesOne, max_length=8, compare_sample=4)
    agent = make_actor(env, optimizer="adamw").agent_ppo(update_interval=8, minibatch_size=64, epochs=4, lr=0.005)
    rewards = [play_episode(agent, env, "a cat")[0].mean() for _ in range(20)]
    before, after = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert before < 2 and after > 5


# Statistics and misuse ------------------------------------------------------------------------------------------------


def test_statistics_are_named_as_pfrls() -> None:
    env = make_env(FirstEnv, max_length=3, compare_sample=1)
    agent = make_actor(env).agent_ppo(update_interval=1000, epochs=2, lr=0.1, kl_coef=0.0)
    names = [name for name, _ in agent.get_statistics()]
    assert names == [
        "average_value", "average_entropy", "average_value_loss", "average_policy_loss", "n_updates",
        "explained_variance",
    ]  # fmt: skip
    before = dict(agent.get_statistics())
    assert before["n_updates"] == 0 and math.isnan(before["average_value"])
    play_episode(agent, env, "a cat")
    logits = env.model(input_ids=torch.tensor([[*env.prompt_ids, *env.completions[0]]])).logits[0]
    entropies = torch.distributions.Categorical(logits=logits[len(env.prompt_ids) - 1 : -1]).entropy()
    assert dict(agent.get_statistics())["average_entropy"] == pytest.approx(entropies.mean().item(), abs=1e-4)
    returns = agent.learner.make_batch()[0].returns
    agent._update()
    after = dict(agent.get_statistics())
    assert after["n_updates"] == 2 and after["average_value"] == 0.0 and after["explained_variance"] <= 1
    first = agent._losses[0][1]
    assert first == pytest.approx(float((returns**2).mean()), rel=1e-4)  # the critic began at 0


def test_evaluation_stores_and_learns_nothing() -> None:
    env = make_env()
    agent = make_actor(env).agent_ppo(update_interval=1)
    weights = copy.deepcopy(env.policy.state_dict())
    with agent.eval_mode():
        assert not agent.training
        play_episode(agent, env)
    assert agent.training and agent.t == 0 and not agent.learner.episodes
    assert all(torch.equal(value, weights[name]) for name, value in env.policy.state_dict().items())


def test_observations_must_be_the_last_of_the_environment() -> None:
    env = make_env()
    agent = make_actor(env).agent_ppo()
    first = env.reset("a cat")
    action = agent.act(first.clone())  # an equal one will do
    obs, reward, done, _ = env.step(action)
    agent.observe(obs, reward, done)
    with pytest.raises(ConfigError, match="returned last"):
        agent.act(first)
    other = LettersEnv(env.model, env.tokenizer, ITEMS, max_length=6)
    with pytest.raises(ConfigError, match="watch"):
        agent.act(other.reset("oh"))
    agent.watch(other)
    with agent.eval_mode():
        play_episode(agent, other)
    with pytest.raises(ConfigError, match="another model"):
        agent.watch(make_env())


def test_the_environment_must_take_what_was_chosen() -> None:
    env = make_env()
    agent = make_actor(env).agent_ppo()
    action = agent.act(env.reset("a cat"))
    obs, reward, done, _ = env.step((action + 1) % 37)
    with pytest.raises(ConfigError, match="what act returned"):
        agent.observe(obs, reward, done)
    with pytest.raises(ConfigError, match="call act"):
        agent.observe(obs, reward, done)


@pytest.mark.parametrize("reward", [[1.0], [1.0, float("inf")], "x", [1, 2, 3], None])
def test_rewards_of_the_loop_are_checked(reward: Any) -> None:
    env = make_env(compare_sample=2)
    agent = make_actor(env).agent_ppo()
    obs, _, done, _ = env.step(agent.act(env.reset("a cat")))
    if reward == [1.0]:  # one number counts for every sample
        agent.observe(obs, reward, done)
        assert agent._open.rewards == [[1.0], [1.0]]
        return
    with pytest.raises(RewardError, match="each of the 2 samples"):
        agent.observe(obs, reward, done)


def test_an_episode_that_is_dropped_is_told(caplog: pytest.LogCaptureFixture) -> None:
    env = make_env()
    actor = make_actor(env)
    agent = actor.agent_ppo(update_interval=1)
    obs, reward, done, _ = env.step(agent.act(env.reset("a cat")))
    agent.observe(obs, reward, done)
    with caplog.at_level(logging.WARNING, logger="tropism"):
        actor.predict("oh")
    assert "left after 1 steps" in caplog.text
    play_episode(agent, env, most=1)
    assert agent.learner.trainer.counts.updates > 0


def test_a_reward_without_end_is_refused_and_the_weights_stay() -> None:
    env = make_env(FirstEnv, max_length=3)
    agent = make_actor(env).agent_ppo(update_interval=1000)
    play_episode(agent, env)
    with torch.no_grad():
        env.policy.value_head.linear.weight.fill_(float("nan"))
    agent.learner.episodes[0].rollouts.values.fill_(float("nan"))
    before = copy.deepcopy(env.model.state_dict())
    with pytest.raises(NumericsError, match="the value"):
        agent.learner.update()
    assert not agent.learner.episodes
    assert all(torch.equal(value, before[name]) for name, value in env.model.state_dict().items())
