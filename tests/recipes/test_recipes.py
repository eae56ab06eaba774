"""Every recipe parses strictly, and trains two steps of a tiny model on local data, leaving a complete run folder.

Those of lm-human-preferences have further tests in test_lm_human_preferences.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tiny_models import tiny_model, tiny_tokenizer
from tropism.algorithms import ALGORITHMS
from tropism.cli import main
from tropism.config import Recipe
from tropism.data.prompts import make_prompts
from tropism.models.saving import save_plain
from tropism.rewards import RewardHarness
from tropism.types import RewardInputs

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes"
SWEEPS = FOLDER / "sweeps"
"""Files of sweeps, which tests/sweeps checks."""
COMPARISONS = FOLDER / "compare"
"""Recipes of comparisons, which tests/comparing checks."""
RECIPES = {
    path.relative_to(FOLDER).as_posix(): path
    for path in sorted(FOLDER.rglob("*.yaml"))
    if path.parent not in (SWEEPS, COMPARISONS)
}
FILMS = ROOT / "src" / "tropism" / "demo_data"

QUERIES = ("--data.path", "{judged}/books.jsonl", "--data.subset=null", "--data.limit=8", "--data.prepare.length=16")
LABELS = (
    *("--data.path", "{judged}/labels.json", "--data.limit", "8", "--data.eval_fraction", "0.3"),
    *("--normalise.policy", "{judged}/stories", "--normalise.samples", "4"),
    *(word.replace("--data.", "--normalise.data.") for word in QUERIES),
    *("--sampling.truncation.after", "2"),
)
PPO_ON_LABELS = (*QUERIES, "--eval_data", "{judged}/books.jsonl", "--sampling.truncation.after", "2")
TASKS = ("sentiment", "descriptiveness", "cnndm", "tldr")
WALKS = (
    *("--data.path", "{walks}/prompts.jsonl", "--eval_data.path", "{walks}/prompts.jsonl"),
    *("--reward.optimality.args.graph", "{walks}", "--metrics.reached.args.graph", "{walks}"),
)

REVIEWS = (
    *("--data.path", "{shared}/data/imdb/small_train.jsonl.gz", "--data.limit", "8", "--data.eval_fraction", "0.3"),
    *("--reward", "vader"),
)
HELD_OUT = ("--eval_data", f"{FILMS}/held_out.txt")
PROMPTS = ("--data", f"{FILMS}/train.txt", *HELD_OUT)

LOCAL: dict[str, tuple[str, ...]] = {
    **{f"lm-human-preferences/{task}-reward.yaml": LABELS for task in TASKS},
    **{
        f"lm-human-preferences/{task}-policy.yaml": (*PPO_ON_LABELS, f"--reward.{task}.use", "{judged}/reward")
        for task in TASKS
    },
    "conditioned-imdb.yaml": (
        *("--data.path", "{scored}/imdb.jsonl", "--reward", "vader"),
        *("--eval_data.path", "{shared}/data/imdb/small_test.jsonl.gz", "--eval_data.limit", "3"),
        *("--eval_data.split", "train"),
    ),
    "conditioned-scitldr.yaml": ("--data.path", "{scored}/papers.jsonl", "--eval_data.path", "{scored}/papers.jsonl"),
    "conditioned-warm-films.yaml": (
        *("--data", f"{FILMS}/train.txt", "--eval_data", f"{FILMS}/held_out.txt"),
        *("--algorithm.samples_per_prompt", "2"),
    ),
    "grpo-warm-films.yaml": ("--data", f"{FILMS}/train.txt", "--eval_data", f"{FILMS}/held_out.txt"),
    "grpo-gsm8k.yaml": (
        *("--data.path", "{shared}/data/gsm8k/test.jsonl.gz", "--data.limit", "6", "--data.eval_fraction", "0.4"),
        *("--data.chat", "false", "--data.template", "'{{question}}'"),
    ),
    "grpo-t5-summaries.yaml": (
        *("--data.path", "{articles}/articles.jsonl", "--data.subset=null", "--data.prepare.length", "16"),
        *("--data.eval_fraction", "0.3"),
    ),
    "grpo-less-toxic.yaml": (
        *("--data.path", f"{FILMS}/train.txt", "--data.prompt_column", "text", "--data.eval_fraction", "0.4"),
        *("--data.limit", "8"),
    ),
    "ppo-imdb.yaml": (*REVIEWS, "--algorithm.minibatch_size", "2"),
    "grpo-imdb.yaml": REVIEWS,
    "rft-imdb.yaml": REVIEWS,
    "ilql-imdb.yaml": REVIEWS,
    "kto-imdb.yaml": REVIEWS,
    "dpo-imdb.yaml": ("--data.path", "{remarks}/films-pairs.jsonl", "--data.eval_fraction", "0.4", "--reward", "vader"),
    "sft-positive-imdb.yaml": REVIEWS,
    "ppo-warm-films.yaml": (*PROMPTS, "--algorithm.minibatch_size", "2"),
    "rft-warm-films.yaml": (*PROMPTS, "--algorithm.improve_steps", "1"),
    "sft-warm-films.yaml": ("--data.path", "{remarks}/films-best.jsonl", "--data.eval_fraction", "0.4"),
    "dpo-warm-films.yaml": ("--data.path", "{remarks}/films-pairs.jsonl", "--data.eval_fraction", "0.4"),
    "kto-warm-films.yaml": ("--data.path", "{remarks}/films-opinions.jsonl", "--data.eval_fraction", "0.4"),
    "ilql-warm-films.yaml": ("--data.path", "{remarks}/films.jsonl", *HELD_OUT),
    "quark-warm-films.yaml": (
        *("--data", f"{FILMS}/train.txt", "--eval_data", f"{FILMS}/held_out.txt"),
        *("--algorithm.quantiles", "2", "--algorithm.updates", "1"),
    ),
    "best-of-n-warm-films.yaml": PROMPTS,
    "ppo-movies.yaml": (
        *("--data", f"{FILMS}/train.txt", "--eval_data", f"{FILMS}/held_out.txt"),
        *("--reward.taste.use", "{judged}/reward"),
    ),
    **{f"randomwalks/{name}.yaml": WALKS for name in ("ppo", "grpo")},
    "randomwalks/ilql.yaml": ("--data.path", "{walks}/walks.jsonl", *WALKS[2:]),
    "randomwalks/sft.yaml": ("--data.path", "{walks}/walks.jsonl", "--eval_data.path", "{walks}/held_out.jsonl"),
    "reward-model-movies.yaml": (
        *("--data.path", "{shared}/data/movie_ratings/best_of_4.jsonl.gz", "--data.limit", "40"),
        *("--normalise.policy", "{judged}/stories", "--normalise.samples", "4", "--normalise.check", "4"),
        *("--normalise.data", f"{FILMS}/train.txt"),
    ),
    "rloo-brief-and-kind.yaml": (
        "--data.path",
        f"{FILMS}/train.txt",
        "--data.chat",
        "false",
        "--data.system_prompt=null",
    ),
    "sft-imdb.yaml": ("--data.path", "{shared}/data/imdb/small_train.jsonl.gz", "--data.limit", "8"),
}
"""What replaces the hub's data sets, and what needs a chat template or a classifier, which the tiny model lacks."""


