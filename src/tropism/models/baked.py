"""A conditioned model at one target as a plain model: its slots become rows of the vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from tropism.errors import ModelError
from tropism.models.baked_tokenizer import SlotToken
from tropism.models.conditioning_files import MARK
from tropism.models.modules import with_weights
from tropism.models.policy import Policy
from tropism.models.q_head_files import MARK as Q_MARK
from tropism.models.saving import merged_weights, plain_tensors

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference of logits, as a share of the largest logit (or of 1): about eight steps of the half precisions."""
_PROBED = 64
"""Rows of the embedding that its scale is measured on."""


@torch.no_grad()
def baked_model(
    policy: Policy, slots: Sequence[SlotToken], slot_ids: Sequence[int], *, unlikely: int | None = None
) -> PreTrainedModel:
    """A plain model that reads, in the rows of ``slots``, what the policy reads in ``slot_ids``.

    An adapter is merged. Input and output embeddings are apart, and the rows of the output embedding stay as they were,
    so that logits are those of the policy. Rows that are appended have the output of the token ``unlikely``.

    Args:
        slots: the rows; none for a model that is only merged.
        slot_ids: as many ids below 0 (``ops.slots``).
        unlikely: needed where rows are appended.

    Raises:
        ModelError: the family's input embedding does more than look rows up and scale them.
    """
    base: PreTrainedModel = policy.language_model
    weights = merged_weights(policy.model) if isinstance(policy.model, PeftModel) else plain_tensors(base)
    config = copy.deepcopy(base.config)
    for part in _parts(config):
        for mark in (MARK, Q_MARK):
            if hasattr(part, mark):
                delattr(part, mark)
        if slots:
            part.tie_word_embeddings = False
    if slots:
        embedding = base.get_input_embeddings()
        name, output = (_name_of(base, part) for part in (embedding, base.get_output_embeddings()))
        answers = _slot_embeddings(policy, slot_ids)
        rows = answers.float() / _scale(embedding, weights[f"{name}.weight"])
        weights |= _with_rows(weights, slots, rows, name=name, output=output, unlikely=unlikely)
        if policy.hidden_scale != 1:  # of T5, by a rule that hangs on tied embeddings, which these are not any more
            head = weights[f"{output}.weight"]
            weights[f"{output}.weight"] = (head.float() * policy.hidden_scale).to(head.dtype)
            config.scale_decoder_outputs = False
        config.get_text_config().vocab_size = weights[f"{name}.weight"].shape[0]
    # A shallow copy with its own configuration is all that the new model is made after.
    pattern = copy.copy(base)
    pattern.config = config
    plain = with_weights(pattern, weights)
    if slots:
        _part_untied(plain)
        before = plain.generation_config.suppress_tokens or []
        plain.generation_config.suppress_tokens = sorted({*before, *(slot.row for slot in slots)})
    return plain


def _part_untied(plain: PreTrainedModel) -> None:
    """Give weights a memory of their own that share one though the configuration does not tie them, in place.

    Where embeddings are not tied, BART has those of encoder and decoder apart as well, and T5 has not.
    """
    tied, first = plain.all_tied_weights_keys, dict[int, str]()
    for name, parameter in list(plain.named_parameters(remove_duplicate=False)):
        other = first.setdefault(parameter.data_ptr(), name)
        if other not in (name, tied.get(name)) and tied.get(other) != name:
            path, _, last = name.rpartition(".")
            setattr(plain.get_submodule(path), last, torch.nn.Parameter(parameter.detach().clone()))


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _name_of(model: PreTrainedModel, part: Any) -> str:
    return next(str(name) for name, module in model.named_modules() if module is part)


def _slot_embeddings(policy: Policy, slot_ids: Sequence[int]) -> Tensor:
    """[K, H] what the policy's input embedding answers."""
    slots = policy.conditioning
    assert slots is not None
    ids = torch.tensor([*slot_ids], device=policy.device)
    with slots.embedded(policy.input_embedding):
        answer: Tensor = policy.input_embedding(ids[None])[0]
    return answer


def _scale(embedding: Any, matrix: Tensor) -> float:
    """What the module ``embedding`` multiplies the rows of ``matrix`` with: 1 but in families such as Gemma."""
    ids = torch.linspace(0, matrix.shape[0] - 1, min(_PROBED, matrix.shape[0])).long()
    answers = embedding(ids.to(next(embedding.parameters()).device)).double().cpu()
    rows = matrix[ids.to(matrix.device)].double().cpu()
    scale = float((answers * rows).sum() / (rows * rows).sum().clamp(min=1e-30))
    step = torch.finfo(matrix.dtype).eps
    rest = (answers - scale * rows).abs().max()
    if not scale or rest > 4 * step * answers.abs().max():
        raise ModelError(
            f"{type(embedding).__name__} does more than look embeddings up and scale them, so no row of it can be a "
            "reward slot; train with the mechanism text to export this family"
        )
    return 1.0 if abs(scale - 1) <= step else scale


