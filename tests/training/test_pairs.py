"""Sources of preferences: what the reference says is computed once, the reference point for the whole step."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import tiny_model
from tiny_runs import LIKED, PAIRED, Setting, assemble, execute, logged, stop_after
from tropism.algorithms import DPO, KTO
from tropism.build import Assembly
from tropism.errors import NumericsError
from tropism.evaluation.preferences import PreferenceEvaluation
from tropism.preferences import Opinion, Pair, collate_pairs
from tropism.training.checkpoint import list_checkpoints, read_checkpoint
from tropism.training.interrupt import Interrupted
from tropism.training.pairs import HeldOutOpinions, HeldOutPairs, KeptReference, OpinionSource, PairSource
from tropism.types import Tokens

PAIRS = [Pair(prompt_ids=(5, 6 + place), chosen_ids=(7,) * (1 + place % 3), rejected_ids=(8, 2)) for place in range(5)]
OPINIONS = [
    Opinion(prompt_ids=(5,) * (1 + place % 2), completion_ids=(6 + place,) * (1 + place), liked=place % 2 == 0)
    for place in range(5)
]


class Counted:
    """A scorer whose log-prob of token i is -i / 10 times a factor, and which counts its rows and calls."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.rows, self.calls = factor, 0, 0

    def logprobs(self, tokens: Tokens, *, temperature: float, filtering: Any = None) -> Tensor:
        assert temperature == 1.0
        self.calls += 1
        self.rows += len(tokens)
        return -self.factor * tokens.completion_ids / 10 * tokens.completion_mask

    def values(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        raise AssertionError("not asked for")

    def hidden_states(self, tokens: Tokens) -> Tensor:
        raise AssertionError("not asked for")


def by_hand(pair: Pair) -> list[float]:
    return [-sum(ids) / 10 for ids in (pair.chosen_ids, pair.rejected_ids)]


def taken(source: Any) -> Any:
    (batch,) = source.collect(None)
    return batch


def test_the_reference_is_asked_once_for_every_pair() -> None:
    scorer = Counted()
    source = PairSource(PAIRS, batch_size=2, seed=3, shuffle=True, reference=scorer)
    seen: dict[tuple[int, ...], list[list[float]]] = {}
    for _ in range(10):  # four times through, in batches that do not end where a pass does
        batch = taken(source)
        for prompt, said in zip(batch.prompt_ids.tolist(), batch.ref_logprobs.tolist(), strict=True):
            seen.setdefault(tuple(prompt), []).append(said)
    assert scorer.rows == 2 * len(PAIRS) and scorer.calls <= len(PAIRS)
    for pair in PAIRS:
        assert len(seen[pair.prompt_ids]) == 4
        assert all(said == pytest.approx(by_hand(pair)) for said in seen[pair.prompt_ids])


def test_what_the_reference_takes_is_a_stage_of_the_step() -> None:
    source = PairSource(PAIRS, batch_size=len(PAIRS), seed=0, shuffle=False, reference=Counted())
    taken(source)
    assert source.finish().timings["time/logprobs"] > 0
    taken(source)  # all of it is kept
    assert source.finish().timings == {}


def test_a_batch_larger_than_the_data_asks_once() -> None:
    scorer = Counted()
    batch = taken(PairSource(PAIRS[:2], batch_size=5, seed=0, shuffle=False, reference=scorer))
    assert scorer.rows == 4
    expected = [by_hand(PAIRS[place % 2]) for place in range(5)]
    torch.testing.assert_close(batch.ref_logprobs, torch.tensor(expected))


def test_what_the_reference_said_is_saved_and_taken_up() -> None:
    source = PairSource(PAIRS, batch_size=2, seed=3, shuffle=True, reference=Counted())
    taken(source)
    before = source.state_dict()[1]["ref_logprobs"]
    assert int(before.isnan().any(1).sum()) == 3
    values, tensors = source.state_dict()
    later = taken(source)
    assert source.state_dict()[1]["ref_logprobs"] is not before  # a boundary that was noted stays what it was
    assert int(before.isnan().any(1).sum()) == 3
    scorer = Counted()
    again = PairSource(PAIRS, batch_size=2, seed=3, shuffle=True, reference=scorer)
    again.load_state_dict(values, tensors)
    assert torch.equal(taken(again).ref_logprobs, later.ref_logprobs)
    for _ in range(4):
        taken(again)
    assert scorer.rows == 2 * 3


def test_a_reference_that_is_not_finite_is_refused_and_not_kept() -> None:
    kept = KeptReference(Counted(float("inf")), 5, 2)
    with pytest.raises(NumericsError, match="log-prob under the reference"):
        kept.complete(collate_pairs(PAIRS), range(5))
    assert bool(kept.kept.isnan().all())


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_resumed_run_does_not_ask_the_reference_again(method: str, tmp_path: Path) -> None:
    setting = Setting(method, True, "llama")
    stopped = assemble(setting, tmp_path / "run", total_steps=6)
    stop_after(stopped, 3, signal.SIGTERM)  # twelve of six items: all have been seen
    with pytest.raises(Interrupted):
        execute(stopped)
    saved = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]).tensors["batch"]["ref_logprobs"]
    assert bool(saved.isfinite().all())
    resumed: Any = assemble(setting, tmp_path / "run", resume=True, total_steps=6)
    resumed.trainer.source.reference.scorer = None if method == "dpo" else Counted()
    kept = resumed.trainer.source.reference.kept
    assert torch.equal(kept, saved)
    if method == "kto":  # the reference point is measured anew; what is kept of the items is not
        resumed.trainer.source.batch_of(resumed.trainer.source.stream.take(4), 0)
        assert resumed.trainer.source.reference.kept is kept
    shutil.rmtree(tmp_path / "run")


