"""One cell of a comparison: what its process does once anything is trained, choosing a target and measuring."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.comparing.config import BASE, BEST_OF, Choice, family_of
from tropism.comparing.plan import filters_of
from tropism.comparing.pool import scores_of
from tropism.comparing.prompts import ComparedPrompts
from tropism.config import Recipe
from tropism.errors import DataError
from tropism.evaluation.best_of import best_of_kl
from tropism.evaluation.result_files import without_nan
from tropism.generation import policy_with_slots
from tropism.metric_functions import MetricFunctions
from tropism.models.loading import LoadedModel, ModelConfig, load_model
from tropism.models.policy import Policy
from tropism.ops import kl_k1
from tropism.recipe_processes import accelerator_for
from tropism.rewards import RewardHarness
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.guidance import RewardGuidance
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.storage import write_whole, writing
from tropism.targets.conditioner import Conditioner, Targets
from tropism.training.processes import Processes
from tropism.training.run_folder import as_text
from tropism.training.scoring import ModelScorer
from tropism.types import Prompt, RewardBatch, RewardInputs, Rollouts, pad_rows

SAMPLES, CELL, CHOICE = "samples.parquet", "cell.json", "choice.json"
K1, K1_GUIDED, BOUND = "k1", "k1 of the guided distribution", "bound ln n - (n-1)/n"
K1_FILTERED = "k1 of the filtered distribution"
TARGET_SHARES = (0.90, 0.98, 1.0)
"""Of the rewards that a model learned from: the quantiles that are asked for where the settings list no targets."""

Table = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class CellJob:
    """What a cell's process is told, as plain values."""

    recipe: dict[str, Any]
    """The comparison's shared recipe."""
    method: str
    seed: int
    folder: str
    samples_per_prompt: int
    best_of: int = 1
    beta: float = 0.0
    choice: dict[str, Any] = field(default_factory=dict)
    """Settings of the choice of a target; none where there is nothing to choose."""
    to_choose: int = 0
    """Completions by which all pairs of target and guidance are judged, those of all together."""
    taken: int = 0
    """Tokens of the context that some method of the comparison needs before every prompt."""
    allow_code: bool = False

    @property
    def run(self) -> Path | None:
        """The run folder of a method that trains."""
        return None if family_of(self.method) in (BASE, BEST_OF) else Path(self.folder) / "run"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a conditioned model is asked for, and how strongly."""

    target: Targets = None
    guidance: float = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        return {"target": self.target, "guidance": self.guidance}


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Completions with their scores and log-probs."""

    inputs: RewardInputs
    rewards: RewardBatch
    rollouts: Rollouts

    @property
    def totals(self) -> list[float]:
        """The reward of each; NaN where there is none."""
        return torch.where(self.rewards.scored, self.rewards.totals, torch.nan).tolist()

    def select(self, rows: Sequence[int]) -> Sampled:
        index = torch.tensor(rows)
        inputs = self.inputs
        columns = {name: [values[row] for row in rows] for name, values in inputs.columns.items()}
        picked: dict[str, Any] = {
            name: [getattr(inputs, name)[row] for row in rows]
            for name in ("prompts", "completions", "completion_ids", "finish_reasons")
        }
        rewards = replace(
            self.rewards,
            per_completion=self.rewards.per_completion[index],
            per_token=None if self.rewards.per_token is None else self.rewards.per_token[index],
            scored=self.rewards.scored[index],
            terms={name: values[index] for name, values in self.rewards.terms.items()},
            extras={},
            token_terms={},
            errors={},
        )
        return Sampled(
            inputs=replace(inputs, columns=columns, **picked), rewards=rewards, rollouts=self.rollouts.select(index)
        )


