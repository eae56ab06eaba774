"""What a recipe cannot hold of a run, as fingerprints in its checkpoints: weights, held-out data, rewards, the machine.

A recipe names files and describes objects of a Python program. Whether the same is still there when a run is resumed is
told by digests of what was read. (The training items have theirs in ``data.order``.)
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism import __version__
from tropism.algorithms.base import RunFacts
from tropism.errors import ConfigError, DataError, ModelError, StorageError
from tropism.models.loading import ModelConfig
from tropism.models.modules import base_model
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.redaction import redact_values
from tropism.rewards import RewardConfig
from tropism.rewards.reward_model import find_reward_model, fingerprint, folder_named
from tropism.storage import write_whole

logger = logging.getLogger("tropism")

SAMPLED = 64
"""Values of each tensor that its fingerprint looks at, at even distances: cheap for models of any size."""

_MODEL = "model:"
"""Begins the digest of a reward that is a trained model."""

_UNSTEADY = ("_name_or_path", "name_or_path", "transformers_version")
"""Entries of a model's configuration that say nothing about what it computes."""

MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".txt", ".jinja")
"""Endings of the files of a model folder that decide what it is."""
_PIECE = 1 << 20


class WatchedFacts(RunFacts):
    """Facts of a run that know whether the method has asked for ``total_steps``: only then must it stay as it was."""

    def __getattribute__(self, name: str) -> Any:
        if name == "total_steps":
            object.__setattr__(self, "_read", True)
        return super().__getattribute__(name)

    @property
    def total_steps_read(self) -> bool:
        return "_read" in vars(self)


def identity_of(
    policy: Policy, reference: Reference | None, reward: RewardConfig | None, gold: RewardConfig | None = None
) -> dict[str, Any]:
    """Fingerprints of what a run starts from, as plain JSON, taken before anything is trained or read back.

    ``held_out`` is an empty list, for the fingerprints of the items of each evaluation.
    """
    model: Any = policy.model
    config = base_model(model).config.to_dict()
    steady = {key: value for key, value in config.items() if key not in _UNSTEADY}
    return {
        "weights": weights_fingerprint(starting_weights(policy, reference)),
        "config": _digest(json.dumps(steady, sort_keys=True, default=str).encode()),
        "held_out": [],
        "rewards": {} if reward is None else reward_sources(reward),
        "gold": {} if gold is None else reward_sources(gold),
    }


