"""The process of one training run of a sweep: ``tropism train``, which saves and ends when the sweep does.

Its standard input is a pipe that the sweep holds open. When that ends, the sweep has ended, however it did.
"""

from __future__ import annotations

import os
import signal
import sys
import threading


def main() -> int:
    """Run the command line of this process's arguments."""
    threading.Thread(target=end_with_parent, name="tropism-sweep", daemon=True).start()
    from tropism.cli import main as command_line

    return command_line(sys.argv[1:])


def end_with_parent() -> None:
    """Wait for the end of standard input, and then ask this process to save and end."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
