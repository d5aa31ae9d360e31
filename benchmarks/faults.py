"""Measures the effect of faults on other callers: `python -m benchmarks.faults`.

Fifty tasks call all the time: twenty read, twenty write, ten increment. Meanwhile one fault happens. For each fault,
one line shows the calls a second, the longest call, and the number of failed calls by kind. Only `increment`, which
must not run twice, may fail, with "not known what was done".
"""

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from benchmarks.server import own_server
from rss import SessionError, SessionStore, StoreUnavailable

_TIMEOUT = 5.0
_SECONDS = 2.0


class Tally:
    """The outcome of the calls of the fifty tasks."""

    def __init__(self) -> None:
        self.calls = 0
        self.longest = 0.0
        self.failed = Counter[str]()

    async def work(self, name: str, call: Callable[[], Awaitable[Any]], stop: asyncio.Event) -> None:
        """Call again and again, until *stop* is set."""
        while not stop.is_set():
            started = time.perf_counter()
            try:
                await call()
            except SessionError as error:
                known = "not known" if "not known" in str(error) else type(error).__name__
                self.failed[f"{name}: {known}"] += 1
            self.calls += 1
            self.longest = max(self.longest, time.perf_counter() - started)


async def _measure(title: str, store: SessionStore, fault: Callable[[], Awaitable[object]]) -> None:
    tally, stop = Tally(), asyncio.Event()
    for n in range(20):
        await store.set(f"s{n}", {"user_id": n, "n": 0})
    calls = (
        [("get", lambda n=n: store.get(f"s{n}")) for n in range(20)]
        + [("set", lambda n=n: store.set(f"s{n}", {"user_id": n})) for n in range(20)]
        + [("increment", lambda n=n: store.increment(f"s{n}", "n")) for n in range(10)]
    )
    tasks = [asyncio.create_task(tally.work(name, call, stop)) for name, call in calls]
    await asyncio.sleep(0.2)
    started, before = time.perf_counter(), tally.calls
    tally.longest = 0.0
    word = await fault()
    await asyncio.sleep(max(0.0, _SECONDS - (time.perf_counter() - started)))
    rate = (tally.calls - before) / (time.perf_counter() - started)
    stop.set()
    await asyncio.gather(*tasks)
    failed = ", ".join(f"{number} {name}" for name, number in tally.failed.items()) or "none"
    print(f"{title:42} {rate:9,.0f}/s  longest {tally.longest * 1000:6.0f} ms  failed: {failed}", end="")
    print(f"  ({word})" if word else "", flush=True)


@asynccontextmanager
async def _proxy(port: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """Relay connections to a port. Once the event is set, connections that are open then relay nothing more."""
    silent = asyncio.Event()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, deaf: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if not (silent.is_set() and deaf):
                    writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        deaf = not silent.is_set()
        await asyncio.gather(pump(reader, there_writer, deaf=deaf), pump(there_reader, writer, deaf=deaf))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], silent


async def _told(call: Awaitable[object]) -> str:
    started = time.perf_counter()
    try:
        await call
    except SessionError as error:
        return f"the guilty call was told after {time.perf_counter() - started:.2f} s: {type(error).__name__}"
    return "the guilty call went well"


async def _faults(url: str) -> None:
    port = int(url.rpartition(":")[2])
    async with Redis.from_url(url) as admin, SessionStore.from_url(url, timeout=_TIMEOUT) as store:

        async def calm() -> None: ...

        await _measure("nothing", store, calm)

        await admin.config_set("proto-max-bulk-len", 1 << 20)
        await _measure(
            "a value of 2 MB, proto-max-bulk-len 1 MB", store, lambda: _told(store.set("p", {"x": "x" * (2 << 20)}))
        )
        await admin.config_set("proto-max-bulk-len", 512 << 20)

        for n in range(6):
            await store.set("large", {f"f{n}": "x" * (1 << 19)})
        await admin.config_set("client-output-buffer-limit", "normal 1048576 0 0")
        await _measure("a reply of 3 MB, output limit 1 MB", store, lambda: _told(store.get("large")))
        await admin.config_set("client-output-buffer-limit", "normal 0 0 0")

        async def kill() -> None:
            for _ in range(40):
                await admin.client_kill_filter(_type="normal", skipme=True)
                await asyncio.sleep(0.05)

        await _measure("CLIENT KILL every 50 ms", store, kill)

        async def flush() -> None:
            for _ in range(40):
                await admin.script_flush()
                await asyncio.sleep(0.05)

        await _measure("SCRIPT FLUSH every 50 ms", store, flush)

        pid = (await admin.info("server"))["process_id"]

        async def hang() -> None:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(3)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(1)

        await _measure("SIGSTOP for 3 s", store, hang)

        async def crowd() -> str:
            calls = (store.touch("s1") for _ in range(100_000))
            results = await asyncio.gather(*calls, return_exceptions=True)
            refused = sum(isinstance(result, StoreUnavailable) for result in results)
            return f"of the 100,000, {results.count(True):,} were done and {refused:,} refused at once"

        await _measure("100,000 calls at once", store, crowd)

        async with _proxy(port) as (between, silent):
            address = f"redis://127.0.0.1:{between}"
            async with SessionStore.from_url(address, timeout=_TIMEOUT) as behind:

                async def drop() -> None:
                    silent.set()
                    await asyncio.sleep(4)

                await _measure("a connection dropped without a word", behind, drop)


def main() -> None:
    """Measure all faults on a new server."""
    with own_server() as url:
        asyncio.run(_faults(url))


if __name__ == "__main__":
    main()
