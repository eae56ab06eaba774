"""How completions are sampled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from tropism.errors import ConfigError

BEAMS = ("num_beams", "num_beam_groups", "early_stopping", "length_penalty", "diversity_penalty")
"""Settings of a search by beams, which other libraries take for rollouts."""

Beyond = Literal["stop", "mask", "train"]
PolicyDistribution = Literal["tempered", "filtered"]


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """A token that ends completions once they have some length, such as the full stop of a sentence.

    Fine-tuning language models from human preferences, https://arxiv.org/abs/1909.08593.
    """

    token: str | int
    """A text that is exactly one token of the model's tokenizer where it follows other text, or the token's id."""
    after: int = 0
    """The first such token at this index of the completion (from 0) or later ends it; earlier ones are plain text."""
    beyond: Beyond = "stop"
    """`stop` ends sampling there; `mask` always samples max_new_tokens tokens and cuts off what follows the end;
    `train` samples as many and trains them all, and rewards see the text up to the end. In `mask` and `train` no eos
    ends a completion."""

    def __post_init__(self) -> None:
        if isinstance(self.token, bool) or not isinstance(self.token, (str, int)):
            raise ValueError(f"token must be a text that is one token, or an id, not {self.token!r:.60}")
        if self.token == "":
            raise ValueError("token must not be empty: give a text that is one token, or an id")
        if isinstance(self.token, int) and self.token < 0:
            raise ValueError(f"token is the id {self.token}; ids are not negative")
        if self.after < 0:
            raise ValueError("after must not be negative: it is the index of a token")
        if self.beyond not in get_args(Beyond):
            raise ValueError(f"beyond must be one of {', '.join(get_args(Beyond))}, not {self.beyond!r:.60}")


def refuse_beams(names: Iterable[Any]) -> None:
    """Refuse settings of a beam search.

    Raises:
        ConfigError: there is one among the names.
    """
    for name in names:
        if name in BEAMS:
            raise ConfigError(
                f"sampling.{name}: what a search by beams finds is no sample of the policy, so ratios, the KL and"
                " every update that is made of them would be wrong; leave it out, and one token is sampled after the"
                " other. (A model can be measured with beams: tropism toxicity --num-beams 5)"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one round of sampling; the defaults sample the model's own distribution."""

    max_new_tokens: int = 64
    """Most tokens of a completion, the final eos included."""
    min_new_tokens: int = 0
    """No eos (nor stop token) before this many tokens."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token (log-probs then hold at temperature 1)."""
    top_k: int = 0
    """Keep the k most likely tokens, ties included; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability, the crossing token included."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or completion; 1 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the text that rewards see ends before the string, the token ids keep it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, beside the model's eos."""
    truncation: Truncation | None = None
    """A token that ends completions once they have some length; None: there is none."""
    beta: float = 0.0
    """Of a model with Q heads (ilql): so much of each token's advantage is added to its logit; 0 leaves it as it is."""
    allowed_tokens: str | None = None
    """A JSON file {token: [tokens that may follow it]}; no other token is sampled. None: every token may follow."""
    policy_distribution: PolicyDistribution = "tempered"
    """Which distribution ppo, grpo and rloo train, and ratio and KL are about: `tempered` is the model's at this
    temperature, whatever else samples; `filtered` is what remains of it after the repetition penalty, top-k, top-p and
    min-p. A token that leaves the filtered set has ratio 0 and no gradient: the policy cannot learn it back."""
    batch_size: int = 64
    """Most rows decoded at once; as rows end, waiting prompts take their place."""
    compile: bool = False
    """Decode on the CPU in fp32 with kernels that the machine's C compiler builds at first use (about a second; kept in
    the user's cache folder). Faster, most of all for small models; log-probs agree with torch's to rounding."""

    refuse = staticmethod(refuse_beams)

    def __new__(cls, **given: Any) -> Self:
        """Names of other libraries are refused with the reason, where Python would say that it does not know them."""
        refuse_beams(given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        refuse_sweep({f.name: getattr(self, f.name) for f in fields(self)})
        checks = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "min_new_tokens must lie between 0 and max_new_tokens": 0 <= self.min_new_tokens <= self.max_new_tokens,
            "temperature must be 0 (greedy) or positive": self.temperature >= 0,
            "top_k must be 0 (off) or positive": self.top_k >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "min_p must lie in [0, 1]": 0 <= self.min_p <= 1,
            "repetition_penalty must be positive": self.repetition_penalty > 0,
            "stop strings must not be empty": all(self.stop),
            "batch_size must be at least 1": self.batch_size >= 1,
            "beta must be 0 (off) or positive and finite": 0 <= self.beta < math.inf,
            "allowed_tokens is empty; name a JSON file, or leave it out": self.allowed_tokens != "",
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)
        self._check_policy_distribution()
        if self.truncation is not None:
            self._check_truncation(self.truncation)

    def _check_policy_distribution(self) -> None:
        if self.policy_distribution not in get_args(PolicyDistribution):
            known = ", ".join(get_args(PolicyDistribution))
            raise ValueError(f"policy_distribution must be one of {known}, not {self.policy_distribution!r:.60}")
        if self.policy_distribution == "tempered":
            return
        others = {
            "temperature=0": self.temperature == 0,
            "min_new_tokens": self.min_new_tokens > 0,
            "beta": self.beta > 0,
            "allowed_tokens": self.allowed_tokens is not None,
        }
        for name, given in others.items():
            if given:
                raise ValueError(
                    f"policy_distribution='filtered' knows what the repetition penalty, top-k, top-p and min-p leave, "
                    f"and {name} changes it in a way that training does not compute. Leave {name} out, or set "
                    "policy_distribution to 'tempered'"
                )

    def _check_truncation(self, truncation: Truncation) -> None:
        after, beyond = truncation.after, truncation.beyond
        if after >= self.max_new_tokens:
            raise ValueError(
                f"truncation.after is {after}, and the last token of max_new_tokens={self.max_new_tokens} has the "
                f"index {self.max_new_tokens - 1}: no token could end a completion. Lower truncation.after, raise "
                "max_new_tokens, or leave truncation out"
            )
        if beyond == "stop" and self.min_new_tokens > after + 1:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is more than the {after + 1} tokens after which "
                f"truncation.after={after} lets a completion end; raise truncation.after"
            )
        if self.fixed_length:
            ends = {"stop": self.stop, "stop_token_ids": self.stop_token_ids, "min_new_tokens": self.min_new_tokens}
            for name, given in ends.items():
                if given:
                    raise ValueError(
                        f"{name} says where completions may end, and with truncation.beyond={beyond!r} none ends "
                        f"before max_new_tokens. Leave {name} out, or set truncation.beyond to 'stop'"
                    )

    @property
    def fixed_length(self) -> bool:
        """Whether exactly ``max_new_tokens`` tokens are sampled, whatever they are."""
        return self.truncation is not None and self.truncation.beyond != "stop"

    def can_end(self, *, eos: bool) -> bool:
        """Whether anything but the length limit can end a completion.

        Args:
            eos: whether the model has one.
        """
        return self.truncation is not None or bool(self.stop or self.stop_token_ids) or eos

    @property
    def softmax_temperature(self) -> float:
        """The temperature at which log-probs are reported: greedy sampling reports them at 1."""
        return self.temperature if self.temperature > 0 else 1.0

    def shortened(self, max_new_tokens: int) -> Self:
        """The same with at most that many tokens; what cannot happen before then may happen at the last token."""
        new = min(max_new_tokens, self.max_new_tokens)
        truncation = self.truncation
        if truncation is not None:
            truncation = replace(truncation, after=min(truncation.after, new - 1))
        return replace(self, max_new_tokens=new, min_new_tokens=min(new, self.min_new_tokens), truncation=truncation)


def refuse_sweep(settings: Mapping[str, Any]) -> None:
    """Refuse a list where one value belongs: a run samples with one value of each field.

    Raises:
        ValueError: says where several are listed.
    """
    for name, value in settings.items():
        if name not in ("stop", "stop_token_ids") and isinstance(value, list | tuple):
            changes = ", ".join(f"{{{name}: {one}}}" for one in value[:3]) + ", ..." * (len(value) > 3)
            raise ValueError(
                f"sampling.{name} is a list, and a run samples with one value. To evaluate at several, give one here "
                f"and list the others: trainer: {{evaluation: {{sampling: [{changes:.200}]}}}}"
            )
