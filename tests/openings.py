"""Beginnings of stories that a model of short stories goes on from: 32 to train on and 16 to ask with."""

from __future__ import annotations

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
