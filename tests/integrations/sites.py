"""The same small application on every framework: the path says what its handler does with the session."""

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp_session
import fastapi
import fastapi.responses
import litestar
import litestar.di
import litestar.exceptions
import litestar.middleware
import litestar.params
import litestar.response
import quart
import starlette.applications
import starlette.middleware
import starlette.requests
import starlette.responses
import starlette.routing
import starlette.websockets
from aiohttp import web

import rss.aiohttp
import rss.aiohttp_session
import rss.asgi
import rss.quart
from rss import Session, Sessions
from rss.fastapi import SessionDep
from tests.integrations.serving import serve_aiohttp, serve_hypercorn, serve_uvicorn

FILE = Path(__file__)
CSRF = "X-CSRF-Token"
PUBLIC = {"Cache-Control": "public, max-age=60"}

Builder = Callable[[Sessions], Any]
Server = Callable[[Any], AbstractAsyncContextManager[str]]


class Crash(Exception):
    """An error that a handler did not expect."""


async def act(session: Session, action: str, token: str = "") -> dict[str, Any]:
    """Do what the path says, by the methods that all frameworks have in common."""
    match action:
        case "read" | "not-modified":
            return await session.get()
        case "write" | "crash" | "stream" | "websocket" | "missing" | "file" | "public":
            await session.set({"visits": 1})
        case "read-write":
            visits = (await session.get()).get("visits", 0)
            await session.set({"visits": visits + 1})
            return await session.get()
        case "sign-in":
            await session.rotate({"user_id": 7})
        case "sign-out":
            await session.delete(reason="signed-out")
        case "form":
            return {"token": await session.create_csrf_token()}
        case "check":
            return {"valid": await session.verify_csrf_token(token)}
        case "ended":
            await session.get()
            return {"ended": session.ended}
        case "late":
            await session.get()
            await session.sessions.store.delete_by("user_id", 7, reason="password")
            await session.set({"visits": 7})
        case _:
            assert action == "untouched"
    return {}


async def act_on_dict(session: MutableMapping[str, Any], handle: Session, action: str) -> dict[str, Any]:
    """Do what the path says where the session is a dict, as far as a dict can do it."""
    match action:
        case "read" | "not-modified":
            return dict(session)
        case "write" | "crash" | "stream" | "websocket" | "missing" | "file" | "public":
            session["visits"] = 1
        case "pop":
            session.pop("visits", None)
            await handle.sessions.store.count_by("user_id", 7)  # A login is two scripts: give it time to come first.
        case "read-write":
            session["visits"] = session.get("visits", 0) + 1
            return dict(session)
        case "sign-in" if handle.sessions.store.fields.identity:
            session["user_id"] = 7
        case "sign-in":
            await handle.rotate({"user_id": 7})
        case "sign-out":
            session.clear()
        case _:
            assert action == "untouched"
    return {}


async def chunks(session: Session) -> AsyncIterator[bytes]:
    """Yield the body of a stream: its headers have gone, so a new id is refused."""
    yield b'{"begun": true, "refused": '
    try:
        await session.rotate()
    except RuntimeError:
        yield b"true"
    yield b"}"


# ---------------------------------------------------------------- aiohttp


def _aiohttp(
    do: Callable[[web.Request, str], Awaitable[dict[str, Any]]],
) -> list[web.RouteDef]:
    async def handle(request: web.Request) -> web.StreamResponse:
        action = request.match_info["action"]
        held = await do(request, action)
        match action:
            case "not-modified":
                raise web.HTTPNotModified
            case "missing":
                raise web.HTTPNotFound
            case "crash":
                raise Crash
            case "file":
                return web.FileResponse(FILE)
            case "stream":
                response = web.StreamResponse()
                await response.prepare(request)
                async for chunk in chunks(await rss.aiohttp.get_session(request)):
                    await response.write(chunk)
                return response
            case "websocket":
                socket = web.WebSocketResponse()
                await socket.prepare(request)
                await socket.send_json(await (await rss.aiohttp.get_session(request)).get())
                await socket.close()
                return socket
        return web.json_response(held, headers=PUBLIC if action == "public" else None)

    return [web.get("/{action}", handle)]


async def _do(request: web.Request, action: str) -> dict[str, Any]:
    return await act(await rss.aiohttp.get_session(request), action, request.headers.get(CSRF, ""))


