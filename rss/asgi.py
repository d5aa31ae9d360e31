"""Sessions for every ASGI application: Starlette, FastAPI, Litestar, Quart, or none of these."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Protocol

from rss.errors import StoreUnavailable
from rss.session import Session, Sessions

_Message = MutableMapping[str, Any]
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

#: Where the session of a request is in its scope.
KEY: Final = "rss.session"

# What carries headers to the client, once for each request.
_BEGINNINGS: Final = {"http.response.start", "websocket.accept", "websocket.http.response.start"}

_logger = logging.getLogger("rss")


class _Connection(Protocol):
    """A request or a WebSocket of Starlette, FastAPI, Litestar or Quart."""

    @property
    def scope(self) -> Any: ...


class SessionMiddleware:
    """Gives each request and each WebSocket its session, in `scope["rss.session"]`, and the response its cookie.

    Where the application lets `StoreUnavailable` pass, the response is 503, and so is a 500 that it makes of that.
    """

    def __init__(self, app: Any, sessions: Sessions[Any]) -> None:
        self._app: _App = app
        self._sessions = sessions

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        cookies = "; ".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"cookie")
        session = scope[KEY] = self._sessions.create_session(cookies)

        async def send_with_cookie(message: _Message) -> None:
            if message["type"] in _BEGINNINGS:  # Changed in a copy: the application may send the same one to others.
                headers = list(message.get("headers", ()))
                message = {**message, "headers": headers + _headers(session, headers)}
                if session.unavailable and message.get("status") == 500:
                    message["status"] = 503
            await send(message)

        try:
            await self._app(scope, receive, send_with_cookie)
        except (StoreUnavailable, ExceptionGroup) as raised:
            error: BaseException = raised
            while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:  # Of a task group.
                error = error.exceptions[0]
            if session.sent or not isinstance(error, StoreUnavailable):
                raise
            _logger.error("503: %s", error)  # noqa: TRY400 - the application is not at fault
            await _refuse(scope, send_with_cookie)


async def get_session(connection: _Connection) -> Session[Any]:
    """Return the session of a request or a WebSocket. Raises RuntimeError where there is no `SessionMiddleware`."""
    try:
        session: Session[Any] = connection.scope[KEY]
    except KeyError:
        raise RuntimeError("there is no SessionMiddleware around this application") from None
    return session


def lifespan(sessions: Sessions[Any]) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """Return what opens the store when the application starts and closes it at its end.

    For Starlette, FastAPI and Litestar, as their argument `lifespan`. Others: `async with sessions.store`.
    """

    @asynccontextmanager
    async def opened(_: object) -> AsyncIterator[None]:
        async with sessions.store:
            yield

    return opened


def _headers(session: Session[Any], headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    present: dict[bytes, list[str]] = {}
    for name, value in headers:
        present.setdefault(bytes(name).lower(), []).append(bytes(value).decode("latin-1"))
    own = (", ".join(present[name]) if name in present else None for name in (b"cache-control", b"vary"))
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in session.take_headers(*own)]


async def _refuse(scope: _Scope, send: _Send) -> None:
    """Answer that the service is not available now."""
    kind = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    if kind == "http.response" or kind in (scope.get("extensions") or ()):
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": f"{kind}.start", "status": 503, "headers": headers})
        await send({"type": f"{kind}.body", "body": b"Service Unavailable", "more_body": False})
    else:
        await send({"type": "websocket.close", "code": 1013})
