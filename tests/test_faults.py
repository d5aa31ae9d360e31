"""Failures of Redis and of the network: which calls are retried, which fail, and what they leave behind."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.sentinel import Sentinel

from rss import Reference, SessionEnded, SessionError, SessionNotFound, SessionStore, StoreUnavailable
from tests.keyspace import Keyspace
from tests.servers import Proxy, connections, free_port, own_server, proxied, sentinel, until

Call = Callable[[SessionStore], Awaitable[object]]


@pytest.fixture(name="own")
async def _own(url: str) -> AsyncIterator[Keyspace]:
    """The keyspace of the server of this file, which is empty at the start."""
    async with Redis.from_url(url, decode_responses=True) as client:
        await client.flushall()
        yield Keyspace(client, "rss")


@pytest.fixture(name="shop")
async def _shop(url: str, own: Keyspace) -> AsyncIterator[SessionStore]:
    """A store on the server of this file, with session "a" of user 1."""
    del own
    async with SessionStore.from_url(url, references=["user_id", "ip"], timeout=2) as store:
        await store.set("a", {"user_id": 1, "ip": "x", "n": 1})
        yield store


# ---------------------------------------------------------------------- scripts that are not there


async def test_scripts_that_are_gone_are_loaded_again(shop: SessionStore, own: Keyspace) -> None:
    """Scripts that are missing after SCRIPT FLUSH are loaded again, and the caller notices nothing."""
    for call in (shop.get("a"), shop.increment("a", "n"), shop.pop("a", ["n"]), shop.create(), shop.rotate("a")):
        await own.client.script_flush()
        await call
    await own.client.script_flush()
    assert await shop.delete_by("user_id", 1) == 1


async def test_many_callers_load_once(shop: SessionStore, own: Keyspace) -> None:
    """Many callers that find the scripts missing load them once."""
    await asyncio.gather(*(shop.get("a") for _ in range(50)))
    await own.client.script_flush()
    await own.client.config_resetstat()
    found = await asyncio.gather(*(shop.get("a") for _ in range(50)))
    assert all(session["id"] == "a" for session in found)
    stats = await own.client.info("commandstats")
    assert stats["cmdstat_script|load" if "cmdstat_script|load" in stats else "cmdstat_script"]["calls"] == len(
        shop.operations.scripts.sources
    )


async def test_scripts_flushed_all_the_time(shop: SessionStore, own: Keyspace) -> None:
    """No increment fails or counts twice while scripts are flushed all the time."""

    async def flush() -> None:
        while True:
            await own.client.script_flush()
            await asyncio.sleep(0.02)

    flushing = asyncio.create_task(flush())
    for _ in range(20):
        await asyncio.gather(*(shop.increment("a", "m") for _ in range(10)))
    flushing.cancel()
    assert await shop.get("a", ["m"]) == {"id": "a", "m": 200}


# ---------------------------------------------------------------------- connections that break


@pytest.fixture(name="broken")
async def _broken(url: str, shop: SessionStore) -> AsyncIterator[tuple[Proxy, SessionStore]]:
    """A store behind a proxy."""
    del shop
    async with (
        proxied(url) as (proxy, address),
        SessionStore.from_url(address, references=["user_id", "ip"], timeout=2) as store,
    ):
        proxy.scripts = 0
        yield proxy, store


REPEATED: dict[str, tuple[Call, object]] = {
    "get": (lambda s: s.get("a", ["n"]), {"id": "a", "n": 1}),
    "get and touch": (lambda s: s.get("a", ["n"], touch=True), {"id": "a", "n": 1}),
    "count_by": (lambda s: s.count_by("user_id", 1, exact=False), 1),
    "blocked": (lambda s: s.blocked("user_id", 1), None),
    "unblock": (lambda s: s.unblock("user_id", 1), False),
    "set": (lambda s: s.set("a", {"user_id": 2}), {"user_id": 2}),
    "unset": (lambda s: s.unset("a", ["n"]), None),
    "touch": (lambda s: s.touch("a"), True),
    "ids_by": (lambda s: s.ids_by("user_id", 1), ["a"]),
    "load": (lambda s: s.load(), None),
}


@pytest.mark.parametrize("name", REPEATED)
async def test_what_may_be_repeated_is(broken: tuple[Proxy, SessionStore], name: str) -> None:
    """An idempotent call whose reply was lost is retried, with the same result."""
    proxy, store = broken
    call, result = REPEATED[name]
    proxy.swallow = 2
    assert await call(store) == result


async def test_create_and_rotate_recognise_their_own_work(broken: tuple[Proxy, SessionStore], own: Keyspace) -> None:
    """`create` and `rotate` that are retried after a lost reply find their own work, and make nothing else."""
    proxy, store = broken
    proxy.swallow = 1
    created = await store.create({"user_id": 7})
    proxy.swallow = 1
    rotated = await store.rotate("a", {"user_id": 7})
    assert proxy.scripts == 4
    assert await own.dump() == {
        "{a}": {"_ended": "rotated"},
        f"{{{created}}}": {"id": created, "user_id": "7"},
        f"{{{rotated}}}": {"id": rotated, "user_id": "7", "ip": "x", "n": "1"},
        "user_id:{7}": {created, rotated},
        "ip:{x}": {rotated},
    }


async def test_create_does_not_evict_twice(url: str, own: Keyspace) -> None:
    """A retried `create` does not evict the session that its first run made."""
    async with proxied(url) as (proxy, address):
        references = {"user_id": Reference(limit=1)}
        async with SessionStore.from_url(address, references=references, timeout=2) as store:
            proxy.swallow = 1
            created = await store.create({"user_id": 1})
            assert await own.dump() == {f"{{{created}}}": {"id": created, "user_id": "1"}, "user_id:{1}": {created}}


async def test_delete_is_done_when_it_says_so(broken: tuple[Proxy, SessionStore], own: Keyspace) -> None:
    """A `delete` whose first reply was lost is retried, and returns False because the session has ended already."""
    proxy, store = broken
    proxy.swallow = 1
    assert not await store.delete("a")
    assert await own.dump() == {"{a}": {"_ended": "deleted"}}


@pytest.mark.parametrize("name", ["increment", "pop"])
async def test_what_must_not_be_repeated_is_not(broken: tuple[Proxy, SessionStore], own: Keyspace, name: str) -> None:
    """`increment` and `pop` are not retried after a lost reply; the error says that the outcome is unknown."""
    proxy, store = broken
    proxy.swallow = 1
    with pytest.raises(StoreUnavailable, match="not known what was done"):
        await (store.increment("a", "n") if name == "increment" else store.pop("a", ["n"]))
    assert proxy.scripts == 1
    session = (await own.dump())["{a}"]
    assert isinstance(session, dict)
    assert session.get("n") == ("2" if name == "increment" else None)


async def test_rotate_that_is_repeated_tells_that_the_session_ended(
    broken: tuple[Proxy, SessionStore], shop: SessionStore
) -> None:
    """A retried `rotate` raises SessionEnded if the new session was ended between the two runs."""
    proxy, store = broken
    proxy.swallow = 1
    rotating = asyncio.create_task(store.rotate("a"))
    while proxy.swallow:
        await asyncio.sleep(0)
    ended = await shop.delete_by("user_id", 1, reason="password")
    with pytest.raises(SessionEnded, match="password"):
        await rotating
    assert ended == 1


async def test_set_that_expects_is_not_repeated(broken: tuple[Proxy, SessionStore], shop: SessionStore) -> None:
    """`set` with `expect` is not retried, since a second run would conflict with the first one."""
    proxy, store = broken
    proxy.swallow = 1
    with pytest.raises(StoreUnavailable, match="not known what was done"):
        await store.set("a", {"n": 2}, expect={"n": 1})
    assert await shop.get("a", ["n"]) == {"id": "a", "n": 2}


async def test_large_delete_by_goes_on_where_it_was(broken: tuple[Proxy, SessionStore]) -> None:
    """A large `delete_by` that lost a reply repeats that page, and spares sessions that came meanwhile."""
    proxy, store = broken
    for _ in range(5):
        await asyncio.gather(*(store.create({"user_id": 5}) for _ in range(60)))
    proxy.swallow = 1
    deleting = asyncio.create_task(store.delete_by("user_id", 5))
    while proxy.swallow:
        await asyncio.sleep(0)
    came = await store.create({"user_id": 5})
    assert await deleting <= 300
    assert await store.ids_by("user_id", 5) == [came]


async def test_connections_killed_all_the_time(shop: SessionStore, own: Keyspace) -> None:
    """Idempotent calls never fail while connections are killed, and each gets its own reply."""
    ids = [await shop.create({"n": n}) for n in range(20)]
    done = 0

    async def kill() -> None:
        while True:
            with contextlib.suppress(redis.exceptions.ResponseError):
                await own.client.client_kill_filter(_type="normal", skipme=True)
            before = done
            while done == before:  # Otherwise a slow machine kills connections before they are used.
                await asyncio.sleep(0.005)

    async def work(n: int) -> None:
        nonlocal done
        for _ in range(30):
            assert await shop.get(ids[n]) == {"id": ids[n], "n": n}
            await shop.set(ids[n], {"n": n})
            done += 1

    killing = asyncio.create_task(kill())
    await asyncio.gather(*(work(n) for n in range(20)))
    killing.cancel()


async def test_an_idle_connection_that_was_reset(shop: SessionStore, own: Keyspace) -> None:
    """A call after an idle connection was reset succeeds, even if the call must not be repeated."""
    for n in range(10):
        assert await shop.increment("a", "m") == n + 1
        await own.client.client_kill_filter(_type="normal", skipme=True)
        while await connections(own.client):
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)  # The client must notice that the server closed the connection.


async def test_redis_is_not_there() -> None:
    """A call without a server raises StoreUnavailable after its deadline, not before."""
    for url in ("unix:///nowhere/redis.sock", f"redis://127.0.0.1:{free_port()}"):
        async with Redis.from_url(url) as client:
            store = SessionStore(client, timeout=0.3)
            started = time.monotonic()
            with pytest.raises(
                StoreUnavailable, match="no answer from Redis within the deadline: ConnectionError"
            ) as raised:
                await store.get("SECRET")
            assert time.monotonic() - started >= 0.29
            assert isinstance(raised.value.__cause__, redis.exceptions.ConnectionError)


async def test_redis_comes_back(tmp_path: Path) -> None:
    """A call waits for a server that restarts within the deadline, even if the call must not be repeated."""
    port = free_port()
    arguments = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--appendonly", "yes")
    async with Redis(port=port) as client:
        store = SessionStore(client, timeout=20)
        with own_server(*arguments):
            await store.set("a", {"n": 1})
        await asyncio.sleep(0.01)  # The client must notice that the server closed the connection.
        counting = asyncio.create_task(store.increment("a", "n"))
        await asyncio.sleep(0.1)
        with own_server(*arguments):
            assert await counting == 2


async def test_a_server_that_hangs(own: Keyspace, url: str) -> None:
    """A call to a server that hangs fails at its deadline, even if the client's `socket_timeout` is longer."""
    async with Redis.from_url(url, socket_timeout=60) as client:
        store = SessionStore(client, timeout=0.2)
        await store.load()
        await own.client.client_pause(1000)
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="it takes too long"):
            await store.get("a")
        assert 0.19 <= time.monotonic() - started < 0.9
        assert await SessionStore(client, timeout=5).get("a") == {}