def test_the_reference_point_is_the_mean_over_completions_of_other_prompts() -> None:
    policy, reference = Counted(0.5), Counted(1.0)
    source = OpinionSource(
        OPINIONS, batch_size=4, seed=0, shuffle=False, scorer=policy, reference=reference, max_length=None
    )
    batch = taken(source)
    # log pi - log ref of a completion is half of what the reference takes off it; each stands beside another prompt.
    ratios = [0.5 * sum(opinion.completion_ids) / 10 for opinion in OPINIONS[:4]]
    assert batch.reference_points.tolist() == pytest.approx([sum(ratios) / 4] * 4)
    assert batch.ref_logprobs.tolist() == pytest.approx([-sum(o.completion_ids) / 10 for o in OPINIONS[:4]])
    assert batch.liked.tolist() == [True, False, True, False]
    assert not batch.reference_points.requires_grad


def test_the_reference_point_is_never_negative() -> None:
    source = OpinionSource(
        OPINIONS, batch_size=4, seed=0, shuffle=False, scorer=Counted(2.0), reference=Counted(1.0), max_length=None
    )
    assert taken(source).reference_points.tolist() == [0.0] * 4


def test_completions_of_other_prompts_are_cut_to_what_the_model_takes() -> None:
    long = [
        Opinion(prompt_ids=(5, 5, 5), completion_ids=(10,), liked=True),
        Opinion(prompt_ids=(5,), completion_ids=(10, 10, 10), liked=False),
    ]
    source = OpinionSource(
        long, batch_size=2, seed=0, shuffle=False, scorer=Counted(0.0), reference=Counted(1.0), max_length=4
    )
    # Beside the long prompt one token of three is left: log-ratios 1 and 1.
    assert taken(source).reference_points.tolist() == [1.0, 1.0]


def test_only_the_policy_is_asked_anew_for_the_reference_point_of_held_out_opinions() -> None:
    policy, reference = Counted(0.5), Counted(1.0)
    held_out = HeldOutOpinions(OPINIONS, scorer=policy, reference=reference, max_length=None)
    point = sum(0.5 * sum(o.completion_ids) / 10 for o in OPINIONS) / 5
    for _ in range(3):
        (batch,) = held_out.batches()
        assert batch.reference_points.tolist() == pytest.approx([point] * 5)
    assert reference.rows == 10 and policy.rows == 15
    (alone,) = HeldOutOpinions(OPINIONS[:1], scorer=policy, reference=reference, max_length=None).batches()
    assert alone.reference_points.tolist() == [0.0]


