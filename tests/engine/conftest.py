"""The engine is tested on every event loop, with a server for each file of tests."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
from redis.asyncio import Redis

from tests.conftest import LOOPS


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run each test on every event loop."""
    return LOOPS


@pytest.fixture(name="admin")
async def _admin(url: str) -> AsyncIterator[Redis]:
    """A client of the server of this file; the server is empty and as configured at the start."""
    async with Redis.from_url(url, decode_responses=True) as client:
        await client.flushall()
        await client.script_flush()
        yield client
