"""The model card of an export: what it is, how it was made, what that bought, and how to load it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism import __version__
from tropism.algorithms.reward_modeling import RewardModeling
from tropism.evaluation.run_folder import RunData
from tropism.export_card_facts import RECIPE, Origin, data_names, origin_of, public_name, public_text, public_values
from tropism.export_card_results import curves_section, evaluation_section, is_limited_to
from tropism.export_source import Trained, language_model_of
from tropism.safe_yaml import read_yaml
from tropism.schema import dump_yaml

if TYPE_CHECKING:
    from tropism.export import Export

CARD = "README.md"
MOST_WARNINGS = 10
_SHOWN_OF_RECIPE = (
    "model",
    "algorithm",
    "data",
    "eval_data",
    "reward",
    "metrics",
    "total_steps",
    "prompts_per_step",
    "seed",
    "sampling",
    "lora",
    "train_layers",
    "normalise",
)
_TRAINER = (
    "learning_rate",
    "schedule",
    "warmup_steps",
    "max_grad_norm",
    "optimizer",
    "precision",
    "micro_batch_tokens",
)
_SAMPLING: Mapping[str, Any] = {
    "max_new_tokens": None,
    "temperature": None,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "stop": [],
    "beta": 0.0,
    "policy_distribution": "tempered",
}
"""Settings that a card names in words, and the values that say nothing."""
PIPELINES = {"policy": "text-generation", "seq2seq": "text2text-generation", "reward-model": "text-classification"}


def write_card(path: Path, export: Export, trained: Trained) -> None:
    """Write README.md into an export, and the picture of its curves beside it.

    Args:
        path: the folder while it is being made; its name is in ``export.folder``.
    """
    run = None if trained.run is None else is_limited_to(RunData.read(trained.run), trained)
    recipe = {} if trained.run is None else read_yaml(trained.run / RECIPE)
    origin = origin_of(recipe.get("model") if recipe else trained.name or None)
    kind = _kind(export, trained)
    sections = [
        [f"# {export.folder.resolve().name}", "", *_summary(export, recipe, origin)],
        _usage(export, kind),
        _method(recipe),
        [] if run is None else evaluation_section(run),
        [] if run is None else curves_section(run, path),
        [] if run is None else _warnings(run),
        _making(export, trained, recipe),
        _verified(export),
        _versions(run),
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines)
    header = _metadata(recipe, origin, PIPELINES[kind])
    (path / CARD).write_text(f"---\n{header}---\n\n{public_text(text)}\n", encoding="utf-8")


def add_gguf(folder: Path, file: Path) -> None:
    """Name a GGUF file in the card of the export that it was made of."""
    card = folder / CARD
    line = (
        f"\n`{file.name}` holds the same model for llama.cpp and its kin, written by its own `convert_hf_to_gguf.py`. "
        "Its numbers were not compared with those of the plain files.\n"
    )
    card.write_text(card.read_text(encoding="utf-8") + line, encoding="utf-8")


def _kind(export: Export, trained: Trained) -> str:
    decodes = bool(language_model_of(trained.model).config.is_encoder_decoder)
    return "seq2seq" if decodes and export.kind == "policy" else export.kind


def _metadata(recipe: Mapping[str, Any], origin: Origin | None, pipeline: str) -> str:
    """What the hub reads at the top of a card. The language is left to the author, who knows it."""
    from huggingface_hub import ModelCardData

    method = _method_name(recipe)
    data = ModelCardData(
        base_model=None if origin is None else origin.hub_id,
        datasets=data_names(recipe)[1] or None,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["tropism", *([method] if method else [])],
    )
    return public_text(data.to_yaml()).rstrip("\n") + "\n"


def _method_name(recipe: Mapping[str, Any]) -> str | None:
    algorithm = recipe.get("algorithm")
    name = algorithm.get("name") if isinstance(algorithm, Mapping) else None
    return name if isinstance(name, str) else None


# What it is -----------------------------------------------------------------------------------------------------------


def _summary(export: Export, recipe: Mapping[str, Any], origin: Origin | None) -> list[str]:
    what = "A reward model" if export.kind == "reward-model" else "A language model"
    began = "" if origin is None else f" It began as `{origin.shown}`."
    after = "" if export.step is None else f", after step {export.step}"
    lines = [f"{what} trained with tropism (`{_method_name(recipe)}`){after}.{began}"]
    if not recipe:
        lines = [f"{what}, written by tropism{'' if origin is None else f' from `{origin.shown}`'}."]
    if export.mechanism is not None:
        asked = ", ".join(f"{n} {'left open' if v is None else f'{v:g}'}" for n, v in export.targets.items())
        lines += [
            f"It was trained to be asked for a reward (mechanism `{export.mechanism}`); this copy has one target built",
            f"in: **{asked}**. The tokenizer puts what asks for it before every text by itself, so there is nothing to",
            "add to a prompt.",
        ]
    if origin is not None:
        licence = "look it up there" if origin.licence is None else f"it is `{origin.licence}`"
        lines += ["", f"The licence of {origin.hub_id or origin.shown} holds for this model, too: {licence}."]
    if export.notes:
        lines += ["", *(f"- {note[0].upper()}{note[1:]}." for note in export.notes)]
    return lines


_LOADING = {
    "policy": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoModelForCausalLM.from_pretrained({name})
inputs = tokenizer("The film was", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))""",
    "seq2seq": """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoModelForSeq2SeqLM.from_pretrained({name})
inputs = tokenizer("The film was", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))""",
    "reward-model": """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoModelForSequenceClassification.from_pretrained({name})
inputs = tokenizer("I would see it again.", return_tensors="pt")
print(model(**inputs).logits.item())""",
}


