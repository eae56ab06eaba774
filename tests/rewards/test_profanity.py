"""The SVM scorer of offensive language, on mild texts."""

from __future__ import annotations

import math
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from tropism.errors import ConfigError
from tropism.rewards import RewardConfig, RewardHarness
from tropism.rewards.registry import make_reward
from tropism.types import RewardInputs

RUDE, KIND = "you are an idiot", "what a lovely day"


def scores(texts: list[Any], **args: Any) -> list[float]:
    return list(make_reward("profanity", args)(completions=texts))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Put a function in the place of the package's ``predict_prob``."""
    pytest.importorskip("sklearn")

    def put(predict_prob: Any) -> None:
        module = types.ModuleType("profanity_check")
        module.predict_prob = predict_prob  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "profanity_check", module)

    return put


def test_the_package_itself() -> None:
    predict_prob = pytest.importorskip("profanity_check").predict_prob
    rude, kind, empty, blank = scores([RUDE, KIND, "", "  \n"])
    assert [rude, kind] == predict_prob([RUDE, KIND]).tolist()
    assert rude > 0.9 and kind < 0.1
    assert empty == blank == scores(["I, a ."])[0] and 0.0 < empty < 0.1  # nothing that it knows
    assert scores([[{"role": "assistant", "content": RUDE}]]) == [rude]
    assert scores([]) == []
    odds = scores([RUDE, KIND, ""], output="log_odds")
    assert [1 / (1 + math.exp(-value)) for value in odds] == pytest.approx([rude, kind, empty])


def test_pitfall_21_the_complement_rewards_the_kind_text() -> None:
    pytest.importorskip("profanity_check")
    for output in ("probability", "log_odds"):
        rude, kind = scores([RUDE, KIND], output=output)
        assert rude > kind
        rude, kind = scores([RUDE, KIND], output=output, complement=True)
        assert rude < kind
    assert scores([KIND], complement=True)[0] == pytest.approx(1 - scores([KIND])[0])


def test_it_is_calibrated_as_its_description_says() -> None:
    """The mean over five SVMs of logistic curves of their distance to the boundary."""
    inner = pytest.importorskip("profanity_check.profanity_check")
    rows = inner.vectorizer.transform([RUDE, KIND])
    total = [0.0, 0.0]
    parts = inner.model.calibrated_classifiers_
    for part in parts:
        (curve,) = part.calibrators
        for place, distance in enumerate(part.estimator.decision_function(rows)):
            total[place] += 1 / (1 + math.exp(curve.a_ * distance + curve.b_))
    assert len(parts) == 5
    assert scores([RUDE, KIND]) == pytest.approx([value / 5 for value in total])
    assert scores(["idiot day"]) == scores(["Day, day: IDIOT idiot!"])


def test_log_odds_end_where_the_probability_has_no_digits(package: Callable[[Any], None]) -> None:
    given = {"a lovely day": 0.5, "never": 0.0, "always": 1.0, "nearly": 1 - 1e-15, "half": 0.5, "some": 0.2}
    package(lambda texts: [given[text] for text in texts])
    texts = ["never", "always", "nearly", "half", "some"]
    assert scores(texts, output="log_odds") == pytest.approx([-20, 20, 20, 0, math.log(0.25)])
    assert scores(texts, output="log_odds", complement=True) == pytest.approx([20, -20, -20, 0, math.log(4)])
    assert scores(texts, complement=True) == pytest.approx([1, 0, 1e-15, 0.5, 0.8])


def test_in_the_harness_with_threads_and_in_a_process() -> None:
    pytest.importorskip("profanity_check")
    texts = [RUDE, KIND, "", "the film was good", "no", "stupid", "a b c", "thanks"]
    inputs = RewardInputs(prompts=["p"] * 8, completions=texts, completion_ids=[[1]] * 8, finish_reasons=["eos"] * 8)
    terms: dict[str, Any] = {
        "here": {"use": "profanity"},
        "threads": {"use": "profanity", "rows_per_call": 1, "concurrency": 4},
        "process": {"use": "profanity", "rows_per_call": 4, "timeout": 120},
    }
    harness = RewardHarness(RewardConfig.of({"terms": terms}))
    try:
        got = harness.score(inputs).terms
    finally:
        harness.close()
    assert got["here"].tolist() == pytest.approx(scores(texts))
    assert got["threads"].tolist() == got["here"].tolist() == got["process"].tolist()


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("profanity_check", "sklearn.exceptions"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ConfigError, match=r"reward 'profanity': .*pip install 'tropism\[profanity\]'"):
                scores([KIND])


def test_a_model_of_another_scikit_learn(package: Callable[[Any], None]) -> None:
    """Its warnings are kept from the reader, as what they fear is tried; others are not."""
    from sklearn.exceptions import InconsistentVersionWarning

    def old(texts: list[str]) -> list[float]:
        warnings.warn(
            InconsistentVersionWarning(
                estimator_name="LinearSVC", current_sklearn_version="9", original_sklearn_version="1"
            ),
            stacklevel=1,
        )
        warnings.warn("something else", stacklevel=1)
        return [0.5] * len(texts)

    package(old)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_reward("profanity", {})
    assert [str(warning.message) for warning in caught] == ["something else"]

    def broken(texts: list[str]) -> list[float]:
        raise AttributeError("'LinearSVC' object has no attribute 'coef_'")

    for predict in (broken, lambda texts: [float("nan")]):
        package(predict)
        with pytest.raises(ConfigError, match=r"does not work with scikit-learn [\d.]+: .*pip install"):
            make_reward("profanity", {})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"output": "logodds"}, "Did you mean 'log_odds'"),
        ({"complement": "yes"}, "complement: expected true or false, not 'yes'"),
        ({"label": "toxic"}, "takes no argument 'label'"),
    ],
)
def test_bad_arguments(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scores([KIND], **args)
