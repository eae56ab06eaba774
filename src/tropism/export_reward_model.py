"""A reward model as a plain sequence classifier: written, loaded anew as anybody would, and its scores compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tropism.classifier_inputs import UnreadableError
from tropism.export_checks import CHATS, TEXTS, Found, differs, load_plain, tolerance_of
from tropism.foreign.reward_facts import OFFSET, RewardFacts
from tropism.models.reward_files import save_reward_model
from tropism.text_reward_model import TextRewardModel


def write_reward_model(path: Path, model: TextRewardModel, texts: Sequence[str]) -> tuple[RewardFacts, Found]:
    """Write a reward model into a folder of its own, and verify it.

    Returns:
        What the folder says of its scores, and what the verification measured.

    Raises:
        ModelError: the folder scores otherwise than the model; says how.
    """
    written = save_reward_model(model.model, model.tokenizer, path, model.facts)
    # A model that was loaded has gain and bias in its head already; what they were stays known.
    facts = model.facts if written.gain == 1 else written
    facts = replace(facts, offset=written.offset)
    facts.write(path)
    return facts, _verify(path, model, texts)


@torch.no_grad()
def _verify(folder: Path, model: TextRewardModel, texts: Sequence[str]) -> Found:
    """Load the folder as anybody would, and compare its scores with the model's, one by one and in a batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    live = model.model.classifier
    plain = load_plain(AutoModelForSequenceClassification, folder, live)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise differs("the vocabulary of its tokenizer is another")
    if tokenizer.chat_template != model.tokenizer.chat_template:
        raise differs("its tokenizer has another chat template")
    if plain.config.num_labels != 1:
        raise differs(f"it has {plain.config.num_labels} scores instead of one")
    offset = float(getattr(plain.config, OFFSET, 0.0))
    rows = list(_rows(model, texts))
    for text, ids in rows:
        if isinstance(text, str) and model.facts.text == "completion":
            found = tokenizer(text, truncation=True, max_length=model.inputs.max_length)["input_ids"]
            if text and list(found) != ids:
                raise differs(f"the text {text!r:.60} becomes other ids")
    expected = torch.stack([_score(model, ids) for _, ids in rows])
    alone = torch.stack([_logit(plain, [ids], tokenizer)[0] for _, ids in rows]) + offset
    together = _logit(plain, [ids for _, ids in rows], tokenizer) + offset
    largest = float(expected.abs().max())
    allowed = tolerance_of(plain.dtype) * max(1.0, largest)
    worst = 0.0
    for how, found in (("", alone), (" in a padded batch", together)):
        difference = float((found.to(expected.device) - expected).abs().max().nan_to_num(nan=float("inf")))
        if not difference <= allowed:
            raise differs(f"scores{how} differ by {difference:.3g}, and rounding makes {allowed:.3g}")
        worst = max(worst, difference)
    return Found(
        texts=len(rows),
        largest_difference=worst,
        largest_logit=largest,
        tolerance=tolerance_of(plain.dtype),
        dtype=str(plain.dtype).removeprefix("torch."),
    )


def _rows(model: TextRewardModel, texts: Sequence[str]) -> Iterator[tuple[Any, list[int]]]:
    """What is scored, and its ids: texts behind a prompt where the model reads one, and chats."""
    pairs: list[tuple[Any, Any]] = [(TEXTS[2], text) for text in texts]
    if model.tokenizer.chat_template and model.facts.text != "completion":
        pairs += [(chat, [{"role": "assistant", "content": TEXTS[3]}]) for chat in CHATS]
    for prompt, completion in pairs:
        try:
            yield completion, model.inputs.ids(prompt, completion)
        except UnreadableError:  # an empty text, or a template that refuses such conversations
            continue


def _score(model: TextRewardModel, ids: Sequence[int]) -> torch.Tensor:
    row = torch.tensor([[*ids]], device=model.model.device)
    return model.model(row, torch.tensor([len(ids)], device=row.device))[0].float()  # type: ignore[no-any-return]


def _logit(plain: Any, rows: Sequence[Sequence[int]], tokenizer: Any) -> torch.Tensor:
    """[N] what the plain classifier says of rows that its tokenizer pads."""
    batch = tokenizer.pad({"input_ids": [list(row) for row in rows]}, return_tensors="pt").to(plain.device)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return plain(**given).logits.squeeze(-1).float()  # type: ignore[no-any-return]
