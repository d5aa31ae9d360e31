"""The contract of the store: every method, with every kind of client, on every event loop, coalesced and not."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from rss import Blocked, Conflict, SessionEnded, SessionError, SessionNotFound, SessionStore
from rss.engine.operations import Found, Position
from tests.conftest import send_singly
from tests.keyspace import SLACK, Keyspace

pytestmark = pytest.mark.parametrize(
    ("client", "coalescing", "keyspace"),
    [
        *(
            pytest.param({"protocol": protocol, "decode_responses": decode}, True, None, id=f"resp{protocol}-{kind}")
            for protocol in (2, 3)
            for decode, kind in ((False, "bytes"), (True, "str"))
        ),
        pytest.param({}, False, None, id="not-coalesced"),
        pytest.param({}, True, 16, id="partitioned"),
        pytest.param("cluster", True, "cluster", id="cluster"),
    ],
    indirect=True,
)

HOUR = 3_600_000
DAY = 24 * HOUR
ALICE: dict[str, Any] = {"user_id": 1, "ip": "::1", "name": "alice"}


@pytest.fixture(autouse=True, name="coalescing")
def _coalescing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch coalescing off if the parameter is False."""
    if not request.param:
        send_singly(monkeypatch)


async def test_set_makes_a_session_with_its_references(store: SessionStore, keyspace: Keyspace) -> None:
    """A session is a hash; each of its reference values has a set with its id."""
    assert await store.set("a", ALICE) == ALICE
    assert await keyspace.dump() == {
        "{a}": {"id": "a", "user_id": "1", "ip": "::1", "name": "alice"},
        "user_id:{1}": {"a"},
        "ip:{::1}": {"a"},
    }
    assert await store.get("a") == {"id": "a", **ALICE}


async def test_a_session_without_fields_is_a_session(store: SessionStore, keyspace: Keyspace) -> None:
    """A session without fields differs from no session."""
    await store.set("a", {})
    assert await store.get("a") == {"id": "a"}
    assert await store.get("b") == {}
    assert await keyspace.dump() == {"{a}": {"id": "a"}}


async def test_set_keeps_the_other_fields(store: SessionStore, keyspace: Keyspace) -> None:
    """Two requests that write different fields do not overwrite each other's fields."""
    await store.set("a", ALICE)
    await store.set("a", {"theme": "dark"})
    assert await store.get("a") == {"id": "a", "theme": "dark", **ALICE}
    assert await keyspace.dump() == {
        "{a}": {"id": "a", "user_id": "1", "ip": "::1", "name": "alice", "theme": "dark"},
        "user_id:{1}": {"a"},
        "ip:{::1}": {"a"},
    }


async def test_set_moves_a_session_between_sets(store: SessionStore, keyspace: Keyspace) -> None:
    """A new reference value moves the session from the set of the old value to that of the new one."""
    await store.set("a", ALICE)
    await store.set("b", ALICE)
    await store.set("a", {"user_id": 2})
    assert await keyspace.dump() == {
        "{a}": {"id": "a", "user_id": "2", "ip": "::1", "name": "alice"},
        "{b}": {"id": "b", "user_id": "1", "ip": "::1", "name": "alice"},
        "user_id:{1}": {"b"},
        "user_id:{2}": {"a"},
        "ip:{::1}": {"a", "b"},
    }


async def test_a_list_puts_a_session_into_several_sets(store: SessionStore, keyspace: Keyspace) -> None:
    """A session whose reference holds a list is in the set of each value; 1 and "1" share a set."""
    await store.set("a", {"user_id": [1, "1", "x]", 2**53]})
    assert await keyspace.dump() == {
        "{a}": {"id": "a", "user_id": '[1,"1","x]",9007199254740992]'},
        "user_id:{1}": {"a"},
        "user_id:{x]}": {"a"},
        "user_id:{9007199254740992}": {"a"},
    }
    await store.set("a", {"user_id": [2, 1]})
    assert await keyspace.dump() == {
        "{a}": {"id": "a", "user_id": "[2,1]"},
        "user_id:{1}": {"a"},
        "user_id:{2}": {"a"},
    }
    await store.set("a", {"user_id": []})
    assert await keyspace.dump() == {"{a}": {"id": "a", "user_id": "[]"}}


@pytest.mark.parametrize(
    "value", ["null", "1", '"', '"x"', "[", "[1]", "[0x10]", " [1]", "{}", "true", "a:b", "}", "\n\0", "ü😀", "x" * 512]
)
async def test_any_text_is_a_reference_value(store: SessionStore, keyspace: Keyspace, value: str) -> None:
    """A reference value may be any text, even one that looks like JSON or like part of a key."""
    await store.set("a", {"user_id": value})
    assert await store.get("a") == {"id": "a", "user_id": value}
    assert await store.ids_by("user_id", value) == ["a"]
    assert set(await keyspace.dump()) == {"{a}", f"user_id:{{{value}}}"}
    await store.set("a", {"user_id": 7})
    assert set(await keyspace.dump()) == {"{a}", "user_id:{7}"}
    await store.set("a", {"user_id": value})
    assert await store.delete_by("user_id", value) == 1
    assert await keyspace.dump() == {"{a}": {"_ended": "deleted"}}


