"""Calls that are pending at the same time are sent as batches, and callers do not notice."""

import asyncio
import gc
import random
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis

from rss import (
    Conflict,
    LimitExceeded,
    Reference,
    SessionEnded,
    SessionError,
    SessionNotFound,
    SessionStore,
    StoreUnavailable,
)
from rss.engine import coalesce
from rss.engine.servers import OneServer
from rss.testing import RedisServer
from tests.keyspace import Keyspace
from tests.servers import connections, proxied


@pytest.fixture(name="admin")
async def _admin(url: str) -> AsyncIterator[Redis]:
    """A client of the server of this file, which is empty at the start."""
    async with Redis.from_url(url, decode_responses=True) as client:
        await client.flushall()
        yield client


@pytest.fixture(name="shop")
async def _shop(url: str, admin: Redis) -> AsyncIterator[SessionStore]:
    """A store on the server of this file, loaded, with sessions "0" to "199"."""
    del admin
    async with SessionStore.from_url(url, references=["user_id", "ip"], timeout=5) as store:
        await asyncio.gather(*(store.set(str(n), {"user_id": n % 10, "n": n}) for n in range(200)))
        yield store


async def _scripts_run(admin: Redis, *calls: Awaitable[object]) -> int:
    """Run calls that begin at the same time, and return how many scripts they took."""
    await admin.config_resetstat()
    await asyncio.gather(*calls)
    stats = await admin.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


# ---------------------------------------------------------------------- together


CALLS: dict[str, Callable[[SessionStore, int], Awaitable[object]]] = {
    "get": lambda store, n: store.get(str(n)),
    "get fields": lambda store, n: store.get(str(n), ["n"]),
    "get and touch": lambda store, n: store.get(str(n), touch=True),
    "set": lambda store, n: store.set(str(n), {"user_id": n % 7, "n": -n}),
    "create": lambda store, n: store.create({"user_id": n}),
    "unset": lambda store, n: store.unset(str(n), ["n"]),
    "pop": lambda store, n: store.pop(str(n), ["n"]),
    "increment": lambda store, n: store.increment(str(n), "n"),
    "touch": lambda store, n: store.touch(str(n)),
    "ttl": lambda store, n: store.ttl(str(n)),
    "delete": lambda store, n: store.delete(str(n)),
    "rotate": lambda store, n: store.rotate(str(n)),
    "blocked": lambda store, n: store.blocked("user_id", n),
    "unblock": lambda store, n: store.unblock("user_id", n),
}


@pytest.mark.parametrize("name", CALLS)
async def test_calls_of_one_moment_are_a_few_scripts(shop: SessionStore, admin: Redis, name: str) -> None:
    """Two hundred calls at the same time take two scripts, and one call takes one."""
    assert await _scripts_run(admin, *(CALLS[name](shop, n) for n in range(200))) == 2
    assert await _scripts_run(admin, CALLS[name](shop, 1) if name not in ("delete", "rotate") else shop.get("1")) == 1


async def test_a_script_has_a_hundred_sessions_at_most(shop: SessionStore, admin: Redis) -> None:
    """A script has about a hundred sessions at most, so that it does not block Redis for long."""
    assert 10 <= await _scripts_run(admin, *(shop.touch(str(n)) for n in range(1000))) <= 11


async def test_pages_of_a_set_do_not_go_together(shop: SessionStore, admin: Redis) -> None:
    """Pages of reference sets are not batched, since each takes long enough alone."""
    assert await _scripts_run(admin, *(shop.count_by("user_id", n) for n in range(10))) == 10


async def test_each_caller_gets_the_own_reply(shop: SessionStore) -> None:
    """Each caller gets its own reply, even if calls read different fields or missing sessions."""
    found = await asyncio.gather(
        *(shop.get(str(n), None if n % 3 else ["n"], touch=n % 2 == 0) for n in range(0, 400, 2))
    )
    for n, session in zip(range(0, 400, 2), found, strict=True):
        whole = {"id": str(n), "user_id": n % 10, "n": n} if n % 3 else {"id": str(n), "n": n}
        assert session == (whole if n < 200 else {})


