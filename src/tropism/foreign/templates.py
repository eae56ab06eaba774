"""Chat templates, which are programs in a model's files: run in a process of their own, with limits.

transformers renders them in jinja2's immutable sandbox, which keeps them from files, modules and Python's internals,
but neither from endless loops nor from filling the memory. So one worker process renders them all. A template that
takes too long or too much ends that process alone, and the next template gets a new one.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tropism.errors import DataError, TropismError

SECONDS = 4
"""Of computing, that one conversation may take to render. Usual templates take less than a millisecond."""
PATIENCE = 60.0
"""Seconds after which the worker is ended whatever it does: a machine may be too busy to let it compute."""
MEGABYTES = 512
"""What the worker may allocate beyond what it has when it starts."""
START_SECONDS = 120.0
"""What the worker may take to start, on a machine that is busy."""
_WORKER = Path(__file__).with_name("template_worker.py")


def render_chat_template(
    tokenizer: Any, messages: Any, *, where: str, add_generation_prompt: bool, error: type[TropismError] = DataError
) -> str:
    """The text of a chat, by the tokenizer's chat template.

    Args:
        tokenizer: with a chat template.
        messages: at least one.
        where: names the record in errors.
        add_generation_prompt: end with the header of the assistant's answer.
        error: the class of what is raised.

    Raises:
        TropismError: of the class ``error``: the template refuses these messages, takes too long or too much memory.
    """
    from transformers import PreTrainedTokenizerBase

    if not _is_usual(type(tokenizer), PreTrainedTokenizerBase):  # renders by rules of its own, without a template
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    try:
        request = {
            "template": tokenizer.get_chat_template(),
            "messages": messages,
            "variables": dict(tokenizer.special_tokens_map),
            "add_generation_prompt": add_generation_prompt,
        }
        answer = _worker.ask(request)
    except (TypeError, ValueError, RecursionError) as reason:
        raise error(f"{where}: the chat template cannot be used on these messages ({reason})") from reason
    if "text" not in answer:
        raise error(f"{where}: the chat template refuses these messages ({answer['error']})")
    return str(answer["text"])


def _is_usual(kind: type, base: type) -> bool:
    return kind.apply_chat_template is base.apply_chat_template  # type: ignore[attr-defined]


class _Worker:
    """The process that renders, started with the first request and again after each that ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.lock = threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer: ``{"text": ...}``, or ``{"error": ...}``, which may also say that it had to be ended."""
        line = json.dumps(request, default=lambda value: f"<{type(value).__name__}>").encode() + b"\n"
        with self.lock:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self.start()
            answer = self.exchange(line, PATIENCE)
            if answer is None:
                self.stop()
                return {"error": f"it took more than {SECONDS} seconds or {MEGABYTES} MB, or crashed"}
        found: dict[str, Any] = json.loads(answer)
        return found

    def start(self) -> None:
        self.stop()
        # -P: the working directory, where anybody may have left a json.py, is no place to import from.
        command = [sys.executable, "-P", str(_WORKER), str(MEGABYTES), str(SECONDS)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.owner = os.getpid()
        atexit.register(self.stop)
        if self.exchange(b"", START_SECONDS) != b"ready":
            self.stop()
            raise ValueError("the process that renders chat templates did not start; is transformers installed?")

    def exchange(self, line: bytes, seconds: float) -> bytes | None:
        """Send a line and wait for one; None where none comes in time."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        end, parts = time.monotonic() + seconds, b""
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            descriptor = self.process.stdout.fileno()
            while not parts.endswith(b"\n"):
                left = end - time.monotonic()
                if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                    return None
                part = os.read(descriptor, 1 << 20)
                if not part:
                    return None
                parts += part
        except OSError:
            return None
        return parts[:-1]

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


_worker = _Worker()