async def test_a_reference_that_is_none_is_in_no_set(store: SessionStore, keyspace: Keyspace) -> None:
    """A reference that is None is stored, and puts the session into no set."""
    await store.set("a", {"user_id": 1})
    await store.set("a", {"user_id": None})
    assert await keyspace.dump() == {"{a}": {"id": "a", "user_id": "null"}}
    assert await store.get("a") == {"id": "a", "user_id": None}


async def test_get_reads_some_fields(store: SessionStore) -> None:
    """`get` with a list of fields returns the id and those of the fields that exist."""
    await store.set("a", ALICE)
    assert await store.get("a", ["name", "missing"]) == {"id": "a", "name": "alice"}
    assert await store.get("a", ["missing", "id"]) == {"id": "a"}
    assert await store.get("b", ["name"]) == {}


async def test_get_with_touch_renews(store: SessionStore, keyspace: Keyspace) -> None:
    """`get` with `touch=True` renews the session and its sets; a plain `get` does not."""
    await store.set("a", ALICE)
    await keyspace.shorten(27 * DAY)
    await store.get("a")
    assert await keyspace.ttl("{a}") <= DAY
    assert await store.get("a", ["name"], touch=True) == {"id": "a", "name": "alice"}
    assert 27 * DAY < await keyspace.ttl("{a}") <= 28 * DAY
    for key in ("user_id:{1}", "ip:{::1}"):
        assert await keyspace.ttl("{a}") <= await keyspace.ttl(key) <= 28 * DAY * SLACK
    assert await store.get("b", touch=True) == {}
    assert len(await keyspace.dump()) == 3


async def test_get_with_a_time_renews_when_that_has_passed(store: SessionStore, keyspace: Keyspace) -> None:
    """`get` with a time renews the session for its own lifetime, if its last renewal was that long ago."""
    await store.set("a", ALICE, "1h")
    await keyspace.shorten(60_000)
    await store.get("a", touch="2m")
    assert await keyspace.ttl("{a}") <= HOUR - 60_000
    assert await store.get("a", ["name"], touch="1m") == {"id": "a", "name": "alice"}
    assert HOUR - 30_000 < await keyspace.ttl("{a}") <= HOUR
    for key in ("user_id:{1}", "ip:{::1}"):
        assert await keyspace.ttl("{a}") <= await keyspace.ttl(key) <= HOUR * SLACK
    await keyspace.shorten(31 * 60_000)
    await store.get("a", touch="2h")  # A session is renewed at the latest after half of its lifetime.
    assert HOUR - 30_000 < await keyspace.ttl("{a}") <= HOUR


@pytest.mark.parametrize("age", ["1h", "60 days"])
async def test_a_session_keeps_the_time_it_was_given(store: SessionStore, keyspace: Keyspace, age: str) -> None:
    """A session keeps its `max_age` through writes, renewals and a new id, until another is given."""
    await store.set("a", ALICE, age)
    full = await keyspace.ttl("{a}")
    for renew in (
        lambda: store.set("a", {"name": "bob"}),
        lambda: store.set("a", {"user_id": 2}),
        lambda: store.unset("a", ["name"]),
        lambda: store.unset("a", ["ip"]),
        lambda: store.touch("a"),
        lambda: store.get("a", touch=True),
    ):
        await keyspace.shorten(60_000)
        await renew()
        assert full - 30_000 < await keyspace.ttl("{a}") <= full + 30_000
    new = await store.rotate("a")
    await keyspace.shorten(60_000)
    await store.touch(new)
    assert full - 30_000 < await keyspace.ttl(f"{{{new}}}") <= full + 30_000
    await store.touch(new, "28 days")
    await store.set(new, {"name": "x"})
    assert 27 * DAY < await keyspace.ttl(f"{{{new}}}") <= 28 * DAY


async def test_a_time_that_is_also_the_default_is_the_sessions_own(client: Redis, keyspace: Keyspace) -> None:
    """A `max_age` that was given stays when the default changes, even if it was the default before."""
    options: dict[str, Any] = {"references": ["user_id"], "prefix": keyspace.prefix, "partitions": keyspace.partitions}
    given, later = SessionStore(client, **options, max_age="1h"), SessionStore(client, **options, max_age="1m")
    await given.set("set", {"user_id": 1}, "1h")
    created = await given.create({"user_id": 1}, timedelta(hours=1))
    await given.set("touched", {})
    await given.touch("touched", 3600)
    await given.set("unset", {"x": 1})
    await given.unset("unset", ["x"], "60 minutes")
    rotated = await given.rotate(await given.create(), max_age="1h")
    await given.set("default", {})
    for session_id in ("set", created, "touched", "unset", rotated):
        await keyspace.shorten(60_000)
        await later.touch(session_id)
        assert HOUR - 30_000 < await keyspace.ttl(f"{{{session_id}}}") <= HOUR
    await later.touch("default")
    assert 0 < await keyspace.ttl("{default}") <= 60_000
    for one in (given, later):
        await one.aclose()


