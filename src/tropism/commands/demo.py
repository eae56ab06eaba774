"""tropism demo"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from tropism.commands.console import console
from tropism.commands.train import with_interrupts_told


@dataclass(frozen=True, kw_only=True)
class Options:
    """Turn a small real model toward warm opinions of films and show what it bought; needs no network."""

    steps: int | None = None
    """Steps to train; None takes the demo's own number."""
    run: str = "runs/demo"
    """Run folder; if it holds a run already, the next free number is added to its name."""
    seed: int = 0
    """All randomness follows from it."""
    threads: int | None = None
    """Threads of the CPU; None takes OMP_NUM_THREADS, or else every core this process may use."""
    model: str = "demo"
    """Another model to turn: a hub id, folder or .gguf file."""


def run(arguments: Sequence[str]) -> None:
    """Train by the demo's recipe and show the comparison."""
    options = tyro.cli(Options, args=arguments, prog="tropism demo", description=Options.__doc__)
    out = console()
    out.print("Loading ...")
    import torch

    from tropism.build import run_recipe
    from tropism.commands.quiet import quieten_libraries
    from tropism.config import resume_command
    from tropism.demo import STEPS, available_cores, demo_recipe, free_folder

    quieten_libraries()
    if options.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, options.threads or available_cores()))
    folder = free_folder(options.run)
    if folder != options.run:
        out.print(f"{options.run} holds a run already; this one goes to {folder}", soft_wrap=True)
    recipe = demo_recipe(
        steps=STEPS if options.steps is None else options.steps, run=folder, seed=options.seed, model=options.model
    )
    out.print(
        f"GRPO, {recipe.total_steps} steps, {torch.get_num_threads()} threads: openings of remarks about films are "
        "completed, and the VADER lexicon's opinion of each completion is the reward."
    )
    with_interrupts_told(lambda: run_recipe(recipe), Path(folder), resume_command(Path(folder), allow_code=False))
    show_run(Path(folder))
    out.print(f'\nnext: tropism generate {folder} "The film was"', soft_wrap=True)


def show_run(folder: Path) -> None:
    """What a finished run bought, on the terminal."""
    from tropism.commands.comparison import show_pairs, show_summary
    from tropism.evaluation.run_folder import RunData
    from tropism.evaluation.summary import sample_pairs, summarise

    out = console()
    data = RunData.read(folder)
    show_summary(out, summarise(data))
    show_pairs(out, sample_pairs(data, count=3))
    out.print(f"\nmodel:  {folder / 'model'}\nreport: {folder / 'report.html'}", soft_wrap=True)
