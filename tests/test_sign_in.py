"""Signing in and out on a store with an identity, also beside parallel requests."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from rss import (
    Blocked,
    CookiePolicy,
    LimitExceeded,
    Reference,
    Session,
    SessionEnded,
    SessionNotFound,
    Sessions,
    SessionStore,
    StoreUnavailable,
)
from rss.dict_session import DictSession
from tests.keyspace import Keyspace
from tests.steps import run_at
from tests.test_session import UNKNOWN, id_of, request, token_in

pytestmark = pytest.mark.usefixtures("kept_secret")


@pytest.fixture(name="sessions")
def _sessions(client: Redis, keyspace: Keyspace) -> Sessions:
    """The sessions of an application whose store has an identity."""
    references = {"user_id": Reference(identity=True), "ip": Reference()}
    return Sessions(SessionStore(client, references=references, prefix=keyspace.prefix))


async def begin(sessions: Sessions, **values: object) -> str:
    """Make a session, and return the token in the client's cookie."""
    session = sessions.create_session()
    await session.set(values)
    return token_in(session.take_cookies())


async def dict_session(sessions: Sessions, token: str) -> DictSession:
    """Return the session of a request as a dict."""
    session = request(sessions, token)
    return DictSession(session, await session.peek())


async def _by_dict(session: Session, change: Callable[[DictSession], object]) -> None:
    items = DictSession(session, await session.peek())
    change(items)
    await items.save()


def _begin_anew(items: DictSession) -> None:
    items.clear()
    items["user_id"] = 7


LOGINS: dict[str, Callable[[Session], Awaitable[object]]] = {
    "rotate": lambda session: session.rotate({"user_id": 7}),
    "set": lambda session: session.set({"user_id": 7}),
    "replace": lambda session: session.replace({}, {"user_id": 7}),
    "a dict": lambda session: _by_dict(session, lambda items: items.__setitem__("user_id", 7)),
    "a dict that was cleared": lambda session: _by_dict(session, _begin_anew),
}
logins = pytest.mark.parametrize("login", LOGINS.values(), ids=LOGINS)


@logins
@pytest.mark.parametrize("read", [True, False])
async def test_a_login_gives_a_new_id(
    sessions: Sessions, keyspace: Keyspace, login: Callable[[Session], Awaitable[object]], *, read: bool
) -> None:
    """A login by any interface gives the session a new id, and the old token opens no session."""
    planted = await begin(sessions, n=1)
    session = request(sessions, planted)
    if read:
        await session.get()
    await login(session)
    token = token_in(session.take_cookies())
    assert token != planted
    assert session.id == id_of(token)
    assert (await session.get())["user_id"] == 7
    assert await session.get() == await request(sessions, token).get()
    assert await request(sessions, planted).get() == {}
    assert (await keyspace.dump())["user_id:{7}"] == {id_of(token)}


LOGOUTS: dict[str, Callable[[Session], Awaitable[object]]] = {
    "unset": lambda session: session.unset(["user_id"]),
    "set": lambda session: session.set({"user_id": None}),
    "a dict": lambda session: _by_dict(session, lambda items: items.pop("user_id")),
}


@pytest.mark.parametrize("logout", LOGOUTS.values(), ids=LOGOUTS)
async def test_to_lose_the_identity_gives_a_new_id(
    sessions: Sessions, keyspace: Keyspace, logout: Callable[[Session], Awaitable[object]]
) -> None:
    """A session that loses its identity gets a new id, and the old token opens no session."""
    token = await begin(sessions, user_id=7, theme="dark")
    session = request(sessions, token)
    await logout(session)
    new = token_in(session.take_cookies())
    assert new != token
    assert (await request(sessions, new).get())["theme"] == "dark"
    assert await request(sessions, new).get(["user_id"]) in ({"id": id_of(new)}, {"id": id_of(new), "user_id": None})
    assert await request(sessions, token).get() == {}
    assert "user_id:{7}" not in await keyspace.dump()


