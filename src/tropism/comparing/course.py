"""The course of a comparison: pools and cells, each in a process of its own, all of it resumable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tropism.comparing.cell import CellJob, write_job
from tropism.comparing.config import BASE, CompareConfig
from tropism.comparing.costs import Cost, pool_cost
from tropism.comparing.forms import form_of, write_form
from tropism.comparing.identity import (
    PLAN,
    check_identity,
    identity_of,
    is_begun,
    merged_plan,
    plan_of,
    read_identity,
    write_identity,
)
from tropism.comparing.outcome import add_wall, cell_name, is_finished, write_cell, write_failure
from tropism.comparing.plan import (
    GROUP,
    MethodPlan,
    Spending,
    check_code,
    method_plans,
    notes_of,
    shared_recipe,
    spendings,
)
from tropism.comparing.pool import PoolFacts, facts_of, read_pool
from tropism.comparing.prompts import (
    ComparedPrompts,
    context_length_of,
    file_of_prompts,
    taken_by,
    write_prompts,
)
from tropism.comparing.tasks import Task, fail, run_tasks
from tropism.config import Recipe
from tropism.data.config import DataConfig
from tropism.data.readers import require_there
from tropism.errors import ConfigError, TropismError
from tropism.models.loading import ModelConfig
from tropism.redaction import find_secret, redact
from tropism.safe_yaml import read_yaml
from tropism.schema import dump_yaml, to_plain
from tropism.storage import append_whole, write_whole, writing
from tropism.sweeps.work import CHILD as RUN_CHILD
from tropism.sweeps.work import Ended, Halt, Job, execute, reason_in, run_process
from tropism.tokenizer_of import tokenizer_of
from tropism.training.run_lock import RunLock

CHILD = "tropism.comparing.child"
ANY_METRIC = "optim/lr"
"""A metric that every run has, by which it is seen that it trained."""
POOL = "pool "
"""Begins the names of tasks that sample one."""
FOLDERS = ("cells", "pools", "logs", "recipes")


class Course:
    """A comparison and its folder.

    Args:
        config: what is compared.
        mapping: the recipe's plain values.
        folder: of the comparison; one that was interrupted goes on.
        processes: cells that are worked on at once.
        allow_code: let the reward name code.
        say: told one line per cell.

    Raises:
        TropismError: what is wrong with the recipe, the prompts or a method, before anything is sampled or written.
    """

    def __init__(
        self,
        config: CompareConfig,
        mapping: Mapping[str, Any],
        folder: Path,
        *,
        processes: int = 1,
        allow_code: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if processes < 1:
            raise ConfigError(f"processes must be at least 1, got {processes}")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError("tropism compare starts its processes by itself: call it without a launcher")
        found = find_secret(dict(mapping))
        if found is not None:
            raise ConfigError(f"{found[0]} looks like {found[1]}. Recipes are written into folders: take it out")
        self.config, self.mapping, self.folder = config, dict(mapping), folder.absolute()
        self.processes, self.allow_code, self.say = processes, allow_code, say
        self.recipe = shared_recipe(mapping)
        self.plans = method_plans(config, mapping)
        check_code(self.recipe, allow_code=allow_code)
        self.spending: dict[str, Spending] = {}
        if config.completions is not None:
            self.spending = spendings(self.plans, config, config.completions)
        for data in (self.recipe.data, self.recipe.eval_data):
            require_there(data)
        self.halt = Halt()

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.model_name)

    @property
    def model_name(self) -> str:
        model = self.recipe.model
        return model.name if isinstance(model, ModelConfig) else str(model)

    @cached_property
    def taken(self) -> int:
        """Tokens that some method needs before every prompt: all get prompts that leave room for them."""
        return max(0, *(taken_by(plan.recipe, self.tokenizer) for plan in self.plans if plan.recipe is not None), 0)

    @cached_property
    def prompts(self) -> ComparedPrompts:
        """Of all cells, read once before anything is sampled.

        Raises:
            TropismError: unusable data, or prompts that some method could not be given.
        """
        length = context_length_of(self.model_name)
        read = ComparedPrompts.read(self.recipe, self.tokenizer, context_length=length, taken=self.taken)
        if any(plan.form for plan in self.plans):
            names = ", ".join(plan.method for plan in self.plans if plan.form)
            read.refuse_prepared(self.tokenizer, f"leave it out, or compare methods without {names}")
        elif self.parted:
            read.refuse_prepared(self.tokenizer, "leave it out, or give eval_data instead of data.eval_fraction")
        return read

    @property
    def parted(self) -> bool:
        """Whether the held-out prompts are a part of the data, which runs of other seeds would part otherwise."""
        return self.recipe.eval_data is None

    @property
    def training_file(self) -> Path:
        """The training prompts, where they are parted; held-out.jsonl stands beside it."""
        return self.folder / "prompts" / "training.jsonl"

    # The course ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, str]:
        """Do all that is left; returns the reason of every cell that failed.

        Raises:
            KeyboardInterrupt: after a signal; the next call goes on.
            TropismError: the folder holds something else, or something cannot be written.
        """
        lock, untried = self._open(), dict[str, str]()
        try:
            if self.config.seconds is not None:
                from tropism.comparing.trials import spendings_by_time

                self.spending, untried = spendings_by_time(self)
            failed = run_tasks(self._tasks(untried), processes=self.processes, halt=self.halt)
            return {name: reason for name, reason in failed.items() if not name.startswith(POOL)}
        finally:
            lock.release()

    def _tasks(self, untried: Mapping[str, str]) -> list[Task]:
        """Pools first, since others wait for them; then the cells that are not finished.

        Args:
            untried: why the trials of methods failed whose budget is therefore not known.
        """
        tasks, pools = [], dict[str, Task]()
        for seed in self.config.seeds:
            for plan in [MethodPlan(method=BASE, recipe=None), *self.plans]:
                if is_finished(self.cell_folder(plan.method, seed)):
                    self.say(f"{cell_name(plan.method, seed)}: done before")
                    continue
                needs, name = None, cell_name(plan.method, seed)
                act, lost = partial(self._do_cell, plan, seed), partial(self._lose, plan, seed)
                if plan.method in untried:
                    act = partial(fail, untried[plan.method])
                elif plan.form is not None:
                    path, size = self._pool_of(plan, seed)
                    needs = f"{POOL}{path.stem}"
                    pools[needs] = Task(name=needs, act=partial(self._sample_pool, path, size, seed))
                tasks.append(Task(name=name, act=act, needs=needs, lost=lost))
        return [*pools.values(), *tasks]

    # Pools -----------------------------------------------------------------------------------------------------------

    def _pool_of(self, plan: MethodPlan, seed: int) -> tuple[Path, int]:
        """The file of the pool that a method learns from, and how many completions it holds.

        With a budget of completions it is one for all methods of a seed; with one of seconds each has its own.
        """
        if self.config.completions is not None:
            return self.folder / "pools" / f"seed{seed}.jsonl", self.config.completions // GROUP * GROUP
        return self.folder / "pools" / f"{plan.method}-seed{seed}.jsonl", self.spending[plan.method].pool

    def pool_facts(self, size: int, seed: int) -> PoolFacts:
        return facts_of(self.recipe, self.prompts.training, completions=size, seed=seed)

    def _sample_pool(self, path: Path, size: int, seed: int) -> None:
        if read_pool(path, self.pool_facts(size, seed)) is not None:
            return
        self.sample_pool(path, size, seed)
        self.say(f"pool of seed {seed}: {size:,} completions")

    def sample_pool(self, path: Path, size: int, seed: int) -> None:
        """Sample a pool in a process of its own.

        Raises:
            TropismError: with the reason.
        """
        job = {
            "pool": str(path),
            "recipe": self.plain_recipe,
            "completions": size,
            "seed": seed,
            "allow_code": self.allow_code,
            "taken": self.taken,
        }
        place, log = self.folder / "recipes" / f"pool-{path.stem}.json", self.folder / "logs" / f"pool-{path.stem}.log"
        write_whole(place, json.dumps(job, indent=1).encode())
        self._run_child([CHILD, str(place)], log, f"the pool of seed {seed} could not be sampled")

    def _run_child(self, child: list[str], log: Path, failure: str) -> None:
        append_whole(log, f"$ {' '.join(child)}\n".encode())
        begin = log.stat().st_size
        code = run_process(child, log, os.getcwd(), self.environment, halt=self.halt)
        if code in (128 + 2, 128 + 15):
            raise KeyboardInterrupt
        if code != 0:
            raise TropismError(f"{failure}: {reason_in(log, begin, code)}")

    # Cells -----------------------------------------------------------------------------------------------------------

    def cell_folder(self, method: str, seed: int) -> Path:
        return self.folder / "cells" / cell_name(method, seed)

    def _do_cell(self, plan: MethodPlan, seed: int) -> None:
        """Train, choose and measure; a cell that was interrupted goes on."""
        folder, name = self.cell_folder(plan.method, seed), cell_name(plan.method, seed)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        pooled = Cost()
        began = time.monotonic()
        measured = folder / "measured.json"
        try:
            job = self._job(plan, seed)
            place = folder / "job.json"
            write_job(job, place)
            measured.unlink(missing_ok=True)
            if plan.recipe is None:
                self._run_child([CHILD, str(place)], self.folder / "logs" / f"{name}.log", "it could not be measured")
            else:
                recipe, pooled = self._recipe_of(plan, seed)
                ended = self.train(recipe, name, child=(CHILD, str(place)))
                if not measured.is_file():
                    raise TropismError(ended.reason or "it ended without a result; its log may say why")
        finally:
            add_wall(folder, time.monotonic() - began)
        facts = json.loads(measured.read_bytes())
        write_cell(folder, plan, seed, facts, pooled)
        mean = facts["reward"]
        self.say(f"{name}: done" + ("" if mean is None else f", mean reward {mean:.4g}"))

    def train(self, recipe: Recipe, name: str, *, child: tuple[str, ...] = (RUN_CHILD,)) -> Ended:
        """A run in a process of its own, or what is left of it.

        Args:
            child: the module of the process, and what it is told beside the run.
        """
        job = Job(
            run=str(recipe.run),
            recipe=recipe.to_yaml(),
            recipe_path=str(self.folder / "recipes" / f"{name}.yaml"),
            log=str(self.folder / "logs" / f"{name}.log"),
            working_directory=os.getcwd(),
            options=self.options,
            metric=ANY_METRIC,
            child=child,
            environment=tuple(self.environment.items()),
        )
        return execute(job, halt=self.halt)

    def _recipe_of(self, plan: MethodPlan, seed: int) -> tuple[Recipe, Cost]:
        """The recipe of a cell, and what its part of the pool cost."""
        assert plan.recipe is not None
        folder, spend = self.cell_folder(plan.method, seed), self.spending[plan.method]
        changes: dict[str, Any] = {"seed": seed, "run": str(folder / "run")}
        if plan.form is None:
            assert spend.steps is not None
            if self.parted:
                changes["data"] = file_of_prompts(self.training_file)
                if plan.recipe.trainer.evaluation.every is not None:
                    changes["eval_data"] = file_of_prompts(self.training_file.with_name("held-out.jsonl"))
            return replace(plan.recipe, total_steps=spend.steps, **changes), Cost()
        path, size = self._pool_of(plan, seed)
        rows = read_pool(path, self.pool_facts(size, seed))
        if rows is None:
            raise TropismError(f"{path} is not there any more; start the same command again")
        part = rows[: spend.pool]
        records = form_of(part, plan.form, keep=plan.keep, where=f"the pool of seed {seed}")
        steps = max(1, -(-plan.epochs * len(records) // plan.recipe.prompts_per_step))
        data: DataConfig = write_form(records, folder / "data.jsonl")
        return replace(plan.recipe, total_steps=steps, data=data, **changes), pool_cost(part)

    def _job(self, plan: MethodPlan, seed: int) -> CellJob:
        spend = self.spending.get(plan.method, Spending())
        return CellJob(
            recipe=self.plain_recipe,
            method=plan.method,
            seed=seed,
            folder=str(self.cell_folder(plan.method, seed)),
            samples_per_prompt=self.config.samples_per_prompt,
            best_of=plan.best_of,
            beta=plan.beta,
            choice=asdict(self.config.choice) if plan.choices else {},
            to_choose=spend.per_choice * spend.choices,
            taken=self.taken,
            allow_code=self.allow_code,
        )

    def _lose(self, plan: MethodPlan, seed: int, reason: str) -> None:
        write_failure(self.cell_folder(plan.method, seed), plan, seed, redact(reason))
        self.say(f"{cell_name(plan.method, seed)}: failed: {redact(reason)}")

    # What processes are told -----------------------------------------------------------------------------------------

    @cached_property
    def plain_recipe(self) -> dict[str, Any]:
        """The shared recipe as plain values; beta is for ilql when it is measured, and nothing else has Q heads."""
        without = replace(self.recipe, sampling=replace(self.recipe.sampling, beta=0.0))
        shared = {**to_plain(without), "run": None, "total_steps": 1, "normalise": None}
        return {**shared, "algorithm": {"name": self.recipe.algorithm.name}}

    @property
    def environment(self) -> dict[str, str]:
        """Threads of each process, where nobody has said how many: the processors are shared."""
        if "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.processes))}

    @property
    def options(self) -> tuple[str, ...]:
        """What every run's ``tropism train`` is called with."""
        trusted = isinstance(self.recipe.model, ModelConfig) and self.recipe.model.trust_remote_code
        return (
            *(["--allow-code"] if self.allow_code else []),
            *(["--model.trust_remote_code", "true"] if trusted else []),
        )

    # The folder ------------------------------------------------------------------------------------------------------

    def _open(self) -> RunLock:
        """Make the folder, or see that it holds this comparison; the lock is held then."""
        folder, prompts = self.folder, self.prompts
        there = is_begun(folder)
        with writing(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = RunLock(folder)
        lock.acquire()
        try:
            before = read_identity(folder)
            plan, identity = plan_of(self.config, self.recipe, self.mapping), identity_of(self.recipe, prompts, before)
            if there:
                plan = merged_plan(folder, read_yaml(folder / PLAN), plan)
                check_identity(folder, before, identity)
            self._write_head(plan, identity, prompts)
        except BaseException:
            lock.release()
            raise
        return lock

    def _write_head(self, plan: Mapping[str, Any], identity: Mapping[str, Any], prompts: ComparedPrompts) -> None:
        with writing(self.folder):
            for name in FOLDERS:
                (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        if self.parted:
            write_prompts(prompts.training, self.training_file)
            write_prompts(prompts.held_out, self.training_file.with_name("held-out.jsonl"))
        write_whole(self.folder / "notes.json", json.dumps(self.notes, indent=1).encode())
        write_identity(self.folder, identity)
        write_whole(self.folder / PLAN, redact(dump_yaml(plan)).encode())

    @property
    def notes(self) -> list[str]:
        """What has to be known of all results."""
        return [*notes_of(self.recipe, self.plans), *self.prompts.notes]
