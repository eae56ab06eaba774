"""Labelling data with a reward: texts that are there, or completions that a model is asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tropism import __version__
from tropism.data.columns import other_columns
from tropism.data.config import DataConfig
from tropism.data.demonstrations import FINISH_REASON, encode_parts, layout_of, texts_of
from tropism.data.encoding import room_for_prompt
from tropism.data.order import fingerprint
from tropism.data.prompts import make_prompts
from tropism.data.readers import Record, locate_records
from tropism.errors import ConfigError, DataError, RewardError
from tropism.generation import TextPolicy
from tropism.recipe_identity import reward_sources, weights_fingerprint
from tropism.rewards import RewardConfig, RewardHarness
from tropism.rewards.calling import asked_by
from tropism.rollouts.config import Sampling
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.scored_file import ScoredFile, require_json
from tropism.targets.conditioner import Conditioner, Targets
from tropism.tokenizer_of import tokenizer_of
from tropism.types import Prompt, RewardInputs

logger = logging.getLogger("tropism")

SAMPLING = Sampling(max_new_tokens=48)
"""How completions are sampled where nothing else is said."""

Columns = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """What was written."""

    path: Path
    records: int
    """Records in the file."""
    unscored: int
    """Records on which the reward had no opinion; in the file as null, unless they were dropped."""
    dropped: bool
    """Whether these were left out."""
    rewards: tuple[float, ...] = field(repr=False)
    """The reward of every record that has one, in order."""

    @property
    def mean(self) -> float:
        """Of the rewards; NaN where there is none."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else math.nan


