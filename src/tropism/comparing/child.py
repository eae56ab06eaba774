"""The process of one task of a comparison, which ends when the comparison does: a pool, or a cell.

``JOB.json`` alone samples a pool or measures; arguments of ``tropism`` behind it are run first, in the same process, so
that a cell starts once.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import threading
from pathlib import Path

from tropism.sweeps.child import end_with_parent


def main() -> int:
    """The exit code, as of the command line."""
    threading.Thread(target=end_with_parent, name="tropism-compare", daemon=True).start()
    return work(sys.argv[1:])


def work(arguments: list[str]) -> int:
    """Do what the arguments say.

    Args:
        arguments: the job's file, and behind it those of a command that is run first.
    """
    path, *command = arguments
    if command:
        from tropism.cli import main as command_line

        code = command_line(command)
        if code != 0:
            return code
        _let_go()
    return _told(Path(path))


def _told(path: Path) -> int:
    """Do what the job says; what goes wrong is the last line that is printed."""
    from tropism.commands.console import guarded_output, tell
    from tropism.commands.quiet import quieten_libraries
    from tropism.errors import TropismError
    from tropism.training.interrupt import signals_raise

    logging.basicConfig(format="%(levelname)s: %(message)s")
    quieten_libraries()
    try:
        with guarded_output(), signals_raise():
            _work(path)
    except TropismError as error:
        tell(str(error), label="error: ")
        return 2
    except KeyboardInterrupt as interruption:
        return 128 + (getattr(interruption, "signal_number", None) or 2)
    except Exception as error:
        tell(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", label="error: ")
        return 1
    return 0


def _work(path: Path) -> None:
    job = json.loads(path.read_bytes())
    if "pool" not in job:
        from tropism.comparing.cell import finish_cell

        finish_cell(path)
        return
    from tropism.comparing.pool import sample_pool
    from tropism.config import Recipe

    recipe = Recipe.from_mapping(job["recipe"])
    told = {name: job[name] for name in ("completions", "seed", "allow_code", "taken")}
    sample_pool(recipe, Path(job["pool"]), **told)


def _let_go() -> None:
    """Free what training left in memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
