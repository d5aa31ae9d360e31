"""Callers of a store, and what each of them gets."""

import asyncio
from collections.abc import Awaitable, Iterable

from redis.asyncio import Redis

from rss import SessionStore


async def outcomes(calls: Iterable[Awaitable[object]], within: float = 20) -> list[object]:
    """Run calls at the same time, and return the result or the exception of each. Fails if one hangs."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    _, hanging = await asyncio.wait(tasks, timeout=within)
    assert not hanging, f"{len(hanging)} of {len(tasks)} calls have no outcome"
    return await asyncio.gather(*tasks, return_exceptions=True)


async def works(store: SessionStore, calls: int = 50) -> bool:
    """Write and read that many sessions at the same time, and return whether each caller got its own back."""
    await asyncio.gather(*(store.set(f"w{n}", {"n": n}) for n in range(calls)))
    found = await asyncio.gather(*(store.get(f"w{n}", ["n"]) for n in range(calls)))
    return found == [{"id": f"w{n}", "n": n} for n in range(calls)]


async def kill(admin: Redis) -> None:
    """Cut all connections but that of the administrator."""
    await admin.client_kill_filter(_type="normal", skipme=True)
