"""Sessions move from one Redis to a cluster while applications use them."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable
from datetime import timedelta
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster

from rss import (
    IncompleteReference,
    LimitExceeded,
    PartlyDone,
    Reference,
    SessionEnded,
    SessionError,
    SessionNotFound,
    Sessions,
    SessionStore,
    StoreUnavailable,
)
from rss.moving import MovingStore, Progress
from tests.keyspace import Keyspace
from tests.steps import run_at

REFERENCES = {"user_id": Reference(identity=True), "ip": Reference()}


@pytest.fixture(name="there")
async def _there(url: str) -> AsyncIterator[Redis]:
    """A client of the Redis that the sessions leave. It has no other keys."""
    async with Redis.from_url(url, decode_responses=True) as client:
        await client.flushall()
        yield client


@pytest.fixture(name="source")
async def _source(there: Redis) -> AsyncIterator[SessionStore]:
    source = SessionStore(there, references=REFERENCES)
    yield source
    await source.aclose()


@pytest.fixture(name="keyspace")
async def _keyspace(cluster_url: str, keyspace: Keyspace) -> AsyncIterator[Keyspace]:
    """All keys on the cluster."""
    async with RedisCluster.from_url(cluster_url.replace("+cluster", ""), decode_responses=True) as client:
        keyspace = Keyspace(client, keyspace.prefix, 64)  # type: ignore[arg-type]
        yield keyspace
        await keyspace.clear()


@pytest.fixture(name="options")
def _options(keyspace: Keyspace) -> dict[str, Any]:
    return {"references": REFERENCES, "prefix": keyspace.prefix, "partition_by_identity": False, "timeout": 20}


@pytest.fixture(name="store")
async def _store(cluster_url: str, source: SessionStore, options: dict[str, Any]) -> AsyncIterator[MovingStore]:
    """A store on the cluster, to which the sessions move."""
    async with RedisCluster.from_url(cluster_url.replace("+cluster", "")) as client:
        store = MovingStore(client, source=source, **options)
        yield store
        await store.aclose()


async def test_a_session_moves_when_it_is_used(
    store: MovingStore, source: SessionStore, there: Redis, keyspace: Keyspace
) -> None:
    """The first use of a session moves it with its id, fields, age and TTL. Nothing is left of it but a tombstone."""
    await source.set("a", {"user_id": 7, "ip": ["x", "y"], "cart": [1]}, "2h")
    created = await there.hget("rss:{a}", "_created")
    assert await store.get("a") == {"id": "a", "user_id": 7, "ip": ["x", "y"], "cart": [1]}
    assert await store.increment("a", "n") == 1
    assert await store.ttl("a") > timedelta(minutes=119)  # type: ignore[operator]
    assert await keyspace.client.hget(store.get_session_key("a"), "_created") == created
    dump = await keyspace.dump()
    assert {name: held for name, held in dump.items() if isinstance(held, set)} == {
        "user_id:{7}": {"a"},
        "ip:{x}": {"a"},
        "ip:{y}": {"a"},
    }
    assert sorted(await there.keys("*")) == ["rss:_meta", "rss:{a}"]
    assert await source.ended("a") == "rotated"


async def test_sessions_of_both_sides_end(store: MovingStore, source: SessionStore) -> None:
    """`delete_by` ends the sessions at both sides, except those to keep."""
    ids = [await source.create({"user_id": 7}) for _ in range(4)]
    assert await store.get(ids[0])
    assert await store.delete_by("user_id", 7, keep=[ids[1]]) == 3
    assert [bool(await store.get(session_id)) for session_id in ids] == [False, True, False, False]
    assert await store.delete_by("user_id", 7) == 1


@pytest.mark.parametrize("moved", [True, False])
async def test_every_operation(store: MovingStore, source: SessionStore, *, moved: bool) -> None:
    """Each operation has the same result, whether its session has moved already or not."""
    for session_id in "abcdefghi":
        await source.set(session_id, {"user_id": 1, "ip": "x", "n": 1})
        if moved:
            await store.get(session_id)
    await source.delete("i", reason="bye") if not moved else await store.delete("i", reason="bye")
    assert await store.set("a", {"n": 2}, create=False) == {"n": 2}
    assert await store.pop("b", ["n"]) == {"n": 1}
    await store.unset("c", ["ip"])
    assert await store.increment("d", "n", 4) == 5
    assert await store.touch("e")
    assert await store.delete("f")
    new = await store.rotate("g", {"user_id": 2})
    assert await store.ended("g") == "rotated"
    assert set(await store.ids_by("user_id", 1)) == set("abcdeh")
    assert await store.count_by("user_id", 1, exact=False) >= 6
    assert await store.get("i") == {}
    assert await store.ended("i") == "bye"
    assert not await store.touch("i")
    assert not await store.delete("i")
    with pytest.raises(SessionEnded, match="bye"):
        await store.set("i", {"n": 1})
    with pytest.raises(SessionNotFound):
        await store.increment("nobody", "n")
    assert await store.delete_by("user_id", 1, keep=["a"], keep_required=True, block="1m") == 5
    assert await store.blocked("user_id", 1)
    assert await store.unblock("user_id", 1)
    assert await store.ids_by("user_id", 1) == ["a"]
    assert await store.wait_ended("i") == "bye"
    waiting = asyncio.create_task(store.wait_ended("h" if moved else "a"))
    await asyncio.sleep(0.1)
    assert waiting.done() == moved
    waiting.cancel()
    assert set(await store.ids_by("ip", "x")) == {"a", new}
    assert await store.set("made", {"user_id": 1})
    created = await store.create({"user_id": 1})
    assert set(await store.ids_by("user_id", 1)) == {"a", "made", created}


async def test_both_in_one_redis(source: SessionStore, there: Redis) -> None:
    """A store gets partitions in place. Until all processes use a plain store, new ones may still open the source."""
    await source.set("a", {"user_id": 1})
    options: dict[str, Any] = {"references": REFERENCES, "partition_by_identity": False, "partitions": 64}
    async with MovingStore(there, source=source, **options) as store:
        async with SessionStore(there, references=REFERENCES) as late:
            assert await late.ids_by("user_id", 1) == ["a"]
        with pytest.raises(SessionError, match="could remove those that have not moved"):
            await anext(store.maintenance.repair())
        assert await source.get("a")
        assert await store.move_all() == Progress(1, 1)
    async with SessionStore(there, **options) as plain:
        assert await plain.ids_by("user_id", 1) == ["a"]
        assert {found.kind async for found in plain.maintenance.repair()} <= {"stray"}  # The tombstone at the source.
        assert await plain.ids_by("user_id", 1) == ["a"]
    with pytest.raises(SessionError, match="in 64 partitions, not in no"):
        await SessionStore(there, references=REFERENCES).create()


async def test_the_other_side_ends_too(store: MovingStore, source: SessionStore, there: Redis) -> None:
    """If sessions may have been missed at the source, those that have moved end all the same."""
    for session_id in "abc":
        await source.set(session_id, {"user_id": 1, "ip": "x"})
    await store.get("a")
    async with SessionStore(there, references=["user_id"]):
        pass  # A store without the reference "ip" makes it incomplete.
    found = list[str]()

    async def find() -> None:
        async for session in store.find_by("ip", "x"):
            found.append(session["id"])

    with pytest.raises(IncompleteReference):
        await find()
    assert sorted(found) == ["a", "b", "c"]
    for exact in (True, False):
        with pytest.raises(IncompleteReference) as raised:
            await store.count_by("ip", "x", exact=exact)
        assert raised.value.found == 3
    with pytest.raises(IncompleteReference) as raised:
        await store.delete_by("ip", "x")
    assert raised.value.ended == 3
    assert [await store.ended(session_id) for session_id in "abc"] == ["deleted"] * 3


async def test_a_source_that_does_not_answer(
    store: MovingStore, source: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sessions that have moved end all the same, and the error tells how many."""
    for session_id in "ab":
        await source.set(session_id, {"user_id": 1})
    await store.get("a")

    async def fail(call: Awaitable[Any]) -> Any:
        await call
        raise StoreUnavailable("gone")

    run_at(source, monkeypatch, "delete_by_ref", fail)
    with pytest.raises(PartlyDone) as raised:
        await store.delete_by("user_id", 1)
    assert raised.value.ended == 1
    assert await store.ended("a") == "deleted"