def score(
    data: Any,
    reward: Any,
    *,
    out: str | Path,
    config: DataConfig | None = None,
    reward_column: str = "reward",
    term_columns: bool = False,
    batch_size: int = 64,
    tokenizer: str | Any | None = None,
    model: Any = None,
    n: int = 4,
    sampling: Sampling | None = None,
    seed: int = 0,
    target_reward: Targets = None,
    drop_unscored: bool = False,
    overwrite: bool = False,
    allow_code: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ScoreResult:
    """Write a data set with the reward of each record, or of completions that a model gives to each prompt.

    Called again after it was stopped, it goes on after the last record that was written down.

    Args:
        data: records as of demonstrations, or prompts where there is a ``model``, in any form that can be trained on.
        reward: a callable, a registered name, ``{"name": (reward, weight)}``, or a ``RewardConfig``. The weighted sum
            of its terms is written, neither clipped nor scaled.
        out: the ``.jsonl`` or ``.parquet`` file, which appears once it is whole.
        config: how records become texts; default: ``data`` itself, if it is one.
        reward_column: name of the new column.
        term_columns: a column for each term; always so where there are several.
        batch_size: completions that are sampled and scored at once.
        tokenizer: gives ids to rewards that ask for them: an object, or the name of its model. None: no ids.
        model: a ``TextPolicy`` or whatever it can be loaded from: ``n`` completions of each prompt are sampled by
            ``sampling`` and ``seed`` and written with their prompts. None: the texts of the data are scored.
        target_reward: what a reward-conditioned model is asked for, or ``{"name": number}``; None: its own default.
        drop_unscored: leave out records on which the reward has no opinion, in place of a null.
        overwrite: replace a file that is there.
        allow_code: let the reward name code: ``module:function`` or ``file.py:function``.
        on_progress: called with the numbers of records that are done and of all.

    Raises:
        TropismError: something about the data, the reward or the file cannot work.
    """
    file = ScoredFile(out, overwrite=overwrite)
    rewards = RewardConfig.of(reward)
    config = data if config is None and isinstance(data, DataConfig) else config
    _check_options(model, tokenizer, target_reward)
    terms = tuple(rewards.terms) if term_columns or len(rewards.terms) > 1 else ()
    with closing(RewardHarness(rewards, allow_code=allow_code)) as harness:
        texts: _Texts
        if model is None:
            texts = _Given(data, config, require_tokenizer(harness, tokenizer))
        else:
            texts = _Sampled(data, config, model, sampling=sampling, n=n, seed=seed, target_reward=target_reward)
        labels = _Labels(texts, harness, reward_column, terms)
        labels.write(file, batch_size=batch_size, tell=on_progress or (lambda done, total: None))
    return _finish(file, texts, reward_column, drop=drop_unscored)


class _Texts(Protocol):
    """What is scored."""

    group: int
    """So many texts belong together."""
    names: tuple[str, ...]
    """Columns that come with each batch."""

    def __len__(self) -> int: ...

    @property
    def identity(self) -> str:
        """Fingerprint of everything that the texts depend on."""

    def columns(self, index: int) -> Columns:
        """The columns of the data in the record of one text."""

    def batch(self, begin: int, end: int) -> tuple[RewardInputs, list[Columns]]:
        """What the reward sees of the texts from ``begin`` to ``end`` (exclusive), and their values of ``names``."""


class _Given:
    """Texts of the data."""

    group = 1
    names: tuple[str, ...] = ()

    def __init__(self, data: Any, config: DataConfig | None, tokenizer: Any) -> None:
        records = locate_records(data)
        layout = layout_of(records, config)
        if config is not None and config.prepare is not None:
            raise ConfigError("prepare cuts prompts by tokens of a model; give the model to sample from, or no prepare")
        self.tokenizer = tokenizer
        self.records: list[Record] = []
        self.texts: list[Any] = []
        self.seen: list[Columns] = []
        skipped = 0
        for record, seen in zip(records, other_columns(records, layout.prompt), strict=True):
            if config is not None and len(self.records) == config.limit:
                break
            texts = texts_of(record, layout, config)
            if texts is None:
                skipped += 1
                continue
            self.records.append(record)
            self.texts.append(texts)
            self.seen.append(seen)
        if skipped:
            logger.warning("left out %d texts with too few words for first_words", skipped)
        if not self.records:
            raise DataError(f"none of the {len(records)} texts has more words than first_words; lower it")

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def identity(self) -> str:
        ids = None if self.tokenizer is None else sorted(self.tokenizer.get_vocab().items())
        return fingerprint([*zip(self.texts, (record.columns for record in self.records), strict=True), ids])

    def columns(self, index: int) -> Columns:
        return self.records[index].columns

    def batch(self, begin: int, end: int) -> tuple[RewardInputs, list[Columns]]:
        rows = range(begin, end)
        inputs = RewardInputs(
            prompts=[self.texts[row][0] for row in rows],
            completions=[self.texts[row][1] for row in rows],
            completion_ids=[self._ids(row) for row in rows],
            finish_reasons=["eos" for _ in rows],
            columns={name: [self.seen[row][name] for row in rows] for name in self.seen[0]},
        )
        return inputs, [{} for _ in rows]

    def _ids(self, row: int) -> list[int]:
        if self.tokenizer is None:
            return []
        where = self.records[row].where
        ids, start, _ = encode_parts(self.tokenizer, *self.texts[row], where=where, shortest_prompt=0)
        return ids[start:]


class _Sampled:
    """Completions that a model gives; a sample depends on its number, not on where the work was cut."""

    names: tuple[str, ...] = ("prompt", "completion", FINISH_REASON)

    def __init__(
        self,
        data: Any,
        config: DataConfig | None,
        model: Any,
        *,
        sampling: Sampling | None,
        n: int,
        seed: int,
        target_reward: Targets,
    ) -> None:
        if n < 1:
            raise ConfigError(f"n must be at least 1, got {n}")
        self.policy = model if isinstance(model, TextPolicy) else TextPolicy.load(model)
        self.sampling, self.group = sampling or SAMPLING, n
        self.key = StreamKey(seed=seed, purpose="generate")
        conditioner = self.policy.conditioner
        _check_target(conditioner, target_reward)
        self.target = None if conditioner is None else conditioner.values(target_reward)
        limit, taken = self.policy.policy.context_length, 0 if conditioner is None else conditioner.width
        room = room_for_prompt(self.policy.tokenizer, limit, new=self.sampling.max_new_tokens, taken=taken)
        self.prompts = make_prompts(data, self.policy.tokenizer, config, max_length=room)
        self.asked: Sequence[Prompt] = self.prompts
        if conditioner is not None:
            self.asked = conditioner.condition(self.prompts, target_reward)
        self.transcribe = Transcriber(self.policy.tokenizer, self.sampling.stop)

    def __len__(self) -> int:
        return len(self.prompts) * self.group

    @cached_property
    def identity(self) -> str:
        weights = {name: weight.detach() for name, weight in self.policy.policy.named_parameters()}
        sampling = {**asdict(self.sampling), "batch_size": None}
        del sampling["compile"]
        asked = [] if self.target is None else [self.target]
        return fingerprint([*self.asked, weights_fingerprint(weights), sampling, self.group, self.key, *asked])

    def columns(self, index: int) -> Columns:
        return dict(self.prompts[index // self.group].columns)

    def batch(self, begin: int, end: int) -> tuple[RewardInputs, list[Columns]]:
        prompts = self.prompts[begin // self.group : end // self.group]
        asked = self.asked[begin // self.group : end // self.group]
        rollouts = self.policy.sampler.generate(
            self.policy.policy, asked, self.sampling, self.group, key=self.key, first_index=begin
        )
        inputs = self.transcribe(rollouts.to("cpu"), [prompt for prompt in prompts for _ in range(self.group)])
        told = zip(inputs.prompts, inputs.completions, inputs.finish_reasons, strict=True)
        return inputs, [dict(zip(self.names, values, strict=True)) for values in told]


def _check_options(model: Any, tokenizer: Any, target_reward: Targets) -> None:
    """What goes with a model, and what without one."""
    if model is None and target_reward is not None:
        raise ConfigError("target_reward is what a model is asked for; give the model, or leave it out")
    if model is not None and tokenizer is not None:
        raise ConfigError("a model brings its own tokenizer; leave tokenizer out")


def _check_target(conditioner: Conditioner | None, target_reward: Targets) -> None:
    """A model that can be asked must be asked, any other cannot be."""
    if conditioner is None and target_reward is not None:
        raise ConfigError(
            "this model was not trained to be asked for a reward; train one with algorithm: conditioned, or leave "
            "--target-reward (target_reward) out"
        )
    if conditioner is not None and target_reward is None and conditioner.default is None:
        named = " ".join(f"--target-reward {name}=NUMBER" for name in conditioner.names)
        raise ConfigError(
            f"this model is asked for a reward ({', '.join(conditioner.names)}); say for which: {named} (target_reward)"
        )


class _Labels:
    """The new columns of every record."""

    def __init__(self, texts: _Texts, harness: RewardHarness, column: str, terms: Sequence[str]) -> None:
        self.texts, self.harness, self.column, self.terms = texts, harness, column, tuple(terms)
        new = [*texts.names, column, *terms]
        there = {name for index in range(0, len(texts), texts.group) for name in texts.columns(index)}
        for name in new:
            if name in there or new.count(name) > 1:
                whose = "the data has such a column" if name in there else "two new columns would have that name"
                raise ConfigError(
                    f"the column {name!r} cannot be added: {whose}. The reward's column is named by --reward-column"
                    " (reward_column), that of a term by its name in the reward"
                )

    @property
    def identity(self) -> str:
        """Fingerprint of everything that the columns depend on beside the texts."""
        config = self.harness.config
        terms = [(name, term.use, term.weight, term.args) for name, term in config.terms.items()]
        return fingerprint([__version__, self.column, self.terms, reward_sources(config), *terms])

    def write(self, file: ScoredFile, *, batch_size: int, tell: Callable[[int, int], None]) -> None:
        """All that are missing in the file."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        total, group = len(self.texts), self.texts.group
        if file.path.suffix == ".jsonl":
            require_json([(f"record {index // group}", self.texts.columns(index)) for index in range(0, total, group)])
        file.begin({"data": self.texts.identity, "reward": self.identity}, total=total, group=group)
        tell(file.done, total)
        step = max(1, batch_size // group) * group
        while file.done < total:
            file.append(self._of(file.done, min(file.done + step, total)))
            tell(file.done, total)

    def _of(self, begin: int, end: int) -> list[Columns]:
        inputs, columns = self.texts.batch(begin, end)
        raw = self.harness.evaluate(inputs, first_row=begin)
        counts = [len(ids) for ids in inputs.completion_ids]
        lengths, width = torch.tensor(counts, dtype=torch.long), max(counts)
        scores = self.harness.combine(raw, lengths, width, update_moments=False, unscaled=True)
        totals = scores.totals.masked_fill(~scores.scored, math.nan).tolist()
        values = {self.column: totals, **{name: scores.terms[name].tolist() for name in self.terms}}
        for row, own in enumerate(columns):
            own.update({name: _shortest(numbers[row]) for name, numbers in values.items()})
        return columns


def _shortest(value: float) -> float | None:
    """A float32 as the shortest number that means the same; None for NaN."""
    return None if math.isnan(value) else float(str(np.float32(value)))


def require_tokenizer(harness: RewardHarness, given: Any) -> Any:
    """The tokenizer for rewards that ask for token ids, if there is one.

    Raises:
        ConfigError: a reward asks for ids, and there is none.
    """
    if given is not None:
        return tokenizer_of(given) if isinstance(given, str | Path) else given
    for name, term in harness.terms.items():
        asks = term.workers.asks if term.workers is not None else asked_by(term.function)  # type: ignore[arg-type]
        if "completion_ids" in asks.names or "completion_ids" in (term.term.args.get("columns") or ()):
            raise ConfigError(
                f"the reward {name!r} asks for completion_ids, and texts have none without a tokenizer; name the model"
                " whose tokens are meant: --tokenizer NAME (tokenizer=...)"
            )
    return None


def _finish(file: ScoredFile, texts: _Texts, column: str, *, drop: bool) -> ScoreResult:
    """The file itself, once all its new columns are there."""
    rows = [{**texts.columns(index), **new} for index, new in enumerate(file.columns())]
    scored = [row for row in rows if row[column] is not None]
    unscored = len(rows) - len(scored)
    if drop and not scored:
        raise RewardError(f"the reward had no opinion on any of the {len(rows)} records, so none would be left")
    if unscored and not drop:
        logger.warning(
            "%d of %d records have no reward (null), which training refuses; leave them out with --drop-unscored"
            " (drop_unscored=True)",
            unscored,
            len(rows),
        )
    kept = scored if drop else rows
    file.finish(kept)
    rewards = tuple(row[column] for row in scored)
    return ScoreResult(path=file.path, records=len(kept), unscored=unscored, dropped=drop, rewards=rewards)
