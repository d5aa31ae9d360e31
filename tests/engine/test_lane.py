"""What breaks on the way to a server, and what its callers notice of it: mostly nothing."""

import asyncio
import contextlib
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel
from redis.backoff import EqualJitterBackoff

from rss import SessionError, SessionStore, StoreUnavailable
from tests.engine.callers import kill, outcomes, works
from tests.servers import connections, fake, free_port, own_server, proxied, sentinel, serving, stopped, until, wired


def _ones(command: list[bytes]) -> bytes:
    """Answer as `touch` and `increment` do for sessions that are all alive."""
    keys = int(command[2])
    return b"*%d\r\n" % keys + b":1\r\n" * keys


# ---------------------------------------------------------------------- the connection breaks


async def test_under_load_no_call_that_may_be_repeated_fails(url: str, admin: Redis) -> None:
    """However often all connections are cut, every caller gets its own reply, also while many others wait."""
    del admin
    async with SessionStore.from_url(url, timeout=20) as store, Redis.from_url(url) as killer:
        await works(store, 600)
        done = 0

        async def read(n: int) -> None:
            nonlocal done
            for _ in range(20):
                assert await store.get(f"w{n}", ["n"]) == {"id": f"w{n}", "n": n}
                done += 1

        async def cut() -> None:
            while True:
                before = done
                await kill(killer)
                while done < before + 300:
                    await asyncio.sleep(0)

        cutting = asyncio.create_task(cut())
        assert await outcomes((read(n) for n in range(600)), within=50) == [None] * 600
        cutting.cancel()
        await asyncio.wait([cutting])


async def test_what_must_not_be_repeated_runs_once(url: str, admin: Redis) -> None:
    """Each increment is counted, or its caller is told that it is not known."""
    del admin
    async with SessionStore.from_url(url, timeout=20) as store, Redis.from_url(url) as killer:
        await store.set("a", {"n": 0})
        counted = unknown = 0

        async def count() -> None:
            nonlocal counted, unknown
            for _ in range(50):
                try:
                    await store.increment("a", "n")
                    counted += 1
                except StoreUnavailable as error:
                    unknown += "not known what was done" in str(error)

        counting = [asyncio.ensure_future(count()) for _ in range(20)]
        for n in itertools.count():
            await kill(killer)
            while counted + unknown < 40 * (n + 1) and not all(one.done() for one in counting):
                await asyncio.sleep(0)
            if all(one.done() for one in counting):
                break
        await outcomes(counting)
        assert counted + unknown == 1000
        assert counted <= (await store.get("a", ["n"]))["n"] <= 1000


async def test_an_idle_connection_that_broke_costs_no_failure(url: str, admin: Redis) -> None:
    """Not even of a call that must not be repeated: the loss is noticed before the next call."""
    async with SessionStore.from_url(url) as store:
        await store.set("a", {"n": 0})
        for n in range(20):
            await kill(admin)
            while await connections(admin):
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            assert await store.increment("a", "n") == n + 1


async def test_two_calls_by_reference_that_lose_their_replies() -> None:
    """Their pages are run again, each in a script of its own, and each caller gets its own."""
    with own_server() as url:  # A script that got two pages could run for ever.
        async with proxied(url) as (proxy, address):
            store = SessionStore.from_url(address, references=["user_id"], timeout=20)
            for value in (1, 2):
                await asyncio.gather(*(store.create({"user_id": value}) for _ in range(30 * value)))
            await store.ids_by("user_id", 1)
            proxy.swallow = 1
            found = await outcomes(store.ids_by("user_id", value) for value in (1, 2))
            assert [len(ids) if isinstance(ids, list) else ids for ids in found] == [30, 60]
            proxy.swallow = 1
            for ended, most in zip(
                await outcomes(store.delete_by("user_id", n) for n in (1, 2)), (30, 60), strict=True
            ):
                assert isinstance(ended, int)
                assert ended <= most
            assert await outcomes(store.ids_by("user_id", value) for value in (1, 2)) == [[], []]
            await store.aclose()


# ---------------------------------------------------------------------- a call that breaks connections


