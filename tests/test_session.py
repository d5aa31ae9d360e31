"""The session of a request, without a framework: its reads and writes, and the cookies that it sets."""

import asyncio
import base64
import hashlib
import hmac
import pickle
import re
from collections.abc import Awaitable, Callable
from http.cookies import SimpleCookie
from types import SimpleNamespace
from typing import Any

import pytest
from redis.asyncio import Redis

from rss import (
    CookiePolicy,
    LimitExceeded,
    Reference,
    Session,
    SessionEnded,
    SessionNotFound,
    Sessions,
    SessionStore,
    StoreUnavailable,
    TextCodec,
)
from rss.dict_session import field_of, item_of
from tests.keyspace import Keyspace

HOUR = 3_600_000
DAY = 24 * HOUR
UNKNOWN = "x" * 32

pytestmark = pytest.mark.usefixtures("kept_secret")


@pytest.fixture(name="sessions")
def _sessions(store: SessionStore) -> Sessions:
    """The sessions of an application with the default options."""
    return Sessions(store)


def token_in(cookies: list[str]) -> str:
    """Return the value of the only cookie that is set."""
    (cookie,) = cookies
    return cookie.split(";")[0].partition("=")[2]


def id_of(token: str) -> str:
    """Return the id that belongs to a token: the SHA-256 of the token."""
    return base64.urlsafe_b64encode(hashlib.sha256(token.encode()).digest()).decode().rstrip("=")


def request(sessions: Sessions, token: str) -> Session:
    """Return the session of a request whose cookie holds this token."""
    return sessions.create_session(f"theme=dark; session-id={token}; x=y")


async def signed_in(sessions: Sessions, values: dict[str, Any] | None = None) -> str:
    """Make a session, and return the token in the client's cookie."""
    session = sessions.create_session()
    await session.set(values or {"user_id": 1})
    return token_in(session.take_cookies())


async def scripts_run(client: Redis) -> int:
    """Return how many scripts this server has run."""
    stats = await client.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))


# ---------------------------------------------------------------- reading


async def test_a_request_without_a_cookie_costs_nothing(watched_url: str) -> None:
    """A request without a cookie runs no script and sets no cookie until it writes, so bots make no sessions."""
    async with Redis.from_url(watched_url) as client:
        sessions = Sessions(SessionStore(client))
        before = await scripts_run(client)
        session = sessions.create_session("theme=dark")
        assert await session.get() == {}
        assert await session.get(["user_id"]) == {}
        assert not await session.touch()
        await session.unset(["user_id"])
        assert not await session.verify_csrf_token("x" * 86)
        assert not await session.delete()
        assert session.id is None
        assert session.take_cookies() == []
        assert await scripts_run(client) == before
        assert await client.dbsize() == 0


async def test_a_session_is_read_once(watched_url: str) -> None:
    """A request reads its session from Redis once, and sees its own writes without another read."""
    async with Redis.from_url(watched_url) as client:
        sessions = Sessions(SessionStore(client, references=["user_id"]))
        token = await signed_in(sessions, {"user_id": 1, "cart": ["book"]})
        before = await scripts_run(client)
        session = request(sessions, token)
        first, some = await asyncio.gather(session.get(), session.get(["user_id", "missing"]))
        assert first == {"id": id_of(token), "user_id": 1, "cart": ["book"]}
        assert some == {"id": id_of(token), "user_id": 1}
        assert await scripts_run(client) == before + 1
        await session.set({"user_id": 2, "theme": "dark"})
        await session.unset(["cart"])
        assert await session.get() == {"id": id_of(token), "user_id": 2, "theme": "dark"}
        assert await scripts_run(client) == before + 3
        assert await sessions.store.get(id_of(token)) == await session.get()
        await client.flushdb()


async def test_what_is_read_may_be_changed(sessions: Sessions) -> None:
    """A later change to a value that was read or given to `set` is neither stored nor read."""
    cart = ["book"]
    session = request(sessions, await signed_in(sessions, {"cart": cart}))
    cart.append("towel")
    (await session.get())["cart"].append("tea")
    assert (await session.get())["cart"] == ["book"]
    await session.set({"cart": cart})
    cart.append("milk")
    assert (await session.get())["cart"] == ["book", "towel"]


class _Pickled:
    """A codec that stores every value of Python."""

    def encode(self, field: str, value: Any, /) -> bytes:
        del field
        return pickle.dumps(value)

    def decode(self, field: str, data: bytes, /) -> Any:
        del field
        return pickle.loads(data)


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ({1}, lambda held: held.add(2)),
        (bytearray(b"a"), lambda held: held.extend(b"b")),
        (SimpleNamespace(n=1), lambda held: setattr(held, "n", 2)),
    ],
    ids=["set", "bytearray", "class"],
)
async def test_what_a_codec_decodes_may_be_changed(
    client: Redis, keyspace: Keyspace, value: Any, change: Callable[[Any], object]
) -> None:
    """A later change to a value that was read is not read, whatever type the codec decodes."""
    sessions = Sessions(SessionStore(client, prefix=keyspace.prefix, codec=_Pickled()))
    session = request(sessions, await signed_in(sessions, {"held": value}))
    for read in (session.get, session.peek, session.get):
        held = (await read())["held"]
        assert held == value
        assert type(held) is type(value)
        change(held)


