"""What reward functions see of the tokens."""

from __future__ import annotations

from typing import Any

import torch

from tropism.rollouts.transcribe import Transcriber
from tropism.types import Prompt, Rollouts, pad_rows


def rollouts_of(prompts: list[Prompt], completions: list[list[int]]) -> Rollouts:
    ids = pad_rows(completions)
    zeros = torch.zeros(ids.shape)
    return Rollouts(
        prompt_ids=pad_rows([prompt.ids for prompt in prompts], left=True),
        prompt_lengths=torch.tensor([len(prompt.ids) for prompt in prompts]),
        completion_ids=ids,
        completion_lengths=torch.tensor([len(row) for row in completions]),
        logprobs=zeros,
        behaviour_logprobs=zeros,
        finish_reasons=tuple(("eos", "stop", "length")[i % 3] for i in range(len(completions))),
    )


def text_prompt(tokenizer: Any, text: str, **columns: Any) -> Prompt:
    return Prompt(text=text, ids=tuple(tokenizer(text).input_ids), columns=columns)


def test_texts_ids_reasons_columns_and_state(characters: Any) -> None:
    prompts = [text_prompt(characters, "ab", label=1), text_prompt(characters, "abc", label=2, extra="x")]
    completions = [[*characters(" c!").input_ids, 2], characters("d").input_ids]
    inputs = Transcriber(characters)(rollouts_of(prompts, completions), prompts, {"step": 3, "total_steps": 9})
    assert inputs.prompts == ["ab", "abc"]
    assert inputs.completions == [" c!", "d"]
    assert inputs.completion_ids == completions  # the eos stays, the padding (id 0) is gone
    assert inputs.finish_reasons == ["eos", "stop"]
    assert inputs.columns == {"label": [1, 2], "extra": [None, "x"]}
    assert inputs.trainer_state == {"step": 3, "total_steps": 9}
    assert len(inputs) == 2


def test_a_token_that_is_the_pad_id_is_kept_where_the_length_says_so(characters: Any) -> None:
    prompts = [text_prompt(characters, "ab")]
    inputs = Transcriber(characters)(rollouts_of(prompts, [[0, 5, 0]]), prompts)
    assert inputs.completion_ids == [[0, 5, 0]]


def test_the_leading_space_of_a_completion_is_kept(pieces: Any) -> None:
    prompt = text_prompt(pieces, "Once upon a time")
    whole = pieces("Once upon a time there was a dog.").input_ids
    ids = whole[len(prompt.ids) :]
    assert pieces.decode(ids[:1]) == "there"
    inputs = Transcriber(pieces)(rollouts_of([prompt], [ids]), [prompt])
    assert inputs.completions == [" there was a dog."]
    assert f"{inputs.prompts[0]}{inputs.completions[0]}" == "Once upon a time there was a dog."


def test_spaces_before_punctuation_stay_as_they_were(characters: Any) -> None:
    prompt = text_prompt(characters, "ab")
    ids = characters(" c , d . don 't").input_ids
    assert Transcriber(characters).completion(prompt, ids) == " c , d . don 't"


def test_characters_cut_into_bytes(byte_tokens: Any) -> None:
    transcriber = Transcriber(byte_tokens)
    accent, smile = byte_tokens("é").input_ids, byte_tokens("😀").input_ids
    prompt = text_prompt(byte_tokens, "a")
    assert transcriber.completion(prompt, [*accent, *smile]) == "é😀"
    assert transcriber.completion(prompt, [*accent, *smile[:2]]).startswith("é\ufffd")  # type: ignore[union-attr]
    # The prompt ends within a character that the completion goes on with: its rest is no text of its own.
    half = Prompt(text="a\ufffd", ids=(*prompt.ids, accent[0]))
    assert transcriber.completion(half, [accent[1], *byte_tokens(" b").input_ids]) == "\ufffd b"


def test_messages_are_answered_by_an_assistant_message_without_special_tokens(characters: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    prompt = Prompt(text=messages, ids=(3, 10, 11, 4), columns={})
    ids = [*characters("yo, ok").input_ids, 2]
    inputs = Transcriber(characters)(rollouts_of([prompt], [ids]), [prompt])
    assert inputs.prompts == [messages]
    assert inputs.completions == [[{"role": "assistant", "content": "yo, ok"}]]
    cut = Transcriber(characters, (",",)).completion(prompt, ids)
    assert cut == [{"role": "assistant", "content": "yo"}]


def test_the_text_ends_before_the_stop_string_and_the_ids_keep_it(characters: Any) -> None:
    prompt = text_prompt(characters, "a stop")
    ids = characters(" b stop").input_ids
    inputs = Transcriber(characters, ("stop", "zz"))(rollouts_of([prompt], [ids]), [prompt])
    assert inputs.completions == [" b "]
    assert inputs.completion_ids == [ids]


def test_an_empty_completion_is_an_empty_text(characters: Any) -> None:
    prompt = text_prompt(characters, "a")
    inputs = Transcriber(characters)(rollouts_of([prompt, prompt], [[], [2]]), [prompt, prompt])
    assert inputs.completions == ["", ""]
    assert inputs.completion_ids == [[], [2]]
