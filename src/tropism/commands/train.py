"""tropism train RECIPE.yaml --dotted.key value ..."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.commands.console import console, tell
from tropism.commands.recipe_arguments import (
    Words,
    refuse_python_objects,
    run_recipe_mapping,
    take_apart,
    with_overrides,
)
from tropism.errors import ConfigError
from tropism.safe_yaml import read_yaml
from tropism.training.interrupt import Interrupted

if TYPE_CHECKING:
    from rich.table import Table

    from tropism.config import Recipe
    from tropism.training.memory_facts import MemoryReport

FLAGS = {
    "-h": "help",
    "--help": "help",
    "--resume": "resume",
    "--allow-code": "allow_code",
    "--dry-run": "dry_run",
    "--profile": "profile",
}

USAGE = """\
usage: tropism train RECIPE.yaml [--dotted.key VALUE ...] [--allow-code] [--dry-run] [--profile]
       tropism train --resume RUN_FOLDER [--dotted.key VALUE ...]

  --resume       go on with a run from its newest complete checkpoint
  --allow-code   let the recipe name reward functions: module:function or file.py:function
  --dry-run      print the resolved recipe and check everything (data, model, reward), but do not train
  --profile      record where the second step goes: profile/table.txt and profile/trace.json.gz in the run folder
  --debug        show tracebacks and more messages

The recipe may be left out if the keys say everything. `tropism train RECIPE.yaml --help` shows that recipe's values."""


def run(arguments: Sequence[str]) -> None:
    """Train, resume, check or explain."""
    words = take_apart(arguments, FLAGS)
    if "help" in words.flags or not arguments:
        _help(words)
        return
    resume = "resume" in words.flags
    mapping = _mapping(words, resume=resume)
    profile = "profile" in words.flags
    if profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own messages; read when torch is imported
    from tropism.build import run_recipe
    from tropism.commands.quiet import quieten_libraries
    from tropism.config import Recipe, free_run, resume_command
    from tropism.reward_recipes import is_begun, is_trained, reward_recipes, with_placeholders, with_trained_rewards

    quieten_libraries()
    recipe = Recipe.from_mapping(mapping)
    if resume and recipe.run is None:
        raise ConfigError("--resume needs to know the run: tropism train --resume RUN_FOLDER")
    allow_code = "allow_code" in words.flags
    named = recipe if recipe.run is not None else replace(recipe, run=str(free_run(recipe.algorithm.name)))
    if "dry_run" in words.flags:
        for first in reward_recipes(named).values():
            if not is_trained(first):
                console().print(f"to be trained first, in {first.run}:", soft_wrap=True)
                _dry_run(first, first, resume=is_begun(first), allow_code=allow_code, profile=False)
        _dry_run(with_placeholders(named), recipe, resume=resume, allow_code=allow_code, profile=profile)
        return
    named = with_trained_rewards(named, lambda first, goes_on: _train_first(first, goes_on, allow_code=allow_code))
    folder = Path(str(named.run))
    with_interrupts_told(
        lambda: run_recipe(named, resume=resume, allow_code=allow_code, profile=profile),
        folder,
        resume_command(folder, allow_code=allow_code),
    )
    _show_end(named)


def _train_first(recipe: Recipe, resume: bool, *, allow_code: bool) -> None:
    """Train a reward model that a recipe names by its own."""
    from tropism.build import run_recipe

    with_interrupts_told(
        lambda: run_recipe(recipe, resume=resume, allow_code=allow_code),
        Path(str(recipe.run)),
        "the same command once more",
    )


def _dry_run(recipe: Recipe, shown: Recipe, *, resume: bool, allow_code: bool, profile: bool) -> None:
    """Build everything and check it.

    Args:
        shown: the recipe as it was given.
    """
    from tropism.build import assembly_for

    assembled = assembly_for(recipe)(recipe, resume=resume, allow_code=allow_code)
    if profile:
        assembled.profile_a_step()
    assembled.check()
    if assembled.processes.is_main:
        _show_dry_run(assembled, shown)


def with_interrupts_told(train: Any, folder: Path, command: str) -> Any:
    """Call ``train``; after a signal say what was saved and which command goes on, and let the interruption pass."""
    try:
        return train()
    except Interrupted:
        from tropism.training.checkpoint import newest_complete

        newest, _ = newest_complete(folder / "checkpoints", hashes=False)
        if newest is None:
            tell(f"nothing is saved in {folder}", label="interrupted: ", style="bold yellow")
        else:
            tell(
                f"saved {newest}; go on with: {command}",
                label="interrupted: ",
                style="bold yellow",
            )
        raise


