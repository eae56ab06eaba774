"""A trained (or any) model that answers prompts in text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tropism.best_of import BestCompletion, best_completions, text_of
from tropism.data.encoding import room_for_prompt
from tropism.data.prompts import make_prompts
from tropism.errors import ConfigError, ModelError
from tropism.export_hub import check_repository, push_folder
from tropism.models.conditioning import RewardSlots, make_slots
from tropism.models.conditioning_files import MARK, write_conditioning
from tropism.models.loading import LoadedModel, ModelConfig, load_model
from tropism.models.modules import base_model
from tropism.models.policy import Policy
from tropism.models.q_head_files import MARK as Q_MARK
from tropism.models.q_head_files import write_q_heads
from tropism.models.q_heads import QHeads
from tropism.models.saving import save_plain
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.guidance import RewardGuidance
from tropism.rollouts.protocol import LogitFilter
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.targets.conditioner import Conditioner, Targets
from tropism.targets.config import Conditioning
from tropism.types import Messages, Prompt, RewardInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextPolicy:
    """A policy with its tokenizer: text in, text out.

    Args:
        sampling: the settings that ``generate`` starts from.
        conditioner: of a model that can be asked for a reward; None for any other.
    """

    def __init__(
        self,
        policy: Policy,
        loaded: LoadedModel,
        sampling: Sampling | None = None,
        *,
        conditioner: Conditioner | None = None,
    ) -> None:
        self.policy = policy
        self.tokenizer = loaded.tokenizer
        self.sampler = EmbeddedSampler(loaded.tokenizer, loaded.tokens.eos_ids)
        self.sampling = sampling or Sampling()
        self.conditioner = conditioner

    @classmethod
    def load(cls, source: Any, **model_fields: Any) -> TextPolicy:
        """From a run folder, or anything that ``load_model`` takes.

        Args:
            model_fields: further fields of ``ModelConfig``, such as ``device="cpu"``.
        """
        if isinstance(source, (str, Path)):
            source = ModelConfig(name=model_path(source), **model_fields)
        loaded = load_model(source)
        policy, conditioner = policy_with_slots(loaded)
        return cls(policy, loaded, conditioner=conditioner)

    from_pretrained = load

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, its tokenizer, and what it needs to be asked for rewards, for ``load``."""
        save_policy(self.policy, self.tokenizer, self.conditioner, Path(folder))

    def push_to_hub(self, repository: str, *, private: bool = False, token: str | None = None) -> str:
        """The same into a model repository of the Hugging Face hub, which is made where there is none; its address.

        Args:
            repository: ``user/name``.
            token: None takes the one in HF_TOKEN, or the one that ``hf auth login`` left.

        Raises:
            TropismError: no such repository can be, or the hub cannot be reached or refuses the token.
        """
        check_repository(repository)
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / repository.rpartition("/")[2]
            self.save_pretrained(folder)
            return push_folder(folder, repository, private=private, token=token)

    def generate(
        self,
        prompts: str | Sequence[str | Messages],
        *,
        n: int = 1,
        seed: int = 0,
        target_reward: Targets | Sequence[Targets] = None,
        guidance: float = 0.0,
        guidance_from: Targets = None,
        filters: Sequence[LogitFilter] = (),
        **changes: Any,
    ) -> list[str]:
        """``n`` completions of each prompt, those of one prompt together.

        Args:
            seed: equal seeds give equal completions.
            target_reward: of a model that can be asked: a number, ``{"name": number}``, or a list with one per prompt;
                in the reward's own units. Rewards left out are left open.
            guidance: strength of the push from ``guidance_from`` towards ``target_reward``; 0 is off.
            guidance_from: a low target; None: what the model says when the reward is left open.
            filters: logit filters, see ``tropism.rollouts.protocol.LogitFilter``.
            changes: fields of ``Sampling``, such as ``max_new_tokens=20``; of a model with Q heads also ``beta=4``.

        Raises:
            ConfigError: a target of a model that cannot be asked, or of the wrong name, type or number.
        """
        inputs = self._complete(
            prompts,
            n,
            seed=seed,
            target_reward=target_reward,
            guidance=guidance,
            guidance_from=guidance_from,
            filters=filters,
            **changes,
        )
        return [text_of(completion) for completion in inputs.completions]

    def best_of(
        self,
        prompts: str | Sequence[str | Messages | Mapping[str, Any]],
        reward: Any,
        *,
        n: int = 16,
        seed: int = 0,
        allow_code: bool = False,
        **options: Any,
    ) -> list[BestCompletion]:
        """Of each prompt the best of ``n`` completions: best-of-n, which is search by a reward without any training.

        The KL to the policy itself is at most log n - (n - 1) / n (``tropism.evaluation.best_of.best_of_kl``).

        Args:
            prompts: also records such as ``{"prompt": ..., "answer": ...}``, whose other columns the reward sees.
            reward: what a recipe's reward may be: a function, a name, ``{"name": (reward, weight)}``.
            seed: equal seeds sample equal completions, those of ``generate``.
            allow_code: let the reward name code: ``module:function`` or ``file.py:function``.
            options: further arguments of ``generate``, such as ``max_new_tokens=20``.

        Raises:
            TropismError: as ``generate`` does; the reward fails, or has no opinion on any completion of a prompt.
        """

        def sample(count: int) -> RewardInputs:
            return self._complete(prompts, count, seed=seed, **options)

        return best_completions(sample, reward, n=n, allow_code=allow_code)

    def _complete(
        self,
        prompts: str | Sequence[Any],
        n: int,
        *,
        seed: int,
        target_reward: Targets | Sequence[Targets] = None,
        guidance: float = 0.0,
        guidance_from: Targets = None,
        filters: Sequence[LogitFilter] = (),
        **changes: Any,
    ) -> RewardInputs:
        """Prompts with n completions of each, as rewards see them; arguments as of ``generate``."""
        items = [prompts] if isinstance(prompts, str) else list(prompts)
        sampling = replace(self.sampling, **changes)
        push = RewardGuidance(guidance)
        self._check_asked(target_reward, guidance, guidance_from)
        plain = make_prompts(items, self.tokenizer, max_length=self._room(sampling))
        asked: Sequence[Prompt] = plain
        streams, used = None, list(filters)
        if self.conditioner is not None:
            asked = self.conditioner.condition(plain, target_reward)
        if guidance and self.conditioner is not None:
            others = self.conditioner.condition(plain, {} if guidance_from is None else guidance_from)
            streams = [[prompt.ids] for prompt in others]
            used.insert(0, push)
        key = StreamKey(seed=seed, purpose="generate")
        rollouts = self.sampler.generate(self.policy, asked, sampling, n, key=key, filters=used, streams=streams)
        per_row = [prompt for prompt in plain for _ in range(n)]
        return Transcriber(self.tokenizer, sampling.stop)(rollouts.to("cpu"), per_row)

    def _check_asked(self, target_reward: Targets | Sequence[Targets], guidance: float, guidance_from: Targets) -> None:
        conditioner = self.conditioner
        if guidance_from is not None and not guidance:
            raise ConfigError("guidance_from says what guidance pushes away from; give guidance a strength, such as 1")
        if conditioner is None:
            if target_reward is not None or guidance:
                raise ConfigError(
                    "this model was not trained to be asked for a reward; train one with algorithm: conditioned, or "
                    "leave target_reward and guidance out"
                )
        elif guidance:
            if target_reward is None and conditioner.default is None:
                raise ConfigError("guidance pushes towards target_reward; give one, or leave guidance out")
            if guidance_from is None and not conditioner.knows_open:
                raise ConfigError(
                    "guidance pushes away from what the model says where its reward is left open, which this model has "
                    "not learned (target_dropout was 0); give guidance_from, a low target"
                )

    def _room(self, sampling: Sampling) -> int | None:
        """Most tokens of a prompt."""
        limit = self.policy.context_length
        taken = 0 if self.conditioner is None else self.conditioner.width
        room = room_for_prompt(self.tokenizer, limit, new=sampling.max_new_tokens, taken=taken)
        if room is not None and room < 1:
            before = f" and {taken} for what asks for the rewards" if taken else ""
            raise ConfigError(
                f"max_new_tokens={sampling.max_new_tokens}{before} leave no room for a prompt in the model's context "
                f"of {limit}; sample fewer tokens"
            )
        return room


