"""Tests of Quart alone: its extension, and `quart.session`."""

import contextlib
import datetime as dt
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import quart
from quart import Quart
from quart.sessions import SecureCookieSession
from redis.asyncio import Redis

import rss.quart
from rss import Reference, Sessions, SessionStore
from rss.demo.app import create_app as create_demo
from tests.integrations.serving import browser, cookie_of, serve_hypercorn
from tests.keyspace import Keyspace
from tests.servers import own_server
from tests.test_session import id_of

View = Callable[[], Awaitable[Any]]


def create_app(sessions: Sessions, **views: View) -> Quart:
    """Return an application with these pages, and sessions of both kinds."""
    app = Quart(__name__)
    rss.quart.QuartSessions(app, sessions)
    app.session_interface = rss.quart.SessionInterface()  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    for name, view in views.items():
        app.add_url_rule(f"/{name}", name, view)
    return app


async def test_an_application_factory(redis_url: str, keyspace: Keyspace) -> None:
    """An extension that is made before the application takes its options from the application's configuration."""
    extension = rss.quart.QuartSessions()

    def factory() -> Quart:
        app = Quart(__name__)
        app.config.update(
            RSS_URL=redis_url,
            RSS_STORE={"prefix": keyspace.prefix, "references": ["user_id"], "max_age": "1h"},
            RSS_COOKIE={"name": "__Host-sid"},
            RSS_SESSIONS={"rolling": None},
        )
        extension.init_app(app)

        @app.get("/")
        async def home() -> str:
            await rss.quart.session.set({"user_id": 1})
            return str((await rss.quart.get_session(quart.request)).is_new)

        return app

    for _ in range(2):  # Each application has a store of its own.
        app = factory()
        assert app.extensions["rss"].idle is None
        for _ in range(2):  # An application may be started again.
            async with app.test_app() as test_app:
                client = test_app.test_client()
                response = await client.get("/", scheme="https")
                assert response.headers["Set-Cookie"].startswith("__Host-sid=")
                assert await (await client.get("/", scheme="https")).get_data(as_text=True) == "False"
            with pytest.raises(RuntimeError, match="the store is closed"):
                await app.extensions["rss"].store.get("a")
    assert len((await keyspace.dump())["user_id:{1}"]) == 4


async def test_a_mistake_in_the_configuration_is_told(redis_url: str) -> None:
    """A mistake in the configuration raises an error when the application is made."""
    for options, error in (
        ({"RSS_STORE": {"reference": ["user_id"]}}, TypeError),
        ({"RSS_COOKIE": {"samesite": "lax"}}, TypeError),
        ({"RSS_SESSIONS": {"rolling": "often"}}, ValueError),
    ):
        app = Quart(__name__)
        app.config.update(RSS_URL=redis_url, **options)
        with pytest.raises(error):
            rss.quart.QuartSessions(app)


async def test_without_the_extension_there_is_no_session() -> None:
    """Without the extension, or without a request, the error says so."""
    app = Quart(__name__)
    async with app.test_request_context("/"):
        with pytest.raises(RuntimeError, match="QuartSessions was not set up"):
            await rss.quart.session.get()
    with pytest.raises(RuntimeError, match="Not within a request"):
        await rss.quart.session.get()


# ---------------------------------------------------------------- quart.session


async def test_quart_session_writes_what_was_changed(sessions: Sessions, keyspace: Keyspace) -> None:
    """`quart.session` writes changed fields only, also nested changes, and keeps fields of parallel requests."""

    async def begin() -> str:
        quart.session["user_id"] = 1
        quart.session["cart"] = {"books": ["a"]}
        quart.session["theme"] = "dark"
        return ""

    async def change() -> str:
        quart.session["cart"]["books"].append("b")
        quart.session["user_id"] += 1
        del quart.session["theme"]
        assert quart.session.modified
        await sessions.store.set(str(rss.quart.session.id), {"other": 1})  # A parallel request.
        return ""

    async def look() -> dict[str, Any]:
        assert not quart.session.modified
        return dict(quart.session)

    client = create_app(sessions, begin=begin, change=change, look=look).test_client()
    for path in ("/begin", "/change"):
        await client.get(path, scheme="https")
    response = await client.get("/look", scheme="https")
    assert await response.get_json() == {"user_id": 2, "cart": {"books": ["a", "b"]}, "other": 1}
    assert "Set-Cookie" not in response.headers
    dump = await keyspace.dump()
    (key,) = [key for key in dump if key.startswith("{")]
    session_id = key.strip("{}")
    assert dump == {
        key: {"id": session_id, "user_id": "2", "cart": '{"books":["a","b"]}', "other": "1"},
        "user_id:{2}": {session_id},
    }


