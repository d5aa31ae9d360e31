"""Tests of ASGI alone: its messages, the lifespan, and Starlette."""

import asyncio
import contextlib
import logging
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware as StarlettesMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from rss import Session, Sessions, SessionStore, StoreUnavailable
from rss.asgi import KEY, SessionMiddleware, get_session, lifespan
from tests.integrations.serving import browser, cookie_of, serve_uvicorn
from tests.servers import own_server
from tests.test_session import request, signed_in, token_in


class Connection:
    """A scope, and the messages that an application sends in it."""

    def __init__(self, kind: str = "http", cookies: str = "", **more: Any) -> None:
        """*cookies*: the Cookie headers, one a line."""
        headers = [(b"cookie", line.encode()) for line in cookies.splitlines()]
        self.scope: dict[str, Any] = {"type": kind, "headers": headers, **more}
        self.sent: list[Any] = []

    async def run(self, app: Any) -> list[Any]:
        """Run an application, and return the messages that it sent."""

        async def receive() -> Any:
            raise AssertionError

        async def send(message: Any) -> None:
            self.sent.append(message)

        await app(self.scope, receive, send)
        return self.sent


async def test_other_scopes_pass(sessions: Sessions) -> None:
    """A scope without a session, such as a lifespan, passes unchanged."""
    scopes = []

    async def app(scope: Any, _receive: object, _send: object) -> None:
        scopes.append(scope)

    await Connection("lifespan").run(SessionMiddleware(app, sessions))
    assert scopes == [{"type": "lifespan", "headers": []}]


async def test_a_session_is_in_the_scope(sessions: Sessions) -> None:
    """The session is in the scope, with the cookie from any Cookie header; without the middleware an error says so."""
    token = await signed_in(sessions)
    seen = []

    async def app(scope: Any, _receive: object, _send: object) -> None:
        assert isinstance(scope[KEY], Session)
        seen.append(await scope[KEY].get())

    await Connection(cookies=f"a=b\nsession-id={token}\nc=d").run(SessionMiddleware(app, sessions))
    await Connection(cookies=f"session-id={token}\nsession-id=y{token}").run(SessionMiddleware(app, sessions))
    assert [one.get("user_id") for one in seen] == [1, None]
    with pytest.raises(RuntimeError, match="there is no SessionMiddleware"):
        await get_session(Request({"type": "http", "headers": []}))


@pytest.mark.parametrize("kind", ["http.response.start", "websocket.accept", "websocket.http.response.start"])
async def test_headers_are_added_to_those_of_the_application(sessions: Sessions, kind: str) -> None:
    """The headers of the session are added to those of the application, which all stay."""

    async def app(scope: Any, _receive: object, send: Any) -> None:
        await scope[KEY].set({"user_id": 1})
        own = [(b"Set-Cookie", b"csrftoken=x"), (b"Cache-Control", b"private"), (b"Vary", b"Accept")]
        await send({"type": kind, "headers": own})
        await send({"type": "http.response.body"})

    connection = Connection(kind.split(".", maxsplit=1)[0])
    start, body = await connection.run(SessionMiddleware(app, sessions))
    names = [name.lower() for name, _ in start["headers"]]
    assert names == [b"set-cookie", b"cache-control", b"vary", b"set-cookie", b"vary"]
    assert body == {"type": "http.response.body"}
    token = token_in([start["headers"][3][1].decode()])
    assert (await request(sessions, token).get())["user_id"] == 1


async def test_an_application_without_headers(sessions: Sessions) -> None:
    """A message without headers gets those of the session."""

    async def app(scope: Any, _receive: object, send: Any) -> None:
        await scope[KEY].set({})
        await send({"type": "websocket.accept"})

    (accept,) = await Connection("websocket").run(SessionMiddleware(app, sessions))
    assert [name for name, _ in accept["headers"]] == [b"set-cookie", b"cache-control", b"vary"]


