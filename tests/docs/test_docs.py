"""The documentation is true: links lead somewhere, code runs, recipes and commands parse, tables hold the defaults."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

import tropism
from hub_stand_ins import save_classifiers
from public_sets import write_dialogues, write_toxicity_prompts
from tiny_models import tiny_model, tiny_tokenizer
from tiny_reward_models import FACTS, tiny_reward_model
from tiny_runs import METHODS, Setting, assemble, execute
from tropism.algorithms import ALGORITHMS
from tropism.commands import COMMANDS
from tropism.comparing.config import compare_config
from tropism.config import Recipe, algorithm_from
from tropism.models.reward_files import save_reward_model
from tropism.rewards import RewardConfig
from tropism.safe_yaml import parse_yaml, read_yaml
from tropism.schema import field_docs

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCE = ROOT / "src" / "tropism"

SMALL_RECIPE = {"model": "demo", "data": "prompts.txt", "algorithm": "grpo"}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language; those marked ``no-run`` are left out."""
    return [body for info, body in FENCE.findall(page.read_text(encoding="utf-8")) if info.split() == [language]]


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# Links ---------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, by the rule of GitHub."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        missing_anchor = bool(anchor) and file.suffix == ".md" and file.is_file() and anchor not in anchors(file)
        if not file.exists() or missing_anchor:
            broken.append(target)
    assert not broken


def test_every_page_can_be_reached_from_the_index() -> None:
    seen, waiting = set(), [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or not page.is_file():
            continue
        seen.add(page)
        targets = (target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8")))
        waiting += [(page.parent / target).resolve() for target in targets if target.endswith(".md")]
    assert {page for page in PAGES if page.parent != ROOT} <= seen


def test_the_pages_hold_no_comments() -> None:
    """What is not for readers does not belong into a page."""
    assert not [name_of(page) for page in PAGES if "<!--" in page.read_text(encoding="utf-8")]


# Code ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A temporary folder in which "demo" is a tiny random model, and runs are a step or two of a few tokens."""
    from tropism import build
    from tropism.models import loading
    from tropism.rewards import registry

    def load_tiny(path: Path, config: Any, dtype: Any) -> tuple[Any, Any]:
        return tiny_model("llama", max_position_embeddings=256), tiny_tokenizer(chat=True)

    whole = build.run_recipe

    def run_small(recipe: Recipe, **options: Any) -> Any:
        truncation = recipe.sampling.truncation
        few = 6 if truncation is None else truncation.after + 2
        sampling = dataclasses.replace(recipe.sampling, max_new_tokens=min(few, recipe.sampling.max_new_tokens))
        trainer = dataclasses.replace(recipe.trainer, progress=False)
        fewer: dict[str, Any] = {
            "total_steps": min(2, recipe.total_steps),
            "prompts_per_step": min(2, recipe.prompts_per_step),
        }
        return whole(dataclasses.replace(recipe, sampling=sampling, trainer=trainer, **fewer), **options)

    monkeypatch.setattr(loading, "demo_model_path", lambda: tmp_path / "demo.gguf")
    monkeypatch.setattr(loading, "_load_gguf", load_tiny)
    monkeypatch.setattr(build, "run_recipe", run_small)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_reward_model("llama")  # that pages suppose to be there
    save_reward_model(model, tokenizer, tmp_path / "runs" / "my-rm" / "model", FACTS)
    save_classifiers(tmp_path)
    write_dialogues(tmp_path / "DIALOCONAN.csv")
    write_toxicity_prompts(tmp_path / "toxicity-prompts.jsonl")
    methods, rewards = dict(ALGORITHMS), dict(registry._registered)
    yield
    for now, before in ((ALGORITHMS, methods), (registry._registered, rewards)):
        now.clear()
        now.update(before)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page: Path, tiny_demo: None) -> None:
    """Blocks of a page run one after the other, in one scope."""
    if '"vader"' in page.read_text(encoding="utf-8"):
        pytest.importorskip("vaderSentiment")
    scope: dict[str, Any] = {"__name__": "docs"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{name_of(page)}, python block {number}", "exec", dont_inherit=True), scope)


def test_few_python_blocks_are_left_out() -> None:
    infos = [info for page in PAGES for info, _ in FENCE.findall(page.read_text(encoding="utf-8"))]
    assert sum("no-run" in info for info in infos) <= 2


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name_of)
def test_recipes_parse(page: Path) -> None:
    """A block that shows a part of a recipe stands in a small whole one."""
    for block in blocks(page, "yaml"):
        part = parse_yaml(block, name_of(page))
        whole = {**SMALL_RECIPE, **part}
        if algorithm_from(whole["algorithm"]).on_policy:
            whole.setdefault("reward", "vader")
        Recipe.from_mapping(whole)


# Command lines -------------------------------------------------------------------------------------------------------


def command_lines() -> list[tuple[str, str]]:
    """(page, command line) of every ``tropism`` and ``make`` line in a shell block, also behind a launcher."""
    launcher = re.compile(r"^(accelerate launch|torchrun) .*-m tropism\.cli")
    found = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                found.append((name_of(page), launcher.sub("tropism", line.strip())))
    return [(page, line) for page, line in found if line.startswith(("tropism ", "make "))]


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_command_lines_are_understood(page: str, line: str, tmp_path: Path) -> None:
    program, name, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if name.startswith("--"):
        assert name in ("--help", "--version")
        return
    assert name in COMMANDS
    if "--help" in arguments:
        return
    module = importlib.import_module(f"tropism.commands.{name}")
    if name == "train":
        check_train(module, arguments)
    elif name == "compare":
        check_compare(module, arguments)
    else:
        cli: Any = tyro.cli
        if name == "data":
            kind, *arguments = arguments
            module = types.SimpleNamespace(Options=getattr(module, DATA_SETS[kind]))
        _, unknown = cli(
            module.Options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,), return_unknown_args=True
        )
        # These two also take fields of the recipe.
        assert all("." in word for word in unknown[::2]) if name in ("evaluate", "inspect") else not unknown


