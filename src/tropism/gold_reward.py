"""A gold reward: an independent judge of held-out completions. It trains nothing, and shows whether a reward is gamed.

It is measured where the metrics of a user are, with them, so several processes share its work in the same way.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism.errors import ConfigError, RewardError
from tropism.metric_functions import Measured, MetricFunctions
from tropism.rewards import RewardConfig, RewardTerm
from tropism.rewards.reward_model import NAME as REWARD_MODEL
from tropism.rewards.reward_model import find_reward_model, folder_named

if TYPE_CHECKING:
    from tropism.types import RewardInputs

logger = logging.getLogger("tropism")

PLACE = "trainer.evaluation.gold"
NAME = "gold"
"""``eval/<this>``, and ``eval/<this>/<term>`` of several terms; no metric of a user may have the name."""
EXECUTION = frozenset({"batch_size", "device", "dtype"})
"""Arguments that say how a judge computes, and nothing of its opinion."""
LONGEST_PATH = 4096
"""Characters of an argument that may be a path."""


class GoldReward:
    """A reward that is only measured: the plain weighted sum of its terms, neither clipped nor scaled.

    Raises:
        ConfigError: a term that cannot work as it is set, or code that is not allowed.
    """

    def __init__(self, config: RewardConfig, *, allow_code: bool = False) -> None:
        from tropism.rewards import RewardHarness

        try:
            self.harness = RewardHarness(config, allow_code=allow_code)
        except ConfigError as error:
            raise ConfigError(f"{PLACE}: {error}") from error

    def evaluate(self, inputs: RewardInputs, *, first_row: int = 0) -> Measured:
        """The gold reward of B completions, and each term where there are several; None where it has no opinion.

        Args:
            first_row: the number of the first of these rows among those of all processes, for messages.

        Raises:
            RewardError: a function raised or returned something unusable.
        """
        import torch

        if not len(inputs):
            return {}
        lengths = torch.tensor([len(ids) for ids in inputs.completion_ids], dtype=torch.long)
        try:
            raw = self.harness.evaluate(inputs, first_row=first_row)
            rewards = self.harness.combine(raw, lengths, int(lengths.max()), update_moments=False, unscaled=True)
        except RewardError as error:
            raise RewardError(f"{PLACE}: {error}") from error
        totals = zip(rewards.totals.tolist(), rewards.scored.tolist(), strict=True)
        found: Measured = {NAME: [total if scored else None for total, scored in totals]}
        if len(rewards.terms) > 1:
            for name, values in rewards.terms.items():
                found[f"{NAME}/{name}"] = [None if value != value else value for value in values.tolist()]
        return found

    def close(self) -> None:
        """End the workers and the event loop, where there are any."""
        self.harness.close()


class Measurements:
    """What is measured of held-out completions beside the reward: the metrics of a user, and the gold reward.

    Args:
        parts: each has names of its own.
    """

    def __init__(self, parts: Sequence[MetricFunctions | GoldReward]) -> None:
        self.parts = parts

    def evaluate(self, inputs: RewardInputs, *, first_row: int = 0) -> Measured:
        """As of the parts."""
        found: Measured = {}
        for part in self.parts:
            found |= part.evaluate(inputs, first_row=first_row)
        return found

    def close(self) -> None:
        """End what runs for the parts."""
        for part in self.parts:
            part.close()


def measurements_of(metrics: Mapping[str, Any], gold: RewardConfig | None, *, allow_code: bool) -> Measurements | None:
    """What measures held-out completions by a recipe's ``metrics`` and gold reward; None where it has neither.

    Raises:
        ConfigError: a function that cannot be found or called, or code that is not allowed.
    """
    parts: list[MetricFunctions | GoldReward] = []
    if metrics:
        parts.append(MetricFunctions(metrics, allow_code=allow_code))
    if gold is not None:
        parts.append(GoldReward(gold, allow_code=allow_code))
    return Measurements(parts) if parts else None


def check_gold(gold: RewardConfig, reward: RewardConfig | None) -> None:
    """Refuse a gold reward that is the training reward, and warn about one that shares a term with it.

    Raises:
        ConfigError: they are the same, or the gold reward is a recipe of a reward model still to be trained.
    """
    for name, term in gold.terms.items():
        if isinstance(term.use, str) and term.use.endswith((".yaml", ".yml")):
            raise ConfigError(
                f"{PLACE}: the term {name!r} is a recipe ({term.use}), and a gold reward is not trained along the way; "
                "train it first, and give its run folder"
            )
    if reward is None:
        return
    judged, trained = _weighted(gold), _weighted(reward)
    shared = [name for name, term in judged.items() if any(_is_same(term, other) for other in trained.values())]
    if shared and len(shared) == len(judged) and len(judged) == len(trained):
        raise ConfigError(
            f"{PLACE}: {', '.join(shared)} is what the run is trained by. A gold reward has to be another judge, or it "
            "cannot show that the reward is gamed: give an independent one (another classifier, a reward model trained "
            "on other judgements, a check of your own), or leave it out"
        )
    if shared:
        logger.warning(
            "%s shares %s with the training reward, so it is no independent judge: what games that term raises both",
            PLACE,
            ", ".join(map(repr, shared)),
        )


def _weighted(config: RewardConfig) -> dict[str, RewardTerm]:
    """The terms that count; all where none does."""
    return {name: term for name, term in config.terms.items() if term.weight != 0}


def _is_same(one: RewardTerm, other: RewardTerm) -> bool:
    return _judge(one) == _judge(other)


def _judge(term: RewardTerm) -> tuple[object, dict[str, object]]:
    """What makes two terms the same: what judges, and those of its arguments that decide how."""
    args = {name: _place(value) for name, value in term.args.items() if name not in EXECUTION}
    folder = folder_named(term)
    if folder is None:
        return _identity(term.use), args
    args.pop("model", None)
    try:
        found = find_reward_model(folder)
    except ConfigError:  # not there (yet): what needs it says so
        found = Path(folder).expanduser()
    return (REWARD_MODEL, str(found.resolve())), args


def _place(value: object) -> object:
    """A path that leads somewhere as that place; any other value as it is."""
    if not isinstance(value, str) or not value or len(value) > LONGEST_PATH or "\0" in value:
        return value
    path = Path(value).expanduser()
    try:
        return str(path.resolve()) if path.exists() else value
    except OSError:
        return value


def _identity(use: str | Callable[..., Any]) -> object:
    """The name, or the place of the code: of a function at the top of a file also where it is given as itself."""
    if not isinstance(use, str):
        if not inspect.isfunction(use) or use.__closure__ is not None or not use.__qualname__.isidentifier():
            return use  # others may share their code
        path = Path(use.__code__.co_filename)
        return f"{path.resolve()}:{use.__qualname__}" if path.is_file() else use
    source, colon, function = use.rpartition(":")
    if not colon:
        return use
    if "/" in source or source.endswith(".py"):
        return f"{Path(source).expanduser().resolve()}:{function}"
    module = sys.modules.get(source)
    file = None if module is None else getattr(module, "__file__", None)
    return use if file is None else f"{Path(file).resolve()}:{function}"
