"""tropism randomwalks FOLDER"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from tropism.commands.console import console
from tropism.envs.randomwalks import RandomWalksConfig


@dataclass(frozen=True, kw_only=True)
class Options(RandomWalksConfig):
    """Write the toy task of random walks: a graph, walks on it, and a small untrained model of their letters.

    The recipes in recipes/randomwalks learn shortest paths from it, by sft, ppo, grpo and ilql.
    """

    folder: tyro.conf.Positional[Path]
    """The folder to write; a new or an empty one."""
    n_layer: int = 6
    """Blocks of the model."""
    n_embd: int = 144
    """Width of the model."""
    n_head: int = 12
    """Attention heads of the model."""


def run(arguments: Sequence[str]) -> None:
    """Write the folder, and say what the task is."""
    options = tyro.cli(Options, args=arguments, prog="tropism randomwalks", description=Options.__doc__)
    from tropism.commands.quiet import quieten_libraries
    from tropism.envs.randomwalks_model import write_randomwalks

    quieten_libraries()
    size = {"n_layer": options.n_layer, "n_embd": options.n_embd, "n_head": options.n_head}
    graph, walks = write_randomwalks(options.folder, options, **size)
    scores = [graph.optimality(walk) for walk in walks]
    edges, shortest = sum(map(len, graph.successors)), [graph.shortest[start] for start in graph.starts]
    out = console()
    for line in (
        f"graph: {len(graph.successors)} nodes, {edges} edges; the shortest paths to a have {min(shortest)} to "
        f"{max(shortest)} nodes",
        f"walks: {len(walks):,}, of which {sum(score > 0 for score in scores):,} earn something and "
        f"{sum(score == 1 for score in scores):,} are shortest paths; mean optimality {sum(scores) / len(scores):.3f}",
        f"written: {options.folder}",
        "next: tropism train recipes/randomwalks/sft.yaml",
    ):
        out.print(line, soft_wrap=True)
