"""What the Node original gets wrong, each shown right here; the numbers are those of its known defects."""

import asyncio

import pytest
from redis.asyncio import Redis

from rss import SessionEnded, SessionError, SessionStore, TextCodec
from tests.keyspace import SLACK, Keyspace


async def test_b1_delete_leaves_every_set(store: SessionStore, keyspace: Keyspace) -> None:
    """The original takes values for pairs of field and value, and leaves no set at all."""
    await store.set("a", {"user_id": 1, "ip": "0.0.0.0"})
    await store.delete("a")
    assert await keyspace.dump() == {"{a}": {"_ended": "deleted"}}


async def test_b2_a_new_value_leaves_the_old_set(store: SessionStore, keyspace: Keyspace) -> None:
    """The original leaves the session in both."""
    await store.set("a", {"user_id": 1})
    await store.set("a", {"user_id": 2})
    assert await keyspace.dump() == {"{a}": {"id": "a", "user_id": "2"}, "user_id:{2}": {"a"}}


async def test_b3_reference_sets_have_a_ttl(store: SessionStore, keyspace: Keyspace) -> None:
    """Those of the original stay for ever."""
    await store.set("a", {"user_id": 1}, "1h")
    assert 3_590_000 < await keyspace.ttl("{a}") <= await keyspace.ttl("user_id:{1}") <= 3_600_000 * SLACK


async def test_b4_the_id_of_an_expired_session_goes(store: SessionStore, keyspace: Keyspace) -> None:
    """By a read of the set, by the next that joins, or with the set itself: here it is read."""
    await store.set("a", {"user_id": 1})
    await store.set("b", {"user_id": 1}, "1h")
    await keyspace.expire("{b}")
    assert await store.count_by("user_id", 1) == 1
    assert (await keyspace.dump())["user_id:{1}"] == {"a"}


async def test_b5_a_deleted_session_is_not_made_again(store: SessionStore, keyspace: Keyspace) -> None:
    """A late write to it fails: the original makes half a session of it."""
    await store.set("a", {"user_id": 1})
    await store.delete("a")
    with pytest.raises(SessionEnded):
        await store.set("a", {"theme": "dark"})
    assert await keyspace.dump() == {"{a}": {"_ended": "deleted"}}


async def test_b6_touch_tells_that_there_is_no_session(store: SessionStore) -> None:
    """So that no cookie is renewed for it."""
    assert await store.touch("a") is False


async def test_b7_none_leaves_nothing_behind(store: SessionStore, keyspace: Keyspace) -> None:
    """The original puts a session without a user into the set of user "null", and never takes it out."""
    await store.set("a", {"user_id": None})
    assert await keyspace.dump() == {"{a}": {"id": "a", "user_id": "null"}}
    await store.unset("a", ["user_id"])
    assert await keyspace.dump() == {"{a}": {"id": "a"}}


async def test_b8_a_list_is_a_value(store: SessionStore, keyspace: Keyspace) -> None:
    """The original spreads it over the fields that come next, or fails in silence."""
    await store.set("a", {"roles": ["a", "b", "c"], "user_id": ["a", "b"]})
    assert await store.get("a") == {"id": "a", "roles": ["a", "b", "c"], "user_id": ["a", "b"]}
    assert set(await keyspace.dump()) == {"{a}", "user_id:{a}", "user_id:{b}"}


async def test_b9_no_fields_to_unset_is_an_error_of_the_caller(store: SessionStore) -> None:
    """Not one of a broken transaction."""
    with pytest.raises(ValueError, match="fields must not be empty"):
        await store.unset("a", [])


async def test_b10_a_key_of_another_type_stops_the_write(store: SessionStore, keyspace: Keyspace) -> None:
    """The original resolves, with a session that no set knows of."""
    await keyspace.client.set(store.get_reference_key("user_id", 1), "x", ex=60)
    with pytest.raises(SessionError, match="another type of data"):
        await store.set("a", {"ip": "x", "user_id": 1})
    assert await keyspace.dump() == {"user_id:{1}": "string"}


async def test_b11_one_operation_is_one_command(store: SessionStore, redis_url: str) -> None:
    """No transaction over several keys: where slots matter, one script names all keys it makes."""
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
    """The original brings back text, and "[object Object]"."""
    values = {"i": 1, "f": 1.5, "b": True, "n": None, "l": [1, "1"], "d": {"a": {"b": [None]}}, "s": "1", "e": ""}
    await store.set("a", values)
    assert await store.get("a") == {"id": "a", **values}


async def test_b13_stores_do_not_mix(client: Redis, keyspace: Keyspace) -> None:
    """Two stores whose names meet in one key see an error, never each other's data; there is always a prefix."""
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
    """To the original it is 28 days, and so is 0."""
    for duration in ("soon", "28 dayz", 0):
        with pytest.raises(ValueError, match="max_age must be"):
            await store.set("a", {}, duration)
    assert await keyspace.dump() == {}


async def test_r1_unset_does_not_race_with_set(store: SessionStore, client: Redis, keyspace: Keyspace) -> None:
    """The original reads, then writes: a set in between leaves an id in a set without the field in the hash."""
    other = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix)
    for n in range(50):
        await store.set("a", {"user_id": n})
        await asyncio.gather(store.unset("a", ["user_id"]), other.set("a", {"user_id": n + 1}), store.touch("a"))
        dump = await keyspace.dump()
        value = (await store.get("a")).get("user_id")
        sets = {f"user_id:{{{value}}}": {"a"}} if value else {}
        assert {name: held for name, held in dump.items() if name != "{a}"} == sets


async def test_its_sessions_can_be_read(client: Redis, keyspace: Keyspace) -> None:
    """With TextCodec a store works on what the original wrote, and the original can read what it writes."""
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
