"""Chat templates are programs in a model's files: they reach nothing, and end in time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tiny_models import CHAT_TEMPLATE, FAMILIES, tiny_tokenizer
from tropism.data.encoding import encode_chat, render_chat
from tropism.data.prompts import make_prompts
from tropism.errors import DataError, RewardError
from tropism.foreign import templates
from tropism.foreign.templates import render_chat_template
from tropism.models.loading import load_model

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "oh"}]


def rendered(template: str, messages: Any = MESSAGES) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return render_chat(tokenizer, messages, where="record 3", add_generation_prompt=True)


def refusal(template: str) -> str:
    with pytest.raises(DataError) as caught:
        rendered(template)
    return str(caught.value)


TOOL_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages %}{%- if message.name is defined %}{{ message.name }}{% endif %}"
    "{% if message['content'] is string %}{{ message.content | trim }}{% else %}{{ message.content | tojson }}"
    "{% endif %}"
    "{% generation %}!{% endgeneration %}{% if loop.index0 == 5 %}{% break %}{% endif %}{% endfor %}{{ eos_token }}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TOOL_TEMPLATE])
@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        MESSAGES,
        [{"role": "user", "content": "a <eos> b & <i>ü\U0001f600\ud800\0"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None, "n": (1, 2.5, float("inf"))}],
    ],
)
def test_the_worker_renders_what_transformers_renders(template: str, opened: bool, messages: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if template == CHAT_TEMPLATE and not isinstance(messages[0]["content"], str):  # it only joins texts
        messages = MESSAGES
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    assert render_chat(tokenizer, messages, where="x", add_generation_prompt=opened) == expected
    if "\ud800" not in str(expected):
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=opened)
        assert encode_chat(tokenizer, messages, where="x", add_generation_prompt=opened) == encoded["input_ids"]


# Payloads of published advisories on llama-cpp-python, vLLM, SGLang and jinja2's own sandbox.
PAYLOADS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for c in ().__class__.__base__.__subclasses__() %}{% if 'warning' in c.__name__ %}"
    "{{ c()._module.__builtins__['__import__']('os').popen('touch WITNESS').read() }}{% endif %}{% endfor %}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('touch WITNESS').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch WITNESS').read() }}",
    "{{ joiner.__init__.__globals__.os.system('touch WITNESS') }}",
    "{{ namespace.__init__.__globals__.os.system('touch WITNESS') }}",
    "{{ lipsum.__globals__['os'].popen('touch WITNESS').read() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('WITNESS', 'w') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ tojson.__globals__ }}",
    "{{ get_flashed_messages.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "{{ (messages | attr('__class__') | attr('__base__')).__subclasses__() }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ ['a'] | map('attr', '__class__') | first }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{0.__class__.__base__}'.format_map({'0': messages}) }}",
    "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(namespace) }}",
    "{{ ('{0.__class__.__globals__}' | attr('format'))(cycler) }}",
    "{{ ['{.__class__.__globals__}'] | map('format', cycler) | list }}",
    "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as p %}{{ p }}",
    "{% extends '/etc/passwd' %}",
    "{% from 'os' import system %}{{ system('touch WITNESS') }}",
    "{{ messages.append(1) }}{{ messages }}",
    "{{ (messages | first).update({'role': 'x'}) }}",
    "{% macro f() %}{{ caller.__globals__ }}{% endmacro %}{% call f() %}{% endcall %}",
    "{{ (f for f in ()).gi_frame.f_back.f_globals }}",
    "{% set x = messages.__getattribute__('__class__') %}{{ x }}",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_published_payloads_reach_nothing(payload: str, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    try:
        text = rendered(payload.replace("WITNESS", str(witness)))
    except DataError as error:
        text = str(error)
    assert not witness.exists()
    for leaked in ("root:", "<module", "<class 'subprocess", "builtins", "<class 'object'>", "<class 'list'>"):
        assert leaked not in text


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "letters": "{% for a in 'x' * 99999 %}{% for b in 'x' * 99999 %}{% for c in 'x' * 99999 %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "powers": "{{ (9 ** 99999) ** 9999 }}",
}

TOO_LARGE = {
    "a little": "{% set x = 'a' * 700_000_000 %}more than the limit, and less than machines have",
    "product": "{{ 'a' * 10 ** 10 }}",
    "doubling": "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "replacement": "{{ ('a' * 100000) | replace('a', 'a' * 100000) }}",
    "width": "{{ 'a' | center(10 ** 10) }}",
    "format": "{{ '%10000000000d' | format(5) }}",
    "lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "output": "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
}

BROKEN = {
    "range": "{% for a in range(10 ** 9) %}x{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "syntax": "{% if %}",
    "brackets": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "undefined": "{{ nothing.at.all }}",
    "refusal": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_templates_without_end_are_ended(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1)
    templates._worker.stop()
    rendered(CHAT_TEMPLATE)
    before = time.monotonic()
    assert refusal(ENDLESS[kind]).startswith(
        "record 3: the chat template refuses these messages (it took more than 1 s"
    )
    assert time.monotonic() - before < templates.PATIENCE
    assert rendered(CHAT_TEMPLATE).endswith("<assistant>")  # the next one works again


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_templates_that_fill_the_memory_are_ended(kind: str) -> None:
    said = refusal(TOO_LARGE[kind])
    assert "memory" in said or "MB" in said


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_templates_name_the_record(kind: str) -> None:
    assert refusal(BROKEN[kind]).startswith("record 3: the chat template refuses these messages (")


def test_the_record_and_the_class_of_the_error_are_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].content == 'two' %}{{ 'a' * 10 ** 10 }}{% endif %}{{ messages }}"
    chats = [[{"role": "user", "content": text}] for text in ("one", "two")]
    with pytest.raises(DataError, match=r"record 1: .*too much memory"):
        make_prompts(chats, tokenizer, max_length=None)
    with pytest.raises(RewardError, match="the scorer: the chat template"):
        render_chat_template(tokenizer, chats[1], where="the scorer", add_generation_prompt=False, error=RewardError)
    monkeypatch.setattr(templates, "_WORKER", Path("/nothing/there.py"))
    templates._worker.stop()
    with pytest.raises(DataError, match="did not start"):
        rendered(CHAT_TEMPLATE)


def test_a_worker_that_was_killed_is_replaced() -> None:
    rendered(CHAT_TEMPLATE)
    assert templates._worker.process is not None
    os.kill(templates._worker.process.pid, signal.SIGKILL)
    templates._worker.process.wait()
    assert rendered(CHAT_TEMPLATE).endswith("<assistant>")


def test_the_worker_ends_with_its_run(tmp_path: Path) -> None:
    """Also when nobody is left to end it; and no module of the working directory gets in."""
    script = (
        "import os, signal; from tests.security.test_chat_templates import rendered, CHAT_TEMPLATE, templates\n"
        "rendered(CHAT_TEMPLATE); print(templates._worker.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    witness = tmp_path / "ran"
    (tmp_path / "json.py").write_text(f"open({str(witness)!r}, 'w').close()")
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(path) for path in (root, root / "tests"))
    ended = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    worker = int(ended.stdout)
    end = time.monotonic() + 30
    while Path(f"/proc/{worker}/cmdline").exists() and "template_worker" in _command(worker):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not witness.exists()


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def test_templates_in_files_of_the_model(tmp_path: Path) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path / "tiny")
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.save_pretrained(tmp_path / "tiny")
    loaded = load_model(str(tmp_path / "tiny"))
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE
    extra = tmp_path / "tiny" / "additional_chat_templates"
    extra.mkdir()
    (extra / "tools.jinja").write_text("{{ messages }}")
    assert load_model(str(tmp_path / "tiny")).tokenizer.chat_template["tools"] == "{{ messages }}"
    (tmp_path / "secret").write_text("secret")
    (extra / "tools.jinja").unlink()
    (extra / "tools.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="leads outside its folder"):
        load_model(str(tmp_path / "tiny"))
    shutil.rmtree(extra)
    (tmp_path / "tiny" / "chat_template.jinja").unlink()
    (tmp_path / "tiny" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="leads outside its folder"):
        load_model(str(tmp_path / "tiny"))
