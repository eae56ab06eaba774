"""``python -m benchmarks``: the standard works, by us and by the peers, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import physical_cores, versions
from benchmarks.runner import ROOT, Settings, ask, run_work
from benchmarks.summary import add_ratios, summarise
from benchmarks.table import print_limits, print_work
from benchmarks.work import SYSTEMS, WORKS, Job, Work


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write; what is finished is on disk whenever the run ends."""
    options = parse(arguments)
    console = Console(width=max(140, Console().width))
    with tempfile.TemporaryDirectory(prefix="tropism-bench-") as scratch:
        settings = Settings(
            device=options.device,
            threads=options.threads,
            repeats=options.repeats,
            scratch=Path(scratch),
            timeout=options.timeout,
            report=lambda line: print(line, flush=True),
        )
        measure([WORKS[name] for name in options.works], options.systems, options.model, settings, options.out, console)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; names are checked here, before anything is started."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), help="what to measure")
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=[system.name for system in SYSTEMS.values() if system.default],
        help="who does it; each works where it can",
    )
    add_common(parser)
    parser.add_argument("--repeats", type=int, default=5, help="clean steps of each, after one to warm up")
    parser.add_argument("--model", default="demo", help="demo, or a model folder with 32-bit weights")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/<device>-<date>.json")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    return options


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every measurement."""
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of every system; default: the cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where every system computes")
    parser.add_argument("--timeout", type=float, default=900.0, help="most seconds for loading, and for a step")


def measure(
    works: Sequence[Work],
    systems: Sequence[str],
    model: str,
    settings: Settings,
    out: Path | None,
    console: Console,
) -> dict[str, Any]:
    """All works; returns what is written to JSON after each of them."""
    names = dict.fromkeys(work.model for work in works)
    models = {name: prepare(model if name == "main" else name, settings) for name in names}
    machine = measured_limits(settings)
    found: dict[str, dict[str, Any]] = {}
    result = {**circumstances(settings), "model": Path(model).name, "models": public(models), "machine": machine}
    path = out or ROOT / "benchmarks" / "results" / f"{slug(machine['device_name'], settings.device)}.json"
    print_limits(machine, console)
    for work in works:
        doing = [SYSTEMS[name] for name in systems if work.kind in SYSTEMS[name].kinds]
        folder = models[work.model]["folder"]
        if work.kind == "ppo":
            ask(job("reward_model", folder, settings), timeout=settings.timeout)
        results = run_work(work, doing, folder, settings)
        found[work.name] = summarise(work, results, machine | models[work.model])
        add_ratios(found)
        result["works"] = list(found.values())
        write(path, result)
        print_work(found[work.name], console)
    console.print(f"written to {path}")
    return result


def prepare(model: str, settings: Settings) -> dict[str, Any]:
    """Folder and weights of a model, made if need be by a process of its own."""
    return _facts(ask(job("models", model, settings), timeout=settings.timeout))


def measured_limits(settings: Settings) -> dict[str, Any]:
    """The machine and its limits at the threads of the settings."""
    return _facts(ask(job("machine", "", settings), timeout=settings.timeout)) | {"threads": settings.threads}


def _facts(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("event", "load_seconds")}


def public(models: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is written about models: where their folders lie means nothing elsewhere."""
    return {size: {name: value for name, value in facts.items() if name != "folder"} for size, facts in models.items()}


def job(task: str, model: str, settings: Settings) -> Job:
    """A job without a work."""
    return Job(task=task, device=settings.device, threads=settings.threads, scratch=str(settings.scratch), model=model)


def circumstances(settings: Settings) -> dict[str, Any]:
    """How a figure came about."""
    return {
        "command": f"python -m benchmarks {shlex.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "device": settings.device,
        "threads": settings.threads,
        "repeats": settings.repeats,
        "versions": versions(),
    }


def slug(device_name: str, device: str) -> str:
    """The name of a result: cpu or the GPU's, and the day."""
    name = device if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return f"{name}-{date.today().isoformat()}"


def write(path: Path, result: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
