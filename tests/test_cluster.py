"""The store on a Redis Cluster whose slots move, and whose servers stop."""

import asyncio
import random
import re
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis.exceptions
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode

from rss import (
    Blocked,
    PartlyDone,
    Reference,
    SessionEnded,
    SessionError,
    SessionNotFound,
    Sessions,
    SessionStore,
    StoreUnavailable,
)
from rss.engine import operations
from rss.engine.call import Call
from rss.engine.coalesce import Batch, Queue
from rss.engine.lane import Lane
from rss.keys import Partitioned
from rss.keys import slot as slot_of
from rss.testing import Cluster, cluster, free_port
from tests.documents import ROOT
from tests.keyspace import Keyspace
from tests.servers import behind_proxy, own_server
from tests.steps import run_at

PARTITIONS = 16
GUIDE = (ROOT / "rss" / "guides" / "store.md").read_text()


@pytest.fixture(name="keyspace")
async def _keyspace(servers: Cluster) -> AsyncIterator[Keyspace]:
    """All keys of this test, in all servers."""
    client: Any = RedisCluster.from_url(servers.url.replace("+cluster", ""), decode_responses=True)
    async with client:
        keyspace = Keyspace(client, f"test-{secrets.token_hex(8)}", PARTITIONS)
        yield keyspace
        await keyspace.clear()


@pytest.fixture(name="layout")
def _layout(keyspace: Keyspace) -> Partitioned:
    return Partitioned(keyspace.prefix, 24, PARTITIONS)


@pytest.fixture(name="store", params=["lax", "strict"])
async def _store(servers: Cluster, keyspace: Keyspace, request: pytest.FixtureRequest) -> AsyncIterator[SessionStore]:
    """A store with a client of its own."""
    references = {"user_id": Reference(), "ip": Reference(strict=request.param == "strict")}
    url = servers.url
    options: dict[str, Any] = {"prefix": keyspace.prefix, "partitions": PARTITIONS, "timeout": 8}
    async with SessionStore.from_url(url, references=references, **options) as store:
        yield store


async def move_some(servers: Cluster, slot: int, count: int) -> Any:
    """Let a slot begin to move and move some of its keys. Return the server to which it moves."""
    target = next(server for server in servers.servers if server is not servers.owner(slot))
    await asyncio.to_thread(servers.begin_migration, slot, target)
    await asyncio.to_thread(servers.move_keys, slot, target, count)
    return target


