"""What was trained, by whatever method, as a plain Hugging Face folder that any server of such models can serve."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel

from tropism import __version__
from tropism.config import method_named
from tropism.errors import ConfigError
from tropism.evaluation.run_folder import RunData
from tropism.export_card import write_card
from tropism.export_checks import TEXTS, Found, differs, verify
from tropism.export_reward_model import write_reward_model
from tropism.export_slots import SlotTokens, asked_ids, opening_for, refuse_targets
from tropism.export_source import RECIPE, Trained, load_trained
from tropism.foreign.json_files import read_object
from tropism.foreign.view import CONFIG
from tropism.generation import TextPolicy
from tropism.models.baked import baked_model, highest_logprobs
from tropism.models.baked_tokenizer import Opening, SlotToken, with_opening, write_opening
from tropism.models.q_head_files import MARK as Q_MARK
from tropism.models.q_head_files import read_q_heads, write_q_heads
from tropism.models.saving import replacing, save_plain
from tropism.safe_yaml import read_yaml
from tropism.targets.conditioner import Conditioner, Targets
from tropism.text_reward_model import TextRewardModel

MARK = "tropism_export.json"
"""What an export says of itself; a folder with it may be replaced by the next export."""
HELD_OUT = 8
"""Held-out prompts of a run that the export is verified on, beside the texts that are built in."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, and how it was found."""

    folder: Path
    kind: str
    """``policy`` or ``reward-model``."""
    mechanism: str | None = None
    """How the model was told its rewards; None for a model that could not be asked."""
    targets: Mapping[str, float | None] = field(default_factory=dict)
    """What is built in; None where a reward was left open."""
    slots: tuple[SlotToken, ...] = ()
    """Rows of the vocabulary that ask for it."""
    step: int | None = None
    """The step of the run that the weights are of, where that is known."""
    checkpoint: str | None = None
    """Name of the checkpoint that was exported; None of a finished model."""
    heads_kept: bool = False
    """Whether Q heads lie beside the plain files."""
    notes: tuple[str, ...] = ()
    """One sentence for each thing that was merged, left out or kept."""
    found: Found
    """What the verification measured."""


def export_model(
    source: str | Path | TextPolicy | TextRewardModel,
    out: str | Path,
    *,
    targets: Targets = None,
    slot_tokens: SlotTokens = None,
    step: int | None = None,
    best: bool = False,
    base: Any = None,
    keep_heads: bool = False,
    device: str = "cpu",
) -> Export:
    """Write what was trained as a folder that the Auto class of its kind loads with no custom code.

    Adapters are merged, the value head of PPO and the Q heads of ILQL are left out, a target that the model is asked
    for is built in. The folder is loaded anew and compared with the model before it gets its name; after an error there
    is none.

    Args:
        source: a run, model or adapter folder, a hub id, or a model in memory.
        out: a folder that is not there, is empty, or holds an earlier export.
        targets: of a model that is asked for rewards: a number, or ``{"name": number}`` (names left out are open). None
            asks for what it has for a default (Quark: the best), and is right for all other models.
        slot_tokens: tokens to give up for the targets, one per reward. None takes rows of the vocabulary that are free.
        step: of a run: the checkpoint after this step, in place of its last model.
        best: of a run: the weights of its best evaluation.
        base: what a checkpoint or an adapter stands on, where it is no longer where it was; what ``load_model`` takes.
        keep_heads: keep the Q heads of ILQL beside the plain files, so that tropism can be given ``beta``.
        device: where a folder is loaded.

    Raises:
        ConfigError: no such run or step, a run that has not finished, targets that the model cannot be asked, or an
            ``out`` that is taken.
        ModelError: a damaged model, no free row, a token that cannot be given up, or an export that differs from the
            model.
        StorageError: it cannot be written.
    """
    folder = Path(out).expanduser()
    _check_out(folder)
    if isinstance(source, TextPolicy | TextRewardModel):
        trained = Trained(model=source)
    else:
        trained = load_trained(str(source), step=step, best=best, base=base, device=device)
    texts = (*TEXTS, *_held_out(trained.run))
    with replacing(folder) as path:
        if isinstance(trained.model, TextRewardModel):
            export = _reward_model(path, folder, trained, trained.model, texts, targets, slot_tokens, keep_heads)
        else:
            export = _policy(path, folder, trained, trained.model, texts, targets, slot_tokens, keep_heads)
        (path / MARK).write_text(json.dumps(_facts(export), indent=1, ensure_ascii=False), encoding="utf-8")
        write_card(path, export, trained)
        readable = (path / "config.json").stat().st_mode
        for file in path.rglob("*"):  # weights are written for their owner alone, and servers run as somebody else
            if file.is_file():
                file.chmod(readable)
    return export


def export_at_target(
    run_or_policy: str | Path | TextPolicy,
    targets: Targets,
    out: str | Path,
    slot_tokens: SlotTokens = None,
    *,
    device: str = "cpu",
) -> Export:
    """``export_model`` of a model that is asked for rewards, at these targets."""
    return export_model(run_or_policy, out, targets=targets, slot_tokens=slot_tokens, device=device)


# Before ---------------------------------------------------------------------------------------------------------------


def _check_out(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and ((folder / MARK).is_file() or not any(folder.iterdir()))):
        return
    raise ConfigError(
        f"{folder} is there already and is no earlier export; name a new folder, or take that one away first"
    )


def _held_out(run: Path | None) -> list[str]:
    """Prompts that a run was last evaluated on."""
    evaluations = [] if run is None else RunData.read(run).evaluations
    return [] if not evaluations else list(dict.fromkeys(evaluations[-1].prompts))[:HELD_OUT]


