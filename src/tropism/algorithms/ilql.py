"""ILQL: implicit Q-learning of language models, from texts with rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from tropism.algorithms.base import Algorithm, AlgorithmConfig, Ratios, RunFacts, Signal, count_tokens
from tropism.episodes import EpisodeBatch
from tropism.ops import (
    advantage_weighted_loss,
    conservative_loss,
    expectile_loss,
    masked_sum,
    next_action_values,
    td_targets,
)
from tropism.types import Metrics, Sums

TRLX = {"tau": 0.7, "gamma": 0.99, "alpha": 0.001, "target_sync_every": 5, "awac_max_weight": None, "q_rate": 1.0}


@dataclass(frozen=True, kw_only=True)
class ILQL(AlgorithmConfig):
    """Implicit Q-learning (ILQL, https://arxiv.org/abs/2206.11871): learn from texts with rewards what each token is
    worth, and sample the tokens that are worth more (``sampling.beta``)."""

    name: ClassVar[str] = "ilql"
    learns_from: ClassVar[str] = "texts of one or several turns with rewards"
    needs_q_heads: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "trlx": TRLX,
        "trlx/randomwalks": {**TRLX, "tau": 0.8, "alpha": 0.1},
    }

    target: str = "reward"
    """The column of the rewards: one number per text, or a list of one per turn or token (docs/data.md)."""
    tau: float = 0.7
    """Expectile of the state values: 0.5 is the mean over actions, towards 1 they approach the best action's value."""
    gamma: float = 0.99
    """Discount per action."""
    cql_scale: float = 0.1
    """Weight of the conservative term, which lowers the values of tokens that the data never takes."""
    awac_scale: float = 1.0
    """Weight of the likelihood of the data's tokens; 0 trains the values alone."""
    awac_beta: float = 0.0
    """How much more the likelihood of tokens counts that are worth more: exp(awac_beta * advantage); 0: all alike."""
    awac_max_weight: float | None = 100.0
    """Largest such weight; None sets no limit."""
    alpha: float = 0.1
    """How far the targets move towards the Q heads at every sync: target <- alpha Q + (1 - alpha) target."""
    target_sync_every: int = 5
    """Optimizer steps from one sync to the next."""
    two_qs: bool = True
    """Two Q heads, of which the lesser counts; False: one."""
    normalise_returns: bool = True
    """Bring the returns of the training texts to mean 0 and deviation 1; what is held out is scaled alike."""
    max_length: int | None = None
    """Longer texts are cut at this many tokens; None: the model's context."""
    q_rate: float = 10.0
    """Learning rate of the heads as a multiple of the language model's."""

    def __post_init__(self) -> None:
        checks = {
            "target must name a column": bool(self.target),
            "tau must lie in (0, 1), both excluded": 0 < self.tau < 1,
            "gamma must lie in [0, 1]": 0 <= self.gamma <= 1,
            "cql_scale must not be negative: it is a penalty": self.cql_scale >= 0,
            "awac_scale must not be negative": self.awac_scale >= 0,
            "awac_beta must not be negative": self.awac_beta >= 0,
            "awac_max_weight must be positive, or None for no limit": (
                self.awac_max_weight is None or self.awac_max_weight > 0
            ),
            "alpha must lie in (0, 1]": 0 < self.alpha <= 1,
            "target_sync_every must be at least 1": self.target_sync_every >= 1,
            "max_length must be at least 2, or None for the model's context": (
                self.max_length is None or self.max_length >= 2
            ),
            "q_rate must be positive": self.q_rate > 0,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)

    @property
    def reads(self) -> Literal["episodes"]:
        return "episodes"

    @property
    def q_head_count(self) -> int:
        return 2 if self.two_qs else 1

    @property
    def head_rate(self) -> float:
        return self.q_rate

    def build(self, facts: RunFacts) -> ILQLAlgorithm:
        return ILQLAlgorithm(self, facts)


class ILQLAlgorithm(Algorithm[ILQL]):
    """ILQL in a run; its state is the number of optimizer steps, by which the targets are synced."""

    def __init__(self, config: ILQL, facts: RunFacts) -> None:
        super().__init__(config, facts)
        self.updates = 0

    def loss(self, policy: Any, batch: EpisodeBatch) -> tuple[Sums, Ratios]:
        """The four terms, summed over actions; those of the Q heads over the heads as well.

        q     (Q_i(s, a) - y)^2,  y = r + gamma V(s')     v     expectile_tau(min_i target_i(s, a) - V(s))
        cql   logsumexp Q_i(s, .) - Q_i(s, a)             awac  -log pi(a | s) exp(awac_beta (min_i target_i - V))
        """
        config, mask = self.config, batch.loss_mask
        want = {"q", "target_q", "state_values"}
        want |= {"q_logsumexp"} if config.cql_scale > 0 else set()
        want |= {"logprobs"} if config.awac_scale > 0 else set()
        output = policy(**batch.inputs, mask=mask, want=frozenset(want))
        values, best = output.state_values, output.target_q
        goals = td_targets(batch.rewards, next_action_values(values.detach(), mask), gamma=config.gamma)
        heads = output.q.unbind(-1)
        sums = {
            "q": torch.stack([masked_sum((q - goals).square(), mask) for q in heads]).sum(),
            "v": masked_sum(expectile_loss(values, best, tau=config.tau), mask),
        }
        if config.cql_scale > 0:
            totals = output.q_logsumexp.unbind(-1)
            apart = [masked_sum(conservative_loss(q, all_), mask) for q, all_ in zip(heads, totals, strict=True)]
            sums["cql"] = config.cql_scale * torch.stack(apart).sum()
        advantages = (best - values).detach()
        if config.awac_scale > 0:
            weighed = advantage_weighted_loss(
                output.logprobs, advantages, beta=config.awac_beta, max_weight=config.awac_max_weight
            )
            sums["awac"] = config.awac_scale * masked_sum(weighed, mask)
        count = mask.sum()
        means = {"q/mean": heads[0].detach(), "q/target": best, "q/value": values.detach(), "q/advantage": advantages}
        return sums, {name: (masked_sum(numbers, mask), count) for name, numbers in means.items()}

    def weight(self, batch: EpisodeBatch) -> dict[str, float]:
        return dict.fromkeys(("q", "v", "cql", "awac"), count_tokens(batch))

    def after_step(self, policy: Any, metrics: Metrics) -> Signal:
        """Sync the targets every ``target_sync_every`` optimizer steps."""
        self.updates += 1
        if self.updates % self.config.target_sync_every == 0:
            policy.q_heads.sync(self.config.alpha)
        return Signal.CONTINUE

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = int(state["updates"])
