"""What an encoder reads and a decoder writes: texts of their own, each with the special tokens of the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from tiny_models import BOS_ID, EOS_ID, PAD_ID, tiny_tokenizer
from tropism.data.config import DataConfig, Preparation
from tropism.data.demonstrations import make_demonstrations
from tropism.data.encoding import encode_completion, encode_text, room_behind, room_for_prompt
from tropism.data.episodes import read_episodes
from tropism.data.opinions import make_opinions
from tropism.data.pairs import make_pairs
from tropism.data.prompts import make_prompts
from tropism.data.scored import make_scored
from tropism.errors import DataError
from tropism.texts import tell_decoder_prefix

A, B, C = 5, 6, 7
"""Ids of the letters."""


@pytest.fixture
def t5() -> Any:
    """Every text ends with an eos; the decoder begins with the pad."""
    tokenizer = tiny_tokenizer(add_eos=True)
    tell_decoder_prefix(tokenizer, (PAD_ID,))
    return tokenizer


@pytest.fixture
def bart() -> Any:
    """Every text stands between bos and eos; the decoder begins with the eos."""
    tokenizer = tiny_tokenizer(add_bos=True, add_eos=True)
    tell_decoder_prefix(tokenizer, (EOS_ID,))
    return tokenizer


def test_prompts_keep_their_special_tokens(t5: Any, bart: Any) -> None:
    assert [prompt.ids for prompt in make_prompts(["ab", ""], t5)] == [(A, B, EOS_ID), (EOS_ID,)]
    assert [prompt.ids for prompt in make_prompts(["ab"], bart)] == [(BOS_ID, A, B, EOS_ID)]
    causal = tiny_tokenizer(add_bos=True, add_eos=True)
    assert [prompt.ids for prompt in make_prompts(["ab"], causal)] == [(BOS_ID, A, B)]


@pytest.mark.parametrize("text", ["ab", "ab<eos>"])
def test_completions_end_with_one_eos(text: str, t5: Any, bart: Any) -> None:
    assert encode_completion(t5, text) == [A, B, EOS_ID]
    assert encode_completion(bart, text) == [BOS_ID, A, B, EOS_ID]
    plain = tiny_tokenizer()
    tell_decoder_prefix(plain, (PAD_ID,))
    assert encode_completion(plain, text) == [A, B, EOS_ID]


def test_an_eos_within_a_completion_stays(t5: Any) -> None:
    assert encode_completion(t5, "a<eos>b") == [A, EOS_ID, B, EOS_ID]


def test_what_generation_forces_is_not_learned(bart: Any) -> None:
    tell_decoder_prefix(bart, (EOS_ID, BOS_ID))
    assert encode_completion(bart, "ab") == [A, B, EOS_ID]


def test_a_language_behind_the_eos_is_not_learned() -> None:
    """As mBART's tokenizer writes it; the decoder starts with the language."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
    special = [("<eos>", EOS_ID), ("<user>", 3)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <eos> <user>", special_tokens=special)
    tell_decoder_prefix(tokenizer, (3,))
    assert encode_text(tokenizer, "ab") == [A, B, EOS_ID, 3]
    assert encode_completion(tokenizer, "ab") == [A, B, EOS_ID]


def test_every_kind_of_text_is_parted(t5: Any) -> None:
    """Prompt and completion are encoded by themselves, so nothing merges where they meet."""
    record = {"prompt": "ab", "completion": "c", "reward": 1.0, "label": True}
    demonstration = make_demonstrations([record], t5, max_length=None)[0]
    assert (demonstration.prompt_ids, demonstration.completion_ids) == ((A, B, EOS_ID), (C, EOS_ID))
    scored = make_scored([record], t5, targets=["reward"], max_length=None)[0]
    assert (scored.prompt_ids, scored.completion_ids) == ((A, B, EOS_ID), (C, EOS_ID))
    cut = make_scored([{**record, "finish_reason": "length"}], t5, targets=["reward"], max_length=None)[0]
    assert cut.completion_ids == (C,)
    opinion = make_opinions([record], t5, max_length=None)[0]
    assert (opinion.prompt_ids, opinion.completion_ids) == ((A, B, EOS_ID), (C, EOS_ID))
    pair = make_pairs([{"prompt": "ab", "chosen": "c", "rejected": "b"}], t5, max_length=None)[0]
    assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == ((A, B, EOS_ID), (C, EOS_ID), (B, EOS_ID))
    for turns in ([{"turns": ["ab", "c"], "reward": 1.0}], [record]):
        episode = read_episodes(turns, t5, target="reward", max_length=None)[0][1]
        assert (episode.prompt_ids, episode.completion_ids) == ((A, B, EOS_ID), (C, EOS_ID))


def test_a_prompt_of_first_words(t5: Any) -> None:
    made = make_demonstrations(["a bc"], t5, DataConfig(path="x", first_words=1), max_length=None)[0]
    assert made.prompt_ids == (A, EOS_ID)
    assert t5.decode(made.completion_ids) == " bc<eos>"


def test_preparation_frames_a_prompt_within_its_special_tokens(bart: Any) -> None:
    prepare = Preparation(length=2, prefix="c", suffix="b")
    config = DataConfig(path="x", prepare=prepare, completion_column="completion")
    assert make_prompts([{"prompt": "abc"}], bart, config)[0].ids == (BOS_ID, C, A, B, B, EOS_ID)
    made = make_demonstrations([{"prompt": "abc", "completion": "a"}], bart, config, max_length=None)[0]
    assert made.prompt_ids == (BOS_ID, C, A, B, B, EOS_ID)
    assert made.completion_ids == (BOS_ID, A, EOS_ID)


def test_each_half_has_the_whole_length(t5: Any) -> None:
    record = {"prompt": "abcab", "completion": "cabca"}  # six tokens each, with the eos
    whole = make_demonstrations([record], t5, max_length=7)[0]
    assert (len(whole.prompt_ids), len(whole.completion_ids)) == (6, 6)
    cut = make_demonstrations([record], t5, max_length=6)[0]  # one place of the decoder is the start token's
    assert (len(cut.prompt_ids), len(cut.completion_ids)) == (6, 5)
    with pytest.raises(DataError, match="the prompts of 1 fill"):
        make_demonstrations([record], t5, max_length=5)
    pair = make_pairs([{"prompt": "abcab", "chosen": "cabca", "rejected": "b"}], t5, max_length=6)[0]
    assert (len(pair.prompt_ids), len(pair.chosen_ids)) == (6, 5)
    episode = read_episodes([{"turns": ["abcab", "cabca"], "reward": 1.0}], t5, target="reward", max_length=6)[0][1]
    assert (len(episode.prompt_ids), len(episode.completion_ids)) == (6, 5)


def test_room(t5: Any) -> None:
    causal = tiny_tokenizer()
    assert [room_behind(causal, length, 10) for length in (3, 10, 12)] == [7, 0, 0]
    assert [room_behind(t5, length, 10) for length in (3, 10, 12)] == [9, 9, 0]
    assert room_behind(t5, 99, None) is room_behind(causal, 99, None) is None
    assert (room_for_prompt(causal, 10, new=4, taken=1), room_for_prompt(t5, 10, new=4, taken=1)) == (5, 9)
    assert (room_for_prompt(t5, 10, new=9), room_for_prompt(t5, 10, new=10)) == (10, 0)
    assert room_for_prompt(t5, None, new=10) is None


def refused() -> Iterator[tuple[Any, dict[str, Any], str]]:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    yield ["ab"], {}, "texts without a prompt of their own, and an encoder-decoder needs one"
    yield [{"prompt": "", "completion": "b"}], {}, "the prompt is empty, and an encoder-decoder needs one"
    yield [{"prompt": "a", "completion": "b"}], {"completion_only": False}, "predicts no tokens; leave completion_only"
    yield [{"prompt": chat[:1], "completion": chat[1:]}], {}, "an encoder-decoder, which no chat template is for"


@pytest.mark.parametrize(("records", "options", "message"), refused())
def test_texts_that_only_a_causal_model_can_learn(records: Any, options: Any, message: str, t5: Any) -> None:
    t5.chat_template = "{{ messages }}"
    with pytest.raises(DataError, match=message):
        make_demonstrations(records, t5, max_length=None, **options)


def test_several_turns_are_refused(t5: Any) -> None:
    with pytest.raises(DataError, match="turns has 4 texts, and an encoder-decoder reads one prompt"):
        read_episodes([{"turns": ["a", "b", "c", "a"], "reward": 1.0}], t5, target="reward", max_length=None)


def test_a_chat_prompt_is_refused(t5: Any) -> None:
    with pytest.raises(DataError, match="an encoder-decoder, which no chat template is for"):
        make_prompts([{"messages": [{"role": "user", "content": "a"}]}], t5)
