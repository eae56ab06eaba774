"""A trained (or any) model that answers prompts in text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tropism.data.prompts import make_prompts
from tropism.errors import ModelError
from tropism.models.loading import LoadedModel, ModelConfig, load_model
from tropism.models.policy import Policy
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.protocol import LogitFilter
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.types import Messages


class TextPolicy:
    """A policy with its tokenizer: text in, text out.

    Args:
        sampling: the settings that ``generate`` starts from.
    """

    def __init__(self, policy: Policy, loaded: LoadedModel, sampling: Sampling | None = None) -> None:
        self.policy = policy
        self.tokenizer = loaded.tokenizer
        self.sampler = EmbeddedSampler(loaded.tokenizer, loaded.tokens.eos_ids)
        self.sampling = sampling or Sampling()

    @classmethod
    def load(cls, source: Any, **model_fields: Any) -> TextPolicy:
        """From a run folder, or anything that ``load_model`` takes.

        Args:
            model_fields: further fields of ``ModelConfig``, such as ``device="cpu"``.
        """
        if isinstance(source, (str, Path)):
            source = ModelConfig(name=model_path(source), **model_fields)
        loaded = load_model(source)
        return cls(Policy(loaded.model), loaded)

    def generate(
        self,
        prompts: str | Sequence[str | Messages],
        *,
        n: int = 1,
        seed: int = 0,
        filters: Sequence[LogitFilter] = (),
        **changes: Any,
    ) -> list[str]:
        """``n`` completions of each prompt, those of one prompt together.

        Args:
            seed: equal seeds give equal completions.
            filters: logit filters, see ``tropism.rollouts.protocol.LogitFilter``.
            changes: fields of ``Sampling``, such as ``max_new_tokens=20``.
        """
        items = [prompts] if isinstance(prompts, str) else list(prompts)
        sampling = replace(self.sampling, **changes)
        limit = self.policy.context_length
        room = None if limit is None else limit - sampling.max_new_tokens
        made = make_prompts(items, self.tokenizer, max_length=room)
        key = StreamKey(seed=seed, purpose="generate")
        rollouts = self.sampler.generate(self.policy, made, sampling, n, key=key, filters=filters).to("cpu")
        texts = Transcriber(self.tokenizer, sampling.stop)(rollouts, [p for p in made for _ in range(n)]).completions
        return [text if isinstance(text, str) else str(text[0]["content"]) for text in texts]


def model_path(source: str | Path) -> str:
    """The model inside a run folder; anything else as it is.

    Raises:
        ModelError: a run folder whose run has not finished.
    """
    folder = Path(source)
    if not (folder / "recipe.yaml").is_file():
        return str(source)
    if not (folder / "model").is_dir():
        raise ModelError(f"the run {folder} has no model yet; finish it with `tropism train --resume {folder}`")
    return str(folder / "model")
