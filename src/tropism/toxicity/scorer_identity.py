"""What tells one scorer from another: its code, its settings, what a function encloses, and the files of its model.

Two scorers of one fingerprint give one score. Where that cannot be told, the reason is noted beside the fingerprint.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import torch

from tropism import __version__
from tropism.data.order import fingerprint
from tropism.errors import StorageError
from tropism.recipe_identity import file_digest, model_files, reward_sources
from tropism.rewards import RewardConfig, RewardTerm
from tropism.rewards.registry import FACTORIES, registered
from tropism.rewards.reward_model import folder_named

PACKAGES = {"profanity": ("alt-profanity-check", "scikit-learn"), "vader": ("vaderSentiment",)}
"""Registered reward -> packages whose versions decide its scores."""
MOST_PARTS = 100_000
"""Of one scorer; what has more is not looked through."""
_OF_CLASSES = (
    *("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__static_attributes__"),
    *("_abc_impl", "__dataclass_fields__", "__dataclass_params__", "__match_args__"),
)
"""Entries of a class that change no score."""
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


class UnknownStateError(Exception):
    """Part of a scorer that nothing can be told of; the message names it."""


@dataclass(frozen=True, kw_only=True)
class ScorersIdentity:
    """What the scores of a measurement depend on."""

    fingerprint: str
    """Of all that can be told."""
    unknown: Mapping[str, str]
    """Scorer -> why it cannot be told from a changed one; empty where all can."""


def identity_of(config: RewardConfig) -> ScorersIdentity:
    """The identity of scorers as they are now: a function that counts its calls is another after a call."""
    sources = reward_sources(config)
    found: list[Any] = [__version__]
    unknown = {}
    for name, term in config.terms.items():
        try:
            part = _term(term, sources.get(name))
        except UnknownStateError as reason:
            unknown[name] = str(reason)
            part = ["unknown", sources.get(name)]
        found.append([name, part])
    return ScorersIdentity(fingerprint=fingerprint(found), unknown=unknown)


def _term(term: RewardTerm, source: str | None) -> list[Any]:
    """Plain data of all that the scores of a term depend on."""
    args = Description().of(dict(term.args))
    if not isinstance(term.use, str):
        return ["function", Description().of(term.use), args]
    if ":" in term.use:
        if source is None:
            raise UnknownStateError(f"the file of {term.use} cannot be read")
        return ["file", term.use, source, args]
    if folder_named(term) is not None:
        return ["reward model", source, {name: value for name, value in term.args.items() if name != "model"}]
    if term.use not in FACTORIES:
        return ["function", Description().of(registered(term.use)), args]
    files = {}
    if term.use == "classifier":
        files = {name: facts["digest"] for name, facts in model_files(str(term.args["model"]), {}).items()}
        if not files:
            raise UnknownStateError(f"the files of {term.args['model']} are not to be found")
        args = Description().of({name: value for name, value in term.args.items() if name != "model"})
    return ["registered", term.use, args, files, {name: _version(name) for name in PACKAGES.get(term.use, ())}]


class Description:
    """Plain data of Python objects: values, the code of functions and what it reaches, the state of instances.

    The code of installed packages counts by its version.
    """

    def __init__(self) -> None:
        self._done: dict[int, str] = {}
        self._path: list[int] = []
        self._held: list[Any] = []  # so that no id is given twice

    def of(self, value: Any) -> Any:
        """Plain data, for JSON.

        Raises:
            UnknownStateError: something that holds what cannot be seen, such as an open file.
        """
        try:
            return self._of(value)
        except RecursionError as error:
            raise UnknownStateError(f"a {type(value).__name__} is nested too deeply to be looked through") from error

    def _of(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | complex) or value is ...:
            return [type(value).__name__, repr(value)]
        if isinstance(value, str) and type(value) is str:
            return ["str", value]
        if isinstance(value, bytes | bytearray):
            return [type(value).__name__, hashlib.blake2b(value, digest_size=16).hexdigest()]
        if id(value) in self._path:
            return ["around", len(self._path) - self._path.index(id(value))]
        if id(value) not in self._done:
            if len(self._held) > MOST_PARTS:
                raise UnknownStateError("it holds too much to be looked through")
            self._held.append(value)
            self._path.append(id(value))
            # A digest each time, so that it does not matter whether two equal parts are one object.
            self._done[id(value)] = fingerprint([self._container(value)])
            self._path.pop()
        return ["part", self._done[id(value)]]

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if kind in (list, tuple):
            return [kind.__name__, [self._of(entry) for entry in value]]
        if kind in (dict, MappingProxyType):
            return ["dict", [[self._of(key), self._of(entry)] for key, entry in value.items()]]
        if kind in (set, frozenset):  # whose order differs by process
            return [kind.__name__, sorted(fingerprint([self._of(entry)]) for entry in value)]
        if isinstance(value, torch.Tensor):  # what pickle makes of one holds addresses
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest = hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()
            return ["tensor", str(value.dtype), list(value.shape), digest]
        if isinstance(value, ModuleType):
            return self._module(value)
        if isinstance(value, functools.partial):
            return ["partial", self._of(value.func), self._of(value.args), self._of(value.keywords)]
        if isinstance(value, MethodType):
            return ["method", self._of(value.__func__), self._of(value.__self__)]
        if isinstance(value, BuiltinFunctionType):
            owner = value.__self__
            bound = None if owner is None or isinstance(owner, ModuleType) else self._of(owner)
            return ["builtin", value.__module__, value.__qualname__, bound]
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, CodeType):
            return self._code(value)
        if isinstance(value, type):
            return self._class(value)
        return self._instance(value)

    def _module(self, module: ModuleType) -> Any:
        if _is_library(module.__name__):
            return ["module", module.__name__, _version_of(module.__name__)]
        try:
            return ["module", module.__name__, file_digest(Path(str(module.__file__)))]
        except (AttributeError, StorageError) as error:
            raise UnknownStateError(f"the file of the module {module.__name__} cannot be read") from error

    def _function(self, function: FunctionType) -> Any:
        """Code, defaults, what it encloses, and the globals that it names."""
        cells = [_content(cell) for cell in function.__closure__ or ()]
        parts = [self._of(part) for part in (cells, function.__defaults__, function.__kwdefaults__)]
        if _is_library(function.__module__):
            return ["function", function.__module__, function.__qualname__, _version_of(function.__module__), parts]
        names = sorted(set(_global_names(function.__code__)))
        reached = [[name, self._of(function.__globals__[name])] for name in names if name in function.__globals__]
        wrapped = self._of(vars(function))  # attributes, and what functools.wraps keeps
        return ["function", self._code(function.__code__), parts, reached, wrapped]

    def _code(self, code: CodeType) -> Any:
        names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
        counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
        constants = [self._of(entry) for entry in code.co_consts]
        return ["code", code.co_code.hex(), code.co_exceptiontable.hex(), constants, *map(list, names), counts]

    def _class(self, kind: type) -> Any:
        if _is_library(kind.__module__):
            return ["class", kind.__module__, kind.__qualname__, _version_of(kind.__module__)]
        own = {name: _plain_member(member) for name, member in vars(kind).items() if name not in _OF_CLASSES}
        kept = {name: member for name, member in own.items() if not inspect.isdatadescriptor(member)}
        return ["class", kind.__qualname__, [self._of(base) for base in kind.__bases__], self._of(kept)]

    def _instance(self, value: Any) -> Any:
        """What pickle would keep of it."""
        kind = type(value)
        try:
            reduced = value.__reduce_ex__(4)
        except Exception as error:  # whatever an object says that cannot be kept
            raise UnknownStateError(
                f"it holds a {kind.__module__}.{kind.__qualname__}, whose state is hidden"
            ) from error
        if isinstance(reduced, str):
            wrapped = self._of(getattr(value, "__wrapped__", None))  # of a function with functools.cache
            return ["named", kind.__module__, reduced, _version_of(kind.__module__), wrapped]
        make, arguments, state, *items = (*reduced, None, None, None)[:5]
        listed = [None if entries is None else list(entries) for entries in items]
        return ["object", self._of(kind), self._of(make), self._of(arguments), self._of(state), self._of(listed)]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _global_names(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for entry in code.co_consts:
        if isinstance(entry, CodeType):
            yield from _global_names(entry)


def _plain_member(member: Any) -> Any:
    """The functions of what a class holds in place of a function."""
    if isinstance(member, staticmethod | classmethod):
        return ["wrapped", type(member).__name__, member.__func__]
    if isinstance(member, property):
        return ["property", member.fget, member.fset, member.fdel]
    return member


def _is_library(module: str | None) -> bool:
    """Whether a module comes with Python, a package, or this library, so that its version stands for its code."""
    if module is None or module == "__main__":
        return False
    top = module.partition(".")[0]
    if top in ("tropism", "builtins"):
        return True
    if module not in sys.modules:  # made by hand, or gone: not to be looked up
        return False
    file = getattr(sys.modules[module], "__file__", None)
    return file is None or str(Path(file)).startswith(_LIBRARIES)


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _version_of(module: str) -> str:
    """The versions of the packages that a module comes from."""
    top = module.partition(".")[0]
    return __version__ if top == "tropism" else " ".join(_version(name) for name in _owners().get(top, ()))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