async def test_a_dict_without_its_last_item_ends(sessions: Sessions, keyspace: Keyspace) -> None:
    """A dict that loses its last item ends the session, even if that item was the identity."""
    token = await begin(sessions, user_id=7)
    items = await dict_session(sessions, token)
    del items["user_id"]
    await items.save()
    assert "; Max-Age=0;" in items.handle.take_cookies()[0]
    assert await keyspace.dump() == {f"{{{id_of(token)}}}": {"_ended": "deleted"}}


async def test_a_dict_that_is_cleared_ends(sessions: Sessions, keyspace: Keyspace) -> None:
    """A dict that is cleared ends the session, including fields that a parallel request wrote."""
    token = await begin(sessions, user_id=7)
    items = await dict_session(sessions, token)
    await sessions.store.set(id_of(token), {"cart": ["book"]})
    items.clear()
    await items.save()
    assert "; Max-Age=0;" in items.handle.take_cookies()[0]
    assert await keyspace.dump() == {f"{{{id_of(token)}}}": {"_ended": "deleted"}}


async def test_the_same_identity_again_is_no_login(sessions: Sessions) -> None:
    """A write of the same identity keeps the id and sets no cookie."""
    token = await begin(sessions, user_id=7)
    session = request(sessions, token)
    await session.set({"user_id": 7, "n": 1})
    assert session.take_cookies() == []
    assert (await session.get())["n"] == 1


@logins
@pytest.mark.parametrize("reason", ["rotated", "password"])
@pytest.mark.parametrize("read", [True, False])
async def test_a_login_makes_a_session_if_the_old_one_is_gone(
    sessions: Sessions, login: Callable[[Session], Awaitable[object]], reason: str, *, read: bool
) -> None:
    """A login makes a new session if the old one was rotated or ended meanwhile."""
    token = await begin(sessions, n=1)
    session = request(sessions, token)
    if read:
        await session.get()
    if reason == "rotated":
        first = request(sessions, token)
        await first.rotate({"user_id": 7})
    else:
        await sessions.store.delete(id_of(token), reason=reason)
    await login(session)
    new = token_in(session.take_cookies())
    assert await request(sessions, new).get() == {"id": id_of(new), "user_id": 7}
    assert len(await sessions.store.ids_by("user_id", 7)) == (2 if reason == "rotated" else 1)


async def test_a_login_that_is_sent_twice_makes_two_sessions(sessions: Sessions) -> None:
    """A login that is sent twice succeeds twice, also if the user was signed in before and both were read."""
    token = await begin(sessions, user_id=7)
    one, other = request(sessions, token), request(sessions, token)
    await other.get()
    found = set()
    for session in (one, other):
        await session.rotate({"user_id": 7})
        found.add(id_of(token_in(session.take_cookies())))
    assert len(found) == 2
    assert set(await sessions.store.ids_by("user_id", 7)) == found


