"""Maintenance: checking, repairing and sweeping the keys of a store while applications use it."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster

from rss import Reference, SessionError, SessionStore, StoreUnavailable, maintenance
from rss.engine.scan import scan
from rss.keys import slot as slot_of
from rss.maintenance import Finding, Maintenance
from rss.testing import Cluster, cluster
from tests.keyspace import Keyspace
from tests.servers import client_of, connections, own_server
from tests.test_acl import ACL_RULE

REFERENCES = {"user_id": Reference(identity=True), "ip": Reference()}

on_both = pytest.mark.parametrize(("client", "keyspace"), [({}, None), ("cluster", "cluster")], indirect=True)

#: Plants damage in the keys of a session, and returns the kinds of findings that it must cause.
Damage = Callable[["Scene", str, dict[str, Any]], Awaitable[set[str]]]


@pytest.fixture(name="store")
async def _store(client: Redis | RedisCluster, keyspace: Keyspace) -> AsyncIterator[SessionStore]:
    store = SessionStore(client, references=REFERENCES, prefix=keyspace.prefix, timeout=20)
    yield store
    await store.aclose()


async def listed(findings: AsyncIterator[Finding]) -> list[Finding]:
    """Return all findings."""
    return [finding async for finding in findings]


async def kinds(findings: AsyncIterator[Finding]) -> Counter[str]:
    """Count the findings of each kind."""
    return Counter([finding.kind async for finding in findings])


class Scene:
    """A store with sessions, and ways to damage their keys."""

    def __init__(self, store: SessionStore, keyspace: Keyspace) -> None:
        self.store = store
        self.client = keyspace.client
        self.prefix = keyspace.prefix

    def session(self, session_id: str) -> str:
        """Return the key of a session."""
        return self.store.get_session_key(session_id)

    def set_of(self, session_id: str, field: str, value: object) -> str:
        """Return the set of a value in the partition of a session."""
        layout = self.store.operations.layout
        return layout.reference(field, value, layout.place(session_id)[1])

    async def taken_out(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A set lacks a session."""
        await self.client.srem(self.set_of(session_id, "user_id", values["user_id"]), session_id)
        return {"outside"}

    async def set_lost(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A set is gone."""
        await self.client.unlink(self.set_of(session_id, "user_id", values["user_id"]))
        return {"outside"}

    async def dead_ids(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A set holds ids of no session."""
        await self.client.sadd(self.set_of(session_id, "ip", values["ip"]), "dead-1", "dead-2")
        return {"stale"}

    async def endless_session(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A session has no TTL."""
        del values
        await self.client.persist(self.session(session_id))
        return {"endless"}

    async def endless_set(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A set has no TTL."""
        await self.client.persist(self.set_of(session_id, "user_id", values["user_id"]))
        return {"endless"}

    async def endless_fence(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A fence has no TTL."""
        layout = self.store.operations.layout
        fence = layout.fence("user_id", values["user_id"], layout.place(session_id)[1])
        await self.client.hset(fence, "round", "1")
        return {"endless"}

    async def short_set(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A set would expire before its session."""
        await self.client.pexpire(self.set_of(session_id, "user_id", values["user_id"]), 60_000)
        return {"short"}

    async def other_type(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A text is where a set was."""
        key = self.set_of(session_id, "user_id", values["user_id"])
        await self.client.unlink(key)
        await self.client.set(key, "x", ex=600)
        return {"wrong type", "outside"}

    async def fence_of_another_type(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A text is where a fence would be."""
        layout = self.store.operations.layout
        await self.client.set(layout.fence("user_id", values["user_id"], layout.place(session_id)[1]), "x", ex=600)
        return {"wrong type"}

    async def foreign_hash(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A hash that is no session has the name of one."""
        del session_id, values
        await self.client.hset(self.session(self.store.create_session_id()), "a", "b")
        return {"stray"}

    async def stray_key(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A key has the prefix, but no name of a store."""
        del values
        await self.client.set(f"{self.prefix}:thing-{session_id}", "x")
        return {"stray"}

    async def unknown_partition(self, session_id: str, values: dict[str, Any]) -> set[str]:
        """A session is in a partition that the store does not have."""
        del values
        await self.client.hset(f"{self.prefix}:{{nowhere}}:s:{session_id}", "id", session_id)
        return {"misplaced" if self.store.operations.layout.partitions > 1 else "stray"}


DAMAGES: list[Damage] = [
    Scene.taken_out,
    Scene.set_lost,
    Scene.dead_ids,
    Scene.endless_session,
    Scene.endless_set,
    Scene.endless_fence,
    Scene.short_set,
    Scene.other_type,
    Scene.fence_of_another_type,
    Scene.foreign_hash,
    Scene.stray_key,
    Scene.unknown_partition,
]


async def fill(store: SessionStore, count: int) -> dict[str, dict[str, Any]]:
    """Make sessions, each of its own user, and return their values by id."""
    made: dict[str, dict[str, Any]] = {}
    for start in range(0, count, 100):
        rows = [{"user_id": n, "ip": f"x{n % 50}"} for n in range(start, min(start + 100, count))]
        made |= zip(await asyncio.gather(*map(store.create, rows)), rows, strict=True)
    return made


@on_both
async def test_nothing_is_wrong_with_a_store(store: SessionStore, keyspace: Keyspace) -> None:
    """A check finds nothing after all operations, and changes nothing."""
    ids = [*await fill(store, 60)]
    await store.rotate(ids[0], grace="1m")
    await store.rotate(ids[1], {"user_id": 9})
    await store.delete(ids[2])
    await store.delete_by("ip", "x3")
    await store.block("user_id", 7, "1m")
    await store.touch(ids[8], "60 days")
    await store.unset(ids[9], ["ip"])
    async with store.sweeper():
        await asyncio.sleep(0)
    before = await keyspace.dump()
    assert await listed(store.maintenance.check()) == []
    assert await listed(store.maintenance.repair()) == []
    assert await keyspace.dump() == before


@on_both
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
async def test_each_damage_is_found_and_mended(store: SessionStore, keyspace: Keyspace, damage: Damage) -> None:
    """A check finds the damage and changes nothing. A repair mends it, and then there is nothing to find."""
    made = await fill(store, 40)
    scene = Scene(store, keyspace)
    whole = await keyspace.dump()
    victim = random.choice([*made])
    expected = await damage(scene, victim, made[victim])
    assert set(await kinds(store.maintenance.check())) == expected
    found = await listed(store.maintenance.repair())
    assert {finding.kind for finding in found} == expected
    assert all(finding.mended for finding in found)
    assert await listed(store.maintenance.check()) == []
    after = await keyspace.dump()
    assert {name: held for name, held in after.items() if not name.startswith("_fence:")} == whole
    for session_id, values in made.items():
        assert await store.get(session_id) == {"id": session_id, **values}
        assert await store.ids_by("user_id", values["user_id"]) == [session_id]


@pytest.mark.timeout(180)  # Thousands of keys are looked at three times.
@on_both
async def test_much_damage_under_load(store: SessionStore, keyspace: Keyspace) -> None:
    """Damage of each kind among many sessions is found and mended while applications use the store."""
    made, scene, stop = await fill(store, 3000), Scene(store, keyspace), asyncio.Event()
    victims = random.sample([*made], 20 * len(DAMAGES))
    expected: set[str] = set()
    for number, victim in enumerate(victims):
        expected |= await DAMAGES[number % len(DAMAGES)](scene, victim, made[victim])

    async def work(number: int) -> None:
        while not stop.is_set():
            session_id = await store.create({"user_id": f"load-{number}", "ip": "load"})
            await store.set(session_id, {"ip": f"other-{number}"})
            session_id = await store.rotate(session_id)
            assert session_id in await store.ids_by("user_id", f"load-{number}")
            assert await store.delete(session_id)

    load = [asyncio.create_task(work(number)) for number in range(8)]
    assert set(await kinds(store.maintenance.check())) == expected
    assert set(await kinds(store.maintenance.repair())) == expected
    stop.set()
    await asyncio.gather(*load)
    assert await listed(store.maintenance.check()) == []
    assert all(await asyncio.gather(*(store.get(session_id) for session_id in made)))
    for session_id in victims:
        assert await store.ids_by("user_id", made[session_id]["user_id"]) == [session_id]


@on_both
async def test_keys_of_another_store_are_left_alone(store: SessionStore, keyspace: Keyspace) -> None:
    """A store whose prefix begins with that of this store keeps its keys."""
    await fill(store, 5)
    client: Any = keyspace.client
    other = SessionStore(client, references=["user_id"], prefix=f"{keyspace.prefix}:admin")
    ids = [await other.create({"user_id": n}) for n in range(20)]
    assert await listed(store.maintenance.repair()) == []
    assert all(await asyncio.gather(*map(other.get, ids)))
    assert await other.count_by("user_id", 7) == 1
    await other.aclose()


@on_both
async def test_a_doubt_prunes_nothing(store: SessionStore, keyspace: Keyspace) -> None:
    """An id stays in its set if its session is endless or of another type, until that is mended."""
    made, scene = await fill(store, 2), Scene(store, keyspace)
    for session_id in made:
        await scene.endless_session(session_id, {})
    assert await store.maintenance.sweep() == 0
    assert set(await kinds(store.maintenance.check())) == {"endless"}
    for session_id, values in made.items():
        assert await keyspace.client.sismember(scene.set_of(session_id, "ip", values["ip"]), session_id)


@on_both
async def test_a_strict_session_is_not_brought_back(client: Redis, keyspace: Keyspace) -> None:
    """A session that is revoked, because the set of a strict reference lacks it, stays revoked."""
    store = SessionStore(client, references={"user_id": Reference(strict=True)}, prefix=keyspace.prefix)
    session_id = await store.create({"user_id": 1})
    scene = Scene(store, keyspace)
    await keyspace.client.unlink(scene.set_of(session_id, "user_id", 1))
    assert await listed(store.maintenance.repair()) == []
    assert await store.get(session_id) == {}


@on_both
async def test_a_sweep_removes_the_ids_of_expired_sessions(store: SessionStore, keyspace: Keyspace) -> None:
    """A sweep removes all stale ids, returns their number, and reports its progress."""
    kept = [await store.create({"ip": "x"}) for _ in range(5)]
    gone = [await store.create({"ip": "x"}) for _ in range(200)]
    for session_id in gone:
        await keyspace.client.unlink(store.get_session_key(session_id))
    shares: list[float] = []
    left = await store.count_by("ip", "x", exact=False) - len(kept)
    assert await store.maintenance.sweep(shares.append) == left
    assert left > 0
    assert await store.count_by("ip", "x", exact=False) == 5
    assert sorted(await store.ids_by("ip", "x")) == sorted(kept)
    assert shares[-1] == 1
    assert shares == sorted(shares)
    assert await store.maintenance.sweep() == 0


async def test_one_process_sweeps_at_a_time(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sweepers, one sweeps in each period."""
    swept = 0

    async def sweep(_: Maintenance, **__: float) -> int:
        nonlocal swept
        swept += 1
        return 0

    monkeypatch.setattr(Maintenance, "_sweep", sweep)
    async with store.sweeper("1h"), store.sweeper("1h"), store.sweeper("1h"):
        while not swept:
            await asyncio.sleep(0.01)
        await store.touch("a")
    assert swept == 1
    with pytest.raises(ValueError, match="every"):
        async with store.sweeper(0):
            pass


async def test_a_sweeper_survives_a_failure(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If Redis does not answer, a warning is logged, and the next sweep is tried."""
    outcomes: list[Exception | None] = [StoreUnavailable("no answer"), None]

    async def sweep(_: Maintenance, **__: float) -> int:
        if outcome := outcomes.pop(0):
            raise outcome
        return 0

    monkeypatch.setattr(Maintenance, "_sweep", sweep)
    with caplog.at_level(logging.WARNING, "rss"):
        async with asyncio.timeout(20), store.sweeper("20ms"):
            while outcomes:
                await asyncio.sleep(0.01)
    assert "the sweep failed: no answer" in caplog.text


async def test_an_exit_beside_a_sweeper(store: SessionStore) -> None:
    """An exit code passes a sweeper as it is."""
    with pytest.raises(SystemExit) as raised:
        async with store.sweeper():
            raise SystemExit(3)
    assert raised.value.code == 3


async def test_an_error_beside_a_sweeper(store: SessionStore) -> None:
    """An error of the application passes a sweeper as it is, and ends the sweeper. So does a cancellation."""
    with pytest.raises(KeyError, match="mine"):
        async with store.sweeper():
            raise KeyError("mine")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), store.sweeper("10ms"):
            await asyncio.sleep(20)
    assert len(asyncio.all_tasks()) == 1


@on_both
async def test_what_is_stopped_leaves_nothing(store: SessionStore, keyspace: Keyspace) -> None:
    """A check that is left, and a sweep that is cancelled, close their connections at once."""
    await fill(store, 300)
    client: Any = keyspace.client
    await store.get("a")
    before = len(await connections(client))
    scene = Scene(store, keyspace)
    await scene.endless_session(await store.create({"ip": "x"}), {})
    async with aclosing(store.maintenance.check()) as findings:
        async for _ in findings:
            break
    async with asyncio.timeout(20):
        while len(await connections(client)) > before:
            await asyncio.sleep(0.01)
    tasks = asyncio.all_tasks()
    for _ in range(5):
        sweep = asyncio.create_task(store.maintenance.sweep())
        await asyncio.sleep(0.002)
        sweep.cancel()
        await asyncio.wait([sweep])
        assert asyncio.all_tasks() == tasks
    async with asyncio.timeout(20):
        while len(await connections(client)) > before:
            await asyncio.sleep(0.01)


async def test_a_sweeper_of_a_closed_store(store: SessionStore) -> None:
    """A sweeper ends quietly when the store is closed."""
    async with store.sweeper("10ms"):
        await store.aclose()
        async with asyncio.timeout(20):
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.01)


async def test_names_that_are_no_text(url: str) -> None:
    """A key whose name is not UTF-8 is stray. It is found and removed."""
    async with client_of(url) as admin, SessionStore.from_url(url, prefix="raw") as store:
        session_id = await store.create()
        await admin.set(b"raw:\xff\xfe", "x")
        [finding] = await listed(store.maintenance.check())
        assert (finding.kind, finding.key, finding.mended) == ("stray", "raw:\\xff\\xfe", False)
        assert [found.mended for found in await listed(store.maintenance.repair())] == [True]
        assert await listed(store.maintenance.check()) == []
        assert await store.get(session_id)


async def test_a_user_without_the_right(url: str) -> None:
    """A user that may not list keys is told which right is missing."""
    async with client_of(url) as admin:
        await admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", *ACL_RULE.split())
        store = SessionStore.from_url(url.replace("://", "://app:secret@"))
        with pytest.raises(SessionError, match="no permission for the command dbsize"):
            await listed(store.maintenance.check())
        await store.aclose()
        await admin.execute_command("ACL", "DELUSER", "app")


async def test_a_slot_that_moves_during_a_check(servers: Cluster, keyspace: Keyspace) -> None:
    """If a slot moves while keys are listed, they are listed anew, so that none is missed."""
    async with SessionStore.from_url(servers.url, prefix=keyspace.prefix, timeout=20) as store:
        layout: Any = store.operations.layout
        ids = [layout.mint(number) for number in range(layout.partitions) for _ in range(10)]
        await asyncio.gather(*(store.set(session_id, {"n": 1}) for session_id in ids))
        *_, last = dict.fromkeys(store.operations.engine.servers.masters)
        moving = store.operations.engine.servers.owners.index(last)
        slot, seen, moved = layout.slots[moving], set[bytes](), False
        owner = servers.owner(slot)
        target = servers.owner(layout.slots[0])
        async for page in scan(store.operations.engine.servers, layout):
            if not moved:  # The target is listed already, or is being listed.
                await asyncio.to_thread(servers.migrate, slot, target)
                moved = True
            seen.update(page.names)
        assert seen >= {store.get_session_key(session_id).encode() for session_id in ids}
        await asyncio.to_thread(servers.migrate, slot, owner)


async def test_a_slot_that_is_moving_during_a_check(servers: Cluster, keyspace: Keyspace) -> None:
    """If the keys of a slot move to a server that is listed already, and the slot stays open, none is missed."""
    async with SessionStore.from_url(servers.url, prefix=keyspace.prefix, timeout=20) as store:
        layout: Any = store.operations.layout
        masters = list(dict.fromkeys(store.operations.engine.servers.masters))
        moving = store.operations.engine.servers.owners.index(masters[-1])
        ids = [layout.mint(moving) for _ in range(20)]
        await asyncio.gather(*(store.set(session_id, {"n": 1}) for session_id in ids))
        slot, seen, moved = layout.slots[moving], set[bytes](), False
        target = servers.owner(layout.slots[store.operations.engine.servers.owners.index(masters[0])])
        await asyncio.to_thread(servers.begin_migration, slot, target)
        async for page in scan(store.operations.engine.servers, layout):
            seen.update(page.names)
            if page.node is masters[1] and not moved:  # The first one has been listed.
                while await asyncio.to_thread(servers.move_keys, slot, target):
                    pass
                moved = True
        assert seen >= {store.get_session_key(session_id).encode() for session_id in ids}
        await asyncio.to_thread(servers.end_migration, slot, target)


async def test_a_reindex_while_slots_move(servers: Cluster, keyspace: Keyspace) -> None:
    """A reference can be completed while the slots of marks and of the meta key move, or have just moved."""
    options: dict[str, Any] = {"prefix": keyspace.prefix, "timeout": 20}
    async with (
        SessionStore.from_url(servers.url, references=["gone"], **options) as old,
        SessionStore.from_url(servers.url, references=["ip"], **options) as store,
    ):
        layout: Any = store.operations.layout
        session_id = layout.mint(4)  # Not 3: a repair of its sets would wait until the slot has moved.
        await old.set(session_id, {"ip": "x"})
        slots = [layout.slots[3], slot_of(layout.meta)]
        owners = [servers.owner(slot) for slot in slots]
        targets = [next(one for one in servers.servers if one is not owner) for owner in owners]
        await asyncio.to_thread(servers.begin_migration, slots[0], targets[0])
        await asyncio.to_thread(servers.migrate, slots[1], targets[1])
        assert await store.maintenance.reindex() == ["ip"]
        assert await store.ids_by("ip", "x") == [session_id]
        await asyncio.to_thread(servers.end_migration, slots[0], targets[0])


async def test_a_master_that_dies_during_a_check() -> None:
    """If a master dies while keys are listed, its replica takes over, and the check ends as always."""
    with cluster(3, 1) as servers:
        async with SessionStore.from_url(servers.url, references=["ip"], timeout=20) as store:
            ids = await asyncio.gather(*(store.create({"ip": n % 7}) for n in range(600)))
            victim = next(one for one in servers.servers if one.is_master)
            seen, killed = set[bytes](), False
            async for page in scan(store.operations.engine.servers, store.operations.layout):
                if page.first:
                    seen.clear()
                seen.update(page.names)
                if not killed:
                    victim.kill()
                    killed = True
            assert seen >= {store.get_session_key(session_id).encode() for session_id in ids}
            assert await listed(store.maintenance.check()) == []


async def test_a_store_with_very_many_partitions(client: Redis, keyspace: Keyspace) -> None:
    """The largest number of partitions can be checked and reindexed."""
    options: dict[str, Any] = {"prefix": keyspace.prefix, "partitions": 4096, "timeout": 20}
    async with SessionStore(client, references=["a"], **options) as store:
        await store.create({"a": 1, "b": 2, "c": 3})
    async with SessionStore(client, references=["a", "b", "c"], **options) as store:
        assert await store.maintenance.reindex() == ["b", "c"]
        assert len(await store.ids_by("c", 3)) == 1
        assert await listed(store.maintenance.check()) == []


async def test_another_store_whose_keys_look_like_sets(client: Redis, keyspace: Keyspace) -> None:
    """A prefix that consists of another one and the name of a reference of it is left alone."""
    async with (
        SessionStore(client, references=["admin"], prefix=keyspace.prefix) as store,
        SessionStore(client, references=["user_id"], prefix=f"{keyspace.prefix}:admin") as other,
    ):
        session_id = await other.create({"user_id": 1})
        await store.create({"admin": "yes"})
        before = await keyspace.dump()
        assert await listed(store.maintenance.check()) == []
        assert await listed(store.maintenance.repair()) == []
        assert await keyspace.dump() == before
        assert await other.ids_by("user_id", 1) == [session_id]


@on_both
async def test_many_keys_of_another_store(
    store: SessionStore, keyspace: Keyspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The keys of another store do not use up the number of stray keys that are listed. More of these are announced."""
    monkeypatch.setattr(maintenance, "_MOST_STRAYS", 10)
    client: Any = keyspace.client
    other = SessionStore(client, references=["user_id"], prefix=f"{keyspace.prefix}:admin", partitions=4)
    await asyncio.gather(*(other.create({"user_id": n}) for n in range(50)))
    await client.set(f"{keyspace.prefix}:mine", "x")
    assert await kinds(store.maintenance.check()) == {"stray": 1}
    assert "call again" not in caplog.text
    for n in range(12):
        await client.set(f"{keyspace.prefix}:mine-{n}", "x")
    assert await kinds(store.maintenance.repair()) == {"stray": 10}
    assert "call again" in caplog.text
    assert await kinds(store.maintenance.repair()) == {"stray": 3}
    assert await other.count_by("user_id", 7) == 1
    await other.aclose()


async def test_a_server_that_is_away_is_told() -> None:
    """If a server does not answer, a check raises instead of finding nothing."""
    with own_server() as url:
        store = SessionStore.from_url(url, timeout=0.3)
        await store.create()
    with pytest.raises(SessionError):
        await listed(store.maintenance.check())
    await store.aclose()


def test_findings_are_discreet() -> None:
    """The text of a finding holds neither its key nor a session id."""
    finding = Finding("outside", "rss:user_id:{7}", mended=False, session_id="abc")
    assert repr(finding) == "Finding(kind='outside', mended=False, count=1)"