async def test_messages_of_the_application_stay_as_they_are(sessions: Sessions) -> None:
    """A message that the application sends to several clients is not changed, so none gets another's cookie."""
    start = {"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]}

    async def app(scope: Any, _receive: object, send: Any) -> None:
        if scope["path"] == "/write":
            await scope[KEY].set({"user_id": 1})
        await send(start)

    wrapped = SessionMiddleware(app, sessions)
    (mine,) = await Connection(path="/write").run(wrapped)
    (others,) = await Connection(path="/").run(wrapped)
    assert b"set-cookie" in dict(mine["headers"])
    assert others["headers"] == start["headers"] == [(b"x", b"y")]


async def test_headers_may_be_any_iterable(sessions: Sessions) -> None:
    """The headers of a message may be any iterable, which is read once."""

    async def app(scope: Any, _receive: object, send: Any) -> None:
        await scope[KEY].set({"user_id": 1})
        headers = iter([(b"cache-control", b"private"), (b"vary", b"Cookie")])
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    (start,) = await Connection().run(SessionMiddleware(app, sessions))
    assert [name for name, _ in start["headers"]] == [b"cache-control", b"vary", b"set-cookie"]


async def test_an_unavailable_store_is_seen_in_a_task_group(sessions: Sessions) -> None:
    """StoreUnavailable in a task group is a 503, unless another error was raised beside it."""

    def failing(*errors: Exception) -> Any:
        async def app(_scope: object, _receive: object, _send: object) -> None:
            async def fail(error: Exception) -> None:
                raise error

            async with asyncio.TaskGroup() as group:
                for error in errors:
                    group.create_task(fail(error))

        return SessionMiddleware(app, sessions)

    start, _ = await Connection().run(failing(StoreUnavailable("no answer")))
    assert start["status"] == 503
    with pytest.raises(ExceptionGroup):
        await Connection().run(failing(ValueError("x")))
    with pytest.raises(ExceptionGroup):
        await Connection().run(failing(StoreUnavailable("no answer"), ValueError("x")))


@pytest.mark.parametrize(
    ("kind", "extensions", "answer"),
    [
        ("http", {}, ["http.response.start", "http.response.body"]),
        (
            "websocket",
            {"websocket.http.response": {}},
            ["websocket.http.response.start", "websocket.http.response.body"],
        ),
        ("websocket", {}, ["websocket.close"]),
        ("websocket", None, ["websocket.close"]),
    ],
)
async def test_an_unavailable_store_is_answered(
    kind: str, extensions: dict[str, Any] | None, answer: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """An unavailable store is a 503, or closes a WebSocket, and is logged without the token."""
    with contextlib.ExitStack() as server:
        store = SessionStore.from_url(server.enter_context(own_server()), timeout=0.2)
        sessions = Sessions(store)
        token = await signed_in(sessions)
        server.close()

        async def app(scope: Any, _receive: object, _send: object) -> None:
            await scope[KEY].get()

        with caplog.at_level(logging.DEBUG, "rss"):
            connection = Connection(kind, f"session-id={token}", extensions=extensions)
            sent = await connection.run(SessionMiddleware(app, sessions))
        await store.aclose()
    assert [message["type"] for message in sent] == answer
    assert sent[0].get("status", sent[0].get("code")) in (503, 1013)
    (record,) = caplog.records
    assert record.getMessage().startswith("503: no answer from Redis")
    assert record.levelname == "ERROR"
    assert token not in caplog.text


async def test_an_answer_of_the_application_stands() -> None:
    """A response of an application that handled StoreUnavailable is not replaced by a 503."""
    with contextlib.ExitStack() as server:
        store = SessionStore.from_url(server.enter_context(own_server()), timeout=0.2)
        token = await signed_in(Sessions(store))
        server.close()

        async def app(scope: Any, _receive: object, send: Any) -> None:
            with pytest.raises(StoreUnavailable):
                await scope[KEY].get()
            await send({"type": "http.response.start", "status": 404})

        (start,) = await Connection("http", f"session-id={token}").run(SessionMiddleware(app, Sessions(store)))
        await store.aclose()
    assert start["status"] == 404


async def test_an_error_in_a_stream_stays_one(sessions: Sessions) -> None:
    """An error after the headers of a stream is raised, since a 503 cannot follow the headers."""

    async def app(_scope: object, _receive: object, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        raise StoreUnavailable("no answer")

    connection = Connection()
    with pytest.raises(StoreUnavailable):
        await connection.run(SessionMiddleware(app, sessions))
    assert [message["status"] for message in connection.sent] == [200]


@pytest.mark.parametrize("late", [True, False])
async def test_a_stream_that_reads_late_does_not_vary(sessions: Sessions, *, late: bool) -> None:
    """A stream that first reads the session after its headers lacks `Vary: Cookie`."""
    token = await signed_in(sessions)

    async def app(scope: Any, _receive: object, send: Any) -> None:
        if not late:
            await scope[KEY].get()
        await send({"type": "http.response.start", "status": 200})
        assert (await scope[KEY].get())["user_id"] == 1

    (start,) = await Connection(cookies=f"session-id={token}").run(SessionMiddleware(app, sessions))
    assert start["headers"] == ([] if late else [(b"vary", b"Cookie")])


async def test_a_middleware_between_nested_ones(sessions: Sessions) -> None:
    """A middleware between two of the same sessions has the session of the handler; one cookie is set, the login's."""
    seen: list[Session] = []

    async def login(scope: Any, _receive: object, send: Any) -> None:
        seen.append(await get_session(Request(scope)))
        await seen[-1].rotate({"user_id": 7})
        await send({"type": "http.response.start", "status": 200})

    inner = SessionMiddleware(login, sessions)

    async def between(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await get_session(Request(scope)))
        await seen[-1].set({"n": 1})
        await inner(scope, receive, send)

    for cookies in ("", f"session-id={await signed_in(sessions)}"):
        (start,) = await Connection(cookies=cookies).run(SessionMiddleware(between, sessions))
        token = token_in([value.decode() for name, value in start["headers"] if name == b"set-cookie"])
        one, other = seen
        assert one is other
        seen.clear()
        held = await request(sessions, token).get()
        assert (held["user_id"], held["n"]) == (7, 1)


async def test_it_lives_beside_starlettes_own(sessions: Sessions) -> None:
    """The middleware works beside Starlette's own, whose `request.session` stays."""

    async def home(request: Request) -> JSONResponse:
        request.session["theirs"] = 1
        await (await get_session(request)).set({"ours": 1})
        return JSONResponse({**request.session, **await (await get_session(request)).get(["ours"])})

    theirs = Middleware(StarlettesMiddleware, secret_key="x" * 16)
    for middleware in (
        [theirs, Middleware(SessionMiddleware, sessions=sessions)],
        [Middleware(SessionMiddleware, sessions=sessions), theirs],
    ):
        app = Starlette(routes=[Route("/", home)], middleware=middleware)
        async with serve_uvicorn(app) as url, browser(url) as visitor:
            async with visitor.get("/") as response:
                assert len(response.headers.getall("Set-Cookie")) == 2
                seen = await response.json()
            assert (seen["theirs"], seen["ours"]) == (1, 1)
            assert cookie_of(visitor)
            assert cookie_of(visitor, "session")


async def test_the_lifespan_opens_and_closes_the_store(sessions: Sessions) -> None:
    """The lifespan opens and closes the store, also twice."""
    for _ in range(2):
        async with lifespan(sessions)(None):
            await signed_in(sessions)
        with pytest.raises(RuntimeError, match="the store is closed"):
            await sessions.store.get("a")


async def test_an_application_without_redis_does_not_start() -> None:
    """An application does not start without Redis; the error names the address, but no password."""
    for url, address in (
        ("unix://user:pass@/nowhere/redis.sock", "/nowhere/redis.sock"),
        ("redis://user:pass@127.0.0.1:9/3", "127.0.0.1:9"),
    ):
        store = SessionStore.from_url(url, timeout=60)
        with pytest.raises(StoreUnavailable, match=f"cannot connect to Redis at {address}: is it running") as raised:
            async with lifespan(Sessions(store))(None):
                pass
        assert "pass" not in str(raised.value)
