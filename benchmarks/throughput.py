"""Calls a second, latency and processor time, for all contenders at several numbers of tasks."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from benchmarks.contenders import ALL, OURS, Coalesced, Contender, prepare
from benchmarks.measure import Call, Cell, at_random, run

SESSIONS = 1000
# So many sessions are deleted in a cell, at most.
DELETED = 4000


@dataclass(frozen=True)
class Plan:
    """What to measure, and how long."""

    contenders: Sequence[type[Contender]]
    operations: Sequence[str]
    tasks: Sequence[int]
    rounds: int
    seconds: float
    loop: str = "asyncio"


def plans(*, quick: bool) -> list[Plan]:
    """Return what makes the tables: all contenders on asyncio's own loop, ours on uvloop too."""
    if quick:
        return [Plan(ALL, ("get", "set"), (1, 50, 200), 2, 0.1), Plan(OURS, ("touch", "delete"), (50, 200), 2, 0.1)]
    return [
        Plan(ALL, ("get", "set"), (1, 10, 50, 200, 1000), 7, 0.2),
        Plan(ALL, ("touch", "delete"), (50, 200), 7, 0.2),
        Plan(ALL, ("get", "set"), (50, 200), 3, 0.2, "uvloop"),
    ]


async def throughput(url: str, plan: Plan) -> list[Cell]:
    """Measure a plan, and say how it goes on."""
    cells: dict[tuple[str, int, str], Cell] = {}
    made = itertools.count(1_000_000, DELETED)
    async with Redis.from_url(url) as admin:
        for operation in plan.operations:
            taking_part = [kind for kind in plan.contenders if operation in kind.operations]
            contenders = [kind(url, f"bench{n}") for n, kind in enumerate(taking_part)]
            bulk = [Coalesced(url, contender.prefix) for contender in contenders]
            for contender in contenders:
                await prepare(contender, range(SESSIONS))
            for tasks in plan.tasks:
                for turn in range(-1, plan.rounds):  # The first is to warm up.
                    for n in range(len(contenders)):
                        at = (n + turn) % len(contenders)
                        contender = contenders[at]
                        numbers = at_random(SESSIONS)
                        if operation == "delete":
                            first = next(made)
                            numbers = iter(range(first, first + DELETED))
                            await prepare(bulk[at], range(first, first + DELETED))
                        cell = Cell(operation, contender.name, tasks, plan.loop)
                        if turn >= 0:
                            cell = cells.setdefault((operation, tasks, contender.name), cell)
                        await run(cell, admin, _call(contender, operation), numbers, plan.seconds / (1 + (turn < 0)))
                _report([cells[operation, tasks, contender.name] for contender in contenders])
            for contender in (*contenders, *bulk):
                await contender.aclose()
            await _clear(admin)
    return list(cells.values())


def _call(contender: Contender, operation: str) -> Call:
    if operation != "set":
        call: Call = getattr(contender, operation)
        return call
    visits = itertools.count()
    return lambda n: contender.set(n, next(visits))


def _report(cells: Sequence[Cell]) -> None:
    best = cells[0]
    print(f"\n{best.operation}, {best.tasks} tasks, {best.loop}")
    for cell in cells:
        lowest, highest = min(cell.rates), max(cell.rates)
        print(
            f"  {cell.contender:34} {cell.rate:9,.0f}/s ({lowest:9,.0f} to {highest:9,.0f})"
            f"  p50 {sorted(cell.p50)[len(cell.p50) // 2]:7.2f} ms  p99 {sorted(cell.p99)[len(cell.p99) // 2]:7.2f} ms"
            f"  python {sorted(cell.python)[len(cell.python) // 2]:6.1f} us"
            f"  server {sorted(cell.server)[len(cell.server) // 2]:6.1f} us  1/{best.ratio(cell):.2f}",
            flush=True,
        )


async def _clear(admin: Redis) -> None:
    """Remove what the contenders left."""
    async for keys in _pages(admin):
        await admin.unlink(*keys)


async def _pages(admin: Redis):  # noqa: ANN202
    cursor = 0
    while True:
        cursor, keys = await admin.scan(cursor, match="*bench[0-9]*", count=10_000)
        if keys:
            yield keys
        if not cursor:
            return


if __name__ == "__main__":
    import sys

    for plan in plans(quick=True):
        asyncio.run(throughput(sys.argv[1], plan))
