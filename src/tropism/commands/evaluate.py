"""tropism evaluate RUN_OR_MODEL"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from tropism.commands.console import console, tell
from tropism.commands.evaluate_reward_model import is_of_reward_model
from tropism.commands.evaluate_reward_model import measure as measure_reward_model
from tropism.commands.recipe_arguments import (
    refuse_python_objects,
    run_recipe_mapping,
    was_given_from_python,
    with_overrides,
)
from tropism.errors import ConfigError, ModelError
from tropism.schema import apply_overrides
from tropism.storage import writing

if TYPE_CHECKING:
    from tropism.config import Recipe
    from tropism.evaluation.heldout import RewardEvaluation
    from tropism.gold_reward import Measurements
    from tropism.models.loading import LoadedModel
    from tropism.models.policy import Policy
    from tropism.rewards import RewardHarness
    from tropism.rollouts.protocol import Sampler
    from tropism.types import Prompt

Table = dict[str, list[Any]]
_NO_JSON = (float("inf"), -float("inf"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Score held-out completions. Of a run, its recipe says how, and the model it started from is scored beside it.
    The scores of a reward model are compared with held-out judgements of people.

    Fields of the recipe can be changed as for tropism train, for example --sampling.temperature 0.7.
    """

    source: tyro.conf.Positional[str]
    """A run folder, or a model: folder, .gguf file, hub id, or "demo"."""
    data: str | None = None
    """File or hub id with the prompts, or for a reward model with judgements; None: what the run held out."""
    reward: str | None = None
    """A registered reward, or file.py:function with --allow-code; None: the run's."""
    n: int | None = None
    """Use at most so many prompts or judgements; None: all."""
    sampling: str | None = None
    """Complete the prompts with several values of one field of the sampling, too, and print a table with a column for
    each: temperature=0.7,1.0. None: what trainer.evaluation.sampling of the run lists."""
    out: Path | None = None
    """Write every prompt, completion and reward to this .parquet or .json file; with --steerability, everything into
    this folder (None: the run's folder steerability), and of a reward model, too (None: its folder choices), and with
    --best-of (None: the run's folder best_of)."""
    best_of: str | None = None
    """The expected reward of the best of so many completions, for each of several numbers: 1,2,4,8,16."""
    steerability: bool = False
    """Of a run that was told rewards: ask for many, and measure how closely it gives what it is asked for."""
    targets: tuple[float, ...] = ()
    """With --steerability: what to ask for, in the reward's own units; none: 11 targets from the 5th to the 95th
    percentile of the training rewards, and one beyond the training range on either side."""
    target_name: str | None = None
    """With --steerability: which reward to ask for, where the model knows several; the others are left open."""
    samples_per_prompt: int = 1
    """With --steerability: completions of every prompt at every target. With --best-of: of every prompt (1: as many as
    the largest number takes)."""
    allow_code: bool = False
    """Let the reward name code: module:function or file.py:function."""


def run(arguments: Sequence[str]) -> None:
    """Evaluate and print the table."""
    options, overrides = tyro.cli(
        Options,
        args=arguments,
        prog="tropism evaluate",
        description=Options.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
        return_unknown_args=True,
    )
    if options.n is not None and options.n < 1:
        raise ConfigError(f"--n must be at least 1, got {options.n}")
    of_reward_model = is_of_reward_model(options.source)
    if options.sampling is not None and (of_reward_model or options.steerability or options.best_of is not None):
        raise ConfigError("--sampling is for completions under the run's reward; leave it out")
    if of_reward_model:
        measure_reward_model(options, overrides)
        return
    if options.steerability:
        if options.best_of is not None:
            raise ConfigError("--best-of and --steerability measure different things; leave one of them out")
        from tropism.commands.steerability import measure

        measure(options, _recipe(options, overrides))
        return
    _refuse_options_of_steerability(options)
    if options.best_of is not None:
        from tropism.commands.best_of import measure as measure_best_of

        measure_best_of(options, _recipe(options, overrides))
        return
    if options.out is not None and options.out.suffix not in (".parquet", ".json"):
        raise ConfigError(f"--out {options.out}: name a .parquet or .json file")
    recipe = _recipe(options, overrides)
    from tropism.commands.comparison import show_parting, show_sampling, show_summary
    from tropism.commands.quiet import quieten_libraries
    from tropism.evaluation.run_folder import RunData, evaluation_in
    from tropism.evaluation.summary import summarise

    quieten_libraries()
    tables = tables_of(recipe, options)
    evaluations = [evaluation_in(step, table, name) for step, (name, table) in enumerate(tables.items())]
    names = list(tables)
    summary = summarise(RunData(folder=Path(options.source), evaluations=evaluations))
    show_summary(console(), summary, before=names[0], after=names[-1])
    show_sampling(console(), dict(zip(names, (summary.before, summary.after), strict=False)))
    if recipe.trainer.evaluation.gold is not None and (Path(options.source) / "evaluations").is_dir():
        show_parting(console(), Path(options.source))
    if options.out is not None:
        write_tables(options.out, tables)
        console().print(f"written: {options.out}", soft_wrap=True)


