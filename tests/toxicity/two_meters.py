"""What each of two processes measures: ``python two_meters.py FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tiny_models import tiny_model, tiny_tokenizer
from toxicity.stand_ins import PROMPTS, letter
from tropism import Sampling, ToxicityMeter
from tropism.toxicity.files import GrowingRows

CASES = {
    "own": Sampling(max_new_tokens=6),
    "beams": {"num_beams": 3, "max_new_tokens": 6},
    "generate": {"do_sample": True, "top_k": 20, "max_new_tokens": 6},
}


def measure_all(folder: Path) -> None:
    """A measurement in each way to sample."""
    torch.set_num_threads(1)
    model = (tiny_model("llama"), tiny_tokenizer())
    for name, sampling in CASES.items():
        k = 1 if name == "beams" else 2
        options = {"sampling": sampling, "samples_per_prompt": k, "batch_size": 3, "device": "cpu"}
        meter = ToxicityMeter(model, {"letter": letter}, **options)  # type: ignore[arg-type]
        if meter._processes.rank > 0:
            forbid_writing()
        result = meter.measure(PROMPTS, folder / name)
        assert len(result.responses) == len(PROMPTS) * k


def forbid_writing() -> None:
    """Only the first process writes."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a process other than the first writes")

    for name in ("begin", "append", "finish"):
        setattr(GrowingRows, name, refused)


if __name__ == "__main__":
    measure_all(Path(sys.argv[1]))
