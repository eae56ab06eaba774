"""The hooks of a method are called exactly when the design says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import ON_POLICY, SETTINGS, Setting, assemble, execute
from tropism.algorithms.base import Algorithm, Signal
from tropism.build import Assembly


def spy(assembly: Assembly) -> Counter[str]:
    """Counts the calls of every hook, with a subclass of the method's own class."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        def hook(self: Any, *arguments: Any) -> Any:
            calls[name] += 1
            return getattr(super(Spy, self), name)(*arguments)

        return hook

    names = ("prepare", "loss", "weight", "make_batch", "after_step", "after_collect")
    kind: type[Algorithm[Any]] = type(assembly.algorithm)
    hooks = {name: counted(name) for name in names if hasattr(kind, name)}
    Spy: Any = type("Spy", (kind,), hooks)  # noqa: N806
    assembly.algorithm.__class__ = Spy
    return calls


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_call_counts(setting: Setting, tmp_path: Path) -> None:
    assembly = assemble(setting, tmp_path / "run", trainer={"micro_batch_size": 2})
    calls = spy(assembly)
    counts = execute(assembly).trainer.counts
    assert calls["after_step"] == calls["prepare"] == calls["weight"] == counts.updates
    assert calls["loss"] == 2 * counts.updates
    assert calls["after_collect"] == counts.collects == counts.steps
    if setting.algorithm.on_policy:
        assert (counts.steps, counts.updates, counts.samples) == (2, 8, 16)
        assert calls["make_batch"] == (2 if setting.on_policy else counts.updates)
    else:
        assert (counts.steps, counts.updates, counts.samples) == (4, 4, 16)


@pytest.mark.parametrize("method", ON_POLICY)
def test_after_step_may_end_the_collect(method: str, tmp_path: Path) -> None:
    assembly = assemble(Setting(method, False, "llama"), tmp_path / "run", total_steps=3)
    updates = []

    def after_step(policy: Any, metrics: dict[str, float]) -> Signal:
        updates.append(metrics["policy/approx_kl"])
        return Signal.END_COLLECT if len(updates) in (1, 6) else Signal.CONTINUE

    calls = spy(assembly)
    assembly.algorithm.after_step = after_step
    counts = execute(assembly).trainer.counts
    # The first collect ends after one update, the second has its four, the third ends after one.
    assert (counts.steps, counts.updates) == (3, 6)
    assert calls["after_collect"] == calls["make_batch"] == 3
    assert counts.samples == 24


@pytest.mark.parametrize("method", ON_POLICY)
def test_target_kl_ends_the_collect_after_the_update_that_exceeds_it(method: str, tmp_path: Path) -> None:
    setting = Setting(method, False, "llama")
    assembly = assemble(setting, tmp_path / "run", algorithm=setting.with_algorithm(target_kl=1e-9))
    # The first minibatch is measured before any update (only rounding lies between), the second after the first.
    assert execute(assembly).trainer.counts.updates < 8
