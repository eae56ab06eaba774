"""TRL's trainers doing a work: GRPO, RLOO, SFT and DPO, held at every step by a callback."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback

from benchmarks import work as works
from benchmarks.gate import Gate, Stopwatch, UnavailableError
from benchmarks.work import Job, Work


def run(job: Job, gate: Gate) -> None:
    try:
        trl: Any = import_module("trl")
    except ImportError as error:
        raise UnavailableError(f"TRL is not installed ({error}); pip install 'tropism[parity]'") from error
    torch.set_num_threads(job.threads)
    work = job.its_work
    steps = Steps(gate, work)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    common: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        "processing_class": tokenizer,
        "callbacks": [steps],
    }
    if work.kind == "sft":
        # TRL appends an eos to every text, as tropism does.
        texts = works.texts_of(tokenizer, work.prompts, work.max_new_tokens - 1)
        common["train_dataset"] = Dataset.from_dict({"text": texts * works.STEPS})
        trainer = trl.SFTTrainer(**common, args=trl.SFTConfig(**settings(job), max_length=work.max_new_tokens))
    elif work.kind == "dpo":
        pairs = works.pairs_of(tokenizer, work, work.prompts * works.STEPS)
        common["train_dataset"] = Dataset.from_list(pairs)
        config = trl.DPOConfig(**settings(job), max_length=work.prompt_tokens + work.max_new_tokens)
        trainer = trl.DPOTrainer(**common, args=config)
    else:
        tokenizer.padding_side = "left"
        prompts = works.texts_of(tokenizer, work.prompts, work.prompt_tokens)
        common["train_dataset"] = Dataset.from_dict({"prompt": prompts * works.STEPS})
        kinds = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}
        make_trainer, make_config = kinds[work.kind]
        config = make_config(**settings(job), **on_policy_settings(work))
        trainer = make_trainer(**common, reward_funcs=works.reward, args=config)
    steps.instrument(trainer)
    trainer.train()


def settings(job: Job) -> dict[str, Any]:
    """What is told to every trainer; all else is TRL's default. Nothing is logged or saved."""
    return {
        "output_dir": str(Path(job.scratch) / "trl"),
        "per_device_train_batch_size": job.its_work.prompts if job.its_work.kind == "dpo" else job.its_work.rows,
        "learning_rate": works.LEARNING_RATE,
        "max_steps": 10**6,
        "use_cpu": job.device == "cpu",
        "bf16": job.precision == "bf16",
        "gradient_checkpointing": job.checkpointing,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def on_policy_settings(work: Work) -> dict[str, Any]:
    """Same lengths, group and reference; the order of the prompts is kept, so that each step has different ones."""
    return {
        "num_generations": work.group,
        "max_completion_length": work.max_new_tokens,
        "beta": works.KL_COEF,
        "shuffle_dataset": False,
        "generation_kwargs": {"min_new_tokens": work.max_new_tokens} if work.equal_lengths else None,
    }


class Steps(TrainerCallback):
    """Waits for the parent before every step and reports after it; times what happens in between."""

    def __init__(self, gate: Gate, work: Work) -> None:
        self.gate, self.work = gate, work
        self.watch = Stopwatch(gate)
        self.tokens = work.tokens if work.kind in ("sft", "dpo") else 0

    def instrument(self, trainer: Any) -> None:
        """Time the trainer's own methods from outside."""
        if self.work.kind in ("sft", "dpo"):
            return
        scored = trainer._get_per_token_logps_and_entropies
        scored_timed = self.watch.timed("logprobs", scored)

        def score(*args: Any, **kwargs: Any) -> Any:
            """With gradients it is a part of the update."""
            return (scored if torch.is_grad_enabled() else scored_timed)(*args, **kwargs)

        generate = self.watch.timed("rollout", trainer.model.generate)

        def generate_counted(*args: Any, **kwargs: Any) -> Any:
            if not self.work.equal_lengths:
                forced = ForcedEnd(self.work, kwargs["input_ids"].shape[1], trainer.eos_token_ids)
                kwargs["logits_processor"] = LogitsProcessorList([forced])
            rows = generate(*args, **kwargs)
            new = rows[:, kwargs["input_ids"].shape[1] :]
            ended = torch.isin(new, torch.tensor(trainer.eos_token_ids, device=new.device)).int().cumsum(-1)
            # The first eos of a row counts, what follows does not.
            self.tokens = int((ended == 0).sum() + (ended.amax(-1) > 0).sum())
            return rows

        trainer._get_per_token_logps_and_entropies = score
        trainer.model.generate = generate_counted
        trainer._calculate_rewards = self.watch.timed("reward", trainer._calculate_rewards)
        trainer._prepare_inputs = self.watch.timed("prepare", trainer._prepare_inputs)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.gate.ready()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.watch.take()
        self.gate.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.gate.settle()
        seconds = time.perf_counter() - self.gate.started
        stages = self.watch.take()
        # Prepared inputs are sampled, scored and judged; the rest of the step is the update.
        prepared = stages.pop("prepare", 0.0)
        self.gate.done(stages={**stages, "update": seconds - prepared}, tokens=self.tokens)


class ForcedEnd(LogitsProcessor):
    """Rows end by an eos after the lengths of a work, and not before."""

    def __init__(self, work: Work, prompt_tokens: int, eos_ids: Any) -> None:
        self.lengths = torch.tensor(work.lengths)
        self.prompt_tokens = prompt_tokens
        self.eos_ids = torch.as_tensor(eos_ids).flatten()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ends = self.lengths.to(scores.device) <= input_ids.shape[1] - self.prompt_tokens + 1
        scores = scores.clone()
        scores[:, self.eos_ids] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, self.eos_ids[0]] = 0.0
        return scores
