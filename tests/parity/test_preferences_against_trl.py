"""DPO and KTO take the steps that TRL's trainers take on the same records, order and schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import logged
from tropism.algorithms import AlgorithmConfig

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.parity

STEPS, ROWS, RATE = 6, 4, 2e-3
SUBJECTS = ("a cat", "the big dog", "we", "my friend", "it", "no one", "a small bird", "you")
ENDINGS = (" ran.", " sat on a mat.", " is so big and so old, oh!", " no?", " ran and ran and ran.", " did.")
PAIRS = [
    {"prompt": subject, "chosen": ENDINGS[place % 6], "rejected": ENDINGS[(place + 1 + place // 6) % 6]}
    for place, subject in enumerate(SUBJECTS * 3)
]
CHATS = [
    {
        side: [{"role": "user", "content": f"{subject}?"}, {"role": "assistant", "content": answer}]
        for side, answer in (("chosen", chosen), ("rejected", rejected))
    }
    for subject in SUBJECTS
    for chosen, rejected in (("yes.", "no, no."), ("a cat", "oh"), ("no.", "it is so big"))
]
"""The prompt is what both begin with."""
OPINIONS = [
    {"prompt": subject, "completion": ENDINGS[place % 5], "label": place % 3 != 0}
    for place, subject in enumerate(SUBJECTS * 3)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", seed=3).save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


def arguments(folder: Path, **others: Any) -> dict[str, Any]:
    """What both of TRL's configurations are told."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1e9,
        "optim": "adamw_torch",
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        **others,
    }


def trl_steps(
    kind: str, model: Path, records: list[Any], config: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """What TRL logs of every step, and its weights after the last."""

    class InOrder(getattr(trl, f"{kind}Trainer")):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> torch.utils.data.SequentialSampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        args=config,
        train_dataset=datasets.Dataset.from_list(records),
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return rows, {name: value.detach() for name, value in trainer.model.state_dict().items()}


def our_steps(
    algorithm: AlgorithmConfig, model: Path, records: list[Any], folder: Path
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    result = tropism.train(
        str(model),
        algorithm,
        data=records,
        run=folder / "run",
        total_steps=STEPS,
        prompts_per_step=ROWS,
        trainer=tropism.TrainerConfig(
            learning_rate=RATE,
            schedule="linear",
            progress=False,
            max_grad_norm=1e9,
            optimizer=tropism.OptimizerConfig(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
        ),
    )
    network = AutoModelForCausalLM.from_pretrained(result.path / "model", dtype=torch.float32)
    return logged(result.path, "update"), network.state_dict()


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {}),
    "ipo": ({"variant": "ipo"}, {"loss_type": "ipo"}),
    "hinge": ({"variant": "hinge", "beta": 0.5}, {"loss_type": "hinge", "beta": 0.5}),
    "cut": ({"max_length": 16}, {"max_length": 16}),
}
"""Our fields and TRL's."""


@pytest.mark.parametrize(("name", "data"), [*((name, "text") for name in VARIANTS), ("sigmoid", "chat")])
def test_dpo_takes_the_steps_of_trl(name: str, data: str, model: Path, tmp_path: Path) -> None:
    records: list[Any] = PAIRS if data == "text" else CHATS
    fields, theirs = VARIANTS[name]
    config = trl.DPOConfig(**arguments(tmp_path / "trl", **{"max_length": None, **theirs}))
    rows, weights = trl_steps("DPO", model, records, config)
    ours, own_weights = our_steps(tropism.DPO(shuffle=False, **fields), model, records, tmp_path)
    assert len(ours) == len(rows) == STEPS
    names = {
        "loss/preference": "loss",
        "optim/grad_norm": "grad_norm",
        "implicit/chosen": "rewards/chosen",
        "implicit/rejected": "rewards/rejected",
        "implicit/margin": "rewards/margins",
        "implicit/accuracy": "rewards/accuracies",
    }
    for step, (own, row) in enumerate(zip(ours, rows, strict=True)):
        for mine, its in names.items():
            # Rounding alone says which of two equal rewards is larger before the first update.
            if step > 0 or mine in ("loss/preference", "optim/grad_norm"):
                assert own[mine] == pytest.approx(row[its], rel=1e-4, abs=2e-5), (step, mine)
    assert max(abs(row["implicit/margin"]) for row in ours) > 0.05
    for key, value in weights.items():
        torch.testing.assert_close(own_weights[key], value, rtol=1e-4, atol=5e-5)


def test_kto_takes_the_steps_of_trl(model: Path, tmp_path: Path) -> None:
    """Its completions of other prompts, and so its reference point, are those of TRL on one device."""
    config = trl.KTOConfig(
        **arguments(
            tmp_path / "trl", max_length=None, desirable_weight=1.0, undesirable_weight=1.5, logging_first_step=True
        )
    )
    rows, weights = trl_steps("KTO", model, OPINIONS, config)
    ours, own_weights = our_steps(tropism.KTO(shuffle=False, undesirable_weight=1.5), model, OPINIONS, tmp_path)
    assert len(ours) == len(rows) == STEPS
    for step, (own, row) in enumerate(zip(ours, rows, strict=True)):
        assert own["loss/opinion"] == pytest.approx(row["loss"], rel=1e-4, abs=1e-6), step
        assert own["optim/grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3), step
        assert own["implicit/reference_point"] == pytest.approx(0.1 * row["kl"], rel=1e-3, abs=1e-6), step
    assert max(row["implicit/reference_point"] for row in ours) > 1e-3
    for key, value in weights.items():
        torch.testing.assert_close(own_weights[key], value, rtol=1e-4, atol=5e-5)
