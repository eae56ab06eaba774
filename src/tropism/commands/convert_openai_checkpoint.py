"""tropism convert openai-checkpoint DIR --out DIR"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from tropism.commands.console import console, printable

if TYPE_CHECKING:
    from tropism.models.openai_checkpoint import Conversion

NAMED = 4
"""Groups of tensors up to this size are shown tensor by tensor."""
KINDS = {
    "model": "language model (AutoModelForCausalLM)",
    "policy": "trained policy (AutoModelForCausalLM)",
    "ref_policy": "policy before training (AutoModelForCausalLM)",
    "reward_model": "reward model (AutoModelForSequenceClassification)",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a GPT-2 of OpenAI, or a policy or reward model of lm-human-preferences, as a plain Hugging Face folder.

    TensorFlow is not needed. The folder is loaded anew and compared with the checkpoint before it gets its name.
    """

    source: tyro.conf.Positional[Path]
    """The folder with hparams.json and the checkpoint: 124M, or the policy or reward_model folder of a run."""
    out: Path
    """The folder to write; a new or an empty one."""
    encoding: Path | None = None
    """The folder of encoder.json and vocab.bpe, where the source has none: any published GPT-2. lm-human-preferences
    saves only their name."""
    scope: str | None = None
    """Which of several models of the checkpoint to take: model, policy, reward_model or ref_policy. Default: the first
    of these that is there."""


def run(arguments: Sequence[str]) -> None:
    """Write the folder, and say what went into it and what did not."""
    options = tyro.cli(
        Options,
        args=arguments,
        prog="tropism convert openai-checkpoint",
        description=Options.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    from tropism.commands.quiet import quieten_libraries
    from tropism.models.openai_checkpoint import convert_openai_checkpoint

    quieten_libraries()
    show(convert_openai_checkpoint(options.source, options.out, encoding=options.encoding, scope=options.scope))


def show(conversion: Conversion) -> None:
    """What was written, and every tensor that was left out."""
    out = console()

    def line(text: str) -> None:
        out.print(printable(text), soft_wrap=True)

    line(f"{KINDS[conversion.scope]}: {conversion.parameters:,} numbers in {conversion.tensors} tensors")
    if conversion.offset is not None:
        line(f"reward: the logit + {conversion.offset:g} (tropism_reward_offset in config.json; the class has no bias)")
        found = conversion.normalised
        if found is None:
            line("its scale is not known: no train_reward_hparams.json beside its folder says that it was normalised")
        else:
            line(f"normalised on {found.samples} samples of {found.policy}: mean {found.mean:g}, std {found.std:g}")
    for group, names in conversion.left_out.items():
        which = ", ".join(names) if len(names) <= NAMED else f"{len(names)} tensors, {names[0]} to {names[-1]}"
        line(f"left out: {group} ({which})")
    line("verified: loaded by its Auto class with all weights and tokens of the checkpoint")
    line(f"written: {conversion.folder}")
