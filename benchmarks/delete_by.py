"""Measures how long others wait while `delete_by` ends 100,000 sessions of a user: `python -m benchmarks.delete_by`."""

import asyncio
import time

from redis.asyncio import Redis

from benchmarks.bystander import Bystander
from rss import SessionStore
from rss.testing import redis_server

SESSIONS = 100_000
PREFIX = "rss-benchmark"


async def main() -> None:
    """Fill Redis, measure another client without load and during `delete_by`, and print both."""
    with redis_server() as server, Bystander(server.url) as bystander:
        print(f"Redis: {server.origin}")
        async with SessionStore.from_url(server.url, references=["user_id"], prefix=PREFIX, timeout=60) as store:
            print(f"making {SESSIONS:,} sessions of one user ...", flush=True)
            for _ in range(0, SESSIONS, 1000):
                await asyncio.gather(*(store.create({"user_id": 1, "device": "phone"}) for _ in range(1000)))
            with bystander.pinging():
                await asyncio.sleep(3)
            print(f"longest of {bystander.pings:,} PINGs without load:      {bystander.longest:7.2f} ms")
            started = time.perf_counter()
            with bystander.pinging():
                ended = await store.delete_by("user_id", 1)
            seconds = time.perf_counter() - started
            print(f"longest of {bystander.pings:,} PINGs during delete_by:  {bystander.longest:7.2f} ms")
            left = await store.count_by("user_id", 1)
            print(f"delete_by ended {ended:,} in {seconds:.2f} s, {left} are left")
            async with Redis.from_url(server.url) as client:
                async for key in client.scan_iter(match=f"{PREFIX}:*", count=1000):
                    await client.unlink(key)


if __name__ == "__main__":
    asyncio.run(main())