WRITES: dict[str, Callable[[Session], Awaitable[object]]] = {
    "set": lambda session: session.set({"n": 2}),
    "unset": lambda session: session.unset(["n"]),
    "rotate": lambda session: session.rotate(),
    "rotate with values": lambda session: session.rotate({"admin": True}),
    "rotate to nobody": lambda session: session.rotate({"user_id": None}),
    "replace": lambda session: session.replace({}, {"n": 2}),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("touch", [True, False])
@pytest.mark.parametrize(("seen", "read"), [(True, False), (False, True), (False, False)])
async def test_a_request_that_races_a_login_neither_mints_nor_clears(
    sessions: Sessions,
    keyspace: Keyspace,
    write: Callable[[Session], Awaitable[object]],
    *,
    read: bool,
    seen: bool,
    touch: bool,
) -> None:
    """A request that races a login reads nothing, its writes raise, and its response sets no cookie."""
    token = await begin(sessions, n=1)
    session = request(sessions, token)
    if seen:
        await session.get()
    await request(sessions, token).rotate({"user_id": 7})
    before = await keyspace.dump()
    if read and not seen:
        assert await session.get() == {}
    if touch:
        assert not await session.touch()
    for _ in range(2):
        with pytest.raises(SessionEnded) as raised:
            await write(session)
        assert raised.value.reason == "rotated"
        assert session.status_for(raised.value) == 409
    assert await session.get() == {}
    assert not await session.touch()
    assert not await session.delete()
    assert session.take_cookies() == []
    assert await keyspace.dump() == before


@pytest.mark.parametrize("read", [True, False])
async def test_taking_out_the_last_item_beside_a_login(sessions: Sessions, keyspace: Keyspace, *, read: bool) -> None:
    """`replace` that takes out the last item beside a login writes nothing and sets no cookie."""
    token = await begin(sessions, n=1)
    session = request(sessions, token)
    if read:
        await session.get()
    await request(sessions, token).rotate({"user_id": 7})
    before = await keyspace.dump()
    await session.replace({"n": 1}, {})
    assert session.take_cookies() == []
    assert await keyspace.dump() == before


async def test_a_form_of_before_a_login_still_works(sessions: Sessions) -> None:
    """A form from before a login can still sign in, since the browser may have lost the new cookie."""
    token = await begin(sessions, n=1)
    await request(sessions, token).rotate({"user_id": 7})
    csrf_token = await request(sessions, token).create_csrf_token()
    session = request(sessions, token)
    assert await session.verify_csrf_token(csrf_token)
    assert not await session.verify_csrf_token(csrf_token[::-1])
    await session.set({"user_id": 8})
    assert (await request(sessions, token_in(session.take_cookies())).get())["user_id"] == 8
    await sessions.store.delete(id_of(token))
    assert not await request(sessions, UNKNOWN).verify_csrf_token(csrf_token)


@pytest.mark.parametrize("write", ["set", "rotate", "replace", "cleared"])
@pytest.mark.parametrize("made", [True, False])
async def test_a_write_that_repeats_the_identity_revives_nothing(
    sessions: Sessions, keyspace: Keyspace, write: str, *, made: bool
) -> None:
    """A write that repeats the identity does not revive a session that was ended after the read."""
    session = sessions.create_session()
    await session.set({"user_id": 7, "n": 1})
    if not made:
        session = request(sessions, token_in(session.take_cookies()))
        await session.get()
    await sessions.store.delete_by("user_id", 7, reason="password")
    before = await keyspace.dump()
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "set": lambda: session.set({"user_id": 7, "n": 2}),
        "rotate": lambda: session.rotate({"user_id": "7"}),
        "replace": lambda: session.replace({"n": 1}, {"user_id": 7, "n": 2}),
        "cleared": lambda: session.replace({"user_id": 7, "n": 1}, {"user_id": 7}, anew=True),
    }
    for _ in range(2):
        with pytest.raises(SessionEnded):
            await calls[write]()
    assert await keyspace.dump() == before
    assert session.take_cookies() == []
    assert "new" not in repr(session)


async def test_a_login_that_is_refused_changes_nothing(client: Redis, keyspace: Keyspace) -> None:
    """A login by a cleared dict that is refused changes neither the session nor the cookie."""
    references = {"user_id": Reference(identity=True, limit=1, on_limit="refuse")}
    sessions = Sessions(SessionStore(client, references=references, prefix=keyspace.prefix))
    await begin(sessions, user_id=7)
    token = await begin(sessions, cart=["book"])
    before = await keyspace.dump()
    items = await dict_session(sessions, token)
    _begin_anew(items)
    with pytest.raises(LimitExceeded) as raised:
        await items.save()
    assert items.handle.status_for(raised.value) == 403
    assert await keyspace.dump() == before
    assert items.handle.take_cookies() == []


@pytest.mark.parametrize("by", [8, None])
async def test_ending_all_beside_another_login_keeps_its_cookie(sessions: Sessions, by: int | None) -> None:
    """`delete_all` ends nothing and leaves the cookie if the browser has signed in anew or out meanwhile."""
    token = await begin(sessions, user_id=7)
    session = request(sessions, token)
    await session.get()
    await request(sessions, token).rotate({"user_id": by})
    assert await session.delete_all() == 0
    assert session.take_cookies() == []


