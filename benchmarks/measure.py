"""Measures calls: many at once, each contender in its turn, several rounds."""

import asyncio
import functools
import itertools
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

Call = Callable[[int], Awaitable[Any]]


@dataclass
class Cell:
    """What was measured of one contender at one operation with so many tasks: a list item for each round."""

    operation: str
    contender: str
    tasks: int
    loop: str
    rates: list[float] = field(default_factory=list)  # calls a second
    p50: list[float] = field(default_factory=list)  # milliseconds
    p99: list[float] = field(default_factory=list)
    python: list[float] = field(default_factory=list)  # microseconds of processor time a call
    server: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rates)

    def ratio(self, other: "Cell", what: str = "rates") -> float:
        """How many times the other's this is: the median over the rounds, in each of which both were measured."""
        pairs = zip(getattr(self, what), getattr(other, what), strict=True)
        return float(statistics.median(mine / theirs for mine, theirs in pairs))


async def _server_seconds(admin: Redis) -> float:
    cpu = await admin.info("cpu")
    return float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])


async def measure(cell: Cell, admin: Redis, call: Call, numbers: Iterable[int], seconds: float) -> None:
    """Let the tasks call one after the other, for so long or until there are no more numbers, and note what it took."""
    left: Iterator[int] = iter(numbers)
    times: list[float] = []
    clock = time.perf_counter

    async def work(until: float) -> None:
        before = clock()
        for n in left:
            await call(n)
            after = clock()
            times.append(after - before)
            if after > until:
                return
            before = after

    server, python, started = await _server_seconds(admin), time.process_time(), clock()
    await asyncio.gather(*(work(started + seconds) for _ in range(cell.tasks)))
    took, python = clock() - started, time.process_time() - python
    server = await _server_seconds(admin) - server
    times.sort()
    cell.rates.append(len(times) / took)
    cell.p50.append(times[len(times) // 2] * 1e3)
    cell.p99.append(times[len(times) * 99 // 100] * 1e3)
    cell.python.append(python / len(times) * 1e6)
    cell.server.append(server / len(times) * 1e6)


@functools.cache
def _some(count: int) -> list[int]:
    chance = random.Random(1)
    return [chance.randrange(count) for _ in range(100_003)]


def at_random(count: int) -> Iterator[int]:
    """Return numbers below, without end; the same each time."""
    return itertools.cycle(_some(count))
