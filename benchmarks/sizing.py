"""Compute what a number of sessions needs, from what they take on a real server: `python -m benchmarks.sizing`.

It makes sessions like yours, measures the memory and the processor time of Redis for each, and multiplies.
"""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from redis import Redis

from benchmarks import server, tables
from rss import SessionStore

_MADE: Final = 20_000
# The share of its core that a server should use at most, and of its memory.
_LOAD: Final = 0.5


async def measure(url: str, admin: Redis, *, fields: int, size: int, references: int) -> tuple[float, dict[str, float]]:
    """Return the bytes that a session takes, and the microseconds of Redis for some operations on it, each alone."""
    names = [f"reference{n}" for n in range(references)]
    more = {f"field{n}": "x" * size for n in range(fields)}
    async with SessionStore.from_url(url, references=names) as store:
        server.settle(admin)
        before = _info(admin, "memory", "used_memory")
        ids: list[str] = []
        for start in range(0, _MADE, 100):
            rows = [{**dict.fromkeys(names, n // 2), **more} for n in range(start, start + 100)]
            ids += await asyncio.gather(*map(store.create, rows))
        held = (_info(admin, "memory", "used_memory") - before) / _MADE

        spent: dict[str, float] = {}
        calls: dict[str, Callable[[str], Awaitable[object]]] = {
            "get": store.get,
            "set": lambda one: store.set(one, more),
            "rotate": store.rotate,
        }
        for name, call in calls.items():
            began = _seconds(admin)
            for one in ids[:2000]:
                await call(one)
            spent[name] = (_seconds(admin) - began) / 2000 * 1e6
    return held, spent


def _info(admin: Redis, section: str, name: str) -> float:
    about: dict[str, Any] = admin.info(section)
    return float(about[name])


def _seconds(admin: Redis) -> float:
    return _info(admin, "cpu", "used_cpu_user") + _info(admin, "cpu", "used_cpu_sys")


def main() -> None:
    """Measure, and print what the given number of sessions needs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizing", description=__doc__)
    parser.add_argument("--sessions", type=int, default=1_000_000, help="sessions that are alive at a time")
    parser.add_argument("--fields", type=int, default=3, help="fields of a session, without references")
    parser.add_argument("--bytes", type=int, default=20, help="bytes of each of them")
    parser.add_argument("--references", type=int, default=2, help="references")
    parser.add_argument("--requests", type=int, default=1000, help="requests a second: each reads its session")
    options = parser.parse_args()
    with server.own_server() as url, Redis.from_url(url) as admin:
        held, spent = asyncio.run(
            measure(url, admin, fields=options.fields, size=options.bytes, references=options.references)
        )
    memory = held * options.sessions
    share = spent["get"] * options.requests / 1e6
    print(f"A session takes {held:,.0f} bytes. Redis works for each operation alone, in microseconds:\n")
    print(tables.table([*spent], [[f"{value:.1f}" for value in spent.values()]]))
    print(
        f"\n{options.sessions:,} sessions take {memory / 2**30:.1f} GiB. Give Redis {memory / _LOAD / 2**30:.1f} GiB: "
        f"a fork for persistence may need as much again.\n{options.requests:,} requests a second that each read a "
        f"session take {share:.0%} of a core of Redis, at most."
    )
    if share > _LOAD or memory > 16 * 2**30:
        print("That is more than one server should have: see the guide to Redis Cluster.")


if __name__ == "__main__":
    main()
