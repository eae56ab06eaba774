"""The results as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("system", "s/step", "min-max", "tokens/s", "roll", "reward", "logp", "update", "step/sum", "first", "GB")
STAGES = ("rollout", "reward", "logprobs", "update")


def print_limits(machine: Mapping[str, Any], console: Console) -> None:
    """What the machine can do."""
    rates = machine["gemm_gflops"]
    console.print(
        f"{machine['device_name']} ({machine['cpu_capability']}), {machine['threads']} threads, "
        f"{machine['memory_gb']:.0f} GB: fp32 "
        f"{rates['fp32']:.0f}, bf16 {rates['bf16']:.0f} GFLOP/s, reads {machine['read_gb_per_s']:.0f} GB/s"
    )


def print_work(work: Mapping[str, Any], console: Console) -> None:
    """One work: a row per system."""
    table = Table(title=f"{work['title']} ({work['tokens']} tokens, {work['gflop']:.0f} GFLOP)", title_justify="left")
    for name in (*COLUMNS, "of limit", "ratio", "to best"):
        table.add_column(name, justify="left" if name == "system" else "right")
    missing = []
    for name, entry in work["systems"].items():
        if "median" not in entry:
            missing.append(f"{name}: {entry['error'].splitlines()[-1]}")
            continue
        ratios = work["ratios"].get(name, {})
        table.add_row(
            name,
            f"{entry['median']:.3g}",
            f"{entry['min']:.3g}-{entry['max']:.3g}",
            f"{entry['tokens_per_second']:.0f}",
            *(f"{entry['stages'][stage]:.3g}" if stage in entry["stages"] else "" for stage in STAGES),
            "" if entry["step_over_stages"] is None else f"{entry['step_over_stages']:.2f}",
            f"{entry['first_over_steady']:.2f}x",
            f"{entry['peak_memory_gb']:.2f}",
            f"{100 * entry['share_of_gemm_limit']:.0f} %",
            _ratio(ratios.get("same_class")),
            _ratio(ratios.get("any_class")),
        )
    console.print(table)
    for line in (*missing, work["peer_note"]):
        if line:
            console.print(line)


def _ratio(against: Mapping[str, Any] | None) -> str:
    return "" if against is None else f"{against['ratio']:.2f}x"
