"""The recipe: everything about a run, as one composition of the configurations that live beside their owners."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tropism.algorithms import ALGORITHMS, INFERENCE_ONLY, AlgorithmConfig
from tropism.data.config import DataConfig
from tropism.errors import ConfigError
from tropism.evaluation.sampling_settings import refuse_ambiguous_names, sampling_settings
from tropism.foreign.trust import refuse_trust
from tropism.foreign.view import ADAPTER_CONFIG
from tropism.gold_reward import check_gold
from tropism.metric_functions import MetricTerm, metrics_of
from tropism.models.loading import ModelConfig
from tropism.models.lora import LoRA
from tropism.redaction import find_secret
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling, refuse_sweep
from tropism.schema import build, dump_yaml, read_yaml, refuse_absurd, to_plain
from tropism.training.config import TrainerConfig
from tropism.training.normalisation import Normalisation

logger = logging.getLogger("tropism")

TRAIN_AN_ADAPTER = (
    "and packed weights cannot be trained, neither all nor the last layers: set lora (lora: {}) to train an adapter on "
    "them, or load the model without quantisation"
)
"""The end of two errors."""
MOST_PER_STEP = 10_000_000
"""Completions, or demonstrations, of a step: all of them are held in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run in full. From Python, ``model`` and ``data`` may also be objects (a loaded model, lists, data sets)."""

    model: Any
    """Hub id, folder, .gguf file, "demo", or the fields of ModelConfig."""
    algorithm: AlgorithmConfig
    """The method: its name, or its name and fields (and a preset)."""
    data: Any
    """File, folder, hub id, or the fields of DataConfig: prompts, or demonstrations for sft."""
    eval_data: Any = None
    """Held-out data in the same forms; None: the eval_fraction of data, if that is set."""
    reward: RewardConfig | None = None
    """What is rewarded: a name, or terms with weights."""
    metrics: dict[str, MetricTerm] = field(default_factory=dict)
    """What else is measured of held-out completions: a name, or named functions. Logged as `eval/<name>`."""
    run: str | None = None
    """Run folder, relative to the working directory; None: runs/<method>-<number>."""
    total_steps: int = 100
    """Collects for methods that sample, optimizer updates for sft."""
    prompts_per_step: int = 16
    """Prompts per collect (each is answered group_size times), or demonstrations per update."""
    seed: int = 0
    """All randomness follows from it."""
    sampling: Sampling = field(default_factory=Sampling)
    """How completions are sampled, in training and evaluation."""
    lora: LoRA | None = None
    """Train an adapter; None trains the model's own weights."""
    train_layers: int | None = None
    """Train only that many of the last transformer blocks, the final norm, and the output embedding where it is not
    tied to the input embedding. 0 trains the output head alone (and the final norm): a tied output embedding becomes a
    matrix of its own. None trains all weights. Not together with lora."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Optimizer, precision, evaluation, checkpoints, tracking."""
    normalise: Normalisation | None = None
    """Of a reward model: put its scores on a scale by samples of a policy; None leaves them as they come out."""

    def __post_init__(self) -> None:
        _refuse_secrets(self)
        if self.run is not None:
            object.__setattr__(self, "run", run_folder_name(self.run))
        if self.total_steps < 1:
            raise ConfigError("total_steps must be at least 1")
        if self.prompts_per_step < 1:
            raise ConfigError("prompts_per_step must be at least 1")
        size = self.algorithm.step_size(self.prompts_per_step, self.prompts_per_step)
        per_step = max(size.completions, size.batch)
        if per_step > MOST_PER_STEP:
            raise ConfigError(
                f"prompts_per_step, times the completions of a prompt, is {per_step:,}; at most {MOST_PER_STEP:,} "
                "completions (or demonstrations) make a step"
            )
        if self.train_layers is not None and self.train_layers < 0:
            raise ConfigError(
                f"train_layers is {self.train_layers}; give a number of transformer blocks, or 0 for the output head "
                "alone (leave it out to train all weights)"
            )
        if self.train_layers is not None and self.lora is not None:
            raise ConfigError(
                "lora and train_layers cannot go together: lora trains an adapter, train_layers some of the model's "
                "own weights. Leave one of them out"
            )
        object.__setattr__(self, "metrics", metrics_of(self.metrics))
        settings = sampling_settings(self.sampling, self.trainer.evaluation.sampling)
        refuse_ambiguous_names(settings, {} if self.reward is None else self.reward.terms)
        self._check_reward_model()
        self._check_quantized()
        self._check_best()
        self._check_policy_distribution()
        if self.algorithm.reads == "prompts" and self.reward is None:
            raise ConfigError(
                f"{self.algorithm.name} needs a reward: a registered name such as vader, a callable, or named terms"
            )

    def _check_policy_distribution(self) -> None:
        """What filters leave can be trained by some methods only."""
        if self.sampling.policy_distribution == "filtered" and not self.algorithm.learns_filtered:
            raise ConfigError(
                f"sampling.policy_distribution is filtered, and {self.algorithm.name} as it is set here trains the "
                "tempered distribution: leave policy_distribution out (ppo, rloo, and grpo with a ratio per token or "
                "sequence can train the filtered one)"
            )

    def _check_quantized(self) -> None:
        """Packed weights stand still, so that something else has to be trained."""
        model = self.model
        if not isinstance(model, ModelConfig) or model.quantization is None:
            return
        if self.algorithm.reads == "comparisons":
            raise ConfigError(f"{self.algorithm.name} takes no model.quantization; leave it out")
        adapter = (Path(model.name).expanduser() / ADAPTER_CONFIG).is_file()
        if self.lora is None and not adapter:
            raise ConfigError(f"model.quantization is {model.quantization}, {TRAIN_AN_ADAPTER}")

    def _check_best(self) -> None:
        keeping, gold = self.trainer.checkpoints, self.trainer.evaluation.gold
        if gold is not None:
            check_gold(gold, self.reward)
        elif str(keeping.best_metric).partition("@")[0] == "eval/gold":
            raise ConfigError(
                "trainer.checkpoints.best_metric is eval/gold, and there is no gold reward; name one in "
                "trainer.evaluation.gold"
            )
        waits = keeping.use_best or keeping.patience is not None
        if waits and keeping.best_metric == "eval/reward" and self.reward is None:
            raise ConfigError(
                "trainer.checkpoints.best_metric is eval/reward, and there is no reward; set it to eval/loss, and "
                "best_mode to min"
            )

    def _check_reward_model(self) -> None:
        """What belongs to reward models alone, and what they have no use for."""
        if self.algorithm.reads != "comparisons":
            if self.normalise is not None:
                raise ConfigError(
                    f"normalise is for reward models; {self.algorithm.name} trains a policy: leave it out"
                )
            return
        policy = None if self.normalise is None else self.normalise.policy
        if isinstance(policy, ModelConfig) and policy.trust_remote_code:
            raise ConfigError(
                "normalise.policy does not run the code of a model's authors; leave trust_remote_code out"
            )
        for name, given in (
            ("reward", self.reward),
            ("metrics", self.metrics or None),
            ("trainer.evaluation.sampling", self.trainer.evaluation.sampling or None),
            ("trainer.evaluation.gold", self.trainer.evaluation.gold),
            ("train_layers", self.train_layers),
        ):
            if given is not None:
                raise ConfigError(f"{self.algorithm.name} takes no {name}; leave it out")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Recipe:
        """A recipe from plain values, strictly checked.

        Raises:
            ConfigError: names the field by its dotted path, and the closest valid one where it is unknown.
        """
        values = dict(mapping)
        given = ("model", "data", "eval_data")  # from Python these may be records, or a loaded model
        refuse_absurd({k: v for k, v in values.items() if k not in given or isinstance(v, Mapping)})
        if "algorithm" not in values:
            raise ConfigError(f"algorithm: required, one of {', '.join(ALGORITHMS)}")
        values["algorithm"] = algorithm_from(values["algorithm"])
        if values.get("reward") is not None:
            values["reward"] = RewardConfig.of(values["reward"])
        values |= _with_gold(values)
        values["metrics"] = metrics_of(values.get("metrics") or {})
        if isinstance(values.get("sampling"), Mapping):
            try:
                refuse_sweep(values["sampling"])
            except ValueError as error:
                raise ConfigError(str(error)) from error
        if isinstance(values.get("model"), Mapping):
            values["model"] = build(ModelConfig, values["model"], path="model")
        for name in ("data", "eval_data"):
            if isinstance(values.get(name), Mapping):
                values[name] = build(DataConfig, values[name], path=name)
        if isinstance(values.get("normalise"), Mapping):
            values["normalise"] = _normalisation_from(values["normalise"])
        return build(cls, values)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML file; relative paths in it are relative to the working directory.

        Raises:
            ConfigError: as in ``from_mapping``, or the file lets a model's own code run, which only a caller may.
        """
        values = read_yaml(path)
        refuse_trust(values, str(path))
        return cls.from_mapping(values)

    def to_yaml(self) -> str:
        """The resolved recipe: every field, defaults included. Objects given from Python are described, not stored."""
        plain: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, AlgorithmConfig):
                plain[f.name] = {"name": value.name, **to_plain(value)}
            elif f.name in ("model", "data", "eval_data"):
                plain[f.name] = _plain_or_described(value)
            elif isinstance(value, Normalisation):
                given = {name: _plain_or_described(getattr(value, name)) for name in ("policy", "data")}
                plain[f.name] = to_plain(replace(value, policy=None, data=None)) | given
            else:
                plain[f.name] = to_plain(value)
        return dump_yaml(plain)


def _with_gold(values: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's settings with the gold reward built, which may be one word as a reward may; none where none is."""
    trainer = values.get("trainer")
    evaluation = trainer.get("evaluation") if isinstance(trainer, Mapping) else None
    if not isinstance(evaluation, Mapping) or evaluation.get("gold") is None:
        return {}
    try:
        gold = RewardConfig.of(evaluation["gold"])
    except ConfigError as error:
        raise ConfigError(f"trainer.evaluation.gold: {error}") from error
    return {"trainer": {**trainer, "evaluation": {**evaluation, "gold": gold}}}  # type: ignore[dict-item]


