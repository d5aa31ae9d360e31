"""Scripts that Redis refuses to run: a passing refusal is retried until the deadline, a lasting one fails at once."""

import asyncio

import pytest
from redis.asyncio import Redis

from rss import SessionError, SessionStore, StoreUnavailable
from tests.engine.callers import outcomes, works
from tests.servers import fake, ones

# ---------------------------------------------------------------------- scripts that are gone


async def test_many_find_that_the_scripts_are_gone_and_one_loads_them(url: str, admin: Redis) -> None:
    """Many calls of several kinds that find the scripts missing load them once, and no caller notices."""
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
        assert loads == len(store.operations.scripts.usual)


async def test_a_wrong_reply_to_scripts_that_are_loaded() -> None:
    """A wrong reply to SCRIPT LOAD closes the connection, and the call runs on another one."""
    gone = True

    def flush_once(command: list[bytes]) -> bytes:
        nonlocal gone
        if gone:
            gone, server.once = False, b"$3\r\nold\r\n"
            return b"-NOSCRIPT No matching script.\r\n"
        return ones(command)

    async with fake(flush_once) as server:
        store = SessionStore.from_url(server.url, timeout=20)
        assert await store.touch("a")
        assert server.made == 2
        await store.aclose()


async def test_scripts_that_may_not_be_loaded(url: str, admin: Redis) -> None:
    """Calls fail at once if the scripts may not be loaded, and the server is not asked again and again."""
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
    """A passing refusal is retried at growing intervals, even if the call must not be repeated."""
    refusing = True

    def refuse(command: list[bytes]) -> bytes:
        return f"-{code} later\r\n".encode() if refusing else ones(command)

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
    """Calls of one kind succeed while calls of another kind are refused."""

    def refuse(command: list[bytes]) -> bytes:
        return f"-{code} later\r\n".encode() if b"counter" in command else ones(command)

    async with fake(refuse) as server:
        store = SessionStore.from_url(server.url, timeout=0.5)
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
    "error",
    [
        "NOAUTH Authentication required.",
        "ERR Protocol error: unauthenticated bulk length",  # The reply to a large command.
        "OOM command not allowed",
        "MISCONF Errors writing to the AOF file",
    ],
)
async def test_what_lasts_is_told_at_once(error: str) -> None:
    """A lasting refusal fails every call at once."""
    async with fake(lambda _: f"-{error}\r\n".encode()) as server:
        store = SessionStore.from_url(server.url, timeout=40)
        for found in await outcomes([store.touch(str(n)) for n in range(10)]):
            assert isinstance(found, StoreUnavailable)
            assert "Redis refuses" in str(found)
        await store.aclose()


async def test_a_volley_that_is_refused_keeps_its_deadlines() -> None:
    """Refused calls fail in the order of their deadlines, however often they are put back."""
    refusing = False

    def refuse(command: list[bytes]) -> bytes:
        if refusing:
            return b"-BUSY later\r\n"
        return ones(command)

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
