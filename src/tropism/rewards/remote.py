"""A reward that another machine (or process) computes, over HTTP.

    POST url   {"version": 1, "prompts": [...], "completions": [...], "columns": {"answer": [...]}}
    answer     {"rewards": [1.0, null, [0.0, 0.5]]}   a number, null for no opinion, or one number per token
    or         {"error": "why there are none"}

A connection that fails, and the statuses 429 and 5xx, may be tried again (the term's `retries`); anything else may not.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tropism.errors import ConfigError, RewardError
from tropism.rewards.calling import DATA_ARGUMENTS, RUN_ARGUMENTS, TryAgainError
from tropism.rewards.raw import RowError

logger = logging.getLogger("tropism")

VERSION = 1
LARGEST_ANSWER = 16 * 2**20
"""Bytes of an answer beyond which it is refused."""
LONGEST_NOTE = 200
"""Characters of an answer that an error message shows."""

_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTIONAL = ("completion_ids", "finish_reasons")


def remote(
    url: str,
    columns: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> Callable[..., Any]:
    """Rewards from a server: prompts and completions are sent to it, and nothing else but what `columns` names.

    Redirects are not followed, proxies and `.netrc` are not used, and certificates are checked.

    Args:
        url: http or https, without user and password.
        columns: data columns to send as well; also `completion_ids` and `finish_reasons`.
        headers: header name -> name of the environment variable that holds its value, such as
            `{Authorization: JUDGE_TOKEN}`.
        timeout: seconds for one request and its answer.

    Raises:
        ConfigError: an address that cannot be used, a variable that is not set, a value out of range.
    """
    import httpx2

    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise ConfigError(f"timeout: expected a positive number of seconds, not {timeout!r}")
    address = _address(url, httpx2)
    wanted = _columns(columns)
    sent = {"Accept": "application/json", "Accept-Encoding": "identity", **_header_values(headers or {})}
    server = Server(address, headers=sent, secrets=[sent[name] for name in headers or {}], timeout=timeout)
    told = ", ".join(["prompts", "completions", *wanted])
    names = f" with the headers {', '.join(headers)}" if headers else ""
    logger.warning("a remote reward sends %s of every completion to %s%s", told, server.name, names)

    async def reward_remote(prompts: list[Any], completions: list[Any], **available: Any) -> list[Any]:
        for column in wanted:
            if column not in available:
                there = ", ".join(name for name in available if name not in RUN_ARGUMENTS)
                raise RewardError(f"the column {column!r} is to be sent, but is not there; available: {there}")
        return await server.ask(prompts, completions, {column: available[column] for column in wanted})

    return reward_remote


class Server:
    """Where rewards come from."""

    def __init__(self, address: Any, *, headers: Mapping[str, str], secrets: Sequence[str], timeout: float) -> None:
        self._address, self._headers, self._secrets, self._timeout = address, headers, secrets, timeout
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.name = str(address.copy_with(query=None, fragment=None))
        """The address for messages: a query may hold a key."""

    async def ask(self, prompts: list[Any], completions: list[Any], columns: Mapping[str, list[Any]]) -> list[Any]:
        """The rewards of N completions, as they were sent; the caller checks them.

        Raises:
            TryAgainError: the connection failed, it took too long, or the server said 429 or 5xx.
            RewardError: the server refused, or answered something else than the protocol says.
        """
        import httpx2

        body = _body({"version": VERSION, "prompts": prompts, "completions": completions, "columns": columns})
        try:
            async with asyncio.timeout(self._timeout):
                status, headers, answer = await self._post(body)
        except TimeoutError:
            raise TryAgainError(f"{self.name} did not answer within {self._timeout:g} s") from None
        except httpx2.TransportError as error:
            said = f": {error}" if str(error) else ""
            raise TryAgainError(f"{self.name} cannot be reached: {type(error).__name__}{said}") from None
        if status != 200:
            self._refuse(status, headers, answer)
        return self._rewards(answer)

    async def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of the answer, which is read only as far as it may be long."""
        headers = {**self._headers, "Content-Type": "application/json"}
        async with self._connection().stream("POST", self._address, content=body, headers=headers) as response:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise RewardError(f"{self.name} compressed its answer, which was not asked for")
            parts, size = [], 0
            async for part in response.aiter_raw():
                parts.append(part)
                size += len(part)
                if size > LARGEST_ANSWER:
                    raise RewardError(f"{self.name} answered more than {LARGEST_ANSWER} bytes")
            return response.status_code, response.headers, b"".join(parts)

    def _connection(self) -> Any:
        """A client of the event loop that runs now; connections are kept between requests."""
        import httpx2

        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32)
            self._client = httpx2.AsyncClient(
                timeout=self._timeout, follow_redirects=False, trust_env=False, limits=limits
            )
            self._loop = loop
        return self._client

    def _refuse(self, status: int, headers: Mapping[str, str], answer: bytes) -> None:
        """Raise what a status other than 200 means."""
        said = self._note(answer)
        if 300 <= status < 400:
            target = self._clean(str(headers.get("Location", "nowhere")).partition("?")[0])
            raise RewardError(f"{self.name} redirects to {target} (HTTP {status}), which is not followed; name that")
        if status == 429 or status >= 500:
            raise TryAgainError(f"{self.name} answered HTTP {status}{said}", wait=_seconds(headers.get("Retry-After")))
        raise RewardError(f"{self.name} answered HTTP {status}{said}")

    def _rewards(self, answer: bytes) -> list[Any]:
        try:
            reply = json.loads(answer.decode("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise RewardError(f"{self.name} answered no JSON that can be read ({reason}){self._note(answer)}") from None
        if not isinstance(reply, dict) or set(reply) not in ({"rewards"}, {"error"}):
            raise RewardError(
                f'{self.name} did not answer {{"rewards": [...]}} or {{"error": "..."}}{self._note(answer)}'
            )
        if "error" in reply:
            raise RewardError(f"{self.name} answered an error{self._note(answer)}")
        if not isinstance(reply["rewards"], list):
            raise RewardError(f"{self.name} answered rewards that are no list{self._note(answer)}")
        return reply["rewards"]

    def _note(self, answer: bytes) -> str:
        """The beginning of an answer, its error alone where it has one, for the end of a message."""
        text = answer[: 16 * LONGEST_NOTE].decode("utf-8", "replace")
        try:
            reply = json.loads(text)
        except (ValueError, RecursionError):
            reply = None
        if isinstance(reply, dict) and isinstance(reply.get("error"), str):
            text = reply["error"]
        text = self._clean(text)
        if not text:
            return ""
        return f": {text if len(text) <= LONGEST_NOTE else text[: LONGEST_NOTE - 3] + '...'!r}"

    def _clean(self, text: str) -> str:
        """Without the values of the headers, should the server repeat them."""
        for secret in self._secrets:
            for part in {secret, secret.rpartition(" ")[2]}:
                text = text.replace(part, "***") if len(part) > 3 else text
        return text


def _address(url: Any, httpx2: Any) -> Any:
    """The parsed address. Messages do not repeat one that may hold a password."""
    try:
        address = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ConfigError(f"url: no address that can be used ({error})") from None
    if address.userinfo:
        raise ConfigError("url: leave user and password out, and name a variable of the environment under `headers`")
    if address.scheme not in ("http", "https") or not address.host:
        raise ConfigError(f"url: expected http://... or https://..., not {url!r}")
    return address


def _columns(columns: Any) -> list[str]:
    if isinstance(columns, str) or not isinstance(columns, Sequence) or not all(isinstance(c, str) for c in columns):
        raise ConfigError(f"columns: expected a list of column names, not {columns!r}")
    twice = [column for column in columns if column in DATA_ARGUMENTS and column not in _OPTIONAL]
    if twice:
        raise ConfigError(f"columns: {twice[0]!r} is sent in any case; leave it out")
    return list(dict.fromkeys(columns))


def _header_values(headers: Any) -> dict[str, str]:
    """Values from the environment; what is given is never repeated in a message, as it may be the secret itself."""
    if not isinstance(headers, Mapping) or not all(isinstance(n, str) and _HEADER.fullmatch(n) for n in headers):
        raise ConfigError("headers: expected a mapping of header names to names of environment variables")
    values = {}
    for name, variable in headers.items():
        if not isinstance(variable, str) or not _VARIABLE.fullmatch(variable):
            raise ConfigError(
                f"headers: for {name} give the name of an environment variable that holds the value, not the value"
            )
        value = os.environ.get(variable)
        if not value:
            raise ConfigError(f"headers: {name} comes from the environment variable {variable}, which is not set")
        if not value.isascii() or not value.isprintable():
            raise ConfigError(f"headers: the environment variable {variable} holds characters that no header may have")
        values[name] = value
    return values


def _body(message: Mapping[str, Any]) -> bytes:
    """The request as JSON; lone surrogates travel as escapes.

    Raises:
        RowError: a column holds something that JSON has not; names the row.
    """
    try:
        return json.dumps(message, allow_nan=False).encode()
    except (TypeError, ValueError):
        for column, values in message["columns"].items():
            for row, value in enumerate(values):
                try:
                    json.dumps(value, allow_nan=False)
                except (TypeError, ValueError) as error:
                    raise RowError(f"the column {column!r} cannot be sent as JSON: {error}", row) from None
        raise


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header; 0 where there is none, or a date."""
    return float(retry_after) if retry_after and re.fullmatch(r"[0-9]{1,6}", retry_after.strip()) else 0.0