@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_wrong_password(protocol: int) -> None:
    """A wrong password fails at once, and the error does not show the password."""
    with own_server("--requirepass", "right") as url:
        for secret in ("", ":wrong@"):
            address = f"unix://{secret}{url.removeprefix('unix://')}?protocol={protocol}"
            store = SessionStore.from_url(address, timeout=60)
            with pytest.raises(StoreUnavailable, match="Redis refuses: AUTH") as raised:
                await store.create()
            assert "wrong" not in str(raised.value)
            await store.aclose()


# ---------------------------------------------------------------------- a server that refuses


async def test_a_read_only_replica() -> None:
    """A read-only replica serves reads; a write is retried until its deadline and changes nothing."""
    with own_server() as url:
        async with (
            Redis.from_url(url, decode_responses=True) as admin,
            SessionStore.from_url(url, references=["user_id"], timeout=0.3) as store,
        ):
            await store.set("a", {"user_id": 1})
            await admin.replicaof("127.0.0.1", free_port())
            before = await Keyspace(admin, "rss").dump()
            assert await store.get("a") == {"id": "a", "user_id": 1}
            assert await store.ids_by("user_id", 1) == ["a"]
            for write in (store.set("a", {"user_id": 2}), store.create(), store.delete("a"), store.increment("a", "n")):
                with pytest.raises(StoreUnavailable, match="READONLY"):
                    await write
            assert await Keyspace(admin, "rss").dump() == before
            await admin.replicaof("NO", "ONE")
            assert await store.increment("a", "n") == 1


