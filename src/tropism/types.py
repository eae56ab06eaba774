"""What travels between the parts: prompts, rollouts, rewards and training batches.

Alignment, for every ``[B, T]`` tensor of the library: index ``t`` is about *completion token t*: its id, its log-prob,
the value before it, its mask, its reward. Prompts are padded on the left, completions on the right, and which
entries are real follows from lengths, never from token ids.

A worked example. Two completions, of the prompts ``[5, 6]`` and ``[7]``; the first ended with eos (id 2) after two
tokens, the second was cut after three::

    prompt_ids         [[5, 6], [0, 7]]          prompt_lengths      [2, 1]
    completion_ids     [[8, 2, 0], [9, 8, 9]]    completion_lengths  [2, 3]
    logprobs           [[-1.2, -0.1, 0], [-0.7, -2.0, -0.3]]
    completion_mask    [[1, 1, 0], [1, 1, 1]]
    finish_reasons     ["eos", "length"]

``logprobs[0, 1]`` is the log-prob of the eos after ``5 6 8``. A reward for the first completion as a whole sits at
index 1, its last real token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

Messages = list[dict[str, Any]]
"""A chat: ``[{"role": "user", "content": "..."}, ...]``."""

FinishReason = Literal["eos", "stop", "length"]
"""Why a completion ended: the model's eos, a stop string or stop token, or the length limit."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: what the user wrote, its token ids, and the columns that travel with it to the reward."""

    text: str | Messages
    """The prompt as given: text, or chat messages."""
    ids: tuple[int, ...]
    """Token ids as the model reads them, special tokens included; never empty."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of the record, for reward functions."""


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """One text and the rewards it was given, for methods that learn which text earns what."""

    prompt_ids: tuple[int, ...]
    """Token ids that are read only, without any slot; empty for a plain text where the tokenizer has no BOS."""
    completion_ids: tuple[int, ...]
    """Token ids that follow, the final eos included; never empty."""
    rewards: tuple[float, ...]
    """One per target, in the order of ``Conditioning.targets``, in the reward's own units."""


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Mask of real entries of right-padded rows: ``lengths`` [B] -> bool [B, width]."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def pad_rows(
    rows: Sequence[Sequence[Any]], *, value: Any = 0, dtype: torch.dtype = torch.long, left: bool = False
) -> Tensor:
    """Rows of different lengths -> one tensor ``[B, longest]``, padded with ``value`` on the right (or the left)."""
    width = max((len(row) for row in rows), default=0)
    padded = torch.full((len(rows), width), value, dtype=dtype)
    for index, row in enumerate(rows):
        if len(row):
            span = slice(width - len(row), width) if left else slice(0, len(row))
            padded[index, span] = torch.as_tensor(row, dtype=dtype)
    return padded


def first_with_same_prompt(prompt_ids: Tensor, prompt_lengths: Tensor) -> Tensor:
    """[B] index of the first row whose prompt equals that of each row, from prompts [B, P] and their lengths [B]."""
    seen: dict[tuple[int, ...], int] = {}
    wide = prompt_ids.shape[1]
    rows = zip(prompt_ids.tolist(), prompt_lengths.tolist(), strict=True)
    first = [seen.setdefault(tuple(ids[wide - length :]), index) for index, (ids, length) in enumerate(rows)]
    return torch.tensor(first, dtype=torch.long, device=prompt_ids.device)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Prompts and completions as tensors; the part that rollouts and every training batch share."""

    prompt_ids: Tensor
    """[B, P] padded on the left."""
    prompt_lengths: Tensor
    """[B] at least 1 each."""
    completion_ids: Tensor
    """[B, T] padded on the right."""
    completion_lengths: Tensor
    """[B] 0 is allowed: such a row contributes nothing."""

    def __len__(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def completion_mask(self) -> Tensor:
        """[B, T] bool, true at real completion tokens."""
        return length_mask(self.completion_lengths, self.completion_ids.shape[1])

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of ``Policy.forward``."""
        return {
            name: getattr(self, name)
            for name in ("prompt_ids", "prompt_lengths", "completion_ids", "completion_lengths")
        }

    @property
    def total_lengths(self) -> Tensor:
        """[B] prompt plus completion tokens."""
        return self.prompt_lengths + self.completion_lengths

    def tensors(self) -> dict[str, Tensor]:
        """All tensor fields by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def select(self, rows: Tensor) -> Self:
        """The given rows (index tensor [N]), trimmed to the longest prompt and completion among them."""
        changes: dict[str, Any] = {name: value[rows.to(value.device)] for name, value in self.tensors().items()}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                changes[f.name] = tuple(value[i] for i in rows.tolist())
        return replace(self, **changes).trimmed()

    def trimmed(self) -> Self:
        """Without the columns in which no row has a token."""
        prompt = int(self.prompt_lengths.max()) if len(self) else 0
        completion = int(self.completion_lengths.max()) if len(self) else 0
        wide, width = self.prompt_ids.shape[1], self.completion_ids.shape[1]
        if prompt == wide and completion == width:
            return self
        changes: dict[str, Any] = {"prompt_ids": self.prompt_ids[:, wide - prompt :]}
        for name, value in self.tensors().items():
            if name not in ("prompt_ids", "prompt_lengths") and value.dim() >= 2:
                changes[name] = value[:, :completion]
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Rows of several batches in order, padded to the longest prompt and completion among them."""
        if len(parts) == 1:
            return parts[0]
        merged: dict[str, Any] = {}
        for f in fields(cls):
            values = [getattr(part, f.name) for part in parts]
            if isinstance(values[0], Tensor):
                merged[f.name] = _stack(values, left=f.name == "prompt_ids")
            elif isinstance(values[0], tuple):
                merged[f.name] = sum(values, ())
            elif any(value != values[0] for value in values):
                raise ValueError(f"cannot join batches that differ in {f.name!r}: {values}")
        return replace(parts[0], **merged)


