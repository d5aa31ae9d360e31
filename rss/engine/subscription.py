"""Subscribe to the channels of all partitions, and tell if messages may have been missed."""

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import redis.exceptions

from rss.engine.channel import Channel, Listener
from rss.engine.coalesce import backoff
from rss.engine.failures import error_for, failure_of
from rss.engine.lane import Node, Servers
from rss.engine.scripts import pack
from rss.errors import StoreUnavailable
from rss.keys import Layout, Partitioned

# Seconds between two checks of the connections, and for each reply.
_EVERY: Final = 1.0
_PATIENCE: Final = 2.0
# Seconds for connecting to a server.
_CONNECTING: Final = 10.0
# The maximum number of messages that wait for the reader.
_WAITING: Final = 10_000

_PING: Final = pack("PING")
# Sharded channels are new in this version of Redis.
_SHARDED: Final = 7

Message = bytes


class _Subscriber(Listener):
    """A connection to one server that is subscribed to the channels of some partitions."""

    def __init__(self, node: Node, channels: Sequence[str], subscription: "Subscription", *, sharded: bool) -> None:
        self.node = node
        self._channels = channels
        self._subscription = subscription
        self._sharded = sharded
        self._channel: Channel | None = None
        self._replied = asyncio.Event()
        self._error: Exception | None = None

    async def open(self) -> None:
        """Connect and subscribe. Raises the errors of redis-py."""
        async with asyncio.timeout(_CONNECTING):
            self._channel = await self.node.open(self)
        about = await self._ask(pack("HELLO", 3))
        new = isinstance(about, dict) and int(about[b"version"].split(b".")[0]) >= _SHARDED
        command = "SSUBSCRIBE" if self._sharded and new else "SUBSCRIBE"
        # A successful SUBSCRIBE has no reply, only pushes. A reply that comes before that to PING is its error.
        await self._ask(b"".join(pack(command, name) for name in self._channels) + _PING)

    async def check(self) -> None:
        """Raise an error if the connection is lost, or the server does not answer."""
        await self._ask(_PING)

    async def _ask(self, command: bytes) -> Any:
        replies: list[Any] = []

        def note(reply: Any) -> None:
            replies.append(reply)
            self._replied.set()

        self._replied.clear()
        if self._channel is None or not self._channel.usable:
            raise self._error or redis.exceptions.ConnectionError("the connection was lost")
        self._channel.send(command, [note])
        async with asyncio.timeout(_PATIENCE):
            await self._replied.wait()
        reply = replies[0] if replies else self._error
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        """Close the connection."""
        channel, self._channel = self._channel, None
        if channel:
            channel.abort()

    # Events of the channel.

    def pushed(self, message: Sequence[Any]) -> None:
        """Take a message. If a slot has moved, the server ends the subscription, so the connection is of no use."""
        kind = message[0]
        if kind in (b"message", b"smessage"):
            self._subscription.put(message[2])
        elif kind in (b"unsubscribe", b"sunsubscribe"):
            self._break(redis.exceptions.ConnectionError("the slot of a channel has moved"))

    def lost(self, channel: Channel, error: Exception | None) -> None:
        """Note that messages may be missed from now on."""
        del channel
        self._break(error or redis.exceptions.ConnectionError("the connection was lost"))

    def _break(self, error: Exception) -> None:
        self._error = error
        self._replied.set()


class Subscription:
    """Iterates over the messages of all partitions. None stands for a gap."""

    def __init__(self, servers: Servers, layout: Layout, is_closed: Callable[[], bool]) -> None:
        #: The last failure; None if there was none.
        self.failure: Exception | None = None
        self._servers = servers
        self._is_closed = is_closed
        self._layout = layout
        self._messages: deque[Message | None] = deque()
        self._there = asyncio.Event()
        self._error: Exception | None = None

    def put(self, message: Message | None) -> None:
        """Give a message to the reader. If too many wait already, leave it out, and note a gap."""
        if len(self._messages) < _WAITING:
            self._messages.append(message)
        elif self._messages[-1] is not None:
            self._messages.append(None)
        self._there.set()

    def __aiter__(self) -> AsyncIterator[Message | None]:
        return self

    async def __anext__(self) -> Message | None:
        while not self._messages:
            if self._error:
                raise self._error
            self._there.clear()
            await self._there.wait()
        return self._messages.popleft()

    async def serve(self, begun: asyncio.Event) -> None:
        """Keep connections to all servers, until this is cancelled. *begun*: set when all are subscribed."""
        failures = 0
        while not self._is_closed():
            listeners: list[_Subscriber] = []
            try:
                await self._servers.ready()
                owners = list(self._servers.owners)
                for node in dict.fromkeys(owners):
                    names = [self._layout.events(n) for n, owner in enumerate(owners) if owner is node]
                    listeners.append(_Subscriber(node, names, self, sharded=isinstance(self._layout, Partitioned)))
                    await listeners[-1].open()
                if begun.is_set():
                    self.put(None)
                begun.set()
                failures = 0
                while list(self._servers.owners) == owners and not self._is_closed():
                    for listener in listeners:
                        await listener.check()
                    await asyncio.sleep(_EVERY)
            except Exception as error:  # noqa: BLE001 - a retry may help after any error, even of a hook of the user
                failures, self.failure = failures + 1, error
                if final := error_for(error):
                    self._end(final, begun)
                    return
                for listener in listeners:
                    listener.node.doubt()
                await asyncio.sleep(backoff(failures))
            finally:
                for listener in listeners:
                    listener.close()
        self._end(StoreUnavailable("the store was closed"), begun)

    def _end(self, error: Exception, begun: asyncio.Event) -> None:
        self._error = error
        self._there.set()
        begun.set()


@asynccontextmanager
async def subscribed(
    servers: Servers, layout: Layout, patience: float, is_closed: Callable[[], bool]
) -> AsyncIterator[Subscription]:
    """Subscribe to the channels of all partitions. Messages that are published from now on are not missed silently.

    *is_closed*: returns whether the store is closed. Then the iteration ends with `StoreUnavailable`.

    Raises `StoreUnavailable` if the servers do not answer within *patience* seconds, and `SessionError` if the user of
    Redis lacks a right.
    """
    subscription, begun = Subscription(servers, layout, is_closed), asyncio.Event()
    task = asyncio.Task(subscription.serve(begun), loop=asyncio.get_running_loop(), context=contextvars.Context())
    try:
        try:
            async with asyncio.timeout(patience):
                await begun.wait()
        except TimeoutError as error:
            raise failure_of(subscription.failure or error) from error
        if task.done():
            await anext(subscription)
        yield subscription
    finally:
        task.cancel()
        await asyncio.wait([task])