# Writing --------------------------------------------------------------------------------------------------------------


def _reward_model(
    path: Path,
    folder: Path,
    trained: Trained,
    model: TextRewardModel,
    texts: Sequence[str],
    targets: Targets,
    slot_tokens: SlotTokens,
    keep_heads: bool,
) -> Export:
    if targets is not None or slot_tokens is not None:
        option = "--target-reward" if targets is not None else "--slot-token"
        raise ConfigError(f"a reward model gives scores and is asked for none; leave {option} out")
    _refuse_heads(keep_heads)
    facts, found = write_reward_model(path, model, texts)
    notes = ["gain and bias are in the head, so the logit is the score"]
    if facts.offset:
        notes = [f"its head has no bias, so the score is the logit plus {facts.offset:g} (tropism_reward_offset)"]
    if facts.normalised is None:
        notes.append("its scores have no known scale: compare them with each other alone")
    return Export(
        folder=folder,
        kind="reward-model",
        step=trained.step,
        checkpoint=trained.checkpoint,
        notes=(*_merged(model.model.model), *notes),
        found=found,
    )


def _policy(
    path: Path,
    folder: Path,
    trained: Trained,
    policy: TextPolicy,
    texts: Sequence[str],
    targets: Targets,
    slot_tokens: SlotTokens,
    keep_heads: bool,
) -> Export:
    conditioner = policy.conditioner
    opening: Opening | None = None
    slot_ids: tuple[int, ...] = ()
    if conditioner is None:
        refuse_targets(targets, slot_tokens)
    else:
        targets = conditioner.default if targets is None else targets
        opening, slot_ids = opening_for(policy, conditioner, targets, texts, slot_tokens)
    notes = (*_merged(policy.policy.model), *_heads(policy, trained, keep_heads))
    slots = () if opening is None else opening.slots
    unlikely = None
    if any(slot.kind == "appended" for slot in slots):
        unlikely = int(highest_logprobs(policy.policy, asked_ids(policy, slot_ids, texts)).argmin())
    plain = baked_model(policy.policy, slots, slot_ids if slots else (), unlikely=unlikely)
    plain.config.name_or_path = ""  # a private path, more often than not
    tokenizer = policy.tokenizer if opening is None else with_opening(policy.tokenizer, opening)
    heads = policy.policy.q_heads if keep_heads else None

    def complete(inside: Path) -> None:
        if opening is not None:
            write_opening(inside, policy.tokenizer, opening)
        if heads is not None:
            write_q_heads(inside, heads)

    settings = {} if heads is None else {Q_MARK: len(heads.q)}
    save_plain(plain, tokenizer, path, settings=settings, beside=complete)
    found = verify(path, policy, slot_ids, opening, texts)
    if heads is not None:
        _verify_heads(path, policy)
    return Export(
        folder=folder,
        kind="policy",
        mechanism=None if conditioner is None else conditioner.config.mechanism,
        targets={} if conditioner is None else _named(conditioner, targets),
        slots=slots,
        step=trained.step,
        checkpoint=trained.checkpoint,
        heads_kept=heads is not None,
        notes=notes,
        found=found,
    )


def _named(conditioner: Conditioner, targets: Targets) -> dict[str, float | None]:
    return dict(zip(conditioner.names, conditioner.values(targets), strict=True))


def _merged(model: Any) -> tuple[str, ...]:
    return ("the adapter is merged into the weights",) if isinstance(model, PeftModel) else ()


def _heads(policy: TextPolicy, trained: Trained, keep: bool) -> list[str]:
    """What becomes of the heads that a method trains beside the language model."""
    if policy.policy.q_heads is None:
        _refuse_heads(keep)
    elif keep:
        return [
            "the Q heads are kept beside the plain files: tropism steers by them with beta, other programs ignore them"
        ]
    else:
        return [
            "the Q heads are left out, so there is no beta to steer with: what is left is the language model below "
            "them, which is close to its base. --keep-heads keeps them beside the plain files, for tropism"
        ]
    critic = policy.policy.value_head is not None or _trained_a_critic(trained.run)
    return ["the value head (PPO's critic) is left out; only training needs it"] if critic else []


def _refuse_heads(keep: bool) -> None:
    if keep:
        raise ConfigError("--keep-heads keeps the Q heads of ilql, and this model has none; leave it out")


def _trained_a_critic(run: Path | None) -> bool:
    algorithm = None if run is None else read_yaml(run / RECIPE).get("algorithm")
    return isinstance(algorithm, Mapping) and method_named(algorithm.get("name")).needs_value_head


@torch.no_grad()
def _verify_heads(path: Path, policy: TextPolicy) -> None:
    """Whether the heads that lie in the folder are those of the policy, bit for bit."""
    config = SimpleNamespace(**read_object(path / CONFIG))
    own, saved = policy.policy.q_heads, read_q_heads(str(path), config)
    if own is None or saved is None:
        raise differs("its config.json does not name the Q heads")
    loaded = saved.load(hidden_size=own.hidden_size, vocabulary=own.vocabulary).state_dict()
    for name, value in own.state_dict().items():
        if not torch.equal(value.cpu(), loaded[name]):
            raise differs(f"the Q heads' {name} is another")


def _facts(export: Export) -> dict[str, Any]:
    """What a program may want to know of the folder."""
    return {
        "tropism": __version__,
        "kind": export.kind,
        "step": export.step,
        "mechanism": export.mechanism,
        "targets": dict(export.targets),
        "slots": [asdict(slot) for slot in export.slots],
        "notes": list(export.notes),
        "verified": asdict(export.found),
    }
