"""Reference sets: limits, strictness, and how the ids of expired sessions leave them."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

import hypothesis.strategies as st
import pytest
from hypothesis import given
from redis.asyncio import Redis

from rss import LimitExceeded, Reference, SessionEnded, SessionNotFound, SessionStore
from rss.testing import RedisServer
from tests.keyspace import SLACK, SPARE, Keyspace


def _store(client: Redis, keyspace: Keyspace, **reference: object) -> SessionStore:
    references = {"user_id": Reference(**reference), "ip": Reference()}  # type: ignore[arg-type]
    return SessionStore(client, references=references, prefix=keyspace.prefix)


async def _sign_in(store: SessionStore, keyspace: Keyspace, *ids: str, user_id: object = 1) -> None:
    """Make sessions of a user a millisecond apart, so that their creation times differ."""
    for session_id in ids:
        await store.set(session_id, {"user_id": user_id, "ip": session_id})
        created = await keyspace.client.hget(store.get_session_key(session_id), "_created")
        while (await keyspace.client.time())[0] * 1000 + (await keyspace.client.time())[1] // 1000 <= int(created or 0):
            pass


async def test_the_oldest_goes_at_a_limit(client: Redis, keyspace: Keyspace) -> None:
    """A session that joins a full set evicts the session that was created first."""
    store = _store(client, keyspace, limit=2)
    await _sign_in(store, keyspace, "a", "b")
    await store.touch("a")
    await store.set("a", {"user_id": 1, "x": 1})
    await store.set("c", {"user_id": 1})
    assert await keyspace.dump() == {
        "{a}": {"_ended": "evicted"},
        "{b}": {"id": "b", "user_id": "1", "ip": "b"},
        "{c}": {"id": "c", "user_id": "1"},
        "user_id:{1}": {"b", "c"},
        "ip:{b}": {"b"},
    }
    with pytest.raises(SessionEnded, match="evicted"):
        await store.set("a", {"user_id": 1})


async def test_a_limit_that_refuses(client: Redis, keyspace: Keyspace) -> None:
    """A full set refuses more sessions with LimitExceeded, until one of its sessions ends or expires."""
    store = _store(client, keyspace, limit=2, on_limit="refuse")
    await _sign_in(store, keyspace, "a", "b")
    await store.set("c", {"user_id": 2, "ip": "c"})
    before = await keyspace.dump()
    for write in (
        store.create({"user_id": 1}),
        store.set("d", {"user_id": 1}),
        store.set("c", {"user_id": 1, "x": 1}),
        store.set("c", {"user_id": [2, 1]}),
        store.rotate("c", {"user_id": 1}),
    ):
        with pytest.raises(LimitExceeded) as raised:
            await write
        assert raised.value.field == "user_id"
        assert str(raised.value) == "no more sessions are allowed for this value of 'user_id'"
        assert await keyspace.dump() == before
    await store.set("a", {"user_id": 1, "x": 1})
    a = await store.rotate("a", {"user_id": 1})
    await keyspace.expire("{b}")
    await store.set("c", {"user_id": 1})
    assert (await keyspace.dump())["user_id:{1}"] == {a, "c"}
    await store.delete("c")
    await store.set("d", {"user_id": 1})
    assert (await keyspace.dump())["user_id:{1}"] == {a, "d"}


async def test_a_limit_holds_against_parallel_logins(client: Redis, keyspace: Keyspace) -> None:
    """Fifty parallel logins do not exceed the limit."""
    store = _store(client, keyspace, limit=3)
    await asyncio.gather(*(store.create({"user_id": 1}) for _ in range(50)))
    assert await store.count_by("user_id", 1) == 3
    assert len([key for key, held in (await keyspace.dump()).items() if held == {"_ended": "evicted"}]) == 47


async def test_a_new_limit_shrinks_a_large_set(client: Redis, keyspace: Keyspace) -> None:
    """A new limit evicts all surplus sessions when the next session joins."""
    await _sign_in(_store(client, keyspace), keyspace, *"abcdef")
    await _store(client, keyspace, limit=2).set("g", {"user_id": 1})
    assert (await keyspace.dump())["user_id:{1}"] == {"f", "g"}


async def test_a_session_evicted_for_one_value_makes_room_in_others(client: Redis, keyspace: Keyspace) -> None:
    """A session that joins two full sets evicts one session if both sets hold that session."""
    store = _store(client, keyspace, limit=2)
    await _sign_in(store, keyspace, "a", user_id=[1, 2])
    await _sign_in(store, keyspace, "b")
    await _sign_in(store, keyspace, "c", user_id=2)
    await store.set("d", {"user_id": [1, 2]})
    assert await store.ended("a") == "evicted"
    dump = await keyspace.dump()
    assert dump["user_id:{1}"] == {"b", "d"}
    assert dump["user_id:{2}"] == {"c", "d"}


async def test_strict_deleting_the_set_revokes(client: Redis, keyspace: Keyspace) -> None:
    """Deleting the set of a strict reference revokes its sessions, and no write revives them.

    The sessions stay in their other sets, so a store for which the reference is not strict still finds them.
    """
    store = _store(client, keyspace, strict=True)
    for session_id in "ab":
        await store.set(session_id, {"user_id": 1, "ip": "x"})
    await store.set("c", {"ip": "x"})
    await keyspace.client.delete(store.get_reference_key("user_id", 1))
    before = await keyspace.dump()
    assert await store.get("a") == {}
    assert await store.get("a", ["ip"], touch=True) == {}
    assert await store.ended("a") == "revoked"
    assert await store.ttl("a") is None
    assert not await store.touch("a")
    for write in (
        store.set("a", {"user_id": 1}),
        store.unset("a", ["user_id"]),
        store.pop("a", ["ip"]),
        store.increment("a", "n"),
        store.rotate("a"),
    ):
        with pytest.raises(SessionEnded, match="revoked"):
            await write
    assert await keyspace.dump() == before
    assert not await store.delete("a")
    assert await store.ids_by("ip", "x") == ["c"]
    dump = await keyspace.dump()
    assert dump["{a}"] == {"_ended": "revoked"}
    assert dump["ip:{x}"] == {"b", "c"}
    assert sorted(await _store(client, keyspace).ids_by("ip", "x")) == ["b", "c"]


# ---------------------------------------------------------------------- stores of other options


@pytest.fixture(name="young")
def _young(client: Redis, keyspace: Keyspace) -> SessionStore:
    """A store with a max_lifetime, on the prefix of a store without one, as during a deployment."""
    references = {"user_id": Reference(limit=2), "ip": Reference()}
    return SessionStore(client, references=references, prefix=keyspace.prefix, max_lifetime="1h")


async def _age(keyspace: Keyspace, session_id: str) -> None:
    await keyspace.client.hincrby(f"{keyspace.prefix}:{{{session_id}}}", "_created", -7_200_000)


async def test_a_session_that_is_too_old_for_another_store_stays_in_its_sets(
    store: SessionStore, young: SessionStore, keyspace: Keyspace
) -> None:
    """A store that regards a session as too old hides it, but does not take it out of its sets."""
    await store.set("a", {"user_id": 1, "ip": "x"})
    await store.set("b", {"user_id": 1, "ip": "x"})
    await _age(keyspace, "a")
    before = await keyspace.dump()
    assert await young.ended("a") == "expired"
    assert await young.ids_by("user_id", 1) == ["b"]
    assert await young.count_by("ip", "x") == 1
    assert [session["id"] async for session in young.find_by("ip", "x")] == ["b"]
    assert await keyspace.dump() == before
    assert sorted(await store.ids_by("user_id", 1)) == ["a", "b"]


async def test_delete_by_ends_what_another_store_takes_for_alive(
    store: SessionStore, young: SessionStore, keyspace: Keyspace
) -> None:
    """`delete_by` ends every session with the value, but counts only those that its store regards as alive."""
    await store.set("a", {"user_id": 1, "ip": "x"})
    await store.set("b", {"user_id": 1, "ip": "x"})
    await _age(keyspace, "a")
    assert await young.delete_by("user_id", 1) == 1
    assert await keyspace.dump() == {"{a}": {"_ended": "expired"}, "{b}": {"_ended": "deleted"}}
    assert await store.get("a") == {}


async def test_a_limit_leaves_alone_what_another_store_takes_for_alive(
    store: SessionStore, young: SessionStore, keyspace: Keyspace
) -> None:
    """A limit ignores a session that is too old for this store but alive for another one."""
    await store.set("old", {"user_id": 1})
    await _age(keyspace, "old")
    await _sign_in(young, keyspace, "a", "b", "c")
    assert await store.get("old") == {"id": "old", "user_id": 1}
    assert await young.ended("a") == "evicted"
    assert (await keyspace.dump())["user_id:{1}"] == {"old", "b", "c"}


async def test_a_max_age_that_is_given_is_kept_when_the_default_changes(client: Redis, keyspace: Keyspace) -> None:
    """A `max_age` that was given stays when the default changes, even if it was the default before."""
    before = SessionStore(client, prefix=keyspace.prefix, max_age="1h")
    after = SessionStore(client, prefix=keyspace.prefix, max_age="1m")
    await before.set("given", {}, "1h")
    await before.set("default", {})
    for session_id in ("given", "default"):
        await after.touch(session_id)
    assert 60_000 < await keyspace.ttl("{given}") <= 3_600_000
    assert await keyspace.ttl("{default}") <= 60_000
    new = await before.rotate("default", max_age="1h")
    await after.set(new, {"x": 1})
    assert await keyspace.ttl(f"{{{new}}}") > 60_000


# ---------------------------------------------------------------------- strict references


async def test_strict_needs_every_value_of_a_list(client: Redis, keyspace: Keyspace) -> None:
    """A session with two strict values is revoked when it leaves either set; one without values is not."""
    store = _store(client, keyspace, strict=True)
    await store.set("a", {"user_id": [1, 2]})
    await store.set("b", {"user_id": None})
    await keyspace.client.srem(store.get_reference_key("user_id", 2), "a")
    assert await store.get("a") == {}
    assert await store.get("b") == {"id": "b", "user_id": None}


async def test_strict_another_type_in_place_of_a_set(client: Redis, keyspace: Keyspace) -> None:
    """Another type in place of a strict set revokes its sessions, and does not affect other sessions of the user."""
    references = {"user_id": Reference(), "team": Reference(strict=True)}
    store = SessionStore(client, references=references, prefix=keyspace.prefix)
    await store.set("a", {"user_id": 1, "team": "x"})
    await keyspace.client.set(store.get_reference_key("team", "x"), "planted", ex=60)
    assert await store.get("a") == {}
    await store.set("b", {"user_id": 1})
    assert await store.ids_by("user_id", 1) == ["b"]
    assert await store.delete_by("user_id", 1) == 1


async def test_a_lost_set_is_made_again(store: SessionStore, keyspace: Keyspace) -> None:
    """A write or a rotation puts the session back into a set that was lost, unless the reference is strict."""
    await store.set("a", {"user_id": 1, "ip": "x"})
    before = await keyspace.dump()
    await keyspace.client.delete(store.get_reference_key("user_id", 1))
    await store.set("a", {})
    assert await keyspace.dump() == before
    await keyspace.client.delete(store.get_reference_key("ip", "x"))
    new = await store.rotate("a")
    assert (await keyspace.dump())["ip:{x}"] == {new}


async def test_expired_ids_leave_as_new_ones_come(client: Redis, keyspace: Keyspace) -> None:
    """Expired ids leave a set as new sessions join, so few of them pile up."""
    store = SessionStore(client, references=["ip"], prefix=keyspace.prefix)
    key = store.get_reference_key("ip", "x")
    await store.set("live", {"ip": "x"})
    for _ in range(500):
        await keyspace.expire(f"{{{await store.create({'ip': 'x'}, '1m')}}}")
    assert await keyspace.client.scard(key) < 20
    assert await store.ids_by("ip", "x") == ["live"]
    assert await keyspace.client.smembers(key) == {"live"}


RENEWALS: dict[str, Callable[[SessionStore], Awaitable[object]]] = {
    "touch": lambda store: store.touch("live"),
    "get": lambda store: store.get("live", touch=True),
    "set": lambda store: store.set("live", {"x": 1}),
    "unset": lambda store: store.unset("live", ["x"]),
}


@pytest.mark.parametrize("way", RENEWALS)
async def test_expired_ids_leave_as_a_session_is_renewed(client: Redis, keyspace: Keyspace, way: str) -> None:
    """Renewals that extend a set remove some expired ids, so a set that no session joins shrinks, too."""
    store = SessionStore(client, references=["ip"], prefix=keyspace.prefix)
    key = store.get_reference_key("ip", "x")
    await store.set("live", {"ip": "x"})
    await keyspace.client.sadd(key, *(f"dead-{n}" for n in range(100)))
    for _ in range(40):
        await keyspace.shorten(2 * 24 * 3_600_000)
        await keyspace.client.pexpire(key, await keyspace.client.pttl(key) - 2 * 24 * 3_600_000)
        await RENEWALS[way](store)
    assert await keyspace.client.scard(key) < 30
    assert await keyspace.client.sismember(key, "live")


async def test_a_quick_count_is_an_upper_bound(store: SessionStore, keyspace: Keyspace) -> None:
    """The quick count includes expired sessions, until an exact count removes their ids."""
    await store.set("a", {"user_id": 1})
    await store.set("b", {"user_id": 1})
    assert await store.count_by("user_id", 1, exact=False) == await store.count_by("user_id", 1) == 2
    await keyspace.expire("{a}")
    await store.set("a", {"user_id": 2})
    assert await store.count_by("user_id", 1, exact=False) == 2
    assert await store.count_by("user_id", 1) == 1
    assert await store.count_by("user_id", 1, exact=False) == 1
    assert await store.count_by("user_id", "nobody", exact=False) == 0


async def test_a_session_made_again_counts_only_for_its_new_value(store: SessionStore, keyspace: Keyspace) -> None:
    """A session made again under the id of an expired one is not found by the old value."""
    await store.set("a", {"user_id": 1})
    await keyspace.expire("{a}")
    await store.set("a", {"user_id": 2})
    assert await store.delete_by("user_id", 1) == 0
    assert await keyspace.dump() == {"{a}": {"id": "a", "user_id": "2"}, "user_id:{2}": {"a"}}


async def test_a_set_without_a_ttl_keeps_none(store: SessionStore, keyspace: Keyspace) -> None:
    """A reference set that others made without a TTL stays without one."""
    key = store.get_reference_key("user_id", 1)
    await keyspace.client.sadd(key, "other")
    await store.set("a", {"user_id": 1})
    await store.touch("a")
    assert await keyspace.client.pttl(key) == -1


async def test_a_session_lives_no_longer_than_its_lifetime(client: Redis, keyspace: Keyspace) -> None:
    """Neither a renewal nor a new id lets a session live longer than `max_lifetime`."""
    store = SessionStore(client, prefix=keyspace.prefix, max_age="2h", max_lifetime="3h")
    key = store.get_session_key("a")
    await store.set("a", {})
    await keyspace.client.hincrby(key, "_created", -2 * 3_600_000)
    await store.touch("a")
    assert 3_500_000 < await keyspace.ttl("{a}") <= 3_600_000
    await store.set("a", {"x": 1}, "100 days")
    assert 3_500_000 < await keyspace.ttl("{a}") <= 3_600_000
    new = await store.rotate("a")
    await store.get(new, touch=True)
    assert 3_500_000 < await keyspace.ttl(f"{{{new}}}") <= 3_600_000

    await keyspace.client.hincrby(store.get_session_key(new), "_created", -3_600_000)
    assert await store.get(new) == {}
    assert await store.ended(new) == "expired"
    with pytest.raises(SessionEnded, match="expired"):
        await store.set(new, {"x": 1})


async def test_a_session_of_the_original_gets_a_birthday(client: Redis, keyspace: Keyspace) -> None:
    """A session without a creation time gets one at its first renewal, and keeps it."""
    store = SessionStore(client, references=["user_id"], prefix=keyspace.prefix, max_lifetime="3h")
    key = store.get_session_key("a")
    await keyspace.client.hset(key, mapping={"id": "a", "user_id": "1"})
    await keyspace.client.expire(key, 3600)
    assert await store.get("a") == {"id": "a", "user_id": 1}
    assert await store.touch("a")
    created = await keyspace.client.hget(key, "_created")
    await store.set("a", {"x": 1})
    assert created
    assert await keyspace.client.hget(key, "_created") == created
    assert await keyspace.dump() == {"{a}": {"id": "a", "user_id": "1", "x": "1"}, "user_id:{1}": {"a"}}


async def test_a_hash_without_ttl_is_no_session(store: SessionStore, keyspace: Keyspace) -> None:
    """A hash without a TTL under the key of a session is ignored, and a new session replaces it."""
    key = store.get_session_key("a")
    for rest in ({"id": "a", "role": "admin"}, {"role": "admin"}):
        await keyspace.client.delete(key)
        await keyspace.client.hset(key, mapping=rest)  # type: ignore[arg-type]
        assert await store.get("a") == {}
        with pytest.raises(SessionNotFound):
            await store.increment("a", "n")
        await store.set("a", {"x": 1})
        assert await keyspace.dump() == {"{a}": {"id": "a", "x": "1"}}


WRITES: dict[str, Callable[[SessionStore], Awaitable[object]]] = {
    "set": lambda store: store.set("a", {"x": 1}, "2h"),
    "set that moves": lambda store: store.set("a", {"user_id": 2}, "2h"),
    "new": lambda store: store.set("b", {"user_id": 2}, "2h"),
    "touch": lambda store: store.touch("a", "2h"),
    "get": lambda store: store.get("a", touch=True),
    "unset": lambda store: store.unset("a", ["x"], "2h"),
    "unset that moves": lambda store: store.unset("a", ["user_id"], "2h"),
    "rotate": lambda store: store.rotate("a", max_age="2h"),
}


@pytest.mark.parametrize("way", WRITES)
async def test_a_session_gets_its_ttl_last(url: str, way: str) -> None:
    """A script sets the TTL of a session's hash after all other writes to it.

    On Redis 6.2 time passes inside a script. A write after the TTL could recreate an expired hash, without a TTL.
    """
    async with (
        Redis.from_url(url, decode_responses=True) as admin,
        SessionStore.from_url(url, references=["user_id"]) as store,
    ):
        await admin.flushall()
        await admin.hset("rss:{a}", mapping={"id": "a", "user_id": "1", "x": "0"})  # Without _created and _max_age.
        await admin.sadd("rss:user_id:{1}", "a")
        for key in ("rss:{a}", "rss:user_id:{1}"):
            await admin.expire(key, 3600)
        async with admin.monitor() as monitor:
            await WRITES[way](store)
            await admin.echo("done")
            commands = [(await monitor.next_command())["command"].split(" ")]
            while commands[-1][0] != "ECHO":
                commands.append((await monitor.next_command())["command"].split(" "))
    last = {
        key: name
        for name, key, *_ in filter(lambda command: len(command) > 1, commands)
        if name in ("HSET", "HDEL", "PEXPIRE", "PEXPIREAT") and key.startswith("rss:{")
    }
    assert last
    assert set(last.values()) <= {"PEXPIRE", "PEXPIREAT"}
    assert {"HSET"} <= {name for name, *_ in commands}


# ---------------------------------------------------------------------- no script takes long


async def _scripts_run(url: str, *calls: Awaitable[object]) -> int:
    """Run calls that begin at the same time, and return how many scripts they took."""
    async with Redis.from_url(url) as admin:
        await admin.config_resetstat()
        await asyncio.gather(*calls)
        return int((await admin.info("commandstats"))["cmdstat_evalsha"]["calls"])


@pytest.fixture(name="busy")
async def _busy(url: str) -> AsyncIterator[SessionStore]:
    """A store on a server whose scripts are counted."""
    async with Redis.from_url(url) as admin:
        await admin.flushall()
    async with SessionStore.from_url(url, references=["user_id", "ip"], timeout=30) as store:
        yield store


async def test_sets_are_weighed(busy: SessionStore, url: str) -> None:
    """Sessions in many sets make small batches, since a script ends when its time budget is spent."""
    ids: list[str] = []

    async def create(n: int) -> None:
        ids.append(await busy.create({"user_id": [f"{n}-{i}" for i in range(100)]}))

    async def rotate(session_id: str) -> None:
        ids.append(await busy.rotate(session_id))

    assert await _scripts_run(url, *(create(n) for n in range(100))) >= 20
    assert await _scripts_run(url, *(busy.touch(session_id, "60 days") for session_id in ids)) >= 10
    assert await _scripts_run(url, *(rotate(session_id) for session_id in ids)) >= 20
    assert await _scripts_run(url, *(busy.delete(session_id) for session_id in ids[100:])) >= 5


async def test_fields_are_weighed(busy: SessionStore, url: str) -> None:
    """Sessions with many fields make small batches and small pages."""
    fields = {f"field-{i}": i for i in range(800)}
    ids = await asyncio.gather(*(busy.create({"ip": "x", **fields}) for _ in range(60)))
    assert await _scripts_run(url, *(busy.get(session_id) for session_id in ids)) >= 10
    assert await _scripts_run(url, *(busy.set(session_id, fields) for session_id in ids)) >= 12
    names = [*fields]
    assert await _scripts_run(url, *(busy.get(session_id, names) for session_id in ids)) >= 10

    async def find() -> None:
        assert len([session async for session in busy.find_by("ip", "x")]) == 60

    assert await _scripts_run(url, find()) >= 10
    assert await _scripts_run(url, *(busy.unset(session_id, names) for session_id in ids)) >= 12
    assert await busy.delete_by("ip", "x") == 60


async def test_a_page_of_sessions_in_many_sets_is_small(busy: SessionStore, url: str) -> None:
    """A page of sessions in many sets is small, so `delete_by` needs more pages for them."""
    await asyncio.gather(*(busy.create({"ip": "x", "user_id": [f"{n}-{i}" for i in range(120)]}) for n in range(100)))
    assert await _scripts_run(url, busy.delete_by("ip", "x")) >= 6
    assert await busy.count_by("user_id", "7-7") == 0


async def test_grace_leads_over_eight_rotations(busy: SessionStore, url: str) -> None:
    """Grace follows at most eight rotations, and an older id costs no more commands."""
    ids = [await busy.create()]
    for _ in range(10):
        ids.append(await busy.rotate(ids[-1], grace="1h"))
    assert [bool(await busy.get(session_id)) for session_id in ids] == [False, False, *[True] * 9]
    assert await busy.ended(ids[0]) == "rotated"
    async with Redis.from_url(url) as admin:
        await admin.config_resetstat()
        await busy.get(ids[0])
        stats = await admin.info("commandstats")
    assert sum(stats[f"cmdstat_{name}"]["calls"] for name in ("hgetall", "hmget")) <= 9 + 8


@given(
    ages=st.lists(st.tuples(st.sampled_from(["set", "move", "touch", "unset", "rotate"]), st.integers(60_000, 10**11))),
)
def test_sets_outlive_a_session_however_it_is_renewed(redis_server: RedisServer, ages: list[tuple[str, int]]) -> None:
    """Sets outlive their session by at most a 32nd of its lifetime plus a tenth of a second."""

    async def run() -> None:
        async with Redis.from_url(redis_server.url, decode_responses=True) as client:
            keyspace = Keyspace(client, f"ages-{secrets.token_hex(8)}")
            store = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
            session_id, longest = await store.create({"user_id": 1, "ip": "x"}, timedelta(minutes=1)), 60_000
            for turn, (how, ms) in enumerate(ages):
                age = timedelta(milliseconds=ms)
                match how:
                    case "set":
                        await store.set(session_id, {"visits": 1}, age)
                    case "move":
                        await store.set(session_id, {"user_id": turn % 2}, age)
                    case "touch":
                        await store.touch(session_id, age)
                    case "unset":
                        await store.unset(session_id, ["visits"], age)
                    case _:
                        session_id = await store.rotate(session_id, {"user_id": turn % 3})
                longest = max(longest, ms)
                (user,) = await client.keys(f"{keyspace.prefix}:user_id:*")
                sets = [await client.pttl(key) for key in (user, f"{keyspace.prefix}:ip:{{x}}")]
                assert await keyspace.ttl(f"{{{session_id}}}") <= min(sets) <= max(sets) <= longest * SLACK + SPARE
            await keyspace.clear()

    asyncio.run(run())


@pytest.mark.parametrize("user", [2, "two", None])
async def test_a_limit_ends_no_session_of_another_value(
    client: Redis, keyspace: Keyspace, user: int | str | None
) -> None:
    """A limit never evicts a session of another value whose id was left in the full set."""
    limit = 1000  # Enough members to exhaust the time of a script before it has looked at all.
    store = SessionStore(client, references={"user_id": Reference(limit=limit)}, prefix=keyspace.prefix)
    await store.set("other", {"user_id": user})
    await asyncio.gather(*(store.create({"user_id": 1}) for _ in range(limit - 1)))
    key = store.get_reference_key("user_id", 1)
    await keyspace.client.hincrby(store.get_session_key("other"), "_created", -1000)  # The oldest is evicted.
    for _ in range(20):
        await keyspace.client.sadd(key, "other")
        await store.create({"user_id": 1})
        assert await store.ended("other") is None
    assert await store.count_by("user_id", 1) == limit
