"""Examine a Redis, and what its user may do there: each line says that something is right, or what to do."""

import asyncio
import importlib.metadata
import secrets
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

import redis.exceptions
from redis.asyncio.connection import AbstractConnection

from rss.cli.opening import Store
from rss.engine.failures import final_error_for
from rss.engine.lane import Node
from rss.engine.line import line_to
from rss.engine.meta import ask, connected, may_publish
from rss.engine.operations import Copy, Position
from rss.engine.scripts import pack
from rss.errors import IncompleteReference, SessionError, SessionNotFound, StoreUnavailable

_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_CALLS: Final = 20
# Milliseconds. A request usually makes two calls.
_SLOW: Final = 20
_OLDEST: Final = (6, 2)

Level = Literal["ok", "warning", "error"]


class Line(NamedTuple):
    """One line: what was examined, how it is, and a sentence about it."""

    level: Level
    what: str
    sentence: str


async def examine(store: Store, url: str, *, events: bool) -> AsyncGenerator[Line]:
    """Iterate over all lines. *events*: whether the stores publish events."""
    yield _transport(url)
    yield _distribution()
    masters = store.operations.engine.servers.masters
    for node in masters:  # Each has users and settings of its own.
        async with asyncio.timeout(store.operations.timeout), connected(node) as connection:
            where = f" of {_address(connection)}" if len(masters) > 1 else ""
            for line in [*await _server(connection, url), *await _commands(store, connection, events=events)]:
                yield line._replace(what=line.what + where)
        for line in await _scripts(store, node):
            yield line._replace(what=line.what + where)
    yield await _latency(store)
    async for line in _references(store):
        yield line


def _address(connection: AbstractConnection) -> str:
    return f"{getattr(connection, 'host', '')}:{getattr(connection, 'port', '')}"


def _transport(url: str) -> Line:
    parts = urlsplit(url)
    if parts.scheme.startswith("rediss"):
        return Line("ok", "transport", "The connection is encrypted by TLS.")
    hosts = [host.rpartition(":")[0] or host for host in parts.netloc.rpartition("@")[2].split(",")]
    if parts.scheme == "unix" or all(host.strip("[]") in _LOOPBACK for host in hosts):
        return Line("ok", "transport", "The connection does not leave this machine.")
    return Line("warning", "transport", "The connection is not encrypted: use rediss://.")


def _distribution() -> Line:
    owners = set(importlib.metadata.packages_distributions().get("rss", ())) - {"redis-session-sets"}
    if owners:
        return Line("error", "module rss", f"Another distribution has a module rss too: uninstall {', '.join(owners)}.")
    return Line("ok", "module rss", "No other distribution has a module rss.")


async def _server(connection: AbstractConnection, url: str) -> list[Line]:
    """Examine one server. A user without the right to ask is told so once."""
    try:
        info = _info(await ask(connection, "INFO"))
    except redis.exceptions.ResponseError:
        return [Line("warning", "server", "This user may not run INFO, so the server was not examined.")]
    return [*_version(info, url), *_eviction(info), *_persistence(info), await _lazy_expiry(connection)]


def _info(reply: bytes) -> dict[str, str]:
    text = reply.decode(errors="replace")
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def _version(info: dict[str, str], url: str) -> Iterator[Line]:
    name, version = "Valkey", info.get("valkey_version", "")
    if not version:
        name, version = "Redis", info.get("redis_version", "0")
    kind = "Redis Cluster" if "cluster" in (info.get("redis_mode"), info.get("server_mode")) else "one server"
    if "+sentinel" in url:
        kind = "one server behind Sentinels"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if numbers < _OLDEST:
        yield Line("error", "server", f"{name} {version} is too old: install Redis 6.2 or newer, or Valkey.")
    else:
        yield Line("ok", "server", f"{name} {version}, {kind}.")


def _eviction(info: dict[str, str]) -> Iterator[Line]:
    policy, limit = info.get("maxmemory_policy", ""), int(info.get("maxmemory", 0))
    if policy == "noeviction":
        yield Line("ok", "maxmemory-policy", "It is noeviction: Redis evicts no session and no tombstone.")
    else:
        yield Line(
            "error" if limit else "warning",
            "maxmemory-policy",
            f"It is {policy}, so Redis may evict sessions and tombstones"
            f"{'' if limit else ' once maxmemory is set'}: set noeviction.",
        )