async def test_reading_renews_when_it_is_due(sessions: Sessions, keyspace: Keyspace) -> None:
    """A read renews a session whose last renewal was over a minute ago, and sets no cookie."""
    token = await signed_in(sessions)
    session = request(sessions, token)
    await session.get()
    assert session.take_cookies() == []
    await keyspace.shorten(61_000)
    session = request(sessions, token)
    await session.get()
    assert session.take_cookies() == []
    assert 28 * DAY - 30_000 < await keyspace.ttl(f"{{{id_of(token)}}}") <= 28 * DAY


async def test_reading_does_not_renew_without_rolling(store: SessionStore, keyspace: Keyspace) -> None:
    """A read does not renew the session if `rolling` is None."""
    sessions = Sessions(store, rolling=None)
    token = await signed_in(sessions)
    await keyspace.shorten(DAY)
    session = request(sessions, token)
    await session.get()
    assert session.take_cookies() == []
    assert await keyspace.ttl(f"{{{id_of(token)}}}") <= 27 * DAY


@pytest.mark.parametrize("rolling", [0.001, None])
async def test_peek_does_not_renew(store: SessionStore, keyspace: Keyspace, rolling: float | None) -> None:
    """`peek` does not renew the session. The next `get` does, unless `rolling` is None."""
    sessions = Sessions(store, rolling=rolling)
    token = await signed_in(sessions)
    await keyspace.shorten(60_000)
    session = request(sessions, token)
    for read, renews in ((session.peek, False), (session.peek, False), (session.get, rolling is not None)):
        assert (await read())["user_id"] == 1
        assert (await keyspace.ttl(f"{{{id_of(token)}}}") > 28 * DAY - 60_000) == renews


async def test_a_short_session_is_not_made_longer_by_reading(sessions: Sessions, keyspace: Keyspace) -> None:
    """A read renews a session for its own lifetime, not for the default of the store."""
    session = sessions.create_session()
    await session.set({}, "10m")
    token = token_in(session.take_cookies())
    await keyspace.shorten(120_000)
    session = request(sessions, token)
    await session.get()
    assert 500_000 < await keyspace.ttl(f"{{{id_of(token)}}}") <= 600_000


@pytest.mark.parametrize(
    "cookies",
    [
        f"session-id={UNKNOWN}",
        "session-id=",
        "session-id",
        f"session-id={UNKNOWN}; session-id=y{UNKNOWN}",
        f'session-id="{UNKNOWN}"',
        f"session-id={UNKNOWN[:21]}",
        f"session-id={'x' * 343}",
        "session-id=*:{}\\",
    ],
)
async def test_a_cookie_that_is_not_ours_is_no_session(sessions: Sessions, keyspace: Keyspace, cookies: str) -> None:
    """A cookie without a known session reads as none, and the first write makes a session with a new id."""
    session = sessions.create_session(cookies)
    assert await session.get() == {}
    assert session.id is None
    with pytest.raises(SessionNotFound):
        session.get_key()
    assert session.take_headers(None, None) == [("Vary", "Cookie")]  # Another request may have replaced the cookie.
    for session in (sessions.create_session(cookies), sessions.create_session(cookies)):
        await session.set({"user_id": 1})
        token = token_in(session.take_cookies())
        assert token not in cookies
        assert session.is_new
        assert session.id == id_of(token)
    assert len([key for key in await keyspace.dump() if key.startswith("{")]) == 2


async def test_what_cannot_be_a_token_is_not_looked_up(watched_url: str) -> None:
    """A value that has not the alphabet or the length of a token is not sent to Redis."""
    async with Redis.from_url(watched_url) as client:
        sessions = Sessions(SessionStore(client))
        await signed_in(sessions)
        before = await scripts_run(client)
        for value in ("x" * 21, "x" * 343, f"{UNKNOWN}.", f"{UNKNOWN}\n", f" {UNKNOWN} {UNKNOWN}", f"é{UNKNOWN}", ""):
            assert await request(sessions, value).get() == {}
        assert await scripts_run(client) == before
        assert await request(sessions, UNKNOWN).get() == {}
        assert await scripts_run(client) == before + 1
        await client.flushdb()


async def test_an_id_is_not_a_token(sessions: Sessions) -> None:
    """An id in the cookie opens no session, so a leaked id cannot be used to take over the session."""
    token = await signed_in(sessions)
    assert await request(sessions, token).get()
    assert await request(sessions, id_of(token)).get() == {}


# ---------------------------------------------------------------- writing


async def test_the_first_write_makes_a_session(sessions: Sessions, keyspace: Keyspace) -> None:
    """The cookie holds a token for 400 days; Redis stores the session under the SHA-256 of the token."""
    session = sessions.create_session()
    assert await session.set({"user_id": 1}, "1h") == {"user_id": 1}
    cookies = session.take_cookies()
    token = token_in(cookies)
    assert cookies == [f"session-id={token}; Path=/; Max-Age=34560000; HttpOnly; Secure; SameSite=Lax"]
    assert HOUR - 60_000 < await keyspace.ttl(f"{{{id_of(token)}}}") <= HOUR
    assert re.fullmatch(r"[\w-]{32}", token)
    assert session.is_new
    assert session.id == id_of(token)
    assert session.get_key() == sessions.store.get_session_key(id_of(token))
    assert session.take_cookies() == []
    assert await keyspace.dump() == {
        f"{{{id_of(token)}}}": {"id": id_of(token), "user_id": "1"},
        "user_id:{1}": {id_of(token)},
    }
    assert await session.get() == {"id": session.id, "user_id": 1}


