"""One multiplexed connection to one server. Replies arrive in the order of the commands.

redis-py makes the connection. So TLS, users and passwords, unix sockets, Sentinels and client names work as in the
client. Then a protocol of this module takes over the transport. So no task waits for replies, and a lost connection is
noticed immediately.
"""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, cast

import hiredis
import redis.exceptions
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rss.engine.failures import with_cause
from rss.engine.scripts import pack, sha

#: Seconds of silence of a server after which another one may have taken its place.
QUIET: Final = 0.5

Answer = Callable[[Any], None]
Lost = Callable[["Channel", Exception | None], None]


class Listener:
    """The owner of a channel, which the channel tells of events. A lane is one."""

    def heard(self, channel: "Channel") -> None:
        """Note that the replies of a read were handed out, or that the peer accepts more bytes again."""

    def is_doubted(self) -> bool:
        """Return whether the server may have been replaced, so that its replies are worth nothing."""
        return False

    def woke(self, channel: "Channel") -> None:
        """Note that a doubted server replied, or one that was silent for `QUIET`. Replies are held until `go_on`."""
        channel.go_on()

    def pushed(self, message: Sequence[Any]) -> None:
        """Note a message that is no reply. Only RESP3 has these."""

    def lost(self, channel: "Channel", error: Exception | None) -> None:
        """Note that no more replies will come. This is called once, and not after `close`."""
        raise NotImplementedError


_NOTHING: Final = object()  # Marks an incomplete reply. The default mark, False, could be a reply of RESP3.
_RESET: Final = struct.pack("ii", 1, 0)

# The first command on a connection. Every user that may run scripts may send it. Its reply is unique. So it proves that
# the server works, and that no reply of the handshake is left.
_HELLO: Final = "return 'redis-session-sets'"
_GREETING: Final = pack("SCRIPT", "LOAD", _HELLO)
_GREETED: Final = sha(_HELLO).encode()


