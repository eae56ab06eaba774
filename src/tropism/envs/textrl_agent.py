"""The agent of the TextRL facade: acts by the environment's own logits, stores episodes, and lets PPO learn of them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tropism.envs.textrl_acting import Acting, Choice
from tropism.envs.textrl_files import load_agent, save_agent
from tropism.envs.textrl_learning import Learner, StoredEpisode
from tropism.errors import ConfigError, RewardError
from tropism.rollouts.randomness import StreamKey
from tropism.types import FinishReason, Rollouts, pad_rows

logger = logging.getLogger("tropism")

VALUES_KEPT, LOSSES_KEPT = 1000, 100
"""Acted states, and optimizer steps, over which statistics are means (as in PFRL)."""


class Environment(Protocol):
    """What an agent needs of a ``TextRLEnv``."""

    model: Any
    tokenizer: Any
    compare_sample: int
    episode: int
    """Counts resets."""
    observation: Tensor | None

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def completions(self) -> Sequence[Sequence[int]]: ...
    @property
    def finish_reasons(self) -> Sequence[FinishReason | None]: ...
    def logits(self) -> Tensor: ...


@dataclass
class _Open:
    """A training episode under way."""

    env: Environment
    number: int
    """``env.episode`` of its reset."""
    index: int
    """How many training episodes began before it; keys its draws."""
    logprobs: list[list[float]]
    behaviour_logprobs: list[list[float]]
    values: list[list[float]]
    rewards: list[list[float]]

    @classmethod
    def of(cls, env: Environment, index: int) -> _Open:
        lists: list[list[list[float]]] = [[[] for _ in range(env.compare_sample)] for _ in range(4)]
        return cls(env, env.episode, index, *lists)


class TextRLAgent:
    """Acts, observes and learns, by the names of PFRL's agents.

    An update comes at the end of the episode by which ``update_interval`` steps are stored, never inside one: so every
    token of an episode is sampled by one set of weights, and its log-probs are exact.

    Args:
        env: what it acts in; ``watch`` names further ones, such as one for evaluation.
        acting: how tokens are chosen.
        layers: how many of the last transformer blocks are trained; for ``save`` and ``load``.
    """

    def __init__(self, env: Environment, learner: Learner, acting: Acting, *, layers: int) -> None:
        self.learner, self.acting, self.layers = learner, acting, layers
        self.training = True
        self.t = 0
        """Training steps observed."""
        self.model, self.tokenizer = env.model, env.tokenizer
        self._environments = [env]
        self._open: _Open | None = None
        self._pending: tuple[Environment, Choice, list[bool], list[float]] | None = None
        self._episodes = self._evaluated = 0
        self._values: deque[float] = deque(maxlen=VALUES_KEPT)
        self._entropies: deque[float] = deque(maxlen=VALUES_KEPT)
        self._losses: deque[tuple[float, float]] = deque(maxlen=LOSSES_KEPT)

    def watch(self, env: Environment) -> None:
        """Let the agent act in another environment of the same model, too.

        Raises:
            ConfigError: its model is another.
        """
        if env.model is not self.model:
            raise ConfigError("this environment has another model than the agent; make it with the agent's own")
        if not any(known is env for known in self._environments):
            self._environments.append(env)

    # The loop --------------------------------------------------------------------------------------------------------

    def act(self, obs: Tensor) -> Tensor:
        """The next token of each sample, [n] ids; sampled in training, and as the actor was told in evaluation.

        Raises:
            ConfigError: ``obs`` is not what an environment that the agent knows gave last.
            NumericsError: the model's logits are not finite.
        """
        env = self._environment_of(obs)
        if self.training:
            episode = self._continued(env)
            key = StreamKey(seed=self.learner.settings.seed, purpose="training", collect=episode.index)
        else:
            key = StreamKey(seed=self.learner.settings.seed, purpose="evaluation", collect=self._evaluated)
        going = [reason is None for reason in env.finish_reasons]
        greedy = self.acting.act_deterministically and not self.training
        choice = self.acting.choose(env.logits(), env.completions, going, key=key, greedy=greedy)
        values = self._values_of(obs)
        self._pending = (env, choice, going, values)
        if self.training:
            self._values.extend(value for value, goes in zip(values, going, strict=True) if goes)
            self._entropies.extend(value for value, goes in zip(choice.entropies, going, strict=True) if goes)
        return choice.tokens

    def observe(self, obs: Tensor, reward: Any, done: bool, reset: bool = False) -> None:
        """What became of the token that was acted last.

        Args:
            obs: what the step returned.
            reward: one number per sample, as the step returned, or one for all of them.
            done: the episode has ended.
            reset: it is left here; what would have followed is worth what the critic says.

        Raises:
            ConfigError: nothing was acted, or the environment took other tokens.
            RewardError: no such numbers.
            NumericsError: the update met a number that is not finite.
        """
        if self._pending is None:
            raise ConfigError("observe belongs to a step: call act, step the environment, then observe")
        env, choice, going, values = self._pending
        self._pending = None
        if not self.training:
            self._evaluated += done or reset
            return
        assert self._open is not None
        rewards = _per_sample(reward, env.compare_sample)
        self._check_taken(env, choice, going)
        self.t += 1
        self._record(self._open, choice, going, values, rewards)
        if done or reset:
            episode, self._open = self._open, None
            self._episodes += 1
            self.learner.episodes.append(_stored(episode, self.acting.temperature))
            if self.learner.due:
                self._update()

    def forget_episode(self) -> None:
        """Leave the training episode that is under way; nothing is learned of it, which a warning says."""
        self._pending = None
        if self._open is None:
            return
        steps = max((len(row) for row in self._open.rewards), default=0)
        if steps:
            logger.warning("an episode was left after %d steps without its end; nothing is learned of it", steps)
        self._open = None
        self._episodes += 1  # its random numbers are used up

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """A block in which nothing is stored or learned."""
        before, pending = self.training, self._pending
        self.training, self._pending = False, None
        try:
            yield
        finally:
            self.training, self._pending = before, pending

    def get_statistics(self) -> list[tuple[str, float]]:
        """PFRL's: means over the last states that were acted in and the last optimizer steps; NaN where there are none.

        The entropy is in nats, of the distribution before top-k and the like.
        """
        policy_losses, value_losses = zip(*self._losses, strict=True) if self._losses else ((), ())
        return [
            ("average_value", _mean(self._values)),
            ("average_entropy", _mean(self._entropies)),
            ("average_value_loss", _mean(value_losses)),
            ("average_policy_loss", _mean(policy_losses)),
            ("n_updates", self.learner.trainer.counts.updates),
            ("explained_variance", self.learner.metrics.get("value/explained_variance", float("nan"))),
        ]

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write a plain Hugging Face folder, and beside it the critic and the optimizer's state.

        Raises:
            ConfigError: the folder holds anything but an older agent.
            StorageError: it cannot be written.
        """
        save_agent(self.learner, self.tokenizer, Path(folder), layers=self.layers, steps=self.t)

    def load(self, folder: str | Path) -> None:
        """Take up what ``save`` wrote; an episode that is under way is left.

        Raises:
            ModelError: no such folder, or one of another model.
        """
        self.forget_episode()
        self.learner.episodes = []
        load_agent(self.learner, Path(folder), layers=self.layers)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _environment_of(self, obs: Tensor) -> Environment:
        for env in self._environments:
            if env.observation is obs:
                return env
        for env in self._environments:
            if isinstance(obs, Tensor) and env.observation is not None and torch.equal(env.observation, obs):
                return env
        raise ConfigError(
            "act needs what reset or step of the environment returned last, since tokens are chosen where that "
            "environment stands. For another environment of the same model call agent.watch(env) first"
        )

    def _continued(self, env: Environment) -> _Open:
        """The training episode that ``env`` stands in."""
        if self._open is not None and (self._open.env is not env or self._open.number != env.episode):
            self.forget_episode()
        if self._open is None:
            if any(env.completions):
                raise ConfigError("the episode has begun without the agent; reset the environment first")
            self._open = _Open.of(env, self._episodes)
        return self._open

    @torch.no_grad()
    def _values_of(self, obs: Tensor) -> list[float]:
        head = self.learner.policy.value_head
        assert head is not None
        return head(obs.to(self.learner.policy.device)).tolist()  # type: ignore[no-any-return]

    @staticmethod
    def _check_taken(env: Environment, choice: Choice, going: Sequence[bool]) -> None:
        for ids, token, goes in zip(env.completions, choice.tokens.tolist(), going, strict=True):
            if goes and (not ids or ids[-1] != token):
                raise ConfigError(
                    f"act chose the token {token}, and the environment took {ids[-1] if ids else 'none'}; step the "
                    "environment with what act returned, since its log-probs are what is learned from"
                )

    @staticmethod
    def _record(
        episode: _Open, choice: Choice, going: Sequence[bool], values: Sequence[float], rewards: Sequence[float]
    ) -> None:
        """One step. What a sample earns that has ended already counts for its last token."""
        for i, goes in enumerate(going):
            if goes:
                episode.logprobs[i].append(choice.logprobs[i])
                episode.behaviour_logprobs[i].append(choice.behaviour_logprobs[i])
                episode.values[i].append(values[i])
                episode.rewards[i].append(rewards[i])
            else:
                episode.rewards[i][-1] += rewards[i]

    def _update(self) -> None:
        coefficient = self.learner.settings.value_func_coef
        self.learner.update()
        for metrics in self.learner.losses:
            value_loss = metrics["loss/value"] / coefficient if coefficient else metrics["value/error"]
            self._losses.append((metrics["loss/policy"], value_loss))
        self.learner.losses.clear()


