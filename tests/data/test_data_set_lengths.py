"""How many examples a data set has, and where the labels are: what RewardLM's data set of demonstrations got wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from public_sets import write_dialogues
from tiny_models import EOS_ID, tiny_tokenizer
from tiny_runs import Setting, assemble, execute
from tropism.data.counter_speech import dialoconan
from tropism.data.demonstrations import collate_demonstrations, make_demonstrations
from tropism.data.prompts import make_prompts
from tropism.data.readers import read_records

TEXTS = ["a cat", "the big dog", "oh", "is it so?", "we ran", "no", "so"]

COLUMNS: dict[str, list[Any]] = {
    "input_ids": [[5] * (3 + row) for row in range(7)],
    "attention_mask": [[1] * (3 + row) for row in range(7)],
    "text": TEXTS,
}
"""Seven records in three columns, as a tokenizer gives them; the original counts the columns."""


@pytest.mark.parametrize("source", [COLUMNS, datasets.Dataset.from_dict(COLUMNS)], ids=["mapping", "dataset"])
def test_pitfall_26_a_data_set_is_as_long_as_its_columns_not_as_their_number(source: Any) -> None:
    tokenizer = tiny_tokenizer()
    assert len(read_records(source)) == 7
    assert [prompt.text for prompt in make_prompts(source, tokenizer)] == TEXTS
    demonstrations = make_demonstrations(source, tokenizer, max_length=None)
    assert len(demonstrations) == 7
    assert ["".join(tokenizer.decode(list(item.completion_ids[:-1]))) for item in demonstrations] == [
        text[1:] for text in TEXTS
    ]


def test_pitfall_26_every_record_is_trained_on(tmp_path: Path) -> None:
    """Seven records, two per step: in four steps each of them comes once, and one a second time."""
    source = {name: COLUMNS[name] for name in ("input_ids", "text")}  # two keys: two examples, in the original
    assembly = assemble(Setting("sft", False, "llama"), tmp_path / "run", data=source, prompts_per_step=2)
    seen: list[tuple[int, ...]] = []
    keep = assembly.trainer.update

    def update(batch: Any) -> Any:
        rows = zip(batch.prompt_ids, batch.prompt_lengths, batch.completion_ids, batch.completion_lengths, strict=True)
        for prompt, before, completion, after in rows:
            seen.append((*prompt[len(prompt) - before :].tolist(), *completion[:after].tolist()))
        return keep(batch)

    assembly.trainer.update = update  # type: ignore[method-assign]
    execute(assembly)
    tokenizer = tiny_tokenizer()
    assert len(seen) == 8
    assert {tokenizer.decode(list(ids[:-1])) for ids in seen} == set(TEXTS)


def test_pitfall_26_labels_end_where_texts_end_and_not_at_the_pad_token() -> None:
    """The pad token is the eos, as in the original: the eos of each text is learned, and no pad is."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    batch = collate_demonstrations(make_demonstrations(TEXTS, tokenizer, max_length=None))
    # The first character of each text is read only, one eos follows it: as many labels as characters.
    assert batch.loss_mask.sum(dim=1).tolist() == [len(text) for text in TEXTS]
    for row, text in enumerate(TEXTS):
        labels = batch.completion_ids[row][batch.loss_mask[row]].tolist()
        assert labels == [*tokenizer(text)["input_ids"][1:], EOS_ID]
    assert not (batch.loss_mask & (torch.arange(batch.loss_mask.shape[1]) >= batch.completion_lengths[:, None])).any()


def test_pitfall_26_a_prepared_set_reaches_training_whole(tmp_path: Path) -> None:
    data = dialoconan(write_dialogues(tmp_path / "dialogues.csv"), form="pairs")
    demonstrations = make_demonstrations(data.records, tiny_tokenizer(), max_length=None)
    assert len(demonstrations) == len(data) == 3
    tokenizer = tiny_tokenizer()
    for item, record in zip(demonstrations, data.records, strict=True):
        # Everything up to the last "Assistant:" is read, the answer and one eos are learned.
        assert len(item.prompt_ids) == len(record["prompt"]) and all(item.loss_mask)
        assert len(item.completion_ids) == len(record["completion"]) + 1 == len(item.loss_mask)
        assert item.completion_ids[-1] == tokenizer.eos_token_id