def _persistence(info: dict[str, str]) -> Iterator[Line]:
    if "err" in (info.get("rdb_last_bgsave_status"), info.get("aof_last_write_status")):
        yield Line("error", "persistence", "Redis could not write to disk, and may refuse writes: see its log.")
    elif info.get("aof_enabled") == "1":
        yield Line("ok", "persistence", "The append-only file is on.")
    else:
        yield Line(
            "warning", "persistence", "A restart loses what is newer than the last snapshot: set appendonly yes."
        )


async def _lazy_expiry(connection: AbstractConnection) -> Line:
    what = "lazyfree-lazy-expire"
    try:
        reply = await ask(connection, "CONFIG", "GET", what)
    except redis.exceptions.ResponseError:
        return Line("warning", what, "This user may not run CONFIG GET, so this was not examined.")
    pairs = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))
    if b"yes" in pairs.values():
        return Line("ok", what, "A large key that expires does not stop Redis.")
    return Line("warning", what, "A large reference set that expires stops Redis for a moment: set it to yes.")


async def _commands(store: Store, connection: AbstractConnection, *, events: bool) -> list[Line]:
    """Try the plain commands that some methods need. *events*: whether the stores publish events."""
    layout, lines = store.operations.layout, list[Line]()
    if events and not await may_publish(connection, layout):
        lines.append(Line("warning", "events", "No events are published: this user may not publish to the channels."))
    for command, needing in (
        (("SCAN", "0", "MATCH", f"{layout.prefix}:*", "COUNT", "1"), "check, repair, reindex, sweep, stats and copy"),
        (("DBSIZE",), "check, repair, reindex, sweep, stats and copy"),
        (("HKEYS", layout.meta), "reindex"),
        (("SET", layout.marker(0), "", "PX", "1"), "durable, sweep, repair and reindex"),
        (("MEMORY", "USAGE", layout.meta), "the bytes of stats"),
        (("WAIT", "0", "1"), "durable"),
        (("CLIENT", "TRACKING", "OFF"), "wait_ended"),
    ):
        try:
            await ask(connection, *command)
        except redis.exceptions.MovedError:  # The key is on another master.
            continue
        except redis.exceptions.ResponseError as error:
            name = " ".join(command[:2]) if command[0] in ("CLIENT", "MEMORY") else command[0]
            sentence = _sentence(final_error_for(error))
            lines.append(Line("warning", f"command {name}", f"{sentence} It is needed for {needing}."))
    return lines


async def _scripts(store: Store, node: Node) -> list[Line]:
    """Try every script on a session of its own, and remove its keys."""
    partitions = {number for number, owner in enumerate(store.operations.engine.servers.owners) if owner is node}
    if not partitions:
        return []
    trial, lines, skipped = _Trial(store, partitions), list[Line](), list[str]()
    try:
        calls = trial.calls()
        for name, call in calls:
            try:
                await call()
            except IncompleteReference:  # The script has run.
                continue
            except SessionError as error:
                if isinstance(error, SessionNotFound) and lines:  # A script before it failed.
                    skipped.append(name)
                    continue
                lines.append(Line("error", f"script {name}", _sentence(error)))
                if isinstance(error, StoreUnavailable):
                    skipped += [name for name, _ in calls]
        if skipped:
            lines.append(Line("warning", "scripts", f"Not tried, because others failed: {', '.join(skipped)}."))
    finally:
        left = await trial.clear()
    if left:
        lines.append(Line("error", "trial", "The keys of the trial were not removed: they expire within a minute."))
    return lines or [Line("ok", "scripts", "This user may run every script.")]


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


