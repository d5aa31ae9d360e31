"""When a master is replaced, writes go to the new one, and none runs twice."""

import asyncio
import contextlib
from pathlib import Path

import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel

from rss import SessionStore, StoreUnavailable
from tests.engine.callers import outcomes
from tests.servers import free_port, own_server, sentinel, serving, until


async def _count(store: SessionStore, until_done: asyncio.Event, outcomes: list[bool]) -> None:
    """Increment a field of session "a" until the event is set. A failed increment may have been counted."""
    while not until_done.is_set():
        try:
            await store.increment("a", "n")
        except StoreUnavailable as error:
            assert "not known what was done" in str(error)  # noqa: PT017 - both outcomes are allowed
            outcomes.append(False)
        else:
            outcomes.append(True)
        await asyncio.sleep(0.005)


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

    with (
        own_server("--port", str(ports[0]), *REPLICATED),
        own_server("--port", str(ports[1]), *REPLICATED, "--replicaof", "127.0.0.1", str(ports[0])),
    ):
        async with serving(relay) as port, Redis(port=ports[0]) as first, Redis(port=ports[1]) as second:
            await until(second, "replication", "master_link_status", "up")
            async with SessionStore.from_url(f"redis://127.0.0.1:{port}", timeout=40) as store:
                await store.set("a", {"n": 0})
                done, counted = asyncio.Event(), list[bool]()
                counting = [asyncio.create_task(_count(store, done, counted)) for _ in range(5)]
                while len(counted) < 50:
                    await asyncio.sleep(0.01)
                while await second.hget("rss:{a}", "n") is None:
                    await asyncio.sleep(0.01)
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
                assert all(counted)  # Refused calls were retried, so each ran once.
                assert (await store.get("a", ["n"]))["n"] <= len(counted)
                assert await second.hget("rss:{a}", "n") == str((await store.get("a", ["n"]))["n"]).encode()


async def test_a_failover_by_sentinels(tmp_path: Path) -> None:
    """After a failover by sentinels, writes go to the new master, and no increment is counted twice."""
    ports = [free_port(), free_port()]
    with (
        own_server("--port", str(ports[0]), *REPLICATED),
        own_server("--port", str(ports[1]), *REPLICATED, "--replicaof", "127.0.0.1", str(ports[0])),
    ):
        async with Redis(port=ports[0]) as first, Redis(port=ports[1]) as second:
            await until(second, "replication", "master_link_status", "up")
            # A sentinel asks a master for its replicas when the watch begins, and then only every ten seconds.
            with sentinel(tmp_path, ports[0]) as watch:
                sentinels = Sentinel([("127.0.0.1", watch)])  # type: ignore[no-untyped-call]
                async with Redis(port=watch, decode_responses=True) as guard, sentinels.master_for("main") as client:
                    store = SessionStore(client, timeout=40)
                    await store.set("a", {"n": 0})
                    done, counted = asyncio.Event(), list[bool]()
                    counting = [asyncio.create_task(_count(store, done, counted)) for _ in range(5)]
                    while len(counted) < 50:
                        await asyncio.sleep(0.01)
                    while await second.hget("rss:{a}", "n") is None:
                        await asyncio.sleep(0.01)
                    await _fail_over(guard)
                    await until(first, "replication", "role", "slave")
                    await until(second, "replication", "role", "master")
                    await until(first, "replication", "master_link_status", "up")
                    done.set()
                    await outcomes(counting, within=50)
                    # Until it is demoted, the old master acknowledges writes that are lost with it.
                    assert await store.increment("a", "n") <= len(counted) + 1
                    assert await second.hget("rss:{a}", "n") == str((await store.get("a", ["n"]))["n"]).encode()
                    await store.aclose()
                for one in sentinels.sentinels:
                    await one.aclose()


async def _fail_over(guard: Redis) -> None:
    """Ask a sentinel for a failover until it knows the replica, and agrees."""
    async with asyncio.timeout(40):
        while True:
            with contextlib.suppress(redis.exceptions.RedisError):
                await guard.execute_command("SENTINEL", "FAILOVER", "main")  # type: ignore[no-untyped-call]
                return
            await asyncio.sleep(0.05)
