"""The composition root: from a recipe to a run that can be executed. The only place that wires things."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel

from tropism.config import Recipe, free_run, resume_command
from tropism.data.expected_records import expecting
from tropism.data.readers import require_there
from tropism.errors import ConfigError, TropismError
from tropism.evaluation.over_optimisation import StopAdvice
from tropism.evaluation.report import write_report
from tropism.generation import TextPolicy, save_policy
from tropism.gold_reward import measurements_of
from tropism.models.loading import LoadedModel
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.models.slot_checks import probe_slots
from tropism.recipe_evaluation import planned_evaluations
from tropism.recipe_identity import WatchedFacts, identity_of, note
from tropism.recipe_model import conditioner_of, policy_of
from tropism.recipe_processes import accelerator_for, prepared
from tropism.recipe_resumption import Resumption, device_name, export_of
from tropism.recipe_sources import RecipeSource
from tropism.redaction import redact
from tropism.result import Result
from tropism.reward_recipes import with_trained_rewards
from tropism.rewards import RewardHarness
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.transcribe import Transcriber
from tropism.training.finite import require_finite_weights
from tropism.training.interrupt import Interrupts
from tropism.training.memory import keep_freed_memory
from tropism.training.memory_facts import MemoryReport, memory_of_run, rows_of
from tropism.training.optimizer import build_optimizer, default_learning_rate
from tropism.training.preflight import preflight, sample_rows
from tropism.training.processes import Processes
from tropism.training.profiling import Profile
from tropism.training.rollout_maker import CompletionMaker, RolloutMaker
from tropism.training.run import Run
from tropism.training.run_folder import RunFolder
from tropism.training.scoring import ModelScorer
from tropism.training.trainer import Trainer

logger = logging.getLogger("tropism")

T = TypeVar("T")


def run_recipe(recipe: Recipe, *, resume: bool = False, allow_code: bool = False, profile: bool = False) -> Result:
    """Train by a recipe; reward models that it names by their own recipes are trained first.

    Args:
        resume: go on with the run in ``recipe.run`` from its newest complete checkpoint.
        allow_code: let the recipe name reward functions by ``module:function`` or ``file.py:function``.
        profile: record where the second step goes, in ``profile/`` of the run folder.

    Raises:
        TropismError: anything about the recipe, model, data or reward that cannot work, or that the run in the folder
            cannot go on with, before training starts.
        Interrupted: after a signal, with everything up to the last update saved.
    """
    recipe = with_trained_rewards(
        recipe, lambda first, goes_on: run_recipe(first, resume=goes_on, allow_code=allow_code)
    )
    interrupts = Interrupts()
    with interrupts.listening(), ExitStack() as opened:
        with interrupts.abandonable():  # nothing is written before the run begins
            assemble = assembly_for(recipe)
            assembled = assemble(recipe, resume=resume, allow_code=allow_code, interrupts=interrupts, opened=opened)
            if assembled.resumption is not None and assembled.resumption.finished:
                return assembled.finished_result(assembled.resumption)
            if profile:
                assembled.profile_a_step()
            assembled.check()
        if assembled.policy.device.type == "cpu":
            keep_freed_memory()
        assembled.run.execute(recipe.total_steps, resumed=assembled.checkpoint)
    assembled.processes.accelerator.end_training()
    return assembled.result()


def assembly_for(recipe: Recipe) -> type[Assembly]:
    """What builds the run of a recipe."""
    if recipe.algorithm.reads != "comparisons":
        return Assembly
    from tropism.build_reward_model import RewardModelAssembly

    return RewardModelAssembly


class Assembly:
    """Everything a recipe needs, built and connected.

    Args:
        opened: closes the workers of the reward when it ends, also where something else cannot be built.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        resume: bool = False,
        allow_code: bool = False,
        interrupts: Interrupts | None = None,
        opened: ExitStack | None = None,
    ) -> None:
        if resume and recipe.run is None:
            raise ConfigError("to resume, name the run: run='runs/<name>' (tropism train --resume runs/<name>)")
        self.recipe = recipe
        for data in (recipe.data, recipe.eval_data):
            require_there(data)
        config = recipe.algorithm
        self.processes = Processes(accelerator_for(recipe), interrupts)
        self.processes.leave_talking_to_main()
        self.harness = None if recipe.reward is None else RewardHarness(recipe.reward, allow_code=allow_code)
        if self.harness is not None and opened is not None:
            opened.callback(self.harness.close)
        self.metrics = measurements_of(recipe.metrics, recipe.trainer.evaluation.gold, allow_code=allow_code)
        if self.metrics is not None and opened is not None:
            opened.callback(self.metrics.close)
        path = Path(recipe.run) if recipe.run else free_run(config.name)
        path = Path(self.processes.from_main(str(path)))
        self.folder = _open_folder(path, self.processes, resume=resume)
        device = self.processes.accelerator.device
        self.resumption = Resumption(self.folder.path, recipe, device=device) if resume else None
        self.checkpoint = None if self.resumption is None else self.resumption.checkpoint
        self.loaded, self.policy = self._load()
        require_finite_weights(self.policy)
        self.reference = self._build_reference()
        if config.needs_exact_kl and self.reference is not None:
            self.policy.reference_logits = self.reference.projection()
        self.identity = identity_of(self.policy, self.reference, recipe.reward, recipe.trainer.evaluation.gold)
        self.conditioner = conditioner_of(recipe, self.loaded)
        self.facts = WatchedFacts(
            total_steps=recipe.total_steps,
            max_new_tokens=recipe.sampling.max_new_tokens,
            conditioner=self.conditioner,
        )
        self.algorithm: Any = config.build(self.facts)
        self.transcriber = Transcriber(self.loaded.tokenizer, recipe.sampling.stop)
        self.scorer = self._scorer(lambda: nullcontext(self.policy))
        self.reference_scorer = None if self.reference is None else self._scorer(self.reference.active)
        self.run = Run(
            folder=self.folder,
            config=recipe.trainer,
            processes=self.processes,
            policy=self.policy,
            evaluations=[],
            export=self._export,
            begin=self._write_head,
            conclude=self._conclude,
            identity=self._identity,
            command=resume_command(self.folder.path, allow_code=allow_code),
        )
        self._connect()

    def _connect(self) -> None:
        """Data, trainer and run to each other, and to the checkpoint to go on from."""
        recipe, completes = self.recipe, self.harness is not None or self.metrics is not None
        with expecting(recipe.algorithm, recipe.data, recipe.eval_data, completes=completes):
            data = self._recipe_source()
            source = data.make()
        self.trainer = self._build_trainer(source)
        self.prompts, self.maker, self.answers = data.prompts, data.maker, data.answers
        self.run.evaluations.extend(data.evaluations)
        if recipe.trainer.evaluation.gold is not None:
            self.run.advise = StopAdvice(self.folder.path, planned=planned_evaluations(recipe))
        self.identity["held_out"].extend(data.held_out)
        self.run.attach(self.trainer)
        if self.harness is not None:
            self.harness.on_progress = lambda done, total: self.run.display.scoring(done, total)
        if self.resumption is not None:
            self._compare(self.resumption)

    # Model -----------------------------------------------------------------------------------------------------------

    def _load(self) -> tuple[LoadedModel, Policy]:
        """What is trained, and what it came from."""
        return policy_of(self.recipe)

    def _build_reference(self) -> Reference | None:
        """A reference where the method needs it, or where it costs nothing (adapters switched off)."""
        adapted = isinstance(self.loaded.model, PeftModel)
        # Evaluation by a reward reports the KL that was paid, whatever the method needs itself.
        evaluates = self.harness is not None and self.recipe.algorithm.reads != "demonstrations"
        needed = self.recipe.algorithm.needs_reference or evaluates
        return Reference(self.policy) if needed or adapted else None

    def _scorer(self, active: Any) -> ModelScorer:
        trainer = self.recipe.trainer
        return ModelScorer(
            active, self.processes, max_tokens=2 * trainer.micro_batch_tokens, max_rows=trainer.micro_batch_size
        )

    def _build_trainer(self, source: Any) -> Trainer:
        trainer = self.recipe.trainer
        weights = sum(p.numel() for p in self.policy.model.parameters())
        adapters = isinstance(self.loaded.model, PeftModel)
        rate = trainer.learning_rate or default_learning_rate(weights, adapters=adapters)
        wrapped = prepared(self.policy, self.reference, self.processes.accelerator)
        return Trainer(
            policy=wrapped,
            algorithm=self.algorithm,
            source=source,
            optimizer=build_optimizer(self.policy, trainer, head_rate=self.recipe.algorithm.head_rate),
            config=trainer,
            processes=self.processes,
            learning_rate=rate,
            device=self.policy.device,
            after_update=self.run.after_update,
        )

    # Data ------------------------------------------------------------------------------------------------------------

    def _recipe_source(self) -> RecipeSource:
        recipe = self.recipe
        samples: dict[str, Any] = {
            "sampler": EmbeddedSampler(self.loaded.tokenizer, self.loaded.tokens.eos_ids),
            "sampling": recipe.sampling,
            "transcribe": self.transcriber,
            "policy": self.policy,
            "processes": self.processes,
            "seed": recipe.seed,
        }
        return RecipeSource(
            recipe=recipe,
            loaded=self.loaded,
            policy=self.policy,
            algorithm=self.algorithm,
            conditioner=self.conditioner,
            maker=None if self.harness is None else RolloutMaker(harness=self.harness, **samples),
            unscored=None if self.metrics is None else CompletionMaker(**samples),
            metrics=self.metrics,
            scorer=self.scorer,
            reference=self.reference_scorer,
            exact=self.exact,
            on_collect=self.run.on_collect,
        )

    @property
    def exact(self) -> bool:
        """Whether everything computes in fp32."""
        return self.processes.accelerator.mixed_precision == "no" and self.policy.dtype == torch.float32

    # Before and after ------------------------------------------------------------------------------------------------

    def profile_a_step(self) -> None:
        """Let the run profile the second of the whole steps before it.

        Raises:
            ConfigError: it has fewer than two.
        """
        done = 0
        if self.checkpoint is not None:
            done = self.checkpoint.state["counts"]["steps"] + self.checkpoint.collecting
        profile = Profile(self.folder.path / "profile", left=self.recipe.total_steps - done)
        if self.processes.is_main:
            self.run.profile = profile

    @cached_property
    def memory(self) -> MemoryReport:
        """What the run will need of each device, and what there is before it begins."""
        recipe = self.recipe
        source: Any = self.trainer.source
        rows = rows_of(
            self.prompts if recipe.algorithm.reads == "prompts" else source.stream.items,
            recipe.algorithm,
            recipe.sampling,
            prompts_per_step=recipe.prompts_per_step,
            held_out=max((len(evaluation) for evaluation in self.run.evaluations), default=0),  # type: ignore[arg-type]
            before=0 if self.conditioner is None else self.conditioner.width,
        )
        return memory_of_run(self.policy, self.reference, rows, recipe.trainer, self.processes)

    def check(self) -> None:
        """Memory, the dry call of the reward, and the pre-flight checks on a few real prompts."""
        self.memory.check(tell=self.processes.is_main)
        probe_slots(self.policy, self.conditioner)
        if self.answers is None:
            return
        if not self.prompts:
            logger.warning("no text leaves room for a completion beside it, so the reward was not tried on any")
            return
        recipe, accelerator = self.recipe, self.processes.accelerator
        with self.policy.whole(), accelerator.autocast():
            chosen, rollouts = sample_rows(
                self.policy, self.answers.sampler, self.prompts, sampling=recipe.sampling, seed=recipe.seed
            )
            inputs = self.transcriber(rollouts.to("cpu"), chosen, {"step": 0})
            if self.maker is not None:
                self.maker.harness.dry_call(inputs)
            if self.metrics is not None:
                self.metrics.evaluate(inputs)
            if recipe.trainer.preflight:
                report = preflight(
                    self.policy,
                    self.reference,
                    rollouts,
                    exact=self.exact,
                    fresh=self.checkpoint is None,
                    eos_ids=self.loaded.tokens.eos_ids,
                )
                logger.info("pre-flight: %s", report)

    def _conclude(self) -> None:
        """What all processes do once training is over, before the export."""

    def _write_head(self) -> None:
        """The first files of the run folder; only here, so that what fails before training leaves nothing behind."""
        if self.processes.is_main:
            self.folder.create()
            self._write_facts()
        if self.recipe.trainer.tracking:
            recipe = redact(self.recipe.to_yaml())
            self.processes.accelerator.init_trackers(self.folder.path.name, config={"recipe": recipe})

    def _write_facts(self) -> None:
        """Recipe and environment of a new run; of a resumed one what differs."""
        if self.resumption is None or self.resumption.write():
            self.folder.write_recipe(self.recipe.to_yaml())
        if self.resumption is None:
            self.folder.write_environment(
                {
                    "device": device_name(self.policy.device),
                    "processes": self.processes.count,
                    "learning_rate": self.trainer.learning_rate,
                    "trained_weights": sum(p.numel() for p in self.policy.parameters() if p.requires_grad),
                    "memory": self.memory.facts(),
                }
            )
        for line in self.resumption.lines if self.resumption else ():
            self.run.display.say(line)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint presumes that it does not hold."""
        before = self.resumption is not None and self.resumption.total_steps_read
        return {**self.identity, "total_steps_read": before or self.facts.total_steps_read}

    def _compare(self, resumption: Resumption) -> None:
        """Whether everything that was loaded is what the run began with, before anything is checked or written.

        Raises:
            TropismError: the run cannot go on with it.
        """
        resumption.compare(self.identity, device=self.policy.device, processes=self.processes.count)
        saved, source = resumption.checkpoint, self.trainer.source
        source.load_state_dict(saved.state["source"], saved.tensors["batch"])  # type: ignore[attr-defined]

    def finished_result(self, resumption: Resumption) -> Result:
        """The result of a finished run, of which nothing is written anew."""
        self.run.take_up(resumption.checkpoint)
        self.run.take_best()
        self.policy.gather()
        if self.processes.is_main:
            self.run.display.say(resumption.end)
        return self.result()

    def _export(self) -> None:
        """The trained model as a plain Hugging Face folder, and the report."""
        save_policy(self.policy, self.loaded.tokenizer, self.conditioner, self.folder.path / "model")
        write_report(self.folder.path)
        note(self.folder.path, exported=export_of(self.trainer.state_dict()))

    def result(self) -> Result:
        return Result(
            trained=TextPolicy(self.policy, self.loaded, self.recipe.sampling, conditioner=self.conditioner),
            metrics=dict(self.run.recent),
            path=self.folder.path,
        )


def _open_folder(path: Path, processes: Processes, *, resume: bool) -> RunFolder:
    """The first process looks whether the folder may be used, for all of them."""
    return _by_main(processes, lambda: RunFolder(path, resume=resume)) or RunFolder.existing(path)


def _by_main(processes: Processes, action: Callable[[], T]) -> T | None:
    """What the first process does for all; if that fails, it fails on every process."""
    result: T | None = None
    problem: TropismError | None = None
    if processes.is_main:
        try:
            result = action()
        except TropismError as error:
            problem = error
    problem = processes.from_main(problem)
    if problem is not None:
        raise problem
    return result
