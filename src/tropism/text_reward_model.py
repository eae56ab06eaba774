"""A reward model that judges completions in text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from tropism.classifier_inputs import ClassifierInputs, ReadText, UnreadableError
from tropism.errors import ConfigError, DataError
from tropism.foreign.reward_facts import RewardFacts
from tropism.models.loading import ModelConfig, folder_or_hub_id
from tropism.models.reward_files import load_reward_model, save_reward_model
from tropism.models.reward_model import RewardModel
from tropism.out_of_memory import BatchSize
from tropism.rewards.reward_model import find_reward_model
from tropism.types import Messages, pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextRewardModel:
    """A reward model with its tokenizer: texts in, scores out.

    Args:
        facts: what it reads, and its scale.
    """

    def __init__(self, model: RewardModel, tokenizer: PreTrainedTokenizerBase, facts: RewardFacts) -> None:
        self.model, self.tokenizer, self.facts = model, tokenizer, facts
        self.inputs = ClassifierInputs(
            model.classifier,
            tokenizer,
            text=cast(ReadText, facts.text),
            max_length=facts.max_length,
            cut_completion=True,
        )
        self.size = BatchSize(
            "texts scored at once",
            setting="batch_size",
            advice="Score shorter texts, or load the model on another device or in bfloat16",
        )

    @classmethod
    def load(cls, source: str | Path, **model_fields: Any) -> TextRewardModel:
        """From the run folder of a reward model, its model folder, or a hub id.

        Args:
            model_fields: further fields of ``ModelConfig``, such as ``device="cpu"``.

        Raises:
            ConfigError: there is no such folder, its run has not finished, or it holds something else.
            ModelError: the model is damaged, or cannot be downloaded.
        """
        path = Path(source).expanduser()
        name = str(find_reward_model(path)) if path.exists() else folder_or_hub_id(str(source), path)
        return cls(*load_reward_model(ModelConfig(name=name, **model_fields)))

    from_pretrained = load

    @torch.no_grad()
    def score(
        self,
        prompts: str | Messages | Sequence[str | Messages],
        completions: Sequence[str | Messages],
        *,
        batch_size: int = 16,
    ) -> list[float]:
        """One score per completion: gain * logit + bias.

        Args:
            prompts: text or chat messages; one for all completions, or a list with one for each. They count where the
                model was trained to read them (``facts.text``).
            completions: texts, or lists of chat messages.
            batch_size: texts per forward pass.

        Raises:
            ConfigError: one text in place of a list, or not one prompt for each completion.
            DataError: nothing to read in a prompt and completion, or messages that the chat template refuses.
        """
        if isinstance(completions, str):
            raise ConfigError("completions: expected a list of completions, not one text; put it into a list")
        if not isinstance(prompts, str | Sequence):
            raise ConfigError(f"prompts: expected a text, chat messages or a list of them, not {prompts!r:.60}")
        if batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, not {batch_size}")
        rows = [
            self._row(place, prompt, completion)
            for place, (prompt, completion) in enumerate(
                zip(_one_for_each(prompts, len(completions)), completions, strict=True)
            )
        ]
        by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        scores = [0.0] * len(rows)

        def compute(chosen: Sequence[int]) -> list[float]:
            ids = pad_rows([rows[row] for row in chosen]).to(self.model.device)
            lengths = torch.tensor([len(rows[row]) for row in chosen], device=ids.device)
            return self.model(ids, lengths).tolist()  # type: ignore[no-any-return]

        for chosen, found in self.size.parts(by_length, compute, size=batch_size):
            for row, score in zip(chosen, found, strict=True):
                scores[row] = score
        return scores

    def _row(self, place: int, prompt: Any, completion: Any) -> list[int]:
        try:
            return self.inputs.ids(prompt, completion)
        except UnreadableError as error:
            raise DataError(f"completion {place}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain sequence classifier, its tokenizer and what it reads, for ``load``."""
        save_reward_model(self.model, self.tokenizer, folder, self.facts)


def _one_for_each(prompts: Any, number: int) -> list[Any]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping)):
        return [prompts] * number
    if len(prompts) != number:
        raise ConfigError(
            f"there are {len(prompts)} prompts for {number} completions; give one for all, or one for each"
        )
    return list(prompts)
