"""Whatever a recipe or a command line says: a Recipe, or a TropismError with a readable message."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz.test_readers import damage
from fuzz_budget import HUGE, enlarged, examples, within
from tropism.commands.recipe_arguments import take_apart, with_overrides
from tropism.config import Recipe
from tropism.errors import TropismError
from tropism.safe_yaml import parse_yaml, read_yaml
from tropism.schema import apply_overrides

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {path.name: path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))}
RECIPES = {name: Recipe.from_file(ROOT / "recipes" / name) for name in TEXTS}
RESOLVED: dict[str, dict[str, Any]] = {
    name: json.loads(json.dumps(parse_yaml(recipe.to_yaml(), name))) for name, recipe in RECIPES.items()
}
"""Every field of every recipe, defaults included."""

SECONDS = 20.0


def places(value: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every field, those of sections among them."""
    entries = value.items() if isinstance(value, dict) else ()
    below = [inside for key, entry in entries for inside in places(entry, (*place, key))]
    return [place, *below] if place else below


PLACES = sorted({place for mapping in RESOLVED.values() for place in places(mapping)})

NUMBERS = st.sampled_from(
    [10**30, -(10**30), 2**63, 10**400, HUGE, -1, 0, 1, math.nan, math.inf, -math.inf, 1e308, 5e-324]
)
WORDS = st.sampled_from(
    ["", "\ud800", "\0", "a" * 5000, "none", "~", "../..", "[", "{x}", "1e999", "grpo", "\x1b[2J", "/dev/zero"]
)
KEYS = (
    st.text(max_size=4)
    | WORDS
    | st.sampled_from(["name", "use", "terms", "weight", "path", "args", "preset", "rank", "every"])
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.floats() | WORDS | st.text(max_size=6),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(KEYS, value, max_size=3),
    max_leaves=6,
)
"""What YAML and JSON can say, and numbers that they cannot."""
OBJECTS = PLAIN | st.sampled_from(
    [b"x", {1, 2}, object(), len, {3: 4}, {None: 1}, {HUGE: 1}, 1j, Path("a"), (1, 2), range(3)]
)
"""What a program can pass beside that."""


def check_message(error: TropismError) -> None:
    assert str(error).strip()


def is_recipe_or_refused(make: Callable[[], Recipe]) -> Recipe | None:
    try:
        with within(SECONDS):
            recipe = make()
    except TropismError as error:
        check_message(error)
        return None
    assert isinstance(recipe, Recipe)
    return recipe


def is_written(recipe: Recipe | None) -> None:
    """A recipe can be written down, by whatever it was made from."""
    if recipe is None:
        return
    try:
        with within(SECONDS):
            recipe.to_yaml().encode("utf-8", "surrogatepass")
    except TropismError as error:
        check_message(error)


