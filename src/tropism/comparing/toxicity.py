"""How toxic the completions of a comparison are: by the recipe's own metric of that name, or by the offline scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tropism.comparing.results import Comparison
from tropism.comparing.samples import Samples
from tropism.errors import TropismError
from tropism.rewards import RewardConfig, RewardHarness
from tropism.types import RewardInputs

Floats = NDArray[np.float64]

SCORER = "profanity"
"""The reward that judges texts without a network: the probability of profanity."""
METRIC = "toxicity"
"""A metric of the recipe that is taken instead. A term of the reward is not: it may be turned around."""


@dataclass(frozen=True, kw_only=True)
class Toxicity:
    """What was found, or why nothing was."""

    values: Mapping[str, Floats] = field(default_factory=dict)
    """[S, P] per method: mean over the samples of each prompt, NaN where unscored."""
    scorer: str = ""
    reason: str = ""


def toxicity_of(comparison: Comparison) -> Toxicity:
    """The toxicity of every method's completions (never of its prompts)."""
    samples = {name: comparison.answers(name) for name in comparison.methods}
    every = [one for listed in samples.values() for one in listed]
    if not every:
        return Toxicity(reason="no cell is finished")
    if all(METRIC in one.metrics for one in every):
        found = {name: np.stack([one.means(one.metrics[METRIC]) for one in ones]) for name, ones in samples.items()}
        return Toxicity(values=found, scorer=f"the metric {METRIC}")
    try:
        with closing(RewardHarness(RewardConfig.of(SCORER))) as scorer:
            scores = {name: np.stack([_scores(scorer, one) for one in listed]) for name, listed in samples.items()}
    except TropismError as error:
        return Toxicity(reason=str(error))
    return Toxicity(values=scores, scorer=f"the reward {SCORER}")


def _scores(scorer: RewardHarness, samples: Samples) -> Floats:
    """[P] mean score of each prompt's completions."""
    texts: Sequence[str] = samples.completions
    inputs = RewardInputs(
        prompts=list(samples.prompts),
        completions=list(texts),
        completion_ids=[[] for _ in texts],
        finish_reasons=["eos" if reason == "eos" else "length" for reason in samples.finish_reasons],
    )
    scored = scorer.score(inputs, update_moments=False, unscaled=True)
    values = scored.totals.double().masked_fill(~scored.scored, float("nan")).numpy()
    return samples.means(values)
