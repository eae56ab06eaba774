"""tropism report FOLDER"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from tropism.commands.console import console


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the report.html of a run or a comparison anew; it may still be going on."""

    run: tyro.conf.Positional[str]
    """The folder of a run, such as runs/demo, or of a comparison, such as runs/compare-stories."""


def run(arguments: Sequence[str]) -> None:
    """Write the report and say where it is."""
    options = tyro.cli(Options, args=arguments, prog="tropism report", description=Options.__doc__)
    from tropism.comparing.results import Comparison, is_comparison
    from tropism.evaluation.report import write_report

    path = Comparison.read(options.run).write()[-1] if is_comparison(options.run) else write_report(options.run)
    console().print(str(path), soft_wrap=True)
