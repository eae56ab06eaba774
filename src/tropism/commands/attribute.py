"""tropism attribute MODEL_OR_RUN --prompt "text": which tokens drive a completion, and which words a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.text import Text

from tropism.commands.asked_targets import parsed_targets
from tropism.commands.console import console, printable
from tropism.errors import ConfigError

if TYPE_CHECKING:
    from tropism.evaluation.attribution_files import Attribution

UP = ("#eaf3fb", "#c3dff4", "#8fc3ea", "#4f9fd8", "#0072b2")
DOWN = ("#fdeee3", "#f9d2b4", "#f3ab78", "#e57f38", "#c44e00")
"""Backgrounds of the five shades; the last two have white letters."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show which tokens of a prompt drive a completion, and which words drive a reward.

    Of a run, --samples chooses completions of its newest evaluation and writes their heat maps into its report.
    """

    source: tyro.conf.Positional[str]
    """A run folder, or a model: folder, .gguf file, hub id, or "demo"."""
    prompt: str | None = None
    """The text that the completion goes on from."""
    completion: str | None = None
    """The text to explain; None: one is sampled."""
    reward: str | None = None
    """Explain this reward, too: a registered name, the folder of a reward model, or file.py:function with
    --allow-code; None: with --samples the run's, else none."""
    method: str | None = None
    """integrated_gradients, gradient_x_input or occlusion; None: integrated gradients where there are gradients, and
    occlusion (pieces are left out one by one) of any other reward."""
    each_token: bool = False
    """Also for each token of the completion by itself."""
    samples: int | None = None
    """Of a run: so many samples of its newest evaluation, from the largest gain in reward to the smallest."""
    target_reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to ask a reward-conditioned model for: a number, or NAME=NUMBER for each of its rewards."""
    max_new_tokens: int = 40
    """Most tokens of a sampled completion."""
    seed: int = 0
    """Of a sampled completion."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    allow_code: bool = False
    """Let the reward name code: module:function or file.py:function."""
    out: Path | None = None
    """Write the heat maps of --prompt to this .html file."""


def run(arguments: Sequence[str]) -> None:
    """Attribute, print, write."""
    options = tyro.cli(
        Options,
        args=arguments,
        prog="tropism attribute",
        description=Options.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    _check(options)
    from tropism.commands.quiet import quieten_libraries

    quieten_libraries()
    if options.samples is not None:
        _samples(options, options.samples)
    else:
        _one(options)


def _check(options: Options) -> None:
    if (options.prompt is None) == (options.samples is None):
        raise ConfigError("give either --prompt TEXT, or --samples N of a run")
    if options.out is not None and options.out.suffix != ".html":
        raise ConfigError(f"--out {options.out}: name an .html file")
    of_prompt = {
        "--completion": options.completion is not None,
        "--out": options.out is not None,
        "--target-reward": options.target_reward != (),
    }
    for name, given in of_prompt.items():
        if given and options.samples is not None:
            raise ConfigError(f"{name} belongs to --prompt; of --samples the run says it. Leave one of them out")
    if options.samples is not None and not (Path(options.source) / "recipe.yaml").is_file():
        raise ConfigError(f"--samples are those of a run, and {options.source} is no run folder; give --prompt TEXT")
    if options.method is not None:
        from tropism.attribution.methods import check_method

        check_method(options.method, "mean")


def _one(options: Options) -> None:
    from tropism.attribution.completions import attribute_completion
    from tropism.attribution.rewards import attribute_reward
    from tropism.evaluation.attribution_section import write_attribution
    from tropism.generation import TextPolicy

    policy = TextPolicy.load(options.source, device=options.device)
    prompt, completion = str(options.prompt), options.completion
    target = parsed_targets(options.target_reward, "--target-reward")
    if completion is None:
        asked = {"seed": options.seed, "max_new_tokens": options.max_new_tokens}
        completion = policy.generate([prompt], target_reward=target, **asked)[0]  # type: ignore[arg-type]
        if not completion:
            raise ConfigError("the sampled completion is empty; give one: --completion TEXT, or another --seed")
    method = options.method or "integrated_gradients"
    maps = [
        attribute_completion(
            policy,
            prompt,
            completion,
            method=method,  # type: ignore[arg-type]
            each_token=options.each_token,
            target_reward=target,
        )
    ]
    if options.reward is not None:
        maps.append(
            attribute_reward(
                options.reward,
                prompt,
                completion,
                method=options.method,  # type: ignore[arg-type]
                tokenizer=policy.tokenizer,
                allow_code=options.allow_code,
            )
        )
    out = console()
    out.print(Text.assemble((printable(prompt), "bold"), printable(completion)), soft_wrap=True)
    for one in maps:
        show(out, one)
    if options.out is not None:
        write_attribution(options.out, maps, prompt=prompt, completion=completion)
        out.print(f"written: {options.out}", soft_wrap=True)


def _samples(options: Options, count: int) -> None:
    from tropism.attribution.samples import attribute_samples
    from tropism.evaluation.attribution_files import write_samples
    from tropism.evaluation.report import write_report

    folder = Path(options.source)
    samples = attribute_samples(
        folder,
        count=count,
        method=options.method,  # type: ignore[arg-type]
        each_token=options.each_token,
        reward=options.reward,
        allow_code=options.allow_code,
        device=options.device,
    )
    out = console()
    for sample in samples:
        reward = f"{sample.reward:+.2f}" if math.isfinite(sample.reward) else "unscored"
        out.print(Text(f"\n{sample.label}: step {sample.step}, reward {reward}", "bold underline"))
        out.print(Text.assemble((printable(sample.prompt), "bold"), printable(sample.completion)), soft_wrap=True)
        for one in sample.maps:
            show(out, one)
    write_samples(folder, samples)
    report = write_report(folder)
    out.print(f"written: {len(samples)} files in {folder / 'attribution'}; {report}", soft_wrap=True)


def show(out: Console, one: Attribution) -> None:
    """One heat map: the text in colours, below 0 underlined, and the five largest scores as numbers."""
    from tropism.evaluation.attribution_section import WORDS, level_of

    largest = max((abs(score) for score in one.scores if math.isfinite(score)), default=0.0)
    out.print(Text(f"{one.what}: {one.value:.4g} ({WORDS.get(one.method, one.method)})", "dim"))
    line = Text()
    for place, (piece, score) in enumerate(zip(one.pieces, one.scores, strict=True)):
        if place and one.parts[place] == "completion" and "completion" not in one.parts[:place]:
            line.append(" | ", "dim")
        level = level_of(score, largest)
        style = ""
        if level:
            shade = int(level[1]) - 1
            back = (UP if level[0] == "p" else DOWN)[shade]
            style = f"{'white' if shade > 2 else 'black'} on {back}" + (" underline" if level[0] == "n" else "")
        line.append(printable(piece) + ("" if math.isfinite(score) else "?"), style)
    out.print(line, soft_wrap=True)
    ranked = sorted(
        (pair for pair in zip(one.scores, one.pieces, strict=True) if math.isfinite(pair[0]) and pair[0] != 0),
        key=lambda pair: -abs(pair[0]),
    )
    words = [f"{printable(piece).strip() or repr(piece)} {score:+.3g}" for score, piece in ranked[:5]]
    out.print(Text("most: " + (", ".join(words) or "no piece changes it"), "dim"), soft_wrap=True)
