"""Helpers that call a store, and check what each caller gets."""

import asyncio
from collections.abc import Awaitable, Iterable

import pytest
from redis.asyncio import Redis
from redis.backoff import EqualJitterBackoff

from rss import SessionStore


async def outcomes(calls: Iterable[Awaitable[object]], within: float = 20) -> list[object]:
    """Run calls at the same time, and return the result or the exception of each. Fails if one hangs."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    _, hanging = await asyncio.wait(tasks, timeout=within)
    assert not hanging, f"{len(hanging)} of {len(tasks)} calls have no outcome"
    return await asyncio.gather(*tasks, return_exceptions=True)


async def works(store: SessionStore, calls: int = 50) -> bool:
    """Write and read sessions at the same time, and return whether each caller got its own session."""
    await asyncio.gather(*(store.set(f"w{n}", {"n": n}) for n in range(calls)))
    found = await asyncio.gather(*(store.get(f"w{n}", ["n"]) for n in range(calls)))
    return found == [{"id": f"w{n}", "n": n} for n in range(calls)]


async def kill(admin: Redis) -> None:
    """Cut all connections except the administrator's."""
    await admin.client_kill_filter(_type="normal", skipme=True)


class Hours:
    """Makes all waits between attempts zero, so that hours of failures pass in a moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = EqualJitterBackoff.compute
        self.attempts = 0

        def compute(backoff: EqualJitterBackoff, failures: int) -> float:
            self.attempts += 1
            assert real(backoff, failures) <= 0.25
            return 0

        monkeypatch.setattr(EqualJitterBackoff, "compute", compute)

    async def pass_by(self) -> None:
        """Wait for 1,100 attempts: a wait that doubled each time would overflow a float by then."""
        while self.attempts < 1100:
            await asyncio.sleep(0.001)
