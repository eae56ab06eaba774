"""Truncation at a token: where completions end, what stays of them, and what rewards see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from slow_sampling import PROMPTS, keyed, policy_of, slow_completion
from tiny_models import EOS_ID, tiny_tokenizer
from tropism.errors import ConfigError
from tropism.models.heads import ValueHead
from tropism.models.policy import Policy
from tropism.rollouts.config import Sampling, Truncation
from tropism.rollouts.ends import Ends, end_token_id
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.types import Prompt, Rollouts

NEW, AFTER = 8, 2
ENDS = (9, 14, 20, 29)
"""Tokens of which one ends completions; the tiny models say each of them now and then."""


def sample(end: int, beyond: str | None, *, policy: Any = None, **settings: Any) -> Rollouts:
    """Three completions of each prompt; without eos unless ``eos`` is given."""
    eos = settings.pop("eos", ())
    truncation = None if beyond is None else Truncation(token=end, after=AFTER, beyond=beyond)  # type: ignore[arg-type]
    sampling = Sampling(max_new_tokens=NEW, truncation=truncation, batch_size=5, **settings)
    prompts = [Prompt(text="", ids=tuple(row)) for row in PROMPTS]
    sampler = EmbeddedSampler(None, eos)
    return sampler.generate(policy or policy_of("llama"), prompts, sampling, 3, key=StreamKey(seed=4))


def rows_of(rollouts: Rollouts, name: str = "completion_ids") -> list[list[float]]:
    rows = zip(getattr(rollouts, name).tolist(), rollouts.completion_lengths.tolist(), strict=True)
    return [row[:length] for row, length in rows]


def slow_length(ids: list[Any], end: int) -> int:
    """Tokens up to the first end at ``AFTER`` or later."""
    for index, token in enumerate(ids):
        if index >= AFTER and token == end:
            return index + 1
    return len(ids)


@pytest.mark.parametrize(
    ("ids", "kept", "reason"),
    [
        ([13, 5, 13, 7, 13, 9], 3, "stop"),
        ([1, 2, 3, 4, 5, 6], 6, "length"),
        ([13, 1, 1, 1, 1, 13], 6, "stop"),
    ],
)
def test_golden_truncation_of_lm_human_preferences(ids: list[int], kept: int, reason: str) -> None:
    """Token 13, from index 1 on; what follows the end is what the source replaces by its padding."""
    for beyond in ("mask", "train"):
        sampling = Sampling(max_new_tokens=6, truncation=Truncation(token=13, after=1, beyond=beyond))
        ends = Ends.of(sampling, [7], None)
        assert ends.visible(ids) == kept
        assert ends.kept(ids) == (kept if beyond == "mask" else 6)
        assert ends.reason(ids, spelled_stop=False) == reason
        assert [ends.reason(ids[:n], spelled_stop=False) for n in range(1, 6)] == [None] * 5
    ends = Ends.of(Sampling(max_new_tokens=6, truncation=Truncation(token=13, after=1)), [], None)
    reasons: list[Any] = [ends.reason(ids[:n], spelled_stop=False) for n in range(1, 7)]
    assert reasons.index(reason) == kept - 1 and not any(reasons[: kept - 1])


@pytest.mark.parametrize("end", ENDS)
def test_stop_ends_sampling_at_the_token_and_mask_cuts_the_same_off(end: int) -> None:
    plain, stopped, masked = (sample(end, beyond) for beyond in (None, "stop", "mask"))
    expected = [ids[: slow_length(ids, end)] for ids in rows_of(plain)]
    assert rows_of(stopped) == rows_of(masked) == expected
    early = [length < NEW for length in stopped.completion_lengths.tolist()]
    assert any(early) and not all(early)
    for name in ("logprobs", "behaviour_logprobs"):
        torch.testing.assert_close(getattr(masked, name), getattr(stopped, name), rtol=0, atol=1e-5)
        torch.testing.assert_close(rows_of(masked, name), [
            row[: len(ids)] for row, ids in zip(rows_of(plain, name), expected, strict=True)
        ], rtol=0, atol=1e-5)  # fmt: skip
    assert stopped.finish_reasons == masked.finish_reasons
    for ids, reason in zip(expected, stopped.finish_reasons, strict=True):
        assert reason == ("stop" if end in ids[AFTER:] else "length")
    assert stopped.visible_lengths is None and masked.visible_lengths is None


@pytest.mark.parametrize("end", ENDS)
def test_train_keeps_every_token_and_notes_what_rewards_see(end: int) -> None:
    plain, masked, trained = (sample(end, beyond) for beyond in (None, "mask", "train"))
    assert rows_of(trained) == rows_of(plain) and trained.completion_lengths.tolist() == [NEW] * len(trained)
    torch.testing.assert_close(trained.logprobs, plain.logprobs, rtol=0, atol=0)
    assert trained.seen_lengths.tolist() == masked.completion_lengths.tolist()
    assert trained.finish_reasons == masked.finish_reasons
    policy = policy_of("llama")
    with torch.no_grad():
        logprobs = policy(**trained.inputs).logprobs
    torch.testing.assert_close(logprobs, trained.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("beyond", ["mask", "train"])
def test_with_a_fixed_length_eos_is_a_token_like_any_other(beyond: str) -> None:
    """The distribution is the model's own, eos included, and the texts are those of a slow loop that never ends."""
    rollouts = sample(9, beyond, eos=(EOS_ID,))
    assert rows_of(rollouts) == rows_of(sample(9, beyond))
    policy, rows = policy_of("llama"), rows_of(rollouts)
    assert any(EOS_ID in ids[:-1] for ids in rows)
    for row, ids in enumerate(rows):
        slow_ids, logprobs = slow_completion(policy.model, PROMPTS[row // 3], keyed(4, row), new=NEW, eos=None)
        slow_ids = slow_ids[: len(ids)] if beyond == "mask" else slow_ids
        assert ids == slow_ids
        assert rows_of(rollouts, "logprobs")[row] == pytest.approx(logprobs[: len(ids)], abs=1e-5)
    assert "eos" not in rollouts.finish_reasons


def test_in_stop_mode_the_eos_still_ends_a_completion() -> None:
    rollouts = sample(9, "stop", eos=(EOS_ID,))
    assert {"eos", "stop", "length"} <= set(rollouts.finish_reasons)
    for ids, reason in zip(rows_of(rollouts), rollouts.finish_reasons, strict=True):
        assert EOS_ID not in ids[:-1] and 9 not in ids[AFTER:-1]
        assert (ids[-1] == EOS_ID) == (reason == "eos")


def test_values_are_cut_with_the_tokens() -> None:
    policy = Policy(policy_of("llama").model, value_head=ValueHead(32))
    with torch.no_grad():
        policy.value_head.linear.weight.copy_(torch.linspace(-1, 1, 32)[None])  # type: ignore[union-attr]
    masked, trained = (sample(9, beyond, policy=policy) for beyond in ("mask", "train"))
    assert masked.values is not None and trained.values is not None
    assert masked.values.shape == masked.logprobs.shape and trained.values.shape == trained.logprobs.shape
    for short, whole, length in zip(masked.values, trained.values, masked.completion_lengths.tolist(), strict=True):
        torch.testing.assert_close(short[:length], whole[:length], rtol=0, atol=1e-5)
        assert not short[length:].any()


def test_visible_lengths_survive_selecting_and_joining_and_reach_rewards() -> None:
    tokenizer = tiny_tokenizer()
    rollouts = sample(9, "train")
    mine, others = rollouts.select(torch.tensor([4, 2])), rollouts.select(torch.arange(5, len(rollouts)))
    joined = Rollouts.concat([mine, others])
    order = [4, 2, *range(5, len(rollouts))]
    assert joined.seen_lengths.tolist() == [rollouts.seen_lengths.tolist()[i] for i in order]
    prompts = [Prompt(text=text_of(tokenizer, PROMPTS[i // 3]), ids=PROMPTS[i // 3]) for i in order]
    inputs = Transcriber(tokenizer)(joined, prompts)
    for place, ids in zip(order, inputs.completion_ids, strict=True):
        whole = rollouts.completion_ids[place].tolist()
        assert ids == whole[: slow_length(whole, 9)]
    assert inputs.completions == [text_of(tokenizer, ids) for ids in inputs.completion_ids]
    assert joined.completion_lengths.tolist() == [NEW] * len(order)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


# The token -----------------------------------------------------------------------------------------------------------


def test_a_text_is_the_token_that_follows_other_text(characters: Any, pieces: Any, byte_tokens: Any) -> None:
    assert end_token_id(".", characters) == characters.convert_tokens_to_ids(".")
    assert end_token_id("\n", byte_tokens) == byte_tokens("x\n").input_ids[-1]
    # Pieces give a text that stands alone a leading space; a full stop at the end of a sentence has none.
    inside = pieces("the end.", add_special_tokens=False).input_ids[-1]
    assert pieces.convert_ids_to_tokens(inside) == "."
    assert end_token_id(".", pieces) == inside
    assert end_token_id(13, None) == 13
    assert end_token_id("<eos>", characters) == EOS_ID


def test_a_text_of_several_tokens_or_none_is_refused(characters: Any) -> None:
    with pytest.raises(ConfigError, match=r"truncation.token: '. ' is 2 tokens of this tokenizer, and must be one"):
        end_token_id(". ", characters)
    with pytest.raises(ConfigError, match="'§' is unknown to this tokenizer"):
        end_token_id("§", with_unknown())


def with_unknown() -> Any:
    """A tokenizer that has a token for what it does not know."""
    tokenizer = tiny_tokenizer()
    assert tokenizer("§").input_ids == [tokenizer.unk_token_id]
    return tokenizer


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sampling.truncation.token names a token beyond .* 0 to 36"):
        sample(37, "stop")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"truncation": Truncation(token=5, after=4)}, "after is 4, and the last token .* has the index 3"),
        ({"truncation": Truncation(token=5, after=1), "min_new_tokens": 3}, "more than the 2 tokens after which"),
        ({"truncation": Truncation(token=5, beyond="mask"), "stop": ("x",)}, "^stop says .*beyond='mask'"),
        ({"truncation": Truncation(token=5, beyond="train"), "stop_token_ids": (3,)}, "^stop_token_ids says"),
        ({"truncation": Truncation(token=5, beyond="mask"), "min_new_tokens": 1}, "^min_new_tokens says"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(max_new_tokens=4, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token": ""}, "token must not be empty"),
        ({"token": True}, "token must be a text"),
        ({"token": 1.5}, "token must be a text"),
        ({"token": -1}, "ids are not negative"),
        ({"token": 5, "after": -1}, "after must not be negative"),
        ({"token": 5, "beyond": "cut"}, "beyond must be one of stop, mask, train"),
    ],
)
def test_impossible_truncations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Truncation(**fields)


def test_shortened_sampling_may_end_at_its_last_token() -> None:
    sampling = Sampling(max_new_tokens=75, truncation=Truncation(token=198, after=55, beyond="train"))
    short = sampling.shortened(8)
    assert short.max_new_tokens == 8 and short.truncation == Truncation(token=198, after=7, beyond="train")
    assert sampling.shortened(99) == sampling
    assert Sampling(max_new_tokens=9, min_new_tokens=5).shortened(3) == Sampling(max_new_tokens=3, min_new_tokens=3)


def test_what_can_end_a_completion() -> None:
    assert Sampling().can_end(eos=True) and not Sampling().can_end(eos=False)
    assert Sampling(stop=(".",)).can_end(eos=False) and Sampling(stop_token_ids=(3,)).can_end(eos=False)
    assert Sampling(truncation=Truncation(token=5)).can_end(eos=False)
