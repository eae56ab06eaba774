"""What the 2019 code and its reimplementations got wrong about PPO, in whole tiny runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slow_sampling import PROMPTS, policy_of
from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import Setting, assemble, execute, logged
from tropism.algorithms import PPO, KLControl
from tropism.build import Assembly
from tropism.errors import ConfigError
from tropism.models.policy import Policy
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Beyond, Sampling, Truncation
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.training.processes import Processes
from tropism.training.sources import Collected
from tropism.types import Prompt

SETTING = Setting("ppo", False, "llama")
SENTIMENT = PPO.preset("lm-human-preferences/sentiment", kl=KLControl(target=0.5, horizon=100))
END, AFTER, NEW = 14, 1, 6


def truncated(beyond: Beyond) -> Sampling:
    return Sampling(max_new_tokens=NEW, truncation=Truncation(token=END, after=AFTER, beyond=beyond))


def collected_by(assembly: Assembly) -> list[Collected]:
    """What the run collects from now on."""
    collected: list[Collected] = []
    source: Any = assembly.trainer.source
    source.on_collect = collected.append
    return collected


def test_pitfall_39_the_kl_coefficient_moves_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in those that are not the first; all of them see the KL of the whole collect."""
    assembly = assemble(SETTING, tmp_path / "run", algorithm=SENTIMENT, trainer={"learning_rate": 1e-2}, total_steps=3)
    collected = collected_by(assembly)
    assembly.trainer.after_update = lambda metrics, ended: False
    monkeypatch.setattr(Processes, "is_main", False)
    assembly.trainer.fit(3)
    coefficient = 0.15
    for one in collected:
        assert one.metrics["policy/kl_coef_used"] == pytest.approx(coefficient)
        assert one.batch is not None
        kls = [
            sum(float(one.batch.old_logprobs[i, t] - one.batch.ref_logprobs[i, t]) for t in range(length))
            for i, length in enumerate(one.batch.completion_lengths.tolist())
        ]
        error = max(-0.2, min(0.2, sum(kls) / len(kls) / 0.5 - 1))
        coefficient *= 1 + error * len(kls) / 100
    assert assembly.algorithm.kl_coef == pytest.approx(coefficient) != 0.15


