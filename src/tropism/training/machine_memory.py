"""How much memory there is for this process: of a CUDA device, of the machine, or what a container allows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Names of limit, use and reclaimable cache under control groups of version 2 and 1."""


@dataclass(frozen=True, kw_only=True)
class MachineMemory:
    """Bytes of memory that a device has."""

    available: int
    """What a run could still take, with what this process has taken already for the device."""
    total: int
    """What exists; on the host swap counts too."""


def machine_memory(device: torch.device, *, held: int, sharing: int = 1) -> MachineMemory | None:
    """Memory of the device, or None where the system does not say.

    Args:
        device: CUDA devices have their own memory; everything else is taken to use the host's.
        held: bytes of tensors that are part of the run and exist already.
        sharing: processes of this run that use the same memory.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return MachineMemory(available=free + torch.cuda.memory_reserved(device), total=total)
    host = host_memory()
    if host is None:
        return None
    return MachineMemory(available=host.available // sharing + held, total=host.total // sharing)


def host_memory(root: Path = Path("/")) -> MachineMemory | None:
    """The machine's memory within what control groups (containers, job schedulers) allow; None where unknown.

    Args:
        root: where /proc and /sys are found.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return _physical()
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if rest}
    total, swap = kilobytes["MemTotal"] * 1024, kilobytes.get("SwapTotal", 0) * 1024
    available = kilobytes.get("MemAvailable", kilobytes["MemFree"]) * 1024
    for limit, free in _group_limits(root):
        total, available = min(total, limit), min(available, free)
    return MachineMemory(available=available, total=total + swap)


def _physical() -> MachineMemory | None:
    """Systems without /proc say how much memory is built in; how much of it is free they do not."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return MachineMemory(available=total, total=total)


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) of every control group that this process is in and that has a limit."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [mounts, mounts / "unified"]
        elif "memory" in controllers.split(","):
            tops = [mounts / "memory"]
        else:
            continue
        for top in tops:
            # In a container the path may be that of the host: then the group itself is mounted at the top.
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if top in (folder, *folder.parents):
                    yield from _limit_of(folder)


def _limit_of(group: Path) -> Iterator[tuple[int, int]]:
    for limit_name, used_name, cache_name in _LIMITS:
        try:
            limit = int((group / limit_name).read_text())  # "max" is no number
            used = int((group / used_name).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        yield limit, max(0, limit - used + int(stat.get(cache_name, 0)))
