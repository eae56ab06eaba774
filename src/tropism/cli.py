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
from tropism.errors import ConfigError, TropismError
from tropism.training.interrupt import ProcessLostError, signals_raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tropism ARGUMENTS``.

    Returns:
        The exit code: 0; 2 for what the user can mend; 128 + N after signal N; 1 for everything else.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        from tropism.commands.console import guarded_output

        with guarded_output():
            code = _run([argument for argument in given if argument != "--debug"], debug=debug)
    except OSError as error:  # from the last flush; standard error is all that is left
        _tell_error(f"the output cannot be written: {error.strerror or error}")
        _forget_unwritten_output()
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def _run(given: list[str], *, debug: bool) -> int:
    try:
        with signals_raise():
            _dispatch(given, debug=debug)
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
    except SystemExit as end:  # the parser of the command's options has printed its help or its complaint
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    except OSError as error:
        if debug:
            traceback.print_exc()
        _tell_error(_os_message(error) + _debug_hint(debug))
        return 2
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = " ".join(str(error).split())
        shown = reason if len(reason) <= 500 else reason[:497] + "..."
        # All processes tell of one that is lost: it may have been the one that tells everything else.
        everywhere = isinstance(error, ProcessLostError)
        _tell_error(f"{type(error).__name__}: {shown}{_debug_hint(debug)}", everywhere=everywhere)
        return 1
    return 0


def _dispatch(given: list[str], *, debug: bool) -> None:
    """Find the command and run it."""
    if not given or given[0] in ("-h", "--help", "help"):
        _show_help()
        return
    if given[0] == "--version":
        from tropism.commands.console import console

        console().print(f"tropism {__version__}")
        return
    _refuse_secrets(given)
    name, *rest = given
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"there is no command {name!r}; {hint}The commands are: {', '.join(COMMANDS)}")
    _log_to_terminal(debug=debug)
    import_module(f"tropism.commands.{name}").run(rest)


def _refuse_secrets(given: Sequence[str]) -> None:
    """Command lines can be read by every user of the machine, and stay in the shell's history."""
    from tropism.redaction import find_secret

    for number, word in enumerate(given, start=1):
        found = find_secret(word)
        if found is not None:
            raise ConfigError(
                f"word {number} of the command line holds {found[1]}. Others can read command lines: take it out, and "
                "set it in the environment (HF_TOKEN for the hub, or `hf auth login`; your own code reads os.environ)"
            )


def _os_message(error: OSError) -> str:
    """What could not be read or written, and why."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"a file cannot be read or written: {reason}"
    return f"{error.filename}: {reason}; check the path, its permissions and the space left"


def _debug_hint(debug: bool) -> str:
    return "" if debug else "; run it again with --debug for the traceback"


def _forget_unwritten_output() -> None:
    """Python would try once more to write it when it ends, fail, and print a traceback."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


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


def _tell_error(message: str, *, everywhere: bool = False) -> None:
    from tropism.commands.console import tell

    tell(message, label="error: ", style="bold red", everywhere=everywhere)


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
