"""A task small enough to enumerate: 40 completions of one prompt, a reward for each, and the exact optimum.

The objective is J(pi) = E_pi[r(y) - beta * log(pi(y) / pi_ref(y))]. Its maximum over all policies is
J(pi*) = beta * log sum_y pi_ref(y) exp(r(y) / beta), at pi*(y) proportional to pi_ref(y) exp(r(y) / beta).
"""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiny_models import tiny_model
from tropism.algorithms import AlgorithmConfig
from tropism.build import Assembly
from tropism.config import Recipe
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.training.config import TrainerConfig

LETTERS = "abc$"
EOS, LONGEST = 3, 3
BETA = 0.5

SEQUENCES = [
    ids
    for length in range(1, LONGEST + 1)
    for ids in itertools.product(range(4), repeat=length)
    if EOS not in ids[:-1] and (ids[-1] == EOS or length == LONGEST)
]
"""Every possible completion: it ends with eos, or at three tokens."""

_random = random.Random(4)
REWARD = {ids: _random.uniform(-1.0, 2.0) for ids in SEQUENCES}


def reward(completion_ids: list[list[int]]) -> list[float]:
    return [REWARD[tuple(ids)] for ids in completion_ids]


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({letter: index for index, letter in enumerate(LETTERS)}, unk_token="a"))
    core.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="a", eos_token="$")


def model() -> PreTrainedModel:
    """Learned positions: a Llama's hidden state after "a", "aa" and "aaa" is the same, so it could not reach pi*."""
    network = tiny_model("gpt2", seed=1, vocab_size=4, pad_token_id=None, bos_token_id=None, eos_token_id=EOS)
    with torch.no_grad():  # flatter, so that many completions have a share in the optimum
        network.get_output_embeddings().weight.mul_(0.5)
    return network


@torch.no_grad()
def sequence_logprobs(network: Any) -> list[float]:
    """log pi(y) of every completion of the prompt "a", from the model's own logits one sequence at a time."""
    result = []
    for ids in SEQUENCES:
        logits = network(input_ids=torch.tensor([[0, *ids]])).logits[0].double().log_softmax(-1)
        result.append(sum(float(logits[place, token]) for place, token in enumerate(ids)))
    return result


def objective(logprobs: list[float], ref_logprobs: list[float]) -> float:
    """J(pi), summed over every completion."""
    assert math.isclose(sum(map(math.exp, logprobs)), 1.0, abs_tol=1e-5)
    pairs = zip(SEQUENCES, logprobs, ref_logprobs, strict=True)
    return sum(math.exp(own) * (REWARD[ids] - BETA * (own - ref)) for ids, own, ref in pairs)


def optimum(ref_logprobs: list[float]) -> float:
    pairs = zip(SEQUENCES, ref_logprobs, strict=True)
    return BETA * math.log(sum(math.exp(ref + REWARD[ids] / BETA) for ids, ref in pairs))


def assemble_task(algorithm: AlgorithmConfig, folder: Path, *, steps: int, rate: float) -> Assembly:
    """The real trainer, source, sampler, harness and method on this task; only the run folder's books are left out."""
    recipe = Recipe(
        model=(model(), tokenizer()),
        algorithm=algorithm,
        data=["a"],
        reward=RewardConfig.of(reward),
        run=str(folder / "run"),
        total_steps=steps,
        prompts_per_step=1,
        sampling=Sampling(max_new_tokens=LONGEST, batch_size=256),
        trainer=TrainerConfig(learning_rate=rate, schedule="linear", progress=False),
    )
    assembly = Assembly(recipe)
    assembly.trainer.source.on_collect = lambda collected: None  # type: ignore[attr-defined]
    assembly.trainer.after_update = lambda metrics, ended: False
    return assembly


def share_of_optimum(assembly: Assembly) -> tuple[float, float, float]:
    """Train; how much of the way from J(reference) to J(optimum) was gone, J(policy), and J(optimum)."""
    ref_logprobs = sequence_logprobs(model())
    start, best = objective(ref_logprobs, ref_logprobs), optimum(ref_logprobs)
    assembly.trainer.fit(assembly.recipe.total_steps)
    reached = objective(sequence_logprobs(assembly.policy.model), ref_logprobs)
    return (reached - start) / (best - start), reached, best
