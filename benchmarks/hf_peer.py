"""Plain ``generate`` of transformers doing a rollout."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gate import Gate
from benchmarks.work import Job, texts_of


def run(job: Job, gate: Gate) -> None:
    torch.set_num_threads(job.threads)
    work = job.its_work
    dtype = torch.float32 if job.precision == "fp32" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)
    model.to(job.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    texts = texts_of(tokenizer, work.prompts, work.prompt_tokens)
    prompts = tokenizer(texts, return_tensors="pt")["input_ids"].repeat_interleave(work.group, dim=0).to(job.device)
    gate.ready()
    while True:
        gate.wait()
        with torch.no_grad():
            rows = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=work.max_new_tokens,
                min_new_tokens=work.max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        gate.done(stages={}, tokens=rows[:, work.prompt_tokens :].numel())
