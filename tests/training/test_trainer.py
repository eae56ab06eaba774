"""The loop on a model of three weights, where every number can be worked out by hand."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tropism.algorithms.base import Algorithm, AlgorithmConfig, CollectStats, RunFacts, Signal
from tropism.errors import NumericsError
from tropism.training.config import TrainerConfig
from tropism.training.processes import Processes
from tropism.training.trainer import Trainer
from tropism.types import Batch, length_mask


class Line(nn.Module):
    """w * token id."""

    without_padding = False

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.unused = nn.Parameter(torch.tensor(1.0))


@dataclass(frozen=True, kw_only=True)
class Squares(AlgorithmConfig):
    name = "squares"

    def build(self, facts: RunFacts) -> SquaresAlgorithm:
        return SquaresAlgorithm(self, facts)


class SquaresAlgorithm(Algorithm[Squares]):
    """Two named losses with weights of their own: mean over tokens of (w x)^2, and mean over rows of w."""

    end_after: int | None = None
    steps = 0

    def loss(self, policy: Any, batch: Batch) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        x = batch.completion_ids.float()
        rows = batch.loss_mask.any(1)
        squares = ((policy.w * x) ** 2 * batch.loss_mask).sum()
        sums = {"squares": squares, "rows": policy.w * rows.sum(), "never": policy.w * 1e9}
        return sums, {"x/mean": ((x * batch.loss_mask).sum(), batch.loss_mask.sum())}

    def weight(self, batch: Batch) -> dict[str, float]:
        return {"squares": float(batch.loss_mask.sum()), "rows": float(batch.loss_mask.any(1).sum()), "never": 0.0}

    def after_step(self, policy: Any, metrics: dict[str, float]) -> Signal:
        self.steps += 1
        return Signal.END_COLLECT if self.steps == self.end_after else Signal.CONTINUE

    def after_collect(self, stats: CollectStats) -> dict[str, float]:
        return {"collect/samples": float(stats.samples)}


@dataclass
class Repeat:
    """Yields a batch a number of times per collect."""

    batch: Batch
    times: int = 1
    place: int = 0
    finished: int = 0

    @property
    def done(self) -> bool:
        return self.place >= self.times

    def collect(self, policy: Any) -> Iterator[Batch]:
        while not self.done:
            self.place += 1
            yield self.batch

    def finish(self) -> CollectStats:
        self.place = 0
        self.finished += 1
        return CollectStats(samples=len(self.batch), tokens=int(self.batch.completion_lengths.sum()))


@dataclass
class Books:
    rows: list[tuple[dict[str, float], bool]] = field(default_factory=list)
    stop_after: int | None = None

    def __call__(self, metrics: dict[str, float], ended: bool) -> bool:
        self.rows.append((dict(metrics), ended))
        return len(self.rows) == self.stop_after


def make_batch(ids: list[list[int]]) -> Batch:
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    completion = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    return Batch(
        prompt_ids=torch.ones(len(ids), 1, dtype=torch.long),
        prompt_lengths=torch.ones(len(ids), dtype=torch.long),
        completion_ids=completion,
        completion_lengths=lengths,
        loss_mask=length_mask(lengths, width),
    )


BATCH = make_batch([[1, 2], [3]])
"""Mean of x^2 over tokens: 14 / 3."""


def make_trainer(source: Repeat, books: Books, *, rate: float = 0.25, **config: Any) -> Trainer:
    policy = Line()
    optimizer = torch.optim.SGD([{"params": list(policy.parameters()), "rate": 1.0}], lr=0.0)
    return Trainer(
        policy=policy,
        algorithm=Squares().build(RunFacts(total_steps=4, max_new_tokens=2)),
        source=source,
        optimizer=optimizer,
        config=TrainerConfig(**config),
        processes=Processes(Accelerator(cpu=True)),
        learning_rate=rate,
        device=torch.device("cpu"),
        after_update=books,
    )


def weight(trainer: Trainer) -> float:
    return float(trainer.policy.w.detach())


def test_one_update_by_hand() -> None:
    trainer = make_trainer(Repeat(BATCH), books := Books(), rate=0.01, max_grad_norm=None)
    trainer.fit(1)
    ((metrics, ended),) = books.rows
    assert ended
    assert metrics["loss/squares"] == pytest.approx(4 * 14 / 3)
    assert metrics["loss/rows"] == pytest.approx(2.0)
    assert "loss/never" not in metrics, "a loss of weight 0 takes no part"
    gradient = 2 * 2 * 14 / 3 + 1
    assert metrics["optim/grad_norm"] == pytest.approx(gradient)
    assert metrics["x/mean"] == pytest.approx(2.0)
    assert metrics["optim/skipped"] == 0.0 and metrics["collect/samples"] == 2.0
    assert weight(trainer) == pytest.approx(2 - 0.01 * gradient)
    assert float(trainer.policy.unused.detach()) == 1.0


def test_clipping_scales_the_gradient_and_logs_its_norm_before() -> None:
    trainer = make_trainer(Repeat(BATCH), books := Books(), rate=0.5, max_grad_norm=1.0)
    trainer.fit(1)
    assert books.rows[0][0]["optim/grad_norm"] == pytest.approx(2 * 2 * 14 / 3 + 1)
    assert weight(trainer) == pytest.approx(2 - 0.5, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2])
def test_micro_batches_change_nothing(rows: int) -> None:
    results = []
    for size in (None, rows):
        trainer = make_trainer(Repeat(BATCH), books := Books(), micro_batch_size=size)
        trainer.fit(1)
        results.append((books.rows[0][0]["loss/squares"], weight(trainer)))
    assert results[0] == pytest.approx(results[1])


def test_counts_and_where_collects_end() -> None:
    trainer = make_trainer(source := Repeat(BATCH, times=3), books := Books())
    trainer.fit(2)
    assert trainer.state_dict() == {"steps": 2, "collects": 2, "updates": 6, "samples": 4, "tokens": 6}
    assert [ended for _, ended in books.rows] == [False, False, True] * 2
    assert source.finished == 2


def test_the_method_may_end_a_collect() -> None:
    trainer = make_trainer(source := Repeat(BATCH, times=3), books := Books())
    trainer.algorithm.end_after = 2
    trainer.fit(2)
    assert [ended for _, ended in books.rows] == [False, True, False, False, True]
    assert source.finished == 2


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_stopping_leaves_an_update_boundary_to_go_on_from(stop_after: int) -> None:
    whole = make_trainer(Repeat(BATCH, times=3), Books(), rate=0.01, schedule="linear")
    whole.fit(3)
    source = Repeat(BATCH, times=3)
    trainer = make_trainer(source, books := Books(stop_after=stop_after), rate=0.01, schedule="linear")
    trainer.fit(3)
    assert trainer.counts.updates == stop_after
    saved = trainer.state_dict()
    trainer.load_state_dict(saved)
    books.stop_after = None
    trainer.fit(3)
    assert trainer.state_dict() == whole.state_dict()
    assert weight(trainer) == weight(whole)


def test_all_updates_of_a_step_share_its_learning_rate() -> None:
    trainer = make_trainer(Repeat(BATCH, times=2), books := Books(), rate=0.04, schedule="linear", warmup_steps=1)
    trainer.fit(3)
    rates = [metrics["optim/lr"] for metrics, _ in books.rows]
    assert rates == pytest.approx([0.02, 0.02, 0.04, 0.04, 0.02, 0.02])


def test_a_group_may_have_a_multiple_of_the_rate() -> None:
    trainer = make_trainer(Repeat(BATCH), Books(), rate=0.01, max_grad_norm=1.0)
    trainer.optimizer.param_groups[0]["rate"] = 10.0
    trainer.fit(1)
    assert weight(trainer) == pytest.approx(2 - 0.1, rel=1e-5)


def test_a_batch_without_weight_is_counted_and_skipped() -> None:
    empty = make_batch([[1, 2], [3]])
    empty.loss_mask.zero_()
    trainer = make_trainer(Repeat(empty), books := Books())
    trainer.fit(2)
    assert trainer.counts.updates == 2 and trainer.algorithm.steps == 2
    assert all(metrics["optim/skipped"] == 1.0 and "optim/lr" not in metrics for metrics, _ in books.rows)
    assert weight(trainer) == 2.0


def test_a_loss_that_is_not_finite_names_itself_and_the_update() -> None:
    trainer = make_trainer(Repeat(BATCH), Books())
    trainer.fit(1)
    before = weight(trainer)
    with torch.no_grad():
        trainer.policy.w.fill_(1e30)
    with pytest.raises(NumericsError, match=r"loss/squares is inf at update 2 \(step 2\)"):
        trainer.fit(2)
    assert weight(trainer) == pytest.approx(1e30) and before != 1e30


def test_a_gradient_that_is_not_finite_names_the_weight() -> None:
    trainer = make_trainer(Repeat(BATCH), Books())
    trainer.policy.w.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NumericsError, match="the gradient of w is not finite at update 1 "):
        trainer.fit(1)
    assert weight(trainer) == 2.0 and trainer.policy.w.grad is None


def test_a_backward_pass_lets_signals_in() -> None:
    """On a CPU it is one call of compiled code, in which Python would hear nothing."""
    trainer = make_trainer(Repeat(BATCH), Books())
    weights = [nn.Parameter(torch.ones(())) for _ in range(200)]
    for place, parameter in enumerate(weights):
        trainer.policy.register_parameter(f"deep_{place}", parameter)
    trainer = Trainer(
        policy=trainer.policy,
        algorithm=trainer.algorithm,
        source=trainer.source,
        optimizer=trainer.optimizer,
        config=trainer.config,
        processes=trainer.processes,
        learning_rate=0.1,
        device=torch.device("cpu"),
        after_update=Books(),
    )
    values = torch.rand(300, 300)
    total = values
    for parameter in weights:
        total = (total @ values) * parameter / 150

    def expired(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expired)
    try:
        total.sum().backward(retain_graph=True)
        for parameter in weights:
            parameter.grad = None
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(TimeoutError):
            total.sum().backward()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert weights[0].grad is None, "it went on to its end before the signal was heard"
    assert trainer.policy.deep_199.grad is not None
