"""One connection: it is made as the client makes its own, and closed if replies may not match requests."""

import asyncio
import contextlib
import inspect
import secrets
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.credentials import CredentialProvider

from rss import SessionError, SessionStore, StoreUnavailable
from tests.engine.callers import kill, outcomes, works
from tests.servers import connections, fake, ones, own_server, serving, wired

# With RESP2 and without a name of the library, redis-py sends nothing when it connects. Newer versions have
# driver_info, and warn about the older names.
SILENT: dict[str, Any] = {"protocol": 2} | dict.fromkeys(
    ("driver_info",) if "driver_info" in inspect.signature(Redis).parameters else ("lib_name", "lib_version")
)


# ---------------------------------------------------------------------- as the client connects


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode", [False, True])
async def test_user_database_and_name_are_those_of_the_client(
    url: str, admin: Redis, protocol: int, *, decode: bool
) -> None:
    """The engine connects with the client's user, database, name and protocol, also after a break."""
    await admin.acl_setuser("app", enabled=True, passwords=["+pw"], keys=["rss:*"], commands=["+@all"], reset=True)
    path, name = url.removeprefix("unix://"), f"me-{secrets.token_hex(4)}"
    async with Redis(
        unix_socket_path=path, username="app", password="pw", db=3, client_name=name, protocol=protocol,
        decode_responses=decode,
    ) as client:  # fmt: skip
        store = SessionStore(client)
        for _ in range(2):
            assert await works(store)
            (mine,) = [one for one in await connections(admin) if one["name"] == name]
            spoken = mine.get("resp", str(protocol))  # Redis 6.2 does not report the protocol.
            assert (mine["user"], mine["db"], spoken) == ("app", "3", str(protocol))
            await kill(admin)
        await store.aclose()
    async with Redis.from_url(url, db=3) as third:
        assert await third.dbsize() == 51  # 50 sessions, and the meta key.
        await third.flushdb()


async def test_a_client_that_says_nothing_when_it_connects(url: str, admin: Redis) -> None:
    """The engine works if redis-py sends no command when it connects."""
    async with Redis.from_url(url, **SILENT) as client:
        store = SessionStore(client)
        await admin.config_resetstat()
        await store.load()
        stats = await admin.info("commandstats")
        assert not {"cmdstat_hello", "cmdstat_client|setinfo", "cmdstat_auth"} & {*stats}
        assert await works(store)
        await store.aclose()


@pytest.mark.parametrize("make", [ConnectionPool.from_url, BlockingConnectionPool.from_url], ids=["refuses", "blocks"])
async def test_a_pool_of_one_connection_keeps_it(url: str, admin: Redis, make: Callable[..., ConnectionPool]) -> None:
    """A store uses its own connections, so it works while the client's pool is exhausted, and takes none of them."""
    del admin
    async with Redis.from_pool(make(url, max_connections=1)) as client:
        store = SessionStore(client, references=["user_id"], timeout=20)
        held = client.pubsub()
        await held.subscribe("news")  # This takes the only connection of the pool.
        assert await works(store, 300)
        assert await store.count_by("user_id", 1) == 0
        await held.aclose()  # type: ignore[no-untyped-call]
        assert await client.ping()
        await store.aclose()
        assert await client.ping()


async def test_few_connections_for_any_number_of_calls(url: str, admin: Redis) -> None:
    """A store uses one connection for calls, and one more for pages of reference sets."""
    async with SessionStore.from_url(url, references=["user_id"]) as store:
        await outcomes([store.set(str(n), {"user_id": n % 10}) for n in range(1000)])
        assert len(await connections(admin)) == 1
        await outcomes([store.count_by("user_id", n % 10) for n in range(100)])
        assert len(await connections(admin)) == 2
    assert not await connections(admin)


class _Changing(CredentialProvider):
    """A provider that gives the password that is valid now."""

    def __init__(self) -> None:
        self.password = "first"

    def get_credentials(self) -> tuple[str, str]:
        return "changing", self.password


async def test_a_password_that_changes(url: str, admin: Redis) -> None:
    """An open connection survives a change of the password; a new one takes the provider's current password."""
    await admin.acl_setuser("changing", enabled=True, passwords=["+first"], keys=["*"], commands=["+@all"], reset=True)
    provider = _Changing()
    path = url.removeprefix("unix://")
    async with (
        Redis(unix_socket_path=path, credential_provider=provider) as client,
        Redis(unix_socket_path=path, username="changing", password="first") as rigid,
    ):
        store, other = SessionStore(client), SessionStore(rigid)
        assert await works(store)
        assert await works(other)
        await admin.execute_command("ACL", "SETUSER", "changing", "<first", ">second")  # type: ignore[no-untyped-call]
        assert await works(store)
        provider.password = "second"
        await kill(admin)
        assert await works(store)
        with pytest.raises(StoreUnavailable, match="Redis refuses: AUTH") as raised:
            await other.touch("a")
        assert "first" not in repr(raised.value)
        await store.aclose()
        await other.aclose()