def _refuse_options_of_steerability(options: Options) -> None:
    given = {
        "--targets": options.targets != (),
        "--target-name": options.target_name is not None,
        "--samples-per-prompt": options.samples_per_prompt != 1 and options.best_of is None,
    }
    for name, was_given in given.items():
        if was_given:
            raise ConfigError(f"{name} belongs to --steerability; add that, or leave {name} out")


def _recipe(options: Options, overrides: Sequence[str]) -> Recipe:
    """The recipe of the run, or as much of one as evaluating a model needs; ``data`` is what to evaluate on."""
    from tropism.config import Recipe

    folder = Path(options.source)
    is_run = (folder / "recipe.yaml").is_file()
    if is_run:
        mapping = run_recipe_mapping(folder)
    else:
        missing = [f"--{name}" for name in ("data", "reward") if getattr(options, name) is None]
        if missing:
            problem = "is no run folder" if folder.exists() else "is not there"
            raise ConfigError(f"{options.source} {problem}; of a model, {' and '.join(missing)} must say what to score")
        mapping = {"model": options.source, "algorithm": "grpo", "data": options.data}
    if options.reward is not None:
        mapping["reward"] = options.reward
    if options.data is not None:
        mapping["data"], mapping["eval_data"] = with_path(mapping["data"], options.data), None
    mapping = with_overrides(mapping, overrides)
    if options.steerability or options.best_of is not None:  # which sample in one way, for every target or number
        mapping = apply_overrides(mapping, ["--trainer.evaluation.sampling=[]"])
    if options.sampling is not None:
        mapping = apply_overrides(mapping, [f"--trainer.evaluation.sampling={json.dumps(_sweep(options.sampling))}"])
    refuse_python_objects({name: mapping.get(name) for name in ("data", "eval_data")}, folder)
    recipe = Recipe.from_mapping(mapping)
    if recipe.reward is None:
        raise ConfigError(f"the run {folder} has no reward; name one: --reward vader")
    return recipe


def _sweep(text: str) -> list[dict[str, Any]]:
    """``temperature=0.7,1.0`` as changes to the sampling, one for each value."""
    name, equals, values = text.partition("=")
    if not equals or not name or not all(value.strip() for value in values.split(",")):
        raise ConfigError(f"--sampling {text!r:.80}: give one field and its values, such as temperature=0.7,1.0")
    return [apply_overrides({}, [f"--{name}={value}"]) for value in values.split(",")]


def with_path(data: Any, path: str) -> Any:
    """How a run's records become prompts, with other records."""
    if not isinstance(data, dict):
        return path
    of_the_old_data = ("split", "subset", "revision", "limit", "eval_fraction")
    return {key: value for key, value in data.items() if key not in of_the_old_data} | {"path": path}


def tables_of(recipe: Recipe, options: Options, *, per_prompt: int = 1) -> dict[str, Table]:
    """One table per model: the base model first, where there is one that can be loaded.

    Args:
        per_prompt: completions of every prompt, those of one prompt together.
    """
    from tropism.generation import model_path, policy_with_slots
    from tropism.gold_reward import measurements_of
    from tropism.models.loading import ModelConfig, load_model
    from tropism.rewards import RewardHarness

    assert recipe.reward is not None
    harness = RewardHarness(recipe.reward, allow_code=options.allow_code)
    metrics = measurements_of(recipe.metrics, recipe.trainer.evaluation.gold, allow_code=options.allow_code)
    path = model_path(options.source)
    is_run = path != options.source
    fields = recipe.model if isinstance(recipe.model, ModelConfig) else ModelConfig(name=str(recipe.model))
    trained = load_model(fields.of_export(path) if is_run else fields)
    base = base_model(recipe) if is_run else None
    policy, conditioner = policy_with_slots(trained)
    taken = 0 if conditioner is None else conditioner.width
    scored = prompts_to_score(recipe, options, trained.tokenizer, limit=policy.context_length, taken=taken)
    prompts = [prompt for prompt in scored for _ in range(per_prompt)]
    tables = {}
    if base is not None:
        tables["base"] = _score(base, base, recipe, prompts, harness, metrics)
    tables["trained" if is_run else "model"] = _score(trained, base, recipe, prompts, harness, metrics)
    return tables


