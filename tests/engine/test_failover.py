"""When a master is replaced, writes go to the new one, and none runs twice."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel

from rss import SessionStore, StoreUnavailable
from rss.engine.channel import Listener
from rss.testing import ClusterServer, cluster, free_port
from tests.engine.callers import outcomes
from tests.servers import own_server, sentinel, serving, until


async def _begin_to_count(
    store: SessionStore, replica: Redis, done: asyncio.Event, counted: list[bool]
) -> list[asyncio.Task[None]]:
    """Let five tasks count in a session, and return them when the replica has it."""
    await store.set("a", {"n": 0})
    counting = [asyncio.create_task(_count(store, done, counted)) for _ in range(5)]
    while len(counted) < 50:
        await asyncio.sleep(0.01)
    while await replica.hget("rss:{a}", "n") is None:
        await asyncio.sleep(0.01)
    return counting


async def _count(store: SessionStore, until_done: asyncio.Event, outcomes: list[bool], pause: float = 0.005) -> None:
    """Increment a field of session "a" until the event is set. A failed increment may have been counted."""
    while not until_done.is_set():
        try:
            await store.increment("a", "n")
        except StoreUnavailable as error:
            assert "not known what was done" in str(error)  # noqa: PT017 - both outcomes are allowed
            outcomes.append(False)
        else:
            outcomes.append(True)
        await asyncio.sleep(pause)


REPLICATED = ("--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0")


async def test_a_master_that_is_demoted(url: str) -> None:
    """Writes reach the new master behind a proxy, although old connections stay open, and none runs twice."""
    del url
    ports = [free_port(), free_port()]
    target = ports[0]

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", target)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    sink.write(data)

        pumps = [asyncio.ensure_future(pump(reader, back)), asyncio.ensure_future(pump(there, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in pumps:
                one.cancel()
            back.close()

    async with (
        replicated_pair(ports) as (first, second),
        serving(relay) as port,
        SessionStore.from_url(f"redis://127.0.0.1:{port}", references=["user_id"], timeout=40) as store,
    ):
        assert await store.ids_by("user_id", 7) == []
        done, counted = asyncio.Event(), list[bool]()
        counting = await _begin_to_count(store, second, done, counted)
        # For a moment no master accepts writes. Then the replica takes over.
        await first.replicaof("127.0.0.1", str(ports[0]))
        await until(first, "replication", "role", "slave")
        acknowledged = len(counted)
        await second.replicaof("NO", "ONE")
        target = ports[1]
        while len(counted) < acknowledged + 50:
            await asyncio.sleep(0.01)
        done.set()
        await outcomes(counting)
        # The channel of the pages was idle, and still led to the old master.
        session_id = await store.create({"user_id": 7})
        assert await store.ids_by("user_id", 7) == [session_id]
        assert all(counted)  # Refused calls were retried, so each ran once.
        assert (await store.get("a", ["n"]))["n"] <= len(counted)
        assert await second.hget("rss:{a}", "n") == str((await store.get("a", ["n"]))["n"]).encode()


@contextlib.asynccontextmanager
async def replicated_pair(ports: Sequence[int]) -> AsyncIterator[tuple[Redis, Redis]]:
    """Start a master and its replica, and yield clients of both."""
    with (
        own_server("--port", str(ports[0]), *REPLICATED),
        own_server("--port", str(ports[1]), *REPLICATED, "--replicaof", "127.0.0.1", str(ports[0])),
    ):
        async with Redis(port=ports[0]) as first, Redis(port=ports[1]) as second:
            await until(second, "replication", "master_link_status", "up")
            yield first, second


@contextlib.asynccontextmanager
async def watched(folder: Path, master: int) -> AsyncIterator[tuple[Redis, Redis]]:
    """Let a sentinel watch the master on a port, and yield a client of the sentinel and one of the master."""
    with sentinel(folder, master) as port:
        sentinels = Sentinel([("127.0.0.1", port)])  # type: ignore[no-untyped-call]
        async with Redis(port=port, decode_responses=True) as guard, sentinels.master_for("main") as client:
            yield guard, client
        for one in sentinels.sentinels:
            await one.aclose()


async def test_a_failover_by_sentinels(tmp_path: Path) -> None:
    """After a failover by sentinels, writes go to the new master, and no increment is counted twice."""
    ports = [free_port(), free_port()]
    async with (
        replicated_pair(ports) as (first, second),
        # A sentinel asks a master for its replicas when the watch begins, and then only every ten seconds.
        watched(tmp_path, ports[0]) as (guard, client),
    ):
        store = SessionStore(client, timeout=40)
        done, counted = asyncio.Event(), list[bool]()
        counting = await _begin_to_count(store, second, done, counted)
        await _fail_over(guard, second)
        await until(first, "replication", "role", "slave")
        await until(first, "replication", "master_link_status", "up")
        done.set()
        await outcomes(counting, within=50)
        # Until it is demoted, the old master acknowledges writes that are lost with it.
        assert await store.increment("a", "n") <= len(counted) + 1
        assert await second.hget("rss:{a}", "n") == str((await store.get("a", ["n"]))["n"]).encode()
        await store.aclose()


async def test_a_master_that_is_replaced_but_lives(tmp_path: Path) -> None:
    """Writes soon go to the new master, although the old one lives, is no replica, and keeps its connections open."""
    ports = [free_port(), free_port()]
    with own_server("--port", str(ports[0]), *REPLICATED), own_server("--port", str(ports[1]), *REPLICATED):
        async with (
            Redis(port=ports[0]) as first,
            Redis(port=ports[1]) as second,
            watched(tmp_path, ports[0]) as (guard, client),
        ):
            store = SessionStore(client, timeout=20)
            done, acknowledged = asyncio.Event(), list[bool]()
            await store.set("a", {"n": 0})
            counting = [asyncio.create_task(_count(store, done, acknowledged, pause=0)) for _ in range(5)]
            while len(acknowledged) < 50:
                await asyncio.sleep(0.01)
            await second.hset("rss:{a}", mapping={"id": "a", "n": 0})
            await second.expire("rss:{a}", 600)
            await guard.sentinel_remove("main")
            await guard.sentinel_monitor("main", "127.0.0.1", ports[1], 1)
            async with asyncio.timeout(10):
                while await second.hget("rss:{a}", "n") == b"0":
                    await asyncio.sleep(0.01)
            lost, before = await first.hget("rss:{a}", "n"), len(acknowledged)
            while len(acknowledged) < before + 50:
                await asyncio.sleep(0.01)
            done.set()
            await outcomes(counting)
            assert await first.hget("rss:{a}", "n") == lost
            assert all(acknowledged)
            await store.aclose()


async def test_a_sentinel_that_has_not_heard_of_the_failover(tmp_path: Path) -> None:
    """Connections go to the master of the last failover, although another sentinel comes first and names the old one.

    Writes, reads and events leave the old master, which lives and keeps its connections open.
    """
    ports = [free_port(), free_port()]
    for name in ("late", "newest"):
        (tmp_path / name).mkdir()
    with contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(own_server("--port", str(port), *REPLICATED))
        late = stack.enter_context(sentinel(tmp_path / "late", ports[0]))
        newest = free_port()
        sentinels = Sentinel([("127.0.0.1", late), ("127.0.0.1", newest)])  # type: ignore[no-untyped-call]
        async with (
            Redis(port=ports[1]) as second,
            sentinels.master_for("main") as client,
            SessionStore(client, references=["user_id"], timeout=20, events=True) as store,
            store.events() as events,
        ):
            await store.create({"user_id": 1})
            assert (await anext(events)).kind == "created"
            assert len(await store.ids_by("user_id", 1)) == 1
            stack.enter_context(sentinel(tmp_path / "newest", ports[1], newest, epoch=7))
            async with asyncio.timeout(20):
                while await second.dbsize() == 0:
                    await store.create({"user_id": 2})
                    await asyncio.sleep(0.05)
                while (await anext(events)).kind != "gap":
                    pass
            session_id = await store.create({"user_id": 3})
            assert await second.exists(store.get_session_key(session_id))
            assert await store.ids_by("user_id", 3) == [session_id]
            async with asyncio.timeout(20):
                while (await anext(events)).session_id != session_id:
                    pass
        for one in sentinels.sentinels:
            await one.aclose()


async def test_no_cancellation_is_lost(tmp_path: Path) -> None:
    """A connection that is being made, by the advice of a sentinel, is given up whenever its task is cancelled."""
    port, cancelled = free_port(), 0
    with own_server("--port", str(port), *REPLICATED):
        async with watched(tmp_path, port) as (_, client), SessionStore(client, timeout=20) as store:
            node = store.operations.engine.servers.owners[0]
            for turns in range(300):
                task = asyncio.create_task(node.open(Listener()))
                for _ in range(turns % 100):
                    await asyncio.sleep(0)
                if not task.cancel():
                    task.result().close()
                    continue
                await asyncio.wait([task])
                assert task.cancelled()
                cancelled += 1
    assert cancelled > 30


class Writers:
    """Tasks that each write a session of its own again and again, and find what was acknowledged."""

    def __init__(self, store: SessionStore, ids: list[str]) -> None:
        self.acknowledged = dict.fromkeys(ids, 0)
        self._store = store
        self._done = asyncio.Event()
        self._tasks = [asyncio.create_task(self._write(session_id)) for session_id in ids]

    async def _write(self, session_id: str) -> None:
        while not self._done.is_set():
            found = await self._store.get(session_id, ["n"])
            assert found == {"id": session_id, "n": self.acknowledged[session_id]}
            await self._store.set(session_id, {"n": self.acknowledged[session_id] + 1}, create=False)
            self.acknowledged[session_id] += 1

    async def until_all_have_written(self) -> None:
        """Wait until each task has written ten times more, or failed."""
        goal = {session_id: n + 10 for session_id, n in self.acknowledged.items()}
        while any(self.acknowledged[session_id] < n for session_id, n in goal.items()):
            if any(task.done() for task in self._tasks):
                return
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Stop the tasks. Fails if one of them did not find what was acknowledged."""
        self._done.set()
        await asyncio.gather(*self._tasks)


