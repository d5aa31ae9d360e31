"""The contract that holds with every framework, on every server."""

import asyncio
import contextlib
import json
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis

from rss import Sessions, SessionStore
from tests.integrations.serving import browser, cookie_of, serve_aiohttp, serve_hypercorn, tls
from tests.integrations.sites import CSRF, SITES, Site
from tests.keyspace import Keyspace
from tests.servers import own_server
from tests.test_session import id_of

GUIDE = (Path(__file__).parents[2] / "rss" / "guides" / "frameworks.md").read_text()
STREAMED = '{"begun": true, "refused": true}'

with_all_verbs = pytest.mark.parametrize("site", [site for site in SITES if not site.keeps_a_dict], ids=str)


async def visit(
    visitor: aiohttp.ClientSession, site: Site, action: str, status: int = 200, headers: dict[str, str] | None = None
) -> Any:
    """Make a request and return what the handler saw."""
    async with visitor.get(f"{site.root}/{action}", headers=headers) as response:
        assert response.status == status
        return await response.json() if response.content_type == "application/json" else await response.text()


async def test_a_visitor_has_a_session(visitor: aiohttp.ClientSession, site: Site, keyspace: Keyspace) -> None:
    """A visitor has a session from the first write on, which other visitors do not see."""
    assert await visit(visitor, site, "untouched") == {}
    assert await visit(visitor, site, "read") == {}
    assert not cookie_of(visitor)
    assert await keyspace.dump() == {}
    await visit(visitor, site, "write")
    token = cookie_of(visitor)
    assert (await visit(visitor, site, "read"))["visits"] == 1
    assert (await visit(visitor, site, "read-write"))["visits"] == 2
    assert cookie_of(visitor) == token
    async with browser(str(visitor._base_url)) as another:
        assert await visit(another, site, "read") == {}
    (session,) = (await keyspace.dump()).values()
    assert isinstance(session, dict)
    assert session["id"] == id_of(token)
    assert session["visits"] == "2"


async def test_signing_in_gives_another_cookie(visitor: aiohttp.ClientSession, site: Site, keyspace: Keyspace) -> None:
    """A login keeps the data under another cookie, and the old cookie opens no session."""
    await visit(visitor, site, "write")
    planted = cookie_of(visitor)
    await visit(visitor, site, "sign-in")
    token = cookie_of(visitor)
    assert token != planted
    seen = await visit(visitor, site, "read")
    assert (seen["visits"], seen["user_id"]) == (1, 7)
    async with browser(str(visitor._base_url)) as attacker:
        attacker.cookie_jar.update_cookies({"session-id": planted}, attacker._base_url or "")  # type: ignore[arg-type]
        assert await visit(attacker, site, "read") == {}
    assert (await keyspace.dump())["user_id:{7}"] == {id_of(token)}


async def test_signing_out_ends_session_and_cookie(
    visitor: aiohttp.ClientSession, site: Site, keyspace: Keyspace
) -> None:
    """A logout removes the cookie, and a copy of the cookie opens no session."""
    await visit(visitor, site, "write")
    token = cookie_of(visitor)
    await visit(visitor, site, "sign-out")
    assert not cookie_of(visitor)
    assert list((await keyspace.dump())[f"{{{id_of(token)}}}"]) == ["_ended"]
    visitor.cookie_jar.update_cookies({"session-id": token}, visitor._base_url or "")  # type: ignore[arg-type]
    assert await visit(visitor, site, "read") == {}


async def test_a_session_that_is_ended_elsewhere_is_none(
    visitor: aiohttp.ClientSession, site: Site, sessions: Sessions
) -> None:
    """A session that was ended elsewhere reads as none, and the next login makes another one."""
    await visit(visitor, site, "sign-in")
    token = cookie_of(visitor)
    assert await sessions.store.delete_by("user_id", 7, reason="password") == 1
    assert await visit(visitor, site, "read") == {}
    if not site.keeps_a_dict:
        assert await visit(visitor, site, "ended") == {"ended": "password"}
    await visit(visitor, site, "sign-in")
    assert cookie_of(visitor) != token
    assert (await visit(visitor, site, "read"))["user_id"] == 7