def _usage(export: Export, kind: str) -> list[str]:
    return ["## Use", "", "```python", _LOADING[kind].format(name=f'"{export.folder.resolve().name}"'), "```"]


def _method(recipe: Mapping[str, Any]) -> list[str]:
    """Method, data, reward and sampling in words; the recipe below has every setting."""
    if not recipe:
        return []
    lines = ["## Training", ""]
    steps, size = recipe.get("total_steps"), recipe.get("prompts_per_step")
    lines.append(
        f"- Method: {_method_name(recipe)}, {steps} steps of {size} prompts or texts, seed {recipe.get('seed')}"
    )
    lora, layers = recipe.get("lora"), recipe.get("train_layers")
    if isinstance(lora, Mapping):
        lines.append(f"- Trained: a LoRA adapter of rank {lora.get('rank')}, merged here")
    elif layers is not None:
        top = f"the last {layers} blocks" if layers else "the output head"
        lines.append(f"- Trained: {top}; the other weights are those of the base")
    lines += [f"- {words[0].upper()}{words[1:]}" for words in data_names(recipe)[0]]
    sampling = recipe.get("sampling")
    if isinstance(sampling, Mapping) and _method_name(recipe) != RewardModeling.name:
        changed = {key: sampling.get(key, off) for key, off in _SAMPLING.items() if sampling.get(key, off) != off}
        lines.append(f"- Sampling: {', '.join(f'{key} {value}' for key, value in changed.items())}")
    return [*lines, *_reward(recipe)]


def _reward(recipe: Mapping[str, Any]) -> list[str]:
    reward = recipe.get("reward")
    terms = reward.get("terms") if isinstance(reward, Mapping) else None
    if not isinstance(terms, Mapping) or not terms:
        return []
    rows = [
        f"| {_cell(name)} | `{_cell(public_name(str(term.get('use'))))}` | {term.get('weight', 1.0)} |"
        for name, term in terms.items()
        if isinstance(term, Mapping)
    ]
    return ["", "| reward term | computed by | weight |", "|---|---|---|", *rows]


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _warnings(run: RunData) -> list[str]:
    """What the run warned of, each message once."""
    first = {str(line.get("message", "")): line.get("step") for line in reversed(run.warnings)}
    if not first:
        return []
    lines = [f"- Step {step}: {message}" for message, step in list(first.items())[::-1][:MOST_WARNINGS]]
    more = len(first) - MOST_WARNINGS
    return ["## Warnings of the run", "", *lines, *([f"- and {more} more"] if more > 0 else [])]


