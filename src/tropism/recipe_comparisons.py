"""From the recipe of a reward model to its judgements, and to the samples that its scores are put on a scale with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tropism.algorithms.reward_modeling import RewardModeling
from tropism.classifier_inputs import ClassifierInputs
from tropism.config import Recipe
from tropism.data.comparisons import comparison_key, read_comparisons
from tropism.data.config import DataConfig
from tropism.data.order import PromptStream, fingerprint
from tropism.data.prompts import make_prompts
from tropism.data.split import train_eval_split
from tropism.errors import ConfigError, DataError, ModelError
from tropism.judgements import Comparison, Kind
from tropism.models.loading import LoadedModel, load_model
from tropism.models.modules import base_model
from tropism.models.policy import Policy
from tropism.recipe_data import prompt_room, source_and_settings
from tropism.recipe_identity import weights_fingerprint
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.transcribe import Transcriber
from tropism.training.normalisation import Normalisation
from tropism.training.processes import Processes
from tropism.training.rollout_maker import CompletionMaker
from tropism.types import Prompt

logger = logging.getLogger("tropism")


@dataclass(frozen=True, kw_only=True)
class Judgements:
    """What people said, parted by prompts."""

    kind: Kind
    train: Sequence[Comparison]
    held_out: Sequence[Comparison]
    """Empty where the recipe holds out nothing."""


def comparisons_of(recipe: Recipe, inputs: ClassifierInputs) -> Judgements:
    """The judgements of a recipe; no prompt is in both parts.

    Raises:
        TropismError: unusable data, or a batch that is larger than the data.
    """
    config = recipe.algorithm
    assert isinstance(config, RewardModeling)

    def read(data: Any) -> tuple[Kind, list[Comparison]]:
        source, settings = source_and_settings(data)
        weights = config.annotator_weights
        kind, items = read_comparisons(source, inputs, settings, varied_k=config.varied_k, annotator_weights=weights)
        wanted = None if settings is None else settings.limit
        if settings is not None and wanted is not None and len(items) < wanted:
            raise DataError(
                f"{settings.path} holds {len(items)} judgements, fewer than the limit of {wanted}; lower it"
            )
        return kind, items

    kind, train = read(recipe.data)
    held_out: Sequence[Comparison] = ()
    fraction = recipe.data.eval_fraction if isinstance(recipe.data, DataConfig) else 0.0
    if recipe.eval_data is not None:
        other, held_out = read(recipe.eval_data)
        if other != kind:
            raise ConfigError(f"data holds judgements of the kind {kind!r}, and eval_data of the kind {other!r}")
        seen = {comparison_key(item) for item in held_out}
        apart = [item for item in train if comparison_key(item) not in seen]
        if len(apart) < len(train):
            logger.warning(
                "%d of %d judgements have a prompt that eval_data holds, too, and are not trained on",
                len(train) - len(apart),
                len(train),
            )
        if not apart:
            raise DataError("every judgement has a prompt that eval_data holds, too, so that none is left to train on")
        train = apart
    elif fraction > 0:
        train, held_out = train_eval_split(train, fraction, seed=recipe.seed, key=comparison_key)
    if recipe.prompts_per_step > len(train):
        raise ConfigError(
            f"prompts_per_step is {recipe.prompts_per_step}, but there are only {len(train)} judgements to train on"
        )
    limit = recipe.data.limit if isinstance(recipe.data, DataConfig) else None
    if limit is not None and fraction == 0 and limit % recipe.prompts_per_step:
        raise ConfigError(
            f"data.limit is {limit}, which prompts_per_step={recipe.prompts_per_step} does not divide, so that a pass "
            "over the judgements would end inside a batch; choose a multiple"
        )
    wanted = recipe.total_steps * recipe.prompts_per_step
    if wanted > len(train):
        logger.info("%d judgements are gone through %.1f times", len(train), wanted / len(train))
    return Judgements(kind=kind, train=train, held_out=held_out)


class NormalisationSamples:
    """Completions of a policy, as rows of ids for a reward model.

    Args:
        judged: what is trained on; its prompts are completed where the recipe names no others.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: Normalisation,
        inputs: ClassifierInputs,
        *,
        judged: Sequence[Comparison],
        processes: Processes,
    ) -> None:
        self.recipe, self.settings, self.inputs = recipe, settings, inputs
        self.judged, self.processes = judged, processes
        self._prompts: Sequence[Prompt] | None = None

    @property
    def policy_name(self) -> str:
        """Whose completions they are."""
        source = self._source
        return source if isinstance(source, str) else str(getattr(source, "name", "a model given from Python"))

    @property
    def _source(self) -> Any:
        return self.recipe.model if self.settings.policy is None else self.settings.policy

    def identity(self) -> str:
        """Fingerprint of the policy and its prompts, which no checkpoint holds.

        Raises:
            TropismError: what ``load`` and ``prompts`` raise.
        """
        loaded = self.load()
        return f"{weights_fingerprint(dict(loaded.model.named_parameters()))} {fingerprint(self.prompts(loaded))}"

    def load(self) -> LoadedModel:
        """The policy, as it was before any training.

        Raises:
            TropismError: it is no causal language model.
        """
        try:
            loaded = load_model(self._source)
            network = base_model(loaded.model)
            if not network.can_generate():  # of a pair that is an encoder
                raise ModelError(f"{type(network).__name__} writes no text; a causal LM is needed")
        except ModelError as error:
            if self.settings.policy is not None:
                raise ModelError(f"normalise.policy: {error}") from error
            raise ConfigError(
                "normalise.policy is not named, so that the reward model's own body would have to write the "
                f"completions to score, and it cannot: {error}. Name the policy that the reward model is for"
            ) from error
        return loaded

    def prompts(self, loaded: LoadedModel) -> Sequence[Prompt]:
        """What the policy is to complete.

        Raises:
            TropismError: there are none, or they leave no room.
        """
        if self._prompts is None:
            source, config = source_and_settings(self.settings.data)
            room = prompt_room(self.recipe, loaded.tokenizer, Policy(loaded.model).context_length)
            given = self._judged_prompts() if source is None else source
            self._prompts = make_prompts(given, loaded.tokenizer, config, max_length=room)
        return self._prompts

    def _judged_prompts(self) -> list[str]:
        """Those of the judgements, each once."""
        if any(item.chat for item in self.judged):
            raise ConfigError(
                "the judgements are of chats, which are kept as plain text; name the chats to complete: normalise.data"
            )
        prompts = list(dict.fromkeys(item.prompt for item in self.judged if item.prompt))
        if not prompts:
            raise ConfigError("the judgements have no prompts to sample completions of; name some: normalise.data")
        return prompts

    def rows(self, loaded: LoadedModel, count: int, *, collect: int) -> list[list[int]]:
        """``count`` fresh completions with their prompts, as the reward model reads them.

        Args:
            loaded: the policy.
            collect: another number gives others.
        """
        recipe = self.recipe
        maker = CompletionMaker(
            sampler=EmbeddedSampler(loaded.tokenizer, loaded.tokens.eos_ids),
            sampling=recipe.sampling,
            transcribe=Transcriber(loaded.tokenizer, recipe.sampling.stop),
            policy=Policy(loaded.model),
            processes=self.processes,
            seed=recipe.seed,
        )
        stream = PromptStream(self.prompts(loaded), seed=recipe.seed)
        stream.position = collect * count
        prompts = [prompt for _, prompt in stream.take(count)]
        seen = maker.transcribe(maker.sample(prompts, purpose="normalisation", collect=collect), prompts, {})
        return [self.inputs.ids(prompt, text) for prompt, text in zip(seen.prompts, seen.completions, strict=True)]