def prompts_to_score(
    recipe: Recipe, options: Options, tokenizer: Any, *, limit: int | None, taken: int = 0
) -> Sequence[Prompt]:
    """The first ``--n`` held-out prompts of the run, or of ``--data``.

    Args:
        limit: tokens of the context. taken: those of them that stand before every prompt.
    """
    from tropism.recipe_data import prompts_of

    training, held_out = prompts_of(recipe, tokenizer, context_length=limit, taken=taken)
    if not held_out and options.data is None:
        raise ConfigError(f"the run {options.source} held out no prompts; give some: --data FILE")
    return (held_out or training)[: options.n]


def base_model(recipe: Recipe) -> LoadedModel | None:
    """The model that a run started from, or None, said aloud, where it cannot be had any more."""
    from tropism.models.loading import ModelConfig, load_model

    fields = recipe.model if isinstance(recipe.model, ModelConfig) else ModelConfig(name=str(recipe.model))
    if was_given_from_python(recipe.model):
        reason = "it was given from Python"
    else:
        try:
            return load_model(fields)
        except ModelError as error:
            reason = str(error)
    tell(f"the model that the run started from is left out: {reason}", label="note: ", style="yellow")
    return None


def _score(
    loaded: LoadedModel,
    base: LoadedModel | None,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    harness: RewardHarness,
    metrics: Measurements | None,
) -> Table:
    from tropism.generation import policy_with_slots
    from tropism.rollouts.engine import EmbeddedSampler

    sampler = EmbeddedSampler(loaded.tokenizer, loaded.tokens.eos_ids)
    policy, conditioner = policy_with_slots(loaded)
    if loaded is base and policy.q_heads is None:
        recipe = _without_beta(recipe)
    condition = None
    if conditioner is not None:
        condition = partial(conditioner.for_evaluation, target=recipe.algorithm.evaluated_at)
    evaluation = reward_evaluation(
        policy, loaded.tokenizer, sampler, base, recipe, prompts, harness, condition, metrics
    )
    return evaluation(0)[1]


def _without_beta(recipe: Recipe) -> Recipe:
    """The recipe for a model that does not value its tokens, as the one that ILQL started from."""
    others = [change for change in recipe.trainer.evaluation.sampling if "beta" not in change]
    evaluation = replace(recipe.trainer.evaluation, sampling=tuple(others))
    return replace(
        recipe,
        sampling=replace(recipe.sampling, beta=0.0),
        trainer=replace(recipe.trainer, evaluation=evaluation),
    )


def reward_evaluation(
    policy: Policy,
    tokenizer: Any,
    sampler: Sampler,
    base: LoadedModel | None,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    harness: RewardHarness,
    condition: Callable[[Sequence[Prompt]], Sequence[Prompt]] | None = None,
    metrics: Measurements | None = None,
) -> RewardEvaluation:
    """What samples completions of the prompts as the recipe says, and scores them.

    Args:
        base: the model that KL is measured to.
        condition: as in ``RewardEvaluation``.
    """
    from tropism.models.policy import Policy
    from tropism.recipe_evaluation import evaluation_of
    from tropism.recipe_processes import accelerator_for
    from tropism.rollouts.transcribe import Transcriber
    from tropism.training.processes import Processes
    from tropism.training.rollout_maker import RolloutMaker
    from tropism.training.scoring import ModelScorer

    processes = Processes(accelerator_for(recipe))
    reference = None
    if base is not None:
        start = Policy(base.model)
        most = 2 * recipe.trainer.micro_batch_tokens
        reference = ModelScorer(
            lambda: nullcontext(start), processes, max_tokens=most, max_rows=recipe.trainer.micro_batch_size
        )
    maker = RolloutMaker(
        sampler=sampler,
        sampling=recipe.sampling,
        harness=harness,
        transcribe=Transcriber(tokenizer, recipe.sampling.stop),
        policy=policy,
        processes=processes,
        seed=recipe.seed,
    )
    return evaluation_of(
        recipe,
        prompts,
        maker=maker,
        tokenizer=tokenizer,
        reference=reference,
        condition=condition,
        measures=metrics,
    )


def write_tables(path: Path, tables: dict[str, Table]) -> None:
    """All rows of all tables, with the name of their model, as .parquet or .json."""
    rows: Table = {"model": [name for name, table in tables.items() for _ in table["prompt"]]}
    for column in dict.fromkeys(column for table in tables.values() for column in table):
        rows[column] = [
            value for table in tables.values() for value in table.get(column, [None] * len(table["prompt"]))
        ]
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with writing(path):
            pq.write_table(pa.table(rows), path)
    else:
        lines = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        clean = [{k: None if v in _NO_JSON or v != v else v for k, v in line.items()} for line in lines]
        with writing(path):
            path.write_text(json.dumps(clean, ensure_ascii=False, indent=1), encoding="utf-8")