def starting_weights(policy: Policy, reference: Reference | None) -> dict[str, Tensor]:
    """The weights that no checkpoint holds and that a resumed run needs as they were: the frozen ones, and those that
    the reference copies before they are trained."""
    copied = reference is not None and reference.kind == "copy"
    return {name: p.detach() for name, p in policy.model.named_parameters() if copied or not p.requires_grad}


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes, dtypes, and about ``SAMPLED`` values of each tensor."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in weights.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.reshape(-1)
        if len(flat):
            chosen = torch.cat([flat[:: max(1, len(flat) // SAMPLED)], flat[-1:]])
            digest.update(chosen.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def reward_sources(config: RewardConfig) -> dict[str, str]:
    """Digest of the code of each term that is the user's own: of a function's source, or of the file that a reference
    such as ``rewards.py:mine`` names. Terms whose source is not to be had, such as functions typed in, have none. Of
    a trained reward model that of its files, after ``_MODEL``."""
    sources: dict[str, str] = {}
    for name, term in config.terms.items():
        folder = folder_named(term)
        if folder is not None:
            sources[name] = _MODEL + fingerprint(find_reward_model(folder))
            continue
        code = _file_of(term.use) if isinstance(term.use, str) else _source_of(term.use)
        if code is not None:
            sources[name] = _digest(code)
    return sources


def model_files(model: Any, before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each file of a local model folder (or GGUF file) with a digest of its content; of a hub model its commit.

    A digest is taken over only for a file that the system has not changed since: size, inode and time of change, which
    unlike the time of modification nobody can set.
    """
    name = model.name if isinstance(model, ModelConfig) else str(model)
    path = Path(name)
    if not path.exists():
        commit = _commit(name, model.revision if isinstance(model, ModelConfig) else None)
        return {} if commit is None else {name: {"digest": commit}}
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.suffix in MODEL_FILES)
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        if not file.is_file():
            continue
        status = file.stat()
        mark = [status.st_size, status.st_ino, status.st_ctime_ns]
        known = before.get(file.name)
        same = isinstance(known, Mapping) and known.get("mark") == mark
        found[file.name] = {"digest": known["digest"] if same and known else file_digest(file), "mark": mark}
    return found


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a hub model that is on this machine; None for the demo model, or where there is none yet."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name of the hub
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def file_digest(path: Path) -> str:
    """Digest of the content of a file.

    Raises:
        StorageError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def check_identity(saved: Mapping[str, Any] | None, own: Mapping[str, Any], *, same_libraries: bool) -> list[str]:
    """Compare what a checkpoint presumes with what is there now.

    Args:
        saved: ``identity_of`` the run, from its checkpoint.
        same_libraries: whether the versions are those of the run; others describe the same model in other words.

    Returns:
        A sentence for each difference that the run can go on with.

    Raises:
        ModelError: other weights, or another model's configuration.
        DataError: other held-out items.
        ConfigError: the checkpoint holds no fingerprints.
    """
    if saved is None:
        raise ConfigError("the checkpoint was written by another version of tropism and cannot be resumed by this one")
    if saved["weights"] != own["weights"] or (saved["config"] != own["config"] and same_libraries):
        what = "weights" if saved["weights"] != own["weights"] else "configuration"
        raise ModelError(
            f"the {what} of the model are not those that the run started from: the model's files have changed, or a "
            "model given from Python has been trained since. Give the model as it was before the run (load it anew)"
        )
    if saved["held_out"] != own["held_out"]:
        raise DataError(
            "the held-out data is not that of the run: other items, another order, or other token ids. Give the run "
            "the same eval_data, with the same tokenizer and chat template, or start a new run"
        )
    # Not refused: mending a function that failed in the middle of a run is why runs are resumed.
    rewards, golds = (_changed(saved.get(kind, {}), own[kind]) for kind in ("rewards", "gold"))
    return [
        *(f"the {part} of the reward {name!r} has changed; what it scored before stays" for name, part in rewards),
        *(
            f"the {part} of the gold reward {name!r} has changed; what it measured before stays, and does not compare "
            "with what follows"
            for name, part in golds
        ),
    ]


def _changed(saved: Mapping[str, str], own: Mapping[str, str]) -> list[tuple[str, str]]:
    """The terms whose sources are others now, each with what of it is: its code, or its model."""
    names = [name for name, source in saved.items() if name in own and own[name] != source]
    return [(name, "model" if own[name].startswith(_MODEL) else "code") for name in names]


def read_environment(folder: Path) -> dict[str, Any]:
    """``environment.json`` of a run folder; empty where it cannot be read, as the run does not depend on it."""
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        environment = None
    if not isinstance(environment, dict):
        logger.warning(
            "%s is missing or damaged: versions and threads cannot be compared with those that the run began with",
            folder / "environment.json",
        )
        return {}
    return environment


def note(folder: Path, **facts: Any) -> None:
    """Put further facts into ``environment.json``.

    Raises:
        StorageError: it cannot be written.
    """
    content = json.dumps(redact_values({**read_environment(folder), **facts}), indent=1)
    write_whole(folder / "environment.json", content.encode())


def machine_facts(environment: Mapping[str, Any], *, device: str, processes: int) -> dict[str, Any]:
    """What is here now of the facts that ``environment.json`` of a run states and results depend on."""
    facts: dict[str, Any] = {"device": device, "processes": processes, "threads": torch.get_num_threads()}
    return facts | {name: __version__ if name == "tropism" else _version(name) for name in _versions(environment)}


def machine_changes(environment: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``threads 2 -> 1`` for everything that is not as ``environment.json`` says."""
    then = {**environment, **_versions(environment)}
    return [f"{name} {then[name]} -> {value}" for name, value in now.items() if name in then and then[name] != value]


def same_libraries(environment: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether all versions are those that ``environment.json`` names."""
    return all(now.get(name) == version for name, version in _versions(environment).items())


def _versions(environment: Mapping[str, Any]) -> Mapping[str, Any]:
    versions = environment.get("versions")
    return versions if isinstance(versions, Mapping) else {}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _source_of(function: Any) -> bytes | None:
    while isinstance(function, functools.partial):
        function = function.func
    named: Callable[..., Any] = function if hasattr(function, "__code__") else type(function)
    named = function if inspect.ismethod(function) else named
    if named.__module__.split(".")[0] == "tropism":
        return None  # its version stands for it
    try:
        return inspect.getsource(named).encode("utf-8", "surrogatepass")
    except (OSError, TypeError):
        return None


def _file_of(reference: str) -> bytes | None:
    """The content of the file that ``file.py:function`` or ``module:function`` names; None for registered names."""
    source, colon, _ = reference.rpartition(":")
    if not colon:
        return None
    spec_file: str | None = source
    if not (source.endswith(".py") or "/" in source or "\\" in source):
        spec_file = _module_file(source)
    try:
        return None if spec_file is None else Path(spec_file).read_bytes()
    except OSError:
        return None


def _module_file(name: str) -> str | None:
    """Where a module is, whether this process has imported it or not; its parents are imported."""
    try:
        spec = importlib.util.find_spec(name)
    except Exception:  # whatever the parents do as they are imported; who calls the function says so
        return None
    return None if spec is None or not spec.has_location else spec.origin
