"""tropism methods [NAME]"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.padding import Padding
from rich.text import Text

from tropism.commands.console import console


@dataclass(frozen=True, kw_only=True)
class Options:
    """List the methods, or the fields of one."""

    name: tyro.conf.Positional[str] = ""
    """A method, to see its fields; leave it out for the list."""


def run(arguments: Sequence[str]) -> None:
    """Show the table of methods, or one method's fields."""
    options = tyro.cli(Options, args=arguments, prog="tropism methods", description=Options.__doc__)
    from tropism.algorithms import ALGORITHMS, INFERENCE_ONLY
    from tropism.commands.recipe_help import entries, show_entries
    from tropism.config import method_named

    out = console()
    if not options.name:
        for name, method in ALGORITHMS.items():
            first = " ".join((inspect.getdoc(method) or "").split("\n\n")[0].split())
            out.print(Text.assemble((f"{name:<13}", "bold"), ("learns from ", "dim"), method.learns_from))
            for line in (first, f"presets: {', '.join(method.presets) or 'none'}"):
                out.print(Padding(Text(line), (0, 0, 0, 13)))
        for name, how in INFERENCE_ONLY.items():
            out.print(Text.assemble((f"{name:<13}", "bold"), ("learns nothing: ", "dim"), "for inference only"))
            out.print(Padding(Text(how), (0, 0, 0, 13)))
        out.print("\nThe fields of one: tropism methods NAME. In a recipe: algorithm: {name: NAME, preset: ...}")
        return
    if options.name in INFERENCE_ONLY:
        out.print(Text(f"{options.name} is for inference only. {INFERENCE_ONLY[options.name]}"))
        return
    method = method_named(options.name)
    out.print(inspect.getdoc(method))
    out.print(f"presets: {', '.join(method.presets) or 'none'}\n")
    show_entries(out, entries(method, "algorithm."))
