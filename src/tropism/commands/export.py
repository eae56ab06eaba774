"""tropism export RUN --out DIR"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from tropism.commands.asked_targets import parsed_targets
from tropism.commands.console import console
from tropism.errors import ConfigError, TropismError

if TYPE_CHECKING:
    from tropism.export import Export


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write what a run trained as a plain Hugging Face folder, which any server of such models loads without tropism.

    Adapters are merged, partly trained models are whole, heads that only training needs are left out, reward models
    become sequence classifiers, and a target that the model is asked for is built in. The folder is loaded anew and
    compared with the trained model before it gets its name.
    """

    source: tyro.conf.Positional[str]
    """A run folder, a model or adapter folder, a .gguf file, a hub id, or "demo"."""
    out: Path
    """The folder to write; one that holds anything but an earlier export is refused."""
    step: int | None = None
    """Of a run: its checkpoint after this step, in place of its last model."""
    best: bool = False
    """Of a run: the weights of its best evaluation."""
    base: str | None = None
    """What a checkpoint or an adapter stands on, where it no longer lies where the recipe or the adapter says."""
    target_reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Of a model that is asked for rewards: what to ask for, in the reward's own units. A number, or NAME=NUMBER once
    for each of several rewards; those left out stay open. Quark asks for its best without."""
    slot_token: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Where the vocabulary has no free row: a token to give up for the target, or its id; once for each reward."""
    keep_heads: bool = False
    """Keep the Q heads of ilql beside the plain files, so that tropism can steer the export with --beta."""
    gguf: str | None = None
    """Write a GGUF file into the folder, too: f16 (which --gguf alone means), f32, bf16, q8_0, tq1_0, tq2_0 or auto. It
    needs llama.cpp's convert_hf_to_gguf.py."""
    gguf_converter: Path | None = None
    """Where convert_hf_to_gguf.py is, if it is not on PATH."""
    push_to_hub: str | None = None
    """USER/NAME of a model repository on the Hugging Face hub to upload the folder to; it is made where there is none.
    The token is that of `hf auth login`, or HF_TOKEN."""
    private: bool = False
    """Make that repository a private one."""
    device: str = "cpu"
    """Where to load and compare: auto, cpu, cuda, cuda:1, mps."""


def run(arguments: Sequence[str]) -> None:
    """Write the folder, say what was found, and convert or upload it where that is asked for."""
    from tropism.export_gguf import DEFAULT, TYPES, check_type, find_converter
    from tropism.export_hub import check_repository

    options = tyro.cli(
        Options,
        args=_with_kind(arguments, TYPES, DEFAULT),
        prog="tropism export",
        description=Options.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    # What can be told before the model is loaded is told then.
    if options.push_to_hub is not None:
        check_repository(options.push_to_hub)
    elif options.private:
        raise ConfigError("--private is about the repository that --push-to-hub USER/NAME makes; give that, too")
    if options.gguf_converter is not None and options.gguf is None:
        raise ConfigError("--gguf-converter is for --gguf; give that, too")
    targets = parsed_targets(options.target_reward, "--target-reward")
    from tropism.commands.quiet import quieten_libraries
    from tropism.export import export_model

    converter, missing = None, None
    if options.gguf is not None:
        check_type(options.gguf)
        try:
            converter = find_converter(options.gguf_converter)
        except ConfigError as error:
            missing = error  # the plain folder is worth having all the same
    quieten_libraries()
    tokens = [int(word) if word.isdecimal() else word for word in options.slot_token]
    export = export_model(
        options.source,
        options.out,
        targets=targets,
        slot_tokens=tokens or None,
        step=options.step,
        best=options.best,
        base=options.base,
        keep_heads=options.keep_heads,
        device=options.device,
    )
    show(export)
    if missing is not None:
        raise ConfigError(f"the plain folder {export.folder} is whole, but no GGUF file was made of it: {missing}")
    if converter is not None and options.gguf is not None:
        _convert(export.folder, options.gguf, converter)
    if options.push_to_hub is not None:
        _push(export.folder, options.push_to_hub, private=options.private)


def _with_kind(arguments: Sequence[str], kinds: Sequence[str], default: str) -> list[str]:
    """``--gguf`` without a kind means the default one."""
    words = list(arguments)
    for place, word in enumerate(words):
        after = words[place + 1] if place + 1 < len(words) else "-"
        if word == "--gguf" and after not in kinds and (after.startswith("-") or _is_no_kind(words, place)):
            words.insert(place + 1, default)
            break
    return words


def _is_no_kind(words: Sequence[str], place: int) -> bool:
    """Whether the word after ``--gguf`` is the source: nothing else in the line can be it."""
    flags = {"--best", "--keep-heads", "--private"}
    taken = {i + 1 for i, word in enumerate(words) if word.startswith("--") and "=" not in word and word not in flags}
    return not any(i not in taken and not word.startswith("-") for i, word in enumerate(words))


def _convert(folder: Path, kind: str, converter: Path) -> None:
    from tropism.export_card import add_gguf
    from tropism.export_gguf import write_gguf

    file = write_gguf(folder, kind, converter)
    add_gguf(folder, file)
    console().print(f"written: {file} (by {converter.name}; its numbers are not compared)", soft_wrap=True)


def _push(folder: Path, repository: str, *, private: bool) -> None:
    from tropism.export_hub import push_folder

    try:
        address = push_folder(folder, repository, private=private)
    except TropismError as error:
        raise type(error)(
            f"{error}. The folder stays as it is; upload it later with: hf upload {repository} {folder}"
        ) from error
    console().print(f"uploaded: {address}", soft_wrap=True)


def show(export: Export) -> None:
    """What was written, where the target sits, what is no part of it, and how equal the two models are."""
    out, found = console(), export.found
    if export.step is not None:
        of = "" if export.checkpoint is None else f", from {export.checkpoint}"
        out.print(f"weights: after step {export.step}{of}", soft_wrap=True)
    for name, value in export.targets.items():
        out.print(f"{name}: {'left open' if value is None else f'{value:g}'}, built in (mechanism {export.mechanism})")
    for slot in export.slots:
        out.print(
            f"slot: row {slot.row} of the vocabulary ({slot.kind}), which the tokenizer calls {slot.name}",
            soft_wrap=True,
        )
    for note in export.notes:
        out.print(f"note: {note}", soft_wrap=True)
    number = "score" if export.kind == "reward-model" else "logit"
    limit = found.tolerance * max(1.0, found.largest_logit)
    greedy = f", and {found.greedy_texts} greedy completions are equal" if found.greedy_texts else ""
    out.print(
        f"verified: on {found.texts} texts {number}s differ by at most {found.largest_difference:.1e} (allowed "
        f"{limit:.1e}: {found.tolerance:g} of the largest {number}, {found.largest_logit:.1f}){greedy}",
        soft_wrap=True,
    )
    if found.dtype != "float32" and export.slots:
        out.print(f"weights are {found.dtype}, so a slot's row is rounded to it, as every weight is", soft_wrap=True)
    out.print(f"written: {export.folder}", soft_wrap=True)
