"""A real, if very small, language model learns warm stories: the default settings of PPO and GRPO on VADER."""

from __future__ import annotations

from pathlib import Path

import pytest

import tropism
from tiny_runs import logged
from tropism.algorithms import AlgorithmConfig

pytestmark = [pytest.mark.slow, pytest.mark.learning]

OPENINGS = """
Once upon a time, there was
One day, a little girl
Tom had a red
The dog ran to the
Lily was very sad because
In the park, Ben saw
The old man walked
Mia and her mom went
A small bird sat on
Sam did not want to
There was a big storm
The cat looked at the
Anna lost her
Every night, the boy
Max found a box
Two friends went to the
The baby bear was
Sue wanted a new
One morning, the sun
Tim fell down and
The princess lived in
A boy named Jack
The rain came and
Mom said that they
Dad gave him a
The frog jumped into
Lucy saw a dark
In a far away land
The wolf was hungry and
Ben and Mia played
The teacher told them
A little fish swam
It was time for
The girl heard a loud
Spot the dog was
At the beach, they
The bunny could not find
His toy was broken
Grandma made some
Nobody wanted to play
The farmer had a
Once there was a mean
They walked home
The door was locked
Zoe cried when her
A truck came down
The sky was blue
Jim opened the box
""".strip().splitlines()
TRAIN, HELD_OUT = OPENINGS[:32], OPENINGS[32:]

STEPS = {"ppo": 20, "grpo": 12}
"""Steps of 16 prompts: less than a minute on two idle cores."""


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm", [tropism.PPO(), tropism.GRPO(group_size=8)], ids=lambda a: a.name)
def test_default_settings_raise_held_out_warmth(
    algorithm: AlgorithmConfig, seed: int, stories: Path, tmp_path: Path
) -> None:
    tropism.train(
        str(stories),
        algorithm,
        data=TRAIN,
        eval_data=HELD_OUT * 4,
        reward="vader",
        run=tmp_path / "run",
        total_steps=STEPS[algorithm.name],
        prompts_per_step=16,
        sampling=tropism.Sampling(max_new_tokens=40),
        trainer=tropism.TrainerConfig(progress=False),
        seed=seed,
    )
    before, after = (row["eval/reward"] for row in logged(tmp_path / "run", "evaluation"))
    assert before < 0.45
    assert after > 0.8