async def test_what_a_client_presents_is_not_adopted(
    visitor: aiohttp.ClientSession, site: Site, keyspace: Keyspace
) -> None:
    """A cookie that was made up is not adopted; the first write makes a session with a new id."""
    visitor.cookie_jar.update_cookies({"session-id": "x" * 32}, visitor._base_url or "")  # type: ignore[arg-type]
    await visit(visitor, site, "write")
    token = cookie_of(visitor)
    assert token != "x" * 32
    assert list(await keyspace.dump()) == [f"{{{id_of(token)}}}"]


async def test_two_cookies_are_none(visitor: aiohttp.ClientSession, site: Site) -> None:
    """Two session cookies read as no session, so a sibling domain cannot choose the session."""
    await visit(visitor, site, "write")
    cookies = f"session-id={'x' * 32}; session-id={cookie_of(visitor)}"
    for one in (cookies, "; ".join(reversed(cookies.split("; ")))):
        async with browser(str(visitor._base_url)) as client:
            assert await visit(client, site, "read", headers={"Cookie": one}) == {}


@with_all_verbs
async def test_a_late_write_is_refused(visitor: aiohttp.ClientSession, site: Site, keyspace: Keyspace) -> None:
    """A late write to a session that was ended fails with 401, and nothing is written."""
    await visit(visitor, site, "sign-in")
    token = cookie_of(visitor)
    await visit(visitor, site, "late", 401)
    assert await keyspace.dump() == {f"{{{id_of(token)}}}": {"_ended": "password"}}


@with_all_verbs
async def test_forms_are_protected(visitor: aiohttp.ClientSession, site: Site) -> None:
    """A CSRF token is valid for its own session only, also in another request."""
    token = (await visit(visitor, site, "form"))["token"]
    assert await visit(visitor, site, "check", headers={CSRF: token}) == {"valid": True}
    async with browser(str(visitor._base_url)) as attacker:
        other = (await visit(attacker, site, "form"))["token"]
    assert await visit(visitor, site, "check", headers={CSRF: other}) == {"valid": False}
    assert await visit(visitor, site, "check") == {"valid": False}


@pytest.mark.parametrize("site", [site for site in SITES if site.name != "aiohttp-session"], ids=str)
async def test_a_stream_begins_with_the_cookie(visitor: aiohttp.ClientSession, site: Site) -> None:
    """A stream sends the cookie of earlier writes with its headers, and refuses a new id later."""
    body = await visit(visitor, site, "stream")
    assert body in (STREAMED, json.loads(STREAMED))
    assert (await visit(visitor, site, "read"))["visits"] == 1


@pytest.mark.parametrize("action", ["missing", "file"])
@with_all_verbs
async def test_every_kind_of_response_carries_the_cookie(
    visitor: aiohttp.ClientSession, site: Site, action: str
) -> None:
    """An error response of the framework carries the cookie, and so does a file."""
    await visit(visitor, site, action, 404 if action == "missing" else 200)
    assert cookie_of(visitor)
    await visit(visitor, site, "untouched")  # After this request the file is closed.


@with_all_verbs
async def test_headers_say_what_may_be_stored(visitor: aiohttp.ClientSession, site: Site) -> None:
    """A response that sets the cookie is not stored, one that reads the session varies by Cookie, others do neither."""
    for action, cache_control, vary in (
        ("untouched", None, None),
        ("read", None, "Cookie"),
        ("write", "no-store", "Cookie"),
    ):
        async with visitor.get(f"{site.root}/{action}") as response:
            assert response.headers.get("Cache-Control") == cache_control
            assert response.headers.get("Vary") == vary


