"""Sessions for aiohttp: also for its sub-applications, streams, files and WebSockets."""

import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from rss.session import Session, Sessions, checked

if TYPE_CHECKING:
    from rss.oidc import BackChannelLogout  # Not everybody has what it needs.

#: Where an application keeps its sessions: `request.config_dict[SESSIONS]` finds them in a sub-application too.
SESSIONS: Final = web.AppKey("rss_sessions", Sessions[Any])
#: Where a request keeps its session.
SESSION: Final = web.RequestKey("rss_session", Session[Any])
# All sessions of a request: applications within it may have sessions of their own.
_ALL: Final = web.RequestKey("rss_sessions", list[Session[Any]])

_ERRORS: Final = {
    503: web.HTTPServiceUnavailable,
    409: web.HTTPConflict,
    403: web.HTTPForbidden,
    401: web.HTTPUnauthorized,
}

_logger = logging.getLogger("rss")


def setup(app: web.Application, sessions: Sessions[Any]) -> None:
    """Give each request its session, and each response its cookie; open the store with the application and close it.

    If a handler lets an error of its session pass, the response is 503 (Redis does not answer), 409 (the request raced
    a login), 401 (the session has ended), or 403 (a limit or a block refuses it).
    """
    app[SESSIONS] = checked(sessions, "setup(app, Sessions(store))")
    app.cleanup_ctx.append(_open)
    app.middlewares.insert(0, _attach)
    # A cookie that is set in a response by now is too late: its headers are made.
    app.on_response_prepare.append(_add_headers)


async def get_session(request: web.Request) -> Session[Any]:
    """Return the session of a request. Raises RuntimeError if `setup` was not called for the application."""
    try:
        return request[SESSION]
    except KeyError:
        raise RuntimeError("rss.aiohttp.setup() was not called for this application") from None


def logout_handler(logout: "BackChannelLogout") -> Handler:
    """Return the handler to which an OpenID provider posts its logout tokens: `web.post("/logout", handler)`."""

    async def handle(request: web.Request) -> web.StreamResponse:
        answer = await logout.answer(request.method, request.headers.get("Content-Type", ""), await request.read())
        return web.Response(status=answer.status, headers=answer.headers, body=answer.body)

    return handle


async def _open(app: web.Application) -> AsyncIterator[None]:
    async with app[SESSIONS].store:
        yield


@web.middleware
async def _attach(request: web.Request, handler: Handler) -> web.StreamResponse:
    sessions, around = request.app[SESSIONS], request.get(SESSION)
    if around is not None and around.sessions is sessions:  # An application around this one has the same.
        return await handler(request)
    cookies = "; ".join(request.headers.getall("Cookie", ()))
    session = request[SESSION] = sessions.create_session(cookies, scheme=request.scheme)
    request[_ALL] = [*request.get(_ALL, ()), session]
    try:
        return await handler(request)
    except Exception as error:
        status = session.status_for(error)
        if session.sent or status is None:
            raise
        _logger.error("%d: %s", status, error)  # noqa: TRY400 - the application is not at fault
        # An error of HTTP, not a response: middlewares of the application may make a page of it.
        raise _ERRORS[status] from error
    finally:
        if around is not None:
            request[SESSION] = around


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    headers = response.headers
    for session in request.get(_ALL, ()):
        vary = ", ".join(headers.getall("Vary", ())) or None
        for name, value in session.take_headers(headers.get("Cache-Control"), vary):
            if name == "Cache-Control":
                headers[name] = value
            else:
                headers.add(name, value)
