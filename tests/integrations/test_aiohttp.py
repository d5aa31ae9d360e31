"""Tests of aiohttp alone, and of applications on aiohttp-session."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import aiohttp
import aiohttp_session
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

import rss.aiohttp
import rss.aiohttp_session
from rss import CookiePolicy, Session, Sessions, SessionStore
from tests.integrations.serving import browser, cookie_of, serve_aiohttp
from tests.keyspace import Keyspace
from tests.servers import own_server
from tests.test_session import id_of, signed_in, token_in

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(sessions: Sessions, handler: Handler) -> web.Application:
    """Return an application with one page."""
    app = web.Application()
    rss.aiohttp.setup(app, sessions)
    app.router.add_get("/", handler)
    return app


async def test_without_setup_there_is_no_session() -> None:
    """Without setup, the error names `rss.aiohttp.setup()`."""
    with pytest.raises(RuntimeError, match=r"rss.aiohttp.setup\(\) was not called"):
        await rss.aiohttp.get_session(make_mocked_request("GET", "/"))


async def test_the_store_is_closed_with_the_application(sessions: Sessions) -> None:
    """The store is open while the application is served, and closed afterwards."""

    async def handler(request: web.Request) -> web.Response:
        await (await rss.aiohttp.get_session(request)).set({"n": 1})
        return web.Response()

    app = application(sessions, handler)
    async with serve_aiohttp(app) as url, browser(url) as visitor, visitor.get("/") as response:
        assert response.status == 200
    with pytest.raises(RuntimeError, match="the store is closed"):
        await sessions.store.get("a")


async def test_a_malformed_request_is_answered(sessions: Sessions) -> None:
    """A malformed request is answered without a session."""

    async def handler(_: web.Request) -> web.Response:
        raise AssertionError

    async with serve_aiohttp(application(sessions, handler)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET / HTTP/1.1\r\nno header\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.0 400")
        writer.close()


async def test_other_middlewares_have_the_session(sessions: Sessions) -> None:
    """Earlier middlewares have the session, too; a request that never reaches them is answered without one."""

    @web.middleware
    async def greet(request: web.Request, handler: Handler) -> web.StreamResponse:
        await (await rss.aiohttp.get_session(request)).set({"n": 1})
        return await handler(request)

    async def handler(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application(middlewares=[greet])
    rss.aiohttp.setup(app, sessions)
    app.router.add_get("/", handler)
    async with serve_aiohttp(app) as url, browser(url) as visitor:
        async with visitor.get("/") as response:
            assert "Set-Cookie" in response.headers
        async with visitor.get("/", headers={"Expect": "nonsense"}) as response:
            assert response.status == 417
            assert "Set-Cookie" not in response.headers


async def test_the_cookie_may_be_in_any_header(sessions: Sessions) -> None:
    """The cookie is found in any of several Cookie headers, since proxies may split them."""
    token = await signed_in(sessions)

    async def handler(request: web.Request) -> web.Response:
        return web.json_response(await (await rss.aiohttp.get_session(request)).get())

    async with serve_aiohttp(application(sessions, handler)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        lines = ("GET / HTTP/1.1", "Host: x", "Connection: close", "Cookie: a=b", f"Cookie: session-id={token}", "", "")
        writer.write("\r\n".join(lines).encode())
        assert b'"user_id": 1' in await reader.read()
        writer.close()


async def test_a_redirect_after_a_post_carries_the_cookie(sessions: Sessions, keyspace: Keyspace) -> None:
    """A redirect that is raised carries the cookie, and keeps the headers of the handler."""

    async def handler(request: web.Request) -> web.Response:
        await (await rss.aiohttp.get_session(request)).rotate({"user_id": 1})
        raise web.HTTPSeeOther("/home", headers={"Cache-Control": "private", "Vary": "Accept"})

    async with serve_aiohttp(application(sessions, handler)) as url, browser(url) as visitor:
        async with visitor.get("/", allow_redirects=False) as response:
            assert response.status == 303
            assert response.headers["Cache-Control"] == "private"
            assert response.headers.getall("Vary") == ["Accept", "Cookie"]
        assert (await keyspace.dump())["user_id:{1}"] == {id_of(cookie_of(visitor))}


async def test_an_error_in_a_stream_stays_one() -> None:
    """An error in a stream breaks the connection, since a 503 cannot follow the headers."""

    async def handler(request: web.Request) -> web.StreamResponse:
        session = await rss.aiohttp.get_session(request)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        server.close()
        await session.get()
        return response

    with contextlib.ExitStack() as server:
        store = SessionStore.from_url(server.enter_context(own_server()), timeout=0.3)
        async with serve_aiohttp(application(Sessions(store), handler)) as url, browser(url) as visitor:
            visitor.cookie_jar.update_cookies({"session-id": "x" * 32})
            async with visitor.get("/") as response:
                assert response.status == 200
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()


async def test_a_part_with_sessions_of_its_own(sessions: Sessions) -> None:
    """A sub-application with its own sessions sets its own cookie, beside that of the whole application."""
    theirs = Sessions(sessions.store, cookie=CookiePolicy(name="theirs"))
    seen: list[bool] = []

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        session = await rss.aiohttp.get_session(request)
        await session.set({"n": 1})
        response = await handler(request)
        seen.append(await rss.aiohttp.get_session(request) is session)
        return response

    async def handler(request: web.Request) -> web.Response:
        await (await rss.aiohttp.get_session(request)).set({"n": 2})
        return web.Response()

    app, part = web.Application(middlewares=[count]), application(theirs, handler)
    rss.aiohttp.setup(app, sessions)
    app.add_subapp("/part", part)
    async with serve_aiohttp(app) as url, browser(url) as visitor:
        async with visitor.get("/part/") as response:
            assert response.status == 200
        assert cookie_of(visitor)
        assert cookie_of(visitor, "theirs")
    assert seen == [True]


async def test_a_part_with_the_same_sessions(sessions: Sessions, keyspace: Keyspace) -> None:
    """A sub-application that is set up with the same sessions has the session of the whole; one cookie is set."""
    seen: list[Session] = []

    @web.middleware
    async def write(request: web.Request, handler: Handler) -> web.StreamResponse:
        seen.append(await rss.aiohttp.get_session(request))
        await seen[-1].set({"n": 1})
        return await handler(request)

    async def login(request: web.Request) -> web.Response:
        seen.append(await rss.aiohttp.get_session(request))
        await seen[-1].rotate({"user_id": 7})
        return web.Response()

    app = web.Application(middlewares=[write])
    rss.aiohttp.setup(app, sessions)
    app.add_subapp("/part", application(sessions, login))
    async with serve_aiohttp(app) as url, browser(url) as visitor:
        for _ in range(2):
            async with visitor.get("/part/") as response:
                session_id = id_of(token_in(response.headers.getall("Set-Cookie")))
            one, other = seen
            assert one is other
            seen.clear()
            assert (await keyspace.dump())["user_id:{7}"] == {session_id}


# ---------------------------------------------------------------- aiohttp-session


def on_aiohttp_session(sessions: Sessions, handler: Handler) -> web.Application:
    """Return an application on aiohttp-session with one page."""
    app = web.Application()
    rss.aiohttp_session.setup(app, sessions)
    app.router.add_get("/", handler)
    return app


async def test_a_session_of_aiohttp_session(sessions: Sessions, keyspace: Keyspace) -> None:
    """A session of aiohttp-session writes changed fields, removes deleted ones, and follows its references."""
    seen: list[aiohttp_session.Session] = []

    async def handler(request: web.Request) -> web.Response:
        session = await aiohttp_session.get_session(request)
        seen.append(session)
        match len(seen):
            case 1:
                session["user_id"] = 1
                session["cart"] = ["book"]
                session["theme"] = "dark"
            case 2:
                session["cart"].append("towel")
                session.changed()
                del session["theme"]
                assert session.identity
                await sessions.store.set(str(session.identity), {"other": 1})  # A parallel request.
        return web.Response()

    async with serve_aiohttp(on_aiohttp_session(sessions, handler)) as url, browser(url) as visitor:
        for _ in range(3):
            async with visitor.get("/") as response:
                assert response.status == 200
        session_id = id_of(cookie_of(visitor))
    assert [session.new for session in seen] == [True, False, False]
    assert dict(seen[2]) == {"user_id": 1, "cart": ["book", "towel"], "other": 1}
    assert seen[2].created == seen[0].created
    assert abs(seen[0].created - time.time()) < 60
    dump = await keyspace.dump()
    assert dump["user_id:{1}"] == {session_id}
    assert set(dump[f"{{{session_id}}}"]) == {"id", "user_id", "cart", "other", "aiohttp_session.created"}


async def test_a_new_session_at_a_login_has_another_id(sessions: Sessions, keyspace: Keyspace) -> None:
    """`new_session` at a login gives an empty session with a new id and keeps `max_age`; the old cookie opens none."""
    created: list[int] = []

    async def handler(request: web.Request) -> web.Response:
        session = await aiohttp_session.get_session(request)
        if not session.new:
            session = await aiohttp_session.new_session(request)
            session.max_age = 3600
        created.append(session.created)
        session["user_id"] = 2 if session.max_age else 1
        return web.Response()

    async with serve_aiohttp(on_aiohttp_session(sessions, handler)) as url, browser(url) as visitor:
        async with visitor.get("/"):
            planted = cookie_of(visitor)
        async with visitor.get("/"):
            token = cookie_of(visitor)
    assert token != planted
    assert await keyspace.ttl(f"{{{id_of(token)}}}") <= 3_600_000
    dump = await keyspace.dump()
    assert dump[f"{{{id_of(planted)}}}"] == {"_ended": "rotated"}
    assert dump["user_id:{2}"] == {id_of(token)}
    assert set(dump) == {f"{{{id_of(planted)}}}", f"{{{id_of(token)}}}", "user_id:{2}"}
    assert dump[f"{{{id_of(token)}}}"]["aiohttp_session.created"] == str(created[1])  # type: ignore[index]


@pytest.mark.parametrize("end", ["invalidate", "clear"])
@pytest.mark.parametrize("anew", [True, False])
async def test_a_session_that_is_invalidated(sessions: Sessions, keyspace: Keyspace, end: str, *, anew: bool) -> None:
    """`invalidate` and `clear` end the session, also beside another write; items that are set then get a new id."""

    async def handler(request: web.Request) -> web.Response:
        session = await aiohttp_session.get_session(request)
        if session.new:
            session["user_id"] = 1
        else:
            getattr(session, end)()
            if anew:
                session["user_id"] = 2
            else:
                await sessions.store.set(str(session.identity), {"other": 1})  # A parallel request.
        return web.Response()

    async with serve_aiohttp(on_aiohttp_session(sessions, handler)) as url, browser(url) as visitor:
        async with visitor.get("/"):
            before = f"{{{id_of(cookie_of(visitor))}}}"
        async with visitor.get("/") as response:
            assert response.status == 200
        token = cookie_of(visitor)
    dump = await keyspace.dump()
    if anew:
        after = f"{{{id_of(token)}}}"
        assert dump.pop(before) == {"_ended": "rotated"}
        assert set(dump[after]) == {"id", "user_id", "aiohttp_session.created"}
        assert set(dump) == {after, "user_id:{2}"}
    else:
        assert not token
        assert dump == {before: {"_ended": "deleted"}}


async def test_a_new_session_for_a_request_without_one(sessions: Sessions, keyspace: Keyspace) -> None:
    """`new_session` without a session makes one, and ends none."""

    async def handler(request: web.Request) -> web.Response:
        (await aiohttp_session.new_session(request))["user_id"] = 1
        return web.Response()

    async with serve_aiohttp(on_aiohttp_session(sessions, handler)) as url, browser(url) as visitor:
        async with visitor.get("/") as response:
            assert response.status == 200
        session_id = id_of(cookie_of(visitor))
    dump = await keyspace.dump()
    assert set(dump) == {f"{{{session_id}}}", "user_id:{1}"}
    assert set(dump[f"{{{session_id}}}"]) == {"id", "user_id", "aiohttp_session.created"}


async def test_a_late_write_by_aiohttp_session_is_refused(sessions: Sessions, keyspace: Keyspace) -> None:
    """A late write by aiohttp-session fails with 401, and the session that was ended stays ended."""

    async def handler(request: web.Request) -> web.Response:
        session = await aiohttp_session.get_session(request)
        if not session.new:
            await sessions.store.delete_by("user_id", 1)
        session["user_id"] = 1
        session["n"] = session.get("n", 0) + 1
        return web.Response()

    async with serve_aiohttp(on_aiohttp_session(sessions, handler)) as url, browser(url) as visitor:
        for status in (200, 401):
            async with visitor.get("/") as response:
                assert response.status == status
        assert await keyspace.dump() == {f"{{{id_of(cookie_of(visitor))}}}": {"_ended": "deleted"}}


async def test_both_kinds_in_one_request(sessions: Sessions, keyspace: Keyspace) -> None:
    """Changes by both interfaces in one request are kept."""

    async def handler(request: web.Request) -> web.Response:
        session = await aiohttp_session.get_session(request)
        session["visits"] = session.get("visits", 0) + 1
        await (await rss.aiohttp.get_session(request)).rotate({"user_id": 7})
        return web.Response()

    async with serve_aiohttp(on_aiohttp_session(sessions, handler)) as url, browser(url) as visitor:
        for visits in ("1", "2"):
            async with visitor.get("/") as response:
                assert response.status == 200
            key = f"{{{id_of(cookie_of(visitor))}}}"
            held = (await keyspace.dump())[key]
            assert isinstance(held, dict)
            assert (held["user_id"], held["visits"]) == ("7", visits)


async def test_any_name_of_an_item(sessions: Sessions, keyspace: Keyspace) -> None:
    """An item may have any name, also a reserved one, and a changed `max_age` alone is kept."""
    seen: list[dict[str, object]] = []

    async def handler(request: web.Request) -> web.Response:
        session = await aiohttp_session.get_session(request)
        seen.append(dict(session))
        if session.new:
            session.update({"_csrf": 1, "id": 2, "created": 3})
        else:
            session.max_age = 60
            session.changed()
        return web.Response()

    async with serve_aiohttp(on_aiohttp_session(sessions, handler)) as url, browser(url) as visitor:
        async with visitor.get("/") as response:
            assert response.status == 200
        async with visitor.get("/") as response:
            assert response.status == 200
        assert seen[1] == {"_csrf": 1, "id": 2, "created": 3}
        assert await keyspace.ttl(f"{{{id_of(cookie_of(visitor))}}}") <= 60_000


async def test_a_login_by_the_handle_after_invalidate_stays(sessions: Sessions, keyspace: Keyspace) -> None:
    """`invalidate` does not end the session that the application rotates in the same request."""

    async def handler(request: web.Request) -> web.Response:
        session = await aiohttp_session.get_session(request)
        if session.new:
            session["theme"] = "dark"
        else:
            session.invalidate()
            await (await rss.aiohttp.get_session(request)).rotate({"user_id": 7})
        return web.Response()

    async with serve_aiohttp(on_aiohttp_session(sessions, handler)) as url, browser(url) as visitor:
        for _ in range(2):
            async with visitor.get("/") as response:
                assert response.status == 200
        session_id = id_of(cookie_of(visitor))
    dump = await keyspace.dump()
    assert dump["user_id:{7}"] == {session_id}
    assert dump[f"{{{session_id}}}"] == {"id": session_id, "user_id": "7"}


@pytest.mark.parametrize("outermost", [True, False])
@pytest.mark.parametrize("raises", [True, False])
async def test_a_middleware_that_clones_the_request(sessions: Sessions, *, outermost: bool, raises: bool) -> None:
    """The response has the cookie: a clone with another scheme or address is usual behind a proxy."""

    @web.middleware
    async def clone(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await handler(request.clone(remote="203.0.113.7"))

    async def sign_in(request: web.Request) -> web.Response:
        await (await rss.aiohttp.get_session(request)).rotate({"user_id": 7})
        if raises:
            raise web.HTTPSeeOther("/")
        return web.Response()

    app = web.Application()
    app.router.add_get("/", sign_in)
    rss.aiohttp.setup(app, sessions)
    app.middlewares.insert(0 if outermost else 1, clone)
    async with serve_aiohttp(app) as url, browser(url) as visitor:
        async with visitor.get(url, allow_redirects=False) as response:
            assert len(response.headers.getall("Set-Cookie")) == 1
            assert response.headers["Vary"] == "Cookie"
        assert await sessions.store.ids_by("user_id", 7) == [id_of(cookie_of(visitor))]
