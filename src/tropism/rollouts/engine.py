"""The embedded sampler: decodes with the policy itself, a causal LM or an encoder-decoder.

Rows that end leave the batch and waiting rows take their place; the completions of equal prompts share one prefill; the
KV cache is allocated once; log-probs fall out of sampling; every draw has its own key.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tropism.errors import ConfigError, NumericsError
from tropism.out_of_memory import BatchSize
from tropism.rollouts.checks import check_context, check_ends, check_ids
from tropism.rollouts.config import Sampling
from tropism.rollouts.distribution import draw, penalise_repetition, truncate
from tropism.rollouts.ends import Ends
from tropism.rollouts.prefill import RowCache, prefill, room_for
from tropism.rollouts.protocol import Capabilities, FilterContext, GeneratingPolicy, LogitFilter, SamplingModel
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.row import Row, collected, sampled_by_parts
from tropism.rollouts.sampling_filters import filters_of
from tropism.types import Prompt, Rollouts

SLACK = 32
"""Columns beyond the longest row, so that rows need to be shifted only once in that many steps when others enter."""


@dataclass(frozen=True)
class _Prefill:
    """What one forward pass over a prompt (and its streams) left behind."""

    wave: int
    """Number of that pass; the prefixes that it computed share ``cache``."""
    cache: RowCache
    place: int
    """First cache row of this prefix."""
    hidden: Tensor
    """[S, H] at the last token of each stream."""


class EmbeddedSampler:
    """Samples with the policy's own weights and forward pass.

    Args:
        tokenizer: for stop strings, and for the token of ``Truncation`` where it is given as text.
        eos_ids: tokens that end a completion; empty where the model has none.
    """

    capabilities = Capabilities(logit_filters=True, streams=True, stop_strings=True, keyed_randomness=True)

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.size = BatchSize(
            "rows sampled at once",
            setting="sampling.batch_size",
            advice="Lower sampling.max_new_tokens, shorten the prompts, or choose a smaller model",
        )

    @torch.no_grad()
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
        """See ``Sampler.generate``."""
        if not prompts:
            raise ConfigError("there are no prompts to sample from")
        if n < 1:
            raise ConfigError(f"n is {n}; at least one completion per prompt must be asked for")
        prefixes = [
            (prompt.ids, *(tuple(ids) for ids in (streams[i] if streams is not None else ())))
            for i, prompt in enumerate(prompts)
        ]
        if len({len(p) for p in prefixes}) > 1:
            raise ConfigError("every prompt needs the same number of streams")
        check_context(prefixes, sampling, policy.context_length, decoder_prefix=policy.decoder_prefix)
        vocabulary = int(policy.config.vocab_size)
        check_ids(prefixes, vocabulary, slots=policy.takes_slots)
        check_ends(sampling, self.tokenizer, vocabulary)
        rows = [Row(index=i * n + j, prefixes=prefix) for i, prefix in enumerate(prefixes) for j in range(n)]
        ends = Ends.of(sampling, self.eos_ids, self.tokenizer)

        def decode(waiting: Sequence[Row], width: int) -> None:
            # What is prepared for sampling (a graph over a cache, on CUDA) belongs to one attempt.
            with policy.for_sampling(compiled=sampling.compile) as model:
                own = filters_of(sampling, model, self.tokenizer, self.eos_ids, vocabulary)
                _Decoder(policy, model, waiting, sampling, key, first_index, (*own, *filters), ends, width).run()

        rows = sampled_by_parts(rows, decode, self.size, sampling.batch_size)
        return collected(rows, sampling, ends)


class _Decoder:
    """The decode loop of one ``generate`` call. Each row occupies one cache row per stream, side by side."""

    def __init__(
        self,
        policy: GeneratingPolicy,
        model: SamplingModel,
        rows: Sequence[Row],
        sampling: Sampling,
        key: StreamKey,
        first_index: int,
        filters: Sequence[LogitFilter],
        ends: Ends,
        width: int,
    ) -> None:
        self.policy, self.device, self.model, self.sampling = policy, policy.device, model, sampling
        self.key, self.first_index = key, first_index
        self.filters, self.ends = filters, ends
        self.forbidden_early = torch.tensor(sorted(ends.eos_ids | ends.stop_ids), device=self.device)
        self.streams = len(rows[0].prefixes)
        self.waiting = deque(rows)
        self.active: list[Row] = []
        self.width = width
        longest = max(len(ids) for row in rows for ids in row.prefixes)
        new = sampling.max_new_tokens + (SLACK if len(rows) > self.width else 1)
        self.cache = room_for(policy, model, rows=self.width * self.streams, longest=longest, new=new)
        self.prefilled: dict[tuple[tuple[int, ...], ...], _Prefill] = {}
        self.waves = 0
        self.uses = Counter(row.prefixes for row in rows)
        self.hidden: Tensor | None = None

    def run(self) -> None:
        while self.waiting or self.active:
            self._admit()
            tokens = self._sample()
            if any(row.finish_reason is not None for row in self.active):
                tokens = tokens[self._drop_ended()]
            if self.active:
                self._decode(tokens)

    # Rows enter ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Waiting rows take free places, once a quarter of the places are free: a prefill costs about a decode step."""
        free = self.width - len(self.active)
        if not self.waiting or (self.active and free < max(1, self.width // 4)):
            return
        entering = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        missing = list(dict.fromkeys(row.prefixes for row in entering if row.prefixes not in self.prefilled))
        if missing:
            self._prefill(missing)
        # Rows whose prefixes were computed together are copied together; the sort keeps the order reproducible.
        entering.sort(key=lambda row: self.prefilled[row.prefixes].wave)
        found = [self.prefilled[row.prefixes] for row in entering]
        for _, group in groupby(found, key=lambda prefill: prefill.wave):
            members = list(group)
            places = [prefill.place + stream for prefill in members for stream in range(self.streams)]
            self.cache.make_room(members[0].cache.cursor)
            self.cache.append(members[0].cache, torch.tensor(places, device=self.device))  # type: ignore[arg-type]
        for row in entering:
            self.uses[row.prefixes] -= 1
            if self.uses[row.prefixes] == 0:
                del self.prefilled[row.prefixes]
        entered = torch.stack([prefill.hidden for prefill in found])
        self.hidden = entered if self.hidden is None else torch.cat([self.hidden, entered])
        self.active.extend(entering)

    def _prefill(self, missing: Sequence[tuple[tuple[int, ...], ...]]) -> None:
        """One forward pass over distinct prefixes; keeps their cache and last hidden states."""
        flat = [ids for prefixes in missing for ids in prefixes]
        cache, hidden = prefill(self.policy, self.model, flat)
        for index, prefixes in enumerate(missing):
            place = index * self.streams
            own = hidden[place : place + self.streams]
            self.prefilled[prefixes] = _Prefill(wave=self.waves, cache=cache, place=place, hidden=own)
        self.waves += 1

    # Rows go on ----------------------------------------------------------------------------------------------------

    def _sample(self) -> Tensor:
        """One token for every active row, recorded; rows that end get their finish reason."""
        assert self.hidden is not None
        all_logits = self.model.logits(self.hidden).float()
        logits = all_logits[:, 0]
        greedy = self.sampling.temperature == 0
        if self._plain:
            tokens, behaviour, logprobs = self._draw_without_early_ends(self._tempered(logits))
        else:
            tempered = self._tempered(logits)
            scaled = self._filtered(logits, all_logits)
            if greedy:
                tokens = scaled.argmax(-1)
                behaviour = _logprob(scaled, tokens)
            else:
                tokens, behaviour = draw(scaled, self._uniforms())
            logprobs = _logprob(tempered, tokens)
        values = self.model.values(self.hidden[:, 0])
        if values is not None:
            for row, value in zip(self.active, values.tolist(), strict=True):
                row.values.append(value)
        sampled = zip(self.active, tokens.tolist(), logprobs.tolist(), behaviour.tolist(), strict=True)
        for row, token, logprob, behaviour_logprob in sampled:
            if isnan(logprob) or isnan(behaviour_logprob):
                raise self._no_distribution(row, logprob)
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.behaviour_logprobs.append(0.0 if greedy else behaviour_logprob)
        self._finish()
        return tokens

    def _tempered(self, logits: Tensor) -> Tensor:
        temperature = self.sampling.softmax_temperature
        return logits if temperature == 1 else logits / temperature

    def _no_distribution(self, row: Row, logprob: float) -> NumericsError:
        place = f"token {len(row.ids)} of completion {row.index}"
        if isnan(logprob):
            weights = self.policy.named_parameters()
            bad = next((name for name, weight in weights if not bool(weight.isfinite().all())), None)
            broken = "all weights are, so its precision is broken"
            cause = broken if bad is None else f"the first weight that is not is {bad}"
            return NumericsError(
                f"the model's logits for {place} are not finite; {cause} (try dtype float32 and a lower learning rate)"
            )
        return NumericsError(
            f"no token is possible for {place}: the logit filters and min_new_tokens={self.sampling.min_new_tokens} "
            "forbid every one; let a filter keep at least one token finite"
        )

    @property
    def _plain(self) -> bool:
        """Whether the distribution sampled from is the tempered one itself, but for ends that come too early."""
        s = self.sampling
        truncated = s.top_k > 0 or s.top_p < 1 or s.min_p > 0 or s.repetition_penalty != 1
        return not (truncated or self.filters or s.temperature == 0)

    def _draw_without_early_ends(self, tempered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [R], their log-probs where early ends are forbidden, and where they are not.

        What the few forbidden tokens weigh is added to the sum of all others, which saves a pass over the vocabulary:
        log p = l - log(exp(lse of the allowed) + exp(lse of the forbidden)).
        """
        early = self._early_rows()
        if early is None:
            tokens, logprobs = draw(tempered, self._uniforms())
            return tokens, logprobs, logprobs
        forbidden = tempered[:, self.forbidden_early].logsumexp(-1)
        tempered[early, self.forbidden_early[None, :]] = -torch.inf
        tokens, behaviour = draw(tempered, self._uniforms())
        chosen = tempered.gather(-1, tokens[:, None]).squeeze(-1)
        unforbidden = chosen - torch.logaddexp(chosen - behaviour, forbidden)
        at_early = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        at_early[early.squeeze(-1)] = True
        return tokens, behaviour, torch.where(at_early, unforbidden, behaviour)

    def _early_rows(self) -> Tensor | None:
        """[E, 1] rows that may not end yet; None where there are none, or nothing would end them."""
        early = [len(row.ids) < self.sampling.min_new_tokens for row in self.active]
        if not any(early) or not len(self.forbidden_early):
            return None
        return torch.tensor(early, device=self.device).nonzero()

    def _filtered(self, logits: Tensor, stream_logits: Tensor) -> Tensor:
        """Logits [R, V] of the distribution that is sampled from."""
        sampling = self.sampling
        if self.filters:
            assert self.hidden is not None
            ids = [[*row.prompt, *row.ids] for row in self.active]
            context = FilterContext(
                stream_logits=stream_logits,
                hidden=self.hidden,
                ids=ids,
                prompt_lengths=[len(row.prompt) for row in self.active],
                row_state=[row.state for row in self.active],
            )
            for change in self.filters:
                logits = change(logits, context)
        if sampling.repetition_penalty != 1:
            # Of an encoder-decoder what its decoder has read; a summary may repeat words of the text.
            prefix = self.policy.decoder_prefix
            read = [[*(row.prompt if prefix is None else prefix), *row.ids] for row in self.active]
            logits = penalise_repetition(logits, read, sampling.repetition_penalty)
        early = self._early_rows()
        if early is not None:
            logits = logits.clone()
            logits[early, self.forbidden_early[None, :]] = -torch.inf
        return truncate(self._tempered(logits), sampling)

    def _uniforms(self) -> Tensor:
        samples = np.array([self.first_index + row.index for row in self.active], dtype=np.int64)
        tokens = np.array([len(row.ids) for row in self.active], dtype=np.int64)
        return torch.from_numpy(self.key.uniforms(samples, tokens))

    def _finish(self) -> None:
        stops, apart = self.ends.stops, self.policy.decoder_prefix is not None
        for row in self.active:
            if stops is not None and not row.spelled_stop:
                row.spelled_stop = stops.ended(() if apart else row.prompt, row.ids)
            row.finish_reason = self.ends.reason(row.ids, spelled_stop=row.spelled_stop)

    def _drop_ended(self) -> Tensor:
        """Rows that ended leave the batch and the cache; returns the former places [R] of those that stay.

        The last rows move into the places that became free, so that few keys and values are copied.
        """
        going = [i for i, row in enumerate(self.active) if row.finish_reason is None]
        movers = deque(reversed([i for i in going if i >= len(going)]))
        order = [i if self.active[i].finish_reason is None else movers.popleft() for i in range(len(going))]
        index = torch.tensor(order, dtype=torch.long, device=self.device)
        self.cache.keep((index[:, None] * self.streams + torch.arange(self.streams, device=index.device)).flatten())
        assert self.hidden is not None
        self.hidden = self.hidden[index]
        self.active = [self.active[i] for i in order]
        return index

    def _decode(self, tokens: Tensor) -> None:
        """One forward pass: the sampled token of each row, in each of its streams."""
        self.cache.make_room(0)
        hidden = self.model.decode(tokens.repeat_interleave(self.streams), self.cache)
        self.cache.advance(1)
        self.hidden = hidden.view(len(self.active), self.streams, -1)


def _logprob(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