async def test_a_call_that_breaks_connections_takes_no_other_with_it() -> None:
    """Others are repeated at most a few times, and it fails alone, at its deadline."""
    runs: dict[bytes, int] = {}

    def hang_up(command: list[bytes]) -> bytes | None:
        for key in command[3 : 3 + int(command[2])]:
            runs[key] = runs.get(key, 0) + 1
        return None if b"rss:{poison}" in command else _ones(command)

    async with fake(hang_up) as server:
        store = SessionStore.from_url(server.url, timeout=2)
        poison = asyncio.ensure_future(store.touch("poison"))
        for turn in itertools.count():
            found = await outcomes(store.touch(f"{turn}-{n}") for n in range(500))
            assert found == [True] * 500
            if poison.done():
                break
        with pytest.raises(StoreUnavailable, match="within the deadline: ConnectionError"):
            await poison
        alone = runs.pop(b"rss:{poison}")
        assert 4 < alone < 80
        # The volley that it came with; once more with it; then without.
        assert max(runs.values()) <= 3
        assert sum(runs.values()) - len(runs) <= 600
        await store.aclose()


async def test_many_calls_that_break_connections_fail_alone() -> None:
    """They fail at their deadlines; the others among them do not."""

    def hang_up(command: list[bytes]) -> bytes | None:
        keys = command[3 : 3 + int(command[2])]
        return None if any(b"poison" in key for key in keys) else _ones(command)

    async with fake(hang_up) as server:
        store = SessionStore.from_url(server.url, timeout=4)
        found = await outcomes(store.touch(f"poison{n}" if n % 20 == 7 else f"{n}") for n in range(100))
        assert [n for n in range(100) if found[n] is not True] == [n for n in range(100) if n % 20 == 7]
        assert {type(one) for one in found if one is not True} == {StoreUnavailable}
        await store.aclose()


@pytest.mark.parametrize("callers", [20, 500])
async def test_a_reply_over_the_output_limit(url: str, admin: Redis, callers: int) -> None:
    """Redis hangs up on the call that wants it. All others are served, and increments in flight are told."""
    await admin.config_set("client-output-buffer-limit", "normal 1mb 1mb 1")
    try:
        async with SessionStore.from_url(url, timeout=3) as store:
            await store.set("large", {"v": "x" * 3_000_000})
            await works(store, callers)
            poison = asyncio.ensure_future(store.get("large"))
            unknown = 0
            while not poison.done():
                reads = [store.get(f"w{n}", ["n"]) for n in range(callers)]
                counts = [store.increment(f"w{n}", "m") for n in range(20)]
                found = await outcomes([*reads, *counts])
                assert found[:callers] == [{"id": f"w{n}", "n": n} for n in range(callers)]
                failed = [one for one in found[callers:] if not isinstance(one, int)]
                assert all("not known what was done" in str(one) for one in failed)
                unknown += len(failed)
            assert unknown <= 20, "only those that were in flight with it"
            with pytest.raises(StoreUnavailable, match="within the deadline"):
                await poison
    finally:
        await admin.config_set("client-output-buffer-limit", "normal 0 0 0")


@pytest.mark.parametrize("callers", [20, 500])
async def test_a_value_over_the_limit_of_the_protocol(url: str, admin: Redis, callers: int) -> None:
    """Redis tells the first call of a batch and hangs up. It is not the fault of that one; the guilty is told soon."""
    await admin.config_set("proto-max-bulk-len", 1024 * 1024)
    try:
        async with SessionStore.from_url(url, timeout=30) as store:
            guilty = callers - 5
            calls = [store.set(f"w{n}", {"v": "x" * (2_000_000 if n == guilty else 10)}) for n in range(callers)]
            found = await outcomes(calls)
            assert [n for n, one in enumerate(found) if isinstance(one, BaseException)] == [guilty]
            assert isinstance(found[guilty], SessionError)
            assert await store.get("w0", ["v"]) == {"id": "w0", "v": "x" * 10}
    finally:
        await admin.config_set("proto-max-bulk-len", 512 * 1024 * 1024)


# ---------------------------------------------------------------------- silence


