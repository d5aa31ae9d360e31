"""Blocking a value ends its sessions, and no session can join it for a while."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from rss import Blocked, LimitExceeded, Reference, SessionEnded, SessionStore, StoreUnavailable
from tests.keyspace import Content, Keyspace

HOUR = 3_600_000


async def _until(keyspace: Keyspace, name: str) -> datetime:
    """Return the time until which a fence blocks its value."""
    milliseconds = await keyspace.client.hget(f"{keyspace.prefix}:{name}", "until")
    assert milliseconds
    return datetime.fromtimestamp(int(milliseconds) / 1000, UTC)


async def _dump(keyspace: Keyspace) -> dict[str, Content]:
    """Return all keys, without the time until which a value is blocked, and without the names of calls."""
    dump = await keyspace.dump()
    for held in dump.values():
        if isinstance(held, dict):
            for field in [name for name in held if name == "until" or name.startswith("call:")]:
                del held[field]
    return dump


async def test_block_ends_all_sessions_and_lets_none_join(store: SessionStore, keyspace: Keyspace) -> None:
    """`block` ends all sessions of a value with the reason, and leaves a fence that refuses others."""
    for session_id in "ab":
        await store.set(session_id, {"user_id": 1, "ip": "x"})
    await store.set("c", {"user_id": 2, "ip": "x"})
    assert await store.block("user_id", 1, "1h", reason="stolen") == 2
    expected: dict[str, Content] = {
        "{a}": {"_ended": "stolen"},
        "{b}": {"_ended": "stolen"},
        "{c}": {"id": "c", "user_id": "2", "ip": "x"},
        "user_id:{2}": {"c"},
        "ip:{x}": {"c"},
        "_fence:user_id:{1}": {"why": "stolen"},
    }
    assert await _dump(keyspace) == expected
    ttl = timedelta(milliseconds=await keyspace.ttl("_fence:user_id:{1}"))
    left = await store.blocked("user_id", 1)
    assert left is not None
    assert timedelta(minutes=59) < left <= ttl <= timedelta(hours=1)
    with pytest.raises(Blocked):
        await store.create({"user_id": 1})
    assert await _dump(keyspace) == expected


async def test_blocked_says_why_and_until_when(store: SessionStore, keyspace: Keyspace) -> None:
    """Blocked is a LimitExceeded with the field, the reason, and the end of the block in UTC."""
    await store.block("user_id", "alice", "1h", reason="pass-word_1")
    with pytest.raises(LimitExceeded) as raised:
        await store.create({"user_id": "alice"})
    error = raised.value
    assert isinstance(error, Blocked)
    assert (error.field, error.reason) == ("user_id", "pass-word_1")
    assert error.until == await _until(keyspace, "_fence:user_id:{alice}")
    assert error.until.tzinfo is UTC
    seconds, microseconds = await keyspace.client.time()
    now = datetime.fromtimestamp(seconds, UTC) + timedelta(microseconds=microseconds)
    assert timedelta(minutes=59) < error.until - now <= timedelta(hours=1)
    assert str(error) == "this value of 'user_id' is blocked: pass-word_1"


async def test_the_reason_is_blocked_if_none_is_given(store: SessionStore) -> None:
    """The default reason of a block is "blocked", also in the tombstones."""
    await store.set("a", {"user_id": 1})
    await store.block("user_id", 1, "1h")
    assert await store.ended("a") == "blocked"
    with pytest.raises(Blocked, match="is blocked: blocked"):
        await store.set("b", {"user_id": 1})


async def test_a_field_with_spaces_is_named(client: Redis, keyspace: Keyspace) -> None:
    """Blocked names a field that contains spaces as it is."""
    store = SessionStore(client, references=["a b c"], prefix=keyspace.prefix)
    await store.block("a b c", "x y", "1h")
    with pytest.raises(Blocked) as raised:
        await store.create({"a b c": "x y"})
    assert raised.value.field == "a b c"


JOINS: dict[str, Callable[[SessionStore], Awaitable[object]]] = {
    "create": lambda s: s.create({"user_id": 1, "ip": "y"}),
    "set a new session": lambda s: s.set("new", {"user_id": 1}),
    "set a session of nobody": lambda s: s.set("anonymous", {"user_id": 1, "x": 2}),
    "set a session of another": lambda s: s.set("other", {"user_id": 1, "ip": "y"}, "1h"),
    "set without create": lambda s: s.set("other", {"user_id": 1}, create=False),
    "set that expects": lambda s: s.set("other", {"user_id": 1}, expect={"user_id": 2}),
    "set as text": lambda s: s.set("other", {"user_id": "1"}),
    "rotate a session of nobody": lambda s: s.rotate("anonymous", {"user_id": 1}),
    "rotate a session of another": lambda s: s.rotate("other", {"user_id": 1, "x": 2}, "1h", grace="1m"),
    "create in a list": lambda s: s.create({"user_id": [3, 1]}),
    "set in a list": lambda s: s.set("other", {"user_id": [2, 1]}),
    "rotate in a list": lambda s: s.rotate("other", {"user_id": [1, 2]}),
}


@pytest.mark.parametrize("case", JOINS)
async def test_nothing_joins_a_value_that_is_blocked(store: SessionStore, keyspace: Keyspace, case: str) -> None:
    """A write that would put a session into the set of a blocked value raises Blocked and writes nothing."""
    await store.set("anonymous", {"x": 1})
    await store.set("other", {"user_id": 2, "x": 1})
    await store.block("user_id", 1, "1h")
    before = await keyspace.dump()
    with pytest.raises(Blocked) as raised:
        await JOINS[case](store)
    assert raised.value.field == "user_id"
    assert await keyspace.dump() == before


async def test_other_values_are_free(store: SessionStore, keyspace: Keyspace) -> None:
    """A block does not affect other values, or the same value of another field."""
    await store.set("a", {"ip": "1"})
    await store.block("user_id", 1, "1h")
    await store.set("a", {"user_id": 2, "ip": "1"})
    await store.set("b", {"user_id": "1x", "ip": 1})
    a = await store.rotate("a", {"user_id": [2, 11]})
    assert await _dump(keyspace) == {
        "{a}": {"_ended": "rotated"},
        f"{{{a}}}": {"id": a, "ip": '"1"', "user_id": "[2,11]"},
        "{b}": {"id": "b", "user_id": "1x", "ip": "1"},
        "user_id:{2}": {a},
        "user_id:{11}": {a},
        "user_id:{1x}": {"b"},
        "ip:{1}": {a, "b"},
        "_fence:user_id:{1}": {"why": "blocked"},
    }


@pytest.mark.parametrize("sessions", [3, 120], ids=["one page", "several pages"])
async def test_sessions_that_are_kept_go_on(store: SessionStore, keyspace: Keyspace, sessions: int) -> None:
    """Kept sessions can be written, renewed and rotated; one that leaves the blocked value cannot return."""
    await asyncio.gather(*(store.set(f"s{n}", {"user_id": 1}) for n in range(sessions)))
    assert await store.delete_by("user_id", 1, keep=["s0", "s1"], reason="password", block="1h") == sessions - 2
    await store.set("s0", {"user_id": 1, "x": 1})
    await store.set("s0", {"user_id": ["1", 2]})
    await store.set("s0", {"user_id": 1})
    assert await store.touch("s0", "90 days")
    assert await store.get("s0", touch=True) == {"id": "s0", "user_id": 1, "x": 1}
    new = await store.rotate("s0", {"user_id": 1}, grace="1m")
    new = await store.rotate(new)
    assert sorted(await store.ids_by("user_id", 1)) == sorted([new, "s1"])
    await store.set("s1", {"user_id": 2})
    with pytest.raises(Blocked):
        await store.set("s1", {"user_id": 1})
    dump = await _dump(keyspace)
    assert dump["user_id:{1}"] == {new}
    assert dump["user_id:{2}"] == {"s1"}
    assert dump["_fence:user_id:{1}"] == {"why": "password"}


async def test_a_login_that_checked_the_old_password(store: SessionStore) -> None:
    """A login that checked the old password is refused after the reset, until the block ends."""
    reset = asyncio.Event()

    async def login(session_id: str) -> str:
        # The old password was checked before the reset.
        await reset.wait()
        return await store.rotate(session_id, {"user_id": 1})

    await store.set("thief", {"user_id": 1})
    await store.set("mine", {"user_id": 1})
    await store.set("anonymous", {})
    late = asyncio.create_task(login("anonymous"))
    assert await store.delete_by("user_id", 1, keep=["mine"], reason="password", block="30s") == 1
    reset.set()
    with pytest.raises(Blocked, match="password"):
        await late
    assert await store.ids_by("user_id", 1) == ["mine"]
    assert await store.get("anonymous") == {"id": "anonymous"}
    assert await store.unblock("user_id", 1)
    assert await store.rotate("anonymous", {"user_id": 1})


async def test_logins_at_the_same_moment(store: SessionStore) -> None:
    """Each login at the moment of a block is either ended or refused, so no session is left."""
    results = await asyncio.gather(
        *(store.create({"user_id": 1}) for _ in range(150)),
        store.block("user_id", 1, "1h"),
        *(store.create({"user_id": 1}) for _ in range(150)),
        return_exceptions=True,
    )
    assert await store.ids_by("user_id", 1) == []
    assert await store.count_by("user_id", 1, exact=False) == 0
    ended = results[150]
    made = [result for result in results if isinstance(result, str)]
    refused = [result for result in results if isinstance(result, Blocked)]
    assert len(made) == ended
    assert len(made) + len(refused) == 300
    assert [await store.ended(session_id) for session_id in made] == ["blocked"] * len(made)


async def test_a_longer_block_stays(store: SessionStore, keyspace: Keyspace) -> None:
    """A shorter block does not replace a longer one, but a longer block does."""
    await store.block("user_id", 1, "1h", reason="first")
    until = await _until(keyspace, "_fence:user_id:{1}")
    await store.block("user_id", 1, "1m", reason="second")
    await store.delete_by("user_id", 1, reason="third")
    with pytest.raises(Blocked, match="first") as raised:
        await store.create({"user_id": 1})
    assert raised.value.until == until
    await store.delete_by("user_id", 1, reason="fourth", block="2h")
    with pytest.raises(Blocked, match="fourth") as raised:
        await store.create({"user_id": 1})
    assert timedelta(minutes=59) < raised.value.until - until <= timedelta(minutes=61)
    assert await keyspace.ttl("_fence:user_id:{1}") > HOUR


async def test_a_later_delete_by_does_not_shorten_a_block(store: SessionStore, keyspace: Keyspace) -> None:
    """A later `delete_by` does not shorten a block, not even one of several pages, which uses the same fence."""
    await asyncio.gather(*(store.set(f"s{n}", {"user_id": 1}) for n in range(120)))
    await store.delete_by("user_id", 1, keep=[f"s{n}" for n in range(100)], block="1h", reason="first")
    assert await store.delete_by("user_id", 1, reason="second") == 100
    ttl = timedelta(milliseconds=await keyspace.ttl("_fence:user_id:{1}"))
    left = await store.blocked("user_id", 1)
    assert left is not None
    assert timedelta(minutes=59) < left <= ttl
    with pytest.raises(Blocked, match="first"):
        await store.create({"user_id": 1})


async def test_a_block_passes(store: SessionStore, keyspace: Keyspace) -> None:
    """Sessions can join again after a block has passed, and its remains have no effect."""
    await store.block("user_id", 1, 0.05)
    while await store.blocked("user_id", 1):
        pass
    await store.set("a", {"user_id": 1})
    assert await keyspace.ttl("_fence:user_id:{1}") <= 300_000
    assert not await store.unblock("user_id", 1)
    assert await store.blocked("user_id", 1) is None
    new = await store.rotate("a")
    assert await keyspace.dump() == {
        "{a}": {"_ended": "rotated"},
        f"{{{new}}}": {"id": new, "user_id": "1"},
        "user_id:{1}": {new},
    }


async def test_unblock_lets_sessions_join(store: SessionStore, keyspace: Keyspace) -> None:
    """`unblock` lets sessions join again, returns whether the value was blocked, and leaves no key."""
    await store.block("user_id", 1, "1h")
    assert await store.unblock("user_id", "1")
    assert not await store.unblock("user_id", 1)
    assert not await store.unblock("ip", "x")
    assert await store.blocked("user_id", 1) is None
    assert await keyspace.dump() == {}
    await store.set("a", {"user_id": 1})
    assert await store.ids_by("user_id", 1) == ["a"]


async def test_unblock_leaves_the_rest_of_the_fence(store: SessionStore, keyspace: Keyspace) -> None:
    """`unblock` keeps the rest of the fence, which expires as it would without the block."""
    await asyncio.gather(*(store.set(f"s{n}", {"user_id": 1}) for n in range(120)))
    assert await store.block("user_id", 1, "1h") == 120
    assert await store.unblock("user_id", 1)
    dump = await _dump(keyspace)
    assert dump["_fence:user_id:{1}"] == {}
    assert await keyspace.ttl("_fence:user_id:{1}") <= 300_000
    assert await store.create({"user_id": 1})


async def test_blocked_of_a_value_that_is_not(store: SessionStore, keyspace: Keyspace) -> None:
    """`blocked` returns None for a value that is not blocked, and writes nothing."""
    await store.set("a", {"user_id": 1})
    before = await keyspace.dump()
    assert await store.blocked("user_id", 1) is None
    assert await store.blocked("user_id", 2) is None
    assert await keyspace.dump() == before


async def test_delete_by_without_a_block_blocks_nothing(store: SessionStore, keyspace: Keyspace) -> None:
    """Sessions can join a value at once after a `delete_by` without a block."""
    await store.set("a", {"user_id": 1})
    assert await store.delete_by("user_id", 1) == 1
    assert await store.blocked("user_id", 1) is None
    await store.set("b", {"user_id": 1})
    assert await keyspace.dump() == {
        "{a}": {"_ended": "deleted"},
        "{b}": {"id": "b", "user_id": "1"},
        "user_id:{1}": {"b"},
    }


async def test_a_value_without_sessions_is_blocked_too(store: SessionStore, keyspace: Keyspace) -> None:
    """A value without sessions can be blocked, and refuses its first session."""
    assert await store.delete_by("user_id", 1, block="1h") == 0
    with pytest.raises(Blocked, match="deleted"):
        await store.create({"user_id": 1})
    assert set(await keyspace.dump()) == {"_fence:user_id:{1}"}


async def test_a_block_lasts_longer_than_sessions(store: SessionStore, keyspace: Keyspace) -> None:
    """A block may last longer than any session, such as a year."""
    await store.block("user_id", 1, "365 days")
    assert await keyspace.ttl("_fence:user_id:{1}") > 364 * 24 * HOUR


@pytest.mark.parametrize("reference", [{"limit": 1}, {"limit": 1, "on_limit": "refuse"}, {"strict": True}])
async def test_a_block_of_another_kind_of_reference(
    client: Redis, keyspace: Keyspace, reference: dict[str, Any]
) -> None:
    """A block works with a reference that is strict or has a limit; a refused write evicts no session."""
    store = SessionStore(client, references={"user_id": Reference(**reference)}, prefix=keyspace.prefix)
    await store.set("a", {"user_id": 1})
    await store.set("b", {})
    await store.delete_by("user_id", 1, keep=["a"], block="1h")
    before = await keyspace.dump()
    for write in (store.set("b", {"user_id": 1}), store.create({"user_id": 1}), store.rotate("b", {"user_id": 1})):
        with pytest.raises(LimitExceeded):
            await write
        assert await keyspace.dump() == before
    await store.set("a", {"user_id": 1, "x": 1})
    assert await store.get(await store.rotate("a"))


async def test_an_identity_that_is_blocked(client: Redis, keyspace: Keyspace) -> None:
    """A login to a blocked identity is refused, and the session stays as it was."""
    references = {"user_id": Reference(identity=True)}
    store = SessionStore(client, references=references, prefix=keyspace.prefix)
    await store.set("a", {"cart": [1]})
    await store.block("user_id", 1, "1h")
    before = await keyspace.dump()
    with pytest.raises(Blocked):
        await store.rotate("a", {"user_id": 1}, grace="1m")
    assert await keyspace.dump() == before
    assert await store.rotate("a", {"user_id": 2})


async def test_a_session_that_was_ended_says_so(store: SessionStore) -> None:
    """A late write to a session that was ended raises SessionEnded, not Blocked."""
    await store.set("a", {"user_id": 1})
    await store.block("user_id", 1, "1h", reason="stolen")
    for write in (store.set("a", {"user_id": 1}), store.rotate("a", {"user_id": 1})):
        with pytest.raises(SessionEnded, match="stolen"):
            await write


@pytest.mark.parametrize("sessions", [3, 120], ids=["one page", "several pages"])
async def test_a_block_on_a_full_server(url: str, sessions: int) -> None:
    """A full server still ends all sessions of a value and blocks it."""
    async with Redis.from_url(url, decode_responses=True) as admin:
        keyspace = Keyspace(admin, "full")
        store = SessionStore(admin, references=["user_id"], prefix="full")
        await asyncio.gather(*(store.set(f"s{n}", {"user_id": 1}) for n in range(sessions)))
        await admin.config_set("maxmemory", 1)
        try:
            with pytest.raises(StoreUnavailable, match="OOM"):
                await store.create({"user_id": 1})
            assert await store.block("user_id", 1, "1h", reason="stolen") == sessions
            assert await store.blocked("user_id", 1)
            assert await store.unblock("user_id", 1)
            assert await store.block("user_id", 1, "1h", reason="again") == 0
        finally:
            await admin.config_set("maxmemory", 0)
        with pytest.raises(Blocked, match="again"):
            await store.create({"user_id": 1})
        dump = await _dump(keyspace)
        assert dump.pop("_fence:user_id:{1}") == {"why": "again"}
        assert dump == {f"{{s{n}}}": {"_ended": "stolen"} for n in range(sessions)}
        await store.aclose()
        await keyspace.clear()
