"""The engine: runs the operations of many callers on the running event loop."""

import asyncio
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import redis.exceptions
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.sentinel import SentinelConnectionPool

from rss.engine.call import Call
from rss.engine.cluster import Cluster
from rss.engine.coalesce import Operation, durable
from rss.engine.failures import code_of, tls_reason
from rss.engine.observed import ObservedCall, guarded
from rss.engine.scripts import Scripts
from rss.engine.servers import OneServer, SentinelServer
from rss.errors import StoreUnavailable
from rss.keys import Layout
from rss.observe import Observer

#: The maximum number of waiting calls in a lane, without those in flight. With more, all of them would be late. A
#: cancelled call counts for at most a tick of the lane.
MAX_PENDING: Final = 10_000


# Seconds until the server of a key is looked up again: at first, and after several times.
_PAUSE: Final = 0.1
_LONG_PAUSE: Final = 1.0


class Engine:
    """Runs the scripts of one store.

    *timeout*: the maximum number of seconds that a caller waits. *observe*: is told about each call; None: nobody is.
    """

    def __init__(
        self,
        client: Redis | RedisCluster,
        scripts: Scripts,
        layout: Layout,
        description: Mapping[str, str],
        timeout: float,
        *,
        observe: Observer | None = None,
    ) -> None:
        #: Whether new calls are refused. Operations that have begun may still make calls.
        self.closed: bool = False
        self._client = client
        self._scripts = scripts
        self._layout = layout
        #: What `open_store` takes. None: the store is not compared with those before it, because it only looks after
        #: their sessions.
        self.description: Mapping[str, str] | None = description
        self._timeout = timeout
        self._observe = None if observe is None else guarded(observe)
        self._servers: OneServer | Cluster | None = None
        self._finalizer: weakref.finalize[[asyncio.AbstractEventLoop, OneServer | Cluster], Engine] | None = None
        self._operations: set[asyncio.Future[None]] = set()
        _ENGINES.add(self)

    def run(
        self,
        operation: Operation,
        keys: Sequence[str],
        args: Sequence[str | bytes] = (),
        *,
        shared: tuple[str, ...] = (),
        partition: int = 0,
        begun: bool = False,
        replicas: int = 0,
    ) -> Call:
        """Run an operation for one session, and return a call. The result of the call is the reply.

        *shared*: the shared arguments, which precede those of the sessions. Only calls with the same ones are batched.
        *begun*: the call is part of an `operation`, so it is accepted even while the store closes.
        *replicas*: the number of replicas that must have the writes before the call has a result. If too few have them
        in time, the call raises `StoreUnavailable`.

        If Redis did not run the call, the call is retried until its deadline. If that is unknown, the call is retried
        only if the operation is repeatable. At the deadline the call raises `StoreUnavailable`.
        """
        if self.closed and not begun:
            raise RuntimeError("the store is closed")
        servers, loop = self._servers, asyncio.get_running_loop()
        if servers is None or servers.loop is not loop:
            servers = self._begin(loop)
        node = servers.owners[partition]
        if replicas:
            operation = durable(operation, replicas)
        lane = node.durable if replicas else node.main if operation.batched else node.pages
        size = sum(map(len, args)) if operation.sized else 0
        deadline = loop.time() + self._timeout
        if self._observe is None:
            call = Call.make(loop, keys, args, size, deadline)
        else:
            call = ObservedCall.make(loop, keys, args, size, deadline)
            call.begin(operation.script or operation.command.lower(), self._observe)
        if not lane.is_full(MAX_PENDING):
            lane.put((operation, partition, shared), call)
        else:
            # Fail in the next turn. If a caller retries in a loop, the engine must still get to send waiting calls.
            refusal = StoreUnavailable(f"{MAX_PENDING:,} calls wait for Redis: no more are taken")
            loop.call_soon(call.fail, refusal, context=node.context)
        return call

    async def wait_ended(self, key: str, partition: int) -> str:
        """Wait until the session of a key has ended, and return the reason. There is no deadline.

        Raises `StoreUnavailable` if the store is closed, and `SessionError` if the user of Redis lacks a right.
        """
        servers, pause = self.servers, _PAUSE
        while (reason := await servers.owners[partition].watch.ended(key)) is None:
            # The slot moves, or the master is being replaced. A slot may stay between two masters for hours.
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONG_PAUSE)
            if self.closed:
                raise StoreUnavailable("the store was closed")
        return reason

    @property
    def servers(self) -> OneServer | Cluster:
        """The servers of the store, for the event loop that runs. Raises RuntimeError if the store is closed."""
        if self.closed:
            raise RuntimeError("the store is closed")
        loop = asyncio.get_running_loop()
        if self._servers is None or self._servers.loop is not loop:
            return self._begin(loop)
        return self._servers

    @contextmanager
    def operation(self) -> Iterator[None]:
        """Run an operation that makes several calls. `drain` waits for the end of this context."""
        if self.closed:
            raise RuntimeError("the store is closed")
        done = asyncio.get_running_loop().create_future()
        self._operations.add(done)
        try:
            yield
        finally:
            self._operations.discard(done)
            done.cancel()

    def reopen(self) -> None:
        """Accept calls again after `aclose`, as when a test restarts an application."""
        self.closed = False

    async def connect(self) -> None:
        """Connect once, and close the connection.

        Raises `StoreUnavailable` immediately if no server answers.
        """
        servers = self.servers
        try:
            async with asyncio.timeout(self._timeout):
                await servers.ready()  # Any server of a cluster may tell which of them have the partitions.
                node = servers.owners[0]
                channel = await node.open(node.main)
        except (OSError, redis.exceptions.RedisError) as error:
            # If a server answered with an error, the first call reports it, or waits.
            if code_of(error) or isinstance(error, redis.exceptions.ResponseError):
                return
            reason = tls_reason(error)
            advice = f"TLS failed: {reason}" if reason else "is it running, and is the address right?"
            why = f"cannot connect to Redis at {_address(self._client)}: {advice}"
            raise StoreUnavailable(why) from error
        channel.close()

    async def drain(self) -> None:
        """Wait until every call is done and every operation has ended."""
        loop = asyncio.get_running_loop()
        while True:
            nodes = self._servers.nodes if self._servers and self._servers.loop is loop else ()
            lanes = [lane for node in nodes for lane in node.lanes]
            pending: set[asyncio.Future[Any]] = {call for lane in lanes for call in lane if not call.done()}
            pending |= {done for done in self._operations if done.get_loop() is loop}
            if not pending:
                return
            await asyncio.wait(pending)

    async def aclose(self) -> None:
        """Refuse new calls, wait for the others, and close the connections."""
        self.closed = True
        await self.drain()
        servers = self._servers
        if servers and servers.loop is asyncio.get_running_loop():
            self._forget()
            await servers.aclose()

    def _begin(self, loop: asyncio.AbstractEventLoop) -> "OneServer | Cluster":
        """Begin to serve another event loop, such as the loop of a test client or of a second `asyncio.run`."""
        if self._servers and self._servers.loop.is_running():
            raise RuntimeError("another event loop that is still running uses this store: make one store for each loop")
        self._forget()
        options = self._scripts, self._layout, self.description, self._timeout
        if isinstance(self._client, RedisCluster):
            servers: OneServer | Cluster = Cluster(self._client, *options)
        else:
            pool = self._client.connection_pool
            if isinstance(pool, SentinelConnectionPool):
                servers = SentinelServer(pool, *options)
            else:
                servers = OneServer(pool.make_connection, *options)
        self._servers = servers
        self._finalizer = weakref.finalize(self, _abandon, loop, servers)
        self._finalizer.atexit = False
        return servers

    def _forget(self) -> None:
        if self._finalizer:
            self._finalizer.detach()
        self._servers = self._finalizer = None

    def after_fork(self) -> None:  # pragma: no cover - it runs in a child process, which a test ends at once
        """Forget the connections in a child process, without closing them. They belong to the parent.

        Closing them would end TLS for the parent, and remove them from the selector that both processes share.
        """
        self._forget()
        self._operations.clear()


def _address(client: Redis | RedisCluster) -> str:
    """Return the address of a client for an error message: without user, password and database."""
    if isinstance(client, RedisCluster):
        return ", ".join(f"{node.host}:{node.port}" for node in client.nodes_manager.startup_nodes.values())
    pool = client.connection_pool
    known = pool.connection_kwargs
    if service := getattr(pool, "service_name", None):
        return f"the Sentinel service {service!r}"
    return str(known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}")


def _abandon(loop: asyncio.AbstractEventLoop, servers: OneServer | Cluster) -> None:
    """Close the connections of a store that was garbage-collected. This may run in any thread."""
    with suppress(RuntimeError):  # The event loop is closed, and so are its connections.
        loop.call_soon_threadsafe(servers.close)


_ENGINES: Final[weakref.WeakSet[Engine]] = weakref.WeakSet()


def _after_fork() -> None:  # pragma: no cover - it runs in a child process, which a test ends at once
    for engine in list(_ENGINES):
        engine.after_fork()


if hasattr(os, "register_at_fork"):  # pragma: no branch - it is missing on Windows
    os.register_at_fork(after_in_child=_after_fork)
