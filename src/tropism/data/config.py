"""Settings of a source of data. Imports no torch: the command line reads the docstrings here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from string import Formatter
from typing import Literal

from tropism.errors import ConfigError

_NO_TEXT = re.compile("[\0\ud800-\udfff]")


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