async def test_quart_session_takes_what_quarts_own_takes(sessions: Sessions) -> None:
    """`quart.session` stores flashed messages, reserved names, and types that JSON does not have."""
    values: dict[str, Any] = {
        "tuple": (1, ("a",)),
        "time": dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
        "uuid": uuid.UUID(int=1),
        "bytes": b"\0\xff",
        "id": "an id of mine",
        "_user": "x",
        ".dot": "y",
        "nested": {" t": [1], "list": [{"tuple": (1,)}]},
        "none": None,
        "true": True,
    }
    seen: list[dict[str, Any]] = []

    async def write() -> str:
        quart.session.update(values)
        await quart.flash("hello", "greeting")
        return ""

    async def look() -> str:
        seen.append(dict(quart.session))
        assert quart.get_flashed_messages(with_categories=True) == [("greeting", "hello")]
        return ""

    client = create_app(sessions, write=write, look=look).test_client()
    await client.get("/write", scheme="https")
    assert (await client.get("/look", scheme="https")).status_code == 200
    assert seen[0].pop("_flashes") == [("greeting", "hello")]
    assert seen[0] == values
    async with client.session_transaction(scheme="https") as session:
        assert "_flashes" not in session
        assert session["_user"] == "x"


async def test_how_quart_session_describes_itself(sessions: Sessions) -> None:
    """`len` counts the items of the application. The repr tells the state of the session, but no value and no id."""

    async def write() -> str:
        quart.session.update({"user_id": 1, "theme": "dark"})
        return ""

    async def look() -> list[Any]:
        return [len(quart.session), repr(quart.session)]

    client = create_app(sessions, write=write, look=look).test_client()
    assert await (await client.get("/look", scheme="https")).get_json() == [0, "<DictSession of <Session: none>>"]
    await client.get("/write", scheme="https")
    assert await (await client.get("/look", scheme="https")).get_json() == [2, "<DictSession of <Session: alive>>"]


async def test_a_transaction_of_the_test_client(sessions: Sessions) -> None:
    """`session_transaction` of the test client works as with Quart's own sessions."""

    async def look() -> dict[str, Any]:
        return dict(quart.session)

    client = create_app(sessions, look=look).test_client()
    async with client.session_transaction(scheme="https") as session:
        session["user_id"] = 7
        assert session.new
        assert session.permanent
    async with client.session_transaction(scheme="https") as session:
        session["n"] = 1
        session.modified = session.permanent = True
    assert await (await client.get("/look", scheme="https")).get_json() == {"user_id": 7, "n": 1}
    with pytest.raises(TypeError, match="the name of an item must be a str"):
        session[1] = 1  # type: ignore[index]


async def test_an_emptied_session_is_ended(sessions: Sessions, keyspace: Keyspace) -> None:
    """Clearing `quart.session` ends the session and removes its cookie; without a session nothing happens."""

    async def write() -> str:
        quart.session["user_id"] = 1
        return ""

    async def empty() -> str:
        quart.session.clear()
        return ""

    client = create_app(sessions, write=write, empty=empty).test_client()
    assert "Set-Cookie" not in (await client.get("/empty", scheme="https")).headers
    await client.get("/write", scheme="https")
    response = await client.get("/empty", scheme="https")
    assert "; Max-Age=0;" in response.headers["Set-Cookie"]
    assert [*(await keyspace.dump()).values()] == [{"_ended": "deleted"}]


