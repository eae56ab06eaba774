"""tropism evaluate RUN --steerability: ask a conditioned model for many rewards, and see what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from tropism.commands.console import console, printable
from tropism.errors import ConfigError
from tropism.evaluation.statistics import Interval
from tropism.evaluation.steerability import (
    Beyond,
    Samples,
    Steerability,
    TrainingRewards,
    default_targets,
    steerability,
)

if TYPE_CHECKING:
    from tropism.commands.evaluate import Options
    from tropism.config import Recipe
    from tropism.rewards import RewardConfig
    from tropism.targets.conditioner import Conditioner
    from tropism.types import Prompt

Complete = Callable[[Sequence[float], int, int], dict[str, list[Any]]]
"""(target of each prompt, completions of each, number of the collect) -> the table of ``RewardEvaluation``."""

THIN = 0.015
"""A target with a smaller share of the training rewards near it is named as one that had little to learn from."""


CLEAR = 0.5
"""A model that moves by a smaller share of the training rewards' spread is said to follow weakly."""


def measure(options: Options, recipe: Recipe) -> None:
    """Sweep over targets, print the numbers and write the files.

    Raises:
        ConfigError: the model cannot be asked for rewards, or the options do not fit it.
    """
    from tropism.commands.evaluate import base_model, prompts_to_score, reward_evaluation
    from tropism.commands.quiet import quieten_libraries
    from tropism.evaluation.steerability_files import SweepRecord, write_sweep
    from tropism.generation import TextPolicy
    from tropism.rewards import RewardHarness

    assert recipe.reward is not None
    if options.samples_per_prompt < 1:
        raise ConfigError(f"--samples-per-prompt must be at least 1, got {options.samples_per_prompt}")
    folder = _folder(options)
    quieten_libraries()
    harness = RewardHarness(recipe.reward, allow_code=options.allow_code)
    trained = TextPolicy.load(options.source, device=getattr(recipe.model, "device", "auto"))
    conditioner = trained.conditioner
    if conditioner is None:
        raise ConfigError(
            f"{options.source} was not trained to be asked for a reward, so there is nothing to sweep; steerability is "
            "of runs with a method such as conditioned (tropism methods conditioned)"
        )
    name = target_name(options.target_name, conditioner)
    training = TrainingRewards.of(conditioner.seen[conditioner.names.index(name)].quantiles)
    targets = checked_targets(options.targets, training)
    column = reward_column(name, recipe.reward, only=len(conditioner.names) == 1)
    limit = trained.policy.context_length
    prompts = prompts_to_score(recipe, options, trained.tokenizer, limit=limit, taken=conditioner.width)
    base = base_model(recipe) if (Path(options.source) / "recipe.yaml").is_file() else None

    def complete(asked: Sequence[float], n: int, collect: int) -> dict[str, list[Any]]:
        rows = [prompt for prompt in prompts for _ in range(n)]
        each = [target for target in asked for _ in range(n)]
        evaluation = reward_evaluation(
            trained.policy,
            trained.tokenizer,
            trained.sampler,
            base,
            recipe,
            rows,
            harness,
            lambda given: told(given, each, conditioner, name),
        )
        return evaluation(0, collect=collect)[1]

    seed = recipe.seed
    samples, sampled = sweep(
        complete, targets, training, prompts=len(prompts), n=options.samples_per_prompt, column=column, seed=seed
    )
    result = steerability(samples, training, seed=seed)
    out = console()
    show(out, name, result)
    record = SweepRecord(name=name, result=result, samples=samples, sampled=sampled, training=training)
    written = write_sweep(folder, record)
    out.print(f"written: {len(written)} files in {folder}", soft_wrap=True)


def _folder(options: Options) -> Path:
    if options.out is not None:
        if options.out.suffix in (".parquet", ".json", ".csv") or options.out.is_file():
            raise ConfigError(f"--out {options.out}: with --steerability, name a folder to write into")
        return options.out
    if not Path(options.source).is_dir():
        raise ConfigError(f"{options.source} is no folder to write into; name one: --out FOLDER")
    return Path(options.source) / "steerability"