async def test_two_first_writes_make_one_session(sessions: Sessions, keyspace: Keyspace) -> None:
    """Several first writes of one request at the same time make one session."""
    session = sessions.create_session()
    await asyncio.gather(session.set({"a": 1}), session.set({"b": 2}), session.create_csrf_token())
    session_id = id_of(token_in(session.take_cookies()))
    assert await keyspace.dump() == {f"{{{session_id}}}": {"id": session_id, "a": "1", "b": "2"}}


async def test_a_write_without_a_read_is_one_round_trip(watched_url: str) -> None:
    """A write to an existing session takes one round trip and sets no cookie."""
    async with Redis.from_url(watched_url) as client:
        sessions = Sessions(SessionStore(client))
        token = await signed_in(sessions)
        before = await scripts_run(client)
        session = request(sessions, token)
        await session.set({"n": 1})
        assert session.take_cookies() == []
        assert not session.is_new
        assert await scripts_run(client) == before + 1
        assert await session.get() == {"id": id_of(token), "user_id": 1, "n": 1}
        await client.flushdb()


@pytest.mark.parametrize(
    ("lifetime", "age"), [(None, 400 * 86_400), ("2h", 7200), ("1500 ms", 2), ("401 days", 400 * 86_400)]
)
async def test_the_cookie_is_set_when_its_token_changes(
    client: Redis, keyspace: Keyspace, lifetime: str | None, age: int
) -> None:
    """Only a new token sets a cookie, which lasts 400 days, or `max_lifetime` if that is shorter."""
    store = SessionStore(client, references=["user_id"], prefix=keyspace.prefix, max_lifetime=lifetime)
    sessions = Sessions(store, rolling=0.001)
    calls: list[tuple[bool, Callable[[Session], Awaitable[object]]]] = [
        (False, lambda session: session.get()),
        (False, lambda session: session.peek()),
        (False, lambda session: session.set({"n": 1}, "3h")),
        (False, lambda session: session.set({"user_id": 2})),
        (False, lambda session: session.replace({"user_id": 2}, {"n": 2})),
        (False, lambda session: session.unset(["n"])),
        (False, lambda session: session.touch("5h")),
        (False, lambda session: session.create_csrf_token()),
        (True, lambda session: session.rotate({"n": 3})),
    ]
    for changes, call in calls:
        session = request(sessions, await signed_in(sessions))
        await call(session)
        cookies = session.take_cookies()
        assert bool(cookies) == changes
        assert all(f"; Max-Age={age};" in cookie for cookie in cookies)


async def test_unset_and_touch_make_no_session(sessions: Sessions, keyspace: Keyspace) -> None:
    """`unset` and `touch` make no session, neither without a cookie nor with an unknown one."""
    for session in (sessions.create_session(), request(sessions, UNKNOWN)):
        await session.unset(["user_id"])
        assert not await session.touch()
        assert session.take_cookies() == []
        assert session.id is None
    assert await keyspace.dump() == {}


async def test_a_limit_refuses(client: Redis, keyspace: Keyspace) -> None:
    """A write that a limit refuses stores nothing and sets no cookie."""
    reference = Reference(limit=1, on_limit="refuse", identity=keyspace.partitions is not None)
    sessions = Sessions(SessionStore(client, references={"user_id": reference}, prefix=keyspace.prefix))
    await signed_in(sessions)
    before = await keyspace.dump()
    session = sessions.create_session()
    for attempt in (session.set, session.rotate):
        with pytest.raises(LimitExceeded):
            await attempt({"user_id": 1})
    assert session.take_cookies() == []
    assert session.id is None
    assert await keyspace.dump() == before


# ---------------------------------------------------------------- what has ended


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("expires", [True, False])
async def test_a_session_that_was_there_is_not_made_again(
    sessions: Sessions, keyspace: Keyspace, *, read: bool, expires: bool
) -> None:
    """A request that saw its session alive cannot write to that session after its end."""
    token = await signed_in(sessions)
    session = request(sessions, token)
    await (session.get() if read else session.set({"n": 1}))
    if expires:
        await keyspace.expire(f"{{{id_of(token)}}}")
    else:
        await sessions.store.delete_by("user_id", 1, reason="password")
    before = await keyspace.dump()
    if not read:
        assert await session.get() == {}
    writes: list[Callable[[], Awaitable[object]]] = [
        lambda: session.set({"user_id": 1}),
        lambda: session.unset(["n"]),
        session.rotate,
        session.create_csrf_token,
    ]
    for write in writes:
        with pytest.raises(SessionNotFound) as raised:
            await write()
        assert isinstance(raised.value, SessionEnded) != expires
    assert not await session.touch()
    assert await session.get() == {}
    assert await keyspace.dump() == before


async def test_a_session_that_ended_before_is_none(sessions: Sessions, keyspace: Keyspace) -> None:
    """A session that ended before the request reads as none with the reason, and a login makes another one."""
    token = await signed_in(sessions)
    await sessions.store.delete_by("user_id", 1, reason="password")
    session = request(sessions, token)
    assert await session.get() == {}
    assert session.ended == "password"
    for one in (session, request(sessions, token)):
        await one.rotate({"user_id": 1})
        assert token_in(one.take_cookies()) != token
    assert (await keyspace.dump())[f"{{{id_of(token)}}}"] == {"_ended": "password"}
    assert await sessions.store.count_by("user_id", 1) == 2


