"""The table of one evaluation with a column per way to sample."""

from __future__ import annotations

from collections.abc import Callable

from tropism.evaluation.number_texts import interval_text, number_text
from tropism.evaluation.summary import Snapshot

OWN = "own sampling"
"""The label of the sampling that others are changes of."""

_NUMBERS: dict[str, Callable[[Snapshot], str]] = {
    "reward": lambda one: interval_text(one.reward),
    "sequence KL (nats)": lambda one: interval_text(one.sequence_kl),
    "length (tokens)": lambda one: number_text(one.length, ".1f"),
    "distinct word pairs": lambda one: number_text(one.distinct_2, ".1%"),
}


def sampling_table(snapshot: Snapshot) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The labels of the columns, the own sampling first, and rows of a name with one text per column.

    Rows without any number are left out; a single reward term is the reward itself.
    """
    columns = {OWN: snapshot, **snapshot.settings}
    rows = [(name, [text(one) for one in columns.values()]) for name, text in _NUMBERS.items()]
    for kind, least in (("terms", 2), ("metrics", 1)):
        names = dict.fromkeys(name for one in columns.values() for name in getattr(one, kind))
        for name in names if len(names) >= least else ():
            label = f"reward term {name}" if kind == "terms" else f"metric {name}"
            rows.append((label, [interval_text(getattr(one, kind).get(name)) for one in columns.values()]))
    return list(columns), [row for row in rows if any(row[1])]
