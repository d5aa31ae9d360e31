"""A store that runs for months leaks nothing."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from rss import SessionStore, StoreUnavailable
from tests.engine.callers import Hours, kill, outcomes, works


@pytest.fixture(name="client")
async def _client(url: str) -> AsyncIterator[Redis]:
    """A client of the server of this file."""
    async with Redis.from_url(url) as client:
        yield client


DESCRIPTORS = Path("/proc/self/fd")
here_only = pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="descriptors are counted in /proc")


def _left() -> tuple[int, int]:
    """Return how many objects and descriptors there are."""
    gc.collect()
    return len(gc.get_objects()), len([*DESCRIPTORS.iterdir()])


@here_only
@pytest.mark.parametrize("how", ["cut", "closed", "refused"])
async def test_connections_leave_nothing(url: str, admin: Redis, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A thousand connections leave no objects and no descriptors, however they end."""
    hours = Hours(monkeypatch)
    async with Redis.from_url("unix:///nowhere/redis.sock" if how == "refused" else url) as client:
        store = SessionStore(client, timeout=0.06 if how == "refused" else 20)

        async def end(connections: int) -> None:
            until = hours.attempts + connections
            while how == "refused" and hours.attempts < until:
                with pytest.raises(StoreUnavailable):
                    await store.touch("a")
            for _ in range(connections if how != "refused" else 0):
                await store.touch("a")
                if how == "cut":
                    await kill(admin)
                else:
                    await store.aclose()
                    await store.__aenter__()

        await end(100)
        await asyncio.sleep(0.1)
        objects, descriptors = _left()
        await end(1000)
        await asyncio.sleep(0.1)
        more, open_now = _left()
        assert more - objects < 300
        assert open_now <= descriptors + 1
        await store.aclose()


@here_only
async def test_work_leaves_nothing(client: Redis, admin: Redis) -> None:
    """Calls that succeed, fail or are cancelled leave no objects and no descriptors."""
    store = SessionStore(client, references=["user_id"], timeout=20)
    await admin.set("rss:{x}", "x", ex=600)

    async def once() -> None:
        calls = [asyncio.ensure_future(store.get("x" if n % 3 else "a")) for n in range(50)]
        await asyncio.sleep(0)
        for call in calls[::5]:
            call.cancel()
        await outcomes(calls)
        await store.ids_by("user_id", 1)

    for _ in range(20):
        await once()
    objects, descriptors = _left()
    for _ in range(200):
        await once()
    more, open_now = _left()
    assert more - objects < 300
    assert open_now <= descriptors + 1
    await store.aclose()


async def test_an_idle_store_does_nothing(client: Redis) -> None:
    """No timer wakes the processor when no call waits."""
    store = SessionStore(client, timeout=0.5)
    await works(store)
    await asyncio.sleep(1)  # Longer than the deadline of these calls.
    before = time.process_time()
    await asyncio.sleep(1)
    assert time.process_time() - before < 0.2
    await store.aclose()
