"""tropism evaluate RUN_OR_MODEL --best-of 1,4,16: what choosing the best of several completions is worth."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable

from tropism.commands.console import console
from tropism.errors import ConfigError
from tropism.evaluation.best_of import BestOf, best_of_table

if TYPE_CHECKING:
    from tropism.commands.evaluate import Options
    from tropism.config import Recipe


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model."""

    sizes: tuple[BestOf, ...]
    sequence_kl: float
    """Of its plain completions to the model that the run started from, in nats; NaN where that is not there."""
    completions: int
    unscored: int


def measure(options: Options, recipe: Recipe) -> None:
    """Sample every prompt, print the table of sizes and write the files.

    Raises:
        ConfigError: the options do not fit each other, or no prompt has enough scored completions.
    """
    from tropism.commands.evaluate import tables_of, write_tables
    from tropism.commands.quiet import quieten_libraries

    sizes = parsed_sizes(str(options.best_of))
    per_prompt = samples_of(options.samples_per_prompt, sizes)
    folder = _folder(options)
    quieten_libraries()
    tables = tables_of(recipe, options, per_prompt=per_prompt)
    results = {name: measured(table, per_prompt, sizes, seed=recipe.seed) for name, table in tables.items()}
    out = console()
    show(out, results, per_prompt)
    if folder is None:
        return
    written = [*write_numbers(folder, results, per_prompt), folder / "samples.parquet"]
    write_tables(written[-1], tables)
    out.print(f"written: {len(written)} files in {folder}", soft_wrap=True)


def parsed_sizes(text: str) -> tuple[int, ...]:
    """``1,4,16`` as numbers, ascending.

    Raises:
        ConfigError: something else, or a number below 1.
    """
    try:
        sizes = sorted({int(word) for word in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise ConfigError(f"--best-of {text!r:.60}: give whole numbers from 1 on, such as 1,2,4,8,16")
    return tuple(sizes)


def samples_of(given: int, sizes: Sequence[int]) -> int:
    """Completions of every prompt: as many as the largest size takes, or more.

    Raises:
        ConfigError: fewer are asked for.
    """
    if given != 1 and given < sizes[-1]:
        raise ConfigError(
            f"--samples-per-prompt {given} is too few for the best of {sizes[-1]}; give at least {sizes[-1]}, or leave "
            "it out"
        )
    return max(given, sizes[-1])


def _folder(options: Options) -> Path | None:
    """Where to write; None for a model that is no run, where no folder was named."""
    if options.out is not None:
        if options.out.suffix in (".parquet", ".json", ".csv") or options.out.is_file():
            raise ConfigError(f"--out {options.out}: with --best-of, name a folder to write into")
        return options.out
    folder = Path(options.source)
    return folder / "best_of" if (folder / "recipe.yaml").is_file() else None


def measured(table: dict[str, list[Any]], per_prompt: int, sizes: Sequence[int], *, seed: int) -> Measured:
    """The numbers of one model.

    Args:
        table: of ``RewardEvaluation``, the completions of one prompt together.

    Raises:
        ConfigError: no prompt has enough scored completions.
    """
    rewards: list[float] = table["reward"]
    rows = [rewards[begin : begin + per_prompt] for begin in range(0, len(rewards), per_prompt)]
    try:
        found = best_of_table(rows, sizes, seed=seed)
    except ValueError as error:
        raise ConfigError(f"{error}; raise --samples-per-prompt, or see why the reward has no opinion") from error
    kls = table["sequence_kl"]
    return Measured(
        sizes=tuple(found),
        sequence_kl=math.fsum(kls) / len(kls),
        completions=len(rewards),
        unscored=sum(math.isnan(reward) for reward in rewards),
    )


def show(out: Console, results: dict[str, Measured], per_prompt: int) -> None:
    """The table, and what to read it with."""
    prompts = next(iter(results.values())).completions // per_prompt
    table = RichTable(
        title=f"best of n: {prompts} prompts, {per_prompt} completions of each, 95 % intervals over prompts",
        title_justify="left",
    )
    table.add_column("model")
    for label in ("n", "reward", "KL at most"):
        table.add_column(label, justify="right", no_wrap=True)
    for name, result in results.items():
        for one in result.sizes:
            bounds = f" [{one.reward.low:.3g}, {one.reward.high:.3g}]" if one.reward.known else ""
            table.add_row(name, str(one.n), f"{one.reward.mean:.4g}{bounds}", f"{one.kl:.3f}")
    out.print(table)
    out.print(
        "KL at most: log n - (n - 1) / n nats from the model's own completions to the best of them; less where few "
        "completions have most of the probability, or share a reward."
    )
    trained = results.get("trained")
    if trained is not None and not math.isnan(trained.sequence_kl):
        out.print(f"The trained model's own completions paid {trained.sequence_kl:.3f} nats of KL to the base model.")
    for name, result in results.items():
        if result.unscored:
            out.print(f"{name}: {result.unscored} of {result.completions} completions are unscored and left out.")


def write_numbers(folder: Path, results: dict[str, Measured], per_prompt: int) -> list[Path]:
    """``best_of.csv`` and ``statistics.json``."""
    from tropism.evaluation.result_files import csv_table, plain_values, write_files

    header = ("model", "n", "reward", "low", "high", "kl_bound", "prompts")
    rows = [
        (name, one.n, one.reward.mean, one.reward.low, one.reward.high, one.kl, one.prompts)
        for name, result in results.items()
        for one in result.sizes
    ]
    statistics = {"samples_per_prompt": per_prompt, "models": results}
    content = json.dumps(plain_values(statistics), indent=1).encode()
    return write_files(folder, {"best_of.csv": csv_table(header, rows), "statistics.json": content})
