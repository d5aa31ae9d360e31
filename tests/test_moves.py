"""A rotation into another partition: a login moves a session to the partition of its user, by four scripts."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from rss import (
    Blocked,
    Conflict,
    LimitExceeded,
    Reference,
    SessionEnded,
    SessionError,
    SessionNotFound,
    Sessions,
    SessionStore,
    StoreUnavailable,
)
from rss.engine import operations
from rss.engine.coalesce import Operation
from rss.engine.operations import Copy, Deleted, Position, Retired
from rss.keys import Partitioned
from tests.keyspace import Keyspace
from tests.servers import proxied
from tests.steps import Stop, between_pages, run_at

#: A minute, in which the other seconds of the timeout are included.
ARRIVAL: Final = 90_000
#: The scripts of a move, in their order.
STEPS: Final = ["get", "arrive_with_refs", "retire_with_refs", "confirm_with_refs"]

REFERENCES: Final = {"ip": Reference(), "user_id": Reference(identity=True, limit=5), "tags": Reference(strict=True)}

pytestmark = pytest.mark.parametrize(
    ("client", "keyspace"), [({}, 16), ("cluster", "cluster")], indirect=True, ids=["16", "cluster"]
)


@pytest.fixture(name="store")
async def _store(client: Redis, keyspace: Keyspace) -> AsyncIterator[SessionStore]:
    """A store in which a user may have five sessions."""
    store = new_store(client, keyspace)
    yield store
    await store.aclose()


def new_store(client: Redis, keyspace: Keyspace, **options: Any) -> SessionStore:
    """Return a store in partitions. Its deadline is longer than any test."""
    options = {"references": REFERENCES, "timeout": 15, **options}
    return SessionStore(client, prefix=keyspace.prefix, partitions=keyspace.partitions, **options)


@pytest.fixture(name="anonymous")
async def _anonymous(store: SessionStore, keyspace: Keyspace) -> str:
    """The id of a session without a user, in another partition than that of user 1."""
    layout = Partitioned(keyspace.prefix, 24, keyspace.partitions or 1, "user_id")
    partition = (layout.with_value("user_id", 1)[0] + 1) % layout.partitions
    session_id = layout.mint(partition)
    await store.set(session_id, {"ip": "x", "tags": ["s", "t"], "cart": [1, 2]}, "2h")
    return session_id


async def test_everything_moves(store: SessionStore, keyspace: Keyspace, anonymous: str) -> None:
    """The session has all of its fields under the new id, its sets have the new id, and its TTL and age stay."""
    created = await keyspace.client.hget(store.get_session_key(anonymous), "_created")
    many = {f"f{n}": "x" * (n % 50) for n in range(900)}
    await store.set(anonymous, {**many, "json": {"a": [1, None]}, "text": 'a"\\é\x00'})
    await keyspace.shorten(1_000_000)
    before, ttl = await store.get(anonymous), await keyspace.ttl(f"{{{anonymous}}}")
    new = await store.rotate(anonymous, {"user_id": 1, "tags": ["t", 7], "f3": 3}, grace="1h")
    assert await store.get(new) == {**before, "id": new, "user_id": 1, "tags": ["t", 7], "f3": 3}
    assert await store.get(anonymous) == {}
    assert await store.ended(anonymous) == "rotated"
    assert ttl - 60_000 < await keyspace.ttl(f"{{{new}}}") <= ttl
    held = await keyspace.client.hmget(store.get_session_key(new), ["_created", "_max_age"])
    assert held == [created, "7200000"]
    dump = await keyspace.dump()
    sets = {name: held for name, held in dump.items() if isinstance(held, set)}
    assert sets == {name: {new} for name in ("ip:{x}", "user_id:{1}", "tags:{t}", "tags:{7}")}
    assert all([await keyspace.ttl(name) >= await keyspace.ttl(f"{{{new}}}") for name in sets])
    with pytest.raises(SessionEnded, match="rotated"):
        await store.rotate(anonymous, {"user_id": 1})
    await store.touch(new)
    assert await keyspace.ttl(f"{{{new}}}") > 7_190_000


async def test_a_lifetime_may_change_on_the_way(store: SessionStore, keyspace: Keyspace, anonymous: str) -> None:
    """A rotation with *max_age* gives the session that lifetime, now and after later writes."""
    new = await store.rotate(anonymous, {"user_id": 1}, "3h")
    assert 10_700_000 < await keyspace.ttl(f"{{{new}}}") <= 10_800_000
    await keyspace.shorten(5_000_000)
    await store.touch(new)
    assert 10_700_000 < await keyspace.ttl(f"{{{new}}}") <= 10_800_000
    assert await keyspace.client.hget(store.get_session_key(new), "_max_age") == "10800000"


async def test_a_session_without_notes(store: SessionStore, keyspace: Keyspace, anonymous: str) -> None:
    """A session that another program wrote gets its creation time, as in any rotation."""
    key = store.get_session_key(anonymous)
    await keyspace.client.hdel(key, "_created", "_max_age")
    new = await store.rotate(anonymous, {"user_id": 1})
    assert int(await keyspace.client.hget(store.get_session_key(new), "_created") or 0) > 0
    await keyspace.dump()


async def test_a_session_that_is_not_there(store: SessionStore, keyspace: Keyspace, anonymous: str) -> None:
    """A session that is absent or ended cannot move, and nothing is left under the new id."""
    before = await keyspace.dump()
    with pytest.raises(SessionNotFound) as raised:
        await store.rotate("nobody", {"user_id": 1})
    assert not isinstance(raised.value, SessionEnded)
    assert await keyspace.dump() == before
    successor = await store.rotate(anonymous, grace="1h")
    await store.delete(successor, reason="bye")
    for session_id, reason in ((anonymous, "rotated"), (successor, "bye")):
        with pytest.raises(SessionEnded, match=reason):
            await store.rotate(session_id, {"user_id": 1})
    assert await store.ids_by("user_id", 1) == []


async def test_grace_does_not_lead_to_a_move(store: SessionStore, anonymous: str) -> None:
    """An old id with grace cannot be rotated, so its successor stays where it is."""
    successor = await store.rotate(anonymous, grace="1h")
    with pytest.raises(SessionEnded, match="rotated"):
        await store.rotate(anonymous, {"user_id": 1})
    assert (await store.get(successor))["cart"] == [1, 2]
    assert await store.ids_by("user_id", 1) == []


async def test_new_sessions_begin_with_their_user(store: SessionStore, keyspace: Keyspace) -> None:
    """A new session is in the partition of its user. An id of another partition is refused."""
    made = [await store.create({"user_id": 7}), store.create_session_id(7), store.create_session_id("7")]
    for session_id in made[1:]:
        await store.set(session_id, {"user_id": 7})
    places = {Partitioned("rss", 24, keyspace.partitions or 1).place(session_id)[1] for session_id in made}
    assert len(places) == 1
    assert len(store.get_reference_keys("user_id", 7)) == 1
    assert await keyspace.client.smembers(store.get_reference_key("user_id", 7)) == set(made)
    before = await keyspace.dump()
    other = next(i for i in iter(store.create_session_id, "") if i[0] and _place(keyspace, i) not in places)
    with pytest.raises(ValueError, match=r"use create, or an id of create_session_id\(identity\)"):
        await store.set(other, {"user_id": 7})
    with pytest.raises(SessionNotFound):
        await store.set(other, {"user_id": 7}, create=False)
    assert await keyspace.dump() == before


def _place(keyspace: Keyspace, session_id: str) -> int:
    return Partitioned("rss", 24, keyspace.partitions or 1).place(session_id)[1]


async def test_a_limit_holds_over_logins_at_once(store: SessionStore, keyspace: Keyspace) -> None:
    """Of 200 logins at once under a limit of five, exactly five sessions stay."""
    ids = await asyncio.gather(*(store.create({"ip": f"{n % 9}"}) for n in range(200)))
    new = await asyncio.gather(*(store.rotate(session_id, {"user_id": 1}) for session_id in ids))
    left = await store.ids_by("user_id", 1)
    assert len(left) == len(set(new) & set(left)) == 5
    alive = [session_id for session_id in (*ids, *new) if await store.get(session_id)]
    assert set(alive) == set(left)
    sets = {name: held for name, held in (await keyspace.dump()).items() if isinstance(held, set)}
    assert set().union(*sets.values()) == set(left)


async def test_a_limit_that_refuses(client: Redis, keyspace: Keyspace) -> None:
    """Of 50 logins at once under a limit that refuses, five succeed. The others stay anonymous, and lose nothing."""
    references = {"user_id": Reference(identity=True, limit=5, on_limit="refuse"), "ip": Reference()}
    store = new_store(client, keyspace, references=references)
    layout = Partitioned(keyspace.prefix, 24, keyspace.partitions or 1, "user_id")
    away = [p for p in range(layout.partitions) if p != layout.with_value("user_id", 1)[0]]
    ids = [layout.mint(away[n % len(away)]) for n in range(50)]
    await asyncio.gather(*(store.set(session_id, {"ip": session_id}) for session_id in ids))
    logins = (store.rotate(session_id, {"user_id": 1}) for session_id in ids)
    outcomes = await asyncio.gather(*logins, return_exceptions=True)
    new = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(new) == 5
    assert {type(outcome) for outcome in outcomes} == {str, LimitExceeded}
    assert set(await store.ids_by("user_id", 1)) == set(new)
    for session_id, outcome in zip(ids, outcomes, strict=True):
        kept = outcome if isinstance(outcome, str) else session_id
        assert (await store.get(kept, ["ip"])) == {"id": kept, "ip": session_id}
    await store.aclose()


async def test_a_blocked_user_cannot_log_in(store: SessionStore, keyspace: Keyspace, anonymous: str) -> None:
    """A login of a blocked user raises Blocked, and the anonymous session stays as it was."""
    await store.block("user_id", 1, "1m", reason="reset")
    before = await keyspace.dump()
    with pytest.raises(Blocked, match="reset"):
        await store.rotate(anonymous, {"user_id": 1})
    assert await keyspace.dump() == before
    assert await store.blocked("user_id", 1)
    assert await store.unblock("user_id", 1)
    assert await store.rotate(anonymous, {"user_id": 1})


async def test_no_write_is_lost_on_the_way(store: SessionStore, anonymous: str) -> None:
    """While a session moves, a write is in it afterwards, or was refused."""
    moved = 0
    for n in range(60):
        session_id = await store.create({"n": 0})

        async def write(session_id: str, name: str) -> int:
            for value in itertools.count(1):
                try:
                    await store.set(session_id, {name: value}, create=False)
                    await store.increment(session_id, "n")
                except SessionEnded:
                    return value
            raise AssertionError

        writing = [asyncio.create_task(write(session_id, name)) for name in "ab"]
        await asyncio.sleep(0)
        new = await store.rotate(session_id, {"user_id": n})
        refused = await asyncio.gather(*writing)
        session = await store.get(new)
        # Of the last round, the set, the increment, or both were refused.
        written = [session.get(name, 0) for name in "ab"]
        assert all(last - 1 <= value <= last for value, last in zip(written, refused, strict=True))
        assert session["n"] <= sum(written) <= session["n"] + 2
        moved += sum(written) > 0
    assert anonymous
    assert moved > 0


async def test_a_session_that_never_rests_cannot_move(client: Redis, keyspace: Keyspace, anonymous: str) -> None:
    """If each attempt finds the session changed, the login raises StoreUnavailable, and the session stays."""
    store = new_store(client, keyspace, timeout=0.3)
    original, numbers = store.operations.engine.run, itertools.count()

    def run(operation: Operation, *args: Any, **options: Any) -> Any:
        if operation is operations.RETIRE:
            return write_first(operation, *args, **options)
        return original(operation, *args, **options)

    async def write_first(*args: Any, **options: Any) -> Any:
        await store.set(anonymous, {"ip": f"{next(numbers)}"})
        return await original(*args, **options)

    store.operations.engine.run = run  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable, match="other calls changed or moved the session all the time"):
        await store.rotate(anonymous, {"user_id": 1})
    assert await store.get(anonymous)
    assert next(numbers) > 1
    assert await store.ids_by("user_id", 1) == []
    await store.aclose()


@pytest.mark.parametrize("point", [f"{when} {step}" for step in STEPS for when in ("before", "after")])
async def test_a_login_that_is_stopped(
    store: SessionStore, keyspace: Keyspace, anonymous: str, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """A login that dies before or after a step leaves one session for its user: no copy outlives a minute or so."""
    sent, step = point.startswith("after"), point.split()[1]
    others = [await store.create({"user_id": 1}) for _ in range(5)]

    async def stop(call: Awaitable[Any]) -> None:
        if sent:
            await call
        else:
            assert isinstance(call, asyncio.Future)
            call.cancel()
        raise Stop

    run_at(store, monkeypatch, step, stop)
    with pytest.raises(Stop):
        await store.rotate(anonymous, {"user_id": 1})
    monkeypatch.undo()
    retired = STEPS.index(step) + sent > 2
    assert bool(await store.get(anonymous)) != retired
    assert await store.ended(anonymous) == ("rotated" if retired else None)
    confirmed = sent and step == STEPS[-1]
    found = await keyspace.copies()
    assert len(found) == (point in ("before retire_with_refs", "after retire_with_refs", "before confirm_with_refs"))
    for copy in found:  # It counts as absent.
        assert await keyspace.ttl(f"{{{copy}}}") <= ARRIVAL
        assert await store.get(copy) == {}
        with pytest.raises(SessionNotFound):
            await store.set(copy, {"n": 1}, create=False)
    assert await store.count_by("user_id", 1) == 5
    alive = [i for i in others if await store.get(i)]
    assert len(alive) == (4 if confirmed else 5)  # Only a login that is complete evicts a session.
    if not retired:
        new = await store.rotate(anonymous, {"user_id": 1})
        assert (await store.get(new))["cart"] == [1, 2]
        assert len(await store.ids_by("user_id", 1)) == 5
        assert sum([bool(await store.get(i)) for i in others]) == 4


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("hash_ids", [True, False])
async def test_a_login_that_is_repeated_completes(
    store: SessionStore, anonymous: str, monkeypatch: pytest.MonkeyPatch, step: str, hash_ids: bool
) -> None:
    """If a step of a login is not answered, the application may call again: the session moves once."""

    async def lose(call: Awaitable[Any]) -> None:
        await call
        raise StoreUnavailable("no answer")

    assert anonymous
    for user in range(40):
        sessions = Sessions(store, hash_ids=hash_ids)
        session = sessions.create_session()
        await session.set({"cart": [1]})
        old = str(session.id)
        run_at(store, monkeypatch, step, lose)
        try:
            await session.rotate({"user_id": user})
            moves = False
        except StoreUnavailable:
            moves = True
            await session.rotate({"user_id": user})
        monkeypatch.undo()
        assert await session.get() == {"id": session.id, "user_id": user, "cart": [1]}
        assert await store.ended(old) == "rotated"
        left = await store.ids_by("user_id", user)
        assert session.id in left
        if moves:
            return
    raise AssertionError


@pytest.mark.parametrize("number", range(1, 5))
async def test_a_lost_reply(
    redis_url: str, keyspace: Keyspace, store: SessionStore, anonymous: str, number: int
) -> None:
    """A move whose n-th reply was lost with its connection finds its own work, and completes."""
    if keyspace.partitions != 16:
        pytest.skip("the proxy stands before one server")
    async with proxied(redis_url) as (proxy, address):
        options: dict[str, Any] = {"prefix": keyspace.prefix, "references": REFERENCES, "partitions": 16}
        async with SessionStore.from_url(address, **options) as away:
            proxy.scripts = 0
            original = away.operations.engine.run
            calls = itertools.count(1)

            def run(*args: Any, **named: Any) -> Any:
                proxy.swallow = int(next(calls) == number)
                return original(*args, **named)

            away.operations.engine.run = run  # type: ignore[method-assign]
            new = await away.rotate(anonymous, {"user_id": 1})
    assert await store.ended(anonymous) == "rotated"
    assert (await store.get(new))["cart"] == [1, 2]
    assert await store.ids_by("user_id", 1) == [new]
    assert await keyspace.copies() == []


async def test_a_session_that_ends_while_it_moves(
    store: SessionStore, keyspace: Keyspace, anonymous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a logout ends the session before it has moved, the login raises SessionEnded, and leaves no copy."""

    async def end_first(call: Awaitable[Any]) -> Any:
        await call
        await store.delete(anonymous, reason="bye")

    run_at(store, monkeypatch, "arrive_with_refs", end_first)
    with pytest.raises(SessionEnded, match="bye"):
        await store.rotate(anonymous, {"user_id": 1})
    assert await store.ids_by("user_id", 1) == await store.ids_by("ip", "x") == []
    assert all("id" not in held for held in (await keyspace.dump()).values())


