"""Which number of a classifier's logits is the reward: its labels, its kind of head, its scale and its sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tropism.errors import ConfigError
from tropism.rewards.config import closest

Output = Literal["probability", "logit", "log_odds"]
HeadKind = Literal["softmax", "sigmoid", "regression"]
Label = str | int
"""By name, where case does not matter, or by index."""


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """The score of one label or of several together."""

    head: HeadKind
    """How the logits make probabilities: labels that exclude each other, labels each by itself, or not at all."""
    labels: tuple[int, ...]
    """Indices; never all of a softmax, never several of a regression."""
    output: Output
    complement: bool = False
    """1 - p, or minus the logit or log-odds: the reward is for what is not the label."""

    def of(self, logits: Tensor) -> Tensor:
        """[N] from logits [N, labels].

        log-odds = logsumexp(the labels) - logsumexp(the others)    softmax
                 = max(the labels)                                  sigmoid
        p        = sigmoid(log-odds)

        Labels of a softmax exclude each other, so their probabilities add up. Those of a sigmoid head may hold
        together; how often they do is not known, and the largest of their probabilities is what is certain: that at
        least one of them holds is never less probable. No probability is rounded on the way, so log-odds are exact
        where p is 0 or 1 in fp32.
        """
        chosen = logits[:, list(self.labels)]
        if self.head != "softmax":
            score = chosen.amax(dim=-1)
        else:
            score = chosen.logsumexp(dim=-1)
            if self.output != "logit":
                others = [index for index in range(logits.shape[1]) if index not in self.labels]
                score = score - logits[:, others].logsumexp(dim=-1)
        signed = -score if self.complement else score
        return torch.sigmoid(signed) if self.output == "probability" else signed

    @classmethod
    def for_model(
        cls,
        config: Any,
        *,
        label: Label | Sequence[Label] | None = None,
        output: Output | None = None,
        complement: bool = False,
        head: HeadKind | Literal["auto"] = "auto",
    ) -> LabelScore:
        """The score of a classifier by its configuration.

        Args:
            label: None: the only one there is.
            output: None: the logit of a regression, else the probability.
            head: `auto`: what the configuration says.

        Raises:
            ConfigError: no such label, or a combination that no head has.
        """
        check_values(output=output, head=head, complement=complement)
        kind = head_of(config) if head == "auto" else head
        if kind == "softmax" and config.num_labels == 1:
            raise ConfigError(
                "head: the softmax of a single output is always 1; use 'sigmoid' where it tells two classes apart, or "
                "'regression' where it is a score"
            )
        labels = label_indices(config, label)
        if len(labels) > 1 and kind == "regression":
            raise ConfigError("label: the scores of several outputs are no one score; make a term of each")
        if len(labels) == config.num_labels and kind == "softmax":
            raise ConfigError("label: one of all labels always holds, so their reward is the same for every text")
        return cls(head=kind, labels=labels, output=output_of(kind, output), complement=complement)


def check_values(*, output: Any, head: Any, complement: Any) -> None:
    """Refuse what no classifier takes, which can be told before one is loaded.

    Raises:
        ConfigError: names the value, and the closest one that there is.
    """
    for name, value, choices in (
        ("output", output, (*get_args(Output), None)),
        ("head", head, ("auto", *get_args(HeadKind))),
    ):
        if value not in choices:
            raise ConfigError(f"{name}: unknown value {value!r}. {closest(str(value), filter(None, choices))}")
    if not isinstance(complement, bool):
        raise ConfigError(f"complement: expected true or false, not {complement!r}")


def head_of(config: Any) -> HeadKind:
    """The head of a configuration: by its problem type, else a regression where there is a single output."""
    if config.problem_type == "multi_label_classification":
        return "sigmoid"
    return "regression" if config.problem_type == "regression" or config.num_labels == 1 else "softmax"


def output_of(head: HeadKind, output: Output | None) -> Output:
    """The wanted output, or the default of the head.

    Raises:
        ConfigError: a probability of a head that scores on an open scale.
    """
    if head == "regression" and output not in (None, "logit"):
        raise ConfigError(
            f"output: the classifier's head is a regression without probabilities; use 'logit', not {output!r}, or say "
            "head: sigmoid where the model tells two classes apart by a single output"
        )
    return output or ("logit" if head == "regression" else "probability")


def label_indices(config: Any, label: Label | Sequence[Label] | None) -> tuple[int, ...]:
    """The indices of labels given by name (case does not matter) or index, or not at all where there is only one.

    Raises:
        ConfigError: no such label, none given and several to choose from, or one given twice; lists them.
    """
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    listing = ", ".join(f"{index} {name}" for index, name in enumerate(names))
    if label is None:
        if len(names) > 1:
            raise ConfigError(f"label: the classifier has several; choose one of: {listing}")
        return (0,)
    given = [label] if isinstance(label, str | int) else label
    if not isinstance(given, list | tuple) or not given:
        raise ConfigError(f"label: expected a label, or a list of them, not {label!r}; the classifier has: {listing}")
    indices = tuple(_index(entry, names, listing) for entry in given)
    for entry, index in zip(given, indices, strict=True):
        if indices.count(index) > 1:
            raise ConfigError(f"label: {entry!r} is given twice")
    return indices


def _index(label: Any, names: list[str], listing: str) -> int:
    if isinstance(label, str):
        folded = [name.casefold() for name in names]
        if folded.count(label.casefold()) == 1:
            return folded.index(label.casefold())
        if label.isdecimal() and int(label) < len(names):  # from a command line, where every value is text
            return int(label)
        raise ConfigError(f"label: unknown {label!r}. {closest(label, names)}")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(names):
        raise ConfigError(f"label: no label {label!r}; the classifier has: {listing}")
    return label
