"""The graph and the walks are those of the source; how good a walk is agrees with counting by hand."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tropism.envs.randomwalks import INVALID_LENGTH, Graph, RandomWalksConfig, draw, randomwalks, read_graph
from tropism.errors import ConfigError
from tropism.rewards import RewardConfig, RewardHarness
from tropism.types import RewardInputs

SMALL = Graph(max_length=6, successors=((), (2, 3), (0,), (1,)))
"""b -> c, d; c -> a; d -> b. The goal is a."""


def test_the_default_walks_are_those_of_the_source() -> None:
    """The digest and the mean were made with numpy's rand, randint and choice and networkx's shortest_path."""
    graph, walks = draw(RandomWalksConfig())
    assert walks[:3] == ["oseotba", "qka", "jrmhnba"]
    assert hashlib.sha256("\n".join(walks).encode()).hexdigest()[:16] == "1a78d3a2a820adc1"
    assert sum(map(len, graph.successors)) == 42
    assert np.mean([graph.optimality(walk) for walk in walks]) == pytest.approx(0.790179761904762, abs=1e-12)


def test_neither_drawing_nor_order_matters_to_anything_else() -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].tolist()
    first = draw(RandomWalksConfig(seed=3))
    assert np.random.get_state()[1].tolist() == before
    assert draw(RandomWalksConfig(seed=3)) == first
    assert draw(RandomWalksConfig(seed=4)) != first


def test_walks_end_at_the_goal_or_at_the_limit_and_use_edges_that_are_there() -> None:
    config = RandomWalksConfig(n_nodes=12, max_length=5, p_edge=0.3, seed=1, n_walks=300)
    graph, walks = draw(config)
    assert len(walks) == 300
    for walk in walks:
        nodes = [ord(character) - ord("a") for character in walk]
        assert nodes[0] != 0 and 0 not in nodes[1:-1]
        assert nodes[-1] == 0 or len(nodes) == 5
        assert all(after in graph.successors[node] for node, after in itertools.pairwise(nodes))
    assert {len(walk) for walk in walks} == {2, 3, 4, 5}


@pytest.mark.parametrize("seed", [1002, 1, 2])
def test_shortest_paths_are_those_of_floyd_and_warshall(seed: int) -> None:
    graph, _ = draw(RandomWalksConfig(seed=seed))
    count = len(graph.successors)
    steps = np.full((count, count), np.inf)
    np.fill_diagonal(steps, 0)
    for node, targets in enumerate(graph.successors):
        steps[node, list(targets)] = 1
    for via in range(count):
        for one in range(count):
            for other in range(count):
                steps[one, other] = min(steps[one, other], steps[one, via] + steps[via, other])
    assert graph.shortest == tuple(int(number) + 1 for number in steps[:, 0])


@pytest.mark.parametrize(
    ("walk", "length", "optimality"),
    [
        ("bca", 3, 1.0),
        ("ca", 2, 1.0),
        ("dbca", 4, 1.0),
        ("a", 1, 1.0),
        ("bdbca", 5, 1 / 3),  # (6 - 5) / (6 - 3)
        ("bdbdbca", 7, 0.0),  # beyond the limit
        ("bca<eos>", 3, 1.0),  # what follows the goal does not count
        ("bcaaaaaaaa", 3, 1.0),
        ("ba", INVALID_LENGTH, 0.0),
        ("bc", INVALID_LENGTH, 0.0),
        ("bcb", INVALID_LENGTH, 0.0),
        ("zca", INVALID_LENGTH, 0.0),
        ("b ca", INVALID_LENGTH, 0.0),
        ("é", INVALID_LENGTH, 0.0),
        ("", INVALID_LENGTH, 0.0),
    ],
)
def test_how_good_a_walk_is(walk: str, length: int, optimality: float) -> None:
    assert SMALL.length(walk) == length
    assert SMALL.optimality(walk) == pytest.approx(optimality)


def test_a_walk_of_exactly_the_limit_earns_nothing_but_arrives(tmp_path: Path) -> None:
    graph = replace(SMALL, max_length=5)
    (tmp_path / "graph.json").write_text(graph.to_json())
    assert graph.length("bdbca") == 5 and graph.optimality("bdbca") == 0
    assert randomwalks(str(tmp_path), measure="reached")(["b", "b"], ["dbca", "dbdbca"]) == [1.0, 0.0]


def test_every_path_to_the_goal_is_found_once() -> None:
    assert sorted(SMALL.paths(1)) == [(1, 2, 0), (1, 3, 1, 2, 0)]
    assert list(SMALL.paths(2)) == [(2, 0)]
    assert sorted(SMALL.paths(3)) == [(3, 1, 2, 0), (3, 1, 3, 1, 2, 0)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "graph.json").write_text(SMALL.to_json())
    return tmp_path


def test_a_graph_is_read_back(folder: Path) -> None:
    assert read_graph(folder) == read_graph(folder / "graph.json") == SMALL


def test_the_reward_has_a_name(folder: Path) -> None:
    terms = {m: {"use": "randomwalks", "args": {"graph": str(folder), "measure": m}} for m in ("optimality", "length")}
    inputs = RewardInputs(
        prompts=["b", [{"role": "user", "content": "b"}], "bd"],
        completions=["ca", [{"role": "assistant", "content": "a"}], "bca"],
        completion_ids=[[2, 0], [0], [1, 2, 0]],
        finish_reasons=["eos", "eos", "length"],
    )
    scored = RewardHarness(RewardConfig.of({"terms": terms})).score(inputs)
    assert scored.terms["optimality"].tolist() == pytest.approx([1.0, 0.0, 1 / 3])
    assert scored.terms["length"].tolist() == [3.0, 100.0, 5.0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"edges": None}, "no graph of random walks"),
        ({"edges": {"b": ["c"], "c": ["z"]}}, "'z' is not in list"),
        ({"edges": {"b": ["a"], "d": ["a"]}}, "keys of edges the letters after it"),
        ({"edges": {"b": ["a"], "c": []}}, "node c has no path to the goal"),
        ({"goal": "b"}, "the goal must be 'a'"),
        ({"max_length": "many"}, "invalid literal"),
        ({"max_length": 3}, "node b has no path to the goal of fewer than 3 nodes"),
    ],
)
def test_a_file_that_holds_no_graph_is_refused(changes: dict[str, object], reason: str, folder: Path) -> None:
    content = json.loads((folder / "graph.json").read_text())
    (folder / "graph.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(ConfigError, match=reason) as error:
        read_graph(folder)
    assert str(folder / "graph.json") in str(error.value)


def test_a_file_that_is_damaged_lacks_a_key_or_is_not_there(folder: Path) -> None:
    (folder / "graph.json").write_text('{"goal": "a"}')
    with pytest.raises(ConfigError, match="lacks 'edges'"):
        read_graph(folder)
    (folder / "graph.json").write_text("{")
    with pytest.raises(ConfigError, match="no valid JSON"):
        read_graph(folder)
    with pytest.raises(ConfigError, match="`tropism randomwalks FOLDER` writes one"):
        read_graph(folder / "elsewhere")


def test_a_measure_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="choose one of optimality, length, reached"):
        randomwalks(str(folder), measure="speed")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_nodes": 27}, "every node is a letter"),
        ({"n_nodes": 1}, "every node is a letter"),
        ({"max_length": 2}, "at least 3"),
        ({"n_walks": 0}, "at least 1"),
        ({"p_edge": 0.0}, "p_edge"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, float], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RandomWalksConfig(**changes)  # type: ignore[arg-type]


def test_a_graph_that_cannot_be_drawn_is_no_endless_loop() -> None:
    with pytest.raises(ConfigError, match="raise p_edge"):
        draw(RandomWalksConfig(p_edge=0.001))
