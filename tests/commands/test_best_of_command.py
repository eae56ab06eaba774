"""tropism evaluate --best-of, on a tiny model and on a tiny run that learned from its best completions."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pyarrow.parquet as pq
import pytest

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tropism.cli import main
from tropism.commands.best_of import parsed_sizes, samples_of
from tropism.config import Recipe
from tropism.errors import ConfigError
from tropism.rewards import registry

Captured = pytest.CaptureFixture[str]


def early_letters(completions: list[str]) -> list[float]:
    return [sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text)) for text in completions]


def picky(completions: list[str]) -> list[float | None]:
    return [None if place % 4 == 0 else float(len(text)) for place, text in enumerate(completions)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("best-of")
    before = dict(registry._registered)
    for name, reward in (("early-letters", early_letters), ("picky", picky)):
        tropism.register(name)(reward)
    tiny_model("llama", seed=3).save_pretrained(folder / "plain")
    tiny_tokenizer().save_pretrained(folder / "plain")
    (folder / "prompts.txt").write_text("a cat\nthe big dog\noh\nwe ran\nno\nis it so\n")
    (folder / "held_out.txt").write_text("a dog\nthe cat sat\nso\nwe sat\n")
    tropism.train(
        model=str(folder / "plain"),
        algorithm=tropism.RFT.preset("best-of-n", group_size=4),
        data=str(folder / "prompts.txt"),
        eval_data=str(folder / "held_out.txt"),
        reward="early-letters",
        run=str(folder / "run"),
        total_steps=2,
        prompts_per_step=6,
        sampling=tropism.Sampling(max_new_tokens=6),
        trainer=tropism.TrainerConfig(learning_rate=1e-2, progress=False, preflight=False),
    )
    yield folder / "run"
    registry._registered.clear()
    registry._registered.update(before)


def test_a_run_beside_the_model_it_started_from(run: Path, capsys: Captured) -> None:
    assert main(["evaluate", str(run), "--best-of", "4,1,2", "--samples-per-prompt", "5"]) == 0
    printed = capsys.readouterr().out
    folder = run / "best_of"
    assert {path.name for path in folder.iterdir()} == {"best_of.csv", "statistics.json", "samples.parquet"}
    samples = pq.read_table(folder / "samples.parquet").to_pydict()
    assert samples["model"] == ["base"] * 20 + ["trained"] * 20
    assert samples["reward"] == pytest.approx(early_letters(samples["completion"]), abs=1e-6)
    rows = list(csv.DictReader((folder / "best_of.csv").read_text().splitlines()))
    assert [(row["model"], int(float(row["n"]))) for row in rows] == list(
        itertools.product(("base", "trained"), (1, 2, 4))
    )
    for row in rows:
        begin, n = (0 if row["model"] == "base" else 20), int(float(row["n"]))
        prompts = [samples["reward"][first : first + 5] for first in range(begin, begin + 20, 5)]
        expected = fmean(fmean(max(subset) for subset in itertools.combinations(prompt, n)) for prompt in prompts)
        assert float(row["reward"]) == pytest.approx(expected, abs=1e-9)
        assert float(row["low"]) <= float(row["reward"]) <= float(row["high"])
        assert float(row["kl_bound"]) == pytest.approx(math.log(n) - (n - 1) / n)
        assert float(row["prompts"]) == 4
    for text in ("best of n: 4 prompts, 5 completions of each", "0.193", "0.636", "nats of KL to the base model"):
        assert text in printed
    statistics = json.loads((folder / "statistics.json").read_text())
    assert statistics["samples_per_prompt"] == 5
    assert statistics["models"]["base"]["sequence_kl"] == pytest.approx(0.0, abs=1e-5)
    kls = samples["sequence_kl"][20:]
    assert statistics["models"]["trained"]["sequence_kl"] == pytest.approx(fmean(kls))


def test_a_model_is_printed_and_written_where_a_folder_is_named(run: Path, tmp_path: Path, capsys: Captured) -> None:
    data, plain = str(run.parent / "held_out.txt"), str(run.parent / "plain")
    command = ["evaluate", plain, "--data", data, "--reward", "picky", "--sampling.max_new_tokens", "5"]
    assert main([*command, "--best-of", "1,3", "--n", "2", "--samples-per-prompt", "4"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 8 completions are unscored" in printed and "written" not in printed
    assert not (run.parent / "plain" / "best_of").exists()
    assert main([*command, "--best-of", "2", "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"best_of.csv", "statistics.json", "samples.parquet"}
    assert len(pq.read_table(tmp_path / "out" / "samples.parquet")) == 8, "as many as the largest number takes"


def test_mistakes_are_named(run: Path, tmp_path: Path, capsys: Captured) -> None:
    data, plain = str(run.parent / "held_out.txt"), str(run.parent / "plain")
    cases = [
        ([str(run), "--best-of", "0,2"], "whole numbers from 1 on"),
        ([str(run), "--best-of", "2", "--steerability"], "leave one of them out"),
        ([str(run), "--best-of", "2", "--targets", "1"], "--targets belongs to --steerability"),
        ([str(run), "--best-of", "8", "--samples-per-prompt", "4"], "too few for the best of 8"),
        ([str(run), "--best-of", "2", "--out", "scores.json"], "name a folder"),
        ([str(run), "--best-of", "2", "--sampling", "temperature=0.5,1.0"], "--sampling"),
        (
            [plain, "--data", data, "--reward", "picky", "--best-of", "4", "--sampling.max_new_tokens", "5"],
            "raise --samples-per-prompt",
        ),
    ]
    for arguments, message in cases:
        assert main(["evaluate", *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1.5", "-1", "0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="whole numbers"):
        parsed_sizes(text)


def test_sizes_and_samples() -> None:
    assert parsed_sizes("16,1, 4,4") == (1, 4, 16)
    assert samples_of(1, (1, 4, 16)) == 16 and samples_of(64, (1, 4, 16)) == 64 and samples_of(1, (1,)) == 1


def test_methods_and_train_say_what_best_of_n_is(run: Path, capsys: Captured) -> None:
    assert main(["methods"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert (
        "best-of-n learns nothing: for inference only" in listed and "policy.best_of(prompts, reward, n=16)" in listed
    )
    assert main(["methods", "best-of-n"]) == 0
    assert "--best-of" in capsys.readouterr().out
    prompts = str(run.parent / "prompts.txt")
    assert main(["train", "--algorithm", "best-of-n", "--model", "demo", "--data", prompts, "--reward", "length"]) == 2
    assert "best-of-n trains nothing" in capsys.readouterr().err


def test_a_dry_run_says_when_it_samples(run: Path, capsys: Captured) -> None:
    recipe = Recipe.from_file(run / "recipe.yaml")
    assert recipe.algorithm.name == "rft"
    arguments = [
        *("--model", str(run.parent / "plain"), "--data", str(run.parent / "prompts.txt"), "--reward", "early-letters"),
        *("--algorithm.name", "rft", "--prompts_per_step", "3", "--sampling.max_new_tokens", "5", "--dry-run"),
    ]
    assert main(["train", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "completions in every 4 steps: 24" in printed and "tokens in every 4 steps: at most 120" in printed
