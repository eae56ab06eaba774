"""From the steps that were measured to the numbers that are reported: medians, spread, shares, ratios."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.runner import Steps
from benchmarks.work import SYSTEMS, TRL_PPO_OVER_GRPO, Work

PPO_NOTE = (
    "TRL 1.16 has no PPO trainer; the peer is its GRPO with defaults on W1 in this run, times 24.8/15.3, the published "
    "ratio of TRL 1.12's PPO (its last) to it"
)


def summarise(work: Work, results: Mapping[str, Steps], limits: Mapping[str, Any]) -> dict[str, Any]:
    """One work as it is written to JSON.

    Args:
        limits: of the machine, with the model's weights in matrix products.
    """
    flops = work.flops(limits["body_weights"], limits["head_weights"])
    systems = {}
    for name, steps in results.items():
        # bf16 is no slower than fp32: a CPU without units for it can compute in fp32 and round.
        rate = max(limits["gemm_gflops"][kind] for kind in {"fp32", SYSTEMS[name].precision})
        systems[name] = _numbers(steps, work, flops / 1e9, rate) if steps.clean else {"error": steps.error}
    return {
        "name": work.name,
        "title": work.title,
        "tokens": work.tokens,
        "gflop": flops / 1e9,
        "systems": systems,
        "ratios": {},
        "peer_note": None,
    }


def _numbers(steps: Steps, work: Work, gflop: float, rate: float) -> dict[str, Any]:
    seconds = [step["seconds"] for step in steps.clean]
    middle = median(seconds)
    names = dict.fromkeys(name for step in steps.clean for name in step["stages"])
    stages = {name: median(step["stages"].get(name, 0.0) for step in steps.clean) for name in names}
    measured = [step["seconds"] / total for step in steps.clean if (total := sum(step["stages"].values())) > 0]
    assert steps.first is not None
    return {
        "seconds": seconds,
        "median": middle,
        "min": min(seconds),
        "max": max(seconds),
        "first_step": steps.first["seconds"],
        "first_over_steady": steps.first["seconds"] / middle,
        "load_seconds": steps.load_seconds,
        "stages": stages,
        "step_over_stages": median(measured) if measured else None,
        "tokens_per_second": work.tokens / middle,
        "peak_memory_gb": max(step["peak_memory_gb"] for step in [steps.first, *steps.clean]),
        "share_of_gemm_limit": gflop / middle / rate,
        "error": steps.error,
    }


def add_ratios(works: Mapping[str, dict[str, Any]]) -> None:
    """Put the ratios of every work into it: the peer's best clean step over our median.

    ``same_class`` compares with peers in our precision, ``any_class`` with the best of all. For PPO, see ``PPO_NOTE``.
    """
    for work in works.values():
        ours = {name: entry for name, entry in _measured(work).items() if SYSTEMS[name].ours}
        peers = {name: entry["min"] for name, entry in _measured(work).items() if not SYSTEMS[name].ours}
        if work["name"] == "ppo-w1":
            work["peer_note"] = PPO_NOTE
            grpo = _measured(works["grpo-w1"]) if "grpo-w1" in works else {}
            if "trl-defaults" in grpo:
                peers = {"trl-defaults": grpo["trl-defaults"]["min"] * TRL_PPO_OVER_GRPO}
        for name, entry in ours.items():
            # The estimate of PPO is one for both precisions.
            same = [p for p in peers if SYSTEMS[p].precision == SYSTEMS[name].precision or work["name"] == "ppo-w1"]
            work["ratios"][name] = {
                "same_class": _against(same, peers, entry["median"]),
                "any_class": _against(list(peers), peers, entry["median"]),
            }


def _measured(work: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in work["systems"].items() if "median" in entry}


def _against(names: list[str], peers: Mapping[str, float], seconds: float) -> dict[str, Any] | None:
    if not names:
        return None
    best = min(names, key=peers.__getitem__)
    return {"peer": best, "peer_seconds": peers[best], "ratio": peers[best] / seconds}
