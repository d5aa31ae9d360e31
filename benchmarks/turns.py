"""Gives short turns to workers, one at a time, in rounds, and compares contenders within each round."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from redis import Redis

from benchmarks import server

FOLDER = Path(__file__).parent
SESSIONS = 1000
#: The class of each contender, by its name on the command line; empty for the worker in `node/`.
CONTENDERS: Final = {
    "rss": "contenders.Store",
    "evalsha": "contenders.EvalSha",
    "register_script": "contenders.RegisterScript",
    "ioredis": "",
    "original": "contenders.Original",
    "fastapi-redis-sdk": "peers.FastapiRedisSdk",
    "starsessions": "peers.Starsessions",
    "aiohttp-session": "peers.AiohttpSession",
    "litestar": "peers.Litestar",
    "json": "contenders.Json",
    "nothing": "contenders.Nothing",
}
# A turn of `delete` ends after this many sessions.
_DELETED = 4000


class Unavailable(Exception):
    """A contender cannot run on this machine; the message says why."""


@dataclass
class Cell:
    """The measurements of one contender at one operation and number of tasks. Lists have an item for each round."""

    operation: str
    tasks: int
    contender: str
    loop: str
    name: str
    rates: list[float] = field(default_factory=list)  # Calls a second.
    cpu: list[float] = field(default_factory=list)  # Microseconds a call: processor time of the process.
    server: list[float] = field(default_factory=list)  # Microseconds a call: processor time of Redis.
    p50: list[float] = field(default_factory=list)  # Milliseconds.
    p99: list[float] = field(default_factory=list)

    def add(self, turn: Mapping[str, float], spent: float) -> None:
        """Add a turn. *spent*: the processor time of Redis, in seconds."""
        self.rates.append(turn["calls"] / turn["seconds"])
        self.cpu.append(turn["cpu"] / turn["calls"] * 1e6)
        self.server.append(spent / turn["calls"] * 1e6)
        self.p50.append(turn["p50"] * 1e3)
        self.p99.append(turn["p99"] * 1e3)

    def median(self, what: str = "rates") -> float:
        """Return the median of the rounds."""
        return float(statistics.median(getattr(self, what)))


def ratio(mine: Cell, theirs: Cell, what: str = "rates") -> tuple[float, float, float]:
    """Return the median and the quartiles of the ratios within a round."""
    return spread([m / t for m, t in zip(getattr(mine, what), getattr(theirs, what), strict=True)])


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and the quartiles."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


class Worker:
    """A process that runs one contender. Its keys begin with a prefix of their own."""

    _number = 0

    def __init__(
        self,
        contender: str,
        url: str,
        *,
        loop: str = "asyncio",
        checkout: str = "",
        label: str = "",
        sessions: int = SESSIONS,
        padding: int = 0,
    ) -> None:
        """Start the process.

        *checkout*: the folder whose `rss` the process imports; empty for this checkout. *label*: the name in the
        results; empty for the contender's own name. *sessions*: the number of sessions. *padding*: bytes of one more
        field of each session.
        """
        self.contender = "before" if checkout else contender
        self.loop = loop if CONTENDERS[contender] else "node"
        self.label = label
        self.sessions = sessions
        Worker._number += 1
        options = {
            "contender": CONTENDERS[contender],
            "url": url,
            "prefix": f"{server.RUN}-{Worker._number}",
            "loop": loop,
            "checkout": checkout,
            "padding": padding,
        }
        command = [sys.executable, "-m", "benchmarks.worker"] if CONTENDERS[contender] else _node()
        self.process = subprocess.Popen(  # noqa: S603 - it is ours
            [*command, json.dumps(options)], cwd=FOLDER.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def greet(self) -> None:
        """Wait until the process has started."""
        hello = self._reply()
        self.label = self.label or hello["name"]
        self.lacks: str = hello["lacks"]
        self.operations: list[str] = hello["operations"]
        self.versions: dict[str, str] = hello.get("versions", {})

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for the reply."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of {self.contender} ended: its error is above")
        reply: dict[str, Any] = json.loads(line)
        return reply


class Workers:
    """Workers that start at the same time, take turns, and end together."""

    def __init__(self, admin: Redis, workers: Sequence[Worker], *, pinned: bool = True) -> None:
        """Take started workers. *pinned*: give the server a core for itself, if that can be done."""
        self.workers = workers
        self._admin = admin
        self._pinned = pinned

    def __enter__(self) -> Self:
        for worker in self.workers:
            worker.greet()
        if self._pinned:
            others = server.pin(self._admin)
            for worker in self.workers if others else ():
                os.sched_setaffinity(worker.process.pid, others)
        for worker in self.workers:
            worker.ask(operation="fill", count=worker.sessions)
        server.settle(self._admin)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()
        server.unpin(self._admin)
        server.clear(self._admin)

    def measure(self, operation: str, tasks: Sequence[int], *, rounds: int, seconds: float) -> list[Cell]:
        """Measure an operation of all workers that have it, print the results and return them.

        "create" and "delete" must be the last: they remove the sessions of the others.
        """
        row = [worker for worker in self.workers if operation in worker.operations]
        cells: list[Cell] = []
        if operation == "delete":
            server.clear(self._admin)
        for number in tasks if row else ():
            found = {worker: Cell(operation, number, worker.contender, worker.loop, worker.label) for worker in row}
            for turn in range(-1, rounds):  # The first round warms up.
                first = turn % len(row)
                for worker in row[first:] + row[:first]:
                    self._turn(worker, found[worker], seconds, keep=turn >= 0)
            cells += found.values()
            show([*found.values()])
        return cells

    def _turn(self, worker: Worker, cell: Cell, seconds: float, *, keep: bool) -> None:
        if cell.operation == "create":  # Otherwise each turn has more sessions in Redis than the one before.
            server.clear(self._admin)
            worker.ask(operation="fill", count=worker.sessions)
        if cell.operation == "delete":
            worker.ask(operation="fill", count=min(_DELETED, 1000 + 400 * cell.tasks))
        before = server.seconds(self._admin)
        turn = worker.ask(operation=cell.operation, tasks=cell.tasks, seconds=seconds)
        spent = server.seconds(self._admin) - before
        if keep:
            cell.add(turn, spent)


def _node() -> list[str]:
    """Return the command of the Node worker, after installing what it needs."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise Unavailable("node or npm is missing")
    folder = FOLDER / "node"
    if not (folder / "node_modules" / "ioredis").exists():
        command = [npm, "install", "--no-package-lock", "--no-audit", "--no-fund", "--silent"]
        if subprocess.run(command, cwd=folder, check=False, env={**os.environ, "CI": "1"}).returncode:  # noqa: S603
            raise Unavailable("npm could not install ioredis")
    return [node, str(folder / "worker.js")]


def show(row: Sequence[Cell]) -> None:
    """Print a row of the results, compared with its first cell."""
    tasks = "1 task" if row[0].tasks == 1 else f"{row[0].tasks} tasks"
    print(f"\n{row[0].operation}, {tasks}: medians of the rounds, (quartiles) of the ratios to the first")
    for cell in row:
        middle, low, high = ratio(cell, row[0])
        print(
            f"  {cell.name:36} {cell.loop:8} {cell.median():9,.0f}/s"
            f"  {middle:5.2f} ({low:.2f} to {high:.2f})"
            f"  cpu {cell.median('cpu'):6.1f} us, server {cell.median('server'):5.1f} us"
            f"  p50 {cell.median('p50'):6.2f} ms, p99 {cell.median('p99'):6.2f} ms",
            flush=True,
        )
