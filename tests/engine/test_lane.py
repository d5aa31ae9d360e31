"""Broken and silent connections to a server, and their effect on callers."""

import asyncio
import contextlib
import itertools
from typing import Any

import pytest
from redis.asyncio import Redis

from rss import SessionError, SessionStore, StoreUnavailable
from tests.engine.callers import kill, outcomes, works
from tests.servers import connections, fake, ones, own_server, proxied, stopped, wired

# ---------------------------------------------------------------------- the connection breaks


async def test_under_load_no_call_that_may_be_repeated_fails(url: str, admin: Redis) -> None:
    """Idempotent calls under load never fail while connections are cut, and each gets its own reply."""
    del admin
    async with SessionStore.from_url(url, timeout=20) as store, Redis.from_url(url) as killer:
        await works(store, 600)
        done = 0

        async def read(n: int) -> None:
            nonlocal done
            for _ in range(20):
                assert await store.get(f"w{n}", ["n"]) == {"id": f"w{n}", "n": n}
                done += 1

        async def cut() -> None:
            # It ends by itself: redis-py may lose the cancellation of a command.
            while not all(one.done() for one in reading):
                before = done
                await kill(killer)
                while done < before + 300 and not all(one.done() for one in reading):
                    await asyncio.sleep(0)

        reading = [asyncio.ensure_future(read(n)) for n in range(600)]
        results = await outcomes([*reading, cut()], within=50)
        assert results == [None] * 601


async def test_what_must_not_be_repeated_runs_once(url: str, admin: Redis) -> None:
    """Each increment runs once, or its caller is told that the outcome is unknown."""
    del admin
    async with SessionStore.from_url(url, timeout=20) as store, Redis.from_url(url) as killer:
        await store.set("a", {"n": 0})
        counted = unknown = 0

        async def count() -> None:
            nonlocal counted, unknown
            for _ in range(50):
                try:
                    await store.increment("a", "n")
                    counted += 1
                except StoreUnavailable as error:
                    unknown += "not known what was done" in str(error)

        counting = [asyncio.ensure_future(count()) for _ in range(20)]
        for n in itertools.count():
            await kill(killer)
            while counted + unknown < 40 * (n + 1) and not all(one.done() for one in counting):
                await asyncio.sleep(0)
            if all(one.done() for one in counting):
                break
        await outcomes(counting)
        assert counted + unknown == 1000
        assert counted <= (await store.get("a", ["n"]))["n"] <= 1000


async def test_an_idle_connection_that_broke_costs_no_failure(url: str, admin: Redis) -> None:
    """The loss of an idle connection is noticed before the next call, so even an `increment` succeeds."""
    async with SessionStore.from_url(url) as store:
        await store.set("a", {"n": 0})
        for n in range(20):
            await kill(admin)
            while await connections(admin):
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            assert await store.increment("a", "n") == n + 1


async def test_two_calls_by_reference_that_lose_their_replies() -> None:
    """Two calls by reference that lose their replies are retried in separate scripts, and get their own results."""
    with own_server() as url:  # A script with two pages could run for ever.
        async with proxied(url) as (proxy, address):
            store = SessionStore.from_url(address, references=["user_id"], timeout=20)
            for value in (1, 2):
                await asyncio.gather(*(store.create({"user_id": value}) for _ in range(30 * value)))
            await store.ids_by("user_id", 1)
            proxy.swallow = 1
            found = await outcomes(store.ids_by("user_id", value) for value in (1, 2))
            assert [len(ids) if isinstance(ids, list) else ids for ids in found] == [30, 60]
            proxy.swallow = 1
            for ended, most in zip(
                await outcomes(store.delete_by("user_id", n) for n in (1, 2)), (30, 60), strict=True
            ):
                assert isinstance(ended, int)
                assert ended <= most
            assert await outcomes(store.ids_by("user_id", value) for value in (1, 2)) == [[], []]
            await store.aclose()


# ---------------------------------------------------------------------- a call that breaks connections