def test_every_recipe_is_smoke_run_and_every_method_has_one() -> None:
    assert set(LOCAL) == set(RECIPES)
    assert {Recipe.from_file(path).algorithm.name for path in RECIPES.values()} == set(ALGORITHMS)


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_in_the_comment_is_that_of_the_recipe(name: str) -> None:
    text = RECIPES[name].read_text()
    assert text.startswith("# ")
    named = re.findall(r"tropism train (\S+)", text)
    # One of a policy and a reward model that belong together may name both.
    assert f"recipes/{name}" in named
    assert {word.removeprefix("recipes/") for word in named} <= RECIPES.keys()
    assert len(set(named)) == 1 or "reward-model-movies.yaml" in text or "randomwalks/sft.yaml" in text


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_resolved_and_read_back(name: str) -> None:
    recipe = Recipe.from_file(RECIPES[name])
    assert recipe.run is not None and recipe.run.startswith("runs/")
    copy = ROOT / recipe.data if isinstance(recipe.data, str) else None
    assert copy is None or copy.is_file()


@pytest.fixture(scope="module")
def scored(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small scored files, made as the comments of the recipes say."""
    folder = tmp_path_factory.mktemp("scored")
    reviews = str(shared / "data/imdb/small_train.jsonl.gz")
    assert main(["score", reviews, "--limit", "8", "--reward", "vader", "--out", str(folder / "imdb.jsonl")]) == 0
    papers = [
        {"prompt": f"{text} It is new.\n\nTL;DR:", "completion": f" {summary}", "references": ["A short summary."]}
        for text in ("We train.", "We test.", "We prove.")
        for summary in ("A short summary.", "Short.", "It is new.")
    ]
    (folder / "papers-plain.jsonl").write_text("".join(json.dumps(paper) + "\n" for paper in papers))
    reward, out = str(ROOT / "recipes/conditioned-scitldr.yaml"), str(folder / "papers.jsonl")
    assert main(["score", str(folder / "papers-plain.jsonl"), "--reward-file", reward, "--out", out]) == 0
    return folder


@pytest.fixture(scope="module")
def remarks(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with remarks and their rewards, and what is made of them, as the comments of the recipes say."""
    folder = tmp_path_factory.mktemp("remarks")
    made = folder / "films.jsonl"
    sampled = ("--model", str(stories), "--limit", "12", "--n", "8", "--stop", ".", "--reward", "vader")
    assert main(["score", f"{FILMS}/train.txt", *sampled, "--out", str(made)]) == 0
    subprocess.run([sys.executable, ROOT / "examples" / "from_scores.py", made], check=True, capture_output=True)
    return folder


def book(number: int) -> str:
    """A text with what the preparations look for: full stops, line breaks, something before and behind."""
    return f"It was day {number}. One day the cat sat.\nIt ran to the big mat. The dog said no.\nThe end of it"


@pytest.fixture(scope="module")
def judged(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-ins for what is on the hub: label files of the source's format in the ids of the tiny model's
    tokenizer, books, a reward model that was trained on these labels, and a link to the tiny model itself."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "stories").symlink_to(stories)
    columns = ("text", "article", "prompt")
    books = [dict.fromkeys(columns, book(number)) for number in range(12)]
    (folder / "books.jsonl").write_text("".join(json.dumps(record) + "\n" for record in books))
    tokenizer = AutoTokenizer.from_pretrained(stories)

    def ids(text: str, length: int) -> list[int]:
        found = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        return [*found, *[50259] * (length - len(found))]

    texts = ("she was very happy.", "he was sad and cold.", "it was a big red ball.", "they ran home")
    labels = [
        {
            "query": ids(f"One day a cat sat on mat {row}.", 16),
            **{f"sample{k}": ids(texts[(row + k) % 4], 12) for k in range(4)},
            "best": -row % 4,
        }
        for row in range(8)
    ]
    (folder / "labels.json").write_text(json.dumps(labels))
    recipe = RECIPES["lm-human-preferences/sentiment-reward.yaml"]
    arguments = [
        *("--model", str(stories), "--run", str(folder / "reward"), "--total_steps", "1", "--prompts_per_step", "2"),
        *("--sampling.max_new_tokens", "8", "--trainer.progress", "false"),
        *(word.format(judged=folder) for word in LABELS),
    ]
    assert main(["train", str(recipe), *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small graph with its walks."""
    folder = tmp_path_factory.mktemp("walks") / "randomwalks"
    size = ("--n-nodes", "4", "--p-edge", "0.5", "--n-walks", "12", "--n-layer", "1", "--n-embd", "8", "--n-head", "2")
    assert main(["randomwalks", str(folder), *size]) == 0
    return folder


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny T5 and articles with their highlights."""
    folder = tmp_path_factory.mktemp("articles")
    save_plain(tiny_model("t5"), tiny_tokenizer(add_eos=True), folder / "t5")
    records = [{"article": f"{letter}. {book(0)}", "highlights": "one day the cat sat"} for letter in "abcdefgh"]
    (folder / "articles.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(
    name: str,
    stories: Path,
    shared: Path,
    scored: Path,
    remarks: Path,
    judged: Path,
    walks: Path,
    articles: Path,
    tmp_path: Path,
) -> None:
    recipe = Recipe.from_file(RECIPES[name])
    made = {"shared": shared, "scored": scored, "remarks": remarks, "judged": judged, "walks": walks}
    made["articles"] = articles
    model = articles / "t5" if "-t5-" in name else stories
    on_policy = recipe.algorithm.on_policy
    run = tmp_path / "run"
    arguments = [
        *("--model", str(model), "--run", str(run), "--total_steps", "2", "--prompts_per_step", "2"),
        *("--sampling.max_new_tokens", "8", "--trainer.evaluation.every", "1", "--trainer.progress", "false"),
        *(word.format(**made) for word in LOCAL[name]),
        *(("--algorithm.group_size", "2") if on_policy else ()),
    ]
    assert main(["train", str(RECIPES[name]), *arguments]) == 0

    written = Recipe.from_file(run / "recipe.yaml")
    assert written.total_steps == 2 and written.algorithm.name == recipe.algorithm.name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["kind"] == "update"]
    assert {line["step"] for line in updates} == {1, 2}
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [0, 1, 2]
    if on_policy:
        table = pq.read_table(run / "rollouts" / "step-000002.parquet").to_pydict()
        assert len(table["completion"]) == 4
        assert {f"reward/{term}" for term in written.reward.terms} <= set(table)  # type: ignore[union-attr]
        assert (run / "evaluations" / "step-000002.parquet").is_file()
    assert list((run / "checkpoints").iterdir())
    assert (run / "environment.json").is_file() and (run / "report.html").is_file()
    halves = AutoConfig.from_pretrained(run / "model").is_encoder_decoder
    writes = AutoModelForSeq2SeqLM if halves else AutoModelForCausalLM
    kind = AutoModelForSequenceClassification if recipe.algorithm.reads == "comparisons" else writes
    kind.from_pretrained(run / "model")
    AutoTokenizer.from_pretrained(run / "model")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-imdb.yaml")])
def test_without_the_hub_a_recipe_says_what_it_lacks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else is wrong with it: its first error is about a model of the hub, and how to do without."""
    monkeypatch.chdir(tmp_path)
    data = Path(Recipe.from_file(RECIPES[name]).data.path)
    if data.suffix == ".jsonl":  # what another command writes first
        assert main(["train", str(RECIPES[name]), "--dry-run"]) == 2
        assert f"'{data}': no such file" in capsys.readouterr().err
        data.parent.mkdir(parents=True, exist_ok=True)
        data.touch()
    assert main(["train", str(RECIPES[name]), "--dry-run"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.match("error: .*(lvwerra/distilbert-imdb|openai-community/gpt2)", said)
    assert re.search("(Give a folder, or an id that this machine can download|Without, give a local model)", said)


def test_gsm8k_answers_reach_the_reward(stories: Path, shared: Path, tmp_path: Path) -> None:
    """The reward compares with the reference answer of the same row: a model that always says 18 is right on row 0."""
    recipe = Recipe.from_file(RECIPES["grpo-gsm8k.yaml"])
    assert recipe.reward is not None
    data = replace(recipe.data, path=str(shared / "data/gsm8k/test.jsonl.gz"), limit=2, chat=False)
    prompts = make_prompts(data, AutoTokenizer.from_pretrained(stories))
    inputs = RewardInputs(
        prompts=[prompt.text for prompt in prompts],
        completions=["She makes 9 * 2 dollars.\n#### 18", "#### 18"],
        completion_ids=[[1, 2], [1, 2]],
        finish_reasons=["eos", "eos"],
        columns={"answer": [prompt.columns["answer"] for prompt in prompts]},
    )
    scored = RewardHarness(recipe.reward).score(inputs)
    assert scored.terms["correct"].tolist() == [1.0, 0.0]
    assert scored.totals.tolist() == pytest.approx([1.1, 0.1])
