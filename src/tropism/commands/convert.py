"""tropism convert KIND ..."""

from __future__ import annotations

from collections.abc import Sequence

from tropism.commands.kinds import Kind, run_kind


def _openai_checkpoint(arguments: Sequence[str]) -> None:
    from tropism.commands import convert_openai_checkpoint

    convert_openai_checkpoint.run(arguments)


def _labels(arguments: Sequence[str]) -> None:
    from tropism.commands import convert_labels

    convert_labels.run(arguments)


KINDS: dict[str, Kind] = {
    "openai-checkpoint": Kind(
        summary="GPT-2 or lm-human-preferences checkpoints of TensorFlow, as a plain Hugging Face folder.",
        run=_openai_checkpoint,
    ),
    "labels": Kind(
        summary="Label files of lm-human-preferences (JSON with token ids), as JSON lines with texts.",
        run=_labels,
    ),
}
"""By name, in the order of the help."""


def run(arguments: Sequence[str]) -> None:
    """Find the kind and run it."""
    run_kind("convert", "Turn what other programs wrote into what this one reads.", KINDS, arguments)