def put(mapping: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of the mapping with another value at the place."""
    copy = dict(mapping)
    head, *rest = place
    below = copy.get(head)
    copy[head] = put(below if isinstance(below, dict) else {}, tuple(rest), value) if rest else value
    return copy


def changed(data: st.DataObject, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    mapping = RESOLVED[data.draw(st.sampled_from(sorted(RESOLVED)))]
    for place in data.draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=2)):
        mapping = put(mapping, place, enlarged(data.draw(values)))
    return mapping


# ---- tests ---------------------------------------------------------------------------------------------------------


@examples(100)
@given(data=st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace")))
@example(data=b"a: " + b"[" * 100_000)
@example(data=b"a: " + b"{a: " * 100_000)
@example(data=b"- " * 100_000)
@example(data=b"? " * 100_000)
@example(data=b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n")
@example(data=b"algorithm: grpo\nreward: vader\nmodel: m\ndata: d\ntotal_steps: " + b"9" * 5000)
def test_arbitrary_text(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    is_recipe_or_refused(lambda: Recipe.from_mapping(read_yaml(path)))


@pytest.mark.parametrize("name", TEXTS)
@examples(20)
@given(harm=damage())
def test_damaged_recipes(name: str, harm: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(harm(TEXTS[name]))
    is_written(is_recipe_or_refused(lambda: Recipe.from_mapping(read_yaml(path))))


@examples(200)
@given(data=st.data())
def test_any_value_in_any_field(data: st.DataObject) -> None:
    mapping = changed(data, OBJECTS)
    is_written(is_recipe_or_refused(lambda: Recipe.from_mapping(mapping)))


@examples(40)
@given(mapping=st.dictionaries(KEYS | st.sampled_from([place[0] for place in PLACES]), OBJECTS, max_size=5))
def test_any_mapping(mapping: dict[str, Any]) -> None:
    is_recipe_or_refused(lambda: Recipe.from_mapping(enlarged(mapping)))


@examples(40)
@given(data=st.data())
def test_what_is_accepted_is_written_and_read_back_equal(data: st.DataObject) -> None:
    recipe = is_recipe_or_refused(lambda: Recipe.from_mapping(changed(data, PLAIN)))
    if recipe is None:
        return
    try:
        text = recipe.to_yaml()
        again = Recipe.from_mapping(parse_yaml(text, "written"))
    except TropismError:
        return  # values that no file can hold: half a surrogate pair, numbers in model and data
    assert again.to_yaml() == text


DEEP: list[Any] = []
for _ in range(100):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("total_steps", 10**30, r"^total_steps: the whole number 10{30} is too large"),
        ("total_steps", -1, r"total_steps must be at least 1"),
        ("seed", -(2**63), r"^seed: the whole number -9223372036854775808 is too large"),
        (
            "prompts_per_step",
            10**12,
            r"prompts_per_step, times the completions of a prompt, is 8,000,000,000,000; at most 10,000",
        ),
        (
            "algorithm.group_size",
            10**9,
            r"prompts_per_step, times the completions of a prompt, is 16,000,000,000; at most",
        ),
        ("algorithm.kl_coef", -1.0, r"^algorithm: kl_coef must not be negative"),
        ("sampling.max_new_tokens", 2**63, r"^sampling\.max_new_tokens: the whole number 9223372036854775808"),
        ("sampling.temperature", math.inf, r"^sampling\.temperature: infinity is not a setting"),
        ("trainer.learning_rate", math.nan, r"^trainer\.learning_rate: NaN is not a setting; give a number"),
        ("trainer.learning_rate", -1e-5, r"^trainer: learning_rate must be positive"),
        ("trainer.learning_rate", -math.inf, r"^trainer\.learning_rate: infinity is not a setting"),
        ("trainer.optimizer.betas", [0.9, 5.0], r"^trainer\.optimizer: betas must be at least 0 and below 1"),
        ("trainer.optimizer.weight_decay", -1, r"^trainer\.optimizer: weight_decay must not be negative"),
        ("trainer.optimizer.eps", 0, r"^trainer\.optimizer: eps must be positive"),
        (
            "trainer.checkpoints.keep",
            10**400,
            r"^trainer\.checkpoints\.keep: the whole number with more than 77 digits",
        ),
        ("reward.clip", HUGE, r"^reward\.clip: the whole number with more than 77 digits is too large"),
        ("reward.terms.correct.weight", math.nan, r"^reward\.terms\.correct\.weight: NaN is not a setting"),
        ("reward.terms.correct.args", {"a": [1, math.inf]}, r"^reward\.terms\.correct\.args\.a\[1\]: infinity"),
        (
            "reward.terms.correct.args",
            {"a": DEEP},
            r"^reward\.terms\.correct\.args\.a.*: nested more than 64 levels deep",
        ),
        ("reward", {HUGE: "vader"}, r"^reward: the whole number with more than 77 digits is too large"),
        ("data.limit", 10**20, r"^data\.limit: the whole number 10{20} is too large"),
        ("lora.rank", -3, r"^lora: .*rank"),
    ],
)
def test_absurd_settings_are_refused_with_their_dotted_path(place: str, value: Any, message: str) -> None:
    mapping = put(RESOLVED["grpo-gsm8k.yaml"], tuple(place.split(".")), enlarged(value))
    with pytest.raises(TropismError, match=message):
        Recipe.from_mapping(mapping)


KEY_WORDS = st.sampled_from([".".join(place) for place in PLACES]) | st.lists(KEYS, max_size=4).map(".".join)
VALUE_WORDS = WORDS | st.text(max_size=10) | NUMBERS.map(lambda n: "9" * 5000 if n == HUGE else str(n))
ARGUMENTS = st.lists(
    st.tuples(KEY_WORDS, VALUE_WORDS, st.booleans()).map(
        lambda t: (f"--{t[0]}={t[1]}",) if t[2] else (f"--{t[0]}", t[1])
    )
    | st.tuples(st.text(max_size=6) | WORDS),
    max_size=4,
).map(lambda groups: [word for group in groups for word in group])


@examples(120)
@given(name=st.sampled_from(sorted(TEXTS)), arguments=ARGUMENTS)
@example(name="sft-imdb.yaml", arguments=["--" + "a." * 100_000 + "b", "1"])
def test_any_override(name: str, arguments: list[str]) -> None:
    mapping = parse_yaml(TEXTS[name].decode(), name)
    is_recipe_or_refused(lambda: Recipe.from_mapping(apply_overrides(mapping, arguments)))

    def from_the_command_line() -> Recipe:
        words = take_apart(arguments, {"--flag": "flag"})
        return Recipe.from_mapping(with_overrides(mapping, words.overrides))

    is_written(is_recipe_or_refused(from_the_command_line))
