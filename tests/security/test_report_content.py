"""Run folders with hostile content: a report that runs nothing and stays small, or an error that names the file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tropism.errors import DataError
from tropism.evaluation.pictures import reward_kl_picture
from tropism.evaluation.report import write_report

INJECTIONS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><style>*{background:url(http://example.org/)}</style>",
    "</p></div><img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><a xlink:href='javascript:alert(1)'>x</a></svg>",
    "<a href='javascript:alert(1)'>x</a><iframe srcdoc='<script>alert(1)</script>'></iframe>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)' autofocus='",
    "<base href=http://example.org/><meta http-equiv=refresh content='0;url=http://example.org/'>",
    "<form action=http://example.org/><input type=submit></form><link rel=stylesheet href=http://example.org/>",
    "{{ 7 * 7 }}{% for a in range(10) %}x{% endfor %}{{ self.__init__.__globals__ }}",
    "${alert(1)} #{alert(1)} <%= 7 * 7 %>",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    "<!-- --><![CDATA[ <script>alert(1)</script> ]]><?php echo 1 ?>",
    "\0\x01\x1b[31m\u202e\ufffe\udc80\ud800",
    "expression(alert(1)); url(javascript:alert(1)); } body { display: none",
]


class Page(HTMLParser):
    """Every tag and attribute, and the text, of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def write_table(folder: Path, step: int, **columns: Any) -> Path:
    """One evaluation with the columns that every one has, or others in their place."""
    rows = len(next(iter(columns.values()))) if columns else 2
    plain: dict[str, Any] = {
        "prompt": [f"p{row}" for row in range(rows)],
        "completion": ["a b c"] * rows,
        "reward": [0.5 + row for row in range(rows)],
        "length": [3] * rows,
        "sequence_kl": [0.1] * rows,
        "finish_reason": ["eos"] * rows,
    }
    path = folder / "evaluations" / f"step-{step:06d}.parquet"
    path.parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(pyarrow.table({**plain, **columns}), path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small run folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("model: demo\n")
    lines = [{"kind": "update", "step": step, "updates": step, "reward/mean": 0.1 * step} for step in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (0, 3):
        write_table(folder, step)
    return folder


def clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("attack", INJECTIONS)
def test_nothing_of_a_run_becomes_markup(run: Path, attack: str) -> None:
    plain = Page(write_report(run).read_text(encoding="utf-8"))
    texts = [clean(attack), clean(attack) * 2]
    for step in (0, 3):
        write_table(
            run, step, prompt=texts, completion=texts, finish_reason=texts, **{f"reward/{clean(attack)}": [1.0, 2]}
        )
    line = {"kind": "update", "step": 4, "updates": 4, f"{attack}/mean": 1.0, "reward/mean": 2.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    (run / "warnings.jsonl").write_text(json.dumps({"step": attack, "message": attack}) + "\n")
    (run / "environment.json").write_text(json.dumps({attack: attack, "b": [attack], "c": {attack: 1}}))
    (run / "recipe.yaml").write_text(attack, errors="replace")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert set(page.tags) <= set(plain.tags) | {"li", "ul", "b", "details", "summary", "circle", "polyline", "rect"}
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert page.tags.count("meta") == plain.tags.count("meta")
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcdoc", "action")]
    assert all(re.fullmatch(r"#[a-z0-9-]+", value) for name, value in page.attributes if name == "href")
    assert not [value for _, value in page.attributes if "javascript:" in value or "example.org" in value]
    if "{{" in attack:
        assert "{{ 7 * 7 }}" in page.text and "49" not in page.text


def test_texts_without_end_are_cut(run: Path) -> None:
    long = "x" * 2_000_000
    for step in (0, 3):
        write_table(run, step, prompt=[long, long + "y"], completion=[long, "a"], finish_reason=[long, "eos"])
    (run / "warnings.jsonl").write_text(json.dumps({"step": long, "message": long}) + "\n")
    (run / "environment.json").write_text(json.dumps({"a": long, long: "b", "c": [long]}))
    (run / "recipe.yaml").write_text(long)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "update", "step": 4, f"{long}/mean": 1.0}) + "\n")
    assert write_report(run).stat().st_size < 2_000_000


NUMBERS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e308",
    "-1e308",
    "1e-320",
    "1" * 400,
    "true",
    "null",
    '"x"',
    "[1]",
    "{}",
    "-0.0",
]


KEYS = ["step", "updates", "seconds", "reward/mean", "policy/sequence_kl", "best/step", "kind"]


