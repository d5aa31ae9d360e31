"""Sessions for every ASGI application: on Starlette, FastAPI, Litestar, Quart, or without a framework."""

from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Protocol

from rss.dict_session import DictSession
from rss.errors import SessionError
from rss.session import Session, Sessions, checked, log_refusal

if TYPE_CHECKING:

    class _Connection(Protocol):
        """A request or a WebSocket of Starlette, FastAPI, Litestar or Quart."""

        @property
        def scope(self) -> Any: ...

else:
    try:  # FastAPI injects the connection if this class is the annotation. `Depends(get_session)` needs that.
        from starlette.requests import HTTPConnection as _Connection
    except ImportError:
        _Connection = Any

_Message = MutableMapping[str, Any]
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

#: The key of the session in the scope of a request.
KEY: Final = "rss.session"

# The messages that carry headers to the client. Each request sends one of them.
_BEGINNINGS: Final = {"http.response.start", "websocket.accept", "websocket.http.response.start"}


class SessionMiddleware:
    """Gives each request and each WebSocket its session, in `scope["rss.session"]`, and the response its cookie.

    *dict_session*: also put a dict into `scope["session"]`, which is `request.session` in Starlette and FastAPI. It
    works in `def` endpoints too. The session is read when a request with a cookie begins. Changes are written when
    the response begins. `rss.dict_session.DictSession` describes the dict.

    Raises TypeError if *sessions* is no `Sessions`.

    If the application does not catch an error of its session, the error becomes the response. The same response
    replaces a 500 that the application sends for such an error.

    - 503: Redis does not answer.
    - 409: the request raced a login.
    - 401: the session has ended.
    - 403: a limit or a block refuses the session.
    """

    def __init__(self, app: Any, sessions: Sessions[Any], *, dict_session: bool = False) -> None:
        self._app: _App = app
        self._sessions = checked(sessions, "SessionMiddleware(app, Sessions(store))")
        self._dict_session = dict_session

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        around: Session[Any] | None = scope.get(KEY)
        if around is not None and around.sessions is self._sessions:  # An outer middleware adds the headers.
            if self._dict_session and not isinstance(scope.get("session"), DictSession):
                send = await _with_items(scope, around, send)
            await self._app(scope, receive, send)
            return
        cookies = "; ".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"cookie")
        session = scope[KEY] = self._sessions.create_session(cookies, scheme=scope.get("scheme", "http"))
        response = _Response(scope, session, send)
        begin: _Send = response.send
        try:
            if self._dict_session:
                begin = await _with_items(scope, session, begin)
            await self._app(scope, receive, begin)
        except Exception as error:
            status = session.status_for(error)
            if session.sent:
                if response.refused and status is not None:  # The response reports this error already.
                    return
                raise
            if status is None:
                raise
            log_refusal(status, error)
            await response.refuse(status)


async def _with_items(scope: _Scope, session: Session[Any], send: _Send) -> _Send:
    """Put the session into the scope as a dict. Return a `send` that writes its changes before the response begins."""
    items = scope["session"] = DictSession(session, await session.peek())

    async def save_and_send(message: _Message) -> None:
        if message["type"] in _BEGINNINGS:
            try:
                await items.save()
            except SessionError as error:
                # The application can no longer catch this error, because its response has begun.
                status = session.status_for(error)
                if status is None:
                    raise
                log_refusal(status, error)
                message = {**message, "status": HTTPStatus.INTERNAL_SERVER_ERROR}
        await send(message)

    return save_and_send


class _Response:
    """The response to one request."""

    def __init__(self, scope: _Scope, session: Session[Any], send: _Send) -> None:
        #: Whether the response is an error, and the messages of the application are dropped.
        self.refused = False
        self._scope = scope
        self._session = session
        self._send = send

    async def send(self, message: _Message) -> None:
        """Send a message of the application, with the headers of the session."""
        if message["type"] in _BEGINNINGS:
            failure = self._session.failure
            if failure and message.get("status") == HTTPStatus.INTERNAL_SERVER_ERROR:
                await self.refuse(self._session.status_for(failure) or HTTPStatus.INTERNAL_SERVER_ERROR)
            else:
                await self._begin(message)
        elif not self.refused:
            await self._send(message)

    async def refuse(self, status: int) -> None:
        """Respond with an error. Later messages of the application are dropped."""
        self.refused = True
        kind = "websocket.http.response" if self._scope["type"] == "websocket" else "http.response"
        if kind == "http.response" or kind in (self._scope.get("extensions") or ()):
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await self._begin({"type": f"{kind}.start", "status": status, "headers": headers})
            body = HTTPStatus(status).phrase.encode()
            await self._send({"type": f"{kind}.body", "body": body, "more_body": False})
        else:
            await self._send(
                {"type": "websocket.close", "code": 1013 if status == HTTPStatus.SERVICE_UNAVAILABLE else 1008}
            )

    async def _begin(self, message: _Message) -> None:
        # Change a copy: the application may send the same message to other clients.
        headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
        own = (
            b", ".join(value for name, value in headers if name == wanted).decode("latin-1") or None
            for wanted in (b"cache-control", b"vary")
        )
        added = [(name.lower().encode(), value.encode("latin-1")) for name, value in self._session.take_headers(*own)]
        if any(name == b"cache-control" for name, _ in added):
            headers = [(name, value) for name, value in headers if name != b"cache-control"]
        await self._send({**message, "headers": headers + added})


async def get_session(connection: _Connection) -> Session[Any]:
    """Return the session of a request or a WebSocket.

    Raises RuntimeError if there is no `SessionMiddleware`.
    """
    try:
        session: Session[Any] = connection.scope[KEY]
    except KeyError:
        raise RuntimeError("there is no SessionMiddleware around this application") from None
    return session


def lifespan(sessions: Sessions[Any]) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """Return a lifespan that opens the store when the application starts, and closes it when the application stops.

    Pass it as the argument `lifespan` of Starlette, FastAPI or Litestar. In other applications, use
    `async with sessions.store`.

    Raises TypeError if *sessions* is no `Sessions`.
    """
    checked(sessions, "lifespan(Sessions(store))")

    @asynccontextmanager
    async def opened(_: object) -> AsyncIterator[None]:
        async with sessions.store:
            yield

    return opened