DATA_SETS = {
    "real-toxicity-prompts": "RealToxicityPromptsOptions",
    "dialoconan": "DialoconanOptions",
    "conan": "ConanOptions",
}
"""What `tropism data` makes -> the class of its options."""


def check_compare(module: Any, arguments: list[str]) -> None:
    """The methods and the budget are valid, and so is the recipe with what else is changed."""
    words = module.take_apart(arguments, module.FLAGS)
    own, overrides = module.own_options(words.overrides, module.OWN)
    if "show" in own:
        assert not words.sources and not overrides
        return
    (source,) = words.sources
    own_recipe = {**SMALL_RECIPE, "reward": "vader", "compare": {"methods": ["sft"], "completions": 512}}
    mapping = read_yaml(ROOT / source) if (ROOT / source).is_file() else own_recipe
    mapping = module.with_overrides(mapping, overrides)
    section = mapping.pop("compare", None)
    numbers = {name: module.number_option(own, name) for name in module.NUMBERS if name != "processes"}
    assert compare_config(section, **{name: own.get(name) for name in ("methods", "seeds", "against")}, **numbers)
    Recipe.from_mapping({"algorithm": "grpo", **mapping})


def check_train(module: Any, arguments: list[str]) -> None:
    """The recipe with the line's overrides is a valid one; recipes of a reader's own stand for a small one."""
    words = module.take_apart(arguments, module.FLAGS)
    assert len(words.sources) <= 1
    source = ROOT / words.sources[0] if words.sources else None
    mapping: dict[str, Any] = {**SMALL_RECIPE, "reward": "vader"}
    if source is not None and source.is_file():
        mapping = read_yaml(source)
    Recipe.from_mapping(module.with_overrides(mapping, words.overrides))


