"""Sessions for Quart: an extension, and an interface that keeps `quart.session` in Redis."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from quart import Quart, has_websocket_context, request, websocket
from quart.json.tag import TaggedJSONSerializer
from quart.sessions import SessionInterface as _SessionInterface
from quart.sessions import SessionMixin
from quart.wrappers import Response
from quart.wrappers.base import BaseRequestWebsocket
from werkzeug.local import LocalProxy
from werkzeug.wrappers import Response as WerkzeugResponse

from rss.asgi import KEY, SessionMiddleware
from rss.cookies import CookiePolicy
from rss.dict_session import DictSession as _DictSession
from rss.session import Session, Sessions, checked
from rss.store import SessionStore

if TYPE_CHECKING:
    from rss.oidc import BackChannelLogout  # It needs the extra [oidc].

_SCALARS: Final = {str, int, float, bool, type(None)}
_MISSING: Final = "QuartSessions was not set up for this application"
_tagged: Final = TaggedJSONSerializer()


class QuartSessions:
    """The extension: gives each request and each WebSocket its session, and each response its cookie.

    *app*: the application to set up. An application factory leaves it out, and calls `init_app` later.
    *sessions*: the sessions to use. If None, they are made from the configuration of the application. RSS_URL is the
    URL of Redis. RSS_STORE, RSS_COOKIE and RSS_SESSIONS are dicts with arguments of `SessionStore`, `CookiePolicy` and
    `Sessions`.

    `app.extensions["rss"]` holds the sessions. The store is opened and closed with the application. If a view does not
    catch an error of its session, the error becomes the response, as `rss.asgi.SessionMiddleware` describes.

    Raises TypeError if *app* is no Quart application, or *sessions* is no `Sessions`.
    """

    def __init__(self, app: Quart | None = None, sessions: Sessions[Any] | None = None) -> None:
        if not isinstance(app, Quart | None):
            raise TypeError(f"app must be a Quart, not {type(app).__name__}: QuartSessions(app, Sessions(store))")
        self._sessions = None if sessions is None else checked(sessions, "QuartSessions(app, Sessions(store))")
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Quart) -> None:
        """Set up the extension for an application."""
        sessions = self._sessions or _configured(app.config)
        app.extensions["rss"] = sessions
        app.asgi_app = SessionMiddleware(app.asgi_app, sessions)  # type: ignore[method-assign]
        store = sessions.store

        async def opened() -> None:
            await store.__aenter__()

        app.before_serving(opened)
        app.after_serving(store.aclose)


def _configured(config: Mapping[str, Any]) -> Sessions[Any]:
    url = config.get("RSS_URL", "redis://localhost:6379")
    store = SessionStore.from_url(url, **config.get("RSS_STORE", {}))
    return Sessions(store, cookie=CookiePolicy(**config.get("RSS_COOKIE", {})), **config.get("RSS_SESSIONS", {}))


def logout_view(logout: "BackChannelLogout") -> Callable[[], Awaitable[Response]]:
    """Return a view for the logout tokens that an OpenID provider posts: `app.post("/logout")(view)`."""

    async def back_channel_logout() -> Response:
        body: bytes = await request.body
        answer = await logout.answer(request.method, request.headers.get("Content-Type", ""), body)
        return Response(answer.body, answer.status, answer.headers)

    return back_channel_logout


async def get_session(connection: BaseRequestWebsocket) -> Session[Any]:
    """Return the session of a request or a WebSocket.

    Raises RuntimeError if the extension was not set up for the application.
    """
    return _of(connection)


def _of(connection: BaseRequestWebsocket) -> Session[Any]:
    try:
        found: Session[Any] = connection.scope[KEY]  # type: ignore[typeddict-item]
    except KeyError:
        raise RuntimeError(_MISSING) from None
    return found


#: The session of the request or WebSocket that is being handled.
session: Session[Any] = cast("Session[Any]", LocalProxy(lambda: _of(websocket if has_websocket_context() else request)))


class DictSession(_DictSession, SessionMixin):
    """The type of `quart.session` with `SessionInterface`.

    Values may have all types that Quart's own sessions allow.

    Changes are detected, so setting `modified` is not necessary and does nothing. Setting `permanent` does nothing
    either: the store and the cookie policy decide how long the session lives.
    """

    def item_from(self, data: Any) -> Any:
        return _tagged.loads(json.dumps(data)) if isinstance(data, dict | list) else data

    def data_from(self, item: Any) -> Any:
        return item if type(item) in _SCALARS else json.loads(_tagged.dumps(item))

    @property
    def permanent(self) -> bool:
        """Always True."""
        return True

    @permanent.setter
    def permanent(self, value: bool) -> None:
        pass

    @property
    def accessed(self) -> bool:
        """Whether the response depends on the session."""
        return self.looked_at

    @accessed.setter
    def accessed(self, value: bool) -> None:
        pass  # Quart also sets it when it saves the session.

    @property
    def modified(self) -> bool:
        """Whether anything was changed."""
        return self.is_changed

    @modified.setter
    def modified(self, value: bool) -> None:
        pass


class SessionInterface(_SessionInterface):
    """Keeps `quart.session` in Redis: `app.session_interface = SessionInterface()`. It requires `QuartSessions`.

    The session is read when a request with a cookie begins. When the response is made, one script writes the fields
    that differ. `rss.dict_session` has the details.

    `rss.quart.session` is the same session, with the verbs that a dict does not have.
    """

    async def open_session(self, app: Quart, request: BaseRequestWebsocket) -> DictSession:
        """Read the session.

        Raises RuntimeError if `QuartSessions` was not set up for the application.
        """
        handle = cast("Session[Any] | None", request.scope.get(KEY))
        if handle is None:  # A session transaction of the test client does not run the middleware.
            try:
                sessions: Sessions[Any] = app.extensions["rss"]
            except KeyError:
                raise RuntimeError(f"{_MISSING}: SessionInterface needs it") from None
            cookies = "; ".join(request.headers.getlist("Cookie"))
            handle = sessions.create_session(cookies, scheme=request.scheme)
        return DictSession(handle, await handle.peek())

    async def save_session(
        self, app: Quart, session: SessionMixin, response: Response | WerkzeugResponse | None
    ) -> None:
        """Write the changes, and add the cookie to the response. After a WebSocket the response is None."""
        del app
        if not isinstance(session, DictSession):
            raise TypeError("this interface keeps its own sessions only")
        await session.save()
        if response is not None:
            headers = response.headers
            for name, value in session.handle.take_headers(headers.get("Cache-Control"), headers.get("Vary")):
                if name == "Cache-Control":
                    headers[name] = value
                else:
                    headers.add(name, value)
