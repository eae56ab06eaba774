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

logger = logging.getLogger("tropism")

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def resolve_reward(term: RewardTerm, *, allow_code: bool = False) -> RewardFn:
    """The function of a reward term, with its ``args`` bound.

    A string with a colon refers to code and is refused unless ``allow_code``; what is imported is logged with its hash.
    The working directory is not put on ``sys.path``: a file is named as a file.

    Raises:
        ConfigError: unknown name, code that is not allowed, cannot be found, cannot be imported or cannot be called.
    """
    if not isinstance(term.use, str):
        if inspect.isclass(term.use):
            raise ConfigError(
                f"reward {term.use.__name__} is a class; give an instance of it: {term.use.__name__}(...)"
            )
        return bind_arguments(term.use, term.args, f"reward {term.name!r}")
    if ":" not in term.use:
        return make_reward(term.use, term.args)
    if not allow_code:
        raise ConfigError(
            f"the reward {term.use!r} runs code of your machine. If you trust it, allow it: --allow-code on the "
            "command line, allow_code=True in Python (or pass the function itself)."
        )
    return bind_arguments(_import_reference(term.use), term.args, f"reward {term.use!r}")


def _import_reference(reference: str) -> Any:
    source, _, attribute = reference.rpartition(":")
    if not _DOTTED.fullmatch(attribute):
        raise ConfigError(f"{reference!r}: expected module:function or file.py:function")
    is_file = source.endswith(".py") or "/" in source or "\\" in source
    module = _load_file(Path(source), reference) if is_file else _load_module(source, reference)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            raise ConfigError(f"{reference!r}: {source} has no {part!r}. {closest(part, names)}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{reference!r} is {type(found).__name__}, not a function that can be called")
    return found


def _load_file(path: Path, reference: str) -> ModuleType:
    try:
        source = path.resolve(strict=True).read_bytes()
    except OSError as error:
        raise ConfigError(f"{reference!r}: cannot read {path} from {Path.cwd()}: {error.strerror or error}") from error
    path = path.resolve()
    digest = hashlib.sha256(source).hexdigest()
    logger.warning("running reward code from %s (sha256 %s)", path, digest)
    name = f"tropism_reward_{hashlib.sha256(str(path).encode() + source).hexdigest()[:16]}"
    if name in sys.modules:  # two terms of one file share its state
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickle look their module up here
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)  # the very bytes that were hashed
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{reference!r}: importing {path} failed: {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str, reference: str) -> ModuleType:
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
    if spec.origin and Path(spec.origin).is_file():
        digest = hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
        logger.warning("running reward code from %s (sha256 %s)", spec.origin, digest)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ConfigError(f"{reference!r}: importing {name} failed: {type(error).__name__}: {error}") from error
