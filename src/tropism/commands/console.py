"""Writing to the terminal."""

from __future__ import annotations

import re
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def console(*, stderr: bool = False) -> Console:
    """A console on standard output or standard error as they are now; nothing in what is printed counts as markup."""
    return Console(file=sys.stderr if stderr else sys.stdout, markup=False, highlight=False, emoji=False)


def printable(text: Any) -> str:
    """Text from models and data without control characters, which could steer the terminal."""
    return _CONTROL.sub("\ufffd", str(text))


def tell(message: str, *, label: str = "", style: str = "") -> None:
    """One message on standard error, with a coloured label before it."""
    console(stderr=True).print(Text.assemble((label, style), printable(message)), soft_wrap=True)