def aiohttp_app(sessions: Sessions) -> web.Application:
    """Return an aiohttp application with `rss.aiohttp.setup`."""
    app = web.Application()
    rss.aiohttp.setup(app, sessions)
    app.add_routes(_aiohttp(_do))
    return app


def aiohttp_sub_app(sessions: Sessions) -> web.Application:
    """Return an aiohttp application whose sub-application uses its sessions."""
    app, part = web.Application(), web.Application()
    part.add_routes(_aiohttp(_do))
    rss.aiohttp.setup(app, sessions)
    app.add_subapp("/part", part)
    return app


def aiohttp_session_app(sessions: Sessions) -> web.Application:
    """Return an application on aiohttp-session."""

    async def do(request: web.Request, action: str) -> dict[str, Any]:
        if action == "untouched":
            return {}
        handle = await rss.aiohttp.get_session(request)
        if action == "sign-in" and not sessions.store.fields.identity:
            return await act_on_dict({}, handle, action)
        session = await aiohttp_session.get_session(request)
        if action == "sign-out":
            session.invalidate()
            return {}
        return await act_on_dict(session, handle, action)

    app = web.Application()
    rss.aiohttp_session.setup(app, sessions)
    app.add_routes(_aiohttp(do))
    return app


# ---------------------------------------------------------------- Starlette and FastAPI


async def _starlette_response(action: str, session: Session, held: dict[str, Any]) -> starlette.responses.Response:
    match action:
        case "not-modified":
            return starlette.responses.Response(status_code=304)
        case "missing":
            raise fastapi.HTTPException(404)
        case "crash":
            raise Crash
        case "file":
            return starlette.responses.FileResponse(FILE)
        case "stream":
            return starlette.responses.StreamingResponse(chunks(session))
    return starlette.responses.JSONResponse(held, headers=PUBLIC if action == "public" else None)


async def _starlette_socket(socket: starlette.websockets.WebSocket, session: Session) -> None:
    await act(session, "websocket")
    await socket.accept()
    await socket.send_json(await session.get())
    await socket.close()


def starlette_app(sessions: Sessions) -> starlette.applications.Starlette:
    """Return a Starlette application with the middleware."""

    async def handle(request: starlette.requests.Request) -> starlette.responses.Response:
        session, action = await rss.asgi.get_session(request), request.path_params["action"]
        held = await act(session, action, request.headers.get(CSRF, ""))
        return await _starlette_response(action, session, held)

    async def socket(websocket: starlette.websockets.WebSocket) -> None:
        await _starlette_socket(websocket, await rss.asgi.get_session(websocket))

    return starlette.applications.Starlette(
        routes=[
            starlette.routing.WebSocketRoute("/websocket", socket),
            starlette.routing.Route("/{action}", handle),
        ],
        middleware=[starlette.middleware.Middleware(rss.asgi.SessionMiddleware, sessions=sessions)],
        lifespan=rss.asgi.lifespan(sessions),
    )


def starlette_dict_app(sessions: Sessions) -> starlette.applications.Starlette:
    """Return a Starlette application with `request.session`."""

    async def handle(request: starlette.requests.Request) -> starlette.responses.Response:
        session, action = await rss.asgi.get_session(request), request.path_params["action"]
        held = await act_on_dict(request.session, session, action) if action != "untouched" else {}
        return await _starlette_response(action, session, held)

    async def socket(websocket: starlette.websockets.WebSocket) -> None:
        session = await rss.asgi.get_session(websocket)
        await act_on_dict(websocket.session, session, "websocket")
        await websocket.accept()
        await websocket.send_json(await session.get())
        await websocket.close()

    middleware = starlette.middleware.Middleware(rss.asgi.SessionMiddleware, sessions=sessions, dict_session=True)
    return starlette.applications.Starlette(
        routes=[
            starlette.routing.WebSocketRoute("/websocket", socket),
            starlette.routing.Route("/{action}", handle),
        ],
        middleware=[middleware],
        lifespan=rss.asgi.lifespan(sessions),
    )


def fastapi_app(sessions: Sessions) -> rss.asgi.SessionMiddleware:
    """Return a FastAPI application with the dependency, and the middleware around it."""
    app = fastapi.FastAPI(lifespan=rss.asgi.lifespan(sessions))

    @app.websocket("/websocket")
    async def socket(websocket: fastapi.WebSocket, session: SessionDep) -> None:
        await _starlette_socket(websocket, session)

    @app.get("/{action}")
    async def handle(request: fastapi.Request, action: str, session: SessionDep) -> fastapi.responses.Response:
        held = await act(session, action, request.headers.get(CSRF, ""))
        return await _starlette_response(action, session, held)

    return rss.asgi.SessionMiddleware(app, sessions)


