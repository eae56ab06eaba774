"""tropism export RUN --target-reward 1.0 --out DIR"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from tropism.commands.asked_targets import parsed_targets
from tropism.commands.console import console

if TYPE_CHECKING:
    from tropism.export import Export


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model with a target built in, as a plain Hugging Face folder that any server of such models can serve.

    The folder is loaded anew and compared with the model before it gets its name.
    """

    source: tyro.conf.Positional[str]
    """A run folder, a model folder, a .gguf file, a hub id, or "demo"."""
    out: Path
    """The folder to write; one that holds anything but an earlier export is refused."""
    target_reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to ask for, in the reward's own units: a number, or NAME=NUMBER once for each of several rewards; those left
    out stay open. A model that cannot be asked is written as it is, without."""
    slot_token: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Where the vocabulary has no free row: a token to give up for the slot, or its id; once for each reward."""
    device: str = "cpu"
    """Where to load and compare: auto, cpu, cuda, cuda:1, mps."""


def run(arguments: Sequence[str]) -> None:
    """Write the folder, and say what was found."""
    options = tyro.cli(
        Options,
        args=arguments,
        prog="tropism export",
        description=Options.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    targets = parsed_targets(options.target_reward, "--target-reward")
    from tropism.commands.quiet import quieten_libraries
    from tropism.export import export_at_target

    quieten_libraries()
    tokens = [int(word) if word.isdecimal() else word for word in options.slot_token]
    show(export_at_target(options.source, targets, options.out, tokens or None, device=options.device))


def show(export: Export) -> None:
    """What was written, where the target sits, and how equal the two models are."""
    out, found = console(), export.found
    for name, value in export.targets.items():
        out.print(f"{name}: {'left open' if value is None else f'{value:g}'}, built in (mechanism {export.mechanism})")
    for slot in export.slots:
        out.print(
            f"slot: row {slot.row} of the vocabulary ({slot.kind}), which the tokenizer calls {slot.name}",
            soft_wrap=True,
        )
    limit = found.tolerance * max(1.0, found.largest_logit)
    out.print(
        f"verified: on {found.texts} texts logits differ by at most {found.largest_difference:.1e} (allowed "
        f"{limit:.1e}: {found.tolerance:g} of the largest logit, {found.largest_logit:.1f}), and {found.greedy_texts} "
        "greedy completions are equal",
        soft_wrap=True,
    )
    if found.dtype != "float32" and export.slots:
        out.print(f"weights are {found.dtype}, so a slot's row is rounded to it, as every weight is", soft_wrap=True)
    out.print(f"written: {export.folder}", soft_wrap=True)
