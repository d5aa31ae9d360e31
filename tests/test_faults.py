"""Failures of Redis and of the network: which calls are retried, which fail, and what they leave behind."""

import asyncio
import contextlib
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import redis.exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from rss import PartlyDone, Reference, SessionEnded, SessionError, SessionNotFound, SessionStore, StoreUnavailable
from rss.keys import Partitioned
from rss.testing import Cluster, clusters, free_port
from tests.keyspace import Keyspace
from tests.servers import (
    Proxy,
    behind_proxy,
    client_of,
    connections,
    everywhere,
    own_server,
    require_all,
    restart,
    sentinel,
    until,
)
from tests.steps import run_at

Call = Callable[[SessionStore], Awaitable[object]]

# Tests run on one server and on a cluster, except those with one of these marks.
one_server = pytest.mark.parametrize("url", ["one server"], indirect=True)
on_a_cluster = pytest.mark.parametrize("url", ["cluster"], indirect=True)


@pytest.fixture(scope="module", name="url", params=["one server", "cluster"])
def _url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server, or a cluster, for this file alone."""
    if request.param == "cluster":
        yield request.getfixturevalue("servers").url
    else:
        with own_server() as url:
            yield url


@pytest.fixture(name="own")
async def _own(url: str) -> AsyncIterator[Keyspace]:
    """The keyspace of the servers of this file, which are empty at the start."""
    async with client_of(url, decode_responses=True) as client:
        await everywhere(client, "FLUSHALL")
        yield Keyspace(client, "rss", 64 if "+cluster" in url else None)


@pytest.fixture(name="shop")
async def _shop(url: str, own: Keyspace) -> AsyncIterator[SessionStore]:
    """A store on the servers of this file, with session "a" of user 1."""
    del own
    async with SessionStore.from_url(url, references=["user_id", "ip"], timeout=2) as store:
        await store.set("a", {"user_id": 1, "ip": "x", "n": 1})
        yield store


# ---------------------------------------------------------------------- scripts that are not there


async def test_scripts_that_are_gone_are_loaded_again(shop: SessionStore, own: Keyspace) -> None:
    """Scripts that are missing after SCRIPT FLUSH are loaded again, and the caller notices nothing."""
    for call in (shop.get("a"), shop.increment("a", "n"), shop.pop("a", ["n"]), shop.create(), shop.rotate("a")):
        await everywhere(own.client, "SCRIPT FLUSH")
        await call
    await everywhere(own.client, "SCRIPT FLUSH")
    assert await shop.delete_by("user_id", 1) == 1


async def test_many_callers_load_once(shop: SessionStore, own: Keyspace) -> None:
    """Many callers that find the scripts missing on a server load them once."""
    ids = [await shop.create() for _ in range(50)]
    await asyncio.gather(*map(shop.get, ids))
    await everywhere(own.client, "SCRIPT FLUSH")
    await everywhere(own.client, "CONFIG RESETSTAT")
    found = await asyncio.gather(*map(shop.get, ids))
    assert [session["id"] for session in found] == ids
    for stats in await everywhere(own.client, "INFO", "commandstats"):
        name = "cmdstat_script|load" if "cmdstat_script|load" in stats else "cmdstat_script"
        assert stats[name]["calls"] == len(shop.operations.scripts.usual)


async def test_scripts_flushed_all_the_time(shop: SessionStore, own: Keyspace) -> None:
    """No increment fails or counts twice while scripts are flushed all the time."""
    ids = ["a", *[await shop.create() for _ in range(4)]]

    async def flush() -> None:
        while True:
            await everywhere(own.client, "SCRIPT FLUSH")
            await asyncio.sleep(0.02)

    flushing = asyncio.create_task(flush())
    for _ in range(20):
        await asyncio.gather(*(shop.increment(session_id, "m") for session_id in ids * 2))
    flushing.cancel()
    assert [await shop.get(session_id, ["m"]) for session_id in ids] == [{"id": i, "m": 40} for i in ids]


# ---------------------------------------------------------------------- connections that break


@pytest.fixture(name="broken")
async def _broken(url: str, shop: SessionStore) -> AsyncIterator[tuple[Proxy, SessionStore]]:
    """A store behind a proxy."""
    del shop
    async with behind_proxy(url, references=["user_id", "ip"], timeout=2) as (proxy, store):
        await store.blocked("ip", "nobody's")  # It asks each master, so all of them have the scripts.
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
    assert proxy.swallow == 0


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
    references = {"user_id": Reference(identity=True, limit=1)}
    async with behind_proxy(url, references=references, timeout=2) as (proxy, store):
        proxy.swallow = 1
        created = await store.create({"user_id": 1})
        assert proxy.swallow == 0
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


@one_server
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


@one_server
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
    """Idempotent calls never fail while connections are killed, and each gets its own reply. No increment runs twice.

    An increment without a reply may have run.
    """
    ids = [await shop.create({"n": n}) for n in range(20)]
    counted, unsure = Counter[int](), Counter[int]()
    done = 0

    async def kill() -> None:
        while True:
            with contextlib.suppress(redis.exceptions.ResponseError):
                await everywhere(own.client, "CLIENT KILL", "TYPE", "normal", "SKIPME", "yes")
            before = done
            while done == before:  # Otherwise a slow machine kills connections before they are used.
                await asyncio.sleep(0.005)

    async def work(n: int) -> None:
        nonlocal done
        for _ in range(30):
            assert (await shop.get(ids[n], ["n"])) == {"id": ids[n], "n": n}
            await shop.set(ids[n], {"n": n})
            try:
                await shop.increment(ids[n], "m")
                counted[n] += 1
            except StoreUnavailable as error:
                assert "not known what was done" in str(error)  # noqa: PT017 - it may succeed, too
                unsure[n] += 1
            done += 1

    killing = asyncio.create_task(kill())
    await asyncio.gather(*(work(n) for n in range(20)))
    killing.cancel()
    for n in range(20):
        assert counted[n] <= (await shop.get(ids[n])).get("m", 0) <= counted[n] + unsure[n]


async def test_an_idle_connection_that_was_reset(shop: SessionStore, own: Keyspace) -> None:
    """A call after an idle connection was reset succeeds, even if the call must not be repeated."""
    for n in range(10):
        assert await shop.increment("a", "m") == n + 1
        await everywhere(own.client, "CLIENT KILL", "TYPE", "normal", "SKIPME", "yes")
        while await connections(own.client):
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)  # The client must notice that the server closed the connection.


async def test_redis_is_not_there() -> None:
    """A call without a server raises StoreUnavailable after its deadline, not before."""
    address = f"127.0.0.1:{free_port()}"
    for url in ("unix:///nowhere/redis.sock", f"redis://{address}", f"redis+cluster://{address}"):
        store = SessionStore.from_url(url, timeout=0.3)
        started = time.monotonic()
        with pytest.raises(
            StoreUnavailable, match="no answer from Redis within the deadline: ConnectionError"
        ) as raised:
            await store.get("SECRET")
        assert time.monotonic() - started >= 0.29
        assert isinstance(raised.value.__cause__, redis.exceptions.ConnectionError)
        await store.aclose()


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
    async with client_of(url, socket_timeout=60) as client:
        store = SessionStore(client, timeout=0.2)
        await store.load()
        await everywhere(own.client, "CLIENT PAUSE", 1000)
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


async def test_a_full_server(shop: SessionStore, own: Keyspace, url: str) -> None:
    """A full server refuses each write as a whole, but every store can read, renew and end sessions."""
    for n in range(150):
        await shop.set(f"b{n}", {"user_id": 2, "ip": "y"})
    before = await own.dump()
    await everywhere(own.client, "CONFIG SET", "maxmemory", 1)
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
        async with SessionStore.from_url(url, references=["user_id", "ip"]) as other:
            assert await other.touch("a")
        assert await shop.delete_by("user_id", 2) == 150
        assert await shop.delete("a")
        assert await shop.ended("a") == "deleted"
    finally:
        await everywhere(own.client, "CONFIG SET", "maxmemory", 0)
    ended = {"{a}", *(f"{{b{n}}}" for n in range(150))}
    assert (await own.dump()).keys() - {"_fence:user_id:{2}"} == ended  # A large delete_by leaves a fence.


async def test_a_server_that_is_busy(shop: SessionStore, own: Keyspace, url: str) -> None:
    """Calls wait while a script of others blocks the server, and succeed after that script was killed."""
    await everywhere(own.client, "CONFIG SET", "lua-time-limit", 20)
    key = shop.get_session_key("a")
    async with client_of(url, socket_timeout=None) as other, client_of(url) as impatient:

        async def hang() -> None:
            with pytest.raises(redis.exceptions.ResponseError):
                await other.eval("while true do end", 1, key)

        endless = asyncio.create_task(hang())
        while True:
            try:
                await own.client.exists(key)
            except redis.exceptions.ResponseError as error:
                assert "BUSY" in str(error)  # noqa: PT017 - this error is not the subject of the test
                break
        try:
            with pytest.raises(StoreUnavailable, match="BUSY"):
                await SessionStore(impatient, timeout=0.5).get("a")
            counting = asyncio.create_task(shop.increment("a", "n"))
            await asyncio.sleep(0.05)
        finally:
            with contextlib.suppress(redis.exceptions.ResponseError):  # The other masters run no script.
                await everywhere(own.client, "SCRIPT KILL")
        assert await counting == 2
        await endless


async def test_too_few_replicas(shop: SessionStore, own: Keyspace) -> None:
    """A server with too few replicas refuses a write as a whole."""
    before = await own.dump()
    await everywhere(own.client, "CONFIG SET", "min-replicas-to-write", 1)
    try:
        with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
            await shop.set("a", {"user_id": 2})
    finally:
        await everywhere(own.client, "CONFIG SET", "min-replicas-to-write", 0)
    assert await own.dump() == before


# ---------------------------------------------------------------------- one master of a cluster


@pytest.fixture(name="spread")
async def _spread(shop: SessionStore, servers: Cluster) -> tuple[list[str], list[str]]:
    """The ids of a session of user 2 in each partition: those on the last master, and those on the others."""
    layout = cast("Partitioned", shop.operations.layout)
    last: list[str] = []
    others: list[str] = []
    for partition, slot in enumerate(layout.slots):
        ids = last if servers.owner(slot) is servers.servers[-1] else others
        ids.append(layout.mint(partition))
    await asyncio.gather(*(shop.set(session_id, {"user_id": 2, "n": 0}) for session_id in last + others))
    return last, others


@on_a_cluster
async def test_a_master_that_stands_still(
    shop: SessionStore, servers: Cluster, spread: tuple[list[str], list[str]]
) -> None:
    """While a master stands still, the others serve their calls at once. Its own calls wait, and run once."""
    last, others = spread
    servers.servers[-1].signal(signal.SIGSTOP)
    try:
        waiting = [asyncio.create_task(shop.increment(session_id, "n")) for session_id in last]
        until, rounds = time.monotonic() + 1, 0
        while time.monotonic() < until:
            rounds += 1
            async with asyncio.timeout(0.5):
                assert {await shop.increment(session_id, "n") for session_id in others} == {rounds}
        assert not any(call.done() for call in waiting)
    finally:
        servers.servers[-1].signal(signal.SIGCONT)
    assert await asyncio.gather(*waiting) == [1] * len(last)
    assert {(await shop.get(session_id))["n"] for session_id in last} == {1}


@on_a_cluster
async def test_a_master_that_is_dead(shop: SessionStore, servers: Cluster, spread: tuple[list[str], list[str]]) -> None:
    """The calls of a dead master fail at their deadlines, and `delete_by` counts what it reached. Others go on."""
    last, others = spread
    new = [shop.operations.layout.mint(shop.operations.layout.place(session_id)[1]) for session_id in others]

    async def fail(call: Awaitable[object]) -> StoreUnavailable:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable) as raised:
            await call
        assert 1.9 <= time.monotonic() - started < 3
        return raised.value

    servers.servers[-1].kill()
    try:
        one, *more = last
        failing = asyncio.gather(
            fail(shop.delete_by("user_id", 2)),
            *map(fail, [shop.increment(one, "n"), shop.rotate(one), shop.ids_by("ip", "x"), shop.count_by("ip", "x")]),
            *(fail(shop.get(session_id)) for session_id in more),
        )
        while not failing.done():
            async with asyncio.timeout(0.5):
                for session_id in new:
                    await shop.set(session_id, {"n": 1})
                    assert await shop.increment(session_id, "n") == 2
        partly, *errors = await failing
        assert isinstance(partly, PartlyDone)
        assert (partly.ended, partly.unfinished, partly.partitions) == (len(others), len(last), 64)
        assert {type(error) for error in errors} == {StoreUnavailable}
        assert {str(error) for error in errors} == {"no answer from Redis within the deadline: ConnectionError"}
    finally:
        await asyncio.to_thread(restart, servers, servers.servers[-1])


@on_a_cluster
async def test_a_cluster_that_is_down(
    shop: SessionStore,
    url: str,
    servers: Cluster,
    spread: tuple[list[str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cluster that needs all masters refuses all calls without one. They wait until it has restarted and loaded."""
    last, others = spread
    server = servers.servers[-1]
    # Loading takes a millisecond a key. After two megabytes, the server looks for commands.
    monkeypatch.setattr(clusters, "_OPTIONS", (*clusters._OPTIONS, "--key-load-delay", "1000"))
    require_all(servers, "yes")
    key = shop.get_session_key(last[0])
    server("EVAL", "for n = 1, 500 do redis.call('SET', KEYS[1] .. n, ('x'):rep(20000)) end", 1, key)
    server("CONFIG", "SET", "rdbcompression", "no")
    server("SAVE")
    async with SessionStore.from_url(url, timeout=20) as patient:
        server.kill()
        try:
            await asyncio.to_thread(servers.wait, lambda one: bool(one.info("cluster")["cluster_state"] == "fail"))
            with pytest.raises(StoreUnavailable, match="CLUSTERDOWN"):
                await shop.get(others[0])
            calls = [asyncio.create_task(patient.increment(session_id, "n")) for session_id in last + others]
        finally:
            starting = asyncio.create_task(asyncio.to_thread(restart, servers, servers.servers[-1]))
            loads = await loads_until(starting, server.port)
            (server.folder / "dump.rdb").unlink()
        assert loads
        assert await asyncio.gather(*calls) == [1] * len(calls)


