"""Counts the commands and the server's time of each operation: `python -m benchmarks.commands`.

A proxy between a store and Redis records the EVALSHAs of single calls and of batches of a hundred. Then the keys are
restored, and the same EVALSHAs are sent again in one pipeline, several times. So the server never waits for a client,
and its time is the time of the scripts. The command fails if an operation takes more commands than its budget.
"""

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from redis import Redis

from benchmarks import tables
from benchmarks.server import own_server, version
from rss import SessionStore

SESSIONS = 1000
BATCH = 100
_REFERENCES = ("user_id", "ip")

Keys = dict[bytes, tuple[bytes, int]]
Call = Callable[[SessionStore, str, int], Awaitable[Any]]


def _values(n: int) -> dict[str, Any]:
    """Return the values of a session, whose sets have ten to twenty ids."""
    return {"user_id": n // 10, "ip": f"10.0.0.{n // 20}", "visits": 0}


def _moved(n: int) -> dict[str, Any]:
    return {**_values(n), "ip": f"10.0.1.{n // 20}", "visits": 1}


OPERATIONS: dict[str, Call] = {
    "get": lambda store, session_id, _: store.get(session_id),
    "get, some fields": lambda store, session_id, _: store.get(session_id, ["user_id", "visits"]),
    "get that renews": lambda store, session_id, _: store.get(session_id, touch=True),
    "touch": lambda store, session_id, _: store.touch(session_id),
    "set, same references": lambda store, session_id, n: store.set(session_id, {**_values(n), "visits": 1}),
    "set, no reference": lambda store, session_id, _: store.set(session_id, {"visits": 1}),
    "set that moves one": lambda store, session_id, n: store.set(session_id, _moved(n)),
    "create": lambda store, _, n: store.create(_values(n)),
    "rotate": lambda store, session_id, _: store.rotate(session_id),
    "rotate that moves one": lambda store, session_id, n: store.rotate(session_id, _moved(n)),
    "unset of a field": lambda store, session_id, _: store.unset(session_id, ["visits"]),
    "unset of a reference": lambda store, session_id, _: store.unset(session_id, ["ip"]),
    "increment": lambda store, session_id, _: store.increment(session_id, "visits"),
    "delete": lambda store, session_id, _: store.delete(session_id),
}
# Commands for each session, without TIME.
_BUDGET = {
    "get": 2, "get, some fields": 2, "get that renews": 3, "touch": 3, "set, same references": 6,
    "set that moves one": 11, "create": 11, "rotate": 13, "rotate that moves one": 15, "unset of a reference": 8,
    "delete": 7,
}  # fmt: skip
# Microseconds for each session on Valkey 9, alone and in a batch.
_TIMES = {
    ("get", 1): 9.0, ("get", BATCH): 4.6, ("set that moves one", BATCH): 17.5, ("create", BATCH): 17.5,
    ("rotate", BATCH): 20.0,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The cost of an operation in Redis. Commands and microseconds are those of one session."""

    operation: str
    together: int  # How many calls are made at once.
    scripts: float  # How many sessions a script has.
    time: float  # How often a script asks for the TIME.
    commands: float
    each: dict[str, float]
    microseconds: float

    @property
    def within_budget(self) -> bool:
        """Whether the commands are no more than they may be."""
        return round(self.commands, 1) <= _BUDGET.get(self.operation, 1000)


class Recorder:
    """A proxy to a server on the loopback, which records each EVALSHA."""

    def __init__(self, port: int) -> None:
        """Prepare a proxy to this port."""
        self._port = port
        self._pumps: set[asyncio.Task[None]] = set()
        self.evalshas: list[list[bytes]] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for pump in self._pumps:
            pump.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies, requests = await asyncio.open_connection("127.0.0.1", self._port)
        for work in (self._forward(reader, requests), self._return(replies, writer)):
            pump = asyncio.create_task(work)
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _return(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(2**16):
                writer.write(data)
        writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n")
                writer.write(head)
                command: list[bytes] = []
                for _ in range(int(head[1:])):
                    length = await reader.readuntil(b"\r\n")
                    data = await reader.readexactly(int(length[1:]) + 2)
                    writer.write(length + data)
                    command.append(data[:-2])
                if command[0].upper() == b"EVALSHA":
                    self.evalshas.append(command)
        writer.close()


async def measure(rounds: int) -> tuple[list[Row], str]:
    """Measure all operations on a new server. Return a row for each, alone and in batches, and the server's version."""
    rows: list[Row] = []
    with own_server() as url, Redis.from_url(url) as admin:
        for operation, call in OPERATIONS.items():
            for together in (1, BATCH):
                async with Recorder(int(url.rpartition(":")[2])) as recorder:
                    before = await _record(recorder, admin, call, together)
                calls, microseconds = _replay(admin, recorder.evalshas, before, rounds)
                rows.append(_row(operation, together, calls, microseconds))
                _print(rows[-1])
        return rows, version(admin)


async def _record(recorder: Recorder, admin: Redis, call: Call, together: int) -> Keys:
    """Record the EVALSHAs of one call for each of SESSIONS sessions. Return all keys as they were before."""
    admin.flushall()
    async with SessionStore.from_url(recorder.url, references=_REFERENCES, timeout=60) as store:
        spare = await store.create(_values(0))
        await call(store, spare, 0)  # The script is loaded now.
        admin.flushall()
        ids = [await store.create(_values(n)) for n in range(SESSIONS)]
        before = _dump(admin)
        recorder.evalshas.clear()
        order = list(range(SESSIONS))
        random.Random(1).shuffle(order)  # The sessions of a user are not all in one batch.
        for start in range(0, SESSIONS, together):
            await asyncio.gather(*(call(store, ids[n], n) for n in order[start : start + together]))
        return before


def _dump(admin: Redis) -> Keys:
    """Return all keys with their values and TTLs."""
    keys = [key for key in admin.scan_iter(count=1000) if isinstance(key, bytes)]
    pipeline = admin.pipeline(transaction=False)
    for key in keys:
        pipeline.dump(key)
        pipeline.pttl(key)
    replies = iter(pipeline.execute())
    return dict(zip(keys, zip(replies, replies, strict=True), strict=True))


def _replay(admin: Redis, evalshas: Sequence[Sequence[bytes]], before: Keys, rounds: int) -> tuple[Counter[str], int]:
    """Send the same EVALSHAs several times, each time to the same keys; return the statistics of the fastest."""
    found: list[tuple[Counter[str], int]] = []
    for _ in range(rounds):
        admin.flushall()
        pipeline = admin.pipeline(transaction=False)
        for key, (value, ttl) in before.items():
            pipeline.restore(key, ttl, value)
        pipeline.execute()
        for command in evalshas:
            pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
        admin.config_resetstat()
        pipeline.execute()
        found.append(_statistics(admin))
    return min(found, key=lambda one: one[1])


def _statistics(admin: Redis) -> tuple[Counter[str], int]:
    """Return how often each command ran since CONFIG RESETSTAT, and the microseconds of EVALSHA."""
    found = admin.info("commandstats")
    ours = ("cmdstat_config|resetstat", "cmdstat_config", "cmdstat_info")
    calls = {name.removeprefix("cmdstat_"): one["calls"] for name, one in found.items() if name not in ours}
    return Counter(calls), found["cmdstat_evalsha"]["usec"]


def _row(operation: str, together: int, calls: Counter[str], microseconds: int) -> Row:
    time, scripts = calls.pop("time", 0), calls.pop("evalsha")
    return Row(
        operation,
        together,
        SESSIONS / scripts,
        time / scripts,
        calls.total() / SESSIONS,
        {name: number / SESSIONS for name, number in calls.items()},
        microseconds / SESSIONS,
    )


def verdicts(rows: Sequence[Row], server: str) -> Iterator[tuple[bool, str]]:
    """Judge the budgets, and the times if the server is a Valkey 9."""
    for row in rows:
        how = "alone" if row.together == 1 else f"{row.together} at once"
        if row.operation in _BUDGET:
            yield (
                row.within_budget,
                f"{row.operation}, {how}: {row.commands:.1f} commands, at most {_BUDGET[row.operation]}",
            )
        limit = _TIMES.get((row.operation, row.together))
        if limit and server.startswith("Valkey 9"):
            yield row.microseconds <= limit, f"{row.operation}, {how}: {row.microseconds:.1f} us, at most {limit}"


def table(rows: Sequence[Row], server: str) -> str:
    """Return the rows as Markdown."""
    head = [server, "commands", "a session", "budget", "us, alone", f"us, {BATCH} at once", "sessions a script"]
    lines: list[list[str]] = []
    for alone, batch in zip(rows[::2], rows[1::2], strict=True):
        each = ", ".join(f"{_number(number)} {name.upper()}" for name, number in sorted(alone.each.items()))
        budget = str(_BUDGET.get(alone.operation, ""))
        times = f"{alone.microseconds:.1f}", f"{batch.microseconds:.1f}"
        lines.append([alone.operation, each, _number(alone.commands), budget, *times, f"{batch.scripts:.0f}"])
    return tables.table(head, lines, texts=(0, 1))


def _number(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _print(row: Row) -> None:
    how = f"{row.scripts:.0f} a script"
    each = ", ".join(f"{_number(number)} {name}" for name, number in sorted(row.each.items()))
    print(
        f"  {row.operation:22} {how:12} {row.microseconds:6.1f} us  {row.commands:5.1f} commands"
        f" + {row.time:.0f} TIME a script: {each}",
        flush=True,
    )


def main() -> None:
    """Print all, and fail if a budget is exceeded."""
    rows, server = asyncio.run(measure(rounds=5))
    print(f"\n{table(rows, server)}")
    for kept, verdict in verdicts(rows, server):
        print(f"  {'kept  ' if kept else 'MISSED'} {verdict}")
    if not all(row.within_budget for row in rows):
        sys.exit("an operation takes more commands than its budget")


if __name__ == "__main__":
    main()
