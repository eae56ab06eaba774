"""From the settings of a comparison to the recipe of every method, and to what each may spend."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tropism.algorithms import RewardConditioned
from tropism.comparing.config import BEST_OF, OWN_KEYS, CompareConfig, family_of, merged
from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.errors import ConfigError
from tropism.models.loading import ModelConfig, device_named
from tropism.models.sampling_model import check_compiled
from tropism.rewards.resolve import check_allowed
from tropism.rollouts.config import Sampling

logger = logging.getLogger("tropism")

GROUP = 4
"""Completions of a prompt that are sampled for the pool at once; a pool holds a multiple of it."""
LEAST_PER_CHOICE = 8
"""Completions by which a target and guidance are judged, at least."""
MOST_LEFT = 0.05
"""Share of the budget that a method may leave unspent, because it has no whole step in it."""
CHOSEN_TARGETS = 3
"""Targets that are tried where the settings list none."""
DEFAULT_BETA = 1.0
"""How ILQL weighs what tokens are worth when it is measured, where nothing else is said."""

Form = Literal["demonstrations", "pairs", "opinions", "episodes", "scored"]
"""What the pool becomes for a method; the names are those of ``AlgorithmConfig.reads``."""


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """How one method is trained, whatever the seed and the budget."""

    method: str
    recipe: Recipe | None
    """With its own settings; its seed, run, steps and (of methods with a form) data come later. None: best-of-n."""
    form: Form | None = None
    """What it learns from the pool; None: it samples for itself, or is not trained."""
    per_step: int = 0
    """Completions that a step with sampling takes."""
    every: int = 1
    """It samples in every so many-th step."""
    epochs: int = 2
    """Passes over its form of the pool."""
    keep: float = 0.5
    """Of sft: the share of each prompt's completions that it imitates, best first."""
    choices: int = 0
    """Pairs of target and guidance of which one is chosen; 0: nothing is."""
    beta: float = 0.0
    """Of ilql: how it is sampled from when it is measured."""
    best_of: int = 1
    """Of best-of-n: n."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What a method may spend, in completions that are sampled and scored for training."""

    steps: int | None = None
    """Of its run; None where they follow from its form of the pool."""
    pool: int = 0
    """Completions of the pool that it learns from: the first so many."""
    sampled: int = 0
    """Completions that it samples for itself."""
    per_choice: int = 0
    """Completions of each pair of target and guidance."""
    choices: int = 0
    """Such pairs."""

    @property
    def completions(self) -> int:
        return self.pool + self.sampled + self.per_choice * self.choices


def shared_recipe(mapping: Mapping[str, Any]) -> Recipe:
    """What all methods have: the recipe without its method and its steps.

    Raises:
        ConfigError: it cannot be built, or has no reward or no held-out prompts, or would choose weights by these, or
            asks for kernels that cannot be compiled.
    """
    values = {k: v for k, v in mapping.items() if k not in ("algorithm", "total_steps", "run", "prompts_per_step")}
    if values.get("reward") is None:
        raise ConfigError("a comparison needs a reward: --reward vader, or reward in the recipe")
    recipe = Recipe.from_mapping({**values, "algorithm": "grpo"})
    for name in ("model", "data", "eval_data"):
        value = getattr(recipe, name)
        if value is not None and not hasattr(value, "__dataclass_fields__") and not isinstance(value, str):
            raise ConfigError(
                f"{name}: the cells of a comparison are processes of their own, which a {type(value).__name__} of this "
                "program cannot reach; give the name of a file, folder or hub id"
            )
    held_out = recipe.eval_data is not None or (isinstance(recipe.data, DataConfig) and recipe.data.eval_fraction > 0)
    if not held_out:
        raise ConfigError(
            "a comparison is made on held-out prompts, and the recipe has none: give it eval_data (--eval_data FILE), "
            "or data.eval_fraction"
        )
    keeping = recipe.trainer.checkpoints
    if keeping.use_best or keeping.patience is not None:
        name = "use_best" if keeping.use_best else "patience"
        raise ConfigError(
            f"trainer.checkpoints.{name} chooses weights by the prompts that the comparison is made on, which flatters "
            "whoever evaluates most often; leave it out"
        )
    assert recipe.reward is not None
    for name, term in recipe.reward.terms.items():
        if not isinstance(term.use, str):
            raise ConfigError(
                f"reward {name!r} is a function of this program, which the processes of the cells cannot reach; give "
                "its name (tropism.register works in this process only), or file.py:function with --allow-code"
            )
    if recipe.sampling.compile:
        device = recipe.model.device if isinstance(recipe.model, ModelConfig) else "auto"
        check_compiled(device_named(device).type)
    return recipe


def check_code(recipe: Recipe, *, allow_code: bool) -> None:
    """Refuse rewards and metrics that name code unless that is allowed."""
    assert recipe.reward is not None
    for term in [*recipe.reward.terms.values(), *(metric.as_reward() for metric in recipe.metrics.values())]:
        check_allowed(term, allow_code=allow_code)