_CONFIGS = (ModelConfig, DataConfig)


def _refuse_secrets(recipe: Recipe) -> None:
    """A recipe is written into the run folder, its report and the trackers."""
    settings = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    # Records and models given from Python are written nowhere.
    for name in ("model", "data", "eval_data"):
        if not isinstance(settings[name], (str, Path, Mapping, *_CONFIGS)):
            del settings[name]
    if recipe.normalise is not None and not isinstance(recipe.normalise.data, (str, Path, *_CONFIGS)):
        settings["normalise"] = replace(recipe.normalise, data=None)
    found = find_secret(settings)
    if found is not None:
        raise ConfigError(
            f"{found[0]} looks like {found[1]}. Recipes are written into run folders, which are shared: take it out, "
            "and set it in the environment (HF_TOKEN for the hub, or `hf auth login`; your own reward reads os.environ)"
        )


def resume_command(folder: Path, *, allow_code: bool) -> str:
    """What goes on with a run."""
    return f"tropism train --resume {folder}" + (" --allow-code" if allow_code else "")


def free_run(method: str) -> Path:
    """runs/<method>-<number> with the first number that is free."""
    number = 1
    while (path := Path("runs") / f"{method}-{number}").exists():
        number += 1
    return path


def run_folder_name(given: str) -> str:
    """A run folder as it was given, or as an absolute path where ``~`` or ``..`` in it lead somewhere else.

    Raises:
        ConfigError: no text, nothing that prints, or a folder that is never a run's: the home folder, or one that it
            lies in, such as the root.
    """
    if not isinstance(given, str):
        raise ConfigError(f"run: expected text, not {given!r:.60}")
    if not given.strip() or not given.isprintable():
        problem = (
            "has characters that do not print (NUL, a line break, half a surrogate)" if given.strip() else "is empty"
        )
        raise ConfigError(f"run: {given!r:.80} {problem}; give the run a name such as runs/warm")
    try:
        path = Path(given).expanduser()
        resolved = path.resolve()
        home = Path.home().resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"run: {given!r:.80} cannot be a folder: {error}") from error
    if resolved == home or resolved in home.parents:
        raise ConfigError(f"run: {given!r:.80} is {resolved}, not a folder of one run; give one such as runs/warm")
    if path.name and ".." not in path.parts and str(path) == str(Path(given)):
        return given
    logger.warning("the run folder %s is %s", given, resolved)
    return str(resolved)