# How it was made ------------------------------------------------------------------------------------------------------


def _making(export: Export, trained: Trained, recipe: Mapping[str, Any]) -> list[str]:
    if not trained.name:
        return []
    lines = ["## How it was made", "", "```sh"]
    lines += [*(["tropism train recipe.yaml"] if recipe else []), command_of(export, trained), "```"]
    if not recipe:
        return lines
    shown = {key: recipe[key] for key in _SHOWN_OF_RECIPE if recipe.get(key) not in (None, {}, [])}
    trainer = recipe.get("trainer")
    if isinstance(trainer, Mapping):
        shown["trainer"] = {key: trainer[key] for key in _TRAINER if trainer.get(key) is not None}
    text = dump_yaml(_set(public_values(shown))).rstrip("\n")
    heading = "<summary><code>recipe.yaml</code>, with the names of files alone</summary>"
    return [*lines, "", "<details>", heading, "", "````yaml", text, "````", "", "</details>"]


def _set(value: Any) -> Any:
    """Settings without those that are None, which say that something is off."""
    if not isinstance(value, Mapping):
        return value
    return {key: _set(entry) for key, entry in value.items() if entry is not None}


def command_of(export: Export, trained: Trained) -> str:
    """The command that writes this folder, with the names of files alone."""
    asked = {name: value for name, value in export.targets.items() if value is not None}
    words = [f"{name}={value:g}" if len(export.targets) > 1 else f"{value:g}" for name, value in asked.items()]
    named = [str(slot.row) for slot in export.slots if slot.kind == "named"]
    options = [word for value in words for word in ("--target-reward", value)]
    options += [word for row in named for word in ("--slot-token", row)]
    if export.checkpoint is not None:
        options += ["--best"] if export.checkpoint == "best" else ["--step", str(export.step)]
    options += ["--keep-heads"] if export.heads_kept else []
    path = Path(trained.name).expanduser()
    source = path.resolve().name if path.exists() else public_name(trained.name)
    return shlex.join(["tropism", "export", source, *options, "--out", export.folder.resolve().name])


def _verified(export: Export) -> list[str]:
    found = export.found
    number = "score" if export.kind == "reward-model" else "logit"
    lines = ["## Verified", ""]
    for slot in export.slots:
        lines.append(f"- Row {slot.row} of the vocabulary ({slot.kind}), the special token `{slot.name}`, is a slot.")
    if export.slots:
        lines.append("- Input and output embeddings are apart; `generation_config.json` suppresses the slots' tokens.")
    greedy = f", and {found.greedy_texts} greedy completions are equal" if found.greedy_texts else ""
    return [
        *lines,
        f"- When it was written it was loaded anew and compared with the trained model: on {found.texts} texts no"
        f" {number} differs by more than {found.largest_difference:.1e} (largest {number}"
        f" {found.largest_logit:.1f}, weights in {found.dtype}){greedy}.",
    ]


def _versions(run: RunData | None) -> list[str]:
    """Of what trained it; of a model without a run, of what wrote it."""
    versions = {} if run is None else run.environment.get("versions")
    known = {str(name): str(value) for name, value in versions.items()} if isinstance(versions, Mapping) else {}
    written = f"Written by tropism {__version__}"
    if not known:
        return [f"{written}."]
    python = run.environment.get("python") if run is not None else None
    listed = ", ".join(f"{name} {version}" for name, version in known.items())
    return [f"{written}. Trained with {listed}{f', Python {python}' if python else ''}."]
