"""Runs one contender in its own process. A line of JSON on stdin is a request; a line on stdout is its reply.

{"operation": "fill", "count": 1000} -> {}: make new sessions; the next turns use these.
{"operation": "get", "tasks": 200, "seconds": 0.15} -> {"calls", "seconds", "cpu", "p50", "p99"}: a turn. Times are in
seconds; "cpu" is the processor time of the process; the percentiles are of a call.

The first line on stdout describes the contender. The process ends when stdin is closed.
Its argument is JSON; see `turns.py`.
"""

import asyncio
import gc
import importlib
import itertools
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any


class Turns:
    """The sessions of a contender, and turns with them."""

    def __init__(self, contender: Any) -> None:
        """Begin without sessions."""
        self.contender = contender
        self._numbers = itertools.count()
        self._filled: list[int] = []
        self._again: Iterator[int] = iter(())

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks for."""
        if request["operation"] == "fill":
            await self.fill(request["count"])
            return {}
        return await self.turn(**request)

    async def fill(self, count: int) -> None:
        """Make *count* sessions."""
        self._filled = list(itertools.islice(self._numbers, count))
        await self.contender.fill(self._filled)
        random.Random(1).shuffle(self._filled)
        self._again = itertools.cycle(self._filled)  # No session is used twice at the same time.
        gc.collect()
        gc.freeze()  # Otherwise garbage collection in a turn would scan all objects made before.

    async def turn(self, operation: str, tasks: int, seconds: float) -> dict[str, float]:
        """Let *tasks* tasks call one operation again and again, and measure the calls."""
        left = self._again
        if operation == "create":
            left = self._numbers
        elif operation == "delete":
            left, self._filled = iter(self._filled), []
        call: Callable[[int], Awaitable[Any]] = getattr(self.contender, operation)
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

        cpu, started = time.process_time(), clock()
        await asyncio.gather(*(work(started + seconds) for _ in range(tasks)))
        took, cpu = clock() - started, time.process_time() - cpu
        times.sort()
        return {
            "calls": len(times),
            "seconds": took,
            "cpu": cpu,
            "p50": times[len(times) // 2],
            "p99": times[len(times) * 99 // 100],
        }


async def serve(kind: Any, options: dict[str, Any]) -> None:
    """Answer the requests on stdin."""
    contender = kind(options["url"], options["prefix"], options["padding"])
    say({"name": kind.name, "lacks": kind.lacks, "operations": kind.operations()})
    turns = Turns(contender)
    while line := await asyncio.to_thread(sys.stdin.readline):  # The event loop goes on meanwhile.
        say(await turns.answer(json.loads(line)))
    await contender.aclose()


def say(reply: dict[str, Any]) -> None:
    """Write a line."""
    print(json.dumps(reply), flush=True)


def main() -> None:
    """Read the options, import the contender, and serve."""
    options = json.loads(sys.argv[1])
    if options["checkout"]:
        sys.path.insert(0, options["checkout"])  # Import rss from there; `benchmarks` is imported already.
    module, name = options["contender"].split(".")
    kind = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    assert str(sys.modules["rss"].__file__).startswith(options["checkout"]), "another rss was imported"
    factory = asyncio.new_event_loop
    if options["loop"] == "uvloop":
        import uvloop  # noqa: PLC0415 - Windows has none

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(kind, options))


if __name__ == "__main__":
    main()
