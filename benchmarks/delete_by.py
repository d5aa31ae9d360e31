"""Measures how long others wait while `delete_by` ends 100,000 sessions of a user: `python -m benchmarks.delete_by`."""

import asyncio
import threading
import time
from collections.abc import Awaitable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from rss import SessionStore
from rss.testing import redis_server

T = TypeVar("T")

SESSIONS = 100_000
PREFIX = "rss-benchmark"


def _longest_ping(url: str, stop: threading.Event) -> tuple[float, int]:
    """PING every millisecond until told to stop; return the longest time that one took, in ms, and their number."""
    longest, number = 0.0, 0
    with BlockingRedis.from_url(url) as client:
        client.ping()
        while not stop.wait(0.001):
            started = time.perf_counter()
            client.ping()
            longest, number = max(longest, time.perf_counter() - started), number + 1
    return longest * 1000, number


async def main() -> None:
    """Fill Redis, measure another client without load and during `delete_by`, and print both."""
    with (
        redis_server() as server,
        ProcessPoolExecutor(1, get_context("spawn")) as others,
        get_context("spawn").Manager() as shared,
    ):
        loop = asyncio.get_running_loop()

        async def bystander(work: Awaitable[T]) -> tuple[T, float, int]:
            stop = shared.Event()
            pinging = loop.run_in_executor(others, _longest_ping, server.url, stop)
            try:
                result = await work
            finally:
                stop.set()
            return result, *(await pinging)

        print(f"Redis: {server.origin}")
        async with SessionStore.from_url(server.url, references=["user_id"], prefix=PREFIX, timeout=60) as store:
            await bystander(asyncio.sleep(0.5))  # Starts the other process.
            print(f"making {SESSIONS:,} sessions of one user ...", flush=True)
            for _ in range(0, SESSIONS, 1000):
                await asyncio.gather(*(store.create({"user_id": 1, "device": "phone"}) for _ in range(1000)))
            _, rest, pings = await bystander(asyncio.sleep(3))
            print(f"longest of {pings:,} PINGs without load:      {rest:7.2f} ms")
            started = time.perf_counter()
            ended, longest, pings = await bystander(store.delete_by("user_id", 1))
            seconds = time.perf_counter() - started
            print(f"longest of {pings:,} PINGs during delete_by:  {longest:7.2f} ms")
            left = await store.count_by("user_id", 1)
            print(f"delete_by ended {ended:,} in {seconds:.2f} s, {left} are left")
            async with Redis.from_url(server.url) as client:
                async for key in client.scan_iter(match=f"{PREFIX}:*", count=1000):
                    await client.unlink(key)


if __name__ == "__main__":
    asyncio.run(main())
