"""The learner behind the TextRL facade: stored episodes, made into batches for this library's PPO and trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from tropism.algorithms.base import CollectStats, RunFacts
from tropism.algorithms.ppo import PPO, Critic
from tropism.data.order import epoch_order
from tropism.errors import ConfigError
from tropism.models.heads import ValueHead
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.ops import kl_k1, masked_whiten
from tropism.training.config import TrainerConfig
from tropism.training.correction import sampling_correction
from tropism.training.finite import require_finite
from tropism.training.optimizer import build_optimizer
from tropism.training.processes import Processes
from tropism.training.scoring import ModelScorer
from tropism.training.trainer import Trainer
from tropism.types import Batch, Metrics, PolicyBatch, RewardBatch, Rollouts, pad_rows

logger = logging.getLogger("tropism")

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True, kw_only=True)
class TextRLPPO:
    """PPO under the names and with the defaults of TextRL and PFRL. A step is the environment's: a token per sample."""

    update_interval: int = 10
    """Update at the end of the first episode by which so many steps are stored."""
    minibatch_size: int = 3000
    """Steps per optimizer step; all that are stored where there are fewer."""
    epochs: int = 20
    """Passes over the stored steps."""
    lr: float = 3e-6
    """Learning rate."""
    gamma: float = 0.95
    """Discount per token."""
    lambd: float = 1.0
    """GAE's mixing of one-step (0) and whole-episode (1) returns."""
    clip_eps: float = 0.2
    """The ratio is clipped at 1 - clip_eps and 1 + clip_eps."""
    clip_eps_vf: float | None = None
    """Values move at most so far before their loss stops falling; None: the plain squared error."""
    value_func_coef: float = 1.0
    """Weight of the squared error of the critic."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    standardize_advantages: bool = True
    """Advantages get mean 0 and variance 1 over the stored steps."""
    kl_coef: float = 0.02
    """Each token pays so much reward per nat that it is likelier than under the model as it was; 0 pays nothing, as in
    TextRL."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this norm; None: never."""
    seed: int = 0
    """Of sampling and of the order of minibatches."""

    def __post_init__(self) -> None:
        checks = {
            "update_interval must be at least 1: the steps that are stored before an update": self.update_interval >= 1,
            "minibatch_size must be at least 1": self.minibatch_size >= 1,
            "lr must be positive": self.lr > 0,
            "value_func_coef must not be negative": self.value_func_coef >= 0,
        }
        for message, holds in checks.items():
            if not holds:
                raise ConfigError(message)
        try:
            _ = self.algorithm, self.trainer
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def algorithm(self) -> PPO:
        """The same in this library's words; its value loss is half the squared error."""
        return PPO(
            group_size=1,
            num_epochs=self.epochs,
            kl_coef=self.kl_coef,
            clip_low=self.clip_eps,
            clip_high=self.clip_eps,
            gamma=self.gamma,
            lam=self.lambd,
            critic=Critic(coef=2 * self.value_func_coef, clip=self.clip_eps_vf, rate=1.0),
            whiten_advantages=False,  # over all stored steps, once, and not over each minibatch
            entropy_coef=self.entropy_coef,
        )

    @property
    def trainer(self) -> TrainerConfig:
        """What the optimizer step needs to know."""
        return TrainerConfig(learning_rate=self.lr, max_grad_norm=self.max_grad_norm, precision="fp32")


class FeatureValueHead(ValueHead):
    """A critic that reads the model and never moves it, as TextRL's, which is a network of its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [...]."""
        return super().forward(hidden.detach())


@dataclass(frozen=True, kw_only=True)
class StoredEpisode:
    """An episode that has ended: one completion per sample."""

    rollouts: Rollouts
    """[n, T] with the log-probs and values of the moment of acting."""
    rewards: list[list[float]]
    """Per sample, one per token."""
    cut: tuple[bool, ...]
    """Per sample whether it was left in the middle, so that the critic says what would have followed."""

    @property
    def steps(self) -> int:
        """Steps of the environment."""
        return int(self.rollouts.completion_lengths.max())