async def test_delete_ends_the_session_and_the_cookie(sessions: Sessions, keyspace: Keyspace) -> None:
    """`delete` ends the session, and removes the cookie with the attributes that it was set with."""
    token = await signed_in(sessions)
    session = request(sessions, token)
    assert await session.delete(reason="signed-out")
    assert await session.get() == {}
    assert session.id is None
    assert session.take_cookies() == [
        "session-id=; Path=/; Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT; HttpOnly; Secure; SameSite=Lax"
    ]
    assert await keyspace.dump() == {f"{{{id_of(token)}}}": {"_ended": "signed-out"}}
    assert request(sessions, token).ended is None
    for cookie in (token, UNKNOWN, "nonsense"):  # A cookie without a session is removed, too.
        session = request(sessions, cookie)
        assert not await session.delete()
        assert "; Max-Age=0;" in session.take_cookies()[0]


async def test_delete_of_what_this_request_made(sessions: Sessions, keyspace: Keyspace) -> None:
    """`delete` ends a session that was made in the same request, and sets no cookie."""
    session = sessions.create_session()
    await session.set({"user_id": 1})
    assert session.id
    key = f"{{{session.id}}}"
    assert await session.delete()
    assert not session.is_new
    assert session.take_cookies() == []
    assert await keyspace.dump() == {key: {"_ended": "deleted"}}


async def test_after_delete_another_session_may_be_made(sessions: Sessions) -> None:
    """A write after `delete` makes a session with another id."""
    token = await signed_in(sessions)
    session = request(sessions, token)
    await session.delete()
    await session.set({"message": "bye"})
    new = token_in(session.take_cookies())
    assert new != token
    assert await request(sessions, new).get() == {"id": id_of(new), "message": "bye"}


async def test_delete_is_done_also_for_who_is_gone(sessions: Sessions, keyspace: Keyspace) -> None:
    """`delete` ends the session even if the request is cancelled meanwhile."""
    token = await signed_in(sessions)
    request_ = asyncio.ensure_future(request(sessions, token).delete())
    await asyncio.sleep(0)
    request_.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request_
    async with asyncio.timeout(10):
        while "_ended" not in (await keyspace.dump())[f"{{{id_of(token)}}}"]:
            await asyncio.sleep(0)


# ---------------------------------------------------------------- sign-in


async def test_rotate_gives_a_new_token(sessions: Sessions, keyspace: Keyspace) -> None:
    """`rotate` keeps the data under a new token, and the old token opens no session."""
    planted = await signed_in(sessions, {"cart": ["book"]})
    session = request(sessions, planted)
    await session.get()
    await session.rotate({"user_id": 7})
    token = token_in(session.take_cookies())
    assert await session.get() == {"id": id_of(token), "cart": ["book"], "user_id": 7}
    assert session.id == id_of(token)
    assert await request(sessions, planted).get() == {}
    assert await request(sessions, token).get() == await session.get()
    assert await keyspace.dump() == {
        f"{{{id_of(planted)}}}": {"_ended": "rotated"},
        f"{{{id_of(token)}}}": {"id": id_of(token), "cart": '["book"]', "user_id": "7"},
        "user_id:{7}": {id_of(token)},
    }


async def test_a_read_after_a_write_returns_all_fields(sessions: Sessions) -> None:
    """The first read after a write returns all fields, not only those of the write."""
    token = await signed_in(sessions, {"cart": ["book"], "theme": "dark"})
    session = request(sessions, token)
    await session.unset(["theme"])
    assert await session.get() == {"id": id_of(token), "cart": ["book"]}
    session = request(sessions, token)
    await session.rotate({"user_id": 7})
    new = token_in(session.take_cookies())
    assert await session.get() == {"id": id_of(new), "cart": ["book"], "user_id": 7}


@pytest.mark.parametrize("cookies", ["", f"session-id={UNKNOWN}"])
async def test_rotate_makes_a_session_if_there_is_none(sessions: Sessions, cookies: str) -> None:
    """`rotate` makes a session if there is none, so a login need not check first."""
    session = sessions.create_session(cookies)
    await session.rotate({"user_id": 7})
    token = token_in(session.take_cookies())
    assert await request(sessions, token).get() == {"id": id_of(token), "user_id": 7}


# ---------------------------------------------------------------- headers


async def test_after_the_headers_no_id_can_be_told(sessions: Sessions, keyspace: Keyspace) -> None:
    """After the headers, calls that need a new id raise and write nothing; a known session can be written to."""
    for session in (sessions.create_session(), request(sessions, UNKNOWN)):
        assert session.take_cookies() == []
        for write in (session.set, session.rotate):
            with pytest.raises(RuntimeError, match="the response has begun"):
                await write({"user_id": 1})
        with pytest.raises(RuntimeError, match="the response has begun"):
            await session.create_csrf_token()
    assert await keyspace.dump() == {}

    session = request(sessions, await signed_in(sessions))
    session.take_cookies()
    await session.set({"n": 1})
    with pytest.raises(RuntimeError, match="the response has begun"):
        await session.rotate()
    assert (await session.get())["n"] == 1
    assert await session.delete()
    assert session.take_cookies() == []


@pytest.mark.parametrize(
    ("cache_control", "vary", "added"),
    [
        (None, None, [("Cache-Control", "no-store"), ("Vary", "Cookie")]),
        ("public", None, [("Cache-Control", "no-store"), ("Vary", "Cookie")]),
        ("max-age=60, Public", None, [("Cache-Control", "no-store"), ("Vary", "Cookie")]),
        ("max-age=60, must-revalidate", None, [("Cache-Control", "no-store"), ("Vary", "Cookie")]),
        ("no-store", None, [("Vary", "Cookie")]),
        (None, "Accept, cookie", [("Cache-Control", "no-store")]),
        (None, "*", [("Cache-Control", "no-store")]),
        ("private", "Accept-Cookie", [("Vary", "Cookie")]),
    ],
)
async def test_headers_go_with_the_cookie(
    sessions: Sessions, cache_control: str | None, vary: str | None, added: list[tuple[str, str]]
) -> None:
    """A response that sets the cookie varies by Cookie, and is not stored, at least not by a shared cache."""
    session = sessions.create_session()
    await session.set({})
    (name, _), *others = session.take_headers(cache_control, vary)
    assert name == "Set-Cookie"
    assert others == added


