"""tropism-dump --model BASE --rl AGENT --dump DIR"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tropism.commands.console import console, guarded_output, tell
from tropism.errors import TropismError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write the model of an agent that was trained through ``tropism.envs.textrl`` as a plain Hugging Face folder.

    The folder is loaded anew and compared with the trained weights before it gets its name.
    """

    model: str
    """The model before training: a folder, a hub id, a .gguf file, or "demo"."""
    rl: Path
    """A folder that agent.save wrote, such as OUTDIR/best."""
    dump: Annotated[Path, tyro.conf.arg(aliases=("--dumpdir",))]
    """The folder to write; an older one of that name is replaced."""
    device: str = "cpu"
    """Where to load and compare: auto, cpu, cuda, cuda:1, mps."""


def run(arguments: Sequence[str]) -> None:
    """Write the folder, and say how equal the two models are."""
    options = tyro.cli(Options, args=arguments, prog="tropism-dump", description=Options.__doc__)
    from tropism.commands.quiet import quieten_libraries
    from tropism.envs.textrl_files import dump

    quieten_libraries()
    difference = dump(options.model, options.rl, options.dump, device=options.device)
    out = console()
    out.print(f"verified: logits of the trained model and of the folder differ by at most {difference:.1e}")
    out.print(f"written: {options.dump}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tropism-dump ARGUMENTS``.

    Returns:
        The exit code: 0; 2 for what the user can mend; 130 after Ctrl-C.
    """
    try:
        with guarded_output():
            run(sys.argv[1:] if arguments is None else arguments)
    except TropismError as error:
        tell(str(error), label="error: ", style="bold red")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
