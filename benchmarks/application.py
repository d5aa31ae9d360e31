"""Measures requests a second of small applications that read the session of a visitor, or count in it."""

import asyncio
import logging
import re
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import aiohttp_session
import quart
import quart_session  # type: ignore[import-untyped]
import uvicorn
from aiohttp import web
from aiohttp_session.redis_storage import RedisStorage
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starsessions import SessionAutoloadMiddleware
from starsessions import SessionMiddleware as StarsessionsMiddleware
from starsessions.stores.redis import RedisStore

import rss.aiohttp
import rss.asgi
import rss.quart
from benchmarks.contenders import MAX_AGE
from benchmarks.server import RUN
from rss import CookiePolicy, Session, Sessions, SessionStore

CONNECTIONS = 50
PATHS = ("read", "count")
_SECONDS = 0.7
_BEGIN: dict[str, Any] = {"user_id": 1, "ip": "10.0.0.1", "visits": 0}

Visit = Callable[[Any, str], Awaitable[int]]
_Measured = tuple[float, float, float]  # Requests a second, and p50 and p99 in ms.


@dataclass(frozen=True)
class Application:
    """One way to keep sessions in a framework."""

    framework: str
    name: str
    app: Any

    def serve(self) -> AbstractAsyncContextManager[int]:
        """Serve the application, and yield the port."""
        return _serve_aiohttp(self.app) if isinstance(self.app, web.Application) else _serve_uvicorn(self.app)


async def _nothing(_: object, path: str) -> int:
    return len(path)


async def _visit(session: Session, path: str) -> int:
    if path == "start":
        await session.set(_BEGIN)
        return 0
    visits = int((await session.get())["visits"])
    if path == "count":
        await session.set({"visits": visits + 1})
    return visits


def _visit_dict(session: MutableMapping[str, Any], path: str) -> int:
    if path == "start":
        session.update(_BEGIN)
        return 0
    visits = int(session["visits"])
    if path == "count":
        session["visits"] = visits + 1
    return visits


def _aiohttp(visit: Visit) -> web.Application:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(text=f"{await visit(request, request.match_info['path']):08d}")

    app = web.Application()
    app.router.add_get("/{path}", handle)
    return app