async def test_an_untouched_session_adds_no_header(sessions: Sessions) -> None:
    """A request that does not use its session adds no header to its response."""
    assert request(sessions, await signed_in(sessions)).take_headers(None, None) == []


async def test_a_cookie_that_ends_with_the_browser(store: SessionStore) -> None:
    """A cookie with `persistent=False` has no Max-Age, and is set only with a new token."""
    sessions = Sessions(store, cookie=CookiePolicy(persistent=False), rolling=0.001)
    session = sessions.create_session()
    await session.set({})
    cookies = session.take_cookies()
    token = token_in(cookies)
    assert cookies == [f"session-id={token}; Path=/; HttpOnly; Secure; SameSite=Lax"]
    session = request(sessions, token)
    await session.set({"n": 1})
    assert session.take_cookies() == []
    session = request(sessions, token)
    await session.rotate()
    (cookie,) = session.take_cookies()
    assert "Max-Age" not in cookie
    session = request(sessions, token_in([cookie]))
    await session.delete()
    assert "Max-Age=0" in session.take_cookies()[0]


# ---------------------------------------------------------------- signatures


async def test_the_cookie_may_be_signed(store: SessionStore, watched_url: str) -> None:
    """The first key signs, all keys verify, and a token with a bad signature is not sent to Redis."""
    old, new = "an old secret key", "a newer secret key"
    sessions = Sessions(store, secret_keys=[old])
    session = sessions.create_session()
    await session.set({"user_id": 1})
    value = token_in(session.take_cookies())
    token = value.split(".")[0]
    assert await request(sessions, value).get()

    rolled = Sessions(store, secret_keys=[new, old])
    session = request(rolled, value)
    await session.rotate()
    signed_anew = token_in(session.take_cookies())
    assert await request(Sessions(store, secret_keys=[new]), signed_anew).get()
    assert Sessions(store, secret_keys=[new]).read_tokens(f"session-id={value}") == []

    async with Redis.from_url(watched_url) as client:
        sessions = Sessions(SessionStore(client), secret_keys=[new])
        before = await scripts_run(client)
        for forged in (token, f"{token}.", f"{token}.x", f"{'y' * 32}.{value.split('.')[1]}", "\udcff.x", "ü.x", "."):
            assert await request(sessions, forged).get() == {}
        assert await scripts_run(client) == before


def test_bad_keys_are_refused(store: SessionStore) -> None:
    """Secret keys that are a single text, empty, too short or bytes are refused."""
    for keys, error in ((("x" * 15,), ValueError), ((), ValueError), ("x" * 32, TypeError), ((b"x" * 32,), ValueError)):
        with pytest.raises(error, match="secret_keys must be"):
            Sessions(store, secret_keys=keys)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_other_options_are_checked(store: SessionStore) -> None:
    """Bad options of `Sessions` are refused when the object is made."""
    with pytest.raises(ValueError, match="rolling must be"):
        Sessions(store, rolling="often")
    with pytest.raises(ValueError, match="on_unavailable must be"):
        Sessions(store, on_unavailable="ignore")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_without_hashing_the_cookie_holds_the_id(store: SessionStore) -> None:
    """With `hash_ids=False` the cookie holds the id itself, as in the Node original."""
    sessions = Sessions(store, hash_ids=False)
    token = await signed_in(sessions)
    assert await store.get(token) == {"id": token, "user_id": 1}
    assert await request(sessions, token).get() == {"id": token, "user_id": 1}


# ---------------------------------------------------------------- CSRF


async def test_csrf_tokens(watched_url: str) -> None:
    """CSRF tokens differ from each other, are valid for their session only, and need no write."""
    async with Redis.from_url(watched_url) as client:
        sessions = Sessions(SessionStore(client))
        token, other = await signed_in(sessions), await signed_in(sessions)
        before = await scripts_run(client)
        session = request(sessions, token)
        one, two = await session.create_csrf_token(), await session.create_csrf_token()
        assert one != two
        for csrf_token in (one, two):
            assert await request(sessions, token).verify_csrf_token(csrf_token)
            assert not await request(sessions, other).verify_csrf_token(csrf_token)
            assert not await request(sessions, UNKNOWN).verify_csrf_token(csrf_token)
            assert not await sessions.create_session().verify_csrf_token(csrf_token)
        for wrong in (one[:-1], one + "A", one[:-2] + ("AA" if one[-2:] != "AA" else "BB"), "", None, "ü" * 86):
            assert not await session.verify_csrf_token(wrong)
        assert await scripts_run(client) == before + 7  # One read for each request with a cookie.
        assert session.take_cookies() == []
        await client.flushdb()


async def test_a_csrf_token_makes_a_session(sessions: Sessions, keyspace: Keyspace) -> None:
    """A CSRF token makes a session if there is none, since a login form needs a token, too."""
    session = sessions.create_session()
    csrf_token = await session.create_csrf_token()
    token = token_in(session.take_cookies())
    assert await keyspace.dump() == {f"{{{id_of(token)}}}": {"id": id_of(token)}}
    assert await request(sessions, token).verify_csrf_token(csrf_token)