async def test_a_full_server(shop: SessionStore, own: Keyspace) -> None:
    """A full server refuses each write as a whole, but sessions can still be read, renewed and ended."""
    for n in range(150):
        await shop.set(f"b{n}", {"user_id": 2, "ip": "y"})
    before = await own.dump()
    await own.client.config_set("maxmemory", 1)
    try:
        for write in (
            shop.create({"user_id": 1}),
            shop.create(),
            shop.set("a", {"user_id": 2}),
            shop.set("a", {"n": 2}),
            shop.increment("a", "n"),
        ):
            with pytest.raises(StoreUnavailable, match="OOM"):
                await write
        assert await own.dump() == before
        assert await shop.get("a", ["n"], touch=True) == {"id": "a", "n": 1}
        assert await shop.touch("a")
        assert await shop.delete_by("user_id", 2) == 150
        assert await shop.delete("a")
        assert await shop.ended("a") == "deleted"
    finally:
        await own.client.config_set("maxmemory", 0)
    dump = await own.dump()
    assert {name for name in dump if name.startswith(("user_id", "ip"))} == set()
    assert len(dump) == 152  # Tombstones, and the fence of a large delete_by.


async def test_a_server_that_is_busy(shop: SessionStore, own: Keyspace, url: str) -> None:
    """Calls wait while a script of others blocks the server, and succeed after that script was killed."""
    await own.client.config_set("lua-time-limit", 20)
    async with Redis.from_url(url, socket_timeout=None) as other, Redis.from_url(url) as impatient:

        async def hang() -> None:
            with pytest.raises(redis.exceptions.ResponseError):
                await other.eval("while true do end", 0)

        endless = asyncio.create_task(hang())
        while True:
            try:
                await own.client.ping()
            except redis.exceptions.ResponseError as error:
                assert "BUSY" in str(error)  # noqa: PT017 - this error is not the subject of the test
                break
        try:
            with pytest.raises(StoreUnavailable, match="BUSY"):
                await SessionStore(impatient, timeout=0.5).get("a")
            counting = asyncio.create_task(shop.increment("a", "n"))
            await asyncio.sleep(0.05)
        finally:
            await own.client.script_kill()
        assert await counting == 2
        await endless