async def test_a_dict_that_is_cleared_ends_every_candidate(sessions: Sessions, keyspace: Keyspace) -> None:
    """A dict that is cleared ends the sessions of all cookies with the name."""
    mine, tossed = await begin(sessions, user_id=7), await begin(sessions, user_id=8)
    session = sessions.create_session(f"session-id={tossed}; session-id={mine}")
    items = DictSession(session, await session.peek())
    items.clear()
    await items.save()
    assert "; Max-Age=0;" in session.take_cookies()[0]
    assert set(map(str, (await keyspace.dump()).values())) == {str({"_ended": "deleted"})}


async def test_a_logout_that_cannot_be_done_is_told(store: SessionStore) -> None:
    """A logout that fails raises StoreUnavailable, even by a dict of a session that could not be read."""
    token = await begin(Sessions(store), n=1)
    lost = SessionStore(Redis(unix_socket_path="/nowhere/redis.sock"), timeout=0.05)
    session = request(Sessions(lost, on_unavailable="anonymous"), token)
    items = DictSession(session, await session.peek())
    items.clear()
    with pytest.raises(StoreUnavailable):
        await items.save()
    assert session.take_cookies() == []


async def test_headers_that_leave_during_a_login(sessions: Sessions, keyspace: Keyspace) -> None:
    """A login during which the headers leave raises, and leaves no session."""
    for token in (await begin(sessions, n=1), ""):
        session = request(sessions, token) if token else sessions.create_session()
        login = asyncio.ensure_future(session.rotate({"user_id": 7}))
        await asyncio.sleep(0)
        assert session.take_cookies() == []
        with pytest.raises(RuntimeError, match="the response has begun"):
            await login
        assert session.id is None
        assert not session.is_new
        assert await session.get() == {}
        assert "user_id:{7}" not in await keyspace.dump()


async def test_a_failure_that_was_handled_is_forgotten(sessions: Sessions) -> None:
    """A failure is forgotten when a later call succeeds."""
    token = await begin(sessions, user_id=7)
    session = request(sessions, token)
    await session.get()
    await sessions.store.delete(id_of(token))
    with pytest.raises(SessionEnded):
        await session.set({"n": 1})
    assert session.failure
    await session.set({"user_id": 8})
    assert session.failure is None


async def test_taking_out_from_what_is_gone(sessions: Sessions, keyspace: Keyspace) -> None:
    """`replace` that only removes fields succeeds if the session has ended."""
    for ends in (True, False):
        token = await begin(sessions, user_id=7, n=1)
        session = request(sessions, token)
        await session.get()
        if ends:
            await sessions.store.delete(id_of(token))
        else:
            await keyspace.expire(f"{{{id_of(token)}}}")
        assert await session.replace({"user_id": 7, "n": 1}, {"user_id": 7})
        assert session.failure is None


@pytest.mark.parametrize("reason", ["password", None])
async def test_a_write_to_what_has_ended_is_a_401(sessions: Sessions, keyspace: Keyspace, reason: str | None) -> None:
    """A write to a session that ended during the request is a 401; an error of another session is not."""
    token = await begin(sessions, n=1)
    session = request(sessions, token)
    await session.get()
    if reason:
        await sessions.store.delete(id_of(token), reason=reason)
    else:
        await keyspace.expire(f"{{{id_of(token)}}}")
    with pytest.raises(SessionNotFound) as raised:
        await session.set({"n": 2})
    assert session.status_for(raised.value) == 401
    assert session.status_for(SessionEnded("password")) is None
    assert repr(session) == "<Session: ended>"


async def test_repr_tells_the_state(sessions: Sessions) -> None:
    """The repr of a session tells its state."""
    session = sessions.create_session()
    assert repr(session) == "<Session: none>"
    await session.set({"user_id": 7})
    assert repr(session) == "<Session: new>"
    session = request(sessions, token_in(session.take_cookies()))
    assert repr(session) == "<Session: not looked at>"
    await session.get()
    assert repr(session) == "<Session: alive>"
    await session.delete()
    assert repr(session) == "<Session: none>"
    session = request(sessions, UNKNOWN)
    await session.get()
    assert repr(session) == "<Session: none>"


# ---------------------------------------------------------------- the other sessions


