"""Commands whose first word says what kind of thing they do: ``tropism convert labels ...``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tropism.commands.console import console
from tropism.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of the things that a command does."""

    summary: str
    """One line of help."""
    run: Callable[[Sequence[str]], None]
    """Parses the words behind the kind and does it; imports its module only then."""


def run_kind(command: str, purpose: str, kinds: Mapping[str, Kind], arguments: Sequence[str]) -> None:
    """Find the kind and run it; without one, show which there are.

    Args:
        command: its name.
        purpose: one sentence of help.
        kinds: by name, in the order of the help.
        arguments: the words behind the command.

    Raises:
        ConfigError: there is no such kind; names the closest one.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        _show_help(command, purpose, kinds)
        return
    name, *rest = arguments
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"tropism {command} knows no {name!r}; {hint}The kinds are: {', '.join(kinds)}")
    kinds[name].run(rest)


def _show_help(command: str, purpose: str, kinds: Mapping[str, Kind]) -> None:
    from rich.table import Table

    out = console()
    out.print(f"usage: tropism {command} KIND ...   (tropism {command} KIND --help says more)\n")
    out.print(f"{purpose}\n")
    table = Table.grid(padding=(0, 2))
    for name, kind in kinds.items():
        table.add_row(f"  {name}", kind.summary)
    out.print(table)
