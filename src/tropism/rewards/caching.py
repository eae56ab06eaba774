"""Rewards kept on disk by content: what a term said of a row is not asked again.

A cache is an SQLite file of keys and JSON values. A key is the SHA-256 of everything that the reward depends on as far
as it can be told: the identity of the function, its arguments, and every value of the row that the function asks for.
Each value carries a checksum, so that a damaged file is an error and never a wrong reward.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from tropism.errors import ConfigError, RewardError, StorageError
from tropism.rewards.calling import RUN_ARGUMENTS, Asks
from tropism.rewards.config import RewardTerm
from tropism.rewards.raw import RowError, Value
from tropism.rewards.registry import FACTORIES, RewardFn, registered
from tropism.rewards.resolve import code_digest
from tropism.rewards.reward_model import NAME, find_reward_model, fingerprint, folder_named

APPLICATION = 0x74726F70
"""Marks an SQLite file as a cache of rewards."""
VERSION = 1
WAIT_SECONDS = 30.0
"""How long to wait for another process that is writing."""


class RewardCache:
    """The rewards of one term on disk. Several threads and processes may use it at once.

    Args:
        path: the file; made where it is missing.
        identity: what the rewards depend on beside the row (``identity_of``).

    Raises:
        StorageError: the file cannot be made, or is no cache of rewards.
    """

    def __init__(self, path: str | Path, identity: str) -> None:
        self.path, self._identity = Path(path), identity
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._connected() as connection:
                self._prepare(connection)
        except OSError as error:
            raise StorageError(f"the reward cache {self.path} cannot be used: {error.strerror or error}") from error

    def keys(self, data: Mapping[str, list[Any]], rows: int) -> list[str]:
        """The key of each row of some data.

        Raises:
            RowError: a row holds something that cannot be part of a key.
        """
        keys = []
        for row in range(rows):
            seen = {name: values[row] for name, values in data.items()}
            try:
                text = f"{self._identity}\n{_canonical(seen, 'its data')}"
            except RewardError as error:
                raise RowError(str(error), row) from error
            keys.append(hashlib.sha256(text.encode()).hexdigest())
        return keys

    def read(self, keys: Sequence[str]) -> dict[str, Value]:
        """The rewards of those keys that are there.

        Raises:
            StorageError: the file is damaged or cannot be read.
        """
        found: dict[str, Value] = {}
        with self._connected() as connection:
            for key in dict.fromkeys(keys):
                row = connection.execute("SELECT value, sum FROM rewards WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = self._value(key, *row)
        return found

    def write(self, rewards: Mapping[str, Value]) -> None:
        """Keep rewards; one that is already there stays.

        Raises:
            StorageError: the file cannot be written.
        """
        if not rewards:
            return
        texts = {key: json.dumps(value) for key, value in rewards.items()}
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(
                "INSERT OR IGNORE INTO rewards (key, value, sum) VALUES (?, ?, ?)",
                [(key, text, _checksum(key, text)) for key, text in texts.items()],
            )
            connection.execute("COMMIT")

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """A connection for one operation; one that does not reach its end is rolled back."""
        try:
            with closing(sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)) as connection:
                yield connection
        except sqlite3.Error as error:
            raise self._problem(error) from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the table in a new file; refuse a file that is something else."""
        run = connection.execute
        run("BEGIN IMMEDIATE")
        if run("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            run("CREATE TABLE rewards (key TEXT PRIMARY KEY, value TEXT NOT NULL, sum TEXT NOT NULL) WITHOUT ROWID")
            run(f"PRAGMA application_id = {APPLICATION}")
            run(f"PRAGMA user_version = {VERSION}")
        run("COMMIT")
        mark = (run("PRAGMA application_id").fetchone()[0], run("PRAGMA user_version").fetchone()[0])
        if mark != (APPLICATION, VERSION):
            raise StorageError(f"{self.path} is no cache of rewards of this version; name another file")

    def _value(self, key: str, text: Any, checksum: Any) -> Value:
        if not isinstance(text, str) or checksum != _checksum(key, text):
            raise StorageError(f"the reward cache {self.path} is damaged; delete it, and it is filled anew")
        value: Value = json.loads(text)
        return value

    def _problem(self, error: sqlite3.Error) -> StorageError:
        if isinstance(error, sqlite3.OperationalError):
            return StorageError(f"the reward cache {self.path} cannot be used: {error}")
        return StorageError(
            f"the reward cache {self.path} is damaged, or no cache ({error}); delete it, and it is filled anew"
        )


def check_cacheable(asks: Asks, name: str) -> None:
    """Refuse a cache for a function whose reward depends on the run, or that logs.

    Raises:
        ConfigError: names what the function asks for.
    """
    asked = [argument for argument in RUN_ARGUMENTS if argument in asks.names]
    if asked:
        raise ConfigError(
            f"reward {name!r} asks for {', '.join(asked)}, so its rewards cannot come from a cache: remove `cache`, "
            "or the argument"
        )


def identity_of(term: RewardTerm, function: RewardFn | None, name: str) -> str:
    """What a term's rewards depend on beside the row, as text.

    Named rewards: the name, its arguments and the version of the library. Reward models: their files as well. Code
    references: the file's hash as well.
    Python functions: their source and that of their file, their defaults and what they enclose.

    Raises:
        ConfigError: what a function depends on cannot be told.
    """
    identity: dict[str, Any] = {"args": dict(term.args)}
    folder = folder_named(term)
    if folder is not None:
        model = fingerprint(find_reward_model(folder))
        arguments = {name: value for name, value in term.args.items() if name != "model"}
        identity = {"args": arguments, "use": NAME, "model": model, "version": metadata.version("tropism")}
    elif isinstance(term.use, str) and term.use in FACTORIES:
        identity |= {"use": term.use, "version": metadata.version("tropism")}
    elif isinstance(term.use, str) and ":" in term.use:
        identity |= {"use": term.use, "code": code_digest(term.use)}
    else:
        source = registered(term.use) if isinstance(term.use, str) else term.use
        identity["function"] = _function_identity(source, f"reward {name!r}")
    try:
        return _canonical(identity, "args")
    except RewardError as error:
        raise ConfigError(f"reward {name!r}: its rewards cannot be kept in a cache: {error}") from error


def _function_identity(function: Any, what: str) -> dict[str, Any]:
    if isinstance(function, partial):
        inner = _function_identity(function.func, what)
        return {"partial": inner, "positional": list(function.args), "named": dict(function.keywords)}
    mend = "name it as file.py:function, or remove `cache`"
    if not (inspect.isfunction(function) or inspect.isclass(function)):
        kind = type(function).__name__
        raise ConfigError(f"{what}: what a {kind} depends on cannot be told, so its rewards cannot be kept: {mend}")
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError) as error:
        raise ConfigError(f"{what} has no source that can be read, so its rewards cannot be kept: {mend}") from error
    identity: dict[str, Any] = {"name": function.__qualname__, "source": source}
    with suppress(OSError, TypeError):
        identity["file"] = hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
    if inspect.isfunction(function):
        enclosed = inspect.getclosurevars(function).nonlocals
        identity |= {"defaults": function.__defaults__, "named": function.__kwdefaults__, "encloses": dict(enclosed)}
    return identity


def _canonical(value: Any, where: str) -> str:
    """JSON of one form.

    Raises:
        RewardError: it is not made of texts, numbers, truth values, None, lists, and mappings with text keys.
    """
    return json.dumps(_plain(value, where), sort_keys=True, separators=(",", ":"))


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(entry, where) for entry in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(entry, f"{where}, {key!r}") for key, entry in value.items()}
    raise RewardError(
        f"{where}: a {type(value).__name__} cannot be part of a cache key; remove `cache`, or make it text"
    )


def _checksum(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()[:32]