async def test_too_few_replicas(shop: SessionStore, own: Keyspace) -> None:
    """A server with too few replicas refuses a write as a whole."""
    before = await own.dump()
    await own.client.config_set("min-replicas-to-write", 1)
    try:
        with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
            await shop.set("a", {"user_id": 2})
    finally:
        await own.client.config_set("min-replicas-to-write", 0)
    assert await own.dump() == before


# ---------------------------------------------------------------------- keys of another type


async def test_another_type_under_the_key_of_a_session(shop: SessionStore, own: Keyspace) -> None:
    """A call on a session whose key holds another type raises SessionError, and nothing changes."""
    await own.client.set("rss:{b}", "x", ex=60)
    before = await own.dump()
    for call in (
        shop.get("b"),
        shop.get("b", ["n"], touch=True),
        shop.set("b", {"user_id": 1}),
        shop.unset("b", ["n"]),
        shop.pop("b", ["n"]),
        shop.increment("b", "n"),
        shop.touch("b"),
        shop.delete("b"),
        shop.ended("b"),
        shop.rotate("b"),
        shop.ttl("b"),
    ):
        with pytest.raises(SessionError, match="another type of data") as raised:
            await call
        assert type(raised.value) is SessionError
    assert await own.dump() == before


async def test_another_type_under_the_key_of_a_reference_set(shop: SessionStore, own: Keyspace) -> None:
    """A call that needs a reference set of another type fails as a whole; other sets still work."""
    await own.client.set("rss:user_id:{2}", "x", ex=60)
    before = await own.dump()
    for call in (
        shop.create({"ip": "x", "user_id": 2}),
        shop.set("a", {"ip": "y", "user_id": 2}),
        shop.set("a", {"user_id": [1, 2]}),
        shop.rotate("a", {"user_id": 2}),
        shop.ids_by("user_id", 2),
        shop.delete_by("user_id", 2),
    ):
        with pytest.raises(SessionError, match="another type of data"):
            await call
    assert await own.dump() == before
    assert await shop.ids_by("user_id", 1) == await shop.ids_by("ip", "x") == ["a"]


