"""Stores with different references share a prefix: no session is lost silently, and none refuses to start."""

import asyncio
import contextlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis, RedisCluster

from rss import IncompleteReference, Reference, SessionError, SessionStore, StoreUnavailable
from rss.engine.lane import Servers
from tests.keyspace import Keyspace

pytestmark = pytest.mark.parametrize(("client", "keyspace"), [({}, None), ("cluster", "cluster")], indirect=True)

ROOT: Final = Path(__file__).parents[1]

Make = Callable[..., SessionStore]

#: Each looks at all sessions of an address.
BY_IP: list[Callable[[SessionStore], Awaitable[object]]] = [
    lambda store: store.ids_by("ip", "x"),
    lambda store: store.count_by("ip", "x"),
    lambda store: store.count_by("ip", "x", exact=False),
    lambda store: store.delete_by("ip", "x"),
    lambda store: store.block("ip", "x", "1s"),
]


@pytest.fixture(name="make")
def _make(client: Redis | RedisCluster, keyspace: Keyspace) -> Make:
    """Makes a store with some references, as a process of an application does."""
    return lambda *names, **kinds: SessionStore(
        client, references={**dict.fromkeys(names, Reference()), **kinds}, prefix=keyspace.prefix
    )


async def refuses(operation: Awaitable[object]) -> IncompleteReference:
    """Return the error of an operation that may have missed sessions."""
    with pytest.raises(IncompleteReference, match="the reference 'ip' is incomplete") as caught:
        await operation
    return caught.value


async def test_a_new_prefix_has_complete_references(make: Make) -> None:
    """The first store with a prefix finds all sessions, and so does another one with the same references."""
    for store in (make("user_id", "ip"), make("ip", "user_id")):
        assert await store.ids_by("ip", "x") == []
        session_id = await store.create({"user_id": 1, "ip": "x"})
        assert await store.ids_by("ip", "x") == [session_id]
        assert await store.delete_by("ip", "x") == 1
        await store.aclose()


