"""tropism data KIND SOURCE --out FILE.jsonl"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import tyro

from tropism.commands.console import console, printable
from tropism.commands.jsonl_file import require_free, write_records
from tropism.commands.kinds import Kind, run_kind
from tropism.data.config import DataConfig

if TYPE_CHECKING:
    from tropism.data.prepared import PreparedData


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every preparation is told."""

    source: tyro.conf.Positional[str]
    """A file (.jsonl, .json, .csv, .tsv, also .gz; .parquet), a saved data set, or a hub id."""
    out: Path
    """The .jsonl file to write, which `data` of a recipe reads. It appears once it is whole."""
    split: str = "train"
    """Split of a saved or hub data set."""
    revision: str | None = None
    """Commit, branch or tag of a hub data set."""
    overwrite: bool = False
    """Replace a file that is there."""

    @property
    def data(self) -> DataConfig:
        """The source."""
        return DataConfig(path=self.source, split=self.split, revision=self.revision)


@dataclass(frozen=True, kw_only=True)
class RealToxicityPromptsOptions(Options):
    """Prompts or demonstrations of RealToxicityPrompts (on the hub: allenai/real-toxicity-prompts), filtered."""

    challenging: bool = False
    """Keep the prompts that the data set calls challenging, only."""
    threshold: float | None = None
    """Keep what has at least this toxicity, from 0 to 1."""
    threshold_of: Literal["prompt", "continuation", "both", "either"] = "both"
    """What the threshold is about."""
    form: Literal["prompts", "pairs", "texts"] = "prompts"
    """A prompt to complete; prompt and completion; or one text of both."""
    limit: int | None = None
    """Keep at most so many, from the front."""


@dataclass(frozen=True, kw_only=True)
class DialogueOptions(Options):
    """What dialogues and pairs are told."""

    delete_last_answer: bool = False
    """Leave the last answer out: prompts to complete."""
    user_name: str = "User:"
    """Stands before what a user says."""
    bot_name: str = "Assistant:"
    """Stands before an answer."""
    text_only: bool = False
    """Leave the columns out that say where a record comes from."""


@dataclass(frozen=True, kw_only=True)
class DialoconanOptions(DialogueOptions):
    """Dialogues in the format of DIALOCONAN: one record per exchange, with all exchanges before it."""

    form: Literal["texts", "pairs", "chats"] = "texts"
    """One text; prompt and completion, which are that text parted before the last answer; or chat messages."""


@dataclass(frozen=True, kw_only=True)
class ConanOptions(DialogueOptions):
    """Pairs of hate speech and answer in the formats of CONAN and multi-target CONAN."""

    form: Literal["texts", "pairs", "chats"] = "pairs"
    """Prompt and completion as they stand there; one text with names before both; or chat messages."""
    targets: tuple[str, ...] = ()
    """Keep pairs about these, only; as the data spells them."""


T = TypeVar("T", bound=Options)


def _parsed(options: type[T], kind: str, arguments: Sequence[str]) -> T:
    """The options of a kind; looks at the file to write before anything is read."""
    parsed = tyro.cli(
        options,
        args=arguments,
        prog=f"tropism data {kind}",
        description=options.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    require_free(parsed.out, overwrite=parsed.overwrite)
    from tropism.commands.quiet import quieten_libraries

    quieten_libraries()
    return parsed


def _real_toxicity_prompts(arguments: Sequence[str]) -> None:
    options = _parsed(RealToxicityPromptsOptions, "real-toxicity-prompts", arguments)
    from tropism.data.real_toxicity_prompts import real_toxicity_prompts

    data = real_toxicity_prompts(
        options.data,
        challenging=options.challenging,
        threshold=options.threshold,
        threshold_of=options.threshold_of,
        form=options.form,
        limit=options.limit,
    )
    _write(data, options.out)


def _dialoconan(arguments: Sequence[str]) -> None:
    options = _parsed(DialoconanOptions, "dialoconan", arguments)
    from tropism.data.counter_speech import dialoconan

    data = dialoconan(
        options.data,
        form=options.form,
        delete_last_answer=options.delete_last_answer,
        user_name=options.user_name,
        bot_name=options.bot_name,
        text_only=options.text_only,
    )
    _write(data, options.out)


def _conan(arguments: Sequence[str]) -> None:
    options = _parsed(ConanOptions, "conan", arguments)
    from tropism.data.counter_speech import conan

    data = conan(
        options.data,
        form=options.form,
        delete_last_answer=options.delete_last_answer,
        user_name=options.user_name,
        bot_name=options.bot_name,
        targets=options.targets,
        text_only=options.text_only,
    )
    _write(data, options.out)


KINDS: dict[str, Kind] = {
    "real-toxicity-prompts": Kind(
        summary="RealToxicityPrompts, the challenging ones or above a toxicity.", run=_real_toxicity_prompts
    ),
    "dialoconan": Kind(summary="Dialogues in the format of DIALOCONAN, turn by turn.", run=_dialoconan),
    "conan": Kind(summary="Hate speech and its answers, in the formats of CONAN and multi-target CONAN.", run=_conan),
}
"""By name, in the order of the help."""


def run(arguments: Sequence[str]) -> None:
    """Find the kind and run it."""
    run_kind("data", "Make prompts or demonstrations of a public data set.", KINDS, arguments)


def _write(data: PreparedData, path: Path) -> None:
    """Write the records, and say what became of every row."""
    write_records(path, data.records)
    out = console()
    for line in data.told():
        out.print(printable(line), soft_wrap=True)
    columns = ", ".join(data.records[0])
    out.print(printable(f"written: {path} ({len(data)} records: {columns})"), soft_wrap=True)
