"""A budget of seconds: a short trial of every method says how many completions it manages in them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.comparing.costs import pool_cost, seconds_per_step
from tropism.comparing.forms import form_of, write_form
from tropism.comparing.identity import read_identity
from tropism.comparing.plan import MethodPlan, Spending, spending
from tropism.comparing.pool import facts_path, read_pool
from tropism.comparing.prompts import file_of_prompts
from tropism.data.order import fingerprint
from tropism.errors import StorageError, TropismError
from tropism.storage import write_whole, writing

if TYPE_CHECKING:
    from tropism.comparing.course import Course

POOLED = 128
"""Completions of the pool by which its speed is measured."""
UPDATES = 5
"""Steps of a trial of a method that learns from the pool."""
GUIDED = 2.0
"""How much longer a completion takes with guidance, which decodes two streams."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of each completion of a method's budget."""

    completion: float
    """That it samples itself, its share of a step's updates included; or of the pool, with what it learns from it."""
    choice: float
    """By which a target is chosen."""


def spendings_by_time(course: Course) -> tuple[dict[str, Spending], dict[str, str]]:
    """What each method does in the seconds of the budget, and why the trials of some failed.

    A trial is noted with the seconds, what the comparison is of, and the method's settings, and is taken over only
    where all of these are equal. Once a cell or pool of a method exists, its budget stays what it was.
    """
    found: dict[str, Spending] = {}
    failed: dict[str, str] = {}
    for plan in course.plans:
        if plan.recipe is None:
            found[plan.method] = Spending()
            continue
        kept = _kept(course, plan)
        if kept is not None:
            found[plan.method] = kept
            continue
        try:
            rates = _rates(course, plan)
            completions = budget_of(
                rates, plan, seconds=float(course.config.seconds or 0), share=course.config.choice.share
            )
            found[plan.method] = spending(plan, course.config, completions, exact=False)
            write_whole(_spent(course, plan), json.dumps(asdict(found[plan.method]), indent=1).encode())
            course.say(
                f"{plan.method}: {found[plan.method].completions:,} completions in {course.config.seconds:g} seconds"
            )
        except TropismError as error:
            failed[plan.method] = f"its trial: {error}"
    return found, failed


def _spent(course: Course, plan: MethodPlan) -> Path:
    """Where the budget of a method is written down."""
    return course.folder / "trials" / f"{plan.method}.spending.json"


def _kept(course: Course, plan: MethodPlan) -> Spending | None:
    """The budget by which cells or pools of a method have been begun; None where there are none.

    Raises:
        StorageError: it cannot be read.
    """
    path = _spent(course, plan)
    begun = [one for name in ("cells", "pools") for one in (course.folder / name).glob(f"{plan.method}-seed*")]
    if not begun or not path.is_file():
        return None
    try:
        return Spending(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(
            f"{path} cannot be read ({error}): it says what the cells of {plan.method} may spend. Take it, {begun[0]} "
            "and all others of that method away to begin them anew"
        ) from error


def budget_of(rates: Rates, plan: MethodPlan, *, seconds: float, share: float) -> int:
    """Completions that fit into so many seconds.

    Args:
        share: of the completions by which a target is chosen, where the method has one.
    """
    kept = share if plan.choices else 0.0
    each = (1 - kept) * rates.completion + kept * rates.choice
    return int(seconds / each)


def _rates(course: Course, plan: MethodPlan) -> Rates:
    """Of an equal trial before, or of a new one."""
    path = course.folder / "trials" / f"{plan.method}.json"
    facts = _facts(course, plan)
    try:
        before = json.loads(path.read_bytes())
        if before["facts"] == facts:
            return Rates(**before["rates"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or a damaged one: it is made anew
    rates = _measured(course, plan)
    write_whole(path, json.dumps({"facts": facts, "rates": vars(rates)}, indent=1).encode())
    return rates


def _facts(course: Course, plan: MethodPlan) -> dict[str, Any]:
    assert plan.recipe is not None
    identity = {name: value for name, value in read_identity(course.folder).items() if name != "files"}
    settings: Mapping[str, Any] = course.config.methods[plan.method]
    return {
        "seconds": course.config.seconds,
        "comparison": fingerprint([identity, course.plain_recipe]),
        "settings": fingerprint([settings, plan.recipe.to_yaml()]),
        "processes": course.processes,
    }


def _measured(course: Course, plan: MethodPlan) -> Rates:
    assert plan.recipe is not None
    folder, seed = course.folder / "trials", course.config.seeds[0]
    with writing(folder):
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / plan.method, ignore_errors=True)
    pooled, rows = 0.0, []
    if plan.form is not None or plan.choices:
        rows = _pool(course, folder / "pool.jsonl", seed)
        pooled = pool_cost(rows).seconds / len(rows)
    changes: dict[str, Any] = {"seed": seed, "run": str(folder / plan.method / "run"), "eval_data": None, "metrics": {}}
    (folder / plan.method).mkdir(exist_ok=True)
    if plan.form is None:
        if course.parted:
            changes["data"] = file_of_prompts(course.training_file)
        # All steps but the first: a whole turn of one that samples and those that do not.
        steps = max(3, 1 + plan.every)
    else:
        records = form_of(rows, plan.form, keep=plan.keep, where="the pool of the trial")
        changes["data"], steps = write_form(records, folder / plan.method / "data.jsonl"), UPDATES
    recipe = replace(plan.recipe, total_steps=steps, **changes)
    ended = course.train(recipe, f"trial-{plan.method}")
    step = seconds_per_step(Path(str(recipe.run)))
    if ended.reason is not None or math.isnan(step):
        raise TropismError(ended.reason or "it logged no seconds of its steps")
    if plan.form is None:
        return Rates(completion=step * plan.every / plan.per_step, choice=GUIDED * pooled)
    updates = plan.epochs * len(records) / len(rows) / recipe.prompts_per_step
    return Rates(completion=pooled + step * updates, choice=GUIDED * pooled)


def _pool(course: Course, path: Path, seed: int) -> list[dict[str, Any]]:
    """A small pool, sampled once for all trials of a comparison."""
    try:
        rows = read_pool(path, course.pool_facts(POOLED, seed))
    except TropismError:  # of a comparison that this one has replaced
        path.unlink(missing_ok=True)
        facts_path(path).unlink(missing_ok=True)
        rows = None
    if rows is None:
        course.sample_pool(path, POOLED, seed)
        rows = read_pool(path)
    assert rows is not None
    return rows
