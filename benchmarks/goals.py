"""The goals of the benchmarks: each is a limit for a number, or for a ratio to another contender."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.turns import Cell, ratio, spread

PEERS = ("original", "fastapi-redis-sdk", "starsessions", "aiohttp-session", "litestar", "json")
# Calls a second, in multiples of redis-py at its best.
_FASTER = {
    1: {"get": 1.1, "touch": 1.1, "set": 1.0},
    10: {"get": 3.5, "set": 2.5},
    50: {"get": 5.5, "touch": 7.0, "set": 4.0, "move": 2.5},
    200: {"get": 7.0, "touch": 10.0, "set": 5.0, "move": 3.0, "delete": 5.0, "create": 2.5},
}
# Processor time of a lone call, in multiples of redis-py at its best.
_CHEAPER = {"get": 0.6, "touch": 0.6, "set": 0.7}
# Calls a second, in multiples of the Node original's algorithm, by the number of tasks. `move` has limits of its own.
_NODE = {50: 1.0, 200: 1.5}
_NODE_MOVE = {50: 1.0, 200: 1.8}


@dataclass(frozen=True)
class Verdict:
    """Whether a goal is kept. *low* and *high* are the quartiles of the rounds."""

    goal: str
    found: float
    low: float
    high: float
    limit: float
    at_most: bool = False

    @property
    def kept(self) -> bool:
        """Whether the median is within the limit."""
        return self.found <= self.limit if self.at_most else self.found >= self.limit

    def __str__(self) -> str:
        quartiles = f" ({self.low:.2f} to {self.high:.2f})" if self.low != self.high else ""
        bound = f"{'at most' if self.at_most else 'at least'} {self.limit:g}"
        return f"{'kept  ' if self.kept else 'MISSED'} {self.goal}: {self.found:.2f}{quartiles}, {bound}"


def of_calls(cells: Sequence[Cell]) -> Iterator[Verdict]:
    """Judge the calls on asyncio's own loop: all goals for which there are measurements."""
    table = {(c.operation, c.tasks, c.contender): c for c in cells if c.loop in ("asyncio", "node")}
    named = {"rates": "calls/s", "cpu": "processor time", "p99": "p99"}
    for operation, tasks, to, what, limit in _to_others(table):
        mine, theirs = table.get((operation, tasks, "rss")), table.get((operation, tasks, to))
        if mine and theirs:
            goal = f"{operation}, {tasks} {'task' if tasks == 1 else 'tasks'}, {named[what]} to {theirs.name}"
            yield Verdict(goal, *ratio(mine, theirs, what), limit, at_most=what != "rates")
    if get := table.get(("get", 200, "rss")):
        yield Verdict("get, 200 tasks, processor time in us", *spread(get.cpu), 6.0, at_most=True)
    yield from _to_peers(table)


def _to_others(cells: Iterable[tuple[str, int, str]]) -> Iterator[tuple[str, int, str, str, float]]:
    """Return operation, tasks, contender, what is compared, and the limit of the ratio."""
    for tasks, limits in _FASTER.items():
        for operation, limit in limits.items():
            yield operation, tasks, "evalsha", "rates", limit
    for operation, limit in _CHEAPER.items():
        yield operation, 1, "evalsha", "cpu", limit
    for operation in ("get", "set"):
        yield operation, 200, "evalsha", "p99", 1.0
    for operation, tasks, contender in cells:
        if contender == "ioredis" and tasks in _NODE:
            yield operation, tasks, contender, "rates", (_NODE_MOVE if operation == "move" else _NODE)[tasks]


def _to_peers(table: Mapping[tuple[str, int, str], Cell]) -> Iterator[Verdict]:
    """Judge that none of the other libraries is faster, by a comparison with the fastest of them."""
    for (operation, tasks, contender), mine in table.items():
        if contender == "rss" and tasks in _NODE:
            peers = [table[operation, tasks, peer] for peer in PEERS if (operation, tasks, peer) in table]
            if peers:
                fastest = min(peers, key=lambda peer: ratio(mine, peer))
                goal = f"{operation}, {tasks} tasks, calls/s to the fastest peer, {fastest.name}"
                yield Verdict(goal, *ratio(mine, fastest), 1.0)


def of_many_sessions(cells: Sequence[Cell]) -> Iterator[Verdict]:
    """Judge the ratio of the speed with the most sessions to the speed with the fewest."""
    for operation in ("get", "set"):
        few, *_, most = [cell for cell in cells if cell.operation == operation]
        yield Verdict(f"{operation}, {most.name} to {few.name}", *ratio(most, few), 0.85)


def of_memory(ours: float, original: float) -> Verdict:
    """Judge the ratio of the memory of a session to that in the original's layout."""
    found = ours / original
    return Verdict("memory to the original's layout", found, found, found, 1.15, at_most=True)
