"""The part of a model card that says what a run bought: its evaluation beside the base, and its curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tropism.errors import DataError
from tropism.evaluation.comparison_numbers import measure
from tropism.evaluation.comparison_verdict import counts_text, number_rows, verdict
from tropism.evaluation.number_texts import interval_text
from tropism.evaluation.pictures import Panel, panels_picture
from tropism.evaluation.plots import Series
from tropism.evaluation.run_curves import evaluation_means, training_curve
from tropism.evaluation.run_folder import RunData, is_finite
from tropism.evaluation.summary import summarise, summary_rows
from tropism.export_source import Trained

PICTURE = "training.png"
MOST_ROWS = 12
"""Of the table of steps; of more, some at even distances are shown."""
_HELD_OUT = {
    "eval/reward": "held-out reward",
    "eval/sequence_kl": "sequence KL (nats)",
    "eval/length_mean": "length (tokens)",
    "eval/loss": "held-out loss",
    "eval/accuracy": "held-out accuracy",
}
_TRAINING = {"reward/mean": "reward", "policy/sequence_kl": "sequence KL (nats)", "choice/accuracy": "accuracy"}


def is_limited_to(run: RunData, trained: Trained) -> RunData:
    """What a run knew at the step that is exported, where that is a checkpoint; all of it otherwise."""
    if trained.checkpoint is None or trained.step is None:
        return run
    last = trained.step

    def until(line: Mapping[str, Any]) -> bool:
        return not is_finite(line.get("step")) or line["step"] <= last

    return replace(
        run,
        # Which step is the best is no question where one was chosen.
        metrics=[{k: v for k, v in line.items() if k != "best/step"} for line in run.metrics if until(line)],
        evaluations=[one for one in run.evaluations if one.step <= last],
        comparisons=[one for one in run.comparisons if one.step <= last],
        warnings=[line for line in run.warnings if until(line)],
    )


def evaluation_section(run: RunData) -> list[str]:
    """Before and after on the held-out data, with intervals, and what to keep in mind; empty without an evaluation."""
    if run.comparisons and not run.evaluations:
        return _comparisons(run)
    if not run.evaluations:
        return []
    try:
        summary = summarise(run)
    except DataError:  # other prompts before and after, or none: there is nothing to compare
        return []
    steps = f"step {summary.before.step}" + (f" and step {summary.after.step}" if summary.after else "")
    rows = [row for row in summary_rows(summary) if row[1] or row[2]]
    return [
        "## Evaluation",
        "",
        f"On {summary.before.prompts} held-out prompts, {steps}; step 0 is the model before training. Intervals are"
        " 95 % bootstrap intervals over prompts, and the change is paired: each prompt with itself.",
        "",
        "| | before | after | change |",
        "|---|---|---|---|",
        *(f"| {' | '.join(cell.replace('|', ' ') for cell in row)} |" for row in rows),
        *(["", *(f"- {caution}" for caution in summary.cautions)] if summary.cautions else []),
    ]


def _comparisons(run: RunData) -> list[str]:
    judged = [one for one in run.comparisons if one.items]
    if not judged:
        return []
    first, last = judged[0], next((one for one in judged if one.step == run.best_step), judged[-1])
    before, after = measure(first.items, first.kind), measure(last.items, last.kind)
    late = dict(number_rows(after))
    rows = [(label, interval_text(value), interval_text(late.get(label))) for label, value in number_rows(before)]
    return [
        "## Evaluation",
        "",
        f"On {counts_text(after)}, step {first.step} and step {last.step}; step 0 is the model before training."
        " Indented rows are rules that read nothing. Intervals are 95 % bootstrap intervals.",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(f"| {label.replace('  ', '&nbsp;&nbsp;')} | {one} | {other} |" for label, one, other in rows),
        "",
        *(f"- {sentence}" for sentence in verdict(after)),
    ]


def curves_section(run: RunData, folder: Path) -> list[str]:
    """The picture, drawn into ``folder``, and a small table of steps; empty where nothing was measured."""
    panels = _panels(run)
    table = _table(run)
    if not panels and not table:
        return []
    lines = ["## Curves"]
    if panels:
        panels_picture(panels, folder / PICTURE)
        lines += ["", f"![{' and '.join(title for title, _, _ in panels)} over the steps of training]({PICTURE})"]
    return [*lines, *(["", *table] if table else [])]


def _panels(run: RunData) -> list[Panel]:
    """Reward and KL where the run has them, else losses, and the accuracy of a reward model."""
    losses = [name for name in run.names() if name.startswith("loss/")]
    loss = "loss/total" if "loss/total" in losses else next(iter(losses), "loss/total")
    candidates: list[Panel] = [
        ("Reward", training_curve(*run.series("reward/mean")), evaluation_means(run, "rewards")),
        (
            "Sequence KL to the reference (nats)",
            training_curve(*run.series("policy/sequence_kl")),
            evaluation_means(run, "sequence_kl"),
        ),
        ("Loss", training_curve(*run.series(loss)), _points(run, "eval/loss")),
        ("Accuracy", training_curve(*run.series("choice/accuracy")), _points(run, "eval/accuracy")),
    ]
    known = [panel for panel in candidates if panel[1] or panel[2]]
    return [panel for panel in known if panel[0] != "Loss" or known[0][0] != "Reward"][:2]


def _points(run: RunData, name: str) -> Series | None:
    """A metric of the evaluations, of which no interval is known."""
    steps, values = run.series(name, ("evaluation",))
    return Series(x=steps, y=values, kind="eval") if len(steps) else None


def _table(run: RunData) -> list[str]:
    kinds: Sequence[str] = ("evaluation",)
    columns = _columns(run, _HELD_OUT, kinds)
    if not columns:
        kinds = ("update", "collect")
        losses = {name: name for name in run.names() if name.startswith("loss/")}
        columns = _columns(run, {**_TRAINING, **losses}, kinds)
    steps = sorted({step for values in columns.values() for step in values})
    places = np.linspace(0, len(steps) - 1, min(len(steps), MOST_ROWS)).round().astype(int)
    chosen = [steps[place] for place in np.unique(places)]
    if not chosen:
        return []
    rows = [
        f"| {step:g} | {' | '.join(f'{values[step]:.4g}' if step in values else '' for values in columns.values())} |"
        for step in chosen
    ]
    return [f"| step | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *rows]


def _columns(run: RunData, names: Mapping[str, str], kinds: Sequence[str]) -> dict[str, dict[float, float]]:
    """Label -> step -> value, of the metrics that have any."""
    found = {}
    for name, label in names.items():
        steps, values = run.series(name, kinds)
        if len(steps):
            found[label] = dict(zip(steps.tolist(), values.tolist(), strict=True))
    return found