Info = Callable[[str], Awaitable[dict[str, Any]]]


async def until_replicated(master: Info, replica: Info) -> None:
    """Wait until a replica has all writes of its master. New ones must be paused.

    A master acknowledges a write before its replica has it. If it stopped in between, the write would be lost rightly.
    """
    async with asyncio.timeout(10):
        while (await replica("replication"))["slave_repl_offset"] < (await master("replication"))["master_repl_offset"]:
            await asyncio.sleep(0.001)


async def _info(server: ClusterServer, section: str) -> dict[str, Any]:
    return await asyncio.to_thread(server.info, section)


@pytest.mark.parametrize("pause", [0, 1.5], ids=["nobody has asked", "somebody has asked"])
async def test_a_master_that_wakes_up_replaced(tmp_path: Path, pause: float) -> None:
    """No write is lost that a master acknowledges after a pause, if the sentinels have another master by then."""
    ports = [free_port(), free_port()]
    async with (
        replicated_pair(ports) as (first, second),
        watched(tmp_path, ports[0]) as (guard, client),
        SessionStore(client, timeout=20) as store,
    ):
        writers = Writers(store, [await store.create({"n": 0}) for _ in range(40)])
        await writers.until_all_have_written()
        process = (await first.info("server"))["process_id"]
        await first.client_pause(500, all=False)
        await until_replicated(first.info, second.info)
        os.kill(process, signal.SIGSTOP)
        try:
            await asyncio.sleep(0.1)  # Calls are in flight.
            await second.replicaof("NO", "ONE")
            await guard.sentinel_remove("main")
            await guard.sentinel_monitor("main", "127.0.0.1", ports[1], 1)
            time.sleep(0.6)  # noqa: ASYNC251 - the store must not ask the sentinels before the replies come
            await asyncio.sleep(pause)  # Now it may.
        finally:
            os.kill(process, signal.SIGCONT)
        key = store.get_session_key(next(iter(writers.acknowledged)))
        held = await second.hget(key, "n")
        async with asyncio.timeout(10):
            while await second.hget(key, "n") == held:  # Until the store has changed over.
                await asyncio.sleep(0.01)
        await writers.until_all_have_written()
        await writers.stop()