@pytest.mark.parametrize("part", [0, 1, 2])
async def test_a_slot_that_is_half_moved(
    store: SessionStore, servers: Cluster, keyspace: Keyspace, layout: Partitioned, part: int
) -> None:
    """Each operation is right or waits until the slot has moved. Afterwards, the keyspace is as it would be without."""
    slot, rnd = layout.slots[3], random.Random(part)
    ids = [layout.mint(3) for _ in range(40)]
    for n, session_id in enumerate(ids):
        await store.set(session_id, {"user_id": n % 4, "ip": f"{n % 3}", "n": 0})
    before = await keyspace.dump()
    keys = len(before)
    target = await move_some(servers, slot, keys * (part + 1) // 4)

    ended, moved, rotated = ids[:6], ids[6:12], ids[12:18]

    async def use_one_key() -> None:
        for session_id in ids[18:]:
            assert (await store.get(session_id))["id"] == session_id
            assert await store.increment(session_id, "n", 7) == 7
        for session_id in ended:
            assert await store.delete(session_id, reason="test")
            assert await store.get(session_id) == {}
            with pytest.raises(SessionEnded):
                await store.set(session_id, {"x": 1})

    # These wait for nothing, unless a strict reference makes them look at a set.
    first = asyncio.ensure_future(use_one_key())
    if not store.fields.references["ip"].strict:
        await first
    new = [layout.mint(3) for _ in range(6)]
    changes: list[Coroutine[Any, Any, Any]] = [
        *(store.set(session_id, {"ip": "other", "user_id": [1, 9]}) for session_id in moved),
        *(store.rotate(session_id, {"n": 1}) for session_id in rotated),
        *(store.touch(session_id, "60 days") for session_id in ids[18:24]),
        *(store.unset(session_id, ["ip"]) for session_id in ids[24:30]),
        *(store.set(session_id, {"user_id": 2, "ip": "0"}) for session_id in new),
        store.ids_by("user_id", 3),
        store.count_by("user_id", 3),
    ]
    rnd.shuffle(changes)
    waiting = [asyncio.ensure_future(change) for change in changes]
    await asyncio.wait(waiting, timeout=0.3)
    await asyncio.to_thread(servers.end_migration, slot, target)
    await asyncio.gather(first, *waiting)

    live = [*ids[6:12], *ids[18:], *new]
    users: dict[str, set[str]] = {}
    for session_id in live:
        session = await store.get(session_id)
        assert session["id"] == session_id
        value = session["user_id"]
        for user in value if isinstance(value, list) else [value]:
            users.setdefault(str(user), set()).add(session_id)
    found = {user: set(await store.ids_by("user_id", user)) for user in ("0", "1", "2", "3", "9")}
    late = {user: ids - users.get(user, set()) for user, ids in found.items()}
    assert all(users[user] <= found[user] for user in users)
    assert len(set().union(*late.values())) == len(rotated)
    dump = await keyspace.dump()
    for user, there in found.items():
        assert dump.get(f"user_id:{{{user}}}", set()) == there
    assert await store.delete_by("user_id", 1) == len(found["1"])
    for session_id in found["1"]:
        assert await store.get(session_id) == {}


def _steps() -> Iterator[tuple[str, str, bool, Callable[[SessionStore, dict[str, str]], Awaitable[Any]], Any]]:
    """Yield a name, the keys that have moved, whether the call waits for the others, the call, and its result."""
    yield "read of a moved one", "a", False, lambda s, i: s.get(i["a"], ["n"]), {"id": "a", "n": 0}
    yield "read of one that stays", "b", False, lambda s, i: s.get(i["a"], ["n"]), {"id": "a", "n": 0}
    yield "increment of a moved one", "a", False, lambda s, i: s.increment(i["a"], "n", 3), 3
    yield "renewal beside a moved one", "b", False, lambda s, i: s.touch(i["a"], "60d"), True
    yield "renewal of a moved one", "aUI", False, lambda s, i: s.touch(i["a"], "60d"), True
    yield "renewal without its set", "U", True, lambda s, i: s.touch(i["a"], "60d"), True
    yield "renewal before its set", "a", True, lambda s, i: s.touch(i["a"], "60d"), True
    yield "write beside a moved one", "b", False, lambda s, i: s.set(i["a"], {"n": 1}, "60d", expect={"n": 0}), {"n": 1}
    yield "write without its set", "U", True, lambda s, i: s.set(i["a"], {"n": 1}, expect={"n": 0}), {"n": 1}
    yield "write before its set", "a", True, lambda s, i: s.set(i["a"], {"n": 1}, expect={"n": 0}), {"n": 1}
    yield "another value", "b", True, lambda s, i: s.set(i["a"], {"user_id": 2}), {"user_id": 2}
    yield "another value of a moved one", "a", True, lambda s, i: s.set(i["a"], {"user_id": 2}), {"user_id": 2}
    yield "no value", "U", True, lambda s, i: s.pop(i["a"], ["user_id"]), {"user_id": 1}
    yield "no value of a moved one", "a", True, lambda s, i: s.pop(i["a"], ["user_id"]), {"user_id": 1}
    yield "rotation", "b", True, lambda s, i: s.rotate(i["a"]), None
    yield "end", "b", False, lambda s, i: s.delete(i["a"]), True
    yield "end of a moved one", "a", False, lambda s, i: s.delete(i["a"]), True
    yield "end without its set", "U", False, lambda s, i: s.delete(i["a"]), True
    yield "old id of a moved one", "c", True, lambda s, i: s.increment(i["old"], "n"), 1
    yield "old id that has moved", "o", True, lambda s, i: s.increment(i["old"], "n"), 1
    yield "set with a moved one", "b", True, lambda s, _: s.count_by("user_id", 1), 3
    yield "moved set", "U", True, lambda s, _: s.count_by("user_id", 1), 3
    yield "end of all", "b", True, lambda s, _: s.delete_by("user_id", 1), 3
    yield "end of all in a moved set", "U", True, lambda s, _: s.delete_by("user_id", 1), 3


STEPS = {step[0]: step[1:] for step in _steps()}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("store", ["lax", "strict"], indirect=True)
async def test_keys_of_a_session_on_two_masters(
    store: SessionStore, servers: Cluster, keyspace: Keyspace, layout: Partitioned, step: str
) -> None:
    """Each operation has the result that it would have on one master, at once or when the slot has moved."""
    moved, waits, call, result = STEPS[step]
    slot, user = layout.slots[3], {"user_id": 1, "ip": "x", "n": 0}
    ids = {name: layout.mint(3) for name in ("a", "b", "old")}
    for session_id in ids.values():
        await store.set(session_id, user)
    ids["c"] = await store.rotate(ids["old"], grace="1m")
    keys = {name[0]: store.get_session_key(session_id) for name, session_id in ids.items()}
    keys |= {"U": store.get_reference_keys("user_id", 1)[3], "I": store.get_reference_keys("ip", "x")[3]}
    target = next(server for server in servers.servers if server is not servers.owner(slot))
    await asyncio.to_thread(servers.begin_migration, slot, target)
    await asyncio.to_thread(servers.move, slot, target, *(keys[name] for name in moved))

    calling = asyncio.ensure_future(call(store, ids))
    # A strict reference needs its set.
    waits = waits or (store.fields.references["ip"].strict and "a" in moved and "I" not in moved)
    try:
        await asyncio.wait([calling], timeout=0.2 if waits else 5)
        assert calling.done() != waits
    finally:
        await asyncio.to_thread(servers.end_migration, slot, target)
    reply = await calling
    if result is not None:
        assert reply == ({**result, "id": ids["a"]} if isinstance(result, dict) and "id" in result else result)

    named: dict[str, set[str]] = {}
    for session_id in (ids["a"], ids["b"], ids["c"], reply if step == "rotation" else ""):
        session = await store.get(session_id) if session_id else {}
        for field in ("user_id", "ip"):
            if field in session:
                named.setdefault(f"{field}:{{{session[field]}}}", set()).add(session_id)
                assert (
                    await keyspace.ttl(f"{{{session_id}}}") <= await keyspace.ttl(f"{field}:{{{session[field]}}}") + 50
                )
    for value in (1, 2):  # A read removes the ids of ended sessions.
        assert set(await store.ids_by("user_id", value)) == named.get(f"user_id:{{{value}}}", set())
    await store.ids_by("ip", "x")
    dump = await keyspace.dump()
    assert {name: held for name, held in dump.items() if isinstance(held, set)} == named


@pytest.mark.parametrize(
    ("side", "moved"),
    [
        *(("of the user", keys) for keys in ("", "U", "a", "aI", "UI", "aU")),
        *(("of the old id", k) for k in ("", "o", "X")),
    ],
)
async def test_a_login_while_a_slot_moves(
    servers: Cluster, keyspace: Keyspace, layout: Partitioned, side: str, moved: str
) -> None:
    """A login that moves a session waits for the slot of its user, or of its old id; then it evicts the right one."""
    references = {"user_id": Reference(identity=True, limit=2), "ip": Reference()}
    url = servers.url
    options: dict[str, Any] = {"prefix": keyspace.prefix, "partitions": PARTITIONS, "timeout": 8}
    async with SessionStore.from_url(url, references=references, **options) as store:
        home = replace(layout, identity="user_id").with_value("user_id", 1)[0]
        away = (home + 1) % PARTITIONS
        first = await store.create({"user_id": 1, "ip": "x"})
        await asyncio.sleep(0.01)
        second, old = await store.create({"user_id": 1}), layout.mint(away)
        await store.set(old, {"ip": "x", "cart": [1]})
        partition = home if side == "of the user" else away
        keys = {"a": store.get_session_key(first), "o": store.get_session_key(old)}
        keys |= {"U": store.get_reference_key("user_id", 1), "I": store.get_reference_keys("ip", "x")[home]}
        keys["X"] = store.get_reference_keys("ip", "x")[away]
        slot = layout.slots[partition]
        target = next(server for server in servers.servers if server is not servers.owner(slot))
        await asyncio.to_thread(servers.begin_migration, slot, target)
        try:
            await asyncio.to_thread(servers.move, slot, target, *(keys[key] for key in moved))
            login = asyncio.ensure_future(store.rotate(old, {"user_id": 1}))
            await asyncio.wait([login], timeout=0.3)
        finally:
            await asyncio.to_thread(servers.end_migration, slot, target)
        new = await login
        assert await store.get(new) == {"id": new, "user_id": 1, "ip": "x", "cart": [1]}
        assert await store.ended(old) == "rotated"
        assert await store.ended(first) == "evicted"
        assert set(await store.ids_by("user_id", 1)) == {second, new}
        assert await store.ids_by("ip", "x") == [new]
        sets = {name: held for name, held in (await keyspace.dump()).items() if isinstance(held, set)}
        assert sets == {"user_id:{1}": {second, new}, "ip:{x}": {new}}


@pytest.mark.parametrize("store", ["lax"], indirect=True)
async def test_a_new_session_goes_elsewhere(
    store: SessionStore, servers: Cluster, layout: Partitioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the slot of its partition moves, a new session gets an id of another partition, and does not wait."""
    slot, minted = layout.slots[3], list[int]()
    original = Partitioned.mint

    def mint(self: Partitioned, partition: int | None = None) -> str:
        minted.append(3 if len(minted) % 2 == 0 else 4)
        return original(self, minted[-1] if partition is None else partition)

    monkeypatch.setattr(Partitioned, "mint", mint)
    target = next(server for server in servers.servers if server is not servers.owner(slot))
    await asyncio.to_thread(servers.begin_migration, slot, target)
    try:
        session_id = await store.create({"user_id": 1})
        assert layout.place(session_id)[1] == 4
        session = Sessions(store, hash_ids=False).create_session()
        await session.set({"user_id": 1})
        assert layout.place(str(session.id))[1] == 4
        assert minted == [3, 4, 3, 4]
        assert set(await store.ids_by("user_id", 1)) == {session_id, session.id}
    finally:
        await asyncio.to_thread(servers.end_migration, slot, target)


class Visitor:
    """A task that works on its own sessions, and knows what they hold."""

    def __init__(self, store: SessionStore, number: int) -> None:
        """Begin without a session."""
        self.held: dict[str, dict[str, Any]] = {}
        self._store = store
        self._number = number
        self._random = random.Random(number)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until the event."""
        while not stop.is_set():
            if len(self.held) < 6:
                values = {"user_id": self._number, "ip": f"{self._random.randrange(3)}", "n": 0}
                self.held[await self._store.create(values)] = values
            steps = [self.get, self.get, self.set, self.rotate, self.find, self.increment]
            await self._random.choice(steps)(self._random.choice([*self.held]))

    async def get(self, session_id: str) -> None:
        """Read a session."""
        assert await self._store.get(session_id) == {"id": session_id, **self.held[session_id]}

    async def set(self, session_id: str) -> None:
        """Write a session, and move it to another set."""
        values = {"ip": f"{self._random.randrange(3)}", "x": self._random.random()}
        await self._store.set(session_id, values, create=False)
        self.held[session_id].update(values)

    async def rotate(self, session_id: str) -> None:
        """Give a session a new id."""
        self.held[await self._store.rotate(session_id)] = self.held.pop(session_id)

    async def find(self, _: str) -> None:
        """Find the own sessions."""
        assert sorted(await self._store.ids_by("user_id", self._number)) == sorted(self.held)

    async def increment(self, session_id: str) -> None:
        """Add to a field."""
        self.held[session_id]["n"] += 1
        assert await self._store.increment(session_id, "n") == self.held[session_id]["n"]


async def test_slots_move_under_load(store: SessionStore, servers: Cluster, keyspace: Keyspace) -> None:
    """No error reaches the application, and no acknowledged write is lost, while all slots move and scripts vanish."""
    stop, visitors = asyncio.Event(), [Visitor(store, number) for number in range(12)]
    tasks = [asyncio.create_task(visitor.run(stop)) for visitor in visitors]
    for number, slot in enumerate(Partitioned(keyspace.prefix, 24, PARTITIONS).slots):
        await asyncio.to_thread(servers.migrate, slot, servers.servers[number % 3])
        if number % 5 == 0:
            for server in servers.servers:
                await asyncio.to_thread(server, "SCRIPT", "FLUSH")
    stop.set()
    await asyncio.gather(*tasks)
    named: dict[str, set[str]] = {}
    for visitor in visitors:
        for session_id, values in visitor.held.items():
            await visitor.get(session_id)
            for field in ("user_id", "ip"):
                named.setdefault(f"{field}:{{{values[field]}}}", set()).add(session_id)
    dump = await keyspace.dump()
    assert {name: ids for name, ids in dump.items() if isinstance(ids, set)} == named


async def test_one_master_does_not_answer(servers: Cluster, keyspace: Keyspace, layout: Partitioned) -> None:
    """Sessions on the others are served; `delete_by` ends what it reaches, says so, and can be completed later."""
    client = RedisCluster.from_url(servers.url.replace("+cluster", ""))
    store = SessionStore(client, references=["user_id"], prefix=keyspace.prefix, partitions=PARTITIONS, timeout=1.5)
    ids = [layout.mint(partition) for partition in range(PARTITIONS)]
    async with client, store:
        for session_id in ids:
            await store.set(session_id, {"user_id": 1})
        dead = servers.servers[2]
        lost = [session_id for session_id, slot in zip(ids, layout.slots, strict=True) if servers.owner(slot) is dead]
        assert lost
        dead.signal(signal.SIGSTOP)
        try:
            for session_id in ids:
                if session_id not in lost:
                    assert await store.get(session_id)
            with pytest.raises(PartlyDone) as raised:
                await store.delete_by("user_id", 1)
            assert (raised.value.ended, raised.value.unfinished) == (len(ids) - len(lost), len(lost))
            assert str(raised.value) == (
                f"{len(lost)} of {PARTITIONS} partitions did not answer; {len(ids) - len(lost)} sessions were ended"
            )
            with pytest.raises(StoreUnavailable):
                await store.ids_by("user_id", 1)
        finally:
            dead.signal(signal.SIGCONT)
        while True:
            try:
                assert await store.delete_by("user_id", 1) == len(lost)
            except PartlyDone:
                continue
            break
        assert [await store.get(session_id) for session_id in ids] == [{}] * len(ids)


async def test_the_sessions_of_a_web_application(store: SessionStore, layout: Partitioned) -> None:
    """A session keeps its partition when a login gives it a new id, with ids that are hashes and with others."""
    for hash_ids in (True, False):
        sessions = Sessions(store, hash_ids=hash_ids)
        session = sessions.create_session()
        await session.set({"cart": [1]})
        for number in range(5):
            before = str(session.id)
            await session.rotate({"user_id": number})
            assert layout.place(before)[1] == layout.place(str(session.id))[1]
            assert await store.ids_by("user_id", number) == [session.id]
            assert await store.ended(before) == "rotated"
        assert (await session.get())["cart"] == [1]
        assert await session.delete()
        assert await store.count_by("user_id", 4) == 0


async def test_the_number_of_partitions_is_kept(servers: Cluster, keyspace: Keyspace) -> None:
    """A store with another number of partitions is refused, and sees no session."""
    url = servers.url
    async with SessionStore.from_url(url, prefix=keyspace.prefix, partitions=16) as store:
        await store.create()
    other = SessionStore.from_url(url, prefix=keyspace.prefix)
    with pytest.raises(SessionError, match="in 16 partitions, not in 64"):
        await other.create()
    with pytest.raises(SessionError, match="in 16 partitions, not in 64"):
        async with other:
            pass
    assert len(await keyspace.keys()) == 1


@pytest.mark.parametrize(("held", "own"), [(None, 16), (16, None)])
async def test_partitions_cannot_be_added_or_forgotten(redis_url: str, held: int | None, own: int | None) -> None:
    """A store with partitions is refused where one without them was, and the other way round."""
    if "+cluster" in redis_url:
        pytest.skip("a store on a cluster always has partitions")
    prefix = f"test-{secrets.token_hex(8)}"
    async with SessionStore.from_url(redis_url, prefix=prefix, partitions=held) as store:
        session_id = await store.create()
        words = "in 16 partitions, not in no" if held else "in no partitions, not in 16"
        with pytest.raises(SessionError, match=words):
            await SessionStore.from_url(redis_url, prefix=prefix, partitions=own).create()
        await store.delete(session_id)


async def test_a_start_while_the_first_server_is_away(servers: Cluster, keyspace: Keyspace) -> None:
    """A store with several addresses of a cluster opens although the first one does not answer."""
    nodes = [ClusterNode("127.0.0.1", port) for port in (free_port(), servers.servers[1].port)]
    async with (
        RedisCluster(startup_nodes=nodes) as client,
        SessionStore(client, prefix=keyspace.prefix, partitions=16, timeout=20) as store,
    ):
        assert await store.delete(await store.create())


async def test_a_cluster_that_is_far_away(servers: Cluster, keyspace: Keyspace) -> None:
    """A store opens although no server can be asked for the topology in the time that is given to a near one."""
    async with behind_proxy(servers.url, delay=0.3, prefix=keyspace.prefix, partitions=PARTITIONS, timeout=20) as (
        _,
        far,
    ):
        assert await far.create({"n": 1})


async def test_a_store_that_begins_while_the_slot_of_the_meta_key_moves(servers: Cluster, keyspace: Keyspace) -> None:
    """The first calls of a store wait until the slot of the meta key has moved."""
    async with new_store(servers, prefix=keyspace.prefix):
        pass  # It has written the meta key.
    number = slot_of(f"{keyspace.prefix}:_meta")
    target = await move_some(servers, number, 10)
    store = new_store(servers, prefix=keyspace.prefix)
    first = asyncio.ensure_future(store.get("a"))
    try:
        await asyncio.wait([first], timeout=0.3)
        assert not first.done()
    finally:
        await asyncio.to_thread(servers.end_migration, number, target)
    assert await first == {}
    await store.aclose()


async def test_the_rights_that_the_guide_names_are_enough(
    servers: Cluster, keyspace: Keyspace, layout: Partitioned
) -> None:
    """A user with only these rights can do everything, also while a slot moves."""
    rule, *more = re.findall(r"```\n(resetkeys .*?)\n```|`(\+hkeys)`|`(\+cluster.*?)`", GUIDE, re.DOTALL)
    rights = (
        f"{rule[0]} {more[0][1]} {more[1][2]}".replace("\\|", "|").replace("~rss:*", f"~{keyspace.prefix}:*").split()
    )
    for server in servers.servers:
        server("ACL", "SETUSER", "app", "on", ">secret", *rights)
    url = servers.url.replace("://", "://app:secret@")
    options: dict[str, Any] = {"references": ["user_id"], "prefix": keyspace.prefix, "partitions": PARTITIONS}
    async with SessionStore.from_url(url, **options) as store:
        one, other = layout.mint(3), layout.mint(3)
        await store.set(one, {"user_id": 1})
        await store.set(other, {"user_id": 1})
        target = await move_some(servers, layout.slots[3], 1)
        try:
            assert await store.increment(one, "n") == await store.increment(other, "n") == 1
            assert await store.delete(one)
        finally:
            await asyncio.to_thread(servers.end_migration, layout.slots[3], target)
        assert await store.touch(await store.rotate(other))
        assert await store.block("user_id", 1, "1m") == 1
    for server in servers.servers:
        server("ACL", "DELUSER", "app")


@pytest.mark.parametrize("how", ["delete_by", "find_by", "ids_by", "sweep"])
async def test_a_large_set_moves_between_its_pages(servers: Cluster, keyspace: Keyspace, how: str) -> None:
    """No session is missed if the set is on another master for each page, which orders the ids in its own way."""
    reference = {"user_id": Reference(identity=True)}
    async with SessionStore.from_url(servers.url, references=reference, prefix=keyspace.prefix) as store:
        operations, ids = store.operations, await asyncio.gather(*(store.create({"user_id": 1}) for _ in range(1000)))
        layout: Any = operations.layout
        (partition,) = layout.with_value("user_id", 1)
        slot, moves = layout.slots[partition], 4

        def moving(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def run_and_move(*args: Any, **options: Any) -> Any:
                nonlocal moves
                page = await method(*args, **options)
                if moves:
                    moves -= 1
                    others = [one for one in servers.servers if one is not servers.owner(slot)]
                    await asyncio.to_thread(servers.migrate, slot, others[moves % 2])
                return page

            return run_and_move

        for name in ("find_by", "delete_by", "inspect_set"):
            setattr(operations, name, moving(getattr(operations, name)))
        if how == "delete_by":
            assert await store.delete_by("user_id", 1) == 1000
            assert await keyspace.client.smembers(store.get_reference_key("user_id", 1)) == set()
        elif how == "find_by":
            assert sorted([session["id"] async for session in store.find_by("user_id", 1)]) == sorted(ids)
        elif how == "ids_by":
            assert sorted(await store.ids_by("user_id", 1)) == sorted(ids)
        else:
            await asyncio.gather(*(keyspace.client.unlink(store.get_session_key(one)) for one in ids[::2]))
            await store.maintenance.sweep()
            assert await keyspace.client.smembers(store.get_reference_key("user_id", 1)) == set(ids[1::2])
        assert moves == 0


async def test_a_client_of_one_server_is_not_enough(servers: Cluster, keyspace: Keyspace) -> None:
    """A plain client on a server of a cluster raises an error that names the right client."""
    async with Redis.from_url(servers.url.replace("+cluster", "")) as client:
        store = SessionStore(client, prefix=keyspace.prefix)
        outcomes = await asyncio.gather(*(store.get(f"{n}") for n in range(30)), return_exceptions=True)
        await store.aclose()
    errors = {str(outcome) for outcome in outcomes if isinstance(outcome, SessionError)}
    assert errors == {"this is a node of a Redis Cluster: give the store a RedisCluster"}


async def test_a_server_that_is_no_cluster() -> None:
    """A cluster client on a server without cluster mode raises an error whose cause is the reply of Redis."""
    port = free_port()
    with own_server("--port", str(port)):
        store = SessionStore.from_url(f"redis+cluster://127.0.0.1:{port}")
        with pytest.raises(SessionError) as raised:
            await store.get("a")
        assert "cluster support disabled" in str(raised.value.__cause__)
        await store.aclose()


def new_store(servers: Cluster, **options: Any) -> SessionStore:
    options = {"prefix": f"test-{secrets.token_hex(8)}", "partitions": PARTITIONS, "timeout": 8, **options}
    return SessionStore.from_url(servers.url, **options)


async def test_the_calls_of_a_moving_slot_are_sent_one_by_one(servers: Cluster) -> None:
    """A batch for sessions on both masters does not wait for the move: each of its calls is sent alone."""
    async with new_store(servers) as store:
        layout = store.operations.layout
        slot = Partitioned("x", 24, PARTITIONS).slots[3]
        ids = [layout.mint(3) for _ in range(40)]
        for session_id in ids:
            await store.set(session_id, {"n": 0})
        target = next(server for server in servers.servers if server is not servers.owner(slot))
        await asyncio.to_thread(servers.begin_migration, slot, target)
        try:
            await asyncio.to_thread(servers.move, slot, target, *map(store.get_session_key, ids[::2]))
            async with asyncio.timeout(3):
                assert await asyncio.gather(*(store.increment(i, "n") for i in ids)) == [1] * 40
        finally:
            await asyncio.to_thread(servers.end_migration, slot, target)
        for session_id in ids:
            await store.delete(session_id)


async def test_a_batch_never_follows_ask(servers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis 6.2 answers ASK even if it has some of the keys. So a batch goes back to its lane, and is split."""
    async with new_store(servers) as store:
        engine, layout = store.operations.engine, store.operations.layout
        ids = [layout.mint(3), layout.mint(3)]
        assert await store.get(ids[0]) == {}
        topology: Any = engine._servers
        lane, loop, accepted = topology.owners[3].main, asyncio.get_running_loop(), list[tuple[Any, bool]]()
        other = next(node for node in topology.owners if node is not lane.node)
        port = next(address for address, node in topology._nodes.items() if node is other)[1]
        original = Lane.accept

        def accept(self: Lane, batch: Batch, error: Exception | None = None) -> None:
            accepted.append((self.node, batch.queue.kind[0].on_owner is not None))
            original(self, batch, error)

        monkeypatch.setattr(Lane, "accept", accept)
        calls = [Call.make(loop, (layout.place(i)[0],), (), 0, loop.time() + 5) for i in ids]
        error = redis.exceptions.ResponseError(f"ASK 42 127.0.0.1:{port}")
        kind = (operations.GET, 3, ("all",))
        assert topology.redirect(lane, Batch(Queue(kind), calls), error)
        assert await asyncio.gather(*calls) == [operations.Read([], state=b"absent")] * 2
        assert accepted[0] == (lane.node, False)
        assert topology.split[3] > loop.time()
        accepted.clear()
        call = Call.make(loop, (layout.place(ids[0])[0],), (), 0, loop.time() + 5)
        assert topology.redirect(lane, Batch(Queue(kind), [call]), error)
        assert accepted[0] == (other, True)
        await call


async def test_a_call_follows_moved_at_once(servers: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that gets MOVED goes to the server that the error names, and so do later calls, without a look."""
    async with new_store(servers) as store:
        layout, slot = store.operations.layout, Partitioned("x", 24, PARTITIONS).slots[3]
        session_id = layout.mint(3)
        assert await store.get(session_id) == {}
        topology: Any = store.operations.engine._servers
        monkeypatch.setattr(topology, "doubt", lambda _: None)
        target = next(server for server in servers.servers if server is not servers.owner(slot))
        await asyncio.to_thread(servers.migrate, slot, target)
        async with asyncio.timeout(1):
            assert await store.get(session_id) == {}
        node = topology.owners[3]
        assert next(address for address, one in topology._nodes.items() if one is node)[1] == target.port


async def test_one_moved_tells_of_all(servers: Cluster) -> None:
    """After one MOVED, the store looks at the topology, so it knows the new masters of other partitions, too."""
    async with new_store(servers) as store:
        layout, slots = store.operations.layout, Partitioned("x", 24, PARTITIONS).slots
        assert await store.get(layout.mint(3)) == {}
        topology: Any = store.operations.engine._servers
        first, second = 3, next(p for p in range(4, PARTITIONS) if topology.owners[p] is topology.owners[3])
        target = next(server for server in servers.servers if server is not servers.owner(slots[first]))
        for partition in (first, second):
            await asyncio.to_thread(servers.migrate, slots[partition], target)
        assert await store.get(layout.mint(first)) == {}
        async with asyncio.timeout(3):
            while topology.owners[second] is not topology.owners[first]:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
async def test_a_replica_takes_over(number: signal.Signals) -> None:
    """Calls that wait for a master that does not answer go to its replica, once that is the master."""
    with cluster(3, 1) as servers:
        async with new_store(servers, timeout=15) as store:
            layout = store.operations.layout
            ids = [layout.mint(partition) for partition in range(PARTITIONS)]
            for session_id in ids:
                await store.set(session_id, {"n": 1})
            await asyncio.sleep(0.5)  # The replicas have everything.
            servers.servers[1].signal(number)
            sessions = await asyncio.gather(*(store.get(session_id) for session_id in ids))
            assert [session.get("n") for session in sessions] == [1] * PARTITIONS


@pytest.mark.parametrize(
    "text",
    [
        "Script attempted to access a non local key in a cluster node",
        "Unable to execute command 'exists' in script because undeclared keys were accessed during rehashing of it",
    ],
)
async def test_an_operation_that_is_not_repeatable_and_may_have_written(servers: Cluster, text: str) -> None:
    """If a key proves to be on another master after a write, only a repeatable call is sent again."""
    async with new_store(servers) as store:
        layout, loop = store.operations.layout, asyncio.get_running_loop()
        assert await store.get(layout.mint(3)) == {}
        topology: Any = store.operations.engine._servers
        error = redis.exceptions.ResponseError(text)
        for operation, args in ((operations.POP, ("keep", "1", "x")), (operations.UNSET, ("keep", "1", "x"))):
            call = Call.make(loop, (layout.place(layout.mint(3))[0],), args, 0, loop.time() + 5)
            assert topology.redirect(topology.owners[3].main, Batch(Queue((operation, 3, ())), [call]), error)
            if operation.repeatable:
                with pytest.raises(SessionNotFound):
                    await call
            else:
                with pytest.raises(StoreUnavailable, match="it is not known what was done"):
                    await call


@pytest.mark.parametrize("moved", ["the fence", "the set", "the copy and the set"])
async def test_a_login_whose_keys_are_on_two_masters(
    servers: Cluster, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch, moved: str
) -> None:
    """On the new master of a moving slot, a login takes no set, no fence and no session for absent."""
    references = {"user_id": Reference(identity=True, limit=2)}
    async with new_store(servers, references=references, prefix=keyspace.prefix) as store:
        layout = store.operations.layout
        home = layout.with_value("user_id", 1)[0]
        slot, old = Partitioned("x", 24, PARTITIONS).slots[home], layout.mint((home + 1) % PARTITIONS)
        first = await store.create({"user_id": 1})
        await asyncio.sleep(0.01)
        second = await store.create({"user_id": 1})
        await store.set(old, {})
        keep, block = [first, second], "1h" if moved == "the set" else "1ms"
        await store.delete_by("user_id", 1, keep=keep, block=block)  # It leaves a fence, with a block that has ended.
        await asyncio.sleep(0.01)
        target = next(server for server in servers.servers if server is not servers.owner(slot))
        user = store.get_reference_key("user_id", 1)

        async def move(*keys: str) -> None:
            await asyncio.to_thread(servers.begin_migration, slot, target)
            await asyncio.to_thread(servers.move, slot, target, *keys)

        if moved == "the copy and the set":

            async def move_after(call: Awaitable[Any]) -> Any:
                reply = await call
                (copy,) = await keyspace.copies()
                await move(store.get_session_key(copy), user)
                return reply

            run_at(store, monkeypatch, "retire_with_refs", move_after)
        elif moved == "the set":
            await move(user)
        else:
            await move(layout.fence("user_id", 1, home))
        try:
            login = asyncio.ensure_future(store.rotate(old, {"user_id": 1}))
            await asyncio.wait([login], timeout=0.5)
        finally:
            await asyncio.to_thread(servers.end_migration, slot, target)
        if moved == "the set":
            with pytest.raises(Blocked):
                await login
            assert set(await store.ids_by("user_id", 1)) == {first, second}
        else:
            new = await login
            assert set(await store.ids_by("user_id", 1)) == {second, new}
            assert await store.ended(first) == "evicted"