class Channel(asyncio.Protocol):
    """A connection that serves commands. Use `open_channel` to make one."""

    def __init__(self, connection: AbstractConnection, listener: Listener, lost: Lost) -> None:
        self._listener = listener
        self._lost: Lost | None = lost
        self._loop = asyncio.get_running_loop()
        self._connection = connection  # Keep it alive: its destructor would close the transport.
        self._transport = cast("asyncio.Transport", _writer(connection).transport)
        self._reader = hiredis.Reader(replyError=redis.exceptions.ResponseError, notEnoughData=_NOTHING)
        self._answers: deque[Answer] = deque()
        #: The loop's time of the last byte received. If later: of the first command sent while the channel was idle.
        self.heard_at: float = self._loop.time()
        #: Whether replies are held, because they came after a silence.
        self.held: bool = False
        #: Whether the write buffer is full, because the peer reads too slowly.
        self.paused: bool = False
        self._transport.set_protocol(self)

    def begin(self, greeting: Any) -> None:
        """Begin to serve. Raises an error if *greeting* is not the expected reply, or the connection is lost."""
        if isinstance(greeting, Exception):
            raise greeting
        if greeting != _GREETED or not self.usable:
            raise redis.exceptions.ConnectionError("Redis sent an unexpected reply, or hung up")
        self._lost = self._listener.lost

    @property
    def usable(self) -> bool:
        """Whether commands can be sent."""
        return self._lost is not None and not self._transport.is_closing()

    @property
    def idle(self) -> bool:
        """Whether no reply is outstanding."""
        return not self._answers

    def send(self, data: bytes, answers: Iterable[Answer]) -> None:
        """Send commands. *answers* has a function for each reply. If sending fails, call `lost`, and do not raise."""
        if not self._answers:
            self.heard_at = self._loop.time()
        self._answers.extend(answers)
        try:
            self._transport.write(data)
        except Exception as error:  # noqa: BLE001 - uvloop raises RuntimeError when the peer has just gone
            self.abort(error)

    def data_received(self, data: bytes) -> None:
        now = self._loop.time()
        doubted = now - self.heard_at >= QUIET or self._listener.is_doubted()
        self.heard_at = now
        try:
            self._reader.feed(data)
        except Exception as error:  # noqa: BLE001 - replies and requests may no longer match
            self.abort(error)
        if self.held:
            return
        if doubted and self._answers:
            self.held = True
            self._listener.woke(self)
        else:
            self._hand_out()

    def go_on(self) -> None:
        """Hand out the replies that were held."""
        self.held = False
        self._hand_out()

    def _hand_out(self) -> None:
        # Without the commands that callers send below: their replies are not here yet.
        outstanding = len(self._answers)
        try:
            while self._lost and (reply := self._reader.gets()) is not _NOTHING:
                if isinstance(reply, hiredis.PushNotification):
                    self._listener.pushed(reply)
                    continue
                if not outstanding:
                    self.abort(redis.exceptions.ConnectionError("Redis sent a reply to no command"))
                    break
                outstanding -= 1
                self._answers.popleft()(reply)
        except Exception as error:  # noqa: BLE001 - replies and requests may no longer match
            self.abort(error)
        self._listener.heard(self)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._listener.heard(self)

    def connection_lost(self, exc: Exception | None) -> None:
        _take_stream(self._connection)
        self._report(exc)

    def abort(self, error: Exception | None = None) -> None:
        """Drop the connection, and all calls in flight on it.

        Reset the socket. Otherwise the system would still deliver buffered commands. A write among them could then run
        again after its retry was acknowledged.
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


async def open_channel(make: Callable[[], AbstractConnection], listener: Listener, patience: float) -> Channel:
    """Connect through redis-py, check the greeting, and return a channel. Make one attempt.

    *patience*: the seconds after which the system drops a peer that acknowledges nothing.

    Raises the errors of redis-py.
    """
    connection = make()
    greeted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def hung_up(_: Channel, error: Exception | None) -> None:
        if not greeted.done():
            greeted.set_result(with_cause(redis.exceptions.ConnectionError("Redis hung up"), error))

    try:
        connection.retry = Retry(NoBackoff(), 0)  # The lane decides how often to try.
        with heeding_cancellation():
            await connection.connect()  # type: ignore[no-untyped-call]
        channel = Channel(connection, listener, hung_up)
        _keep_alive(_writer(connection).get_extra_info("socket"), connection, patience)
        channel.send(_GREETING, [greeted.set_result])
        channel.begin(await greeted)
    except BaseException:
        if (writer := _take_stream(connection)) is not None:
            with contextlib.suppress(RuntimeError):  # The event loop is closed.
                writer.transport.abort()
        raise
    return channel


@contextlib.contextmanager
def heeding_cancellation() -> Iterator[None]:
    """Let no cancellation get lost in the body. Use it around calls of redis-py.

    On Python 3.11, `asyncio.wait_for` loses one that comes when its future is done, and redis-py sends by it. Then a
    task that tries again and again would never end.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError


def _writer(connection: AbstractConnection) -> asyncio.StreamWriter:
    """Return the stream of a connection. Only this function and `_take_stream` use private names of redis-py.

    Once the transport has another protocol, do not call methods of the connection.
    """
    reader, writer = connection._reader, connection._writer  # noqa: SLF001 - see above
    if reader is None or writer is None or reader.at_eof():  # A new protocol is not told of an EOF in the past.
        # The window is one turn of the event loop, so no test can hit it reliably.
        raise redis.exceptions.ConnectionError("Redis closed the connection at once")  # pragma: no cover - see above
    return writer


def _take_stream(connection: AbstractConnection) -> asyncio.StreamWriter | None:
    """Remove the stream from a connection, and return it. Return None if there is none.

    If the stream stayed, the destructor of the connection would warn that it was not closed.
    """
    writer = connection._writer  # noqa: SLF001 - see _writer
    connection._reader = connection._writer = None  # noqa: SLF001 - see _writer
    return writer


def _keep_alive(sock: socket.socket | None, connection: AbstractConnection, patience: float) -> None:
    """Let the system probe a silent peer, and drop it after *patience* seconds. The client may set the intervals."""
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
