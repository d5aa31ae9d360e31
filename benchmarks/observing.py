"""Measures what an observer adds to the processor time of a call: `python -m benchmarks.observing`.

One process has a store for each observer. The stores get short turns, one after the other, in rounds. In each round,
the time of a call is compared with that of the store without an observer.
"""

import argparse
import asyncio
import gc
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from typing import Final

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
_CASES: Final = [(operation, tasks) for operation in ("get", "set") for tasks in (1, 50)]


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
    """A store with an observer, and sessions in it."""

    def __init__(self, url: str, prefix: str, observe: Observer | None) -> None:
        self.store = SessionStore.from_url(url, prefix=prefix, references=["user_id", "ip"], observe=observe)
        self._ids: list[str] = []

    async def fill(self) -> None:
        """Make the sessions."""
        for n in range(_SESSIONS):
            self._ids.append(await self.store.create({"user_id": n // 10, "ip": f"10.0.0.{n // 20}", "visits": 0}))

    async def turn(self, operation: str, tasks: int) -> float:
        """Let *tasks* tasks call one operation, and return the microseconds of processor time of a call."""
        calls, until = 0, time.perf_counter() + _SECONDS

        async def work(ids: Sequence[str]) -> None:
            nonlocal calls
            for session_id in itertools.cycle(ids):
                if time.perf_counter() >= until:
                    return
                if operation == "get":
                    await self.store.get(session_id)
                else:
                    await self.store.set(session_id, {"visits": calls})
                calls += 1

        before = time.process_time()
        await asyncio.gather(*(work(self._ids[n::tasks]) for n in range(tasks)))
        return (time.process_time() - before) / calls * 1e6


async def measure(url: str, rounds: int) -> str:
    """Return a table: the time of a call without an observer, and what each observer adds to it."""
    observers = _observers()
    visits = [Visits(url, f"{server.RUN}-{n}", observe) for n, observe in enumerate(observers.values())]
    for one in visits:
        await one.fill()
    gc.collect()
    gc.freeze()
    columns: list[list[str]] = []
    for operation, tasks in _CASES:
        found: list[list[float]] = []
        for n in range(-1, rounds):
            order = range(n % len(visits), n % len(visits) + len(visits))
            turns = {at % len(visits): await visits[at % len(visits)].turn(operation, tasks) for at in order}
            if n >= 0:  # The first round warms up.
                found.append([turns[at] for at in range(len(visits))])
        added = [statistics.median(row[at] - row[0] for row in found) for at in range(1, len(visits))]
        columns.append([f"{statistics.median(row[0] for row in found):.1f}", *(f"{us:+.1f}" for us in added)])
    for one in visits:
        await one.store.aclose()
    head = ["observer", *(f"{operation}, {tasks} task{'s' * (tasks > 1)}" for operation, tasks in _CASES)]
    return tables.table(head, [[name, *row] for name, row in zip(observers, zip(*columns, strict=True), strict=True)])


def main() -> None:
    """Print the table, in microseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    rounds = parser.parse_args().rounds
    with server.own_server() as url, Redis.from_url(url) as admin:
        if others := server.pin(admin):
            os.sched_setaffinity(0, others)
        print(asyncio.run(measure(url, rounds)))


if __name__ == "__main__":
    main()
