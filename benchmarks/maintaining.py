"""Check, sweep and reindex many sessions while another client measures delays: `python -m benchmarks.maintaining`.

A tenth of the sessions has expired, so their ids are stale. A second store adds a reference.

The longest delay grows with the time in which it is looked for. So the row "at rest" lasts as long as the longest row
above it. And a machine that is busy stalls more often: the row "get" shows the delay while 25 tasks read sessions.
"""

import argparse
import asyncio
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from typing import Final

from redis import Redis as SyncRedis
from redis.asyncio import Redis

from benchmarks.bystander import Bystander
from benchmarks.server import own_server, pin, version
from rss import Reference, SessionStore

REFERENCES: Final = {"user_id": Reference(identity=True), "ip": Reference()}
#: How many sessions are made at the same time.
AT_ONCE: Final = 500
#: How many seconds the tasks read, and how many they are.
READING: Final = 30
READERS: Final = 25


async def fill(store: SessionStore, client: Redis, sessions: int) -> list[str]:
    """Make the sessions, three of each user, and let every tenth expire. Return the ids of the last ones."""
    ids = list[str]()
    for first in range(0, sessions, AT_ONCE):
        rows = [{"user_id": n // 3, "ip": f"10.{n % 1000}", "team": n % 5000} for n in range(first, first + AT_ONCE)]
        ids = await asyncio.gather(*map(store.create, rows))
        await client.unlink(*map(store.get_session_key, ids[::10]))
    return ids


async def read(store: SessionStore, ids: list[str]) -> None:
    """Read sessions by several tasks."""
    end = time.perf_counter() + READING

    async def read_some(mine: list[str]) -> None:
        while time.perf_counter() < end:
            for session_id in mine:
                await store.get(session_id)

    await asyncio.gather(*(read_some(ids[n::READERS]) for n in range(READERS)))


async def run(sessions: int, url: str, about: str, bystander: Bystander) -> None:
    """Measure, and print a table."""
    async with Redis.from_url(url) as client, SessionStore.from_url(url, references=REFERENCES) as store:
        ids = await fill(store, client, sessions)
        print(f"{sessions:,} sessions, of which a tenth has expired, on {about}\n")
        print("| | seconds | worst PING of another client in ms | memory of the process in MB | result |")
        print("|---|---:|---:|---:|---|")
        later = SessionStore.from_url(url, references={**REFERENCES, "team": Reference()})

        async def measure(name: str, work: Awaitable[object]) -> float:
            began = time.perf_counter()
            with bystander.pinging():
                result = await work
            spent = time.perf_counter() - began
            print(f"| {name} | {spent:.0f} | {bystander.longest:.1f} | {_memory():.0f} | {result or ''} |", flush=True)
            return spent

        spent = [await measure("get", read(store, ids))]
        spent.append(await measure("check", _kinds(store)))
        spent.append(await measure("sweep", store.maintenance.sweep()))
        spent.append(await measure("reindex", later.maintenance.reindex()))
        await measure("at rest", asyncio.sleep(max(spent)))
        await later.aclose()


async def _kinds(store: SessionStore) -> dict[str, int]:
    return dict(Counter([finding.kind async for finding in store.maintenance.check()]))


def _memory() -> float:
    """Return the most memory that the process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Read the options, and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.maintaining", description=__doc__)
    parser.add_argument("--sessions", type=int, default=1_000_000, help="how many sessions, a multiple of 500")
    sessions = parser.parse_args().sessions
    with own_server() as url, SyncRedis.from_url(url) as admin:
        if others := pin(admin):
            os.sched_setaffinity(0, others)  # Also for the bystander.
        with Bystander(url) as bystander:
            asyncio.run(run(sessions, url, version(admin), bystander))


if __name__ == "__main__":
    main()