async def test_the_sessions_of_an_identity(sessions: Sessions) -> None:
    """The sessions of an identity can be listed and ended; sessions of other identities cannot."""
    phone, laptop, tablet = [await begin(sessions, user_id=7, device=name) for name in ("phone", "laptop", "tablet")]
    stranger = await begin(sessions, user_id=8, device="theirs")
    session = request(sessions, phone)
    found = {one["id"]: one["device"] async for one in session.find_all(["device"])}
    assert found == {id_of(phone): "phone", id_of(laptop): "laptop", id_of(tablet): "tablet"}
    assert session.id in found

    for other in (id_of(stranger), id_of(phone), UNKNOWN, ""):
        if other:
            assert not await session.delete_other(other)
    with pytest.raises(ValueError, match="session_id must not be empty"):
        await session.delete_other("")
    assert await session.delete_other(id_of(laptop), reason="elsewhere")
    assert await sessions.store.ended(id_of(laptop)) == "elsewhere"
    assert await session.delete_others(reason="elsewhere") == 1
    assert await sessions.store.ended(id_of(tablet)) == "elsewhere"
    assert await sessions.store.ids_by("user_id", 7) == [id_of(phone)]
    assert session.take_cookies() == []

    session = request(sessions, phone)
    assert await session.delete_all(reason="password", block="30s") == 1
    assert "; Max-Age=0;" in session.take_cookies()[0]
    assert await session.get() == {}
    with pytest.raises(Blocked):
        await sessions.create_session().rotate({"user_id": 7})
    assert await sessions.store.ids_by("user_id", 8) == [id_of(stranger)]
    await sessions.store.unblock("user_id", 7)


async def test_nobody_has_no_sessions(sessions: Sessions, keyspace: Keyspace) -> None:
    """A session without an identity finds and ends no others, not even other anonymous sessions."""
    tokens = [await begin(sessions, n=1), await begin(sessions, user_id=None)]
    before = await keyspace.dump()
    for session in (sessions.create_session(), request(sessions, UNKNOWN), *(request(sessions, one) for one in tokens)):
        assert [one async for one in session.find_all()] == []
        assert not await session.delete_other(id_of(tokens[0]))
        assert await session.delete_others() == 0
        assert await session.delete_all() == 0
        assert session.take_cookies() == []
    assert await keyspace.dump() == before


async def test_a_search_without_redis(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """If Redis does not answer a search, the session says so, as after each other call."""
    session = request(sessions, await begin(sessions, user_id=7))

    async def fail(*_: object) -> AsyncIterator[dict[str, Any]]:
        raise StoreUnavailable("no answer")
        yield {}

    monkeypatch.setattr(sessions.store, "find_by", fail)
    with pytest.raises(StoreUnavailable):
        await anext(session.find_all())
    assert isinstance(session.failure, StoreUnavailable)
    assert sessions.get_reference_key("user_id", 7) == sessions.store.get_reference_key("user_id", 7)


async def test_a_store_without_an_identity_says_so(store: SessionStore) -> None:
    """Methods that need an identity raise an error that names `identity=True`."""
    session = Sessions(store).create_session()
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: anext(session.find_all()),
        lambda: session.delete_other(UNKNOWN),
        session.delete_others,
        session.delete_all,
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="identity=True"):
            await call()


async def test_a_dict_that_begins_anew_without_an_identity(store: SessionStore, keyspace: Keyspace) -> None:
    """A dict that is cleared and filled again gets a new id, also on a store without an identity."""
    sessions = Sessions(store)
    planted = await begin(sessions, n=1)
    items = await dict_session(sessions, planted)
    _begin_anew(items)
    await items.save()
    session_id = id_of(token_in(items.handle.take_cookies()))
    assert session_id != id_of(planted)
    assert await keyspace.dump() == {
        f"{{{id_of(planted)}}}": {"_ended": "rotated"},
        f"{{{session_id}}}": {"id": session_id, "user_id": "7"},
        "user_id:{7}": {session_id},
    }


