"""A tokenizer that puts the same tokens before every text by itself, and the free tokens that it may take for that."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from tropism.errors import ModelError

RESERVED = re.compile(
    r"[<\[]\|?_*(reserved|unused|extra|special|dummy|placeholder|control)"
    r"([ _-]?(special|token|id))*[ _-]?\d+_*\|?[>\]]",
    re.IGNORECASE,
)
"""Names of tokens that model makers keep for others to use."""

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_KEY = "<|asked|>"
"""Name, inside of the post-processor, of what stands before every text."""


@dataclass(frozen=True, kw_only=True)
class SlotToken:
    """A row of the vocabulary that becomes a slot, and how the tokenizer calls it."""

    row: int
    name: str
    """Text of the special token that stands for it."""
    kind: Literal["padding", "reserved", "named", "appended"]
    """Beyond the tokenizer's ids; reserved by its name; named by the user; or new, beyond the embedding."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What the tokenizer puts before every text."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """Of the same length."""
    text: str
    """What a chat template writes so that ``ids`` come out."""
    slots: tuple[SlotToken, ...] = ()
    """Those that have to become special tokens."""
    after_bos: int | None = None
    """Id of the bos that stays in front, where a text begins with it; None: the opening comes first in any case."""


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokenizers that have no file in which the opening can be written.

    Raises:
        ModelError: names the class.
    """
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise ModelError(
            f"a {type(tokenizer).__name__} keeps its rules in Python, so nothing can be built into its files; load the "
            "model with a fast tokenizer (a tokenizer.json), or put the target before the prompts yourself with "
            "TextPolicy.generate(target_reward=...)"
        )


# Rows -----------------------------------------------------------------------------------------------------------------


def needed_ids(tokenizer: PreTrainedTokenizerBase, generation_ids: Iterable[int]) -> dict[int, str]:
    """Ids that no slot may take, and why: special tokens with a meaning, and what the chat template writes.

    Args:
        generation_ids: those that the model's generation config names.
    """
    needed = {int(i): "the model's generation config uses it" for i in generation_ids}
    for name in _NAMED:
        token_id = getattr(tokenizer, f"{name}_id", None)
        if isinstance(token_id, int):
            needed[token_id] = f"it is the tokenizer's {name.replace('_', ' ')}"
    templates = tokenizer.chat_template
    written = " ".join(templates.values()) if isinstance(templates, Mapping) else str(templates or "")
    for token, token_id in tokenizer.get_added_vocab().items():
        if token in written:
            needed.setdefault(token_id, "the chat template writes it")
    return needed


def free_slots(
    tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], *, rows: int, needed: Iterable[int], append: bool
) -> list[SlotToken]:
    """Rows for as many of ``labels`` as there are free ones, the first labels first.

    Args:
        labels: names of the tokens to make; none is in the vocabulary.
        rows: of the input embedding.
        needed: ids that are not free.
        append: whether new rows may be added at the end.
    """
    vocabulary = tokenizer.get_vocab()
    taken = set(vocabulary.values())
    trial = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    trial.add_special_tokens(list(labels))
    # Which ids new tokens get, the tokenizers library alone decides; where ids have gaps, they may be taken.
    new = {label: int(str(trial.token_to_id(label))) for label in labels}
    padding = [(label, i) for label, i in new.items() if i < rows and i not in taken]
    kept = set(needed)
    reserved = sorted((i, t) for t, i in vocabulary.items() if RESERVED.fullmatch(t) and i < rows and i not in kept)
    found = [SlotToken(row=i, name=label, kind="padding") for label, i in padding]
    found += [SlotToken(row=i, name=token, kind="reserved") for i, token in reserved]
    beyond = list(new.values())[len(padding) :]
    if append and len(found) < len(labels) and beyond == list(range(rows, rows + len(beyond))):
        found = found[: len(padding)]
        last = labels[len(padding) :]
        found += [SlotToken(row=i, name=label, kind="appended") for label, i in zip(last, beyond, strict=True)]
    return found[: len(labels)]


def named_slots(
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str | int],
    labels: Sequence[str],
    *,
    needed: Mapping[int, str],
) -> list[SlotToken]:
    """The rows that a user names.

    Tokens that are special already keep their names. An ordinary one is taken out of the vocabulary: its row gets the
    label instead, so that no text can spell it.

    Args:
        names: tokens, texts that are one token, or ids.
        labels: as many.
        needed: ids that cannot be taken, and why.

    Raises:
        ModelError: no such token, one that is needed, or one that others are built from.
    """
    if len(names) != len(labels):
        raise ModelError(
            f"{len(labels)} reward slots need as many tokens of the vocabulary, and {len(names)} are named; give "
            "--slot-token once for each"
        )
    added = tokenizer.get_added_vocab()
    pieces = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    slots: list[SlotToken] = []
    for name, label in zip(names, labels, strict=True):
        token_id = _id_of(tokenizer, name, pieces)
        if token_id in needed:
            raise ModelError(f"the slot token {name!r} cannot be given up: {needed[token_id]}; name another")
        if token_id in {slot.row for slot in slots}:
            raise ModelError(f"the slot token {name!r} is named twice; every slot needs a row of its own")
        piece = pieces[token_id]
        if piece not in added:
            reason = _why_kept(model, piece)
            if reason is not None:
                raise ModelError(f"the slot token {name!r} cannot be given up: {reason}; name another")
        slots.append(SlotToken(row=token_id, name=piece if piece in added else label, kind="named"))
    return slots


def dispensable(tokenizer: PreTrainedTokenizerBase, needed: Iterable[int]) -> tuple[list[int], list[int]]:
    """Ids that a user may name: those of special tokens without a meaning, and those of ordinary tokens."""
    kept, added = set(needed), tokenizer.get_added_vocab()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    parts = _parts(model)
    special = sorted(i for token, i in added.items() if i not in kept)
    ordinary = sorted(
        i
        for token, i in tokenizer.get_vocab().items()
        if i not in kept and token not in added and _why_kept(model, token, parts) is None
    )
    return special, ordinary


def _id_of(tokenizer: PreTrainedTokenizerBase, name: str | int, pieces: Mapping[int, str]) -> int:
    if isinstance(name, int):
        if name not in pieces:
            raise ModelError(
                f"no token of the vocabulary has the id {name}, so it cannot become a slot; rows that no token has are "
                "found without being named"
            )
        return name
    vocabulary = tokenizer.get_vocab()
    if name in vocabulary:
        return int(vocabulary[name])
    ids = tokenizer(name, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        raise ModelError(
            f"the slot token {name!r} is {len(ids)} tokens for this tokenizer; name a single one, or give its id"
        )
    return int(ids[0])


def _parts(model: Mapping[str, Any]) -> set[str]:
    """Pieces that others are merged from."""
    return {part for merge in model.get("merges") or () for part in _pair(merge)}


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _why_kept(model: Mapping[str, Any], piece: str, parts: set[str] | None = None) -> str | None:
    """Why the tokenizer cannot do without a piece; None where it can."""
    if model["type"] == "WordLevel":
        return "unknown words become it" if piece == model.get("unk_token") else None
    if len(piece.removeprefix("##").removeprefix("▁").removeprefix("Ġ")) < 2:
        return "it stands for a single character, which other texts need"
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return "it stands for a byte, which other texts need"
    if piece in (_parts(model) if parts is None else parts):
        return "other tokens are built from it"
    return None


# Writing --------------------------------------------------------------------------------------------------------------


def with_opening(tokenizer: PreTrainedTokenizerBase, opening: Opening) -> PreTrainedTokenizerBase:
    """A copy whose chat templates write the opening; ``write_opening`` does the rest once it has been saved."""
    baked = copy.deepcopy(tokenizer)
    templates: Any = baked.chat_template
    if isinstance(templates, Mapping):
        baked.chat_template = {name: _opened(text, opening) for name, text in templates.items()}
    elif templates:
        baked.chat_template = _opened(templates, opening)
    return baked


def _opened(template: str, opening: Opening) -> str:
    """A chat template with the opening before what it writes, or behind the bos that this begins with."""
    first = f"{{{{ {json.dumps(opening.text)} }}}}"
    if opening.after_bos is None:
        return first + template
    # The empty expressions keep blanks at either end, which jinja would take for those around its own blocks.
    return (
        "{% set asked_text %}{{ '' }}" + template.removesuffix("\n") + "{{ '' }}{% endset %}"
        "{% if bos_token and asked_text.startswith(bos_token) %}{{ bos_token }}" + first
        + "{{ asked_text[bos_token | length:] }}{% else %}" + first + "{{ asked_text }}{% endif %}"
    )  # fmt: skip


def write_opening(folder: Path, tokenizer: PreTrainedTokenizerBase, opening: Opening) -> None:
    """Build the opening into a saved tokenizer's files.

    The class that is written loads ``tokenizer.json`` as it is, in transformers 4 and 5 alike; others would make parts
    of it anew. What their code knows beyond the file is written beside it.

    Raises:
        ModelError: the tokenizer ends its work in a way that is not known here.
    """
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text(encoding="utf-8"))
    rules |= {"truncation": None, "padding": None}  # left behind by whatever was encoded last
    for slot in opening.slots:
        _add_special(rules, slot, tokenizer.get_added_vocab())
    rules["post_processor"] = _opening_processor(rules.get("post_processor"), opening)
    path.write_text(json.dumps(rules, ensure_ascii=False, indent=2), encoding="utf-8")
    settings_path = folder / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    for name in ("add_bos_token", "add_eos_token", "added_tokens_decoder", "auto_map", "is_local", "local_files_only"):
        settings.pop(name, None)  # the first three would have parts of tokenizer.json made anew
    if isinstance(settings.get("extra_special_tokens"), list):  # which transformers 4 cannot read
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("model_input_names", "padding_side", "truncation_side", "clean_up_tokenization_spaces"):
        settings[name] = getattr(tokenizer, name)
    settings_path.write_text(json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True), encoding="utf-8")


def _add_special(rules: dict[str, Any], slot: SlotToken, added: Mapping[str, int]) -> None:
    """Make a slot's token special, under its name, in the content of tokenizer.json."""
    if slot.kind == "named" and slot.name not in added:
        _rename(rules["model"], slot)
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] != slot.name]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    rules["added_tokens"].append({"id": slot.row, "content": slot.name, **flags})
    rules["added_tokens"].sort(key=lambda token: token["id"])


