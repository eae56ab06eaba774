from __future__ import annotations

import logging

import pytest
import torch

from tropism.data.config import DataConfig
from tropism.data.demonstrations import Demonstration, collate_demonstrations, make_demonstrations
from tropism.errors import ConfigError, DataError


def settings(**changes):
    return DataConfig(path="unused", **changes)


def parts(demonstration: Demonstration):
    assert len(demonstration.loss_mask) == len(demonstration.completion_ids) and all(demonstration.loss_mask)
    return demonstration.prompt_ids, demonstration.completion_ids


# ---- plain text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text", "prompt", "completion"),
    [
        ({"bos": "<s>", "adds": "<s> $A"}, "the film", "<s>", "the film </s>"),
        ({"bos": "<s>", "adds": "<s> $A </s>"}, "the film", "<s>", "the film </s>"),  # its own eos is not doubled
        ({"bos": "<s>", "adds": "<s> $A"}, "the film </s>", "<s>", "the film </s>"),  # nor is one written out
        ({"bos": "<s>", "adds": "<s> $A"}, "", "<s>", "</s>"),
        ({}, "the film", "the", "film </s>"),  # without BOS the first token is read only
        ({}, "the", "the", "</s>"),
        ({"pad": "</s>"}, "the film", "the", "film </s>"),  # pad == eos: the eos is learned all the same
        ({"bos": "</s>", "adds": "</s> $A"}, "the film", "</s>", "the film </s>"),  # bos == eos
        ({"bos": "</s>", "adds": "</s> $A"}, "", "</s>", "</s>"),
    ],
)
def test_text_is_learned_with_one_eos(make_tokenizer, ids_of, options, text, prompt, completion):
    (one,) = make_demonstrations([text], make_tokenizer(**options), max_length=10)
    assert parts(one) == (ids_of(prompt), ids_of(completion))


def test_first_words_are_the_prompt_of_a_text(make_tokenizer, ids_of, caplog):
    with caplog.at_level(logging.INFO):
        (one,) = make_demonstrations(
            ["the film was good", "it was", "it"], make_tokenizer(), settings(first_words=2), max_length=None
        )
    assert parts(one) == (ids_of("the film"), ids_of("was good </s>"))
    assert "skipped 2 texts" in caplog.text


def test_nothing_to_learn_is_refused_by_record(make_tokenizer):
    with pytest.raises(DataError, match="record 0: there is nothing to learn; the completion is empty"):
        make_demonstrations([""], make_tokenizer(), max_length=4)
    with pytest.raises(DataError, match="tokenizer has no eos token"):
        make_demonstrations(["the"], make_tokenizer(eos=None), max_length=4)


# ---- prompt and completion -----------------------------------------------------------------------------------------

PAIR = {"prompt": "I saw", "completion": " the film", "label": 1}


def test_only_completion_and_eos_are_learned(make_tokenizer, ids_of):
    tokenizer = make_tokenizer(bos="<s>", adds="<s> $A")
    (one,) = make_demonstrations([PAIR], tokenizer, max_length=10)
    assert parts(one) == (ids_of("<s> I saw"), ids_of("the film </s>"))
    (all_of_it,) = make_demonstrations([PAIR], tokenizer, max_length=10, completion_only=False)
    assert parts(all_of_it) == (ids_of("<s>"), ids_of("I saw the film </s>"))


def test_a_completion_that_was_cut_while_sampled_has_no_eos_to_learn(make_tokenizer, ids_of):
    records = [{"prompt": "I saw", "completion": " it", "finish_reason": reason} for reason in ("eos", "length", None)]
    made = make_demonstrations(records, make_tokenizer(), max_length=None)
    assert [d.completion_ids for d in made] == [ids_of("it </s>"), ids_of("it"), ids_of("it </s>")]
    assert all(len(d.loss_mask) == len(d.completion_ids) for d in made)


def test_named_columns_and_templates(make_tokenizer, ids_of):
    records = [{"q": "I saw", "a": " it", "x": "y"}]
    for config in (settings(prompt_column="q", completion_column="a"), settings(template="{q}", completion_column="a")):
        (one,) = make_demonstrations(records, make_tokenizer(), config, max_length=10)
        assert parts(one) == (ids_of("I saw"), ids_of("it </s>"))
    (one,) = make_demonstrations(
        [{"q": "I", "a": " it"}], make_tokenizer(), settings(completion_column="a"), max_length=9
    )
    assert parts(one) == (ids_of("I"), ids_of("it </s>"))


