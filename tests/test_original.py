"""The known defects of the Node original, by their numbers: each test shows the right behaviour here."""

import asyncio

import pytest
from redis.asyncio import Redis

from rss import SessionEnded, SessionError, SessionStore, TextCodec
from tests.keyspace import SLACK, Keyspace


async def test_b1_delete_leaves_every_set(store: SessionStore, keyspace: Keyspace) -> None:
    """`delete` takes the session out of every set; in the original it stays in all of them."""
    await store.set("a", {"user_id": 1, "ip": "0.0.0.0"})
    await store.delete("a")
    assert await keyspace.dump() == {"{a}": {"_ended": "deleted"}}


async def test_b2_a_new_value_leaves_the_old_set(store: SessionStore, keyspace: Keyspace) -> None:
    """A new value takes the session out of the old set; in the original it stays in both."""
    await store.set("a", {"user_id": 1})
    await store.set("a", {"user_id": 2})
    assert await keyspace.dump() == {"{a}": {"id": "a", "user_id": "2"}, "user_id:{2}": {"a"}}


async def test_b3_reference_sets_have_a_ttl(store: SessionStore, keyspace: Keyspace) -> None:
    """Reference sets have a TTL; those of the original stay for ever."""
    await store.set("a", {"user_id": 1}, "1h")
    assert 3_590_000 < await keyspace.ttl("{a}") <= await keyspace.ttl("user_id:{1}") <= 3_600_000 * SLACK


async def test_b4_the_id_of_an_expired_session_goes(store: SessionStore, keyspace: Keyspace) -> None:
    """The id of an expired session leaves its set when the set is read."""
    await store.set("a", {"user_id": 1})
    await store.set("b", {"user_id": 1}, "1h")
    await keyspace.expire("{b}")
    assert await store.count_by("user_id", 1) == 1
    assert (await keyspace.dump())["user_id:{1}"] == {"a"}


async def test_b5_a_deleted_session_is_not_made_again(store: SessionStore, keyspace: Keyspace) -> None:
    """A late write to a deleted session fails; in the original it makes half a session."""
    await store.set("a", {"user_id": 1})
    await store.delete("a")
    with pytest.raises(SessionEnded):
        await store.set("a", {"theme": "dark"})
    assert await keyspace.dump() == {"{a}": {"_ended": "deleted"}}


async def test_b6_touch_tells_that_there_is_no_session(store: SessionStore) -> None:
    """`touch` returns False if there is no session, so that no cookie is renewed."""
    assert await store.touch("a") is False


async def test_b7_none_leaves_nothing_behind(store: SessionStore, keyspace: Keyspace) -> None:
    """A reference that is None puts the session into no set; the original uses the set of user "null"."""
    await store.set("a", {"user_id": None})
    assert await keyspace.dump() == {"{a}": {"id": "a", "user_id": "null"}}
    await store.unset("a", ["user_id"])
    assert await keyspace.dump() == {"{a}": {"id": "a"}}


async def test_b8_a_list_is_a_value(store: SessionStore, keyspace: Keyspace) -> None:
    """A list is stored as one value; the original spreads it over the next fields, or fails silently."""
    await store.set("a", {"roles": ["a", "b", "c"], "user_id": ["a", "b"]})
    assert await store.get("a") == {"id": "a", "roles": ["a", "b", "c"], "user_id": ["a", "b"]}
    assert set(await keyspace.dump()) == {"{a}", "user_id:{a}", "user_id:{b}"}


async def test_b9_no_fields_to_unset_is_an_error_of_the_caller(store: SessionStore) -> None:
    """`unset` without fields raises ValueError; in the original the transaction fails."""
    with pytest.raises(ValueError, match="fields must not be empty"):
        await store.unset("a", [])


async def test_b10_a_key_of_another_type_stops_the_write(store: SessionStore, keyspace: Keyspace) -> None:
    """A set of another type stops the write; the original stores a session that is in no set."""
    await keyspace.client.set(store.get_reference_key("user_id", 1), "x", ex=60)
    with pytest.raises(SessionError, match="another type of data"):
        await store.set("a", {"ip": "x", "user_id": 1})
    assert await keyspace.dump() == {"user_id:{1}": "string"}