# Fields and defaults -------------------------------------------------------------------------------------------------


def config_classes() -> list[type[Any]]:
    """Every public configuration."""
    public = [getattr(tropism, name) for name in tropism.__all__]
    return [c for c in public if isinstance(c, type) and dataclasses.is_dataclass(c)]


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_every_field_is_documented_where_it_stands(cls: type[Any]) -> None:
    docs = field_docs(cls)
    assert [f.name for f in dataclasses.fields(cls) if not docs.get(f.name)] == []


TABLES = {
    **{method: f"methods/{name}.md" for name, method in ALGORITHMS.items()},
    tropism.KLControl: "methods/ppo.md",
    tropism.Critic: "methods/ppo.md",
    tropism.MissingEos: "methods/ppo.md",
    tropism.Normalisation: "methods/reward-model.md",
    tropism.Sampling: "sampling.md",
    tropism.Truncation: "sampling.md",
    tropism.TrainerConfig: "training.md",
    tropism.OptimizerConfig: "training.md",
    tropism.EvaluationConfig: "training.md",
    tropism.CheckpointConfig: "training.md",
    tropism.LoRA: "training.md",
    tropism.ModelConfig: "training.md",
}


def default_text(field: dataclasses.Field[Any]) -> str:
    """A default as the tables write it."""
    if field.default_factory is not dataclasses.MISSING:
        return f"`{type(field.default_factory()).__name__}()`"
    if field.default is dataclasses.MISSING:
        return "required"
    return f"`{json.dumps(field.default) if isinstance(field.default, str) else repr(field.default)}`"


@pytest.mark.parametrize(("cls", "page"), TABLES.items(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_tables_hold_every_field_with_its_default(cls: type[Any], page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE))
    missing = [(f.name, default_text(f)) for f in dataclasses.fields(cls) if (f.name, default_text(f)) not in rows]
    assert not missing


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_preset_is_on_the_page_of_its_method(name: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8").partition("## Presets")[2]
    assert set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)) == set(ALGORITHMS[name].presets)


# Metrics -------------------------------------------------------------------------------------------------------------


def glossary() -> set[str]:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    return {re.sub(r"<\w+>", "<>", name) for name in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)}


FAMILIES = "reward|policy|value|rollout|loss|optim|time|throughput|eval|best"


def test_every_metric_named_in_the_code_is_in_the_glossary() -> None:
    literal = re.compile(rf"""["']((?:{FAMILIES})/[\w/{{}}]+)["']""")
    named = {
        re.sub(r"{\w+}", "<>", name)
        for path in SOURCE.rglob("*.py")
        for name in literal.findall(path.read_text(encoding="utf-8"))
        if not name.endswith("/")
    }
    assert "reward/mean" in named
    assert named - glossary() == set()


def letter_a(completions: list[str]) -> list[float]:
    return [text.count("a") / max(1, len(text)) for text in completions]


@pytest.mark.parametrize("method", METHODS)
def test_every_metric_that_is_logged_is_in_the_glossary(method: str, tmp_path: Path) -> None:
    setting = Setting(method, False, "llama")
    changes: dict[str, Any] = {"eval_data": setting.texts[:2]}
    if METHODS[method].reads == "prompts":
        changes["reward"] = RewardConfig.of({"terms": {"a": {"use": letter_a}}, "scale": "running"})
    execute(assemble(setting, tmp_path / "run", **changes))
    known = glossary() | {"kind", "step", "updates", "samples", "tokens", "collects", "reward/a", "eval/reward/a"}
    known |= {"pool/reward"}  # the name of the target, like that of the term
    for log in ("metrics.jsonl", "timings.jsonl"):
        for line in (tmp_path / "run" / log).read_text().splitlines():
            assert {re.sub(r"quantile_\d+$", "quantile_<>", name) for name in json.loads(line)} <= known
