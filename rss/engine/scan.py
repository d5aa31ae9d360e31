"""Iterate over the keys of a store, on all of its servers."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final, NamedTuple

import redis.exceptions

from rss.engine.failures import code_of, failure_of
from rss.engine.lane import Node, Servers
from rss.engine.line import Attempts, line_to
from rss.engine.scripts import pack
from rss.keys import Layout

# The approximate number of keys that one SCAN looks at. It keeps Redis busy for about a tenth of a millisecond.
_COUNT: Final = 250
# Seconds without a page after which the iteration fails: before the first page, and later, while a replica takes over.
_FIRST: Final = 5.0
_PATIENCE: Final = 30.0
# Seconds for one page: after a silence, all keys must be listed anew, and Redis may fork for a snapshot meanwhile.
_REPLY: Final = 10.0
_logger = logging.getLogger("rss")


class Keys(NamedTuple):
    """A page of keys."""

    names: list[bytes]
    #: Their server.
    node: Node
    #: The share of all keys that have been looked at, about: 0 to 1.
    share: float
    #: Whether this is the first page of a pass over all keys. All keys follow.
    first: bool


class _Places(NamedTuple):
    """The masters of the partitions."""

    #: The master of each partition.
    owners: list[Node]
    #: The partitions whose slots move, key by key.
    moving: set[int]


async def scan(servers: Servers, layout: Layout, kind: str | None = None, ending: str = "") -> AsyncGenerator[Keys]:
    """Iterate over all keys that begin with the prefix and a colon. A key may be returned several times.

    *kind*: the type of the keys; None for all. *ending*: the end of their names.

    It returns each key that exists all the time. If a connection breaks, or partitions move between servers, it begins
    anew, since keys may have been missed. While a slot moves key by key, it makes two passes: each key moves only once.

    Raises `StoreUnavailable` if a server does not answer for five seconds at the beginning, or later for half a minute.
    If it refuses to answer, raises what `error_for` returns.
    """
    escaped = re.sub(r"([\\*?\[\]^])", r"\\\1", layout.prefix)
    options = ["MATCH", f"{escaped}:*{ending}", "COUNT", str(_COUNT), *(("TYPE", kind) if kind else ())]
    loop, attempts, places, passes = asyncio.get_running_loop(), Attempts(), None, 0
    heard, patience = loop.time(), _FIRST
    while True:
        try:
            async with asyncio.timeout(patience):
                await servers.ready()
                now = await _places(servers, layout)
            if now != places:
                places, passes = now, 0
            elif passes > bool(now.moving):
                return
            masters, first = servers.masters, True
            for number, node in enumerate(masters):
                async with aclosing(_scan_one(node, options)) as pages:
                    async for names, share in pages:
                        yield Keys(names, node, (number + share) / len(masters), first)
                        first, attempts.failures, heard, patience = False, 0, loop.time(), _PATIENCE
            passes += 1
        except (OSError, redis.exceptions.RedisError) as error:  # TimeoutError is an OSError.
            if final := await attempts.failed(error):
                raise final from error
            if loop.time() - heard > patience:
                raise failure_of(error) from error
            _logger.info("the keys are listed anew: %s", code_of(error) or type(error).__name__)


async def _places(servers: Servers, layout: Layout) -> _Places:
    """Ask the master of each partition whether it still has the slot, by a key that does not exist."""
    owners, moving = list(servers.owners), set[int]()
    for node in dict.fromkeys(owners):
        numbers = [number for number, owner in enumerate(owners) if owner is node]
        async with line_to(node) as line:
            keys = (f"{layout.stems(number)[0]}{layout.mint()}{layout.ending}" for number in numbers)
            replies = await line.ask_each(*(pack("EXISTS", key) for key in keys))
            for number, reply in zip(numbers, replies, strict=True):
                if isinstance(reply, Exception) and code_of(reply) != "ASK":
                    raise reply
                if isinstance(reply, Exception):
                    moving.add(number)
    return _Places(owners, moving)


async def _scan_one(node: Node, options: Sequence[str]) -> AsyncGenerator[tuple[list[bytes], float]]:
    """Iterate over the keys of a server. Raises the errors of redis-py."""
    async with line_to(node, patience=_REPLY) as line:
        cursor, seen, (size,) = b"0", 0, await line.ask(pack("DBSIZE"))
        while True:
            ((cursor, names),) = await line.ask(pack("SCAN", cursor, *options))
            seen += _COUNT
            yield names, min(seen / max(size, 1), 1)
            if cursor == b"0":
                return
