"""An observer is told about each call once: its name, its duration, its attempts and its end."""

import asyncio
import contextvars
import gc
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest
from redis.asyncio import Redis

from rss import LimitExceeded, Reference, SessionEnded, SessionStore, StoreUnavailable
from rss.engine import engine
from rss.engine.channel import Channel
from rss.engine.observed import ObservedCall
from rss.observe import Observation
from tests.conftest import LOOPS
from tests.engine.callers import kill, outcomes, works
from tests.servers import fake, ones, stopped

_NAME: contextvars.ContextVar[str] = contextvars.ContextVar("_NAME", default="nobody")


@pytest.fixture(name="seen")
def _seen() -> list[Observation]:
    """The observations of the store."""
    return []


@pytest.fixture(name="store")
async def _store(url: str, admin: Redis, seen: list[Observation]) -> AsyncIterator[SessionStore]:
    """A store that is open, and whose scripts are loaded."""
    del admin
    async with SessionStore.from_url(url, references={"user_id": Reference(limit=1, on_limit="refuse")}) as store:
        await store.set("a", {"n": 0})
    async with SessionStore.from_url(url, references=store.fields.references, timeout=20, observe=seen.append) as store:
        seen.clear()
        yield store


# ---------------------------------------------------------------------- success


async def test_a_call_is_observed_before_its_caller_continues(store: SessionStore, seen: list[Observation]) -> None:
    """The observation of a call is there when the call returns, and its duration is no longer than the call took."""
    began = time.perf_counter()
    assert await store.increment("a", "n") == 1
    took = time.perf_counter() - began
    ((operation, duration, batch, attempts, error),) = seen
    assert (operation, batch, attempts, error) == ("increment", 1, 1, None)
    assert 0 <= duration < took + 0.002  # The clock of uvloop counts milliseconds.


async def test_a_search_that_stops_early_has_no_error(store: SessionStore, seen: list[Observation]) -> None:
    """A caller that wants only the first session found causes no error of a call beside it."""
    await store.set("a", {"user_id": 1})

    async def search() -> None:
        sessions: Any = store.find_by("user_id", 1)
        assert await anext(sessions)
        await sessions.aclose()

    for _ in range(20):
        await asyncio.gather(*(search() for _ in range(20)))
    await store.aclose()
    assert [observation.operation for observation in seen].count("hget") == 400
    assert {observation.error for observation in seen} == {None}


async def test_a_wait_counts(store: SessionStore, admin: Redis, seen: list[Observation]) -> None:
    """The duration includes the time for which the server stands still."""
    async with stopped(admin):
        call = asyncio.ensure_future(store.touch("a"))
        await asyncio.sleep(0.2)
    assert await call
    assert seen[0].duration > 0.19  # The clock of uvloop counts milliseconds.