def method_plans(config: CompareConfig, mapping: Mapping[str, Any]) -> list[MethodPlan]:
    """Every method of a comparison, in order.

    Args:
        mapping: the recipe's plain values.

    Raises:
        ConfigError: what is wrong with each method that cannot be trained like this, all of them at once.
    """
    plans: list[MethodPlan] = []
    problems: list[str] = []
    for method, own in config.methods.items():
        try:
            plans.append(_plan(method, own, mapping, config))
        except ConfigError as error:
            problems.append(f"{method}: {error}")
    if problems:
        raise ConfigError("; ".join(problems))
    return plans


def _plan(method: str, own: Mapping[str, Any], mapping: Mapping[str, Any], config: CompareConfig) -> MethodPlan:
    if family_of(method) == BEST_OF:
        return MethodPlan(method=method, recipe=None, best_of=_best_of(own, config))
    if "n" in own:
        raise ConfigError("n is for best-of-n; leave it out")
    values = _method_values(method, own, mapping)
    beta = _beta(method, own, mapping)
    recipe = Recipe.from_mapping(values)
    algorithm = recipe.algorithm
    if isinstance(algorithm, RewardConditioned) and algorithm.samples_per_prompt is not None:
        raise ConfigError(
            "algorithm.samples_per_prompt: it learns from the pool that all methods share; leave it out (or set online)"
        )
    choices = _choices(algorithm, config)
    if algorithm.reads == "prompts":
        if any(name in own for name in OWN_KEYS):
            raise ConfigError("epochs and keep are for methods that learn from the pool, and it samples for itself")
        size = algorithm.step_size(recipe.prompts_per_step, recipe.prompts_per_step)
        return MethodPlan(
            method=method, recipe=recipe, per_step=size.completions, every=size.every, choices=choices, beta=beta
        )
    plain = replace(
        recipe,
        reward=None,
        metrics={},
        eval_data=None,
        data="pool",
        sampling=replace(recipe.sampling, policy_distribution="tempered"),
    )
    return MethodPlan(
        method=method,
        recipe=plain,
        form=algorithm.reads,  # type: ignore[arg-type]
        epochs=_epochs(own),
        keep=_keep(method, own),
        choices=choices,
        beta=beta,
    )