async def test_a_connection_that_goes_silent_is_replaced(url: str, admin: Redis) -> None:
    """Another one is answered, so it is given up before the deadline; what must not be repeated is told."""
    del admin
    async with wired(url) as wire, SessionStore.from_url(wire.url, timeout=6) as store:
        await store.set("a", {"n": 1})
        wire.silence()
        read, counted, touched = await outcomes([store.get("a", ["n"]), store.increment("a", "n"), store.touch("a")])
        assert read == {"id": "a", "n": 1}
        assert "not known what was done" in str(counted)
        assert touched is True
        assert await store.increment("a", "n") == 2


async def test_an_idle_connection_that_was_dropped_costs_one_attempt(url: str, admin: Redis) -> None:
    """Of each caller, and whatever lane it is: calls, or pages of reference sets."""
    del admin
    async with wired(url) as wire:
        store = SessionStore.from_url(wire.url, references=["user_id"], timeout=3)
        created = await store.create({"user_id": 1})
        assert await store.ids_by("user_id", 1) == [created]
        for _ in range(2):
            wire.silence()
            assert await store.touch(created)
            assert await store.ids_by("user_id", 1) == [created]
        # When one lane has noticed, the idle connections of the others are not trusted either.
        wire.silence()
        assert await store.ids_by("user_id", 1) == [created]
        assert await store.increment(created, "n") == 1
        await store.aclose()


async def test_a_server_that_stands_still_is_waited_for(url: str, admin: Redis) -> None:
    """No other connection is answered either: so nothing fails, and nothing runs twice."""
    async with SessionStore.from_url(url, references=["user_id"], timeout=6) as store:
        await store.set("a", {"user_id": 1, "n": 0})
        assert await store.ids_by("user_id", 1) == ["a"]
        await admin.config_resetstat()
        async with stopped(admin):
            calls = [asyncio.ensure_future(store.increment("a", "n")) for _ in range(20)]
            page = asyncio.ensure_future(store.ids_by("user_id", 1))
            await asyncio.sleep(2.5)  # Longer than the third of the deadline after which it is doubted.
            assert not any(call.done() for call in calls)
        assert sorted(await outcomes(calls), key=str) == sorted(range(1, 21), key=str)
        assert await outcomes([page]) == [["a"]]
        assert await store.increment("a", "n") == 21


async def test_a_server_that_stands_still_for_too_long(url: str, admin: Redis) -> None:
    """Calls fail at their deadline, and the next ones work as soon as it goes on."""
    async with SessionStore.from_url(url, timeout=0.6) as store:
        await store.set("a", {"n": 0})
        async with stopped(admin):
            for _ in range(2):
                for found in await outcomes([store.touch("a"), store.get("a")]):
                    assert isinstance(found, StoreUnavailable)
                    assert "within the deadline" in str(found)
        async with SessionStore.from_url(url, timeout=20) as other:
            assert await other.touch("a")
        assert await works(store)


async def test_a_slow_script_of_others_costs_no_failure(url: str, admin: Redis) -> None:
    """The server answers nobody meanwhile."""
    del admin
    async with SessionStore.from_url(url, timeout=6) as store:
        await store.set("a", {"n": 0})
        slow = (
            "local t = redis.call('TIME') local stop = t[1] + t[2] / 1e6 + 2.5 "
            "repeat t = redis.call('TIME') until t[1] + t[2] / 1e6 > stop"
        )
        async with Redis.from_url(url, socket_timeout=None) as other:
            running: asyncio.Future[Any] = asyncio.ensure_future(other.eval(slow, 0))
            await asyncio.sleep(0.1)
            assert sorted(await outcomes([store.increment("a", "n") for _ in range(10)]), key=str) == sorted(
                range(1, 11), key=str
            )
            await running


async def test_a_way_that_is_dead_for_a_while(url: str, admin: Redis) -> None:
    """New connections are made but not answered; when the way is open again, everything works."""
    del admin
    async with wired(url) as wire, SessionStore.from_url(wire.url, timeout=1) as store:
        await store.set("a", {"n": 1})
        dead = True

        async def drop() -> None:
            while dead:
                wire.silence()
                await asyncio.sleep(0)

        dropping = asyncio.create_task(drop())
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="within the deadline"):
                await store.touch("a")
        dead = False
        await dropping
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    if await store.touch("a"):
                        break


# ---------------------------------------------------------------------- scripts that are gone