def target_name(given: str | None, conditioner: Conditioner) -> str:
    """Which reward to ask for.

    Raises:
        ConfigError: the model does not know it, or knows several and none was named.
    """
    names = ", ".join(conditioner.names)
    if given is None:
        if len(conditioner.names) > 1:
            raise ConfigError(f"the model knows several rewards, {names}; say which to ask for: --target-name NAME")
        return conditioner.names[0]
    if given not in conditioner.names:
        raise ConfigError(f"the model knows no reward {given!r} (--target-name); it was trained on: {names}")
    return given


def checked_targets(given: Sequence[float], training: TrainingRewards) -> list[float]:
    """What to ask for, ascending.

    Raises:
        ConfigError: one is not finite or given twice, or fewer than two lie within the training range.
    """
    if not given:
        return default_targets(training)
    targets = sorted(given)
    if not all(math.isfinite(target) for target in targets):
        raise ConfigError("--targets must be finite numbers, in the reward's own units")
    if len(set(targets)) < len(targets):
        raise ConfigError("--targets names a number twice; for more completions of each use --samples-per-prompt")
    if sum(training.includes(target) for target in targets) < 2:
        raise ConfigError(
            "--targets needs at least two numbers within the rewards that the model was trained on, "
            f"{training.low:.4g} to {training.high:.4g}"
        )
    return targets


def reward_column(name: str, reward: RewardConfig, *, only: bool) -> str:
    """The column of an evaluation's table in which the reward of that name is.

    Args:
        only: whether the model knows no other; then a reward of one term is taken for it, whatever the term's name.

    Raises:
        ConfigError: the reward has several terms, and none of that name.
    """
    if name in reward.terms and name != "reward":
        return f"reward/{name}"
    if name == "reward" or (only and len(reward.terms) == 1):
        return "reward"
    raise ConfigError(
        f"the reward has no term {name!r} to measure what is achieved (its terms are {', '.join(reward.terms)}); name "
        "the one that the training rewards came from: --reward NAME"
    )


def told(prompts: Sequence[Prompt], targets: Sequence[float], conditioner: Conditioner, name: str) -> list[Prompt]:
    """The prompts, each asking for its target of one reward; the others stay open."""
    prefixes = [conditioner.prefix({name: target}, warn=False) for target in targets]
    return [
        replace(prompt, ids=conditioner.apply(prompt.ids, prefix))
        for prompt, prefix in zip(prompts, prefixes, strict=True)
    ]


# Sampling -------------------------------------------------------------------------------------------------------------


def sweep(
    complete: Complete,
    targets: Sequence[float],
    training: TrainingRewards,
    *,
    prompts: int,
    n: int,
    column: str,
    seed: int,
) -> tuple[Samples, Samples]:
    """Complete every prompt at every target, and once at a target drawn for it.

    Every target has randomness of its own: collect 1 is of the drawn targets, 2 and following of the others; number 0
    draws.

    Args:
        targets: what to ask for. prompts: how many there are. n: completions of each at each target.
        column: of the table, where the achieved reward is.

    Returns:
        The samples of the sweep, and those at targets drawn uniformly from the training range.
    """
    from rich.progress import track

    from tropism.rollouts.randomness import StreamKey

    key = StreamKey(seed=seed, purpose="evaluation")
    uniforms = key.uniforms(np.arange(prompts), np.zeros(prompts, dtype=np.int64))
    drawn = (training.low + uniforms * (training.high - training.low)).tolist()
    passes: list[tuple[list[float], int]] = [(drawn, 1), *(([target] * prompts, n) for target in targets)]
    errors = console(stderr=True)
    parts = [
        _samples(complete(asked, count, collect), asked, count, column)
        for collect, (asked, count) in enumerate(
            track(passes, "completing", console=errors, transient=True, disable=not errors.is_terminal), start=1
        )
    ]
    return Samples.concat(parts[1:]), parts[0]


def _samples(table: dict[str, list[Any]], asked: Sequence[float], n: int, column: str) -> Samples:
    return Samples(
        prompts=tuple(table["prompt"]),
        completions=tuple(table["completion"]),
        prompt_indices=np.repeat(np.arange(len(asked)), n),
        targets=np.repeat(np.array(asked, dtype=np.float64), n),
        achieved=np.array(table[column], dtype=np.float64),
        sequence_kl=np.array(table["sequence_kl"], dtype=np.float64),
    )


# Printing -------------------------------------------------------------------------------------------------------------


