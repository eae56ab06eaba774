"""tropism convert KIND ..."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tropism.commands.console import console
from tropism.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What can be converted."""

    summary: str
    """One line of help."""
    run: Callable[[Sequence[str]], None]
    """Parses the words behind the kind and converts; imports its module only then."""


def _openai_checkpoint(arguments: Sequence[str]) -> None:
    from tropism.commands import convert_openai_checkpoint

    convert_openai_checkpoint.run(arguments)


def _labels(arguments: Sequence[str]) -> None:
    from tropism.commands import convert_labels

    convert_labels.run(arguments)


KINDS: dict[str, Kind] = {
    "openai-checkpoint": Kind(
        summary="GPT-2 or lm-human-preferences checkpoints of TensorFlow, as a plain Hugging Face folder.",
        run=_openai_checkpoint,
    ),
    "labels": Kind(
        summary="Label files of lm-human-preferences (JSON with token ids), as JSON lines with texts.",
        run=_labels,
    ),
}
"""By name, in the order of the help."""


def run(arguments: Sequence[str]) -> None:
    """Find the kind and run it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _show_help()
        return
    name, *rest = arguments
    if name not in KINDS:
        close = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"tropism convert knows no {name!r}; {hint}The kinds are: {', '.join(KINDS)}")
    KINDS[name].run(rest)


def _show_help() -> None:
    from rich.table import Table

    out = console()
    out.print("usage: tropism convert KIND ...   (tropism convert KIND --help says more)\n")
    out.print("Turn what other programs wrote into what this one reads.\n")
    table = Table.grid(padding=(0, 2))
    for name, kind in KINDS.items():
        table.add_row(f"  {name}", kind.summary)
    out.print(table)