async def test_a_connection_that_a_stopped_master_accepts_later(tmp_path: Path) -> None:
    """A connection that was being made when the master was replaced is not used when the old one goes on."""
    ports = [free_port(), free_port()]
    async with (
        replicated_pair(ports) as (first, second),
        watched(tmp_path, ports[0]) as (guard, client),
        SessionStore(client, references=["user_id"], timeout=20) as store,
    ):
        await store.create({"user_id": 1})
        process = (await first.info("server"))["process_id"]
        os.kill(process, signal.SIGSTOP)
        try:
            writing = asyncio.create_task(store.create({"user_id": 2}))
            reading = asyncio.create_task(store.ids_by("user_id", 2))  # The first call of this kind connects.
            await asyncio.sleep(0.6)  # Now the channel of the write is silent.
            await second.replicaof("NO", "ONE")
            await guard.sentinel_remove("main")
            await guard.sentinel_monitor("main", "127.0.0.1", ports[1], 1)
            ids = {await writing}
        finally:
            os.kill(process, signal.SIGCONT)
        await reading
        for _ in range(20):
            ids.add(await store.create({"user_id": 2}))
            assert set(await store.ids_by("user_id", 2)) == ids
            await asyncio.sleep(0.02)
        assert await second.scard(store.get_reference_key("user_id", 2)) == len(ids)