async def loads_until(started: asyncio.Task[None], port: int) -> bool:
    """Wait until a server has started, and return whether it was seen to load its keys."""
    loads = False
    async with Redis(port=port, retry=Retry(NoBackoff(), 0)) as probe:
        while not started.done():
            try:
                await probe.ping()
            except redis.exceptions.BusyLoadingError:
                loads = True
            except redis.exceptions.ConnectionError:
                pass
            await asyncio.sleep(0.01)
    await started
    return loads


# ---------------------------------------------------------------------- keys of another type


async def plant(own: Keyspace, name: str) -> None:
    """Let the keys of this name, one or one in each partition, hold a string."""
    for key in own.named(name):
        await own.client.set(key, "x", ex=60)


async def test_another_type_under_the_key_of_a_session(shop: SessionStore, own: Keyspace) -> None:
    """A call on a session whose key holds another type raises SessionError, and nothing changes."""
    await plant(own, "{b}")
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
    await plant(own, "user_id:{2}")
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
    await plant(own, "user_id:{1}")
    before = await own.ttl("user_id:{1}")
    assert (await shop.get("a", touch=True))["user_id"] == 1
    assert await shop.touch("a")
    assert await shop.ids_by("ip", "x") == ["a"]
    assert await shop.delete("a")
    assert {await own.client.get(key) for key in own.named("user_id:{1}")} == {"x"}
    assert await own.ttl("user_id:{1}") <= before
    assert await shop.ids_by("ip", "x") == []


