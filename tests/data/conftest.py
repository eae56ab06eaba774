"""Tiny tokenizers, each with one of the quirks that real ones have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system"]
WORDS += ["the", "film", "was", "good", "bad", "I", "saw", "it", "red", "blue"]
IDS = {word: index for index, word in enumerate(WORDS)}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)

MakeTokenizer = Callable[..., PreTrainedTokenizerBase]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """A word-level tokenizer.

    Args of the fixture's function: ``adds`` (post-processing template, such as ``<s> $A </s>``), ``bos``, ``eos``,
    ``pad`` (None: the tokenizer has none), ``chat_template``.
    """

    def make(
        *,
        adds: str | None = None,
        bos: str | None = None,
        eos: str | None = "</s>",
        pad: str | None = None,
        chat_template: str | None = None,
    ) -> PreTrainedTokenizerBase:
        backend = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens(WORDS[1:6])
        if adds is not None:
            used = [word for word in adds.split() if word != "$A"]
            backend.post_processor = processors.TemplateProcessing(
                single=adds, special_tokens=[(word, IDS[word]) for word in used]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token=bos, eos_token=eos, pad_token=pad
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chatml() -> str:
    """A chat template in the manner of ChatML, words parted by spaces."""
    return CHATML


@pytest.fixture(scope="session")
def chat_tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerBase:
    """With the template ``chatml``; its own BOS is not part of chats."""
    return make_tokenizer(bos="<s>", adds="<s> $A", eos="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def ids_of() -> Callable[[str], tuple[int, ...]]:
    """Ids of words parted by spaces, looked up one by one."""
    return lambda words: tuple(IDS[word] for word in words.split())
