"""The servers of a store, and the server of each partition: here a single server, in `cluster.py` a Redis Cluster."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final

from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rss.engine.coalesce import Batch
from rss.engine.lane import Lane, Node
from rss.engine.scripts import Scripts
from rss.errors import SessionError
from rss.keys import Layout, Partitioned

#: The field of the meta key that holds the number of partitions.
_PARTITIONS: Final = "partitions"


class OneServer:
    """A Redis, or a Redis behind Sentinels. It has all partitions."""

    def __init__(
        self, make_connection: Callable[[], AbstractConnection], scripts: Scripts, layout: Layout, timeout: float
    ) -> None:
        self.loop = asyncio.get_running_loop()
        #: No slot of one server moves.
        self.split: Mapping[int, float] = {}
        self._layout = layout
        self._checked = not isinstance(layout, Partitioned)
        self._node = Node(make_connection, scripts, layout, timeout, self)
        #: The server of each partition.
        self.owners: Sequence[Node] = [self._node] * layout.partitions

    @property
    def nodes(self) -> Sequence[Node]:
        """All servers."""
        return (self._node,)

    async def ready(self) -> None:
        """Check the number of partitions once. Raises `SessionError` if the keys have another number of them."""
        if not self._checked:
            async with connected(self._node.make_connection) as connection:
                await check_partitions(connection, self._layout)
            self._checked = True

    def redirect(self, lane: Lane, batch: Batch, error: Exception) -> bool:
        """Leave the batch in its lane."""
        del lane, batch, error
        return False

    def doubt(self, node: Node) -> None:
        """Do nothing: there is no other server to ask."""

    async def aclose(self) -> None:
        """Close the connections, and wait until they are closed."""
        await self._node.aclose()

    def close(self) -> None:
        """Close the connections. Calls without a reply get `StoreUnavailable`."""
        self._node.close()


@contextlib.asynccontextmanager
async def connected(make_connection: Callable[[], AbstractConnection]) -> AsyncIterator[AbstractConnection]:
    """Open a connection for a few commands, and close it."""
    connection = make_connection()
    connection.retry = Retry(NoBackoff(), 0)
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        yield connection
    finally:
        await connection.disconnect(nowait=True)


async def ask(connection: AbstractConnection, *command: str) -> Any:
    """Send a command, and return the reply as bytes. Raises the errors of redis-py."""
    await connection.send_command(*command)
    return await connection.read_response(disable_decoding=True)


async def check_partitions(connection: AbstractConnection, layout: Layout) -> None:
    """Write the number of partitions to the meta key if it is new. Raises `SessionError` if it holds another one."""
    await ask(connection, "HSETNX", layout.meta, _PARTITIONS, str(layout.partitions))
    held: bytes = await ask(connection, "HGET", layout.meta, _PARTITIONS)
    if held != str(layout.partitions).encode():
        number = held.decode(errors="backslashreplace")
        raise SessionError(f"the sessions with this prefix are in {number} partitions, not in {layout.partitions}")