async def test_each_caller_gets_the_own_error(shop: SessionStore, admin: Redis) -> None:
    """An error of one call in a batch does not affect the other calls."""
    await shop.delete("3", reason="bye")
    await admin.set("rss:{5}", "x", ex=60)
    await admin.set("rss:user_id:{77}", "x", ex=60)
    expected = await Keyspace(admin, "rss").dump()
    results = await asyncio.gather(
        *(shop.set(str(n), {"user_id": 77 if n == 8 else 1}, create=n != 300) for n in (*range(20), 300)),
        return_exceptions=True,
    )
    failed = {n: type(result) for n, result in enumerate(results) if isinstance(result, Exception)}
    assert failed == {3: SessionEnded, 5: SessionError, 8: SessionError, 20: SessionNotFound}
    for n in set(range(20)) - {3, 5, 8}:
        session, left, joined = expected[f"{{{n}}}"], expected[f"user_id:{{{n % 10}}}"], expected["user_id:{1}"]
        assert isinstance(session, dict)
        assert isinstance(left, set)
        assert isinstance(joined, set)
        session["user_id"] = "1"
        left.discard(str(n))
        joined.add(str(n))
    assert await Keyspace(admin, "rss").dump() == expected

    found = await asyncio.gather(*(shop.get(str(n), ["n"]) for n in range(20)), return_exceptions=True)
    assert isinstance(found[5], SessionError)
    assert found[:3] + found[6:] == [{"id": str(n), "n": n} for n in (0, 1, 2, *range(6, 20))]


async def test_each_count_gets_the_own_reply(shop: SessionStore, admin: Redis) -> None:
    """Counts of one moment are commands of one write, and an error of one of them does not affect the others."""
    await admin.set("rss:user_id:{77}", "x", ex=60)
    values = [*range(10), 77, *range(10)]
    found = await asyncio.gather(
        *(shop.count_by("user_id", value, exact=False) for value in values), return_exceptions=True
    )
    assert isinstance(found.pop(10), SessionError)
    assert found == [20] * 20


async def test_a_session_that_breaks_a_script_breaks_no_other_call(shop: SessionStore, admin: Redis) -> None:
    """A session that makes a script fail, such as a broken tombstone, fails only its own call."""
    await admin.hset("rss:{5}", mapping={"_ended": "rotated", "_next": "6"})
    found = await asyncio.gather(*(shop.get(str(n), ["n"]) for n in range(20)), return_exceptions=True)
    assert isinstance(found[5], Exception)
    assert found[:5] + found[6:] == [{"id": str(n), "n": n} for n in range(20) if n != 5]


SESSIONS = st.sampled_from(["a", "b", "c", "d"])
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "user_id": st.sampled_from([1, 2, None, [1, 2], []]),
        "ip": st.sampled_from(["x", "y"]),
        "n": st.integers(0, 2),
    },
)
OPERATIONS: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    "get": st.tuples(SESSIONS, st.none() | st.just(["n"])),
    "set": st.tuples(SESSIONS, VALUES, st.sampled_from([None, "1h", "2h"])),
    "update": st.tuples(SESSIONS, VALUES, st.integers(0, 2)),
    "unset": st.tuples(SESSIONS, st.lists(st.sampled_from(["user_id", "ip", "n"]), min_size=1)),
    "pop": st.tuples(SESSIONS, st.lists(st.sampled_from(["user_id", "n"]), min_size=1)),
    "increment": st.tuples(SESSIONS, st.just("n")),
    "touch": st.tuples(SESSIONS, st.sampled_from(["1h", "2h"])),
    "delete": st.tuples(SESSIONS),
}
BATCH = st.sampled_from([*OPERATIONS]).flatmap(
    lambda name: st.tuples(st.just(name), st.lists(OPERATIONS[name], min_size=1, max_size=6))
)


def _shape(call: tuple[Any, ...]) -> list[int]:
    """Return how many values of each reference a call writes: calls with the same numbers share a batch."""
    values = call[1] if len(call) > 1 and isinstance(call[1], dict) else {}
    named = [values.get(field, ()) for field in ("user_id", "ip")]
    return [0 if value is None else len(value) if isinstance(value, list | tuple) else 1 for value in named] + [
        field in values for field in ("user_id", "ip")
    ]


async def _call(store: SessionStore, name: str, arguments: tuple[Any, ...]) -> object:
    if name == "update":
        session_id, values, n = arguments
        return await store.set(session_id, values, create=False, expect={"n": n})
    result: object = await getattr(store, name)(*arguments)
    return result


