"""The meta key: compare a store with those before it, and mark the references that only some of them have.

The commands run before the first call of a store, or beside its calls, on connections of their own.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Container, Iterable, Mapping
from typing import Any, Final, NamedTuple

import redis.exceptions
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

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
    """Open a connection to a server for a few commands, and close it."""
    connection = node.make_connection()
    connection.retry = Retry(NoBackoff(), 0)
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        yield connection
    finally:
        await connection.disconnect(nowait=True)


async def ask(connection: AbstractConnection, *command: str | bytes) -> Any:
    """Send a command, and return the reply as bytes. Raises the errors of redis-py."""
    await connection.send_command(*command)
    return await connection.read_response(disable_decoding=True)


async def _run(connection: AbstractConnection, script: str, key: str, *args: str) -> Any:
    await ask(connection, "SCRIPT", "LOAD", script)
    return await ask(connection, "EVALSHA", sha(script), "1", key, *args)


async def open_store(layout: Layout, references: Mapping[str, str], master_of: MasterOf) -> None:
    """Compare a store with those that had its prefix before, and mark the references that only some of them have.

    A store makes no entries in the sets of a reference that it lacks. So if the stores before it lacked one of its
    references, or if it lacks one of theirs, the sets of this reference may be incomplete from now on. The mark is a
    field of a hash in each partition. It stays until `Maintenance.reindex` has completed the sets.

    *references*: their options, as `options_of` returns them. They are kept for `held_by`.

    Raises `SessionError` if the keys have another layout, and the errors of redis-py.
    """
    own = {
        "format": FORMAT,
        "partitions": str(layout.partitions) if isinstance(layout, Partitioned) else "",
        "identity": layout.identity or "",
    }
    async with connected(master_of(layout.meta)) as connection:
        options = (part for pair in references.items() for part in pair)
        try:
            reply = await _run(connection, _OPEN, layout.meta, *own.values(), *options)
        except redis.exceptions.ResponseError as error:
            code, _, rest = str(error).removeprefix("ERR ").partition(" ")
            if code != "RSSOTHER":
                raise
            name, _, held = rest.partition(" ")
            raise SessionError(_OTHER[name].format(held or "none", own[name] or "none")) from None
        added, missing = ([name.decode() for name in names] for names in reply)
        for names, kind in ((added, NEW), (missing, LACKED)):
            if names:
                await mark(layout, names, kind, master_of)
        for name in added:  # After the marks: if this is interrupted, the next store adds them again.
            await _run(connection, _MARK, layout.meta, f"reference:{name}", references[name])
    for names, text in ((added, "new"), (missing, "missing in this store")):
        if names:
            _logger.warning("the references %s are %s: reindex when all processes have the same ones", names, text)


def options_of(reference: Reference, *, json: bool) -> str:
    """Return the options of a reference in words: those that a program must know to read or repair its sets."""
    return ("json" if json else "text") + (" strict" if reference.strict else "")


class Held(NamedTuple):
    """The content of the meta key of a prefix: the layout and the references of its stores."""

    format: str
    #: The number of partitions. None: the store has no partitions.
    partitions: int | None
    #: The reference that determines the partition of a session. None: there is none.
    identity: str | None
    #: The references, with the options that this module knows.
    references: dict[str, Reference]
    #: Whether the values of references are JSON. False: they are texts. None: a version of this library that did not
    #: write the options was the last to open a store, so it is not known which references are strict either.
    json: bool | None


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
        {name: Reference(strict="strict" in one, identity=name == identity) for name, one in words.items()},
        None if not all(words.values()) else not any("text" in one for one in words.values()),
    )


async def mark(layout: Layout, references: Iterable[str], value: str, master_of: MasterOf) -> None:
    """Mark references as incomplete, in each partition. *value*: any text. Raises the errors of redis-py."""
    fields = [part for name in references for part in (incomplete(name), value)]
    for node, keys in _marks(layout, master_of):
        async with connected(node) as connection:
            await ask(connection, "SCRIPT", "LOAD", _MARK)
            for key in keys:
                await ask(connection, "EVALSHA", sha(_MARK), "1", key, *fields)


async def forget(layout: Layout, references: Container[str], master_of: MasterOf) -> None:
    """Forget all references of earlier stores except these. Raises the errors of redis-py."""
    async with connected(master_of(layout.meta)) as connection:
        known = [field.decode() for field in await ask(connection, "HKEYS", layout.meta)]
        others = [name for field in known if (name := field.removeprefix("reference:")) != field]
        others = [name for name in others if name not in references]
        if not others:
            return
        for node, keys in _marks(layout, master_of):
            async with connected(node) as other:
                for key in keys:
                    await ask(other, "HDEL", key, *map(incomplete, others))
        await ask(connection, "HDEL", layout.meta, *(f"reference:{name}" for name in others))


def _marks(layout: Layout, master_of: MasterOf) -> Iterable[tuple[Node, list[str]]]:
    """Return the masters, and the keys of marks that each of them has."""
    found: dict[Node, list[str]] = {}
    for key in map(layout.mark, range(layout.partitions)):
        found.setdefault(master_of(key), []).append(key)
    return found.items()


def incomplete(reference: str) -> str:
    """Return the field of a mark."""
    return f"incomplete:{reference}"