async def test_a_copy_that_ends_before_it_is_confirmed(
    store: SessionStore, anonymous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the sessions of the user end while one arrives, the login raises SessionEnded, and no session is left."""

    async def end_after(call: Awaitable[Any]) -> Any:
        ttl = await call
        assert await store.delete_by("user_id", 1, reason="reset") == 0  # It was no session yet.
        return ttl

    run_at(store, monkeypatch, "retire_with_refs", end_after)
    with pytest.raises(SessionEnded, match="reset"):
        await store.rotate(anonymous, {"user_id": 1})
    assert await store.ids_by("ip", "x") == []


@pytest.mark.parametrize("way", ["by another reference", "by the user that is left"])
async def test_no_session_slips_through(store: SessionStore, keyspace: Keyspace, way: str, anonymous: str) -> None:
    """Of 300 sessions that move while `delete_by` runs, none is left with the value afterwards."""
    assert anonymous
    assert keyspace
    slipped = completed = 0
    for n in range(300):
        user = {"user_id": 1000 + n} if way == "by the user that is left" else {}
        session_id = await store.create({"ip": f"{n}", **user})
        moving = asyncio.create_task(store.rotate(session_id, {"user_id": n}))
        for _ in range(n % 12):
            await asyncio.sleep(0)
        if user:
            await store.delete_by("user_id", 1000 + n)
        else:
            await store.delete_by("ip", n)
        (outcome,) = await asyncio.gather(moving, return_exceptions=True)
        assert isinstance(outcome, str | SessionEnded)
        completed += isinstance(outcome, str)
        if user:
            slipped += bool(await store.get(session_id))
        else:
            slipped += len(await store.ids_by("ip", n))
    assert slipped == 0
    assert completed < 300


async def test_the_identity_of_a_store_is_kept(store: SessionStore, client: Redis, keyspace: Keyspace) -> None:
    """A store with another identity would look for sessions in the wrong partitions, so it is refused."""
    await store.create()
    for references in ({"user_id": Reference()}, {"team": Reference(identity=True)}):
        other = new_store(client, keyspace, references=references)
        name = "none" if "user_id" in references else "team"
        with pytest.raises(SessionError, match=f"have the identity user_id, not {name}"):
            await other.create()
        await other.aclose()


async def test_other_limits_are_refused(client: Redis, keyspace: Keyspace) -> None:
    """A limit on a value whose sessions are in several partitions is refused, but not with one partition."""
    with pytest.raises(ValueError, match="'ip' cannot have a limit in a store with several partitions"):
        new_store(client, keyspace, references={"ip": Reference(limit=2), "user_id": Reference(identity=True)})
    SessionStore(Redis(), references={"ip": Reference(limit=2)}, partitions=1)


async def test_moves_are_coalesced(redis_url: str, store: SessionStore, keyspace: Keyspace) -> None:
    """Fifty logins of one user at once take as many scripts as their partitions, four times."""
    if keyspace.partitions != 16:
        pytest.skip("the statistics of one server are counted")
    layout = Partitioned(keyspace.prefix, 24, 16, "user_id")
    away = (layout.with_value("user_id", 1)[0] + 1) % 16
    ids = [layout.mint(away) for _ in range(50)]
    await asyncio.gather(*(store.set(session_id, {"ip": "x"}) for session_id in ids))
    async with Redis.from_url(redis_url) as admin:
        before = (await admin.info("commandstats"))["cmdstat_evalsha"]["calls"]
        await asyncio.gather(*(store.rotate(session_id, {"user_id": 1}) for session_id in ids))
        assert (await admin.info("commandstats"))["cmdstat_evalsha"]["calls"] - before < 20


async def test_a_login_by_a_write_keeps_max_age(store: SessionStore, keyspace: Keyspace, anonymous: str) -> None:
    """A login by `Session.set` renews the session for its own max_age, which stays."""
    session = Sessions(store, hash_ids=False).create_session(f"session-id={anonymous}")
    await keyspace.shorten(5_000_000)
    await session.set({"user_id": 1})
    assert 7_190_000 < await keyspace.ttl(f"{{{session.id}}}") <= 7_200_000
    assert await keyspace.client.hget(store.get_session_key(str(session.id)), "_max_age") == "7200000"


async def test_a_login_may_take_fields_out(store: SessionStore, anonymous: str) -> None:
    """A login that also takes fields out, one of them a reference, leaves them behind."""
    session = Sessions(store, hash_ids=False).create_session(f"session-id={anonymous}")
    await session.replace({"ip": "x", "cart": [1, 2]}, {"user_id": 1})
    assert await store.get(str(session.id)) == {"id": session.id, "user_id": 1, "tags": ["s", "t"]}
    assert await store.ids_by("ip", "x") == []


async def test_an_old_id_with_grace_makes_no_copy(client: Redis, keyspace: Keyspace) -> None:
    """A rotation of an old id with grace writes nothing, and its error does not depend on the new user."""
    references = {"user_id": Reference(identity=True, limit=1, on_limit="refuse")}
    store = new_store(client, keyspace, references=references)
    await store.create({"user_id": 1})
    layout = Partitioned(keyspace.prefix, 24, keyspace.partitions or 1, "user_id")
    old = layout.mint((layout.with_value("user_id", 1)[0] + 1) % layout.partitions)
    await store.set(old, {"cart": [1]})
    await store.rotate(old, grace="1h")
    before = await keyspace.dump()
    for user in (1, 2):
        with pytest.raises(SessionEnded, match="rotated"):
            await store.rotate(old, {"user_id": user})
        assert await keyspace.dump() == before
    await store.aclose()


async def test_the_values_of_a_login_come_last(
    store: SessionStore, anonymous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fields that a login writes or takes out win over writes on the way. Other fields take these writes over."""

    async def write_after(call: Awaitable[Any]) -> Any:
        ttl = await call
        await store.set(anonymous, {"cart": [9], "b": 9, "n": 9})
        await store.unset(anonymous, ["a", "m"])
        return ttl

    await store.set(anonymous, {"a": 1, "b": 1, "m": 1, "n": 1})
    session = Sessions(store, hash_ids=False).create_session(f"session-id={anonymous}")
    run_at(store, monkeypatch, "arrive_with_refs", write_after)
    await session.replace({"cart": [1, 2], "b": 1, "a": 1}, {"user_id": 1, "a": 2, "b": 2}, anew=True)
    assert await store.get(str(session.id)) == {
        "id": session.id, "user_id": 1, "ip": "x", "tags": ["s", "t"], "a": 2, "b": 2, "n": 9,
    }  # fmt: skip


async def test_a_repeated_retirement_tells_what_has_changed(
    store: SessionStore, anonymous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the reply to the third script is lost, its second run still tells the writes on the way."""
    original = store.operations.engine.run

    def run(operation: Operation, *args: Any, **options: Any) -> Any:
        return (twice if operation is operations.RETIRE else original)(operation, *args, **options)

    async def twice(*args: Any, **options: Any) -> Any:
        await store.set(anonymous, {"new": "é"}, create=False)
        await store.unset(anonymous, ["cart"])
        first = await original(*args, **options)
        second = await original(*args, **options)
        assert first[1:] == second[1:]
        assert 0 <= first[0] - second[0] < 1000  # The session would have expired at the same time.
        return second

    monkeypatch.setattr(store.operations.engine, "run", run)
    new = await store.rotate(anonymous, {"user_id": 1})
    assert await store.get(new) == {"id": new, "ip": "x", "tags": ["s", "t"], "user_id": 1, "new": "é"}


async def test_the_ttl_of_a_session_that_was_evicted_on_the_way(
    store: SessionStore, anonymous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a later login evicts a copy before it is confirmed, the rotation succeeds and has a TTL."""

    async def evict(call: Awaitable[Any]) -> Any:
        reply = await call
        await store.delete_by("user_id", 1, reason="evicted")
        return reply

    run_at(store, monkeypatch, "retire_with_refs", evict)
    mint, values = store.operations.layout.mint, store.fields.encode({"user_id": 1})
    new, ttl = await store.operations.rotate(anonymous, mint, values, "keep")
    assert 7_190_000 < ttl <= 7_200_000
    assert await store.ended(new) == "evicted"


async def test_a_copy_lives_as_long_as_its_login_may_take(
    client: Redis, keyspace: Keyspace, anonymous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy outlives the two scripts that follow, even if each takes the whole timeout of the store."""
    store = new_store(client, keyspace, timeout=300)

    async def stop(call: Awaitable[Any]) -> None:
        assert isinstance(call, asyncio.Future)
        call.cancel()
        raise Stop

    run_at(store, monkeypatch, "retire_with_refs", stop)
    with pytest.raises(Stop):
        await store.rotate(anonymous, {"user_id": 1})
    (copy,) = await keyspace.copies()
    assert 600_000 < await keyspace.ttl(f"{{{copy}}}") <= 660_000
    await store.aclose()


async def test_the_second_look_is_a_call_of_its_own(
    store: SessionStore, keyspace: Keyspace, anonymous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that moves into a partition that `delete_by` has done, from one that is still to do, ends."""
    layout = Partitioned(keyspace.prefix, 24, keyspace.partitions or 1, "user_id")
    home, away = layout.with_value("user_id", 1)[0], layout.place(anonymous)[1]
    await asyncio.gather(*(store.set(layout.mint(home), {"ip": "x"}) for _ in range(120)))  # Several pages.
    original, done, moved = store.operations.delete_by, asyncio.Event(), list[str]()

    async def delete_by(field: str, value: object, at: Position, **options: Any) -> Deleted:
        if done.is_set():
            return await original(field, value, at, **options)
        if at.partition != home:
            await done.wait()
        page = await original(field, value, at, **options)
        if at.partition == home and page.position.done:
            moved.append(await store.rotate(anonymous, {"user_id": 1}))
            done.set()
        return page

    monkeypatch.setattr(store.operations, "delete_by", delete_by)
    assert away != home
    assert await store.delete_by("ip", "x") == 121
    assert await store.get(moved[0]) == {}


async def test_a_session_to_keep_may_end_before_the_second_look(
    store: SessionStore, anonymous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once `delete_by` has ended sessions, it does not raise because the session to keep ends, too."""
    looks = list[int]()

    async def end_after(at: Position) -> None:
        looks.append(at.partition)
        if len(looks) == 1:
            await store.delete(anonymous)
            await store.set(store.operations.layout.mint(at.partition), {"ip": "x"})  # So its set stays.

    between_pages(store, monkeypatch, end_after)
    assert await store.delete_by("ip", "x", keep=[anonymous], keep_required=True) == 1
    assert len(looks) == 2


async def test_references_and_a_lifetime_that_change_on_the_way(
    store: SessionStore, keyspace: Keyspace, anonymous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write on the way that changes a reference, takes one out, or gives another max_age begins the move anew."""
    steps: Iterator[Callable[[], Awaitable[object]]] = iter(
        [
            lambda: store.set(anonymous, {"ip": "y"}),
            lambda: store.unset(anonymous, ["ip"]),
            lambda: store.set(anonymous, {"ip": "z"}),
            lambda: store.touch(anonymous, "3h"),
        ]
    )
    original, attempts = store.operations.engine.run, list[int]()

    def run(operation: Operation, *args: Any, **options: Any) -> Any:
        return (change_first if operation is operations.RETIRE else original)(operation, *args, **options)

    async def change_first(*args: Any, **options: Any) -> Any:
        attempts.append(1)
        if step := next(steps, None):
            await step()
        return await original(*args, **options)

    monkeypatch.setattr(store.operations.engine, "run", run)
    new = await store.rotate(anonymous, {"user_id": 1})
    assert len(attempts) == 5
    assert await store.get(new) == {"id": new, "user_id": 1, "ip": "z", "tags": ["s", "t"], "cart": [1, 2]}
    assert 10_700_000 < await keyspace.ttl(f"{{{new}}}") <= 10_800_000
    assert await keyspace.client.hget(store.get_session_key(new), "_max_age") == "10800000"
    sets = {name: held for name, held in (await keyspace.dump()).items() if isinstance(held, set)}
    assert sets == {name: {new} for name in ("ip:{z}", "user_id:{1}", "tags:{s}", "tags:{t}")}


async def test_a_session_cannot_leave_a_user_whose_sessions_end(
    client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two pages of `delete_by`, a session that would move to another user ends, with the reason of the call."""
    store = new_store(client, keyspace, references={"ip": Reference(), "user_id": Reference(identity=True)})
    layout = store.operations.layout
    user = next(n for n in range(2, 1000) if layout.with_value("user_id", n) != layout.with_value("user_id", 1))
    ids = await asyncio.gather(*(store.create({"user_id": user}) for _ in range(150)))
    outcomes = list[BaseException | str]()

    async def leave(_: Position) -> None:
        alive = [session_id for session_id in ids if await store.get(session_id)]
        if not outcomes and alive:
            outcomes.extend(await asyncio.gather(store.rotate(alive[0], {"user_id": 1}), return_exceptions=True))

    between_pages(store, monkeypatch, leave)
    await store.delete_by("user_id", user, reason="reset")
    assert [str(outcome) for outcome in outcomes] == [str(SessionEnded("reset"))]
    assert await store.ids_by("user_id", 1) == []
    await store.aclose()


async def test_a_store_that_closes_completes_a_move(
    store: SessionStore, client: Redis, keyspace: Keyspace, anonymous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`aclose` waits for a login that has begun, so the session is not lost between two scripts."""
    closing: list[asyncio.Future[None]] = []

    async def close(call: Awaitable[Any]) -> Any:
        reply = await call
        closing.append(asyncio.ensure_future(store.aclose()))
        await asyncio.sleep(0.01)
        return reply

    run_at(store, monkeypatch, "retire_with_refs", close)
    new = await store.rotate(anonymous, {"user_id": 1})
    await closing[0]
    with pytest.raises(RuntimeError, match="the store is closed"):
        await store.rotate(new, {"user_id": 2})
    other = new_store(client, keyspace)
    assert (await other.get(new))["cart"] == [1, 2]
    assert await keyspace.ttl(f"{{{new}}}") > ARRIVAL
    await other.aclose()


async def test_a_login_that_is_cancelled_keeps_no_place(
    client: Redis, keyspace: Keyspace, anonymous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login that is cancelled while its copy is written can be repeated, although only one session is allowed."""
    references = {"user_id": Reference(identity=True, limit=1, on_limit="refuse"), "ip": Reference()}
    store = new_store(client, keyspace, references=references)

    async def cancel(call: Awaitable[Any]) -> None:
        await call
        raise asyncio.CancelledError

    run_at(store, monkeypatch, "arrive_with_refs", cancel)
    with pytest.raises(asyncio.CancelledError):
        await store.rotate(anonymous, {"user_id": 1})
    new = await store.rotate(anonymous, {"user_id": 1})
    assert (await store.get(new))["cart"] == [1, 2]
    assert await store.ids_by("user_id", 1) == [new]
    assert await keyspace.copies() == []
    await store.aclose()


async def test_a_session_that_a_block_has_kept_may_move(store: SessionStore, anonymous: str) -> None:
    """A session may take a blocked value along that it had before. Another session may not get it."""
    other = await store.create({"ip": "y"})
    assert await store.delete_by("ip", "x", keep=[anonymous], block="1h") == 0
    new = await store.rotate(anonymous, {"user_id": 1})
    assert await store.ids_by("ip", "x") == [new]
    for user in range(40):  # Most of these would move.
        with pytest.raises(Blocked):
            await store.rotate(other, {"user_id": user, "ip": "x"})
    assert await store.get(other) == {"id": other, "ip": "y"}


async def test_a_session_to_keep_is_looked_at_first(store: SessionStore, keyspace: Keyspace, anonymous: str) -> None:
    """If a session to keep has ended, nothing ends, in whatever partitions the others are."""
    ids = [await store.create({"ip": "y"}) for _ in range(20)]
    await store.delete(anonymous)
    before = await keyspace.dump()
    for field, value in (("ip", "y"), ("user_id", 1)):
        with pytest.raises(SessionEnded, match="deleted"):
            await store.delete_by(field, value, keep=[anonymous], keep_required=True)
        with pytest.raises(SessionNotFound):
            await store.delete_by(field, value, keep=["nobody"], keep_required=True)
    assert await keyspace.dump() == before
    assert await store.delete_by("ip", "y", keep=ids[:1], keep_required=True) == 19


async def test_a_ttl_beyond_the_default_stays(store: SessionStore, keyspace: Keyspace, anonymous: str) -> None:
    """A session without a max_age of its own keeps its TTL, even if that is longer than the default of the store."""
    key = store.get_session_key(anonymous)
    await keyspace.client.hdel(key, "_max_age")
    await keyspace.client.expire(key, 40 * 24 * 3600)
    new = await store.rotate(anonymous, {"user_id": 1})
    assert await keyspace.ttl(f"{{{new}}}") > 39 * 24 * 3_600_000


@pytest.mark.parametrize("more", [[], [b"n", b"1"]], ids=["the same", "another one"])
async def test_a_copy_that_is_written_again_during_a_revocation(
    client: Redis, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch, more: list[bytes]
) -> None:
    """A copy that was in a set when `delete_by` began ends with it, even if it is written again between two pages."""
    store = SessionStore(client, prefix=keyspace.prefix, partitions=keyspace.partitions, references=["ip"], timeout=30)
    layout, run = store.operations.layout, store.operations
    session_id, read = layout.mint(0), [b"ip", b'"x"']
    first, second = (Copy.of(session_id, [b"id", session_id.encode(), *read, *rest]) for rest in ([], more))
    for _ in range(6):
        await asyncio.gather(*(store.set(layout.mint(0), {"ip": "x"}) for _ in range(50)))
    await run.arrive(session_id, first, lives=60_000)

    async def arrive_again(_: Position) -> None:
        with suppress(Conflict):  # It has ended already.
            await run.arrive(session_id, second, lives=60_000)

    between_pages(store, monkeypatch, arrive_again)
    assert await store.delete_by("ip", "x") == 300
    retired = Retired(60_000, second.name.encode(), [], [])
    with pytest.raises(SessionEnded):
        await run.confirm(session_id, "60000", retired, second, lives=60_000)
    assert await store.ids_by("ip", "x") == []
    await store.aclose()
