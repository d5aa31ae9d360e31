"""Wait for the ends of sessions: Redis says when a key changes, so nothing polls."""

import asyncio
import contextvars
import functools
from collections.abc import Sequence
from typing import Any, Final, Protocol

import redis.exceptions

from rss.engine.channel import Channel, Listener
from rss.engine.coalesce import backoff
from rss.engine.failures import code_of, error_for, final_error_for
from rss.engine.scripts import pack
from rss.errors import StoreUnavailable

# The maximum seconds of one attempt to connect.
_CONNECTING: Final = 10.0
# Seconds between two checks of the connection. A check that is not answered until the next one ends it.
_EVERY: Final = 5.0
_PING: Final = pack("PING")
# Client-side caching: Redis sends a push when a key changes that this connection has read. Pushes need RESP3.
_BEGIN: Final = pack("HELLO", 3) + pack("CLIENT", "TRACKING", "ON")
#: The reason of a session that is gone without a tombstone.
EXPIRED: Final = "expired"

_Future = asyncio.Future[str | None]


class Server(Protocol):
    """The server whose keys are watched: a `Node`."""

    async def open(self, listener: Listener) -> Channel:
        """Open a channel. Raises the errors of redis-py."""
        ...

    def doubt(self) -> None:
        """Note that the server does not answer."""
        ...


class Watch(Listener):
    """The callers that wait for sessions on one server. They share a connection of their own, while there are any.

    A caller gets the reason, or None if the server does not have the key any more: then another one has it.
    """

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._waiting: dict[bytes, set[_Future]] = {}
        self._channel: Channel | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def ended(self, key: str) -> str | None:
        """Wait until the session of a key has ended, and return the reason. Return None if another server has the key.

        Raises `StoreUnavailable` if the store is closed, and `SessionError` if the user of Redis lacks a right.
        """
        name, future = key.encode(), self._loop.create_future()
        self._waiting.setdefault(name, set()).add(future)
        try:
            if self._channel and self._channel.usable:
                self._look(self._channel, name)
            else:
                self._connect_again()
            reason: str | None = await future
            return reason
        finally:
            if futures := self._waiting.get(name):
                futures.discard(future)
                if not futures:
                    del self._waiting[name]
            if not self._waiting:
                self._hang_up()

    def _connect_again(self) -> None:
        if self._waiting and self._connecting is None:
            task = asyncio.Task(self._connect(), loop=self._loop, context=contextvars.Context())
            self._connecting = task
            task.add_done_callback(self._connected, context=contextvars.Context())

    def _connected(self, task: asyncio.Task[None]) -> None:
        if self._connecting is task:
            self._connecting = None
            if self._channel is None or not self._channel.usable:  # It was lost at once.
                self._connect_again()

    async def _connect(self) -> None:
        failures = 0
        while self._waiting:
            try:
                async with asyncio.timeout(_CONNECTING):
                    channel = await self._server.open(self)
            except Exception as error:  # noqa: BLE001 - a retry may help after any error, even of a hook of the user
                if error_for(error):
                    self._fail(error)
                    return
                failures += 1
                self._server.doubt()
                await asyncio.sleep(backoff(failures))
                continue
            self._channel = channel
            channel.send(_BEGIN, [self._begun, self._begun])
            for name in self._waiting:
                self._look(channel, name)
            self._check_later()
            return

    def _begun(self, reply: Any) -> None:
        if isinstance(reply, Exception):
            self._fail(reply)
            self._hang_up()  # Later callers must not use a connection that is told nothing.

    def _check_later(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(_EVERY, self._check, context=contextvars.Context())

    def _check(self) -> None:
        """Drop a connection that answers no longer: an end may have been missed."""
        channel = self._channel
        if channel is None or not channel.usable:
            return
        if not channel.idle:
            channel.abort(redis.exceptions.TimeoutError("the connection is silent"))
            return
        channel.send(_PING, [lambda _: None])
        self._check_later()

    def _look(self, channel: Channel, name: bytes) -> None:
        channel.send(pack("HMGET", name, "id", "_ended"), [functools.partial(self._seen, name)])

    def _seen(self, name: bytes, reply: Any) -> None:
        if isinstance(reply, Exception):
            if code_of(reply):  # Another server has the key, or will have it.
                self._server.doubt()
                self._resolve(name, None)
            else:
                self._fail(reply, name)
        elif reply[1] is not None:
            self._resolve(name, reply[1].decode(errors="backslashreplace"))
        elif reply[0] is None:
            self._resolve(name, EXPIRED)

    def _resolve(self, name: bytes, reason: str | None) -> None:
        for future in self._waiting.pop(name, ()):
            if not future.done():
                future.set_result(reason)

    def _fail(self, error: Exception, *names: bytes) -> None:
        for name in names or list(self._waiting):
            for future in self._waiting.pop(name, ()):
                if not future.done():
                    future.set_exception(final_error_for(error))

    def _hang_up(self) -> None:
        channel, self._channel = self._channel, None
        task, self._connecting = self._connecting, None
        if channel:
            channel.abort()
        if task:
            task.cancel()
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def leave(self) -> None:
        """Close the connection, because the server is not the master any more. Callers look for the one that is."""
        for name in list(self._waiting):
            self._resolve(name, None)
        self._hang_up()

    def close(self) -> None:
        """Close the connection. Callers get `StoreUnavailable`."""
        self._fail(StoreUnavailable("the store was closed"))
        self._hang_up()

    # Events of the channel.

    def pushed(self, message: Sequence[Any]) -> None:
        """Look at the keys that have changed. If Redis cannot say which, look at all."""
        if message[0] == b"invalidate" and self._channel:
            names = self._waiting if message[1] is None else message[1]
            for name in list(names):
                if name in self._waiting:
                    self._look(self._channel, name)

    def lost(self, channel: Channel, error: Exception | None) -> None:
        """Connect again, and look at all keys: some may have changed meanwhile."""
        del error
        if channel is self._channel:
            self._channel = None
            self._server.doubt()
            self._connect_again()
