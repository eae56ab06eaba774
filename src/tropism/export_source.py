"""What is to be exported: the model of a finished run, one of its checkpoints, an adapter, or any model folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from tropism.algorithms.base import RunFacts
from tropism.algorithms.reward_modeling import RewardModeling
from tropism.commands.recipe_arguments import was_given_from_python
from tropism.config import Recipe
from tropism.errors import ConfigError, ModelError
from tropism.evaluation.run_folder import RunData
from tropism.foreign.json_files import read_object
from tropism.foreign.pretrained import load_tokenizer
from tropism.foreign.reward_facts import RewardFacts
from tropism.foreign.trust import refuse_trust
from tropism.foreign.view import ADAPTER_CONFIG, CONFIG, adapter_view, model_view
from tropism.generation import TextPolicy
from tropism.models.loading import LoadedModel, ModelConfig, load_model
from tropism.models.lora import load_adapter, saved_adapter
from tropism.models.modules import base_model
from tropism.models.policy import Policy
from tropism.models.reward_files import facts_of_source
from tropism.models.reward_model import RewardModel
from tropism.recipe_identity import weights_fingerprint
from tropism.recipe_model import conditioner_of, policy_of, reward_model_of
from tropism.safe_yaml import read_yaml
from tropism.targets.conditioner import Conditioner
from tropism.text_reward_model import TextRewardModel
from tropism.training.checkpoint import Checkpoint, list_checkpoints, newest_complete, read_checkpoint, read_newest
from tropism.training.state import load_trainable_state

logger = logging.getLogger("tropism")

RECIPE = "recipe.yaml"
DTYPES: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16", "float16")
_KEPT = ("model", "algorithm", "reward", "sampling", "lora", "train_layers", "seed", "normalise")
"""Fields of a recipe without which its model cannot be built again."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is exported, and what is known of where it came from."""

    model: TextPolicy | TextRewardModel
    name: str = ""
    """What it was given as; empty of a model in memory."""
    run: Path | None = None
    """The run folder, where it came out of one."""
    step: int | None = None
    """The step of the run that its weights are of."""
    checkpoint: str | None = None
    """Name of the checkpoint that was taken; None of a finished run's model."""


