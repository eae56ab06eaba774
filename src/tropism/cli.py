"""The command line: finds the command, runs it, and turns what goes wrong into one screen of text."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from tropism import __version__
from tropism.commands import COMMANDS
from tropism.errors import TropismError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tropism ARGUMENTS``.

    Returns:
        The exit code: 0; 2 for what the user can mend; 128 + N after signal N; 1 for everything else.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help", "help"):
        _show_help()
        return 0
    if given[0] == "--version":
        sys.stdout.write(f"tropism {__version__}\n")
        return 0
    name, *rest = given
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        _tell_error(f"there is no command {name!r}; {hint}The commands are: {', '.join(COMMANDS)}")
        return 2
    _log_to_terminal(debug=debug)
    return _run(name, rest, debug=debug)


def _run(name: str, arguments: list[str], *, debug: bool) -> int:
    try:
        import_module(f"tropism.commands.{name}").run(arguments)
    except TropismError as error:
        if debug:
            traceback.print_exc()
        _tell_error(str(error))
        return 2
    except KeyboardInterrupt as interruption:  # Interrupted among them, of which the command has told
        number = getattr(interruption, "signal_number", None)
        if number is None:
            _tell_error("interrupted")
        return 128 + (number or 2)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as end:  # the parser of the command's options has printed its help or its complaint
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split())
        shown = reason if len(reason) <= 500 else reason[:497] + "..."
        hint = "" if debug else "; run it again with --debug for the traceback"
        _tell_error(f"{type(error).__name__}: {shown}{hint}")
        return 1
    return 0


def _show_help() -> None:
    from rich.table import Table

    from tropism.commands.console import console

    out = console()
    out.print("Turn a language model toward a reward: one reward, every method, one table.\n")
    out.print("usage: tropism COMMAND ...   (tropism COMMAND --help says more)\n")
    table = Table.grid(padding=(0, 2))
    for name, summary in COMMANDS.items():
        table.add_row(f"  {name}", summary)
    out.print(table)
    out.print("\nEvery command takes --debug, which shows tracebacks and more messages. Begin with: tropism demo")


def _tell_error(message: str) -> None:
    from tropism.commands.console import tell

    tell(message, label="error: ", style="bold red")


class _Terminal(logging.Handler):
    """Messages of the library, one line each, on what is standard error at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        from tropism.commands.console import tell

        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        tell(record.getMessage(), label=f"{record.levelname.lower()}: ", style=style)


def _log_to_terminal(*, debug: bool) -> None:
    logger = logging.getLogger("tropism")
    logger.setLevel(logging.INFO if debug else logging.WARNING)
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        logger.addHandler(_Terminal())
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
