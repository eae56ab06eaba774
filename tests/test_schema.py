from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tropism.errors import ConfigError, TropismError
from tropism.schema import apply_overrides, build, dump_yaml, field_docs, read_yaml, to_plain


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    rank: int = 16
    """Size of the update."""
    alpha: float = 32.0
    """Scale of it,
    over two lines."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")


@dataclass(frozen=True, kw_only=True)
class Source:
    path: str
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    model: str
    """Which model."""
    data: str | Source | list[str]
    adapter: Adapter | None = None
    scale: Literal["group", "batch", "none"] = "group"
    level: Literal[1, 2] = 1
    stop: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    sizes: list[int] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    names: Sequence[str] = ()
    function: Callable[..., float] | None = None
    either: str | Callable[..., Any] = "x"
    anything: Any = None
    flag: bool = False
    colour: Colour = Colour.RED
    folder: Path = Path("runs")
    number: float | None = None
    count: int | float = 0


@dataclass(frozen=True, kw_only=True)
class Longer(Adapter):
    extra: int
    """One more."""


GOOD = {"model": "m", "data": "d"}


def made(**changes: Any) -> Recipe:
    return build(Recipe, {**GOOD, **changes})


# ---- build ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given_value", "expected"),
    [
        ("data", {"path": "p", "limit": 3}, Source(path="p", limit=3)),
        ("data", Source(path="p"), Source(path="p")),
        ("data", ["a"], ["a"]),
        ("adapter", {"rank": 8, "alpha": "1e-5"}, Adapter(rank=8, alpha=1e-5)),
        ("adapter", {}, Adapter()),
        ("adapter", None, None),
        ("scale", "batch", "batch"),
        ("scale", None, "none"),
        ("level", 2, 2),
        ("stop", ["a", "b"], ("a", "b")),
        ("betas", [1, "0.5"], (1.0, 0.5)),
        ("sizes", (1, 2), [1, 2]),
        ("rewards", {"a": 1}, {"a": 1.0}),
        ("adapters", {"a": {"rank": 2}}, {"a": Adapter(rank=2)}),
        ("names", ["a"], ("a",)),
        ("function", len, len),
        ("either", len, len),
        ("anything", {"x": [1]}, {"x": [1]}),
        ("colour", "blue", Colour.BLUE),
        ("folder", "a/b", Path("a/b")),
        ("number", "-2.5E+3", -2500.0),
        ("number", 3, 3.0),
        ("count", 3, 3),
        ("count", 0.5, 0.5),
        ("count", "0.5", 0.5),
    ],
)
def test_values_become_the_annotated_types(key, given_value, expected):
    value = getattr(made(**{key: given_value}), key)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, r"modle: unknown key; did you mean 'model'\? \(valid: model, data, adapter"),
        ({"adapter": {"rnak": 3}}, r"adapter\.rnak: unknown key; did you mean 'rank'\? \(valid: rank, alpha\)"),
        ({"adapters": {"one": {"rank": "x"}}}, r"adapters\.one\.rank: expected a whole number, got the text 'x'"),
        ({"data": {"limit": 3}}, r"data\.path: required by Source but not given"),
        ({"adapter": {"rank": 0}}, r"adapter: rank must be at least 1, got 0"),
        ({"adapter": {"rank": True}}, r"adapter\.rank: expected a whole number, got the truth value True"),
        ({"adapter": {"rank": 2.0}}, r"adapter\.rank: expected a whole number, got the number 2\.0"),
        ({"adapter": {"rank": "8"}}, r"adapter\.rank: expected a whole number, got the text '8'"),
        ({"adapter": 8}, r"adapter: expected a mapping of Adapter settings, got the whole number 8"),
        ({"model": 7}, r"model: expected text, got the whole number 7; put it in quotes"),
        ({"model": None}, r"model: expected text, got null"),
        ({"data": 7}, r"data: expected text or a mapping of Source settings or a list, got the whole number 7"),
        ({"data": ["a", 3]}, r"data\[1\]: expected text, got the whole number 3"),
        (
            {"scale": "grop"},
            r"scale: expected one of 'group', 'batch', 'none', got the text 'grop'; did you mean 'group'",
        ),
        ({"level": True}, r"level: expected one of 1, 2, got the truth value True"),
        ({"stop": "abc"}, r"stop: expected a list, got the text 'abc'; write \[a, b\]"),
        ({"stop": [1]}, r"stop\[0\]: expected text"),
        ({"betas": [1]}, r"betas: expected 2 values, got 1"),
        ({"rewards": {"a": "x"}}, r"rewards\.a: expected a number, got the text 'x'"),
        ({"rewards": ["a"]}, r"rewards: expected a mapping, got the list"),
        ({"function": "os.system"}, r"function: expected a function, got the text 'os\.system'"),
        ({"flag": "yes"}, r"flag: expected true or false, got the text 'yes'"),
        ({"flag": 1}, r"flag: expected true or false, got the whole number 1"),
        ({"colour": "green"}, r"colour: expected one of red, blue, got the text 'green'"),
        ({"number": True}, r"number: expected a number, got the truth value True"),
        ({"number": math.nan}, r"number: NaN is not a setting"),
        ({"number": -math.inf}, r"number: infinity is not a setting; give a number, or null"),
        ({"adapter": {"rank": 10**30}}, r"adapter\.rank: the whole number 10{30} is too large; settings stay below"),
        ({"sizes": [1, -(2**63)]}, r"sizes\[1\]: the whole number -9223372036854775808 is too large"),
        ({"adapter": {"r" * 9000: 1}}, r"adapter\.r{60}: unknown key"),
        ({"adapters": {10**5000: {}}}, r"adapters: expected text, got the whole number with more than 77 digits"),
        ({"model": [10**5000]}, r"model: expected text, got the list that is too large to show"),
        ({"number": "nan"}, r"number: expected a number, got the text 'nan'"),
        ({"number": "1e999"}, r"number: '1e999' is too large"),
        ({"number": 10**5000}, r"number: a whole number with more than 77 digits is too large"),
        ({"model": 10**5000}, r"model: expected text, got the whole number with more than 77 digits"),
        ({3: 4}, r"3: unknown key"),
    ],
)
def test_wrong_values_name_the_dotted_path_and_the_mend(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(Recipe, {**GOOD, **changes})


def test_all_missing_keys_are_named_at_once_below_their_path():
    with pytest.raises(ConfigError, match=r"^job\.model, job\.data: required by Recipe but not given"):
        build(Recipe, {}, path="job")
    with pytest.raises(ConfigError, match=r"expected a mapping of Recipe settings, got the list"):
        build(Recipe, [1])  # type: ignore[arg-type]


# ---- YAML ----------------------------------------------------------------------------------------------------------


def read(tmp_path: Path, text: str | bytes) -> dict[str, Any]:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(path)


def test_yaml_scalars_are_those_of_yaml_1_2(tmp_path):
    text = """\ufeff# a comment
    floats: [1e-5, 1.5, .5, -1.0E+3, 7.]
    ints: [64, -1, +2, 010]
    nothing: [null, ~, ]
    truth: [true, False]
    text: [yes, on, NO, 1:30, 2020-01-01, 1_000, 0x1f, "1e-5", 'true', none, a b, =]
    nested: {a: {b: [c]}}
    long: |
      two
      lines
    """
    assert read(tmp_path, text) == {
        "floats": [1e-5, 1.5, 0.5, -1000.0, 7.0],
        "ints": [64, -1, 2, 10],
        "nothing": [None, None],
        "truth": [True, False],
        "text": ["yes", "on", "NO", "1:30", "2020-01-01", "1_000", "0x1f", "1e-5", "true", "none", "a b", "="],
        "nested": {"a": {"b": ["c"]}},
        "long": "two\nlines\n",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"recipe\.yaml:3: duplicate key 'a'; keep one of the two"),
        ("x:\n  a: 1\n  a: 2\n", r"recipe\.yaml:3: duplicate key 'a'"),
        ("a: [1, 2\nb: 3\n", r"recipe\.yaml:2: "),
        ("a: 1\n b: 2\n", r"recipe\.yaml:2: mapping values are not allowed here"),
        ("a: 1\nb: .nan\n", r"recipe\.yaml:2: '\.nan' is not a finite number"),
        ("a: -.inf\n", r"recipe\.yaml:1: '-\.inf' is not a finite number"),
        ("a: 1e999\n", r"recipe\.yaml:1: '1e999' is not a finite number"),
        ("a: " + "9" * 5000, r"recipe\.yaml:1: a whole number with thousands of digits"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", r"recipe\.yaml:2: the tag '.*os\.system' is not supported"),
        ("a: !x 3\n", r"recipe\.yaml:1: the tag '!x' is not supported"),
        ("a: &x [1]\nb: *x\n", r"recipe\.yaml:2: aliases \(\*name\) are not supported; write the value out"),
        ("1: a\n", r"recipe\.yaml:1: the key 1 is not text; put it in quotes"),
        (".nan: a\n", r"recipe\.yaml:1: '\.nan' is not a finite number"),
        ("? [a]\n: b\n", r"recipe\.yaml:1: the key \['a'\] is not text"),
        ("- a\n", r"recipe\.yaml: expected a mapping of settings \(key: value\), not list"),
        ("", r"recipe\.yaml: expected a mapping of settings \(key: value\), not NoneType"),
        ("a: 1\n---\nb: 2\n", r"recipe\.yaml:2: "),
        ("a: 1\nb: \x01\n", r"recipe\.yaml:2: the character 1 is not allowed"),
        (b"a: \xff\n", r"recipe\.yaml: not UTF-8 text \(byte 3\)"),
        ("a: 1\nb: " + "[" * 100_000, r"recipe\.yaml:2: nested more than 64 levels deep"),
        ("- " * 5000, r"recipe\.yaml:1: nested more than 64 levels deep"),
        ("a: " + "x" * 2_000_000, r"recipe\.yaml: 2,000,003 bytes, and a recipe has at most 2,000,000"),
        ("a: " + "x" * 2_000_000, r"is it a data file\? Name that in data\.path"),
        ("k: " + "1" * 5000, r"recipe\.yaml:1: a whole number with thousands of digits; put text in quotes"),
        ("? " + "k" * 5000 + "\n: 1\n? " + "k" * 5000 + "\n: 2\n", r"recipe\.yaml:3: duplicate key 'k{59}; keep one"),
        ("a: 1".encode("utf-16"), r"recipe\.yaml: not UTF-8 text \(byte 0\); it is UTF-16; save it as UTF-8"),
    ],
)
def test_refused_yaml_names_file_and_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_missing_yaml_file_names_the_closest(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"recpe\.yaml: cannot be read \(No such file.*did you mean '.*recipe\.yaml'"):
        read_yaml(tmp_path / "recpe.yaml")
    for path in (tmp_path, "a\0b", tmp_path / "no" / "such"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_yaml(path)


# ---- command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--a", "64"], {"a": 64}),
        (["--a=8", "--a", "9"], {"a": 9}),
        (["--s.t.u", "1e-5"], {"s": {"t": {"u": 1e-5}}}),
        (["--a", "-1"], {"a": -1}),
        (["--a", "none", "--b=null", "--c", "None"], {"a": None, "b": None, "c": None}),
        (["--a=", "--b", "yes", "--c", "true"], {"a": "", "b": "yes", "c": True}),
        (["--a", "[x, 1]", "--b", "{c: 2}"], {"a": ["x", 1], "b": {"c": 2}}),
        (["--a", "Question: {q}", "--b", "x=y", "--c=x=y", "--d", "# no"], {
            "a": "Question: {q}", "b": "x=y", "c": "x=y", "d": "# no"}),
        (["--a", '"{q}"', "--b", "'64'"], {"a": "{q}", "b": "64"}),
        (["--a=--b"], {"a": "--b"}),
    ],
)  # fmt: skip
def test_pairs_are_merged(arguments, expected):
    assert apply_overrides({}, arguments) == expected


def test_merging_goes_into_mappings_and_replaces_text_and_null():
    base = {"lora": {"rank": 8, "alpha": 1}, "data": "p.txt", "eval": None}
    merged = apply_overrides(base, ["--lora.rank", "4", "--data.path", "q.txt", "--eval.every", "3"])
    assert merged == {"lora": {"rank": 4, "alpha": 1}, "data": {"path": "q.txt"}, "eval": {"every": 3}}
    assert base == {"lora": {"rank": 8, "alpha": 1}, "data": "p.txt", "eval": None}
    assert apply_overrides(base, ["--lora", "none"])["lora"] is None
    assert apply_overrides(base, ["--lora", "none", "--lora.rank=2"])["lora"] == {"rank": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], r"'a': expected --dotted\.key VALUE"),
        (["--"], r"'--': expected"),
        (["-a", "1"], r"'-a': expected"),
        (["--a"], r"--a: needs a value \(--a VALUE or --a=VALUE\)"),
        (["--a", "--b", "1"], r"--a: needs a value"),
        (["--a..b", "1"], r"--a\.\.b: a dotted key has a name between its dots"),
        (["--=1"], r"--: a dotted key has a name"),
        (["--a.", "1"], r"--a\.: a dotted key"),
        (["--n.x", "1"], r"--n\.x: n is the whole number 3, not a mapping"),
        (["--l.x", "1"], r"--l\.x: l is the list \[1\], not a mapping"),
        (["--a", "[1"], r"--a:1: .* put it in a second pair of quotes"),
        (["--a", "{x} and"], r"put it in a second pair of quotes"),
        (["--a", "!!python/name:os.system"], None),
    ],
)
def test_malformed_arguments(arguments, message):
    base = {"n": 3, "l": [1]}
    if message is None:  # no YAML outside of quotes and brackets, so a tag is text
        assert apply_overrides({}, arguments) == {"a": arguments[1]}
        return
    with pytest.raises(ConfigError, match=message):
        apply_overrides(base, arguments)


PIECES = [
    "--a",
    "--a.b",
    "--c=1",
    "[",
    "{",
    '"',
    "none",
    "a: b",
    "*x",
    "&x",
    "!!t",
    "-",
    "1e9",
    "\0",
    "\ud800",
    ".",
    "=",
]
FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(
    arguments=st.lists(st.text(max_size=10) | st.lists(st.sampled_from(PIECES), max_size=3).map("".join), max_size=4)
)
def test_any_arguments_are_merged_or_refused_plainly(arguments):
    with suppress(TropismError):
        assert isinstance(apply_overrides({"a": "x"}, arguments), dict)


@FUZZ
@given(
    data=st.binary(max_size=60) | st.lists(st.sampled_from([*PIECES, "\n", "  ", ": ", "- "]), max_size=12).map("".join)
)
def test_any_yaml_is_read_or_refused_plainly(tmp_path, data):
    with suppress(TropismError):
        assert isinstance(read(tmp_path, data if isinstance(data, bytes) else data.encode(errors="replace")), dict)


# ---- writing -------------------------------------------------------------------------------------------------------


def test_to_plain():
    recipe = made(
        adapter={"rank": 2}, stop=["x"], function=len, either=made, colour="blue", anything=[{1: {3, 2}}, Adapter]
    )
    plain = to_plain(recipe)
    assert plain["adapter"] == {"rank": 2, "alpha": 32.0}
    assert plain["stop"] == ["x"] and plain["betas"] == [0.9, 0.95]
    assert plain["function"] == "builtins:len" and plain["either"] == f"{__name__}:made"
    assert plain["colour"] == "blue" and plain["folder"] == "runs"
    assert plain["anything"] == [{"1": [2, 3]}, f"{__name__}:Adapter"]
    assert to_plain(object()) == "builtins:object"


def test_a_recipe_survives_writing_and_reading(tmp_path):
    recipe = made(adapter={"alpha": 1e-5}, stop=["1e-5", "yes", "null", "", "\n", "é🎬", "#"], rewards={"010": 1})
    assert build(Recipe, read(tmp_path, dump_yaml(recipe))) == recipe


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=6), value, max_size=3),
    max_leaves=6,
)


@FUZZ
@example(mapping={"a": "\x85", "\u2028": "\r\ufeff"})
@given(mapping=st.dictionaries(st.text(max_size=6), PLAIN, max_size=3))
def test_plain_data_survives_writing_and_reading(tmp_path, mapping):
    assert read(tmp_path, dump_yaml(mapping)) == mapping


def test_equal_lists_are_written_out_twice(tmp_path):
    shared = [1, 2]
    assert read(tmp_path, dump_yaml({"a": shared, "b": shared})) == {"a": [1, 2], "b": [1, 2]}


def test_field_docs_come_from_the_literals_under_the_fields():
    assert field_docs(Adapter) == {"rank": "Size of the update.", "alpha": "Scale of it,\nover two lines."}
    assert field_docs(Longer)["extra"] == "One more." and field_docs(Longer)["rank"] == "Size of the update."
    assert field_docs(Recipe) == {"model": "Which model."}
