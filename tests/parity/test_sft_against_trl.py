"""SFT takes the steps that TRL's SFTTrainer takes on the same batches, order and schedule."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tropism
from tiny_runs import logged

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.parity

STEPS, ROWS, RATE = 20, 8, 5e-4


def openings(file: Path, count: int) -> list[str]:
    """The first forty words of the first reviews."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]
    return [" ".join(text.replace("<br />", " ").split()[:40]) for text in texts]


@pytest.fixture(scope="module")
def texts(shared: Path) -> tuple[list[str], list[str]]:
    """What is trained on, each text once, and what is held out."""
    folder = shared / "data" / "imdb"
    return openings(folder / "small_train.jsonl.gz", STEPS * ROWS), openings(folder / "small_test.jsonl.gz", 24)


def trl_losses(model: Path, train: list[str], held_out: list[str], folder: Path) -> tuple[list[float], float, float]:
    """Loss of every step, and the held-out loss before and after."""

    class InOrder(trl.SFTTrainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.SequentialSampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        args=trl.SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=ROWS,
            per_device_eval_batch_size=len(held_out),
            max_steps=STEPS,
            learning_rate=RATE,
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            bf16=False,
            gradient_checkpointing=False,
            packing=False,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_num_workers=0,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": train}),
        eval_dataset=datasets.Dataset.from_dict({"text": held_out}),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, before, trainer.evaluate()["eval_loss"]


def test_losses_of_every_step_and_held_out(stories: Path, texts: tuple[list[str], list[str]], tmp_path: Path) -> None:
    train, held_out = texts
    result = tropism.train(
        str(stories),
        tropism.SFT(shuffle=False),
        data=train,
        eval_data=held_out,
        run=tmp_path / "run",
        total_steps=STEPS,
        prompts_per_step=ROWS,
        trainer=tropism.TrainerConfig(learning_rate=RATE, schedule="linear", progress=False),
    )
    losses = [row["loss/nll"] for row in logged(result.path, "update")]
    before, after = (row["eval/loss"] for row in logged(result.path, "evaluation"))
    theirs, their_before, their_after = trl_losses(stories, train, held_out, tmp_path / "trl")
    assert len(losses) == len(theirs) == STEPS
    assert losses == pytest.approx(theirs, rel=1e-4)
    assert before == pytest.approx(their_before, rel=1e-4)
    assert after == pytest.approx(their_after, rel=1e-4)
    assert after < before - 0.1