async def test_b11_one_operation_is_one_command(store: SessionStore, redis_url: str) -> None:
    """One operation is one script that names all keys it makes, and no transaction over several keys."""
    await store.load()
    async with Redis.from_url(redis_url, decode_responses=True) as watcher, watcher.monitor() as monitor:
        await store.set("a", {"user_id": 1, "ip": "x"})
        await store.delete("a")
        seen: list[str] = []
        while len([command for command in seen if command.startswith("EVALSHA")]) < 2:
            event = await monitor.next_command()
            if event["client_type"] != "lua":
                seen.append(str(event["command"]))
        key = store.get_session_key("a").removesuffix("{a}")
        evals = [command.split() for command in seen if command.startswith("EVALSHA") and key in command]
    assert [command[2] for command in evals] == ["3", "1"]
    assert not [command for command in seen if command.startswith(("MULTI", "EXEC", "WATCH"))]


async def test_b12_values_keep_their_types(store: SessionStore) -> None:
    """Values keep their types; the original returns text, such as "[object Object]"."""
    values = {"i": 1, "f": 1.5, "b": True, "n": None, "l": [1, "1"], "d": {"a": {"b": [None]}}, "s": "1", "e": ""}
    await store.set("a", values)
    assert await store.get("a") == {"id": "a", **values}


async def test_b13_stores_do_not_mix(client: Redis, keyspace: Keyspace) -> None:
    """Two stores whose keys collide raise an error instead of mixing their data; the prefix is never empty."""
    assert SessionStore(client).get_session_key("x") == "rss:{x}"
    with pytest.raises(ValueError, match="prefix must not be empty"):
        SessionStore(client, prefix="")
    one = SessionStore(client, prefix=keyspace.prefix, references=["b"])
    two = SessionStore(client, prefix=f"{keyspace.prefix}:b", references=["b"])
    assert one.get_reference_key("b", "x") == two.get_session_key("x")
    await one.set("a", {"b": "x"})
    before = await keyspace.dump()
    for mixed in (two.set("x", {"v": 1}), two.get("x"), two.delete("x"), two.touch("x"), two.rotate("x")):
        with pytest.raises(SessionError, match="Is the prefix shared"):
            await mixed
    assert await keyspace.dump() == before
    await two.set("y", {"v": 1})
    with pytest.raises(SessionError, match="Is the prefix shared"):
        await one.set("z", {"b": "y"})
    assert await one.get("z") == {}
    assert await two.get("y") == {"id": "y", "v": 1}


async def test_b14_an_unknown_duration_is_an_error(store: SessionStore, keyspace: Keyspace) -> None:
    """An unknown duration is an error, and so is 0; the original takes 28 days for both."""
    for duration in ("soon", "28 dayz", 0):
        with pytest.raises(ValueError, match="max_age must be"):
            await store.set("a", {}, duration)
    assert await keyspace.dump() == {}


async def test_r1_unset_does_not_race_with_set(store: SessionStore, client: Redis, keyspace: Keyspace) -> None:
    """`unset` is atomic: a parallel `set` cannot leave an id in a set without the field in the hash."""
    other = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    for n in range(50):
        await store.set("a", {"user_id": n})
        await asyncio.gather(store.unset("a", ["user_id"]), other.set("a", {"user_id": n + 1}), store.touch("a"))
        dump = await keyspace.dump()
        value = (await store.get("a")).get("user_id")
        sets = {f"user_id:{{{value}}}": {"a"}} if value else {}
        assert {name: held for name, held in dump.items() if name != "{a}"} == sets


async def test_its_sessions_can_be_read(client: Redis, keyspace: Keyspace) -> None:
    """With TextCodec a store can read and change the sessions of the original."""
    store = SessionStore(client, references=["user_id"], prefix=keyspace.prefix, codec=TextCodec())
    await keyspace.client.hset(f"{keyspace.prefix}:{{a}}", mapping={"id": "a", "user_id": "[1]", "theme": "null"})
    await keyspace.client.pexpire(f"{keyspace.prefix}:{{a}}", 60_000)
    await keyspace.client.sadd(f"{keyspace.prefix}:user_id:{{[1]}}", "a", "leaked")
    assert await store.get("a") == {"id": "a", "user_id": "[1]", "theme": "null"}
    assert await store.ids_by("user_id", "[1]") == ["a"]
    await store.set("a", {"user_id": 2})
    assert await keyspace.dump() == {
        "{a}": {"id": "a", "user_id": "2", "theme": "null"},
        "user_id:{2}": {"a"},
    }
