"""tropism score DATA --reward NAME --out FILE"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from tropism.commands.asked_targets import parsed_targets
from tropism.commands.console import console
from tropism.commands.sampling_options import SamplingOptions
from tropism.commands.scoring_progress import scoring_progress
from tropism.data.config import DataConfig
from tropism.errors import ConfigError
from tropism.schema import apply_overrides, build, read_yaml

if TYPE_CHECKING:
    from tropism.scoring import ScoreResult

DATA = (
    *("prompt_column", "completion_column", "first_words", "template", "system_prompt", "chat"),
    *("limit", "split", "subset", "revision"),
)
SAMPLING = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("beta", "allowed_tokens", "stop", "compile"),
)
WITH_MODEL = ("n", "seed", "target_reward", "device", *SAMPLING)
"""Options that mean nothing without --model."""


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Write a data set with the reward of each record, or with rewarded completions of a model (--model).

    Arguments of a reward follow it: --reward length --reward.args.target 20 --reward.args.unit words
    """

    data: tyro.conf.Positional[str]
    """A file (.txt, .jsonl, .json, .csv, .tsv, also .gz; .parquet), a saved data set, or a hub id."""
    out: Path
    """The .jsonl or .parquet file to write. It appears once it is whole; the same command goes on where it stopped."""
    reward: str | None = None
    """A registered reward, or file.py:function with --allow-code."""
    reward_file: Path | None = None
    """A YAML file with the reward, as a recipe has it under `reward`; in place of --reward."""
    reward_column: str = "reward"
    """Name of the new column."""
    term_columns: bool = False
    """Add a column for each term of the reward; always so where there are several."""
    drop_unscored: bool = False
    """Leave out records on which the reward has no opinion, in place of writing null."""
    prompt_column: str | None = None
    """Column with the prompt, the text or the chat messages."""
    completion_column: str | None = None
    """Column with the completion. Default: `completion`, where there is one; else the whole text is scored."""
    first_words: int | None = None
    """Take the first so many words of each text for its prompt, and score the rest."""
    template: str | None = None
    """The prompt with a column's name in braces wherever its value goes."""
    system_prompt: str | None = None
    """System message put before every chat that has none of its own."""
    chat: bool = False
    """Send text prompts as a user's message."""
    limit: int | None = None
    """Use at most so many records, from the front."""
    split: str = "train"
    """Split of a saved or hub data set."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Commit, branch or tag of a hub data set."""
    batch_size: int = 64
    """Completions that are scored (and sampled) at once."""
    tokenizer: str | None = None
    """Model whose tokens rewards count that ask for them, such as length in tokens."""
    allow_code: bool = False
    """Let the reward name code: module:function or file.py:function."""
    overwrite: bool = False
    """Replace a file that is there."""
    model: str | None = None
    """Sample completions of each prompt from this run folder, model folder, .gguf file, hub id or "demo"."""
    n: int = 4
    """Completions per prompt."""
    max_new_tokens: int = 48
    """Most tokens of a completion."""


def run(arguments: Sequence[str]) -> None:
    """Score, show how far it is, and say what was written."""
    options, overrides = _options(arguments)
    reward = _reward(options, overrides)
    data = build(DataConfig, {"path": options.data, **{name: getattr(options, name) for name in DATA}})
    target = parsed_targets(options.target_reward, "--target-reward")
    if options.model is None:
        _refuse_without_model(options)
    from tropism.commands.quiet import quieten_libraries
    from tropism.generation import TextPolicy
    from tropism.rollouts.config import Sampling
    from tropism.scored_file import ScoredFile
    from tropism.scoring import score

    ScoredFile(options.out, overwrite=options.overwrite)  # looked at before a model is loaded
    sampling = build(Sampling, {name: getattr(options, name) for name in SAMPLING})
    quieten_libraries()
    policy = None if options.model is None else TextPolicy.load(options.model, device=options.device)
    with scoring_progress("scoring", "records") as show:
        result = score(
            data,
            reward,
            out=options.out,
            reward_column=options.reward_column,
            term_columns=options.term_columns,
            batch_size=options.batch_size,
            tokenizer=options.tokenizer,
            model=policy,
            n=options.n,
            sampling=sampling,
            seed=options.seed,
            target_reward=target,
            drop_unscored=options.drop_unscored,
            overwrite=options.overwrite,
            allow_code=options.allow_code,
            on_progress=show,
        )
    _show_end(result)


def _options(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """The options, and what is set of the reward: ``--reward.args.target 20``."""
    settings: dict[str, Any] = {
        "args": arguments,
        "prog": "tropism score",
        "description": Options.__doc__,
        "config": (tyro.conf.FlagCreatePairsOff,),
    }
    options, unknown = tyro.cli(Options, **settings, return_unknown_args=True)
    if unknown and not unknown[0].startswith("--reward."):
        tyro.cli(Options, **settings)  # says which option there is not, and ends
    return options, unknown


def _reward(options: Options, overrides: Sequence[str]) -> Any:
    """The reward as a recipe has it."""
    if (options.reward is None) == (options.reward_file is None):
        raise ConfigError("say what to score by: --reward NAME, or --reward-file FILE.yaml (one of them)")
    reward: Any = options.reward
    if options.reward_file is not None:
        reward = read_yaml(options.reward_file)
        reward = reward.get("reward", reward) if not {"terms", "use"} & set(reward) else reward
    if not overrides:
        return reward
    merged = apply_overrides({"reward": {"use": reward} if isinstance(reward, str) else reward}, overrides)
    beyond = sorted(set(merged) - {"reward"})
    if beyond:
        raise ConfigError(f"there is no option --{beyond[0]}; arguments of the reward are set by --reward.args.NAME")
    return merged["reward"]


def _refuse_without_model(options: Options) -> None:
    defaults = {f.name: f.default for f in fields(Options)}
    for name in WITH_MODEL:
        if getattr(options, name) != defaults[name]:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is for sampling completions; name what to sample from: --model MODEL")


def _show_end(result: ScoreResult) -> None:
    out = console()
    rewards = result.rewards
    if rewards:
        mean = result.mean
        deviation = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
        spread = f"standard deviation {deviation:.4g}, from {min(rewards):.4g} to {max(rewards):.4g}"
        out.print(f"reward: mean {mean:.4g}, {spread}", soft_wrap=True)
    dropped = f", {result.unscored} without a reward left out" if result.dropped and result.unscored else ""
    out.print(f"written: {result.path} ({result.records} records{dropped})", soft_wrap=True)
