from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tropism.errors import DataError
from tropism.evaluation.comparison_numbers import measure
from tropism.evaluation.comparison_table import ScoredComparison, table_of
from tropism.evaluation.report import write_report
from tropism.evaluation.reward_model_report import RewardModelPart, reward_model_part
from tropism.evaluation.run_folder import RunData

MARKUP = "</pre><script>alert('x')</script><img src=http://example.org/a onerror=alert(1)>"


def items_at(progress: float, *, kind: str = "choice", count: int = 40) -> list[ScoredComparison]:
    """Scores that follow the hidden quality the more, the further training is."""
    rng = np.random.default_rng(3)
    items = []
    for number in range(count):
        quality = rng.normal(0, 2, 3)
        scores = progress * quality + (1 - progress) * rng.normal(0, 1, 3)
        texts = tuple(f"answer {number}-{place} " + "x" * int(rng.integers(9)) for place in range(3))
        fields: dict[str, Any] = {"choice": int(quality.argmax()), "ratings": tuple(quality)}
        size = 3
        if kind == "rating":
            fields, size = {"target": float(quality[0])}, 1
        if kind == "difference":
            fields, size = {"target": float(quality[1] - quality[0])}, 2
        shown = tuple(float(score) for score in scores[:size])
        items.append(ScoredComparison(prompt=f"question {number}", completions=texts[:size], scores=shown, **fields))
    return items


