"""One multiplexed connection to one server: commands go out one after another, replies come back in the same order.

redis-py makes the connection, so TLS, users and passwords, unix sockets, Sentinels and client names are those of the
client. Then its transport gets a protocol of ours: no task waits for a reply, and a lost connection is noticed at once.
"""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol, cast

import hiredis
import redis.exceptions
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rss.engine.failures import lost
from rss.engine.scripts import pack, sha

Answer = Callable[[Any], None]

_PUSH: Final = getattr(hiredis, "PushNotification", ())
_NOTHING: Final = object()  # What the reader returns without a whole reply. The default, False, is a reply of RESP3.
_RESET: Final = struct.pack("ii", 1, 0)

# The first command on a connection. A user of scripts may send it, and its reply is like no other: it proves that the
# server works, and that no byte was left over from the handshake.
_HELLO: Final = "return 'redis-session-sets'"
_GREETING: Final = pack("SCRIPT", "LOAD", _HELLO)
_GREETED: Final = sha(_HELLO).encode()


class Owner(Protocol):
    """What a channel reports to."""

    def heard(self, channel: "Channel", /) -> None:
        """Note that all replies of one read were handed out, or that the peer takes more bytes again."""

    def lost(self, channel: "Channel", error: BaseException | None, /) -> None:
        """Note that there will be no more replies. Called once."""


class Channel(asyncio.Protocol):
    """A connection that was greeted. `open_channel` makes it; it is of no use after `Owner.lost`."""

    def __init__(self, connection: AbstractConnection, owner: Owner) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection: AbstractConnection | None = connection  # Its destructor would close the transport.
        self._transport = cast("asyncio.Transport", _writer(connection).transport)
        self._reader = hiredis.Reader(replyError=redis.exceptions.ResponseError, notEnoughData=_NOTHING)
        #: What it reports to; None once that was told of the end.
        self.owner: Owner | None = owner
        self._answers: deque[Answer] = deque()
        #: The loop's time of the last byte, or of the first command that was sent after a pause.
        self.heard_at = self._loop.time()
        #: Whether the peer reads too slowly to be sent more.
        self.paused = False
        self._transport.set_protocol(self)

    @property
    def usable(self) -> bool:
        """Whether it was not lost."""
        return self.owner is not None and not self._transport.is_closing()

    @property
    def idle(self) -> bool:
        """Whether no reply is missing."""
        return not self._answers

    def send(self, data: bytes, answers: Iterable[Answer]) -> None:
        """Send commands; *answers* has a function for the reply to each. Never raises: what fails is lost."""
        if not self._answers:
            self.heard_at = self._loop.time()
        self._answers.extend(answers)
        try:
            self._transport.write(data)
        except Exception as error:  # noqa: BLE001 - uvloop raises RuntimeError when the peer has just gone
            self.abort(error)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _NOTHING:
                if not isinstance(reply, _PUSH):
                    self._answers.popleft()(reply)
        except Exception as error:  # noqa: BLE001 - replies and requests may no longer match
            self.abort(error)
        else:
            if self.owner:
                self.owner.heard(self)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.owner:
            self.owner.heard(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:  # Else its destructor warns that it was not closed.
            connection._reader = connection._writer = None  # noqa: SLF001 - see _writer
        self._report(exc)

    def abort(self, error: BaseException | None = None) -> None:
        """Give the connection up, and tell the owner at once.

        The socket is reset. Without that, the system would still deliver what it has not sent yet: perhaps after a
        repetition of the same write was acknowledged.
        """
        with contextlib.suppress(OSError, AttributeError):
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        with contextlib.suppress(RuntimeError):  # The event loop is closed.
            self._transport.abort()
        self._report(error)

    def close(self) -> None:
        """Close an idle connection."""
        self.owner = None
        with contextlib.suppress(RuntimeError):
            self._transport.close()

    def _report(self, error: BaseException | None) -> None:
        owner, self.owner = self.owner, None
        if owner:
            owner.lost(self, error)


async def open_channel(make: Callable[[], AbstractConnection], owner: Owner, patience: float) -> Channel:
    """Connect as redis-py does, once, and return a channel that was greeted. Raises what redis-py raises.

    *patience*: seconds after which the system gives up a peer that acknowledges nothing.
    """
    connection = make()
    try:
        connection.retry = Retry(NoBackoff(), 0)  # The lane decides how often to try.
        await connection.connect()  # type: ignore[no-untyped-call]
        channel = Channel(connection, _Greeting())
        _keep_alive(_writer(connection).get_extra_info("socket"), connection, patience)
        await _greet(channel)
    except BaseException:
        with contextlib.suppress(redis.exceptions.ConnectionError, RuntimeError):
            _writer(connection).transport.abort()
        raise
    channel.owner = owner
    return channel


class _Greeting:
    """Owns a channel until the server has replied once."""

    def __init__(self) -> None:
        self.reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def heard(self, _: Channel) -> None: ...

    def lost(self, _: Channel, error: BaseException | None) -> None:
        if not self.reply.done():
            self.reply.set_exception(lost(error))


async def _greet(channel: Channel) -> None:
    greeting = cast("_Greeting", channel.owner)
    channel.send(_GREETING, [greeting.reply.set_result])
    reply = await greeting.reply
    if isinstance(reply, Exception):
        raise reply
    if reply != _GREETED or not channel.usable:
        raise redis.exceptions.ConnectionError("Redis sent a reply to something else, or hung up")


def _writer(connection: AbstractConnection) -> asyncio.StreamWriter:
    """Return the stream of a connection: the one place that uses private names of redis-py, with `connection_lost`.

    Methods of the connection must not be called once its transport has another protocol.
    """
    reader, writer = connection._reader, connection._writer  # noqa: SLF001 - see above
    if reader is None or writer is None or reader.at_eof():  # A protocol that is set later is not told of an EOF.
        raise redis.exceptions.ConnectionError("Redis closed the connection at once")
    return writer


def _keep_alive(sock: socket.socket | None, connection: AbstractConnection, patience: float) -> None:
    """Let the system probe a peer that is silent for long, unless the client says how it shall do that."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = {"TCP_USER_TIMEOUT": max(int(patience * 1000), 1)}
    if not getattr(connection, "socket_keepalive_options", None):
        options |= {"TCP_KEEPIDLE": 15, "TCP_KEEPALIVE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):  # Systems differ.
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