def algorithm_from(value: Any) -> AlgorithmConfig:
    """A method from its name, or from ``{name, preset, field: value, ...}``.

    Raises:
        ConfigError: unknown name (the closest is named), preset or field.
    """
    if isinstance(value, AlgorithmConfig):
        return value
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or "name" not in given:
        raise ConfigError("algorithm: give a method's name, or a mapping with name and the method's fields")
    rest = {key: entry for key, entry in given.items() if key not in ("name", "preset")}
    method = method_named(given["name"])
    if given.get("preset") is None:
        return build(method, rest, path="algorithm")
    base = method.preset(str(given["preset"]))
    return build(method, {**to_plain(base), **rest}, path="algorithm")


def method_named(name: Any) -> type[AlgorithmConfig]:
    """The configuration class of a method."""
    if isinstance(name, str) and name in INFERENCE_ONLY:
        raise ConfigError(f"algorithm: {name} trains nothing. {INFERENCE_ONLY[name]}")
    if not isinstance(name, str) or name not in ALGORITHMS:
        from difflib import get_close_matches

        close = get_close_matches(str(name), ALGORITHMS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"algorithm: there is no method {name!r}; {hint}The methods are: {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def _normalisation_from(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a normalisation, its policy and data built where they are settings, too, and no names."""
    kinds: dict[str, type[Any]] = {"policy": ModelConfig, "data": DataConfig}
    given = {name: mapping.get(name) for name in kinds}
    built = {
        name: build(kinds[name], value, path=f"normalise.{name}")
        for name, value in given.items()
        if isinstance(value, Mapping)
    }
    return {**mapping, **built}


def _plain_or_described(value: Any) -> Any:
    """What a recipe's file holds of a model or of data."""
    return to_plain(value) if isinstance(value, (str, type(None), *_CONFIGS)) else _describe(value)


def _describe(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    size = f" of {len(value)}" if hasattr(value, "__len__") else ""
    return f"<{type(value).__name__}{size} given from Python>"
