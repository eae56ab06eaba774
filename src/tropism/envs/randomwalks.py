"""Random walks: short paths through a drawn graph, learned from walks that wander, with every path's quality known.

The graph and the walks are those of trlX's example of the same name (https://github.com/CarperAI/trlx), number for
number, which follows the toy task of the Decision Transformer (https://arxiv.org/abs/2106.01345). Nodes are letters, a
walk is a text such as ``dka``, and node ``a`` is where every walk should go.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from tropism.errors import ConfigError
from tropism.texts import plain_text

GOAL = 0
"""The node to reach; no edge leaves it."""
INVALID_LENGTH = 100
"""The length of a walk that takes an edge that is not there, or never reaches the goal."""
MOST_NODES = 26
"""One letter each."""
MOST_DRAWS = 10_000
"""Graphs drawn before giving up on one from which every node reaches the goal."""

Measure = Literal["optimality", "length", "reached"]


@dataclass(frozen=True, kw_only=True)
class RandomWalksConfig:
    """What is drawn; the defaults are the source's."""

    n_nodes: int = 21
    """Nodes of the graph, the goal among them; 2 to 26."""
    max_length: int = 10
    """Most nodes of a walk, its first and last included."""
    n_walks: int = 1000
    """Walks to draw."""
    p_edge: float = 0.1
    """Probability of an edge from one node to another."""
    seed: int = 1002
    """The graph and the walks follow from it, the same on every machine."""

    def __post_init__(self) -> None:
        if not 2 <= self.n_nodes <= MOST_NODES:
            raise ConfigError(f"n_nodes is {self.n_nodes}; choose 2 to {MOST_NODES}: every node is a letter")
        if self.max_length < 3:
            raise ConfigError(f"max_length is {self.max_length}; it must be at least 3, or no walk could be improved")
        if self.n_walks < 1:
            raise ConfigError(f"n_walks is {self.n_walks}; it must be at least 1")
        if not 0 < self.p_edge <= 1:
            raise ConfigError(f"p_edge is {self.p_edge}; it must lie above 0 and not above 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it must lie between 0 and 2**32 - 1")


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Where one can go from each node, and how good a walk is."""

    max_length: int
    """Most nodes of a walk that counts."""
    successors: tuple[tuple[int, ...], ...]
    """For each node the nodes that an edge leads to, in ascending order; none for the goal."""

    def __post_init__(self) -> None:
        nodes = len(self.successors)
        if not 2 <= nodes <= MOST_NODES:
            raise ConfigError(f"the graph has {nodes} nodes; it must have 2 to {MOST_NODES}")
        if any(not 0 <= target < nodes for targets in self.successors for target in targets):
            raise ConfigError("an edge of the graph leads to a node that it does not have")
        if self.successors[GOAL]:
            raise ConfigError("an edge of the graph leaves its goal")
        for start in self.starts:
            if self.shortest[start] >= self.max_length:
                raise ConfigError(
                    f"node {letter(start)} has no path to the goal of fewer than {self.max_length} nodes, so nothing "
                    "says how good a walk from there is"
                )

    @property
    def starts(self) -> range:
        """Every node but the goal."""
        return range(1, len(self.successors))

    @cached_property
    def shortest(self) -> tuple[int, ...]:
        """Nodes of the shortest path from each node to the goal, both ends included; INVALID_LENGTH without one.

        By breadth-first search from the goal, against the edges.
        """
        lengths = [INVALID_LENGTH] * len(self.successors)
        lengths[GOAL] = 1
        waiting = deque([GOAL])
        while waiting:
            node = waiting.popleft()
            for source, targets in enumerate(self.successors):
                if node in targets and lengths[source] == INVALID_LENGTH:
                    lengths[source] = lengths[node] + 1
                    waiting.append(source)
        return tuple(lengths)

    def length(self, walk: str) -> int:
        """Nodes of a walk up to the goal; INVALID_LENGTH where an edge is missing or the goal is not reached.

        What follows the goal does not count.
        """
        before: int | None = None
        for count, character in enumerate(walk, start=1):
            node = ord(character) - ord("a")
            known = 0 <= node < len(self.successors)
            if not known or (before is not None and node not in self.successors[before]):
                return INVALID_LENGTH
            if node == GOAL:
                return count
            before = node
        return INVALID_LENGTH

    def optimality(self, walk: str) -> float:
        """How close a walk comes to the shortest one from its first node.

            (max_length - length) / (max_length - shortest length)

        1 for a shortest path; 0 for one that is wrong, does not arrive, or takes max_length nodes or more.
        """
        length = self.length(walk)
        if length >= self.max_length:
            return 0.0
        return (self.max_length - length) / (self.max_length - self.shortest[ord(walk[0]) - ord("a")])

    def paths(self, start: int) -> Iterator[tuple[int, ...]]:
        """Every path from a node to the goal of at most ``max_length`` nodes, loops included."""
        waiting: list[tuple[int, ...]] = [(start,)]
        while waiting:
            path = waiting.pop()
            if path[-1] == GOAL:
                yield path
            elif len(path) < self.max_length:
                waiting += [(*path, target) for target in self.successors[path[-1]]]

    def to_json(self) -> str:
        """What ``read_graph`` reads: edges by letters."""
        edges = {letter(node): [letter(target) for target in self.successors[node]] for node in self.starts}
        content = {"goal": letter(GOAL), "max_length": self.max_length, "edges": edges}
        return json.dumps(content, indent=1) + "\n"


def letter(node: int) -> str:
    """The letter that stands for a node."""
    return chr(ord("a") + node)


def draw(config: RandomWalksConfig) -> tuple[Graph, list[str]]:
    """A graph and walks on it, each from a node that is drawn, over edges that are drawn, until the goal or the limit.

    Of numpy's RandomState only methods are used whose numbers are frozen, in widths that do not depend on the machine.

    Raises:
        ConfigError: no graph was found from which every node reaches the goal in fewer than ``max_length`` nodes.
    """
    state = np.random.RandomState(config.seed)
    graph = _draw_graph(config, state)
    return graph, [_draw_walk(graph, state) for _ in range(config.n_walks)]


def _draw_graph(config: RandomWalksConfig, state: np.random.RandomState) -> Graph:
    for _ in range(MOST_DRAWS):
        edges = state.random_sample((config.n_nodes, config.n_nodes)) > 1 - config.p_edge
        np.fill_diagonal(edges, False)
        if not edges.any(axis=1).all():
            continue
        edges[GOAL] = False
        successors = tuple(tuple(int(target) for target in np.flatnonzero(row)) for row in edges)
        try:
            return Graph(max_length=config.max_length, successors=successors)
        except ConfigError:
            continue
    raise ConfigError(
        f"in none of {MOST_DRAWS:,} graphs drawn does every node reach the goal in fewer than {config.max_length} "
        f"nodes; raise p_edge ({config.p_edge:g}) or max_length"
    )


def _draw_walk(graph: Graph, state: np.random.RandomState) -> str:
    def below(number: int) -> int:
        return int(state.randint(number, dtype=np.int64))

    while (node := below(len(graph.successors))) == GOAL:
        pass
    walk = [node]
    while len(walk) < graph.max_length and node != GOAL:
        targets = graph.successors[node]
        node = targets[below(len(targets))]
        walk.append(node)
    return "".join(map(letter, walk))


def read_graph(path: str | Path) -> Graph:
    """The graph of a file ``graph.json``, or of the folder that it is in.

    Raises:
        ConfigError: there is none, or it holds something else.
    """
    file = Path(path) / "graph.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"the graph {file} cannot be read: {error.strerror or error}; `tropism randomwalks FOLDER` writes one"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is no valid JSON: {error}") from error
    try:
        edges = content["edges"]
        letters = [letter(node) for node in range(len(edges) + 1)]
        if content["goal"] != letter(GOAL) or sorted(edges) != letters[1:]:
            raise ConfigError(f"the goal must be {letter(GOAL)!r}, and the keys of edges the letters after it")
        successors = [(), *(tuple(sorted(map(letters.index, edges[name]))) for name in letters[1:])]
        return Graph(max_length=int(content["max_length"]), successors=tuple(successors))
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{file} is no graph of random walks: {reason}") from error


def randomwalks(graph: str, measure: Measure = "optimality") -> Callable[..., list[float]]:
    """How good the walk of prompt and completion is on the graph of ``tropism randomwalks``.

    Args:
        graph: the folder that the command wrote, or its graph.json.
        measure: ``optimality``, 1 for a shortest path and 0 for a wrong one; ``length``, nodes up to the goal, 100 for
            a walk that is wrong or does not arrive; ``reached``, 1 for any path to the goal within the limit, else 0.
    """
    if measure not in get_args(Measure):
        raise ConfigError(f"measure is {measure!r}; choose one of {', '.join(get_args(Measure))}")
    drawn = read_graph(graph)
    measures: dict[str, Callable[[str], float]] = {
        "optimality": drawn.optimality,
        "length": drawn.length,
        "reached": lambda walk: float(drawn.length(walk) <= drawn.max_length),
    }
    of_walk = measures[measure]

    def reward_walks(prompts: list[Any], completions: list[Any]) -> list[float]:
        walks = [plain_text(p) + plain_text(c) for p, c in zip(prompts, completions, strict=True)]
        return [float(of_walk(walk)) for walk in walks]

    return reward_walks