def test_empty_prompt_and_empty_completion(make_tokenizer, ids_of):
    records = [{"prompt": "", "completion": "the film"}, {"prompt": "the", "completion": ""}]
    first, second = make_demonstrations(records, make_tokenizer(), max_length=10)
    assert parts(first) == (ids_of("the"), ids_of("film </s>"))
    assert parts(second) == (ids_of("the"), ids_of("</s>"))


def test_tokens_that_merge_across_the_border_are_learned_and_counted(make_tokenizer, ids_of, caplog):
    # "the" + "film" without a space is one unknown word: the joint text departs from the prompt's ids at its end.
    with caplog.at_level(logging.WARNING):
        (one,) = make_demonstrations([{"prompt": "I the", "completion": "film it"}], make_tokenizer(), max_length=10)
    assert parts(one) == (ids_of("I"), ids_of("<unk> it </s>"))
    assert "in 1 demonstrations the prompt's last token merges" in caplog.text


def test_truncation_keeps_the_front_and_drops_full_prompts(make_tokenizer, ids_of, caplog):
    tokenizer = make_tokenizer(bos="<s>", adds="<s> $A")
    records = [PAIR, {"prompt": "I saw the film", "completion": " it"}]
    with caplog.at_level(logging.WARNING):
        (one,) = make_demonstrations(records, tokenizer, max_length=4)
    assert parts(one) == (ids_of("<s> I saw"), ids_of("the"))
    assert "left out 1 demonstrations" in caplog.text
    with pytest.raises(DataError, match=r"none of the 2 records is left: .* prompts of 2 fill max_length \(2\)"):
        make_demonstrations(records, tokenizer, max_length=2)


def test_refusals(make_tokenizer, chatml):
    tokenizer = make_tokenizer(chat_template=chatml)
    with pytest.raises(DataError, match="first_words parts plain texts"):
        make_demonstrations([PAIR], tokenizer, settings(first_words=1), max_length=9)
    with pytest.raises(ConfigError, match="system_prompt needs chat"):
        make_demonstrations(["the film"], tokenizer, settings(system_prompt="it"), max_length=9)
    with pytest.raises(DataError, match="chat needs the answer as well; name its column in completion_column"):
        make_demonstrations(["the film"], tokenizer, settings(chat=True), max_length=9)
    with pytest.raises(DataError, match="the prompt is text but the completion is messages"):
        make_demonstrations([{"prompt": "x", "completion": ANSWER}], tokenizer, max_length=9)
    with pytest.raises(DataError, match="record 1: there is no column 'completion'"):
        make_demonstrations([PAIR, {"prompt": "the"}], tokenizer, max_length=9)


# ---- chat ----------------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "I saw it"}]
ANSWER = [{"role": "assistant", "content": "good film"}]


@pytest.mark.parametrize(
    ("record", "config"),
    [
        (QUESTION + ANSWER, None),
        ({"messages": QUESTION + ANSWER}, None),
        ({"prompt": QUESTION, "completion": ANSWER}, None),
        ({"prompt": QUESTION, "completion": "good film"}, None),
        ({"prompt": "I saw it", "completion": "good film"}, settings(chat=True)),
    ],
)
def test_the_last_answer_of_a_chat_is_learned(chat_tokenizer, ids_of, record, config):
    (one,) = make_demonstrations([record], chat_tokenizer, config, max_length=30)
    assert parts(one) == (
        ids_of("<|im_start|> user I saw it <|im_end|> <|im_start|> assistant"),
        ids_of("good film <|im_end|>"),
    )


def test_earlier_answers_and_the_system_prompt_are_read_only(chat_tokenizer, ids_of):
    chat = [*QUESTION, {"role": "assistant", "content": "bad"}, {"role": "user", "content": "it"}, *ANSWER]
    (one,) = make_demonstrations([chat], chat_tokenizer, settings(system_prompt="blue"), max_length=None)
    assert one.prompt_ids[:4] == ids_of("<|im_start|> system blue <|im_end|>")
    assert parts(one)[1] == ids_of("good film <|im_end|>")


