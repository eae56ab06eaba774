"""tropism convert labels FILE.json --tokenizer MODEL --out FILE.jsonl"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from tropism.commands.console import console, printable
from tropism.commands.jsonl_file import require_free, write_records

if TYPE_CHECKING:
    from tropism.data.label_files import ConvertedLabels

COLUMNS = {
    "choice": "prompt, completions, choice",
    "rating": "prompt, completion, rating",
    "difference": "prompt, completions, difference",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a label file of openai/lm-human-preferences, which holds token ids, as one JSON object of texts per line.

    All three kinds are taken: best_of_N, scalar_rating and scalar_compare. Padding is left out.
    """

    source: tyro.conf.Positional[Path]
    """The label file (.json, also .gz)."""
    tokenizer: str
    """Hub id, model folder or run folder with the tokenizer of the labels: that of GPT-2 for the published ones."""
    out: Path
    """The .jsonl file to write. It appears once it is whole."""
    overwrite: bool = False
    """Replace a file that is there."""


def run(arguments: Sequence[str]) -> None:
    """Write the file, and say what does not survive."""
    options = tyro.cli(
        Options,
        args=arguments,
        prog="tropism convert labels",
        description=Options.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    require_free(options.out, overwrite=options.overwrite)
    from tropism.commands.quiet import quieten_libraries
    from tropism.data.label_files import convert_labels
    from tropism.tokenizer_of import tokenizer_of

    quieten_libraries()
    converted = convert_labels(options.source, tokenizer_of(options.tokenizer))
    write_records(options.out, converted.rows)
    show(converted, options.out)


def show(converted: ConvertedLabels, path: Path) -> None:
    """What was written, and how much of it is encoded to other ids again."""
    out = console()
    if converted.changed:
        out.print(
            f"{converted.changed} of {len(converted.rows)} records are encoded to other ids than they were decoded"
            " from: they were sampled as other tokens than the tokenizer makes of this text, or end within a character."
            " To train on the exact ids, name the label file itself as data",
            soft_wrap=True,
        )
    out.print(printable(f"written: {path} ({len(converted.rows)} records: {COLUMNS[converted.kind]})"), soft_wrap=True)
