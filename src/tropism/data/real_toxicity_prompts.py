"""Prompts with toxicity scores in the format of RealToxicityPrompts (https://arxiv.org/abs/2009.11462).

A record holds the two halves of a sentence, each with the scores of a toxicity classifier, and whether the prompt is
one of those that make most models toxic::

    {"prompt": {"text": "...", "toxicity": 0.3, ...}, "continuation": {"text": " ...", "toxicity": 0.1, ...},
     "challenging": false, ...}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tropism.data.files import shown
from tropism.data.prepared import PreparedData, check_choice, name_of, prepared
from tropism.data.readers import Record, locate_records
from tropism.errors import ConfigError, DataError

HUB_ID = "allenai/real-toxicity-prompts"
"""The data set on the Hugging Face hub: 99,442 records in one split, `train`."""

Form = Literal["prompts", "pairs", "texts"]
"""What a record becomes: a prompt to complete, a prompt with its completion, or one text."""
Judged = Literal["prompt", "continuation", "both", "either"]
"""What a threshold is about."""


@dataclass(frozen=True, kw_only=True)
class _Half:
    """Prompt or continuation."""

    text: str
    toxicity: float | None


def real_toxicity_prompts(
    source: Any = HUB_ID,
    *,
    challenging: bool = False,
    threshold: float | None = None,
    threshold_of: Judged = "both",
    form: Form = "prompts",
    limit: int | None = None,
) -> PreparedData:
    """Records of RealToxicityPrompts, filtered, as prompts or demonstrations.

    Every record of the result has the columns ``prompt_toxicity``, ``continuation_toxicity`` (null where unscored) and
    ``challenging``, which rewards and reports can use, and

    - ``prompts``: ``prompt`` and ``continuation`` (how the sentence went on);
    - ``pairs``: ``prompt`` and ``completion``;
    - ``texts``: ``text``, prompt and continuation with one blank between them.

    Args:
        source: ``DataConfig``, path of a file (.jsonl, .jsonl.gz, .parquet, ...), hub id, list or data set.
        challenging: keep the prompts that the data set calls challenging, only.
        threshold: keep what has at least this toxicity, from 0 to 1; a half without a score has not.
        threshold_of: the prompt, the continuation, both of them, or either.
        form: what a record becomes.
        limit: keep at most so many, from the front; those beyond are counted.

    Raises:
        ConfigError: a setting that is none.
        DataError: the source has another format, or no record is left; names the record, or the filter.
    """
    check_choice("form", form, get_args(Form))
    check_choice("threshold_of", threshold_of, get_args(Judged))
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"threshold must be from 0 to 1, got {threshold}")
    if threshold is None and threshold_of != "both":
        raise ConfigError(f"threshold_of is {threshold_of!r}, but there is no threshold; set threshold, too")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    located = locate_records(source)
    made: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for record in located:
        prompt, continuation = _half(record, "prompt"), _half(record, "continuation")
        reason = _why_not(record, prompt, continuation, challenging, threshold, threshold_of, form)
        if reason is None and limit is not None and len(made) == limit:
            reason = f"beyond the limit of {limit}"
        if reason is None:
            made.append(_made(record, prompt, continuation, form))
        else:
            left_out[reason] += 1
    return prepared(made, noun="records", read=len(located), left_out=left_out, name=name_of(source))


def _half(record: Record, name: str) -> _Half:
    value = record.columns.get(name)
    if value is None and name == "continuation":
        return _Half(text="", toxicity=None)
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        raise DataError(
            f"{record.where}: {name!r} of RealToxicityPrompts is a record with `text` and `toxicity`; here it is"
            f" {shown(value)}"
        )
    toxicity = value.get("toxicity")
    if toxicity is None or (isinstance(toxicity, float) and math.isnan(toxicity)):
        return _Half(text=value["text"], toxicity=None)
    if isinstance(toxicity, bool) or not isinstance(toxicity, int | float) or not 0 <= toxicity <= 1:
        raise DataError(f"{record.where}: the toxicity of {name!r} is {shown(toxicity)}, expected a number from 0 to 1")
    return _Half(text=value["text"], toxicity=float(toxicity))


def _why_not(
    record: Record,
    prompt: _Half,
    continuation: _Half,
    challenging: bool,
    threshold: float | None,
    threshold_of: Judged,
    form: Form,
) -> str | None:
    """Why a record is left out; None where it is kept."""
    if challenging:
        if not isinstance(record.columns.get("challenging"), bool):
            raise DataError(f"{record.where}: there is no true or false in `challenging`; filter by threshold instead")
        if not record.columns["challenging"]:
            return "not challenging (challenging)"
    if threshold is not None:
        halves = {"prompt": prompt, "continuation": continuation}
        asked = [half for name, half in halves.items() if threshold_of in (name, "both", "either")]
        toxic = [half.toxicity is not None and half.toxicity >= threshold for half in asked]
        if not (any(toxic) if threshold_of == "either" else all(toxic)):
            what = {"both": "prompt or continuation is", "either": "neither prompt nor continuation is"}
            said = what.get(threshold_of, f"{threshold_of} is")
            word = "of" if threshold_of == "either" else "not of"
            return f"{said} {word} toxicity {threshold:g} or more (threshold)"
    if not prompt.text.strip():
        return "the prompt is blank"
    if form != "prompts" and not continuation.text.strip():
        return f"there is no continuation (form {form})"
    return None


def _made(record: Record, prompt: _Half, continuation: _Half, form: Form) -> dict[str, Any]:
    """The columns of one record; what follows a prompt begins with a blank."""
    following = continuation.text
    if following and not (following[0].isspace() or prompt.text[-1].isspace()):
        following = f" {following}"
    if form == "texts":
        columns: dict[str, Any] = {"text": prompt.text + following}
    else:
        columns = {"prompt": prompt.text, "continuation" if form == "prompts" else "completion": following}
    return {
        **columns,
        "prompt_toxicity": prompt.toxicity,
        "continuation_toxicity": continuation.toxicity,
        "challenging": record.columns.get("challenging"),
    }