def test_pitfall_42_the_rate_of_a_step_is_set_before_its_first_update(tmp_path: Path) -> None:
    """1 - steps done / all steps, for every update of a step; the last step still learns."""
    trainer = {"learning_rate": 1e-3, "schedule": "linear"}
    execute(assemble(SETTING, tmp_path / "run", trainer=trainer, total_steps=4))
    rows = logged(tmp_path / "run", "update")
    assert len(rows) == 16
    assert [row["optim/lr"] for row in rows] == pytest.approx([1e-3 * (1 - i // 4 / 4) for i in range(16)], rel=1e-12)


@pytest.mark.parametrize("rows", [None, 1])
def test_pitfall_44_the_logged_total_is_the_sum_of_the_logged_losses(rows: int | None, tmp_path: Path) -> None:
    """However the batch is split, and nothing is divided twice."""
    config = replace(SENTIMENT, entropy_coef=0.01, kl=KLControl(place="loss"))
    execute(assemble(SETTING, tmp_path / "run", algorithm=config, trainer={"micro_batch_size": rows}))
    for row in logged(tmp_path / "run", "update"):
        parts = [row[f"loss/{name}"] for name in ("policy", "value", "kl", "entropy")]
        assert row["loss/total"] == pytest.approx(sum(parts), rel=1e-5, abs=1e-7)


class Watched:
    """A policy that notes how many tokens each pass of sampling computes."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.tokens: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    @contextmanager
    def for_sampling(self, *, compiled: bool = False) -> Iterator[Any]:
        with self.policy.for_sampling(compiled=compiled) as model:
            self.model = model
            yield self

    @property
    def cache_dtype(self) -> Any:
        return self.model.cache_dtype

    def hidden_states(self, ids: Tensor, *rest: Any) -> Tensor:
        self.tokens.append(ids.numel())
        return self.model.hidden_states(ids, *rest)

    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        self.tokens.append(ids.numel())
        return self.model.decode(ids, cache)

    def values(self, hidden: Tensor) -> Tensor | None:
        return self.model.values(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


def test_pitfall_45_sampling_computes_every_token_once() -> None:
    policy: Any = Watched(policy_of("llama"))
    prompt = Prompt(text="", ids=PROMPTS[0])
    sampler = EmbeddedSampler(None, ())
    rollouts = sampler.generate(policy, [prompt], truncated("train"), 1, key=StreamKey(seed=0))
    # The prompt in one pass, and one pass of one token for each but the last, which nothing follows.
    assert policy.tokens == [len(PROMPTS[0])] + [1] * (NEW - 1)
    assert rollouts.completion_lengths.tolist() == [NEW]


def test_pitfall_45_a_prompt_that_does_not_fit_is_refused_and_never_cut() -> None:
    context = policy_of("llama").context_length
    assert context is not None
    long = Prompt(text="", ids=(5,) * (context - NEW + 1))
    sampler = EmbeddedSampler(None, ())
    with pytest.raises(ConfigError, match=f"prompt 0 has {context - NEW + 1} tokens; .* context of {context}"):
        sampler.generate(policy_of("llama"), [long], truncated("mask"), 1, key=StreamKey(seed=0))


def test_pitfall_47_micro_batches_do_not_change_what_is_whitened(tmp_path: Path) -> None:
    """Rewards are whitened over the collect and advantages over the minibatch, before either is split."""
    found = []
    for rows in (None, 1, 3):
        assembly = assemble(
            SETTING,
            tmp_path / str(rows),
            algorithm=replace(SENTIMENT, num_epochs=2, minibatch_size=4),
            sampling=truncated("train"),
            prompts_per_step=8,
            trainer={"micro_batch_size": rows, "learning_rate": 1e-4},
        )
        collected = collected_by(assembly)
        losses: list[float] = []

        def note(metrics: dict[str, float], ended: bool, losses: list[float] = losses) -> bool:
            losses.extend(metrics[name] for name in ("loss/total", "loss/policy", "loss/value", "optim/grad_norm"))
            return False

        assembly.trainer.after_update = note
        assembly.trainer.fit(1)
        batch = collected[0].batch
        assert batch is not None
        # The source's formula by hand: the deviation over all tokens of the collect divides, the mean stays.
        rewards = -0.15 * (batch.old_logprobs - batch.ref_logprobs)
        rewards[:, -1] += collected[0].rewards.per_completion.where(
            torch.tensor([reason == "stop" for reason in collected[0].rollouts.finish_reasons]), torch.tensor(-1.0)
        )
        white = (rewards - rewards.mean()) / (rewards.var(unbiased=False) + 1e-8).sqrt() + rewards.mean()
        last = batch.returns[:, -1]
        torch.testing.assert_close(last, white[:, -1], rtol=1e-5, atol=1e-5)
        found.append(losses)
    assert len(found[0]) == 4 * 4
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-5)


def test_pitfall_50_text_that_rewards_do_not_see_is_not_trained_unless_asked(tmp_path: Path) -> None:
    assert Truncation(token=END).beyond == "stop"
    seen: dict[str, Any] = {}
    beyonds: tuple[Beyond, ...] = ("stop", "mask", "train")
    for beyond in beyonds:
        model = (tiny_model("llama", seed=3, eos_token_id=None), tiny_tokenizer(eos=False))
        assembly = assemble(
            SETTING,
            tmp_path / beyond,
            model=model,
            algorithm=PPO.preset("lm-human-preferences/tldr"),
            sampling=truncated(beyond),
            prompts_per_step=12,
        )
        collected = collected_by(assembly)
        next(iter(assembly.trainer.source.collect(None)))
        (one,) = collected
        assert one.batch is not None
        seen[beyond] = one.inputs.completion_ids, one.inputs.completions, one.rewards.per_completion.tolist()
        visible = [len(ids) for ids in one.inputs.completion_ids]
        assert min(visible) < NEW and "length" in one.inputs.finish_reasons and "stop" in one.inputs.finish_reasons
        trained = one.batch.loss_mask.sum(-1).tolist()
        assert trained == ([NEW] * 12 if beyond == "train" else visible)
        for ids, reason in zip(one.inputs.completion_ids, one.inputs.finish_reasons, strict=True):
            assert (END in ids[AFTER:]) == (reason == "stop") and END not in ids[AFTER:-1]
        # The score, or -1 without an end, stands at the last trained token.
        lasts = one.batch.returns.gather(1, torch.tensor(trained)[:, None] - 1)[:, 0].tolist()
        scores = [
            score if reason == "stop" else -1.0
            for score, reason in zip(one.rewards.per_completion.tolist(), one.inputs.finish_reasons, strict=True)
        ]
        assert lasts == pytest.approx(scores, abs=1e-6)  # policy and reference are equal, so no KL is paid yet
    assert seen["stop"] == seen["mask"] == seen["train"]


def test_rewards_per_token_are_about_the_tokens_that_rewards_see(tmp_path: Path) -> None:
    """The others are trained all the same, and get none."""

    def places(completion_ids: list[list[int]]) -> list[list[float]]:
        return [[float(1 + index) for index in range(len(ids))] for ids in completion_ids]

    assembly = assemble(
        SETTING,
        tmp_path / "run",
        algorithm=PPO(kl_coef=0.0, gamma=0.0),
        sampling=truncated("train"),
        reward=RewardConfig.of(places),
        prompts_per_step=12,
    )
    collected = collected_by(assembly)
    next(iter(assembly.trainer.source.collect(None)))
    batch, ids = collected[0].batch, collected[0].inputs.completion_ids
    assert batch is not None and min(len(row) for row in ids) < NEW
    for returns, row in zip(batch.returns.tolist(), ids, strict=True):
        assert returns == pytest.approx([*range(1, 1 + len(row)), *[0.0] * (NEW - len(row))])


@pytest.mark.parametrize("beyond", ["mask", "train"])
def test_a_whole_run_with_a_fixed_length_passes_its_checks(beyond: Beyond, tmp_path: Path) -> None:
    """The checks sample fewer tokens than ``after``; evaluation sees what rewards see."""
    sampling = Sampling(max_new_tokens=16, truncation=Truncation(token=".", after=12, beyond=beyond))
    execute(assemble(SETTING, tmp_path / "run", sampling=sampling, eval_data=["a cat", "we ran"]))
    (*_, last) = logged(tmp_path / "run", "collect")
    assert last["rollout/tokens"] == 8 * 16 or beyond == "mask"
    assert 12 < last["rollout/length_mean"] <= 16
    assert logged(tmp_path / "run", "evaluation")[0]["eval/length_mean"] > 12


def test_a_missing_end_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    model = (tiny_model("llama", seed=3, eos_token_id=None), tiny_tokenizer(eos=False))
    task = PPO.preset("lm-human-preferences/cnndm")
    with pytest.raises(ConfigError, match="the model has no eos token, and sampling names no other end"):
        assemble(SETTING, tmp_path / "run", model=model, algorithm=task)
    assemble(SETTING, tmp_path / "run", algorithm=task)  # this model has an eos
    for sampling in (
        truncated("stop"),
        Sampling(max_new_tokens=6, stop=(".",)),
        Sampling(max_new_tokens=6, stop_token_ids=(END,)),
    ):
        assemble(SETTING, tmp_path / "run", model=model, algorithm=task, sampling=sampling)


@pytest.mark.parametrize(
    ("token", "message"), [(". ", "'. ' is 2 tokens of this tokenizer"), (99, "truncation.token names a token beyond")]
)
def test_an_end_that_is_no_token_of_the_model_is_refused_at_once(token: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble(SETTING, tmp_path / "run", sampling=Sampling(truncation=Truncation(token=token)))
