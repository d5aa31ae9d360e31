"""A connection beside the lanes: for one task that listens to a server, or reads much from it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import redis.exceptions

from rss.engine.channel import Answer, Channel, Listener
from rss.engine.coalesce import backoff
from rss.engine.failures import REDIRECTED, code_of, error_for, with_cause
from rss.engine.scripts import pack

#: A command that always has a reply.
PING: Final = pack("PING")
# The maximum seconds of one attempt to connect, and usually for the replies to some commands.
_CONNECTING: Final = 10.0
_PATIENCE: Final = 2.0

Pushed = Callable[[Sequence[Any]], None]


class Server(Protocol):
    """The server at the other end: a `Node`."""

    async def open(self, listener: Listener) -> Channel:
        """Open a channel. Raises the errors of redis-py."""
        ...

    def doubt(self) -> None:
        """Note that the server does not answer, or does not have a key."""
        ...


@asynccontextmanager
async def line_to(
    server: Server, pushed: Pushed | None = None, *, patience: float = _PATIENCE
) -> AsyncIterator["Line"]:
    """Open a line, and close it at the end of the context.

    *pushed*: is called with each message that is no reply: only RESP3 has these. If it raises, the line is closed.
    *patience*: the maximum seconds for the replies to some commands.

    An error in the context puts the server in doubt.

    Raises the errors of redis-py, also `TimeoutError`.
    """
    line = Line(pushed, patience)
    try:
        await line.open(server)
        yield line
    except Exception:
        server.doubt()
        raise
    finally:
        line.close()


class Line(Listener):
    """A channel of one task. Use `line_to` to make one.

    The methods raise the errors of redis-py if the connection is lost, and `TimeoutError` if a reply is late.
    """

    def __init__(self, pushed: Pushed | None, patience: float) -> None:
        self._pushed = pushed
        self._patience = patience
        self._channel: Channel | None = None
        #: Done when the connection is lost. The result is the reason.
        self.end: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def open(self, server: Server) -> None:
        """Connect."""
        async with asyncio.timeout(_CONNECTING):
            self._channel = await server.open(self)

    def close(self) -> None:
        """Close the connection."""
        if self._channel:
            self._channel.abort()

    def send(self, command: bytes, answer: Answer) -> None:
        """Send a command, and do not wait. *answer*: is called with the reply, unless the line breaks before."""
        self._send(command, [answer])

    async def ask(self, *commands: bytes) -> list[Any]:
        """Send commands, and return their replies. An error among them is raised."""
        replies = await self.ask_each(*commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def ask_each(self, *commands: bytes) -> list[Any]:
        """Send commands, and return their replies. Errors are among them."""
        replies: list[Any] = []
        done = self.end.get_loop().create_future()

        def note(reply: Any) -> None:
            replies.append(reply)
            if len(replies) == len(commands) and not done.done():
                done.set_result(None)

        self._send(b"".join(commands), [note] * len(commands))
        await asyncio.wait((done, self.end), timeout=self._patience, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise self.end.result() if self.end.done() else TimeoutError("Redis did not reply")
        return replies

    def _send(self, data: bytes, answers: Sequence[Answer]) -> None:
        if self._channel and not self.end.done():
            self._channel.send(data, answers)

    # Events of the channel.

    def pushed(self, message: Sequence[Any]) -> None:
        if self._pushed:
            self._pushed(message)

    def lost(self, channel: Channel, error: Exception | None) -> None:
        del channel
        if not self.end.done():
            self.end.set_result(with_cause(redis.exceptions.ConnectionError("the connection was lost"), error))


async def stay(lines: Sequence[Line], seconds: float) -> None:
    """Wait, and check then that the servers still answer. A lost connection is noticed at once.

    Raises the errors of redis-py, and `TimeoutError`.
    """
    # Not by `gather`: if one line breaks while the caller is cancelled, it would raise the error of the line.
    await asyncio.wait([line.end for line in lines], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for line in lines:
        await line.ask_each(PING)  # The refusal of a user without this right is an answer too.


class Attempts:
    """Attempts at something that must go on, such as a subscription."""

    def __init__(self) -> None:
        #: The number of failures in a row.
        self.failures: int = 0

    async def failed(self, error: Exception) -> Exception | None:
        """Wait until the next attempt, and return None. If no attempt can help, return the error for the caller."""
        # A redirection tells that the servers of a cluster have changed: the next attempt goes to the right one.
        if (final := error_for(error)) and code_of(error) not in REDIRECTED:
            return final
        self.failures += 1
        await asyncio.sleep(backoff(self.failures))
        return None
