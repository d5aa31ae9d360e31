"""`request.session`: packages that expect it work unchanged."""

import logging
from typing import Annotated, Any

import aiohttp
import fastapi
import pytest
import sqladmin
import sqladmin.authentication
import sqlalchemy
import starlette_admin
import starlette_admin.auth
from aiohttp import web
from authlib.integrations.starlette_client import OAuth
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

import rss.aiohttp
import rss.quart
from rss import Reference, Session, Sessions, SessionStore
from rss.asgi import SessionMiddleware, get_session, lifespan
from rss.dict_session import DictSession
from rss.fastapi import SessionDep
from tests.integrations.serving import browser, cookie_of, serve_aiohttp, serve_uvicorn
from tests.keyspace import Keyspace
from tests.test_session import id_of


@pytest.fixture(name="sessions")
def _sessions(client: Redis, keyspace: Keyspace) -> Sessions:
    """The sessions of an application whose store has an identity."""
    return Sessions(SessionStore(client, references={"user_id": Reference(identity=True)}, prefix=keyspace.prefix))


def wrapped(sessions: Sessions) -> Middleware:
    """Return the middleware that serves `request.session`."""
    return Middleware(SessionMiddleware, sessions=sessions, dict_session=True)


async def visit(visitor: aiohttp.ClientSession, path: str, status: int = 200, **more: Any) -> Any:
    """Make a request, as POST if it has data, and return the body of the response."""
    method = "POST" if "data" in more else "GET"
    async with visitor.request(method, path, **more) as response:
        assert response.status == status, await response.text()
        return await response.json() if response.content_type == "application/json" else await response.text()


async def test_request_session_is_a_dict(sessions: Sessions, keyspace: Keyspace) -> None:
    """`request.session` is a dict, also for json; nested changes are stored, and responses vary only if it is used."""

    async def write(request: Request) -> Response:
        request.session.update({"cart": {"books": ["a"]}, "n": 1, "_private": 1, "id": "mine"})
        return JSONResponse({"session": request.session})

    async def change(request: Request) -> Response:
        request.session["cart"]["books"].append("b")
        request.session.pop("n")
        request.session.setdefault("theme", "dark")
        return PlainTextResponse("")

    async def look(request: Request) -> Response:
        assert isinstance(request.session, dict)
        assert repr(request.session) == "<DictSession of <Session: alive>>"
        return JSONResponse(request.session)

    async def untouched(_: Request) -> Response:
        return PlainTextResponse("")

    routes = [Route(f"/{view.__name__}", view) for view in (write, change, look, untouched)]
    app = Starlette(routes=routes, middleware=[wrapped(sessions)])
    async with serve_uvicorn(app) as url, browser(url) as visitor:
        seen = await visit(visitor, "/write")
        assert seen == {"session": {"cart": {"books": ["a"]}, "n": 1, "_private": 1, "id": "mine"}}
        key = f"{{{id_of(cookie_of(visitor))}}}"
        await visit(visitor, "/change")
        expected = {"cart": {"books": ["a", "b"]}, "theme": "dark", "_private": 1, "id": "mine"}
        assert await visit(visitor, "/look") == expected
        async with visitor.get("/look") as response:
            assert response.headers["Vary"] == "Cookie"
        async with visitor.get("/untouched") as response:
            assert "Vary" not in response.headers
    held = (await keyspace.dump())[key]
    assert isinstance(held, dict)
    assert set(held) == {"id", ".id", "._private", "cart", "theme"}


async def test_endpoints_that_are_not_async(sessions: Sessions, keyspace: Keyspace) -> None:
    """Endpoints that are not async, which FastAPI runs in threads, can change `request.session`."""
    app = fastapi.FastAPI()
    app.add_middleware(SessionMiddleware, sessions=sessions, dict_session=True)

    @app.get("/login")
    def login(request: fastapi.Request) -> int:
        request.session["user_id"] = 7
        return 1

    @app.get("/count")
    def count(request: fastapi.Request) -> int:
        request.session["n"] = request.session.get("n", 0) + 1
        return int(request.session["n"])

    async with serve_uvicorn(app) as url, browser(url) as visitor:
        for n in (1, 2):
            assert await visit(visitor, "/count") == n
        planted = cookie_of(visitor)
        await visit(visitor, "/login")
        assert await visit(visitor, "/count") == 3
        session_id = id_of(cookie_of(visitor))
    assert cookie_of(visitor) != planted
    assert (await keyspace.dump())["user_id:{7}"] == {session_id}


