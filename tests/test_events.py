"""Events: every process learns what happens to sessions, each thing once, or that it may have missed some."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster

from rss import Reference, SessionError, SessionStore, StoreUnavailable
from rss.events import Event
from rss.testing import Cluster
from tests.keyspace import Keyspace
from tests.servers import client_of, everywhere, own_server

on_both = pytest.mark.parametrize(("client", "keyspace"), [({}, None), ({}, 16), ("cluster", "cluster")], indirect=True)

REFERENCES = {"user_id": Reference(identity=True, limit=3), "ip": Reference()}
#: How many sessions are made and ended while connections are cut.
LOGINS = 800


@pytest.fixture(name="store")
async def _store(client: Redis | RedisCluster, keyspace: Keyspace) -> AsyncIterator[SessionStore]:
    """A store with events."""
    store = SessionStore(
        client,
        references=REFERENCES,
        prefix=keyspace.prefix,
        partitions=keyspace.partitions,
        timeout=20,
        events=True,
    )
    yield store
    await store.aclose()


class Reader:
    """Collects the events of a store."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.task: asyncio.Task[None] | None = None

    async def read(self, events: AsyncIterator[Event]) -> None:
        """Collect events for ever."""
        async for event in events:
            self.events.append(event)

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait for events."""
        async with asyncio.timeout(20):
            while not done():
                if self.task and self.task.done():
                    self.task.result()  # It has failed.
                await asyncio.sleep(0.01)

    async def told(self, count: int) -> list[Event]:
        """Return the events since the last call, when there are so many. Fails if there are more."""
        await self.until(lambda: len(self.events) >= count)
        await asyncio.sleep(0.05)  # A moment for an event too many.
        assert len(self.events) == count
        events, self.events = self.events, []
        return events


@asynccontextmanager
async def reading(store: SessionStore) -> AsyncIterator[Reader]:
    """Collect the events of a store meanwhile."""
    reader = Reader()
    async with store.events() as events:
        task = reader.task = asyncio.create_task(reader.read(events))
        try:
            yield reader
        finally:
            task.cancel()
            await asyncio.wait([task])


@on_both
async def test_what_happens_is_told(store: SessionStore) -> None:
    """Each kind of event is told once, with its details, in the order in which it happened."""
    async with reading(store) as reader:
        first = await store.create({"user_id": 7, "ip": "x"})
        assert await reader.told(1) == [Event("created", first)]
        await store.set(first, {"n": 1, "ip": "y"})
        await store.touch(first)
        await store.get(first, touch=True)
        second = await store.rotate(first)
        assert await reader.told(1) == [Event("rotated", first, new_id=second)]
        assert await store.delete(second, reason="bye")
        assert not await store.delete(second)
        assert await reader.told(1) == [Event("ended", second, reason="bye", identity=7)]
        anonymous = await store.create()
        login = await store.rotate(anonymous, {"user_id": "alice"})
        assert await reader.told(2) == [Event("created", anonymous), Event("rotated", anonymous, new_id=login)]
        assert await store.delete_by("user_id", "alice", reason="password") == 1
        assert await reader.told(1) == [Event("ended", login, reason="password", identity="alice")]


@on_both
async def test_a_limit_and_a_block_are_told(store: SessionStore) -> None:
    """An evicted session is told, and a block with the value."""
    async with reading(store) as reader:
        ids = [await store.create({"user_id": "a:b"}) for _ in range(4)]
        events = await reader.told(5)
        (evicted,) = [event for event in events if event.kind == "ended"]
        assert evicted.session_id in ids[:3]
        assert evicted == Event("ended", evicted.session_id, reason="evicted", identity="a:b")
        assert await store.block("user_id", "a:b", "1m", reason="stolen") == 3
        events = await reader.told(4)
        assert events[0] == Event("blocked", reason="stolen", field="user_id", value="a:b")
        assert {event.session_id for event in events[1:]} == set(ids) - {evicted.session_id}


@on_both
async def test_a_block_of_many_partitions_is_told_once(store: SessionStore) -> None:
    """One block is one event, also if it is in force in all partitions."""
    await store.create({"user_id": 1, "ip": "x"})
    async with reading(store) as reader:
        await store.block("ip", "x", "1m")
        events = {event.kind: event for event in await reader.told(2)}
        assert (events["blocked"].field, events["blocked"].value) == ("ip", "x")
        assert events["ended"].reason == "blocked"
    await store.unblock("ip", "x")


@on_both
async def test_expired_sessions_are_told_by_a_sweep(store: SessionStore) -> None:
    """A sweep tells which sessions have expired, each once, although they were in two sets."""
    async with reading(store) as reader:
        ids = [await store.create({"user_id": n, "ip": ["x", "y"]}) for n in range(10)]
        await reader.told(10)
        for session_id in ids:
            await store.touch(session_id, "1ms")
        await asyncio.sleep(0.05)
        await store.maintenance.sweep()
        events = await reader.told(10)
        assert {event.session_id for event in events} == set(ids)
        assert {(event.kind, event.reason, event.identity) for event in events} == {("ended", "expired", None)}


@on_both
async def test_without_the_option_nothing_is_told(
    client: Redis | RedisCluster, keyspace: Keyspace, store: SessionStore
) -> None:
    """A store without events publishes nothing, and may still read the events of others."""
    quiet = SessionStore(client, references=REFERENCES, prefix=keyspace.prefix, partitions=keyspace.partitions)
    async with reading(quiet) as reader:
        await quiet.create({"user_id": 1})
        told = await store.create({"user_id": 1})
        assert await reader.told(1) == [Event("created", told)]
    await quiet.aclose()


@on_both
async def test_each_is_told_once_or_a_gap_is(store: SessionStore, client: Redis | RedisCluster) -> None:
    """While connections are cut, each login and each end is told once, or a gap is told. None is told twice."""
    done: dict[tuple[str, str], int] = {}  # For each thing done: how many events had been read before it.

    async def work(reader: Reader, number: int) -> None:
        for n in range(LOGINS // 20):
            read = len(reader.events)
            session_id = await store.create({"user_id": f"{number}-{n}"})
            done["created", session_id], read = read, len(reader.events)
            await store.delete(session_id)
            done["ended", session_id] = read

    async with reading(store) as reader:
        work_all = asyncio.gather(*(work(reader, number) for number in range(20)))
        while not work_all.done():
            await everywhere(client, "CLIENT KILL TYPE normal")
            await everywhere(client, "CLIENT KILL TYPE pubsub")
            await asyncio.sleep(0.15)
        await work_all
        last = set[str]()
        async with asyncio.timeout(20):  # After the last cut, events are missed until all masters are connected again.
            while last.isdisjoint(event.session_id for event in reader.events):
                last.add(await store.create())
                await asyncio.sleep(0.1)
        told = Counter((event.kind, event.session_id) for event in reader.events if event.kind != "gap")
        assert max(told.values()) == 1
        assert {what for what in told if what[1] not in last} <= done.keys()
        gaps = [number for number, event in enumerate(reader.events) if event.kind == "gap"]
        assert gaps
        assert all(read <= gaps[-1] for what, read in done.items() if what not in told)


@on_both
async def test_nothing_is_missed_without_a_gap(store: SessionStore) -> None:
    """Thousands of logins and ends are told, each once, if the connection holds."""
    async with reading(store) as reader:

        async def work(number: int) -> list[str]:
            ids = [await store.create({"user_id": f"{number}-{n}"}) for n in range(50)]
            for session_id in ids:
                await store.delete(session_id)
            return ids

        ids = {i for some in await asyncio.gather(*(work(number) for number in range(40))) for i in some}
        events = await reader.told(4000)
        assert Counter(event.kind for event in events) == {"created": 2000, "ended": 2000}
        assert {event.session_id for event in events} == ids


async def test_a_slow_reader_is_told_of_a_gap(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If too many events wait, the rest is left out, and a gap follows those that wait."""
    monkeypatch.setattr("rss.engine.subscription._WAITING", 10)
    async with store.events() as events:
        ids = [await store.create() for _ in range(30)]
        await store.create()
        read = [await anext(events) for _ in range(11)]
    assert [event.session_id for event in read[:10]] == ids[:10]
    assert read[10].kind == "gap"


