"""Labels, outputs, signs and heads of the classifier reward, against numbers made by hand."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_classifiers import letter_classifier, save_bert
from tropism.errors import ConfigError
from tropism.ops.advantages import group_advantages
from tropism.rewards.label_score import LabelScore
from tropism.rewards.registry import make_reward

FOUR = [2.0, 1.0, 0.0, -1.0]
"""Logits; exp of them is 7.389056, 2.718282, 1, 0.367879: 11.475217 in all."""


def score(head: str, logits: list[list[float]], labels: tuple[int, ...], output: str, **more: bool) -> list[float]:
    wanted: Any = {"head": head, "labels": labels, "output": output, **more}
    scores: list[float] = LabelScore(**wanted).of(torch.tensor(logits)).tolist()
    return scores


def rewards_of(folder: Path, completions: list[str], **args: Any) -> list[float]:
    reward = make_reward("classifier", {"model": str(folder), "device": "cpu", **args})
    return list(reward(prompts=["the"] * len(completions), completions=completions))


@pytest.mark.parametrize(
    ("labels", "output", "complement", "expected"),
    [
        ((1,), "probability", False, 0.236883),  # 2.718282 / 11.475217
        ((1,), "probability", True, 0.763117),
        ((1,), "log_odds", False, -1.169846),  # log(2.718282 / 8.756935)
        ((1,), "log_odds", True, 1.169846),
        ((1,), "logit", True, -1.0),
        ((1, 3), "probability", False, 0.268941),  # 3.086161 / 11.475217
        ((3, 1), "probability", True, 0.731059),
        ((1, 3), "log_odds", False, -1.0),  # log(3.086161 / 8.389056)
        ((1, 3), "logit", False, 1.126928),  # log(3.086161)
    ],
)
def test_softmax(labels: tuple[int, ...], output: str, complement: bool, expected: float) -> None:
    (got,) = score("softmax", [FOUR], labels, output, complement=complement)
    assert got == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("labels", "output", "complement", "expected"),
    [
        ((1,), "probability", False, 0.731059),  # 1 / (1 + exp(-1))
        ((1,), "probability", True, 0.268941),
        ((2, 1), "probability", False, 0.731059),  # the larger of 0.5 and 0.731059
        ((2, 1), "probability", True, 0.268941),
        ((2, 3), "log_odds", False, 0.0),
        ((3,), "log_odds", True, 1.0),
        ((3,), "logit", False, -1.0),
        ((0, 1, 2, 3), "log_odds", True, -2.0),
    ],
)
def test_sigmoid(labels: tuple[int, ...], output: str, complement: bool, expected: float) -> None:
    (got,) = score("sigmoid", [FOUR], labels, output, complement=complement)
    assert got == pytest.approx(expected, abs=1e-6)


def test_several_labels_by_name_in_a_run_of_the_reward(tmp_path: Path) -> None:
    names = {0: "clean", 1: "insult", 2: "threat"}
    folder = save_bert(tmp_path, labels=names, bias=[math.log(2.0), math.log(5.0), math.log(3.0)])
    assert rewards_of(folder, ["good", "very bad ."], label=["Threat", 1]) == pytest.approx([0.8, 0.8])
    assert rewards_of(folder, ["good"], label=["insult", "threat"], complement=True) == pytest.approx([0.2])
    assert rewards_of(folder, ["good"], label="clean", output="log_odds") == pytest.approx([math.log(0.25)])


def test_a_head_that_the_configuration_names_wrongly(tmp_path: Path) -> None:
    """A binary classifier of one output looks like a regression; a multi-label one may not say that it is."""
    one = save_bert(tmp_path / "one", labels={0: "toxic"}, bias=[math.log(4.0)])
    assert rewards_of(one, ["good"]) == pytest.approx([math.log(4.0)])
    assert rewards_of(one, ["good"], head="sigmoid") == pytest.approx([0.8])
    assert rewards_of(one, ["good"], head="sigmoid", complement=True) == pytest.approx([0.2])
    assert rewards_of(one, ["good"], head="sigmoid", output="log_odds") == pytest.approx([math.log(4.0)])
    marked = save_bert(tmp_path / "marked", labels={0: "toxic"}, bias=[0.0], problem_type="multi_label_classification")
    assert rewards_of(marked, ["good"]) == [0.5]
    two = save_bert(tmp_path / "two", labels={0: "rude", 1: "toxic"}, bias=[0.0, math.log(4.0)])
    assert rewards_of(two, ["good"], label="rude") == pytest.approx([0.2])
    assert rewards_of(two, ["good"], label="rude", head="sigmoid") == [0.5]
    assert rewards_of(two, ["good"], label="toxic", head="regression") == pytest.approx([math.log(4.0)])
    numbers = save_bert(tmp_path / "numbers", labels={0: "a", 1: "b"}, bias=[3.0, 4.0], problem_type="regression")
    assert rewards_of(numbers, ["good"], label="b", complement=True) == [-4.0]


@pytest.mark.parametrize(
    ("labels", "args", "message"),
    [
        (1, {"head": "softmax"}, r"head: the softmax of a single output is always 1; use 'sigmoid'"),
        (1, {"output": "log_odds"}, r"regression without probabilities; .*head: sigmoid"),
        (1, {"head": "binary"}, r"head: unknown value 'binary'"),
        (3, {"head": "regression", "label": 0, "output": "probability"}, "regression without probabilities"),
        (3, {"head": "regression", "label": [0, 1]}, "a term of each"),
        (3, {"label": [0, 1, 2]}, "one of all labels always holds"),
        (3, {"label": []}, r"expected a label, or a list of them, not \[\].*0 l0, 1 l1, 2 l2"),
        (3, {"label": {"l0": 1}}, "expected a label, or a list"),
        (3, {"label": ["l0", 0]}, "'l0' is given twice"),
        (3, {"label": ["l0", "l9"]}, "label: unknown 'l9'"),
        (3, {"label": [0, 3]}, "no label 3"),
        (3, {"label": 1.0}, "expected a label, or a list"),
        (3, {"label": [True]}, "no label True"),
        (3, {"label": 0, "complement": 1}, "complement: expected true or false, not 1"),
        (3, {"label": 0, "empty": True}, "empty: expected 'read', a number"),
        (3, {"label": 0, "empty": float("nan")}, "empty: expected 'read', a number"),
        (3, {"label": 0, "empty": "reed"}, "empty: expected 'read', a number"),
        (3, {"label": 0, "dtype": "bf16"}, "dtype: unknown value 'bf16'"),
    ],
)
def test_what_cannot_be(tmp_path: Path, labels: int, args: dict[str, Any], message: str) -> None:
    folder = save_bert(tmp_path, labels={index: f"l{index}" for index in range(labels)})
    with pytest.raises(ConfigError, match=rf"reward 'classifier': .*{message}"):
        rewards_of(folder, ["good"], **args)


def test_weights_in_another_precision(tmp_path: Path) -> None:
    folder = save_bert(tmp_path, labels={0: "clean", 1: "toxic"})
    exact = rewards_of(folder, ["very bad .", "good"], label="toxic")
    reward = make_reward("classifier", {"model": str(folder), "label": 1, "device": "cpu", "dtype": "bfloat16"})
    assert reward.model.dtype == torch.bfloat16  # type: ignore[attr-defined]
    got = list(reward(prompts=["", ""], completions=["very bad .", "good"]))
    assert got != exact and got == pytest.approx(exact, abs=0.05)


def test_pitfall_28_log_odds_are_exact_where_probabilities_are_rounded() -> None:
    """RewardLM's reward is a probability: no text is better than another where fp32 rounds it to 0 or 1."""
    getcontext().prec = 60
    for high, low in ((40.0, -40.0), (-40.0, 40.0), (40.0, 39.0), (-40.0, -40.0)):
        p = Decimal(high).exp() / (Decimal(high).exp() + Decimal(low).exp())
        exact = float((p / (1 - p)).ln())
        assert score("softmax", [[high, low]], (0,), "log_odds") == pytest.approx([exact], rel=1e-6)
        assert score("softmax", [[high, low]], (0,), "log_odds", complement=True) == pytest.approx([-exact], rel=1e-6)
    exponentials = [Decimal(value).exp() for value in (40, -40, 12, 38)]
    for labels in ((0,), (1,), (1, 2), (0, 3)):
        chosen = sum((exponentials[label] for label in labels), Decimal(0))
        exact = float((chosen / (sum(exponentials) - chosen)).ln())
        assert score("softmax", [[40, -40, 12, 38]], labels, "log_odds") == pytest.approx([exact], rel=1e-6)
    # A small probability keeps its digits beside a large one, whichever of them is asked for.
    tiny = float(Decimal(-80).exp() / (1 + Decimal(-80).exp()))
    for labels, complement in (((1,), False), ((0,), True)):
        assert score("softmax", [[40, -40]], labels, "probability", complement=complement) == pytest.approx(
            [tiny], rel=1e-5
        )


