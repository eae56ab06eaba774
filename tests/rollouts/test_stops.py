"""Stop strings and stop tokens: where a completion ends, whatever tokens its text is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slow_sampling import keyed, slow_completion
from tiny_models import EOS_ID, FAMILIES, tiny_model
from tropism.models.policy import Policy
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.protocol import FilterContext
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.stops import StopStrings, added_text, cut_at_stop
from tropism.rollouts.transcribe import Transcriber
from tropism.types import Prompt, Rollouts


def scripted(text_ids: Sequence[int]) -> Any:
    """A filter that makes every row say exactly these tokens."""

    def force(logits: Tensor, context: FilterContext) -> Tensor:
        forced = torch.full_like(logits, -torch.inf)
        for row, (ids, length) in enumerate(zip(context.ids, context.prompt_lengths, strict=True)):
            forced[row, text_ids[len(ids) - length]] = 0.0
        return forced

    return force


def say(policy: Policy, tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], **settings: Any) -> Rollouts:
    sampler = EmbeddedSampler(tokenizer, (tokenizer.eos_token_id,))
    sampling = Sampling(max_new_tokens=settings.pop("max_new_tokens", len(ids)), **settings)
    one = [Prompt(text="", ids=tuple(prompt))]
    return sampler.generate(policy, one, sampling, key=StreamKey(seed=0), filters=[scripted(ids)])


@pytest.fixture(scope="module")
def letters_policy() -> Policy:
    return Policy(FAMILIES["llama"]())


@pytest.fixture(scope="module")
def bytes_policy() -> Policy:
    return Policy(tiny_model("llama", vocab_size=257))


def test_a_stop_string_across_token_borders_ends_the_row_with_its_last_token(
    letters_policy: Policy, characters: Any
) -> None:
    ids = characters("we are the end of it").input_ids
    rollouts = say(letters_policy, characters, (5,), ids, stop=("the end", "zzz"))
    assert characters.decode(rollouts.completion_ids[0]) == "we are the end"
    assert rollouts.finish_reasons == ("stop",)


def test_a_stop_string_in_the_prompt_or_across_its_border_does_not_count(
    letters_policy: Policy, characters: Any
) -> None:
    prompt, ids = characters("stop st").input_ids, characters("op here").input_ids
    rollouts = say(letters_policy, characters, prompt, ids, stop=("stop",))
    assert rollouts.finish_reasons == ("length",)


def test_special_tokens_inside_a_stop_string_are_no_text_however_many(letters_policy: Policy, characters: Any) -> None:
    letters = characters("abc").input_ids
    ids = [letters[0], *[0] * 20, letters[1], 1, letters[2], 9, 9]
    rollouts = say(letters_policy, characters, (5,), ids, stop=("abc",))
    assert rollouts.completion_lengths.tolist() == [24]
    assert rollouts.finish_reasons == ("stop",)


def test_multi_byte_characters_end_a_row_once_complete(bytes_policy: Policy, byte_tokens: Any) -> None:
    for stop in ("😀", "é", "a😀b"):
        ids = byte_tokens("xa😀bé and more").input_ids
        spoken = "xa😀bé".split(stop)[0] + stop
        rollouts = say(bytes_policy, byte_tokens, (5,), ids, stop=(stop,))
        assert rollouts.completion_lengths.tolist() == [len(spoken.encode())]
        assert rollouts.finish_reasons == ("stop",)


def test_pieces_with_byte_fallback_and_leading_spaces(stories_policy: Policy, pieces: Any) -> None:
    prompt = pieces("Once").input_ids
    whole = pieces("Once the cat saw a 😀 there").input_ids
    assert whole[: len(prompt)] == prompt
    ids = whole[len(prompt) :]
    for stop in (" the", " cat saw", "😀", " 😀 t"):
        rollouts = say(stories_policy, pieces, prompt, ids, stop=(stop,))
        assert rollouts.finish_reasons == ("stop",), stop
        length = int(rollouts.completion_lengths[0])
        texts = [added_text(pieces, prompt, ids[:n]) for n in (length - 1, length)]
        assert stop not in texts[0] and stop in texts[1]
        # What rewards see ends before the very string that ended the row, the first token's space included.
        seen = Transcriber(pieces, (stop,)).completion(Prompt(text="Once", ids=tuple(prompt)), ids[:length])
        assert seen == " the cat saw a 😀 there".split(stop)[0]


def test_the_window_sees_what_the_whole_text_shows(characters: Any, byte_tokens: Any) -> None:
    """At each token the answer is that of decoding everything so far and searching it."""
    for tokenizer in (characters, byte_tokens):
        text = "abab, abc abcd. dcba abcde" * 2
        stops = StopStrings(("abcd", "d. d"), tokenizer)
        prompt, ids = tokenizer("ab").input_ids, tokenizer(text).input_ids
        first = next(n for n in range(1, len(ids)) if any(s in text[:n] for s in ("abcd", "d. d")))
        assert [n for n in range(1, first + 1) if stops.ended(prompt, ids[:n])] == [first]


def test_min_new_tokens_defers_a_stop_string_however_early_it_was_spelled(
    letters_policy: Policy, characters: Any
) -> None:
    ids = characters("ab then quite a lot more text").input_ids
    rollouts = say(letters_policy, characters, (5,), ids, stop=("ab",), min_new_tokens=17)
    assert rollouts.completion_lengths.tolist() == [17]
    assert rollouts.finish_reasons == ("stop",)


def test_eos_goes_before_a_stop_string_and_a_stop_before_the_length(letters_policy: Policy, characters: Any) -> None:
    ids = [*characters("abc").input_ids, EOS_ID]
    assert say(letters_policy, characters, (5,), ids, stop=("zz",)).finish_reasons == ("eos",)
    assert say(letters_policy, characters, (5,), ids[:3], stop=("abc",)).finish_reasons == ("stop",)
    assert say(letters_policy, characters, (5,), ids[:3]).finish_reasons == ("length",)
    rollouts = say(letters_policy, characters, (5,), ids, stop_token_ids=(ids[1],))
    assert rollouts.finish_reasons == ("stop",)
    assert rollouts.completion_ids.tolist() == [ids[:2]]


def test_bos_equal_to_eos_at_the_head_of_the_prompt_ends_nothing(stories_policy: Policy, pieces: Any) -> None:
    """The real model's bos is its eos, and every prompt starts with it."""
    texts = ["Once upon a time", "Lily had a dog."]
    prompts = [Prompt(text=text, ids=tuple(pieces(text).input_ids)) for text in texts]
    assert pieces.bos_token_id == pieces.eos_token_id == 1
    assert all(prompt.ids[0] == 1 and 1 not in prompt.ids[1:] for prompt in prompts)
    sampler = EmbeddedSampler(pieces, (1,))
    sampling = Sampling(max_new_tokens=8, min_new_tokens=2)
    rollouts = sampler.generate(stories_policy, prompts, sampling, 2, key=StreamKey(seed=5))
    assert set(rollouts.finish_reasons) == {"length"}
    plain = sampler.generate(stories_policy, prompts, Sampling(max_new_tokens=8), 2, key=StreamKey(seed=5))
    for row in range(4):
        ids, _ = slow_completion(stories_policy.model, prompts[row // 2].ids, keyed(5, row), new=8, eos=1)
        assert plain.completion_ids[row, : len(ids)].tolist() == ids
    with torch.no_grad():
        logprobs = stories_policy(**rollouts.inputs).logprobs
    torch.testing.assert_close(logprobs, rollouts.logprobs, rtol=0, atol=1e-5)


def test_rows_that_stop_make_room_and_the_others_do_not_notice(
    stories: Path, stories_policy: Policy, pieces: Any
) -> None:
    prompts = [Prompt(text="", ids=tuple(pieces(text).input_ids)) for text in ("Once upon a time", "The", "Tom and")]
    sampler = EmbeddedSampler(pieces, (1,))
    key = StreamKey(seed=1)
    free = sampler.generate(stories_policy, prompts, Sampling(max_new_tokens=24), 3, key=key)
    stop = (" was", "the", ".")
    cut = sampler.generate(stories_policy, prompts, Sampling(max_new_tokens=24, stop=stop, batch_size=4), 3, key=key)
    assert "stop" in cut.finish_reasons and stories.is_dir()
    for row, (length, reason) in enumerate(zip(cut.completion_lengths.tolist(), cut.finish_reasons, strict=True)):
        ids = cut.completion_ids[row, :length].tolist()
        assert ids == free.completion_ids[row, :length].tolist()
        texts = [added_text(pieces, prompts[row // 3].ids, ids[:n]) for n in range(1, length + 1)]
        spelled = [any(string in text for string in stop) for text in texts]
        assert spelled == [False] * (length - 1) + [reason == "stop"]


def test_text_is_cut_before_the_first_of_several_stop_strings() -> None:
    assert cut_at_stop("one two three", ("three", "two")) == "one "
    assert cut_at_stop("one two three", ("one",)) == ""
    assert cut_at_stop("one two three", ("four",)) == "one two three"
    assert cut_at_stop("one", ()) == "one"
