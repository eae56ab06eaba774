"""The model card: what it says of a run, in names alone, and what it keeps to itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import JUDGED_APART, PROMPTS, Setting, assemble, early_letters, execute
from tropism.export import export_model
from tropism.export_card_facts import data_names, hub_name, origin_of, public_name, public_text
from tropism.generation import save_policy
from tropism.models.policy import Policy
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.training.config import EvaluationConfig

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropism.export_checks.GREEDY", 1)


def far_letters(completions: list[str]) -> list[float]:
    return [1 - share for share in early_letters(completions)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run that has everything: files in private places, two rewards, evaluations, warnings."""
    home = tmp_path_factory.mktemp("private")
    save_policy(Policy(tiny_model("gpt2", seed=3)), tiny_tokenizer(), None, home / "bases" / "tiny-gpt2")
    card = "---\nlicense: cc-by-4.0\n---\n# tiny\n"
    (home / "bases" / "tiny-gpt2" / "README.md").write_text(card)
    (home / "clients").mkdir()
    (home / "clients" / "openings.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    terms = {"early": {"use": early_letters, "weight": 2.0}, "far": {"use": far_letters, "weight": 0.5}}
    execute(
        assemble(
            Setting("grpo", True, "gpt2"),
            home / "runs" / "warm",
            model=str(home / "bases" / "tiny-gpt2"),
            data=str(home / "clients" / "openings.jsonl"),
            eval_data=[f"so {prompt}" for prompt in PROMPTS[:4]],
            reward=RewardConfig.of({"terms": terms}),
            sampling=Sampling(max_new_tokens=6, temperature=0.9, top_k=12),
            trainer={"evaluation": EvaluationConfig(every=1)},
        ),
        export=True,
    )
    with (home / "runs" / "warm" / "warnings.jsonl").open("a") as log:
        for step in (1, 2):
            message = f"the cache {home}/clients/cache is slow, says {SECRET}"
            log.write(json.dumps({"step": step, "message": message}) + "\n")
    return export_model(home / "runs" / "warm", home / "exports" / "warm-v1").folder


def test_what_the_hub_reads(exported: Path) -> None:
    data: Any = ModelCard.load(exported / "README.md").data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.tags == ["tropism", "grpo"]
    assert data.base_model is None and data.datasets is None and data.language is None


def test_what_people_read(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    for words in (
        "# warm-v1",
        "trained with tropism (`grpo`), after step 2. It began as `tiny-gpt2`.",
        "The licence of tiny-gpt2 holds for this model, too: it is `cc-by-4.0`.",
        "- Method: grpo, 2 steps of 4 prompts or texts, seed 7",
        "- Trained: a LoRA adapter of rank 4, merged here",
        "- Trained on: `openings.jsonl`",
        "- Sampling: max_new_tokens 6, temperature 0.9, top_k 12\n",
        "| early | `tiny_runs:early_letters` | 2.0 |",
        "test_export_card:far_letters` | 0.5 |",
        "On 4 held-out prompts, step 0 and step 2; step 0 is the model before training.",
        "| | before | after | change |",
        "| reward term early |",
        "(training.png)",
        "| step | held-out reward | sequence KL (nats) | length (tokens) |",
        "## Warnings of the run",
        "the cache cache is slow, says [redacted]",
        "tropism train recipe.yaml\ntropism export warm --out warm-v1\n",
        "\ndata: openings.jsonl\n",
        "Trained with tropism ",
        "transformers ",
    ):
        assert words in card, words
    assert card.count("the cache cache is slow") == 1, "each warning once"
    assert [line.split("|")[1].strip() for line in card.split("| step |")[1].splitlines()[2:5]] == ["0", "1", "2"]


def test_nothing_private_is_in_an_export(exported: Path) -> None:
    home = str(exported.parent.parent)
    for path in exported.iterdir():
        content = path.read_bytes().decode("utf-8", errors="replace")
        for private in (home, "clients/", "bases/", "runs/warm", SECRET):
            assert private not in content, f"{path.name} holds {private}"


def test_the_numbers_are_those_of_the_evaluation(exported: Path) -> None:
    """Means of the held-out rewards, by the files of the run."""
    import pyarrow.parquet as pq

    run = exported.parent.parent / "runs" / "warm"
    card = (exported / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| reward (held-out) |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    means = []
    for step, cell in ((0, cells[1]), (2, cells[2])):
        rewards = pq.read_table(run / "evaluations" / f"step-{step:06d}.parquet")["reward"].to_pylist()
        means.append(sum(rewards) / len(rewards))
        assert float(cell.split()[0]) == pytest.approx(means[-1], abs=0.006)
        assert "[" in cell, "with its interval"
    assert float(cells[3].split()[0]) == pytest.approx(means[1] - means[0], abs=0.006)


def test_the_picture_is_one(exported: Path) -> None:
    content = (exported / "training.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_a_reward_model_has_its_own_card(tmp_path: Path) -> None:
    setting = Setting("reward-model", False, "llama")
    execute(assemble(setting, tmp_path / "run", eval_data=JUDGED_APART), export=True)
    card = (export_model(tmp_path / "run", tmp_path / "out").folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification" in card
    assert "| accuracy |" in card and "always the longest" in card and "- Sampling" not in card
    assert (tmp_path / "out" / "training.png").is_file()


def test_a_model_without_a_run_has_a_short_card(tmp_path: Path) -> None:
    save_policy(Policy(tiny_model("llama")), tiny_tokenizer(), None, tmp_path / "model")
    card = (export_model(tmp_path / "model", tmp_path / "out").folder / "README.md").read_text()
    assert "tropism export model --out out" in card
    assert "A language model, written by tropism from `model`." in card
    assert "## Training" not in card and "## Evaluation" not in card and "recipe.yaml" not in card
    assert not (tmp_path / "out" / "training.png").exists()


def test_the_base_is_followed_through_runs(tmp_path: Path) -> None:
    for name, model in (("first", "ada/base-model"), ("second", str(tmp_path / "first" / "model"))):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").write_text(f"model:\n  name: {model}\n")
    origin = origin_of({"name": str(tmp_path / "second" / "model")})
    assert origin is not None
    assert (origin.shown, origin.hub_id, origin.licence) == ("the run second", "ada/base-model", None)
    demo = origin_of("demo")
    assert demo is not None and demo.hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct" and demo.licence == "apache-2.0"
    assert origin_of("<tuple of 2 given from Python>") is None


def test_names_of_the_hub_and_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert hub_name("stanfordnlp/imdb") == "stanfordnlp/imdb" and hub_name("imdb") == "imdb"
    for name in ("data/films", "gone/films.jsonl", "/data/films", "~/films", "./films", "a/b/c", "data"):
        assert hub_name(name) is None, name
    for name, shown in [
        ("stanfordnlp/imdb", "stanfordnlp/imdb"),
        ("/home/ada/clients/acme.jsonl", "acme.jsonl"),
        ("~/acme/films", "films"),
        ("../acme/films", "films"),
        ("clients/acme/films", "films"),
        ("acme/films.csv.gz", "films.csv.gz"),
        ("/home/ada/rewards.py:warmth", "rewards.py:warmth"),
        ("rewards:warmth", "rewards:warmth"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("\n", "\n"),
    ]:
        assert public_name(name) == shown
    recipe = {"data": {"path": "stanfordnlp/imdb", "split": "train", "eval_fraction": 0.1}, "eval_data": "x/y.jsonl"}
    words, on_hub = data_names(recipe)
    assert words == ["trained on: `stanfordnlp/imdb` (train), 10% of it held out", "evaluated on: `y.jsonl`"]
    assert on_hub == ["stanfordnlp/imdb"]


def test_paths_inside_of_sentences() -> None:
    here = "in " + str(Path.cwd() / "warm films" / "x.txt")
    assert public_text(here) == "in warm films/x.txt"
    text = "see /home/ada/runs/warm/report.html, ~/x/y and and/or 1/2 at https://example.org/a/b </details> a</b/c>"
    assert public_text(text) == "see report.html, y and and/or 1/2 at https://example.org/a/b </details> a</b/c>"


def test_data_of_the_hub_is_named_to_it(tmp_path: Path) -> None:
    """A run whose data and base came from the hub, told by its recipe alone."""
    setting = Setting("sft", False, "llama")
    execute(assemble(setting, tmp_path / "run"), export=True)
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    recipe = recipe.replace("model: <tuple of 2 given from Python>", "model: ada/base-model")
    recipe = recipe.replace("data: <list of 6 given from Python>", "data: stanfordnlp/imdb", 1)
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    data: Any = ModelCard.load(export_model(tmp_path / "run", tmp_path / "out").folder / "README.md").data
    assert data.base_model == "ada/base-model" and data.datasets == ["stanfordnlp/imdb"]
    assert "license" not in data.to_dict() and "language" not in data.to_dict()