def _mapping(words: Words, *, resume: bool) -> dict[str, Any]:
    """The plain values of the recipe."""
    if len(words.sources) > 1:
        raise ConfigError(f"expected one recipe, got {len(words.sources)}: {', '.join(words.sources)}")
    if not words.sources:
        return with_overrides({}, words.overrides)
    source = Path(words.sources[0])
    if not source.is_dir():
        return with_overrides(read_yaml(source), words.overrides)
    if not resume:
        raise ConfigError(f"{source} is a folder; give a recipe file, or go on with a run: --resume {source}")
    mapping = with_overrides(run_recipe_mapping(source), words.overrides)
    refuse_python_objects(mapping, source)
    return mapping


def _help(words: Words) -> None:
    from tropism.commands.recipe_help import show_recipe_help

    out = console()
    out.print(USAGE)
    if not words.sources and not words.overrides:
        show_recipe_help(out, None)
        return
    from tropism.config import Recipe

    mapping = _mapping(words, resume="resume" in words.flags)
    show_recipe_help(out, Recipe.from_mapping(mapping))


TEXTS = {
    "demonstrations": "demonstrations",
    "scored": "texts",
    "comparisons": "judgements",
    "pairs": "pairs",
    "opinions": "opinions",
    "episodes": "episodes",
}
"""What the items are called of methods that do not sample, by what they read."""


def _show_dry_run(assembled: Any, recipe: Recipe) -> None:
    out = console()
    resumption = assembled.resumption
    for line in [] if resumption is None else [resumption.end] if resumption.finished else resumption.lines:
        out.print(line, soft_wrap=True)
    out.print(recipe.to_yaml(), soft_wrap=True)
    trained = sum(p.numel() for p in assembled.policy.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in assembled.policy.parameters())
    facts = [f"run folder: {assembled.folder.path}"]
    if recipe.algorithm.reads == "prompts":
        size = recipe.algorithm.step_size(recipe.prompts_per_step, len(assembled.prompts))
        tokens = size.completions * recipe.sampling.max_new_tokens
        when = "per step" if size.every == 1 else f"in every {size.every} steps"
        when = when if recipe.algorithm.on_policy else "before the first step"
        facts += [
            f"prompts: {len(assembled.prompts)}",
            f"completions {when}: {size.completions}",
            f"tokens {when}: at most {tokens:,}",
        ]
    else:
        items = TEXTS[recipe.algorithm.reads]
        facts += [
            f"{items}: {len(assembled.trainer.source.stream.items)}",
            f"{items} per step: {recipe.prompts_per_step}",
        ]
    held_out = [len(evaluation) for evaluation in assembled.run.evaluations]
    facts += [
        f"held out: {' and '.join(map(str, held_out)) or 'none'}",
        f"trained weights: {trained:,} of {weights:,}",
        f"learning rate: {assembled.trainer.learning_rate:g}",
    ]
    out.print("\n".join(facts))
    out.print(_memory_table(assembled.memory))
    finished = resumption is not None and resumption.finished
    out.print("Everything checked: " + ("nothing is left to do." if finished else "ready to train."))


def _memory_table(report: MemoryReport) -> Table:
    """What the run will need, part by part, phase by phase."""
    from rich.table import Table

    from tropism.training.memory_estimate import readable

    estimate = report.estimate
    table = Table(title="memory", title_justify="left", show_footer=True, box=None)
    machine = report.machine
    there = "unknown" if machine is None else f"{readable(machine.available)} of {readable(machine.total)}"
    table.add_column("phase", footer=f"{estimate.phase}\n")
    table.add_column("part", footer="most at any time\navailable")
    table.add_column("size", justify="right", footer=f"{readable(estimate.peak)}\n{there}")
    phases = {"always": estimate.lasting, **estimate.phases}
    for phase, parts in phases.items():
        shown = [(part, size) for part, size in parts.items() if size]
        for index, (part, size) in enumerate(shown):
            table.add_row(phase if index == 0 else "", part, readable(size))
    return table


def _show_end(recipe: Recipe) -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    folder = Path(str(recipe.run))
    from tropism.commands.comparison import show_parting

    out = console()
    out.print(f"model:  {folder / 'model'}\nreport: {folder / 'report.html'}", soft_wrap=True)
    if recipe.trainer.evaluation.gold is not None:
        show_parting(out, folder)
    next_command = f'generate {folder} "..."'
    if recipe.algorithm.reads == "comparisons":
        next_command = f"evaluate {folder}" if _holds_out(recipe) else f"evaluate {folder} --data FILE"
    out.print(f"next:   tropism {next_command}", soft_wrap=True)


def _holds_out(recipe: Recipe) -> bool:
    """Whether some of the data is kept from training."""
    from tropism.data.config import DataConfig

    return recipe.eval_data is not None or (isinstance(recipe.data, DataConfig) and recipe.data.eval_fraction > 0)