def _rename(model: dict[str, Any], slot: SlotToken) -> None:
    """Give an ordinary token's id to the slot; texts that held the token are spelled in smaller ones."""
    if isinstance(model["vocab"], list):
        model["vocab"][slot.row][0] = slot.name
        return
    piece = next(token for token, token_id in model["vocab"].items() if token_id == slot.row)
    del model["vocab"][piece]
    model["vocab"][slot.name] = slot.row
    prefix = model.get("continuing_subword_prefix") or ""

    def makes(merge: str | Sequence[str]) -> str:
        left, right = _pair(merge)
        return left + right.removeprefix(prefix)

    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if makes(merge) != piece]


def _opening_processor(processor: dict[str, Any] | None, opening: Opening) -> dict[str, Any]:
    """A post-processor of tokenizer.json that does the same and adds the opening."""
    if processor is None:
        return _template(opening)
    kind = processor.get("type")
    if kind == "TemplateProcessing":
        return _into_template(processor, opening)
    if kind == "ByteLevel":
        return {"type": "Sequence", "processors": [processor, _template(opening)]}
    if kind == "Sequence":
        inner = list(processor["processors"])
        known = [place for place, one in enumerate(inner) if one.get("type") == "TemplateProcessing"]
        if len(known) == 1 and all(inner[i].get("type") == "ByteLevel" for i in range(len(inner)) if i not in known):
            inner[known[0]] = _into_template(inner[known[0]], opening)
            return {"type": "Sequence", "processors": inner}
        if not known and all(one.get("type") == "ByteLevel" for one in inner):
            return {"type": "Sequence", "processors": [*inner, _template(opening)]}
    raise ModelError(
        f"the tokenizer ends its work with {kind}, into which a target cannot be built; save it with a post-processor "
        "of the kind TemplateProcessing (tokenizers.processors) first"
    )


