"""The meta key: compare a store with those before it, and mark the references that only some of them have.

The commands run before the first call of a store, or beside its calls, on connections of their own.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import redis.exceptions
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rss.engine.channel import heeding_cancellation
from rss.engine.lane import Node
from rss.engine.scripts import read, sha
from rss.errors import SessionError
from rss.keys import Layout, Partitioned
from rss.references import Reference

#: Returns the master of a key.
MasterOf = Callable[[str], Node]

#: The beginning of a mark: the stores before lacked the reference, or some store lacked one that others had.
NEW: Final = "new"
LACKED: Final = "lacked"
#: The version of the format of keys and data.
FORMAT: Final = "1"
# Seconds to connect and run a few commands.
_PATIENCE: Final = 10.0
# How many marks are sent together: a store may have thousands of partitions, and the server may be far away.
_AT_ONCE: Final = 100
_logger = logging.getLogger("rss")
#: The names of the scripts that run before all others.
SCRIPTS: Final = ("open", "mark")
_OPEN, _MARK = map(read, SCRIPTS)
_OTHER: Final = {
    "format": "the sessions with this prefix have the format {}, but this version of redis-session-sets knows {}",
    "partitions": "the sessions with this prefix are in {} partitions, not in {}",
    "identity": "the sessions with this prefix have the identity {}, not {}",
}


@contextlib.asynccontextmanager
async def connected(node: Node) -> AsyncIterator[AbstractConnection]:
    """Open a connection to a server for a few commands, and close it. An error puts the server in doubt.

    Raises `TimeoutError` if the connection and the commands take too long.
    """
    connection = node.make_connection()
    connection.retry = Retry(NoBackoff(), 0)
    try:
        async with asyncio.timeout(_PATIENCE):
            with heeding_cancellation():
                await connection.connect()  # type: ignore[no-untyped-call]
                yield connection
    except Exception:
        node.doubt()
        raise
    finally:
        await connection.disconnect(nowait=True)


async def ask(connection: AbstractConnection, *command: str | bytes) -> Any:
    """Send a command, and return the reply as bytes. Raises the errors of redis-py."""
    await connection.send_command(*command)
    return await connection.read_response(disable_decoding=True)


async def _run(connection: AbstractConnection, script: str, key: str, *args: str) -> Any:
    await ask(connection, "SCRIPT", "LOAD", script)
    return await ask(connection, "EVALSHA", sha(script), "1", key, *args)


async def open_store(layout: Layout, description: Mapping[str, str], master_of: MasterOf) -> None:
    """Compare a store with those that had its prefix before, and mark the references that only some of them have.

    A store makes no entries in the sets of a reference that it lacks. So if the stores before it lacked one of its
    references, or if it lacks one of theirs, the sets of this reference may be incomplete from now on. The mark is a
    field of a hash in each partition. It stays until `Maintenance.reindex` has completed the sets.

    *description*: what `describe` returns. It is kept for `held_by`.

    Raises `SessionError` if the keys have another layout, and the errors of redis-py.
    """
    own = {
        "format": FORMAT,
        "partitions": str(layout.partitions) if isinstance(layout, Partitioned) else "",
        "identity": layout.identity or "",
    }
    async with connected(master_of(layout.meta)) as connection:
        pairs = (part for pair in description.items() for part in pair)
        try:
            reply = await _run(connection, _OPEN, layout.meta, *own.values(), *pairs)
        except redis.exceptions.ResponseError as error:
            code, _, rest = str(error).removeprefix("ERR ").partition(" ")
            if code != "RSSOTHER":
                raise
            name, _, held = rest.partition(" ")
            none = "no" if name == "partitions" else "none"
            raise SessionError(_OTHER[name].format(held or none, own[name] or none)) from None
        added, missing = ([name.decode() for name in names] for names in reply)
        if description["events"] == "yes" and not await may_publish(connection, layout):
            _logger.warning("no events are published: this user of Redis has no permission, see the guide to the store")
        for names, kind in ((added, NEW), (missing, LACKED)):
            if names:
                await mark(layout, names, kind, master_of)
        for name in added:  # After the marks: if this is interrupted, the next store adds them again.
            await _run(connection, _MARK, layout.meta, f"reference:{name}", description[f"reference:{name}"])
    for names, text in ((added, "new"), (missing, "missing in this store")):
        if names:
            _logger.warning("the references %s are %s: reindex when all processes have the same ones", names, text)


async def may_publish(connection: AbstractConnection, layout: Layout) -> bool:
    """Return whether the user of Redis may publish events. The scripts ignore that error, as their writes are done."""
    for command in ("SPUBLISH", "PUBLISH") if isinstance(layout, Partitioned) else ("PUBLISH",):
        try:
            await ask(connection, command, layout.meta, "")
        except redis.exceptions.NoPermissionError:
            return False
        except redis.exceptions.ResponseError as error:
            if "unknown command" in str(error):  # Redis 6.2 has no SPUBLISH, so the scripts use PUBLISH.
                continue
        return True  # Also if another master has the slot: Redis looks at the permissions first.
    return True


def describe(
    references: Mapping[str, Reference], *, json: bool, events: bool, max_age: int, max_lifetime: int
) -> dict[str, str]:
    """Return fields of the meta key: what a program must know to read, end or repair the sessions of a store.

    *max_age*, *max_lifetime*: milliseconds. 0: there is no maximum.
    """
    fields = {"events": "yes" if events else "no", "max_age": str(max_age), "max_lifetime": str(max_lifetime)}
    for name, reference in references.items():
        words = ["json" if json else "text"]
        words += [word for word in ("strict", "identity") if getattr(reference, word)]
        fields[f"reference:{name}"] = " ".join(words)
    return fields


class Held(NamedTuple):
    """The content of the meta key of a prefix: the layout and the references of its stores."""

    format: str
    #: The number of partitions. None: the store has no partitions.
    partitions: int | None
    #: The reference that determines the partition of a session. None: there is none.
    identity: str | None
    #: The references, with the options that this module knows.
    references: dict[str, Reference]
    #: Milliseconds until a session expires that is not renewed.
    max_age: int
    #: The longest life of a session in milliseconds. 0: there is none.
    max_lifetime: int
    #: Whether the store that opened last publishes events.
    events: bool
    #: Whether the values of references are JSON. False: they are texts.
    json: bool
    #: Whether the key tells the options of the references and the lifetimes. False: older versions of this library have
    #: written it.
    complete: bool
    #: Whether sessions may still move to these stores from one without partitions.
    moving: bool


async def held_by(layout: Layout, master_of: MasterOf) -> Held | None:
    """Read the meta key. Return None if no store has used the prefix. Raises the errors of redis-py."""
    async with connected(master_of(layout.meta)) as connection:
        reply = await ask(connection, "HGETALL", layout.meta)
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)  # RESP3, RESP2
    held = {name.decode(): value.decode() for name, value in pairs}
    if not held:
        return None
    partitions, identity = held.get("partitions", ""), held.get("identity", "") or None
    words = {name.removeprefix("reference:"): held[name].split() for name in held if name.startswith("reference:")}
    return Held(
        held.get("format", ""),
        int(partitions) if partitions else None,
        identity,
        {name: Reference(strict="strict" in one, identity="identity" in one) for name, one in words.items()},
        int(held.get("max_age", 0)),
        int(held.get("max_lifetime", 0)),
        held.get("events") == "yes",
        not any("text" in one for one in words.values()),
        all(words.values()) and int(held.get("max_age", 0)) > 0,
        "moving" in held,
    )


async def mark(layout: Layout, references: Iterable[str], value: str, master_of: MasterOf) -> None:
    """Mark references as incomplete, in each partition. *value*: any text. Raises the errors of redis-py."""
    fields = [part for name in references for part in (incomplete(name), value)]
    by_master: dict[Node, list[str]] = {}
    for key in map(layout.mark, range(layout.partitions)):
        by_master.setdefault(master_of(key), []).append(key)
    for node, keys in by_master.items():
        async with connected(node) as connection:
            await ask(connection, "SCRIPT", "LOAD", _MARK)
            for first in range(0, len(keys), _AT_ONCE):
                some = [("EVALSHA", sha(_MARK), "1", key, *fields) for key in keys[first : first + _AT_ONCE]]
                await connection.send_packed_command(connection.pack_commands(some))
                for _ in some:
                    await connection.read_response(disable_decoding=True)


async def known_references(layout: Layout, master_of: MasterOf) -> list[str]:
    """Return the references that a store of this prefix has, or had. Raises the errors of redis-py."""
    async with connected(master_of(layout.meta)) as connection:
        fields = [field.decode() for field in await ask(connection, "HKEYS", layout.meta)]
    return [field.removeprefix("reference:") for field in fields if field.startswith("reference:")]


async def forget(layout: Layout, references: Iterable[str], master_of: MasterOf) -> None:
    """Forget references. Their marks must be removed already. Raises the errors of redis-py."""
    if fields := [f"reference:{name}" for name in references]:
        async with connected(master_of(layout.meta)) as connection:
            await ask(connection, "HDEL", layout.meta, *fields)


def incomplete(reference: str) -> str:
    """Return the field of a mark."""
    return f"incomplete:{reference}"