async def _outcome(call: Awaitable[object]) -> object:
    try:
        return await call
    except (Conflict, LimitExceeded, SessionNotFound) as error:
        return type(error)


@given(batches=st.lists(BATCH, max_size=12), limit=st.sampled_from([None, 1, 2]), strict=st.booleans())
def test_a_batch_does_what_its_calls_do_one_after_another(
    redis_server: RedisServer, batches: list[tuple[str, list[tuple[Any, ...]]]], limit: int | None, *, strict: bool
) -> None:
    """A batch gives the same replies, errors and keys as its calls one after another."""

    async def run(*, together: bool) -> tuple[list[object], object]:
        async with Redis.from_url(redis_server.url, decode_responses=True) as client:
            keyspace = Keyspace(client, f"batch-{secrets.token_hex(8)}")
            references = {"user_id": Reference(limit=limit, on_limit="refuse", strict=strict), "ip": Reference()}
            store = SessionStore(client, references=references, prefix=keyspace.prefix)
            outcomes: list[object] = []
            for name, calls in batches:
                todo = [_outcome(_call(store, name, arguments)) for arguments in sorted(calls, key=_shape)]
                outcomes += await asyncio.gather(*todo) if together else [await call for call in todo]
            await store.aclose()
            dump = await keyspace.dump()
            await keyspace.clear()
            return outcomes, dump

    # With two volleys, the first would take calls of each kind before all calls of one kind are done.
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as loop:
        patch.setattr(OneServer, "volleys", 1)
        assert loop.run(run(together=True)) == loop.run(run(together=False))


async def test_large_values_make_small_batches(shop: SessionStore, admin: Redis) -> None:
    """Large values make small batches, since no script reads or writes much more than 128 kB."""
    value = "x" * 30_000
    assert 20 <= await _scripts_run(admin, *(shop.set(str(n), {"note": value}) for n in range(100))) <= 30
    found: list[dict[str, Any]] = []

    async def read() -> None:
        found.extend(await asyncio.gather(*(shop.get(str(n), ["note"]) for n in range(100))))

    assert 20 <= await _scripts_run(admin, read()) <= 30
    assert found == [{"id": str(n), "note": value} for n in range(100)]
    assert 20 <= await _scripts_run(admin, *(shop.pop(str(n), ["note"]) for n in range(100))) <= 30


async def test_no_kind_of_call_waits_for_all_of_another(shop: SessionStore) -> None:
    """A call of one kind gets its turn while many calls of another kind keep coming."""
    calls = 0

    async def read() -> None:
        nonlocal calls
        while not deleted.done():
            await shop.get("1")
            calls += 1

    deleted = asyncio.ensure_future(shop.delete("2"))
    await asyncio.gather(*(read() for _ in range(500)))
    assert await deleted
    assert calls < 5000


# ---------------------------------------------------------------------- callers that go


async def test_ten_thousand_cancellations_among_a_hundred_thousand_calls(url: str, admin: Redis) -> None:
    """Cancelled calls do not affect the replies of other calls, and leave no task and no connection."""
    chance = random.Random(1)
    async with Redis.from_url(url) as client:
        store = SessionStore(client, references=["user_id"], timeout=60)
        await asyncio.gather(*(store.set(f"s{n}", {"user_id": n % 50, "n": n}) for n in range(1000)))
        await admin.set("rss:{broken}", "x", ex=600)
        cancelled = answered = 0

        async def call(n: int) -> bool:
            match n % 5:
                case 0:
                    return await store.set(f"s{n % 1000}", {"user_id": n % 50}) == {"user_id": n % 50}
                case 1:
                    return await store.touch(f"s{n % 1000}")
                case 2:
                    with pytest.raises(SessionError, match="another type"):
                        await store.get("broken")
                    return True
                case _:
                    return await store.get(f"s{n % 1000}", ["n"]) == {"id": f"s{n % 1000}", "n": n % 1000}

        for start in range(0, 100_000, 5000):
            tasks = [asyncio.create_task(call(n)) for n in range(start, start + 5000)]
            victims = chance.sample(tasks, 500)
            while victims:
                await asyncio.sleep(0)
                for victim in victims[-100:]:
                    victim.cancel()
                del victims[-100:]
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, asyncio.CancelledError):
                    cancelled += 1
                else:
                    assert result is True
                    answered += 1
        assert cancelled + answered == 100_000
        assert cancelled > 5000
        assert len(await connections(admin)) == 1
        await store.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert await connections(admin) == []


