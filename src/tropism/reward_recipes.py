"""Rewards that are trained first: a recipe of a reward model in the place of a reward's name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

from tropism.config import Recipe, free_run
from tropism.errors import ConfigError
from tropism.rewards import RewardConfig, RewardTerm
from tropism.safe_yaml import parse_yaml, read_yaml
from tropism.training.checkpoint import newest_complete

logger = logging.getLogger("tropism")

ENDINGS = (".yaml", ".yml")


def reward_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of reward models that a recipe names as rewards, by the name of the term.

    The run folder of each is that of the recipe with the term's name behind it, unless it names one itself.

    Raises:
        ConfigError: one is no recipe of a reward model, or samples otherwise than the policy will.
    """
    found: dict[str, Recipe] = {}
    for name, term in ({} if recipe.reward is None else recipe.reward.terms).items():
        if not _is_recipe(term):
            continue
        inner = Recipe.from_file(str(term.use))
        if inner.algorithm.reads != "comparisons":
            raise ConfigError(f"reward {name!r}: {term.use} trains {inner.algorithm.name} and no reward model")
        _compare(recipe, inner, str(term.use))
        if inner.normalise is None or not inner.normalise.after:
            logger.warning(
                "%s does not normalise its reward model after training, so its scores have no scale", term.use
            )
        found[name] = inner if inner.run is not None else replace(inner, run=f"{recipe.run}-{name}")
    return found


def with_trained_rewards(recipe: Recipe, train: Callable[[Recipe, bool], object]) -> Recipe:
    """The recipe with the run folders of trained reward models in place of their recipes.

    One that is trained already is taken as it is, one that was interrupted goes on.

    Args:
        train: called with the recipe of a reward model, and whether to resume it.
    """
    if not any(_is_recipe(term) for term in _terms(recipe).values()):
        return recipe
    if recipe.run is None:
        recipe = replace(recipe, run=str(free_run(recipe.algorithm.name)))
    inner = reward_recipes(recipe)
    for name, first in inner.items():
        if not is_trained(first):
            logger.warning("the reward %r is trained first, in %s", name, first.run)
            train(first, is_begun(first))
            logger.warning("the reward %r is trained; now the policy, in %s", name, recipe.run)
    return _with_folders(recipe, inner)


def with_placeholders(recipe: Recipe) -> Recipe:
    """The recipe with a reward of 0 for every reward model that is still to be trained: to check everything else."""

    def untrained(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    inner = reward_recipes(recipe)
    terms = {
        name: replace(_terms(recipe)[name], use=untrained, args={}, cache=None)
        for name, first in inner.items()
        if not is_trained(first)
    }
    return _with(_with_folders(recipe, {name: first for name, first in inner.items() if name not in terms}), terms)


def is_trained(first: Recipe) -> bool:
    """Whether a reward model is there; a warning says where it was trained by another recipe."""
    folder = Path(str(first.run))
    if not (folder / "model" / "reward_model.json").is_file():
        return False
    written = read_yaml(folder / "recipe.yaml")
    wanted = parse_yaml(first.to_yaml(), "the recipe")
    other = [name for name in wanted if name not in ("run", "trainer") and written.get(name) != wanted[name]]
    how = f", by a recipe that differs in {', '.join(other)}" if other else ""
    logger.warning("the reward model in %s is trained already%s, and is used as it is", folder, how)
    return True


def is_begun(first: Recipe) -> bool:
    """Whether there is a checkpoint to go on from."""
    return newest_complete(Path(str(first.run)) / "checkpoints", hashes=False)[0] is not None


def _is_recipe(term: RewardTerm) -> bool:
    return isinstance(term.use, str) and term.use.endswith(ENDINGS)


def _with_folders(recipe: Recipe, inner: Mapping[str, Recipe]) -> Recipe:
    return _with(recipe, {name: replace(_terms(recipe)[name], use=str(first.run)) for name, first in inner.items()})


def _terms(recipe: Recipe) -> dict[str, RewardTerm]:
    return {} if recipe.reward is None else dict(recipe.reward.terms)


def _with(recipe: Recipe, terms: dict[str, RewardTerm]) -> Recipe:
    if not terms:
        return recipe
    assert isinstance(recipe.reward, RewardConfig)
    return replace(recipe, reward=replace(recipe.reward, terms={**recipe.reward.terms, **terms}))


def _compare(policy: Recipe, reward: Recipe, where: str) -> None:
    """The completions that put the reward on its scale should be those that it will judge."""
    for field in fields(policy.sampling):
        ours, theirs = getattr(policy.sampling, field.name), getattr(reward.sampling, field.name)
        if ours != theirs and field.name != "batch_size":
            raise ConfigError(
                f"sampling.{field.name} is {ours!r} in this recipe and {theirs!r} in {where}: the reward model would "
                "be put on the scale of other completions than it judges. Make them equal"
            )