async def test_many_find_that_the_scripts_are_gone_and_one_loads_them(url: str, admin: Redis) -> None:
    """Also if they are of several kinds and in several volleys; no caller notices."""
    async with SessionStore.from_url(url, references=["user_id"]) as store:
        await works(store, 300)
        await admin.script_flush()
        await admin.config_resetstat()
        calls = [store.get(f"w{n}", ["n"]) for n in range(300)]
        counts = [store.increment(f"w{n}", "n") for n in range(300)]
        found = await outcomes([*calls, *counts])
        assert found[300:] == [n + 1 for n in range(300)]
        stats = await admin.info("commandstats")
        loads = stats["cmdstat_script|load" if "cmdstat_script|load" in stats else "cmdstat_script"]["calls"]
        assert loads == len(store.operations.scripts.sources)


async def test_scripts_that_may_not_be_loaded(url: str, admin: Redis) -> None:
    """The reason is told at once, and the server is not asked for ever."""
    await admin.acl_setuser("flat", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all"], reset=True)
    async with Redis(unix_socket_path=url.removeprefix("unix://"), username="flat", password="pw") as client:
        store = SessionStore(client, timeout=40)
        await store.load()
        await admin.execute_command("ACL", "SETUSER", "flat", "-script")  # type: ignore[no-untyped-call]
        await admin.script_flush()
        await admin.config_resetstat()
        for found in await outcomes([store.touch(str(n)) for n in range(10)]):
            assert isinstance(found, SessionError)
            assert "permission" in str(found)
            assert "script" in str(found)
        assert (await admin.info("commandstats"))["cmdstat_evalsha"]["calls"] <= 20
        await admin.execute_command("ACL", "SETUSER", "flat", "+script")  # type: ignore[no-untyped-call]
        assert await works(store)
        await store.aclose()


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("code", ["LOADING", "BUSY", "MASTERDOWN", "READONLY", "NOREPLICAS", "NOSCRIPT"])
async def test_what_passes_is_waited_for(code: str) -> None:
    """Also for what must not be repeated; at intervals that grow."""
    refusing = True

    def refuse(command: list[bytes]) -> bytes:
        return f"-{code} later\r\n".encode() if refusing else _ones(command)

    async with fake(refuse) as server:
        store = SessionStore.from_url(server.url, timeout=20)
        calls = [asyncio.ensure_future(store.increment(f"s{n}", "n")) for n in range(20)]
        await asyncio.sleep(0.5)
        assert not any(call.done() for call in calls)
        refusing = False
        assert await outcomes(calls) == [1] * 20
        assert server.commands.count("EVALSHA") < 60
        assert server.made < 60
        await store.aclose()


@pytest.mark.parametrize("code", ["LOADING", "BUSY", "READONLY", "NOREPLICAS"])
async def test_what_is_refused_keeps_no_other_kind_waiting(code: str) -> None:
    """Reads go on while writes are refused."""

    def refuse(command: list[bytes]) -> bytes:
        return f"-{code} later\r\n".encode() if b"counter" in command else _ones(command)

    async with fake(refuse) as server:
        store = SessionStore.from_url(server.url, timeout=1)
        refused = asyncio.ensure_future(store.increment("s", "counter"))
        served = 0
        while not refused.done():
            assert await store.touch("a")
            served += 1
        with pytest.raises(StoreUnavailable, match=f"within the deadline: {code}"):
            await refused
        assert served > 20
        await store.aclose()


@pytest.mark.parametrize(
    "error", ["NOAUTH Authentication required.", "OOM command not allowed", "MISCONF Errors writing to the AOF file"]
)
async def test_what_lasts_is_told_at_once(error: str) -> None:
    """To every caller: waiting would not help."""
    async with fake(lambda _: f"-{error}\r\n".encode()) as server:
        store = SessionStore.from_url(server.url, timeout=40)
        for found in await outcomes([store.touch(str(n)) for n in range(10)]):
            assert isinstance(found, StoreUnavailable)
            assert "Redis refuses" in str(found)
        await store.aclose()


async def test_a_volley_that_is_refused_keeps_its_deadlines() -> None:
    """A call that waits longer than others is told first, however often they are put back."""
    refusing = False

    def refuse(command: list[bytes]) -> bytes:
        if refusing:
            return b"-BUSY later\r\n"
        return _ones(command)

    async with fake(refuse) as server:
        store = SessionStore.from_url(server.url, timeout=1.5)
        await store.touch("a")
        refusing = True
        told: list[int] = []

        async def call(n: int) -> None:
            with pytest.raises(StoreUnavailable, match="within the deadline"):
                await store.touch(str(n))
            told.append(n)

        calls = []
        for n in range(10):
            calls.append(asyncio.ensure_future(call(n)))
            await asyncio.sleep(0.75 if n == 4 else 0)
        assert await outcomes(calls) == [None] * 10
        assert {*told[:5]} == {*range(5)}
        await store.aclose()


# ---------------------------------------------------------------------- making connections


class _Hours:
    """Lets what waits for Redis see hours of failures in a moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = EqualJitterBackoff.compute
        self.attempts = 0

        def compute(backoff: EqualJitterBackoff, failures: int) -> float:
            self.attempts += 1
            assert real(backoff, failures) <= 0.25
            return 0

        monkeypatch.setattr(EqualJitterBackoff, "compute", compute)

    async def pass_by(self) -> None:
        """Return after more attempts than a float has powers of two."""
        while self.attempts < 1100:
            await asyncio.sleep(0.001)


async def test_a_server_that_is_gone_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store connects as soon as it is there again."""
    port, hours = free_port(), _Hours(monkeypatch)
    async with Redis(port=port) as client:
        store = SessionStore(client, timeout=40)
        calls = [asyncio.ensure_future(store.touch(str(n))) for n in range(5)]
        await asyncio.wait([asyncio.ensure_future(hours.pass_by()), *calls], return_when=asyncio.FIRST_COMPLETED)
        assert hours.attempts >= 1100
        with own_server("--port", str(port), "--bind", "127.0.0.1"):
            assert await outcomes(calls) == [False] * 5
            assert await works(store)
            await store.aclose()


@pytest.mark.timeout(180)  # More than a thousand attempts, each on a new connection.
async def test_a_server_that_refuses_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are run as soon as it does not."""
    hours, refusing = _Hours(monkeypatch), True
    async with fake(lambda command: b"-READONLY later\r\n" if refusing else _ones(command)) as server:
        store = SessionStore.from_url(server.url, timeout=150)
        calls = [asyncio.ensure_future(store.touch(str(n))) for n in range(5)]
        await asyncio.wait([asyncio.ensure_future(hours.pass_by()), *calls], return_when=asyncio.FIRST_COMPLETED)
        assert hours.attempts >= 1100
        refusing = False
        assert await outcomes(calls) == [True] * 5
        await store.aclose()


async def test_a_caller_that_is_gone_leaves_nothing_to_do() -> None:
    """When all callers gave up, a server that is not there is dialled no more, and the processor has a rest."""
    async with Redis.from_url("unix:///nowhere/redis.sock") as client:
        store = SessionStore(client, references=["user_id"], timeout=30)
        calls = [asyncio.ensure_future(store.touch("a")), asyncio.ensure_future(store.ids_by("user_id", 1))]
        await asyncio.sleep(0.2)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        await asyncio.sleep(0.5)  # The attempt that was under way ends.
        before = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - before < 0.5
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await store.aclose()


async def test_a_restart_with_another_state(tmp_path: Path) -> None:
    """The server is gone for a while and comes back without scripts: calls wait for it."""
    port = free_port()
    arguments = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path))
    async with Redis(port=port) as client:
        store = SessionStore(client, timeout=30)
        with own_server(*arguments):
            assert await works(store)
        calls = [asyncio.ensure_future(store.touch(f"w{n}")) for n in range(50)]
        await asyncio.sleep(0.3)
        with own_server(*arguments):
            assert await outcomes(calls) == [False] * 50
            assert await works(store)
            await store.aclose()


async def _count(store: SessionStore, until_done: asyncio.Event, outcomes: list[bool]) -> None:
    """Increment a field of session "a" all the time. What fails may have been counted."""
    while not until_done.is_set():
        try:
            await store.increment("a", "n")
        except StoreUnavailable as error:
            assert "not known what was done" in str(error)  # noqa: PT017 - it is told, or counted
            outcomes.append(False)
        else:
            outcomes.append(True)
        await asyncio.sleep(0.005)


REPLICATED = ("--bind", "127.0.0.1", "--repl-diskless-sync-delay", "0")


async def test_a_master_that_is_demoted(url: str) -> None:
    """A proxy leads to the new master, but what is connected stays so: writes find the new one, and none runs twice."""
    del url
    ports = [free_port(), free_port()]
    target = ports[0]

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", target)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(1 << 16):
                    sink.write(data)

        pumps = [asyncio.ensure_future(pump(reader, back)), asyncio.ensure_future(pump(there, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in pumps:
                one.cancel()
            back.close()

    with (
        own_server("--port", str(ports[0]), *REPLICATED),
        own_server("--port", str(ports[1]), *REPLICATED, "--replicaof", "127.0.0.1", str(ports[0])),
    ):
        async with serving(relay) as port, Redis(port=ports[0]) as first, Redis(port=ports[1]) as second:
            await until(second, "replication", "master_link_status", "up")
            async with SessionStore.from_url(f"redis://127.0.0.1:{port}", timeout=40) as store:
                await store.set("a", {"n": 0})
                done, counted = asyncio.Event(), list[bool]()
                counting = [asyncio.create_task(_count(store, done, counted)) for _ in range(5)]
                while len(counted) < 50:
                    await asyncio.sleep(0.01)
                while await second.hget("rss:{a}", "n") is None:
                    await asyncio.sleep(0.01)
                # No master takes writes for a moment: then the replica takes over.
                await first.replicaof("127.0.0.1", str(ports[0]))
                await until(first, "replication", "role", "slave")
                acknowledged = len(counted)
                await second.replicaof("NO", "ONE")
                target = ports[1]
                while len(counted) < acknowledged + 50:
                    await asyncio.sleep(0.01)
                done.set()
                await outcomes(counting)
                assert all(counted)  # Refused is not lost: each was run once.
                assert (await store.get("a", ["n"]))["n"] <= len(counted)
                assert await second.hget("rss:{a}", "n") == str((await store.get("a", ["n"]))["n"]).encode()


async def test_a_failover_by_sentinels(tmp_path: Path) -> None:
    """They move the master while it lives: writes go to the new one, and nothing is counted twice."""
    ports = [free_port(), free_port()]
    with (
        own_server("--port", str(ports[0]), *REPLICATED),
        own_server("--port", str(ports[1]), *REPLICATED, "--replicaof", "127.0.0.1", str(ports[0])),
        sentinel(tmp_path, ports[0]) as watch,
    ):
        async with (
            Redis(port=watch, decode_responses=True) as guard,
            Redis(port=ports[0]) as first,
            Redis(port=ports[1]) as second,
        ):
            await until(second, "replication", "master_link_status", "up")
            sentinels = Sentinel([("127.0.0.1", watch)])  # type: ignore[no-untyped-call]
            async with sentinels.master_for("main") as client:
                store = SessionStore(client, timeout=40)
                await store.set("a", {"n": 0})
                done, counted = asyncio.Event(), list[bool]()
                counting = [asyncio.create_task(_count(store, done, counted)) for _ in range(5)]
                while len(counted) < 50:
                    await asyncio.sleep(0.01)
                while await second.hget("rss:{a}", "n") is None:
                    await asyncio.sleep(0.01)
                await _fail_over(guard)
                await until(first, "replication", "role", "slave")
                await until(second, "replication", "role", "master")
                await until(first, "replication", "master_link_status", "up")
                done.set()
                await outcomes(counting, within=50)
                # Until it is demoted, the old master acknowledges writes that are lost with it.
                assert await store.increment("a", "n") <= len(counted) + 1
                assert await second.hget("rss:{a}", "n") == str((await store.get("a", ["n"]))["n"]).encode()
                await store.aclose()
            for one in sentinels.sentinels:
                await one.aclose()


async def _fail_over(guard: Redis) -> None:
    """Ask a sentinel for a failover until it knows the replica, and agrees."""
    async with asyncio.timeout(40):
        while True:
            with contextlib.suppress(redis.exceptions.RedisError):
                await guard.execute_command("SENTINEL", "FAILOVER", "main")  # type: ignore[no-untyped-call]
                return
            await asyncio.sleep(0.05)