# ---------------------------------------------------------------- Litestar


def litestar_app(sessions: Sessions) -> litestar.Litestar:
    """Return a Litestar application with the middleware and a dependency."""

    async def session(request: litestar.Request[Any, Any, Any]) -> Session:
        return await rss.asgi.get_session(request)

    @litestar.get("/{action:str}")
    async def handle(
        request: litestar.Request[Any, Any, Any],
        session: litestar.di.NamedDependency[Session],
        action: litestar.params.FromPath[str],
    ) -> litestar.response.Response[Any]:
        held = await act(session, action, request.headers.get(CSRF, ""))
        match action:
            case "not-modified":
                return litestar.response.Response(b"", status_code=304)
            case "missing":
                raise litestar.exceptions.NotFoundException
            case "crash":
                raise Crash
            case "file":
                return litestar.response.File(FILE)
            case "stream":
                return litestar.response.Stream(chunks(session))
        return litestar.response.Response(held, headers=PUBLIC if action == "public" else None)

    @litestar.websocket("/websocket")
    async def socket(socket: litestar.WebSocket[Any, Any, Any]) -> None:
        session = await rss.asgi.get_session(socket)
        await act(session, "websocket")
        await socket.accept()
        await socket.send_json(await session.get())
        await socket.close()

    return litestar.Litestar(
        [handle, socket],
        middleware=[litestar.middleware.DefineMiddleware(rss.asgi.SessionMiddleware, sessions=sessions)],
        dependencies={"session": litestar.di.Provide(session)},
        lifespan=[rss.asgi.lifespan(sessions)],
    )


# ---------------------------------------------------------------- Quart


def _quart(app: quart.Quart, do: Callable[[str], Awaitable[dict[str, Any]]]) -> quart.Quart:
    @app.get("/<action>")
    async def handle(action: str) -> Any:
        held = await do(action)
        match action:
            case "not-modified":
                return "", 304
            case "missing":
                quart.abort(404)
            case "crash":
                raise Crash
            case "file":
                return await quart.send_file(FILE)
            case "stream":
                return chunks(rss.quart.session._get_current_object())  # type: ignore[attr-defined]
            case "public":
                return held, PUBLIC
        return held

    @app.websocket("/websocket")
    async def socket() -> None:
        await do("websocket")
        await quart.websocket.accept()
        await quart.websocket.send_json(await rss.quart.session.get())

    return app


def quart_app(sessions: Sessions) -> quart.Quart:
    """Return a Quart application with the extension."""
    app = quart.Quart(__name__)
    rss.quart.QuartSessions(app, sessions)

    async def do(action: str) -> dict[str, Any]:
        token = quart.request.headers.get(CSRF, "") if quart.has_request_context() else ""
        return await act(rss.quart.session, action, token)

    return _quart(app, do)


def quart_dict_app(sessions: Sessions) -> quart.Quart:
    """Return a Quart application with `quart.session`."""
    app = quart.Quart(__name__)
    rss.quart.QuartSessions(app, sessions)
    app.session_interface = rss.quart.SessionInterface()  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    return _quart(app, lambda action: act_on_dict(quart.session, rss.quart.session, action))


@dataclass(frozen=True)
class Site:
    """A framework, and how it is served.

    *keeps_a_dict*: the session is a dict, so some actions are missing. *root*: the path of the application.
    """

    name: str
    build: Builder
    serve: Server
    keeps_a_dict: bool = False
    root: str = ""

    def __str__(self) -> str:
        return f"{self.name} on {self.serve.__name__.removeprefix('serve_')}"


SITES = [
    Site("aiohttp", aiohttp_app, serve_aiohttp),
    Site("aiohttp, sub-application", aiohttp_sub_app, serve_aiohttp, root="/part"),
    Site("aiohttp-session", aiohttp_session_app, serve_aiohttp, keeps_a_dict=True),
    *(
        Site(name, build, serve, keeps_a_dict)
        for serve in (serve_uvicorn, serve_hypercorn)
        for name, build, keeps_a_dict in (
            ("Starlette", starlette_app, False),
            ("request.session", starlette_dict_app, True),
            ("FastAPI", fastapi_app, False),
            ("Litestar", litestar_app, False),
            ("Quart", quart_app, False),
            ("quart.session", quart_dict_app, True),
        )
    ),
]
