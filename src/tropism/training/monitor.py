"""Warnings that name the cause, while there is still time to stop a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tropism.types import Metrics

PATIENCE = 10
"""Collects in a row before a slow problem is reported."""
HIGH_KL = 10.0
EXPLODED_KL = 50.0
LOW_DIVERSITY = 0.25
LOW_SAMPLE_SIZE = 0.9
"""Effective share of tokens: log-probs that scatter by about 0.3 nats, several times what bf16 does."""
LOW_SEQUENCE_SAMPLE_SIZE = 0.3
"""Effective share of completions; the scatter of their tokens adds up, so it falls with length."""


@dataclass(frozen=True)
class _Rule:
    name: str
    holds: Callable[[Metrics], bool]
    message: str
    after: int = 1
    """Collects in a row for which it must hold."""


RULES = (
    _Rule(
        "truncated",
        lambda m: m.get("rollout/truncated_fraction", 0) == 1.0,
        "every completion was cut by the length limit: rewards see unfinished text, and the model never practises "
        "ending. That is fine for plain openings of text; otherwise raise sampling.max_new_tokens or add sampling.stop",
    ),
    _Rule(
        "constant",
        lambda m: m.get("reward/std", 1.0) == 0.0,
        "every completion got the same reward ({reward/mean}): there is nothing to learn from. Check the reward on a "
        "few rows of rollouts/*.parquet, or raise sampling.temperature",
    ),
    _Rule(
        "zero variance",
        lambda m: m.get("reward/zero_variance_groups", 0.0) == 1.0,
        "in every group all completions got the same reward for 10 steps: groups give no signal. Use a reward with "
        "more levels, prompts of mixed difficulty, or a larger group_size",
        PATIENCE,
    ),
    _Rule(
        "kl",
        lambda m: m.get("policy/sequence_kl", 0.0) > HIGH_KL,
        "the policy is {policy/sequence_kl} nats from the reference per completion: read the samples before you trust "
        "the reward. A larger kl_coef or a smaller learning rate keeps it closer",
    ),
    _Rule(
        "exploded kl",
        lambda m: m.get("policy/sequence_kl", 0.0) > EXPLODED_KL,
        "the KL to the reference exploded ({policy/sequence_kl} nats per completion): the text is probably degenerate. "
        "Stop, raise kl_coef or lower the learning rate",
    ),
    _Rule(
        "negative kl",
        lambda m: m.get("policy/sequence_kl", 0.0) < -5.0,
        "the sampled KL to the reference is {policy/sequence_kl} nats, clearly negative: samples do not come from the "
        "policy that is scored. Look for truncated sampling (top_k, top_p) or mismatched log-probs",
    ),
    _Rule(
        "diversity",
        lambda m: m.get("rollout/distinct", 1.0) < LOW_DIVERSITY,
        "only {rollout/distinct} of the completions of a step are distinct: the policy has collapsed onto few answers. "
        "Raise kl_coef or sampling.temperature, or stop earlier",
    ),
    _Rule(
        "empty",
        lambda m: m.get("rollout/empty_fraction", 0.0) > 0.5,
        "most completions are empty or one token long: the policy learned to stop at once. Check what the reward gives "
        "an empty text, or set sampling.min_new_tokens",
    ),
    _Rule(
        "sample size",
        lambda m: m.get("rollout/effective_sample_size", 1.0) < LOW_SAMPLE_SIZE,
        "sampling and training forward differ by {rollout/logprob_mismatch} nats per token: the tokens count as only "
        "{rollout/effective_sample_size} of their number. Set trainer.precision to fp32, or model.dtype to float32",
    ),
    _Rule(
        "sequence sample size",
        lambda m: m.get("rollout/sequence_effective_sample_size", 1.0) < LOW_SEQUENCE_SAMPLE_SIZE,
        "sampling and training forward differ so much over whole completions that these count as "
        "{rollout/sequence_effective_sample_size} of their number. Set trainer.precision to fp32, use a method with "
        "a ratio per token, or switch the weights off (trainer.importance_cap: null)",
    ),
    _Rule(
        "unscored",
        lambda m: m.get("reward/unscored", 0.0) == 1.0,
        "the reward had no opinion (None) on any completion of this step: no update was possible",
    ),
)


@dataclass
class Monitor:
    """Checks every collect against ``RULES``; each warning is given once per run."""

    given: set[str] = field(default_factory=set)
    streaks: dict[str, int] = field(default_factory=dict)

    def check(self, metrics: Metrics) -> list[str]:
        """The warnings that are due."""
        due = []
        for rule in RULES:
            self.streaks[rule.name] = self.streaks.get(rule.name, 0) + 1 if rule.holds(metrics) else 0
            if self.streaks[rule.name] >= rule.after and rule.name not in self.given:
                self.given.add(rule.name)
                message = rule.message
                for name, value in metrics.items():
                    message = message.replace(f"{{{name}}}", f"{value:.3g}")
                due.append(message)
        return due + self._failing_rewards(metrics)

    def _failing_rewards(self, metrics: Metrics) -> list[str]:
        due = []
        for name, count in metrics.items():
            if name.startswith("reward/") and name.endswith("/skipped") and name not in self.given:
                self.given.add(name)
                term = name.removeprefix("reward/").removesuffix("/skipped")
                due.append(
                    f"{count:.0f} completions were left unscored because calls of the reward {term!r} failed; the "
                    f"column error/{term} of rollouts/*.parquet says why"
                )
        return due

    def state_dict(self) -> dict[str, object]:
        return {"given": sorted(self.given), "streaks": self.streaks}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.given = set(state["given"])  # type: ignore[call-overload]
        self.streaks = dict(state["streaks"])  # type: ignore[call-overload]
