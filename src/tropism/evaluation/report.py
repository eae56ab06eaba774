"""``report.html``: one file without network access that shows what a run bought, and at what price.

The page loads nothing, and its content security policy allows only the style sheet and script that are written here, so
that a completion holding markup can neither run nor fetch anything even if an escape were missed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tropism.evaluation.number_texts import change_text, interval_text
from tropism.evaluation.plots import (
    Column,
    Series,
    evaluation_means,
    histogram,
    line_chart,
    meter,
    reward_kl_picture,
    term_means,
    training_curve,
)
from tropism.evaluation.reward_model_report import reward_model_section
from tropism.evaluation.run_folder import RunData, is_finite
from tropism.evaluation.sampling_table import sampling_table
from tropism.evaluation.summary import (
    KL_FAR,
    KL_LIMIT,
    SamplePair,
    Summary,
    compared,
    sample_pairs,
    summarise,
    summary_rows,
)
from tropism.storage import writing

__all__ = ["Summary", "reward_kl_picture", "sample_pairs", "summarise", "summary_rows", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"
MOST_PAIRS = 100
"""Pairs in the searchable list."""
MOST_CHARACTERS = 4000
"""Of one prompt or completion; what is longer is cut, and says so."""
MOST_MESSAGES = 200
"""Of the warnings; the first ones are shown."""
MOST_CURVES = 200
"""Of the metrics that have no curve of their own above."""
MOST_OF_RECIPE = 100_000
"""Characters of the recipe."""
MAIN_CURVES: tuple[tuple[str, str, Column | None, str | None], ...] = (
    ("Reward", "reward/mean", "rewards", "eval/reward"),
    ("Sequence KL to the reference (nats)", "policy/sequence_kl", "sequence_kl", "eval/sequence_kl"),
    ("Entropy (nats per token)", "policy/entropy", None, None),
    ("Completion length (tokens)", "rollout/length_mean", "lengths", "eval/length_mean"),
    ("Throughput (tokens per second)", "throughput/tokens_per_second", None, None),
)
"""Title, training metric, column of the evaluations, evaluation metric that the column already shows."""
MOST_TERMS = 6
"""Of more terms of the reward the curves stand with the other metrics."""
KL_WORDS = {
    "unknown": "not measured",
    "low": "close to the reference",
    "high": "far from the reference: read the samples",
    "extreme": "very far from the reference: expect text that only the reward likes",
}


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder: one self-contained file that needs no network.

    Args:
        folder: a run folder, finished or in progress.

    Returns:
        The path of the report, which replaces an earlier one.

    Raises:
        DataError: it is no run folder, or what is in it cannot be read or compared.
        StorageError: the report cannot be written.
    """
    run = RunData.read(folder)
    path = run.folder / "report.html"
    unfinished = run.folder / f".report-{os.getpid()}.html"
    page = _render(run).encode("utf-8", errors="replace")
    with writing(path, needed=len(page)):
        try:
            unfinished.write_bytes(page)
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
    return path


