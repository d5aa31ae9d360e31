"""Many callers at once: each has a deadline and gets a reply, in any event loop, process or context."""

import asyncio
import contextvars
import functools
import gc
import inspect
import os
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn

import pytest
from redis.asyncio import Redis

from rss import Codec, SessionError, SessionStore, StoreUnavailable
from rss.engine import channel, coalesce, engine, lane
from tests.conftest import LOOPS
from tests.engine.callers import kill, outcomes, works
from tests.servers import connections, fake, stopped

# ---------------------------------------------------------------------- nonsense from a codec


class _Nonsense(Codec):
    """A codec that returns a given object for the value "bad"."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def encode(self, field: str, value: Any) -> Any:
        del field
        return self.result if value == "bad" else str(value)

    def decode(self, field: str, data: bytes) -> Any:
        del field
        return data.decode()


@pytest.mark.parametrize(
    "result",
    [5, None, bytearray(b"x"), "\ud800", object(), [], 1.5, memoryview(b"x")],
    ids=lambda result: type(result).__name__,
)
async def test_a_codec_that_returns_nonsense_fails_its_own_caller(url: str, admin: Redis, result: Any) -> None:
    """A codec that returns nonsense fails its own call at once; the other calls of the batch succeed."""
    del admin
    async with SessionStore.from_url(url, codec=_Nonsense(result)) as store:
        found = await outcomes(store.set(str(n), {"v": "bad" if n == 5 else "good"}) for n in range(20))
        assert isinstance(found.pop(5), TypeError | ValueError)
        assert found == [{"v": "good"}] * 19


async def test_a_text_of_a_class_of_its_own(url: str, admin: Redis) -> None:
    """A subclass of str or bytes with odd methods does not break the other calls of its batch."""
    del admin

    class Text(str):
        __slots__ = ()

        def encode(self, encoding: str = "utf-8", errors: str = "strict") -> NoReturn:  # noqa: ARG002 - as in str
            raise ZeroDivisionError

    class Data(bytes):
        def __len__(self) -> int:
            return 10**9

    for result in (Text("é"), Data(b"x")):
        async with SessionStore.from_url(url, codec=_Nonsense(result)) as store:
            found = await outcomes(store.set(str(n), {"v": "bad" if n == 5 else "good"}) for n in range(20))
            assert found[:5] + found[6:] == [{"v": "good"}] * 19


# ---------------------------------------------------------------------- deadlines, cancellation, bounds


async def test_thousands_of_deadlines(url: str, admin: Redis) -> None:
    """Each of thousands of calls fails after its own deadline, not before."""
    async with SessionStore.from_url(url, timeout=1) as store:
        loop = asyncio.get_running_loop()

        async def call(n: int) -> float:
            begun = loop.time()
            with pytest.raises(StoreUnavailable, match="within the deadline"):
                await store.touch(str(n))
            return loop.time() - begun

        async with stopped(admin):
            calls: list[asyncio.Future[float]] = []
            for part in range(3):
                calls += [asyncio.ensure_future(call(part * 3000 + n)) for n in range(3000)]
                await asyncio.sleep(0.2)
            for waited in await outcomes(calls):
                assert isinstance(waited, float)
                assert waited >= 0.99
        assert await works(store)


async def test_a_deadline_holds_while_connecting(url: str, admin: Redis) -> None:
    """A deadline holds while redis-py waits for the reply to its handshake, whatever timeouts the client has."""
    async with Redis.from_url(url, socket_connect_timeout=60, socket_timeout=60) as client:
        store = SessionStore(client, timeout=0.5)
        async with stopped(admin):
            for found in await outcomes([store.touch("a"), store.increment("a", "n")]):
                assert isinstance(found, StoreUnavailable)
                assert "within the deadline" in str(found)
        await store.aclose()


async def test_calls_that_were_in_doubt_keep_their_deadlines() -> None:
    """A call that breaks connections fails at its deadline, before calls that came later."""
    poisonous = True

    def hang_up(command: list[bytes]) -> bytes | None:
        keys = command[3 : 3 + int(command[2])]
        return None if b"rss:{poison}" in keys or not poisonous else b"*%d\r\n" % len(keys) + b":1\r\n" * len(keys)

    async with fake(hang_up) as server:
        store = SessionStore.from_url(server.url, timeout=2)
        assert await store.touch("a")
        told: list[str] = []

        async def call(name: str) -> None:
            with pytest.raises(StoreUnavailable, match="within the deadline"):
                await store.touch(name)
            told.append(name)

        poison = asyncio.ensure_future(call("poison"))
        await asyncio.sleep(1)
        poisonous = False  # From now on every call breaks its connection.
        later = [asyncio.ensure_future(call(f"later{n}")) for n in range(10)]
        assert await outcomes([poison, *later]) == [None] * 11
        assert told[0] == "poison"
        await store.aclose()


async def test_no_more_calls_wait_than_the_limit(url: str, admin: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call above the limit of pending calls fails at once; calls are accepted again when there is room."""
    monkeypatch.setattr(engine, "MAX_PENDING", 500)
    async with SessionStore.from_url(url, references=["user_id"], timeout=20) as store:
        async with stopped(admin):
            calls = [asyncio.ensure_future(store.touch(str(n))) for n in range(1000)]
            while sum(call.done() for call in calls) <= 250:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            refused = [call for call in calls if call.done()]
            assert len(refused) <= 500
            for call in refused:
                assert isinstance(call.exception(), StoreUnavailable)
                assert "no more are taken" in str(call.exception())
        for call in set(calls) - set(refused):
            assert await call is False
        assert await works(store)