async def test_a_caller_that_is_cancelled_is_not_sent(shop: SessionStore) -> None:
    """A call that is cancelled before it was sent is never sent."""
    task = asyncio.create_task(shop.delete("1"))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert await shop.get("1", ["n"]) == {"id": "1", "n": 1}


# ---------------------------------------------------------------------- what goes wrong


async def test_every_caller_has_the_own_deadline(shop: SessionStore, url: str, admin: Redis) -> None:
    """Calls fail in the order in which they began, each at its own deadline, also within one batch."""
    del shop
    async with SessionStore.from_url(url, timeout=0.4) as store:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await admin.client_pause(2500)

        async def told(delay: float) -> float:
            await asyncio.sleep(delay)
            with pytest.raises(StoreUnavailable, match="within the deadline"):
                await store.get("1")
            return loop.time() - begun

        late, first, second, third, same = await asyncio.gather(*(told(delay) for delay in (0.3, 0, 0.1, 0.2, 0.1)))
        assert 0.39 < first < second <= same < third < late
        assert late - second > 0.1
        await store.operations.engine.drain()
        assert loop.time() - begun < 2.5
        await admin.client_unpause()
        assert await store.get("1", ["n"]) == {"id": "1", "n": 1}


@pytest.mark.parametrize("name", ["increment", "pop"])
async def test_when_the_connection_breaks_every_caller_is_told(shop: SessionStore, url: str, name: str) -> None:
    """A batch of calls that must not be repeated fails, and each caller is told that the outcome is unknown."""
    async with proxied(url) as (proxy, address), SessionStore.from_url(address) as store:
        proxy.scripts, proxy.swallow = 0, 1  # One connection carries all of them.
        results = await asyncio.gather(*(CALLS[name](store, n) for n in range(100)), return_exceptions=True)
        assert proxy.scripts == 1
        for result in results:
            assert isinstance(result, StoreUnavailable)
            assert "not known what was done" in str(result)
        assert len({id(result) for result in results}) == 100
    values = [session.get("n") for session in await asyncio.gather(*(shop.get(str(n), ["n"]) for n in range(100)))]
    assert values == ([n + 1 for n in range(100)] if name == "increment" else [None] * 100)


async def test_when_the_connection_breaks_a_batch_is_repeated(shop: SessionStore, url: str) -> None:
    """A batch of idempotent calls is retried after the connection breaks, and no caller notices."""
    del shop
    async with proxied(url) as (proxy, address), SessionStore.from_url(address, references=["user_id"]) as store:
        proxy.scripts, proxy.swallow = 0, 4
        found = await asyncio.gather(*(store.get(str(n), ["n"]) for n in range(100)))
        assert found == [{"id": str(n), "n": n} for n in range(100)]
        assert proxy.scripts > 4


async def test_a_full_server_refuses_every_call_of_a_batch(shop: SessionStore, admin: Redis) -> None:
    """A full server refuses every write of a batch and stores nothing; deletions still work."""
    before = await Keyspace(admin, "rss").dump()
    await admin.config_set("maxmemory", 1)
    try:
        results = await asyncio.gather(*(CALLS["set"](shop, n) for n in range(100)), return_exceptions=True)
        assert {str(result) for result in results} == {"Redis refuses: OOM"}
        assert await Keyspace(admin, "rss").dump() == before
        assert all(await asyncio.gather(*(shop.delete(str(n)) for n in range(100))))
    finally:
        await admin.config_set("maxmemory", 0)


