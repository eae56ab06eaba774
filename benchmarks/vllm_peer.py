"""vLLM doing a rollout, where it is installed."""

from __future__ import annotations

import os

from benchmarks.gate import Gate, UnavailableError
from benchmarks.work import Job, texts_of


def run(job: Job, gate: Gate) -> None:
    """One engine in this process, so that its memory is seen; its caches take a third of a GPU that others share."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # its CPU build then keeps to OMP_NUM_THREADS
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UnavailableError(f"vLLM is not installed ({error})") from error
    from transformers import AutoTokenizer

    work = job.its_work
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    texts = texts_of(tokenizer, work.prompts, work.prompt_tokens)
    prompts = [{"prompt_token_ids": tokenizer(text)["input_ids"]} for text in texts]
    engine = LLM(model=job.model, dtype="bfloat16", gpu_memory_utilization=0.33, disable_log_stats=True)
    sampling = SamplingParams(n=work.group, temperature=1.0, max_tokens=work.max_new_tokens, ignore_eos=True)
    gate.ready()
    while True:
        gate.wait()
        answers = engine.generate(prompts, sampling, use_tqdm=False)
        tokens = sum(len(completion.token_ids) for answer in answers for completion in answer.outputs)
        gate.done(stages={}, tokens=tokens)
