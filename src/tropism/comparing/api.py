"""A comparison in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tropism.comparing.config import SECTION, compare_config
from tropism.comparing.results import Comparison
from tropism.config import Recipe
from tropism.errors import ConfigError
from tropism.foreign.trust import refuse_trust
from tropism.safe_yaml import read_yaml
from tropism.schema import to_plain


def compare(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    methods: str | Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    *,
    seeds: int | Sequence[int] | None = None,
    completions: int | None = None,
    seconds: float | None = None,
    samples_per_prompt: int | None = None,
    best_of: int | None = None,
    against: str | None = None,
    out: str | Path | None = None,
    processes: int = 1,
    allow_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train several methods with the same model, prompts, reward and budget, and measure what each bought.

    Called again after it was stopped, it goes on; what is finished is not computed anew. A method that fails loses none
    of the others: ``Comparison.failed`` says why.

    Args:
        recipe: a file, its plain values, or a ``Recipe``, whose model, data and reward are names: every cell is a
            process of its own. A section ``compare`` in it holds the same settings as the arguments here.
        methods: names, or each name with what its recipe changes.
        seeds: so many, from 0, or which.
        completions, seconds: the budget of each method and seed, one of the two.
        samples_per_prompt, best_of, against: see ``CompareConfig``.
        out: the folder; None: ``runs/compare-<name of the file>``.
        processes: cells that are worked on at once.
        allow_code: let the reward name code: ``module:function`` or ``file.py:function``.
        say: told one line per cell.

    Raises:
        TropismError: something about the recipe, the prompts, a method or the folder cannot work; raised before
            anything is sampled, of all methods at once.
    """
    mapping, name = _values(recipe)
    given = mapping.pop(SECTION, None)
    config = compare_config(
        given,
        methods=methods,
        seeds=seeds,
        completions=completions,
        seconds=seconds,
        samples_per_prompt=samples_per_prompt,
        best_of=best_of,
        against=against,
    )
    if out is None and name is None:
        raise ConfigError("out: name the folder of the comparison, such as runs/compare-mine")
    folder = Path(out) if out is not None else folder_named(str(name))
    from tropism.comparing.course import Course  # which imports everything

    Course(config, mapping, folder, processes=processes, allow_code=allow_code, say=say).run()
    comparison = Comparison.read(folder)
    comparison.write()
    return comparison


def folder_named(name: str) -> Path:
    """Where a comparison is written unless something else is said."""
    return Path("runs") / f"compare-{name}"


def _values(recipe: str | Path | Mapping[str, Any] | Recipe) -> tuple[dict[str, Any], str | None]:
    """The plain values of a recipe, and a name for its folder."""
    if isinstance(recipe, str | Path):
        values = read_yaml(recipe)
        refuse_trust(values, str(recipe))
        return dict(values), Path(recipe).stem
    if isinstance(recipe, Mapping):
        return dict(recipe), None
    plain = to_plain(recipe) | {name: getattr(recipe, name) for name in ("model", "data", "eval_data", "reward")}
    return {**plain, "algorithm": {"name": recipe.algorithm.name, **to_plain(recipe.algorithm)}}, None