async def test_a_master_of_a_cluster_that_wakes_up_replaced() -> None:
    """No write is lost that a master acknowledges after a pause in which its replica took over."""
    with cluster(3, 1) as servers:
        async with SessionStore.from_url(servers.url, timeout=20) as store:
            writers = Writers(store, [await store.create({"n": 0}) for _ in range(60)])
            await writers.until_all_have_written()
            victim = servers.servers[0]
            victim("CLIENT", "PAUSE", 500, "WRITE")
            replica = next(one for one in servers.servers if one.info("replication").get("master_port") == victim.port)
            await until_replicated(partial(_info, victim), partial(_info, replica))
            victim.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(0.1)  # Calls are in flight.
                while victim.port in {row[2][1] for row in servers.servers[1]("CLUSTER", "SLOTS")}:
                    time.sleep(0.01)  # noqa: ASYNC251 - the store must not look at the topology before the replies come
            finally:
                victim.signal(signal.SIGCONT)
            await writers.until_all_have_written()
            await writers.stop()


async def test_durable_revocations_survive_the_master(tmp_path: Path) -> None:
    """A revocation that was acknowledged as durable is one on the new master too, when the old one is killed."""
    ports = [free_port(), free_port()]
    async with replicated_pair(ports) as (first, second), watched(tmp_path, ports[0]) as (guard, client):
        store = SessionStore(client, references=["user_id"], timeout=8)
        ids = [await store.create({"user_id": n}) for n in range(400)]
        ended, killed = list[str](), asyncio.Event()

        async def revoke(ids: list[str]) -> None:
            for session_id in ids:
                # After a retry it may not know that it was the one that ended the session.
                await store.delete(session_id, durable=1)
                ended.append(session_id)
                if killed.is_set():
                    return

        revoking = [asyncio.create_task(revoke(ids[n::4])) for n in range(4)]
        while len(ended) < 100:
            await asyncio.sleep(0)
        while not (await guard.sentinel_slaves("main")):
            await asyncio.sleep(0.05)
        server = await first.info("server")
        os.kill(server["process_id"], signal.SIGKILL)
        killed.set()
        await outcomes(revoking, within=50)
        await until(second, "replication", "role", "master")
        held = [await second.hget(store.get_session_key(session_id), "_ended") for session_id in ended]
        assert held == [b"deleted"] * len(ended)
        assert 100 <= len(ended) <= len(ids)
        await store.aclose()


async def _fail_over(guard: Redis, replica: Redis) -> None:
    """Ask a sentinel for a failover until the replica is the master: a sentinel may refuse it, or give it up."""
    async with asyncio.timeout(50):
        while (await replica.info("replication"))["role"] != "master":
            with contextlib.suppress(redis.exceptions.RedisError):
                await guard.execute_command("SENTINEL", "FAILOVER", "main")  # type: ignore[no-untyped-call]
            await asyncio.sleep(0.1)