async def test_a_session_may_be_injected_by_either_name(sessions: Sessions) -> None:
    """`SessionDep` and `Depends(get_session)` inject the same session."""
    app = fastapi.FastAPI()
    app.add_middleware(SessionMiddleware, sessions=sessions)

    @app.get("/")
    async def home(one: SessionDep, other: Annotated[Session[Any], fastapi.Depends(get_session)]) -> bool:
        return one is other

    async with serve_uvicorn(app) as url, browser(url) as visitor:
        assert await visit(visitor, "/") is True


async def test_nested_middlewares_are_one(sessions: Sessions) -> None:
    """Nested middlewares of the same sessions set one cookie, that of the login."""

    async def login(request: Request) -> Response:
        session = await get_session(request)
        await session.rotate({"user_id": 7})
        return JSONResponse((await session.get())["id"])

    inner = Starlette(routes=[Route("/", login)], middleware=[Middleware(SessionMiddleware, sessions=sessions)] * 2)
    served = serve_uvicorn(SessionMiddleware(inner, sessions))
    async with served as url, browser(url) as visitor, visitor.get("/") as response:
        assert len(response.headers.getall("Set-Cookie")) == 1
        assert await response.json() == id_of(cookie_of(visitor))


async def test_a_part_of_an_application_may_ask_for_the_dict(sessions: Sessions, keyspace: Keyspace) -> None:
    """A middleware around a part adds `request.session` to the session of the outer middleware."""

    async def login(request: Request) -> Response:
        request.session["user_id"] = 7
        return PlainTextResponse("")

    app = Starlette(routes=[Route("/", login)], middleware=[wrapped(sessions)] * 2)
    served = serve_uvicorn(SessionMiddleware(app, sessions))
    async with served as url, browser(url) as visitor, visitor.get("/") as response:
        assert response.status == 200
        assert len(response.headers.getall("Set-Cookie")) == 1
        assert (await keyspace.dump())["user_id:{7}"] == {id_of(cookie_of(visitor))}


@pytest.mark.parametrize("outside", [True, False])
async def test_errors_of_the_dict_are_answered(
    sessions: Sessions, keyspace: Keyspace, caplog: pytest.LogCaptureFixture, *, outside: bool
) -> None:
    """An error while the dict is saved becomes a response: 403 for a block, 401 for an ended session."""
    caplog.set_level(logging.INFO)

    async def login(request: Request) -> Response:
        request.session["user_id"] = 7
        return PlainTextResponse("welcome")

    async def late(request: Request) -> Response:
        await sessions.store.delete_by("user_id", 8)
        request.session["n"] = 1
        return PlainTextResponse("done")

    routes = [Route("/login", login), Route("/late", late)]
    app: Any = Starlette(routes=routes, middleware=[] if outside else [wrapped(sessions)])
    app = SessionMiddleware(app, sessions, dict_session=True) if outside else app
    await sessions.store.block("user_id", 7, "1m")
    async with serve_uvicorn(app) as url, browser(url) as visitor:
        assert await visit(visitor, "/login", 403) == "Forbidden"
        assert not cookie_of(visitor)
        session = sessions.create_session()
        await session.set({"user_id": 8})
        token = session.take_cookies()[0].partition("=")[2].partition(";")[0]
        visitor.cookie_jar.update_cookies({"session-id": token}, visitor._base_url or "")  # type: ignore[arg-type]
        assert await visit(visitor, "/late", 401) == "Unauthorized"
    assert "403: this value of 'user_id' is blocked" in caplog.text
    assert {record.levelname for record in caplog.records if record.name == "rss"} == {"INFO"}
    assert "Traceback" not in caplog.text
    assert "user_id:{8}" not in await keyspace.dump()