async def test_create_mints_an_id(store: SessionStore, keyspace: Keyspace) -> None:
    """The id is new, random and URL-safe."""
    session_id = await store.create({"user_id": 1}, "1 day")
    assert len(session_id) == 32
    assert await keyspace.dump() == {
        f"{{{session_id}}}": {"id": session_id, "user_id": "1"},
        "user_id:{1}": {session_id},
    }
    assert DAY - 60_000 < await keyspace.ttl(f"{{{session_id}}}") <= await keyspace.ttl("user_id:{1}") <= DAY * SLACK
    assert await store.create() != session_id


async def test_set_without_create_needs_a_session(store: SessionStore, keyspace: Keyspace) -> None:
    """`set` with `create=False` raises SessionNotFound and writes nothing if there is no session."""
    with pytest.raises(SessionNotFound):
        await store.set("a", ALICE, create=False)
    assert await keyspace.dump() == {}
    await store.set("a", {})
    await store.set("a", {"x": 1}, create=False)
    assert await store.get("a") == {"id": "a", "x": 1}


@pytest.mark.parametrize(
    ("expect", "meets"),
    [
        ({"n": 1}, True),
        ({"n": 1, "user_id": 1}, True),
        ({"n": "1"}, False),
        ({"n": 2}, False),
        ({"n": 1, "x": 1}, False),
        ({"missing": None}, True),
        ({"nothing": None}, True),
        ({"n": None}, False),
        ({"l": [1, {"a": "ü"}]}, True),
        ({}, True),
    ],
)
async def test_set_expects(store: SessionStore, keyspace: Keyspace, expect: dict[str, Any], *, meets: bool) -> None:
    """`set` writes only if the fields hold the expected values; None also matches an absent field."""
    await store.set("a", {"n": 1, "user_id": 1, "nothing": None, "l": [1, {"a": "ü"}]})
    before = await keyspace.dump()
    if meets:
        await store.set("a", {"n": 3}, expect=expect)
        assert (await store.get("a"))["n"] == 3
    else:
        with pytest.raises(Conflict):
            await store.set("a", {"n": 3, "user_id": 5}, expect=expect)
        assert await keyspace.dump() == before


async def test_set_expects_of_a_session_that_is_not_there(store: SessionStore, keyspace: Keyspace) -> None:
    """A session that does not exist holds no values, so only None matches."""
    with pytest.raises(Conflict):
        await store.set("a", {"n": 1}, expect={"n": 0})
    assert await keyspace.dump() == {}
    await store.set("a", {"n": 1}, expect={"n": None})
    assert await store.get("a") == {"id": "a", "n": 1}


async def test_unset_takes_fields_out(store: SessionStore, keyspace: Keyspace) -> None:
    """`unset` removes fields, takes the session out of their sets, and renews the session."""
    await store.set("a", ALICE, "1 day")
    await store.unset("a", ["user_id", "name", "missing", "name"], "2 days")
    assert await keyspace.dump() == {"{a}": {"id": "a", "ip": "::1"}, "ip:{::1}": {"a"}}
    assert DAY < await keyspace.ttl("{a}") <= 2 * DAY
    assert await keyspace.ttl("{a}") <= await keyspace.ttl("ip:{::1}") <= 2 * DAY * SLACK


async def test_unset_of_no_session_does_nothing(store: SessionStore, keyspace: Keyspace) -> None:
    """`unset` of a session that does not exist writes nothing."""
    await store.unset("a", ["name"])
    assert await keyspace.dump() == {}


async def test_pop_takes_fields_out_and_returns_them(store: SessionStore, keyspace: Keyspace) -> None:
    """`pop` removes fields, returns their values once, and keeps the TTL."""
    await store.set("a", {"user_id": 1, "state": "xyz"}, "1 day")
    assert await store.pop("a", ["state", "user_id", "missing"]) == {"state": "xyz", "user_id": 1}
    assert await store.pop("a", ["state"]) == {}
    assert await keyspace.dump() == {"{a}": {"id": "a"}}
    assert await keyspace.ttl("{a}") <= DAY
    with pytest.raises(SessionNotFound):
        await store.pop("b", ["state"])