@pytest.mark.parametrize("late", [False, True], ids=["known at once", "known later"])
async def test_a_moved_slot_is_a_gap(
    servers: Cluster, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch, *, late: bool
) -> None:
    """If a slot moves to another master, a gap is told, and then the events from there."""
    options: dict[str, Any] = {"references": REFERENCES, "prefix": keyspace.prefix, "timeout": 20, "events": True}
    async with SessionStore.from_url(servers.url, **options) as store:
        layout: Any = store.operations.layout
        slot = layout.slots[3]
        owner = servers.owner(slot)
        target = next(server for server in servers.servers if server is not owner)
        async with reading(store) as reader:
            await store.set(layout.mint(3), {"n": 1})
            await reader.told(1)
            with monkeypatch.context() as patch:
                if late:  # The old master is asked again, and names the new one.
                    patch.setattr(store.operations.engine.servers, "doubt", lambda _: None)
                await asyncio.to_thread(servers.migrate, slot, target)
                await asyncio.sleep(1.5 if late else 0)  # The connections are checked every second.
            await store.set(layout.mint(3), {"n": 1})
            await reader.until(lambda: any(event.kind == "gap" for event in reader.events))
            session_id = layout.mint(3)
            await store.set(session_id, {"n": 2})
            await reader.until(lambda: any(event.session_id == session_id for event in reader.events))
        await asyncio.to_thread(servers.migrate, slot, owner)


