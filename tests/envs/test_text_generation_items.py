"""What the token-level environment refuses, the items it begins with, and the rollouts it gives."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import EOS_ID, VOCABULARY, tiny_model, tiny_tokenizer
from tropism import TextGenerationEnv
from tropism.errors import ConfigError, DataError, TropismError

pytest.importorskip("gymnasium")

A, B, C = 5, 6, 7
"""Token ids of the letters a, b and c."""


def count_a(completions: list[str]) -> list[float]:
    return [float(text.count("a")) for text in completions]


def make(reward: Any = count_a, items: Any = ("hello",), **options: Any) -> TextGenerationEnv:
    model = (tiny_model("llama"), tiny_tokenizer())
    return TextGenerationEnv(model, list(items), reward, **{"max_new_tokens": 3, **options})


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [-1, VOCABULARY, 10**12])
def test_an_action_out_of_the_vocabulary_is_refused(action: int) -> None:
    env = make()
    env.reset()
    with pytest.raises(TropismError, match=rf"the action {action} is no token: .* 0 to {VOCABULARY - 1}"):
        env.step(action)
    assert env.completions == [[]]
    env.step(A)  # nothing has happened
    assert env.completions == [[A]]


@pytest.mark.parametrize("action", [1.0, "a", None, True, [A, B], [[A]], np.array([0.5]), []])
def test_an_action_that_is_no_token_id_is_refused(action: Any) -> None:
    env = make()
    env.reset()
    with pytest.raises(TropismError, match="the action must be a token id"):
        env.step(action)


@pytest.mark.parametrize("action", [A, [A], [A, B, C], [A, 1.5]])
def test_an_action_needs_a_token_per_sample(action: Any) -> None:
    env = make(compare_sample=2)
    env.reset()
    with pytest.raises(TropismError, match="the action must be 2 token ids, one per sample"):
        env.step(action)


@pytest.mark.parametrize("action", [np.int64(A), np.array(A), np.array([A]), torch.tensor(A), [A], np.uint8(A)])
def test_an_action_may_be_any_kind_of_whole_number(action: Any) -> None:
    env = make()
    env.reset()
    env.step(action)
    assert env.completions == [[A]]
    assert all(type(token) is int for token in env.completions[0])


def test_a_step_after_the_end_or_before_the_beginning_is_refused() -> None:
    env = make(max_new_tokens=1)
    for use in (lambda: env.step(A), lambda: env.logits(), lambda: env.prompt_ids, lambda: env.item):
        with pytest.raises(TropismError, match=r"no episode: call reset\(\) first"):
            use()
    env.reset()
    env.step(A)
    with pytest.raises(TropismError, match=r"the episode is over; call reset\(\)"):
        env.step(A)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "at least one item"),
        (["ab", {"answer": "x", "by": "us"}], "item 1 has no prompt: .*'prompt' or 'input'.*'answer', 'by'"),
        ([{"input": None}], "item 0 has no prompt"),
        ([{"input": 7}], "item 0, 'input' is int '7'; a prompt is text"),
        ([7], "item 0 is int '7'"),
        (["a" * 62], "at most 61 fit"),
    ],
)
def test_an_item_without_a_usable_prompt_is_refused(items: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(items=items)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"item": 3}, "there is no item 3; the environment has 1"),
        ({"item": {"answer": "x"}}, "the item has no prompt"),
        ({"items": 0}, "knows the option 'item' alone, not 'items'"),
    ],
)
def test_reset_refuses_what_it_cannot_begin_with(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TropismError, match=message):
        make().reset(options=options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observation": "text"}, "choose hidden or ids"),
        ({"compare_sample": 0}, "compare_sample must be a whole number of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ({"max_new_tokens": 64}, "leaves no room for a prompt in the model's context of 64"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


# Items and rollouts --------------------------------------------------------------------------------------------------


def test_reset_begins_with_the_item_that_is_asked_for() -> None:
    env = make(items=["ab", {"input": "hello", "by": "us"}])
    env.reset(options={"item": -1})
    assert env.item == {"input": "hello", "by": "us"}
    env.reset(options={"item": np.int64(0)})
    assert env.prompt_ids == [A, B]
    env.reset(options={"item": {"prompt": "a much longer one than the others", "by": "them"}})
    assert len(env.prompt_ids) == 33
    env.step(C)


def test_prompt_of_makes_the_prompt_of_any_item() -> None:
    env = make(items=[("ab", 3), ("c", 4)], prompt_of=lambda item: item[0] * 2)
    env.reset(options={"item": 0})
    assert (env.item, env.prompt_ids) == (("ab", 3), [A, B, A, B])


def test_a_chat_is_asked_through_the_template() -> None:
    chat = [{"role": "user", "content": "ab"}]
    seen: list[Any] = []

    def look(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.append((prompts, completions))
        return [0.0]

    env = TextGenerationEnv((tiny_model("llama"), tiny_tokenizer(chat=True)), [chat], look, max_new_tokens=1)
    env.reset()
    assert env.prompt_ids == [3, A, B, 4]
    *_, info = env.step(C)
    assert info["predicted_str"] == ["c"]
    assert seen == [([chat], [[{"role": "assistant", "content": "c"}]])]


def test_a_finished_episode_gives_rollouts() -> None:
    env = make(items=["hello"], compare_sample=2)
    env.reset()
    with pytest.raises(TropismError, match="the episode goes on"):
        env.rollouts([[], []])
    for actions in ([A, B], [EOS_ID, C], [A, A]):
        env.step(actions)
    rollouts = env.rollouts([[-1, -2], [-3, -4, -5]], values=[[1, 2], [3, 4, 5]], temperature=0.5)
    assert rollouts.prompt_ids.tolist() == [env.prompt_ids] * 2
    assert rollouts.completion_ids.tolist() == [[A, EOS_ID, 0], [B, C, A]]
    assert rollouts.completion_lengths.tolist() == [2, 3]
    assert rollouts.logprobs.tolist() == [[-1, -2, 0], [-3, -4, -5]] == rollouts.behaviour_logprobs.tolist()
    assert rollouts.values is not None and rollouts.values.tolist() == [[1, 2, 0], [3, 4, 5]]
    assert rollouts.finish_reasons == ("eos", "length")
    assert rollouts.temperature == 0.5
    with pytest.raises(TropismError, match=r"logprobs has rows of \[2, 2\] numbers for completions of \[2, 3\] tokens"):
        env.rollouts([[-1, -2], [-3, -4]])


def test_importing_the_library_needs_no_gymnasium_and_using_the_environment_says_so() -> None:
    code = (
        "import sys; sys.modules['gymnasium'] = None\n"
        "import tropism\n"
        "try:\n    tropism.TextGenerationEnv\n"
        "except tropism.TropismError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "tropism[gym]"' in said