async def test_increment_counts(store: SessionStore, keyspace: Keyspace) -> None:
    """`increment` counts an absent field from 0, and keeps the TTL."""
    await store.set("a", {}, "1 day")
    assert await store.increment("a", "n") == 1
    assert await store.increment("a", "n", -5) == -4
    assert await store.get("a") == {"id": "a", "n": -4}
    assert await keyspace.ttl("{a}") <= DAY
    with pytest.raises(SessionNotFound):
        await store.increment("b", "n")
    assert set(await keyspace.dump()) == {"{a}"}


@pytest.mark.parametrize(
    ("held", "by", "total"),
    [
        (2**53, 1, 2**53 + 1),
        (-(2**53), -1, -(2**53) - 1),
        (2**53 - 1, 1, 2**53),
        (2**53 + 1, -2, 2**53 - 1),
        (2**63 - 2, 1, 2**63 - 1),
        (1 - 2**63, -1, -(2**63)),
        (0, -(2**63), -(2**63)),
        (0, 2**63 - 1, 2**63 - 1),
        (-(2**63), 2**63 - 1, -1),
        (1234567890123456789, 0, 1234567890123456789),
        (1, -1, 0),
    ],
)
async def test_increment_is_exact(store: SessionStore, held: int, by: int, total: int) -> None:
    """`increment` is exact over all of 64 bits."""
    await store.set("a", {"n": held})
    assert await store.increment("a", "n", by) == total
    assert await store.get("a") == {"id": "a", "n": total}


@pytest.mark.parametrize("value", ["alice", 2**63 - 1, 2**63, [1], 1.5, None, True, ""])
async def test_increment_needs_an_integer(store: SessionStore, keyspace: Keyspace, value: object) -> None:
    """`increment` raises ValueError and keeps the field, if it holds no integer or the sum exceeds 64 bits."""
    await store.set("a", {"n": value})
    before = await keyspace.dump()
    with pytest.raises(ValueError, match="does not hold an integer"):
        await store.increment("a", "n")
    assert await keyspace.dump() == before


async def test_touch_renews_a_session_and_its_sets(store: SessionStore, keyspace: Keyspace) -> None:
    """`touch` renews the session, and extends the TTLs of its sets if necessary, but never shortens them."""
    await store.set("a", ALICE, "1 day")
    assert await store.touch("a", "3 days")
    assert 2 * DAY < await keyspace.ttl("{a}") <= 3 * DAY
    for key in ("user_id:{1}", "ip:{::1}"):
        assert await keyspace.ttl("{a}") <= await keyspace.ttl(key) <= 3 * DAY * SLACK
    assert await store.touch("a", "2 days")
    assert DAY < await keyspace.ttl("{a}") <= 2 * DAY
    assert 3 * DAY - 60_000 < await keyspace.ttl("user_id:{1}") <= 3 * DAY * SLACK
    assert await store.touch("a")
    assert DAY < await keyspace.ttl("{a}") <= 2 * DAY
    assert not await store.touch("b")
    assert set(await keyspace.dump()) == {"{a}", "user_id:{1}", "ip:{::1}"}


async def test_delete_leaves_a_tombstone(store: SessionStore, keyspace: Keyspace) -> None:
    """`delete` takes the session out of its sets, and leaves a tombstone with the reason for five minutes."""
    await store.set("a", ALICE)
    await store.set("b", ALICE)
    assert await store.delete("a", reason="signed-out")
    assert await keyspace.dump() == {
        "{a}": {"_ended": "signed-out"},
        "{b}": {"id": "b", "user_id": "1", "ip": "::1", "name": "alice"},
        "user_id:{1}": {"b"},
        "ip:{::1}": {"b"},
    }
    assert 240_000 < await keyspace.ttl("{a}") <= 300_000
    assert await store.get("a") == {}
    assert await store.get("a", ["name"]) == {}
    assert await store.ended("a") == "signed-out"
    assert await store.ended("b") is None
    assert await store.ended("c") is None


async def test_delete_of_no_session(store: SessionStore, keyspace: Keyspace) -> None:
    """`delete` of no session returns False and leaves no tombstone; an existing tombstone keeps its reason."""
    assert not await store.delete("a")
    assert await keyspace.dump() == {}
    await store.set("a", {})
    await store.delete("a", reason="first")
    assert not await store.delete("a", reason="second")
    assert await store.ended("a") == "first"


