"""Attribution of chosen completions of a run's newest evaluation: the largest gain, the median, the smallest."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tropism.attribution.completions import attribute_ids, completion_ids
from tropism.attribution.methods import Method
from tropism.attribution.rewards import attribute_reward
from tropism.errors import ConfigError, DataError, RewardError
from tropism.evaluation.attribution_files import AttributedSample, Attribution
from tropism.evaluation.run_folder import Evaluation, RunData
from tropism.generation import TextPolicy
from tropism.types import Prompt

logger = logging.getLogger("tropism")

LABELS = {
    1: ("Largest gain",),
    2: ("Largest gain", "Smallest gain"),
    3: ("Largest gain", "Median gain", "Smallest gain"),
}


def chosen_rows(run: RunData, count: int) -> list[tuple[str, int]]:
    """Label and row of completions of the newest evaluation, by their gain in reward over the first one.

    With one evaluation alone, or where nothing is scored in both, by the reward itself.

    Raises:
        DataError: the run has no evaluation of completions.
        ConfigError: ``count`` < 1.
    """
    if count < 1:
        raise ConfigError(f"--samples must be at least 1, not {count}")
    if not run.evaluations:
        raise DataError(f"the run {str(run.folder)!r} has no evaluation of completions, so there are no samples")
    first, last = run.evaluations[0], run.evaluations[-1]
    gains = last.rewards - first.rewards if first is not last and first.prompts == last.prompts else last.rewards
    order = sorted(
        (row for row in range(len(last)) if last.completions[row].strip()),
        key=lambda row: (math.isnan(gains[row]), -gains[row] if math.isfinite(gains[row]) else 0.0),
    )
    scored = [row for row in order if math.isfinite(gains[row])]
    order = scored if len(scored) >= count else order
    if not order:
        raise DataError(f"all completions of step {last.step} are empty, so there is nothing to attribute")
    count = min(count, len(order))
    ranks = [round(place * (len(order) - 1) / max(1, count - 1)) for place in range(count)]
    labels = LABELS.get(count) or tuple(f"Rank {rank + 1} of {len(order)} by gain" for rank in ranks)
    return [(label, order[rank]) for label, rank in zip(labels, ranks, strict=True)]


def attribute_samples(
    folder: Path,
    *,
    count: int = 3,
    method: Method | None = None,
    each_token: bool = False,
    reward: Any = None,
    allow_code: bool = False,
    device: str = "auto",
) -> list[AttributedSample]:
    """What drove the completions and rewards of chosen samples of a run.

    The completions are those of the newest evaluation; log-probs are those of the model that the run exported.

    Args:
        count: how many.
        method: of both; None: integrated gradients of the log-prob, and the first that the reward can do. Where a
            reward has no gradients, ask for None or ``occlusion``.
        each_token: also for each token of the completion.
        reward: another reward than the run's.

    Raises:
        TropismError: no finished run, other prompts than those of the evaluation, a reward that fails.
    """

    run = RunData.read(folder)
    rows = chosen_rows(run, count)
    last = run.evaluations[-1]
    recipe = _recipe(folder)
    policy = TextPolicy.load(str(folder), device=device)
    prompts = _held_out(recipe, policy, last, folder)
    judged = recipe.reward if reward is None else reward
    explain: Callable[..., Attribution] | None = None
    if judged is not None:
        settings: dict[str, Any] = {"method": method, "tokenizer": policy.tokenizer, "allow_code": allow_code}
        explain = partial(attribute_reward, judged, **settings)
    samples = []
    for label, row in rows:
        prompt, completion = prompts[row], last.completions[row]
        asked = prompt
        if policy.conditioner is not None:
            asked = policy.conditioner.for_evaluation([prompt], recipe.algorithm.evaluated_at)[0]
        ids = completion_ids(policy.tokenizer, prompt, completion)
        driven = attribute_ids(policy, asked.ids, ids, method=method or "integrated_gradients", each_token=each_token)
        samples.append(
            AttributedSample(
                label=label,
                step=last.step,
                prompt=last.prompts[row],
                completion=completion,
                reward=float(last.rewards[row]),
                maps=(driven, *_of_reward(explain, prompt, completion)),
            )
        )
    return samples


def _recipe(folder: Path) -> Any:
    from tropism.commands.recipe_arguments import refuse_python_objects, run_recipe_mapping
    from tropism.config import Recipe

    mapping = run_recipe_mapping(folder)
    refuse_python_objects({name: mapping.get(name) for name in ("data", "eval_data")}, folder)
    return Recipe.from_mapping(mapping)


def _of_reward(explain: Callable[..., Attribution] | None, prompt: Prompt, completion: str) -> list[Attribution]:
    """The map of the reward; none, said aloud, where it has no opinion on this completion."""
    if explain is None:
        return []
    judged: Any = completion if isinstance(prompt.text, str) else [{"role": "assistant", "content": completion}]
    try:
        return [explain(prompt.text, judged, columns=prompt.columns)]
    except RewardError as error:
        logger.warning("a sample has no map of its reward: %s", error)
        return []


def _held_out(recipe: Any, policy: TextPolicy, last: Evaluation, folder: Path) -> list[Prompt]:
    """The prompts of an evaluation, in its order, with their ids and columns.

    Raises:
        DataError: the data is not that of the run any more.
    """
    from tropism.recipe_data import prompts_of
    from tropism.training.run_folder import as_text

    taken = 0 if policy.conditioner is None else policy.conditioner.width
    _, held_out = prompts_of(recipe, policy.tokenizer, context_length=policy.policy.context_length, taken=taken)
    if [as_text(prompt.text) for prompt in held_out] != last.prompts:
        raise DataError(
            f"the held-out prompts of {folder} are not those of its evaluation of step {last.step}: its data has "
            "changed since; put back what it held"
        )
    return list(held_out)
