"""``python -m benchmarks [options]``, or another measurement first: scaling, soak, conditioned, environment."""

from __future__ import annotations

import sys

from benchmarks import conditioned, environment, scaling, soak, standard
from benchmarks.runner import WorkerError


def main() -> None:
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["scaling"]:
            scaling.main(arguments[1:])
        elif arguments[:1] == ["soak"]:
            soak.main(arguments[1:])
        elif arguments[:1] == ["conditioned"]:
            conditioned.main(arguments[1:])
        elif arguments[:1] == ["environment"]:
            environment.main(arguments[1:])
        else:
            standard.main(arguments)
    except WorkerError as death:
        raise SystemExit(f"a process that prepares or measures something failed: {death}") from None


if __name__ == "__main__":
    main()