async def test_who_knows_the_id_cannot_make_a_csrf_token(sessions: Sessions) -> None:
    """A CSRF token cannot be made from the id or the key of a session."""
    session = request(sessions, await signed_in(sessions))
    await session.get()
    assert session.id
    for key in (session.id, session.get_key()):
        for secret in (hmac.digest(key.encode(), b"csrf", "sha256"), hashlib.sha256(key.encode()).digest()):
            assert not await session.verify_csrf_token(sessions.tokens.create(secret))


async def test_csrf_tokens_end_with_the_id(sessions: Sessions) -> None:
    """A CSRF token is invalid after `rotate` and after `delete`."""
    token = await signed_in(sessions)
    session = request(sessions, token)
    csrf_token = await session.create_csrf_token()
    await session.rotate()
    assert not await session.verify_csrf_token(csrf_token)
    new = await session.create_csrf_token()
    assert await session.verify_csrf_token(new)
    await session.delete()
    assert not await session.verify_csrf_token(new)


# ---------------------------------------------------------------- when Redis does not answer


@pytest.fixture(name="lost")
async def _lost() -> SessionStore:
    """A store without a server."""
    return SessionStore(Redis(unix_socket_path="/nowhere/redis.sock"), references=["user_id"], timeout=0.05)


async def test_unavailable_is_not_anonymous(lost: SessionStore) -> None:
    """Every call raises StoreUnavailable if Redis does not answer; none treats the client as anonymous."""
    session = request(Sessions(lost), UNKNOWN)
    calls: list[Callable[[], Awaitable[object]]] = [
        session.get,
        lambda: session.set({}),
        lambda: session.unset(["n"]),
        session.touch,
        session.rotate,
        session.delete,
        session.create_csrf_token,
        lambda: session.verify_csrf_token("x" * 86),
    ]
    for call in calls:
        session.failure = None
        with pytest.raises(StoreUnavailable) as raised:
            await call()
        assert session.failure is raised.value
        assert session.status_for(raised.value) == 503
    assert session.take_cookies() == []