async def test_a_user_that_is_deleted(url: str, admin: Redis) -> None:
    """A call of a user that was deleted fails at once with an AUTH error."""
    await admin.acl_setuser("leaving", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all"], reset=True)
    async with Redis(unix_socket_path=url.removeprefix("unix://"), username="leaving", password="pw") as client:
        store = SessionStore(client, timeout=30)
        await store.load()
        await admin.acl_deluser("leaving")
        with pytest.raises(StoreUnavailable, match="Redis refuses: AUTH"):
            await store.touch("a")
        await store.aclose()


@pytest.mark.parametrize("right", ["script|load", "script", "evalsha"])
async def test_a_missing_right_names_the_command(url: str, admin: Redis, right: str) -> None:
    """A missing permission raises a SessionError that names the command."""
    if right == "script|load" and int((await admin.info("server"))["redis_version"].split(".")[0]) < 7:
        pytest.skip("subcommands of ACLs are new in Redis 7.0")
    command = right.partition("|")[0]
    await admin.acl_setuser("poor", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all"], reset=True)
    async with Redis(unix_socket_path=url.removeprefix("unix://"), username="poor", password="pw") as client:
        store = SessionStore(client, timeout=30)
        await store.load()
        await admin.execute_command("ACL", "SETUSER", "poor", f"-{right}")  # type: ignore[no-untyped-call]
        await admin.script_flush()
        for _ in range(2):
            with pytest.raises(SessionError, match=f"permission for .*{command}") as raised:
                await store.touch("a")
            assert type(raised.value) is SessionError
            await kill(admin)
        await admin.execute_command("ACL", "SETUSER", "poor", "+@all")  # type: ignore[no-untyped-call]
        assert await works(store)
        await store.aclose()


@pytest.fixture(name="certificate", scope="session")
def _certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key."""
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", path.with_suffix(".key"), "-out", path,
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + path.with_suffix(".key").read_text())
    return path


async def test_over_tls(url: str, admin: Redis, certificate: Path) -> None:
    """A store over TLS copes with large values, cut connections and a silent connection."""
    del admin
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with wired(url, context) as wire, Redis.from_url(wire.url, ssl_ca_certs=str(certificate)) as client:
        store = SessionStore(client, timeout=3)
        assert await works(store)
        large = "x" * 3_000_000
        await store.set("large", {"v": large})
        assert await store.get("large", ["v"]) == {"id": "large", "v": large}
        wire.cut()
        assert await works(store)
        wire.silence()
        assert await works(store)
        await store.aclose()


async def test_a_certificate_that_is_not_trusted(url: str, admin: Redis, certificate: Path) -> None:
    """A certificate that is not trusted makes calls fail, and the cause of the error says so."""
    del admin
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)  # The server of the test logs the failed handshake.
    async with wired(url, context) as wire, Redis.from_url(wire.url) as client:
        store = SessionStore(client, timeout=0.5)
        with pytest.raises(StoreUnavailable, match="within the deadline: ConnectionError") as raised:
            await store.touch("a")
        assert "certificate" in str(raised.value.__cause__)
        await store.aclose()
        with pytest.raises(StoreUnavailable, match="TLS failed: .*certificate"):
            async with store:
                pass


async def test_pushes_are_ignored(url: str, admin: Redis) -> None:
    """Push messages of Redis are not taken for replies, and do not break the connection."""

    async def track(connection: Any) -> None:
        await connection.on_connect()
        await connection.send_command("CLIENT", "TRACKING", "ON", "BCAST")
        await connection.read_response()

    name = f"tracked-{secrets.token_hex(4)}"
    async with Redis.from_url(url, protocol=3, client_name=name, redis_connect_func=track) as client:
        store = SessionStore(client, timeout=20)
        await store.load()
        (before,) = [one["id"] for one in await connections(admin) if one["name"] == name]
        for _ in range(20):
            assert all(await asyncio.gather(works(store), *(admin.set(f"other{n}", n) for n in range(20))))
        assert [one["id"] for one in await connections(admin) if one["name"] == name] == [before]
        await store.aclose()


@pytest.mark.parametrize(("given", "idle"), [({}, 15), ({socket.TCP_KEEPIDLE: 33}, 33)], ids=["ours", "the client's"])
async def test_the_system_probes_a_silent_peer(url: str, admin: Redis, given: dict[int, int], idle: int) -> None:
    """Keepalive probes follow the client's options, else ours; TCP_USER_TIMEOUT is the timeout of calls."""
    del admin
    options: list[int] = []

    async def look(connection: Any) -> None:
        await connection.on_connect()
        sock = connection._writer.get_extra_info("socket")

        def read() -> None:
            options.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            options.extend(
                sock.getsockopt(socket.IPPROTO_TCP, name) for name in (socket.TCP_KEEPIDLE, socket.TCP_USER_TIMEOUT)
            )

        asyncio.get_running_loop().call_soon(read)  # When the engine has begun to use the socket.

    keep_alive: dict[str, Any] = {"socket_keepalive": True, "socket_keepalive_options": given}
    async with wired(url) as wire, Redis.from_url(wire.url, redis_connect_func=look, **keep_alive) as client:
        store = SessionStore(client, timeout=7)
        await store.load()
        assert options[-3:] == [1, idle, 7000]  # Those of the second connection: the first one asks a question only.
        await store.aclose()


class _Refusing:
    """A transport whose `write` raises while `refuses` is True."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.refuses = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self.refuses:
            raise RuntimeError("the handler is closed")
        self._transport.write(data)


async def test_a_transport_that_raises(url: str, admin: Redis) -> None:
    """A connection whose transport raises, as uvloop's may, is replaced, and idempotent calls are retried."""
    del admin
    transports: list[_Refusing] = []

    async def wrap(connection: Any) -> None:
        await connection.on_connect()
        transports.append(_Refusing(connection._writer.transport))
        connection._writer._transport = transports[-1]

    async with Redis.from_url(url, redis_connect_func=wrap) as client:
        store = SessionStore(client, timeout=20)
        await store.set("a", {"n": 1})
        for transport in transports:
            transport.refuses = True
        assert await store.get("a", ["n"]) == {"id": "a", "n": 1}
        assert await store.touch("a")
        for transport in transports:
            transport.refuses = True
        with pytest.raises(StoreUnavailable, match="not known what was done"):
            await store.increment("a", "n")
        assert await works(store)
        await store.aclose()


# ---------------------------------------------------------------------- replies that match nothing


async def test_a_reply_to_nothing_reaches_nobody() -> None:
    """A reply without a request closes the connection, and later calls get their own replies on another one."""
    once = [b"*1\r\n:7\r\n"]

    async with fake(lambda command: ones(command) + (once.pop() if once else b"")) as server:
        store = SessionStore.from_url(server.url)
        assert await store.touch("a")
        assert await outcomes(store.operations.touch(f"b{n}", "renew") for n in range(20)) == [1] * 20
        assert server.made == 2
        await store.aclose()


@pytest.mark.parametrize("where", ["before", "after", "instead"])
async def test_a_wrong_reply_to_the_greeting(where: str) -> None:
    """A connection with a wrong or extra reply to its greeting is not used; others are tried at growing intervals."""
    async with fake(ones) as server:
        setattr(server, where, b"$3\r\nold\r\n")
        store = SessionStore.from_url(server.url, timeout=1)
        with pytest.raises(StoreUnavailable, match="within the deadline: ConnectionError"):
            await store.touch("a")
        assert 3 < server.made < 40
        server.before = server.after = server.instead = b""
        assert await store.touch("a")
        await store.aclose()


@pytest.mark.parametrize(
    "reply",
    [b"!bad\r\n", b":1\r\n", b"*0\r\n", b"_\r\n", b"#f\r\n", b"$-1\r\n", b"*-1\r\n", b"$2\r\nOK\r\n"],
)
async def test_replies_that_no_script_gives(reply: bytes) -> None:
    """A reply that no script gives fails its call with a SessionError in time."""
    async with fake(lambda _: reply) as server:
        store = SessionStore.from_url(server.url, timeout=0.5)
        for found in await outcomes([store.touch("a"), store.increment("b", "n")]):
            assert isinstance(found, SessionError)
        server.script = ones
        assert await store.touch("a")
        await store.aclose()


async def test_a_reply_that_comes_byte_by_byte(url: str, admin: Redis) -> None:
    """A reply that arrives byte by byte is delivered when it is complete."""
    del admin

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(url.removeprefix("unix://"))

        async def requests() -> None:
            while data := await reader.read(1 << 16):
                back.write(data)
            back.close()

        asking = asyncio.ensure_future(requests())
        try:
            while byte := await there.read(1):
                writer.write(byte)
                await asyncio.sleep(0)
        finally:
            asking.cancel()
            back.close()

    async with (
        serving(trickle) as port,
        SessionStore.from_url(f"redis://127.0.0.1:{port}", timeout=20) as store,
    ):
        assert await works(store)


@pytest.mark.parametrize("polite", [False, True])
async def test_a_server_that_hangs_up_at_once(*, polite: bool) -> None:
    """A server that hangs up at once is dialled at growing intervals until the deadline.

    The retry policy of the client, whose pauses may be far longer, is not used.
    """
    made = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal made
        made += 1
        if polite:
            data = await reader.read(1 << 16)
            writer.write(b"+OK\r\n" * data.count(b"SETINFO"))

    retry = Retry(ConstantBackoff(60), 10)
    async with serving(hang_up) as port, Redis(port=port, protocol=2, retry=retry) as client:
        store = SessionStore(client, timeout=1.5)
        with pytest.raises(StoreUnavailable, match="within the deadline: ConnectionError"):
            await store.touch("a")
        assert 3 < made < 40
        await store.aclose()


async def test_a_server_that_is_no_redis() -> None:
    """A server that does not speak the protocol makes calls fail with StoreUnavailable."""

    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(web) as port:
        store = SessionStore.from_url(f"redis://127.0.0.1:{port}", timeout=0.5)
        with pytest.raises(StoreUnavailable):
            await store.touch("a")
        await store.aclose()


@pytest.mark.parametrize("options", [{"protocol": 3}, SILENT], ids=["handshake", "greeting"])
async def test_max_clients(options: dict[str, Any]) -> None:
    """Calls wait while the server has too many clients."""
    with own_server("--maxclients", "1") as url:
        async with Redis.from_url(url) as admin, Redis.from_url(url, **options) as client:
            async with asyncio.timeout(20):
                while True:  # Wait until the server has closed the connection that tested it.
                    with contextlib.suppress(redis.exceptions.ConnectionError):
                        await admin.ping()
                        break
            store = SessionStore(client, timeout=0.5)
            with pytest.raises(StoreUnavailable, match="within the deadline"):
                await store.touch("a")
            await store.aclose()
            patient = SessionStore(client, references=["user_id"], timeout=30)
            calls = [asyncio.ensure_future(call) for call in (patient.touch("a"), patient.ids_by("user_id", 1))]
            await asyncio.sleep(0.2)
            assert not any(call.done() for call in calls)
            await admin.config_set("maxclients", 1000)
            assert await outcomes(calls) == [False, []]
            await patient.aclose()


# ---------------------------------------------------------------------- much to send


async def test_a_peer_that_reads_too_slowly_is_given_no_more(url: str, admin: Redis) -> None:
    """Calls wait while the peer reads too slowly, and can be cancelled before they are sent."""
    async with wired(url) as wire:
        store = SessionStore.from_url(wire.url, timeout=30)
        await store.load()
        wire.stall()
        calls = [asyncio.ensure_future(store.set(f"s{n}", {"v": "x" * 20_000_000})) for n in range(4)]
        await asyncio.sleep(0.3)
        for call in calls[1:]:
            call.cancel()
        await asyncio.sleep(0)
        wire.go_on()
        assert [type(one) for one in await outcomes(calls)] == [dict] + [asyncio.CancelledError] * 3
        assert await store.touch("s0")  # This call comes after all that was sent.
        assert await admin.dbsize() == 2  # With the meta key.
        await store.aclose()


async def test_what_was_given_up_does_not_arrive_later(url: str, admin: Redis) -> None:
    """A write that was given up on a stalled connection does not arrive after its retry."""
    del admin
    gate = asyncio.Event()
    ends: list[asyncio.StreamWriter] = []
    holds = False

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(url.removeprefix("unix://"))
        ends.append(writer)
        first = len(ends) == 1

        async def replies() -> None:
            while data := await there.read(1 << 16):
                if not (first and holds):
                    writer.write(data)

        answering = asyncio.ensure_future(replies())
        try:
            while data := await reader.read(1 << 16):
                if first and holds:
                    await gate.wait()
                back.write(data)
        finally:
            answering.cancel()
            back.close()  # Data that was written is still sent.

    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.bind(("127.0.0.1", 0))
    async with serving(relay, sock=sock) as port:
        store = SessionStore.from_url(f"redis://127.0.0.1:{port}", timeout=3)
        await store.set("a", {"v": 0})
        holds = True
        ends[0].transport.pause_reading()  # type: ignore[attr-defined]
        fill = asyncio.create_task(store.set("fill", {"x": "x" * 300_000}))
        await asyncio.sleep(0.05)
        given_up = asyncio.create_task(store.set("a", {"v": 1}))
        await asyncio.gather(fill, given_up)
        await store.set("a", {"v": 2})
        gate.set()
        if not ends[0].transport.is_closing():
            ends[0].transport.resume_reading()  # type: ignore[attr-defined]
        while not ends[0].transport.is_closing():
            await asyncio.sleep(0.01)
        assert await store.get("a", ["v"]) == {"id": "a", "v": 2}
        await store.aclose()
