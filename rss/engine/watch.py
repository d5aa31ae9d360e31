"""Wait for the ends of sessions: Redis says when a key changes, so nothing polls."""

import asyncio
import contextvars
import functools
from collections.abc import Sequence
from typing import Any, Final

from rss.engine.failures import code_of, final_error_for
from rss.engine.line import Attempts, Line, Server, line_to, stay
from rss.engine.scripts import pack
from rss.errors import StoreUnavailable

# Seconds between two checks of the connection.
_EVERY: Final = 5.0
# Client-side caching: Redis sends a push when a key changes that this connection has read. Pushes need RESP3.
_BEGIN: Final = pack("HELLO", 3), pack("CLIENT", "TRACKING", "ON")
#: The reason of a session that is gone without a tombstone.
EXPIRED: Final = "expired"

_Future = asyncio.Future[str | None]


class Watch:
    """The callers that wait for sessions on one server. They share a line, while there are any.

    A caller gets the reason, or None if the server does not have the key any more: then another one has it.
    """

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._waiting: dict[bytes, set[_Future]] = {}
        self._line: Line | None = None  # Its pushes name the keys that have changed.
        self._serving: asyncio.Task[None] | None = None

    async def ended(self, key: str) -> str | None:
        """Wait until the session of a key has ended, and return the reason. Return None if another server has the key.

        Raises `StoreUnavailable` if the store is closed, and `SessionError` if the user of Redis lacks a right.
        """
        name, future = key.encode(), self._loop.create_future()
        self._waiting.setdefault(name, set()).add(future)
        if self._serving is None:
            self._serving = asyncio.Task(self._serve(), loop=self._loop, context=contextvars.Context())
        elif self._line:
            self._look(self._line, name)
        try:
            reason: str | None = await future
            return reason
        finally:
            if futures := self._waiting.get(name):
                futures.discard(future)
                if not futures:
                    del self._waiting[name]
            if not self._waiting:
                self._stop()

    async def _serve(self) -> None:
        """Keep a line while callers wait. After each loss look at all keys: some may have changed meanwhile."""
        attempts = Attempts()
        while True:
            try:
                async with line_to(self._server, self._pushed) as line:
                    await line.ask(*_BEGIN)
                    self._line = line
                    for name in self._waiting:
                        self._look(line, name)
                    attempts.failures = 0
                    while True:
                        await stay([line], _EVERY)
            except Exception as error:  # noqa: BLE001 - a retry may help after any error, even of a hook of the user
                self._line = None
                if final := await attempts.failed(error):
                    self._serving = None
                    self._fail(final)
                    return

    def _stop(self) -> None:
        self._line = None
        if self._serving:
            self._serving.cancel()
            self._serving = None

    def _look(self, line: Line, name: bytes) -> None:
        line.send(pack("HMGET", name, "id", "_ended"), functools.partial(self._seen, name))

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

    def _pushed(self, message: Sequence[Any]) -> None:
        """Look at the keys that have changed. If Redis cannot say which, look at all."""
        if message[0] == b"invalidate" and self._line:
            names = self._waiting if message[1] is None else message[1]
            for name in names:
                if name in self._waiting:
                    self._look(self._line, name)

    def _resolve(self, name: bytes, reason: str | None) -> None:
        for future in self._waiting.pop(name, ()):
            if not future.done():
                future.set_result(reason)

    def _fail(self, error: Exception, *names: bytes) -> None:
        for name in names or list(self._waiting):
            for future in self._waiting.pop(name, ()):
                if not future.done():
                    future.set_exception(final_error_for(error))

    def leave(self) -> None:
        """Close the line, because the server is not the master any more. Callers look for the one that is."""
        for name in list(self._waiting):
            self._resolve(name, None)
        self._stop()

    def close(self) -> None:
        """Close the line. Callers get `StoreUnavailable`."""
        self._fail(StoreUnavailable("the store was closed"))
        self._stop()
