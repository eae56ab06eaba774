"""Two processes deal the prompts among them, and measure what one does."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from toxicity.two_meters import CASES, measure_all
from tropism.errors import ConfigError
from tropism.recipe_processes import processes_for_measuring
from tropism.toxicity.result import ToxicityResult
from two_started import start_two

SCRIPT = Path(__file__).with_name("two_meters.py")


@pytest.mark.distributed
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    start_two(SCRIPT, tmp_path / "two")
    measure_all(tmp_path / "one")
    for name in CASES:
        one, two = (
            pq.read_table(tmp_path / count / name / "responses.parquet").to_pylist() for count in ("one", "two")
        )
        assert one == two
        first, second = (ToxicityResult.load(tmp_path / count / name) for count in ("one", "two"))
        assert first.metrics == second.metrics and first.identity == second.identity


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ConfigError, match="without --use_fsdp"):
        processes_for_measuring("cpu")
