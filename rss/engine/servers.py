"""The servers of a store, and the server of each partition: here a single server, in `cluster.py` a Redis Cluster."""

import asyncio
import contextlib
import contextvars
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
)

from rss.engine.coalesce import Batch
from rss.engine.lane import VOLLEYS, Lane, Node
from rss.engine.meta import open_store
from rss.engine.scripts import Scripts
from rss.keys import Layout

# Seconds between two questions to the Sentinels.
_EVERY: Final = 1.0


class OneServer:
    """A Redis. It has all partitions."""

    def __init__(
        self,
        make_connection: Callable[[], AbstractConnection],
        scripts: Scripts,
        layout: Layout,
        description: Mapping[str, str] | None,
        timeout: float,
    ) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        #: No slot of one server moves.
        self.split: Mapping[int, float] = {}
        self._layout = layout
        self._description = description
        self._opened = False
        self._node = Node(make_connection, scripts, layout, timeout, self)
        #: The server of each partition.
        self.owners: Sequence[Node] = [self._node] * layout.partitions

    @property
    def nodes(self) -> Sequence[Node]:
        """All servers."""
        return (self._node,)

    @property
    def volleys(self) -> int:
        """Two volleys: while Redis runs one, Python handles the other."""
        return VOLLEYS

    async def ready(self) -> None:
        """Compare the store once with those before it. Raises `SessionError` if the keys have another layout."""
        if not self._opened and self._description is not None:
            await open_store(self._layout, self._description, self.master_of)
            self._opened = True

    @property
    def masters(self) -> Sequence[Node]:
        """The servers that together have all keys."""
        return (self._node,)

    def master_of(self, key: str) -> Node:
        """Return the server: it has all keys."""
        del key
        return self._node

    def redirect(self, lane: Lane, batch: Batch, error: Exception) -> bool:
        """Leave the batch in its lane."""
        del lane, batch, error
        return False

    def doubt(self, node: Node) -> None:
        """Do nothing: there is no other server to ask."""

    async def confirm(self, node: Node) -> bool:
        """Return True: no other server takes its place."""
        del node
        return True

    async def aclose(self) -> None:
        """Close the connections, and wait until they are closed."""
        await self._node.aclose()

    def close(self) -> None:
        """Close the connections. Calls without a reply get `StoreUnavailable`."""
        self._node.close()


class _Address:
    """Gives a connection the address of the master, in place of its pool. We choose which Sentinel is asked first."""

    is_master: Final = True

    def __init__(self, pool: SentinelConnectionPool) -> None:
        self.check_connection: bool = pool.check_connection
        self._name = pool.service_name
        self._manager: Sentinel = copy.copy(pool.sentinel_manager)
        #: All Sentinels.
        self.sentinels: Sequence[Redis] = tuple(self._manager.sentinels)

    def ask_first(self, sentinel: Redis) -> None:
        """Ask this Sentinel before all others."""
        self._manager.sentinels = [sentinel, *(one for one in self.sentinels if one is not sentinel)]

    async def get_master_address(self) -> tuple[str, int]:
        """Return what the first Sentinel says that answers. Raises `MasterNotFoundError` if none does."""
        address: tuple[str, int] = await self._manager.discover_master(self._name)
        return address


class SentinelServer(OneServer):
    """A Redis behind Sentinels.

    If a master is replaced, it may live on for a while, and acknowledge writes that will be lost. So the Sentinels are
    asked which server is the master: every second, and when it answers after a silence.
    """

    def __init__(
        self,
        pool: SentinelConnectionPool,
        scripts: Scripts,
        layout: Layout,
        description: Mapping[str, str] | None,
        timeout: float,
    ) -> None:
        super().__init__(self._make_connection, scripts, layout, description, timeout)
        self._pool = pool
        self._address = _Address(pool)
        self._master: object = None
        self._watching: asyncio.Task[None] | None = None

    def _make_connection(self) -> AbstractConnection:
        connection = cast("SentinelManagedConnection", self._pool.make_connection())  # type: ignore[no-untyped-call]
        connection.connection_pool = self._address
        return connection

    async def ready(self) -> None:
        """Check the layout, as any server does. Learn who is the master, and watch that from now on.

        Raises the errors of redis-py if no Sentinel answers.
        """
        await super().ready()
        if self._watching is None:
            self._master = await self._ask()
        if self._watching is None:  # Another lane may have been faster.
            self._watching = asyncio.Task(self._watch(), loop=self.loop, context=contextvars.Context())

    async def aclose(self) -> None:
        """Close the connections, and wait until they are closed, also the one of a question to the Sentinels."""
        watching = self._watching
        self.close()
        if watching:
            await asyncio.wait([watching])
        await super().aclose()

    def close(self) -> None:
        """Close the connections. Calls without a reply get `StoreUnavailable`."""
        if self._watching:
            self._watching.cancel()  # It stays, so that `ready` begins no other one.
        super().close()

    async def confirm(self, node: Node) -> bool:
        """Ask the Sentinels. If they do not answer, the server stays the master."""
        del node
        with contextlib.suppress(Exception):  # Also of a hook of the user. The next question may be answered.
            address = await self._ask()
            if address != self._master:
                self._master = address
                self._node.demote()
                return False
        return True

    async def _ask(self) -> object:
        """Return the address of the master: the one of the last failover. Some Sentinels hear of it later than others.

        From now on, new connections believe the Sentinel that knows of it. Another one might lead to the old master.

        Raises `MasterNotFoundError` if no Sentinel knows the master.
        """
        name, sentinels = self._pool.service_name, self._address.sentinels

        async def state_of(sentinel: Redis) -> dict[str, Any]:
            async with asyncio.timeout(_EVERY):
                state: dict[str, Any] = (await sentinel.sentinel_masters())[name]
            return state

        def age(answer: tuple[dict[str, Any], Redis]) -> tuple[int, bool]:
            # The Sentinel that leads a failover has its epoch before it gives the new address.
            return int(answer[0]["config-epoch"]), "failover_in_progress" not in answer[0]["flags"]

        states = zip(await asyncio.gather(*map(state_of, sentinels), return_exceptions=True), sentinels, strict=True)
        answers = [(state, sentinel) for state, sentinel in states if not isinstance(state, BaseException)]
        if not answers:
            raise MasterNotFoundError("no Sentinel knows the master")
        newest, sentinel = max(answers, key=age)
        self._address.ask_first(sentinel)
        return newest["ip"], newest["port"]

    async def _watch(self) -> None:
        while True:
            await self.confirm(self._node)
            await asyncio.sleep(_EVERY)