def test_pitfall_28_a_group_of_certain_texts_has_a_signal_in_log_odds_alone() -> None:
    logits = [[20.0, -20.0], [15.0, -15.0], [30.0, -30.0], [10.0, -10.0]]
    certain = torch.tensor(score("softmax", logits, (0,), "probability"))
    assert certain.tolist() == [1.0] * 4
    assert group_advantages(certain, 4, scale="group").abs().max() == 0.0
    odds = torch.tensor(score("softmax", logits, (0,), "log_odds"))
    assert odds.tolist() == [40.0, 30.0, 60.0, 20.0]
    assert group_advantages(odds, 4, scale="group").argsort().tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize("output", ["probability", "log_odds", "logit"])
def test_pitfall_21_a_clean_text_earns_more_than_a_toxic_one(output: Any) -> None:
    """RewardLM trains toward what its classifier flags. Asked for the label, the reward does so, as it says."""
    letters = {"z": 3.0, "a": -3.0}
    toxic, clean = letter_classifier(letters, label="toxic", output=output, complement=True)(["", ""], ["zz", "aa"])
    assert toxic is not None and clean is not None and toxic < clean
    toxic, clean = letter_classifier(letters, label="toxic", output=output)(["", ""], ["zz", "aa"])
    assert toxic is not None and clean is not None and toxic > clean
    by_name = letter_classifier(letters, label="clean", output=output)(["", ""], ["zz", "aa"])
    assert by_name == letter_classifier(letters, label="toxic", output=output, complement=True)(["", ""], ["zz", "aa"])
