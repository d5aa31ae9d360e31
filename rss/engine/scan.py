"""Iterate over the keys of a store, on all of its servers."""

import re
from collections.abc import AsyncGenerator, Sequence
from typing import Final, NamedTuple

import redis.exceptions

from rss.engine.failures import failure_of
from rss.engine.lane import Node, Servers
from rss.engine.line import Attempts, line_to
from rss.engine.scripts import pack
from rss.errors import StoreUnavailable

# The approximate number of keys that one SCAN looks at. It keeps Redis busy for about a tenth of a millisecond.
_COUNT: Final = 250
# The maximum number of failures in a row. They take about five seconds.
_FAILURES: Final = 25


class Keys(NamedTuple):
    """A page of keys."""

    names: list[bytes]
    #: Their server.
    node: Node
    #: The share of all keys that have been looked at, about: 0 to 1.
    share: float


async def scan(servers: Servers, prefix: str, kind: str | None = None) -> AsyncGenerator[Keys]:
    """Iterate over all keys that begin with a prefix and a colon. A key may be returned several times.

    *kind*: the type of the keys; None for all.

    If partitions move between servers meanwhile, keys may have been missed, so the iteration begins anew. So it returns
    each key that exists all the time.

    Raises `StoreUnavailable` if a server does not answer, after several attempts.
    """
    try:
        await servers.ready()
    except (OSError, redis.exceptions.RedisError) as error:
        raise failure_of(error) from error
    escaped = re.sub(r"([\\*?\[\]^])", r"\\\1", prefix)
    options = ["MATCH", f"{escaped}:*", "COUNT", str(_COUNT), *(("TYPE", kind) if kind else ())]
    while True:
        owners, masters = list(servers.owners), servers.masters
        for number, node in enumerate(masters):
            async for names, share in _scan_one(node, options):
                yield Keys(names, node, (number + share) / len(masters))
        if list(servers.owners) == owners:
            return


async def _scan_one(node: Node, options: Sequence[str]) -> AsyncGenerator[tuple[list[bytes], float]]:
    """Iterate over the keys of a server. If the connection breaks, begin anew: it may be another server then."""
    attempts = Attempts()
    while True:
        try:
            async with line_to(node) as line:
                cursor, seen, (size,) = b"0", 0, await line.ask(pack("DBSIZE"))
                while True:
                    ((cursor, names),) = await line.ask(pack("SCAN", cursor, *options))
                    attempts.failures, seen = 0, seen + _COUNT
                    yield names, min(seen / max(size, 1), 1)
                    if cursor == b"0":
                        return
        except (OSError, redis.exceptions.RedisError) as error:  # TimeoutError is an OSError.
            if final := await attempts.failed(error):
                raise final from error
            if attempts.failures == _FAILURES:
                raise StoreUnavailable("a server does not answer, so its keys cannot be listed") from error
