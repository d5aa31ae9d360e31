"""Calls a second, latency and processor time, of all contenders at several numbers of tasks."""

import gc
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from redis.asyncio import Redis

from benchmarks.contenders import ALL, RUN, Coalesced, Contender, prepare
from benchmarks.measure import Call, Cell, at_random, measure

SESSIONS = 1000
# So many sessions are deleted in a cell, at most.
_DELETED = 4000


@dataclass(frozen=True)
class Plan:
    """What to measure, and how long."""

    operations: Sequence[str]
    tasks: Sequence[int]
    rounds: int
    seconds: float = 0.2
    loop: str = "asyncio"
    contenders: Sequence[type[Contender]] = ALL


def plans(*, quick: bool) -> list[Plan]:
    """Return what makes the tables."""
    if quick:
        return [Plan(("get", "set"), (1, 50, 200), 3, 0.05), Plan(("touch", "create", "delete"), (50, 200), 2, 0.05)]
    return [
        Plan(("get", "set"), (50, 200), 15),
        Plan(("get", "set"), (1, 10, 1000), 3),
        Plan(("touch", "create", "delete"), (50, 200), 7),
        Plan(("get", "set"), (50, 200), 2, loop="uvloop"),
    ]


async def run(url: str, plan: Plan) -> list[Cell]:
    """Measure a plan, and say how it goes."""
    cells: list[Cell] = []
    made = itertools.count(1_000_000, _DELETED)
    async with Redis.from_url(url) as admin:
        for operation in plan.operations:
            kinds = [kind for kind in plan.contenders if operation in kind.operations]
            contenders = [kind(url, f"{RUN}-{n}") for n, kind in enumerate(kinds)]
            bulk = [Coalesced(url, contender.prefix) for contender in contenders]  # The fastest prepares for others.
            for contender in contenders:
                await prepare(contender, range(SESSIONS))
            for tasks in plan.tasks:
                row = [Cell(operation, kind.name, tasks, plan.loop) for kind in kinds]
                for turn in range(-1, plan.rounds):  # The first is to warm up.
                    if turn == 0:  # So that no collection looks through thousands of connections in somebody's turn.
                        gc.collect()
                        gc.freeze()
                    for n in range(len(kinds)):
                        at = (n + turn) % len(kinds)
                        numbers = at_random(SESSIONS)
                        if operation == "delete":
                            start = next(made)
                            numbers = iter(range(start, start + _DELETED))
                            await prepare(bulk[at], range(start, start + _DELETED))
                        cell = row[at] if turn >= 0 else Cell(operation, "", tasks, plan.loop)
                        await measure(cell, admin, call(contenders[at], operation), numbers, plan.seconds)
                _print(row)
                cells += row
            gc.unfreeze()
            for contender in (*contenders, *bulk):
                await contender.aclose()
            await clear(admin)
    return cells


def call(contender: Contender, operation: str) -> Call:
    """Return what a task calls, with the number of a session."""
    if operation != "set":
        method: Call = getattr(contender, operation)
        return method
    visits = itertools.count()
    return lambda n: contender.set(n, next(visits))


async def clear(admin: Redis) -> None:
    """Remove all that was made, and nothing else."""
    cursor = -1
    while cursor:
        cursor, keys = await admin.scan(max(cursor, 0), match=f"*{RUN}*", count=10_000)
        if keys:
            await admin.unlink(*keys)
    while (await admin.info("memory"))["lazyfree_pending_objects"]:
        pass


def _print(row: Sequence[Cell]) -> None:
    print(f"\n{row[0].operation}, {row[0].tasks} tasks, {row[0].loop}: the median round, and all of them")
    for cell in row:
        print(
            f"  {cell.contender:34} {cell.rate:9,.0f}/s ({min(cell.rates):9,.0f} to {max(cell.rates):9,.0f})"
            f"  p50 {statistics.median(cell.p50):6.2f} ms  p99 {statistics.median(cell.p99):6.2f} ms"
            f"  python {statistics.median(cell.python):5.1f} us, server {statistics.median(cell.server):5.1f} us",
            flush=True,
        )