async def test_a_server_that_is_not_there() -> None:
    """The context fails if Redis does not answer before the deadline."""
    store = SessionStore.from_url("redis://127.0.0.1:1", timeout=0.3)
    with pytest.raises(StoreUnavailable):
        async with store.events():
            pass
    await store.aclose()


async def test_a_user_without_the_right() -> None:
    """A user that may not subscribe is told so. One that may not publish can still do everything else."""
    with own_server() as url:
        async with client_of(url) as admin:
            await admin.execute_command("ACL", "SETUSER", "poor", "on", ">pw", "~*", "+@all", "resetchannels")
            store = SessionStore.from_url(url.replace("://", "://poor:pw@"), references=["user_id"], events=True)
            with pytest.raises(SessionError, match="no permission"):
                async with store.events() as events:
                    await anext(events)
            session_id = await store.create({"user_id": 1})
            assert await store.delete(session_id)
            await store.aclose()


@pytest.mark.parametrize(
    "message",
    [
        "x",
        "{}",
        "[]",
        "5",
        pytest.param("[" * 100_000, id="deep"),
        '["ended"]',
        '["ended", "id", "why", {"a": 1}]',
        '["blocked", 5, "why"]',
        '["rotated", "id"]',
        '["later", "id"]',
        "\udcff",
    ],
)
async def test_a_message_that_is_not_readable(store: SessionStore, client: Redis, message: str) -> None:
    """A message of another program, or of a later version, is a gap. The events after it are told."""
    channel = store.operations.layout.events(0)
    async with store.events() as events:
        await client.publish(channel, message.encode(errors="surrogateescape"))
        session_id = await store.create()
        told = [await anext(events)]
        while told[-1].kind == "gap":
            told.append(await anext(events))
    assert [one.kind for one in told[:2]] == ["gap", "created"]
    assert told[-1].session_id == session_id


async def test_a_reader_that_outlives_the_subscription(store: SessionStore) -> None:
    """If the context ends while another task reads, its iteration ends."""
    reader = Reader()
    async with store.events() as events:
        task = asyncio.create_task(reader.read(events))
        await asyncio.sleep(0.05)
    async with asyncio.timeout(5):
        await task


async def test_an_end_while_a_connection_breaks(cluster_url: str, keyspace: Keyspace) -> None:
    """The context ends also if a connection breaks at the same moment."""
    async with (
        RedisCluster.from_url(cluster_url.replace("+cluster", "")) as admin,
        SessionStore.from_url(cluster_url, prefix=keyspace.prefix, timeout=20, events=True) as store,
    ):
        master = admin.get_primaries()[0]
        for turns in range(60):
            async with asyncio.timeout(10):
                async with store.events():
                    await admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub", target_nodes=master)
                    for _ in range(turns):
                        await asyncio.sleep(0)


async def test_nothing_is_left(store: SessionStore) -> None:
    """When the context ends, no task and no connection is left."""
    async with reading(store):
        pass
    await asyncio.sleep(0.05)
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_events_are_discreet() -> None:
    """The text of an event holds no id and no value."""
    event = Event("ended", "secret-id", "secret-new", "bye", identity="secret", value="secret")
    assert "secret" not in repr(event)


async def test_a_store_that_closes(store: SessionStore) -> None:
    """If the store is closed, the iteration ends with an error. A closed store refuses to begin."""
    async with store.events() as events:
        await store.aclose()
        async with asyncio.timeout(20):
            with pytest.raises(StoreUnavailable, match="the store was closed"):
                await anext(events)
    with pytest.raises(RuntimeError, match="the store is closed"):
        async with store.events():
            pass


async def test_an_error_of_a_hook(store: SessionStore, client: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any error while connecting again is retried, and a gap is told."""
    async with reading(store) as reader:
        node, failures = store.operations.engine.servers.masters[0], [KeyError("of the user")]
        make = node.make_connection

        def make_connection() -> Any:
            if failures:
                raise failures.pop()
            return make()

        await store.create()
        monkeypatch.setattr(node, "make_connection", make_connection)
        await everywhere(client, "CLIENT KILL TYPE pubsub")
        await reader.until(lambda: any(event.kind == "gap" for event in reader.events))
        assert not failures


async def test_another_layout_is_told(store: SessionStore, client: Redis, keyspace: Keyspace) -> None:
    """If the prefix has another number of partitions, the context says so."""
    await SessionStore(client, prefix=keyspace.prefix, partitions=4).create()
    del store
    with pytest.raises(SessionError, match="in 4 partitions, not in 8"):
        async with SessionStore(client, prefix=keyspace.prefix, partitions=8).events():
            pass
