"""Rewards over HTTP, from a server of this machine that is slow, wrong, rude or dead."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tropism.errors import ConfigError, RewardError
from tropism.rewards import RewardConfig, RewardHarness, remote, terms
from tropism.types import RewardInputs

Make = Callable[..., RewardInputs]
TWO = ["a", "bb"]


class Judge(ThreadingHTTPServer):
    """A server that rewards length, unless a test gives it another way to answer."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.requests: list[dict[str, Any]] = []
        self.headers_seen: list[dict[str, str]] = []
        self.answers: list[Callable[[Handler], None]] = []
        """Ways to answer the next requests; the last one stays."""
        self.url = f"http://127.0.0.1:{self.server_address[1]}/score"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.headers_seen.append({name.lower(): value for name, value in self.headers.items()})
        answers = self.server.answers
        if answers:
            (answers.pop(0) if len(answers) > 1 else answers[0])(self)
        else:
            self.say({"rewards": [float(len(text)) for text in body["completions"]]})

    def say(self, reply: Any, status: int = 200, **headers: str) -> None:
        body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def judge() -> Iterator[Judge]:
    server = Judge()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "FIRST_WAIT", 0.01)


def harness_of(url: str, *, args: dict[str, Any] | None = None, **settings: Any) -> RewardHarness:
    return RewardHarness(RewardConfig.of({"use": "remote", "args": {"url": url, **(args or {})}, **settings}))


def values(harness: RewardHarness, inputs: RewardInputs) -> Any:
    (found,) = harness.evaluate(inputs).values.values()
    harness.close()
    return found


def test_what_is_sent_and_what_comes_back(judge: Judge, make_inputs: Make) -> None:
    judge.answers = [lambda handler: handler.say({"rewards": [None, [1, 2.5]]})]
    harness = harness_of(judge.url, args={"columns": ["answer", "completion_ids"]})
    inputs = make_inputs(["a \ud800 é", "b c"], answer=[{"k": [1, None]}, 2], secret=["x", "y"])
    assert values(harness, inputs) == [None, [1.0, 2.5]]
    (request,) = judge.requests
    columns = {"answer": [{"k": [1, None]}, 2], "completion_ids": inputs.completion_ids}
    assert request == {
        "version": 1,
        "prompts": ["prompt 0", "prompt 1"],
        "completions": ["a \ud800 é", "b c"],
        "columns": columns,
    }


def test_chat_messages_travel_as_they_are(judge: Judge, make_inputs: Make) -> None:
    judge.answers = [lambda handler: handler.say({"rewards": [1]})]
    chat = [[{"role": "assistant", "content": "hi"}]]
    assert values(harness_of(judge.url), make_inputs(chat)) == [1.0]
    assert judge.requests[0]["completions"] == chat


def test_it_says_once_what_it_sends_where(judge: Judge, caplog: pytest.LogCaptureFixture, make_inputs: Make) -> None:
    harness = harness_of(f"{judge.url}?token=abc", args={"columns": ["answer"]})
    for _ in range(2):
        harness.evaluate(make_inputs(TWO, answer=[1, 2]))
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [f"a remote reward sends prompts, completions, answer of every completion to {judge.url}"]
    harness.close()


def test_calls_side_by_side_in_the_order_of_rows(judge: Judge, make_inputs: Make) -> None:
    together = threading.Barrier(3, timeout=10)

    def length(handler: Handler) -> None:
        together.wait()  # none is answered before three are there
        time.sleep(0.01)
        handler.say({"rewards": [1.0]})

    judge.answers = [length]
    harness = harness_of(judge.url, rows_per_call=1, concurrency=3)
    assert values(harness, make_inputs(["a", "b", "c"])) == [1.0, 1.0, 1.0]
    assert sorted(request["completions"][0] for request in judge.requests) == ["a", "b", "c"]
    judge.answers = []
    assert values(harness, make_inputs([str(n) * n for n in range(1, 9)])) == [float(n) for n in range(1, 9)]