def test_starlettes_test_client_without_a_lifespan(redis_url: str, keyspace: Keyspace) -> None:
    """The store works with Starlette's test client, which makes an event loop for each request."""

    async def count(request: Request) -> Response:
        session = await get_session(request)
        n = (await session.get()).get("n", 0) + 1
        await session.set({"n": n})
        return JSONResponse(n)

    sessions = Sessions(SessionStore.from_url(redis_url, prefix=keyspace.prefix))
    middleware = [Middleware(SessionMiddleware, sessions=sessions)]
    app = Starlette(routes=[Route("/", count)], middleware=middleware, lifespan=lifespan(sessions))
    client = TestClient(app, base_url="https://testserver")
    assert [client.get("/").json() for _ in range(3)] == [1, 2, 3]
    with TestClient(app, base_url="https://testserver", cookies=client.cookies) as opened:
        assert [opened.get("/").json() for _ in range(2)] == [4, 5]


async def test_what_is_no_sessions_is_refused_by_each_adapter(sessions: Sessions) -> None:
    """Each adapter refuses a store in place of sessions, with an error that shows the right call."""
    store: Any = sessions.store
    with pytest.raises(TypeError, match=r"SessionMiddleware\(app, Sessions\(store\)\)"):
        SessionMiddleware(Starlette(), store)
    with pytest.raises(TypeError, match=r"lifespan\(Sessions\(store\)\)"):
        lifespan(store)
    with pytest.raises(TypeError, match=r"setup\(app, Sessions\(store\)\)"):
        rss.aiohttp.setup(web.Application(), store)
    with pytest.raises(TypeError, match=r"QuartSessions\(app, Sessions\(store\)\)"):
        rss.quart.QuartSessions(None, store)
    only: Any = sessions
    with pytest.raises(TypeError, match=r"app must be a Quart, not Sessions: QuartSessions\(app, Sessions\(store\)\)"):
        rss.quart.QuartSessions(only)


async def test_a_cleared_session_leaves_what_the_handle_did(sessions: Sessions) -> None:
    """Clearing the dict does not end a session that the application rotates in the same request."""
    session = sessions.create_session()
    await session.set({"theme": "dark"})
    items = DictSession(session, await session.peek())
    items.clear()
    await session.rotate({"user_id": 8})
    await items.save()
    assert await session.get() == {"id": session.id, "user_id": 8}


# ---------------------------------------------------------------- other packages


