from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tropism.data.config import DataConfig
from tropism.data.prompts import make_prompts
from tropism.errors import ConfigError, DataError


def settings(**changes):
    return DataConfig(path="unused", **changes)


# ---- special tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "the film", "the film"),
        ({"bos": "<s>"}, "the film", "the film"),  # has a BOS but does not add it: neither do we
        ({"bos": "<s>", "adds": "<s> $A"}, "the film", "<s> the film"),
        ({"bos": "<s>", "adds": "<s> $A"}, "<s> the film", "<s> the film"),  # written out: not doubled
        ({"bos": "<s>", "adds": "<s> $A </s>"}, "the film", "<s> the film"),  # appended eos taken off
        ({"bos": "<s>", "adds": "<s> $A </s>"}, "the film </s>", "<s> the film </s>"),  # the text's own eos stays
        ({"bos": "</s>", "adds": "</s> $A </s>", "pad": "</s>"}, "film", "</s> film"),  # bos == eos == pad
        ({"adds": "$A </s>"}, "the film", "the film"),
        ({"bos": "<s>", "adds": "<s> $A"}, "", "<s>"),
        ({"bos": "<s>", "adds": "<s> $A </s>"}, "", "<s>"),
        ({"bos": "<s>"}, "", "<s>"),  # an empty prompt becomes the BOS even where none is added
        ({"bos": "<s>"}, "   ", "<s>"),
    ],
)
def test_ids_have_one_bos_if_the_tokenizer_adds_one_and_no_added_eos(make_tokenizer, ids_of, options, text, expected):
    (prompt,) = make_prompts([text], make_tokenizer(**options))
    assert prompt.ids == ids_of(expected)
    assert prompt.text == text


def test_real_tokenizer_gives_its_own_ids(stories):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    plain, written, empty = make_prompts(["Once upon", "<s>Once upon", ""], tokenizer)
    assert plain.ids == (1, 403, 407)
    assert written.ids == (1, 403, 407)
    assert empty.ids == (1,)


def test_empty_prompt_without_bos_is_refused_by_record(make_tokenizer):
    with pytest.raises(DataError, match=r"record 1: the prompt '' is empty.*remove it"):
        make_prompts(["the", ""], make_tokenizer())


# ---- columns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompt", "text", "question"])
def test_default_column_and_the_others_travel_along(make_tokenizer, name):
    records = [{name: "the film", "label": 1}, {name: "it"}] if name != "question" else [{name: "it"}]
    prompts = make_prompts(records, make_tokenizer())
    assert prompts[0].text == records[0][name]
    if name != "question":
        assert [dict(p.columns) for p in prompts] == [{"label": 1}, {"label": None}]


def test_prompt_goes_before_messages_and_text(make_tokenizer):
    (prompt,) = make_prompts([{"text": "bad", "prompt": "good"}], make_tokenizer())
    assert prompt.text == "good" and prompt.columns == {"text": "bad"}


def test_unknown_column_lists_what_there_is(make_tokenizer):
    with pytest.raises(DataError, match=r"record 0: none of the columns .* prompt_column. There are: a, b"):
        make_prompts([{"a": "x", "b": "y"}], make_tokenizer())
    with pytest.raises(DataError, match=r"no column 'c'; there are: a, b"):
        make_prompts([{"a": "x", "b": "y"}], make_tokenizer(), settings(prompt_column="c"))


def test_missing_null_or_wrong_value_names_the_record(make_tokenizer):
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match=r"record 1: there is no column 'prompt'"):
        make_prompts([{"prompt": "a"}, {"x": "b"}], tokenizer)
    with pytest.raises(DataError, match=r"record 1: the column 'prompt' is null"):
        make_prompts([{"prompt": "a"}, {"prompt": None}], tokenizer)
    with pytest.raises(DataError, match=r"record 0: the column 'prompt' is int, expected text"):
        make_prompts([{"prompt": 3}], tokenizer)
    with pytest.raises(DataError, match=r"record 0: the column 'prompt' is dict.*with prompt\.text"):
        make_prompts([{"prompt": {"text": "a"}}], tokenizer)


