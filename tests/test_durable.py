"""Durable operations: they return when replicas have their writes, so that these survive the loss of the master."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from rss import Reference, SessionError, SessionStore, StoreUnavailable
from rss.testing import free_port
from tests.servers import own_server, proxied, until

Call = Callable[[SessionStore, str], Awaitable[object]]

#: Each durable operation on a session of user 1.
CALLS: dict[str, Call] = {
    "delete": lambda store, i: store.delete(i, durable=1),
    "rotate": lambda store, i: store.rotate(i, {"user_id": 2}, durable=1),
    "delete_by": lambda store, _: store.delete_by("user_id", 1, durable=1),
    "block": lambda store, _: store.block("user_id", 1, "1m", durable=1),
}
LACKS = "it was done, but replicas may lack it: 0 of 1 have it. Call again"
REFERENCES = {"user_id": Reference(identity=True)}


class Servers(NamedTuple):
    """The URL and the port of a master, and the port of its replica."""

    url: str
    master: int
    replica: int


def another(store: SessionStore, url: str) -> SessionStore:
    """Return a store with connections of its own to the same sessions."""
    partitions = store.operations.layout.partitions
    return SessionStore.from_url(
        url, references=REFERENCES, partitions=partitions if partitions > 1 else None, timeout=1
    )


@pytest.fixture(scope="module", name="servers")
def _servers() -> Iterator[Servers]:
    """A master with a replica."""
    master, replica = free_port(), free_port()
    options = ("--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0")
    with (
        own_server("--port", str(master), *options) as url,
        own_server("--port", str(replica), *options, "--replicaof", "127.0.0.1", str(master)),
        SyncRedis(port=master) as admin,
    ):
        admin.set("ready", "yes")
        assert admin.wait(1, 20_000) == 1  # Its first reply comes up to a second after it has connected.
        yield Servers(url, master, replica)


@pytest.fixture(name="master")
async def _master(servers: Servers) -> AsyncIterator[Redis]:
    async with Redis(port=servers.master, decode_responses=True) as master:
        await until(master, "replication", "connected_slaves", 1)
        yield master
        await master.flushall()


@pytest.fixture(name="replica")
async def _replica(servers: Servers) -> AsyncIterator[Redis]:
    async with Redis(port=servers.replica, decode_responses=True) as replica:
        await until(replica, "replication", "master_link_status", "up")
        yield replica


@pytest.fixture(name="store", params=[None, 4], ids=["plain", "partitions"])
async def _store(master: Redis, servers: Servers, request: pytest.FixtureRequest) -> AsyncIterator[SessionStore]:
    """A store on the master. Its deadline is a second, so it waits half a second for replicas."""
    del master
    async with SessionStore.from_url(servers.url, references=REFERENCES, partitions=request.param, timeout=1) as store:
        yield store


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def pid_of(client: Redis) -> int:
    """Return the process id of a server."""
    return int((await client.info("server"))["process_id"])


@pytest.mark.parametrize("name", CALLS)
async def test_a_replica_that_follows(store: SessionStore, replica: Redis, name: str) -> None:
    """The call returns as soon as the replica has its writes."""
    for _ in range(20):
        session_id = await store.create({"user_id": 1})
        await CALLS[name](store, session_id)
        assert await replica.hget(store.get_session_key(session_id), "_ended")
        assert await store.unblock("user_id", 1) == (name == "block")


@pytest.mark.parametrize("name", CALLS)
async def test_a_master_that_is_demoted_while_it_waits(
    store: SessionStore, master: Redis, replica: Redis, name: str
) -> None:
    """The call raises StoreUnavailable, since the write may be lost with the master."""
    session_id = await store.create({"user_id": 1})
    try:
        with stopped(await pid_of(replica)):
            call = asyncio.ensure_future(CALLS[name](store, session_id))
            while await store.get(session_id):
                await asyncio.sleep(0)
            await master.replicaof("127.0.0.1", str(free_port()))
            with pytest.raises(StoreUnavailable) as raised:
                await call
            assert str(raised.value) == "it was done, but replicas may lack it: call again"
            assert "UNBLOCKED" in str(raised.value.__cause__)
    finally:
        await master.replicaof("NO", "ONE")


@pytest.mark.parametrize("name", CALLS)
async def test_a_replica_that_stands_still(store: SessionStore, replica: Redis, name: str) -> None:
    """The call raises StoreUnavailable, which says that it was done. Other calls do not wait for it."""
    session_id, other = await store.create({"user_id": 1}), await store.create({"user_id": 5})
    with stopped(await pid_of(replica)):
        call = asyncio.ensure_future(CALLS[name](store, session_id))
        while await store.get(session_id):
            await asyncio.sleep(0)
        assert await store.get(other)
        assert await store.ids_by("user_id", 5) == [other]
        assert await store.delete(other)
        assert not call.done()
        with pytest.raises(StoreUnavailable) as raised:
            await call
        assert str(raised.value) == LACKS
    assert await store.ended(session_id)


@pytest.mark.parametrize("name", ["delete", "delete_by", "block"])
async def test_a_call_that_is_repeated(
    store: SessionStore, servers: Servers, master: Redis, replica: Redis, name: str
) -> None:
    """A call that finds its work done returns only when the replica has it, also on another connection."""
    assert master
    session_id = await store.create({"user_id": 1})
    async with another(store, servers.url) as other:
        with stopped(await pid_of(replica)):
            for one in (store, other, other):
                with pytest.raises(StoreUnavailable, match=LACKS):
                    await CALLS[name](one, session_id)
        assert not await CALLS[name](other, session_id)
        assert await replica.hget(store.get_session_key(session_id), "_ended")


async def test_a_lost_reply(store: SessionStore, servers: Servers, replica: Redis) -> None:
    """A call that is retried on another connection, and finds its work done, waits for the replica too."""
    ids = [await store.create({"user_id": 1}) for _ in range(2)]
    async with proxied(servers.url) as (proxy, address), another(store, address) as other:
        assert await other.get(ids[0])
        with stopped(await pid_of(replica)):
            proxy.swallow = 1
            with pytest.raises(StoreUnavailable, match=LACKS):
                await other.delete(ids[0], durable=1)
        proxy.swallow = 1
        assert not await other.delete(ids[1], durable=1)  # The second run found no session.
    for session_id in ids:
        assert await replica.hget(store.get_session_key(session_id), "_ended") == "deleted"


async def test_many_calls_share_one_wait(store: SessionStore, master: Redis) -> None:
    """Fifty durable calls at once wait for the replica a few times."""
    ids = [await store.create({"user_id": 1}) for _ in range(50)]
    await master.config_resetstat()
    assert all(await asyncio.gather(*(store.delete(session_id, durable=1) for session_id in ids)))
    assert (await master.info("commandstats"))["cmdstat_wait"]["calls"] <= 3


async def test_more_replicas_than_there_are(store: SessionStore) -> None:
    """The error says how many replicas have the writes."""
    session_id = await store.create({"user_id": 1})
    with pytest.raises(StoreUnavailable, match="replicas may lack it: 1 of 3 have it"):
        await store.delete(session_id, durable=3)
    assert await store.ended(session_id) == "deleted"


async def test_a_session_that_is_not_there(store: SessionStore) -> None:
    """A durable call on a session that is absent has the same result as any other."""
    assert await store.delete("nobody", durable=1) is False
    assert await store.delete_by("user_id", 9, durable=1) == 0
    with pytest.raises(SessionError, match="there is no such session"):
        await store.rotate("nobody", durable=1)


async def test_nothing_is_left_of_the_waiting(store: SessionStore, master: Redis) -> None:
    """A durable call leaves no key of its own."""
    session_id = await store.create({"user_id": 1})
    assert await store.delete(session_id, durable=1)
    while len(keys := await master.keys("*")) > 2:  # The session, and the key that describes the store.
        await asyncio.sleep(0.01)
    assert store.get_session_key(session_id) in keys


async def test_scripts_that_are_gone(store: SessionStore, master: Redis) -> None:
    """Scripts that are missing are loaded again."""
    session_id = await store.create({"user_id": 1})
    await master.script_flush()
    assert await store.delete(session_id, durable=1)


async def test_a_full_server(store: SessionStore, master: Redis) -> None:
    """A full server cannot make a call durable; the call says so, and is done."""
    session_id = await store.create({"user_id": 1})
    await master.config_set("maxmemory", "1")
    try:
        with pytest.raises(StoreUnavailable, match="it was done, but replicas may lack it: call again"):
            await store.delete(session_id, durable=1)
        assert await store.ended(session_id) == "deleted"
    finally:
        await master.config_set("maxmemory", "0")


@pytest.mark.parametrize("command", ["wait", "set"])
async def test_a_user_who_may_not_wait(store: SessionStore, servers: Servers, master: Redis, command: str) -> None:
    """An error names the command WAIT, or SET, if the user has no right to it."""
    rule = "reset", "on", ">secret", "~*", "+@all", f"-{command}"
    await master.execute_command("ACL", "SETUSER", "app", *rule)  # type: ignore[no-untyped-call]
    session_id = await store.create({"user_id": 1})
    async with another(store, f"redis://app:secret@127.0.0.1:{servers.master}") as other:
        with pytest.raises(SessionError, match=f"no permission for the command {command}"):
            await other.delete(session_id, durable=1)
    assert await store.ended(session_id) == "deleted"