class _Trial:
    """A session in one of some partitions, of a value that no application uses, and the calls of all scripts on it."""

    def __init__(self, store: Store, partitions: Collection[int]) -> None:
        self._store = store
        self._operations = store.operations
        layout = self._operations.layout
        self._field = layout.identity or next(iter(store.fields.references), None)
        while True:
            self._value = f"doctor-{secrets.token_hex(16)}"
            home = layout.home([(self._field, self._value)] if self._field else [])
            if home is None or home in partitions:  # The value of an identity determines its partition.
                break
        self._values: dict[str, Any] = {self._field: self._value} if self._field else {}
        self._partition = min(partitions) if home is None else home
        self._ids = [layout.mint(self._partition) for _ in range(3)]

    def calls(self) -> Iterator[tuple[str, Callable[[], Awaitable[object]]]]:
        """Iterate over the name and the call of each script."""
        store, operations, field, (one, two, other) = self._store, self._operations, self._field, self._ids
        yield "set_with_refs", lambda: store.set(one, {**self._values, "n": 1, "x": "y"}, "1m")
        yield "get", lambda: store.get(one)
        yield "get_and_renew", lambda: store.get(one, touch=True)
        yield "touch", lambda: store.touch(one)
        yield "increment", lambda: store.increment(one, "n")
        yield "unset_with_refs", lambda: store.unset(one, ["x"])
        yield "inspect", lambda: operations.inspect(one, self._partition, (), "check")
        if field:
            layout = operations.layout
            names = [make(field, self._value, self._partition) for make in (layout.reference, layout.fence)]
            position = Position(self._partition)
            yield "find_by_ref", lambda: store.ids_by(field, self._value)
            yield "blocked", lambda: store.blocked(field, self._value)
            yield "inspect_ref", lambda: operations.inspect_set(names[0], field, position, "check")
            yield "inspect_fence", lambda: operations.inspect_fence(names[1], self._partition, "check")
        yield "rotate_with_refs", self._rotate
        yield "arrive, retire, confirm", lambda: self._move(two, other)
        yield "delete_with_refs", lambda: store.delete(other)
        if field:
            yield "delete_by_ref", lambda: store.block(field, self._value, "1m")
            yield "unblock", lambda: store.unblock(field, self._value)
        yield "complete", lambda: operations.complete(secrets.token_hex(8), "x", self._partition)

    async def _rotate(self) -> None:
        encoded = self._store.fields.encode({})
        await self._operations.rotate(self._ids[0], lambda _: self._ids[1], encoded, "keep")

    async def _move(self, session_id: str, other: str) -> None:
        """Move the session to another id, as a change of its partition does."""
        copy = Copy.of(session_id, (await self._operations.get(session_id, None)).pairs)
        await self._operations.arrive(other, copy, lives=60_000)
        retired = await self._operations.retire(session_id, other, copy)
        if retired:
            await self._operations.confirm(other, "60000", retired, copy, lives=60_000)

    async def clear(self) -> bool:
        """Remove all keys of the trial. Return whether that failed."""
        layout = self._operations.layout
        names = [layout.place(one)[0] for one in self._ids]
        for partition in layout.with_value(self._field, self._value) if self._field else ():
            names += [make(self._field or "", self._value, partition) for make in (layout.reference, layout.fence)]
        by_master = defaultdict[Node, list[str]](list)
        for name in names:
            by_master[self._operations.engine.servers.master_of(name)].append(name)
        try:
            for node, some in by_master.items():
                async with line_to(node) as line:
                    await line.ask(*(pack("UNLINK", name) for name in some))
        except (OSError, redis.exceptions.RedisError):
            return True
        return False


async def _latency(store: Store) -> Line:
    taken = list[float]()
    for _ in range(_CALLS):
        begun = time.perf_counter()
        await store.ended(store.operations.layout.mint())
        taken.append((time.perf_counter() - begun) * 1000)
    median, longest = statistics.median(taken), max(taken)
    numbers = f"{len(taken)} calls took {median:.1f} ms in the median, and {longest:.1f} ms at most"
    if median > _SLOW:
        return Line("warning", "latency", f"{numbers}: run the application nearer to Redis.")
    return Line("ok", "latency", f"{numbers}.")


async def _references(store: Store) -> AsyncIterator[Line]:
    for name, kind in store.fields.references.items():
        what = f"reference {name}"
        try:
            with store.operations.incompleteness(name, 0) as incomplete:
                marked = await incomplete
        except SessionError as error:
            yield Line("error", what, _sentence(error))
            continue
        if marked:
            yield Line("warning", what, "Its sets may lack sessions: run rss reindex.")
        else:
            yield Line("ok", what, f"It is complete{' and strict' if kind.strict else ''}.")