async def test_a_call_that_breaks_connections_takes_no_other_with_it() -> None:
    """A call that breaks connections fails alone at its deadline; other calls are retried a few times at most."""
    runs: dict[bytes, int] = {}

    def hang_up(command: list[bytes]) -> bytes | None:
        for key in command[3 : 3 + int(command[2])]:
            runs[key] = runs.get(key, 0) + 1
        return None if b"rss:{poison}" in command else ones(command)

    async with fake(hang_up) as server:
        store = SessionStore.from_url(server.url, timeout=2)
        poison = asyncio.ensure_future(store.touch("poison"))
        for turn in itertools.count():
            found = await outcomes(store.touch(f"{turn}-{n}") for n in range(500))
            assert found == [True] * 500
            if poison.done():
                break
        with pytest.raises(StoreUnavailable, match="within the deadline: ConnectionError"):
            await poison
        alone = runs.pop(b"rss:{poison}")
        assert 4 < alone < 80
        # Other calls run in the first volley with the poison, once more with it, and then without it.
        assert max(runs.values()) <= 3
        assert sum(runs.values()) - len(runs) <= 600
        await store.aclose()


async def test_many_calls_that_break_connections_fail_alone() -> None:
    """Many calls that break connections fail at their deadlines, and the other calls do not."""

    def hang_up(command: list[bytes]) -> bytes | None:
        keys = command[3 : 3 + int(command[2])]
        return None if any(b"poison" in key for key in keys) else ones(command)

    async with fake(hang_up) as server:
        store = SessionStore.from_url(server.url, timeout=4)
        found = await outcomes(store.touch(f"poison{n}" if n % 20 == 7 else f"{n}") for n in range(100))
        assert [n for n in range(100) if found[n] is not True] == [n for n in range(100) if n % 20 == 7]
        assert {type(one) for one in found if one is not True} == {StoreUnavailable}
        await store.aclose()


async def test_calls_that_break_connections_are_cancelled() -> None:
    """Calls that break connections can be cancelled; the others fail at their deadlines, and the store works."""

    def hang_up(command: list[bytes]) -> bytes | None:
        keys = command[3 : 3 + int(command[2])]
        return None if any(b"poison" in key for key in keys) else ones(command)

    async with fake(hang_up) as server:
        store = SessionStore.from_url(server.url, timeout=1)
        calls = [asyncio.ensure_future(store.touch(f"poison{n}")) for n in range(20)]
        await asyncio.sleep(0.2)
        for call in calls[::2]:
            call.cancel()
            await asyncio.sleep(0.03)
        found = await outcomes(calls)
        assert {type(one) for one in found[::2]} == {asyncio.CancelledError}
        assert {type(one) for one in found[1::2]} == {StoreUnavailable}
        assert await store.touch("a")
        await store.aclose()


@pytest.mark.parametrize("callers", [20, 500])
async def test_a_reply_over_the_output_limit(url: str, admin: Redis, callers: int) -> None:
    """A reply over the output limit fails its own call; increments in flight with it have an unknown outcome."""
    await admin.config_set("client-output-buffer-limit", "normal 1mb 1mb 1")
    try:
        async with SessionStore.from_url(url, timeout=2) as store:
            await store.set("large", {"v": "x" * 3_000_000})
            await works(store, callers)
            poison = asyncio.ensure_future(store.get("large"))
            unknown = 0
            while not poison.done():
                reads = [store.get(f"w{n}", ["n"]) for n in range(callers)]
                counts = [store.increment(f"w{n}", "m") for n in range(20)]
                found = await outcomes([*reads, *counts])
                assert found[:callers] == [{"id": f"w{n}", "n": n} for n in range(callers)]
                failed = [one for one in found[callers:] if not isinstance(one, int)]
                assert all("not known what was done" in str(one) for one in failed)
                unknown += len(failed)
            assert unknown <= 20, "only increments in flight with the large reply may fail"
            with pytest.raises(StoreUnavailable, match="within the deadline"):
                await poison
    finally:
        await admin.config_set("client-output-buffer-limit", "normal 0 0 0")


@pytest.mark.parametrize("callers", [20, 500])
async def test_a_value_over_the_limit_of_the_protocol(url: str, admin: Redis, callers: int) -> None:
    """A value over the protocol limit fails its own call, although Redis blames the first call of the batch."""
    await admin.config_set("proto-max-bulk-len", 1024 * 1024)
    try:
        async with SessionStore.from_url(url, timeout=30) as store:
            guilty = callers - 5
            calls = [store.set(f"w{n}", {"v": "x" * (2_000_000 if n == guilty else 10)}) for n in range(callers)]
            found = await outcomes(calls)
            assert [n for n, one in enumerate(found) if isinstance(one, BaseException)] == [guilty]
            assert isinstance(found[guilty], SessionError)
            assert await store.get("w0", ["v"]) == {"id": "w0", "v": "x" * 10}
    finally:
        await admin.config_set("proto-max-bulk-len", 512 * 1024 * 1024)