@pytest.mark.parametrize(
    ("expect", "meets"),
    [
        ({"n": 1}, True),
        ({"user_id": 1, "n": 1, "l": [1, {"a": "ü"}]}, True),
        ({"missing": None}, True),
        ({"nothing": None}, True),
        ({}, True),
        ({"n": "1"}, False),
        ({"user_id": 2}, False),
        ({"user_id": "1"}, False),
        ({"n": 1, "user_id": 2}, False),
        ({"user_id": None}, False),
        ({"missing": 1}, False),
        ({"unreadable": None}, False),
        ({"unreadable": "x"}, False),
    ],
)
async def test_delete_expects(store: SessionStore, keyspace: Keyspace, expect: dict[str, Any], *, meets: bool) -> None:
    """`delete` ends the session only if the fields hold the expected values; other fields may be unreadable."""
    await store.set("a", {"n": 1, "user_id": 1, "nothing": None, "l": [1, {"a": "ü"}], "unreadable": "?"})
    before = await keyspace.dump()
    await keyspace.client.hset(store.get_session_key("a"), "unreadable", b"\xff")
    assert await store.delete("a", expect=expect, reason="bye") is meets
    if meets:
        assert await keyspace.dump() == {"{a}": {"_ended": "bye"}}
    else:
        await keyspace.client.hset(store.get_session_key("a"), "unreadable", "?")
        assert await keyspace.dump() == before


async def test_delete_expects_of_no_session(store: SessionStore, keyspace: Keyspace) -> None:
    """`delete` with `expect` returns False if there is no session; an existing tombstone keeps its reason."""
    for expect in ({}, {"n": None}, {"n": 1}):
        assert not await store.delete("a", expect=expect)
    assert await keyspace.dump() == {}
    await store.set("a", {"n": 1})
    await store.delete("a", reason="first")
    for expect in ({}, {"n": None}, {"n": 1}):
        assert not await store.delete("a", expect=expect, reason="second")
    assert await keyspace.dump() == {"{a}": {"_ended": "first"}}


async def test_delete_expects_by_an_old_id(store: SessionStore, keyspace: Keyspace) -> None:
    """During grace, `delete` by the old id compares the current values of the session."""
    await store.set("a", {"user_id": 1})
    new = await store.rotate("a", grace="1m")
    await store.set(new, {"user_id": 2})
    assert not await store.delete("a", expect={"user_id": 1})
    assert await store.get(new) == {"id": new, "user_id": 2}
    assert await store.delete("a", expect={"user_id": 2})
    assert await store.ended(new) == "deleted"
    assert (await keyspace.dump())[f"{{{new}}}"] == {"_ended": "deleted"}


async def test_a_late_write_is_refused(store: SessionStore, keyspace: Keyspace) -> None:
    """A write to a session that was ended raises SessionEnded and changes nothing."""
    await store.set("a", ALICE)
    await store.delete("a", reason="password")
    before = await keyspace.dump()
    for write in (
        store.set("a", {"user_id": 1}),
        store.set("a", {"user_id": 1}, create=False),
        store.set("a", {"user_id": 1}, expect={"user_id": 1}),
        store.unset("a", ["name"]),
        store.pop("a", ["name"]),
        store.increment("a", "n"),
        store.rotate("a"),
    ):
        with pytest.raises(SessionEnded) as raised:
            await write
        assert raised.value.reason == "password"
    assert not await store.touch("a")
    assert await store.get("a", touch=True) == {}
    assert await keyspace.dump() == before


async def test_rotate_gives_a_new_id(store: SessionStore, keyspace: Keyspace) -> None:
    """`rotate` keeps data, references and TTL, writes new values, and ends the old id."""
    await store.set("a", ALICE, "1 day")
    created = await keyspace.client.hget(f"{keyspace.prefix}:{{a}}", "_created")
    new = await store.rotate("a", {"user_id": 2, "theme": "dark"})
    assert await keyspace.dump() == {
        "{a}": {"_ended": "rotated"},
        f"{{{new}}}": {"id": new, "user_id": "2", "ip": "::1", "name": "alice", "theme": "dark"},
        "user_id:{2}": {new},
        "ip:{::1}": {new},
    }
    assert await keyspace.client.hget(f"{keyspace.prefix}:{{{new}}}", "_created") == created
    assert DAY - 60_000 < await keyspace.ttl(f"{{{new}}}") <= DAY
    assert await store.get("a") == {}
    assert await store.ended("a") == "rotated"
    with pytest.raises(SessionEnded):
        await store.rotate("a")
    with pytest.raises(SessionNotFound):
        await store.rotate("b")


async def test_rotate_may_give_another_lifetime(store: SessionStore, keyspace: Keyspace) -> None:
    """`rotate` can give the session another lifetime, which later renewals keep."""
    await store.set("a", ALICE, "1h")
    new = await store.rotate("a", {"user_id": 2}, "2 days")
    for _ in range(2):
        assert DAY < await keyspace.ttl(f"{{{new}}}") <= 2 * DAY
        for key in ("user_id:{2}", "ip:{::1}"):
            assert await keyspace.ttl(f"{{{new}}}") <= await keyspace.ttl(key) <= 2 * DAY * SLACK
        await store.set(new, {"name": "bob"})