async def test_a_response_with_the_cookie_is_not_public(
    served: str, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """A response that sets the cookie is not stored, even if the handler makes it public; one warning says so."""
    for _ in range(2):
        async with browser(served) as visitor, visitor.get(f"{site.root}/public") as response:
            assert cookie_of(visitor)
            assert response.headers.getall("Cache-Control") == ["no-store"]
    assert caplog.text.count("had a Cache-Control without private or no-store") == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "site",
    [site for site in SITES if site.name in ("aiohttp", "Starlette", "Quart") and site.serve is not serve_hypercorn],
    ids=str,
)
async def test_a_secure_cookie_on_http_is_told_once(
    sessions: Sessions, site: Site, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    """A Secure cookie on plain http is warned of once, and one on https not at all."""
    app, context, headers = site.build(sessions), tls(ssl.PROTOCOL_TLS_CLIENT), {"X-Forwarded-Proto": scheme}
    ends_tls = site.serve is serve_aiohttp and scheme == "https"  # uvicorn takes the scheme from the header.
    async with serve_aiohttp(app, tls(ssl.PROTOCOL_TLS_SERVER)) if ends_tls else site.serve(app) as url:
        for _ in range(2):
            async with browser(url) as visitor:
                async with visitor.get(f"{site.root}/write", ssl=context, headers=headers) as response:
                    assert "; Secure;" in response.headers["Set-Cookie"]
                async with visitor.get(f"{site.root}/read", ssl=context, headers=headers) as response:
                    assert response.status == 200
    assert caplog.text.count("CookiePolicy(secure=False)") == (scheme == "http")


async def test_a_websocket_has_the_session(visitor: aiohttp.ClientSession, site: Site) -> None:
    """A WebSocket has the session of the browser, and a session made before the accept comes with its cookie."""
    if not site.keeps_a_dict:
        async with visitor.ws_connect(f"{site.root}/websocket") as socket:
            assert (await socket.receive_json())["visits"] == 1
        token = cookie_of(visitor)
        assert token
    await visit(visitor, site, "sign-in")
    async with visitor.ws_connect(f"{site.root}/websocket") as socket:
        assert (await socket.receive_json())["user_id"] == 7


async def test_an_unavailable_store_is_a_503(site: Site) -> None:
    """An unavailable store is a 503 for clients with a cookie, which they keep; others are served."""
    with contextlib.ExitStack() as server:
        store = SessionStore.from_url(server.enter_context(own_server()), references=["user_id"], timeout=0.4)
        async with site.serve(site.build(Sessions(store))) as url, browser(url) as visitor, browser(url) as another:
            await visit(visitor, site, "write")
            token = cookie_of(visitor)
            server.close()
            assert await visit(another, site, "read") == {}
            await asyncio.gather(*(visit(visitor, site, action, 503) for action in ("read", "write", "sign-out")))
            assert cookie_of(visitor) == token


async def test_a_client_that_is_taken_for_anonymous_cannot_write(site: Site) -> None:
    """With `on_unavailable="anonymous"`, a read without Redis returns nothing, and a later write is a 503."""
    with contextlib.ExitStack() as server:
        store = SessionStore.from_url(server.enter_context(own_server()), timeout=0.4)
        app = site.build(Sessions(store, on_unavailable="anonymous"))
        async with site.serve(app) as url, browser(url) as visitor:
            await visit(visitor, site, "write")
            token = cookie_of(visitor)
            server.close()
            seen, _ = await asyncio.gather(visit(visitor, site, "read"), visit(visitor, site, "read-write", 503))
            assert seen == {}
            assert cookie_of(visitor) == token


# ---------------------------------------------------------------- what it costs

ACTIONS = ["untouched", "read", "write", "read-write", "sign-in", "sign-out"]


async def cost(site: Site, url: str, admin: Redis, action: str) -> tuple[int, int]:
    """Return the round trips to Redis and the Set-Cookie headers of a request with a session."""
    async with browser(url) as visitor:
        await visit(visitor, site, "sign-in")
        before = (await admin.info("commandstats"))["cmdstat_evalsha"]["calls"]
        async with visitor.get(f"{site.root}/{action}") as response:
            assert response.status == 200
            cookies = response.headers.getall("Set-Cookie", [])
        after = (await admin.info("commandstats"))["cmdstat_evalsha"]["calls"]
    return after - before, len(cookies)


@pytest.mark.parametrize("site", [site for site in SITES if not site.root], ids=str)
async def test_a_request_costs_what_the_guide_says(site: Site, watched_url: str) -> None:
    """A request takes the round trips and sets the cookies that the table of the guide says."""
    table = GUIDE.split("| a request that", 1)[1].split("\n\n", 1)[0]
    heads, _, *rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in ("| x" + table).splitlines()]
    told = {name.strip(" `"): row[1:] for row in rows for name in row[0].split(",")}[site.name]
    app = site.build(Sessions(SessionStore.from_url(watched_url, references=["user_id"])))
    async with Redis.from_url(watched_url) as admin, site.serve(app) as served:
        found = [await cost(site, served, admin, action) for action in ACTIONS]
    assert len(heads) - 1 == len(ACTIONS)
    assert [f"{trips} / {cookies}" for trips, cookies in found] == told
