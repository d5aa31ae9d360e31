"""Measures what observers and events add to the processor time of a call: `python -m benchmarks.observing`.

One process has a store for each observer, then one for each kind of events. The stores get short turns, one after the
other, in rounds. In each round, the time of a call is compared with that of the first store.
"""

import argparse
import asyncio
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from prometheus_client import CollectorRegistry
from redis import Redis

from benchmarks import server, tables
from rss import SessionStore
from rss.observe import Observation, Observer
from rss.observe.logging import Logging
from rss.observe.opentelemetry import OpenTelemetry
from rss.observe.prometheus import Prometheus

_SESSIONS: Final = 500
_SECONDS: Final = 0.15


def _nothing(observation: Observation) -> None:
    del observation


def _telemetry(sampler: Sampler) -> OpenTelemetry:
    """Return an observer with the SDK of OpenTelemetry, whose spans and metrics are not exported."""
    return OpenTelemetry(TracerProvider(sampler), MeterProvider([InMemoryMetricReader()]))


def _observers() -> dict[str, Observer | None]:
    return {
        "none": None,
        "a function that does nothing": _nothing,
        "`Logging`, nothing to log": Logging("10s"),
        "`Prometheus`": Prometheus(CollectorRegistry()),
        "`OpenTelemetry`, no span sampled": _telemetry(ALWAYS_OFF),
        "`OpenTelemetry`, every span sampled, without export": _telemetry(ALWAYS_ON),
    }


class Visits:
    """A store, and sessions in it."""

    def __init__(self, store: SessionStore, admin: Redis) -> None:
        self._store = store
        self._admin = admin
        self._ids: list[str] = []

    async def fill(self) -> None:
        """Make the sessions."""
        for n in range(_SESSIONS):
            self._ids.append(await self._login(n))

    async def _login(self, n: int) -> str:
        return await self._store.create({"user_id": n // 10, "ip": f"10.0.0.{n // 20}", "visits": 0})

    async def turn(self, operation: str, tasks: int) -> tuple[float, float]:
        """Let *tasks* tasks call one operation. Return the microseconds of processor time of a call: ours, Redis'."""
        calls, until = 0, time.perf_counter() + _SECONDS

        async def work(ids: Sequence[str]) -> None:
            nonlocal calls
            for session_id in itertools.cycle(ids):
                if time.perf_counter() >= until:
                    return
                if operation == "get":
                    await self._store.get(session_id)
                elif operation == "set":
                    await self._store.set(session_id, {"visits": calls})
                else:
                    await self._store.delete(await self._login(calls))
                calls += 1

        before, theirs = time.process_time(), server.seconds(self._admin)
        await asyncio.gather(*(work(self._ids[n::tasks]) for n in range(tasks)))
        ours = time.process_time() - before
        return ours / calls * 1e6, (server.seconds(self._admin) - theirs) / calls * 1e6


async def measure(
    stores: Mapping[str, SessionStore], cases: Sequence[tuple[str, int]], admin: Redis, rounds: int, *, theirs: bool
) -> str:
    """Return a table: the time of a call of the first store, and what each other store adds to it.

    *theirs*: whether the table shows the time of Redis too, behind a slash.
    """
    visits = [Visits(store, admin) for store in stores.values()]
    for one in visits:
        await one.fill()
    gc.collect()
    gc.freeze()
    columns: list[list[str]] = []
    for operation, tasks in cases:
        found: list[list[tuple[float, float]]] = []
        for n in range(-1, rounds):
            order = range(n % len(visits), n % len(visits) + len(visits))
            turns = {at % len(visits): await visits[at % len(visits)].turn(operation, tasks) for at in order}
            if n >= 0:  # The first round warms up.
                found.append([turns[at] for at in range(len(visits))])
        column: list[str] = []
        for at in range(len(visits)):
            added = [[row[at][who] - (row[0][who] if at else 0) for row in found] for who in range(1 + theirs)]
            column.append(" / ".join(f"{statistics.median(us):{'+' if at else ''}.1f}" for us in added))
        columns.append(column)
    head = ["", *(f"{operation}, {tasks} task{'s' * (tasks > 1)}" for operation, tasks in cases)]
    return tables.table(head, [[name, *row] for name, row in zip(stores, zip(*columns, strict=True), strict=True)])


async def observers(url: str, admin: Redis, rounds: int) -> None:
    """Print what each observer adds."""
    async with AsyncExitStack() as stack:
        stores: dict[str, SessionStore] = {}
        for name, observe in _observers().items():
            options: dict[str, Any] = {"prefix": f"{server.RUN}-o{len(stores)}", "references": ["user_id", "ip"]}
            stores[name] = await stack.enter_async_context(SessionStore.from_url(url, **options, observe=observe))
        cases = [(operation, tasks) for operation in ("get", "set") for tasks in (1, 50)]
        print(await measure(stores, cases, admin, rounds, theirs=False))


async def events(url: str, admin: Redis, rounds: int) -> None:
    """Print what events add, in our process and in Redis: without a reader, and with one in another process."""
    async with AsyncExitStack() as stack:
        stores: dict[str, SessionStore] = {}
        for name in ("without events", "`events=True`, no reader", "`events=True`, one reader"):
            options: dict[str, Any] = {"prefix": f"{server.RUN}-e{len(stores)}", "references": ["user_id", "ip"]}
            stores[name] = await stack.enter_async_context(SessionStore.from_url(url, **options, events=bool(stores)))
        command = [sys.executable, "-m", "benchmarks.observing", "--read", url, options["prefix"]]
        reader = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            assert reader.stdout
            await reader.stdout.readline()
            cases = [(operation, tasks) for operation in ("get", "set", "create and delete") for tasks in (1, 50)]
            print(await measure(stores, cases, admin, rounds, theirs=True))
        finally:
            reader.kill()
            await reader.wait()


async def read(url: str, prefix: str) -> None:
    """Read events, until this process is killed."""
    store = SessionStore.from_url(url, prefix=prefix, references=["user_id", "ip"])
    async with store, store.events() as them:
        print(flush=True)
        async for _ in them:
            pass


def main() -> None:
    """Print both tables, in microseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--read", nargs=2, metavar=("URL", "PREFIX"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        asyncio.run(read(*options.read))
        return
    with server.own_server() as url, Redis.from_url(url) as admin:
        if others := server.pin(admin):
            os.sched_setaffinity(0, others)
        for table in (observers, events):
            asyncio.run(table(url, admin, options.rounds))


if __name__ == "__main__":
    main()