def _starlette(visit: Visit, *middleware: Middleware) -> Starlette:
    async def handle(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{await visit(request, request.path_params['path']):08d}")

    return Starlette(routes=[Route("/{path}", handle)], middleware=middleware)


def _quart(visit: Visit) -> quart.Quart:
    app = quart.Quart(__name__)

    @app.get("/<path>")
    async def handle(path: str) -> str:
        return f"{await visit(None, path):08d}"

    return app


def _applications(url: str, client: Redis) -> list[Application]:
    def sessions() -> Sessions:  # Each application closes its store at the end.
        store = SessionStore.from_url(url, references=["user_id", "ip"], prefix=f"{RUN}-app")
        return Sessions(store, cookie=CookiePolicy(secure=False))

    async def in_aiohttp(request: web.Request, path: str) -> int:
        return await _visit(await rss.aiohttp.get_session(request), path)

    async def in_aiohttp_session(request: web.Request, path: str) -> int:
        return _visit_dict(await aiohttp_session.get_session(request), path)

    async def in_starlette(request: Request, path: str) -> int:
        return await _visit(await rss.asgi.get_session(request), path)

    async def in_starsessions(request: Request, path: str) -> int:
        return _visit_dict(request.session, path)

    async def in_quart(_: object, path: str) -> int:
        return await _visit(rss.quart.session, path)

    async def in_quart_session(_: object, path: str) -> int:
        return _visit_dict(quart.session, path)

    ours = _aiohttp(in_aiohttp)
    rss.aiohttp.setup(ours, sessions())
    theirs = _aiohttp(in_aiohttp_session)
    aiohttp_session.setup(theirs, RedisStorage(client, cookie_name=RUN, max_age=MAX_AGE))

    starsessions = RedisStore(connection=client, prefix=f"{RUN}-starsessions")
    by_quart = _quart(in_quart)
    rss.quart.QuartSessions(by_quart, sessions())
    by_interface = _quart(in_quart_session)
    rss.quart.QuartSessions(by_interface, sessions())
    by_interface.session_interface = rss.quart.SessionInterface()  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    by_cookie = _quart(in_quart_session)
    by_cookie.secret_key = "x" * 32
    by_quart_session = _quart(in_quart_session)
    by_quart_session.config.update(SESSION_TYPE="redis", SESSION_REDIS=client, SESSION_KEY_PREFIX=f"{RUN}-quart:")
    quart_session.Session(by_quart_session)
    return [
        Application("aiohttp", "no session", _aiohttp(_nothing)),
        Application("aiohttp", "redis-session-sets", ours),
        Application("aiohttp", "aiohttp-session", theirs),
        Application("Starlette", "no session", _starlette(_nothing)),
        Application(
            "Starlette",
            "redis-session-sets",
            _starlette(in_starlette, Middleware(rss.asgi.SessionMiddleware, sessions=sessions())),
        ),
        Application(
            "Starlette",
            "starsessions",
            _starlette(
                in_starsessions,
                Middleware(StarsessionsMiddleware, store=starsessions, lifetime=MAX_AGE, rolling=True),
                Middleware(SessionAutoloadMiddleware),
            ),
        ),
        Application("Quart", "no session", _quart(_nothing)),
        Application("Quart", "redis-session-sets", by_quart),
        Application("Quart", "redis-session-sets, quart.session", by_interface),
        Application("Quart", "quart-session", by_quart_session),
        Application("Quart", "Quart's own, a cookie without Redis", by_cookie),
    ]


@asynccontextmanager
async def _serve_aiohttp(app: web.Application) -> AsyncIterator[int]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield runner.addresses[0][1]
    await runner.cleanup()


@asynccontextmanager
async def _serve_uvicorn(app: Any) -> AsyncIterator[int]:
    config = uvicorn.Config(app, port=0, log_level=logging.ERROR, access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for this
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def _browse(port: int, path: str) -> list[float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def get(path: str, cookie: str) -> str:
        writer.write(f"GET /{path} HTTP/1.1\r\nHost: localhost\r\n{cookie}\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("HTTP/1.1 200"), head
        await reader.readexactly(8)
        return head

    cookies = re.findall(r"^set-cookie: ([^;]*)", await get("start", ""), re.IGNORECASE | re.MULTILINE)
    cookie = f"Cookie: {cookies[0]}\r\n" if cookies else ""
    times: list[float] = []
    before = time.perf_counter()
    until = before + _SECONDS
    while before < until:
        head = await get(path, cookie)
        if path == "count" and (anew := re.search(r"^set-cookie: ([^;]*)", head, re.IGNORECASE | re.MULTILINE)):
            cookie = f"Cookie: {anew[1]}\r\n"
        after = time.perf_counter()
        times.append(after - before)
        before = after
    writer.close()
    return times


async def _load(port: int, path: str) -> _Measured:
    times = await asyncio.gather(*(_browse(port, path) for _ in range(CONNECTIONS)))
    flat = sorted(one for some in times for one in some)
    return len(flat) / _SECONDS, flat[len(flat) // 2] * 1e3, flat[len(flat) * 99 // 100] * 1e3


def _loader(port: int, path: str) -> _Measured:
    """Run the browsers, in a process of their own."""
    return asyncio.run(_load(port, path))


async def application(url: str, rounds: int) -> list[dict[str, Any]]:
    """Measure each application in its turn, print a row of results for each, and return the rows."""
    measured: dict[tuple[str, str], dict[str, list[_Measured]]] = {}
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, get_context("spawn")) as browsers:
        client = Redis.from_url(url, max_connections=1000)
        for turn in range(-1, rounds):  # The first round warms up.
            for application in _applications(url, client):
                async with application.serve() as port:
                    for path in PATHS:
                        found = await loop.run_in_executor(browsers, _loader, port, path)
                        if turn >= 0:
                            paths = measured.setdefault((application.framework, application.name), {})
                            paths.setdefault(path, []).append(found)
        await client.aclose()
    rows: list[dict[str, Any]] = []
    for (framework, name), paths in measured.items():
        row: dict[str, Any] = {"framework": framework, "name": name}
        for path, measurements in paths.items():
            rate, p50, p99 = (statistics.median(column) for column in zip(*measurements, strict=True))
            row[path] = {"rate": rate, "p50": p50, "p99": p99}
        rows.append(row)
        print(
            f"  {framework:10} {name:36}"
            + "".join(f"{path:>6} {row[path]['rate']:9,.0f}/s p99 {row[path]['p99']:6.2f} ms" for path in PATHS),
            flush=True,
        )
    return rows
