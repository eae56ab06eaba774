"""Which tokens of a prompt drive what a policy says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tropism.attribution.methods import Baseline, Method, attribute, check_method, replaced_embeddings
from tropism.data.encoding import encode_bare, encode_completion, encode_text
from tropism.data.prompts import make_prompts
from tropism.errors import ConfigError
from tropism.evaluation.attribution_files import Attribution, Part
from tropism.generation import TextPolicy
from tropism.models.policy import Policy
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.stops import added_text
from tropism.targets.conditioner import Targets
from tropism.texts import plain_text
from tropism.types import Messages, Prompt

WHAT = "log-prob of the completion"


def attribute_completion(
    model: Any,
    prompt: str | Messages,
    completion: str | None = None,
    *,
    method: Method = "integrated_gradients",
    baseline: Baseline = "mean",
    each_token: bool = False,
    target_reward: Targets = None,
    seed: int = 0,
    **sampling: Any,
) -> Attribution:
    """How much each token of a prompt raises (or lowers) the log-prob of a completion.

    Args:
        model: a ``TextPolicy``, or whatever it can be loaded from: a run folder, a model.
        completion: the text that follows; None samples one.
        method: ``integrated_gradients``, whose scores add up to the log-prob less that at the baseline;
            ``gradient_x_input``, one backward pass and rougher; ``occlusion``, the log-prob less that without it.
        baseline: of integrated gradients, in the place of every token of the prompt: the ``mean`` of all embeddings, or
            ``zero``.
        each_token: also by each token of the completion (``matrix``), with a backward pass for each.
        target_reward: what a reward-conditioned model is asked for; its slots have scores, too.
        seed: of the sampled completion. sampling: fields of ``Sampling``, such as ``max_new_tokens=20``.

    Returns:
        Scores [P] in nats, at temperature 1. The first token of a prompt is left in place by occlusion where it is
        a special one.

    Raises:
        ConfigError: an unknown method, an empty completion, or more tokens than the context holds.
        ModelError: the model cannot be loaded, or reads its tokens in a way that is not known.
    """
    check_method(method, baseline)
    policy = model if isinstance(model, TextPolicy) else TextPolicy.load(model)
    plain = make_prompts([prompt], policy.tokenizer)[0]
    asked = plain if policy.conditioner is None else policy.conditioner.condition([plain], target_reward)[0]
    if target_reward is not None and policy.conditioner is None:
        raise ConfigError("target_reward: this model was not trained to be asked for a reward; leave it out")
    if completion is None:
        ids = _sampled(policy, asked, seed, sampling)
    elif sampling:
        raise ConfigError(f"{next(iter(sampling))}: with a completion nothing is sampled; leave it out")
    else:
        ids = completion_ids(policy.tokenizer, plain, completion)
    return attribute_ids(policy, asked.ids, ids, method=method, baseline=baseline, each_token=each_token)


def attribute_ids(
    policy: TextPolicy,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    *,
    method: Method = "integrated_gradients",
    baseline: Baseline = "mean",
    each_token: bool = False,
) -> Attribution:
    """The same of token ids; those of the prompt may hold reward slots (below 0).

    Raises:
        ConfigError: the completion is empty, or the context too short.
    """
    if not ids:
        raise ConfigError("the completion is empty, so it has no log-prob to explain; give a text")
    limit = policy.policy.context_length
    rows = (len(prompt_ids), len(ids)) if policy.policy.encoder_decoder else (len(prompt_ids) + len(ids),)
    if limit is not None and max(rows) > limit:
        raise ConfigError(f"there are {max(rows)} tokens, and the model's context has {limit}; shorten the texts")
    function = CompletionLogprobs(policy.policy, prompt_ids, ids)
    parts = _parts(policy.tokenizer, prompt_ids)
    removable = [place for place, part in enumerate(parts) if part == "prompt"]
    found = attribute(function, method, removable=removable, baseline=baseline, each=each_token)
    scores = found.values.sum(0)
    return Attribution(
        of="completion",
        what=WHAT,
        method=method,
        pieces=pieces_of(policy.tokenizer, prompt_ids),
        parts=parts,
        scores=tuple(scores.tolist()),
        value=float(found.totals.sum()),
        unit="nats",
        baseline=None if found.baselines is None else float(found.baselines.sum()),
        gap=found.gap,
        rows=pieces_of(policy.tokenizer, ids, before=prompt_ids) if each_token else None,
        matrix=tuple(map(tuple, found.values.tolist())) if each_token else None,
    )


class CompletionLogprobs:
    """Log-probs [T] of a completion's tokens as a function of the embeddings of its prompt."""

    def __init__(self, policy: Policy, prompt_ids: Sequence[int], ids: Sequence[int]) -> None:
        self.policy = policy
        self.prompt = torch.tensor(list(prompt_ids), device=policy.device)
        self.ids = torch.tensor(list(ids), device=policy.device)

    @cached_property
    def embeddings(self) -> Tensor:
        """[P, H], of reward slots their own."""
        policy = self.policy
        with torch.no_grad():
            if policy.conditioning is None:
                return policy.input_embedding(self.prompt[None])[0].detach()  # type: ignore[no-any-return]
            with policy.conditioning.embedded(policy.input_embedding):
                return policy.input_embedding(self.prompt[None])[0].detach()  # type: ignore[no-any-return]

    @cached_property
    def mean_embedding(self) -> Tensor:
        return mean_embedding(self.policy.input_embedding)

    def __call__(self, embeddings: Tensor, kept: Tensor) -> Tensor:
        count, width = kept.shape
        prompt = self.prompt.clamp(min=0)[kept]
        completion = self.ids.expand(count, -1)
        with replaced_embeddings(self.policy.input_embedding, embeddings):
            states = self._states(prompt, completion, width)
        logits = self.policy.logits(states)
        exact = torch.promote_types(logits.dtype, torch.float32)
        return torch.log_softmax(logits, dim=-1, dtype=exact).gather(-1, completion[..., None]).squeeze(-1)

    def _states(self, prompt: Tensor, completion: Tensor, width: int) -> Tensor:
        """[B, T, H] that predict the completion."""
        halves = self.policy.halves
        if halves is None:
            ids = torch.cat([prompt, completion], dim=1)
            return self.policy.hidden_states(ids, *_plain(ids))[:, width - 1 : -1]
        encoded_mask, places = _plain(prompt)
        encoded = halves.encode(prompt, encoded_mask, places)
        prefix = torch.tensor(halves.prefix, device=prompt.device).expand(len(prompt), -1)
        rows = torch.cat([prefix, completion], dim=1)[:, :-1]
        return halves.decode(rows, *_plain(rows), encoded, encoded_mask)[:, len(halves.prefix) - 1 :]