async def test_who_has_a_reply_may_call_again(url: str, admin: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that just got a reply may call again, even while as many calls wait as the limit allows."""
    del admin
    monkeypatch.setattr(engine, "MAX_PENDING", 200)
    async with SessionStore.from_url(url, timeout=20) as store:

        async def work() -> None:
            for _ in range(200):
                await store.get("session")
                await store.touch("session")

        workers = [asyncio.ensure_future(work()) for _ in range(20)]
        for _ in range(30):
            await asyncio.sleep(0.002)
            floods = await outcomes([store.get(str(n), ["n"]) for n in range(600)])
            assert any(isinstance(one, StoreUnavailable) for one in floods)
        assert await outcomes(workers) == [None] * 20


async def test_callers_that_are_gone_make_room(url: str, admin: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled calls do not count for the limit of pending calls, even if other calls wait before them."""
    monkeypatch.setattr(engine, "MAX_PENDING", 60)
    async with SessionStore.from_url(url, timeout=20) as store:
        async with stopped(admin):
            first = [asyncio.ensure_future(store.touch(str(n))) for n in range(40)]
            await asyncio.sleep(0.05)  # These calls are in flight.
            first += [asyncio.ensure_future(store.touch(str(n))) for n in range(10)]
            for _ in range(3):
                calls = [asyncio.ensure_future(store.touch(str(n))) for n in range(50)]
                await asyncio.sleep(0.05)
                for call in calls:
                    call.cancel()
                assert {type(one) for one in await outcomes(calls)} == {asyncio.CancelledError}
                await asyncio.sleep(0.15)  # The engine looks for cancelled calls every 50 ms.
            calls = [asyncio.ensure_future(store.touch(str(n))) for n in range(50)]
            await asyncio.sleep(0.05)
        assert await outcomes(first + calls) == [False] * 100


async def test_a_storm_of_cancellations_while_connections_break(url: str, admin: Redis) -> None:
    """Calls that are not cancelled get their own replies while connections break."""
    chance = random.Random(1)
    async with SessionStore.from_url(url, timeout=20) as store:
        await works(store, 500)
        for turn in range(20):
            calls = [asyncio.ensure_future(store.get(f"w{n}", ["n"])) for n in range(500)]
            for _ in range(chance.randrange(5)):
                await asyncio.sleep(0)
            if turn % 2:
                await kill(admin)
            for call in chance.sample(calls, 200):
                call.cancel()
            for n, found in enumerate(await outcomes(calls)):
                assert isinstance(found, asyncio.CancelledError) or found == {"id": f"w{n}", "n": n}


# ---------------------------------------------------------------------- the end


async def test_aclose_waits_for_what_has_begun(url: str, admin: Redis) -> None:
    """`aclose` waits for a `delete_by` of many pages, and later calls are refused."""
    del admin
    store = SessionStore.from_url(url, references=["user_id"])
    await asyncio.gather(*(store.create({"user_id": 1}) for _ in range(1000)))
    deleting = asyncio.ensure_future(store.delete_by("user_id", 1))
    await asyncio.sleep(0)
    await store.aclose()
    assert deleting.done()
    assert await deleting == 1000
    for call in (store.delete_by("user_id", 1), store.touch("a"), anext(store.find_by("user_id", 1))):
        with pytest.raises(RuntimeError, match="the store is closed"):
            await call


async def test_aclose_waits_for_all_pages(url: str, admin: Redis) -> None:
    """`aclose` waits for all pages of a count and of a list of ids."""
    del admin
    store = SessionStore.from_url(url, references=["user_id"])
    await asyncio.gather(*(store.create({"user_id": 1}) for _ in range(1000)))
    counting = asyncio.ensure_future(store.count_by("user_id", 1))
    listing = asyncio.ensure_future(store.ids_by("user_id", 1))
    await asyncio.sleep(0)
    await store.aclose()
    assert counting.done()
    assert await counting == 1000
    assert len(await listing) == 1000


async def test_aclose_waits_for_an_operation_between_two_calls(url: str, admin: Redis) -> None:
    """`aclose` waits for an operation of several calls, even while none of them is in flight."""
    del admin
    store = SessionStore.from_url(url)
    await store.load()
    ended = False

    async def operation() -> None:
        nonlocal ended
        with store.operations.several():
            await asyncio.sleep(0.2)
            ended = True

    running = asyncio.ensure_future(operation())
    await asyncio.sleep(0)
    await store.aclose()
    assert ended
    await running


async def test_aclose_ends_at_the_deadline(url: str, admin: Redis) -> None:
    """`aclose` ends at the deadline if the server is silent or missing, and leaves no task."""
    for address in (url, "unix:///nowhere/redis.sock"):
        store = SessionStore.from_url(address, timeout=1)
        async with stopped(admin):
            call = asyncio.ensure_future(store.touch("a"))
            await asyncio.sleep(0)
            await store.aclose()
            assert isinstance(call.exception(), StoreUnavailable)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not await connections(admin)


async def test_aclose_of_a_call_that_was_cancelled(url: str, admin: Redis) -> None:
    """`aclose` does not wait for the reply to a cancelled call, and does not fail because of it."""
    store = SessionStore.from_url(url, timeout=30)
    await store.load()
    async with stopped(admin):
        call = asyncio.ensure_future(store.touch("a"))
        await asyncio.sleep(0.05)
        call.cancel()
        await asyncio.wait([call])
        await store.aclose()
    while await connections(admin):
        await asyncio.sleep(0.01)


async def test_aclose_before_a_connection_is_made() -> None:
    """`aclose` before a connection is made leaves no task."""
    store = SessionStore.from_url("unix:///nowhere/redis.sock", timeout=30)
    call = asyncio.ensure_future(store.touch("a"))
    await asyncio.sleep(0)
    call.cancel()
    await store.aclose()
    await asyncio.wait([call])
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_aclose_twice_and_at_once(url: str, admin: Redis) -> None:
    """`aclose` may be called twice or in parallel, and a store that is entered again works again."""
    store = SessionStore.from_url(url)
    await store.load()
    await asyncio.gather(store.aclose(), store.aclose())
    await store.aclose()
    async with store:
        assert await works(store)
    assert not await connections(admin)


async def test_a_store_that_is_thrown_away_closes_its_connections(url: str, admin: Redis) -> None:
    """A store that is thrown away without `aclose` closes its connections when it is garbage-collected."""
    async with Redis.from_url(url) as client:
        gone: list[weakref.ref[SessionStore]] = []
        for _ in range(5):
            store = SessionStore(client, references=["user_id"])
            await store.touch("a")
            await store.ids_by("user_id", 1)
            gone.append(weakref.ref(store))
            del store
        gc.collect()  # A store may be part of a cycle.
        assert {one() for one in gone} == {None}
        async with asyncio.timeout(20):
            while await connections(admin):
                await asyncio.sleep(0.01)


# ---------------------------------------------------------------------- loops, threads, processes


async def _touch(store: SessionStore) -> bool:
    return await store.touch("a")


@pytest.fixture(name="loops", params=LOOPS)
def _loops(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    """A factory of event loops, for tests that are no coroutines."""
    return LOOPS[request.param]


@pytest.fixture(name="quiet")
def _quiet() -> Iterator[None]:
    """Fails if the garbage collector warns of something that the test left open."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
        gc.collect()


@pytest.mark.usefixtures("quiet")
def test_one_event_loop_after_another(url: str, loops: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """A store starts afresh in each event loop, and its connections close with the loop, without `aclose`."""
    with asyncio.Runner(loop_factory=loops) as last:
        admin = Redis.from_url(url, decode_responses=True)
        store = SessionStore.from_url(url, references=["user_id"])
        for _ in range(3):
            with asyncio.Runner(loop_factory=loops) as runner:
                assert runner.run(_touch(store)) is False
                assert runner.run(works(store))
                assert runner.run(_pages(store)) == []
            assert last.run(connections(admin)) == []
        last.run(admin.aclose())


async def _pages(store: SessionStore) -> list[str]:
    return await store.ids_by("user_id", 1)


@pytest.mark.usefixtures("quiet")
def test_event_loops_in_turn(url: str, loops: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """A store works in two event loops that are both open but run in turn."""
    store = SessionStore.from_url(url)
    with asyncio.Runner(loop_factory=loops) as one, asyncio.Runner(loop_factory=loops) as two:
        for _ in range(3):
            assert one.run(_touch(store)) is False
            assert two.run(works(store))


@pytest.mark.usefixtures("quiet")
def test_an_event_loop_that_ends_with_calls_under_way(url: str, loops: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Calls in flight are cancelled when their event loop ends, and the store works in the next loop."""
    store = SessionStore.from_url(url, timeout=30)

    async def begin() -> None:
        await store.load()
        tasks.extend(asyncio.ensure_future(store.touch(str(n))) for n in range(20))
        await asyncio.sleep(0)

    for _ in range(2):
        tasks: list[asyncio.Future[bool]] = []
        with asyncio.Runner(loop_factory=loops) as runner:
            runner.run(begin())
        assert all(task.cancelled() or task.result() is False for task in tasks)
    with asyncio.Runner(loop_factory=loops) as runner:
        assert runner.run(works(store))


@pytest.mark.usefixtures("quiet")
def test_an_event_loop_that_ends_while_redis_is_dialled(loops: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """An event loop that ends while Redis is dialled leaves no task, no connection and no warning."""
    store = SessionStore.from_url("unix:///nowhere/redis.sock", timeout=30)

    async def begin() -> None:
        tasks.append(asyncio.ensure_future(store.touch("a")))
        await asyncio.sleep(0.1)

    tasks: list[asyncio.Future[bool]] = []
    with asyncio.Runner(loop_factory=loops) as runner:
        runner.run(begin())
    assert tasks[0].cancelled()


@pytest.mark.usefixtures("quiet")
def test_two_event_loops_at_once(url: str, loops: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """A second event loop at the same time gets RuntimeError, and the first loop is not affected."""
    store = SessionStore.from_url(url)

    async def main() -> None:
        await store.touch("a")
        raised: list[BaseException] = []

        def other() -> None:
            try:
                with asyncio.Runner(loop_factory=loops) as runner:
                    runner.run(_touch(store))
            except RuntimeError as error:
                raised.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert "another event loop" in str(raised[0])
        assert await works(store)
        await store.aclose()

    with asyncio.Runner(loop_factory=loops) as runner:
        runner.run(main())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_fork(url: str) -> None:
    """A forked child starts afresh, and does not affect the connections of its parent."""
    store = SessionStore.from_url(url, references=["user_id"], prefix="fork", timeout=20)

    async def parent() -> None:
        assert await store.touch("a") is False
        assert await store.ids_by("user_id", 1) == []
        for _ in range(3):
            pid = os.fork()  # Fork while the loop runs, as multiprocessing does.
            if not pid:
                child()
            for _ in range(20):
                assert await works(store)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0  # noqa: ASYNC222 - the child is about to end
            assert await works(store)
        await store.aclose()

    def child() -> NoReturn:
        code = 1
        try:
            warnings.simplefilter("ignore")  # Warnings of the parent's sockets.
            gc.collect()
            with asyncio.Runner() as own:
                code = 0 if own.run(works(store)) and own.run(_pages(store)) == [] else 2
            gc.collect()
        finally:
            os._exit(code)

    with asyncio.Runner() as runner:
        runner.run(parent())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are new in Python 3.12")
async def test_eager_tasks(url: str, admin: Redis) -> None:
    """Eager tasks, which start inside of a call, work while connections break."""
    loop = asyncio.get_running_loop()
    if "uvloop" in type(loop).__module__ and (3, 13) <= sys.version_info < (3, 13, 3):
        pytest.skip("uvloop makes no eager tasks there, not even for asyncio.gather")
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    try:
        async with SessionStore.from_url(url, timeout=20) as store:
            for _ in range(20):
                assert await works(store)
                await kill(admin)
    finally:
        loop.set_task_factory(None)


VARIABLE: contextvars.ContextVar[object] = contextvars.ContextVar("VARIABLE")


class _Request:
    """An object that a framework keeps in a context."""


async def test_no_context_of_a_request_lives_on(url: str, admin: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work for many callers runs in the context of none of them, so no request is kept alive."""
    seen: set[object] = set()

    def observed(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def observe(*args: Any) -> Any:
            seen.add(VARIABLE.get(None))
            return real(*args)

        return observe

    # These functions run when replies come, when connections break, and when deadlines pass.
    for place, name in (
        (channel.Channel, "data_received"),
        (channel.Channel, "connection_lost"),
        (coalesce.Waiting, "expire"),
    ):
        monkeypatch.setattr(place, name, observed(getattr(place, name)))
    store = SessionStore.from_url(url, references=["user_id"], timeout=0.5)
    requests: list[weakref.ref[_Request]] = []

    async def request() -> None:
        VARIABLE.set(one := _Request())
        requests.append(weakref.ref(one))
        await store.touch("a")
        await store.ids_by("user_id", 1)

    for _ in range(3):
        await asyncio.gather(*(asyncio.create_task(request()) for _ in range(20)))
        await kill(admin)
        await asyncio.sleep(0.7)  # Longer than a deadline, so that `expire` runs.
    assert seen == {None}
    gc.collect()
    assert {one() for one in requests} == {None}
    await store.aclose()


# ---------------------------------------------------------------------- no caller waits for ever


# Functions that the event loop calls, and functions that answer callers, such as all methods of `Call`. An exception in
# one of these would reach no caller. The test breaks all other functions in turn.
_OUTERMOST = {"data_received", "connection_lost", "resume_writing", "_flush", "_dialled", "_watch"}
_ANSWERS = {"fail", "_fail", "_give_up", "close", "aclose"}


def _functions() -> list[tuple[Any, str]]:
    """Return the functions of the engine that run for many callers at once."""
    found: list[tuple[Any, str]] = [(lane, "error_for"), (lane, "code_of")]
    for kind in (channel.Channel, coalesce.Queue, coalesce.Batch, coalesce.Waiting, lane.Lane, lane.Node):
        for name, value in vars(kind).items():
            if (
                inspect.isfunction(value)
                and not inspect.isasyncgenfunction(value)
                and not name.startswith("__")
                and name not in _OUTERMOST | _ANSWERS
            ):
                found.append((kind, name))
    return found


# An exception while connections are closed leaves them to the garbage collector, which warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("place", _functions(), ids=lambda place: f"{place[0].__name__}.{place[1]}")
async def test_an_exception_anywhere_leaves_nobody_waiting(
    url: str, admin: Redis, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    """An exception in any function of the engine leaves no caller waiting, and the next calls work."""
    chance = random.Random(1)
    real = getattr(*place)

    def maybe(*args: Any, **kwargs: Any) -> Any:
        if chance.random() < 0.2:
            raise ZeroDivisionError
        return real(*args, **kwargs)

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    store = SessionStore.from_url(url, references=["user_id"], timeout=1)
    await store.touch("a")
    with monkeypatch.context() as broken:
        broken.setattr(*place, maybe)
        for turn in range(6):
            calls: list[Awaitable[object]] = [
                store.touch(f"{n}") if n % 2 else store.increment(f"{n}", "n") for n in range(60)
            ]
            calls += [store.ids_by("user_id", n) for n in range(3)]
            pending = [asyncio.ensure_future(call) for call in calls]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if turn % 3 == 0:
                await kill(admin)
            if turn % 3 == 1:
                await admin.script_flush()
            await outcomes(pending, within=10)
    await outcomes([store.touch("a")])  # This call may still fail because of earlier ones.
    async with asyncio.timeout(10):
        while isinstance((await outcomes([store.touch("x")]))[0], SessionError):
            pass
    assert await works(store)
    await store.aclose()
    gc.collect()
