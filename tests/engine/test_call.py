"""A caller continues as soon as its reply arrives, and cannot harm the other callers by what it does then."""

import asyncio
import contextvars
from collections.abc import Callable, Iterable

import pytest
from redis.asyncio import Redis

from rss import SessionStore
from rss.engine.call import Call
from rss.engine.channel import Answer, Channel
from rss.engine.observed import ObservedCall
from tests.conftest import LOOPS
from tests.engine.callers import outcomes

_NAME: contextvars.ContextVar[str] = contextvars.ContextVar("_NAME", default="nobody")


async def test_what_callers_call_next_is_sent_before_the_loop_turns(
    url: str, admin: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next calls of callers that just got replies are sent before `data_received` returns."""
    del admin
    received, real = Channel.data_received, Channel.send
    sent: list[int] = []
    turns: list[list[int]] = []

    def send(channel: Channel, data: bytes, answers: Iterable[Answer]) -> None:
        sent.append(data.count(b"EVALSHA"))
        real(channel, data, answers)

    def data_received(channel: Channel, data: bytes) -> None:
        sent.clear()
        received(channel, data)
        turns.append([*sent])

    monkeypatch.setattr(Channel, "send", send)
    monkeypatch.setattr(Channel, "data_received", data_received)
    async with SessionStore.from_url(url) as store:
        await store.load()
        turns.clear()
        for _ in range(20):
            await store.get("session")
    assert turns == [[1]] * 20 + [[]]  # After the last reply nothing was called.


async def test_a_caller_ends_the_others_of_its_batch(url: str, admin: Redis) -> None:
    """A caller with a reply may cancel the other callers of its batch, and the store still works."""
    del admin
    async with SessionStore.from_url(url) as store:
        tasks: list[asyncio.Task[None]] = []

        async def work(n: int) -> None:
            await store.get(str(n))
            for task in tasks:
                if task is not asyncio.current_task():
                    task.cancel()

        tasks += [asyncio.create_task(work(n)) for n in range(10)]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(one, asyncio.CancelledError) for one in done) == 9
        assert await store.set("again", {"n": 1}) == {"n": 1}


async def test_a_caller_closes_the_store(url: str, admin: Redis) -> None:
    """Calls that were made at the same time get their replies if one caller closes the store."""
    del admin
    store = SessionStore.from_url(url)
    await store.load()

    async def close() -> None:
        await store.get("first")
        await store.aclose()

    async def read(n: int) -> dict[str, object]:
        return await store.get(str(n))

    found = await outcomes([close(), *(read(n) for n in range(30))])
    assert found == [None, *[{}] * 30]


async def test_each_caller_keeps_its_context(url: str, admin: Redis) -> None:
    """Each caller keeps its own context variables, although one read delivers the replies of many."""
    del admin
    async with SessionStore.from_url(url) as store:

        async def work(name: str) -> str:
            _NAME.set(name)
            await store.get(name)
            held = _NAME.get()
            _NAME.set("changed")
            await store.get(name)
            return held + _NAME.get()

        names = [f"caller{n}" for n in range(20)]
        assert await outcomes(map(work, names)) == [f"{name}changed" for name in names]
        assert _NAME.get() == "nobody"


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("loops", LOOPS.values(), ids=LOOPS)
def test_a_caller_that_ends_the_program(
    url: str, loops: Callable[[], asyncio.AbstractEventLoop], end: type[BaseException]
) -> None:
    """An exception that ends the program leaves the event loop, and the other callers get their replies."""
    loop = loops()
    store = SessionStore.from_url(url)
    done: list[int] = []

    async def work(n: int) -> None:
        await store.get(str(n))
        if n == 0:
            raise end
        done.append(n)

    try:
        loop.run_until_complete(store.load())
        tasks = [loop.create_task(work(n)) for n in range(10)]
        with pytest.raises(end):
            loop.run_until_complete(asyncio.wait(tasks[1:]))
        loop.run_until_complete(asyncio.wait(tasks[1:]))
        assert sorted(done) == [*range(1, 10)]
        with pytest.raises(end):
            tasks[0].result()
        loop.run_until_complete(store.aclose())
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _call() -> Call:
    return Call.make(asyncio.get_running_loop(), (), (), 0, 0.0)


def _observed_call() -> Call:
    call = ObservedCall.make(asyncio.get_running_loop(), (), (), 0, 0.0)
    call.begin("touch", lambda _: None)
    return call


@pytest.mark.parametrize("new", [_call, _observed_call])
async def test_a_reply_runs_its_caller_at_once(new: Callable[[], Call]) -> None:
    """A caller has run to its next await when `answer` returns."""
    loop = asyncio.get_running_loop()
    call, done = new(), loop.create_future()
    steps: list[str] = []

    async def wait() -> None:
        steps.append(await call)
        await asyncio.sleep(0)
        steps.append("later")

    def tell() -> None:
        call.answer("at once")
        done.set_result([*steps])

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    loop.call_soon(tell)
    assert await done == ["at once"]
    await task
    assert steps == ["at once", "later"]


async def test_a_transport_may_read_inside_of_a_task(url: str, admin: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the transport reads inside of a task, callers continue in the next turn, since tasks cannot nest."""
    del admin
    received, reads = Channel.data_received, set[asyncio.Task[None]]()

    async def receive(channel: Channel, data: bytes) -> None:
        received(channel, data)

    monkeypatch.setattr(
        Channel, "data_received", lambda channel, data: reads.add(asyncio.create_task(receive(channel, data)))
    )
    async with SessionStore.from_url(url) as store:
        assert await asyncio.gather(*(store.get(str(n)) for n in range(5))) == [{}] * 5
    await asyncio.gather(*reads)


@pytest.mark.parametrize("new", [_call, _observed_call])
async def test_a_call_is_a_future(new: Callable[[], Call]) -> None:
    """A call is a future: all its waiters are told once, however it ends."""

    async def wait(for_call: Call) -> object:
        return await for_call

    for end in ("answer", "set_result", "set_exception", "cancel"):
        one, told = new(), list[object]()
        task, other = asyncio.create_task(wait(one)), asyncio.create_task(wait(one))
        shielded = asyncio.shield(one)
        one.add_done_callback(told.append)
        await asyncio.sleep(0)
        if end == "answer":
            asyncio.get_running_loop().call_soon(one.answer, "result")
            assert [*await asyncio.gather(task, other, shielded)] == ["result"] * 3
        elif end == "set_result":
            one.set_result("result")
            assert [*await asyncio.gather(task, other, shielded)] == ["result"] * 3
        elif end == "set_exception":
            one.set_exception(ValueError("told"))
            found = await asyncio.gather(task, other, shielded, return_exceptions=True)
            assert [type(each) for each in found] == [ValueError] * 3
        else:
            one.cancel()
            found = await asyncio.gather(task, other, shielded, return_exceptions=True)
            assert [type(each) for each in found] == [asyncio.CancelledError] * 3
        await asyncio.sleep(0)
        assert told == [one]


async def test_a_caller_with_a_time_limit_of_its_own(url: str, admin: Redis) -> None:
    """`asyncio.timeout` ends a call, and the store still works."""
    async with SessionStore.from_url(url) as store:
        await admin.client_pause(300)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await store.get("session")
        await admin.client_unpause()
        assert await store.get("session") == {}