def test_a_chat_without_answer_is_refused(chat_tokenizer):
    for chat in (QUESTION, ANSWER):
        with pytest.raises(DataError, match="record 0: the chat must end with an assistant message"):
            make_demonstrations([chat], chat_tokenizer, max_length=9)


def test_a_template_without_the_prefix_property_is_refused(make_tokenizer, chatml):
    # Like some reasoning models: the header for generation opens a block that the finished chat does not have.
    tokenizer = make_tokenizer(chat_template=chatml.replace("assistant ' }}", "assistant red ' }}"))
    with pytest.raises(DataError, match=r"record 0: the chat template ends the prompt alone with 'red '"):
        make_demonstrations([QUESTION + ANSWER], tokenizer, max_length=20)


def test_a_template_without_eos_is_reported(make_tokenizer, chatml, caplog):
    tokenizer = make_tokenizer(eos="</s>", chat_template=chatml)
    with caplog.at_level(logging.WARNING):
        make_demonstrations([QUESTION + ANSWER], tokenizer, max_length=20)
    assert "ends 1 answers without the tokenizer's eos" in caplog.text


# ---- batches -------------------------------------------------------------------------------------------------------


def test_collate_pads_prompts_left_and_completions_right():
    batch = collate_demonstrations(
        [
            Demonstration(prompt_ids=(5, 6), completion_ids=(8,), loss_mask=(True,)),
            Demonstration(prompt_ids=(7,), completion_ids=(9, 8, 9), loss_mask=(False, True, True)),
        ]
    )
    assert batch.prompt_ids.tolist() == [[5, 6], [0, 7]] and batch.prompt_lengths.tolist() == [2, 1]
    assert batch.completion_ids.tolist() == [[8, 0, 0], [9, 8, 9]] and batch.completion_lengths.tolist() == [1, 3]
    assert batch.loss_mask.dtype == torch.bool
    assert batch.loss_mask.tolist() == [[True, False, False], [False, True, True]]
    with pytest.raises(ValueError, match="no demonstrations"):
        collate_demonstrations([])


# ---- against TRL ---------------------------------------------------------------------------------------------------

TEXTS = [{"text": "Once upon a time, there was a girl."}, {"text": "The end.<s>"}, {"text": "A very long day. " * 9}]
PAIRS = [
    {"prompt": "Once upon a", "completion": " time, there was a girl."},
    {"prompt": "Tom and L", "completion": "ily ran"},  # merges across the border
    {"prompt": "The", "completion": " end.<s>"},
    {"prompt": "A day", "completion": ""},
    {"prompt": "A very long day. " * 9, "completion": " cut off whole"},
    {"prompt": "One day", "completion": " he ran and ran" * 9},
]
CHATS = [{"prompt": QUESTION, "completion": ANSWER}, {"prompt": [*QUESTION, *ANSWER, *QUESTION], "completion": ANSWER}]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("records", "completion_only"),
    [(TEXTS, True), (PAIRS, True), (PAIRS, False), (CHATS, True)],
    ids=["texts", "pairs", "pairs with prompts", "chats"],
)
def test_same_tokens_and_labels_as_trl(stories, tmp_path, chatml, records, completion_only):
    """What TRL 1.16 does, and we do too.

    It writes the eos behind text and completion unless it is spelled out there, encodes prompt + completion in one
    piece, lets the completion begin where that departs from the prompt's ids, keeps the start of what is too long and
    drops what then has nothing to learn. Chats get what the template gives, without another eos.
    """
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = chatml.replace("<|im_end|>", "<s>")
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(stories),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_length=40,
            use_cpu=True,
            bf16=False,
            report_to=[],
            completion_only_loss=completion_only,
        ),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer,
    )
    ours = make_demonstrations(records, tokenizer, max_length=40, completion_only=completion_only)
    assert len(ours) == len(trainer.train_dataset)
    for one, theirs in zip(ours, trainer.train_dataset, strict=True):
        assert [*one.prompt_ids, *one.completion_ids] == theirs["input_ids"]
        # The first token's label never counts: the loss is shifted by one.
        learned = [False] * len(one.prompt_ids) + list(one.loss_mask)
        assert learned[1:] == [label != -100 for label in theirs["labels"]][1:]