def _method_values(method: str, own: Mapping[str, Any], mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a method's recipe: those of all, with its own over them."""
    values = {key: value for key, value in mapping.items() if key not in ("run", "normalise")}
    given = mapping.get("algorithm")
    given = {"name": given} if isinstance(given, str) else given
    name = family_of(method)
    same = isinstance(given, Mapping) and given.get("name") == name
    values["algorithm"] = dict(given) if same else {"name": name}  # type: ignore[arg-type]
    changes = {key: value for key, value in own.items() if key not in (*OWN_KEYS, "sampling")}
    if not isinstance(changes.get("algorithm", {}), Mapping):
        raise ConfigError("algorithm: expected a mapping of the method's fields")
    if changes.get("algorithm", {}).get("name", name) != name:
        raise ConfigError(f"algorithm.name is {changes['algorithm']['name']!r}; leave the name out")
    values = merged(values, changes)
    values["total_steps"] = 1
    trainer = dict(values.get("trainer") or {})
    evaluation = dict(trainer.get("evaluation") or {})
    if evaluation.get("every") is None:  # the cells are measured when they are through
        values |= {"eval_data": None, "metrics": {}}
    trainer["evaluation"] = {"every": evaluation.get("every")}
    checkpoints = trainer.get("checkpoints") or {}
    trainer["checkpoints"] = {**checkpoints, "best_metric": None}
    trainer.setdefault("progress", False)
    values["trainer"] = trainer
    sampling = values.get("sampling")
    if isinstance(sampling, Mapping):
        values["sampling"] = {name: value for name, value in sampling.items() if name != "beta"}
    return values


def _beta(method: str, own: Mapping[str, Any], mapping: Mapping[str, Any]) -> float:
    """How much of the advantages is added to the logits when ilql is sampled from."""
    if family_of(method) != "ilql":
        return 0.0
    sampling = mapping.get("sampling")
    shared = sampling.get("beta") if isinstance(sampling, Mapping) else None
    beta: Any = (own.get("sampling") or {}).get("beta", DEFAULT_BETA if shared is None else shared)
    try:
        return Sampling(beta=beta).beta
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sampling.beta: {error}") from error


def _best_of(own: Mapping[str, Any], config: CompareConfig) -> int:
    n = own.get("n", config.best_of)
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ConfigError(f"n: expected a whole number of at least 2, not {n!r:.60}")
    return n


def _epochs(own: Mapping[str, Any]) -> int:
    epochs = own.get("epochs", MethodPlan.epochs)
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ConfigError(f"epochs: expected a whole number of at least 1, not {epochs!r:.60}")
    return epochs


def _keep(method: str, own: Mapping[str, Any]) -> float:
    keep = own.get("keep", MethodPlan.keep)
    if "keep" in own and family_of(method) != "sft":
        raise ConfigError("keep is for sft, which imitates a share of the pool; leave it out")
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise ConfigError(f"keep: expected a share above 0 and at most 1, not {keep!r:.60}")
    return float(keep)


def _choices(algorithm: Any, config: CompareConfig) -> int:
    """How many pairs of target and guidance there are to choose from."""
    if not isinstance(algorithm, RewardConditioned):
        return 0
    choice = config.choice
    if choice.targets and len(algorithm.targets) > 1:
        raise ConfigError(
            f"choice.targets are numbers of one reward, and algorithm.targets names {len(algorithm.targets)}; leave "
            "choice.targets out (quantiles of each are asked for then)"
        )
    if not algorithm.leaves_open and any(choice.guidance):
        raise ConfigError(
            "guidance pushes away from what the model says where the reward is left open, which it does not learn with "
            "algorithm.target_dropout 0; raise that, or set choice.guidance to [0]"
        )
    return (len(choice.targets) or CHOSEN_TARGETS) * len(choice.guidance)


# The budget -----------------------------------------------------------------------------------------------------------


def spendings(plans: Sequence[MethodPlan], config: CompareConfig, completions: int) -> dict[str, Spending]:
    """What each method does with a budget of so many completions.

    Raises:
        ConfigError: of each method that cannot spend it: why, and what would do.
    """
    found: dict[str, Spending] = {}
    problems: list[str] = []
    for plan in plans:
        try:
            found[plan.method] = spending(plan, config, completions)
        except ConfigError as error:
            problems.append(f"{plan.method}: {error}")
    if problems:
        raise ConfigError(f"a budget of {completions:,} completions: " + "; ".join(problems))
    return found


def spending(plan: MethodPlan, config: CompareConfig, completions: int, *, exact: bool = True) -> Spending:
    """What one method does with a budget.

    Args:
        exact: refuse a budget of which much would be left.

    Raises:
        ConfigError: it is below one step, or leaves much unspent.
    """
    if plan.recipe is None:
        return Spending()
    per_choice = int(config.choice.share * completions) // plan.choices if plan.choices else 0
    if plan.choices and per_choice < LEAST_PER_CHOICE:
        raise ConfigError(
            f"{config.choice.share:.0%} of it are kept to choose among {plan.choices} pairs of target and guidance, "
            f"{per_choice} completions for each, and {LEAST_PER_CHOICE} are the least; raise the budget or "
            "choice.share, or list fewer choice.targets or choice.guidance"
        )
    left = completions - per_choice * plan.choices
    if plan.form is not None:
        pool = left - left % GROUP
        if pool < 2 * GROUP:
            raise ConfigError(f"it leaves {pool} for the pool, and {2 * GROUP} are the least")
        return Spending(pool=pool, per_choice=per_choice, choices=plan.choices)
    growths = left // plan.per_step
    if growths < 1:
        raise ConfigError(
            f"one step samples {plan.per_step:,} and {left:,} are left for it; raise the budget, or lower "
            "prompts_per_step or the completions of a prompt (group_size)"
        )
    rest = left - growths * plan.per_step
    if exact and rest > MOST_LEFT * completions:
        raise ConfigError(
            f"{growths} steps of {plan.per_step:,} leave {rest:,} of it unspent, more than {MOST_LEFT:.0%}; give a "
            f"budget such as {completions - rest:,} or {completions - rest + plan.per_step:,}, or another "
            "prompts_per_step"
        )
    return Spending(
        steps=growths * plan.every, sampled=growths * plan.per_step, per_choice=per_choice, choices=plan.choices
    )


# What to know of the results ------------------------------------------------------------------------------------------


def filters_of(sampling: Sampling) -> list[str]:
    """The settings by which tokens are sampled from something else than the model's distribution, by name."""
    filters = {
        "top_k": sampling.top_k > 0,
        "top_p": sampling.top_p < 1,
        "min_p": sampling.min_p > 0,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "min_new_tokens": sampling.min_new_tokens > 0,
        "allowed_tokens": sampling.allowed_tokens is not None,
        "temperature 0": sampling.temperature == 0,
    }
    return [name for name, given in filters.items() if given]


def notes_of(recipe: Recipe, plans: Sequence[MethodPlan]) -> list[str]:
    """What has to be known of all results: how the KL is estimated where filters are on, and who is not evaluated."""
    notes, named = [], filters_of(recipe.sampling)
    if named:
        notes.append(
            f"Completions are sampled with {', '.join(named)}, and the KL is that of what was sampled from, filters "
            "included, to the base model without them: the base model has some itself, best-of-n's bound is to the "
            "filtered base model, and evaluations during training have the KL of the unfiltered policy. Compare it "
            "between cells, not with a KL measured elsewhere"
        )
    pooled = [plan.method for plan in plans if plan.form is not None]
    if pooled and recipe.trainer.evaluation.every is not None:
        notes.append(
            f"trainer.evaluation.every: {', '.join(pooled)} learn from the pool and are measured in the end only, so "
            "they have no line over training"
        )
    return notes
