"""Missing servers are dialled as long as a caller waits, and no longer."""

import asyncio
import time
from pathlib import Path

import pytest
from redis.asyncio import Redis

from rss import SessionStore
from rss.testing import free_port
from tests.engine.callers import Hours, outcomes, works
from tests.servers import fake, ones, own_server


async def test_a_server_that_is_gone_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store connects as soon as a server is back, even after hours."""
    port, hours = free_port(), Hours(monkeypatch)
    async with Redis(port=port) as client:
        store = SessionStore(client, timeout=40)
        calls = [asyncio.ensure_future(store.touch(str(n))) for n in range(5)]
        await asyncio.wait([asyncio.ensure_future(hours.pass_by()), *calls], return_when=asyncio.FIRST_COMPLETED)
        assert hours.attempts >= 1100
        with own_server("--port", str(port), "--bind", "127.0.0.1"):
            assert await outcomes(calls) == [False] * 5
            assert await works(store)
            await store.aclose()


async def test_a_server_that_refuses_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run as soon as a server no longer refuses them, even after hours."""
    hours, refusing = Hours(monkeypatch), True
    async with fake(lambda command: b"-READONLY later\r\n" if refusing else ones(command)) as server:
        store = SessionStore.from_url(server.url, timeout=40)
        calls = [asyncio.ensure_future(store.touch(str(n))) for n in range(5)]
        await asyncio.wait([asyncio.ensure_future(hours.pass_by()), *calls], return_when=asyncio.FIRST_COMPLETED)
        assert hours.attempts >= 1100
        refusing = False
        assert await outcomes(calls) == [True] * 5
        await store.aclose()


async def test_a_caller_that_is_gone_leaves_nothing_to_do() -> None:
    """A missing server is no longer dialled after all callers gave up, and the processor is idle."""
    async with Redis.from_url("unix:///nowhere/redis.sock") as client:
        store = SessionStore(client, references=["user_id"], timeout=30)
        calls = [asyncio.ensure_future(store.touch("a")), asyncio.ensure_future(store.ids_by("user_id", 1))]
        await asyncio.sleep(0.2)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await asyncio.sleep(0.5)  # The attempt in progress ends.
        before = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - before < 0.5
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await store.aclose()


async def test_a_restart_with_another_state(tmp_path: Path) -> None:
    """Calls wait for a server that restarts without its scripts and its data."""
    port = free_port()
    arguments = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path))
    async with Redis(port=port) as client:
        store = SessionStore(client, timeout=30)
        with own_server(*arguments):
            assert await works(store)
        calls = [asyncio.ensure_future(store.touch(f"w{n}")) for n in range(50)]
        await asyncio.sleep(0.3)
        with own_server(*arguments):
            assert await outcomes(calls) == [False] * 50
            assert await works(store)
            await store.aclose()
