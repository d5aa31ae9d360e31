"""The number of commands of each operation: scripts are fast because they do nothing twice."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, NamedTuple

import pytest
from redis.asyncio import Redis

from rss import Reference, SessionStore

SESSIONS: Final = 40
# Commands that are not counted: the scripts themselves, loading them, TIME once a script, and those of this test.
UNCOUNTED: Final = {"evalsha", "script", "script|load", "time", "info", "config", "config|resetstat"}


class Budget(NamedTuple):
    """A call for one session, and the highest number of commands that it may run."""

    call: Callable[[SessionStore, str], Awaitable[Any]]
    commands: int


BUDGETS: Final[dict[str, Budget]] = {
    "get": Budget(lambda s, i: s.get(i), 2),
    "get of some fields": Budget(lambda s, i: s.get(i, ["name"]), 2),
    "get of a session that is not there": Budget(lambda s, _: s.get("nobody"), 1),
    "get that renews": Budget(lambda s, i: s.get(i, touch=True), 3),
    "get that need not renew": Budget(lambda s, i: s.get(i, touch="1m"), 2),
    "touch": Budget(lambda s, i: s.touch(i), 3),
    "set with the same references": Budget(lambda s, i: s.set(i, {"user_id": 1, "ip": "x", "name": "bob"}), 6),
    "set without references": Budget(lambda s, i: s.set(i, {"name": "bob"}), 6),
    "set that moves one of two": Budget(lambda s, i: s.set(i, {"user_id": 2}), 11),
    "create": Budget(lambda s, _: s.create({"user_id": 1, "ip": "x", "name": "bob"}), 11),
    "rotate": Budget(lambda s, i: s.rotate(i), 13),
    "rotate that moves one": Budget(lambda s, i: s.rotate(i, {"user_id": 2}), 15),
    "unset of a field": Budget(lambda s, i: s.unset(i, ["name"]), 7),
    "unset of a reference": Budget(lambda s, i: s.unset(i, ["user_id"]), 8),
    "pop of a field": Budget(lambda s, i: s.pop(i, ["name"]), 6),
    "increment": Budget(lambda s, i: s.increment(i, "n"), 3),
    "delete": Budget(lambda s, i: s.delete(i), 7),
    "count_by that is not exact": Budget(lambda s, _: s.count_by("user_id", 1, exact=False), 2),
    "blocked": Budget(lambda s, _: s.blocked("user_id", 1), 1),
    "unblock of what is not blocked": Budget(lambda s, _: s.unblock("user_id", 1), 1),
}


@pytest.fixture(name="admin")
async def _admin(url: str) -> AsyncIterator[Redis]:
    """A client of the server of this file, whose statistics count no other tests."""
    async with Redis.from_url(url, decode_responses=True) as client:
        await client.flushall()
        yield client


async def _commands(admin: Redis, *calls: Awaitable[Any]) -> dict[str, int]:
    """Run calls at the same time, and return how often each command ran in Redis."""
    await admin.config_resetstat()
    await asyncio.gather(*calls)
    stats = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in (await admin.info("commandstats")).items()}
    return {name: calls for name, calls in stats.items() if name not in UNCOUNTED}


async def _time_runs_on(admin: Redis) -> bool:
    """Return whether time passes inside scripts, as it did before Redis 7.2."""
    version = (await admin.info("server"))["redis_version"]
    return tuple(map(int, version.split(".")[:2])) < (7, 2)


@pytest.mark.parametrize("name", BUDGETS)
async def test_an_operation_keeps_its_budget(url: str, admin: Redis, name: str) -> None:
    """An operation on a batch runs no more commands for each session than its budget.

    No id in the sets is expired. The sessions share their sets with others, so a session that moves joins an existing
    set.
    """
    references = {"user_id": Reference(), "ip": Reference()}
    async with SessionStore.from_url(url, references=references) as store:
        for user in (1, 2):
            await asyncio.gather(*(store.create({"user_id": user, "ip": "x"}) for _ in range(20)))
        ids = await asyncio.gather(
            *(store.create({"user_id": 1, "ip": "x", "name": "alice", "n": 1}) for _ in range(SESSIONS))
        )
        call, budget = BUDGETS[name]
        await call(store, ids.pop())  # Loads the scripts.
        commands = await _commands(admin, *(call(store, session_id) for session_id in ids))
    if await _time_runs_on(admin):
        budget += 1  # A set may seem to expire a millisecond too early, and gets its TTL again.
    assert sum(commands.values()) <= budget * len(ids), commands


@pytest.mark.parametrize("sessions", [1, 100])
async def test_the_time_is_read_once_a_script(url: str, admin: Redis, sessions: int) -> None:
    """A script reads the time once for a whole batch, or not at all if it needs no time."""
    async with SessionStore.from_url(url, references=["user_id"]) as store:
        ids = await asyncio.gather(*(store.create({"user_id": 1}) for _ in range(sessions)))
        await store.get("nobody", touch=True)
        for call, reads_time in ((store.touch, True), (store.get, False), (store.delete, False)):
            await admin.config_resetstat()
            await asyncio.gather(*(call(session_id) for session_id in ids))
            stats = await admin.info("commandstats")
            times = stats.get("cmdstat_time", {"calls": 0})["calls"]
            assert times == (stats["cmdstat_evalsha"]["calls"] if reads_time else 0)


async def test_a_quick_count_costs_the_same_whatever_it_counts(url: str, admin: Redis) -> None:
    """A quick count takes two commands, while the exact count reads hundreds of sessions."""
    async with SessionStore.from_url(url, references=["user_id"]) as store:
        await asyncio.gather(*(store.create({"user_id": 1}) for _ in range(300)))
        await store.count_by("user_id", 1, exact=False)
        assert await _commands(admin, store.count_by("user_id", 1, exact=False)) == {"hget": 1, "scard": 1}
        assert sum((await _commands(admin, store.count_by("user_id", 1))).values()) >= 300
