"""The identity of a session stays under one id, and changes only with a new id."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from rss import (
    Conflict,
    IdentityChanged,
    LimitExceeded,
    Reference,
    SessionEnded,
    SessionError,
    SessionNotFound,
    SessionStore,
    TextCodec,
)
from rss.keys import Partitioned
from tests.keyspace import Keyspace

Write = Callable[[SessionStore, str], Awaitable[object]]


pytestmark = pytest.mark.parametrize(
    ("client", "keyspace"),
    [({}, None), ({}, 16), ("cluster", "cluster")],
    indirect=True,
    ids=["plain", "16", "cluster"],
)


def new_store(client: Redis, keyspace: Keyspace, **options: Any) -> SessionStore:
    """Return a store whose sessions belong to a user, or to nobody."""
    options.setdefault("references", {"user_id": Reference(identity=True), "ip": Reference()})
    return SessionStore(client, prefix=keyspace.prefix, partitions=keyspace.partitions, **options)


def home(keyspace: Keyspace, user: int) -> int | None:
    """Return the partition of the sessions of a user."""
    return Partitioned(keyspace.prefix, 24, keyspace.partitions or 1, "user_id").home([("user_id", str(user))])


@pytest.fixture(name="store")
def _store(client: Redis, keyspace: Keyspace) -> SessionStore:
    return new_store(client, keyspace)


#: A session, and writes that would change its identity.
CHANGES: dict[str, tuple[dict[str, Any], Write]] = {
    "set another": ({"user_id": 1}, lambda s, i: s.set(i, {"user_id": 2})),
    "set one": ({}, lambda s, i: s.set(i, {"user_id": 1})),
    "set one where it is None": ({"user_id": None}, lambda s, i: s.set(i, {"user_id": 1})),
    "set None": ({"user_id": 1}, lambda s, i: s.set(i, {"user_id": None})),
    "set with other fields": ({"user_id": 1}, lambda s, i: s.set(i, {"ip": "y", "x": 2, "user_id": 2})),
    "set with max_age": ({"user_id": 1}, lambda s, i: s.set(i, {"user_id": 2}, "1h")),
    "set without create": ({"user_id": 1}, lambda s, i: s.set(i, {"user_id": 2}, create=False)),
    "set that expects the old one": ({"user_id": 1}, lambda s, i: s.set(i, {"user_id": 2}, expect={"user_id": 1})),
    "set that expects None": ({}, lambda s, i: s.set(i, {"user_id": 2}, expect={"user_id": None})),
    "unset": ({"user_id": 1}, lambda s, i: s.unset(i, ["user_id"])),
    "unset with other fields": ({"user_id": 1}, lambda s, i: s.unset(i, ["x", "user_id", "ip"], "1h")),
    "pop": ({"user_id": 1}, lambda s, i: s.pop(i, ["user_id"])),
    "pop with other fields": ({"user_id": 1}, lambda s, i: s.pop(i, ["x", "user_id"])),
    "text that looks alike": ({"user_id": "1"}, lambda s, i: s.set(i, {"user_id": "01"})),
    "text with an escape": ({"user_id": 'a"b'}, lambda s, i: s.set(i, {"user_id": "a\\b"})),
}


@pytest.mark.parametrize("case", CHANGES)
async def test_a_write_that_would_change_the_identity(store: SessionStore, keyspace: Keyspace, case: str) -> None:
    """A write that would change the identity raises IdentityChanged and writes nothing, also by an old id."""
    values, write = CHANGES[case]
    a = store.create_session_id(values.get("user_id"))
    await store.set(a, {"ip": "x", "x": 1, **values}, "2h")
    new = await store.rotate(a, grace="1m")
    before, ttl = await keyspace.dump(), await keyspace.ttl(f"{{{new}}}")
    for session_id in (new, a):
        with pytest.raises(IdentityChanged, match="a session keeps its identity") as raised:
            await write(store, session_id)
        assert isinstance(raised.value, SessionError)
        assert not isinstance(raised.value, SessionNotFound | Conflict | LimitExceeded)
        assert await keyspace.dump() == before
        assert ttl - 60_000 < await keyspace.ttl(f"{{{new}}}") <= ttl


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"user_id": 1}, {"user_id": 1}),
        ({"user_id": 1}, {"user_id": "1"}),
        ({"user_id": "1"}, {"user_id": 1}),
        ({"user_id": 'a"b'}, {"user_id": 'a"b'}),
        ({"user_id": "[1]"}, {"user_id": "[1]"}),
        ({"user_id": "null"}, {"user_id": "null"}),
        ({"user_id": 2**63}, {"user_id": str(2**63)}),
        ({"user_id": None}, {"user_id": None}),
        ({}, {"user_id": None}),
        ({}, {}),
        ({"user_id": 1}, {"ip": "y"}),
    ],
)
async def test_a_write_that_keeps_the_identity(
    store: SessionStore, keyspace: Keyspace, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """The values 1 and "1" are the same identity, and so are None and no value."""
    a = store.create_session_id(before.get("user_id"))
    await store.set(a, {"ip": "x", **before})
    await store.set(a, {"x": 1, **after})
    assert await store.get(a) == {"id": a, "ip": "x", **before, "x": 1, **after}
    value = (before | after).get("user_id")
    dump = await keyspace.dump()
    assert {name for name in dump if name.startswith("user_id")} == ({f"user_id:{{{value}}}"} if value else set())
    assert dump[f"ip:{{{after.get('ip', 'x')}}}"] == {a}


@pytest.mark.parametrize("values", [{"user_id": None, "x": 1}, {"x": 1}])
async def test_nobody_may_be_taken_out(store: SessionStore, keyspace: Keyspace, values: dict[str, Any]) -> None:
    """An identity that is None or absent may be removed, since the session stays anonymous."""
    a = store.create_session_id()
    await store.set(a, values)
    assert await store.pop(a, ["user_id"]) == {field: None for field in values if field == "user_id"}
    await store.set(a, {"user_id": None})
    await store.unset(a, ["user_id", "x"])
    assert await keyspace.dump() == {f"{{{a}}}": {"id": a}}


async def test_a_new_session_may_have_any_identity(store: SessionStore, keyspace: Keyspace) -> None:
    """A new session may have any identity, even under the id of an expired session of another user."""
    created = await store.create({"user_id": 1})
    a, b = store.create_session_id(1), store.create_session_id(2)
    other = next(user for user in range(3, 3000) if home(keyspace, user) == home(keyspace, 1))
    await store.set(a, {"user_id": 1})
    await store.set(b, {"user_id": 2}, expect={"user_id": None})
    await keyspace.expire(f"{{{a}}}")
    await store.set(a, {"user_id": other})
    assert await store.ids_by("user_id", 1) == [created]
    assert await keyspace.dump() == {
        f"{{{created}}}": {"id": created, "user_id": "1"},
        f"{{{a}}}": {"id": a, "user_id": f"{other}"},
        f"{{{b}}}": {"id": b, "user_id": "2"},
        "user_id:{1}": {created},
        "user_id:{2}": {b},
        f"user_id:{{{other}}}": {a},
    }


async def test_other_references_change_freely(store: SessionStore, keyspace: Keyspace) -> None:
    """References other than the identity may change freely."""
    a = store.create_session_id(1)
    await store.set(a, {"user_id": 1, "ip": "x"})
    await store.set(a, {"ip": ["y", "z"]})
    await store.set(a, {"user_id": "1", "ip": "y"})
    assert await store.pop(a, ["ip"]) == {"ip": "y"}
    assert await keyspace.dump() == {f"{{{a}}}": {"id": a, "user_id": '"1"'}, "user_id:{1}": {a}}


async def test_a_conflict_comes_before_the_identity(store: SessionStore, keyspace: Keyspace) -> None:
    """A write whose expectation fails raises Conflict, even if it would also change the identity."""
    a = store.create_session_id(1)
    await store.set(a, {"user_id": 1})
    before = await keyspace.dump()
    with pytest.raises(Conflict):
        await store.set(a, {"user_id": 2}, expect={"user_id": 3})
    assert await keyspace.dump() == before


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, {"user_id": 1}), ({"user_id": 1}, {"user_id": 2}), ({"user_id": 1}, {"user_id": None})],
    ids=["sign in", "change", "sign out"],
)
async def test_rotate_changes_the_identity(
    store: SessionStore, keyspace: Keyspace, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """`rotate` may change the identity; then the old id gets no grace, even if grace was asked for."""
    a = store.create_session_id(before.get("user_id"))
    await store.set(a, {"ip": "x", **before})
    new = await store.rotate(a, after, grace="1h")
    value = after["user_id"]
    users = {f"user_id:{{{value}}}": {new}} if value else {}
    assert await keyspace.dump() == {
        f"{{{a}}}": {"_ended": "rotated"},
        f"{{{new}}}": {"id": new, "ip": "x", "user_id": str(value) if value else "null"},
        "ip:{x}": {new},
        **users,
    }
    assert await keyspace.ttl(f"{{{a}}}") <= 300_000
    assert await store.get(a) == {}
    with pytest.raises(SessionEnded, match="rotated"):
        await store.set(a, {"x": 1})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"user_id": 1}, {}),
        ({"user_id": 1}, {"user_id": 1}),
        ({"user_id": 1}, {"user_id": "1"}),
        ({}, {}),
        ({}, {"user_id": None}),
        ({"user_id": None}, {"user_id": None}),
        ({"user_id": 1}, {"ip": "y"}),
    ],
)
async def test_rotate_that_keeps_the_identity_gives_grace(
    store: SessionStore, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """`rotate` that keeps the identity gives the old id its grace."""
    a = store.create_session_id(before.get("user_id"))
    await store.set(a, before)
    new = await store.rotate(a, after, grace="1h")
    assert await store.get(a) == {"id": new, **before, **after}


async def test_no_chain_of_grace_leads_past_a_login(store: SessionStore) -> None:
    """No old id leads past a login, not even an id that was rotated with grace before."""
    await store.set("planted", {"cart": [1]})
    before = await store.rotate("planted", grace="1h")
    assert (await store.get("planted"))["id"] == before
    after = await store.rotate(before, {"user_id": 7}, grace="1h")
    assert await store.get(after) == {"id": after, "cart": [1], "user_id": 7}
    for old in ("planted", before):
        assert await store.get(old) == {}
        assert not await store.touch(old)
        assert not await store.delete(old)
        for write in (store.set(old, {"x": 1}), store.increment(old, "n"), store.rotate(old, {"user_id": 8})):
            with pytest.raises(SessionEnded, match="rotated"):
                await write
    assert await store.get(after) == {"id": after, "cart": [1], "user_id": 7}


async def test_two_logins_of_one_session(store: SessionStore, keyspace: Keyspace) -> None:
    """Of two logins of one session, one succeeds and the other raises SessionEnded."""
    a = store.create_session_id()
    await store.set(a, {"cart": [1]})
    results = await asyncio.gather(
        store.rotate(a, {"user_id": 1}), store.rotate(a, {"user_id": 2}), return_exceptions=True
    )
    assert [type(result) for result in results] in ([str, SessionEnded], [SessionEnded, str])
    (new,) = [result for result in results if isinstance(result, str)]
    user = results.index(new) + 1
    dump = await keyspace.dump()
    for name in [name for name, held in dump.items() if held == {"_ended": "deleted"}]:
        assert keyspace.partitions
        del dump[name]  # The copy in the partition of the other user.
    assert dump == {
        f"{{{a}}}": {"_ended": "rotated"},
        f"{{{new}}}": {"id": new, "cart": "[1]", "user_id": str(user)},
        f"user_id:{{{user}}}": {new},
    }


async def test_a_write_beside_a_login(store: SessionStore) -> None:
    """A request that read the session before a login cannot write the old identity into it."""
    a = store.create_session_id()
    await store.set(a, {"user_id": None})
    new = await store.rotate(a, {"user_id": 1})
    with pytest.raises(SessionEnded):
        await store.set(a, {"user_id": None})
    with pytest.raises(IdentityChanged):
        await store.set(new, {"user_id": None})
    assert await store.get(new) == {"id": new, "user_id": 1}


async def test_an_identity_may_be_limited_and_strict(client: Redis, keyspace: Keyspace) -> None:
    """An identity may have a limit and be strict, like any reference."""
    reference = Reference(identity=True, limit=1, strict=True)
    store = new_store(client, keyspace, references={"user_id": reference})
    a = store.create_session_id(1)
    await store.set(a, {"user_id": 1})
    await store.set("b", {})
    c = await store.rotate("b", {"user_id": 1})
    assert await store.ended(a) == "evicted"
    with pytest.raises(IdentityChanged):
        await store.set(c, {"user_id": 2})
    await keyspace.client.delete(store.get_reference_key("user_id", 1))
    with pytest.raises(SessionEnded, match="revoked"):
        await store.set(c, {"user_id": 2})


async def test_an_identity_that_is_text(client: Redis, keyspace: Keyspace) -> None:
    """With TextCodec, 1 and "1" are the same identity."""
    references = {"user_id": Reference(identity=True)}
    store = new_store(client, keyspace, references=references, codec=TextCodec())
    a = store.create_session_id(1)
    await store.set(a, {"user_id": 1})
    await store.set(a, {"user_id": "1"})
    for write in (store.set(a, {"user_id": "2"}), store.pop(a, ["user_id"])):
        with pytest.raises(IdentityChanged):
            await write
    new = await store.rotate(a, {"user_id": 2})
    assert await keyspace.dump() == {
        f"{{{a}}}": {"_ended": "rotated"},
        f"{{{new}}}": {"id": new, "user_id": "2"},
        "user_id:{2}": {new},
    }


@pytest.mark.parametrize("value", [[1], [1, 2], []])
async def test_an_identity_is_no_list(store: SessionStore, keyspace: Keyspace, value: list[int]) -> None:
    """A list as the identity is refused, since a session belongs to one user."""
    a = store.create_session_id(1)
    await store.set(a, {"user_id": 1})
    before = await keyspace.dump()
    for write in (
        store.create({"user_id": value}),
        store.set(a, {"user_id": value}),
        store.set("b", {"user_id": value}),
        store.rotate(a, {"user_id": value}),
    ):
        with pytest.raises(ValueError, match="'user_id' is the identity: it has one value, not a list"):
            await write
    assert await keyspace.dump() == before


async def test_the_identity_may_be_any_of_the_references(client: Redis, keyspace: Keyspace) -> None:
    """The identity need not be the first of the references."""
    references = {"ip": Reference(), "tags": Reference(), "user_id": Reference(identity=True)}
    store = new_store(client, keyspace, references=references)
    a = store.create_session_id(1)
    await store.set(a, {"user_id": 1, "ip": "x", "tags": ["t"]})
    await store.set(a, {"ip": "y", "tags": []})
    before = await keyspace.dump()
    for write in (
        store.set(a, {"ip": "z", "user_id": 2}),
        store.set(a, {"tags": ["u"], "ip": "z", "user_id": 2}),
        store.unset(a, ["ip", "tags", "user_id"]),
    ):
        with pytest.raises(IdentityChanged):
            await write
        assert await keyspace.dump() == before
