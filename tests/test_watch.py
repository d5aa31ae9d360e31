"""Waiting for the end of a session: callers are told at once, through one connection, and never miss it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster

from rss import Reference, SessionError, SessionStore, StoreUnavailable
from rss.testing import Cluster, cluster, free_port
from tests.keyspace import Keyspace
from tests.servers import client_of, connections, everywhere, own_server

on_both = pytest.mark.parametrize(("client", "keyspace"), [({}, None), ("cluster", "cluster")], indirect=True)


@pytest.fixture(name="store")
async def _store(client: Redis | RedisCluster, keyspace: Keyspace) -> AsyncIterator[SessionStore]:
    references = {"user_id": Reference(identity=True)}
    store = SessionStore(client, references=references, prefix=keyspace.prefix, timeout=20)
    yield store
    await store.aclose()


async def waiting(store: SessionStore, *ids: str) -> list[asyncio.Task[str]]:
    """Begin to wait for the ends of sessions, and return when Redis knows that."""
    tasks = [asyncio.create_task(store.wait_ended(session_id)) for session_id in ids]
    # The connection answers in order. So if a session that is absent is told, all that came before it are watched.
    async with asyncio.timeout(20):
        for number in range(store.operations.layout.partitions):
            await store.wait_ended(f"absent-{number}")
    return tasks


async def reasons(tasks: list[asyncio.Task[str]]) -> list[str]:
    """Return what the callers were told."""
    async with asyncio.timeout(20):
        return await asyncio.gather(*tasks)


ENDS: dict[str, tuple[Callable[[SessionStore, str], Awaitable[object]], str]] = {
    "delete": (lambda store, one: store.delete(one, reason="bye"), "bye"),
    "delete_by": (lambda store, _: store.delete_by("user_id", 1, reason="password"), "password"),
    "block": (lambda store, _: store.block("user_id", 1, "1s"), "blocked"),
    "rotate": (lambda store, one: store.rotate(one), "rotated"),
    "rotate with grace": (lambda store, one: store.rotate(one, grace="1m"), "rotated"),
    "a login that moves it": (lambda store, one: store.rotate(one, {"user_id": 2}), "rotated"),
    "expire": (lambda store, one: store.touch(one, "20ms"), "expired"),
}


@on_both
@pytest.mark.parametrize(("end", "reason"), ENDS.values(), ids=ENDS)
async def test_the_reason_of_an_end(
    store: SessionStore, end: Callable[[SessionStore, str], Awaitable[object]], reason: str
) -> None:
    """A caller is told the reason when the session ends, and not when it is only written to."""
    session_id, other = await store.create({"user_id": 1}), await store.create({"user_id": 3})
    tasks = await waiting(store, session_id, session_id, other)
    for number in range(3):
        await store.set(session_id, {"n": number})
    await store.touch(session_id)
    assert not any(task.done() for task in tasks)
    await end(store, session_id)
    assert await reasons(tasks[:2]) == [reason] * 2
    assert not tasks[2].done()
    tasks[2].cancel()


@on_both
async def test_a_session_that_is_gone(store: SessionStore) -> None:
    """A caller is told at once if the session has ended before, has expired, or never was."""
    session_id = await store.create()
    await store.delete(session_id, reason="bye")
    async with asyncio.timeout(20):
        assert await store.wait_ended(session_id) == "bye"
        assert await store.wait_ended("never") == "expired"


@on_both
async def test_many_callers_share_a_connection(store: SessionStore, client: Redis | RedisCluster) -> None:
    """A thousand callers use one connection to each server, which is closed when the last of them is gone."""
    before = len(await connections(client))
    ids = await asyncio.gather(*(store.create({"user_id": 1}) for _ in range(1000)))
    opened = len(await connections(client)) - before
    tasks = await waiting(store, *ids)
    masters = len(await everywhere(client, "CLIENT ID"))
    assert len(await connections(client)) - before - opened <= masters
    await store.delete_by("user_id", 1)
    assert await reasons(tasks) == ["deleted"] * 1000
    async with asyncio.timeout(20):
        while len(await connections(client)) - before > opened + 2 * masters:  # Pages have their own connections.
            await asyncio.sleep(0.01)


@on_both
async def test_an_end_while_the_connection_is_cut(store: SessionStore, client: Redis | RedisCluster) -> None:
    """If the connection breaks, sessions are looked at again, so no end is missed."""
    ids = [await store.create({"user_id": number}) for number in range(40)]
    tasks = await waiting(store, *ids)
    for number, session_id in enumerate(ids):
        if number % 8 == 0:
            await everywhere(client, "CLIENT KILL TYPE normal")
        await store.delete(session_id, reason=f"r{number}")
    assert await reasons(tasks) == [f"r{number}" for number in range(40)]


@on_both
async def test_a_cancelled_caller_leaves_nothing(store: SessionStore) -> None:
    """Callers that are cancelled, also while the connection is made, leave no task, and others still wait."""
    session_id = await store.create()
    early = asyncio.create_task(store.wait_ended(session_id))
    await asyncio.sleep(0)
    early.cancel()
    await asyncio.wait([early])
    tasks = await waiting(store, session_id, session_id)
    tasks[0].cancel()
    await asyncio.wait([tasks[0]])
    await store.delete(session_id)
    assert await reasons(tasks[1:]) == ["deleted"]
    await asyncio.sleep(0.1)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_server_that_restarts() -> None:
    """While the server is away, callers wait. A session that it has lost is "expired"."""
    port = free_port()
    store = SessionStore.from_url(f"redis://127.0.0.1:{port}", timeout=20)
    with own_server("--port", str(port)):
        session_id = await store.create()
        tasks = await waiting(store, session_id)
    await asyncio.sleep(0.2)
    assert not tasks[0].done()
    with own_server("--port", str(port)):
        assert await reasons(tasks) == ["expired"]
        await store.aclose()


async def test_a_store_that_closes(store: SessionStore) -> None:
    """Callers get an error when the store is closed, and a closed store refuses to wait."""
    tasks = await waiting(store, await store.create())
    await store.aclose()
    with pytest.raises(StoreUnavailable, match="the store was closed"):
        await tasks[0]
    with pytest.raises(RuntimeError, match="the store is closed"):
        await store.wait_ended("a")


async def test_flushed_keys() -> None:
    """If Redis cannot say which keys have changed, all are looked at."""
    with own_server() as url:
        async with client_of(url) as client:
            store = SessionStore(client, timeout=20)
            tasks = await waiting(store, await store.create())
            await client.flushall()
            assert await reasons(tasks) == ["expired"]
            await store.aclose()


async def test_a_user_without_the_right(url: str) -> None:
    """A user that may not use CLIENT TRACKING is told so."""
    async with client_of(url) as admin:
        rights = ["on", ">pw", "~*", "+@all", "-client|tracking"]
        try:
            await admin.execute_command("ACL", "SETUSER", "poor", "reset", *rights)
        except Exception:  # noqa: BLE001 - Redis 6.2 knows no subcommands here
            pytest.skip("this server cannot forbid a subcommand")
        store = SessionStore.from_url(url.replace("://", "://poor:pw@"))
        session_id = await store.create()
        with pytest.raises(SessionError, match="no permission for"):
            await store.wait_ended(session_id)
        await store.aclose()


async def test_a_user_that_may_not_ping(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is checked by a command. A refusal of that shows that the server answers."""
    monkeypatch.setattr("rss.engine.watch._EVERY", 0.01)
    async with client_of(url) as admin:
        await admin.execute_command("ACL", "SETUSER", "poor", "reset", "on", ">pw", "~*", "+@all", "-ping")
        store = SessionStore.from_url(url.replace("://", "://poor:pw@"))
        session_id = await store.create()
        tasks = await waiting(store, session_id)
        before = {one["id"] for one in await connections(admin)}
        await asyncio.sleep(0.1)
        assert {one["id"] for one in await connections(admin)} == before
        await store.delete(session_id)
        assert await reasons(tasks) == ["deleted"]
        await store.aclose()
        await admin.execute_command("ACL", "DELUSER", "poor")