async def test_a_transport_may_read_inside_of_a_task(
    store: SessionStore, seen: list[Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the transport reads inside of a task, calls are observed too, before their callers continue."""
    received, reads = Channel.data_received, set[asyncio.Task[None]]()

    async def receive(channel: Channel, data: bytes) -> None:
        received(channel, data)

    with monkeypatch.context() as patch:
        patch.setattr(
            Channel, "data_received", lambda channel, data: reads.add(asyncio.create_task(receive(channel, data)))
        )
        assert await store.touch("a")
    assert [one.operation for one in seen] == ["touch"]
    await asyncio.gather(*reads)


async def test_batches_are_those_that_were_sent() -> None:
    """Each call tells the number of calls in its EVALSHA."""
    sent, seen = Counter[int](), list[Observation]()

    def count(command: list[bytes]) -> bytes:
        sent[int(command[2])] += int(command[2])
        return ones(command)

    async with fake(count) as server, aclosing(SessionStore.from_url(server.url, observe=seen.append)) as store:
        await store.touch("a")
        sent.clear()
        seen.clear()
        await asyncio.gather(*(store.touch(str(n)) for n in range(250)))
    assert Counter(one.batch for one in seen) == sent
    assert max(sent) == 100
    assert {one.attempts for one in seen} == {1}


async def test_a_plain_command_is_a_batch_of_one(store: SessionStore, seen: list[Observation]) -> None:
    """The name of a plain command is in small letters, and each command has one call."""
    await asyncio.gather(*(store.count_by("user_id", n, exact=False) for n in range(10)))
    assert {one[0::2] for one in seen} == {("scard", 1, None), ("hget", 1, None)}
    assert len(seen) == 20


async def test_a_call_that_a_script_had_no_time_for() -> None:
    """A call that a script left over was sent twice."""

    def few(command: list[bytes]) -> bytes:
        keys = min(int(command[2]), 2)
        return b"*%d\r\n" % keys + b":1\r\n" * keys

    seen = list[Observation]()
    async with fake(few) as server, aclosing(SessionStore.from_url(server.url, observe=seen.append)) as store:
        await store.touch("a")
        seen.clear()
        await asyncio.gather(*(store.touch(str(n)) for n in range(6)))
    assert sorted(one.attempts for one in seen) == [1, 1, 1, 1, 2, 2]


# ---------------------------------------------------------------------- retries


async def test_scripts_that_are_gone(store: SessionStore, admin: Redis, seen: list[Observation]) -> None:
    """A call that found its script missing was sent twice."""
    await admin.script_flush()
    await asyncio.gather(*(store.touch("a") for _ in range(20)))
    assert {one.attempts for one in seen} == {2}
    assert len(seen) == 20


async def test_a_connection_that_breaks(store: SessionStore, admin: Redis, seen: list[Observation]) -> None:
    """A call that was in flight on a broken connection was sent twice; one that must not be repeated, once."""
    await admin.client_pause(20_000, all=False)
    calls = [asyncio.ensure_future(call) for call in (store.touch("a"), store.increment("a", "n"))]
    await asyncio.sleep(0.1)
    await kill(admin)
    await asyncio.sleep(0.1)
    await admin.client_unpause()
    touched, counted = await outcomes(calls)
    assert touched is True
    assert isinstance(counted, StoreUnavailable)
    assert [(one.operation, *one[2:]) for one in seen] == [
        ("increment", 1, 1, StoreUnavailable),
        ("touch", 1, 2, None),
    ]


async def test_a_call_that_is_refused() -> None:
    """A call that Redis refused to run tells all attempts."""
    refusals, seen = 2, list[Observation]()

    def refuse(command: list[bytes]) -> bytes:
        nonlocal refusals
        if b"rss:{a}" in command and refusals:
            refusals -= 1
            return b"-BUSY later\r\n"
        return ones(command)

    async with (
        fake(refuse) as server,
        aclosing(SessionStore.from_url(server.url, timeout=20, observe=seen.append)) as store,
    ):
        assert await store.touch("a")
    assert seen[0].attempts == 3


# ---------------------------------------------------------------------- errors


async def test_an_error_of_one_call_of_a_batch(store: SessionStore, seen: list[Observation]) -> None:
    """An error is told by its class, for the call that gets it, before its caller continues."""
    await store.create({"user_id": 1})
    await store.delete("a")
    seen.clear()

    async def write(session_id: str, user: int) -> None:
        try:
            await store.set(session_id, {"user_id": user})
        finally:
            told.append(len(seen))

    told = list[int]()
    await outcomes([write("a", 2), write("b", 1), write("c", 3)])
    assert Counter(one.error for one in seen) == {SessionEnded: 1, LimitExceeded: 1, None: 1}
    assert {one.operation for one in seen} == {"set_with_refs"}
    assert min(told) >= 1
    assert told[-1] == 3


async def test_a_deadline(url: str, admin: Redis) -> None:
    """A call that got no reply tells that it was sent; a call that waited behind others tells that it was not."""
    seen = list[Observation]()
    async with SessionStore.from_url(url, timeout=0.5, observe=seen.append) as store:
        assert await works(store)
        seen.clear()
        async with stopped(admin):
            found = await outcomes(store.touch(str(n)) for n in range(300))
    assert {type(one) for one in found} == {StoreUnavailable}
    assert {one.error for one in seen} == {StoreUnavailable}
    assert {(one.batch, one.attempts) for one in seen} == {(100, 1), (0, 0)}
    assert len(seen) == 300
    assert all(0.45 < one.duration < 5 for one in seen)


async def test_a_server_that_is_missing() -> None:
    """A call that was never sent tells that."""
    seen = list[Observation]()
    store = SessionStore.from_url("unix:///nowhere/redis.sock", timeout=0.2, observe=seen.append)
    await outcomes([store.touch("a")])
    assert [one[2:] for one in seen] == [(0, 0, StoreUnavailable)]
    await store.aclose()


async def test_an_overload(
    store: SessionStore, admin: Redis, seen: list[Observation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is not taken, because too many wait, is observed."""
    monkeypatch.setattr(engine, "MAX_PENDING", 10)
    async with stopped(admin):
        calls = [asyncio.ensure_future(store.touch("a")) for _ in range(300)]
        while not seen:
            await asyncio.sleep(0)
        assert {one[2:] for one in seen} == {(0, 0, StoreUnavailable)}
        refused = len(seen)
    await outcomes(calls)
    assert 0 < refused < 100
    assert Counter(one.error for one in seen) == {StoreUnavailable: refused, None: 300 - refused}


async def test_calls_that_are_cancelled(store: SessionStore, admin: Redis, seen: list[Observation]) -> None:
    """A cancelled call is observed once, before its caller continues, and not again when the reply comes."""
    told = list[int]()

    async def call() -> None:
        try:
            await store.touch("a")
        finally:
            told.append(len(seen))

    async with stopped(admin):
        tasks = [asyncio.ensure_future(call()) for _ in range(3)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert told == [1, 2, 3]
        assert {one[3:] for one in seen} == {(1, asyncio.CancelledError)}
    assert await store.touch("a")
    assert len(seen) == 4


async def test_a_call_that_is_cancelled_too_late() -> None:
    """A call that has failed is observed once, even if its caller is cancelled before it continues."""
    call, seen = ObservedCall.make(asyncio.get_running_loop(), (), (), 0, 0.0), list[Observation]()
    call.begin("touch", seen.append)
    call.fail(StoreUnavailable())
    assert not call.cancel()
    await asyncio.sleep(0)
    assert [one.error for one in seen] == [StoreUnavailable]
    assert isinstance(call.exception(), StoreUnavailable)


async def test_what_is_no_call(store: SessionStore, seen: list[Observation]) -> None:
    """A call that is refused before it begins is not observed."""
    with pytest.raises(ValueError, match="must not be empty"):
        await store.touch("")
    await store.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await store.touch("a")
    assert seen == []


# ---------------------------------------------------------------------- contexts


@pytest.mark.parametrize("end", [None, StoreUnavailable, asyncio.CancelledError])
async def test_the_context_is_that_of_the_caller(url: str, admin: Redis, end: type[BaseException] | None) -> None:
    """The observer runs in the context in which the caller called, and cannot change the context of the caller."""
    seen, kept = list[tuple[str, type[BaseException] | None]](), list[str]()

    def observe(observation: Observation) -> None:
        seen.append((_NAME.get(), observation.error))
        _NAME.set("the observer")

    async def work(name: str) -> None:
        _NAME.set(name)
        try:
            await store.touch("a")
        finally:
            kept.append(_NAME.get())

    names = [f"caller{n}" for n in range(20)]
    async with SessionStore.from_url(url, timeout=0.5, observe=observe) as store, AsyncExitStack() as stack:
        seen.clear()
        if end:
            await stack.enter_async_context(stopped(admin))
        tasks = [asyncio.create_task(work(name)) for name in names]
        await asyncio.sleep(0.05)
        if end is asyncio.CancelledError:
            for task in tasks:
                task.cancel()
        await outcomes(tasks)
    assert kept == names
    assert seen == [(name, end) for name in names]


class _Request:
    """An object that a framework keeps in a context."""


async def test_no_context_of_a_request_lives_on(store: SessionStore, admin: Redis) -> None:
    """The context of a caller is not kept after the call."""
    variable: contextvars.ContextVar[object] = contextvars.ContextVar("variable")
    requests: list[weakref.ref[_Request]] = []

    async def request() -> None:
        variable.set(one := _Request())
        requests.append(weakref.ref(one))
        await store.touch("a")
        await store.ids_by("user_id", 1)

    for _ in range(3):
        await asyncio.gather(*(asyncio.create_task(request()) for _ in range(20)))
        await kill(admin)
    gc.collect()
    assert {one() for one in requests} == {None}


# ---------------------------------------------------------------------- observers that misbehave


async def test_an_observer_that_raises(url: str, admin: Redis) -> None:
    """No caller notices an observer that raises. The exception handler of the loop gets the first error."""
    told = list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

    def observe(observation: Observation) -> None:
        raise ZeroDivisionError(observation.operation)

    async with SessionStore.from_url(url, timeout=0.5, observe=observe) as store:
        assert await works(store)
        async with stopped(admin):
            found = await outcomes(store.touch(str(n)) for n in range(20))
        assert {type(one) for one in found} == {StoreUnavailable}
        assert await works(store)
    (context,) = told
    assert isinstance(context["exception"], ZeroDivisionError)
    assert "the observer of a SessionStore failed" in context["message"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("loops", LOOPS.values(), ids=LOOPS)
def test_an_observer_that_ends_the_program(
    url: str, loops: Callable[[], asyncio.AbstractEventLoop], end: type[BaseException]
) -> None:
    """An exception that ends the program leaves the event loop, and all callers get their replies."""
    ends = True

    def observe(_: Observation) -> None:
        nonlocal ends
        if ends:
            ends = False
            raise end

    loop = loops()
    store = SessionStore.from_url(url, observe=observe)
    try:
        ending = loop.create_task(store.touch("a"))
        tasks = [ending, *(loop.create_task(store.touch(str(n))) for n in range(10))]
        with pytest.raises(end):
            loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(asyncio.wait(tasks))
        assert {task.exception() for task in tasks} == {None}
        loop.run_until_complete(store.aclose())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def test_an_observer_that_calls_the_store(url: str, admin: Redis) -> None:
    """An observer may call the store while calls succeed, fail or are cancelled. No call fails because of that."""
    made = list[Awaitable[int]]()

    def observe(observation: Observation) -> None:
        if observation.operation == "touch" and len(made) < 320:
            made.append(store.operations.touch("a", "renew"))

    async with SessionStore.from_url(url, timeout=0.5, observe=observe) as store:
        assert await outcomes(store.touch("a") for _ in range(20)) == [False] * 20
        async with stopped(admin):
            tasks = [asyncio.ensure_future(store.touch("a")) for _ in range(300)]
            await asyncio.sleep(0.05)
            for task in tasks[:10]:
                task.cancel()
            found = await outcomes(tasks)
        assert Counter(map(type, found)) == {asyncio.CancelledError: 10, StoreUnavailable: 290}
        found += await outcomes(made)
        assert "a bug" not in "".join(map(str, found))
        assert len(found) == 620
