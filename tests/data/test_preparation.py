from __future__ import annotations

import logging
import random
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tiny_models import tiny_tokenizer
from tropism.config import Recipe
from tropism.data.config import DataConfig, Preparation
from tropism.data.demonstrations import make_demonstrations
from tropism.data.encoding import encode_bare
from tropism.data.order import PromptStream
from tropism.data.preparation import Preparer, clean_news, clean_post
from tropism.data.prompts import make_prompts
from tropism.data.scored import make_scored
from tropism.errors import ConfigError, DataError

FULL_STOP, LINE_BREAK, BLANK_FULL_STOP = 13, 198, 764
"""'.', '\\n' and ' .' in GPT-2's vocabulary."""


@pytest.fixture(scope="module")
def gpt2():
    """A tokenizer of bytes with GPT-2's ids for them, and its token for " ."; bos is eos and is not added."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): index for index, byte in enumerate(printable)}
    vocabulary |= {chr(256 + n): len(printable) + n for n in range(len(other))}
    vocabulary |= {"\u0120.": BLANK_FULL_STOP, "<|endoftext|>": 50256}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u0120", ".")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)


def settings(**changes):
    return DataConfig(path="unused", prepare=Preparation(**changes))


def random_queries(count, *, seed):
    """The data set that the source tests itself with: 40 characters, letters and full stops."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz.", k=40)) for _ in range(count)]


# ---- start, length, end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preparation", "text", "expected"),
    [
        ({}, "ab. cd", "ab. cd"),
        ({"start_text": "."}, "ab. cd. ef", " cd. ef"),  # after the first
        ({"start_text": "."}, ".ab", "ab"),
        ({"start_text": "."}, "abc.", "abc."),  # nothing after it: the text stays whole
        ({"start_text": "."}, "ab.c.", "c."),
        ({"start_text": "."}, "abc", None),
        ({"length": 3}, "abcdef", "abc"),
        ({"length": 3}, "ab", "ab"),
        ({"length": 3, "start_text": "."}, "ab.cdef", "cde"),  # counted after the start
        ({"end_text": "."}, "ab. cd. ef", "ab. cd."),  # the last of them stays
        ({"end_text": "."}, "abc", None),
        ({"end_text": ".", "length": 5}, "ab. cd. ef", "ab."),  # the last within the length
        ({"end_text": ".", "length": 3}, "abcd. ef", None),  # it is there, but cut off
        ({"start_text": ".", "end_text": "."}, "ab. cd. ef", " cd."),
        ({"start_text": ".", "end_text": "."}, "ab. cd", None),  # the only one is the start
        ({"start_text": ".", "end_text": "."}, "ab.", "ab."),
        ({"start_text": "\n", "end_text": "\n"}, "a\nb\nc", "b\n"),
    ],
)
def test_texts_start_and_end_at_tokens(gpt2, preparation, text, expected):
    prepared = Preparer(gpt2, Preparation(**preparation))(text, "record 0")
    assert (None if prepared is None else prepared.text) == expected
    if prepared is not None:
        assert prepared.ids == tuple(gpt2(expected)["input_ids"])


def test_random_strings_are_cut_as_slices_of_characters_would_be():
    """Every token of the tiny tokenizer is one character, so the right answer can be had from the string alone."""
    tokenizer = tiny_tokenizer()
    preparer = Preparer(tokenizer, Preparation(start_text=".", length=12, end_text="."))
    kept = 0
    for text in random_queries(300, seed=0):
        _, start, rest = text.partition(".")
        cut = (rest or text)[:12]
        expected = cut[: cut.rfind(".") + 1] if start and "." in cut else None
        prepared = preparer(text, "record 0")
        assert (None if prepared is None else prepared.text) == expected
        kept += expected is not None
    assert 30 < kept < 270 and preparer.read == 300
    assert kept == 300 - preparer.skipped["start_text"] - preparer.skipped["end_text"]


