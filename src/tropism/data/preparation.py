"""From a raw text to a prompt: cleaned, started and ended at given tokens, cut to a length, and framed for the policy.

The steps are those of the 2019 work on human preferences (https://github.com/openai/lm-human-preferences), whose
tasks these settings describe. There every text is padded on the right to its full length, and the pads are masked in
attention and left out of the positions. Here lengths are explicit, so no pads are needed and the model reads the same.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tropism.data.config import Preparation
from tropism.data.encoding import encode_bare, frame_of
from tropism.errors import ConfigError, DataError
from tropism.texts import token_of_text
from tropism.types import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MARK = re.compile(r"\(CNN\) +--")
_CO_AUTHOR = re.compile(r"\Aand \w+\n")
_UPDATED = re.compile(r"UPDATED:\s+[0-9]{2}:[0-9]{2}[^\n]{0,80}?\b20[0-9]{2}\b")
_GAP = re.compile(r"\n{3,}")

_MARK_WITHIN = 100
"""Characters at the beginning of an article in which a bare `(CNN)` is a mark."""

_CHARACTERS_PER_TOKEN = 8
"""More than most vocabularies need, so that the first beginning of a long text usually suffices."""
_UNUSED_TOKENS = 16
"""Tokens at the end of a beginning that are not used, since a tokenizer might make others of them in the whole text."""

Lack = Literal["start_text", "end_text", "text"]
"""What a skipped text lacks; ``text``: anything at all."""


# ---- clean-up ------------------------------------------------------------------------------------------------------


def clean_news(text: str) -> str:
    """An article without what stands around it: its byline, agency marks, time of update and highlights.

    Of a text of more than two lines that begins with "By" the first two go, then all up to the last "(CNN) --", up to
    the last "(CNN)" in the first 100 characters, a second author's line ("and name"), and all up to the last
    "UPDATED: hh:mm ... year". Single curly quotes become straight. Then mended as by ``mend_text``; it ends before
    the first "@highlight".

    Raises:
        ConfigError: ftfy is not installed.
    """
    lines = text.split("\n")
    if text.startswith("By") and len(lines) > 2:
        text = "\n".join(lines[2:])
    text = _MARK.split(text)[-1]
    text = text[:_MARK_WITHIN].split("(CNN)")[-1] + text[_MARK_WITHIN:]
    text = _UPDATED.split(_CO_AUTHOR.sub("", text))[-1]
    text = text.replace("\u2019", "'").replace("\u2018", "'").strip()
    return mend_text(text).split("@highlight")[0].strip()


def clean_post(text: str) -> str:
    """A forum post with its characters mended by ``mend_text``, without blanks around it.

    Raises:
        ConfigError: ftfy is not installed.
    """
    return mend_text(text).strip()


def mend_text(text: str) -> str:
    """The text as ftfy mends it (wrongly decoded characters, HTML entities, curly quotes), with one blank line at most.

    Raises:
        ConfigError: ftfy is not installed.
    """
    try:
        from ftfy import fix_text
    except ImportError as error:
        raise ConfigError("prepare.clean needs the package ftfy: pip install 'tropism[text]'") from error
    return _GAP.sub("\n\n", fix_text(text))


_CLEAN: dict[str | None, Callable[[str], str]] = {None: str, "news": clean_news, "post": clean_post}


# ---- tokens --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PreparedQuery:
    """One text that has been prepared. " It was good." between "Q:" and "A:" is that text, and the ids of all three."""

    text: str
    """The text alone, as rewards see it; what was cut by tokens is decoded from those that are left."""
    ids: tuple[int, ...]
    """What the policy reads: the BOS if the tokenizer adds one, prefix, text and suffix, each encoded apart; behind
    them what an encoder's tokenizer adds there (T5's eos)."""


class Preparer:
    """Prepares texts one by one, and counts those that it skips.

    Args:
        tokenizer: of the model that reads the texts.
        preparation: what is done.

    Raises:
        ConfigError: ``start_text`` or ``end_text`` is not one token, or what the clean-up needs is not installed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, preparation: Preparation) -> None:
        self.tokenizer, self.preparation = tokenizer, preparation
        self.prefix, self.suffix = (
            encode_bare(tokenizer, preparation.prefix),
            encode_bare(tokenizer, preparation.suffix),
        )
        self.start = _token(preparation.start_text, tokenizer, "start_text")
        self.end = _token(preparation.end_text, tokenizer, "end_text")
        self.before, self.behind = frame_of(tokenizer)
        self.clean = _CLEAN[preparation.clean]
        self.clean("")  # what it needs is missed now, not at the first text
        self.read = 0
        """Texts so far."""
        self.skipped: Counter[Lack] = Counter()
        """Those that were skipped, by what they lack."""
        self._seen: dict[Lack, Counter[int]] = {"start_text": Counter(), "end_text": Counter()}
        """Of the texts that lack a token: in how many each token occurs."""

    def __call__(self, text: str | Messages, where: str) -> PreparedQuery | None:
        """The text prepared; None where it is skipped, since it lacks the start or end token, or nothing is left of it.

        Args:
            text: of one record.
            where: names the record in errors.

        Raises:
            DataError: chat messages.
        """
        if not isinstance(text, str):
            raise DataError(f"{where}: prepare is for plain text, but the prompt is a list of chat messages")
        self.read += 1
        text = self.clean(text)
        whole, is_all = self._encode(text)
        ids = self._cut(whole)
        if ids is None:
            return None
        if len(ids) < len(whole) or not is_all:
            text = _decoded(self.tokenizer, ids)
        joined = [*self.prefix, *ids, *self.suffix]
        if joined[: len(self.before)] != self.before:
            joined = [*self.before, *joined]
        joined += self.behind
        return PreparedQuery(text=text, ids=tuple(joined))

    def _encode(self, text: str) -> tuple[list[int], bool]:
        """Ids of the text, or of a beginning that holds all that can stay of it, and whether they are all there are.

        Of a book that is cut to 64 tokens only the first lines are worth their time. A beginning ends before a blank,
        which no token crosses in GPT-2's vocabulary or a sentencepiece one, and leaves some tokens unused all the same.
        """
        if self.preparation.length is not None:
            end = _CHARACTERS_PER_TOKEN * (self.preparation.length + _UNUSED_TOKENS)
            while (blank := text.find(" ", end)) >= 0:
                ids = encode_bare(self.tokenizer, text[:blank])
                begin = 0 if self.start is None else _behind(ids, self.start)
                if begin is not None and len(ids) - begin >= self.preparation.length + _UNUSED_TOKENS:
                    return ids, False
                end = 2 * blank
        return encode_bare(self.tokenizer, text), True

    def _cut(self, ids: list[int]) -> list[int] | None:
        """The tokens that stay; None where the text is skipped."""
        if not ids:
            self._skip("text", ids)
            return None
        if self.start is not None:
            begin = _behind(ids, self.start)
            if begin is None:
                self._skip("start_text", ids)
                return None
            # A text that has nothing after the start token stays whole.
            ids = ids[begin:] or ids
        ids = ids[: self.preparation.length]
        if self.end is not None:
            if self.end not in ids:
                self._skip("end_text", ids)
                return None
            ids = ids[: len(ids) - ids[::-1].index(self.end)]
        return ids

    def _skip(self, lack: Lack, ids: list[int]) -> None:
        self.skipped[lack] += 1
        if lack in self._seen:
            self._seen[lack].update(set(ids))

    def report(self) -> None:
        """Tell how many texts were skipped; warn where more than half of them lack a token, with similar ones."""
        if self.skipped["text"]:
            logger.info("skipped %d texts of which nothing is left", self.skipped["text"])
        for lack in self._seen:
            if not self.skipped[lack]:
                continue
            logger.info("skipped %d texts without %s", self.skipped[lack], lack)
            if 2 * self.skipped[lack] > self.read:
                logger.warning("%s", self._told(lack))

    def reasons(self) -> str:
        """Why texts were skipped, for an error that says that none is left."""
        told = [self._told(lack) for lack in self._seen if self.skipped[lack]]
        if self.skipped["text"]:
            told.append(f"{self.skipped['text']} of {self.read} texts are empty (after prepare.clean, if it is set)")
        return "; ".join(told)

    def _told(self, lack: Lack) -> str:
        """How many texts lack a token, and which tokens like it they have."""
        wanted = str(getattr(self.preparation, lack))
        token = self.start if lack == "start_text" else self.end
        said = f"{self.skipped[lack]} of {self.read} texts lack prepare.{lack} {wanted!r} (token {token})"
        near = [f"{text!r} (token {near_id}) in {count} of them" for text, near_id, count in self._near(lack, wanted)]
        if near:
            return f"{said}, but tokens like it occur: {', '.join(near)}; should {lack} be one of these?"
        within = f" in their first {self.preparation.length} tokens" if self.preparation.length else ""
        return f"{said}{within if lack == 'end_text' else ''}; choose a token that occurs, or leave {lack} out"

    def _near(self, lack: Lack, wanted: str) -> Iterator[tuple[str, int, int]]:
        """Text, id and number of texts of the three commonest tokens that hold the wanted text."""
        core, found = wanted.strip() or wanted, 0
        for token, count in self._seen[lack].most_common():
            text = _decoded(self.tokenizer, [token])
            if core in text:
                yield text, token, count
                found += 1
            if found == 3:
                return


def preparer_of(tokenizer: PreTrainedTokenizerBase, preparation: Preparation | None) -> Preparer | None:
    """A ``Preparer``, or None where there is nothing to prepare."""
    return None if preparation is None else Preparer(tokenizer, preparation)


def _behind(ids: list[int], token: int) -> int | None:
    """The place after the first of a token; None where there is none."""
    return ids.index(token) + 1 if token in ids else None


def _token(text: str | None, tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    return None if text is None else token_of_text(text, tokenizer, setting=f"prepare.{name}")


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of some tokens, special ones included."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
