"""A reward model of the policy's size: the same transformer with a fresh scalar head, written to a folder."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gate import Gate
from benchmarks.work import Job

FOLDER = "reward-model"
"""Its name in the scratch folder."""


def run(job: Job, gate: Gate) -> None:
    """Write the reward model of ``job.model`` to the scratch folder."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    folder = Path(job.scratch) / FOLDER
    model = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=1, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(job.model).save_pretrained(folder)
    gate.ready(folder=str(folder))