def load_trained(
    source: str, *, step: int | None = None, best: bool = False, base: Any = None, device: str = "cpu"
) -> Trained:
    """A model in the precision that it was trained or saved in, so that nothing is rounded on the way.

    Args:
        source: a run folder, or anything that ``load_model`` takes by name.
        step: of a run: the checkpoint after this step, in place of its last model.
        best: of a run: the weights of its best evaluation.
        base: what a checkpoint or an adapter stands on, where it is no longer where recipe or adapter say; what
            ``load_model`` takes.
        device: where it is loaded.

    Raises:
        ConfigError: no such run, step or folder, or a run that has not finished.
        ModelError: what is there is damaged, or does not belong together.
    """
    if step is not None and best:
        raise ConfigError("--step and --best both name a checkpoint; give one of them")
    folder = Path(source).expanduser()
    if (folder / RECIPE).is_file():
        if step is not None or best:
            return _of_checkpoint(folder, step, base, device)
        _refuse_base(base)
        _check_finished(folder)
        return Trained(model=_load(str(folder / "model"), device), name=source, run=folder, step=_step_of_model(folder))
    if step is not None or best:
        raise ConfigError(f"{source} is no run folder (it has no {RECIPE}), so it has no checkpoints; leave "
                          f"{'--best' if best else '--step'} out")  # fmt: skip
    _check_folder(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return Trained(model=_load_adapter(folder, base, device), name=source)
    _refuse_base(base)
    return Trained(model=_load(source, device), name=source)


def _refuse_base(base: Any) -> None:
    if base is not None:
        raise ConfigError("--base is for checkpoints and adapters, which stand on one; leave it out of a whole model")


def _check_folder(folder: Path) -> None:
    """Tell folders of a run that hold no whole model, and any other folder, from models."""
    if not folder.is_dir() or any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        return
    for run, option in ((folder.parent, "--best"), (folder.parent.parent, "--step N")):
        if (run / RECIPE).is_file():
            raise ConfigError(
                f"{folder} is a part of the run {run}; export it by: tropism export {run} {option} --out DIR"
            )
    raise ConfigError(f"{folder} is neither a run (it has no {RECIPE}) nor a model folder (it has no {CONFIG})")


def _load(name: str, device: str) -> TextPolicy | TextRewardModel:
    """A whole model: a policy, or a reward model."""
    settings = Path(name).expanduser() / CONFIG
    saved: Any = None
    if settings.is_file():
        content = read_object(settings)
        saved = content.get("dtype", content.get("torch_dtype"))
    fields = {"device": device, "dtype": saved if saved in DTYPES else "auto"}
    if facts_of_source(name) is not None:
        return TextRewardModel.load(name, **fields)
    return TextPolicy.load(name, **fields)


def _load_adapter(folder: Path, base: Any, device: str) -> TextPolicy:
    """A LoRA adapter on the model that it names, or on another place of the same."""
    with adapter_view(folder) as view:
        adapter = saved_adapter(view)
        named = str(adapter.base_model_name_or_path)
        try:
            below = load_model(_on(named if base is None else base, device))
        except ModelError as error:
            raise ModelError(
                f"the adapter {folder} stands on {named if base is None else base}, which cannot be loaded: {error}\n"
                "Give the model that it was trained on with --base MODEL"
            ) from error
        if isinstance(below.model, PeftModel):
            raise ModelError(f"the base model of the adapter {folder} is an adapter itself; merge that one first")
        model = load_adapter(below.model, adapter, view)
    tokenizer = below.tokenizer
    if (folder / "tokenizer_config.json").is_file():
        with model_view(str(folder), revision=None, weights=False) as view:
            tokenizer = load_tokenizer(view, below.model.config, str(folder))
    loaded = replace(below, model=model, tokenizer=tokenizer, source=str(folder), conditioning=None, q_heads=None)
    return TextPolicy(Policy(model), loaded)


def _on(source: Any, device: str) -> Any:
    return ModelConfig(name=str(source), device=device) if isinstance(source, str | Path) else source


# Runs -----------------------------------------------------------------------------------------------------------------


def _check_finished(run: Path) -> None:
    """Whether what lies in model/ is what the run has come to.

    Raises:
        ConfigError: it is not; says what can be exported.
    """
    ways = _checkpoints_there(run)
    if not (run / "model" / CONFIG).is_file():
        raise ConfigError(
            f"the run {run} has not finished, so it has no model yet; finish it with `tropism train --resume {run}`"
            f"{ways}"
        )
    exported = _environment(run).get("exported")
    newest, _ = newest_complete(run / "checkpoints", hashes=False)
    if newest is None or not isinstance(exported, Mapping):
        return
    written = (exported.get("step"), exported.get("update"))
    if (found := _numbers(newest)) != written and found > written:
        raise ConfigError(
            f"the run {run} went on after its model was written: that is of step {written[0]}, and the newest "
            f"checkpoint of step {found[0]}. Finish it with `tropism train --resume {run}`, take the older one by "
            f"its own folder, {run / 'model'}{ways}"
        )


def _checkpoints_there(run: Path) -> str:
    """The end of a sentence about what else can be exported."""
    steps = sorted({_numbers(path)[0] for path in list_checkpoints(run / "checkpoints")})
    ways = [f"--step {step}" for step in steps] + ["--best"] * (run / "best" / "state.json").is_file()
    return f", or export a checkpoint: {', '.join(ways)}" if ways else ""


def _numbers(checkpoint: Path) -> tuple[int, int]:
    """Steps and updates, from the name of a checkpoint."""
    words = checkpoint.name.removeprefix(".replaced-").split("-")
    return int(words[1]), int(words[3])


def _environment(run: Path) -> Mapping[str, Any]:
    try:
        content = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _step_of_model(run: Path) -> int | None:
    """The step that the weights in model/ are of: the best one, where the run was told to end with it."""
    exported = _environment(run).get("exported")
    best = RunData.read(run).best_step
    return best or (exported.get("step") if isinstance(exported, Mapping) else None)


def _of_checkpoint(run: Path, step: int | None, base: Any, device: str) -> Trained:
    """A model as a checkpoint has it: what the recipe starts from, with the trained weights in their places."""
    path = _checkpoint_of(run, step)
    saved = read_checkpoint(path, parts=("policy",))
    # best/ holds weights alone; the fingerprints and scales of a run are in each of its checkpoints.
    books = saved if step is not None else read_newest(run / "checkpoints")[0]
    recipe = _recipe_of(run, base, device)
    after = int(saved.state["counts"]["steps"] if step is not None else saved.state["step"])
    name = path.name.removeprefix(".replaced-")
    trained: TextPolicy | TextRewardModel
    if isinstance(recipe.algorithm, RewardModeling):
        trained = _reward_model(recipe, recipe.algorithm, run, saved, books)
    else:
        trained = _policy(recipe, run, saved, books)
    return Trained(model=trained, name=str(run), run=run, step=after, checkpoint=name)


def _checkpoint_of(run: Path, step: int | None) -> Path:
    if step is None:
        if (run / "best").is_dir():
            return run / "best"
        raise ConfigError(
            f"the run {run} has no best/: no evaluation has found one after step 0 (by trainer.checkpoints.best_metric)"
            f"{_checkpoints_there(run)}"
        )
    found = [path for path in list_checkpoints(run / "checkpoints") if _numbers(path)[0] == step]
    if not found:
        there = _checkpoints_there(run) or "; it has none at all"
        raise ConfigError(f"the run {run} has no checkpoint after step {step}{there}")
    return found[0]  # the one at the end of the step, where there are later ones in the middle of the next


def _recipe_of(run: Path, base: Any, device: str) -> Recipe:
    """As much of a run's recipe as its model needs."""
    mapping = read_yaml(run / RECIPE)
    refuse_trust(mapping, str(run / RECIPE))
    model = mapping.get("model")
    fields = dict(model) if isinstance(model, Mapping) else {"name": model}
    if base is None and was_given_from_python(model):
        raise ConfigError(
            f"the run {run} was given {str(model).strip('<>')}, which its recipe.yaml cannot hold; say what it started "
            "from: --base MODEL (in Python also base=(model, tokenizer))"
        )
    if base is None or isinstance(base, str | Path):
        given: Any = {**fields, "name": str(base or fields["name"]), "device": device, "gradient_checkpointing": False}
        if str(fields["name"]).startswith("<"):
            given = {"name": str(base), "device": device}
    else:
        given = base
    values = {key: mapping[key] for key in _KEPT if mapping.get(key) is not None}
    return Recipe.from_mapping({**values, "model": given, "data": "none", "normalise": None})


def _built(recipe: Recipe, run: Path, books: Checkpoint | None, build: Any) -> Any:
    """(loaded, policy), in the precision of the run; ``auto`` depends on the machine, which may have been another."""
    model = recipe.model
    tries = [recipe]
    if isinstance(model, ModelConfig) and model.dtype == "auto":
        dtypes = DTYPES[:2] if _environment(run).get("device") in ("cpu", "mps") else DTYPES[1::-1]
        tries = [replace(recipe, model=replace(model, dtype=dtype)) for dtype in dtypes]
    expected = None if books is None else books.state["identity"]["weights"]
    for one in tries:
        try:
            loaded, policy = build(one)
        except ModelError as error:
            raise ModelError(
                f"what the run {run} started from cannot be loaded: {error}\nIf it lies elsewhere now, give it with "
                "--base MODEL"
            ) from error
        if expected is None or expected in set(_fingerprints(policy.model)):
            break
    else:
        raise ModelError(
            f"the weights of {loaded.source} are not those that the run {run} started from, so its checkpoints do not "
            "belong to them; give the model as it was before the run with --base MODEL"
        )
    if expected is None:
        logger.warning("whether %s is what the run started from cannot be told: it has no complete checkpoint", run)
    return loaded, policy


def _fingerprints(model: torch.nn.Module) -> Iterator[str]:
    """Of the frozen weights, and of all: which one a run noted depends on whether its reference is a copy."""
    parameters = list(model.named_parameters())
    yield weights_fingerprint({name: p.detach() for name, p in parameters if not p.requires_grad})
    yield weights_fingerprint({name: p.detach() for name, p in parameters})


def _policy(recipe: Recipe, run: Path, saved: Checkpoint, books: Checkpoint | None) -> TextPolicy:
    loaded: LoadedModel
    policy: Policy
    loaded, policy = _built(recipe, run, books, policy_of)
    load_trainable_state(policy, saved.tensors["policy"])
    conditioner = conditioner_of(recipe, loaded)
    if conditioner is not None:
        _take_up_scales(recipe, conditioner, run, books)
    return TextPolicy(policy, loaded, recipe.sampling, conditioner=conditioner)


def _take_up_scales(recipe: Recipe, conditioner: Conditioner, run: Path, books: Checkpoint | None) -> None:
    """What the model may be asked for, as the run knew it."""
    if books is None:
        raise ConfigError(f"the run {run} has no complete checkpoint, which the scales of its rewards would be in")
    facts = RunFacts(
        total_steps=recipe.total_steps, max_new_tokens=recipe.sampling.max_new_tokens, conditioner=conditioner
    )
    algorithm: Any = recipe.algorithm.build(facts)
    algorithm.load_state_dict(books.state["algorithm"])
    rewards = books.tensors.get("batch", {}).get("rewards")
    if not conditioner.fitted and rewards is not None:
        algorithm.take_scores([tuple(row) for row in rewards.tolist()])
    if not conditioner.fitted:
        raise ConfigError(f"the run {run} had seen no rewards yet, so there is nothing to ask its model for")


def _reward_model(
    recipe: Recipe, config: RewardModeling, run: Path, saved: Checkpoint, books: Checkpoint | None
) -> TextRewardModel:
    loaded: LoadedModel
    model: RewardModel
    loaded, model = _built(recipe, run, books, reward_model_of)
    load_trainable_state(model, saved.tensors["policy"])
    facts = RewardFacts(
        text=config.text,
        max_length=config.max_length,
        gain=model.gain.item(),
        bias=model.bias.item(),
        offset=0.0,
        normalised=None,
    )
    return TextRewardModel(model, loaded.tokenizer, facts)


def language_model_of(model: TextPolicy | TextRewardModel) -> Any:
    """The transformers model inside, without adapters' wrappers."""
    if isinstance(model, TextPolicy):
        return base_model(model.policy.model)  # type: ignore[arg-type]
    return model.model.classifier
