"""A conditioned model at one target, written as a plain Hugging Face model that any server of such models can serve."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism import __version__
from tropism.errors import ConfigError, ModelError
from tropism.evaluation.run_folder import RunData
from tropism.export_checks import TEXTS, Found, verify
from tropism.foreign.json_files import read_object
from tropism.generation import TextPolicy, model_path
from tropism.models.baked import baked_model, highest_logprobs
from tropism.models.baked_tokenizer import (
    Opening,
    SlotToken,
    check_fast,
    dispensable,
    free_slots,
    named_slots,
    needed_ids,
    with_opening,
    write_opening,
)
from tropism.models.saving import save_plain
from tropism.safe_yaml import read_yaml
from tropism.targets.conditioner import Conditioner, Targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "tropism_export.json"
"""What an export says of itself; a folder with it may be replaced by the next export."""
HELD_OUT = 8
"""Held-out prompts of a run that the export is verified on, beside the texts that are built in."""
SHOWN = 3
"""Tokens that an error proposes."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, and how it was found."""

    folder: Path
    mechanism: str | None
    """How the model was told; None for a model that could not be asked."""
    targets: Mapping[str, float | None]
    """What is built in; None where a reward was left open."""
    slots: tuple[SlotToken, ...]
    """Rows of the vocabulary that ask for it."""
    found: Found
    """What the verification measured."""


def export_at_target(
    run_or_policy: str | Path | TextPolicy,
    targets: Targets,
    out: str | Path,
    slot_tokens: str | int | Sequence[str | int] | None = None,
    *,
    device: str = "cpu",
) -> Export:
    """Write a model with a target built in, as a folder that ``AutoModelForCausalLM`` loads with no custom code.

    The folder is loaded anew and compared with the model before it gets its name; after an error there is none.

    Args:
        run_or_policy: a run or model folder, or a loaded ``TextPolicy``.
        targets: a number, ``{"name": number}`` (names left out are open), or None for a model that cannot be asked,
            which is written as it is, adapters merged.
        out: a folder that is not there, is empty, or holds an earlier export.
        slot_tokens: tokens to give up, one per reward: the token, a text that is one token, or its id. None takes
            rows of the vocabulary that are free.
        device: where a folder is loaded.

    Raises:
        ConfigError: targets that the model cannot be asked, or a folder that is taken.
        ModelError: no free row, a token that cannot be given up, or an export that differs from the model.
        StorageError: it cannot be written.
    """
    folder = Path(out)
    _check_out(folder)
    source = "" if isinstance(run_or_policy, TextPolicy) else str(run_or_policy)
    policy = run_or_policy if isinstance(run_or_policy, TextPolicy) else _load(source, device)
    conditioner = policy.conditioner
    texts = (*TEXTS, *_held_out(source))
    opening: Opening | None = None
    slot_ids: tuple[int, ...] = ()
    if conditioner is None:
        _refuse_targets(targets, slot_tokens)
    else:
        opening, slot_ids = _opening(policy, conditioner, targets, texts, slot_tokens)
    slots = () if opening is None else opening.slots
    unlikely = None
    if any(slot.kind == "appended" for slot in slots):
        unlikely = int(highest_logprobs(policy.policy, _asked(policy, slot_ids, texts)).argmin())
    plain = baked_model(policy.policy, slots, slot_ids if slots else (), unlikely=unlikely)
    named = {} if conditioner is None else dict(zip(conditioner.names, conditioner.values(targets), strict=True))
    results: list[Export] = []

    def complete(path: Path) -> None:
        if opening is not None:
            write_opening(path, policy.tokenizer, opening)
        found = verify(path, policy, slot_ids, opening, texts)
        mechanism = None if conditioner is None else conditioner.config.mechanism
        results.append(Export(folder=folder, mechanism=mechanism, targets=named, slots=slots, found=found))
        _describe(path, results[0], source)
        for file in path.iterdir():  # weights are written for their owner alone, and servers run as somebody else
            file.chmod((path / "config.json").stat().st_mode)

    tokenizer = policy.tokenizer if opening is None else with_opening(policy.tokenizer, opening)
    save_plain(plain, tokenizer, folder, beside=complete)
    return results[0]


# Before ---------------------------------------------------------------------------------------------------------------


def _check_out(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and ((folder / MARK).is_file() or not any(folder.iterdir()))):
        return
    raise ConfigError(
        f"{folder} is there already and is no earlier export; name a new folder, or take that one away first"
    )


