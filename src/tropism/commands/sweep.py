"""tropism sweep RECIPE.yaml SWEEP.yaml --dotted.key value ..."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tropism.commands.console import console, printable, tell
from tropism.commands.recipe_arguments import own_options, take_apart, with_overrides
from tropism.errors import ConfigError
from tropism.safe_yaml import read_yaml

if TYPE_CHECKING:
    from tropism.sweeps.config import SweepConfig
    from tropism.sweeps.outcome import Row

FLAGS = {"-h": "help", "--help": "help", "--allow-code": "allow_code", "--dry-run": "dry_run"}

USAGE = """\
usage: tropism sweep RECIPE.yaml SWEEP.yaml [--trials N] [--out FOLDER] [--dotted.key VALUE ...] [--allow-code]

Train a recipe with many settings, chosen by the sweep's file, and say which was best.

  --trials N     settings to try in all, instead of what the sweep's file says
  --out FOLDER   where everything is written [runs/sweep-<name of the sweep's file>]
  --allow-code   let the recipe name reward functions: module:function or file.py:function
  --dry-run      check both files and show what would be tried
  --debug        show tracebacks and more messages

Any field of the recipe can be changed by --dotted.key VALUE, as for tropism train. The same command goes on with a
sweep that was interrupted. docs/sweeps.md says what a sweep's file holds; recipes/sweeps has examples."""

OWN = ("trials", "out")
MOST_ROWS = 30
"""Of the table that is printed; table.csv holds all."""


def run(arguments: Sequence[str]) -> None:
    """Sweep, or go on."""
    words = take_apart(arguments, FLAGS)
    if "help" in words.flags or not arguments:
        console().print(USAGE)
        return
    own, overrides = own_options(words.overrides, OWN)
    if len(words.sources) != 2:
        raise ConfigError(
            f"expected a recipe and a sweep's file, got {len(words.sources)} "
            f"({', '.join(words.sources) or 'nothing'}); tropism sweep --help says more"
        )
    recipe, file = map(Path, words.sources)
    base = with_overrides(read_yaml(recipe), overrides)
    if find_spec("optuna") is None:
        raise ConfigError('tropism sweep needs Optuna: pip install "tropism[sweep]"')
    from tropism.commands.quiet import quieten_libraries
    from tropism.sweeps.space import check_space

    quieten_libraries()
    config = _config(file, own.get("trials"))
    _refuse_swept(overrides, config)
    allow_code = "allow_code" in words.flags
    check_space(base, config, where=str(file), allow_code=allow_code)
    folder = Path(own["out"]) if "out" in own else Path("runs") / f"sweep-{file.stem}"
    if "dry_run" in words.flags:
        _show_plan(config, folder)
        return
    _sweep(config, base, folder, _options(base, allow_code=allow_code))


def _sweep(config: SweepConfig, base: dict[str, Any], folder: Path, options: tuple[str, ...]) -> None:
    from tropism.sweeps.sweep import Sweep

    out = console()
    sweep = Sweep(config, base, folder, options=options, say=lambda line: out.print(printable(line), soft_wrap=True))
    before = _complete(folder)
    try:
        rows = sweep.run()
    except KeyboardInterrupt:
        done = _complete(folder)
        tell(f"{done} of {config.total} trials are done; the same command goes on", label="interrupted: ")
        raise
    if before >= config.total:
        out.print(
            f"the sweep in {folder} is finished: all {before} trials are done. Raise --trials to go on with it",
            soft_wrap=True,
        )
    _show(rows, config, folder)


def _config(file: Path, trials: str | None) -> SweepConfig:
    from tropism.sweeps.config import sweep_from_mapping

    mapping = read_yaml(file)
    if trials is not None:
        if not trials.isdecimal():
            raise ConfigError(f"--trials: expected a whole number, not {trials!r:.60}")
        mapping["trials"] = int(trials)
        if isinstance(mapping.get("tune_config"), dict):
            mapping["tune_config"].pop("num_samples", None)
    return sweep_from_mapping(mapping, str(file))


def _refuse_swept(overrides: Sequence[str], config: SweepConfig) -> None:
    for word in overrides:
        key = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and key in config.parameters:
            raise ConfigError(f"--{key}: the sweep chooses this field; take it out of the command, or out of its file")


def _options(base: dict[str, Any], *, allow_code: bool) -> tuple[str, ...]:
    """What every run's ``tropism train`` is called with."""
    model = base.get("model")
    trusted = isinstance(model, dict) and bool(model.get("trust_remote_code"))
    return (
        *(["--allow-code"] if allow_code else []),
        *(["--model.trust_remote_code", "true"] if trusted else []),
    )


def _complete(folder: Path) -> int:
    """Trials of a sweep that are done, by its summary."""
    import json

    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return sum(int(summary[state]) for state in ("complete", "pruned", "failed"))
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _show_plan(config: SweepConfig, folder: Path) -> None:
    from rich.table import Table

    table = Table(box=None, title=f"{config.total} trials in {folder}", title_justify="left")
    for column in ("parameter", "strategy", "values"):
        table.add_column(column)
    for key, parameter in config.parameters.items():
        table.add_row(key, parameter.strategy, printable(", ".join(map(str, parameter.values))))
    out = console()
    out.print(table)
    seeds = f", each with {config.seeds} seeds" if config.seeds > 1 else ""
    chosen = f"chosen by {config.sampler}{seeds}; {config.mode} of {config.metric}"
    out.print(f"{chosen}. Both files are checked; nothing is written.", soft_wrap=True)


def _show(rows: Sequence[Row], config: SweepConfig, folder: Path) -> None:
    """The table, best first, and where everything is."""
    from rich.table import Table

    from tropism.sweeps.outcome import best_of, cautions, ranked, shown_value

    several = config.seeds > 1
    about = f"mean ± deviation over {config.seeds} seeds" if several else "95 % interval where there is one"
    title = f"{config.metric} ({config.mode}; {about})"
    table = Table(box=None, title=title, title_justify="left", pad_edge=False)
    for column in ("trial", config.metric, *config.parameters, "seconds", ""):
        side: Literal["left", "right"] = "right" if column in ("trial", "seconds") else "left"
        table.add_column(printable(column), justify=side, overflow="fold")
    ordered = ranked(rows, config.mode)
    for row in ordered[:MOST_ROWS]:
        settings = [printable(shown_value(row.values[k])) if k in row.values else "" for k in config.parameters]
        note = {"complete": "", "failed": f"failed: {row.reason}"}.get(row.state, row.state)
        table.add_row(f"{row.number:03d}", row.measured, *settings, f"{row.seconds:.0f}", printable(note)[:120])
    out = console()
    out.print(table)
    if len(ordered) > MOST_ROWS:
        out.print(f"... and {len(ordered) - MOST_ROWS} more in {folder / 'table.csv'}", soft_wrap=True)
    for line in cautions(rows, config):
        out.print(line, soft_wrap=True)
    best = best_of(rows, config.mode)
    files = [f"table: {folder / 'table.csv'}", f"plots: {folder / 'plots'}"]
    if best is None:
        out.print("\n".join([*files[:1], "no trial has a value"]), soft_wrap=True)
        return
    files += [f"best:  {folder / 'best.yaml'} (trial {best.number:03d}, trained in {folder / best.folder})"]
    out.print("\n".join([*files, f"next:  tropism train {folder / 'best.yaml'}"]), soft_wrap=True)