async def test_a_mistake_of_ours_reaches_every_caller(shop: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception in the engine reaches every caller, and the next call works."""

    def fail(*_: object) -> bytes:
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr(coalesce, "pack", fail)
        results = await asyncio.gather(*(shop.get(str(n)) for n in range(300)), return_exceptions=True)
    assert {str(result) for result in results} == {"a bug in redis-session-sets: ZeroDivisionError"}
    assert {type(result.__cause__) for result in results if isinstance(result, SessionError)} == {ZeroDivisionError}
    assert await shop.get("1", ["n"]) == {"id": "1", "n": 1}


async def test_a_caller_outlives_the_end_of_all_other_tasks(shop: SessionStore, admin: Redis) -> None:
    """A call gets its reply even if all other tasks are cancelled, as at the end of an event loop."""
    await admin.client_pause(300)
    calls = [asyncio.ensure_future(shop.increment("1", "n")) for _ in range(3)]
    await asyncio.sleep(0.05)
    for task in asyncio.all_tasks() - {asyncio.current_task(), *calls}:
        task.cancel()
    assert await asyncio.gather(*calls) == [2, 3, 4]
    await admin.client_unpause()
    assert await shop.get("2", ["n"]) == {"id": "2", "n": 2}


async def test_aclose_waits_for_every_answer(url: str, shop: SessionStore) -> None:
    """`aclose` waits until all earlier calls are done."""
    store = SessionStore.from_url(url, references=["user_id", "ip"])
    calls = [asyncio.ensure_future(store.set(str(n), {"n": 0})) for n in range(200)]
    await asyncio.sleep(0)
    await store.aclose()
    assert all(call.done() for call in calls)
    assert await shop.get("199", ["n"]) == {"id": "199", "n": 0}


async def _visit(store: SessionStore, served: list[object]) -> None:
    while True:
        served.append(await store.get("1"))


async def test_aclose_ends_also_under_traffic(url: str, shop: SessionStore) -> None:
    """`aclose` returns while many callers keep calling, and later calls raise RuntimeError."""
    store = SessionStore.from_url(url)
    served: list[object] = []
    visitors = [asyncio.ensure_future(_visit(store, served)) for _ in range(20)]
    while len(served) < 1000:
        await asyncio.sleep(0)
    await asyncio.wait_for(store.aclose(), 10)
    results = await asyncio.gather(*visitors, return_exceptions=True)
    assert {str(result) for result in results if isinstance(result, RuntimeError)} == {"the store is closed"}
    with pytest.raises(RuntimeError, match="the store is closed"):
        await store.touch("1")
    assert await shop.get("1", ["n"]) == {"id": "1", "n": 1}


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("pool", [BlockingConnectionPool, ConnectionPool])
async def test_a_busy_store_takes_no_connections_of_others(
    shop: SessionStore, url: str, pool: type[ConnectionPool], limit: int
) -> None:
    """A busy store takes no connection from the client's pool, so other users of the client lose none."""
    del shop
    async with Redis.from_pool(pool.from_url(url, max_connections=limit)) as client:
        busy, other = SessionStore(client), SessionStore(client, references=["user_id"])
        served: list[object] = []
        visitors = [asyncio.ensure_future(_visit(busy, served)) for _ in range(50)]
        for _ in range(20):
            async with client.pipeline() as held:
                await held.watch("x")  # One connection of the pool is taken.
                assert await other.get("2", ["n"]) == {"id": "2", "n": 2}
            assert await client.ping()
        assert len(served) > 20
        for visitor in visitors:
            visitor.cancel()
        await asyncio.wait(visitors)
        await busy.aclose()
        await other.aclose()


async def test_a_crowded_limit_makes_small_batches(url: str, admin: Redis) -> None:
    """Creations at a crowded limit make small batches, since a script ends after about two milliseconds."""
    async with Redis.from_url(url) as client:
        store = SessionStore(client, references={"user_id": Reference(limit=100)}, prefix="crowd")
        await asyncio.gather(*(store.create({"user_id": 1}) for _ in range(100)))
        assert await _scripts_run(admin, *(store.create({"user_id": 1}) for _ in range(100))) >= 10
        assert await store.count_by("user_id", 1) == 100


async def test_an_error_that_nobody_asks_for_is_no_complaint(
    shop: SessionStore, admin: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that arrives for a cancelled call is not logged."""
    await admin.set("rss:{x}", "x", ex=60)
    for turns in range(8):
        tasks = [asyncio.create_task(shop.get("x")) for _ in range(20)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        del tasks
    await shop.operations.engine.drain()
    gc.collect()
    assert not caplog.records


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are new in Python 3.12")
async def test_eager_tasks(shop: SessionStore) -> None:
    """Eager tasks, which start inside of a call, get the right replies."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    for _ in range(3):
        found = await asyncio.gather(*(shop.get(str(n), ["n"]) for n in range(200)))
        assert found == [{"id": str(n), "n": n} for n in range(200)]
    loop.set_task_factory(None)