def test_dotted_column_reaches_into_nested_records(make_tokenizer):
    records = [{"prompt": {"text": "the film", "toxicity": 0.5}, "id": 3}]
    (prompt,) = make_prompts(records, make_tokenizer(), settings(prompt_column="prompt.text"))
    assert prompt.text == "the film"
    assert prompt.columns == {"prompt": {"text": "the film", "toxicity": 0.5}, "id": 3}


# ---- first_words, limit, template ----------------------------------------------------------------------------------


def test_first_words_keeps_spacing_and_counts_what_it_skips(make_tokenizer, caplog):
    texts = ["the  film\nwas good", "it", "I saw", " it was bad"]
    with caplog.at_level(logging.INFO):
        prompts = make_prompts(texts, make_tokenizer(), settings(first_words=2))
    assert [p.text for p in prompts] == ["the  film", "I saw", " it was"]
    assert "skipped 1 texts of fewer than 2 words" in caplog.text


def test_first_words_longer_than_every_text_is_refused(make_tokenizer):
    with pytest.raises(DataError, match="none of the 2 texts has 9 words; lower first_words"):
        make_prompts(["it was", "bad"], make_tokenizer(), settings(first_words=9))


def test_limit_counts_usable_prompts(make_tokenizer):
    prompts = make_prompts(
        ["it", "I saw it", "the film", "bad film"], make_tokenizer(), settings(first_words=2, limit=2)
    )
    assert [p.text for p in prompts] == ["I saw", "the film"]


def test_imdb_openings(shared, stories):
    from transformers import AutoTokenizer

    config = DataConfig(path=str(shared / "data" / "imdb" / "small_test.jsonl.gz"), first_words=5, limit=50)
    prompts = make_prompts(config, AutoTokenizer.from_pretrained(stories))
    assert len(prompts) == 50
    assert prompts[0].text == "The submarine used was NOT"
    assert all(len(p.text.split()) == 5 and p.ids[0] == 1 and 1 not in p.ids[1:] for p in prompts)
    assert prompts[0].columns == {"id": "test/pos/694", "label": 1, "rating": 8}


def test_template_fills_in_columns_and_keeps_all_of_them(make_tokenizer):
    config = settings(template="Question: {question} ({n}) {{as is}}\nAnswer:")
    (prompt,) = make_prompts([{"question": "{n} __class__", "n": 3}], make_tokenizer(bos="<s>"), config)
    assert prompt.text == "Question: {n} __class__ (3) {as is}\nAnswer:"
    assert prompt.columns == {"question": "{n} __class__", "n": 3}


def test_template_errors_name_record_and_column(make_tokenizer):
    with pytest.raises(DataError, match=r"record 0: there is no column 'answer'; there are: question"):
        make_prompts([{"question": "x"}], make_tokenizer(), settings(template="{answer}"))
    with pytest.raises(DataError, match=r"record 0: \{question\} of the template is list"):
        make_prompts([{"question": ["x"]}], make_tokenizer(), settings(template="{question}"))
    with pytest.raises(DataError, match=r"no column 'question\.__class__'"):
        make_prompts([{"question": "x"}], make_tokenizer(), settings(template="{question.__class__}"))


# ---- length --------------------------------------------------------------------------------------------------------


def test_overlong_prompt_is_an_error_with_numbers_and_mend(make_tokenizer):
    with pytest.raises(DataError, match=r"record 1: the prompt has 4 tokens, but at most 3 fit.*shorten"):
        make_prompts(["the film", "the film was good"], make_tokenizer(), max_length=3)


