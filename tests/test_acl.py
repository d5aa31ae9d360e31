"""The permissions that the store needs in Redis: with them all calls work, and an error names a missing one."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from rss import Reference, SessionError, SessionStore
from tests.keyspace import Keyspace

GUIDE = (Path(__file__).parents[1] / "rss" / "guides" / "store.md").read_text()
#: The permissions that a user of Redis needs for a store with the prefix "rss", and no more.
ACL_RULE = GUIDE.split("for the prefix `rss`:\n\n```\n", 1)[1].split("```", 1)[0]
COMMANDS = re.findall(r"\+(\S+)", ACL_RULE)

#: More sessions than a page of `find_by` and `delete_by` has.
CROWD = 60
REFERENCES = {
    "user_id": Reference(limit=100, on_limit="refuse"),
    "ip": Reference(limit=2),
    "team": Reference(strict=True),
}
ALICE: dict[str, Any] = {"user_id": 1, "ip": "x", "team": "t", "name": "alice"}
ELSEWHERE: dict[str, Any] = {"user_id": 9, "ip": "z", "team": "u"}


async def _set_user(admin: Redis, *rules: str) -> None:
    """Give the user permissions, or take some away."""
    await admin.execute_command("ACL", "SETUSER", "app", *rules)  # type: ignore[no-untyped-call]


@pytest.fixture(name="admin")
async def _admin(url: str) -> AsyncIterator[Redis]:
    """A client with all permissions; the user of the other client has those of the rule."""
    async with Redis.from_url(url, decode_responses=True) as admin:
        await _set_user(admin, "reset", "on", ">secret", *ACL_RULE.split())
        yield admin
        await admin.flushall()


@pytest.fixture(name="free")
async def _free(admin: Redis) -> AsyncIterator[SessionStore]:
    """A store with all permissions, which prepares the sessions for the other store."""
    free = SessionStore(admin, references=REFERENCES)
    yield free
    await free.aclose()


@pytest.fixture(name="store")
async def _store(url: str) -> AsyncIterator[SessionStore]:
    """The store of the user with the limited permissions."""
    async with Redis.from_url(url, username="app", password="secret") as client:
        store = SessionStore(client, references=REFERENCES)
        yield store
        await store.aclose()


@pytest.fixture(name="keyspace")
def _keyspace(admin: Redis) -> Keyspace:
    """All keys that both stores have."""
    return Keyspace(admin, "rss")


async def _found(store: SessionStore, field: str, value: object) -> list[Any]:
    return [session async for session in store.find_by(field, value)]  # type: ignore[arg-type]


#: Calls of the store and their results, as `_outcome` writes them.
CALLS: dict[str, tuple[Callable[[SessionStore], Awaitable[object]], object]] = {
    "create": (lambda s: s.create({"user_id": 1, "ip": "x", "team": "t"}), "an id"),
    "create with values that are new": (lambda s: s.create(ELSEWHERE, "1h"), "an id"),
    "create at a limit": (lambda s: s.create({"ip": "full"}), "an id"),
    "create where another has expired": (lambda s: s.create({"ip": "old"}), "an id"),
    "get": (lambda s: s.get("a"), ALICE),
    "get some": (lambda s: s.get("a", ["user_id"]), {"user_id": 1}),
    "get by an old id": (lambda s: s.get("old"), {"user_id": 2, "team": "t"}),
    "get and renew": (lambda s: s.get("short", touch=True), {"user_id": 1, "ip": "y", "team": "t"}),
    "set what is not there": (lambda s: s.set("new", ELSEWHERE), ELSEWHERE),
    "set": (lambda s: s.set("a", {"name": "bob"}), {"name": "bob"}),
    "set for longer": (lambda s: s.set("a", {"name": "bob"}, "90 days"), {"name": "bob"}),
    "set other values": (lambda s: s.set("a", ELSEWHERE), ELSEWHERE),
    "set and expect": (lambda s: s.set("a", {"name": "bob"}, expect={"name": "alice"}), {"name": "bob"}),
    "unset": (lambda s: s.unset("a", ["name"]), None),
    "unset references": (lambda s: s.unset("a", ["user_id", "team"]), None),
    "pop": (lambda s: s.pop("a", ["name"]), {"name": "alice"}),
    "increment": (lambda s: s.increment("a", "n"), 1),
    "touch": (lambda s: s.touch("short", "90 days"), True),
    "delete": (lambda s: s.delete("a"), True),
    "delete and expect": (lambda s: s.delete("a", expect={"name": "alice"}), True),
    "ended": (lambda s: s.ended("gone"), "deleted"),
    "rotate": (lambda s: s.rotate("a"), "an id"),
    "rotate to other values": (lambda s: s.rotate("a", ELSEWHERE, "1h"), "an id"),
    "rotate with grace": (lambda s: s.rotate("a", grace="1m"), "an id"),
    "ttl": (lambda s: s.ttl("a"), "a time"),
    "ids_by": (lambda s: s.ids_by("user_id", 1), ["a", "short"]),
    "find_by": (lambda s: _found(s, "user_id", 2), [{"user_id": 2, "team": "t"}]),
    "count_by": (lambda s: s.count_by("user_id", 1), 2),
    "count_by, not exact": (lambda s: s.count_by("user_id", 1, exact=False), 3),
    "delete_by": (lambda s: s.delete_by("user_id", 1, keep=["a", "old"]), 1),
    "delete_by of several pages": (lambda s: s.delete_by("team", "crowd", keep=["old"]), CROWD),
    "block": (lambda s: s.block("user_id", 1, "1m"), 2),
    "blocked": (lambda s: s.blocked("team", "blocked"), "a time"),
    "unblock": (lambda s: s.unblock("team", "blocked"), True),
}


def _outcome(result: object) -> object:
    """Write ids and times as words, and leave the ids of sessions out."""
    match result:
        case str() if len(result) == 32:
            return "an id"
        case timedelta():
            return "a time"
        case dict():
            return {field: value for field, value in result.items() if field != "id"}
        case list():
            return sorted(map(_outcome, result), key=str)
    return result


async def _furnish(free: SessionStore, keyspace: Keyspace, name: str) -> None:
    """Prepare the sessions that a call needs."""
    await keyspace.clear()
    await free.set("a", ALICE)
    await free.set("short", {"user_id": 1, "ip": "y", "team": "t"}, "1m")
    await free.set("old", {"user_id": 2, "team": "t"})
    await free.rotate("old", grace="1m")
    await free.set("gone", {})
    await free.delete("gone")
    await free.block("team", "blocked", "1m")
    await free.set("dead", {"user_id": 1, "ip": "old", "team": "t"})
    await keyspace.expire("{dead}")
    if "limit" in name:
        for session_id in ("full-1", "full-2"):
            await free.set(session_id, {"ip": "full"})
    if "pages" in name:
        await asyncio.gather(*(free.set(f"c{n}", {"team": "crowd"}) for n in range(CROWD)))


async def _faults(free: SessionStore, keyspace: Keyspace) -> list[str]:
    """Return broken promises: keys without a TTL, and live sessions that are missing in one of their sets."""
    try:
        dump = await keyspace.dump()
    except AssertionError as error:
        return [str(error).partition("\n")[0]]
    faults = []
    for key, held in dump.items():
        if isinstance(held, dict) and "id" in held:
            if key != f"{{{held['id']}}}":
                faults.append("the hash has the id of another session")
            session = free.fields.decode([text.encode() for pair in held.items() for text in pair])
            faults += [
                f"a session is not in its set of {field}"
                for field in REFERENCES
                if field in session and held["id"] not in dump.get(f"{field}:{{{session[field]}}}", ())
            ]
    return faults


async def _sessions(admin: Redis) -> int:
    """Return how many keys hold a session."""
    return sum([await admin.hexists(key, "id") for key in await admin.keys("rss:{*")])


def _blames(error: SessionError, command: str) -> bool:
    """Return whether an error names this command as forbidden, or no command if Redis named none."""
    what = re.fullmatch(
        "this user of Redis has no permission for (.*): see the ACL rule in the guide to the store", str(error)
    )
    said = re.search(r"'([\w|]+)' command", str(error.__cause__))  # Redis 6.2 and 7.0 do not name it in scripts.
    return bool(what and what[1] == (f"the command {said[1]}" if said else "a command or a key of the scripts")) and (
        not said or said[1] in (command, command.partition("|")[0])
    )


async def test_no_more_is_needed(store: SessionStore, free: SessionStore, keyspace: Keyspace) -> None:
    """A user with these permissions can make all calls."""
    for name, (call, outcome) in CALLS.items():
        await _furnish(free, keyspace, name)
        assert _outcome(await call(store)) == outcome, name
        assert await _faults(free, keyspace) == [], name


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_right_that_is_missing(
    store: SessionStore, free: SessionStore, admin: Redis, keyspace: Keyspace, command: str
) -> None:
    """Calls that need a missing permission raise a SessionError that names it, and break no promise."""
    await _set_user(admin, f"-{command.partition('|')[0]}")
    refused = 0
    faults = []
    for name, (call, outcome) in CALLS.items():
        await _furnish(free, keyspace, name)
        before = await _sessions(admin)
        try:
            result = _outcome(await call(store))
        except SessionError as error:
            refused += 1
            if not _blames(error, command):
                faults.append(f"{name}: {type(error).__name__}: {error}")
            if name.startswith(("create", "set what is not there")) and await _sessions(admin) > before:
                faults.append(f"{name}: it left a session")
        else:
            if result != outcome:
                faults.append(f"{name}: its result is {result}")
        faults += [f"{name}: {fault}" for fault in await _faults(free, keyspace)]
    assert faults == []
    assert refused


async def test_no_right_to_the_keys(store: SessionStore, admin: Redis, free: SessionStore, keyspace: Keyspace) -> None:
    """A user without permission for the keys gets a SessionError that shows no key."""
    await _furnish(free, keyspace, "")
    before = await keyspace.dump()
    await _set_user(admin, "resetkeys", "~other:*")
    for name, (call, _) in CALLS.items():
        with pytest.raises(SessionError, match="no permission for a command or a key of the scripts") as raised:
            await call(store)
        assert "rss:" not in f"{raised.value} {raised.value.__cause__}", name
    assert await keyspace.dump() == before


async def test_rights_that_come_back(store: SessionStore, admin: Redis) -> None:
    """A store that was refused works again as soon as its user has the permissions."""
    for command in ("evalsha", "script|load", "hset"):
        await _set_user(admin, f"-{command.partition('|')[0]}")
        with pytest.raises(SessionError, match="has no permission"):
            await store.create({"user_id": 1})
        await _set_user(admin, f"+{command}")
        assert await store.create({"user_id": 1})
        await store.aclose()
        store._engine.closed = False
