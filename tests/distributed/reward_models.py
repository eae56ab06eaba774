"""What each of two processes does for tests/distributed/test_reward_models.py: ``python reward_models.py FOLDER``.

Both have the local rank 0, as the first processes of two machines have.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if __name__ == "__main__":
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from distributed.two_processes import forbid_writing
from tiny_runs import JUDGED, JUDGED_APART, PROMPTS, Setting, assemble, execute, weights_of
from tropism import build_reward_model
from tropism.algorithms import PPO, KLControl
from tropism.build import Assembly
from tropism.rewards import RewardConfig
from tropism.training.normalisation import Normalisation

STEPS = 10
RATED = [
    {"prompt": item["prompt"], "completion": text, "rating": float((5 * row + 3 * place) % 7)}
    for row, item in enumerate(JUDGED)
    for place, text in enumerate(item["completions"])
]
SCALE = Normalisation(samples=9, check=5, data=PROMPTS)
SOURCE = PPO.preset("lm-human-preferences/sentiment", kl=KLControl(target=0.5, horizon=100), num_epochs=2)
CASES: dict[str, tuple[Setting, dict[str, Any]]] = {
    "choice": (Setting("reward-model", False, "llama"), {"normalise": SCALE, "eval_data": JUDGED_APART[:3]}),
    "rating-lora": (Setting("reward-model", True, "gpt2"), {"normalise": SCALE, "data": RATED}),
    "ppo": (Setting("ppo", False, "llama"), {"algorithm": SOURCE, "prompts_per_step": 9, "eval_data": PROMPTS[:3]}),
}
"""Two reward models whose shares are never even, put on a scale before and after training; and PPO as the source has it
(an adaptive KL coefficient, whitened rewards) on the first of them."""


def run_all(folder: Path) -> None:
    """Ten steps of every case, of which each process writes what it did."""
    torch.set_num_threads(1)
    for name, (setting, changes) in CASES.items():
        trainer = {"learning_rate": 1e-4, "micro_batch_size": 1}
        reward = {"reward": RewardConfig.of(str(folder / "choice"))} if name == "ppo" else {}
        given = {"prompts_per_step": 5, "total_steps": STEPS, **reward, **changes}
        assembly = assemble(setting, folder / name, trainer=trainer, **given)
        rank = assembly.processes.rank
        if rank > 0:
            forbid_writing()
            vars(build_reward_model)["note"] = _refuse
        noted = take_notes(assembly)
        execute(assembly, export=name == "choice")
        noted["state"] = assembly.algorithm.state_dict()
        (folder / f"{name}-rank-{rank}.json").write_text(json.dumps(noted))
        save_file(weights_of(assembly), folder / f"{name}-rank-{rank}.safetensors")


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a process other than the first noted something")


def take_notes(assembly: Assembly) -> dict[str, Any]:
    """What this process computes: the texts of every update, and the gradients of gain and bias as they are used."""
    noted: dict[str, Any] = {"texts": [[]], "gain": [], "bias": [], "coefficients": []}
    loss: Any = assembly.algorithm.loss
    make_batch: Any = getattr(assembly.algorithm, "make_batch", None)

    def watched(policy: Any, batch: Any) -> Any:
        if hasattr(batch, "choices"):
            noted["texts"][-1] += batch.ids.tolist()
        return loss(policy, batch)

    def made(*arguments: Any) -> Any:
        noted["coefficients"].append(assembly.algorithm.state_dict())
        return make_batch(*arguments)

    def stepped(*_: object) -> None:
        for name in ("gain", "bias"):
            parameter = getattr(assembly.policy, name, None)
            if parameter is not None:
                noted[name].append(float(parameter.grad))
        noted["texts"].append([])

    assembly.algorithm.loss = watched
    if make_batch is not None:
        assembly.algorithm.make_batch = made
    assembly.trainer.optimizer.register_step_pre_hook(stepped)
    return noted


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
