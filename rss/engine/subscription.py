"""Subscribe to the channels of all partitions, and tell if messages may have been missed."""

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import redis.exceptions

from rss.engine.failures import failure_of
from rss.engine.lane import Node, Servers
from rss.engine.line import PING, Attempts, Line, line_to, stay
from rss.engine.scripts import pack
from rss.errors import StoreUnavailable
from rss.keys import Layout, Partitioned

# Seconds between two checks of the connections.
_EVERY: Final = 1.0
# The maximum number of messages that wait for the reader.
_WAITING: Final = 10_000
# Sharded channels are new in this version of Redis.
_SHARDED: Final = 7

Message = bytes


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
        attempts = Attempts()
        while not self._is_closed():
            try:
                async with AsyncExitStack() as stack:
                    await self._servers.ready()
                    masters = self._owners()
                    owners = [node for node, _ in masters]
                    lines: list[Line] = []
                    for node in dict.fromkeys(owners):
                        lines.append(await stack.enter_async_context(line_to(node, self._pushed)))
                        await self._subscribe(lines[-1], [n for n, owner in enumerate(owners) if owner is node])
                    if begun.is_set():
                        self.put(None)
                    begun.set()
                    attempts.failures = 0
                    while self._owners() == masters and not self._is_closed():
                        await stay(lines, _EVERY)
            except Exception as error:  # noqa: BLE001 - a retry may help after any error, even of a hook of the user
                self.failure = error
                if final := await attempts.failed(error):
                    self.end(final, begun)
                    return
        self.end(StoreUnavailable("the store was closed"), begun)

    def _owners(self) -> list[tuple[Node, int]]:
        """Return the server of each partition, with the number of masters that this server was before."""
        return [(node, node.demotions) for node in self._servers.owners]

    async def _subscribe(self, line: Line, partitions: Sequence[int]) -> None:
        (about,) = await line.ask(pack("HELLO", 3))
        new = isinstance(about, dict) and int(about[b"version"].split(b".")[0]) >= _SHARDED
        command = "SSUBSCRIBE" if isinstance(self._layout, Partitioned) and new else "SUBSCRIBE"
        channels = (pack(command, self._layout.events(partition)) for partition in partitions)
        # A successful SUBSCRIBE has no reply, only pushes. A reply that comes before that to PING is its error.
        await line.ask(b"".join(channels) + PING)

    def _pushed(self, message: Sequence[Any]) -> None:
        """Take a message. If a slot has moved, the server ends the subscription, so the line is of no use."""
        if message[0] in (b"message", b"smessage"):
            self.put(message[2])
        elif message[0] in (b"unsubscribe", b"sunsubscribe"):
            raise redis.exceptions.ConnectionError("the slot of a channel has moved")

    def end(self, error: Exception, begun: asyncio.Event) -> None:
        """Let the iteration end with this error, after the messages that are there."""
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
        subscription.end(StopAsyncIteration(), begun)  # Another task may be reading.
