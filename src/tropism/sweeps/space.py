"""From a sweep's parameters to recipes: which values a trial has, and whether recipes can be built of them."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from tropism.commands.recipe_arguments import with_overrides
from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.errors import ConfigError
from tropism.reward_recipes import ENDINGS
from tropism.rewards.resolve import check_allowed
from tropism.sweeps.config import LISTED, LOGARITHMIC, WHOLE, Parameter, SweepConfig

logger = logging.getLogger("tropism")

MOST_BUILT = 256
"""Combinations of values that are built before the first trial; of more, one value is changed at a time."""

Values = Mapping[str, Any]
"""Dotted key -> value."""


def distribution(parameter: Parameter) -> BaseDistribution:
    """What a parameter is to the study."""
    if parameter.strategy in LISTED:
        return CategoricalDistribution(parameter.labels)
    low, high = parameter.ends
    if parameter.strategy in WHOLE:
        return IntDistribution(low, high, log=parameter.strategy in LOGARITHMIC)
    step = parameter.values[2] if parameter.strategy == "quniform" else None
    return FloatDistribution(low, high, log=parameter.strategy in LOGARITHMIC, step=step)


def study_value(parameter: Parameter, value: Any) -> Any:
    """What the study calls a value."""
    return parameter.labels[parameter.values.index(value)] if parameter.strategy in LISTED else value


def recipe_value(parameter: Parameter, value: Any) -> Any:
    """The value that the study means."""
    if parameter.strategy in LISTED:
        return parameter.values[parameter.labels.index(value)]
    # Multiples of a step carry the last bits of a sum, which nobody would write.
    return float(f"{value:.12g}") if parameter.strategy == "quniform" else value


def suggested(trial: Trial, config: SweepConfig) -> dict[str, Any]:
    """The values of a trial; those that it has already stay."""
    values = {}
    for key, parameter in config.parameters.items():
        kind = distribution(parameter)
        if isinstance(kind, FloatDistribution):
            value: Any = trial.suggest_float(key, kind.low, kind.high, step=kind.step, log=kind.log)
        elif isinstance(kind, IntDistribution):
            value = trial.suggest_int(key, kind.low, kind.high, step=kind.step, log=kind.log)
        else:
            value = trial.suggest_categorical(key, parameter.labels)
        values[key] = recipe_value(parameter, value)
    return values


# ---- recipes ---------------------------------------------------------------------------------------------------------


def with_values(base: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """A recipe's plain values with those of a trial, as the command line would set them.

    A whole section (``algorithm``) is set before the fields in it (``algorithm.kl_coef``).
    """
    model = base.get("model")
    trusted = isinstance(model, Mapping) and bool(model.get("trust_remote_code"))
    mapping = dict(base)
    if trusted:  # by the command line, as nothing else can
        mapping["model"] = {name: value for name, value in dict(base["model"]).items() if name != "trust_remote_code"}
    for key in sorted(values, key=lambda key: key.count(".")):
        mapping = with_overrides(mapping, [f"--{key}={json.dumps(values[key], ensure_ascii=False)}"])
    return with_overrides(mapping, ["--model.trust_remote_code=true"]) if trusted else mapping


def recipe_of(base: Mapping[str, Any], values: Values, *, run: str | None, seed: int = 0) -> Recipe:
    """The recipe of one run of a trial.

    Args:
        run: its folder.
        seed: is added to the recipe's.

    Raises:
        ConfigError: no recipe can be built of these values.
    """
    mapping = with_values(base, values)
    mapping["run"] = run
    if seed:
        mapping["seed"] = mapping.get("seed", 0) + seed
    return Recipe.from_mapping(mapping)


def check_space(base: Mapping[str, Any], config: SweepConfig, *, where: str, allow_code: bool) -> None:
    """Build the recipes of all listed values and of the ends of all ranges, before anything is trained.

    Args:
        base: the recipe's plain values.
        where: names the sweep's file.

    Raises:
        ConfigError: a key that is no field of the recipe (the closest is named); a value with which no recipe can be
            built; a metric that no trial will have; a reward that may not run.
    """
    built: dict[tuple[str, str], bool] = {}
    refused: dict[tuple[str, str], ConfigError] = {}
    failed, count = 0, 0
    recipes: list[Recipe] = []
    for values in _combinations(config.parameters):
        count += 1
        marks = [(key, json.dumps(value, default=str)) for key, value in values.items()]
        try:
            recipes.append(recipe_of(base, values, run=None))
            built |= dict.fromkeys(marks, True)
        except ConfigError as error:
            failed += 1
            for mark in marks:
                refused.setdefault(mark, error)
    if not recipes:
        raise ConfigError(f"{where}: {_why_none(base, config, next(iter(refused.values())))}")
    for (key, value), problem in refused.items():
        if (key, value) not in built:
            raise ConfigError(f"{where}: parameters.{key}, with {value:.80}: {problem}")
    if failed:
        example = next(iter(refused.values()))
        logger.warning(
            "of %d combinations of values %d cannot be built; such trials count as failed (%s)", count, failed, example
        )
    _check_rewards(recipes, allow_code=allow_code)
    _check_metric(recipes, config, where)


def _combinations(parameters: Mapping[str, Parameter]) -> Iterator[dict[str, Any]]:
    keys = list(parameters)
    probes = [parameter.probes for parameter in parameters.values()]
    if math.prod(map(len, probes)) <= MOST_BUILT:
        for cell in itertools.product(*probes):
            yield dict(zip(keys, cell, strict=True))
        return
    first = {key: values[0] for key, values in zip(keys, probes, strict=True)}
    yield first
    for key, values in zip(keys, probes, strict=True):
        for value in values[1:]:
            yield first | {key: value}


def _why_none(base: Mapping[str, Any], config: SweepConfig, error: ConfigError) -> str:
    """Why no recipe can be built: the first value that fails alone, where the recipe itself does not."""
    try:
        Recipe.from_mapping(base)
    except ConfigError:
        return f"no combination of values makes a recipe: {error}"
    for key, parameter in config.parameters.items():
        for value in parameter.probes:
            try:
                recipe_of(base, {key: value}, run=None)
            except ConfigError as alone:
                return f"parameters.{key}, with {json.dumps(value, default=str):.80}: {alone}"
    return f"no combination of values makes a recipe: {error}"


def _check_rewards(recipes: Sequence[Recipe], *, allow_code: bool) -> None:
    """Refuse functions of the user's own where they may not run, and rewards that every trial would train."""
    for recipe in recipes:
        for term in recipe.metrics.values():
            check_allowed(term.as_reward(), allow_code=allow_code)
        for name, reward in ({} if recipe.reward is None else recipe.reward.terms).items():
            check_allowed(reward, allow_code=allow_code)
            if isinstance(reward.use, str) and reward.use.endswith(ENDINGS):
                raise ConfigError(
                    f"reward {name!r} is the recipe {reward.use}, and every trial would train a reward model of its "
                    f"own: train it once (tropism train {reward.use} --run runs/judge), and name that folder instead"
                )


def _check_metric(recipes: Sequence[Recipe], config: SweepConfig, where: str) -> None:
    """Refuse a metric of held-out data where nothing is held out, and a pruner that would never see one."""
    if not config.metric.startswith("eval/"):
        return
    if not any(_holds_out(recipe) for recipe in recipes):
        raise ConfigError(
            f"{where}: metric: {config.metric} is measured on held-out data, and the recipe holds out none: give it "
            "eval_data (--eval_data FILE), or data.eval_fraction"
        )
    if config.metric.startswith("eval/reward") and all(
        recipe.reward is None and recipe.algorithm.reads != "comparisons" for recipe in recipes
    ):
        raise ConfigError(
            f"{where}: metric: {config.metric} needs a reward, and the recipe has none: give it one, or take eval/loss"
        )
    if config.pruner == "median" and all(recipe.trainer.evaluation.every is None for recipe in recipes):
        raise ConfigError(
            f"{where}: pruner: median compares {config.metric} on the way, and the recipe evaluates before and after "
            "only: set trainer.evaluation.every"
        )


def _holds_out(recipe: Recipe) -> bool:
    return recipe.eval_data is not None or (isinstance(recipe.data, DataConfig) and recipe.data.eval_fraction > 0)
