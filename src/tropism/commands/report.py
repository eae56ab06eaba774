"""tropism report RUN"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from tropism.commands.console import console


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the report.html of a run anew; the run may still be going on."""

    run: tyro.conf.Positional[str]
    """The run folder, such as runs/demo."""


def run(arguments: Sequence[str]) -> None:
    """Write the report and say where it is."""
    options = tyro.cli(Options, args=arguments, prog="tropism report", description=Options.__doc__)
    from tropism.evaluation.report import write_report

    console().print(str(write_report(options.run)), soft_wrap=True)