async def test_rotate_with_grace_lets_the_old_id_lead_to_the_new(store: SessionStore, keyspace: Keyspace) -> None:
    """During grace, calls by the old id work on the session, except for `rotate`."""
    await store.set("a", ALICE)
    b = await store.rotate("a", grace="30s")
    c = await store.rotate(b, grace="30s")
    for old in ("a", b):
        assert await store.get(old) == {"id": c, **ALICE}
        assert await store.get(old, ["name"], touch=True) == {"id": c, "name": "alice"}
        assert await store.ended(old) is None
        assert await store.touch(old)
        assert await store.ttl(old)
        with pytest.raises(SessionEnded):
            await store.rotate(old)
    await store.set("a", {"user_id": 2}, create=False, expect={"user_id": 1})
    assert await store.increment("a", "n") == 1
    assert await store.pop("a", ["name"]) == {"name": "alice"}
    await store.unset("a", ["ip"])
    dump = await keyspace.dump()
    assert dump[f"{{{c}}}"] == {"id": c, "user_id": "2", "n": "1"}
    assert dump["user_id:{2}"] == {c}
    assert set(dump) == {"{a}", f"{{{b}}}", f"{{{c}}}", "user_id:{2}"}
    assert await store.delete("a", reason="bye")
    assert await store.ended("a") == "bye"
    assert await store.ended(c) == "bye"


async def test_grace_passes(store: SessionStore) -> None:
    """After its grace the old id has ended, and the session lives on under the new id."""
    await store.set("a", ALICE)
    new = await store.rotate("a", grace=0.001)
    while await store.get("a"):
        pass
    assert await store.ended("a") == "rotated"
    with pytest.raises(SessionEnded):
        await store.set("a", {"x": 1})
    assert await store.get(new) == {"id": new, **ALICE}


async def test_ttl_tells_what_is_left(store: SessionStore) -> None:
    """`ttl` returns the time that a session has left, or None if there is no session."""
    await store.set("a", {}, timedelta(hours=1))
    left = await store.ttl("a")
    assert left is not None
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    await store.delete("a")
    assert await store.ttl("a") is None
    assert await store.ttl("b") is None


async def test_find_by_reads_the_sessions_with_a_value(store: SessionStore, keyspace: Keyspace) -> None:
    """`find_by` yields the sessions with a value, `ids_by` returns their ids, and `count_by` their number."""
    await store.set("a", {"user_id": 1, "name": "x"})
    await store.set("b", {"user_id": [1, 2]})
    await store.set("c", {"user_id": 2})
    found = [session async for session in store.find_by("user_id", "1")]
    assert sorted(found, key=str) == [
        {"id": "a", "user_id": 1, "name": "x"},
        {"id": "b", "user_id": [1, 2]},
    ]
    some = [session async for session in store.find_by("user_id", 2, ["name"])]
    assert sorted(some, key=str) == [{"id": "b"}, {"id": "c"}]
    assert sorted(await store.ids_by("user_id", 1)) == ["a", "b"]
    assert await store.count_by("user_id", 2) == 2
    assert await store.ids_by("user_id", 3) == []
    assert await store.count_by("user_id", 3) == 0
    assert len(await keyspace.dump()) == 5


async def test_fields_that_hold_names_of_the_library(store: SessionStore) -> None:
    """A value is never taken for the name of a field."""
    for session_id in "ab":
        await store.set(session_id, {"kind": "id", "user_id": "_ended"})
    found = [session async for session in store.find_by("user_id", "_ended")]
    assert sorted(found, key=str) == [{"id": i, "kind": "id", "user_id": "_ended"} for i in "ab"]


async def test_reading_by_reference_removes_dead_ids(store: SessionStore, keyspace: Keyspace) -> None:
    """A read by reference removes the ids of expired sessions from the set."""
    await store.set("a", {"user_id": 1})
    await store.set("b", {"user_id": 1})
    await keyspace.expire("{b}")
    assert (await keyspace.dump())["user_id:{1}"] == {"a", "b"}
    assert await store.ids_by("user_id", 1) == ["a"]
    assert (await keyspace.dump())["user_id:{1}"] == {"a"}


async def test_delete_by_ends_all_sessions_with_a_value(store: SessionStore, keyspace: Keyspace) -> None:
    """`delete_by` ends all sessions with a value except those to keep, and removes ids of expired sessions."""
    for name in "abcd":
        await store.set(name, {"user_id": 1, "ip": name})
    await store.set("e", {"user_id": 2, "ip": "a"})
    await keyspace.expire("{d}")
    assert await store.delete_by("user_id", 1, keep=["c", "unknown"], reason="password") == 2
    assert await keyspace.dump() == {
        "{a}": {"_ended": "password"},
        "{b}": {"_ended": "password"},
        "{c}": {"id": "c", "user_id": "1", "ip": "c"},
        "{e}": {"id": "e", "user_id": "2", "ip": "a"},
        "user_id:{1}": {"c"},
        "user_id:{2}": {"e"},
        "ip:{a}": {"e"},
        "ip:{c}": {"c"},
        "ip:{d}": {"d"},  # This set was not read, so it still holds the id of the expired session.
    }
    assert await store.delete_by("user_id", 1, keep=["c"]) == 0
    assert await store.delete_by("user_id", 9) == 0