async def test_a_view_may_use_both(sessions: Sessions, keyspace: Keyspace) -> None:
    """A view may use both interfaces: changes by `rss.quart.session` survive changes of `quart.session`."""

    async def flash() -> str:
        await quart.flash("hello")
        return ""

    async def form() -> str:
        assert quart.get_flashed_messages() == ["hello"]  # The message was the only item.
        return await rss.quart.session.create_csrf_token()

    async def check() -> str:
        return str(await rss.quart.session.verify_csrf_token(quart.request.headers["X"]))

    async def sign_in() -> str:
        quart.session["theme"] = "dark"
        quart.session.pop("cart", None)
        await rss.quart.session.rotate({"user_id": 7})
        return ""

    async def begin_anew() -> str:
        quart.session.clear()
        await rss.quart.session.rotate({"user_id": 8})
        return ""

    async def look() -> dict[str, Any]:
        return dict(quart.session)

    views = {"flash": flash, "form": form, "check": check, "sign_in": sign_in, "begin_anew": begin_anew, "look": look}
    client = create_app(sessions, **views).test_client()
    await client.get("/flash", scheme="https")
    token = await (await client.get("/form", scheme="https")).get_data(as_text=True)
    assert await (await client.get("/check", scheme="https", headers={"X": token})).get_data(as_text=True) == "True"
    await client.get("/sign_in", scheme="https")
    assert await (await client.get("/look", scheme="https")).get_json() == {"theme": "dark", "user_id": 7}
    await client.get("/begin_anew", scheme="https")
    assert await (await client.get("/look", scheme="https")).get_json() == {"user_id": 8}
    dump = await keyspace.dump()
    assert len(dump["user_id:{8}"]) == 1
    assert "user_id:{7}" not in dump


async def test_what_does_not_look_carries_no_cookie(sessions: Sessions, keyspace: Keyspace) -> None:
    """A response that does not use the session renews nothing and stays public; the next use renews it."""

    async def write() -> str:
        quart.session["n"] = quart.session.get("n", 0) + 1
        return ""

    async def untouched() -> Any:
        return "", {"Cache-Control": "public, max-age=3600"}

    async def look() -> str:
        return str(quart.session["n"])

    client = create_app(sessions, write=write, untouched=untouched, look=look).test_client()
    await client.get("/write", scheme="https")
    await keyspace.shorten(61_000)
    response = await client.get("/untouched", scheme="https")
    assert "Set-Cookie" not in response.headers
    assert response.headers["Cache-Control"] == "public, max-age=3600"
    (key,) = await keyspace.dump()
    assert await keyspace.ttl(key) < 28 * 86_400_000 - 60_000
    for path in ("/look", "/look", "/write"):
        assert "Set-Cookie" not in (await client.get(path, scheme="https")).headers
        assert await keyspace.ttl(key) > 28 * 86_400_000 - 60_000


async def test_only_a_view_that_looks_varies(sessions: Sessions, keyspace: Keyspace) -> None:
    """Only the response of a view that reads `quart.session` varies by Cookie."""

    async def untouched() -> str:
        quart.session.accessed = True  # Some versions of Quart set this in every request.
        return ""

    async def look() -> str:
        return str("user_id" in quart.session)

    async def write() -> str:
        quart.session["n"] = 1
        return ""

    client = create_app(sessions, untouched=untouched, look=look, write=write).test_client()
    for _ in range(2):
        assert "Vary" not in (await client.get("/untouched")).headers
        assert (await client.get("/look")).headers["Vary"] == "Cookie"
        await client.get("/write", scheme="https")
    assert len(await keyspace.dump()) == 1


async def test_a_late_write_by_quart_session_is_refused(
    sessions: Sessions, keyspace: Keyspace, caplog: pytest.LogCaptureFixture
) -> None:
    """A late write by `quart.session` fails once, and the session that was ended stays ended."""

    async def write() -> str:
        if quart.session.get("user_id"):
            await sessions.store.delete_by("user_id", 1, reason="password")
        quart.session["user_id"] = 1
        quart.session["n"] = quart.session.get("n", 0) + 1
        return ""

    client = create_app(sessions, write=write).test_client()
    assert (await client.get("/write", scheme="https")).status_code == 200
    response = await client.get("/write", scheme="https")
    assert response.status_code == 401
    assert "Set-Cookie" not in response.headers
    assert "Exception on request" in caplog.text
    assert "Request finalizing errored" not in caplog.text  # The write is not repeated for the error response.
    assert [*(await keyspace.dump()).values()] == [{"_ended": "password"}]


async def test_a_websocket_writes_at_its_end(sessions: Sessions, keyspace: Keyspace) -> None:
    """A WebSocket writes to an existing session when it closes, but cannot make a session then."""
    app = create_app(sessions)
    app.config["PROPAGATE_EXCEPTIONS"] = False

    @app.websocket("/socket")
    async def socket() -> None:
        quart.session["user_id"] = 1
        await quart.websocket.send("done")

    @app.get("/write")
    async def write() -> str:
        quart.session["n"] = 1
        return ""

    async with serve_hypercorn(app) as url, browser(url) as visitor:
        async with visitor.ws_connect("/socket") as connection:
            assert await connection.receive_str() == "done"
            async for _ in connection:
                pass
        assert await keyspace.dump() == {}
        async with visitor.get("/write"):
            pass
        async with visitor.ws_connect("/socket") as connection:
            async for _ in connection:
                pass
        session_id = id_of(cookie_of(visitor))
    assert (await keyspace.dump())["user_id:{1}"] == {session_id}


