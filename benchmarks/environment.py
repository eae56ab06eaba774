"""``python -m benchmarks environment``: a step of the token-level environment against reading the text again.

Both take the same greedy tokens of the same model. Reading again is what TextRL's environment does: for every sample
and token it encodes the pair of prompt and text so far anew and runs the whole model over it. The seconds are per token
of one sample; the ratios are of their medians, over the last steps and over all.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.machine import physical_cores, processor, versions
from benchmarks.models import model_folder
from benchmarks.runner import ROOT
from benchmarks.standard import write

PROMPT = "The film was nothing like what the reviews had said about it, and when we left the cinema"
AROUND = 8
"""Steps up to the last one that stand for the length that is asked for."""


def main(arguments: Sequence[str]) -> None:
    """Take the steps, print the ratios, write JSON."""
    options = parse(arguments)
    import torch

    from tropism.training.memory import keep_freed_memory

    torch.set_num_threads(options.threads)
    keep_freed_memory()
    figures = [measure(options, samples) for samples in options.samples]
    for found in figures:
        for where in ("last", "all"):
            ours, theirs = found[where]["step"], found[where]["reread"]
            length = f"at {options.tokens} tokens" if where == "last" else f"over {options.tokens} tokens"
            print(
                f"{found['samples']} sample(s), {length}: {1e3 * ours:.2f} ms a token by step(), {1e3 * theirs:.2f} ms "
                f"by reading again: {theirs / ours:.1f} times as fast"
            )
    result = {
        "command": f"python -m benchmarks {shlex.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "processor": processor(),
        "threads": options.threads,
        "versions": versions(),
        "model": options.model,
        "tokens": options.tokens,
        "observation": options.observation,
        "figures": figures,
    }
    out = options.out or ROOT / "benchmarks" / "results" / f"environment-cpu-{date.today().isoformat()}.json"
    write(out, result)
    print(f"written to {out}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks environment", description=__doc__)
    parser.add_argument("--model", default="demo", help="any model, or one of the random ones of the benchmarks")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of an episode")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 8], help="samples side by side, a figure each")
    parser.add_argument("--episodes", type=int, default=3, help="counted episodes by step(); one before is not counted")
    parser.add_argument("--observation", choices=("hidden", "ids"), default="hidden")
    parser.add_argument("--compile", action="store_true", help="decode with compiled kernels")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: the cores")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/environment-cpu-<date>.json")
    options = parser.parse_args(arguments)
    if options.tokens < 2 or min(*options.samples, options.episodes) < 1:
        parser.error("--tokens must be at least 2, --samples and --episodes at least 1")
    return options


def measure(options: argparse.Namespace, samples: int) -> dict[str, Any]:
    """Seconds per token of one sample: medians over the last steps and over all, of both ways."""
    from tropism.envs.text_generation import TextGenerationEnv
    from tropism.models.loading import ModelConfig, load_model

    class Unrewarded(TextGenerationEnv):
        def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> float:
            return 0.0

    loaded = load_model(ModelConfig(name=str(model_folder(options.model))))
    env = Unrewarded(
        loaded,
        [PROMPT],
        max_new_tokens=options.tokens,
        compare_sample=samples,
        observation=options.observation,
        compile=options.compile,
    )
    never = loaded.tokens.eos_ids
    seconds: dict[str, list[list[float]]] = {"step": [], "reread": []}
    tokens: list[list[int]] = []
    for episode in range(1 + options.episodes):
        taken, tokens = stepped(env, never)
        if episode:
            seconds["step"].append(taken)
    seconds["reread"].append(reread(env, loaded, tokens))
    found: dict[str, Any] = {"samples": samples}
    for where, first in (("last", -AROUND), ("all", 0)):
        found[where] = {
            way: statistics.median(value for taken in episodes for value in taken[first:]) / samples
            for way, episodes in seconds.items()
        }
        found[where]["ratio"] = found[where]["reread"] / found[where]["step"]
    return {**found, "seconds": seconds}


def stepped(env: Any, never: Sequence[int]) -> tuple[list[float], list[list[int]]]:
    """Seconds of every step of an episode of greedy tokens that never ends by itself, and the tokens."""
    import numpy as np

    env.reset(options={"item": 0})
    seconds: list[float] = []
    over = False
    while not over:
        logits = env.logits()
        logits[:, list(never)] = -np.inf
        action = logits.argmax(-1).numpy()
        began = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(action if env.compare_sample > 1 else action[0])
        seconds.append(time.perf_counter() - began)
        over = terminated or truncated
    return seconds, env.completions


def reread(env: Any, loaded: Any, tokens: Sequence[Sequence[int]]) -> list[float]:
    """Seconds per token of all samples by encoding and reading prompt and text again, as TextRL's ``gat_obs`` does.

    A lower bound: neither tokens are chosen nor rewards asked for, and the last hidden state is all that is taken.
    """
    import torch

    tokenizer, model = loaded.tokenizer, loaded.model
    seconds: list[float] = []
    with torch.inference_mode():
        for length in range(1, len(tokens[0]) + 1):
            began = time.perf_counter()
            for sample in tokens:
                strings = tokenizer.convert_ids_to_tokens(sample[:length])
                text = tokenizer.convert_tokens_to_string(strings)
                encoded = tokenizer([[PROMPT, text]], add_special_tokens=False, return_tensors="pt")
                encoded.pop("token_type_ids", None)
                states = model(**encoded.to(model.device), output_hidden_states=True).hidden_states
                states[-1][:, -1].cpu()
            seconds.append(time.perf_counter() - began)
    return seconds
