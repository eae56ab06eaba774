"""From what a recipe or a Python caller names to a function that can be called."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import logging
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tropism.errors import ConfigError
from tropism.rewards.config import RewardTerm, closest
from tropism.rewards.registry import RewardFn, bind_arguments, make_reward
from tropism.rewards.reward_model import NAME, names_folder

logger = logging.getLogger("tropism")

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def resolve_reward(term: RewardTerm, *, allow_code: bool = False, expected_digest: str | None = None) -> RewardFn:
    """The function of a reward term, with its ``args`` bound.

    A path is the folder of a trained reward model. A string with a colon refers to code and is refused unless
    ``allow_code``; what is imported is logged with its hash. The working directory is not put on ``sys.path``: a file
    is named as a file.

    Args:
        expected_digest: what ``code_digest`` gave in the process that announced the code; other code is refused.

    Raises:
        ConfigError: unknown name, a folder that holds no reward model, code that is not allowed, cannot be found,
            cannot be imported or cannot be called.
    """
    if not isinstance(term.use, str):
        if inspect.isclass(term.use):
            raise ConfigError(
                f"reward {term.use.__name__} is a class; give an instance of it: {term.use.__name__}(...)"
            )
        return bind_arguments(term.use, term.args, f"reward {term.name!r}")
    if names_folder(term.use):
        if "model" in term.args:
            raise ConfigError(f"args.model: {term.use} names the reward model already; leave it out")
        return make_reward(NAME, {"model": term.use, **term.args})
    if ":" not in term.use:
        return make_reward(term.use, term.args)
    check_allowed(term, allow_code=allow_code)
    digest, path, content = _code_of(term.use)
    if expected_digest is None:
        _announce(digest, path)
    elif digest != expected_digest:
        raise ConfigError(f"the code of {term.use!r} has changed since the run began; start the run again")
    return bind_arguments(_import_reference(term.use, path, content), term.args, f"reward {term.use!r}")


def check_allowed(term: RewardTerm, *, allow_code: bool) -> None:
    """Refuse a term that names code unless that is allowed."""
    if isinstance(term.use, str) and ":" in term.use and not allow_code:
        raise ConfigError(
            f"the reward {term.use!r} runs code of your machine. If you trust it, allow it: --allow-code on the "
            "command line, allow_code=True in Python (or pass the function itself)."
        )


def announce_code(reference: str) -> None:
    """Log which file a reference runs, with its hash."""
    digest, path, _ = _code_of(reference)
    _announce(digest, path)


def _announce(digest: str, path: Path | None) -> None:
    if path is not None:
        logger.warning("running reward code from %s (sha256 %s)", path, digest)


def code_digest(reference: str) -> str:
    """SHA-256 of the file that a code reference runs.

    Raises:
        ConfigError: there is none.
    """
    return _code_of(reference)[0]


def _code_of(reference: str) -> tuple[str, Path | None, bytes]:
    """Hash, path and content of the file of a reference; no path for a module that is in no file."""
    source, _, attribute = reference.rpartition(":")
    if not _DOTTED.fullmatch(attribute):
        raise ConfigError(f"{reference!r}: expected module:function or file.py:function")
    if not _names_file(source):
        path = _module_file(source, reference)
        content = b"" if path is None else path.read_bytes()
        return hashlib.sha256(content).hexdigest(), path, content
    path = Path(source)
    try:
        content = path.resolve(strict=True).read_bytes()
    except OSError as error:
        raise ConfigError(f"{reference!r}: cannot read {path} from {Path.cwd()}: {error.strerror or error}") from error
    return hashlib.sha256(content).hexdigest(), path.resolve(), content


def _names_file(source: str) -> bool:
    return source.endswith(".py") or "/" in source or "\\" in source


def _import_reference(reference: str, path: Path | None, content: bytes) -> Any:
    source, _, attribute = reference.rpartition(":")
    if _names_file(source):
        assert path is not None
        module = _load_file(path, content, reference)
    else:
        module = _load_module(source, reference)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            raise ConfigError(f"{reference!r}: {source} has no {part!r}. {closest(part, names)}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{reference!r} is {type(found).__name__}, not a function that can be called")
    return found


def _load_file(path: Path, source: bytes, reference: str) -> ModuleType:
    """The module that the content of a file makes: the very bytes that were hashed."""
    name = f"tropism_reward_{hashlib.sha256(str(path).encode() + source).hexdigest()[:16]}"
    if name in sys.modules:  # two terms of one file share its state
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{reference!r}: importing {path} failed: {type(error).__name__}: {error}") from error
    return module


def _module_file(name: str, reference: str) -> Path | None:
    """Where a module is, without importing it (its parents are)."""
    if not _DOTTED.fullmatch(name):
        raise ConfigError(f"{reference!r}: expected module:function or file.py:function")
    try:
        spec = importlib.util.find_spec(name)
    except Exception as error:  # finding a submodule runs its parents
        raise ConfigError(f"{reference!r}: importing {name} failed: {type(error).__name__}: {error}") from error
    if spec is None:
        raise ConfigError(
            f"{reference!r}: there is no installed module {name!r}. Files of the working directory are named as files: "
            f"{name.replace('.', '/')}.py:{reference.rpartition(':')[2]}"
        )
    return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None


def _load_module(name: str, reference: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(f"{reference!r}: importing {name} failed: {type(error).__name__}: {error}") from error