async def test_another_type_in_place_of_the_set_of_a_session(shop: SessionStore, own: Keyspace) -> None:
    """A session whose set was replaced by another type can be read, renewed and ended, and that key stays."""
    await own.client.set("rss:user_id:{1}", "x")
    assert (await shop.get("a", touch=True))["user_id"] == 1
    assert await shop.touch("a")
    assert await shop.ids_by("ip", "x") == ["a"]
    assert await shop.delete("a")
    assert await own.client.get("rss:user_id:{1}") == "x"
    assert await own.client.ttl("rss:user_id:{1}") == -1
    assert await shop.ids_by("ip", "x") == []


async def test_another_type_in_place_of_a_fence(shop: SessionStore, own: Keyspace) -> None:
    """A call that reads a fence of another type fails as a whole."""
    await own.client.set("rss:_fence:user_id:{2}", "x", ex=60)
    await own.client.set("rss:_fence:user_id:{1}", "x", ex=60)
    before = await own.dump()
    for call in (
        shop.create({"user_id": 2}),
        shop.set("a", {"user_id": 2}),
        shop.unset("a", ["user_id"]),
        shop.rotate("a"),
        shop.delete_by("user_id", 1),
    ):
        with pytest.raises(SessionError, match="another type of data"):
            await call
    assert await own.dump() == before
    assert await shop.delete("a")


async def test_a_member_that_is_no_session(shop: SessionStore, own: Keyspace) -> None:
    """`delete_by` ignores a member whose key is no hash, and does not change that key."""
    await own.client.sadd("rss:user_id:{1}", "b")
    await own.client.set("rss:{b}", "x", ex=60)
    assert await shop.delete_by("user_id", 1) == 1
    assert await own.dump() == {"{a}": {"_ended": "deleted"}, "{b}": "string"}


async def test_data_that_cannot_be_read(shop: SessionStore, own: Keyspace) -> None:
    """A field that cannot be decoded raises an error that names the field."""
    await own.client.hset("rss:{a}", "n", b"\xff")
    with pytest.raises(SessionError, match="the field 'n' holds data that is not readable") as raised:
        await shop.get("a")
    assert raised.value.__cause__ is None
    assert await shop.get("a", ["ip"]) == {"id": "a", "ip": "x"}