def error_of(judge: Judge, inputs: RewardInputs, **settings: Any) -> str:
    harness = harness_of(judge.url, **settings)
    with pytest.raises(RewardError) as caught:
        harness.evaluate(inputs)
    harness.close()
    message = str(caught.value)
    assert message.startswith("reward 'remote', after step 3") and "'prompt " in message
    return message


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"<html>oops</html>", r"no JSON that can be read .*<html>oops"),
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"rewards": [' + b"[" * 200_000, "nested too deeply"),
        (b'{"rewards": [NaN, 1]}', "NaN is no number of JSON"),
        (b'{"rewards": [Infinity, 1]}', "Infinity is no number"),
        (b'{"rewards": [1e999, 1]}', "returned inf"),
        (b'{"rewards": [1' + b"0" * 5000 + b", 1]}", "no JSON that can be read"),
        ({"rewards": ["1", "2"]}, "the str '1'"),
        ({"rewards": [1.0]}, "returned 1 rewards for 2 completions"),
        ({"rewards": [1.0] * 3}, "returned 3 rewards for 2 completions"),
        ({"rewards": [[1.0, 2.0], 1.0]}, "2 per-token rewards for a completion of 1 tokens"),
        ({"rewards": {"a": 1}}, "rewards that are no list"),
        ({"rewards": None}, "rewards that are no list"),
        ([1.0, 2.0], "did not answer"),
        ({"reward": [1, 2]}, "did not answer"),
        ({"rewards": [1, 2], "more": 1}, "did not answer"),
        ({"error": "the model is on fire"}, "answered an error: 'the model is on fire'"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_wrong_answers_are_refused_and_not_asked_for_again(
    reply: Any, said: str, judge: Judge, make_inputs: Make
) -> None:
    judge.answers = [lambda handler: handler.say(reply)]
    message = error_of(judge, make_inputs(TWO), retries=3)
    assert re.search(said, message) and len(message) < 800
    assert len(judge.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refusal_names_address_status_and_rows(status: int, judge: Judge, make_inputs: Make) -> None:
    judge.answers = [lambda handler: handler.say({"error": "not you"}, status)]
    message = error_of(judge, make_inputs(TWO), retries=3)
    assert f"{judge.url} answered HTTP {status}: 'not you'" in message and "rows 0 to 1" in message
    assert len(judge.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_asked_again(status: int, judge: Judge, make_inputs: Make) -> None:
    busy: Callable[[Handler], None] = lambda handler: handler.say({"error": "busy"}, status)  # noqa: E731
    right: Callable[[Handler], None] = lambda handler: handler.say({"rewards": [1, 2]})  # noqa: E731
    judge.answers = [busy, busy, right]
    harness = harness_of(judge.url, retries=2)
    raw = harness.evaluate(make_inputs(TWO))
    assert raw.values["remote"] == [1.0, 2.0] and raw.counts == {"remote": {"retries": 2}}
    judge.answers = [busy]
    with pytest.raises(RewardError, match=rf"HTTP {status}: 'busy' \(the last of 3 attempts\)"):
        harness.evaluate(make_inputs(TWO))
    harness.close()


def test_retry_after_is_heeded_up_to_a_limit(judge: Judge, make_inputs: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def after(seconds: str) -> Callable[[Handler], None]:
        return lambda handler: handler.say({}, 503, Retry_After=seconds)

    judge.answers = [after("1"), lambda handler: handler.say({"rewards": [1, 2]})]
    harness = harness_of(judge.url, retries=1)
    began = time.monotonic()
    harness.evaluate(make_inputs(TWO))
    assert 1.0 <= time.monotonic() - began < 5
    monkeypatch.setattr(terms, "LONGEST_WAIT", 0.1)
    for seconds in ("999999", "Wed, 21 Oct 2099 07:28:00 GMT", "-1", "9" * 400):
        judge.answers = [after(seconds), lambda handler: handler.say({"rewards": [1, 2]})]
        began = time.monotonic()
        assert harness.evaluate(make_inputs(TWO)).values["remote"] == [1.0, 2.0]
        assert time.monotonic() - began < 3
    harness.close()


def slowly(handler: Handler) -> None:
    """A byte of the answer now and then, for ever: each arrives in time."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def slow_head(handler: Handler) -> None:
    for _ in range(200):
        handler.wfile.write(b"H")
        time.sleep(0.05)


@pytest.mark.parametrize("way", [lambda handler: time.sleep(5), slowly, slow_head], ids=["silent", "body", "head"])
def test_a_slow_answer_is_not_waited_for(way: Any, judge: Judge, make_inputs: Make) -> None:
    judge.answers = [way]
    began = time.monotonic()
    message = error_of(judge, make_inputs(TWO), args={"timeout": 0.3})
    assert "did not answer within 0.3 s" in message and time.monotonic() - began < 4


def test_huge_answers_are_not_read_to_their_end(
    judge: Judge, make_inputs: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LARGEST_ANSWER", 100_000)
    sent = 0

    def huge(handler: Handler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**9))
        handler.end_headers()
        try:
            for _ in range(10_000):
                sent += handler.wfile.write(b" " * 100_000)
        except OSError:
            pass

    judge.answers = [huge]
    assert "answered more than 100000 bytes" in error_of(judge, make_inputs(TWO))
    assert sent < 10**8
    judge.answers = [lambda handler: handler.say(b"\x1f\x8b", Content_Encoding="gzip")]
    assert "compressed its answer" in error_of(judge, make_inputs(TWO))


def hang_up(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut_off(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"rewards": [')


@pytest.mark.parametrize("way", [hang_up, cut_off], ids=["hang up", "cut off"])
def test_a_lost_connection_may_be_tried_again(way: Any, judge: Judge, make_inputs: Make) -> None:
    judge.answers = [way, lambda handler: handler.say({"rewards": [1, 2]})]
    assert values(harness_of(judge.url, retries=1), make_inputs(TWO)) == [1.0, 2.0]
    judge.answers = [way]
    assert f"{judge.url} cannot be reached" in error_of(judge, make_inputs(TWO))


def test_a_server_that_dies_and_comes_back(make_inputs: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Judge()
    harness = harness_of(first.url, retries=8)
    assert harness.evaluate(make_inputs(TWO)).values["remote"] == [1.0, 2.0]
    port = first.server_address[1]
    first.shutdown()
    first.server_close()
    with pytest.raises(RewardError, match=r"cannot be reached: ConnectError"):
        harness_of(first.url).evaluate(make_inputs(TWO))
    monkeypatch.setattr(terms, "FIRST_WAIT", 0.05)
    again: list[Judge] = []
    timer = threading.Timer(0.3, lambda: again.append(Judge(port)))
    timer.start()
    raw = harness.evaluate(make_inputs(TWO))
    timer.join()
    assert raw.values["remote"] == [1.0, 2.0] and raw.counts["remote"]["retries"] >= 1
    harness.close()
    again[0].shutdown()
    again[0].server_close()


def test_redirects_are_not_followed(judge: Judge, make_inputs: Make) -> None:
    other = Judge()
    where = other.url.replace("127.0.0.1", "localhost")
    for status in (301, 302, 307, 308):
        judge.answers = [lambda handler, status=status: handler.say(b"", status, Location=f"{where}?key=1")]  # type: ignore[misc]
        message = error_of(judge, make_inputs(TWO), retries=2)
        assert f"redirects to {where} (HTTP {status}), which is not followed" in message
    assert other.requests == []
    other.shutdown()
    other.server_close()


def test_the_environment_names_no_proxy(judge: Judge, make_inputs: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert values(harness_of(judge.url), make_inputs(TWO)) == [1.0, 2.0]


def test_secrets_come_from_the_environment_and_go_nowhere_else(
    judge: Judge, make_inputs: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "Bearer canary-1234")
    harness = harness_of(judge.url, args={"headers": {"Authorization": "JUDGE_TOKEN"}})
    harness.evaluate(make_inputs(TWO))
    assert judge.headers_seen[0]["authorization"] == "Bearer canary-1234"
    judge.answers = [lambda handler: handler.say({"error": "bad token canary-1234 (Bearer canary-1234)"}, 401)]
    with pytest.raises(RewardError, match=r"HTTP 401: 'bad token \*\*\* ") as caught:
        harness.evaluate(make_inputs(TWO))
    assert "canary" not in f"{caught.value} {caplog.text} {harness.config}"
    harness.close()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"url": "ftp://host/x"}, "http://"),
        ({"url": "host/x"}, "http://"),
        ({"url": 3}, "url"),
        ({"url": "http://[::1/"}, "url"),
        ({"url": "http://user:canary@host/"}, "leave user and password out"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"columns": "answer"}, "list of column names"),
        ({"columns": ["prompts"]}, "'prompts' is sent in any case"),
        ({"headers": {"Authorization": "Bearer canary"}}, "name of an environment variable"),
        ({"headers": {"Bad Name": "X"}}, "header names"),
        ({"headers": {"X": "TROPISM_NO_SUCH_VARIABLE"}}, "TROPISM_NO_SUCH_VARIABLE, which is not set"),
        ({"headers": {"X": "TWO_LINES"}}, "characters that no header may have"),
        ({"retry": 1}, "takes no argument 'retry'"),
    ],
)
def test_bad_settings_are_named(args: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWO_LINES", "canary\nX: y")
    with pytest.raises(ConfigError, match=message) as caught:
        harness_of(args.pop("url", "http://127.0.0.1:9/"), args=args)
    assert "canary" not in str(caught.value)


def test_columns_that_cannot_be_sent_are_named(judge: Judge, make_inputs: Make) -> None:
    message = error_of(judge, make_inputs(TWO, other=[1, 2]), args={"columns": ["answer"]})
    assert "the column 'answer' is to be sent, but is not there; available: other, completion_ids" in message
    for value in (float("nan"), object()):
        message = error_of(judge, make_inputs(TWO, answer=[1, value]), args={"columns": ["answer"]})
        assert "row 1" in message and "the column 'answer' cannot be sent as JSON" in message
    assert judge.requests == []


def test_it_works_in_a_worker(judge: Judge, make_inputs: Make) -> None:
    harness = harness_of(judge.url, timeout=20, rows_per_call=1, concurrency=2)
    assert values(harness, make_inputs(TWO)) == [1.0, 2.0]
