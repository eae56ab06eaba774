"""How the TextRL facade chooses tokens: filtered to sample, tempered and unfiltered for the log-probs that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tropism.errors import ConfigError, NumericsError
from tropism.ops import entropy
from tropism.rollouts.config import Sampling
from tropism.rollouts.distribution import draw, penalise_repetition, truncate
from tropism.rollouts.randomness import StreamKey


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One token per sample, and what the distributions that it came from say of it."""

    tokens: Tensor
    """[n] ids, on the CPU."""
    logprobs: list[float]
    """Under the tempered, unfiltered distribution: what training compares with."""
    behaviour_logprobs: list[float]
    """Under the distribution that was sampled from; 0 where the most likely token was taken."""
    entropies: list[float]
    """Of the tempered distribution, in nats."""


@dataclass(frozen=True, kw_only=True)
class Acting:
    """What ``TextRLActor`` was told about sampling."""

    act_deterministically: bool = True
    """Outside training the most likely token is taken. Training always samples."""
    temperature: float = 1.0
    """Logits are divided by it."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability, the crossing token included."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that the completion holds already; 1 is off."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be positive (act_deterministically=True takes the most "
                "likely token)"
            )
        try:
            _ = self.sampling
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def sampling(self) -> Sampling:
        """The same as settings of the sampler."""
        return Sampling(
            temperature=float(self.temperature),
            top_k=self.top_k,
            top_p=float(self.top_p),
            repetition_penalty=float(self.repetition_penalty),
        )

    @torch.no_grad()
    def choose(
        self,
        logits: Tensor,
        completions: Sequence[Sequence[int]],
        going: Sequence[bool],
        *,
        key: StreamKey,
        greedy: bool,
    ) -> Choice:
        """The next token of each sample.

        Args:
            logits: [n, V] raw ones of the next token.
            completions: n lists of ids so far.
            going: which samples have not ended; the tokens of the others mean nothing.
            key: of the draws; sample and token index complete it.
            greedy: take the most likely token of the filtered distribution.

        Raises:
            NumericsError: the model gives no distribution.
        """
        tempered = logits.float() / self.temperature
        filtered = tempered
        if self.repetition_penalty != 1 and all(completions):
            filtered = penalise_repetition(tempered, completions, self.repetition_penalty)
        filtered = truncate(filtered, self.sampling)
        if greedy:
            tokens, behaviour = filtered.argmax(-1), torch.zeros(len(filtered))
        else:
            index = np.array([len(ids) for ids in completions], dtype=np.int64)
            uniforms = key.uniforms(np.arange(len(index), dtype=np.int64), index)
            tokens, behaviour = draw(filtered, torch.from_numpy(uniforms))
        logprobs = tempered.gather(-1, tokens[:, None]).squeeze(-1) - tempered.logsumexp(-1)
        if not bool(logprobs.cpu()[torch.tensor(going)].isfinite().all()):
            raise NumericsError(
                "the model's logits are not finite, so no token can be chosen; try dtype float32 and a lower learning "
                "rate, and load the last good weights"
            )
        return Choice(
            tokens=tokens.cpu(),
            logprobs=logprobs.tolist(),
            behaviour_logprobs=behaviour.tolist(),
            entropies=entropy(tempered).tolist(),
        )
