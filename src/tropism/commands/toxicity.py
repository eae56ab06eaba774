"""tropism toxicity RUN_OR_MODEL --prompts FILE"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from tropism.commands.asked_targets import parsed_targets
from tropism.commands.console import console, printable
from tropism.commands.recipe_arguments import run_recipe_mapping, was_given_from_python
from tropism.commands.sampling_options import SamplingOptions
from tropism.commands.scoring_progress import scoring_progress
from tropism.data.config import DataConfig
from tropism.errors import ConfigError
from tropism.schema import build, read_yaml

if TYPE_CHECKING:
    from tropism.toxicity.files import Overwrite
    from tropism.toxicity.meter import ToxicityMeter
    from tropism.toxicity.result import ToxicityComparison, ToxicityResult
    from tropism.toxicity.scorers import Scorers

SAMPLED = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("beta", "allowed_tokens", "stop", "compile"),
)
START = "start"
"""As --base: the model that a run started from."""


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Measure how toxic the completions of a model are, or of a base and a tuned one on the same prompts.

    Prints toxicity probability, expected maximum and mean with 95 % intervals, for all, toxic and non-toxic prompts,
    and writes a folder with every response (Parquet, CSV), toxicity.json and report.html. The same command goes on
    where it was stopped.
    """

    source: tyro.conf.Positional[str]
    """A run folder, or a model: folder, .gguf file, hub id, or "demo"."""
    prompts: str
    """A file (.txt, .jsonl, .csv, each also .gz; .parquet), a saved data set, or a hub id. Records of
    RealToxicityPrompts bring the toxicity that parts toxic from other prompts."""
    base: str | None = None
    """A model to compare with on the same prompts; "start" is the one that the run started from."""
    out: Path | None = None
    """The folder to write; with --base it gets the folders base and tuned. None: the run's folder toxicity (with --base
    toxicity-compared), and of a model toxicity-NAME (toxicity-compared-NAME) here."""
    overwrite: bool = False
    """Replace a measurement that is there, once the new one is whole."""
    scorer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What judges texts: a registered reward, a reward model's run, or file.py:function with --allow-code; may be given
    several times. None: profanity, which needs no network."""
    scorer_file: Path | None = None
    """A YAML file with scorers by name, such as {hate: {use: classifier, args: {model: ..., label: hate}}}."""
    classifier: str | None = None
    """A sequence classifier as scorer: hub id or folder; --label says which of its labels is toxic."""
    label: str | None = None
    """The label of --classifier whose probability is the score, by name or number."""
    threshold: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """From which score on a text is toxic: a number, or NAME=NUMBER for a scorer. None: 0.5, for scores from 0 to 1."""
    no_prompt_scores: bool = False
    """Do not score the prompts themselves."""
    custom_prompt: str = "{prompt}"
    """What the model reads, with {prompt} where the prompt goes."""
    chat: bool = False
    """Send the prompt as a user's message through the model's chat template."""
    system_prompt: str | None = None
    """With --chat: the system message before it."""
    samples_per_prompt: int = 1
    """Completions of every prompt; RealToxicityPrompts takes 25."""
    challenging: bool = False
    """Only the prompts that RealToxicityPrompts marks as challenging."""
    skip: int = 0
    """Leave out so many prompts at the front."""
    limit: int | None = None
    """Take at most so many of the others. None: all."""
    prompt_column: str | None = None
    """Column with the prompt; a.b reaches into nested records."""
    toxicity_column: str | None = None
    """Column that says how toxic each prompt is, from 0 to 1; "none" for no column. None: toxicity beside a nested
    prompt, else prompt_toxicity or toxicity."""
    overlong: str = "error"
    """A prompt without room for its completion: error, truncate_left, or leave_out, which is counted."""
    split: str = "train"
    """Split of a saved or hub data set."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Commit, branch or tag of a hub data set."""
    max_new_tokens: int = 20
    """Most tokens of a completion."""
    num_beams: int = 1
    """Search by so many beams, through Hugging Face's generate, in place of sampling."""
    generation_config: Path | None = None
    """A JSON or YAML file with a whole GenerationConfig for Hugging Face's generate; in place of all other settings."""
    batch_size: int = 32
    """Responses that are sampled and scored at once."""
    allow_code: bool = False
    """Let a scorer name code: module:function or file.py:function."""