def mean_embedding(embedding: Any) -> Tensor:
    """[H] mean of what an input embedding answers for its vocabulary (scaled, where it scales)."""
    rows: Tensor = embedding.weight
    with torch.no_grad():
        longest = rows.float().norm(dim=-1).argmax()[None]  # others may be a pad's zeros
        scale = embedding(longest).float().norm() / rows[longest].float().norm()
        mean: Tensor = (rows.float().mean(0) * scale).to(rows.dtype)
        return mean.detach()


def completion_ids(tokenizer: Any, prompt: Prompt, completion: str) -> list[int]:
    """Token ids of a text behind a prompt, whose own ids stay as they are; without an eos."""
    from tropism.texts import decoder_prefix_of

    if decoder_prefix_of(tokenizer) is not None:
        ids = encode_completion(tokenizer, completion)
        return ids[:-1]
    if isinstance(prompt.text, str):
        whole, own = encode_text(tokenizer, prompt.text + completion), list(prompt.ids)
        if whole[: len(own)] == own and len(whole) > len(own):
            return whole[len(own) :]
    return encode_bare(tokenizer, plain_text(completion))


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all tokens that are no text, those of a chat template too."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}


def pieces_of(tokenizer: Any, ids: Sequence[int], *, before: Sequence[int] = ()) -> tuple[str, ...]:
    """The text that each token adds to those before it; special tokens and reward slots by name."""
    special = special_ids(tokenizer)
    real = [token for token in before if token >= 0]
    pieces = []
    for token in ids:
        if token < 0:
            pieces.append("<target>")
            continue
        name = str(tokenizer.convert_ids_to_tokens(token))
        pieces.append(name if token in special else added_text(tokenizer, real[-8:], [token]) or name)
        real.append(token)
    return tuple(pieces)


def _parts(tokenizer: Any, ids: Sequence[int]) -> tuple[Part, ...]:
    special = special_ids(tokenizer)
    return tuple("special" if token < 0 or token in special else "prompt" for token in ids)


def _plain(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and positions of rows without pads."""
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return torch.ones_like(ids, dtype=torch.bool), places


def _sampled(policy: TextPolicy, prompt: Prompt, seed: int, changes: dict[str, Any]) -> list[int]:
    """The ids of one sampled completion."""
    from dataclasses import replace

    sampling = replace(policy.sampling, **changes)
    key = StreamKey(seed=seed, purpose="generate")
    rollouts = policy.sampler.generate(policy.policy, [prompt], sampling, 1, key=key)
    ids: list[int] = rollouts.completion_ids[0, : int(rollouts.completion_lengths[0])].tolist()
    return ids