async def test_count_by_may_count_too_many(store: SessionStore, keyspace: Keyspace) -> None:
    """With `exact=False`, `count_by` returns the size of the set, which may include expired sessions."""
    await store.set("a", {"user_id": 1})
    await store.set("b", {"user_id": [1, 2]})
    await store.set("c", {"user_id": 1})
    await keyspace.expire("{b}")
    before = await keyspace.dump()
    assert await store.count_by("user_id", 1, exact=False) == 3
    assert await store.count_by("user_id", "2", exact=False) == 1
    assert await store.count_by("user_id", 3, exact=False) == 0
    assert await keyspace.dump() == before
    assert await store.count_by("user_id", 1) == 2
    assert await store.count_by("user_id", 1, exact=False) == 2


@pytest.mark.parametrize("others", [2, 120], ids=["one page", "several pages"])
async def test_keep_follows_grace(store: SessionStore, keyspace: Keyspace, others: int) -> None:
    """`keep` accepts the old id of a session that was rotated with grace, once or twice."""
    for session_id in ("a", "b", "c", "d", "gone"):
        await store.set(session_id, {"user_id": 1})
    a = await store.rotate("a", grace="1m")
    b = await store.rotate(await store.rotate("b", grace="1m"), grace="1m")
    c = await store.rotate("c")  # Without grace the old id leads nowhere.
    d = await store.rotate("d", {"user_id": 2}, grace="1m")
    await store.delete("gone")
    for _ in range(others):
        await store.create({"user_id": 1})
    assert await store.delete_by("user_id", 1, keep=["a", "b", "c", "d", "gone", "unknown"]) == others + 1
    assert sorted(await store.ids_by("user_id", 1)) == sorted([a, b])
    assert await store.ended(c) == "deleted"
    assert await store.ids_by("user_id", 2) == [d]
    assert (await keyspace.dump())["user_id:{1}"] == {a, b}


async def test_block_and_unblock(store: SessionStore, keyspace: Keyspace) -> None:
    """`block` ends the sessions of a value, and no session can join the value until `unblock`."""
    await store.set("a", {"user_id": 1})
    assert await store.blocked("user_id", 1) is None
    assert await store.block("user_id", 1, timedelta(hours=1), reason="stolen") == 1
    left = await store.blocked("user_id", "1")
    assert left is not None
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    with pytest.raises(Blocked) as raised:
        await store.set("b", {"user_id": 1})
    assert raised.value.reason == "stolen"
    assert await store.unblock("user_id", 1)
    assert not await store.unblock("user_id", 1)
    await store.set("b", {"user_id": 1})
    assert await keyspace.dump() == {
        "{a}": {"_ended": "stolen"},
        "{b}": {"id": "b", "user_id": "1"},
        "user_id:{1}": {"b"},
    }


async def test_find_by_yields_what_is_readable(store: SessionStore, keyspace: Keyspace) -> None:
    """`find_by` skips unreadable sessions, and raises an error with their number at the end."""
    for session_id in "abcde":
        await store.set(session_id, {"user_id": 1, "x": session_id})
    for session_id in "bd":
        await keyspace.client.hset(store.get_session_key(session_id), "x", b"\xff")
    found = []
    with pytest.raises(SessionError, match="^2 sessions hold data that is not readable"):  # noqa: PT012
        async for session in store.find_by("user_id", 1):
            found.append(session["x"])  # noqa: PERF401 - the sessions before the error are checked
    assert sorted(found) == ["a", "c", "e"]
    assert sorted(await store.ids_by("user_id", 1)) == [*"abcde"]
    assert await store.count_by("user_id", 1) == 5
    some = [session["id"] async for session in store.find_by("user_id", 1, ["user_id"])]
    assert sorted(some) == [*"abcde"]
    with pytest.raises(SessionError, match="the field 'x' holds data that is not readable"):
        await store.get("b")
    assert await store.delete_by("user_id", 1) == 5


async def test_what_is_left_out_is_counted_over_all_pages(store: SessionStore, keyspace: Keyspace) -> None:
    """`find_by` counts each unreadable session once, over all pages."""
    for n in range(120):
        await store.set(f"s{n}", {"user_id": 1, "x": n})
    for n in range(0, 120, 2):
        await keyspace.client.hset(store.get_session_key(f"s{n}"), "x", b"\xff")
    found = []
    with pytest.raises(SessionError, match="^60 sessions hold data"):  # noqa: PT012
        async for session in store.find_by("user_id", 1, ["x"]):
            found.append(session["x"])  # noqa: PERF401 - the sessions before the error are checked
    assert sorted(found) == [*range(1, 120, 2)]