def _stack(values: Sequence[Tensor], *, left: bool) -> Tensor:
    if values[0].dim() == 1:
        return torch.cat(list(values))
    width = max(value.shape[1] for value in values)
    beyond = (0, 0) * (values[0].dim() - 2)  # what follows the columns of [B, T, H] is as wide in all of them
    missing = [width - value.shape[1] for value in values]
    pads = [(*beyond, count, 0) if left else (*beyond, 0, count) for count in missing]
    return torch.cat([torch.nn.functional.pad(value, pad) for value, pad in zip(values, pads, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Filtering:
    """What is taken out of the model's distribution where the policy is what remains; the defaults take nothing out.

    The penalty comes before the temperature, the rest after it, in this order.
    """

    repetition_penalty: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, sampling: Any) -> Filtering | None:
        """What settings of sampling (``rollouts.config.Sampling``) take out of what is trained; None: nothing."""
        if sampling.policy_distribution == "tempered":
            return None
        kept = cls(**{f.name: getattr(sampling, f.name) for f in fields(cls)})
        return None if kept == cls() else kept


@dataclass(frozen=True, kw_only=True)
class Rollouts(Tokens):
    """Sampled completions. The completions of one prompt are contiguous (a group)."""

    logprobs: Tensor
    """[B, T] log-prob of each sampled token under the tempered, unfiltered distribution (under the filtered one where
    ``filtering`` says so); 0 beyond the end."""
    behaviour_logprobs: Tensor
    """[B, T] the same under the distribution that was sampled from (after top-k, top-p, filters); 0 beyond the end."""
    finish_reasons: tuple[FinishReason, ...]
    """B entries."""
    values: Tensor | None = None
    """[B, T] the critic's value before each token, as it was while sampling; None where the policy has no critic."""
    temperature: float = 1.0
    """Softmax temperature at which ``logprobs`` hold."""
    filtering: Filtering | None = None
    """Of the distribution that ``logprobs`` are about; None: the unfiltered one."""
    visible_lengths: Tensor | None = None
    """[B] how many tokens of each completion rewards see, where more are trained (``Truncation.beyond: train``); None:
    all of them."""

    @property
    def seen_lengths(self) -> Tensor:
        """[B] tokens that rewards see."""
        return self.completion_lengths if self.visible_lengths is None else self.visible_lengths

    @property
    def truncated(self) -> Tensor:
        """[B] bool: cut by the length limit."""
        return torch.tensor([r == "length" for r in self.finish_reasons], device=self.prompt_ids.device)


@dataclass(frozen=True, kw_only=True)
class RewardInputs:
    """What reward functions may see of B completions. All lists have B entries."""

    prompts: list[str | Messages]
    completions: list[str | Messages]
    """Text (undecodable bytes as U+FFFD), or ``[{"role": "assistant", "content": ...}]`` for chat prompts."""
    completion_ids: list[list[int]]
    """Token ids without padding; the final eos is included where the model produced it."""
    finish_reasons: list[FinishReason]
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    """Every extra column of the data: one list of B values per column."""
    trainer_state: Mapping[str, int | float] = field(default_factory=dict)
    """``{"step": ..., "total_steps": ...}``."""

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, begin: int, end: int) -> RewardInputs:
        """Completions ``begin`` to ``end`` (exclusive)."""
        return RewardInputs(
            prompts=self.prompts[begin:end],
            completions=self.completions[begin:end],
            completion_ids=self.completion_ids[begin:end],
            finish_reasons=self.finish_reasons[begin:end],
            columns={name: values[begin:end] for name, values in self.columns.items()},
            trainer_state=self.trainer_state,
        )


@dataclass(frozen=True, kw_only=True)
class RewardBatch:
    """Rewards of B completions, and every named term they were made of."""

    per_completion: Tensor
    """[B] fp32; 0 where unscored."""
    per_token: Tensor | None
    """[B, T] fp32, 0 beyond the end, or None where no term gives rewards per token. Adds to ``per_completion``."""
    scored: Tensor
    """[B] bool: false where every term returned None; such a completion is left out of advantages and losses."""
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    """Raw value of each term, [B] (sum over tokens for per-token terms), NaN where it returned None."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What reward functions logged by ``log_metric``."""
    extras: Mapping[str, list[Any]] = field(default_factory=dict)
    """What reward functions logged by ``log_extra``: one list of B values per name."""
    token_terms: Mapping[str, list[list[float] | None]] = field(default_factory=dict)
    """Raw rewards per token of each term that gives any: B lists, None where it gave a number or None."""
    errors: Mapping[str, list[str | None]] = field(default_factory=dict)
    """Why completions are unscored by a term whose call failed: B reasons, None where it did not."""

    def __len__(self) -> int:
        return self.per_completion.shape[0]

    @property
    def totals(self) -> Tensor:
        """[B] the reward of each completion as one number."""
        return self.per_completion if self.per_token is None else self.per_completion + self.per_token.sum(-1)

    def by_token(self, lengths: Tensor, width: int) -> Tensor:
        """[B, width]: per-token rewards, with the reward of the whole completion added at its last real token."""
        tokens = torch.zeros(len(self), width, dtype=torch.float32, device=self.per_completion.device)
        if self.per_token is not None:
            tokens += self.per_token
        rows = torch.nonzero(lengths > 0).squeeze(-1)
        tokens[rows, lengths[rows] - 1] += self.per_completion[rows]
        return tokens


@dataclass(frozen=True, kw_only=True)
class Batch(Tokens):
    """A training batch: tokens and which completion tokens are learned from."""

    loss_mask: Tensor
    """[B, T] bool, at most ``completion_mask``."""

    def emptied(self) -> Self:
        """The same rows, of which nothing is learned."""
        return replace(self, loss_mask=torch.zeros_like(self.loss_mask))


@dataclass(frozen=True, kw_only=True)
class DemonstrationBatch(Batch):
    """Texts to imitate (SFT): learned at ``loss_mask``, nothing else needed."""


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(Batch):
    """On-policy data: rollouts with what the update compares against."""

    old_logprobs: Tensor
    """[B, T] of the sampled tokens, at the rollout's temperature, before this collect's first update."""
    advantages: Tensor
    """[B, T] zero at unmasked tokens."""
    ref_logprobs: Tensor
    """[B, T] under the reference, same temperature; equal to ``old_logprobs`` where the method needs no reference."""
    returns: Tensor
    """[B, T] value targets; zeros for methods without a critic."""
    old_values: Tensor
    """[B, T] the critic before this collect's first update; zeros for methods without a critic."""
    importance_weights: Tensor | None = None
    """[B, T] factor of each token's policy loss where sampling and training differ; None: no correction."""
    temperature: float = 1.0
    """At which all log-probs here hold."""
    filtering: Filtering | None = None
    """Of the distribution that all log-probs here are about; None: the unfiltered one."""

    @classmethod
    def of(cls, rollouts: Rollouts, *, loss_mask: Tensor | None = None, **columns: Tensor) -> PolicyBatch:
        """A batch of these rollouts. Columns not given are zeros, but ``ref_logprobs`` defaults to ``old_logprobs``."""
        zeros = torch.zeros_like(rollouts.logprobs)
        columns.setdefault("old_logprobs", rollouts.logprobs)
        columns.setdefault("ref_logprobs", columns["old_logprobs"])
        for name in ("advantages", "returns", "old_values"):
            columns.setdefault(name, zeros)
        mask = rollouts.completion_mask if loss_mask is None else loss_mask
        return cls(
            **rollouts.inputs,
            loss_mask=mask,
            temperature=rollouts.temperature,
            filtering=rollouts.filtering,
            **columns,
        )


Sums = dict[str, Tensor]
"""Named loss sums (scalars with gradient); the trainer alone divides, by the weight of the same name."""

Metrics = dict[str, float]
"""Named numbers for the log."""