def write_run(folder: Path, *, kind: Any = "choice", best: int | None = None, facts: bool = True) -> Path:
    (folder / "evaluations").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "recipe.yaml").write_text("algorithm: {name: reward-model}\n")
    lines: list[dict[str, Any]] = []
    for step in range(13):
        if step:
            numbers = {f"loss/{kind}": 1.1 - step / 20, "choice/accuracy": 0.3 + step / 30, "optim/lr": 1e-5}
            lines.append({"kind": "update", "step": step, "updates": step, "samples": 8 * step, **numbers})
        if step % 4 == 0:
            items = items_at(step / 12, kind=kind)
            path = folder / "evaluations" / f"step-{step:06d}.parquet"
            pyarrow.parquet.write_table(pyarrow.table(table_of(items, kind)), path)
            found = measure(items, kind, resamples=0).numbers
            lines.append({"kind": "evaluation", "step": step, **{f"eval/{name}": v.mean for name, v in found.items()}})
    if best is not None:
        lines.append({"kind": "evaluation", "step": 12, "best/step": best})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if facts:
        normalised = {"mean": 0.0123, "std": 0.987, "samples": 2048, "policy": "demo"}
        written = {"text": "completion", "max_length": None, "gain": 0.4, "bias": -0.6, "offset": -0.6}
        (folder / "model" / "reward_model.json").write_text(json.dumps({**written, "normalised": normalised}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "judge")


def part_of(folder: Path) -> RewardModelPart:
    part = reward_model_part(RunData.read(folder))
    assert part is not None
    return part


def body_of(part: RewardModelPart, title: str) -> str:
    return str(next(section.body for section in part.sections if section.title == title))


def figures_of(part: RewardModelPart) -> list[str]:
    return body_of(part, "Learning and calibration").split("<figure>")[1:]


def prompts_of(part: RewardModelPart) -> list[str]:
    return re.findall(r'<p class="text prompt" dir="auto">([^<]*)', body_of(part, "Held-out comparisons"))


def test_what_the_page_shows(folder: Path) -> None:
    text = write_report(folder).read_text()
    rule = max(
        measure(items_at(1.0), "choice", resamples=0).numbers[f"accuracy_{name}"].mean
        for name in ("longest", "shortest", "first", "majority", "chance")
    )
    for wanted in (
        "Accuracy on held-out data", "1.000", f"{rule:.3f}", "better than every rule that reads nothing", "Loss",
        "best rule: always", "Calibration: pairs: the chosen one has the higher score", "predicted probability",
        "Calibration error",
        "Right, and surest of it", "chosen", "rating ", "score ", "gain", "0.4", "-0.6", "0.0123", "0.987",
        "2048 completions of demo", "optim/lr", "40 held-out comparisons", "step 0 to 12", "always the longest",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "There is no evaluation" not in text and "Held-out reward" not in text
    assert "eval/accuracy_longest" in text and ">eval/accuracy<" not in text  # the main ones are shown above alone


def test_the_curves(folder: Path) -> None:
    part = part_of(folder)
    loss, accuracy, pairs, best = figures_of(part)
    assert "<h3>Loss</h3>" in loss and "best rule" not in loss
    for chart in (loss, accuracy):
        assert "</i>training</span>" in chart and "</i>held-out, 95 %</span>" in chart
    assert "</i>best rule: " in accuracy
    for chart in (accuracy, pairs, best):
        assert 'class="curve rule"' in chart
    assert accuracy.count('class="dot eval"') == 4  # steps 0, 4, 8 and 12
    assert 'class="whisker"' in pairs and "predictions of" in pairs
    (section,) = (one for one in part.sections if one.pictures)
    assert list(section.pictures)[:2] == ["loss.png", "accuracy.png"] and len(section.pictures) == 4
    assert all(content.startswith(b"\x89PNG") for content in section.pictures.values())


def test_right_and_wrong_ones_are_shown_with_their_scores(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "judge", best=4)
    items = items_at(4 / 12)

    def sure(item: ScoredComparison) -> float:
        shares = np.exp(np.array(item.scores))
        return float(shares.max() / shares.sum())

    right = sorted((one for one in items if np.argmax(one.scores) == one.choice), key=sure)[::-1]
    wrong = sorted((one for one in items if np.argmax(one.scores) != one.choice), key=sure)[::-1]
    part = part_of(folder)
    assert "step 0 to 4" in part.lead  # the best one
    assert prompts_of(part) == [one.prompt for one in (*right[:3], *wrong[:3])]
    fourth = body_of(part, "Held-out comparisons").split('<div class="pair">')[4]
    assert wrong[0].choice is not None
    assert fourth.startswith('<p class="quiet">Wrong, and surest of it</p>')
    sides = fourth.split('<div class="side')[2:]  # after the grid that holds them
    (chosen,) = (side for side in sides if "<b>chosen</b>" in side)
    assert chosen.startswith(" after") and wrong[0].completions[wrong[0].choice].strip() in chosen
    assert f'<p class="quiet">score {max(wrong[0].scores):.2f}, rating ' in sides[0]


@pytest.mark.parametrize(("kind", "title"), [("rating", "Correlation with ratings"), ("difference", "Accuracy")])
def test_numbers_in_place_of_choices(tmp_path: Path, kind: str, title: str) -> None:
    folder = write_run(tmp_path / "judge", kind=kind, facts=False)
    part = part_of(folder)
    assert f"<h3>{title} on held-out data</h3>" in part.lead and "Calibration error" not in part.lead
    assert [re.search("<h3>([^<]*)", one)[1] for one in figures_of(part)] == ["Mean squared error", title]  # type: ignore[index]
    assert "The reward model" not in [section.title for section in part.sections]
    items = items_at(1.0, kind=kind)
    errors = [abs((one.scores[-1] - one.scores[0] * (len(one.scores) == 2)) - (one.target or 0)) for one in items]
    assert prompts_of(part)[0] == items[int(np.argmin(errors))].prompt
    assert '<p class="quiet">Farthest from the label' in body_of(part, "Held-out comparisons").split('class="pair"')[-1]
    assert "mean squared error" in write_report(folder).read_text()


def test_a_run_in_progress_and_a_model_without_a_scale(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "judge")
    for step in (4, 8, 12):
        (folder / "evaluations" / f"step-{step:06d}.parquet").unlink()
    (folder / "evaluations" / "step-000004.parquet").write_bytes(b"PAR1 and no more")
    written = json.loads((folder / "model" / "reward_model.json").read_text())
    (folder / "model" / "reward_model.json").write_text(json.dumps({**written, "normalised": None}))
    text = write_report(folder).read_text()
    assert "not yet" in text and "no known scale" in text and "step-000004.parquet is no readable" in text


def test_an_evaluation_without_rows_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "judge")
    empty = pyarrow.table(table_of(items_at(0.0), "choice")).slice(0, 0)
    pyarrow.parquet.write_table(empty, folder / "evaluations" / "step-000004.parquet")
    with pytest.raises(DataError, match="step-000004"):
        write_report(folder)


def test_everything_foreign_is_escaped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "judge")
    items = [
        ScoredComparison(prompt=MARKUP, completions=(MARKUP, MARKUP), scores=(1.0, 2.0), choice=number % 2)
        for number in range(4)
    ]
    for path in (folder / "evaluations").iterdir():
        pyarrow.parquet.write_table(pyarrow.table(table_of(items, "choice")), path)
    facts = {"text": MARKUP, "gain": 1.0, "normalised": {"samples": MARKUP, "policy": MARKUP}}
    (folder / "model" / "reward_model.json").write_text(json.dumps(facts))
    text = write_report(folder).read_text()
    assert "<img" not in text and text.count("<script>") == 1