def _load(source: str, device: str) -> TextPolicy:
    """A model in the precision that it was saved in, so that nothing is rounded on the way."""
    settings = Path(model_path(source)) / "config.json"
    saved: Any = None
    if settings.is_file():
        content = read_object(settings)
        saved = content.get("dtype", content.get("torch_dtype"))
    dtype = saved if saved in ("float32", "bfloat16", "float16") else "auto"
    return TextPolicy.load(source, device=device, dtype=dtype)


def _held_out(source: str) -> list[str]:
    """Prompts that a run was last evaluated on."""
    if not source or not (Path(source) / "recipe.yaml").is_file():
        return []
    evaluations = RunData.read(source).evaluations
    return [] if not evaluations else list(dict.fromkeys(evaluations[-1].prompts))[:HELD_OUT]


def _refuse_targets(targets: Targets, slot_tokens: Any) -> None:
    if targets is not None or slot_tokens is not None:
        raise ConfigError(
            "this model was not trained to be asked for a reward, so no target can be built in; leave "
            f"{'--target-reward' if targets is not None else '--slot-token'} out to write it as it is"
        )


def _opening(
    policy: TextPolicy,
    conditioner: Conditioner,
    targets: Targets,
    texts: Sequence[str],
    slot_tokens: str | int | Sequence[str | int] | None,
) -> tuple[Opening | None, tuple[int, ...]]:
    """What the tokenizer is to put before every text, and the ids that ask the conditioned model for the same."""
    if targets is None:
        ranges = "; ".join(
            f"{name} was {seen.range[0]:g} to {seen.range[1]:g} in training"
            for name, seen in zip(conditioner.names, conditioner.seen, strict=True)
        )
        raise ConfigError(
            f"the model is asked for a reward, so an export needs a target: --target-reward NUMBER"
            f"{' or NAME=NUMBER' if len(conditioner.names) > 1 else ''} ({ranges})"
        )
    tokenizer = policy.tokenizer
    check_fast(tokenizer)
    asked = conditioner.prefix(targets)
    if conditioner.config.mechanism == "text":
        if slot_tokens is not None:
            raise ConfigError("this model reads its target as text, which needs no slot token; leave --slot-token out")
        if not asked:
            return None, ()
        text = str(tokenizer.decode(list(asked), clean_up_tokenization_spaces=False))
        tokens = tuple(tokenizer.convert_ids_to_tokens(list(asked)))
        return Opening(ids=asked, tokens=tokens, text=text, after_bos=conditioner.bos_id), asked
    slots = _slots(policy, conditioner, targets, asked, texts, slot_tokens)
    names = tuple(slot.name for slot in slots)
    return Opening(ids=tuple(slot.row for slot in slots), tokens=names, text="".join(names), slots=slots), asked


def _slots(
    policy: TextPolicy,
    conditioner: Conditioner,
    targets: Targets,
    asked: Sequence[int],
    texts: Sequence[str],
    slot_tokens: str | int | Sequence[str | int] | None,
) -> tuple[SlotToken, ...]:
    tokenizer = policy.tokenizer
    labels = _labels(conditioner, targets, tokenizer)
    needed = needed_ids(tokenizer, policy.sampler.eos_ids)
    for text in texts:
        for token_id in tokenizer(text, verbose=False)["input_ids"]:
            needed.setdefault(token_id, f"the text {text!r:.60} needs it")
    if slot_tokens is not None:
        names = [slot_tokens] if isinstance(slot_tokens, str | int) else list(slot_tokens)
        return tuple(named_slots(tokenizer, names, labels, needed=needed))
    rows = int(policy.policy.input_embedding.weight.shape[0])
    append = conditioner.config.mechanism == "token"
    found = free_slots(tokenizer, labels, rows=rows, needed=needed, append=append)
    if len(found) < len(labels):
        raise ModelError(_no_free_row(policy, asked, texts, needed, missing=(len(labels), len(found))))
    return tuple(found)


