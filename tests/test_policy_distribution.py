"""The setting sampling.policy_distribution, from the recipe to what is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from given_numbers import built, rewards, rollouts
from tiny_runs import Setting, assemble, assert_same, execute, logged, stop_after, weights_of
from tropism.algorithms import GRPO, PPO, RLOO
from tropism.algorithms.base import OnPolicyConfig
from tropism.algorithms.kl_control import KLControl
from tropism.build import Assembly
from tropism.errors import ConfigError
from tropism.rollouts.config import Sampling
from tropism.training.interrupt import Interrupted
from tropism.types import Filtering, PolicyBatch

FILTERED = Sampling(max_new_tokens=6, top_k=8, top_p=0.9, repetition_penalty=1.3, policy_distribution="filtered")
FILTERING = Filtering(top_k=8, top_p=0.9, repetition_penalty=1.3)
METHODS: list[OnPolicyConfig] = [
    PPO(kl=KLControl(place="loss"), entropy_coef=0.01),
    PPO(),
    GRPO(group_size=2),
    GRPO(group_size=2, kl_estimator="k2"),
    GRPO(group_size=2, ratio="sequence"),
    RLOO(group_size=2),
]


def batch_of(run: Assembly) -> PolicyBatch:
    batch = run.trainer.source.batch  # type: ignore[attr-defined]
    assert isinstance(batch, PolicyBatch)
    return batch


@pytest.mark.parametrize(
    ("method", "family"), [("ppo", "llama"), ("grpo", "llama"), ("rloo", "llama"), ("grpo", "t5"), ("ppo", "bart")]
)
def test_ratio_and_kl_are_about_what_filters_leave(method: str, family: str, tmp_path: Path) -> None:
    """A repetition penalty counts what the half reads that writes: of T5 and BART not the prompt."""
    run = assemble(Setting(method, False, family), tmp_path / "run", sampling=FILTERED)
    run.trainer.source.on_collect = lambda _: None  # type: ignore[attr-defined]
    next(run.trainer.source.collect(run.policy))
    batch = batch_of(run)
    assert batch.filtering == FILTERING
    with torch.no_grad():
        found = run.policy(**batch.inputs, filtering=FILTERING).need("logprobs")
        tempered = run.policy(**batch.inputs).need("logprobs")
    assert torch.allclose(found, batch.old_logprobs, atol=1e-5)
    assert torch.allclose(found, batch.ref_logprobs, atol=1e-5)
    assert not torch.allclose(tempered, batch.old_logprobs, atol=1e-2)


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_a_run_is_finite_begins_at_ratio_one_and_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    setting = Setting(method, False, "llama")
    changes: dict[str, Any] = {"sampling": FILTERED, "trainer": {"learning_rate": 1e-2}}
    whole = execute(assemble(setting, tmp_path / "whole", **changes))
    updates = logged(tmp_path / "whole", "update")
    assert updates[0]["policy/ratio"] == pytest.approx(1, abs=1e-4) and updates[0]["policy/outside_fraction"] == 0
    assert max(row["policy/outside_fraction"] for row in updates) > 0
    for row in updates:
        assert all(not isinstance(v, float) or abs(v) < 1e6 for v in row.values()), row
    cut = assemble(setting, tmp_path / "cut", **changes)
    stop_after(cut, 3, 15)
    with pytest.raises(Interrupted):
        execute(cut)
    assert_same(weights_of(execute(assemble(setting, tmp_path / "cut", resume=True, **changes))), weights_of(whole))


@pytest.mark.parametrize("config", METHODS, ids=str)
def test_pitfall_17_a_token_outside_the_set_is_finite_and_learns_nothing(config: OnPolicyConfig) -> None:
    """The second token of the first completion has left the set: whatever its advantage, it has no gradient."""
    given = replace(rollouts(), filtering=FILTERING)

    class Scored:
        def logprobs(self, *_: Any, **__: Any) -> torch.Tensor:
            return torch.where(torch.tensor([[True, True, False], [True, True, True]]), given.logprobs, -torch.inf)

        def values(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(2, 3), torch.zeros(2)

    algorithm: Any = built(config)
    batch = algorithm.make_batch(Scored(), Scored(), given, rewards(1.0, 3.0))
    assert batch.filtering == FILTERING
    assert bool(batch.ref_logprobs.isfinite().all()) and batch.ref_logprobs[0, 2] == -20
    logprobs = given.logprobs.clone()
    logprobs[0, 1] = -torch.inf
    logprobs.requires_grad_()
    values = torch.zeros(2, 3, requires_grad=True)

    def policy(**_: Any) -> Any:
        return type("Output", (), {"logprobs": logprobs, "values": values, "entropy": torch.ones(2, 3)})

    for sign in (1, -1):
        sums, ratios = algorithm.loss(policy, replace(batch, advantages=sign * batch.advantages))
        total = sum(sums.values())
        assert bool(total.isfinite())
        (gradient,) = torch.autograd.grad(total, logprobs)
        assert bool(gradient.isfinite().all()) and gradient[0, 1] == 0
        for name, (numerator, denominator) in ratios.items():
            assert bool(torch.as_tensor(numerator / denominator).isfinite()), name
        outside = ratios["policy/outside_fraction"]
        assert [float(part) for part in outside] == [1.0, 5.0]


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.0), ("min_new_tokens", 2), ("beta", 1.0), ("allowed_tokens", "a.json")]
)
def test_what_training_does_not_compute_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"policy_distribution='filtered' knows what .* and {field}"):
        Sampling(policy_distribution="filtered", top_k=3, **{field: value})
    assert Sampling(**{field: value}).policy_distribution == "tempered"


def test_an_unknown_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match="policy_distribution must be one of tempered, filtered, not 'raw'"):
        Sampling(policy_distribution="raw")  # type: ignore[arg-type]


def test_nothing_taken_out_is_the_tempered_distribution() -> None:
    assert Filtering.of(Sampling(policy_distribution="filtered")) is None
    assert Filtering.of(Sampling(top_k=4)) is None


@pytest.mark.parametrize("method", ["sft", "rft", "quark", "conditioned", "dpo", "ilql"])
def test_methods_that_train_the_tempered_distribution_refuse_it(method: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy_distribution is filtered, and .* trains the tempered distribution"):
        assemble(Setting(method, False, "llama"), tmp_path / "run", sampling=FILTERED)


def test_cispo_and_recomputed_log_probs_refuse_it(tmp_path: Path) -> None:
    setting = Setting("grpo", False, "llama")
    with pytest.raises(ConfigError, match="and grpo as it is set here trains the tempered distribution"):
        assemble(setting, tmp_path / "run", sampling=FILTERED, algorithm=setting.with_algorithm(ratio="cispo"))
    with pytest.raises(ConfigError, match="needs sampling and training to find the same tokens inside the set"):
        assemble(setting, tmp_path / "run", sampling=FILTERED, trainer={"recompute_logprobs": True})
