"""What a sampler is: the contract between the engine that samples and everything that trains on its samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tropism.rollouts.config import Sampling
from tropism.rollouts.randomness import StreamKey
from tropism.types import Prompt, Rollouts


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What an engine can do. What it cannot do is refused, never replaced by something similar."""

    logit_filters: bool
    streams: bool
    """Rows of several streams with different prefixes that share the sampled token (guidance)."""
    stop_strings: bool
    keyed_randomness: bool
    """A sample depends on its key alone."""


@dataclass(frozen=True, kw_only=True)
class FilterContext:
    """What a logit filter may look at when it changes the logits of the next token of R rows."""

    stream_logits: Tensor
    """[R, S, V] raw logits of each stream; stream 0 is the row's own, whose log-probs are reported."""
    hidden: Tensor
    """[R, S, H] input of the vocabulary projection, per stream."""
    ids: Sequence[Sequence[int]]
    """R lists: prompt (without reward slots) and completion so far, of stream 0."""
    prompt_lengths: Sequence[int]
    """How many of each row's ids are prompt."""
    row_state: Sequence[dict[str, Any]]
    """One dict per row that lives as long as the row; a filter may keep what it likes there."""


class LogitFilter(Protocol):
    """Changes the logits that are sampled from; reported ``logprobs`` stay those of the unfiltered distribution."""

    def __call__(self, logits: Tensor, context: FilterContext) -> Tensor:
        """[R, V] raw logits of stream 0, as left by the filters before -> [R, V] logits; -inf forbids a token."""
        ...


class SamplingModel(Protocol):
    """A policy while it samples; ``cache`` is the sampler's ``SlabCache``."""

    @property
    def cache_dtype(self) -> Any:
        """Of keys and values."""
        ...

    def hidden_states(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """[B, L] ids -> [B, L, H], the input of the vocabulary projection."""
        ...

    def encode(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """[B, P] ids of prompts -> [B, P, H] of the encoder, where there is one."""
        ...

    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        """[R] next ids -> [R, H]."""
        ...

    def values(self, hidden: Tensor) -> Tensor | None:
        """[..., H] -> [...] of the critic; None where there is none."""
        ...

    @property
    def values_actions(self) -> bool:
        """Whether the policy says what each token is worth."""
        ...

    def advantages(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V] what each token is worth beyond its state, where ``values_actions`` is true."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        ...


class GeneratingPolicy(Protocol):
    """What the embedded sampler needs of a policy."""

    @property
    def config(self) -> Any: ...
    @property
    def device(self) -> Any: ...
    @property
    def context_length(self) -> int | None: ...
    @property
    def takes_slots(self) -> bool: ...
    @property
    def decoder_prefix(self) -> tuple[int, ...] | None:
        """What stands before every completion in an encoder-decoder's decoder; None of a causal model."""
        ...

    @property
    def cached_layers(self) -> int: ...
    def for_sampling(self, *, compiled: bool = False) -> AbstractContextManager[SamplingModel]: ...
    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...


class Sampler(Protocol):
    """Anything that turns prompts into rollouts."""

    @property
    def capabilities(self) -> Capabilities: ...

    def generate(
        self,
        policy: GeneratingPolicy,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int = 1,
        *,
        key: StreamKey,
        first_index: int = 0,
        filters: Sequence[LogitFilter] = (),
        streams: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> Rollouts:
        """``n`` completions of each prompt, contiguous, in the order of the prompts.

        Args:
            key: what the randomness is keyed by; with it go the sample index (``first_index`` plus the row) and the
                token index.
            filters: applied in order to the raw logits, before temperature and truncation of the distribution.
            streams: per prompt, further prefixes (token ids) that decode along and see the same sampled tokens.

        Raises:
            TropismError: no prompts, a prompt that leaves no room in the context, or something the engine cannot do.
        """
        ...