async def test_finds_of_one_moment_read_their_own_fields(store: SessionStore) -> None:
    """Searches for different values and fields at the same moment each find their own."""
    ids = [await store.create({"user_id": n % 3, "n": n}) for n in range(12)]

    async def found(user: int, fields: list[str] | None) -> dict[str, dict[str, Any]]:
        return {session["id"]: session async for session in store.find_by("user_id", user, fields)}

    wanted = [None, ["n"], ["n", "user_id"], ["user_id", "n", "absent"]]
    searches = [(user, fields) for fields in wanted for user in range(3)]
    results = await asyncio.gather(*(found(user, fields) for user, fields in searches))
    for (user, fields), sessions in zip(searches, results, strict=True):
        own = {ids[n]: {"id": ids[n], "user_id": user, "n": n} for n in range(user, 12, 3)}
        keep = {"id", "user_id", "n"} if fields is None else {"id", *fields}
        assert sessions == {
            session_id: {name: value for name, value in session.items() if name in keep}
            for session_id, session in own.items()
        }


async def test_a_session_on_two_pages_is_seen_once(
    store: SessionStore, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that is on two pages, as after a rehash of the set, is yielded and counted once."""
    for session_id in "abc":
        await store.set(session_id, {"user_id": 1, "x": session_id})
    await keyspace.client.hset(store.get_session_key("b"), "x", b"\xff")
    find_by, cursors = store.operations.find_by, list[bytes]()

    async def again(
        field: str, value: object, fields: Sequence[str] | None, positions: Sequence[Position], *, begun: bool = False
    ) -> list[Found]:
        cursors.extend(at.cursor for at in positions)
        pages = await find_by(field, value, fields, [Position(at.partition) for at in positions], begun=begun)
        return [
            page if at.cursor == b"1" else Found(page.sessions, at._replace(cursor=b"1"))
            for at, page in zip(positions, pages, strict=True)
        ]

    monkeypatch.setattr(store.operations, "find_by", again)
    found = []
    with pytest.raises(SessionError, match="hold data that is not readable"):  # noqa: PT012
        async for session in store.find_by("user_id", 1):
            found.append(session["id"])  # noqa: PERF401 - the sessions before the error are checked
    assert sorted(found) == ["a", "c"]
    assert cursors.count(b"") == cursors.count(b"1") > 0


async def test_as_much_as_a_call_may_have(store: SessionStore, keyspace: Keyspace) -> None:
    """The store accepts 1,000 fields, 128 reference values and 1,000 ids to keep in one call."""
    fields = {f"f{n}": n for n in range(998)}
    values: dict[str, Any] = {**fields, "user_id": [*range(64)], "ip": [*range(64)]}
    await store.set("a", values, expect={f"f{n}": None for n in range(1000)})
    assert await store.get("a") == {"id": "a", **values}
    assert await store.get("a", [*values]) == {"id": "a", **values}
    assert await store.pop("a", [*fields, "user_id", "ip"]) == values
    await store.set("a", {**fields, "user_id": 1}, expect={"id_": None})
    await store.unset("a", [*fields, "x", "y"])
    assert await store.delete_by("user_id", 1, keep=["a", *(f"k{n}" for n in range(999))]) == 0
    assert await store.delete("a", expect={f"f{n}": None for n in range(1000)})
    assert await keyspace.dump() == {"{a}": {"_ended": "deleted"}}


async def test_key_names(store: SessionStore, keyspace: Keyspace) -> None:
    """The names of keys are those of the Node original; in partitions, each has the tag of its partition."""
    await store.set("a", {"user_id": 1})
    if keyspace.partitions:
        tag = {16: "4i4", 64: "6bk"}[keyspace.partitions]
        assert store.get_session_key("a") == f"{keyspace.prefix}:{{{tag}}}:s:a"
        keys = store.get_reference_keys("user_id", 1)
        assert len(keys) == len(set(keys)) == keyspace.partitions
        held = [key for key in keys if await keyspace.client.exists(key)]
        assert held == [f"{keyspace.prefix}:{{{tag}}}:r:user_id:1"]
        with pytest.raises(ValueError, match="use get_reference_keys"):
            store.get_reference_key("user_id", 1)
        return
    assert store.get_session_key("a") == f"{keyspace.prefix}:{{a}}"
    assert store.get_reference_key("user_id", 1) == f"{keyspace.prefix}:user_id:{{1}}"
    assert await keyspace.client.smembers(store.get_reference_key("user_id", "1")) == {"a"}
    assert len(store.create_session_id()) == 32


async def test_a_store_can_be_opened_again(store: SessionStore) -> None:
    """A closed store refuses calls until it is opened again."""
    for _ in range(2):
        async with store:
            await store.set("a", {})
        with pytest.raises(RuntimeError, match="the store is closed"):
            await store.get("a")
