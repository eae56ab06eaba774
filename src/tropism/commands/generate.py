"""tropism generate RUN_OR_MODEL "prompt" ..."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro
from rich.padding import Padding
from rich.text import Text

from tropism.commands.asked_targets import parsed_targets
from tropism.commands.console import console, printable
from tropism.commands.sampling_options import SamplingOptions
from tropism.errors import ConfigError, DataError
from tropism.schema import build

if TYPE_CHECKING:
    from tropism.types import Messages


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Complete prompts with a trained run or any model."""

    source: tyro.conf.Positional[str]
    """A run folder, a model folder, a .gguf file, a hub id, or "demo"."""
    prompts: tyro.conf.Positional[tuple[str, ...]]
    """Texts to complete; - reads them from standard input, one a line."""
    n: int = 1
    """Completions per prompt."""
    guidance: float = 0.0
    """Push the model away from what it would say without a target, by this strength; 0 is off."""
    guidance_from: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A low target to push away from instead, given as --target-reward is."""
    max_new_tokens: int = 40
    """Most tokens of a completion."""
    chat: bool = False
    """Send each prompt as a user's message through the model's chat template."""


def run(arguments: Sequence[str]) -> None:
    """Load the model, complete the prompts, print both."""
    options = tyro.cli(
        Options,
        args=arguments,
        prog="tropism generate",
        description=Options.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    texts = _texts(options.prompts)
    if options.n < 1:
        raise ConfigError(f"--n must be at least 1, got {options.n}")
    from tropism.commands.quiet import quieten_libraries
    from tropism.generation import TextPolicy
    from tropism.rollouts.config import Sampling

    target = parsed_targets(options.target_reward, "--target-reward")
    other = parsed_targets(options.guidance_from, "--guidance-from")
    own = ("source", "prompts", "n", "seed", "chat", "device", "target_reward", "guidance", "guidance_from")
    sampling = build(Sampling, {name: value for name, value in vars(options).items() if name not in own})
    quieten_libraries()
    policy = TextPolicy.load(options.source, device=options.device)
    policy.sampling = sampling
    prompts: list[str | Messages] = [[{"role": "user", "content": text}] if options.chat else text for text in texts]
    completions = policy.generate(
        prompts,
        n=options.n,
        seed=options.seed,
        target_reward=target,
        guidance=options.guidance,
        guidance_from=other,
    )
    out = console()
    for index, text in enumerate(texts):
        out.print(Text(printable(text), "bold"), soft_wrap=True)
        for completion in completions[index * options.n : (index + 1) * options.n]:
            out.print(Padding(Text(printable(completion.strip(" "))), (0, 0, 1, 4)))


def _lines_of_input() -> list[str]:
    if sys.stdin is None:  # closed before the program began
        return []
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not {error.encoding} text (byte {error.start}); give it as UTF-8"
        ) from error
    return [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]


def _texts(prompts: Sequence[str]) -> list[str]:
    texts: list[str] = []
    for prompt in prompts:
        if prompt == "-":
            texts += _lines_of_input()
        else:
            texts.append(prompt)
    if not texts:
        raise DataError("there is no prompt; give texts in quotes, or - to read them from standard input")
    return texts
