"""Completions for a measurement: by the library's own sampler, or by Hugging Face's ``generate`` with all it can do.

Both give the same completions wherever the work was cut and whichever process does it. The own sampler has a random
number per token; ``generate`` draws from torch's generator, which is seeded for each batch by the batch's place.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from tropism.data.order import keyed_hash
from tropism.errors import ConfigError, NoRoomError
from tropism.generation import TextPolicy
from tropism.models.modules import base_model
from tropism.out_of_memory import is_out_of_memory, reason_of
from tropism.rewards.config import closest
from tropism.rollouts.config import Sampling
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.safe_yaml import read_yaml
from tropism.schema import build, to_plain
from tropism.targets.conditioner import Targets
from tropism.texts import decoder_prefix_of
from tropism.types import FinishReason, Prompt, RewardInputs, pad_rows

Generation = Sampling | GenerationConfig

DEFAULT = Sampling(max_new_tokens=20)
"""As long as the completions of RealToxicityPrompts."""
_DESCRIBES = ("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash")
"""Entries of a generation config that set nothing."""
_NO_MATTER = ("output_", "return_dict", "assistant_", "num_assistant", "target_lookbehind", "max_length")
"""Begin the names of settings that change no completion here: max_new_tokens goes before max_length."""


def generation_of(given: Any, *, whole: bool = False) -> Generation:
    """What says how to complete: settings of the own sampler, or of Hugging Face's ``generate``.

    Args:
        given: a ``Sampling``, a ``GenerationConfig``, the path of a JSON or YAML file, or a mapping. One whose names
            are all fields of ``Sampling`` is that; any other, and any with ``transformers_version``, is a
            ``GenerationConfig``. None: ``DEFAULT``.
        whole: a file or mapping always is a ``GenerationConfig``.

    Raises:
        ConfigError: a name that neither knows, or a value that is refused.
    """
    if given is None:
        return DEFAULT
    if isinstance(given, str | Path):
        return generation_of(read_yaml(given), whole=whole)
    if isinstance(given, Sampling):
        return given
    if isinstance(given, GenerationConfig):
        return _checked(given)
    if not isinstance(given, Mapping):
        raise ConfigError(f"sampling: expected Sampling, GenerationConfig, a file or a mapping, not {given!r:.80}")
    settings = {name: value for name, value in given.items() if name not in _DESCRIBES}
    own = [f.name for f in fields(Sampling)]
    if set(settings) <= set(own) and not whole and "transformers_version" not in given:
        return build(Sampling, settings, path="sampling")
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name in settings:
        if name not in known:
            meant = known if whole else {*known, *own}
            raise ConfigError(f"sampling: unknown setting {name!r}. {closest(str(name), meant)}")
    try:
        return _checked(GenerationConfig(**settings))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"sampling: {_first_line(error)}") from error


def _checked(config: GenerationConfig) -> GenerationConfig:
    if config.max_new_tokens is None:
        raise ConfigError(
            "sampling: the generation config has no max_new_tokens; give it, as Hugging Face's max_length counts the"
            " prompt, too"
        )
    if config.num_return_sequences not in (None, 1):
        raise ConfigError("sampling: num_return_sequences is set by samples_per_prompt; leave it out")
    return config


def max_new_tokens(generation: Generation) -> int:
    """Most tokens of a completion."""
    assert generation.max_new_tokens is not None
    return int(generation.max_new_tokens)


def is_random(generation: Generation) -> bool:
    """Whether two completions of one prompt can differ."""
    return generation.temperature > 0 if isinstance(generation, Sampling) else bool(generation.do_sample)


def plain_settings(generation: Generation) -> dict[str, Any]:
    """The settings as plain data, with what they are settings of; of ``generate`` with the defaults that it fills in,
    such as top_k 50."""
    if isinstance(generation, Sampling):
        settings: dict[str, Any] = to_plain(generation)
        for name in ("batch_size", "compile"):  # how they are computed, not what
            settings.pop(name)
        return {"engine": "tropism", **settings}
    filled = copy.deepcopy(generation)
    filled.update(**filled._get_default_generation_params(), defaults_only=True)
    kept = {name: value for name, value in filled.to_dict().items() if value is not None and name not in _DESCRIBES}
    shown = {name: to_plain(value) for name, value in sorted(kept.items()) if not name.startswith(_NO_MATTER)}
    return {"engine": "transformers", **shown}


class Generator(Protocol):
    """Completes prompts."""

    def __call__(self, prompts: Sequence[Prompt], n: int, *, first_index: int) -> RewardInputs:
        """``n`` completions of each prompt, those of one prompt together; ``first_index`` is the number of the first
        among all completions of the measurement."""


def generator_of(policy: TextPolicy, generation: Generation, *, seed: int, target_reward: Targets) -> Generator:
    """What completes by these settings.

    Raises:
        ConfigError: a reward asked of a model that cannot be asked, or of one by Hugging Face's ``generate``.
    """
    if policy.conditioner is None and target_reward is not None:
        raise ConfigError("this model was not trained to be asked for a reward; leave target_reward out")
    if isinstance(generation, Sampling):
        return OwnSampling(policy, generation, seed=seed, target_reward=target_reward)
    if policy.conditioner is not None:
        raise ConfigError(
            "Hugging Face's generate knows nothing of reward slots, which this model was trained with; give settings of"
            " Sampling, or measure its plain export"
        )
    return HuggingFaceGeneration(policy, generation, seed=seed)


class OwnSampling:
    """Completions by the library's sampler."""

    def __init__(self, policy: TextPolicy, sampling: Sampling, *, seed: int, target_reward: Targets = None) -> None:
        self.policy, self.sampling, self.target_reward = policy, sampling, target_reward
        self.key = StreamKey(seed=seed, purpose="evaluation")
        self.transcribe = Transcriber(policy.tokenizer, sampling.stop)

    def __call__(self, prompts: Sequence[Prompt], n: int, *, first_index: int) -> RewardInputs:
        policy, asked = self.policy, prompts
        if policy.conditioner is not None:
            asked = policy.conditioner.condition(list(prompts), self.target_reward)
        rollouts = policy.sampler.generate(
            policy.policy, asked, self.sampling, n, key=self.key, first_index=first_index
        )
        return self.transcribe(rollouts.to("cpu"), [prompt for prompt in prompts for _ in range(n)])


