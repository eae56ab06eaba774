"""Where a target sits in an export: what the tokenizer is to put before every text, and the rows that stand for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tropism.errors import ConfigError, ModelError
from tropism.models.baked import highest_logprobs
from tropism.models.baked_tokenizer import (
    Opening,
    SlotToken,
    check_fast,
    dispensable,
    free_slots,
    named_slots,
    needed_ids,
)
from tropism.targets.conditioner import Conditioner, Targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tropism.generation import TextPolicy

SlotTokens = str | int | Sequence[str | int] | None
"""Tokens to give up, one per reward: each the token, a text that is one token, or its id. None takes free rows."""
SHOWN = 3
"""Tokens that an error proposes."""


def refuse_targets(targets: Targets, slot_tokens: Any) -> None:
    """Of a model that was never told a reward.

    Raises:
        ConfigError: one is asked of it all the same.
    """
    if targets is not None or slot_tokens is not None:
        raise ConfigError(
            "this model was not trained to be asked for a reward, so no target can be built in; leave "
            f"{'--target-reward' if targets is not None else '--slot-token'} out to write it as it is"
        )


def opening_for(
    policy: TextPolicy,
    conditioner: Conditioner,
    targets: Targets,
    texts: Sequence[str],
    slot_tokens: SlotTokens,
) -> tuple[Opening | None, tuple[int, ...]]:
    """What the tokenizer is to put before every text, and the ids that ask the conditioned model for the same.

    Raises:
        ConfigError: no target, or one that the model cannot be asked.
        ModelError: no free row, or a token that cannot be given up.
    """
    if targets is None:
        ranges = "; ".join(
            f"{name} was {seen.range[0]:g} to {seen.range[1]:g} in training"
            for name, seen in zip(conditioner.names, conditioner.seen, strict=True)
        )
        raise ConfigError(
            f"the model is asked for a reward, so an export needs a target: --target-reward NUMBER"
            f"{' or NAME=NUMBER' if len(conditioner.names) > 1 else ''} ({ranges})"
        )
    tokenizer = policy.tokenizer
    check_fast(tokenizer)
    asked = conditioner.prefix(targets)
    if conditioner.config.mechanism == "text":
        if slot_tokens is not None:
            raise ConfigError("this model reads its target as text, which needs no slot token; leave --slot-token out")
        if not asked:
            return None, ()
        text = str(tokenizer.decode(list(asked), clean_up_tokenization_spaces=False))
        tokens = tuple(tokenizer.convert_ids_to_tokens(list(asked)))
        return Opening(ids=asked, tokens=tokens, text=text, after_bos=conditioner.bos_id), asked
    slots = _slots(policy, conditioner, targets, asked, texts, slot_tokens)
    names = tuple(slot.name for slot in slots)
    return Opening(ids=tuple(slot.row for slot in slots), tokens=names, text="".join(names), slots=slots), asked


def _slots(
    policy: TextPolicy,
    conditioner: Conditioner,
    targets: Targets,
    asked: Sequence[int],
    texts: Sequence[str],
    slot_tokens: SlotTokens,
) -> tuple[SlotToken, ...]:
    tokenizer = policy.tokenizer
    labels = _labels(conditioner, targets, tokenizer)
    needed = needed_ids(tokenizer, policy.sampler.eos_ids)
    for text in texts:
        for token_id in tokenizer(text, verbose=False)["input_ids"]:
            needed.setdefault(token_id, f"the text {text!r:.60} needs it")
    if slot_tokens is not None:
        names = [slot_tokens] if isinstance(slot_tokens, str | int) else list(slot_tokens)
        return tuple(named_slots(tokenizer, names, labels, needed=needed))
    rows = int(policy.policy.input_embedding.weight.shape[0])
    append = conditioner.config.mechanism == "token"
    found = free_slots(tokenizer, labels, rows=rows, needed=needed, append=append)
    if len(found) < len(labels):
        raise ModelError(_no_free_row(policy, asked, texts, needed, missing=(len(labels), len(found))))
    return tuple(found)


def _labels(conditioner: Conditioner, targets: Targets, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Names for the slots' tokens, such as ``<|reward=0.9|>``, none of which the tokenizer has."""
    vocabulary = set(tokenizer.get_vocab())
    labels: list[str] = []
    for name, value in zip(conditioner.names, conditioner.values(targets), strict=True):
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
        label = first = f"{plain}={'open' if value is None else f'{value:g}'}"
        number = 2
        while f"<|{label}|>" in vocabulary:
            label, number = f"{first}#{number}", number + 1
        labels.append(f"<|{label}|>")
        vocabulary.add(labels[-1])
    return labels


def _no_free_row(
    policy: TextPolicy,
    asked: Sequence[int],
    texts: Sequence[str],
    needed: Mapping[int, str],
    *,
    missing: tuple[int, int],
) -> str:
    """What to do about it, with tokens that can be named."""
    special, ordinary = dispensable(policy.tokenizer, needed)
    likely = highest_logprobs(policy.policy, asked_ids(policy, asked, texts)) if ordinary else None
    rare = sorted(ordinary, key=lambda i: float(likely[i]))[:SHOWN] if likely is not None else []
    pieces = {i: token for token, i in policy.tokenizer.get_vocab().items()}

    def shown(ids: Sequence[int]) -> str:
        return ", ".join(f"{pieces[i]!r} (id {i})" for i in ids)

    proposals = []
    if special:
        proposals.append(f"special tokens that nothing here uses: {shown(special[:SHOWN])}")
    if rare:
        proposals.append(f"ordinary ones that the model finds unlikely: {shown(rare)}")
    wanted, found = missing
    return (
        f"the model's vocabulary has {found or 'no'} free row{'s' if found > 1 else ''} for {wanted} reward "
        f"slot{'' if wanted == 1 else 's'}. Name a token for each that your texts never hold, by --slot-token TOKEN or "
        f"its id. {'Candidates: ' + '; '.join(proposals) if proposals else 'This vocabulary can do without none'}"
    )


def asked_ids(policy: TextPolicy, prefix: Sequence[int], texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The texts' ids after what asks for the target, as far as they fit the context."""
    assert policy.conditioner is not None
    ids = [policy.tokenizer(text, verbose=False)["input_ids"] for text in texts]
    return [policy.conditioner.apply(row, prefix)[: policy.policy.context_length] for row in ids]