async def test_unavailable_may_be_anonymous_for_a_reader(
    lost: SessionStore, store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `on_unavailable="anonymous"` a read returns no session, but a write still fails."""
    token = await signed_in(Sessions(store))
    sessions = Sessions(lost, on_unavailable="anonymous")
    session = request(sessions, token)
    assert await session.get() == {}
    assert not await session.verify_csrf_token("x" * 86)
    for write in (lambda: session.set({"n": 1}), session.rotate, session.create_csrf_token):
        with pytest.raises(StoreUnavailable):
            await write()
    assert session.take_cookies() == []

    session = request(sessions, token)
    assert await session.get() == {}
    assert session.failure is None
    monkeypatch.setattr(session, "_store", store)  # Redis is back, but a write may depend on the failed read.
    assert await session.get() == {}
    with pytest.raises(StoreUnavailable) as raised:
        await session.set({"n": 1})
    assert session.failure is raised.value
    assert session.take_cookies() == []
    assert repr(session) == "<Session: unreadable>"
    assert await session.delete()


# ---------------------------------------------------------------- other behaviour


async def test_bad_arguments_are_refused_with_and_without_a_session(sessions: Sessions, keyspace: Keyspace) -> None:
    """Bad arguments are refused before anything is written, with and without a session."""
    await signed_in(sessions)
    before = await keyspace.dump()
    for session in (sessions.create_session(), request(sessions, UNKNOWN)):
        with pytest.raises(TypeError, match="cannot store this bytes"):
            await session.set({"x": b""})
        with pytest.raises(ValueError, match="'_ended' is reserved"):
            await session.rotate({"_ended": "x"})
        with pytest.raises(ValueError, match="'id' is reserved"):
            await session.unset(["id"])
        with pytest.raises(ValueError, match="'_created' is reserved"):
            await session.get(["_created"])
        with pytest.raises(ValueError, match="max_age must be"):
            await session.touch("soon")
    assert await keyspace.dump() == before


async def test_it_shows_no_id_and_no_value(sessions: Sessions) -> None:
    """The repr of a session shows neither its token nor its id nor its values, in any state."""
    token = await signed_in(sessions, {"user_id": "SECRET"})
    session = request(sessions, token)
    shown = [repr(session), repr(sessions), str(session)]
    await session.get()
    shown.append(repr(session))
    await session.delete()
    shown.append(repr(session))
    for text in shown:
        assert "SECRET" not in text
        assert token not in text
        assert id_of(token) not in text
    assert repr(session) == "<Session: none>"


async def test_the_cookie_is_one_that_others_can_read(sessions: Sessions) -> None:
    """The standard library can parse the cookie."""
    session = sessions.create_session()
    await session.set({})
    (cookie,) = session.take_cookies()
    morsel = SimpleCookie(cookie)["session-id"]
    assert (morsel["path"], morsel["max-age"], morsel["samesite"]) == ("/", "34560000", "Lax")
    assert morsel["secure"]
    assert morsel["httponly"]


async def test_replace_writes_what_differs(sessions: Sessions, keyspace: Keyspace) -> None:
    """`replace` writes only fields that differ, such as 1 and True, and keeps fields of other requests."""
    token = await signed_in(sessions, {"user_id": 1, "n": 1, "gone": 1, "l": [1]})
    session = request(sessions, token)
    before: dict[str, Any] = await session.get()
    del before["id"]
    await sessions.store.set(id_of(token), {"other": 1})
    await session.replace(before, {"user_id": 1, "n": True, "l": [True]})
    assert (await keyspace.dump())[f"{{{id_of(token)}}}"] == {
        "id": id_of(token),
        "user_id": "1",
        "n": "true",
        "l": "[true]",
        "other": "1",
    }
    await session.replace({"n": True}, {"n": True}, "1h")
    assert HOUR - 60_000 < await keyspace.ttl(f"{{{id_of(token)}}}") <= HOUR
    session.take_cookies()
    session = request(sessions, token)
    assert not await session.replace({"n": True}, {"n": True})
    assert session.take_cookies() == []
    assert await session.replace({"n": True}, {"n": 1})


async def test_replace_is_one_script(watched_url: str) -> None:
    """`replace` sets and unsets fields in one script, so no other call sees a state in between."""
    async with Redis.from_url(watched_url) as client:
        sessions = Sessions(SessionStore(client, references=["user_id", "role"]))
        token = await signed_in(sessions, {"user_id": 1, "role": "admin", "n": 1})
        before = await scripts_run(client)
        await request(sessions, token).replace({"user_id": 1, "role": "admin", "n": 1}, {"user_id": 2, "n": 2})
        assert await scripts_run(client) == before + 1
        assert await sessions.store.get(id_of(token)) == {"id": id_of(token), "user_id": 2, "n": 2}
        assert await sessions.store.ids_by("role", "admin") == []
        assert await sessions.store.ids_by("user_id", 2) == [id_of(token)]
        await client.flushdb()


@pytest.mark.parametrize("identity", [True, False])
async def test_taking_out_the_last_field_is_one_script(watched_url: str, *, identity: bool) -> None:
    """`replace` takes out the last field of an anonymous session, and so ends the session, in one script."""
    async with Redis.from_url(watched_url) as client:
        sessions = Sessions(SessionStore(client, references={"user_id": Reference(identity=identity)}))
        token = await signed_in(sessions, {"n": 1})
        session = request(sessions, token)
        await session.get()
        before = await scripts_run(client)
        assert await session.replace({"n": 1}, {})
        assert await scripts_run(client) == before + 1
        assert await sessions.store.ended(id_of(token)) == "deleted"
        await client.flushdb()


@pytest.mark.parametrize("lifetime", [None, "1h"])
async def test_a_session_of_which_nothing_is_left_ends(
    sessions: Sessions, keyspace: Keyspace, lifetime: str | None
) -> None:
    """`replace` ends a session and its cookie when the last field goes, unless a parallel request added one."""
    session = sessions.create_session()
    await session.set({"user_id": 1, "n": 1}, lifetime)
    token = token_in(session.take_cookies())
    await sessions.store.set(id_of(token), {"other": 1})
    session = request(sessions, token)
    assert await session.replace({"user_id": 1, "n": 1}, {})
    assert session.take_cookies() == []
    assert await keyspace.dump() == {f"{{{id_of(token)}}}": {"id": id_of(token), "other": "1"}}
    session = request(sessions, token)
    assert await session.replace({"other": 1}, {})
    assert "; Max-Age=0;" in session.take_cookies()[0]
    assert await session.get() == {}
    assert await keyspace.dump() == {f"{{{id_of(token)}}}": {"_ended": "deleted"}}
    assert await request(sessions, token).replace({"other": 1}, {})  # The session has ended already.
    session = request(sessions, token)
    await session.get()
    await session.set({"n": 1})
    assert token_in(session.take_cookies()) != token


async def test_replace_keeps_what_was_written_in_the_request(sessions: Sessions) -> None:
    """`replace` does not unset a field that another method changed in the same request."""
    session = request(sessions, await signed_in(sessions, {"user_id": 1, "n": 1, "l": [1]}))
    before: dict[str, Any] = await session.get()
    await session.rotate({"user_id": 2, "theme": "dark"})
    del before["id"]
    await session.replace(before, {"l": [1]})
    assert await session.get() == {"id": session.id, "user_id": 2, "theme": "dark", "l": [1]}


async def test_what_is_read_after_a_write_is_what_is_stored(client: Redis, keyspace: Keyspace) -> None:
    """A read after a write returns the stored value, also if the codec decodes it to another type."""
    sessions = Sessions(SessionStore(client, prefix=keyspace.prefix, codec=TextCodec()))
    session = sessions.create_session()
    await session.set({"n": 1})
    assert await session.get() == {"id": session.id, "n": "1"}
    await session.set({"m": 2})
    await session.rotate({"k": 3})
    assert await session.get() == {"id": session.id, "n": "1", "m": "2", "k": "3"}
    token = token_in(session.take_cookies())
    assert await request(sessions, token).get() == await session.get()


@pytest.mark.parametrize("write", ["set", "unset", "rotate"])
async def test_a_write_tells_why_there_is_no_session(sessions: Sessions, write: str) -> None:
    """A write to a session that has ended stores the reason in `ended`, and keeps no old cookie."""
    token = await signed_in(sessions)

    async def late(session: Session) -> None:
        await (session.unset(["n"]) if write == "unset" else getattr(session, write)({"n": 2}))

    session = request(sessions, token)
    await session.set({"n": 1})
    await sessions.store.delete(id_of(token), reason="password")
    with pytest.raises(SessionEnded):
        await (session.rotate() if write == "rotate" else late(session))
    assert session.ended == "password"
    assert session.id is None
    with pytest.raises(SessionNotFound):
        session.get_key()
    assert session.take_cookies() == []

    session = request(sessions, token)
    await late(session)
    assert session.ended == "password"
    assert session.is_new == (write != "unset")


@pytest.mark.parametrize("write", ["set", "unset", "rotate", "delete"])
async def test_after_a_cancelled_write_a_read_asks_again(watched_url: str, write: str) -> None:
    """A read after a cancelled write asks Redis again, since the write may or may not have taken effect."""
    async with Redis.from_url(watched_url) as admin:
        sessions = Sessions(SessionStore.from_url(watched_url))
        token = await signed_in(sessions, {"n": 1})
        session = request(sessions, token)
        await session.get()
        await admin.client_pause(10_000, all=False)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "set": lambda: session.set({"n": 2}),
            "unset": lambda: session.unset(["n"]),
            "rotate": lambda: session.rotate({"n": 2}),
            "delete": session.delete,
        }
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(calls[write](), 0.05)
        await admin.client_unpause()
        async with asyncio.timeout(10):
            while (await sessions.store.get(id_of(token))).get("n") == 1:
                await asyncio.sleep(0.01)
        assert await session.get() == await sessions.store.get(id_of(token))
        await sessions.store.aclose()
        await admin.flushdb()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("same", [True, False])
async def test_a_cancelled_login_can_be_repeated(watched_url: str, *, there: bool, same: bool) -> None:
    """After a cancelled login, the same login finds its session, and another login makes another session."""
    async with Redis.from_url(watched_url) as admin:
        reference = Reference(limit=1, on_limit="refuse")
        sessions = Sessions(SessionStore.from_url(watched_url, references={"user_id": reference}))
        session = request(sessions, await signed_in(sessions, {"n": 1})) if there else sessions.create_session()
        await session.get()
        await sessions.store.load()  # Redis 6.2 pauses SCRIPT LOAD too, which a new connection needs.
        await admin.client_pause(10_000, all=False)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(session.rotate({"user_id": 7}), 0.05)
        await admin.client_unpause()
        async with asyncio.timeout(10):
            while not (done := await sessions.store.ids_by("user_id", 7)):
                await asyncio.sleep(0.01)
        if same:
            await session.rotate({"user_id": 7})
            assert (await session.get())["user_id"] == 7
            assert done == await sessions.store.ids_by("user_id", 7) == [id_of(token_in(session.take_cookies()))]
        else:
            await session.rotate({"user_id": 8})
            assert (await session.get())["user_id"] == 8
            assert done != await sessions.store.ids_by("user_id", 8) == [id_of(token_in(session.take_cookies()))]
        await sessions.store.aclose()
        await admin.flushdb()


async def test_headers_that_leave_meanwhile_tell_nothing(watched_url: str) -> None:
    """If the headers leave while a session is made, the write raises, since the client cannot get the cookie."""
    async with Redis.from_url(watched_url) as admin:
        sessions = Sessions(SessionStore.from_url(watched_url))
        session = sessions.create_session()
        await admin.client_pause(10_000, all=False)
        making = asyncio.ensure_future(session.set({"n": 1}))
        await asyncio.sleep(0)  # The write has begun.
        assert session.take_cookies() == []
        await admin.client_unpause()
        with pytest.raises(RuntimeError, match="the response has begun"):
            await making
        await sessions.store.aclose()
        await admin.flushdb()


async def test_a_server_that_takes_no_writes_can_be_read(watched_url: str) -> None:
    """A read works while the server refuses writes, unless the caller asks for a renewal."""
    async with Redis.from_url(watched_url) as admin:
        sessions = Sessions(SessionStore.from_url(watched_url, timeout=0.3), rolling=0.001)
        token = await signed_in(sessions)
        await admin.config_set("min-replicas-to-write", 1)
        try:
            session = request(sessions, token)
            assert (await session.get())["user_id"] == 1
            assert session.take_cookies() == []
            with pytest.raises(StoreUnavailable):
                await session.set({"n": 1})
            with pytest.raises(StoreUnavailable):
                await sessions.store.get(id_of(token), touch=True)
        finally:
            await admin.config_set("min-replicas-to-write", 0)
        session = request(sessions, token)
        assert (await session.get())["user_id"] == 1
        assert session.take_cookies() == []
        await sessions.store.aclose()
        await admin.flushdb()


async def test_rotate_may_give_another_lifetime(sessions: Sessions, keyspace: Keyspace) -> None:
    """`rotate` can give a session another lifetime, as at a login."""
    session = sessions.create_session()
    await session.set({}, "1h")
    token = token_in(session.take_cookies())
    for values in ({"user_id": 1}, {"user_id": 2}):
        session = request(sessions, token)
        await session.rotate(values, "30 days")
        token = token_in(session.take_cookies())
        assert 30 * DAY - 60_000 < await keyspace.ttl(f"{{{id_of(token)}}}") <= 30 * DAY
    session = sessions.create_session()
    await session.rotate({"user_id": 1}, "30 days")
    token = token_in(session.take_cookies())
    assert 30 * DAY - 60_000 < await keyspace.ttl(f"{{{id_of(token)}}}") <= 30 * DAY


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ("n", "n"),
        ("", ""),
        ("id", ".id"),
        ("_x", "._x"),
        (".id", "..id"),
        ("._x", ".._x"),
        (".n", ".n"),
        ("i.d", "i.d"),
    ],
)
def test_items_whose_names_are_the_stores_get_others(item: str, field: str) -> None:
    """An item with a reserved name is stored under another field name, and read back under its own."""
    assert field_of(item) == field
    assert item_of(field) == item