# ---------------------------------------------------------------------- silence


async def test_a_connection_that_goes_silent_is_replaced(url: str, admin: Redis) -> None:
    """A silent connection is replaced before the deadline if another one gets replies; an `increment` fails."""
    del admin
    async with wired(url) as wire, SessionStore.from_url(wire.url, timeout=6) as store:
        await store.set("a", {"n": 1})
        wire.silence()
        read, counted, touched = await outcomes([store.get("a", ["n"]), store.increment("a", "n"), store.touch("a")])
        assert read == {"id": "a", "n": 1}
        assert "not known what was done" in str(counted)
        assert touched is True
        assert await store.increment("a", "n") == 2


async def test_an_idle_connection_that_was_dropped_costs_one_attempt(url: str, admin: Redis) -> None:
    """A dropped idle connection costs one attempt, on the lane of calls and on the lane of pages."""
    del admin
    async with wired(url) as wire:
        store = SessionStore.from_url(wire.url, references=["user_id"], timeout=3)
        created = await store.create({"user_id": 1})
        assert await store.ids_by("user_id", 1) == [created]
        for _ in range(2):
            wire.silence()
            assert await store.touch(created)
            assert await store.ids_by("user_id", 1) == [created]
        # Once one lane has noticed the loss, the idle connections of the other lanes are not trusted either.
        wire.silence()
        assert await store.ids_by("user_id", 1) == [created]
        assert await store.increment(created, "n") == 1
        await store.aclose()


async def test_a_server_that_stands_still_is_waited_for(url: str, admin: Redis) -> None:
    """Calls wait for a server that stands still: none of them fails or runs twice."""
    async with SessionStore.from_url(url, references=["user_id"], timeout=3) as store:
        await store.set("a", {"user_id": 1, "n": 0})
        assert await store.ids_by("user_id", 1) == ["a"]
        await admin.config_resetstat()
        async with stopped(admin):
            calls = [asyncio.ensure_future(store.increment("a", "n")) for _ in range(20)]
            page = asyncio.ensure_future(store.ids_by("user_id", 1))
            await asyncio.sleep(1.3)  # Longer than a third of the deadline, when the engine begins to doubt.
            assert not any(call.done() for call in calls)
        assert sorted(await outcomes(calls), key=str) == sorted(range(1, 21), key=str)
        assert await outcomes([page]) == [["a"]]
        assert await store.increment("a", "n") == 21


async def test_a_server_that_stands_still_for_too_long(url: str, admin: Redis) -> None:
    """Calls fail at their deadlines while the server stands still, and later calls work when it goes on."""
    async with SessionStore.from_url(url, timeout=0.6) as store:
        await store.set("a", {"n": 0})
        async with stopped(admin):
            for _ in range(2):
                for found in await outcomes([store.touch("a"), store.get("a")]):
                    assert isinstance(found, StoreUnavailable)
                    assert "within the deadline" in str(found)
        async with SessionStore.from_url(url, timeout=20) as other:
            assert await other.touch("a")
        assert await works(store)


async def test_a_slow_script_of_others_costs_no_failure(url: str, admin: Redis) -> None:
    """Calls wait while a slow script of others keeps the server busy, and none of them fails."""
    del admin
    async with SessionStore.from_url(url, timeout=3) as store:
        await store.set("a", {"n": 0})
        loop = asyncio.get_running_loop()
        turns = "for _ = 1, ARGV[1] do end"
        async with Redis.from_url(url, socket_timeout=None) as other:
            began = loop.time()
            await other.eval(turns, 0, 10**7)
            enough = int(1.3 / (loop.time() - began) * 10**7)
            running: asyncio.Future[Any] = asyncio.ensure_future(other.eval(turns, 0, enough))
            await asyncio.sleep(0.1)
            assert sorted(await outcomes([store.increment("a", "n") for _ in range(10)]), key=str) == sorted(
                range(1, 11), key=str
            )
            await running


async def test_a_way_that_is_dead_for_a_while(url: str, admin: Redis) -> None:
    """Calls fail at their deadlines while no connection gets replies, and work again afterwards."""
    del admin
    async with wired(url) as wire, SessionStore.from_url(wire.url, timeout=0.5) as store:
        await store.set("a", {"n": 1})
        dead = True

        async def drop() -> None:
            while dead:
                wire.silence()
                await asyncio.sleep(0)

        dropping = asyncio.create_task(drop())
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="within the deadline"):
                await store.touch("a")
        dead = False
        await dropping
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    if await store.touch("a"):
                        break
