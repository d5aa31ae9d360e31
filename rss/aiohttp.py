"""Sessions for aiohttp, including its sub-applications, streams, files and WebSockets."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from rss.session import Session, Sessions, checked, log_refusal

if TYPE_CHECKING:
    from rss.oidc import BackChannelLogout  # It needs the extra [oidc].

#: The key of an application's sessions. `request.config_dict[SESSIONS]` works in a sub-application too.
SESSIONS: Final = web.AppKey("rss_sessions", Sessions[Any])
#: The key of a request's session.
SESSION: Final = web.RequestKey("rss_session", Session[Any])
# All sessions of a request. There are several if a sub-application has sessions of its own.
_ALL: Final = web.RequestKey("rss_sessions", list[Session[Any]])
# The same, of a response. A middleware may pass a clone of the request on, while aiohttp prepares the response with the
# original. So the response needs the sessions, unless the handler itself prepares it.
_SESSIONS: Final = web.ResponseKey("rss_sessions", list[Session[Any]])

_ERRORS: Final = {
    503: web.HTTPServiceUnavailable,
    409: web.HTTPConflict,
    403: web.HTTPForbidden,
    401: web.HTTPUnauthorized,
}


def setup(app: web.Application, sessions: Sessions[Any]) -> None:
    """Add sessions to an application: each request gets its session, and each response its cookie.

    The store is opened and closed with the application. Raises TypeError if *sessions* is no `Sessions`.

    If a handler does not catch an error of its session, the error becomes the response:

    - 503: Redis does not answer.
    - 409: the request raced a login.
    - 401: the session has ended.
    - 403: a limit or a block refuses the session.
    """
    app[SESSIONS] = checked(sessions, "setup(app, Sessions(store))")
    app.cleanup_ctx.append(_open)
    app.middlewares.insert(0, _attach)
    # The headers of a stream leave before its handler returns, so `_attach` would add the cookie too late. When this
    # signal is sent, aiohttp has rendered `response.cookies`, so `_add_headers` adds headers instead.
    app.on_response_prepare.append(_add_headers)


async def get_session(request: web.Request) -> Session[Any]:
    """Return the session of a request.

    Raises RuntimeError if `setup` was not called for the application.
    """
    try:
        return request[SESSION]
    except KeyError:
        raise RuntimeError("rss.aiohttp.setup() was not called for this application") from None


def logout_handler(logout: "BackChannelLogout") -> Handler:
    """Return a handler for the logout tokens that an OpenID provider posts: `web.post("/logout", handler)`."""

    async def handle(request: web.Request) -> web.StreamResponse:
        answer = await logout.answer(request.method, request.headers.get("Content-Type", ""), await request.read())
        return web.Response(status=answer.status, headers=answer.headers, body=answer.body)

    return handle


async def _open(app: web.Application) -> AsyncIterator[None]:
    async with app[SESSIONS].store:
        yield


@web.middleware
async def _attach(request: web.Request, handler: Handler) -> web.StreamResponse:
    sessions, outer = request.app[SESSIONS], request.get(_ALL, ())
    around = request[SESSION] if outer else None
    if around is not None and around.sessions is sessions:  # An outer application has attached it.
        return await handler(request)
    cookies = "; ".join(request.headers.getall("Cookie", ()))
    session = request[SESSION] = sessions.create_session(cookies, scheme=request.scheme)
    request[_ALL] = [*outer, session]
    try:
        response = await handler(request)
    except web.HTTPException as error:
        _add_sessions(error, request)
        raise
    except Exception as error:
        status = session.status_for(error)
        if session.sent or status is None:
            raise
        log_refusal(status, error)
        # Raise an error, not return a response: middlewares of the application may render a page for it.
        refused = _ERRORS[status]()
        _add_sessions(refused, request)
        raise refused from error
    else:
        _add_sessions(response, request)
        return response
    finally:
        if around is not None:
            request[SESSION] = around


def _add_sessions(response: web.StreamResponse, request: web.Request) -> None:
    """Note the sessions of a request for `_add_headers`."""
    response[_SESSIONS] = [*dict.fromkeys([*response.get(_SESSIONS, ()), *request[_ALL]])]


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    headers = response.headers
    for session in response.get(_SESSIONS) or request.get(_ALL, ()):
        vary = ", ".join(headers.getall("Vary", ())) or None
        for name, value in session.take_headers(headers.get("Cache-Control"), vary):
            if name == "Cache-Control":
                headers[name] = value
            else:
                headers.add(name, value)
