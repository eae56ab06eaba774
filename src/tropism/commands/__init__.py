"""The commands of the command line: a name is also the name of its module here, which is imported when it is used."""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "demo": "Turn a small real model toward warm opinions of films and show what it bought; needs no network.",
    "train": "Train by a recipe; any field can be changed by --dotted.key value.",
    "sweep": "Train a recipe with many settings and show which is best; goes on where it was interrupted.",
    "compare": "Train several methods with one model, reward and budget, and show what each bought.",
    "generate": "Complete prompts with a trained run or any model.",
    "evaluate": "Score held-out completions of a run and of the model it started from, or of any model.",
    "toxicity": "Measure how toxic completions are, of one model or before and after training, with intervals.",
    "attribute": "Show which tokens of a prompt drive a completion, and which words drive a reward.",
    "score": "Write a data set with the reward of each record, or with rewarded completions of a model.",
    "export": "Write what a run trained as a plain folder that any server can load; upload it.",
    "convert": "Turn what other programs wrote into what this one reads: OpenAI's checkpoints, label files.",
    "data": "Make prompts or demonstrations of a public data set: RealToxicityPrompts, DIALOCONAN, CONAN.",
    "inspect": "Show a few rows of data as the model sees them: text, tokens, masks, positions.",
    "methods": "List the methods, or the fields of one.",
    "report": "Write the report.html of a run anew.",
    "randomwalks": "Write the toy task of random walks, whose best outcome is known: graph, walks and a tiny model.",
}
"""Name and one line of help, in the order of the help."""