async def test_signing_out_beside_a_tossed_cookie_ends_every_candidate(sessions: Sessions, keyspace: Keyspace) -> None:
    """A logout with several session cookies ends the session of each, since any could be the right one."""
    mine, tossed = await begin(sessions, user_id=7), await begin(sessions, user_id=8)
    session = sessions.create_session(f"session-id={tossed}; session-id={mine}; session-id={UNKNOWN}")
    assert await session.get() == {}
    assert await session.delete(reason="signed-out")
    assert "; Max-Age=0;" in session.take_cookies()[0]
    ended = {"_ended": "signed-out"}
    assert await keyspace.dump() == {f"{{{id_of(mine)}}}": ended, f"{{{id_of(tossed)}}}": ended}
    session = sessions.create_session(f"session-id={tossed}; session-id={mine}")
    await session.set({"n": 1})  # The client gets a new cookie beside the two.
    assert await session.delete()
    assert all(held in (ended, {"_ended": "deleted"}) for held in (await keyspace.dump()).values())


# ---------------------------------------------------------------- errors that name the call that was meant


async def test_what_is_no_store_and_no_sessions_is_refused(store: SessionStore) -> None:
    """`Sessions` and `SessionStore` refuse other objects with an error that shows the right call."""
    with pytest.raises(TypeError, match=r"Sessions\(SessionStore\.from_url\(url\)\)"):
        Sessions("redis://localhost")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"Sessions\(SessionStore\(client\)\)"):
        Sessions(Redis())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="CookiePolicy"):
        Sessions(store, cookie={"name": "x"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"SessionStore\.from_url\(url\)"):
        SessionStore("redis://localhost")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_an_attribute_is_not_an_item(sessions: Sessions) -> None:
    """Setting an attribute is refused, and so is `set` with a name and a value."""
    session = sessions.create_session()
    with pytest.raises(AttributeError):
        session.user_id = 7  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="a mapping of fields to values"):
        await session.set("user_id", "alice")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_a_secure_cookie_on_http_is_told_once(sessions: Sessions, caplog: pytest.LogCaptureFixture) -> None:
    """A secure cookie on plain HTTP is logged once, since clients drop it silently."""
    caplog.set_level(logging.WARNING, "rss")
    for scheme in ("https", "http", "ws", "http"):
        session = sessions.create_session("", scheme=scheme)
        await session.set({"n": 1})
        session.take_cookies()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "CookiePolicy(secure=False)" in caplog.text
    caplog.clear()
    session = Sessions(sessions.store, cookie=CookiePolicy(secure=False)).create_session("", scheme="http")
    await session.set({"n": 1})
    assert session.take_cookies()
    assert not caplog.records


async def test_ending_the_others_beside_a_rotation(sessions: Sessions, keyspace: Keyspace) -> None:
    """A request whose session was rotated meanwhile ends nothing: the new id is its own session too."""
    login = sessions.create_session()
    await login.set({"user_id": 7})
    other = await sessions.store.create({"user_id": 7})
    cookie = login.take_cookies()[0].partition(";")[0]
    slow, quick = sessions.create_session(cookie), sessions.create_session(cookie)
    assert await slow.get()
    await quick.rotate()
    before = await keyspace.dump()
    with pytest.raises(SessionEnded, match="rotated") as raised:
        await slow.delete_others()
    assert slow.status_for(raised.value) == 409
    assert await keyspace.dump() == before
    assert await quick.delete_others() == 1
    assert await sessions.store.ids_by("user_id", 7) == [quick.id]
    assert await sessions.store.get(other) == {}


@pytest.mark.parametrize("stale", [True, False])
async def test_a_login_without_a_session_that_is_repeated(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, *, stale: bool
) -> None:
    """A login whose answer was lost, and which is repeated, makes one session, also with a cookie of a session gone."""

    async def lose(call: Awaitable[Any]) -> None:
        await call
        raise StoreUnavailable("no answer")

    session = sessions.create_session(f"session-id={'x' * 32}" if stale else "")
    run_at(sessions.store, monkeypatch, "set_with_refs", lose)
    with pytest.raises(StoreUnavailable):
        await session.rotate({"user_id": 1})
    await session.rotate({"user_id": 1})
    assert await sessions.store.ids_by("user_id", 1) == [session.id]