def _provider(codes: dict[str, str]) -> web.Application:
    """Return an OAuth 2 provider that accepts every user."""

    async def authorize(request: web.Request) -> web.Response:
        codes["code"] = request.query["state"]
        raise web.HTTPFound(f"{request.query['redirect_uri']}?code=code&state={request.query['state']}")

    async def token(request: web.Request) -> web.Response:
        assert (await request.post())["code"] == "code"
        return web.json_response({"access_token": "a", "token_type": "Bearer"})

    async def user(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer a"
        return web.json_response({"id": 7})

    app = web.Application()
    app.add_routes([web.get("/authorize", authorize), web.post("/token", token), web.get("/user", user)])
    return app


async def test_authlibs_client(sessions: Sessions, keyspace: Keyspace) -> None:
    """Authlib keeps its state in the session, and the login at the end gives the session a new id."""
    codes: dict[str, str] = {}
    async with serve_aiohttp(_provider(codes)) as provider:
        oauth = OAuth()
        oauth.register(
            "own",
            client_id="id",
            client_secret="secret",
            authorize_url=f"{provider}/authorize",
            access_token_url=f"{provider}/token",
            api_base_url=provider,
        )

        async def login(request: Request) -> Response:
            response: Response = await oauth.own.authorize_redirect(request, str(request.url_for("callback")))
            return response

        async def callback(request: Request) -> Response:
            token = await oauth.own.authorize_access_token(request)
            user = (await oauth.own.get("user", token=token)).json()
            request.session["user_id"] = user["id"]
            return RedirectResponse("/")

        async def home(request: Request) -> Response:
            return JSONResponse(request.session)

        routes = [Route("/login", login), Route("/callback", callback, name="callback"), Route("/", home)]
        app = Starlette(routes=routes, middleware=[wrapped(sessions)])
        async with serve_uvicorn(app) as url, browser(url) as visitor:
            async with visitor.get("/login", allow_redirects=False) as response:
                there = response.headers["Location"]
            before = cookie_of(visitor)
            assert before
            async with aiohttp.ClientSession() as browsing, browsing.get(there, allow_redirects=False) as response:
                back = response.headers["Location"]
            assert await visit(visitor, back.removeprefix(url)) == {"user_id": 7}
            session_id = id_of(cookie_of(visitor))
    assert session_id != id_of(before)
    dump = await keyspace.dump()
    assert dump["user_id:{7}"] == {session_id}
    assert dump[f"{{{id_of(before)}}}"] == {"_ended": "rotated"}


class _Backend(sqladmin.authentication.AuthenticationBackend):
    """The backend of sqladmin's documentation, on the sessions of the application."""

    def __init__(self, sessions: Sessions) -> None:
        self.middlewares = [wrapped(sessions)]

    async def login(self, request: Request) -> bool:
        form = await request.form()
        request.session.update({"user_id": str(form["username"])})
        return form["password"] == "right"

    async def logout(self, request: Request) -> bool:
        request.session.clear()
        return True

    async def authenticate(self, request: Request) -> bool:
        return "user_id" in request.session


async def test_sqladmins_login(sessions: Sessions, keyspace: Keyspace) -> None:
    """The login and logout of sqladmin work, and `delete_by` ends the session of an administrator."""
    app = Starlette()
    engine = sqlalchemy.create_engine("sqlite://")
    sqladmin.Admin(app, engine, authentication_backend=_Backend(sessions))
    async with serve_uvicorn(app) as url, browser(url) as visitor:
        async with visitor.get("/admin/", allow_redirects=False) as response:
            assert response.headers["Location"].endswith("/admin/login")
        await visit(visitor, "/admin/login", data={"username": "root", "password": "right"})
        assert "Admin" in await visit(visitor, "/admin/")
        assert (await keyspace.dump())["user_id:{root}"] == {id_of(cookie_of(visitor))}
        assert await sessions.store.delete_by("user_id", "root") == 1
        async with visitor.get("/admin/", allow_redirects=False) as response:
            assert response.headers["Location"].endswith("/admin/login")
        await visit(visitor, "/admin/login", data={"username": "root", "password": "right"})
        await visit(visitor, "/admin/logout")
        assert not cookie_of(visitor)
    engine.dispose()
    assert "user_id:{root}" not in await keyspace.dump()


class _Provider(starlette_admin.auth.AuthProvider):
    """The provider of starlette-admin's documentation."""

    async def login(self, username: str, password: str, remember_me: bool, request: Request) -> None:
        del remember_me
        assert password == "right"
        request.session["user_id"] = username

    async def logout(self, request: Request) -> None:
        request.session.clear()

    async def authenticate(self, request: Request) -> starlette_admin.auth.AdminUser | None:
        user = request.session.get("user_id")
        return starlette_admin.auth.AdminUser(username=user) if user else None


async def test_starlette_admins_login(sessions: Sessions, keyspace: Keyspace, caplog: pytest.LogCaptureFixture) -> None:
    """The login and logout of starlette-admin work."""
    caplog.set_level(logging.ERROR)
    app = Starlette(middleware=[wrapped(sessions)])
    starlette_admin.BaseAdmin(auth_provider=_Provider(), secret_key="s" * 32).mount_to(app)
    async with serve_uvicorn(app) as url, browser(url) as visitor:
        async with visitor.get("/admin/", allow_redirects=False) as response:
            assert "/admin/login" in response.headers["Location"]
        fields = dict(_hidden(await visit(visitor, "/admin/login")))
        await visit(visitor, "/admin/login", data={"username": "root", "password": "right", **fields})
        assert "root" in await visit(visitor, "/admin/")
        assert (await keyspace.dump())["user_id:{root}"] == {id_of(cookie_of(visitor))}
        fields = dict(_hidden(await visit(visitor, "/admin/")))
        await visit(visitor, "/admin/logout", data=fields)
        assert not cookie_of(visitor)
    assert "user_id:{root}" not in await keyspace.dump()


def _hidden(page: str) -> list[tuple[str, str]]:
    """Return the names and values of the hidden fields of the forms of a page."""
    return [
        (tag.split('name="')[1].split('"')[0], tag.split('value="')[1].split('"')[0])
        for tag in page.split("<input")[1:]
        if 'type="hidden"' in tag.split(">")[0] and 'value="' in tag.split(">")[0]
    ]
