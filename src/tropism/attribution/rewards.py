"""Which pieces of a text drive a reward: by gradients of a classifier, or by leaving pieces out, of any reward."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tropism.attribution.completions import mean_embedding, pieces_of, special_ids
from tropism.attribution.methods import Baseline, Method, attribute, check_method, replaced_embeddings
from tropism.data.encoding import encode_bare
from tropism.errors import ConfigError, RewardError
from tropism.evaluation.attribution_files import Attribution, Part
from tropism.rewards import RewardConfig, RewardHarness
from tropism.rewards.classifier import ClassifierReward
from tropism.rewards.config import closest
from tropism.rewards.reward_model import RewardModelReward
from tropism.texts import plain_text
from tropism.types import Messages, RewardInputs

Unit = Literal["word", "token"]
MOST_PIECES = 2000
"""Of one text: each is a call of the reward."""
_WORD = re.compile(r"\s*\S+")


def attribute_reward(
    reward: Any,
    prompt: str | Messages,
    completion: str | Messages,
    *,
    method: Method | None = None,
    baseline: Baseline = "mean",
    unit: Unit = "word",
    tokenizer: Any = None,
    columns: Mapping[str, Any] | None = None,
    allow_code: bool = False,
) -> Attribution:
    """How much each piece of a prompt and its completion raises (or lowers) a reward.

    Args:
        reward: whatever a recipe's reward may be; the weighted sum of its terms is explained.
        method: of a classifier or reward model ``integrated_gradients``, ``gradient_x_input`` or ``occlusion`` over the
            tokens that it reads; of any other reward ``occlusion``, which leaves out one word (or token) after the
            other and scores again. None: the first that the reward can do.
        baseline: of integrated gradients: the ``mean`` of all embeddings, or ``zero``.
        unit: what occlusion of other rewards leaves out.
        tokenizer: of the model; for ``unit="token"``, and for rewards that ask for token ids.
        columns: further columns of the prompt's record, as rewards see them.
        allow_code: let the reward name code: ``module:function`` or ``file.py:function``.

    Returns:
        Scores [P] in the reward's unit; NaN where the reward has no opinion on the text without the piece.

    Raises:
        ConfigError: gradients of a reward that has none, an unknown method or unit.
        RewardError: the reward fails, or has no opinion on the whole text.
    """
    check_method("occlusion" if method is None else method, baseline)
    if unit not in get_args(Unit):
        raise ConfigError(f"unit: unknown value {unit!r}. {closest(str(unit), get_args(Unit))}")
    config = RewardConfig.of(reward)
    with closing(RewardHarness(config, allow_code=allow_code)) as harness:
        known = _classifier_of(harness)
        if known is not None:
            classifier, weight, offset = known
            made = ClassifierFunction(classifier, prompt, completion, weight=weight, offset=offset)
            return _of_classifier(made, config, method or "integrated_gradients", baseline)
        if method not in (None, "occlusion"):
            raise ConfigError(
                f"method: {method} needs a reward with gradients (one classifier or reward model, without a timeout), "
                f"and {_names(config)} is none; take occlusion"
            )
        pieces = _Pieces(prompt, completion, unit=unit, tokenizer=tokenizer)
        return _occluded(harness, config, pieces, dict(columns or {}))


class ClassifierFunction:
    """The reward of a classifier as a function of the embeddings of the tokens that it reads."""

    def __init__(
        self, classifier: ClassifierReward, prompt: Any, completion: Any, *, weight: float = 1.0, offset: float = 0.0
    ) -> None:
        self.classifier, self.weight, self.offset = classifier, weight, offset
        entry = classifier.inputs.read(prompt, completion)
        self.ids = torch.tensor(entry.ids, device=classifier.model.device)
        self.segments = None if entry.segments is None else torch.tensor(entry.segments, device=self.ids.device)
        self.judged = len(encode_bare(classifier.tokenizer, plain_text(completion)))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Where each token stands; the last ones that are no special tokens are the completion's."""
        special = special_ids(self.classifier.tokenizer)
        texts = [place for place, token in enumerate(self.ids.tolist()) if token not in special]
        of_completion = set(texts[max(0, len(texts) - self.judged) :])
        found: list[Part] = ["special"] * len(self.ids)
        for place in texts:
            found[place] = "completion" if place in of_completion else "prompt"
        return tuple(found)

    @property
    def _embedding(self) -> Any:
        model = self.classifier.model
        inner = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
        return inner.get_input_embeddings()

    @cached_property
    def embeddings(self) -> Tensor:
        with torch.no_grad():
            return self._embedding(self.ids[None])[0].detach()  # type: ignore[no-any-return]

    @cached_property
    def mean_embedding(self) -> Tensor:
        return mean_embedding(self._embedding)

    def __call__(self, embeddings: Tensor, kept: Tensor) -> Tensor:
        ids = self.ids[kept]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.segments is not None:
            given["token_type_ids"] = self.segments[kept]
        with replaced_embeddings(self._embedding, embeddings):
            logits: Tensor = self.classifier.model(**given).logits
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (self.weight * (self.classifier.score.of(exact) + self.offset))[:, None]


