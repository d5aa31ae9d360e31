"""Requests a second of a small aiohttp application that counts the visits of each session, by how it keeps them."""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from multiprocessing import get_context

from aiohttp import web
from aiohttp_session import get_session, setup
from aiohttp_session.redis_storage import RedisStorage
from redis.asyncio import Redis

from benchmarks.contenders import RUN
from rss import SessionStore

CONNECTIONS = 50
_SECONDS = 1.0
_COOKIE = "session-id"

Visit = Callable[[web.Request], Awaitable[int]]


def _application(visit: Visit, *, sets_cookie: bool = False) -> web.Application:
    async def handle(request: web.Request) -> web.Response:
        response = web.Response(text=f"{await visit(request):08d}")
        if sets_cookie:  # As aiohttp-session does with each write.
            response.set_cookie(_COOKIE, request.cookies[_COOKIE], max_age=3600, httponly=True)
        return response

    app = web.Application()
    app.router.add_get("/", handle)
    return app


async def _no_session(_: web.Request) -> int:
    return 0


def _applications(
    store: SessionStore, client: Redis
) -> dict[str, tuple[web.Application, Callable[[str], Awaitable[object]]]]:
    """Return each application, and what makes a session with an id for it."""

    async def ours(request: web.Request) -> int:
        session_id = request.cookies[_COOKIE]
        visits = int((await store.get(session_id))["visits"]) + 1
        await store.set(session_id, {"visits": visits}, create=False)
        return visits

    async def theirs(request: web.Request) -> int:
        session = await get_session(request)
        session["visits"] += 1
        return int(session["visits"])

    async def nothing(_: str) -> None:
        pass

    blob = json.dumps({"created": int(time.time()), "session": {"user_id": 1, "ip": "10.0.0.1", "visits": 0}})
    aiohttp_session = _application(theirs)
    setup(aiohttp_session, RedisStorage(client, cookie_name=_COOKIE, max_age=3600))
    return {
        "no session": (_application(_no_session), nothing),
        "redis-session-sets": (
            _application(ours, sets_cookie=True),
            lambda session_id: store.set(session_id, {"user_id": 1, "ip": "10.0.0.1", "visits": 0}),
        ),
        "aiohttp-session": (aiohttp_session, lambda session_id: client.set(f"{_COOKIE}_{session_id}", blob)),
    }


async def _request(port: int, session_id: str, until: float) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = f"GET / HTTP/1.1\r\nHost: localhost\r\nCookie: {_COOKIE}={session_id}\r\n\r\n".encode()
    times: list[float] = []
    before = time.perf_counter()
    while before < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        await reader.readexactly(8)
        after = time.perf_counter()
        times.append(after - before)
        before = after
    writer.close()
    return times


async def _load(port: int, run: str) -> tuple[float, float, float]:
    until = time.perf_counter() + _SECONDS
    times = await asyncio.gather(*(_request(port, f"{run}-{n}", until) for n in range(CONNECTIONS)))
    flat = sorted(one for some in times for one in some)
    return len(flat) / _SECONDS, flat[len(flat) // 2] * 1e3, flat[len(flat) * 99 // 100] * 1e3


def _loader(port: int, run: str) -> tuple[float, float, float]:
    """Be the browsers, in a process of their own; return requests a second, and p50 and p99 in ms."""
    return asyncio.run(_load(port, run))


@asynccontextmanager
async def _served(app: web.Application) -> AsyncIterator[int]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield runner.addresses[0][1]
    await runner.cleanup()


async def application(url: str, rounds: int) -> dict[str, dict[str, float]]:
    """Measure each application in its turn."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, get_context("spawn")) as browsers:
        async with SessionStore.from_url(url, references=["user_id", "ip"], prefix=f"{RUN}-app") as store:
            client = Redis.from_url(url, max_connections=1000)
            for turn in range(-1, rounds):  # The first is to warm up.
                for name, (app, make) in _applications(store, client).items():
                    await asyncio.gather(*(make(f"{RUN}-{n}") for n in range(CONNECTIONS)))
                    async with _served(app) as port:
                        measured = await loop.run_in_executor(browsers, _loader, port, RUN)
                    if turn >= 0:
                        found.setdefault(name, []).append(measured)
            await client.aclose()
    rows: dict[str, dict[str, float]] = {}
    for name, measurements in found.items():
        rate, p50, p99 = (statistics.median(column) for column in zip(*measurements, strict=True))
        rows[name] = {"rate": rate, "p50": p50, "p99": p99}
        print(f"  {name:34} {rate:9,.0f} requests/s  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms", flush=True)
    return rows
