"""The pool of a seed: completions of the training prompts by the base model, scored once, for every method that learns
from given data.

It grows in a file beside its own name and goes on there; each row holds its share of the seconds that it took.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tropism.comparing.plan import GROUP
from tropism.comparing.prompts import ComparedPrompts, prompts_of_pool
from tropism.config import Recipe
from tropism.data.order import fingerprint
from tropism.errors import ConfigError, StorageError
from tropism.evaluation.result_files import without_nan
from tropism.generation import TextPolicy
from tropism.models.loading import load_model
from tropism.rewards import RewardHarness
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.scored_file import ScoredFile
from tropism.storage import write_whole
from tropism.types import Prompt, RewardBatch, RewardInputs

CALLS = 4
"""Batches of the sampler in one call: rows that end make room for others; what is interrupted is one call."""


@dataclass(frozen=True, kw_only=True)
class PoolFacts:
    """What a pool is; one that is there is never taken for another."""

    completions: int
    prompts: int
    """Training prompts that it has completions of."""
    seed: int
    training_prompts: str
    """Fingerprint."""
    sampling: str
    """Fingerprint."""

    @property
    def per_prompt(self) -> float:
        """Completions of a prompt, on average."""
        return self.completions / self.prompts


def facts_path(path: Path) -> Path:
    return path.with_suffix(".facts.json")


def facts_of(recipe: Recipe, training: Sequence[Prompt], *, completions: int, seed: int) -> PoolFacts:
    """The facts of the pool that a budget asks for."""
    chosen = prompts_of_pool(len(training), completions=completions, least=GROUP, seed=seed)
    sampling = {**asdict(recipe.sampling), "batch_size": None, "beta": None}
    del sampling["compile"]
    return PoolFacts(
        completions=completions,
        prompts=len(chosen),
        seed=seed,
        training_prompts=fingerprint(training),
        sampling=fingerprint([sampling]),
    )


def read_pool(path: Path, facts: PoolFacts | None = None) -> list[dict[str, Any]] | None:
    """The rows of a pool; None where it is not there, or not whole.

    Args:
        facts: what it must be; None: anything.

    Raises:
        ConfigError: it is another pool; names what differs.
        StorageError: it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        before = json.loads(facts_path(path).read_bytes())
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read ({error}); delete it to sample it anew") from error
    now = before if facts is None else asdict(facts)
    changed = [name for name, value in now.items() if before.get(name) != value]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{path} is a pool of other {name.replace('_', ' ')}: {before.get(name)!r:.60}, and {now[name]!r:.60} is "
            "asked for. It is not cut anew: choose another folder (--out)"
        )
    return rows


def sample_pool(recipe: Recipe, path: Path, *, completions: int, seed: int, allow_code: bool, taken: int = 0) -> None:
    """Sample and score a pool, or go on with it.

    Args:
        completions: how many, a multiple of ``GROUP``. taken: tokens of the context that a method needs before prompts.

    Raises:
        TropismError: something about model, data, reward or file cannot work.
    """
    policy = TextPolicy(*_base(recipe), recipe.sampling)
    limit = policy.policy.context_length
    training = ComparedPrompts.read(recipe, policy.tokenizer, context_length=limit, taken=taken).training
    facts = facts_of(recipe, training, completions=completions, seed=seed)
    chosen = prompts_of_pool(len(training), completions=completions, least=GROUP, seed=seed)
    assert recipe.reward is not None
    file = ScoredFile(path)
    file.begin({name: str(value) for name, value in asdict(facts).items()}, total=completions, group=GROUP)
    step = CALLS * max(1, recipe.sampling.batch_size // GROUP) * GROUP
    with closing(RewardHarness(recipe.reward, allow_code=allow_code)) as harness:
        while file.done < completions:
            end = min(file.done + step, completions)
            file.append(_rows(policy, training, chosen, harness, recipe, begin=file.done, end=end, seed=seed))
    write_whole(facts_path(path), json.dumps(asdict(facts), indent=1).encode())
    file.finish(file.columns())


def _base(recipe: Recipe) -> tuple[Any, Any]:
    from tropism.generation import policy_with_slots

    loaded = load_model(recipe.model)
    return policy_with_slots(loaded)[0], loaded


def _rows(
    policy: TextPolicy,
    training: Sequence[Prompt],
    chosen: Sequence[int],
    harness: RewardHarness,
    recipe: Recipe,
    *,
    begin: int,
    end: int,
    seed: int,
) -> list[Mapping[str, Any]]:
    """Rows ``begin`` to ``end`` (exclusive): a few of every prompt in turn, so that any first part of a pool is one."""
    began = time.perf_counter()
    places = [chosen[group % len(chosen)] for group in range(begin // GROUP, end // GROUP)]
    prompts = [training[place] for place in places]
    key = StreamKey(seed=seed, purpose="generate")
    rollouts = policy.sampler.generate(policy.policy, prompts, recipe.sampling, GROUP, key=key, first_index=begin).to(
        "cpu"
    )
    per_row = [prompt for prompt in prompts for _ in range(GROUP)]
    inputs = Transcriber(policy.tokenizer, recipe.sampling.stop)(rollouts, per_row)
    rewards = scores_of(inputs, harness, rollouts.seen_lengths, rollouts.completion_ids.shape[1], first_row=begin)
    totals = torch.where(rewards.scored, rewards.totals, torch.nan).tolist()
    seconds = (time.perf_counter() - began) / len(inputs)
    return [
        {
            "prompt_index": places[row // GROUP],
            "prompt": inputs.prompts[row],
            "completion": inputs.completions[row],
            "finish_reason": inputs.finish_reasons[row],
            "tokens": int(rollouts.completion_lengths[row]),
            "seconds": seconds,
            "reward": _finite(totals[row]),
            "terms": {name: _finite(float(values[row])) for name, values in rewards.terms.items()},
        }
        for row in range(len(inputs))
    ]


def scores_of(
    inputs: RewardInputs, harness: RewardHarness, lengths: torch.Tensor, width: int, *, first_row: int = 0
) -> RewardBatch:
    """The plain weighted sum of the reward's terms, neither clipped nor scaled."""
    raw = harness.evaluate(inputs, first_row=first_row)
    return harness.combine(raw, lengths, width, update_moments=False, unscaled=True)


def _finite(value: float) -> float | None:
    if math.isinf(value):
        return None
    number: float | None = without_nan(value)
    return number
