"""What each of two processes does of which one is short of memory: ``python short_of_memory.py FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from tiny_runs import Setting, assemble, execute, weights_of
from tropism.build import Assembly
from tropism.errors import NoRoomError
from tropism.models.policy import Policy
from tropism.models.sampling_model import SamplingModel

GRPO = Setting("grpo", True, "llama")


def short_of_memory(*, gradients: int, without: int, sampled: int) -> list[str]:
    """From now on passes of this process over more rows than that do not fit; lists those that failed."""
    failed: list[str] = []
    forward, decode = Policy.forward, SamplingModel.decode

    def limited(self: Any, prompt_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        most = gradients if torch.is_grad_enabled() else without
        if len(prompt_ids) > most:
            failed.append("update" if torch.is_grad_enabled() else "score")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, prompt_ids, *args, **kwargs)

    def limited_decode(self: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        if len(ids) > sampled:
            failed.append("sample")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(self, ids, cache)

    Policy.forward = limited  # type: ignore[method-assign]
    SamplingModel.decode = limited_decode  # type: ignore[method-assign]
    return failed


def run(folder: Path) -> Assembly:
    trainer = {"learning_rate": 1e-4, "preflight": False}
    return assemble(GRPO, folder, trainer=trainer, algorithm=GRPO.with_algorithm(group_size=4, minibatch_size=8))


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    assembly = run(folder / "run")
    plain = Policy.forward, SamplingModel.decode
    failed = short_of_memory(gradients=1, without=2, sampled=2) if rank == 1 else []
    execute(assembly)
    assert set(failed) == ({"sample", "score", "update"} if rank == 1 else set()), failed
    save_file(weights_of(assembly), folder / f"rank-{rank}.safetensors")
    Policy.forward, SamplingModel.decode = plain  # type: ignore[method-assign]
    ended = run(folder / "ended")
    if rank == 1:
        short_of_memory(gradients=0, without=99, sampled=99)
    try:
        execute(ended)
    except NoRoomError as error:
        (folder / f"error-{rank}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