async def test_a_session_to_keep_that_has_ended(store: MovingStore, source: SessionStore) -> None:
    """An ended session is no reason to let the others live, unless it was required."""
    for session_id in "ab":
        await source.set(session_id, {"user_id": 1})
    await source.delete("a")
    with pytest.raises(SessionEnded):
        await store.delete_by("user_id", 1, keep=["a"], keep_required=True)
    assert await store.ids_by("user_id", 1) == ["b"]
    assert await store.delete_by("user_id", 1, keep=["a"]) == 1


async def test_a_session_that_expires_after_it_has_moved(store: MovingStore, source: SessionStore) -> None:
    """The tombstone at the source, which outlives a short session, is no reason to fail."""
    await store.load()
    await source.set("a", {"user_id": 7}, 1)
    assert await store.get("a")
    while await store.ttl("a"):
        await asyncio.sleep(0.05)
    assert await store.get("a") == {}
    assert not await store.touch("a")
    assert await store.set("a", {"user_id": 8})
    assert await store.get("a") == {"id": "a", "user_id": 8}


async def test_a_session_that_expires_on_the_way(
    store: MovingStore, source: SessionStore, there: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that expires at the source while it moves is absent, and the next write makes a new one."""

    async def expire(call: Awaitable[Any]) -> Any:
        reply = await call
        await there.unlink("rss:{a}")
        return reply

    await source.set("a", {"user_id": 7, "ip": "x"})
    run_at(store, monkeypatch, "arrive_with_refs", expire)
    assert await store.get("a") == {}
    assert await store.ended("a") is None
    assert await store.set("a", {"user_id": 8})
    assert await store.ids_by("ip", "x") == []


async def test_a_copy_that_was_left_behind(
    store: MovingStore, source: SessionStore, there: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write makes a new session in place of a copy whose session has expired."""

    async def stop(call: Awaitable[Any]) -> Any:
        await call
        raise StoreUnavailable("gone")

    await source.set("a", {"user_id": 7, "ip": "x"})
    run_at(store, monkeypatch, "arrive_with_refs", stop)
    with pytest.raises(StoreUnavailable):
        await store.get("a")
    await there.unlink("rss:{a}")
    assert await store.get("a") == {}
    assert await store.set("a", {"user_id": 8})
    assert await store.get("a") == {"id": "a", "user_id": 8}
    held = await keyspace.dump()
    assert {name: ids for name, ids in held.items() if isinstance(ids, set)} == {"user_id:{8}": {"a"}}


async def test_a_session_that_ends_on_the_way(
    store: MovingStore, source: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why a session has ended at the source stays known, and nothing is left of its copy."""

    async def end(call: Awaitable[Any]) -> Any:
        reply = await call
        await source.delete("a", reason="bye")
        return reply

    await source.set("a", {"user_id": 7})
    run_at(store, monkeypatch, "arrive_with_refs", end)
    assert await store.get("a") == {}
    assert [await store.ended("a"), await store.wait_ended("a")] == ["bye", "bye"]
    assert await store.count_by("user_id", 7) == 0


async def test_a_new_session_under_the_id_of_one_that_has_moved(
    store: MovingStore, source: SessionStore, other: tuple[SessionStore, MovingStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that finds that a session has expired does not end a new one under the same id."""

    async def make_another(call: Awaitable[Any]) -> Any:
        try:
            return await call
        finally:
            await other[1].set("a", {"user_id": 8})

    await store.load()
    await source.set("a", {"user_id": 7}, 1)
    assert await store.get("a")
    while await store.ttl("a"):
        await asyncio.sleep(0.05)
    run_at(store, monkeypatch, "confirm_with_refs", make_another)
    for _ in range(3):
        await store.get("a")
    assert await store.get("a") == {"id": "a", "user_id": 8}


@pytest.fixture(name="other")
async def _other(
    url: str, cluster_url: str, options: dict[str, Any]
) -> AsyncIterator[tuple[SessionStore, MovingStore]]:
    """The stores of another process."""
    async with (
        Redis.from_url(url, decode_responses=True) as client,
        RedisCluster.from_url(cluster_url.replace("+cluster", "")) as cluster,
        SessionStore(client, references=REFERENCES) as source,
        MovingStore(cluster, source=source, **options) as store,
    ):
        yield source, store


@pytest.mark.parametrize("dies", [False, True])
async def test_two_processes_that_move_one_session(
    store: MovingStore,
    source: SessionStore,
    other: tuple[SessionStore, MovingStore],
    monkeypatch: pytest.MonkeyPatch,
    *,
    dies: bool,
) -> None:
    """A slow process does not put an older copy in the place of one for which the session has ended."""
    read, retired, come = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def read_early(call: Awaitable[Any]) -> Any:
        reply = await call
        read.set()
        await retired.wait()
        return reply

    async def come_late(call: Awaitable[Any]) -> Any:
        reply = await call
        come.set()
        return reply

    async def wait_for_the_other(call: Awaitable[Any]) -> Any:
        reply = await call
        retired.set()
        if dies:
            raise StoreUnavailable("gone")
        await come.wait()
        return reply

    await source.set("a", {"user_id": 7, "ip": "x", "n": 1})
    run_at(source, monkeypatch, "get", read_early)
    run_at(store, monkeypatch, "arrive_with_refs", come_late)
    run_at(other[0], monkeypatch, "retire_with_refs", wait_for_the_other)
    slow = asyncio.create_task(store.get("a"))
    await read.wait()
    await other[0].set("a", {"ip": "y", "n": 2})
    expected = {"id": "a", "user_id": 7, "ip": "y", "n": 2}
    if dies:
        with pytest.raises(StoreUnavailable):
            await other[1].get("a")
    else:
        assert await other[1].get("a") == expected
    assert await slow == expected
    assert await store.ids_by("ip", "y") == ["a"]
    assert await store.ids_by("ip", "x") == []


async def test_a_copy_that_another_process_replaces(
    store: MovingStore,
    source: SessionStore,
    other: tuple[SessionStore, MovingStore],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If a process replaces the copy for which the session is ended meanwhile, that copy is written again."""
    read, arrived, again, retired, refused = (asyncio.Event() for _ in range(5))

    async def read_early(call: Awaitable[Any]) -> Any:
        reply = await call
        run_at(source, monkeypatch, "get", read_again)
        read.set()
        await arrived.wait()
        return reply

    async def read_again(call: Awaitable[Any]) -> Any:
        reply = await call
        again.set()
        await retired.wait()
        return reply

    async def find_the_other(call: Awaitable[Any]) -> Any:
        reply = await call
        run_at(store, monkeypatch, "confirm_with_refs", confirm)
        return reply

    async def confirm(call: Awaitable[Any]) -> Any:
        try:
            return await call
        finally:
            refused.set()

    async def arrive(call: Awaitable[Any]) -> Any:
        reply = await call
        await other[0].set("a", {"n": 3})
        arrived.set()
        await again.wait()
        return reply

    async def retire(call: Awaitable[Any]) -> Any:
        reply = await call
        retired.set()
        await refused.wait()
        return reply

    await source.set("a", {"user_id": 7, "n": 1})
    run_at(source, monkeypatch, "get", read_early)
    run_at(store, monkeypatch, "arrive_with_refs", find_the_other)
    run_at(other[1], monkeypatch, "arrive_with_refs", arrive)
    run_at(other[0], monkeypatch, "retire_with_refs", retire)
    slow = asyncio.create_task(store.get("a"))
    await read.wait()
    await other[0].set("a", {"n": 2, "m": 2})
    expected = {"id": "a", "user_id": 7, "n": 3, "m": 2}
    assert await other[1].get("a") == expected
    assert await slow == expected
    assert await other[0].ended("a") == "rotated"


async def test_a_caller_that_is_cancelled(
    store: MovingStore, source: SessionStore, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that was ended at the source moves completely, although its caller is cancelled."""

    async def cancel(call: Awaitable[Any]) -> Any:
        reply = await call
        caller.cancel()
        return reply

    await source.set("a", {"user_id": 7})
    run_at(source, monkeypatch, "retire_with_refs", cancel)
    caller = asyncio.create_task(store.get("a"))
    with pytest.raises(asyncio.CancelledError):
        await caller
    await store.aclose()
    assert not await keyspace.copies()
    assert await source.ended("a") == "rotated"


@pytest.mark.parametrize("how", ["delete", "rotate"])
async def test_a_source_that_has_forgotten_the_move(
    store: MovingStore, source: SessionStore, there: Redis, how: str
) -> None:
    """A session that has ended does not come back from a source whose master was replaced."""
    await source.set("a", {"user_id": 7})
    assert await store.get("a")
    await there.unlink("rss:{a}")
    await source.set("a", {"user_id": 7})
    await (store.delete("a") if how == "delete" else store.rotate("a", {"user_id": 8}))
    assert await source.get("a") == {}


@pytest.mark.parametrize("how", ["delete", "rotate"])
async def test_a_source_that_is_away_later(
    store: MovingStore, source: SessionStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """If the source does not answer, a session that has moved is neither ended nor rotated, and the call may repeat."""

    async def fail(call: Awaitable[Any]) -> Any:
        await call
        raise StoreUnavailable("gone")

    await source.set("a", {"user_id": 7})
    session = await store.get("a")
    call = (lambda: store.delete("a")) if how == "delete" else (lambda: store.rotate("a", {"user_id": 8}))
    run_at(source, monkeypatch, "delete_with_refs", fail)
    with pytest.raises(StoreUnavailable):
        await call()
    assert await store.get("a") == session
    assert await call()
    assert await store.get("a") == {}


async def test_a_session_that_expires_while_it_moves(
    store: MovingStore, source: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session whose move is completed later does not live longer for that."""

    async def stop(call: Awaitable[Any]) -> Any:
        await call
        raise StoreUnavailable("gone")

    await store.load()
    await source.set("a", {"user_id": 7}, 1)
    run_at(source, monkeypatch, "retire_with_refs", stop)
    with pytest.raises(StoreUnavailable):
        await store.get("a")
    await asyncio.sleep(1.1)
    await store.get("a")
    assert (await store.ttl("a") or timedelta(0)) < timedelta(milliseconds=100)


async def test_a_session_that_cannot_move(store: MovingStore, source: SessionStore, keyspace: Keyspace) -> None:
    """`move_all` moves the others, and then raises an error."""
    for n in range(5):
        await source.set(f"s{n}", {"user_id": n})
    bad = store.get_reference_keys("user_id", 3)[store.operations.layout.place("s3")[1]]
    await keyspace.client.set(bad, "x", ex=60)
    with pytest.raises(SessionError, match="1 sessions could not move") as raised:
        await store.move_all()
    assert not isinstance(raised.value, StoreUnavailable)
    assert [await source.ended(f"s{n}") for n in range(5)] == ["rotated"] * 3 + [None, "rotated"]
    await keyspace.client.unlink(bad)
    assert await store.move_all() == Progress(5, 1)


async def test_a_full_limit(there: Redis, keyspace: Keyspace) -> None:
    """A limit that refuses new sessions lets those from the source come."""
    options: dict[str, Any] = {"references": {"user_id": Reference(limit=1, on_limit="refuse")}}
    async with (
        SessionStore(there, **options) as source,
        MovingStore(there, source=source, prefix=keyspace.prefix, partitions=1, **options) as store,
    ):
        await source.set("a", {"user_id": 7})
        await store.create({"user_id": 7})
        assert await store.get("a")
        with pytest.raises(LimitExceeded):
            await store.create({"user_id": 7})


async def test_a_store_that_cannot_take_them(cluster_url: str, source: SessionStore) -> None:
    """A store that would need other ids, or has other references, is refused."""
    client = RedisCluster.from_url(cluster_url.replace("+cluster", ""))
    with pytest.raises(ValueError, match="must have partition_by_identity=False"):
        MovingStore(client, source=source, references=REFERENCES)
    with pytest.raises(ValueError, match="the same references"):
        MovingStore(client, source=source, references=["user_id"])
    with pytest.raises(ValueError, match="give the store partitions"):
        MovingStore(Redis.from_url("redis://localhost"), source=source, references=REFERENCES)
    references = {"user_id": Reference(identity=True, limit=3)}
    with pytest.raises(ValueError, match="cannot have a limit"):
        SessionStore(client, references=references, partition_by_identity=False)


async def test_all_move_under_load(
    store: MovingStore, source: SessionStore, there: Redis, options: dict[str, Any], cluster_url: str
) -> None:
    """While visitors log in, write and leave, all sessions move. No write is lost, and nobody is signed out."""
    tokens, sessions = dict[str, dict[str, Any]](), Sessions(source)
    for n in range(1500):
        session = sessions.create_session()
        await session.set({"user_id": n % 300, "ip": f"{n % 7}", "n": 0})
        tokens[session.take_cookies()[0].partition("=")[2].partition(";")[0]] = {"user_id": n % 300, "n": 0}
    stop, made = asyncio.Event(), 0

    async def visit(mine: list[str], number: int) -> None:
        nonlocal made
        rnd, now = random.Random(number), Sessions(store)
        while not stop.is_set():
            token = rnd.choice(mine)
            session = now.create_session(f"session-id={token}")
            held = tokens[token]
            found = await session.get()
            assert found["user_id"] == held["user_id"], "signed out"
            assert found["n"] == held["n"], "a write is lost"
            if rnd.random() < 0.5:
                held["n"] += 1
                assert await store.increment(str(session.id), "n") == held["n"]
            elif rnd.random() < 0.3:
                await session.rotate({"n": held["n"]})
                new = session.take_cookies()[0].partition("=")[2].partition(";")[0]
                tokens[new] = tokens.pop(token)
                mine[mine.index(token)] = new
            made += 1

    every = [*tokens]
    visiting = [asyncio.create_task(visit(every[n::20], n)) for n in range(20)]
    seen: list[Progress] = []
    await store.move_all(seen.append)
    again = await store.move_all()
    stop.set()
    await asyncio.gather(*visiting)
    assert again.moved == 0
    assert seen[-1].moved <= 1500
    assert made > 20
    assert not any([await there.hexists(key, "id") for key in await there.keys("rss:{*")])
    async with SessionStore.from_url(cluster_url, **options) as plain:  # The source is needed no more.
        for token, held in tokens.items():
            session = Sessions(plain).create_session(f"session-id={token}")
            found = await session.get()
            assert (found["user_id"], found["n"]) == (held["user_id"], held["n"])
        assert await plain.count_by("user_id", 7) == 5
