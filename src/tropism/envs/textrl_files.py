"""What an agent of the TextRL facade writes: a plain Hugging Face folder, and beside it what training needs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tropism.envs.textrl_learning import Learner
from tropism.errors import ConfigError, ModelError
from tropism.foreign.json_files import read_object
from tropism.foreign.paths import file_inside
from tropism.models.freezing import train_last_layers
from tropism.models.loading import LoadedModel, ModelConfig, load_model
from tropism.models.policy import Policy
from tropism.models.saving import save_plain, verify_plain
from tropism.models.seq2seq import is_encoder_decoder
from tropism.recipe_identity import weights_fingerprint
from tropism.tokenizer_of import tokenizer_of
from tropism.training.state import load_optimizer_state, load_trainable_state, optimizer_state, trainable_state

logger = logging.getLogger("tropism")

FACTS = "textrl.json"
DUMPED = "textrl-dump.json"
"""Marks a folder that ``dump`` wrote, and may replace."""
CRITIC = "value_head.safetensors"
OPTIMIZER = "optimizer.safetensors"
FORMAT = 1
TOLERANCE = 1e-5
"""Most that logits of a dumped model may differ, as a share of the largest one (or of 1)."""

_HEAD, _MODEL = "value_head.", "model."
"""How names of weights in a policy begin."""


def save_agent(learner: Learner, tokenizer: PreTrainedTokenizerBase, folder: Path, *, layers: int, steps: int) -> None:
    """Write what ``load_agent`` reads. The folder appears, or replaces an older one, once it is whole.

    Args:
        layers: how many of the last transformer blocks are trained.
        steps: of the environment so far.

    Raises:
        ConfigError: the folder holds anything but an older agent.
        StorageError: it cannot be written.
    """
    policy: Any = learner.policy
    facts = {
        "format": FORMAT,
        "unfreeze_layer_from_past": layers,
        "optimizer": learner.optimizer_name,
        "steps": steps,
        "trained": sorted(_shapes(policy).items()),
        "frozen_weights": _frozen_fingerprint(policy),
    }

    def write(path: Path) -> None:
        (path / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        head = {name: tensor for name, tensor in trainable_state(policy).items() if name.startswith(_HEAD)}
        _write_tensors(head, path / CRITIC)
        _write_tensors(optimizer_state(policy, learner.optimizer), path / OPTIMIZER)

    if folder.is_dir() and any(folder.iterdir()) and not (folder / FACTS).is_file():
        raise ConfigError(f"{folder} holds other files, and no saved agent; name a new folder: {folder / 'agent'}")
    save_plain(policy.model, tokenizer, folder, beside=write)


def load_agent(learner: Learner, folder: Path, *, layers: int) -> None:
    """Put the weights of a saved agent into the learner's policy, with its critic and the optimizer's state.

    Raises:
        ModelError: not such a folder, or one of another model or of other trained blocks; nothing has changed.
    """
    facts = read_facts(folder)
    _check(facts, learner.policy, folder, layers=layers)
    state = _saved_weights(learner.policy, folder)
    head = _tensors(folder, CRITIC)
    load_trainable_state(learner.policy, state | head)
    learner.optimizer.state.clear()
    if facts["optimizer"] == learner.optimizer_name:
        load_optimizer_state(learner.policy, learner.optimizer, _tensors(folder, OPTIMIZER))
    else:
        logger.warning(
            "%s was trained with the optimizer %s, and this agent has %s, which begins anew",
            folder,
            facts["optimizer"],
            learner.optimizer_name,
        )


def dump(base: str, agent: Path, out: Path, *, device: str = "auto") -> float:
    """Write a saved agent's model as a plain Hugging Face folder, and compare it with the trained weights.

    Args:
        base: the model before training: a folder, hub id, .gguf file or "demo".
        agent: what ``TextRLAgent.save`` wrote.
        out: the folder to write; an older dump of that name is replaced.

    Returns:
        The largest difference of logits between what was trained and what ``out`` loads as.

    Raises:
        ModelError: the folder is none of an agent, is of another model, or what was written differs.
        ConfigError: ``out`` holds anything but an older dump.
        StorageError: it cannot be written.
    """
    facts = read_facts(agent)
    _check_dump(out)
    saved = read_object(agent / "config.json")
    dtype = saved.get("dtype", saved.get("torch_dtype"))
    precision: Any = dtype if dtype in ("float32", "bfloat16", "float16") else "auto"
    loaded = load_model(ModelConfig(name=base, device=device, dtype=precision))
    policy = Policy(loaded.model)
    layers = int(facts["unfreeze_layer_from_past"])
    train_last_layers(loaded.model, layers)  # type: ignore[arg-type]
    _check(facts, policy, agent, layers=layers)
    load_trainable_state(policy, _saved_weights(policy, agent))
    differences: list[float] = []

    def compare(path: Path) -> None:
        differences.append(_compare(loaded, path))
        (path / DUMPED).write_text(json.dumps({"format": FORMAT}), encoding="utf-8")

    save_plain(loaded.model, tokenizer_of(agent), out, beside=compare)
    return differences[0]


def _check_dump(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not (out / DUMPED).is_file():
        raise ConfigError(f"{out} is there already and is no earlier dump; name a new folder")


def read_facts(folder: Path) -> dict[str, Any]:
    """What a saved agent says of itself.

    Raises:
        ModelError: there is none.
    """
    path = file_inside(folder, FACTS) if folder.is_dir() else None
    if path is None:
        raise ModelError(
            f"{folder} holds no saved agent ({FACTS} is missing); give a folder that agent.save wrote, such as "
            "OUTDIR/best"
        )
    facts = read_object(path)
    layers, steps = facts.get("unfreeze_layer_from_past"), facts.get("steps")
    if facts.get("format") != FORMAT or not all(type(value) is int and value >= 0 for value in (layers, steps)):
        raise ModelError(f"{path} is damaged, or of another version of tropism")
    return facts


def _check(facts: dict[str, Any], policy: Policy, folder: Path, *, layers: int) -> None:
    if facts["unfreeze_layer_from_past"] != layers:
        raise ModelError(
            f"{folder} was trained with unfreeze_layer_from_past={facts['unfreeze_layer_from_past']}, and this agent "
            f"with {layers}; make the actor with that number"
        )
    ours = [[name, list(shape)] for name, shape in sorted(_shapes(policy).items()) if name.startswith(_MODEL)]
    theirs = [[name, shape] for name, shape in facts.get("trained", []) if name.startswith(_MODEL)]
    if ours != theirs or facts.get("frozen_weights") != _frozen_fingerprint(policy):
        what = "its trained weights have other names or shapes" if ours != theirs else "its frozen weights differ"
        raise ModelError(
            f"{folder} is of another model: {what}. Load the agent on the very model that it was trained from (its own "
            "folder loads as a model by itself, too, with AutoModelForCausalLM)"
        )


def _shapes(policy: Policy) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in policy.named_parameters() if p.requires_grad}


def _frozen_fingerprint(policy: Policy) -> str:
    """Of the weights that training leaves as they are: what the trained ones were trained for."""
    return weights_fingerprint({n: p.detach() for n, p in policy.model.named_parameters() if not p.requires_grad})


def _saved_weights(policy: Policy, folder: Path) -> dict[str, Tensor]:
    """The trained weights of the language model in a saved folder, by their names in the policy."""
    dtype: Any = str(policy.dtype).removeprefix("torch.")
    saved: Any = load_model(ModelConfig(name=str(folder), device="cpu", dtype=dtype)).model
    found = dict(saved.named_parameters(remove_duplicate=False))
    wanted = [name for name in _shapes(policy) if name.startswith(_MODEL)]
    missing = [name for name in wanted if name.removeprefix(_MODEL) not in found]
    if missing:
        raise ModelError(f"{folder} holds no weights {missing[0]}; copy the whole folder that agent.save wrote")
    return {name: found[name.removeprefix(_MODEL)].detach() for name in wanted}


@torch.no_grad()
def _compare(loaded: LoadedModel, path: Path) -> float:
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    ids = (torch.arange(24) * 7919 % min(int(vocabulary), len(loaded.tokenizer))).view(2, 12)
    difference = verify_plain(loaded.model, path, ids)
    given = {"input_ids": ids.to(loaded.model.device), "use_cache": False}
    if is_encoder_decoder(loaded.model):
        given["decoder_input_ids"] = given["input_ids"]
    largest = float(loaded.model(**given).logits.float().abs().max())
    allowed = TOLERANCE * max(1.0, largest)
    if not difference <= allowed:
        raise ModelError(
            f"the folder that was written gives other logits than the trained model, by up to {difference:.2g} "
            f"(allowed {allowed:.2g}); nothing was kept. Please report the model's family"
        )
    return difference


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    path = file_inside(folder, name)
    if path is None:
        raise ModelError(f"{folder} holds no {name}; copy the whole folder that agent.save wrote")
    try:
        return load_file(path)
    except (ValueError, OSError, RuntimeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error