def _classifier_of(harness: RewardHarness) -> tuple[ClassifierReward, float, float] | None:
    """The one classifier that a reward is, with its weight and offset; None where it is something else."""
    terms = [term for term in harness.terms.values() if term.term.weight != 0]
    if len(terms) != 1 or harness.config.clip is not None:
        return None
    function, weight = terms[0].function, float(terms[0].term.weight)
    if isinstance(function, RewardModelReward):
        return function.classifier, weight, function.offset
    return (function, weight, 0.0) if isinstance(function, ClassifierReward) else None


def _of_classifier(
    function: ClassifierFunction, config: RewardConfig, method: Method, baseline: Baseline
) -> Attribution:
    parts = function.parts
    removable = [place for place, part in enumerate(parts) if part != "special"]
    found = attribute(function, method, removable=removable, baseline=baseline)
    return Attribution(
        of="reward",
        what=_names(config),
        method=method,
        pieces=pieces_of(function.classifier.tokenizer, function.ids.tolist()),
        parts=parts,
        scores=tuple(found.values[0].tolist()),
        value=float(found.totals[0]),
        unit="reward",
        baseline=None if found.baselines is None else float(found.baselines[0]),
        gap=found.gap,
    )


class _Pieces:
    """A prompt and its completion in pieces, and both without one of them."""

    def __init__(self, prompt: Any, completion: Any, *, unit: Unit, tokenizer: Any) -> None:
        if unit == "token" and tokenizer is None:
            raise ConfigError("unit: tokens are those of a model; give its tokenizer, or take unit='word'")
        self.prompt, self.completion, self.tokenizer = prompt, completion, tokenizer
        self.of_prompt = self._split(_last_text(prompt), unit)
        self.of_completion = self._split(_last_text(completion), unit)
        if not self.of_prompt and not self.of_completion:
            raise ConfigError("prompt and completion are empty, so there is nothing to leave out")
        if len(self.texts) > MOST_PIECES:
            raise ConfigError(f"the text has {len(self.texts)} pieces; at most {MOST_PIECES} are left out one by one")

    def _split(self, text: str, unit: Unit) -> list[str]:
        if unit == "token":
            return [piece for piece in pieces_of(self.tokenizer, encode_bare(self.tokenizer, text)) if piece]
        words = _WORD.findall(text)
        rest = text[sum(map(len, words)) :]
        return [*words[:-1], words[-1] + rest] if words else []

    @property
    def texts(self) -> tuple[str, ...]:
        return (*self.of_prompt, *self.of_completion)

    @property
    def parts(self) -> tuple[Part, ...]:
        before: tuple[Part, ...] = ("prompt",)
        after: tuple[Part, ...] = ("completion",)
        return before * len(self.of_prompt) + after * len(self.of_completion)

    def variants(self) -> tuple[list[Any], list[Any]]:
        """Prompts and completions: the whole, then without each piece in turn."""
        prompts, completions = [self.prompt], [self.completion]
        for text in _without_each(self.of_prompt):
            prompts.append(_with_text(self.prompt, text))
            completions.append(self.completion)
        for text in _without_each(self.of_completion):
            prompts.append(self.prompt)
            completions.append(_with_text(self.completion, text))
        return prompts, completions


def _occluded(harness: RewardHarness, config: RewardConfig, pieces: _Pieces, columns: Mapping[str, Any]) -> Attribution:
    from tropism.scoring import require_tokenizer

    tokenizer = require_tokenizer(harness, pieces.tokenizer)
    prompts, completions = pieces.variants()
    ids = [[] if tokenizer is None else encode_bare(tokenizer, plain_text(text)) for text in completions]
    inputs = RewardInputs(
        prompts=prompts,
        completions=completions,
        completion_ids=ids,
        finish_reasons=["eos"] * len(prompts),
        columns={name: [value] * len(prompts) for name, value in columns.items()},
    )
    rewards = harness.score(inputs, update_moments=False, unscaled=True)
    totals = [
        total if scored else math.nan
        for total, scored in zip(rewards.totals.tolist(), rewards.scored.tolist(), strict=True)
    ]
    if math.isnan(totals[0]):
        raise RewardError(f"{_names(config)} has no opinion on this completion, so there is nothing to explain")
    return Attribution(
        of="reward",
        what=_names(config),
        method="occlusion",
        pieces=pieces.texts,
        parts=pieces.parts,
        scores=tuple(totals[0] - total for total in totals[1:]),
        value=totals[0],
        unit="reward",
    )


def _without_each(pieces: Sequence[str]) -> list[str]:
    """The text without the first piece, without the second, ...; the first word that stays has no space before it
    where the text had none."""
    texts = []
    for place in range(len(pieces)):
        rest = [*pieces[:place], *pieces[place + 1 :]]
        if place == 0 and rest and not pieces[0][:1].isspace():
            rest[0] = rest[0].lstrip()
        texts.append("".join(rest))
    return texts


def _last_text(value: str | Messages) -> str:
    """The text that pieces are taken from: of chat messages the last one's."""
    if isinstance(value, str):
        return value
    content = value[-1].get("content", "") if value else ""
    return content if isinstance(content, str) else ""


def _with_text(value: str | Messages, text: str) -> str | Messages:
    return text if isinstance(value, str) else [*value[:-1], {**value[-1], "content": text}]


def _names(config: RewardConfig) -> str:
    return "reward " + " + ".join(name for name, term in config.terms.items() if term.weight != 0)