def _with_rows(
    weights: Mapping[str, Tensor],
    slots: Sequence[SlotToken],
    rows: Tensor,
    *,
    name: str,
    output: str,
    unlikely: int | None,
) -> dict[str, Tensor]:
    """The tensors that change: new copies of the embeddings, and of an output bias where rows are appended."""
    inner, outer = weights[f"{name}.weight"], weights[f"{output}.weight"]
    new = sum(slot.kind == "appended" for slot in slots)
    size = inner.shape[0]
    matrix = torch.cat([inner, inner.new_zeros(new, inner.shape[1])])
    for slot, row in zip(slots, rows, strict=True):
        matrix[slot.row] = row.to(device=matrix.device, dtype=matrix.dtype)
    # Encoder and decoder may each have a name for the one matrix.
    names = [
        key for key, tensor in weights.items() if tensor.data_ptr() == inner.data_ptr() and tensor.shape == inner.shape
    ]
    changed = {**dict.fromkeys(names, matrix), f"{output}.weight": outer.clone()}
    if new:
        assert unlikely is not None and outer.shape[0] == size
        names = [key for key in (f"{output}.weight", f"{output}.bias") if key in weights]
        changed |= {key: torch.cat([weights[key], *[weights[key][unlikely : unlikely + 1]] * new]) for key in names}
    return changed


# Checking -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def policy_logits(policy: Policy, ids: Sequence[int]) -> Tensor:
    """[L, V] float32 logits of a policy after each id of a text, slots included."""
    row = torch.tensor([[*ids]], device=policy.device)
    positions = torch.arange(row.shape[1], device=row.device)[None]
    hidden = policy.hidden_states(row, torch.ones_like(row, dtype=torch.bool), positions)[0]
    return policy.logits(hidden).float()


@torch.no_grad()
def logits_difference(policy: Policy, plain: Any, asked: Sequence[int], baked: Sequence[int]) -> tuple[float, float]:
    """Largest difference of logits between the policy and a plain model, and the largest logit.

    Args:
        asked: ids with slots. baked: the same with rows of the vocabulary in their places.
    """
    expected = policy_logits(policy, asked)
    row = torch.tensor([[*baked]], device=plain.device)
    found = plain(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0].float()
    return compared_logits(expected, found)


def compared_logits(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Largest difference of two tables of logits, [L, V] and [L, V or more], and the largest logit expected.

    The difference is infinite where the tables do not fit or a logit is NaN. Rows of the vocabulary that only
    ``found`` has are left out.
    """
    largest = float(expected.abs().max())
    if found.shape[0] != expected.shape[0] or found.shape[1] < expected.shape[1]:
        return float("inf"), largest
    difference = (found[:, : expected.shape[1]].to(expected.device) - expected).abs().max()
    return float(difference.nan_to_num(nan=float("inf"))), largest


@torch.no_grad()
def greedy_gap(
    policy: Policy, plain: Any, asked: Sequence[int], encoded: Mapping[str, Tensor], *, new_tokens: int
) -> float:
    """How far the tokens of greedy generation of ``plain`` are from the policy's best ones, in logits; 0 where equal.

    At equal logits either token is right, so what counts is how much lower than the best the chosen token's logit is.

    Args:
        asked: ids of the prompt with slots. encoded: what the tokenizer of ``plain`` makes of its text, [1, L] each.
    """
    own: GenerationConfig = plain.generation_config
    suppressed = list(own.suppress_tokens or [])
    plain.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        suppress_tokens=suppressed or None,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
    )
    try:
        whole = plain.generate(**{name: tensor.to(plain.device) for name, tensor in encoded.items()})
    finally:
        plain.generation_config = own
    chosen: list[int] = whole[0, encoded["input_ids"].shape[1] :].tolist()
    logits = policy_logits(policy, [*asked, *chosen[:-1]])[-len(chosen) :]
    logits[:, [i for i in suppressed if i < logits.shape[1]]] = -torch.inf
    if max(chosen) >= logits.shape[1]:
        return float("inf")
    best = logits.max(dim=-1).values
    return float((best - logits[range(len(chosen)), chosen]).max())


def highest_logprobs(policy: Policy, texts: Sequence[Sequence[int]]) -> Tensor:
    """[V] the highest log-prob that each token has anywhere in the texts (ids with slots)."""
    highest: Tensor | None = None
    for ids in texts:
        here = policy_logits(policy, ids).log_softmax(dim=-1).max(dim=0).values
        highest = here if highest is None else torch.maximum(highest, here)
    assert highest is not None
    return highest
