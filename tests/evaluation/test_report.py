from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tropism.evaluation.report import write_report

HOSTILE = "</pre><script>alert('x')</script><img src=http://example.org/a onerror=alert(1)>\udc80"


class Page(HTMLParser):
    """Collects the elements of a page and complains about unbalanced ones."""

    VOID = ("meta", "input", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def count(page: Page, tag: str) -> int:
    return sum(1 for name, _ in page.elements if name == tag)


def test_one_file_that_fetches_nothing(run_folder: Path) -> None:
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    text = path.read_text()
    page = Page(text)
    for _, attributes in page.elements:
        assert not {"src", "style", "srcset"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")  # the list of contents
        assert not any(name.startswith("on") for name in attributes)
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", text)
    assert [entry.name for entry in run_folder.iterdir() if entry.name.startswith(".")] == []


def test_only_the_own_script_may_run(run_folder: Path) -> None:
    page = Page(write_report(run_folder).read_text())
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_what_the_page_shows(run_folder: Path) -> None:
    text = write_report(run_folder).read_text()
    for wanted in (
        "Held-out reward", "What it cost: sequence KL", "close to the reference", "Largest gain", "Median gain",
        "Smallest gain", "Sequence KL to the reference (nats)", "Entropy (nats per token)", "Throughput",
        "Completion length", "Held-out reward, share of prompts", "reward term brevity", "optim/grad_norm",
        "eval/perplexity", "2 of 2 groups have equal rewards.", "2.13.0", "kl_coef: 0.15", "time 3 min 39 s",
    ):  # fmt: skip
        assert wanted in text, wanted
    page = Page(text)
    pairs = [a for tag, a in page.elements if tag == "div" and a.get("class") == "pair"]
    assert len(pairs) == 3 + 24


def test_a_hacked_reward_is_marked(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    folder = write_run(tmp_path / "hacked", hacked=True, steps=60, prompts=130)
    text = write_report(folder).read_text()
    assert '<div class="card extreme">' in text
    assert "do not trust the reward" in text
    assert "100 of the 130 prompts" in text


def test_everything_foreign_is_escaped(run_folder: Path) -> None:
    markup = HOSTILE.removesuffix("\udc80")
    for path in sorted((run_folder / "evaluations").iterdir()):
        table = pyarrow.parquet.read_table(path).to_pydict()
        table["prompt"] = [markup] * 24
        table["completion"] = [f"{markup} {index}" for index in range(24)]
        table["finish_reason"] = [markup] * 24
        table[f"reward/{markup}"] = table["reward"]
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "update", "step": 30, f"loss/{HOSTILE}": 1.0}) + "\n")
    (run_folder / "warnings.jsonl").write_text(json.dumps({"step": HOSTILE, "message": HOSTILE}) + "\n")
    (run_folder / "environment.json").write_text(json.dumps({HOSTILE: [HOSTILE]}))
    (run_folder / "recipe.yaml").write_text(markup)
    page = Page(write_report(run_folder).read_text())
    assert count(page, "script") == 1
    assert count(page, "img") == 0


def test_runs_in_progress_have_a_report(run_folder: Path, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        (run_folder / "evaluations" / f"step-{step:06d}.parquet").unlink()
    assert "There is one evaluation so far" in write_report(run_folder).read_text()
    (run_folder / "evaluations" / "step-000000.parquet").unlink()
    assert "There is no evaluation on held-out prompts yet." in write_report(run_folder).read_text()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.yaml").write_text("")
    Page(write_report(tmp_path / "empty").read_text())


@pytest.mark.parametrize("column", ["reward", "sequence_kl"])
def test_a_run_without_rewards_or_kl(run_folder: Path, column: str) -> None:
    for path in (run_folder / "evaluations").iterdir():
        table = pyarrow.parquet.read_table(path).to_pydict()
        table[column] = [float("nan")] * 24
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    text = write_report(run_folder).read_text()
    assert ("not measured" if column == "sequence_kl" else "unscored") in text
    Page(text)


def test_long_texts_are_cut_and_say_so(run_folder: Path) -> None:
    for path in (run_folder / "evaluations").iterdir():
        table = pyarrow.parquet.read_table(path).to_pydict()
        table["completion"] = ["x" * 5000] * 24
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert "(cut here: 5000 characters)" in write_report(run_folder).read_text()


def test_importing_loads_no_heavy_library() -> None:
    code = (
        "import sys, tropism.evaluation.report; "
        "print([m for m in ('matplotlib', 'jinja2', 'pyarrow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