@pytest.mark.parametrize("number", NUMBERS)
def test_any_number_anywhere_in_the_metrics(run: Path, number: str) -> None:
    lines = ['{"kind": "update", "step": 5, "updates": 5, "' + key + '": ' + number + "}\n" for key in KEYS]
    lines.append('{"kind": "update", "step": 6, "updates": 6, "reward/mean": 1e308, "loss/a": ' + number + "}\n")
    lines.append('{"kind": "evaluation", "step": 6, "eval/reward": ' + number + "}\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(lines)
    report_or_refusal(run)


COLUMNS = ["reward", "length", "sequence_kl", "reward/term"]


@pytest.mark.parametrize(
    "values",
    [
        [float("nan")] * 2,
        [float("inf"), float("-inf")],
        [1e308, -1e308],
        [1e-320, 0.0],
        [None, None],
        [True, False],
        [2**62, -(2**62)],
        [-5.0, 0.0],
    ],
    ids=str,
)
def test_any_number_in_a_column_of_numbers(run: Path, values: list[Any]) -> None:
    for column in COLUMNS:
        write_table(run, 3, **{column: values})
        write_report(run)
    write_table(run, 3, **dict.fromkeys(COLUMNS, values))
    report_or_refusal(run)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize(
    "values",
    [["a", "b"], [[1.0], [2.0, 3.0]], [{"a": 1}] * 2, [b"\xff", b""], [datetime(2026, 1, 1, tzinfo=UTC)] * 2],
    ids=str,
)
def test_a_column_of_numbers_that_holds_none_is_named(run: Path, column: str, values: list[Any]) -> None:
    write_table(run, 3, **{column: values})
    with pytest.raises(DataError, match=rf"step-000003\.parquet: the column '{column}' holds .* where numbers belong"):
        write_report(run)


def report_or_refusal(run: Path) -> None:
    """A report, or an error that names the folder, and never anything else."""
    makers: list[Callable[[], Path]] = [
        lambda: write_report(run),
        lambda: reward_kl_picture(run, run / "picture.png"),
    ]
    for make in makers:
        try:
            make()
        except DataError as error:
            assert str(run) in str(error)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl", "warnings.jsonl", "environment.json"])
@pytest.mark.parametrize(
    "content", ["{", "[" * 100_000 + "\n1", "[]\n{}", "\xff\xfe", "5\n{}", '{"a":' * 9999, "1" * 5000 + "\n{}"]
)
def test_damaged_files_of_a_run_are_named(run: Path, name: str, content: str) -> None:
    """A last line that does not parse is still being written, and left out."""
    (run / name).write_text(content, encoding="latin-1")
    try:
        write_report(run)
        assert name.endswith(".jsonl")
    except DataError as error:
        assert name in str(error)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("column", ["prompt", "completion", "finish_reason"])
@pytest.mark.parametrize(
    "values", [[None, None], [1, 2], [["a"], ["b"]], [b"\xff", b""], ["", ""], [{"a": "<b>"}] * 2], ids=str
)
def test_any_value_in_a_column_of_text(run: Path, column: str, values: list[Any]) -> None:
    for step in (0, 3):
        write_table(run, step, **{column: values})
    report_or_refusal(run)


def test_evaluations_of_other_shapes_are_named(run: Path) -> None:
    path = run / "evaluations" / "step-000003.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), path)
    with pytest.raises(DataError, match=r"step-000003\.parquet: the column 'completion' is missing"):
        write_report(run)
    pyarrow.parquet.write_table(pyarrow.table({}), path)
    with pytest.raises(DataError, match=r"step-000003\.parquet"):
        write_report(run)
    path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    write_report(run)  # left out, as one that is still being written
    write_table(run, 3, prompt=pyarrow.array([], pyarrow.string()))
    report_or_refusal(run)


def test_an_evaluation_that_unpacks_to_more_than_memory_is_refused(run: Path) -> None:
    """Few bytes of Parquet can stand for any number of equal rows."""
    rows = 3_000_000
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int32)), pyarrow.array(["x" * 1000]))
    path = write_table(run, 3, prompt=same)
    assert path.stat().st_size < 10**8
    with pytest.raises(DataError, match=r"step-000003\.parquet: .*rows"):
        write_report(run)


def test_pipes_in_place_of_files_do_not_hang(run: Path) -> None:
    for name in ("metrics.jsonl", "environment.json", "evaluations/step-000003.parquet"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    script = "import sys; from tropism.evaluation.report import write_report; write_report(sys.argv[1])"
    ended = subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 or "DataError" in ended.stderr


@pytest.mark.parametrize(
    "command", [["report", "run"], ["generate", "run", "hi"], ["evaluate", "run"]], ids=lambda words: words[0]
)
def test_the_commands_tell_what_is_wrong_without_a_traceback(run: Path, command: list[str]) -> None:
    write_table(run, 3, reward=["a", "b"])
    (run / "recipe.yaml").write_text("model: {name: model, trust_remote_code: maybe}\nalgorithm: [\x1b[31m]\n")
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text('{"model_type": "\\u001b[31mevil"}')
    ended = subprocess.run(
        [sys.executable, "-m", "tropism.cli", *command], cwd=run.parent, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode not in (0, -6, -9, -11)
    assert "Traceback" not in ended.stderr and "error" in ended.stderr.lower()
    assert "\x1b[31m" not in ended.stderr