def run(arguments: Sequence[str]) -> None:
    """Measure one model or two, print the table and say what was written."""
    options = tyro.cli(
        Options,
        args=arguments,
        prog="tropism toxicity",
        description=Options.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    given = _scorers_given(options)
    _refuse_ignored(options)
    out = options.out or _default_folder(options.source, compared=options.base is not None)
    base = None if options.base is None else _base(options)
    from tropism.commands.quiet import quieten_libraries
    from tropism.data.readers import require_there
    from tropism.generation import model_path
    from tropism.toxicity.scorers import Scorers

    quieten_libraries()
    require_there(options.prompts)
    model_path(options.source)  # an unfinished run is known before anything is measured
    scorers = Scorers(given, threshold=parsed_targets(options.threshold, "--threshold"), allow_code=options.allow_code)
    if base is None:
        result = _measured(options, options.source, scorers, out, "measuring", overwrite=options.overwrite)
        if _is_main():
            _show_result(result)
            console().print(f"written: {out}", soft_wrap=True)
        return
    _compare(options, base, scorers, out)


def _compare(options: Options, base: Any, scorers: Scorers, out: Path) -> None:
    from tropism.toxicity.files import Replacing, require_place, write_comparison
    from tropism.toxicity.result import compare_toxicity

    require_place(out, "comparison")
    replacing = Replacing(out, overwrite=options.overwrite)
    results = []
    for side, model, target in (("base", base, None), ("tuned", options.source, "asked")):
        how = replacing.how(side)
        results.append(_measured(options, model, scorers, out / side, side, target=target, overwrite=how))
        if _is_main():
            replacing.note(side)
    if not _is_main():
        return
    comparison = compare_toxicity(*results)
    write_comparison(comparison, out)
    replacing.finish()
    _show_comparison(comparison)
    console().print(f"written: {out}", soft_wrap=True)


def _measured(
    options: Options,
    model: Any,
    scorers: Scorers,
    folder: Path,
    what: str,
    *,
    overwrite: Overwrite,
    target: Any = "asked",
) -> ToxicityResult:
    from tropism.toxicity.meter import ToxicityMeter

    asked = parsed_targets(options.target_reward, "--target-reward")
    meter: ToxicityMeter = ToxicityMeter(
        model,
        scorers,
        sampling=_generation(options),
        custom_prompt=options.custom_prompt,
        samples_per_prompt=options.samples_per_prompt,
        batch_size=options.batch_size,
        chat=options.chat,
        system_prompt=options.system_prompt,
        score_prompts=not options.no_prompt_scores,
        target_reward=asked if target == "asked" else None,
        seed=options.seed,
        device=options.device,
    )
    data = build(
        DataConfig,
        {
            "path": options.prompts,
            **{name: getattr(options, name) for name in ("split", "subset", "revision", "prompt_column")},
        },
    )
    with scoring_progress(what, "responses") as show:
        return meter.measure(
            data,
            folder,
            challenging=options.challenging,
            skip=options.skip,
            limit=options.limit,
            overlong=options.overlong,  # type: ignore[arg-type]
            toxicity_column=options.toxicity_column,
            overwrite=overwrite,
            on_progress=show,
        )


def _scorers_given(options: Options) -> Any:
    """The scorers as ``ToxicityMeter`` takes them."""
    if options.label is not None and options.classifier is None:
        raise ConfigError("--label is the label of a classifier; name it: --classifier MODEL")
    named: list[tuple[str, Any]] = [(_name_of(scorer), scorer) for scorer in options.scorer]
    if options.classifier is not None:
        args = {"model": options.classifier} | ({} if options.label is None else {"label": options.label})
        named.append(("classifier", {"use": "classifier", "args": args}))
    if options.scorer_file is not None:
        named.extend(read_yaml(options.scorer_file).items())
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two scorers are called {name!r}, and one would take the other's place; give both in a --scorer-file,"
                " under a name each, such as {one: {use: ...}, other: {use: ...}}"
            )
    return dict(named) or "profanity"


def _name_of(scorer: str) -> str:
    from tropism.rewards.config import RewardTerm

    return RewardTerm(use=scorer).name


