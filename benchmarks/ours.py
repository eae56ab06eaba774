"""tropism doing a work: a run as ``tropism.train`` makes it, held at every update boundary."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import work as works
from benchmarks.gate import Gate
from benchmarks.reward_model import FOLDER
from benchmarks.work import Job, Work
from tropism.algorithms import DPO, GRPO, PPO, RLOO, SFT, AlgorithmConfig
from tropism.build import Assembly
from tropism.config import Recipe
from tropism.models.loading import ModelConfig
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.rollouts.protocol import FilterContext
from tropism.training.config import TrainerConfig
from tropism.training.memory import keep_freed_memory
from tropism.types import Rollouts

NEVER = 10**9
"""Steps of a run that the parent ends."""

STAGES = ("rollout", "reward", "logprobs", "make_batch", "update", "log")
"""The ``time/*`` metrics that make up a step."""


def run(job: Job, gate: Gate) -> None:
    torch.set_num_threads(job.threads)
    assembled = Assembly(recipe_of(job))
    if not job.its_work.equal_lengths:
        source: Any = assembled.trainer.source
        forced = ForcedLengths(source.maker.sampler, job.its_work, assembled.loaded.tokens.eos_ids)
        source.maker = replace(source.maker, sampler=forced)
    if job.device == "cpu":
        keep_freed_memory()
    if job.its_work.kind == "rollout":
        sample(assembled, gate)
    else:
        train(assembled, gate)


def recipe_of(job: Job) -> Recipe:
    """The recipe of a work: what a user would write for it."""
    from transformers import AutoTokenizer

    work = job.its_work
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    return Recipe(
        model=ModelConfig(name=job.model, dtype="float32", device=job.device),
        algorithm=algorithm_of(work),
        data=data_of(work, tokenizer),
        reward=reward_of(job),
        run=str(Path(job.scratch) / "run"),
        total_steps=NEVER,
        prompts_per_step=work.prompts,
        sampling=Sampling(
            max_new_tokens=work.max_new_tokens,
            min_new_tokens=work.max_new_tokens if work.equal_lengths else 0,
            compile=job.compiled,
        ),
        trainer=TrainerConfig(learning_rate=works.LEARNING_RATE, precision=job.precision, progress=False),
    )


def data_of(work: Work, tokenizer: Any) -> list[Any]:
    """What the method of a work reads."""
    if work.kind == "dpo":
        return works.pairs_of(tokenizer, work, work.prompts * works.STEPS)
    # An eos is appended to every text of SFT, so the texts are one token shorter.
    tokens = work.max_new_tokens - 1 if work.kind == "sft" else work.prompt_tokens
    return works.texts_of(tokenizer, work.prompts, tokens)


def algorithm_of(work: Work) -> AlgorithmConfig:
    """One update per collect, with a reference."""
    match work.kind:
        case "sft":
            return SFT()
        case "dpo":
            return DPO(shuffle=False)
        case "ppo":
            return PPO(group_size=1, kl_coef=works.KL_COEF, num_epochs=1)
        case "rloo":
            return RLOO(group_size=work.group, kl_coef=works.KL_COEF)
        case "rollout":
            # Nothing is made of the completions; PPO takes groups of one.
            return PPO(group_size=work.group, kl_coef=0.0)
        case "grpo":
            return GRPO(group_size=work.group, kl_coef=works.KL_COEF)


def reward_of(job: Job) -> RewardConfig | None:
    """The cheap function; for PPO a reward model of the policy's size."""
    kind = job.its_work.kind
    if kind in ("sft", "dpo"):
        return None
    if kind == "ppo":
        arguments = {"model": str(Path(job.scratch).parent / FOLDER), "text": "prompt+completion", "device": job.device}
        return RewardConfig.of({"terms": {"classifier": {"use": "classifier", "args": arguments}}})
    return RewardConfig.of(works.reward)


def train(assembled: Assembly, gate: Gate) -> None:
    """Train step by step, each when the parent says so; the books of a step belong to it."""
    assembled.check()
    run, trainer = assembled.run, assembled.trainer
    begin, keep_books = run.begin, trainer.after_update
    timings = logged_stages(assembled.folder.path / "timings.jsonl")
    counted = 0

    def begin_gated() -> None:
        begin()
        gate.ready()
        gate.wait()

    def after_update(metrics: dict[str, float], ended: bool) -> bool:
        nonlocal counted
        stop = keep_books(metrics, ended)
        whole = isinstance(assembled.recipe.algorithm, SFT)
        # SFT counts the tokens that are predicted: all but the first of every text.
        tokens = trainer.counts.tokens - counted + (assembled.recipe.prompts_per_step if whole else 0)
        counted = trainer.counts.tokens
        gate.done(stages=next(timings), tokens=tokens)
        gate.wait()
        return stop

    run.begin, trainer.after_update = begin_gated, after_update
    run.execute(NEVER, resumed=None)


def logged_stages(path: Path) -> Iterator[dict[str, float]]:
    """The seconds by stage of one step after another, from what the run logs."""
    read = 0
    while True:
        lines = path.read_text(encoding="utf-8").splitlines()
        stages: dict[str, float] = {}
        for line in lines[read:]:
            for name, seconds in json.loads(line).items():
                stage = name.removeprefix("time/")
                if stage in STAGES:
                    stages[stage] = stages.get(stage, 0.0) + seconds
        read = len(lines)
        yield stages


def sample(assembled: Assembly, gate: Gate) -> None:
    """Rollouts alone, by the source of a training run, without anything that follows them."""
    source: Any = assembled.trainer.source
    gate.ready()
    while True:
        gate.wait()
        group = assembled.recipe.algorithm.group_size  # type: ignore[attr-defined]
        rollouts: Rollouts = source.maker.sample(assembled.prompts, group, collect=source.collects)
        gate.settle()
        seconds = time.perf_counter() - gate.started
        source.collects += 1
        gate.done(stages={"rollout": seconds}, tokens=int(rollouts.completion_lengths.sum()))


class ForcedLengths:
    """A sampler whose rows end by an eos after the lengths of a work, and not before."""

    def __init__(self, inner: Any, work: Work, eos_ids: Sequence[int]) -> None:
        self.inner, self.capabilities = inner, inner.capabilities
        self.lengths = cycle(work.lengths)
        self.eos_ids = torch.tensor(eos_ids)

    def generate(self, *args: Any, **kwargs: Any) -> Rollouts:
        rollouts: Rollouts = self.inner.generate(*args, **kwargs, filters=[self])
        return rollouts

    def __call__(self, logits: Tensor, context: FilterContext) -> Tensor:
        """[R, V] -> [R, V]: eos alone where a row ends, everything else before; rows take lengths as they enter."""
        logits = logits.clone()
        last = []
        for ids, prompt, state in zip(context.ids, context.prompt_lengths, context.row_state, strict=True):
            length = state.setdefault("length", None) or next(self.lengths)
            state["length"] = length
            last.append(len(ids) - prompt + 1 >= length)
        ends = torch.tensor(last)
        logits[:, self.eos_ids] = -torch.inf
        logits[ends] = -torch.inf
        logits[ends, self.eos_ids[0]] = 0.0
        return logits
