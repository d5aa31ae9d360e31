"""One multiplexed connection to one server: commands go out one after another, replies come back in the same order.

redis-py makes the connection. So TLS, users and passwords, unix sockets, Sentinels and client names are those of the
client. Then its transport gets a protocol of ours: no task waits for a reply, and a lost connection is noticed at once.
"""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import hiredis
import redis.exceptions
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rss.engine.failures import with_cause
from rss.engine.scripts import pack, sha

Answer = Callable[[Any], None]
Heard = Callable[["Channel"], None]
Lost = Callable[["Channel", Exception | None], None]

_NOTHING: Final = object()  # Returned while no reply is complete. The default, False, could be a reply of RESP3.
_RESET: Final = struct.pack("ii", 1, 0)

# The first command on a connection. Every user that may run scripts may send it. No other reply looks like its own: it
# proves that the server works, and that no byte was left over from the handshake.
_HELLO: Final = "return 'redis-session-sets'"
_GREETING: Final = pack("SCRIPT", "LOAD", _HELLO)
_GREETED: Final = sha(_HELLO).encode()


class Channel(asyncio.Protocol):
    """A connection that was greeted; `open_channel` makes it.

    *heard* is called when the replies of a read were handed out, and when the peer takes more bytes again. *lost* is
    called once, when there will be no more replies: unless the channel was closed.
    """

    def __init__(self, connection: AbstractConnection, heard: Heard, lost: Lost) -> None:
        self._heard = heard
        self._lost: Lost | None = lost
        self._loop = asyncio.get_running_loop()
        self._connection = connection  # Its destructor would close the transport.
        self._transport = cast("asyncio.Transport", _writer(connection).transport)
        self._reader = hiredis.Reader(replyError=redis.exceptions.ResponseError, notEnoughData=_NOTHING)
        self._answers: deque[Answer] = deque()
        #: The loop's time of the last byte that came, or of the first command that was sent while the channel was idle.
        self.heard_at = self._loop.time()
        #: Whether the peer reads too slowly to be sent more.
        self.paused = False
        self._transport.set_protocol(self)

    def begin(self, greeting: Any, lost: Lost) -> None:
        """Begin to serve, if this is the reply to the greeting and the connection still stands."""
        if isinstance(greeting, Exception):
            raise greeting
        if greeting != _GREETED or not self.usable:
            raise redis.exceptions.ConnectionError("Redis sent a reply to something else, or hung up")
        self._lost = lost

    @property
    def usable(self) -> bool:
        """Whether commands can be sent."""
        return self._lost is not None and not self._transport.is_closing()

    @property
    def idle(self) -> bool:
        """Whether no reply is missing."""
        return not self._answers

    def send(self, data: bytes, answers: Iterable[Answer]) -> None:
        """Send commands. *answers* has a function for each reply. Never raises: if it fails, `lost` is called."""
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
            while self._lost and (reply := self._reader.gets()) is not _NOTHING:
                if not isinstance(reply, hiredis.PushNotification):
                    self._answers.popleft()(reply)
        except Exception as error:  # noqa: BLE001 - replies and requests may no longer match
            self.abort(error)
        self._heard(self)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._heard(self)

    def connection_lost(self, exc: Exception | None) -> None:
        _take_stream(self._connection)
        self._report(exc)

    def abort(self, error: Exception | None = None) -> None:
        """Give the connection up: what is in flight is lost at once.

        The socket is reset. Otherwise the system would still deliver what it has not sent yet, perhaps after a retry of
        the same write was acknowledged.
        """
        with contextlib.suppress(OSError, AttributeError):
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        with contextlib.suppress(RuntimeError):  # The event loop is closed.
            self._transport.abort()
        self._report(error)

    def close(self) -> None:
        """Close an idle connection."""
        self._lost = None
        with contextlib.suppress(RuntimeError):
            self._transport.close()

    def _report(self, error: Exception | None) -> None:
        lost, self._lost = self._lost, None
        if lost:
            lost(self, error)


async def open_channel(make: Callable[[], AbstractConnection], heard: Heard, lost: Lost, patience: float) -> Channel:
    """Connect as redis-py does, once, and return a channel that was greeted. Raises what redis-py raises.

    *patience*: seconds after which the system gives up a peer that acknowledges nothing.
    """
    connection = make()
    greeted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def hung_up(_: Channel, error: Exception | None) -> None:
        if not greeted.done():
            greeted.set_result(with_cause(redis.exceptions.ConnectionError("Redis hung up"), error))

    try:
        connection.retry = Retry(NoBackoff(), 0)  # The lane decides how often to try.
        await connection.connect()  # type: ignore[no-untyped-call]
        channel = Channel(connection, heard, hung_up)
        _keep_alive(_writer(connection).get_extra_info("socket"), connection, patience)
        channel.send(_GREETING, [greeted.set_result])
        channel.begin(await greeted, lost)
    except BaseException:
        if (writer := _take_stream(connection)) is not None:
            with contextlib.suppress(RuntimeError):  # The event loop is closed.
                writer.transport.abort()
        raise
    return channel


def _writer(connection: AbstractConnection) -> asyncio.StreamWriter:
    """Return the stream of a connection: the one place that uses private names of redis-py, with `_take_stream`.

    Methods of the connection must not be called once its transport has another protocol.
    """
    reader, writer = connection._reader, connection._writer  # noqa: SLF001 - see above
    if reader is None or writer is None or reader.at_eof():  # A protocol that is set later is not told of an EOF.
        # A matter of one turn of the event loop: no test can hit it at will.
        raise redis.exceptions.ConnectionError("Redis closed the connection at once")  # pragma: no cover - see above
    return writer


def _take_stream(connection: AbstractConnection) -> asyncio.StreamWriter | None:
    """Take the stream out of a connection, if there is one. The destructor would warn that it was not closed."""
    writer = connection._writer  # noqa: SLF001 - see _writer
    connection._reader = connection._writer = None  # noqa: SLF001 - see _writer
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
