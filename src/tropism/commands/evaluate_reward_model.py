"""tropism evaluate RUN_OR_MODEL of a reward model: how well its scores agree with held-out judgements of people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable

from tropism.commands.console import console, printable
from tropism.commands.recipe_arguments import refuse_python_objects, run_recipe_mapping, with_overrides
from tropism.errors import ConfigError

if TYPE_CHECKING:
    from tropism.commands.evaluate import Options
    from tropism.config import Recipe
    from tropism.evaluation.comparison_files import ComparisonRecord
    from tropism.evaluation.statistics import Interval
    from tropism.judgements import Comparison, Kind
    from tropism.text_reward_model import TextRewardModel

NAME = "reward-model"


def is_of_reward_model(source: str) -> bool:
    """Whether a run folder is of the training of a reward model, or a folder holds one."""
    from tropism.foreign.reward_facts import FILE

    folder = Path(source)
    if not (folder / "recipe.yaml").is_file():
        return (folder / FILE).is_file()
    algorithm = run_recipe_mapping(folder).get("algorithm")
    return (algorithm.get("name") if isinstance(algorithm, dict) else algorithm) == NAME


def measure(options: Options, overrides: Sequence[str]) -> None:
    """Score the held-out judgements, print the numbers and write the files.

    Raises:
        ConfigError: options that mean nothing for a reward model, or nothing is held out.
    """
    from tropism.commands.quiet import quieten_libraries
    from tropism.evaluation.comparison_files import ComparisonRecord, write_comparisons
    from tropism.evaluation.comparison_numbers import measure as measured
    from tropism.evaluation.comparisons import scored_comparisons
    from tropism.models.loading import ModelConfig
    from tropism.recipe_processes import accelerator_for
    from tropism.text_reward_model import TextRewardModel
    from tropism.training.processes import Processes
    from tropism.training.scoring import TextScorer

    _refuse_options(options)
    folder = _folder(options)
    recipe = _recipe(options, overrides)
    quieten_libraries()
    fields = recipe.model if isinstance(recipe.model, ModelConfig) else ModelConfig(name=str(recipe.model))
    judge = TextRewardModel.load(options.source, device=fields.device, dtype=fields.dtype)
    kind, items = _judgements(options, recipe, judge)
    most = 2 * recipe.trainer.micro_batch_tokens
    score = TextScorer(judge.model, Processes(accelerator_for(recipe)), max_tokens=most)
    scored = scored_comparisons(items, lambda rows: judge.facts.as_trained(score(rows)))
    result = measured(scored, kind, seed=recipe.seed)
    name = Path(options.source).resolve().name
    record = ComparisonRecord(name=name, result=result, items=scored)
    out = console()
    if judge.facts.trained_gain is not None:
        out.print(
            "On the scale that it was trained on, which normalisation after training has replaced.", soft_wrap=True
        )
    show(out, record)
    written = write_comparisons(folder, record)
    out.print(f"written: {len(written)} files in {folder}", soft_wrap=True)


def _refuse_options(options: Options) -> None:
    given = {
        "--reward": options.reward is not None,
        "--steerability": options.steerability,
        "--best-of": options.best_of is not None,
        "--targets": options.targets != (),
        "--target-name": options.target_name is not None,
        "--samples-per-prompt": options.samples_per_prompt != 1,
    }
    for name, was_given in given.items():
        if was_given:
            raise ConfigError(f"{options.source} is a reward model, which writes no completions: leave out {name}")


def _folder(options: Options) -> Path:
    if options.out is None:
        source = Path(options.source)
        # Not into the model folder of a run, which is to stay a plain Hugging Face folder.
        run = source.parent if (source.parent / "recipe.yaml").is_file() and source.name == "model" else source
        return run / "choices"
    if options.out.suffix in (".parquet", ".json", ".csv") or options.out.is_file():
        raise ConfigError(f"--out {options.out}: of a reward model, name a folder to write into")
    return options.out


def _recipe(options: Options, overrides: Sequence[str]) -> Recipe:
    """The recipe of the run, or as much of one as reading judgements needs; ``data`` is what to evaluate on."""
    from tropism.commands.evaluate import with_path
    from tropism.config import Recipe

    folder = Path(options.source)
    if (folder / "recipe.yaml").is_file():
        mapping = run_recipe_mapping(folder)
    else:
        if options.data is None:
            raise ConfigError(f"{folder} is no run folder, so --data must name judgements to compare it with")
        mapping = {"model": options.source, "algorithm": NAME, "data": options.data}
    if options.data is not None:
        mapping["data"], mapping["eval_data"] = with_path(mapping["data"], options.data), None
    mapping = with_overrides(mapping, overrides)
    refuse_python_objects({name: mapping.get(name) for name in ("data", "eval_data")}, folder)
    return Recipe.from_mapping(mapping)


def _judgements(options: Options, recipe: Recipe, judge: TextRewardModel) -> tuple[Kind, Sequence[Comparison]]:
    """The first ``--n`` of the judgements that the run held out, or of ``--data``."""
    from tropism.algorithms.reward_modeling import RewardModeling
    from tropism.data.comparisons import read_comparisons
    from tropism.recipe_comparisons import comparisons_of
    from tropism.recipe_data import source_and_settings

    config = recipe.algorithm
    assert isinstance(config, RewardModeling)
    if options.data is None:
        found = comparisons_of(recipe, judge.inputs)
        if not found.held_out:
            raise ConfigError(f"the run {options.source} held out no judgements; give some: --data FILE")
        return found.kind, found.held_out[: options.n]
    source, settings = source_and_settings(recipe.data)
    kind, items = read_comparisons(
        source, judge.inputs, settings, varied_k=config.varied_k, annotator_weights=config.annotator_weights
    )
    return kind, items[: options.n]


# Printing -------------------------------------------------------------------------------------------------------------


def show(out: Console, record: ComparisonRecord) -> None:
    """The table of numbers, and what they say."""
    from tropism.evaluation.comparison_verdict import counts_text, number_rows, verdict

    table = RichTable(title=counts_text(record.result), title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column(printable(record.name), justify="right", overflow="fold")
    table.add_column("95 %", justify="right", no_wrap=True)
    for label, value in number_rows(record.result):
        table.add_row(label, _number(value.mean), _bounds(value))
    out.print(table)
    for line in verdict(record.result):
        out.print(printable(line), soft_wrap=True)
    out.print()


def _bounds(value: Interval) -> str:
    low, high = f"{value.low:.3f}", f"{value.high:.3f}"
    return f"{low} to {high}" if value.known and low != high else ""


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