def _labels(conditioner: Conditioner, targets: Targets, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Names for the slots' tokens, such as ``<|reward=0.9|>``, none of which the tokenizer has."""
    vocabulary = set(tokenizer.get_vocab())
    labels: list[str] = []
    for name, value in zip(conditioner.names, conditioner.values(targets), strict=True):
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
        label = first = f"{plain}={'open' if value is None else f'{value:g}'}"
        number = 2
        while f"<|{label}|>" in vocabulary:
            label, number = f"{first}#{number}", number + 1
        labels.append(f"<|{label}|>")
        vocabulary.add(labels[-1])
    return labels


def _no_free_row(
    policy: TextPolicy,
    asked: Sequence[int],
    texts: Sequence[str],
    needed: Mapping[int, str],
    *,
    missing: tuple[int, int],
) -> str:
    """What to do about it, with tokens that can be named."""
    special, ordinary = dispensable(policy.tokenizer, needed)
    likely = highest_logprobs(policy.policy, _asked(policy, asked, texts)) if ordinary else None
    rare = sorted(ordinary, key=lambda i: float(likely[i]))[:SHOWN] if likely is not None else []
    pieces = {i: token for token, i in policy.tokenizer.get_vocab().items()}

    def shown(ids: Sequence[int]) -> str:
        return ", ".join(f"{pieces[i]!r} (id {i})" for i in ids)

    proposals = []
    if special:
        proposals.append(f"special tokens that nothing here uses: {shown(special[:SHOWN])}")
    if rare:
        proposals.append(f"ordinary ones that the model finds unlikely: {shown(rare)}")
    wanted, found = missing
    return (
        f"the model's vocabulary has {found or 'no'} free row{'s' if found > 1 else ''} for {wanted} reward "
        f"slot{'' if wanted == 1 else 's'}. Name a token for each that your texts never hold, by --slot-token TOKEN or "
        f"its id. {'Candidates: ' + '; '.join(proposals) if proposals else 'This vocabulary can do without none'}"
    )


def _asked(policy: TextPolicy, prefix: Sequence[int], texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The texts' ids after what asks for the target, as far as they fit the context."""
    assert policy.conditioner is not None
    ids = [policy.tokenizer(text, verbose=False)["input_ids"] for text in texts]
    return [policy.conditioner.apply(row, prefix)[: policy.policy.context_length] for row in ids]


# After ----------------------------------------------------------------------------------------------------------------


def _describe(path: Path, export: Export, source: str) -> None:
    """Write the model card, and what a program may want to know of the folder."""
    facts = {
        "tropism": __version__,
        "mechanism": export.mechanism,
        "targets": dict(export.targets),
        "slots": [asdict(slot) for slot in export.slots],
        "verified": asdict(export.found),
    }
    (path / MARK).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
    (path / "README.md").write_text(_model_card(export, source), encoding="utf-8")


def _model_card(export: Export, source: str) -> str:
    base, found = _base_of(source), export.found
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [tropism]"]
    if base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        lines.append(f"base_model: {base}")
    lines += ["---", "", f"# {export.folder.name}", ""]
    origin = "" if base is None else f", from `{Path(base).name if Path(base).exists() else base}`"
    lines.append(f"A language model trained with tropism{origin}.")
    if export.mechanism is not None:
        asked = ", ".join(f"{n} {'left open' if v is None else f'{v:g}'}" for n, v in export.targets.items())
        lines += [
            f"It was trained to be asked for a reward (mechanism `{export.mechanism}`); this copy has one target built",
            f"in: **{asked}**. The tokenizer puts what asks for it before every text by itself, so there is nothing to",
            "add to a prompt.",
        ]
    load = f'"{export.folder.name}"'
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({load})",
        f"model = AutoModelForCausalLM.from_pretrained({load})",
        'inputs = tokenizer("The film was", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))",
        "```",
        "",
    ]
    for slot in export.slots:
        lines.append(f"- Row {slot.row} of the vocabulary ({slot.kind}), the special token `{slot.name}`, is a slot.")
    if export.slots:
        lines.append("- Input and output embeddings are apart; `generation_config.json` suppresses the slots' tokens.")
    lines += [
        f"- Verified when it was written: on {found.texts} texts no logit differs by more than"
        f" {found.largest_difference:.1e} (largest logit {found.largest_logit:.1f}, weights in {found.dtype}), and"
        f" {found.greedy_texts} greedy completions are equal.",
        f"- Written by tropism {__version__}" + (f": `{_command(export, source)}`" if source else "") + ".",
    ]
    return "\n".join(lines) + "\n"


def _base_of(source: str) -> str | None:
    """The model that a run started from, where its recipe can say so."""
    recipe = Path(source) / "recipe.yaml"
    if not source or not recipe.is_file():
        return None
    model = read_yaml(recipe).get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    return name if isinstance(name, str) and not name.startswith("<") else None


def _command(export: Export, source: str) -> str:
    asked = {name: value for name, value in export.targets.items() if value is not None}
    words = [f"{name}={value:g}" if len(export.targets) > 1 else f"{value:g}" for name, value in asked.items()]
    named = [str(slot.row) for slot in export.slots if slot.kind == "named"]
    options = [("--target-reward", word) for word in words] + [("--slot-token", row) for row in named]
    return shlex.join(["tropism", "export", source, *chain(*options), "--out", str(export.folder)])