class Cell:
    """A cell whose method is trained, where it trains."""

    def __init__(self, job: CellJob, opened: ExitStack) -> None:
        self.job, self.folder = job, Path(job.folder)
        self.recipe = Recipe.from_mapping(job.recipe)
        self.sampling = replace(self.recipe.sampling, beta=job.beta)
        assert self.recipe.reward is not None
        self.harness = RewardHarness(self.recipe.reward, allow_code=job.allow_code)
        opened.callback(self.harness.close)
        self.metrics = MetricFunctions(self.recipe.metrics, allow_code=job.allow_code)
        opened.callback(self.metrics.close)
        base = load_model(self.recipe.model)
        self.loaded: LoadedModel = base if job.run is None else _trained(self.recipe, job.run)
        self.policy, self.conditioner = policy_with_slots(self.loaded)
        self.sampler = EmbeddedSampler(self.loaded.tokenizer, self.loaded.tokens.eos_ids)
        start = Policy(base.model)
        trainer = self.recipe.trainer
        self.processes = Processes(accelerator_for(self.recipe))
        self.reference = ModelScorer(
            lambda: nullcontext(start),
            self.processes,
            max_tokens=2 * trainer.micro_batch_tokens,
            max_rows=trainer.micro_batch_size,
        )
        self.prompts = ComparedPrompts.read(
            self.recipe,
            self.loaded.tokenizer,
            context_length=self.policy.context_length,
            taken=max(job.taken, 0 if self.conditioner is None else self.conditioner.width),
        )

    def sample(
        self, prompts: Sequence[Prompt], n: int, key: StreamKey, asked: Asked | None, *, first_index: int = 0
    ) -> Sampled:
        """``n`` completions of each prompt, scored."""
        conditioner, filters, streams = self.conditioner, [], None
        told: Sequence[Prompt] = prompts
        if conditioner is not None:
            told = (
                conditioner.for_evaluation(prompts) if asked is None else conditioner.condition(prompts, asked.target)
            )
            if asked is not None and asked.guidance:
                filters = [RewardGuidance(asked.guidance)]
                streams = [[prompt.ids] for prompt in conditioner.condition(prompts, {})]
        with self.processes.accelerator.autocast():
            rollouts = self.sampler.generate(
                self.policy, told, self.sampling, n, key=key, first_index=first_index, filters=filters, streams=streams
            ).to("cpu")
        rows = [prompt for prompt in prompts for _ in range(n)]
        # What the reference sees: the prompts without what asks for a reward.
        plain = replace(
            rollouts,
            prompt_ids=pad_rows([prompt.ids for prompt in rows], left=True),
            prompt_lengths=torch.tensor([len(prompt.ids) for prompt in rows]),
        )
        inputs = Transcriber(self.loaded.tokenizer, self.sampling.stop)(rollouts, rows)
        width = rollouts.completion_ids.shape[1]
        rewards = scores_of(inputs, self.harness, rollouts.seen_lengths, width, first_row=first_index)
        return Sampled(inputs=inputs, rewards=rewards, rollouts=plain)

    # Choosing --------------------------------------------------------------------------------------------------------

    def choose(self) -> tuple[Asked | None, list[dict[str, Any]], dict[str, float]]:
        """What to ask for, all that was tried, and what that cost; nothing where nothing is chosen.

        It is judged on training prompts. What was found is written down at once, so that it is not tried again.
        """
        if not self.job.choice or self.conditioner is None:
            return None, [], {"completions": 0, "tokens": 0, "seconds": 0.0}
        path = self.folder / CHOICE
        if path.is_file():
            found = json.loads(path.read_bytes())
        else:
            found = self._tried(self.conditioner)
            write_whole(path, json.dumps(found, indent=1).encode())
        tried = [one for one in found["choices"] if one["reward"] is not None]
        if not tried:
            raise DataError("no completion of a training prompt got a reward, so no target can be chosen")
        best = max(tried, key=lambda one: one["reward"])
        return Asked(target=best["target"], guidance=best["guidance"]), found["choices"], found["cost"]

    def _tried(self, conditioner: Conditioner) -> dict[str, Any]:
        settings = Choice(**{**self.job.choice, "targets": tuple(self.job.choice["targets"])})
        began, tokens, targets = time.perf_counter(), 0, targets_of(conditioner, settings.targets)
        # Quantiles may coincide: the fewer pairs share all that was kept for them.
        count = self.job.to_choose // (len(targets) * len(settings.guidance))
        training = self.prompts.training
        prompts = [training[row % len(training)] for row in range(count)]
        choices = []
        for target in targets:
            for guidance in settings.guidance:
                # The same randomness for all: they are compared on the same prompts.
                key = StreamKey(seed=self.job.seed, purpose="generate", collect=1)
                sampled = self.sample(prompts, 1, key, Asked(target=target, guidance=guidance))
                tokens += int(sampled.rollouts.completion_lengths.sum())
                known = [total for total in sampled.totals if math.isfinite(total)]
                mean = sum(known) / len(known) if known else None
                choices.append({"target": target, "guidance": guidance, "reward": mean, "completions": count})
        cost = {"completions": count * len(choices), "tokens": tokens, "seconds": time.perf_counter() - began}
        return {"choices": choices, "cost": cost}

    # Measuring -------------------------------------------------------------------------------------------------------

    def measure(self, asked: Asked | None) -> Table:
        """Rows of ``samples.parquet``: every held-out prompt, so many completions each."""
        k, key = self.job.samples_per_prompt, StreamKey(seed=self.job.seed, purpose="evaluation")
        held_out = self.prompts.held_out
        if family_of(self.job.method) != BEST_OF:
            return self._table(self.sample(held_out, k, key, asked), guided=asked is not None and asked.guidance > 0)
        n, parts = self.job.best_of, []
        for place, prompt in enumerate(held_out):
            sampled = self.sample([prompt], k * n, key, None, first_index=place * k * n)
            totals = [-math.inf if math.isnan(total) else total for total in sampled.totals]
            best = [max(range(begin, begin + n), key=totals.__getitem__) for begin in range(0, k * n, n)]
            parts.append(self._table(sampled.select(best), guided=False))
        table = {name: [value for part in parts for value in part[name]] for name in parts[0]}
        return table | {
            "prompt_index": [place for place in range(len(held_out)) for _ in range(k)],
            "sequence_kl": [math.nan] * len(table["prompt"]),
        }

    def _table(self, sampled: Sampled, *, guided: bool) -> Table:
        inputs, rollouts, k = sampled.inputs, sampled.rollouts, self.job.samples_per_prompt
        count, mask = len(rollouts), rollouts.completion_mask
        of_base = self.reference.logprobs(rollouts, temperature=rollouts.temperature)
        plain = of_base if rollouts.temperature == 1 else self.reference.logprobs(rollouts, temperature=1.0)
        seen = mask & (torch.arange(mask.shape[1]) < rollouts.seen_lengths[:, None])
        # What guidance, beta and filters make of the policy is what is sampled from, and what is paid for.
        changed = guided or self.sampling.beta > 0 or bool(filters_of(self.sampling))
        own = rollouts.behaviour_logprobs if changed else rollouts.logprobs
        kl: Tensor = (kl_k1(own, of_base) * mask).sum(-1)
        terms = {f"reward/{name}": values.tolist() for name, values in sampled.rewards.terms.items()}
        measured = self.metrics.evaluate(inputs) if self.recipe.metrics else {}
        return {
            "prompt_index": [row // k for row in range(count)],
            "sample": [row % k for row in range(count)],
            "prompt": [as_text(prompt) for prompt in inputs.prompts],
            "completion": [as_text(completion) for completion in inputs.completions],
            "reward": sampled.totals,
            **terms,
            **{f"metric/{name}": [_number(value) for value in values] for name, values in measured.items()},
            "length": rollouts.seen_lengths.tolist(),
            "finish_reason": list(rollouts.finish_reasons),
            "sequence_kl": kl.tolist(),
            "base_logprob": (plain * seen).sum(-1).tolist(),
        }

    def finish(self) -> dict[str, Any]:
        """Choose, measure and write the samples; returns what ``cell.json`` says of it."""
        asked, choices, cost = self.choose()
        table = self.measure(asked)
        write_samples(table, self.folder / SAMPLES)
        guided = (asked is not None and asked.guidance > 0) or self.sampling.beta > 0
        estimator = K1_FILTERED if filters_of(self.sampling) else K1_GUIDED if guided else K1
        of_best = family_of(self.job.method) == BEST_OF
        settings: dict[str, Any] = {} if asked is None else asked.settings
        settings |= {"beta": self.sampling.beta} if family_of(self.job.method) == "ilql" else {}
        settings |= {"n": self.job.best_of} if of_best else {}
        known = [total for total in table["reward"] if math.isfinite(total)]
        return {
            "reward": sum(known) / len(known) if known else None,
            "settings": settings,
            "choices": choices,
            "choice": cost,
            "kl_estimator": BOUND if of_best else estimator,
            "kl_bound": best_of_kl(self.job.best_of) if of_best else None,
            "temperature": self.sampling.temperature,
            "prompts": len(self.prompts.held_out),
            "samples_per_prompt": self.job.samples_per_prompt,
            "completions_per_answer": self.job.best_of if of_best else 1,
            "threads": torch.get_num_threads(),
        }


def targets_of(conditioner: Conditioner, given: Sequence[float]) -> list[Any]:
    """What is tried: the given numbers, or quantiles of what the model learned from, each once."""
    if given:
        return list(dict.fromkeys(given))
    targets: list[dict[str, float]] = []
    for share in TARGET_SHARES:
        target = {name: seen.quantile(share) for name, seen in zip(conditioner.names, conditioner.seen, strict=True)}
        if target not in targets:
            targets.append(target)
    return [next(iter(target.values())) if len(target) == 1 else target for target in targets]


def finish_cell(path: Path) -> None:
    """Choose and measure as the job in a file says, and write ``measured.json`` into the cell's folder.

    Raises:
        TropismError: something about it cannot work.
    """
    job = CellJob(**json.loads(path.read_bytes()))
    with ExitStack() as opened:
        facts = Cell(job, opened).finish()
    write_whole(Path(job.folder) / "measured.json", json.dumps(_plain(facts), indent=1).encode())


def write_job(job: CellJob, path: Path) -> None:
    """The job as a file for ``finish_cell``."""
    write_whole(path, json.dumps(asdict(job), indent=1).encode())


def write_samples(table: Mapping[str, Sequence[Any]], path: Path) -> None:
    """The rows as a file that appears whole."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(table)), buffer)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())


def _trained(recipe: Recipe, run: Path) -> LoadedModel:
    """What a run exported, loaded as the base model was, but for weights that were packed."""
    fields = recipe.model if isinstance(recipe.model, ModelConfig) else ModelConfig(name=str(recipe.model))
    return load_model(fields.of_export(run / "model"))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return without_nan(value)