async def test_a_user_without_rights_is_told_the_command(shop: SessionStore, own: Keyspace, url: str) -> None:
    """A missing permission raises an error that names the command, and nothing is written."""
    await own.client.acl_setuser(
        "poor", enabled=True, passwords=["+pw"], keys=["rss:*"], commands=["+@all", "-hset"], reset=True
    )
    async with Redis(unix_socket_path=url.removeprefix("unix://"), username="poor", password="pw") as client:
        store = SessionStore(client)
        assert await store.get("a") != {}
        with pytest.raises(SessionError, match="no permission for .*(hset|of the scripts)") as raised:
            await store.set("a", {"n": 2})
        assert type(raised.value) is SessionError
        assert isinstance(raised.value.__cause__, redis.exceptions.ResponseError)
        await store.aclose()
    assert await shop.get("a", ["n"]) == {"id": "a", "n": 1}


# ---------------------------------------------------------------------- the user's client


@pytest.mark.parametrize("pool", [ConnectionPool, BlockingConnectionPool])
async def test_more_callers_than_connections(url: str, shop: SessionStore, pool: type[ConnectionPool]) -> None:
    """A store works while others use all connections of the client's pool, for both kinds of pools."""
    del shop
    async with Redis(connection_pool=pool.from_url(url, max_connections=1)) as client:
        store = SessionStore(client, timeout=20)
        taken = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        found = await asyncio.gather(*(store.get("a", ["n"]) for _ in range(300)))
        assert found == [{"id": "a", "n": 1}] * 300
        await client.connection_pool.release(taken)
        assert await client.ping()
        await store.aclose()
        await client.connection_pool.disconnect()


async def test_a_client_is_left_as_it_is(url: str, shop: SessionStore) -> None:
    """A store neither configures nor closes the client that it was given; it closes only its own client."""
    await shop.load()
    async with Redis.from_url(url, decode_responses=True) as client:
        kwargs = dict(client.connection_pool.connection_kwargs)
        retry = client.get_retry()
        async with SessionStore(client) as store:
            await store.get("a")
        assert client.connection_pool.connection_kwargs == kwargs
        assert client.get_retry() is retry
        assert await client.ping()

        before = len(await connections(client))
        async with SessionStore.from_url(url) as own:
            await own.get("a")
            assert own._owned
            assert await own._owned.ping()
            assert len(await connections(client)) == before + 2
        assert len(await connections(client)) == before


async def test_a_client_with_one_connection(url: str, shop: SessionStore) -> None:
    """A client with a single connection works, too."""
    del shop
    async with Redis.from_url(url, single_connection_client=True) as client:
        store = SessionStore(client)
        assert await asyncio.gather(*(store.get("a", ["n"]) for _ in range(20))) == [{"id": "a", "n": 1}] * 20


async def test_callers_that_are_cancelled_disturb_nobody(url: str, shop: SessionStore) -> None:
    """After many cancellations every other call has its own reply, and the client's pool was not used."""
    ids = [await shop.create({"n": n}) for n in range(50)]
    chance = random.Random(1)
    async with Redis(connection_pool=BlockingConnectionPool.from_url(url, max_connections=8)) as client:
        store = SessionStore(client)
        await store.load()
        tasks = {asyncio.create_task(store.get(ids[n % 50])): n % 50 for n in range(2000)}
        for task in chance.sample([*tasks], 500):
            await asyncio.sleep(0)
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        answered = 0
        for n, result in zip(tasks.values(), done, strict=True):
            if not isinstance(result, asyncio.CancelledError):
                assert result == {"id": ids[n], "n": n}
                answered += 1
        assert 1500 <= answered < 2000
        await store.aclose()
        assert not client.connection_pool._in_use_connections
        assert not client.connection_pool._available_connections