class StepSource:
    """Minibatches of environment steps: random tokens of whole completions, of which the loss sees those alone."""

    def __init__(self, *, minibatch_size: int, epochs: int, seed: int) -> None:
        self.minibatch_size, self.epochs, self.seed = minibatch_size, epochs, seed
        self.batch: PolicyBatch | None = None
        self.episodes = torch.zeros(0, dtype=torch.long)
        self.steps = torch.zeros(0, 2, dtype=torch.long)
        self.cursor = self.collects = 0

    def put(self, batch: PolicyBatch, episodes: Tensor) -> None:
        """What the next collect goes through.

        Args:
            episodes: [B] the number of each completion's episode, from 0; its samples take their steps together.
        """
        taken = torch.zeros(int(episodes.max()) + 1, batch.loss_mask.shape[1], dtype=torch.bool)
        for episode, mask in zip(episodes.tolist(), batch.loss_mask, strict=True):
            taken[episode] |= mask
        self.batch, self.episodes, self.steps, self.cursor = batch, episodes, torch.nonzero(taken), 0

    @property
    def _per_epoch(self) -> int:
        return math.ceil(len(self.steps) / self.minibatch_size)

    @property
    def done(self) -> bool:
        return self.cursor >= self.epochs * self._per_epoch

    def collect(self, policy: Any) -> Iterator[Batch]:
        """One batch per optimizer step."""
        assert self.batch is not None
        while not self.done:
            epoch, place = divmod(self.cursor, self._per_epoch)
            self.cursor += 1
            if self._per_epoch == 1:
                yield self.batch
                continue
            order = epoch_order(len(self.steps), seed=self.seed, epoch=self.collects * 1000 + epoch)
            chosen = self.steps[order[place * self.minibatch_size : (place + 1) * self.minibatch_size]]
            mask = torch.zeros(int(self.episodes.max()) + 1, self.batch.loss_mask.shape[1], dtype=torch.bool)
            mask[chosen[:, 0], chosen[:, 1]] = True
            yield replace(self.batch, loss_mask=self.batch.loss_mask & mask[self.episodes])

    def finish(self) -> CollectStats:
        assert self.batch is not None
        kl = kl_k1(self.batch.old_logprobs, self.batch.ref_logprobs) * self.batch.loss_mask
        tokens = int(self.batch.completion_lengths.sum())
        stats = CollectStats(samples=len(self.batch), tokens=tokens, sequence_kl=float(kl.sum(-1).mean()))
        self.batch = None
        self.collects += 1
        return stats