def show(out: Console, name: str, result: Steerability) -> None:
    """The table of targets, the numbers, and what they say."""
    title = f"{printable(name)}: {result.prompts} prompts, 95 % intervals over prompts"
    table = RichTable(title=title, title_justify="left")
    for label in ("asked for", "achieved", "single", "KL", "training near"):
        table.add_column(label, justify="right", no_wrap=True)
    for one in result.targets:
        table.add_row(
            f"{one.target:.3g}" + ("" if one.in_range else " (beyond)"),
            _with_bounds(one.achieved),
            f"± {one.std:.3g}",
            f"{one.sequence_kl.mean:.2f}",
            f"{one.coverage:.1%}",
        )
    out.print(table)
    numbers = RichTable.grid(padding=(0, 2))
    for label, interval in number_rows(result):
        numbers.add_row(f"  {label}", _with_bounds(interval))
    out.print(numbers)
    out.print()
    for line in verdict(name, result):
        out.print(printable(line), soft_wrap=True)
    out.print()


def number_rows(result: Steerability) -> list[tuple[str, Interval]]:
    """Label and value of every number that is about all targets within the training range."""
    return [
        ("Spearman, means of targets", result.spearman),
        ("Spearman, single completions", result.spearman_samples),
        ("slope", result.slope),
        ("intercept", result.intercept),
        ("calibration error, mean", result.calibration_error),
        ("calibration error, root mean square", result.calibration_rms),
        ("high-low gap", result.gap),
        ("high-low gap / spread of training", result.gap_share),
        ("prompts that follow", result.control_share),
        ("prompts' own Spearman, mean", result.control_mean),
        ("sequence KL to the base model", result.sequence_kl),
    ]


def _with_bounds(interval: Interval) -> str:
    if not math.isfinite(interval.mean):
        return "-"
    return f"{interval.mean:.3g}" + (f" [{interval.low:.3g}, {interval.high:.3g}]" if interval.known else "")


def verdict(name: str, result: Steerability) -> list[str]:
    """What the numbers say, in sentences."""
    inside = [one for one in result.targets if one.in_range and one.count]
    low, high = inside[0].target, inside[-1].target
    asked = f"asked for {high:.3g} instead of {low:.3g}"
    moved = f"the mean {name} {'rises' if result.gap.mean >= 0 else 'falls'} by {abs(result.gap.mean):.3g}"
    share = f"{result.gap_share.mean:.0%} of the distance between the 5th and 95th percentile of training"
    if result.slope.known and result.slope.low > 0 and result.gap.mean > 0:
        how = "It follows" if result.gap_share.mean >= CLEAR else "It follows, but weakly"
        lines = [f"{how}: {asked}, {moved}, {share}."]
    elif result.slope.known and result.slope.high < 0 and result.gap.mean < 0:
        lines = [f"It goes the wrong way: {asked}, {moved}."]
    else:
        lines = [f"It cannot be said to follow: {asked}, {moved}, which may be chance with {result.prompts} prompts."]
    if math.isfinite(result.spearman.mean):
        order = "In between, more is given where more is asked for"
        order = order if result.spearman.mean >= 0.95 else "In between, the order is not always the one asked for"
        lines.append(f"{order} (Spearman {result.spearman.mean:.2f}).")
    lines.append(
        f"A target is missed by {result.calibration_error.mean:.3g} on average; for each unit that is asked for, the "
        f"reward moves by {result.slope.mean:.2f}. {result.control_share.mean:.0%} of the prompts follow by themselves."
    )
    lines += [_beyond(one, low if one.side == "below" else high) for one in result.beyond]
    thin = [f"{one.target:.3g}" for one in inside if one.coverage < THIN]
    if thin:
        near = f"Few training rewards (under {THIN:.1%}) lie near {', '.join(thin)}"
        lines.append(f"{near}: a bad fit there is no surprise.")
    if result.unscored:
        lines.append(f"{result.unscored} of {result.samples} completions are unscored and left out.")
    return lines


def _beyond(one: Beyond, edge: float) -> str:
    start = f"Asked for {one.target:.3g}, {one.side} all that it was trained on, it gives {one.achieved.mean:.3g}"
    if one.moves_on:
        return f"{start}: it goes on moving, by {one.further.mean:.3g} from what it gives at {edge:.3g}."
    if one.further.high < 0:
        return f"{start}: it turns back, by {-one.further.mean:.3g} from what it gives at {edge:.3g}."
    return f"{start}: no further than at {edge:.3g}, as far as these prompts can tell."