@pytest.mark.parametrize(
    ("options", "limit", "expected"),
    [
        ({}, 2, "was good"),
        ({"bos": "<s>", "adds": "<s> $A"}, 3, "<s> was good"),
        ({"bos": "<s>", "adds": "<s> $A"}, 1, "<s>"),
        ({"bos": "<s>", "adds": "<s> $A"}, 5, "<s> the film was good"),
    ],
)
def test_left_truncation_keeps_the_bos_and_the_end(make_tokenizer, ids_of, options, limit, expected):
    tokenizer = make_tokenizer(**options)
    (prompt,) = make_prompts(["the film was good"], tokenizer, max_length=limit, overlong="truncate_left")
    assert prompt.ids == ids_of(expected)
    assert prompt.text == "the film was good"


def test_no_room_for_any_prompt_is_refused(make_tokenizer):
    with pytest.raises(DataError, match="no prompt fits into 0 tokens"):
        make_prompts(["the"], make_tokenizer(), max_length=0, overlong="truncate_left")


# ---- chat ----------------------------------------------------------------------------------------------------------


def test_messages_go_through_the_template_up_to_the_answer(chat_tokenizer, ids_of):
    messages = [{"role": "user", "content": "I saw it"}]
    for source in ([messages], [{"messages": messages}], [{"prompt": messages}], {"prompt": [messages]}):
        (prompt,) = make_prompts(source, chat_tokenizer)
        # The template is complete: the tokenizer's own BOS is not put before it.
        assert prompt.ids == ids_of("<|im_start|> user I saw it <|im_end|> <|im_start|> assistant")
        assert prompt.text == messages


def test_chat_wraps_text_and_system_prompt_goes_first(chat_tokenizer, ids_of):
    config = settings(chat=True, system_prompt="the blue")
    (prompt,) = make_prompts(["it"], chat_tokenizer, config)
    assert prompt.text == [{"role": "system", "content": "the blue"}, {"role": "user", "content": "it"}]
    assert prompt.ids == ids_of(
        "<|im_start|> system the blue <|im_end|> <|im_start|> user it <|im_end|> <|im_start|> assistant"
    )


def test_a_chat_keeps_its_own_system_message(chat_tokenizer):
    own = [{"role": "system", "content": "red"}, {"role": "user", "content": "it"}]
    (prompt,) = make_prompts([own], chat_tokenizer, settings(system_prompt="blue"))
    assert prompt.text == own


def test_chat_errors_name_the_record_and_the_mend(make_tokenizer, chat_tokenizer):
    user = [{"role": "user", "content": "it"}]
    with pytest.raises(DataError, match=r"record 0: chat messages, but .* no chat template; use an instruction-tuned"):
        make_prompts([user], make_tokenizer())
    with pytest.raises(DataError, match=r"record 0: the chat ends with the assistant's answer"):
        make_prompts([[*user, {"role": "assistant", "content": "good"}]], chat_tokenizer)
    with pytest.raises(DataError, match=r"record 0, column 'prompt': message 0 is not of the form"):
        make_prompts([{"prompt": [{"from": "human"}]}], chat_tokenizer)
    with pytest.raises(DataError, match=r"the content of message 0 \(user\) is not text"):
        make_prompts([{"prompt": [{"role": "user", "content": 3}]}], chat_tokenizer)
    with pytest.raises(DataError, match="the list of messages is empty"):
        make_prompts([{"prompt": []}], chat_tokenizer)
    with pytest.raises(DataError, match="first_words is for plain text"):
        make_prompts([user], chat_tokenizer, settings(first_words=2))
    with pytest.raises(ConfigError, match=r"system_prompt needs chat messages.*set chat: true"):
        make_prompts(["it"], chat_tokenizer, settings(system_prompt="blue"))


def test_a_template_that_refuses_names_the_record(make_tokenizer):
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"record 0: the chat template refuses these messages .*roles must alternate"):
        make_prompts([[{"role": "user", "content": "it"}]], tokenizer)


def test_file_errors_name_the_line(tmp_path: Path, make_tokenizer):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "it"}\n\n{"prompt": ""}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:3: the prompt '' is empty"):
        make_prompts(path, make_tokenizer())