class Learner:
    """PPO on the episodes that an agent stores.

    Args:
        policy: exactly what is trained of it has gradients; it gets a new critic.
        optimizer: one of ``OPTIMIZERS``.

    Raises:
        ConfigError: an unknown optimizer, or several processes.
    """

    def __init__(self, policy: Policy, settings: TextRLPPO, *, optimizer: str) -> None:
        if optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer is {optimizer!r}; choose {' or '.join(OPTIMIZERS)}")
        self.policy, self.settings, self.optimizer_name = policy, settings, optimizer
        self.reference = Reference(policy) if settings.kl_coef > 0 else None
        policy.value_head = FeatureValueHead(policy.hidden_size).to(policy.device)
        AcceleratorState._reset_state()  # another run of this process may have computed in another precision
        self.processes = Processes(Accelerator(mixed_precision="no", cpu=policy.device.type == "cpu"))
        if self.processes.count > 1:
            raise ConfigError(
                "a TextRL agent trains in one process; start Python without a launcher, or train with tropism.train"
            )
        self.algorithm = settings.algorithm.build(RunFacts(total_steps=0, max_new_tokens=0))
        self.scorer = self._scorer(lambda: nullcontext(policy))
        self.reference_scorer = None if self.reference is None else self._scorer(self.reference.active)
        self.source = StepSource(minibatch_size=settings.minibatch_size, epochs=settings.epochs, seed=settings.seed)
        self.metrics: Metrics = {}
        """Of the last optimizer step, with those of its batch."""
        self.losses: list[Metrics] = []
        """Of the optimizer steps since they were last taken away."""
        self.optimizer = self._optimizer()
        self.trainer = self._trainer()
        self.episodes: list[StoredEpisode] = []

    @property
    def stored_steps(self) -> int:
        """Steps that wait for an update."""
        return sum(episode.steps for episode in self.episodes)

    @property
    def due(self) -> bool:
        """Whether enough steps are stored."""
        return self.stored_steps >= self.settings.update_interval

    def update(self) -> Metrics:
        """``epochs`` passes over the stored episodes, which are then forgotten, also where that fails.

        Raises:
            NumericsError: a reward, loss or gradient is not finite; the weights are those of the last optimizer step.
        """
        try:
            self.scorer.keep_trunk(Rollouts.concat([episode.rollouts for episode in self.episodes]))
            batch, metrics = self.make_batch()
            counts = [len(episode.rollouts) for episode in self.episodes]
            self.source.put(batch, torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))
            self.trainer.fit(self.trainer.counts.steps + 1)
        finally:
            self.episodes = []
            self.scorer.drop_trunk()
        self.metrics |= metrics
        return self.metrics

    @torch.no_grad()
    def make_batch(self) -> tuple[PolicyBatch, Metrics]:
        """What PPO makes of the stored episodes, and numbers about it."""
        rollouts = Rollouts.concat([episode.rollouts for episode in self.episodes])
        where = f"before update {self.trainer.counts.updates + 1}; the weights are unchanged"
        recompute, cap = self.settings.trainer.correction(exact=self.policy.dtype == torch.float32)
        sampled, numbers = rollouts.logprobs, Metrics()
        if recompute:
            rollouts = replace(rollouts, logprobs=self.scorer.logprobs(rollouts, temperature=rollouts.temperature))
        rewards = self._rewards(rollouts)
        require_finite({"the log-prob while sampling": rollouts.logprobs, "the value": rollouts.values}, where)
        batch = self.algorithm.make_batch(self.scorer, self.reference_scorer, rollouts, rewards)
        require_finite({"the log-prob under the reference": batch.ref_logprobs, "the return": batch.returns}, where)
        if self.settings.standardize_advantages:
            batch = replace(batch, advantages=masked_whiten(batch.advantages, batch.loss_mask))
        if recompute:
            numbers, weights = sampling_correction(rollouts, sampled, action="token", cap=cap)
            batch = replace(batch, importance_weights=weights)
        kl = (kl_k1(batch.old_logprobs, batch.ref_logprobs) * batch.loss_mask).sum(-1).mean()
        numbers |= self.algorithm.collect_metrics(batch)
        return batch, numbers | {"policy/sequence_kl": float(kl), "reward/mean": float(rewards.totals.mean())}

    def _rewards(self, rollouts: Rollouts) -> RewardBatch:
        """Per token. What the critic expects after a completion that was left in the middle counts as reward of its
        last token: A_T = r_T + gamma V_{T+1} - V_T."""
        given = [row for episode in self.episodes for row in episode.rewards]
        per_token = pad_rows(given, value=0.0, dtype=torch.float32)
        cut = torch.tensor([flag for episode in self.episodes for flag in episode.cut])
        if bool(cut.any()):
            _, after = self.scorer.values(rollouts)
            last = rollouts.completion_lengths[cut] - 1
            per_token[cut, last] += self.settings.gamma * after[cut]
        scored = torch.ones(len(rollouts), dtype=torch.bool)
        return RewardBatch(per_completion=torch.zeros(len(rollouts)), per_token=per_token, scored=scored)

    def _scorer(self, active: Any) -> ModelScorer:
        trainer = self.settings.trainer
        return ModelScorer(active, self.processes, max_tokens=2 * trainer.micro_batch_tokens, max_rows=None)

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer_name == "adamw":
            return build_optimizer(self.policy, self.settings.trainer)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        return torch.optim.SGD([{"params": trained, "rate": 1.0}], lr=self.settings.lr)

    def _trainer(self) -> Trainer:
        return Trainer(
            policy=self.policy,
            algorithm=self.algorithm,
            source=self.source,
            optimizer=self.optimizer,
            config=self.settings.trainer,
            processes=self.processes,
            learning_rate=self.settings.lr,
            device=self.policy.device,
            after_update=self._note,
        )

    def _note(self, metrics: Metrics, ended: bool) -> bool:
        self.metrics = dict(metrics)
        self.losses.append(self.metrics)
        return False