class HuggingFaceGeneration:
    """Completions by ``generate`` of transformers: beams, contrastive search, any processor of its configuration.

    What the given configuration leaves open has the defaults of transformers, not those that came with the model; only
    the special tokens are the model's.
    """

    def __init__(self, policy: TextPolicy, config: GenerationConfig, *, seed: int) -> None:
        self.model: Any = base_model(policy.policy.model)  # type: ignore[arg-type]
        self.tokenizer, self.seed = policy.tokenizer, seed
        self.prefix = decoder_prefix_of(policy.tokenizer)
        stop = config.stop_strings
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        self.transcribe = Transcriber(policy.tokenizer, self.stop)
        self.config = copy.deepcopy(config)
        eos = policy.sampler.eos_ids
        if self.config.eos_token_id is None and eos:
            self.config.eos_token_id = list(eos)
        if self.config.pad_token_id is None:
            pad = policy.tokenizer.pad_token_id
            self.config.pad_token_id = pad if pad is not None else next(iter(eos), 0)
        for name in ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"):
            setattr(self.config, name, False)
        self.config.output_hidden_states = False
        parameters = inspect.signature(self.model.forward).parameters
        self.takes_positions = self.prefix is None and "position_ids" in parameters

    def __call__(self, prompts: Sequence[Prompt], n: int, *, first_index: int) -> RewardInputs:
        rows = [prompt for prompt in prompts for _ in range(n)]
        completions = self._generate(rows, first_index)
        ended = [self._ended(ids) for ids in completions]
        names = dict.fromkeys(name for prompt in rows for name in prompt.columns)
        return RewardInputs(
            prompts=[prompt.text for prompt in rows],
            completions=[self.transcribe.completion(prompt, ids) for prompt, (ids, _) in zip(rows, ended, strict=True)],
            completion_ids=[ids for ids, _ in ended],
            finish_reasons=[reason for _, reason in ended],
            columns={name: [prompt.columns.get(name) for prompt in rows] for name in names},
        )

    def _generate(self, rows: Sequence[Prompt], first_index: int) -> list[list[int]]:
        """New tokens of each row, behind which there may be padding."""
        device = self.model.device
        ids = pad_rows([row.ids for row in rows], value=self.config.pad_token_id, left=self.prefix is None)
        mask = pad_rows([[1] * len(row.ids) for row in rows], left=self.prefix is None)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if self.takes_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
        if self.prefix is not None:
            inputs["decoder_input_ids"] = torch.tensor([self.prefix] * len(rows), device=device)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), _plain_defaults(self.model):
            torch.manual_seed(int.from_bytes(keyed_hash("toxicity", self.seed, first_index)) >> 1)
            try:
                sequences = self.model.generate(
                    **inputs, generation_config=self.config, tokenizer=self.tokenizer if self.stop else None
                )
            except (ValueError, TypeError, ImportError) as error:
                raise ConfigError(f"Hugging Face's generate refuses these settings: {_first_line(error)}") from error
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Not tried again with less: its random numbers are those of the batch, so the samples would be others.
                raise NoRoomError(
                    f"out of memory: Hugging Face's generate has no room for {len(rows)} completions at once"
                    f" ({reason_of(error)}). Lower batch_size (--batch-size), num_beams or max_new_tokens"
                ) from error
        begin = ids.shape[1] if self.prefix is None else len(self.prefix)
        found: list[list[int]] = sequences[:, begin:].tolist()
        return found

    def _ended(self, ids: list[int]) -> tuple[list[int], FinishReason]:
        """A completion up to its end, and why it ended there."""
        eos = self.config.eos_token_id
        ends = {eos} if isinstance(eos, int) else set(eos or ())
        for index, token in enumerate(ids):
            if token in ends:
                return ids[: index + 1], "eos"
        length = len(ids)
        while length and ids[length - 1] == self.config.pad_token_id:
            length -= 1
        return ids[:length], "stop" if self.stop and length < max_new_tokens(self.config) else "length"


@contextmanager
def _plain_defaults(model: Any) -> Iterator[None]:
    """A block in which a model brings no settings of its own, with which transformers would fill what is left open."""
    before = model.generation_config
    model.generation_config = GenerationConfig(
        decoder_start_token_id=getattr(before, "decoder_start_token_id", None),
        bos_token_id=getattr(before, "bos_token_id", None),
    )
    try:
        yield
    finally:
        model.generation_config = before


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
