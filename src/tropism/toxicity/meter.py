"""``ToxicityMeter``: completes prompts, scores the completions, and says how toxic they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tropism.best_of import text_of
from tropism.data.config import DataConfig
from tropism.data.encoding import room_for_prompt
from tropism.data.order import fingerprint
from tropism.errors import ConfigError
from tropism.generation import TextPolicy
from tropism.models.loading import ModelConfig
from tropism.recipe_identity import weights_fingerprint
from tropism.recipe_processes import processes_for_measuring
from tropism.schema import to_plain
from tropism.targets.conditioner import Targets
from tropism.toxicity import scorers as scoring
from tropism.toxicity.files import GrowingRows, Overwrite, Row, write_summary
from tropism.toxicity.generating import (
    Generator,
    generation_of,
    generator_of,
    is_random,
    max_new_tokens,
    plain_settings,
)
from tropism.toxicity.prompts import PLACE, Asked, Choice, Framing, Overlong, Selection, choose, encode
from tropism.toxicity.result import ToxicityResult
from tropism.toxicity.scorers import Scorers
from tropism.training.processes import Processes
from tropism.training.run_folder import as_text
from tropism.types import RewardInputs

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with the numbers of responses that are done and of all."""


class ToxicityMeter:
    """Measures how toxic the completions of a model are.

    Args:
        model: a run folder, anything that ``load_model`` takes, or a ``TextPolicy``.
        scorers: what judges texts, each for itself: registered rewards (`profanity` needs no network), functions,
            ``{"name": {"use": "classifier", "args": {...}}}``, or a list of these; or ``Scorers``, which have their own
            threshold and allow_code. High means toxic.
        sampling: a ``Sampling``, a ``transformers.GenerationConfig`` (beams and all), a file of either, or a mapping.
            None: 20 tokens from the model's own distribution.
        custom_prompt: what the model reads, with `{prompt}` where the prompt goes.
        samples_per_prompt: completions of each prompt.
        batch_size: responses that are sampled and scored at once. With a ``GenerationConfig`` that samples, other
            batches are other samples.
        chat: send the text as a user's message through the model's chat template.
        system_prompt: system message before every chat.
        score_prompts: score the prompts, too.
        threshold: from which score on a text is toxic; one number, or one per scorer. None: 0.5, for scores in [0, 1].
        target_reward: what a reward-conditioned model is asked for.
        seed: of the samples; equal seeds give equal ones, whatever the number of processes.
        device: where the model computes, if it is not loaded yet.
        allow_code: let scorers name code: ``module:function`` or ``file.py:function``.

    Raises:
        ConfigError: a setting that cannot be, such as a template without `{prompt}` or a label that a scorer lacks.
    """

    def __init__(
        self,
        model: Any,
        scorers: Any = scoring.DEFAULT,
        *,
        sampling: Any = None,
        custom_prompt: str = PLACE,
        samples_per_prompt: int = 1,
        batch_size: int = 32,
        chat: bool = False,
        system_prompt: str | None = None,
        score_prompts: bool = True,
        threshold: float | Mapping[str, float] | None = None,
        target_reward: Targets = None,
        seed: int = 0,
        device: str = "auto",
        allow_code: bool = False,
    ) -> None:
        self.framing = Framing(custom_prompt=custom_prompt, chat=chat, system_prompt=system_prompt)
        self.generation = generation_of(sampling)
        for name, value in (("samples_per_prompt", samples_per_prompt), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if samples_per_prompt > 1 and not is_random(self.generation):
            raise ConfigError(
                f"samples_per_prompt is {samples_per_prompt}, but these settings complete a prompt the same way every"
                " time; sample (temperature above 0, or do_sample with a generation config), or take one"
            )
        self.samples_per_prompt, self.batch_size = samples_per_prompt, batch_size
        self.score_prompts, self.target_reward, self.seed = score_prompts, target_reward, seed
        self.scorers = scorers
        if isinstance(scorers, Scorers):
            if threshold is not None or allow_code:
                name = "threshold" if threshold is not None else "allow_code"
                raise ConfigError(f"Scorers have their own {name}: give it to them, Scorers(..., {name}=...)")
        else:
            self.scorers = Scorers(scorers, threshold=threshold, allow_code=allow_code)
        self._model, self._device = model, device

    @cached_property
    def policy(self) -> TextPolicy:
        """The model, loaded when it is first needed."""
        if isinstance(self._model, TextPolicy):
            return self._model
        accelerator = self._processes.accelerator
        own_device = self._processes.count > 1 and accelerator.device.type == "cuda"
        device = str(accelerator.device) if own_device else self._device
        if isinstance(self._model, ModelConfig) and device != "auto":
            return TextPolicy.load(replace(self._model, device=device))
        if isinstance(self._model, str | Path):
            return TextPolicy.load(self._model, device=device)
        return TextPolicy.load(self._model)

    @cached_property
    def _processes(self) -> Processes:
        processes = processes_for_measuring(self._device)
        processes.leave_talking_to_main()
        return processes

    def measure(
        self,
        prompts: Any,
        folder: str | Path | None = None,
        *,
        prompt_column: str | None = None,
        challenging: bool = False,
        skip: int = 0,
        limit: int | None = None,
        overlong: Overlong = "error",
        toxicity_column: str | None = None,
        overwrite: Overwrite = False,
        on_progress: Progress | None = None,
    ) -> ToxicityResult:
        """Complete every prompt, score what comes out, and write both down.

        Called again after it was stopped, it goes on after the last batch that was kept; a finished folder is read.

        Args:
            prompts: a list of texts or records, a file (.txt, .jsonl, .csv, each also .gz; .parquet), a
                ``datasets.Dataset``, a hub id or a ``DataConfig``. Records of RealToxicityPrompts bring their toxicity,
                which parts toxic from other prompts.
            folder: where the tables, ``toxicity.json`` and ``report.html`` go; None: nowhere.
            prompt_column, challenging, skip, limit, overlong, toxicity_column: see ``Selection``.
            overwrite: replace the measurement that is in the folder, once the new one is whole; ``"other"``: only
                where it is not this one.
            on_progress: called in the first process.

        Raises:
            TropismError: something about the prompts, the model, a scorer or the folder that cannot work.
        """
        selection = Selection(
            prompt_column=prompt_column,
            challenging=challenging,
            skip=skip,
            limit=limit,
            overlong=overlong,
            toxicity_column=toxicity_column,
        )
        store = GrowingRows(folder, overwrite=overwrite, unknown=self.scorers.unknown)
        choice = choose(prompts, selection)
        for one in choice.prompts:
            self.framing.applied(one.text, one.record.where)
        with ExitStack() as stack:
            if self._processes.count > 1:
                stack.enter_context(self._processes.interrupts.listening())
            stack.enter_context(closing(self.scorers))
            generate = generator_of(self.policy, self.generation, seed=self.seed, target_reward=self.target_reward)
            asked = encode(choice, self.policy.tokenizer, self.framing, room=self._room(), overlong=overlong)
            settings = self._settings(prompts, choice, selection, len(asked))
            measurement = _Measurement(self, generate, asked, settings)
            return measurement.run(store, on_progress or (lambda done, total: None))

    def _room(self) -> int | None:
        """Most tokens of a prompt."""
        policy, new = self.policy, max_new_tokens(self.generation)
        taken = 0 if policy.conditioner is None else policy.conditioner.width
        limit = policy.policy.context_length
        room = room_for_prompt(policy.tokenizer, limit, new=new, taken=taken)
        if room is not None and room < 1:
            raise ConfigError(f"max_new_tokens={new} leave no room for a prompt in the model's context of {limit}")
        return room

    def _settings(self, source: Any, choice: Choice, selection: Selection, used: int) -> dict[str, Any]:
        """What a reader wants to know of how it was measured, as plain data."""
        return {
            "model": _name_of(self._model),
            "prompts": {
                "source": _source_of(source),
                "records": choice.records,
                "after_filter": choice.filtered,
                "used": used,
                "left_out_too_long": len(choice.prompts) - used,
                **to_plain(selection),
            },
            "scorers": self.scorers.settings,
            "samples_per_prompt": self.samples_per_prompt,
            **to_plain(self.framing),
            "sampling": plain_settings(self.generation),
            "batch_size": self.batch_size,
            "score_prompts": self.score_prompts,
            "target_reward": self.target_reward,
            "seed": self.seed,
        }


class _Measurement:
    """One pass over all prompts."""

    def __init__(
        self, meter: ToxicityMeter, generate: Generator, asked: Sequence[Asked], settings: Mapping[str, Any]
    ) -> None:
        self.meter, self.generate, self.asked, self.settings = meter, generate, asked, settings
        self.processes, self.scorers, self.k = meter._processes, meter.scorers, meter.samples_per_prompt
        self.total = len(asked) * self.k
        self.chunk = max(1, meter.batch_size // self.k) * self.k
        """Responses that are made at once: all of some prompts."""

    @cached_property
    def identity(self) -> dict[str, str]:
        """Fingerprints of all that the rows depend on, so that rows of different measurements never mix."""
        policy, sampling = self.meter.policy, self.settings["sampling"]
        weights = {name: weight.detach() for name, weight in policy.policy.named_parameters()}
        tokenizer = policy.tokenizer
        read = [sorted(tokenizer.get_vocab().items()), [tokenizer.chat_template if self.meter.framing.chat else None]]
        target = None if policy.conditioner is None else policy.conditioner.values(self.meter.target_reward)
        batch = self.chunk if sampling["engine"] == "transformers" else None
        names = ("samples_per_prompt", "custom_prompt", "chat", "system_prompt", "sampling", "score_prompts", "seed")
        settings = {name: self.settings[name] for name in names} | {"overlong": self.settings["prompts"]["overlong"]}
        return {
            "model": fingerprint([weights_fingerprint(weights), *read, [target]]),
            # Scorers may read any column.
            "prompts": fingerprint([[one.text, str(one.toxicity), dict(one.prompt.columns)] for one in self.asked]),
            "scorers": self.scorers.identity,
            "settings": fingerprint([settings, [batch]]),
        }

    def run(self, store: GrowingRows, tell: Progress) -> ToxicityResult:
        """Make what is missing, and put the whole together."""
        there = self._on_main(lambda: store.finished(self.identity))
        if there is not None:
            return self._judged_anew(there)
        if self.meter.score_prompts:
            self.scorers.require_readable(self.asked)
        done = self._on_main(lambda: store.begin(self.identity, total=self.total, group=self.chunk))
        self._on_main(lambda: self._check_scores(store.rows()))
        if self.processes.is_main:
            tell(done, self.total)
        starts = range(done, self.total, self.chunk)
        for first in range(0, len(starts), self.processes.count):
            mine = starts[first + self.processes.rank : first + self.processes.rank + 1]
            parts = self.processes.together(lambda mine=mine: [row for begin in mine for row in self._rows(begin)])  # type: ignore[misc]
            rows = [row for part in parts for row in part]
            self._on_main(lambda rows=rows: store.append(rows))  # type: ignore[misc]
            done += len(rows)
            if self.processes.is_main:
                tell(done, self.total)
        rows = self._on_main(store.rows)
        result = ToxicityResult.of(
            rows,
            scorers=self.scorers.names,
            samples_per_prompt=self.k,
            thresholds=self.scorers.thresholds,
            settings=self.settings,
            identity=self.identity,
            path=store.folder,
        )
        self._on_main(lambda: store.finish(result, rows))
        return result

    def _judged_anew(self, there: ToxicityResult) -> ToxicityResult:
        """A finished measurement; its numbers are written anew where other thresholds than its own are given."""
        result = there.with_thresholds({**there.thresholds, **self.scorers.given})
        if dict(there.thresholds) != dict(result.thresholds):
            assert result.path is not None
            folder = result.path
            self._on_main(lambda: write_summary(result, folder))
        return result

    def _check_scores(self, rows: Sequence[Row]) -> None:
        """See that rows that are there already, perhaps made with another threshold, are judged by one for them."""
        for kind in ("response", "prompt"):
            columns = {name: [row[f"{kind}_score/{name}"] for row in rows] for name in self.scorers.names}
            self.scorers.check({name: [math.nan if v is None else v for v in vs] for name, vs in columns.items()})

    def _on_main(self, work: Callable[[], T]) -> T:
        """What the first process makes of it, in all processes; an error there is one everywhere."""
        parts = self.processes.together(lambda: [work()] if self.processes.is_main else [], abandon=False)
        return parts[0][0]

    def _rows(self, begin: int) -> list[Row]:
        """The rows from ``begin`` on that are made at once."""
        end = min(begin + self.chunk, self.total)
        asked = self.asked[begin // self.k : end // self.k]
        inputs = self.generate([one.prompt for one in asked], self.k, first_index=begin)
        scores = self.scorers.responses(inputs, first_row=begin)
        of_prompts: Mapping[str, Sequence[float]] = {}
        if self.meter.score_prompts:
            of_prompts = self.scorers.prompts(asked, self.meter.policy.tokenizer, first_row=begin // self.k)
        return [self._row(row, asked[row // self.k], inputs, scores, of_prompts) for row in range(end - begin)]

    def _row(
        self,
        row: int,
        asked: Asked,
        inputs: RewardInputs,
        scores: Mapping[str, Sequence[float]],
        of_prompts: Mapping[str, Sequence[float]],
    ) -> Row:
        responses = {name: _known(values[row]) for name, values in scores.items()}
        prompts = {
            name: _known(of_prompts[name][row // self.k]) if name in of_prompts else None for name in self.scorers.names
        }
        first = self.scorers.names[0]
        return {
            "prompts": as_text(asked.text),
            "responses": as_text(text_of(inputs.completions[row])),
            "prompt_score": prompts[first],
            "response_score": responses[first],
            "sample": row % self.k,
            "finish_reason": inputs.finish_reasons[row],
            "prompt_toxicity": _known(asked.toxicity),
            **{f"prompt_score/{name}": value for name, value in prompts.items()},
            **{f"response_score/{name}": value for name, value in responses.items()},
        }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _source_of(prompts: Any) -> str:
    """Where the prompts came from."""
    if isinstance(prompts, DataConfig):
        return prompts.path
    return str(prompts) if isinstance(prompts, str | Path) else f"a {type(prompts).__name__} given from Python"


def _name_of(model: Any) -> str:
    """What a model was given as."""
    if isinstance(model, str | Path):
        return str(model)
    return model.name if isinstance(model, ModelConfig) else getattr(model, "source", type(model).__name__)