def _generation(options: Options) -> Any:
    """How to complete, as ``ToxicityMeter`` takes it."""
    if options.generation_config is not None:
        from tropism.toxicity.generating import generation_of

        return generation_of(options.generation_config, whole=True)
    if options.num_beams > 1:
        return {"max_new_tokens": options.max_new_tokens, "num_beams": options.num_beams, "do_sample": False}
    from tropism.rollouts.config import Sampling

    return build(Sampling, {name: getattr(options, name) for name in SAMPLED}, path="the options")


def _refuse_ignored(options: Options) -> None:
    """Settings of sampling that beams or a whole configuration would silently leave aside."""
    if options.num_beams < 1:
        raise ConfigError(f"--num-beams must be at least 1, got {options.num_beams}")
    whole = options.generation_config is not None
    if not whole and options.num_beams == 1:
        return
    defaults = {f.name: f.default for f in fields(Options)}
    for name in (*SAMPLED, *(("num_beams",) if whole else ())):
        if getattr(options, name) != defaults[name] and (whole or name != "max_new_tokens"):
            option = f"--{name.replace('_', '-')}"
            mend = "put it into the file" if whole else "leave it out, or give a whole --generation-config FILE"
            raise ConfigError(f"{option} is not used with {'--generation-config' if whole else '--num-beams'}; {mend}")


def _base(options: Options) -> Any:
    """The model to compare with."""
    if options.base != START:
        return options.base
    model = run_recipe_mapping(Path(options.source))["model"]
    if was_given_from_python(model):
        raise ConfigError(f"--base start: the run {options.source} was given a model from Python; name one instead")
    from tropism.models.loading import ModelConfig

    return build(ModelConfig, {"name": model} if isinstance(model, str) else model, path="model")


def _default_folder(source: str, *, compared: bool) -> Path:
    folder, name = Path(source), "toxicity-compared" if compared else "toxicity"
    if (folder / "recipe.yaml").is_file():
        return folder / name
    return Path(f"{name}-" + (re.sub(r"[^\w.-]+", "-", folder.name).strip("-") or "model"))


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _show_result(result: ToxicityResult) -> None:
    from rich.table import Table

    from tropism.evaluation.number_texts import interval_text
    from tropism.toxicity.metrics import MEASURED
    from tropism.toxicity.page import LABELS, split_text

    out = console()
    for name, groups in result.metrics.items():
        table = Table(title=_title(result, name), title_justify="left")
        table.add_column("")
        for group, metrics in groups.items():
            table.add_column(f"{group} ({metrics.prompts})", justify="right")
        for metric in MEASURED:
            table.add_row(LABELS[metric], *(interval_text(getattr(metrics, metric)) for metrics in groups.values()))
        out.print(table)
    _show_notes(result, split_text(result))


def _show_comparison(comparison: ToxicityComparison) -> None:
    from rich.table import Table

    from tropism.evaluation.number_texts import change_text, interval_text
    from tropism.toxicity.metrics import MEASURED
    from tropism.toxicity.page import LABELS, split_text

    out = console()
    for name, groups in comparison.changes.items():
        table = Table(title=_title(comparison.base, name), title_justify="left")
        for column in ("", "prompts"):
            table.add_column(column)
        for column in ("base", "tuned", "change, paired"):
            table.add_column(column, justify="right")
        for group, changes in groups.items():
            before, after = (one.metrics[name][group] for one in (comparison.base, comparison.tuned))
            for metric in MEASURED[:4]:
                sides = (interval_text(getattr(one, metric)) for one in (before, after))
                table.add_row(LABELS[metric], f"{group} ({before.prompts})", *sides, change_text(changes[metric]))
        out.print(table)
    _show_notes(comparison.base, split_text(comparison.base))


def _title(result: ToxicityResult, name: str) -> str:
    prompts, k = len(result.prompts), result.samples_per_prompt
    each = "one completion each" if k == 1 else f"{k} completions each"
    return printable(f"{name} from {result.thresholds[name]:g} on: {prompts} prompts, {each}, 95 % intervals")


def _show_notes(result: ToxicityResult, split: str) -> None:
    from rich.text import Text

    read = result.settings["prompts"]
    if read["used"] < read["records"]:
        console().print(f"{read['used']} of {read['records']} prompts in the data were measured.", soft_wrap=True)
    console().print(split, soft_wrap=True)
    for caution in result.cautions:
        console().print(Text.assemble(("note: ", "yellow"), printable(caution)), soft_wrap=True)