def _render(run: RunData) -> str:
    import jinja2  # here, so that importing the package stays fast

    style, script = (_asset(name) for name in ("report.css", "report.js.j2"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    summary = summarise(run) if run.evaluations else None
    judged = reward_model_section(run)
    shown_warnings = run.warnings[:MOST_MESSAGES]
    pairs = [_pair_view(pair) for pair in sample_pairs(run, count=MOST_PAIRS)] if summary else []
    return environment.get_template("report.html.j2").render(
        name=run.folder.resolve().name,
        counters=_counters(run),
        summary=summary,
        judged=judged.view if judged else None,
        verdict=_verdict(summary) if summary else None,
        cautions=summary.cautions if summary else [] if judged else run.skipped,
        rows=summary_rows(summary) if summary else [],
        ways=_ways(summary) if summary else None,
        featured=_featured(run) if summary else [],
        pairs=pairs,
        curves=_main_curves(run),
        more_curves=_more_curves(run, judged.metrics if judged else frozenset()),
        distribution=_distribution(run),
        warnings=[{name: _plain(line.get(name, "")) for name in ("step", "message")} for line in shown_warnings],
        more_warnings=max(0, len(run.warnings) - MOST_MESSAGES),
        environment={_cut(name): _plain(value) for name, value in list(run.environment.items())[:MOST_MESSAGES]},
        recipe=_cut(run.recipe, MOST_OF_RECIPE),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The source expression by which a content security policy allows one inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _plain(value: Any) -> str:
    return _cut(value if isinstance(value, str) else json.dumps(value))


def _counters(run: RunData) -> list[tuple[str, str]]:
    """Steps, updates, samples, tokens and time so far, from the last line that holds each."""
    counters = []
    for name in ("step", "updates", "samples", "tokens", "seconds"):
        values = [line[name] for line in run.metrics if is_finite(line.get(name))]
        if values:
            last = float(values[-1])
            text = f"{int(last // 60)} min {int(last % 60)} s" if name == "seconds" else f"{last:,.0f}"
            counters.append(("time" if name == "seconds" else name, text))
    return counters


def _verdict(summary: Summary) -> dict[str, Any]:
    """The cards on top: reward and KL side by side."""
    before, after = summary.before, summary.after
    kl = after.sequence_kl if after else None
    drawn = (
        meter(kl.mean, limit=KL_LIMIT, level=summary.kl_level, title=f"{kl.mean:.1f} nats, limit {KL_LIMIT:g}")
        if kl
        else ""
    )
    return {
        "prompts": before.prompts,
        "before": f"{before.reward.mean:.2f}" if before.reward else "unscored",
        "after": f"{after.reward.mean:.2f}" if after and after.reward else ("unscored" if after else "not yet"),
        "change": change_text(summary.change),
        "steps": f"step {before.step} to {after.step}" if after else f"step {before.step}",
        "kl": f"{kl.mean:.1f}" if kl else "not measured",
        "kl_interval": interval_text(kl),
        "level": summary.kl_level,
        "kl_words": KL_WORDS[summary.kl_level],
        "meter": drawn,
        "distinct": [_percent(before.distinct_2), _percent(after.distinct_2) if after else "not yet"],
        "far": KL_FAR,
    }


def _ways(summary: Summary) -> dict[str, Any] | None:
    """The table with a column per way to sample, of the newest evaluation that is shown; None where there is one."""
    shown = summary.after or summary.before
    if not shown.settings:
        return None
    labels, rows = sampling_table(shown)
    return {"step": shown.step, "labels": labels, "rows": rows}


def _percent(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "none"


def _featured(run: RunData) -> list[dict[str, Any]]:
    """Three pairs that show the range: the largest gain, the median, the smallest."""
    pairs = sample_pairs(run, count=3)
    labels = ("Largest gain", "Median gain", "Smallest gain") if len(pairs) == 3 else ("",) * len(pairs)
    return [{"label": label, **_pair_view(pair)} for label, pair in zip(labels, pairs, strict=True)]


def _pair_view(pair: SamplePair) -> dict[str, Any]:
    def score(value: float) -> str:
        return f"{value:.2f}" if math.isfinite(value) else "unscored"

    return {
        "prompt": _cut(pair.prompt),
        "before": _cut(pair.before),
        "after": _cut(pair.after),
        "reward_before": score(pair.reward_before),
        "reward_after": score(pair.reward_after),
        "kl_after": f"{pair.kl_after:.1f}" if math.isfinite(pair.kl_after) else "",
        "others": [(label, _cut(text), score(reward)) for label, (text, reward) in pair.others.items()],
        "level": "low" if not pair.kl_after > KL_LIMIT else "high" if pair.kl_after <= KL_FAR else "extreme",
    }


def _cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text for reading: without blanks around it, and cut where it is very long."""
    shown = text.strip(" ")
    if len(shown) <= most:
        return shown
    return f"{shown[:most]} ... (cut here: {len(shown)} characters)"


def _main_curves(run: RunData) -> list[dict[str, Any]]:
    curves = []
    for title, metric, column, _ in MAIN_CURVES:
        lines = training_curve(*run.series(metric))
        points = evaluation_means(run, column) if column else None
        series = [*lines, *([points] if points else [])]
        if series:
            is_kl = metric == "policy/sequence_kl"
            svg = line_chart(series, title=title, limit=KL_LIMIT if is_kl else None, zero=is_kl)
            curves.append({"title": title, "svg": svg, "train": bool(lines), "eval": bool(points), "limit": is_kl})
    frontier = _frontier(run)
    if frontier:
        curves.insert(min(2, len(curves)), frontier)
    return [*curves[:3], *_term_curves(run), *curves[3:]]


def _terms(run: RunData) -> list[str]:
    """Terms of the reward, where there are several: one that follows the reward no longer shows where it is misled."""
    names = list(dict.fromkeys(name for evaluation in run.evaluations for name in evaluation.terms))
    return names if 1 < len(names) <= MOST_TERMS else []


def _term_curves(run: RunData) -> list[dict[str, Any]]:
    curves = []
    for name in _terms(run):
        lines, points = training_curve(*run.series(f"reward/{name}")), term_means(run, name)
        series = [*lines, *([points] if points else [])]
        if series:
            title = f"Reward term {name}"
            svg = line_chart(series, title=title)
            curves.append({"title": title, "svg": svg, "train": bool(lines), "eval": bool(points), "limit": False})
    return curves


def _frontier(run: RunData) -> dict[str, Any] | None:
    """Reward against sequence KL, one point per evaluation: what each nat bought."""
    rewards, kls = evaluation_means(run, "rewards"), evaluation_means(run, "sequence_kl")
    if rewards is None or kls is None:
        return None
    steps, at_reward, at_kl = np.intersect1d(rewards.x, kls.x, return_indices=True)
    if len(steps) < 2 or rewards.low is None or rewards.high is None:
        return None
    path = Series(
        x=kls.y[at_kl],
        y=rewards.y[at_reward],
        low=rewards.low[at_reward],
        high=rewards.high[at_reward],
        kind="eval",
        notes=[f"step {step:g}" for step in steps],
    )
    svg = line_chart([path], title="Held-out reward against sequence KL", x_label="sequence KL (nats)")
    return {"title": "Held-out reward against KL", "svg": svg, "train": False, "eval": True, "limit": False}


def _more_curves(run: RunData, above: frozenset[str]) -> list[dict[str, str]]:
    """Every other metric of the run but those that are shown above, small."""
    above |= {f"{prefix}reward/{name}" for name in _terms(run) for prefix in ("", "eval/")}
    shown = above | {name for curve in MAIN_CURVES for name in curve[1::2]} | {curve[3] for curve in MAIN_CURVES}
    every: Sequence[str] = ("update", "collect", "evaluation")
    names = [name for name in run.names(every) if name not in shown and not name.startswith("best/")]
    return [
        {"title": name, "svg": line_chart(training_curve(*run.series(name, every)), title=name)}
        for name in names[:MOST_CURVES]
    ]


def _distribution(run: RunData) -> str:
    ends = compared(run) if run.evaluations else None
    if ends is None or not all(np.isfinite(one.rewards).any() for one in ends):
        return ""
    return histogram(ends[0].rewards, ends[1].rewards, title="Held-out reward before and after", x_label="reward")
