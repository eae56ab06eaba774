"""How reward functions are called, what they may ask for, and how their failures are reported."""

from __future__ import annotations

import asyncio
import functools
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tropism.errors import ConfigError, RewardError
from tropism.rewards import RewardConfig, RewardHarness, RewardTerm
from tropism.types import RewardInputs

Make = Callable[..., RewardInputs]
TWO = ["a b c", "d"]


def values_of(reward: Any, inputs: RewardInputs, name: str = "r") -> list[Any]:
    return RewardHarness(RewardConfig.of({name: reward})).evaluate(inputs).values[name]


def reward_len(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def test_trl_function_with_kwargs(make_inputs: Make) -> None:
    assert values_of(reward_len, make_inputs(TWO)) == [5.0, 1.0]


def test_trl_function_on_conversational_completions(make_inputs: Make) -> None:
    def format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
        contents = [completion[0]["content"] for completion in completions]
        return [1.0 if content.startswith("<think>") else 0.0 for content in contents]

    chats = [[{"role": "assistant", "content": text}] for text in ("<think>a", "b")]
    assert values_of(format_reward, make_inputs(chats)) == [1.0, 0.0]


def test_trl_function_with_a_data_column(make_inputs: Make) -> None:
    def accuracy(prompts: list[str], completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
        return [None if a is None else float(a in c) for c, a in zip(completions, answer, strict=True)]

    assert values_of(accuracy, make_inputs(TWO, answer=["b", None])) == [1.0, None]


def test_trl_functions_that_its_package_ships(make_inputs: Make) -> None:
    rewards = pytest.importorskip("trl.rewards")
    chats = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "b")]
    assert values_of(rewards.think_format_reward, make_inputs(chats)) == [1.0, 0.0]
    punish = rewards.get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=5)
    inputs = make_inputs(["x", "y", "z"], ids=[[1] * 5, [1] * 7, [1] * 11])
    assert values_of(punish, inputs) == [0.0, -0.4, -1.0]


def test_trl_function_with_trainer_state_and_logging(make_inputs: Make) -> None:
    def shaped(
        completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any, **kwargs: Any
    ) -> list[float]:
        log_extra("upper", [completion.upper() for completion in completions])
        log_metric("share", 0.25)
        log_metric("share", 0.75)
        log_metric("undefined", float("nan"))
        assert trainer_state["step"] == trainer_state.step == trainer_state.global_step == 3
        assert trainer_state.max_steps == trainer_state["total_steps"] == 10
        with pytest.raises(AttributeError, match=r"no 'epoch'.*step"):
            _ = trainer_state.epoch
        return [1.0] * len(completions)

    batch = RewardHarness(RewardConfig.of(shaped)).score(make_inputs(TWO))
    assert batch.metrics["share"] == 0.5
    assert "undefined" not in batch.metrics
    assert batch.extras == {"upper": ["A B C", "D"]}


def test_only_what_is_asked_for_is_passed(make_inputs: Make) -> None:
    seen: dict[str, Any] = {}

    def narrow(
        completion_ids: list[list[int]], label: list[int], finish_reasons: list[str], other: int = 7
    ) -> list[float]:
        seen.update(ids=completion_ids, label=label, finish=finish_reasons, other=other)
        return [0.0, 0.0]

    values_of(narrow, make_inputs(TWO, label=[4, 5], unused=[1, 2]))
    assert seen == {"ids": [[0, 1, 2], [0]], "label": [4, 5], "finish": ["eos", "eos"], "other": 7}


def test_kwargs_receive_everything(make_inputs: Make) -> None:
    seen: dict[str, Any] = {}

    def wide(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0, 0.0]

    values_of(wide, make_inputs(TWO, label=[4, 5]))
    own = {"prompts", "completions", "completion_ids", "finish_reasons", "trainer_state", "log_metric", "log_extra"}
    assert set(seen) == own | {"label"}


