"""The prompts of a comparison: the same training and held-out ones for every method and seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.data.encoding import encode_bare
from tropism.data.order import epoch_order, fingerprint
from tropism.data.prompts import make_prompts
from tropism.data.split import prompt_key
from tropism.errors import ConfigError, ModelError
from tropism.foreign.pretrained import configuration
from tropism.foreign.view import model_view
from tropism.generation import model_path
from tropism.models.loading import DEMO, folder_or_hub_id
from tropism.recipe_data import prompts_of
from tropism.storage import write_whole, writing
from tropism.targets.conditioner import Conditioner
from tropism.types import Prompt

PROMPT = "prompt"
"""The column of prompts in every file that a comparison writes."""


@dataclass(frozen=True, kw_only=True)
class ComparedPrompts:
    """Training and held-out prompts."""

    training: Sequence[Prompt]
    held_out: Sequence[Prompt]

    @classmethod
    def read(
        cls, recipe: Recipe, tokenizer: Any, *, context_length: int | None = None, taken: int = 0
    ) -> ComparedPrompts:
        """Those of a comparison's shared recipe; of data with answers the prompts alone.

        Args:
            context_length: of the model; None: prompts may have any length. taken: tokens that stand before each.

        Raises:
            TropismError: unusable data, or no held-out prompts.
        """
        training, held_out = prompts_of(recipe, tokenizer, context_length=context_length, taken=taken)
        if not held_out:
            raise ConfigError("there are no held-out prompts, so there is nothing to compare on; give eval_data")
        return cls(training=training, held_out=held_out)

    @property
    def fingerprints(self) -> dict[str, str]:
        return {"training prompts": fingerprint(self.training), "held-out prompts": fingerprint(self.held_out)}

    @property
    def notes(self) -> list[str]:
        """What has to be known of them: whether held-out prompts are trained on, too."""
        trained = {prompt_key(prompt) for prompt in self.training}
        shared = sum(prompt_key(prompt) in trained for prompt in self.held_out)
        return [f"{shared} of {len(self.held_out)} held-out prompts are trained on, too"] if shared else []

    def refuse_prepared(self, tokenizer: Any, why: str) -> None:
        """See that every training prompt is what its text says: the pool, and files of prompts, hold texts.

        Args:
            why: ends the message.

        Raises:
            ConfigError: a prompt has other tokens than its text, such as those of ``data.prepare``.
        """
        read = make_prompts([{PROMPT: prompt.text} for prompt in self.training], tokenizer)
        for text, prompt in zip(read, self.training, strict=True):
            if text.ids != prompt.ids:
                raise ConfigError(
                    f"the prompt {str(prompt.text)[:60]!r} has other tokens than its text, by data.prepare or "
                    f"data.overlong; {why}"
                )


def context_length_of(name: str) -> int | None:
    """The model's context by its configuration, without its weights; None where that does not say, or is not there.

    Cells look again at the model itself: this is to fail early.
    """
    path = model_path(name)
    if path == DEMO or path.endswith(".gguf"):
        return None
    source = folder_or_hub_id(path, Path(path))
    try:
        with model_view(source, revision=None, weights=False) as view:
            length = getattr(configuration(view, source), "max_position_embeddings", None)
    except (ModelError, OSError):
        return None
    return int(length) if length else None


def taken_by(recipe: Recipe, tokenizer: Any) -> int:
    """Tokens that a recipe's method puts before every prompt, at most, as far as is known before it is trained."""
    config = recipe.algorithm.conditioning
    return 0 if config is None else Conditioner(config, encode=partial(encode_bare, tokenizer)).width


def write_prompts(prompts: Sequence[Prompt], path: Path) -> None:
    """A file of prompts with their columns, for runs that cannot part the data themselves.

    Raises:
        ConfigError: a column that JSON cannot hold.
        StorageError: it cannot be written.
    """
    lines = []
    for prompt in prompts:
        columns = {name: value for name, value in prompt.columns.items() if name != PROMPT}
        try:
            lines.append(json.dumps({PROMPT: prompt.text, **columns}, ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"a part of the data cannot be written down ({str(error)[:100]}); give eval_data as a file "
                "of its own instead of data.eval_fraction"
            ) from error
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(line + "\n" for line in lines).encode())


def file_of_prompts(path: Path) -> DataConfig:
    """How a file of ``write_prompts`` is read."""
    return DataConfig(path=str(path), prompt_column=PROMPT)


def prompts_of_pool(count: int, *, completions: int, least: int, seed: int) -> list[int]:
    """Which of the prompts a pool is sampled of, in order: all, or fewer where each would get less than ``least``."""
    most = max(1, completions // least)
    order = epoch_order(count, seed=seed, epoch=0)
    return order if count <= most else order[:most]
