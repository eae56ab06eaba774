"""tropism compare RECIPE.yaml --methods sft,ppo,grpo --completions 8000"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.commands.console import console, printable, tell
from tropism.commands.recipe_arguments import own_options, take_apart, with_overrides
from tropism.errors import ConfigError
from tropism.safe_yaml import read_yaml

if TYPE_CHECKING:
    from tropism.comparing.course import Course

FLAGS = {"-h": "help", "--help": "help", "--allow-code": "allow_code", "--dry-run": "dry_run"}

USAGE = """\
usage: tropism compare RECIPE.yaml [--methods NAMES] [--seeds N] (--completions N | --seconds S) [--processes K]
                       [--out FOLDER] [--dotted.key VALUE ...] [--allow-code] [--dry-run]
       tropism compare --show FOLDER [--against METHOD]

Train several methods with the same model, prompts, reward and budget, and put what each bought into one table.

  --methods NAMES          sft,ppo,grpo,rloo,ilql,rft,conditioned,quark,dpo,kto,best-of-n [those of the recipe]
  --seeds N                train each with so many seeds, or with those listed: 0,1,2 [3]
  --completions N          the budget: completions that a method may sample and score in training
  --seconds S              the budget in seconds of training, instead
  --samples-per-prompt K   completions of each held-out prompt that are measured [4]
  --best-of N              n of best-of-n [16]
  --against METHOD         test the others against this one [sft]
  --processes K            work on so many cells at once [1]
  --out FOLDER             where everything is written [runs/compare-<name of the recipe's file>]
  --show FOLDER            print the table of a comparison and write its page again; nothing is trained
  --allow-code             let the recipe name reward functions: module:function or file.py:function
  --dry-run                check everything and show what would be done
  --debug                  show tracebacks and more messages

Any field of the recipe can be changed by --dotted.key VALUE, as for tropism train; the section compare of the recipe
holds the same settings, and each method's own. The same command goes on with a comparison that was interrupted; methods
and seeds may be added. docs/compare.md says what every method gets; recipes/compare has an example."""

NUMBERS = {"completions": int, "seconds": float, "samples_per_prompt": int, "best_of": int, "processes": int}
OWN = ("methods", "seeds", "against", "out", "show", *NUMBERS)


def run(arguments: Sequence[str]) -> None:
    """Compare, go on, or show what is there."""
    words = take_apart(arguments, FLAGS)
    if "help" in words.flags or not arguments:
        console().print(USAGE)
        return
    own, overrides = own_options(words.overrides, OWN)
    if "show" in own:
        _show(Path(own["show"]), own.get("against"), others=[*words.sources, *overrides])
        return
    if len(words.sources) != 1:
        raise ConfigError(
            f"expected one recipe, got {len(words.sources)} ({', '.join(words.sources) or 'nothing'}); "
            "tropism compare --help says more"
        )
    file = Path(words.sources[0])
    mapping = with_overrides(read_yaml(file), overrides)
    from tropism.commands.quiet import quieten_libraries
    from tropism.comparing.api import folder_named
    from tropism.comparing.config import SECTION, compare_config
    from tropism.comparing.course import Course

    quieten_libraries()
    section = mapping.pop(SECTION, None)
    numbers = {name: number_option(own, name) for name in NUMBERS}
    processes = numbers.pop("processes") or 1
    texts = {name: own.get(name) for name in ("methods", "seeds", "against")}
    config = compare_config(section, **texts, **numbers)
    folder = Path(own["out"]) if "out" in own else folder_named(file.stem)
    out = console()
    course = Course(
        config,
        mapping,
        folder,
        processes=processes,
        allow_code="allow_code" in words.flags,
        say=lambda line: out.print(printable(line), soft_wrap=True),
    )
    if "dry_run" in words.flags:
        _show_plan(course)
        return
    _compare(course)


def _compare(course: Course) -> None:
    """Do what is left and show the table; some cells failed: the exit code is 1."""
    for note in course.notes:
        tell(note, label="warning: ", style="yellow")
    try:
        failed = course.run()
    except KeyboardInterrupt:
        tell("what is done is kept; the same command goes on", label="interrupted: ")
        raise
    _print(course.folder)
    if failed:
        names = ", ".join(failed)
        tell(f"{len(failed)} cells failed: {names}. The same command tries them again", label="error: ")
        raise SystemExit(1)


def _show(folder: Path, against: str | None, *, others: Sequence[str]) -> None:
    if others:
        raise ConfigError(f"--show reads what is there; leave {others[0]} out")
    _print(folder, against)


def _print(folder: Path, against: str | None = None) -> None:
    """The table, and where everything is."""
    from tropism.comparing.results import Comparison

    comparison = Comparison.read(folder, against=against)
    written = comparison.write()
    out = console()
    for line in comparison.text().splitlines():
        out.print(printable(line), soft_wrap=True)
    if written:
        out.print(f"report: {written[-1]}", soft_wrap=True)


def number_option(own: dict[str, str], name: str) -> Any:
    """The number of an option, None where it was not given."""
    if name not in own:
        return None
    kind = NUMBERS[name]
    try:
        return kind(own[name].replace(",", "").replace("_", ""))
    except ValueError as error:
        whole = "a whole number" if kind is int else "a number"
        raise ConfigError(f"--{name.replace('_', '-')}: expected {whole}, not {own[name]!r:.60}") from error


def _show_plan(course: Course) -> None:
    """What each method would do."""
    from rich.table import Table

    config, prompts = course.config, course.prompts
    budget = f"{config.completions:,} completions" if config.completions is not None else f"{config.seconds:g} seconds"
    seeds = ", ".join(map(str, config.seeds))
    table = Table(box=None, title=f"{budget} for each method, seeds {seeds}", title_justify="left")
    for column in ("method", "learns from", "completions", "steps", "kept to choose a target"):
        table.add_column(column)
    for plan in course.plans:
        spend = course.spending.get(plan.method)
        source = "nothing" if plan.recipe is None else "its own samples" if plan.form is None else f"pool ({plan.form})"
        epochs = "" if plan.form is None else f"{plan.epochs} passes"
        steps = epochs or ("" if spend is None or spend.steps is None else str(spend.steps))
        kept = "" if spend is None or not spend.choices else f"{spend.choices} x {spend.per_choice}"
        table.add_row(plan.method, source, "" if spend is None else f"{spend.completions:,}", steps, kept)
    out = console()
    out.print(table)
    for note in course.notes:
        out.print(note, soft_wrap=True)
    about = f"{len(prompts.training)} training and {len(prompts.held_out)} held-out prompts"
    out.print(f"{about}; {config.samples_per_prompt} samples of each of these. Nothing is written.", soft_wrap=True)
