"""``python -m benchmarks scaling``: how tokens per second grow with batch, length and model size, as plots and JSON."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner import ROOT, Settings, run_work
from benchmarks.standard import add_common, circumstances, measured_limits, prepare, public, slug, write
from benchmarks.summary import summarise
from benchmarks.work import SYSTEMS, Kind, Work

BATCHES, LENGTHS, SIZES = (1, 4, 16, 64), (32, 64, 256, 1024), ("0.3M", "3M", "30M", "135M")
PROMPT_TOKENS = 16
AXES = {"rows": "rows at once", "length": "tokens per row", "size": "parameters"}
KINDS: tuple[Kind, ...] = ("rollout", "sft")
TITLES = {"rollout": "rollout", "sft": "update"}


@dataclass(frozen=True)
class Point:
    """One place on the plots."""

    rows: int = 16
    length: int = 64
    size: str = "30M"

    def work(self, kind: Kind) -> Work:
        """That many rows of that many new tokens after a short prompt, or texts of that many tokens to learn from."""
        return Work(
            name=f"{kind}-{self.rows}x{self.length}-{self.size}",
            title=f"{TITLES[kind]} {self.rows} x {self.length}, {self.size}",
            kind=kind,
            prompts=self.rows,
            group=1,
            prompt_tokens=PROMPT_TOKENS if kind == "rollout" else 0,
            lengths=(self.length,) * self.rows,
            model=self.size,
        )


def points() -> dict[str, list[Point]]:
    """The points along every axis; all three lines meet in the default point."""
    return {
        "rows": [Point(rows=rows) for rows in BATCHES],
        "length": [Point(length=length) for length in LENGTHS],
        "size": [Point(size=size) for size in SIZES],
    }


def main(arguments: Sequence[str]) -> None:
    """Measure within the given minutes, cheap points first, then write JSON and plots."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="tropism-bench-") as scratch:
        settings = Settings(
            device=options.device,
            threads=options.threads,
            repeats=options.repeats,
            scratch=Path(scratch),
            timeout=options.timeout,
            report=lambda line: print(line, flush=True),
        )
        result = measure(settings, options.precision, options.minutes)
    name = slug(next(iter(result["limits"].values()))["device_name"], options.device)
    out = options.out or ROOT / "benchmarks" / "results" / f"scaling-{name}.json"
    write(out, result)
    plots = [plot(result, kind, options.images) for kind in KINDS]
    print(f"written to {out}, {', '.join(str(path) for path in plots)}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    add_common(parser)
    parser.add_argument("--repeats", type=int, default=2, help="clean steps of each point, after one to warm up")
    parser.add_argument("--minutes", type=float, default=12.0, help="no point is begun after that time")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/scaling-<device>-<date>.json")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="folder of the plots")
    return parser.parse_args(arguments)


def measure(settings: Settings, precision: str, minutes: float) -> dict[str, Any]:
    """Every point by tropism, rollouts by ``generate`` of transformers too."""
    deadline = time.monotonic() + 60 * minutes
    machine = measured_limits(settings)
    limits = {size: machine | prepare(size, settings) for size in SIZES}
    measured: dict[str, dict[str, Any]] = {}
    for point in in_order():
        for kind in KINDS:
            work = point.work(kind)
            names = systems_of(precision) if settings.device == "cpu" else systems_of(precision)[:2]
            systems = [SYSTEMS[name] for name in names if kind in SYSTEMS[name].kinds]
            if time.monotonic() > deadline:
                settings.report(f"{work.name}: left out, the {minutes:g} minutes are over")
                continue
            steps = run_work(work, systems, limits[point.size]["folder"], settings)
            measured[work.name] = summarise(work, steps, limits[point.size])
    return {**circumstances(settings), "precision": precision, "limits": public(limits), "points": measured}


def systems_of(precision: str) -> list[str]:
    """Those on the plots; compiled kernels are in fp32."""
    return [f"tropism-{precision}", f"hf-{precision}", *(["tropism-compiled"] if precision == "fp32" else [])]


def in_order() -> Iterator[Point]:
    """Each point once, the least work first."""
    distinct = {point for line in points().values() for point in line}
    yield from sorted(distinct, key=lambda point: point.rows * point.length * float(point.size.rstrip("M")))


def limit_tokens_per_second(point: Point, kind: Kind, limits: Mapping[str, Any], precision: str) -> float:
    """The most that the machine allows: matrix products at its full rate.

    In a rollout every step also reads all weights at least once, which binds where there are few rows.
    """
    work = point.work(kind)
    machine: dict[str, Any] = limits[point.size]
    body, head = machine["body_weights"], machine["head_weights"]
    seconds: float = work.flops(body, head) / machine["gemm_gflops"][precision] / 1e9
    if kind == "rollout":
        width = 4 if precision == "fp32" else 2
        seconds = max(seconds, point.length * (body + head) * width / machine["read_gb_per_s"] / 1e9)
    return work.tokens / seconds


def plot(result: Mapping[str, Any], kind: Kind, folder: Path) -> Path:
    """One picture per kind: a panel per axis, tokens per second of every system and the machine's limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), dpi=160, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    precision = result["precision"]
    for panel, (axis, line) in zip(panels, points().items(), strict=True):
        there = [point for point in line if point.work(kind).name in result["points"]]
        for name in systems_of(precision):
            values = [_speed(result, point, kind, name) for point in there]
            if any(value is not None for value in values):
                panel.plot([_x(point, axis) for point in there], values, "o-", label=_label(name))
        allowed = [limit_tokens_per_second(point, kind, result["limits"], precision) for point in line]
        panel.plot([_x(point, axis) for point in line], allowed, "k--", linewidth=1, label="limit of the machine")
        panel.set(xscale="log", yscale="log", xlabel=AXES[axis])
        ticks = [_x(point, axis) for point in line]
        panel.set_xticks(ticks, [str(getattr(point, axis)) for point in line])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    base = Point()
    panels[0].set_ylabel("tokens per second")
    panels[0].legend(fontsize=8)
    figure.suptitle(
        f"{TITLES[kind].capitalize()}, {precision}, {result['threads']} threads; elsewhere {base.rows} rows, "
        f"{base.length} tokens, {base.size}",
        fontsize=10,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"scaling-{TITLES[kind]}.png"
    figure.savefig(path)
    return path


def _x(point: Point, axis: str) -> float:
    value = getattr(point, axis)
    return float(value.rstrip("M")) if isinstance(value, str) else float(value)


def _speed(result: Mapping[str, Any], point: Point, kind: Kind, name: str) -> float | None:
    entry = result["points"][point.work(kind).name]["systems"].get(name, {})
    speed: float | None = entry.get("tokens_per_second")
    return speed


def _label(name: str) -> str:
    if name == "tropism-compiled":
        return "tropism, compiled"
    return "tropism" if name.startswith("tropism") else "transformers generate"