class Judge:
    def __init__(self, bonus: float = 0.0) -> None:
        self.bonus = bonus

    def __call__(self, completions: list[str]) -> list[float]:
        return [len(completion) + self.bonus for completion in completions]

    def method(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [self.bonus for _ in completions]

    async def wait(self, completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [self.bonus + 1 for _ in completions]


class Network(torch.nn.Module):
    def forward(self, completion_ids: list[list[int]]) -> torch.Tensor:
        return torch.tensor([float(len(ids)) for ids in completion_ids])


def positional_only(completions: list[str], scale: float = 2.0, /) -> list[float]:
    return [scale for _ in completions]


async def async_function(completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (lambda completions: [1.0, 2.0], [1.0, 2.0]),
        (lambda prompts, completions, **_: [1.0, 2.0], [1.0, 2.0]),
        (functools.partial(positional_only), [2.0, 2.0]),
        (positional_only, [2.0, 2.0]),
        (functools.partial(lambda scale, completions: [scale, scale], 3.0), [3.0, 3.0]),
        (functools.partial(lambda completions, scale: [scale, scale], scale=3.0), [3.0, 3.0]),
        (Judge(), [5.0, 1.0]),
        (Judge(2.0).method, [2.0, 2.0]),
        (Judge(2.0).wait, [3.0, 3.0]),
        (Network(), [3.0, 1.0]),
        (async_function, [5.0, 1.0]),
        (functools.partial(async_function), [5.0, 1.0]),
        (lambda completions: async_function(completions), [5.0, 1.0]),
    ],
)
def test_callables_of_every_kind(reward: Any, expected: list[float], make_inputs: Make) -> None:
    assert values_of(reward, make_inputs(TWO)) == expected


def test_a_builtin_without_a_signature_gets_the_completions(make_inputs: Make) -> None:
    reward = functools.partial(map, len)
    assert values_of(reward, make_inputs(TWO)) == [5.0, 1.0]


def test_what_a_partial_fixed_wins_over_a_column_of_the_same_name(make_inputs: Make) -> None:
    def reward(completions: list[str], answer: Any) -> list[float]:
        return [float(answer == "fixed")] * len(completions)

    assert values_of(functools.partial(reward, answer="fixed"), make_inputs(TWO, answer=["x", "y"])) == [1.0, 1.0]
    term = RewardTerm(use=reward, args={"answer": "fixed"})
    assert values_of(term, make_inputs(TWO, answer=["x", "y"])) == [1.0, 1.0]


def test_an_argument_that_is_not_there_is_named(make_inputs: Make) -> None:
    def reward(completions: list[str], solution: list[str]) -> list[float]:
        raise AssertionError("not called")

    for on_error in ("raise", "skip"):
        harness = RewardHarness(RewardConfig.of({"use": reward, "on_error": on_error}))
        with pytest.raises(
            RewardError, match=r"'reward', after step 3 needs the argument 'solution'.*available: answer, prompts"
        ):
            harness.evaluate(make_inputs(TWO, answer=["x", "y"]))


def test_the_librarys_arguments_hide_a_column_and_say_so_once(
    make_inputs: Make, caplog: pytest.LogCaptureFixture
) -> None:
    harness = RewardHarness(RewardConfig.of(reward_len))
    inputs = make_inputs(TWO, completions_=["x", "y"])
    inputs = RewardInputs(**{**vars(inputs), "columns": {"completions": ["longer text", "y"]}})
    for _ in range(2):
        assert harness.evaluate(inputs).values["reward_len"] == [5.0, 1.0]
    assert [record.message for record in caplog.records].count(
        "the data column 'completions' is hidden from reward functions by the argument of that name"
    ) == 1


def test_inputs_of_different_lengths_are_refused(make_inputs: Make) -> None:
    with pytest.raises(RewardError, match=r"'answer' has 1 entries for 2 completions"):
        values_of(reward_len, make_inputs(TWO, answer=["x"]))


def test_async_terms_run_concurrently_in_one_loop(make_inputs: Make) -> None:
    arrived: list[str] = []
    both = asyncio.Event()
    loops: set[int] = set()

    def meeting(name: str) -> Any:
        async def reward(completions: list[str]) -> list[float]:
            arrived.append(name)
            loops.add(id(asyncio.get_running_loop()))
            if len(arrived) == 2:
                both.set()
            await asyncio.wait_for(both.wait(), timeout=5)  # neither returns before the other has begun
            return [1.0] * len(completions)

        return reward

    harness = RewardHarness(RewardConfig.of({"a": meeting("a"), "b": meeting("b"), "c": reward_len}))
    assert list(harness.evaluate(make_inputs(TWO)).values) == ["a", "b", "c"]
    arrived.clear()
    harness.evaluate(make_inputs(TWO))  # the same loop again: clients made in it stay usable
    assert len(loops) == 1
    harness.close()
    assert harness.evaluate(make_inputs(TWO)).values["a"] == [1.0, 1.0]
    harness.close()


def test_async_terms_work_inside_a_running_loop(make_inputs: Make) -> None:
    async def notebook() -> list[Any]:
        return values_of(async_function, make_inputs(TWO))

    assert asyncio.run(notebook()) == [5.0, 1.0]


def test_sync_functions_run_in_the_callers_thread_without_gradients(make_inputs: Make) -> None:
    def reward(completions: list[str]) -> torch.Tensor:
        assert threading.current_thread() is threading.main_thread()
        assert not torch.is_grad_enabled()
        return torch.ones(len(completions))

    assert values_of(reward, make_inputs(TWO)) == [1.0, 1.0]


def broken(completions: list[str], **kwargs: Any) -> list[float]:
    raise KeyError("label")


async def broken_async(completions: list[str], **kwargs: Any) -> list[float]:
    raise KeyError("label")


def broken_generator(completions: list[str], **kwargs: Any) -> Any:
    yield 1.0
    raise KeyError("label")


@pytest.mark.parametrize("reward", [broken, broken_async, broken_generator])
def test_an_exception_names_function_step_prompt_and_place(reward: Any, make_inputs: Make) -> None:
    harness = RewardHarness(RewardConfig.of({"warmth": reward}))
    name = reward.__name__
    message = (
        rf"reward 'warmth' \({name}\), after step 3 raised KeyError: 'label' at .*test_harness.py:\d+ .*'prompt 0'"
    )
    with pytest.raises(RewardError, match=message) as caught:
        harness.evaluate(make_inputs(TWO))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_bad_value_names_function_step_row_and_prompt(make_inputs: Make) -> None:
    harness = RewardHarness(RewardConfig.of(lambda completions: [1.0, float("nan")]))
    with pytest.raises(
        RewardError, match=r"reward 'reward', after step 3, row 1 \(prompt 'prompt 1'\): returned NaN; return None"
    ):
        harness.evaluate(make_inputs(TWO))
    harness = RewardHarness(RewardConfig.of({"r": lambda completions: [1.0]}))
    with pytest.raises(RewardError, match=r"reward 'r' \(reward\), after step 3 returned 1 rewards for 2 completions"):
        harness.evaluate(make_inputs(TWO))


def test_a_long_chat_prompt_is_shortened_in_messages(make_inputs: Make) -> None:
    inputs = make_inputs(TWO)
    inputs.prompts[0] = [{"role": "user", "content": "x" * 500}]
    with pytest.raises(RewardError, match=rf"first prompt: '{'x' * 57}[.][.][.]'"):
        values_of(broken, inputs)


@pytest.mark.parametrize(
    "reward", [broken, broken_async, lambda completions: [float("nan")] * 2, lambda completions: [1.0]]
)
def test_skip_leaves_the_term_out_counts_it_and_warns(
    reward: Any, make_inputs: Make, caplog: pytest.LogCaptureFixture
) -> None:
    harness = RewardHarness(RewardConfig.of({"terms": {"bad": reward, "good": reward_len}, "on_error": "skip"}))
    batch = harness.score(make_inputs(TWO))
    assert batch.per_completion.tolist() == [5.0, 1.0]
    assert batch.terms["bad"].isnan().all()
    assert batch.metrics["reward/bad/skipped"] == 2.0 and batch.metrics["reward/bad/failed"] == 1.0
    assert "reward/bad" not in batch.metrics
    warnings = [record.message for record in caplog.records if "left unscored" in record.message]
    assert len(warnings) == 1 and "reward 'bad'" in warnings[0]
    assert "step 3" in warnings[0] and re.search(r"rows? [01]|row 1", warnings[0]) and "'prompt " in warnings[0]
    assert [reason in warnings[0] for reason in batch.errors["bad"]] == [True, True]  # type: ignore[operator]


def test_skip_drops_what_the_failed_function_logged(make_inputs: Make) -> None:
    def reward(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
        log_extra("note", ["x"])
        log_metric("m", 1.0)
        raise RuntimeError

    raw = RewardHarness(RewardConfig.of({"use": reward, "on_error": "skip"})).evaluate(make_inputs(TWO))
    assert raw.extras == {} and raw.metrics == {} and raw.counts == {"reward": {"failed": 1, "skipped": 2}}


def test_interrupts_pass_through(make_inputs: Make) -> None:
    def reward(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    harness = RewardHarness(RewardConfig.of({"terms": {"a": async_function, "b": reward}, "on_error": "skip"}))
    with pytest.raises(KeyboardInterrupt):
        harness.evaluate(make_inputs(TWO))


def test_extra_columns_need_one_value_per_completion_and_one_owner(make_inputs: Make) -> None:
    def logs(column: str, count: int) -> Any:
        def reward(completions: list[str], log_extra: Any) -> list[float]:
            log_extra(column, [0] * count)
            return [1.0] * len(completions)

        return reward

    with pytest.raises(RewardError, match=r"logged 3 values as 'x' for 2 completions"):
        values_of(logs("x", 3), make_inputs(TWO))
    with pytest.raises(RewardError, match=r"'b'.* logs the column 'x', as another term does"):
        RewardHarness(RewardConfig.of({"a": logs("x", 2), "b": logs("x", 2)})).evaluate(make_inputs(TWO))


def test_metrics_of_the_library_cannot_be_overwritten(make_inputs: Make) -> None:
    def reward(completions: list[str], log_metric: Any) -> list[float]:
        log_metric("reward/mean", 1.0)
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"logs 'reward/mean'"):
        values_of(reward, make_inputs(TWO))


def test_no_rows_call_no_function(make_inputs: Make) -> None:
    harness = RewardHarness(RewardConfig.of(broken))
    raw = harness.evaluate(make_inputs([]))
    assert raw.values == {"broken": []} and len(raw) == 0
    batch = harness.combine(raw, torch.zeros(0, dtype=torch.long), 0)
    assert len(batch) == 0 and batch.per_token is None


def test_each_function_is_called_once_per_batch(make_inputs: Make) -> None:
    calls: list[int] = []

    def reward(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        return [1.0] * len(completions)

    RewardHarness(RewardConfig.of(reward)).score(make_inputs(["same", "same", "same"]))
    assert calls == [3]


def test_dry_call_fails_on_a_broken_function_even_with_skip(make_inputs: Make) -> None:
    harness = RewardHarness(RewardConfig.of({"use": broken, "on_error": "skip"}))
    with pytest.raises(RewardError, match=r"KeyError"):
        harness.dry_call(make_inputs(TWO))


def test_dry_call_says_nothing_of_constant_rewards(make_inputs: Make, caplog: pytest.LogCaptureFixture) -> None:
    # A few short sample rows often score alike; the monitor judges whole steps.
    raw = RewardHarness(RewardConfig.of({"flat": lambda completions: [0.5, 0.5], "fine": reward_len})).dry_call(
        make_inputs(TWO)
    )
    assert raw.values == {"flat": [0.5, 0.5], "fine": [5.0, 1.0]}
    assert not caplog.records


def test_a_class_is_not_a_reward() -> None:
    with pytest.raises(ConfigError, match=r"Judge is a class; give an instance of it: Judge\(...\)"):
        RewardHarness(RewardConfig.of(Judge))