async def test_another_type_in_place_of_a_fence(shop: SessionStore, own: Keyspace) -> None:
    """A call that reads a fence of another type fails as a whole."""
    await plant(own, "_fence:user_id:{2}")
    await plant(own, "_fence:user_id:{1}")
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
    layout = shop.operations.layout
    partition = layout.place("a")[1]
    other = layout.mint(partition)
    await own.client.sadd(layout.reference("user_id", 1, partition), other)
    await plant(own, f"{{{other}}}")
    assert await shop.delete_by("user_id", 1) == 1
    assert await own.dump() == {"{a}": {"_ended": "deleted"}, f"{{{other}}}": "string"}


async def test_data_that_cannot_be_read(shop: SessionStore, own: Keyspace) -> None:
    """A field that cannot be decoded raises an error that names the field."""
    await own.client.hset(shop.get_session_key("a"), "n", b"\xff")
    with pytest.raises(SessionError, match="the field 'n' holds data that is not readable") as raised:
        await shop.get("a")
    assert raised.value.__cause__ is None
    assert await shop.get("a", ["ip"]) == {"id": "a", "ip": "x"}


async def test_a_user_without_rights_is_told_the_command(shop: SessionStore, own: Keyspace, url: str) -> None:
    """A missing permission raises an error that names the command, and nothing is written."""
    await everywhere(own.client, "ACL SETUSER", "poor", "reset", "on", ">pw", "~rss:*", "+@all", "-hset")
    options: dict[str, Any] = {"references": ["user_id", "ip"]}
    async with SessionStore.from_url(url.replace("://", "://poor:pw@"), **options) as store:
        assert await store.get("a") != {}
        with pytest.raises(SessionError, match="no permission for .*(hset|of the scripts)") as raised:
            await store.set("a", {"n": 2})
        assert type(raised.value) is SessionError
        assert isinstance(raised.value.__cause__, redis.exceptions.ResponseError)
    assert await shop.get("a", ["n"]) == {"id": "a", "n": 1}


