"""From plain mappings (YAML, JSON, the command line) to frozen dataclasses and back, strictly.

Nothing here guesses: an unknown key, a missing key or a value of the wrong type is a ``ConfigError`` that names the
dotted path and the mend. Nothing here runs code from a file either: YAML tags and aliases are refused.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import math
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tropism.errors import ConfigError
from tropism.safe_yaml import FLOAT, MAX_DEPTH, is_plain_scalar, parse_yaml, read_yaml, write_yaml

__all__ = ["apply_overrides", "build", "dump_yaml", "field_docs", "read_yaml", "refuse_absurd", "to_plain"]

T = TypeVar("T")

MOST = 2**63
"""Whole numbers of this size and beyond are no settings: nothing that counts or is stored in 64 bits reaches it."""
MOST_DOTS = 20
"""Levels of a dotted key."""
NO_SHORTHANDS: Mapping[str, str] = types.MappingProxyType({})


# ---- building dataclasses ------------------------------------------------------------------------------------------


def build(cls: type[T], mapping: Mapping[str, Any], *, path: str = "") -> T:
    """An instance of a dataclass from a plain mapping.

    Args:
        cls: the dataclass; nested dataclasses, ``Optional``, unions, ``Literal``, lists, tuples and dicts are followed.
        mapping: field name -> plain value (or an instance that is already built).
        path: dotted place of ``mapping`` in the whole, for messages.

    Raises:
        ConfigError: an unknown key, missing key, value of the wrong type, NaN, or a check of ``__post_init__`` failed.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{_place(path)}: expected a mapping of {cls.__name__} settings, got {_show(mapping)}")
    known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    refuse = getattr(cls, "refuse", None)
    if refuse is not None:  # of names from other libraries the class says why they are none of its own
        refuse(mapping)
    for key in mapping:
        if key not in known:
            raise ConfigError(_unknown_key(key, known, path))
    missing = [name for name, f in known.items() if name not in mapping and _required(f)]
    if missing:
        names = ", ".join(_join(path, name) for name in missing)
        raise ConfigError(f"{names}: required by {cls.__name__} but not given")
    hints = get_type_hints(cls)
    values = {name: _convert(value, hints[name], _join(path, name)) for name, value in mapping.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{_place(path)}: {error}") from error


def _required(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _unknown_key(key: object, known: Mapping[str, Any], path: str) -> str:
    name = key[:60] if isinstance(key, str) else _head(key)
    return f"{_join(path, name)}: unknown key{_closest(name, known)} (valid: {', '.join(known) or 'none'})"


def _closest(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _place(path: str) -> str:
    return path or "the settings"


def _show(value: Any) -> str:
    names = {bool: "truth value", str: "text", int: "whole number", float: "number"}
    kind = "a mapping" if isinstance(value, Mapping) else f"the {names.get(type(value), type(value).__name__)}"
    text = "" if isinstance(value, Mapping) or value is None else f" {_head(value)}"
    return f"{'null' if value is None else kind}{text}"


def _head(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 256:  # repr of a huge int is slow and may be refused by Python
        return "with more than 77 digits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits inside, or hopeless nesting
        return "that is too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _convert(value: Any, hint: Any, path: str) -> Any:
    """``value`` as the annotated type, or a ``ConfigError`` that says what was expected."""
    origin = get_origin(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(hint), path)
    if origin is Literal:
        return _convert_literal(value, get_args(hint), path)
    if hint is Callable or origin is Callable:
        if callable(value):
            return value
        raise ConfigError(f"{path}: expected a function, got {_show(value)}")
    if origin in (list, tuple, Sequence, dict, Mapping) or hint in (list, tuple, dict):
        return _convert_container(value, hint, path)
    if isinstance(hint, type):
        return _convert_scalar(value, hint, path)
    raise ConfigError(f"{path}: settings of type {hint!r} cannot be given in a file; give them in Python")


def _convert_union(value: Any, members: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in members:
        return None
    members = tuple(member for member in members if member is not type(None))
    exact = [member for member in members if type(value) is (get_origin(member) or member)]
    if isinstance(value, Mapping):
        exact += [member for member in members if is_dataclass(member)]
    for member in exact:
        if len(exact) == 1:  # its own message is the helpful one
            return _convert(value, member, path)
    errors: list[ConfigError] = []
    for member in (*exact, *(member for member in members if member not in exact)):
        try:
            return _convert(value, member, path)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    names = " or ".join(_type_name(member) for member in members)
    raise ConfigError(f"{path}: expected {names}, got {_show(value)}")


def _convert_literal(value: Any, choices: tuple[Any, ...], path: str) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    if value is None and "none" in choices:  # `--key none` on the command line reads as null
        return "none"
    hint = _closest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
    raise ConfigError(f"{path}: expected one of {', '.join(map(repr, choices))}, got {_show(value)}{hint}")


def _convert_container(value: Any, hint: Any, path: str) -> Any:
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {_show(value)}")
        key_hint, item_hint = arguments or (Any, Any)
        keys = [_convert(key, key_hint, path) for key in value]
        places = [_join(path, key[:60] if isinstance(key, str) else _head(key)) for key in keys]
        items = [_convert(item, item_hint, place) for item, place in zip(value.values(), places, strict=True)]
        return dict(zip(keys, items, strict=True))
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise ConfigError(f"{path}: expected a list, got {_show(value)}; write [a, b]")
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ConfigError(f"{path}: expected {len(arguments)} values, got {len(value)}")
        return tuple(_convert(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, arguments, strict=True)))
    item_hint = arguments[0] if arguments else Any
    converted = [_convert(item, item_hint, f"{path}[{index}]") for index, item in enumerate(value)]
    return converted if origin is list else tuple(converted)


def _convert_scalar(value: Any, hint: type[Any], path: str) -> Any:
    if is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path=path)
    if hint is float:
        return _convert_float(value, path)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is int):
        if hint is int:
            _refuse_huge(value, path)
        return value
    if issubclass(hint, Enum):
        for member in hint:
            if value in (member.value, member.name):
                return member
        raise ConfigError(f"{path}: expected one of {', '.join(str(m.value) for m in hint)}, got {_show(value)}")
    if issubclass(hint, Path) and isinstance(value, str):
        return hint(value)
    mend = "; put it in quotes" if hint is str and isinstance(value, int | float | Mapping | list) else ""
    raise ConfigError(f"{path}: expected {_type_name(hint)}, got {_show(value)}{mend}")


def _convert_float(value: Any, path: str) -> float:
    number = value
    if isinstance(value, str) and FLOAT.fullmatch(value):
        number = float(value)
        if math.isinf(number):
            raise ConfigError(f"{path}: {_head(value)} is too large for a number")
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ConfigError(f"{path}: expected a number, got {_show(value)}")
    try:
        number = float(number)
    except OverflowError as error:
        raise ConfigError(f"{path}: a whole number {_head(number)} is too large") from error
    if math.isnan(number):
        raise ConfigError(f"{path}: NaN is not a setting; give a number")
    if math.isinf(number):
        raise ConfigError(f"{path}: infinity is not a setting; give a number, or null where null switches it off")
    return number


def _type_name(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    if is_dataclass(hint) and isinstance(hint, type):
        return f"a mapping of {hint.__name__} settings"
    origin = get_origin(hint) or hint
    if origin is Literal:
        return " or ".join(map(repr, get_args(hint)))
    containers = {dict: "a mapping", Mapping: "a mapping", list: "a list", tuple: "a list", Sequence: "a list"}
    return containers.get(origin, "a function" if origin is Callable else getattr(origin, "__name__", str(origin)))


def refuse_absurd(value: Any, path: str = "", depth: int = 0) -> None:
    """Refuse what no setting can be and no file can hold, anywhere in plain data; objects of a program pass.

    Raises:
        ConfigError: NaN, infinity, a whole number of 2**63 or more, nesting of more than ``MAX_DEPTH`` levels; names
            the dotted path.
    """
    if isinstance(value, float):
        _convert_float(value, path)
    elif isinstance(value, int):
        _refuse_huge(value, path)
    elif isinstance(value, Mapping | list | tuple):
        if depth == MAX_DEPTH:
            raise ConfigError(f"{path:.60}...: nested more than {MAX_DEPTH} levels deep")
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            refuse_absurd(key, path, depth + 1)
            name = key[:60] if isinstance(key, str) else _head(key)
            refuse_absurd(item, _join(path, name) if isinstance(value, Mapping) else f"{path}[{name}]", depth + 1)


def _refuse_huge(number: int, path: str) -> None:
    if abs(number) >= MOST:
        raise ConfigError(f"{path}: the whole number {_head(number)} is too large; settings stay below 2**63")


# ---- the command line ----------------------------------------------------------------------------------------------


def apply_overrides(
    mapping: Mapping[str, Any], arguments: Sequence[str], *, shorthands: Mapping[str, str] = NO_SHORTHANDS
) -> dict[str, Any]:
    """``mapping`` with ``--dotted.key value`` and ``--dotted.key=value`` pairs merged in; the last one wins.

    A value in quotes, brackets or braces is YAML; ``none`` and ``null`` mean null; true, false and numbers are
    what they look like; all else is text as it stands. A dotted key below text or null puts a mapping in its place.

    Args:
        shorthands: of sections that may be one text, the field that the text is for; a dotted key below keeps it there.

    Raises:
        ConfigError: an argument that is not of this form, or a dotted key below a list or number.
    """
    merged: dict[str, Any] = _copy_mappings(mapping)
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if not argument.startswith("--") or len(argument) == 2:
            raise ConfigError(f"{argument!r}: expected --dotted.key VALUE")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            position += 1
            if position == len(arguments) or arguments[position].startswith("--"):
                raise ConfigError(f"--{key}: needs a value (--{key} VALUE or --{key}=VALUE)")
            text = arguments[position]
        position += 1
        _set(merged, key, _parse_value(text, f"--{key}"), shorthands)
    return merged


def _copy_mappings(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy_mappings(item) for key, item in value.items()}
    return value


def _parse_value(text: str, source: str) -> Any:
    if text.strip() in ("none", "None", "null", "~"):
        return None
    if text.strip()[:1] in ("[", "{", '"', "'"):
        try:
            return parse_yaml(text, source)
        except ConfigError as error:
            raise ConfigError(
                f"{error}. If {_head(text)} is meant as text, put it in a second pair of quotes"
            ) from error
    if text and is_plain_scalar(text):
        return parse_yaml(text, source)
    return text


def _set(mapping: dict[str, Any], dotted: str, value: Any, shorthands: Mapping[str, str]) -> None:
    *parents, last = dotted.split(".")
    if not all(parents) or not last:
        raise ConfigError(f"--{dotted:.60}: a dotted key has a name between its dots")
    if len(parents) > MOST_DOTS:
        raise ConfigError(f"--{dotted:.60}...: more than {MOST_DOTS} dots; no setting lies so deep")
    for depth, name in enumerate(parents):
        below = mapping.get(name)
        if below is None or isinstance(below, str):
            kept = {shorthands[name]: below} if depth == 0 and below is not None and name in shorthands else {}
            below = mapping[name] = kept
        elif not isinstance(below, dict):
            raise ConfigError(f"--{dotted}: {'.'.join(parents[: depth + 1])} is {_show(below)}, not a mapping")
        mapping = below
    mapping[last] = value


# ---- writing -------------------------------------------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """Plain data (mappings, lists, text, numbers) for YAML or JSON from an instance of a dataclass.

    Enums give their value, paths their text, functions ``module:qualname``; any other object is described by
    ``module:qualname`` of its class, as a record of what was passed in Python.
    """
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return to_plain(value.value)
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((to_plain(item) for item in value), key=repr)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def dump_yaml(value: Any) -> str:
    """The YAML text of a dataclass instance or plain mapping, which ``read_yaml`` reads back."""
    try:
        return write_yaml(to_plain(value))
    except RecursionError as error:
        raise ConfigError("the settings are nested too deeply to be written as YAML") from error


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Field name -> the docstring literal under the field, inherited fields included."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for statement, following in itertools.pairwise(statements):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = inspect.cleandoc(doc)
    return docs