def slots_for(config: Conditioning, loaded: LoadedModel) -> RewardSlots:
    """Slots that fit a model, with no values yet. Their base token is the bos, or else the eos."""
    tokens = loaded.tokens
    base_id = tokens.bos_id if tokens.bos_id is not None else next(iter(tokens.eos_ids), 0)
    return make_slots(
        base_model(loaded.model),
        mechanism=config.mechanism,
        rewards=len(config.targets),
        bins=config.bins,
        base_id=base_id,
    )


def make_conditioner(config: Conditioning, loaded: LoadedModel) -> Conditioner:
    """What puts targets before a model's prompts, with no scales yet."""

    def encode(text: str) -> list[int]:
        return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])

    return Conditioner(config, encode=encode, bos_id=loaded.tokens.bos_id)


def policy_with_slots(loaded: LoadedModel) -> tuple[Policy, Conditioner | None]:
    """A loaded model as a policy, with its slots and scales where it can be asked for a reward.

    Raises:
        ModelError: what it was saved with does not fit it.
    """
    saved = loaded.conditioning
    q_heads = None if loaded.q_heads is None else q_heads_of(loaded)
    if saved is None:
        return Policy(loaded.model, q_heads=q_heads), None
    config = saved.config()
    conditioner = make_conditioner(config, loaded)
    slots = None if config.mechanism == "text" else slots_for(config, loaded)
    saved.restore(conditioner, slots)
    return Policy(loaded.model, q_heads=q_heads, conditioning=slots), conditioner


def q_heads_of(loaded: LoadedModel, *, count: int = 2, seed: int = 0) -> QHeads:
    """Heads that value a model's tokens: its own, or fresh ones where it has none.

    Args:
        count: Q heads of fresh ones. seed: of their first layers.

    Raises:
        ModelError: its own do not fit it.
    """
    matrix = base_model(loaded.model).get_output_embeddings().weight
    # Not the configuration's sizes: some families (OPT) project hidden states, and vocabularies are padded.
    vocabulary, width = matrix.shape
    if loaded.q_heads is not None:
        heads = loaded.q_heads.load(hidden_size=width, vocabulary=vocabulary)
    else:
        heads = QHeads(width, vocabulary, count=count)
        heads.start(seed=seed)
    return heads.to(matrix.device)


def save_policy(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, conditioner: Conditioner | None, folder: Path
) -> None:
    """A policy as a Hugging Face folder, and beside it what it needs to be asked for rewards, and its Q heads."""
    settings: dict[str, Any] = {}
    heads = policy.q_heads
    if conditioner is not None:
        settings[MARK] = conditioner.config.mechanism
    if heads is not None or getattr(policy.language_model.config, Q_MARK, None) is not None:
        settings[Q_MARK] = None if heads is None else len(heads.q)  # None where training went on without them

    def write_others(path: Path) -> None:
        if conditioner is not None:
            write_conditioning(path, conditioner.to_dict(), policy.conditioning)
        if heads is not None:
            write_q_heads(path, heads)

    save_plain(policy.model, tokenizer, folder, settings=settings, beside=write_others)  # type: ignore[arg-type]


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
