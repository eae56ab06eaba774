"""One run of two steps in a process of its own: prints what its memory grew by, and what was estimated.

Started by test_memory_measured.py as ``python measured_run.py METHOD all|lora HIDDEN INNER LAYERS VOCABULARY FOLDER``.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tiny_models import tiny_model, tiny_tokenizer
from tropism.algorithms import GRPO, PPO, SFT, AlgorithmConfig
from tropism.build import Assembly
from tropism.config import Recipe
from tropism.models.lora import LoRA
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.training.config import TrainerConfig
from tropism.training.memory import keep_freed_memory

METHODS: dict[str, AlgorithmConfig] = {
    "sft": SFT(),
    "grpo": GRPO(group_size=4, num_epochs=1),
    "ppo": PPO(group_size=4, num_epochs=1),
}


def varied(completions: list[str]) -> list[float]:
    return [float(len(text) % 5) for text in completions]


def start(method: str, adapter: bool, model: Any, run: Path) -> Assembly:
    """Two steps of 32 rows of 64 tokens, in two micro-batches each; executed, with export and checkpoint."""
    algorithm = METHODS[method]
    rows: dict[str, Any] = {"data": ["a" * 64] * 40, "prompts_per_step": 32}
    if algorithm.on_policy:
        rows = {"data": ["abcdefghijklmnop"] * 9, "prompts_per_step": 8, "reward": RewardConfig.of(varied)}
    recipe = Recipe(
        model=(model, tiny_tokenizer()),
        algorithm=algorithm,
        run=str(run),
        total_steps=2,
        sampling=Sampling(max_new_tokens=48),
        lora=LoRA() if adapter else None,
        trainer=TrainerConfig(learning_rate=1e-4, micro_batch_tokens=1024, progress=False),
        **rows,
    )
    assembly = Assembly(recipe)
    assembly.check()
    keep_freed_memory()
    assembly.run.execute(2, resumed=None)
    return assembly


def sized(hidden: int, inner: int, layers: int, vocabulary: int) -> Any:
    return tiny_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=hidden // 64 or 1,
        num_key_value_heads=hidden // 64 or 1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )


def status(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def main() -> None:
    torch.set_num_threads(1)
    method, what, *sizes, folder = sys.argv[1:]
    adapter = what == "lora"
    start(method, adapter, sized(32, 48, 2, 64), Path(folder) / "warm-up")
    # Buffers that the matrix libraries make for products of this size, once, and keep.
    wide = torch.randn(1024, 1024, requires_grad=True)
    (torch.nn.functional.linear(wide, wide) @ wide).sum().backward()
    del wide
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = status("VmRSS")
    model = sized(*map(int, sizes))
    model.set_attn_implementation("sdpa")
    assembly = start(method, adapter, model, Path(folder) / "run")
    grown = status("VmHWM") - before
    sys.stdout.write(json.dumps({"grown": grown, **assembly.memory.facts()}) + "\n")


if __name__ == "__main__":
    main()
