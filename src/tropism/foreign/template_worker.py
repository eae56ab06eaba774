"""The process that renders chat templates: one JSON request per line in, one JSON answer per line out.

It is run as a script, by its path, so that it imports transformers and the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

LONGEST = 50_000_000
"""Characters of a rendered chat; every context is shorter."""


def main(megabytes: int, seconds: int) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory(megabytes)
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        _limit_time(seconds)
        answer = json.dumps(_answer(render_jinja_template, json.loads(line))).encode()
        answers.write(answer + b"\n")
        answers.flush()


def _answer(render: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        # As tokenizers do: many templates print "None" for a content that is not there.
        messages = [{key: value for key, value in one.items() if value is not None} for one in request["messages"]]
        (text,), _ = render(
            conversations=[messages],
            chat_template=request["template"],
            add_generation_prompt=request["add_generation_prompt"],
            **request["variables"],
        )
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000] if str(error) else type(error).__name__}
    if len(text) > LONGEST:
        return {"error": f"it makes a text of {len(text):,} characters"}
    return {"text": text}


def _limit_memory(megabytes: int) -> None:
    """Let further allocations fail beyond this; systems that cannot count them have the time limit alone."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ImportError, OSError, ValueError):
        return


def _limit_time(seconds: int) -> None:
    """Let the system end this process after so many more seconds of computing, even if nobody waits for it any more."""
    try:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # reaching it is no crash worth a file
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