def _stored(episode: _Open, temperature: float) -> StoredEpisode:
    """The completions of an episode as they are, with what was noted while acting."""
    env = episode.env
    prompt, rows = list(env.prompt_ids), [list(ids) for ids in env.completions]

    def numbers(values: Sequence[Sequence[float]]) -> Tensor:
        return pad_rows(values, value=0.0, dtype=torch.float32)

    rollouts = Rollouts(
        prompt_ids=pad_rows([prompt] * len(rows), left=True),
        prompt_lengths=torch.full((len(rows),), len(prompt)),
        completion_ids=pad_rows(rows),
        completion_lengths=torch.tensor([len(ids) for ids in rows]),
        logprobs=numbers(episode.logprobs),
        behaviour_logprobs=numbers(episode.behaviour_logprobs),
        values=numbers(episode.values),
        finish_reasons=tuple(reason or "length" for reason in env.finish_reasons),
        temperature=temperature,
    )
    cut = tuple(reason is None for reason in env.finish_reasons)
    return StoredEpisode(rollouts=rollouts, rewards=episode.rewards, cut=cut)


def _per_sample(reward: Any, count: int) -> list[float]:
    """One finite number per sample from a number, list, array or tensor."""
    try:
        values = np.asarray(reward.detach().cpu() if isinstance(reward, Tensor) else reward, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.full(1, np.nan)
    if values.size == 1:
        values = np.full(count, values.reshape(-1)[0])
    if values.shape != (count,) or not np.isfinite(values).all():
        raise RewardError(
            f"observe was given the reward {reward!r:.80}; it must be one finite number, or one for each of the "
            f"{count} samples (compare_sample)"
        )
    return [float(value) for value in values]


def _mean(values: Sequence[float] | deque[float]) -> float:
    return fmean(values) if values else float("nan")