async def test_an_unavailable_store_is_a_503_to_the_test_client(caplog: pytest.LogCaptureFixture) -> None:
    """An unavailable store is a 503 to the test client, even if the application propagates exceptions."""

    async def explicit() -> str:
        await rss.quart.session.get()
        return ""

    with contextlib.ExitStack() as server:
        store = SessionStore.from_url(server.enter_context(own_server()), timeout=0.2)
        app = create_app(Sessions(store), explicit=explicit)
        client = app.test_client()
        async with client.session_transaction(scheme="https") as session:
            session["n"] = 1
        server.close()
        for interface in (app.session_interface, Quart.session_interface):
            app.session_interface = interface
            for app.testing in (True, False):
                assert (await client.get("/explicit", scheme="https")).status_code == 503
        await store.aclose()
    assert "503" in caplog.text


async def test_the_interface_without_the_extension() -> None:
    """The session interface without the extension raises an error that names the extension."""
    app = Quart(__name__)
    app.session_interface = rss.quart.SessionInterface()  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises((RuntimeError, ExceptionGroup)) as raised:
        await app.test_client().get("/")
    error = raised.value
    while isinstance(error, ExceptionGroup):  # Some versions of Quart run a request in a task group.
        (error,) = error.exceptions
    assert str(error) == "QuartSessions was not set up for this application: SessionInterface needs it"


async def test_another_kind_of_session_is_refused(sessions: Sessions, client: Redis) -> None:
    """The session interface refuses to save other kinds of sessions."""
    del client
    app = create_app(sessions)
    with pytest.raises(TypeError, match="keeps its own sessions only"):
        await app.session_interface.save_session(app, SecureCookieSession(), None)


# ---------------------------------------------------------------- the demo


@pytest.fixture(name="demo")
def _demo(client: Redis, keyspace: Keyspace) -> Quart:
    """The demo."""
    store = SessionStore(client, references={"user": Reference(identity=True)}, prefix=keyspace.prefix)
    return create_demo(Sessions(store))


def error_page(page: str, title: str) -> str:
    """Return the text of an error page of the demo, which has the layout and the title of its pages."""
    assert f"<title>{title} · redis-session-sets</title>" in page
    assert "style.css" in page
    found = re.search(rf"<header>.*</header>\s*<main>\s*<h1>{title}</h1>\s*<p>(.*)</p>", page)
    assert found
    return found[1]


def csrf_token_in(page: str) -> str:
    """Return the CSRF token of the forms of a page."""
    found = re.search(r'name="csrf_token" value="([^"]+)"', page)
    assert found
    return found[1]


async def test_a_form_of_before_the_login_is_refused_by_a_page(demo: Quart) -> None:
    """A form of the demo from before the login is a 403, whose page says that the form is out of date."""
    client = demo.test_client()
    token = csrf_token_in(await (await client.get("/", scheme="https")).get_data(as_text=True))
    for path, status in (("/sign-in", 303), ("/sign-out-others", 403)):
        response = await client.post(path, scheme="https", form={"user": "Alice", "csrf_token": token})
        assert response.status_code == status
    assert error_page(await response.get_data(as_text=True), "Forbidden").startswith("This form is out of date")


async def test_a_request_that_races_a_login_is_refused_by_a_page(demo: Quart) -> None:
    """A request to the demo that races a login is a 409, whose page says so."""
    client = demo.test_client()
    token = csrf_token_in(await (await client.get("/", scheme="https")).get_data(as_text=True))
    await client.post("/sign-in", scheme="https", form={"user": "Alice", "csrf_token": token})

    @demo.before_request
    async def race() -> None:
        await rss.quart.session.get()
        other = rss.quart.session.sessions.create_session(quart.request.headers["Cookie"])
        await other.rotate({"user": "Bob"})

    response = await client.get("/", scheme="https")
    assert response.status_code == 409
    assert error_page(await response.get_data(as_text=True), "Conflict").startswith("You have just signed in")
