"""Safe YAML in the dialect of the recipes: plain values only, each surprise of YAML 1.1 left out.

``1e-5`` is a number; ``yes``, ``on``, ``1:30`` and dates are text, as in YAML 1.2. Duplicate keys, tags, aliases, NaN
and infinity are refused, with the file and line.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, ClassVar

import yaml  # type: ignore[import-untyped,unused-ignore]

from tropism.errors import ConfigError

FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
"""Text that is a finite decimal number."""

MAX_BYTES = 2_000_000
"""Largest YAML file that is read; a recipe has a few thousand bytes."""
MAX_DEPTH = 64
"""Deepest nesting of lists and mappings."""

_INT = re.compile(r"[-+]?[0-9]+")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """Safe YAML with the scalars of YAML 1.2: ``1e-5`` is a number; ``yes``, ``on``, ``1:30`` and dates are text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc,unused-ignore]
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call,unused-ignore]
            raise _marked("aliases (*name) are not supported; write the value out", mark)
        if self.depth == MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call,unused-ignore]
            raise _marked(f"nested more than {MAX_DEPTH} levels deep", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:  # type: ignore[override,unused-ignore]
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _marked(f"the key {key!r:.60} is not text; put it in quotes", key_node.start_mark)
            if key in mapping:
                raise _marked(f"duplicate key {key!r:.60}; keep one of the two", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping

    def construct_yaml_map(self, node: Any) -> dict[str, Any]:  # type: ignore[override,unused-ignore]
        return self.construct_mapping(node)

    def construct_integer(self, node: Any) -> int:
        try:
            return int(self.construct_scalar(node))
        except ValueError as error:  # Python's limit on digits
            raise _marked("a whole number with thousands of digits; put text in quotes", node.start_mark) from error

    def construct_number(self, node: Any) -> float:
        number = float("nan") if _NOT_FINITE.fullmatch(node.value) else float(node.value)
        if not math.isfinite(number):
            raise _marked(f"{node.value[:60]!r} is not a finite number", node.start_mark)
        return number

    def refuse_tag(self, node: Any) -> Any:
        raise _marked(f"the tag {node.tag!r:.60} is not supported; write plain values", node.start_mark)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc,unused-ignore]
    """Writes what ``_Loader`` reads: the same scalars need quotes, and nothing is abbreviated by aliases."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc,unused-ignore]

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> Any:
        # Line breaks other than the newline survive between double quotes only, where they are escaped.
        style = '"' if re.search("[\r\x85\u2028\u2029\ufeff]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


def _marked(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_SCALARS: tuple[tuple[str, str, list[str]], ...] = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", _INT.pattern, list("-+0123456789")),
    ("float", rf"{FLOAT.pattern}|{_NOT_FINITE.pattern}", list("-+.0123456789")),
)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.yaml_constructors = {
    "tag:yaml.org,2002:null": yaml.SafeLoader.construct_yaml_null,
    "tag:yaml.org,2002:bool": yaml.SafeLoader.construct_yaml_bool,
    "tag:yaml.org,2002:int": _Loader.construct_integer,
    "tag:yaml.org,2002:float": _Loader.construct_number,
    "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
    "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_sequence,
    "tag:yaml.org,2002:map": _Loader.construct_yaml_map,
    None: _Loader.refuse_tag,
}
_Dumper.add_representer(str, _Dumper.represent_text)


def is_plain_scalar(text: str) -> bool:
    """Whether unquoted ``text`` would be read as null, a truth value or a number."""
    return any(re.fullmatch(pattern, text) for _, pattern, _ in _SCALARS)


def parse_yaml(text: str, source: str) -> Any:
    """The value that ``text`` stands for; ``source`` names it in the ``ConfigError`` of malformed text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}:{line_number}: the character {error.character!r} is not allowed") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{source}: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, read safely.

    Raises:
        ConfigError: no such file, no regular or a huge one, malformed YAML, a root that is no mapping, duplicate or
            non-text keys, tags, aliases, NaN or infinity; names the file and, where there is one, the line.
    """
    path = Path(path)
    try:
        data = _read_bytes(path)
        text = data.decode("utf-8-sig")
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        mend = "save it as UTF-8"
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            mend = "it is UTF-16; save it as UTF-8"
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); {mend}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot be read ({reason}){_nearest_name(path)}") from error
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping of settings (key: value), not {type(value).__name__}")
    return value


def _read_bytes(path: Path) -> bytes:
    """The bytes of a regular file: a device has no end, and a pipe may never have one."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{path}: a device or pipe, not a regular file; save the recipe to a file first")
    if status.st_size > MAX_BYTES:
        raise ConfigError(
            f"{path}: {status.st_size:,} bytes, and a recipe has at most {MAX_BYTES:,}; is it a data file? Name that in"
            " data.path"
        )
    return path.read_bytes()


def _nearest_name(path: Path) -> str:
    try:
        close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    except (OSError, ValueError):
        return ""
    return f"; did you mean {str(path.parent / close[0])!r}?" if close else ""


def write_yaml(value: Any) -> str:
    """YAML text of plain data, which ``parse_yaml`` reads back equal."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text
