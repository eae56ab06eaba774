"""tropism attribute, and what train and evaluate say of a gold reward, on a tiny run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tropism.cli import main
from tropism.evaluation.attribution_files import read_samples
from tropism.rewards import registry

Captured = pytest.CaptureFixture[str]


def early_letters(completions: list[str]) -> list[float]:
    return [sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text)) for text in completions]


def brief(completions: list[str]) -> list[float]:
    return [-float(len(text)) for text in completions]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("attribute")
    before = dict(registry._registered)
    for name, reward in (("early-letters", early_letters), ("brief", brief)):
        tropism.register(name)(reward)
    tiny_model("llama", seed=3).save_pretrained(folder / "plain")
    tiny_tokenizer().save_pretrained(folder / "plain")
    (folder / "prompts.txt").write_text("a cat\nthe big dog\noh\nwe ran\nno\nis it so\n")
    held_out = [f"{start} {end}" for start in ("a dog", "the cat", "so", "we sat") for end in ("ran", "sat", "is")]
    (folder / "held_out.txt").write_text("\n".join(held_out) + "\n")
    recipe = {
        "model": str(folder / "plain"),
        "algorithm": {"name": "grpo", "group_size": 2},
        "data": str(folder / "prompts.txt"),
        "eval_data": str(folder / "held_out.txt"),
        "reward": "early-letters",
        "run": str(folder / "run"),
        "total_steps": 2,
        "prompts_per_step": 4,
        "sampling": {"max_new_tokens": 6},
        "trainer": {"learning_rate": 0.01, "progress": False, "evaluation": {"every": 1, "gold": "brief"}},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    yield folder
    registry._registered.clear()
    registry._registered.update(before)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


# Gold ----------------------------------------------------------------------------------------------------------------


def test_train_ends_with_the_verdict(folder: Path, capsys: Captured) -> None:
    other = ["--run", str(folder / "other"), "--trainer.evaluation.gold.use", "brief"]
    assert main(["train", str(folder / "recipe.yaml"), *other]) == 0
    printed = capsys.readouterr().out
    assert "gold:   " in printed and "step" in printed.partition("gold:   ")[2]


def test_evaluate_measures_it_and_repeats_the_verdict(run: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "scores.parquet"
    assert main(["evaluate", str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "gold reward" in printed and "gold:   " in printed
    table = pq.read_table(out).to_pydict()
    assert table["metric/gold"] == brief(table["completion"])


def test_the_report_has_the_section(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Is the reward being gamed?" in page and "training reward" in page
    assert (run / "plots" / "gold-reward.png").read_bytes().startswith(b"\x89PNG")


# Attribution ---------------------------------------------------------------------------------------------------------


def test_samples_of_a_run_go_into_its_report(run: Path, capsys: Captured) -> None:
    assert main(["attribute", str(run), "--samples", "3", "--each-token"]) == 0
    printed = capsys.readouterr().out
    for label in ("Largest gain", "Median gain", "Smallest gain"):
        assert label in printed
    samples = read_samples(run)
    assert [sample.label for sample in samples] == ["Largest gain", "Median gain", "Smallest gain"]
    tables = [pq.read_table(run / "evaluations" / f"step-00000{step}.parquet").to_pydict() for step in (0, 2)]
    gains = [after - before for before, after in zip(tables[0]["reward"], tables[1]["reward"], strict=True)]
    for sample, gain in zip((samples[0], samples[2]), (max(gains), min(gains)), strict=True):
        row = tables[1]["prompt"].index(sample.prompt)
        assert gains[row] == gain and sample.completion == tables[1]["completion"][row]
        of_completion, of_reward = sample.maps
        assert of_completion.method == "integrated_gradients" and of_completion.matrix is not None
        assert of_reward.method == "occlusion" and of_reward.value == pytest.approx(sample.reward, abs=1e-6)
        assert "".join(of_completion.pieces) == sample.prompt
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('class="heat"') >= 6 and "What drove it" in page and 'class="heat-key"' in page


def test_fewer_samples_replace_the_others(run: Path) -> None:
    for count in (2, 1):
        assert main(["attribute", str(run), "--samples", str(count), "--method", "occlusion"]) == 0
        assert len(list((run / "attribution").iterdir())) == count


def test_a_prompt_and_its_page(run: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "map.html"
    given = ["--prompt", "a <b>cat", "--completion", " sat", "--reward", "early-letters", "--out", str(out)]
    assert main(["attribute", str(run), *given]) == 0
    printed = capsys.readouterr().out
    assert "log-prob of the completion" in printed and "reward early-letters" in printed and "most: " in printed
    page = out.read_text(encoding="utf-8")
    assert "&lt;" in page and "a <b>cat" not in page


def test_a_model_and_a_sampled_completion(folder: Path, capsys: Captured) -> None:
    given = ["--prompt", "a cat", "--max-new-tokens", "5", "--method", "gradient_x_input"]
    assert main(["attribute", str(folder / "plain"), *given]) == 0
    assert "gradient x input" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --prompt TEXT, or --samples"),
        (["--prompt", "a", "--samples", "2"], "either --prompt TEXT, or --samples"),
        (["--samples", "2", "--completion", "b"], "--completion belongs to --prompt"),
        (["--samples", "0"], "at least 1"),
        (["--prompt", "a", "--out", "x.txt"], "name an .html file"),
        (["--prompt", "a", "--method", "inseq"], "method: unknown value 'inseq'"),
    ],
)
def test_what_cannot_be_asked(run: Path, arguments: list[str], message: str, capsys: Captured) -> None:
    assert main(["attribute", str(run), *arguments]) != 0
    assert message in capsys.readouterr().err


def test_samples_need_a_run(folder: Path, capsys: Captured) -> None:
    assert main(["attribute", str(folder / "plain"), "--samples", "2"]) != 0
    assert "is no run folder" in capsys.readouterr().err


def test_data_that_has_changed_is_refused(run: Path, folder: Path, capsys: Captured) -> None:
    path = folder / "held_out.txt"
    before = path.read_text()
    path.write_text(before.replace("a dog", "a hat"))
    try:
        assert main(["attribute", str(run), "--samples", "1"]) != 0
    finally:
        path.write_text(before)
    assert "are not those of its evaluation of step 2" in capsys.readouterr().err


def test_a_damaged_file_is_named(run: Path, tmp_path: Path) -> None:
    from tropism.errors import DataError

    (tmp_path / "attribution").mkdir()
    good: dict[str, Any] = {"label": "x", "step": 1, "prompt": "a", "completion": "b", "reward": None, "maps": []}
    (tmp_path / "attribution" / "sample-1.json").write_text(json.dumps(good))
    assert read_samples(tmp_path)[0].maps == ()
    (tmp_path / "attribution" / "sample-2.json").write_text(json.dumps(good | {"maps": [{"of": "reward"}]}))
    with pytest.raises(DataError, match=r"sample-2\.json is no attribution"):
        read_samples(tmp_path)