# ---------------------------------------------------------------------- the user's client


@one_server
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


@one_server
async def test_a_client_is_left_as_it_is(url: str, shop: SessionStore) -> None:
    """A store neither configures nor closes the client that it was given; it closes only its own client."""
    await shop.load()
    async with Redis.from_url(url, decode_responses=True) as client:
        kwargs = dict(client.connection_pool.connection_kwargs)
        retry = client.get_retry()
        async with SessionStore(client) as store:
            await store.get("a")
        assert not client.connection_pool._in_use_connections
        assert not client.connection_pool._available_connections
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


@one_server
async def test_a_client_with_one_connection(url: str, shop: SessionStore) -> None:
    """A client with a single connection works, too."""
    del shop
    async with Redis.from_url(url, single_connection_client=True) as client:
        store = SessionStore(client)
        assert await asyncio.gather(*(store.get("a", ["n"]) for _ in range(20))) == [{"id": "a", "n": 1}] * 20


async def test_callers_that_are_cancelled_disturb_nobody(url: str, shop: SessionStore) -> None:
    """After many cancellations every other call has its own reply."""
    ids = [await shop.create({"n": n}) for n in range(50)]
    chance = random.Random(1)
    async with SessionStore.from_url(url) as store:
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


async def test_a_caller_that_is_cancelled_while_loading(shop: SessionStore, own: Keyspace) -> None:
    """If the caller that loads the scripts is cancelled, the other calls still succeed."""
    for _ in range(20):
        await everywhere(own.client, "SCRIPT FLUSH")
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
    await plant(own, "{SECRET-b}")
    errors: list[BaseException] = []
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(everywhere, own.client, "CONFIG SET", "maxmemory", 0)
        await everywhere(own.client, "CONFIG SET", "maxmemory", 1)
        proxy, store = await stack.enter_async_context(behind_proxy(url, timeout=0.3))
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
    while errors:
        error = errors.pop()
        assert "SECRET" not in str(error)
        assert "SECRET" not in repr(error)
        shown = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        errors += [shown] if shown else []
    assert "SECRET" not in caplog.text