def _template(opening: Opening) -> dict[str, Any]:
    def sequence(name: str, number: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": number}}

    plain = {"single": [sequence("A", 0)], "pair": [sequence("A", 0), sequence("B", 1)], "special_tokens": {}}
    return _into_template({"type": "TemplateProcessing", **plain}, opening)


def _into_template(processor: dict[str, Any], opening: Opening) -> dict[str, Any]:
    special = processor["special_tokens"]
    first = {"SpecialToken": {"id": _KEY, "type_id": 0}}

    def opened(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
        begins = pieces[0].get("SpecialToken") if pieces else None
        behind = begins is not None and special[begins["id"]]["ids"] == [opening.after_bos]
        return [*pieces[:behind], first, *pieces[behind:]]

    entry = {"id": _KEY, "ids": list(opening.ids), "tokens": list(opening.tokens)}
    return {
        **processor,
        "single": opened(processor["single"]),
        "pair": opened(processor["pair"]),
        "special_tokens": {**special, _KEY: entry},
    }


# Checking -------------------------------------------------------------------------------------------------------------


def differing_texts(
    baked: PreTrainedTokenizerBase, texts: Sequence[str], expected: Mapping[str, Sequence[int]]
) -> Iterator[str]:
    """How the tokenizer encodes texts otherwise than expected: one by one, and in batches padded on either side."""
    for text in texts:
        found = baked(text, verbose=False)["input_ids"]
        if list(found) != list(expected[text]):
            yield f"the text {text!r:.60} becomes {_shown(found)} instead of {_shown(expected[text])}"
    if baked.pad_token_id is None or not texts:
        return
    for side in ("left", "right"):
        batch = baked(list(texts), padding=True, padding_side=side, verbose=False)
        for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
            real = [token_id for token_id, kept in zip(ids, mask, strict=True) if kept]
            if real != list(expected[text]):
                yield f"the text {text!r:.60} becomes {_shown(real)} when it is padded on the {side}"


def _shown(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:8]))
    return f"[{shown}{', ...' if len(ids) > 8 else ''}]"
