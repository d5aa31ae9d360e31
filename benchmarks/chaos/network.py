"""A network between a store and a server, which can cut connections, split what is sent, and deliver it late."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

_CHUNK: Final = 1 << 16
# Close with an RST instead of a FIN.
_RESET: Final = struct.pack("ii", 1, 0)


class Network:
    """A proxy before a server on a port of the loopback."""

    def __init__(self, server: int) -> None:
        """Let everything through at first."""
        self.port = 0
        #: Send each byte in a segment of its own.
        self.split = False
        #: Reset the connection in the middle of the next reply.
        self.break_reply = False
        #: Hold what clients send from now on. Requests that were held are delivered even if their client is gone.
        self.held = False
        self._delivered = asyncio.Event()
        self._holding: set[asyncio.StreamWriter] = set()
        #: Requests that were held, and then delivered.
        self.late = 0
        self._server = server
        self._clients: set[asyncio.StreamWriter] = set()
        self._running: set[asyncio.Task[None]] = set()

    def deliver(self) -> None:
        """Deliver what was held, and hold nothing more."""
        self.held = False
        self._delivered.set()
        self._delivered = asyncio.Event()

    def reset(self) -> None:
        """Reset all connections."""
        for client in [*self._clients]:
            _reset(client)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay the data of a new client."""
        task = asyncio.ensure_future(self._relay(reader, writer))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def aclose(self) -> None:
        """End all connections."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self._clients.add(client)
        with suppress(OSError):
            replies, server = await asyncio.open_connection("127.0.0.1", self._server)
            pumps = [asyncio.ensure_future(one) for one in (self._up(reader, server), self._down(replies, client))]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                if server in self._holding:
                    await asyncio.wait(pumps[:1])
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                server.close()
        self._clients.discard(client)
        client.close()

    async def _up(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        """Relay the requests."""
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self.held:
                    self._holding.add(server)
                    await self._delivered.wait()
                    self._holding.discard(server)
                    self.late += 1
                await self._send(server, data)

    async def _down(self, replies: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """Relay the replies."""
        with suppress(OSError):
            while data := await replies.read(_CHUNK):
                if self.break_reply and len(data) > 1:
                    self.break_reply = False
                    client.write(data[: len(data) // 2])
                    _reset(client)
                    return
                await self._send(client, data)

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if not self.split:
            writer.write(data)
        else:
            for byte in data:
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and not writer.transport.is_closing():
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort()


@asynccontextmanager
async def network(server: int) -> AsyncIterator[Network]:
    """Put a network before a server, and yield it."""
    # If the protocol is named, asyncio switches Nagle's algorithm off.
    listening = socket.socket(proto=socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    made = Network(server)
    made.port = listening.getsockname()[1]
    async with await asyncio.start_server(made.accept, sock=listening):
        try:
            yield made
        finally:
            made.deliver()
            await made.aclose()
