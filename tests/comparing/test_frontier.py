from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from comparing.made_up import write_cell, write_plan, write_training
from tropism.comparing.charts import colours_of, frontier_chart, training_chart
from tropism.comparing.frontier import best_of_line, exact_frontier, over_training, write_enumeration
from tropism.comparing.results import Comparison
from tropism.errors import DataError

HALF = math.log(0.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_plan(tmp_path / "compare-a", ["sft", "ppo"], [0, 1])


def test_training_is_the_mean_over_seeds_at_the_steps_of_all(folder: Path) -> None:
    write_training(write_cell(folder, "ppo", 0), {0: (0.0, 0.0), 5: (0.4, 1.0), 10: (0.8, 3.0)})
    write_training(write_cell(folder, "ppo", 1), {0: (0.2, 0.0), 10: (1.0, 5.0)})
    write_cell(folder, "sft", 0)
    (line,) = over_training(Comparison.read(folder))
    assert line.name == "ppo"
    assert [(point.step, point.share) for point in line.points] == [(0, 0.0), (10, 1.0)]
    assert [point.reward for point in line.points] == pytest.approx([0.1, 0.9])
    assert [point.kl for point in line.points] == pytest.approx([0.0, 4.0])


def test_without_a_kl_there_are_rewards_over_training_alone(folder: Path) -> None:
    write_training(write_cell(folder, "ppo", 0), {0: (0.0, math.nan), 10: (1.0, math.nan)})
    comparison = Comparison.read(folder)
    assert over_training(comparison) == []
    chart = training_chart(over_training(comparison, kl=False), colours_of(comparison))
    assert chart is not None
    assert chart.series[0].x.tolist() == [0.0, 100.0]


def test_values_of_a_setting_are_one_line(folder: Path) -> None:
    for name, kl, reward in (
        ("ppo", 4.0, 0.5),
        ("ppo@kl_coef=0.1", 2.0, 0.4),
        ("ppo@kl_coef=1", 0.5, 0.1),
        ("sft", 1.0, 0),
    ):
        write_cell(folder, name, 0, [[reward, reward]] * 3, columns={"sequence_kl": [kl] * 6})
    comparison = Comparison.read(folder)
    (line,) = comparison.frontier.over_settings
    assert line.name == "ppo"
    assert [point.kl for point in line.points] == [0.5, 2.0, 4.0]
    assert [point.reward for point in line.points] == pytest.approx([0.1, 0.4, 0.5])
    chart = frontier_chart(comparison.frontier, colours_of(comparison))
    assert chart is not None
    assert {"ppo", "ppo@kl_coef=0.1", "sft"} <= {one.label for one in chart.series}


def test_the_best_of_n_from_the_samples_of_the_base(folder: Path) -> None:
    """Two seeds of two samples each: four of every prompt, in any order."""
    write_cell(folder, "base", 0, [[0.0, 3.0], [1.0, 1.0]])
    write_cell(folder, "base", 1, [[1.0, 2.0], [1.0, 1.0]])
    line = best_of_line(Comparison.read(folder))
    assert line is not None
    # 0 1 2 3: mean 1.5; best of two of four (1 + 2 * 2 + 3 * 3) / 6 = 14 / 6; best of four 3. The other prompt gives 1.
    assert [point.reward for point in line.points] == pytest.approx([1.25, (14 / 6 + 1) / 2, 2.0])
    assert [point.kl for point in line.points] == pytest.approx([0, math.log(2) - 0.5, math.log(4) - 0.75])


def test_without_a_base_or_with_one_sample_there_is_no_best_of_n(folder: Path) -> None:
    write_cell(folder, "sft", 0)
    assert best_of_line(Comparison.read(folder)) is None
    write_cell(folder, "base", 0, [[1.0]] * 6, columns={"prompt": [f"prompt {index}" for index in range(6)]})
    assert best_of_line(Comparison.read(folder)) is None


def test_the_exact_optimum_is_drawn_where_all_completions_are_known(folder: Path) -> None:
    write_cell(folder, "base", 0)
    assert Comparison.read(folder).frontier.exact == ()
    write_enumeration(folder, [[0.0, 1.0]], [[HALF, HALF]])
    comparison = Comparison.read(folder)
    exact = comparison.frontier.exact
    assert exact[0].reward == pytest.approx(0.5, abs=0.02)
    assert exact[-1].reward == pytest.approx(1.0, abs=0.02)
    assert exact[-1].kl == pytest.approx(math.log(2), abs=0.02)
    chart = frontier_chart(comparison.frontier, colours_of(comparison))
    assert chart is not None
    assert "exact optimum" in {one.label for one in chart.series}


def test_rewards_that_are_all_alike_have_one_point() -> None:
    (point,) = exact_frontier([[2.0, 2.0]], [[HALF, HALF]])
    assert (point.kl, point.reward) == (0.0, 2.0)


def test_a_damaged_enumeration_is_named(folder: Path) -> None:
    write_cell(folder, "base", 0)
    for content in ("{", "{}", '{"rewards": [[1.0]], "reference_logprobs": [[-3.0]]}', '{"rewards": 1}'):
        (folder / "exact.json").write_text(content)
        with pytest.raises(DataError, match=r"exact\.json lists no completions"):
            _ = Comparison.read(folder).frontier
    with pytest.raises(ValueError, match="add up to 1"):
        write_enumeration(folder, [[1.0, 2.0]], [[-3.0, -3.0]])


def test_a_damaged_run_is_named(folder: Path) -> None:
    run = write_training(write_cell(folder, "ppo", 0), {0: (0.0, 0.0)})
    (run / "metrics.jsonl").write_text("{\n{}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1"):
        _ = Comparison.read(folder).frontier


def test_an_unmeasured_kl_leaves_the_method_out(folder: Path) -> None:
    write_cell(folder, "sft", 0, columns={"sequence_kl": np.full(12, math.nan)})
    comparison = Comparison.read(folder)
    assert comparison.frontier.ends == {}
    assert frontier_chart(comparison.frontier, colours_of(comparison)) is None