async def test_a_session_whose_slot_moves(servers: Cluster, keyspace: Keyspace) -> None:
    """Callers are told by the master that has the slot then, after a migration and after a failover of clients."""
    async with SessionStore.from_url(servers.url, prefix=keyspace.prefix, timeout=20) as store:
        layout: Any = store.operations.layout
        ids = [layout.mint(3) for _ in range(5)]
        for session_id in ids:
            await store.set(session_id, {"n": 1})
        tasks = await waiting(store, *ids)
        slot = layout.slots[3]
        owner = servers.owner(slot)
        target = next(server for server in servers.servers if server is not owner)
        await asyncio.to_thread(servers.migrate, slot, target)
        assert not any(task.done() for task in tasks)
        for session_id in ids:
            await store.delete(session_id, reason="moved-on")
        assert await reasons(tasks) == ["moved-on"] * 5
        await asyncio.to_thread(servers.migrate, slot, owner)


@on_both
async def test_a_caller_after_a_cancelled_one(store: SessionStore) -> None:
    """If the last caller is cancelled while the connection is made, the next one is served."""
    for _ in range(5):
        first = asyncio.create_task(store.wait_ended("a"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        first.cancel()
        async with asyncio.timeout(20):
            assert await store.wait_ended("never") == "expired"


async def test_a_key_of_another_type_disturbs_no_other_caller(store: SessionStore, keyspace: Keyspace) -> None:
    """A caller whose key holds other data is told so, and others wait on."""
    session_id = await store.create()
    tasks = await waiting(store, session_id)
    await keyspace.client.set(store.get_session_key("bad"), "x", ex=60)
    with pytest.raises(SessionError, match="another type of data"):
        await store.wait_ended("bad")
    assert not tasks[0].done()
    await store.delete(session_id)
    assert await reasons(tasks) == ["deleted"]


async def test_a_master_that_dies() -> None:
    """If a replica takes over, callers wait on, and are told by the new master."""
    with cluster(3, 1) as own:
        async with SessionStore.from_url(own.url, timeout=20) as store:
            ids = [await store.create({"n": number}) for number in range(30)]
            tasks = await waiting(store, *ids)
            victim = own.servers[0]
            await asyncio.to_thread(victim.kill)
            async with asyncio.timeout(60):
                for session_id in ids:
                    assert await store.get(session_id)
                assert not any(task.done() for task in tasks)
                for session_id in ids:
                    await store.delete(session_id)
                assert await asyncio.gather(*tasks) == ["deleted"] * 30
