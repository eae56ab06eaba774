"""Settings of a source of data. Imports no torch: the command line reads the docstrings here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Formatter
from typing import Literal

from tropism.errors import ConfigError

_NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a raw text becomes a prompt, token by token: cleaned, started and ended at given tokens, cut, and framed."""

    clean: Literal["news", "post"] | None = None
    """`news` drops bylines, agency marks and highlights of an article and mends its characters; `post` mends those of a
    forum post. Both need `pip install "tropism[text]"`. None leaves texts as they are."""
    start_text: str | None = None
    """One token, such as `.`: a text begins after the first of them; texts without it are skipped and counted."""
    length: int | None = None
    """Most tokens of a text, counted after `start_text`; what is longer loses its end."""
    end_text: str | None = None
    """One token: a text, cut to `length`, ends with the last of them; texts without it are skipped and counted."""
    prefix: str = ""
    """What the policy reads before the text; the reward does not."""
    suffix: str = ""
    """What the policy reads after the text; the reward does not."""

    def __post_init__(self) -> None:
        if self.clean not in (None, "news", "post"):
            raise ConfigError(f"clean is {self.clean!r}; choose news or post, or leave it out")
        for name in ("start_text", "end_text"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} is empty; name one token or leave it out")
        for name in ("start_text", "end_text", "prefix", "suffix"):
            if _NO_TEXT.search(getattr(self, name) or ""):
                raise ConfigError(f"{name} holds a NUL or half a surrogate pair, which no text can; remove it")
        if self.length is not None and self.length < 1:
            raise ConfigError(f"length must be at least 1, got {self.length}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prompts or demonstrations come from and how records become text."""

    path: str
    """A file (.txt, .jsonl, .json, .csv, .tsv, each also .gz; .parquet), a folder written by `Dataset.save_to_disk`, or
    the id of a data set on the Hugging Face hub."""
    split: str = "train"
    """Split of a saved or hub data set."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    revision: str | None = None
    """Commit, branch or tag of a hub data set; pin it for exact repetition."""
    prompt_column: str | None = None
    """Column with the prompt, text or chat messages; `a.b` reaches into nested records. Default: `prompt`, else
    `messages`, else `text`, else the only column."""
    completion_column: str | None = None
    """Column with the completion of a demonstration. Default: `completion`, where there is one."""
    first_words: int | None = None
    """Use the first so many words of each text as the prompt; texts with fewer are skipped and counted."""
    limit: int | None = None
    """Use at most so many prompts or demonstrations, from the front."""
    system_prompt: str | None = None
    """System message put before every chat that has none of its own."""
    template: str | None = None
    """The prompt with a column's name in braces wherever its value goes, for example `Question: {question}`."""
    chat: bool = False
    """Send plain text as one user message through the model's chat template."""
    eval_fraction: float = 0.0
    """Share of the prompts held out for evaluation; 0 holds out none."""
    overlong: Literal["error", "truncate_left"] = "error"
    """What becomes of a prompt that leaves no room for the completion: an error, or it loses its beginning (not the
    BOS). Demonstrations always lose their end."""
    prepare: Preparation | None = None
    """Clean-up and cuts of the prompt's text, and what the policy reads around it. None: the text is the prompt."""

    def __post_init__(self) -> None:
        for name in ("path", "split", "subset", "revision", "prompt_column", "completion_column", "template"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} is empty; name one or leave it out")
        for name in ("system_prompt", "template"):
            if _NO_TEXT.search(getattr(self, name) or ""):
                raise ConfigError(f"{name} holds a NUL or half a surrogate pair, which no text can; remove it")
        for name in ("first_words", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.overlong not in ("error", "truncate_left"):
            raise ConfigError(f"overlong is {self.overlong!r}; choose error or truncate_left")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction must be at least 0 and below 1, got {self.eval_fraction}")
        if self.template is not None:
            if self.prompt_column is not None:
                raise ConfigError("template and prompt_column both say what the prompt is; keep one of them")
            if self.first_words is not None:
                raise ConfigError("first_words cuts the text of one column; name it in prompt_column, not in template")
            template_parts(self.template)
        if self.prepare is not None:
            self._check_prepare(self.prepare)

    def _check_prepare(self, prepare: Preparation) -> None:
        if self.chat or self.system_prompt is not None:
            raise ConfigError("prepare is for plain text, not for chats; leave out chat and system_prompt, or prepare")
        if self.first_words is not None:
            raise ConfigError("first_words and prepare both cut texts; keep one of them (prepare.length counts tokens)")
        if prepare.prefix and self.overlong == "truncate_left":
            raise ConfigError("overlong: truncate_left would cut prepare.prefix off; set prepare.length instead")


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """(literal text, column name or None) pairs of a template; ``{{`` and ``}}`` stand for braces.

    Only names stand in braces: nothing is evaluated, formatted or looked up as an attribute.

    Raises:
        ConfigError: unbalanced braces, empty ones, or a conversion or format after the name.
    """
    parts: list[tuple[str, str | None]] = []
    try:
        for literal, name, spec, conversion in Formatter().parse(template):
            if name is not None and (not name or spec or conversion or "[" in name):
                raise ConfigError(f"template {template!r}: braces hold the plain name of a column, like {{question}}")
            parts.append((literal, name))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}; write {{{{ and }}}} for literal braces") from error
    return parts