async def test_a_server_that_gets_full_while_a_session_moves(url: str, own: Keyspace) -> None:
    """A server without memory refuses a login before anything is written, but not its last script."""
    del own
    references = {"user_id": Reference(identity=True)}
    async with client_of(url) as admin, SessionStore(admin, references=references, partitions=16) as store:
        layout = store.operations.layout
        old = layout.mint((layout.with_value("user_id", 1)[0] + 1) % 16)
        await store.set(old, {"n": 1})
        await everywhere(admin, "CONFIG SET", "maxmemory", 1)
        with pytest.raises(StoreUnavailable, match="OOM"):
            await store.rotate(old, {"user_id": 1})
        assert await store.get(old) == {"id": old, "n": 1}
        await everywhere(admin, "CONFIG SET", "maxmemory", 0)

        async def fill(call: Awaitable[Any]) -> Any:
            ttl = await call
            await store.set(old, {"n": 2})
            await everywhere(admin, "CONFIG SET", "maxmemory", 1)
            return ttl

        with pytest.MonkeyPatch.context() as patch:
            run_at(store, patch, "arrive_with_refs", fill)
            new = await store.rotate(old, {"user_id": 1})
        assert await store.get(new) == {"id": new, "n": 2, "user_id": 1}
        await everywhere(admin, "CONFIG SET", "maxmemory", 0)
