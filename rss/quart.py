"""Sessions for Quart: an extension, and an interface by which `quart.session` is one of them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

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
from rss.session import Session, Sessions, field_of, item_of
from rss.store import SessionStore

_SCALARS: Final = {str, int, float, bool, type(None)}
_tagged: Final = TaggedJSONSerializer()


class QuartSessions:
    """The extension: gives each request and each WebSocket its session, and each response its cookie.

    *app*: where it is set up; or later by `init_app`, for an application factory.
    *sessions*: which ones. Without them they are made from the configuration of the application: RSS_URL, of Redis;
    RSS_STORE, RSS_COOKIE and RSS_SESSIONS, which are dicts of what `SessionStore`, `CookiePolicy` and `Sessions` take.

    They are in `app.extensions["rss"]`. The store is opened and closed with the application. Where a view lets
    `StoreUnavailable` pass, the response is 503.
    """

    def __init__(self, app: Quart | None = None, sessions: Sessions[Any] | None = None) -> None:
        self._sessions = sessions
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Quart) -> None:
        """Set it up for an application."""
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


async def get_session(connection: BaseRequestWebsocket) -> Session[Any]:
    """Return the session of a request or a WebSocket. Raises RuntimeError where there is no extension."""
    return _of(connection)


def _of(connection: BaseRequestWebsocket) -> Session[Any]:
    try:
        found: Session[Any] = connection.scope[KEY]  # type: ignore[typeddict-item]
    except KeyError:
        raise RuntimeError("QuartSessions was not set up for this application") from None
    return found


#: The session of the request or WebSocket that is being handled.
session: Session[Any] = cast("Session[Any]", LocalProxy(lambda: _of(websocket if has_websocket_context() else request)))


class DictSession(SessionMixin):
    """What `quart.session` is with `SessionInterface`.

    What is changed in it is seen, however deep, so that `modified` need not be set; and how long it lives, the store
    and the policy of the cookie say, so that `permanent` means nothing. Setting them does nothing.
    """

    def __init__(self, handle: Session[Any], values: dict[str, Any]) -> None:
        self.handle = handle
        self._looked_at = False
        self.new = "id" not in values
        self._before = {field: value for field, value in values.items() if field != "id"}
        self._saved = False
        self._values = {item_of(field): _untag(value) for field, value in self._before.items()}

    @property
    def permanent(self) -> bool:
        """True."""
        return True

    @permanent.setter
    def permanent(self, value: bool) -> None:
        pass

    @property
    def accessed(self) -> bool:
        """Whether the response depends on it."""
        return self._looked_at

    @accessed.setter
    def accessed(self, value: bool) -> None:
        pass  # Quart says so when it saves the session, too.

    @property
    def modified(self) -> bool:
        """Whether anything was changed."""
        return self._fields() != self._before

    @modified.setter
    def modified(self, value: bool) -> None:
        pass

    async def save(self) -> None:
        """Write what was changed. Emptied, it is ended, unless the handle was used in this request, too."""
        if self._saved:  # It failed, and that is what the response is about now.
            return
        self._saved = True
        handle, used = self.handle, self.handle.accessed
        handle.accessed = used or self.accessed
        if self._before and not self._values and not used:
            await handle.delete()
        elif not await handle.replace(self._before, self._fields()) and handle.due and handle.accessed:
            await handle.touch()

    def _fields(self) -> dict[str, Any]:
        return {field_of(name): _tag(value) for name, value in self._values.items()}

    @property
    def _data(self) -> dict[str, Any]:
        self._looked_at = True
        return self._values

    def __getitem__(self, name: str) -> Any:
        return self._data[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str):
            raise TypeError(f"the name of an item must be a str, not {type(name).__name__}")
        self._data[name] = value

    def __delitem__(self, name: str) -> None:
        del self._data[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.handle!r}>"


class SessionInterface(_SessionInterface):
    """Makes `quart.session` a session in Redis: `app.session_interface = SessionInterface()`, beside `QuartSessions`.

    It is read when a request begins that has a cookie, and what was changed is written when the response is made, field
    by field, and nothing if nothing was. Emptied, it is ended, unless `rss.quart.session` was used in the request, too.
    Of the names of items, `id` and those that begin with `_` get a dot before them in Redis. Values may be all that
    Quart's own sessions take.

    For what only the session itself can, such as `rotate` at a login, there is `rss.quart.session`.
    """

    async def open_session(self, app: Quart, request: BaseRequestWebsocket) -> DictSession:
        """Read the session."""
        handle = cast("Session[Any] | None", request.scope.get(KEY))
        if handle is None:  # A transaction of the test client goes round the application.
            cookies = "; ".join(request.headers.getlist("Cookie"))
            sessions: Sessions[Any] = app.extensions["rss"]
            handle = sessions.create_session(cookies)
        handle.renews = False  # What does not look at it, such as a file that all may keep, carries no cookie.
        values = await handle.get()
        handle.accessed = False  # Whether it really is, the view shows.
        return DictSession(handle, values)

    async def save_session(
        self, app: Quart, session: SessionMixin, response: Response | WerkzeugResponse | None
    ) -> None:
        """Write what was changed, and add the cookie to the response; after a WebSocket there is none."""
        del app
        if not isinstance(session, DictSession):
            raise TypeError("this interface keeps its own sessions only")
        await session.save()
        if response is not None:
            vary = response.headers.get("Vary")
            for name, value in session.handle.take_headers(response.headers.get("Cache-Control"), vary):
                response.headers.add(name, value)


def _tag(value: Any) -> Any:
    """Return a value as JSON, as Quart puts it into its cookie: also a tuple, a datetime, a UUID, bytes or Markup."""
    return value if type(value) in _SCALARS else json.loads(_tagged.dumps(value))


def _untag(value: Any) -> Any:
    return _tagged.loads(json.dumps(value)) if isinstance(value, dict | list) else value
