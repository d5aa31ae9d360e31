"""Each call fails at its own deadline, and watching deadlines costs next to nothing."""

import asyncio
from collections.abc import Callable

import pytest
import redis.exceptions
from redis.asyncio import Redis

from rss import SessionStore
from rss.engine import engine, lane
from rss.engine.call import Call
from rss.engine.coalesce import Batch, Queue, Waiting
from rss.engine.operations import GET
from tests.engine.callers import outcomes
from tests.servers import stopped

_KIND = (GET, 0, ("all",))


def _calls(*deadlines: float) -> list[Call]:
    return [Call.make(asyncio.get_running_loop(), (), (), 0, deadline) for deadline in deadlines]


async def test_calls_that_were_put_back_in_another_order() -> None:
    """Calls that were put back in another order than their deadlines still fail in time."""
    waiting, (early, late, latest) = Waiting(), _calls(1.0, 2.0, 3.0)
    waiting.put_back(Batch(Queue(_KIND), [early]))
    waiting.put_back(Batch(Queue(_KIND), [late]))
    waiting.put(_KIND, latest)
    waiting.expire(1.5, None)
    assert [call.done() for call in (early, late, latest)] == [True, False, False]
    assert waiting.count == 2
    waiting.expire(2.5, None)
    assert [call.done() for call in (early, late, latest)] == [True, True, False]
    for call in (early, late):
        assert call.exception() is not None


async def test_refusals_are_remembered_while_a_batch_is_in_flight() -> None:
    """The number of refusals is kept while a batch is in flight, so the waits between attempts grow."""
    waiting, (call,) = Waiting(), _calls(1e9)
    waiting.put(_KIND, call)
    now = 0.0
    for refusals in range(1, 6):
        (batch,) = waiting.take(1, now, {})
        waiting.expire(now, None)
        queue = waiting.put_back(batch)
        queue.hold(redis.exceptions.ResponseError("BUSY"), now)
        assert queue.refusals == refusals
        now = queue.held_until
    (batch,) = waiting.take(1, now, {})
    batch.calls[0].cancel()
    waiting.expire(now + 10, None)
    assert not [*waiting]


async def test_an_overload_leaves_no_timers(url: str, admin: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """After thousands of refusals a lane looks at its deadlines as rarely as before."""
    monkeypatch.setattr(engine, "MAX_PENDING", 100)
    looks = 0
    watch: Callable[[lane.Lane], None] = lane.Lane._watch

    def counted(self: lane.Lane) -> None:
        nonlocal looks
        looks += 1
        watch(self)

    monkeypatch.setattr(lane.Lane, "_watch", counted)
    async with SessionStore.from_url(url, timeout=20) as store:
        async with stopped(admin):
            calls = []
            for _ in range(30):
                calls += [asyncio.ensure_future(store.touch(str(n))) for n in range(100)]
                await asyncio.sleep(0.01)
            looks = 0
            await asyncio.sleep(1)
            assert looks <= 25  # One in 50 ms.
        await outcomes(calls)
