"""Move sessions from one Redis to a cluster while visitors use them: `python -m benchmarks.moving`.

Each visitor knows what its sessions must hold. At the end, every session is read from the cluster alone.
"""

import argparse
import asyncio
import random
import sys
import time
from typing import Final

from redis.asyncio import Redis, RedisCluster

from rss import Reference, SessionStore
from rss.moving import MovingStore
from rss.testing import cluster, local_server, server_binary

VISITORS: Final = 40
REFERENCES: Final = {"user_id": Reference(identity=True), "ip": Reference()}
#: How many sessions are made or read at the same time.
AT_ONCE: Final = 500


class Visits:
    """Tasks that use the sessions, and the numbers of visits and of losses."""

    def __init__(self, store: SessionStore, ids: list[str]) -> None:
        self.held = dict.fromkeys(ids, 0)
        self.made = self.signed_out = self.lost = 0
        self.worst = 0.0
        self._store = store
        self._ids = ids

    async def run(self, number: int, stop: asyncio.Event) -> None:
        """Visit sessions of one's own until the event: read them, and write to half of them."""
        rnd, mine = random.Random(number), self._ids[number::VISITORS]
        while not stop.is_set():
            session_id, began = rnd.choice(mine), time.perf_counter()
            session = await self._store.get(session_id)
            self.signed_out += not session
            self.lost += session.get("n", 0) != self.held[session_id]
            if session and rnd.random() < 0.5:
                self.held[session_id] += 1
                self.lost += await self._store.increment(session_id, "n") != self.held[session_id]
            self.made += 1
            self.worst = max(self.worst, time.perf_counter() - began)

    async def check(self, store: SessionStore) -> int:
        """Read all sessions, and return how many do not hold what they must."""
        wrong = 0
        for first in range(0, len(self._ids), AT_ONCE):
            ids = self._ids[first : first + AT_ONCE]
            for session_id, session in zip(ids, await asyncio.gather(*map(store.get, ids)), strict=True):
                wrong += session.get("n") != self.held[session_id]
        return wrong


async def run(sessions: int) -> int:
    """Move so many sessions. Return how many of them were lost, or signed out."""
    binary = server_binary()
    assert binary
    with local_server(binary) as url, cluster() as servers:
        address = servers.url.replace("+cluster", "")
        async with Redis.from_url(url) as old, RedisCluster.from_url(address) as new:
            source = SessionStore(old, references=REFERENCES)
            ids: list[str] = []
            for first in range(0, sessions, AT_ONCE):
                numbers = range(first, min(first + AT_ONCE, sessions))
                values = [{"user_id": n // 3, "ip": f"{n % 5000}", "n": 0} for n in numbers]
                ids += await asyncio.gather(*map(source.create, values))
            store = MovingStore(new, source=source, references=REFERENCES, partition_by_identity=False, timeout=20)
            visits, stop = Visits(store, ids), asyncio.Event()
            visiting = [asyncio.create_task(visits.run(number, stop)) for number in range(VISITORS)]
            began = time.perf_counter()
            await store.move_all()
            seconds = time.perf_counter() - began
            stop.set()
            await asyncio.gather(*visiting)
            plain = SessionStore(new, references=REFERENCES, partition_by_identity=False)
            wrong = await visits.check(plain)
            print(
                f"{sessions:,} sessions moved in {seconds:.0f} s, during {visits.made:,} visits by {VISITORS} tasks "
                f"(worst {visits.worst:.2f} s): signed out {visits.signed_out}, lost {visits.lost + wrong}"
            )
            for one in (source, store, plain):
                await one.aclose()
            return wrong + visits.lost + visits.signed_out


def main() -> None:
    """Run it, and fail if a session is lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moving", description=__doc__)
    parser.add_argument("--sessions", type=int, default=100_000)
    sys.exit(1 if asyncio.run(run(parser.parse_args().sessions)) else 0)


if __name__ == "__main__":
    main()
