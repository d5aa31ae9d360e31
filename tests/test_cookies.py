"""The session cookie: read strictly, written safely."""

import asyncio
import secrets
import sys
from datetime import timedelta
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from redis.asyncio import Redis

from rss import CookiePolicy, Sessions, SessionStore
from rss.testing import RedisServer

POLICY = CookiePolicy(name="sid")


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("", []),
        ("sid=a", ["a"]),
        ("x=y; sid=a", ["a"]),
        ("x=y;sid=a;", ["a"]),
        ("\t sid = a \t", ["a"]),
        ("sid=a; sid=a", ["a"]),
        ("sid=a; sid=b; sid=a", ["a", "b"]),  # A sibling domain may have set one of the two.
        ("sid=a; sid=", ["a", ""]),
        ("sid=", [""]),
        ("sid", []),
        ("SID=a; xsid=b; sidx=c", []),
        ("bad[=1; aé=1; =; ;; sid=a", ["a"]),  # Malformed pairs of others are ignored.
        ('sid="a"', ['"a"']),
        ('x="; sid=a; "', ["a"]),
        ("sid=a=b", ["a=b"]),
        ("\xa0sid=a", []),
        ("sid=a\\073", ["a\\073"]),
    ],
)
def test_reading(header: str, values: list[str]) -> None:
    """`read` matches the exact name, unquotes nothing, and returns equal values once."""
    assert POLICY.read(header) == values


@given(st.text(), st.text())
def test_reading_never_fails(before: str, after: str) -> None:
    """`read` finds our pair in any surrounding text, and never raises."""
    assert "a" in POLICY.read(f"{before};sid=a;{after}")
    POLICY.read(before)


COOKIES = st.one_of(
    st.binary(max_size=200).map(lambda data: data.decode("latin-1")),
    st.binary(max_size=200).map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.text(st.sampled_from('sesion-d=; ,"\\{}:\0\r\n\x7fAa0._'), max_size=300),
    st.lists(st.sampled_from(["session-id=", "session-id", "=", ";", "x" * 32, "\\" * 9, '"', " "]), max_size=20).map(
        "".join
    ),
)
TOKENS = st.from_regex(r"[A-Za-z0-9_-]{22,64}", fullmatch=True)


@given(cookies=st.one_of(COOKIES, TOKENS.map("session-id={}".format)))
def test_what_a_client_sends_is_a_token_or_nothing(store_without_server: SessionStore, cookies: str) -> None:
    """`read_tokens` returns only texts with the form of a token, and never raises."""
    for sessions in (Sessions(store_without_server), Sessions(store_without_server, secret_keys=["k" * 16])):
        session = sessions.create_session(cookies)
        assert session.id is None
        for token in sessions.read_tokens(cookies):
            assert cookies.count(f"session-id={token}") + cookies.count(token) > 0
            assert 22 <= len(token) <= 342
            assert token.isascii()


def test_nothing_that_a_client_sends_is_adopted(redis_server: RedisServer) -> None:
    """A cookie from the client is never adopted: it reads as no session, and a write makes a new id."""
    with asyncio.Runner() as loop:
        store = SessionStore.from_url(redis_server.url, prefix=f"test-{secrets.token_hex(8)}", max_age="1m")
        sessions = Sessions(store)

        async def visit(cookies: str) -> None:
            session = sessions.create_session(cookies)
            assert await session.get() == {}
            await session.set({"n": 1})
            (cookie,) = session.take_cookies()
            assert cookie.split(";")[0].removeprefix("session-id=") not in cookies
            assert session.is_new
            assert str(session.id) not in cookies

        @given(cookies=st.one_of(COOKIES, TOKENS.map("session-id={}".format)))
        def fuzz(cookies: str) -> None:
            loop.run(visit(cookies))

        fuzz()
        loop.run(store.aclose())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "session-id=v; Path=/; Max-Age=2; HttpOnly; Secure; SameSite=Lax"),
        (
            {"name": "s", "path": "/a", "domain": "example.com", "same_site": "strict"},
            "s=v; Path=/a; Domain=example.com; Max-Age=2; HttpOnly; Secure; SameSite=Strict",
        ),
        ({"secure": False, "http_only": False}, "session-id=v; Path=/; Max-Age=2; SameSite=Lax"),
        ({"same_site": "none", "persistent": False}, "session-id=v; Path=/; HttpOnly; Secure; SameSite=None"),
        (
            {"partitioned": True, "same_site": "none"},
            "session-id=v; Path=/; Max-Age=2; HttpOnly; Secure; SameSite=None; Partitioned",
        ),
        ({"name": "__Host-id"}, "__Host-id=v; Path=/; Max-Age=2; HttpOnly; Secure; SameSite=Lax"),
    ],
)
def test_writing(options: dict[str, Any], line: str) -> None:
    """Max-Age is rounded up, so no cookie expires before its session; `clear` uses the same attributes."""
    policy = CookiePolicy(**options)
    assert policy.write("v", timedelta(milliseconds=1001)) == line
    gone = {"Max-Age=0", "Expires=Thu, 01 Jan 1970 00:00:00 GMT"}
    attributes = set(line.split("; ")[1:]) - {"Max-Age=2"}
    first, *others = policy.clear().split("; ")
    assert first == f"{policy.name}="
    assert set(others) == attributes | gone


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"name": ""}, "the name"),
        ({"name": "a b"}, "the name"),
        ({"name": "a=b"}, "the name"),
        ({"name": "a;b"}, "the name"),
        ({"name": "a\r\nX: y"}, "the name"),
        ({"name": "ä"}, "the name"),
        ({"name": "a" * 257}, "the name"),
        ({"path": "a"}, "the path"),
        ({"path": "/" + "a" * 1024}, "the path"),
        ({"path": "/a;Domain=b"}, "the path"),
        ({"path": "/\r\nX: y"}, "the path"),
        ({"path": "/a\n"}, "the path"),
        ({"domain": "a b"}, "the domain"),
        ({"domain": "a\r\nX: y"}, "the domain"),
        ({"domain": ""}, "the domain"),
        ({"same_site": "Lax"}, "same_site"),
        ({"same_site": "none", "secure": False}, "same_site 'none'"),
        ({"partitioned": True, "secure": False}, "partitioned"),
        ({"name": "__Secure-a", "secure": False}, "__Secure-"),
        ({"name": "__Host-a", "secure": False}, "__Host-"),
        ({"name": "__Host-a", "path": "/a"}, "__Host-"),
        ({"name": "__host-a", "domain": "example.com"}, "__Host-"),
    ],
)
def test_a_bad_policy_is_refused(options: dict[str, Any], why: str) -> None:
    """A policy that browsers would refuse, or that could inject a header or an attribute, raises ValueError."""
    with pytest.raises(ValueError, match=why):
        CookiePolicy(**options)


def test_signing_needs_itsdangerous(store_without_server: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secret keys without itsdangerous raise an error that says how to install it; without keys it is not needed."""
    monkeypatch.setitem(sys.modules, "itsdangerous", None)
    Sessions(store_without_server)
    with pytest.raises(RuntimeError, match=r"pip install redis-session-sets\[signed\]"):
        Sessions(store_without_server, secret_keys=["k" * 16])


@pytest.fixture(name="store_without_server", scope="module")
def _store_without_server() -> SessionStore:
    """A store that is never called."""
    return SessionStore(Redis(unix_socket_path="/nowhere/redis.sock"))