def test_an_uncut_text_stays_as_it_was_written_and_a_cut_one_is_its_tokens(gpt2, make_tokenizer, ids_of):
    for length, text in ((3, "the  film\nwas"), (2, "the film")):  # this tokenizer loses which blanks there were
        prepared = Preparer(make_tokenizer(), Preparation(length=length))("the  film\nwas", "record 0")
        assert prepared is not None and prepared.text == text and prepared.ids == ids_of(text)
    within = Preparer(gpt2, Preparation(length=6))("a caf\u00e9", "record 0")  # its accent is cut in two
    assert within is not None and within.text == "a caf\ufffd" and len(within.ids) == 6


@pytest.mark.parametrize("text", [".", "\n"])
def test_a_token_is_sought_as_it_stands_within_texts(stories, text):
    """This tokenizer puts a blank before a text that stands alone, which makes two tokens of it."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    prepared = Preparer(tokenizer, Preparation(start_text=text))(f"Once{text}upon a time", "record 0")
    assert prepared is not None and prepared.text == "upon a time"


@pytest.mark.parametrize("name", ["start_text", "end_text"])
def test_what_is_not_one_token_is_refused(gpt2, make_tokenizer, name):
    with pytest.raises(ConfigError, match=rf"prepare\.{name}: 'no' is 2 tokens of this tokenizer, and must be one"):
        make_prompts(["it"], gpt2, settings(**{name: "no"}))
    with pytest.raises(ConfigError, match=rf"prepare\.{name}: 'unheard' is unknown to this tokenizer"):
        make_prompts(["it"], make_tokenizer(), settings(**{name: "unheard"}))


@pytest.mark.parametrize(
    "preparation", [{"length": 5}, {"length": 5, "start_text": "."}, {"length": 9, "end_text": "."}]
)
@pytest.mark.parametrize("opening", ["", "no full stop for " * 40, "so. "])
def test_of_a_long_text_only_a_beginning_is_encoded(gpt2, monkeypatch, preparation, opening):
    """The same comes of it as of the whole, which a length beyond the text asks for."""
    text = opening + "It was. A film of the sea. " * 4000
    whole = Preparer(gpt2, Preparation(**{**preparation, "length": None, "end_text": None}))(text, "record 0")
    assert whole is not None
    expected = list(whole.ids[: preparation["length"]])
    if "end_text" in preparation:
        expected = expected[: len(expected) - expected[::-1].index(FULL_STOP)] if FULL_STOP in expected else None
    encoded: list[int] = []
    monkeypatch.setattr(
        "tropism.data.preparation.encode_bare",
        lambda tokenizer, given: encoded.append(len(given)) or encode_bare(tokenizer, given),
    )
    found = Preparer(gpt2, Preparation(**preparation))(text, "record 0")
    assert (None if found is None else list(found.ids)) == expected
    assert found is None or found.text == gpt2.decode(found.ids)
    assert sum(encoded) < 4000


# ---- prefix and suffix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "the film", "I saw the film it was"),
        ({"bos": "<s>"}, "the film", "I saw the film it was"),  # has a BOS but does not add it
        ({"bos": "<s>", "adds": "<s> $A"}, "the film", "<s> I saw the film it was"),
        ({"bos": "<s>", "adds": "<s> $A </s>"}, "the film", "<s> I saw the film it was"),
        ({"bos": "</s>", "adds": "</s> $A </s>", "pad": "</s>"}, "film", "</s> I saw film it was"),
    ],
)
def test_the_policy_reads_what_stands_around_the_text_and_rewards_do_not(
    make_tokenizer, ids_of, options, text, expected
):
    (prompt,) = make_prompts(
        [{"text": text, "n": 1}], make_tokenizer(**options), settings(prefix="I saw", suffix="it was")
    )
    assert prompt.ids == ids_of(expected)
    assert prompt.text == text and prompt.columns == {"n": 1}


def test_one_bos_without_prefix_also_where_it_is_written_out(make_tokenizer, ids_of):
    tokenizer = make_tokenizer(bos="<s>", adds="<s> $A")
    for text in ("the film", "<s> the film"):
        (prompt,) = make_prompts([text], tokenizer, settings(suffix="was"))
        assert prompt.ids == ids_of("<s> the film was")


def test_parts_are_encoded_apart(gpt2):
    """So that the ids of a text do not depend on what stands around it; " ." across the border would be one token."""
    prepared = Preparer(gpt2, Preparation(prefix="a "))(".", "record 0")
    assert prepared is not None and prepared.ids == (64, 220, FULL_STOP)


def test_an_overlong_prompt_is_refused_with_prefix_and_suffix_counted(gpt2):
    config = settings(prefix="Q:", suffix="A:", length=3)
    assert len(make_prompts(["abcdef"], gpt2, config, max_length=7)[0].ids) == 7
    with pytest.raises(DataError, match=r"record 0: the prompt has 7 tokens, but at most 6 fit.*data\.prepare\.length"):
        make_prompts(["abcdef"], gpt2, config, max_length=6)


# ---- what is skipped -----------------------------------------------------------------------------------------------


def test_pitfall_46_records_without_the_tokens_are_skipped_and_counted(gpt2, caplog):
    texts = ["a. b. c", "no stop", "one. stop", "x. y.", "", "b. c. d", "c. d. e"]
    with caplog.at_level(logging.INFO):
        prompts = make_prompts(texts, gpt2, settings(start_text=".", end_text="."))
    assert [prompt.text for prompt in prompts] == [" b.", " y.", " c.", " d."]
    assert "skipped 1 texts without start_text" in caplog.text
    assert "skipped 1 texts without end_text" in caplog.text
    assert "skipped 1 texts of which nothing is left" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_pitfall_46_a_token_that_the_texts_spell_otherwise_is_warned_of(gpt2, caplog):
    """Sentences with blanks between all words end in " .", which is another token than "."."""
    texts = ["it was good .", "the end .", "no .", "it. was"]
    assert gpt2(".")["input_ids"] == [FULL_STOP] and gpt2("no .")["input_ids"][-1] == BLANK_FULL_STOP
    prompts = make_prompts(texts, gpt2, settings(end_text="."))
    assert [prompt.text for prompt in prompts] == ["it."]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "3 of 4 texts lack prepare.end_text '.' (token 13)" in warning
    assert "' .' (token 764) in 3 of them" in warning
    assert [p.text for p in make_prompts(texts, gpt2, settings(end_text=" ."))] == texts[:3]


def test_pitfall_46_the_other_way_round_and_for_the_start(gpt2, caplog):
    texts = ["one. two", "three. four", "five . six"]
    make_prompts(texts, gpt2, settings(start_text=" ."))
    assert "2 of 3 texts lack prepare.start_text ' .' (token 764)" in caplog.text
    assert "'.' (token 13) in 2 of them; should start_text be one of these?" in caplog.text


def test_pitfall_46_none_left_is_an_error_that_names_the_tokens(gpt2):
    with pytest.raises(DataError, match=r"none of the 1 texts is left: 1 of 1 texts lack .* ' \.' \(token 764\)"):
        make_prompts(["the end ."], gpt2, settings(start_text="."))
    with pytest.raises(DataError, match=r"lack prepare\.end_text '\\n' \(token 198\) in their first 2 tokens; choose"):
        make_prompts(["the\nend"], gpt2, settings(end_text="\n", length=2))
    with pytest.raises(DataError, match="2 of 2 texts are empty"):
        make_prompts(["", ""], gpt2, settings(length=2))


def test_pitfall_46_an_epoch_draws_every_text_once_and_none_is_discarded(gpt2):
    prompts = make_prompts(random_queries(60, seed=1), gpt2, settings(start_text=".", length=8))
    assert len(prompts) > 30
    stream = PromptStream(prompts, seed=0)
    for _ in range(3):
        drawn = [index for index, _ in stream.take(len(prompts))]
        assert sorted(drawn) == list(range(len(prompts))) != drawn


def test_limit_counts_what_is_left(gpt2):
    config = DataConfig(path="unused", limit=2, prepare=Preparation(start_text="."))
    assert [p.text for p in make_prompts(["a", "b.c", "d", "e.f", "g.h"], gpt2, config)] == ["c", "f"]


def test_chats_are_refused(gpt2):
    with pytest.raises(DataError, match="record 0: prepare is for plain text, but the prompt is a list of chat"):
        make_prompts([[{"role": "user", "content": "hi"}]], gpt2, settings(length=3))


# ---- clean-up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("By\nJane Doe\nIt rained.", "It rained."),
        ("By\nJane Doe\nand John\nIt rained.", "It rained."),
        ("By\nJane Doe\nand John Roe\nIt rained.", "and John Roe\nIt rained."),  # of one word only
        ("By Jane Doe", "By Jane Doe"),  # no third line: the whole article is in this one
        ("It rained.\nand then\nmore", "It rained.\nand then\nmore"),  # at the beginning only
        ("LONDON, England (CNN) -- It rained.", "It rained."),
        ("(CNN)   -- A (CNN) -- B", "B"),
        ("(CNN)It rained.", "It rained."),
        ("x" * 90 + "(CNN)y", "y"),
        ("x" * 96 + "(CNN)y", "x" * 96 + "(CNN)y"),  # reaches beyond the first 100 characters
        ("PUBLISHED:\n\n10:02 EST, 7 May 2013\n\n| UPDATED:\n\n10:27 EST, 7 November 2013\n\nIt rained.", "It rained."),
        ("UPDATED: soon, in 2013. It rained.", "UPDATED: soon, in 2013. It rained."),
        ("UPDATED: 10:27 EST, 7 November\nIn 2013 it rained.", "UPDATED: 10:27 EST, 7 November\nIn 2013 it rained."),
        ("UPDATED: 10:27 EST, 7 May 2013 In 2012 it rained.", "In 2012 it rained."),
        ("\u2018It\u2019s\u2019 \u201crain\u201d", "'It's' \"rain\""),
        ("a\n\n\n\n\nb\n\nc\nd", "a\n\nb\n\nc\nd"),
        ("It rained.\n\n@highlight\n\nRain\n\n@highlight\n\nMore", "It rained."),
        ("It\u00e2\u20ac\u2122s &amp; caf\u00c3\u00a9", "It's & caf\u00e9"),  # decoded as the wrong character set
    ],
)
def test_articles_lose_what_stands_around_them(text, expected):
    assert clean_news(text) == expected


def test_posts_are_mended_and_stripped():
    assert clean_post("  It\u2019s caf\u00c3\u00a9\n\n\n\nBy me (CNN)\n") == "It's caf\u00e9\n\nBy me (CNN)"


def test_clean_up_comes_before_tokens_and_what_it_empties_is_skipped(gpt2):
    texts = ["@highlight\nBy Jane Doe", "By\nJane\nOne\n\n\n\n\ntwo\n@highlight\nno", "(CNN)three\nfour"]
    prompts = make_prompts(
        texts, gpt2, settings(clean="news", end_text="\n", prefix="Article:\n\n", suffix="\n\nTL;DR:")
    )
    assert [prompt.text for prompt in prompts] == ["One\n\n", "three\n"]
    assert gpt2.decode(prompts[0].ids) == "Article:\n\nOne\n\n\n\nTL;DR:"
    (post,) = make_prompts([texts[2]], gpt2, settings(clean="post"))
    assert post.text == texts[2]


def test_a_clean_up_without_ftfy_names_the_extra_before_any_text_is_read(gpt2, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    for clean in ("news", "post"):
        with pytest.raises(ConfigError, match=r"prepare\.clean needs the package ftfy: pip install 'tropism\[text\]'"):
            Preparer(gpt2, Preparation(clean=clean))
    assert make_prompts(["it"], gpt2, settings(length=5))[0].text == "it"


# ---- prompts with completions --------------------------------------------------------------------------------------


def test_demonstrations_begin_with_the_ids_that_samples_begin_with(gpt2, caplog):
    records = [{"prompt": p, "completion": c} for p, c in (("a. bc", " yes"), ("none", " no"), ("d. e", ". so"))]
    config = settings(start_text=".", prefix="Q:", suffix=" ")
    prompts = make_prompts(records, gpt2, config)
    with caplog.at_level(logging.INFO):
        demonstrations = make_demonstrations(records, gpt2, config, max_length=None)
    assert "skipped 1 texts without start_text" in caplog.text
    assert [d.prompt_ids for d in demonstrations] == [p.ids for p in prompts]
    assert [gpt2.decode(d.prompt_ids) for d in demonstrations] == ["Q: bc ", "Q: e "]
    assert [gpt2.decode(d.completion_ids) for d in demonstrations] == [" yes<|endoftext|>", ". so<|endoftext|>"]
    assert all(all(d.loss_mask) for d in demonstrations)


def test_scored_texts_are_prepared_as_well(gpt2):
    records = [{"prompt": "a. b", "completion": " c<|endoftext|>", "reward": 1}]
    (scored,) = make_scored(records, gpt2, settings(start_text="."), targets=["reward"], max_length=None)
    assert gpt2.decode(scored.prompt_ids) == " b" and gpt2.decode(scored.completion_ids) == " c<|endoftext|>"


def test_demonstrations_without_prompts_or_of_chats_are_refused(gpt2):
    with pytest.raises(DataError, match="prepare is for prompts, but the records are texts without"):
        make_demonstrations([{"text": "a. b"}], gpt2, settings(start_text="."), max_length=None)
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    with pytest.raises(DataError, match="prepare is for prompts"):
        make_demonstrations(chat, gpt2, settings(length=3), max_length=None)
    with pytest.raises(DataError, match=r"none of the 1 records is left: 1 of 1 texts lack prepare\.start_text"):
        make_demonstrations([{"prompt": "a", "completion": "b"}], gpt2, settings(start_text="."), max_length=None)


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": "web"}, "clean is 'web'; choose news or post"),
        ({"start_text": ""}, "start_text is empty"),
        ({"end_text": ""}, "end_text is empty"),
        ({"prefix": "a\0"}, "prefix holds a NUL"),
        ({"length": 0}, "length must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Preparation(**changes)


@pytest.mark.parametrize(
    ("beside", "preparation", "message"),
    [
        ({"chat": True}, {}, "prepare is for plain text, not for chats"),
        ({"chat": True, "system_prompt": "a"}, {}, "prepare is for plain text, not for chats"),
        ({"first_words": 3}, {}, "first_words and prepare both cut texts"),
        ({"overlong": "truncate_left"}, {"prefix": "a"}, r"would cut prepare\.prefix off"),
    ],
)
def test_settings_that_contradict_it_are_refused(beside, preparation, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(path="unused", prepare=Preparation(**preparation), **beside)


def test_a_recipe_holds_it(tmp_path):
    given = {
        "path": "cnndm.jsonl",
        "prepare": {"clean": "news", "length": 500, "end_text": "\n", "suffix": "\n\nTL;DR:"},
    }
    recipe = Recipe.from_mapping(
        {"model": "demo", "algorithm": "ppo", "data": given, "reward": "length", "run": "runs/a"}
    )
    assert recipe.data.prepare == Preparation(clean="news", length=500, end_text="\n", suffix="\n\nTL;DR:")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_file(path).data == recipe.data
