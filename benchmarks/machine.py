"""What the machine can do: the rate of its matrix products, the rate at which it reads memory, what it is made of."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gate import Gate
from benchmarks.work import Job

GEMM = {"cpu": (1024, 1536, 1728), "cuda": (8192, 8192, 8192)}
"""Rows, columns and inner size of the measured product: on a CPU a layer of a small model over 1,024 tokens."""
READ_BYTES = {"cpu": 2**29, "cuda": 2**32}
PACKAGES = ("tropism", "torch", "transformers", "trl", "accelerate", "peft", "vllm")


def physical_cores() -> int:
    """Physical cores that this process may use; every logical one where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(file.read_text().strip() if file.is_file() else str(cpu))
    return len(siblings)


def versions() -> dict[str, str]:
    """Of Python and every package that takes part and is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def run(job: Job, gate: Gate) -> None:
    """Measure the limits."""
    import torch

    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    gate.ready(
        device_name=torch.cuda.get_device_name(device) if job.device == "cuda" else processor(),
        gemm_shape=list(GEMM[job.device]),
        gemm_gflops={
            "fp32": gemm_gflops(device, torch.float32, gate),
            "bf16": gemm_gflops(device, torch.bfloat16, gate),
        },
        read_gb_per_s=read_gb_per_s(device, gate),
        memory_gb=memory_gb(device),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
    )


def processor() -> str:
    """The name of the CPU."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gb(device: Any) -> float:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def best_seconds(function: Callable[[], Any], gate: Gate, *, at_least: float = 0.5, rounds: int = 5) -> float:
    """The least time of a call, over at least ``rounds`` calls and ``at_least`` seconds, after one to warm up."""
    function()
    times: list[float] = []
    while len(times) < rounds or sum(times) < at_least:
        gate.settle()
        started = time.perf_counter()
        function()
        gate.settle()
        times.append(time.perf_counter() - started)
    return min(times)


def gemm_gflops(device: Any, dtype: Any, gate: Gate) -> float:
    """The best of a plain product and, on a CPU that has it, one with a weight packed beforehand."""
    import torch

    rows, columns, inner = GEMM[device.type]
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    weight = torch.randn(columns, inner, device=device, dtype=dtype)
    ways: list[Callable[[], Any]] = [lambda: torch.nn.functional.linear(x, weight)]
    operators: Any = torch.ops.mkldnn
    with torch.no_grad():
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            try:
                packed = operators._reorder_linear_weight(weight.to_mkldnn(), rows)
                ways.append(lambda: operators._linear_pointwise(x, packed, None, "none", [], ""))
                ways[-1]()
            except (AttributeError, RuntimeError):  # private operators: this release or this CPU has none
                del ways[1:]
        seconds = min(best_seconds(way, gate) for way in ways)
    return 2 * rows * columns * inner / seconds / 1e9


def read_gb_per_s(device: Any, gate: Gate) -> float:
    """Summing a tensor far larger than any cache."""
    import torch

    numbers = torch.ones(READ_BYTES[device.type] // 4, device=device)
    return READ_BYTES[device.type] / best_seconds(numbers.sum, gate) / 1e9
