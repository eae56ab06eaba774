"""Writing to the terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console
from rich.text import Text

from tropism.redaction import redact

MOST_CHARACTERS = 4000
"""Of one message."""

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that turn the direction of what follows, and halves of surrogate pairs."""


class GuardedStream:
    """A text stream without secrets, which neither its encoding nor a reader that has gone can break.

    Characters that the encoding does not have are written as ``?``. Once the reader of a pipe has gone, output goes
    nowhere: a run that takes hours does not end because a terminal was closed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        shown = redact(text).encode(encoding, "replace").decode(encoding)
        try:
            self._stream.write(shown)
        except BrokenPipeError:
            self._give_up()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def guarded_output() -> Iterator[None]:
    """Standard output and standard error as guarded streams, for everything that prints meanwhile."""
    before = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is not None:  # a stream that was closed before the program began
            setattr(sys, name, cast(TextIO, GuardedStream(stream)))
    try:
        yield
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        sys.stdout, sys.stderr = before


def console(*, stderr: bool = False) -> Console:
    """A console on standard output or standard error as they are now; nothing in what is printed counts as markup."""
    return Console(file=sys.stderr if stderr else sys.stdout, markup=False, highlight=False, emoji=False)


def printable(text: Any) -> str:
    """Text from models and data without characters that could steer the terminal or that it cannot take."""
    return _UNPRINTABLE.sub("\ufffd", str(text))


def tell(message: str, *, label: str = "", style: str = "", everywhere: bool = False) -> None:
    """One message on standard error, with a coloured label before it; the middle of a very long one is left out.

    Args:
        everywhere: also from other processes of a run than the first, which otherwise leave it to that one.
    """
    if not everywhere and os.environ.get("RANK", "0") != "0":
        return
    if len(message) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        message = f"{message[:half]} ... ({len(message) - 2 * half} characters left out) ... {message[-half:]}"
    console(stderr=True).print(Text.assemble((label, style), printable(message)), soft_wrap=True)