async def test_a_reference_that_is_added(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """If a deploy adds a reference, `*_by` of it raises after it has done what it can, until it is reindexed."""
    before = make("user_id")
    old = [await before.create({"user_id": n, "ip": "x"}) for n in range(3)]
    with caplog.at_level(logging.WARNING, "rss"):
        after = make("user_id", "ip")
        new = await after.create({"user_id": 4, "ip": "x"})
    assert "['ip'] are new" in caplog.text
    for operation in BY_IP[:3]:
        await refuses(operation(after))
    found = list[str]()

    async def find() -> None:
        async for session in after.find_by("ip", "x"):
            found.append(session["id"])

    await refuses(find())
    assert found == [new]
    assert await after.ids_by("user_id", 1) == [old[1]]  # The other reference is complete.
    assert await after.maintenance.reindex() == ["ip"]
    assert sorted(await after.ids_by("ip", "x")) == sorted([*old, new])
    assert await after.delete_by("ip", "x") == 4
    assert await after.maintenance.reindex() == []
    await before.aclose()
    await after.aclose()


async def test_what_was_ended_is_told(make: Make) -> None:
    """`delete_by` and `block` of an incomplete reference end what they find, and the error has the number."""
    await make("user_id").create({"ip": "x"})
    store = make("user_id", "ip")
    for operation in BY_IP[3:]:
        session_id = await store.create({"ip": "x"})
        error = await refuses(operation(store))
        assert error.ended == 1
        assert "1 sessions were ended" in str(error)
        assert await store.get(session_id) == {}
        assert await store.unblock("ip", "x") is (operation is BY_IP[4])


async def test_a_rollback(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """If a store without a reference opens, all stores know at once that the reference is incomplete."""
    new = make("user_id", "ip")
    await new.create({"user_id": 1, "ip": "x"})
    assert len(await new.ids_by("ip", "x")) == 1
    with caplog.at_level(logging.WARNING, "rss"):
        old = make("user_id")
        missed = await old.create({"user_id": 1, "ip": "x"})
    assert "['ip'] are missing in this store" in caplog.text
    assert len(await old.ids_by("user_id", 1)) == 2
    await refuses(new.ids_by("ip", "x"))
    assert await new.maintenance.reindex() == ["ip"]
    assert missed in await new.ids_by("ip", "x")


async def test_a_reference_that_is_dropped_and_comes_back(make: Make) -> None:
    """A reference that reindexing has forgotten is incomplete when it comes back. Without that, too."""
    first = make("user_id", "ip")
    await first.create({"user_id": 1, "ip": "x"})
    second = make("user_id")
    assert await second.maintenance.reindex() == []
    missed = await second.create({"user_id": 1, "ip": "x"})
    third = make("user_id", "ip")
    await refuses(third.ids_by("ip", "x"))
    await third.maintenance.reindex()
    assert missed in await third.ids_by("ip", "x")


async def test_a_strict_reference_that_is_added(make: Make) -> None:
    """Reindexing adds the sessions of before to the sets of a new strict reference, so they are alive again."""
    before = make("user_id")
    session_id = await before.create({"user_id": 1, "ip": "x"})
    after = make("user_id", ip=Reference(strict=True))
    assert await after.get(session_id) == {}
    assert await after.maintenance.reindex() == ["ip"]
    assert await after.get(session_id)
    assert await after.ids_by("ip", "x") == [session_id]


async def test_a_store_that_opens_during_reindexing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a store without the reference opens meanwhile, reindexing begins anew, and raises if that goes on."""
    first = make("user_id")
    await first.create({"ip": "x"})
    store, others = make("user_id", "ip"), 1
    await refuses(store.ids_by("ip", "x"))
    complete, missed = store.operations.complete, list[str]()

    def open_another(field: str, token: str, partition: int) -> Awaitable[int]:
        async def both() -> int:
            nonlocal others
            if partition == 0 and others:
                others -= 1
                missed.append(await make("user_id").create({"ip": "x"}))
            return await complete(field, token, partition)

        return both()

    monkeypatch.setattr(store.operations, "complete", open_another)
    assert await store.maintenance.reindex() == ["ip"]
    assert set(missed) < set(await store.ids_by("ip", "x"))
    others = 10
    await make("user_id").create({"ip": "x"})
    with pytest.raises(IncompleteReference):
        await store.maintenance.reindex()


async def test_the_mark_is_written_before_the_reference_is_known(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the first store with a new reference stops while it writes the marks, the next one writes them again."""
    await make("user_id").create({"ip": "x"})
    store = make("user_id", "ip")
    servers: Servers = store.operations.engine.servers
    master_of, calls = servers.master_of, 0

    def fail_later(key: str) -> object:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError("no more")
        return master_of(key)

    monkeypatch.setattr(servers, "master_of", fail_later)
    with pytest.raises((SessionError, OSError)):
        async with asyncio.timeout(20):
            await servers.ready()
    await refuses(make("user_id", "ip").ids_by("ip", "x"))


async def test_a_newer_format_is_refused(make: Make, keyspace: Keyspace) -> None:
    """A store does not touch the sessions of a version of the library with another format."""
    await make("user_id").create()
    await keyspace.client.hset(f"{keyspace.prefix}:_meta", "format", "2")
    with pytest.raises(SessionError, match="have the format 2, but this version of redis-session-sets knows 1"):
        await make("user_id").create()


class Processes:
    """Processes of an application under load, which a deploy replaces one by one."""

    def __init__(self, url: str, prefix: str) -> None:
        self._command = [sys.executable, "-m", "tests.process", url, prefix]
        self._running: list[asyncio.subprocess.Process] = []
        self._all: list[asyncio.subprocess.Process] = []
        #: The sessions of processes that have ended, and how often they met each error.
        self.live: dict[str, dict[str, Any]] = {}
        self.errors = Counter[str]()

    async def start(self, names: str) -> None:
        """Start a process with these references."""
        made = await asyncio.create_subprocess_exec(
            *self._command, names, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        self._all.append(made)
        assert made.stdout
        assert await made.stdout.readline() == b"begun\n"
        self._running.append(made)

    async def end(self) -> None:
        """End the oldest process, and take over its sessions."""
        ended = self._running.pop(0)
        out, _ = await ended.communicate(b".")
        assert ended.returncode == 0, "it met another error than IncompleteReference"
        live, errors = json.loads(out)
        self.live |= live
        self.errors.update(errors)

    async def deploy(self, names: str) -> None:
        """Replace all processes, one by one."""
        for _ in range(3):
            await self.start(names)
            await asyncio.sleep(0.2)
            await self.end()

    async def kill(self) -> None:
        """Kill those that still run, because the test has failed."""
        for one in self._all:
            with contextlib.suppress(ProcessLookupError):
                one.kill()
            await one.wait()


@pytest.mark.timeout(180)  # It starts twelve processes.
async def test_a_rolling_deploy_and_its_rollback(
    make: Make, keyspace: Keyspace, request: pytest.FixtureRequest
) -> None:
    """Under load, no process meets another error than IncompleteReference, and reindexing finds every session."""
    url = request.getfixturevalue("cluster_url" if keyspace.partitions == 64 else "redis_url")
    async with contextlib.AsyncExitStack() as stack:
        processes = Processes(url, keyspace.prefix)
        stack.push_async_callback(processes.kill)
        for _ in range(3):
            await processes.start("user_id")
        for names in ("user_id,ip", "user_id", "user_id,ip"):
            await processes.deploy(names)
            store = make(*names.split(","))
            assert await store.maintenance.reindex() == (["ip"] if "ip" in names else [])
            for session_id, values in processes.live.items():
                for name in names.split(","):
                    assert session_id in await store.ids_by(name, values[name])
            await store.aclose()
        for _ in range(3):
            await processes.end()
    assert processes.errors["IncompleteReference"] > 0
    assert len(processes.live) > 10


async def test_a_mark_in_one_partition_is_found(make: Make, keyspace: Keyspace) -> None:
    """Reindexing completes a reference that is marked in a single partition."""
    store = make("ip")
    await store.create({"ip": "x"})
    layout = store.operations.layout
    await keyspace.client.hset(layout.mark(layout.partitions - 1), "incomplete:ip", "lacked")
    assert await store.maintenance.reindex() == ["ip"]
    assert await store.maintenance.reindex() == []


async def test_a_strict_session_that_was_revoked_stays_so(make: Make, keyspace: Keyspace) -> None:
    """If some store lacked a strict reference, reindexing does not bring revoked sessions back."""
    store = make("user_id", ip=Reference(strict=True))
    session_id = await store.create({"user_id": 1, "ip": "x"})
    layout = store.operations.layout
    await keyspace.client.srem(layout.reference("ip", "x", layout.place(session_id)[1]), session_id)
    await make("user_id").create({"user_id": 2})
    assert await store.maintenance.reindex() == ["ip"]
    assert await store.get(session_id) == {}


async def test_a_server_that_is_away_is_told_as_such(make: Make) -> None:
    """Without a server, reindexing raises an error of this library."""
    del make
    store = SessionStore.from_url("redis://127.0.0.1:1", references=["ip"])
    for work in (store.maintenance.reindex, store.maintenance.sweep):
        with pytest.raises(StoreUnavailable, match="Redis does not answer"):
            await work()
    await store.aclose()