async def test_a_caller_that_is_cancelled_while_loading(shop: SessionStore, own: Keyspace) -> None:
    """If the caller that loads the scripts is cancelled, the other calls still succeed."""
    for _ in range(20):
        await own.client.script_flush()
        first = asyncio.create_task(shop.get("a"))
        others = [asyncio.create_task(shop.get("a", ["n"])) for _ in range(10)]
        for _ in range(random.Random(2).randrange(12)):
            await asyncio.sleep(0)
        first.cancel()
        assert await asyncio.gather(*others) == [{"id": "a", "n": 1}] * 10


async def test_behind_sentinels(tmp_path: Path) -> None:
    """Calls wait for a new master when the old one dies, and a session that was ended stays ended."""
    ports = [free_port(), free_port()]
    bound = ("--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0")
    with contextlib.ExitStack() as stack:
        master = contextlib.ExitStack()
        master.enter_context(own_server("--port", str(ports[0]), *bound))
        stack.callback(master.close)
        stack.enter_context(own_server("--port", str(ports[1]), *bound, "--replicaof", "127.0.0.1", str(ports[0])))
        watch = stack.enter_context(sentinel(tmp_path, ports[0]))
        async with Redis(port=watch, decode_responses=True) as guard, Redis(port=ports[0]) as first:
            async with Redis(port=ports[1]) as second:
                await until(second, "replication", "master_link_status", "up")
            async with asyncio.timeout(30):
                while not await guard.sentinel_slaves("main"):
                    await asyncio.sleep(0.02)
            sentinels = Sentinel([("127.0.0.1", watch)])  # type: ignore[no-untyped-call]
            async with sentinels.master_for("main") as client:
                store = SessionStore(client, references=["user_id"], timeout=30)
                await store.set("a", {"user_id": 1, "n": 0})
                await store.set("b", {"user_id": 1})
                await store.delete("b")
                # WAIT covers the writes of its own connection and all earlier writes.
                async with first.client() as connection:
                    await connection.set("last", 1)
                    assert await connection.wait(1, 5000) == 1
                master.close()
                assert await store.touch("a")
                assert await store.increment("a", "n") == 1
                assert await store.ids_by("user_id", 1) == ["a"]
                with pytest.raises(SessionEnded):
                    await store.set("b", {"user_id": 1})
            for guarded in sentinels.sentinels:
                await guarded.aclose()


# ---------------------------------------------------------------------- secrets


async def test_no_id_and_no_value_in_logs_and_errors(
    url: str, shop: SessionStore, own: Keyspace, caplog: pytest.LogCaptureFixture
) -> None:
    """No id and no value appears in errors or logs, at any log level."""
    caplog.set_level(logging.DEBUG)
    await own.client.set("rss:{SECRET-b}", "SECRET", ex=60)
    await own.client.config_set("maxmemory", 1)
    errors: list[BaseException] = []
    async with contextlib.AsyncExitStack() as stack:
        proxy, address = await stack.enter_async_context(proxied(url))
        store = await stack.enter_async_context(SessionStore.from_url(address, timeout=0.3))
        bare = stack.enter_context(own_server("--rename-command", "EVALSHA", ""))
        without = await stack.enter_async_context(Redis.from_url(bare))
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: shop.set("SECRET-a", {"user_id": "SECRET"}),
            lambda: shop.get("SECRET-b"),
            lambda: shop.increment("SECRET-c", "n"),
            lambda: store.pop("a", ["n"]),
            lambda: SessionStore(without).get("SECRET-d"),
        ]
        for call in calls:
            proxy.swallow = 1
            with pytest.raises((StoreUnavailable, SessionError, SessionNotFound)) as raised:
                await call()
            errors.append(raised.value)
    await own.client.config_set("maxmemory", 0)
    while errors:
        error = errors.pop()
        assert "SECRET" not in str(error)
        assert "SECRET" not in repr(error)
        shown = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        errors += [shown] if shown else []
    assert "SECRET" not in caplog.text