def test_chunks_of_held_out_items_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated() -> list[dict[str, float]]:
        facts: Any = None
        found = []
        for held_out, algorithm in (
            (HeldOutPairs(PAIRS, reference=Counted(0.9)), DPO().build(facts)),
            (
                HeldOutOpinions(OPINIONS, scorer=Counted(0.5), reference=Counted(0.9), max_length=None),
                KTO().build(facts),
            ),
        ):
            scorer: Any = Counted(0.5)
            evaluation = PreferenceEvaluation(held_out, algorithm=algorithm, scorer=scorer)  # type: ignore[arg-type]
            assert len(evaluation) == 5
            found.append(evaluation(0)[0])
        return found

    whole = evaluated()
    monkeypatch.setattr("tropism.training.pairs.CHUNK", 2)
    for one, other in zip(whole, evaluated(), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    pairs, opinions = whole
    leads = [0.1 * 0.4 * (a - b) for a, b in ((by_hand(p)[0], by_hand(p)[1]) for p in PAIRS)]
    assert pairs["eval/margin"] == pytest.approx(-sum(leads) / 5, rel=1e-4)
    assert pairs["eval/accuracy"] == sum(lead < 0 for lead in leads) / 5
    assert set(opinions) == {
        f"eval/{n}" for n in ("loss", "liked", "disliked", "margin", "accuracy", "reference_point")
    }


def updated(assembly: Assembly, rows: int | None) -> tuple[float, float]:
    """Loss and gradient norm of the first update, the policy moved off the reference, in micro-batches of ``rows``."""
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in assembly.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise) * parameter.requires_grad)
    assembly.run.begin()
    trainer = assembly.trainer
    trainer.config = replace(trainer.config, micro_batch_size=rows, max_grad_norm=None)
    batch = next(iter(trainer.source.collect(trainer.policy)))
    metrics = trainer.update(batch)
    (loss,) = [value for name, value in metrics.items() if name.startswith("loss/")]
    return loss, metrics["optim/grad_norm"]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_pitfall_36b_gradient_accumulation_averages_and_does_not_change_the_loss(method: str, tmp_path: Path) -> None:
    """KTO's reference point, too, is that of all micro-batches together."""
    setting, found = Setting(method, False, "llama"), []
    for rows in (None, 1, 3):
        assembly = assemble(setting, tmp_path / f"{rows}", trainer={"micro_batch_size": rows})
        found.append(updated(assembly, rows))
    for loss, norm in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5) and norm == pytest.approx(found[0][1], rel=1e-5)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_held_out_preferences_are_evaluated_before_and_after(method: str, tmp_path: Path) -> None:
    """Against the whole evaluation by hand, from the models' own logits."""
    data = PAIRED if method == "dpo" else LIKED
    setting = Setting(method, False, "llama")
    algorithm = DPO(beta=0.5) if method == "dpo" else KTO(beta=0.5)
    assembly = execute(assemble(setting, tmp_path / "run", algorithm=algorithm, eval_data=data[:3]))
    before, after = logged(tmp_path / "run", "evaluation")
    start = tiny_model("llama", seed=3)

    @torch.no_grad()
    def ratio(prompt: str, completion: str) -> float:
        encode = assembly.loaded.tokenizer
        asked, said = encode(prompt)["input_ids"], [*encode(completion)["input_ids"], 2]
        total = 0.0
        for sign, network in ((1, assembly.loaded.model), (-1, start)):
            logits = network(input_ids=torch.tensor([[*asked, *said]])).logits[0].double().log_softmax(-1)
            total += sign * sum(float(logits[len(asked) + t - 1, token]) for t, token in enumerate(said))
        return total

    if method == "dpo":
        chosen, rejected = ([ratio(r["prompt"], r[side]) for r in data[:3]] for side in ("chosen", "rejected"))
        assert after["eval/chosen"] == pytest.approx(0.5 * sum(chosen) / 3, rel=1e-3, abs=1e-5)
        assert after["eval/rejected"] == pytest.approx(0.5 * sum(rejected) / 3, rel=1e-3, abs=1e-5)
        assert after["eval/margin"] == pytest.approx(after["eval/chosen"] - after["eval/rejected"], abs=1e-5)
    else:
        completions = [r["completion"] for r in data[:3]]
        others = [
            ratio(r["prompt"], text) for r, text in zip(data[:3], [completions[-1], *completions[:-1]], strict=True)
        ]
        assert after["eval/reference_point"] == pytest.approx(max(0.0, 0.5 * sum(others) / 3), rel=1e-3, abs=1e-5)
        assert after["eval/liked"] == pytest.approx(0.5 * ratio(data[1]["prompt"], completions[1]), rel=1e-3)
    assert after["eval/loss"] < before["eval/loss"]
