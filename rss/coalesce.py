"""Calls of one script that are pending in the same moment become one: that is what makes the store fast.

A call through redis-py costs some hundred microseconds of Python, whatever Redis does. Here it waits until the event
loop has run all that is ready, and is sent with the others of its kind, such as those that read the same fields: one
EVALSHA for a batch of sessions. A call that is alone is sent at once. Every caller has a deadline of its own, and gets
a reply or an error of its own.
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, cast

import redis.exceptions
from redis.asyncio.connection import AbstractConnection
from redis.backoff import EqualJitterBackoff

from rss.errors import StoreUnavailable
from rss.scripts import Scripts, Unanswered, error_for

# What holds Redis for long enough as it is.
_UNBATCHED: Final = {"find_by_ref", "delete_by_ref"}
# What carries values: the larger they are, the fewer calls make a batch, of about so many characters.
_CARRYING_VALUES: Final = {"set_with_refs", "rotate_with_refs"}
_MAX_CHARACTERS: Final = 131072
# Seconds for which a connection is kept while calls keep coming: others may be waiting for it.
_KEPT: Final = 0.01
# Seconds between attempts; the first repetition does not wait.
_BACKOFF: Final = EqualJitterBackoff(cap=0.25, base=0.005)

# The name of a script, its arguments that are for all sessions, and whether it is repeatable: what a batch shares.
_Kind = tuple[str, tuple[str, ...], bool]


@dataclass(slots=True, eq=False)
class _Call:
    keys: Sequence[str]
    args: Sequence[str | bytes]
    deadline: float
    answer: asyncio.Future[Any]
    failure: Unanswered | None = None

    def fail(self, error: BaseException) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def give_up(self, why: str, failure: Unanswered | None) -> None:
        error = StoreUnavailable(why)
        error.__cause__ = failure and failure.__cause__
        self.fail(error)


class Coalescer:
    """Runs scripts for many callers at once, each of whom sees only the own session.

    *head*: the arguments that every script begins with. *timeout*: seconds that a caller waits at most.
    """

    #: Calls in a batch, at most: over so many sessions, a script holds Redis for a millisecond or two.
    max_batch: int = 100
    #: Batches in flight, at most: while Redis does one, Python prepares the other or hands out its replies.
    max_in_flight: int = 2

    def __init__(self, scripts: Scripts, head: Sequence[str], timeout: float) -> None:
        #: Whether no more calls are taken.
        self.closed = False
        self._scripts = scripts
        self._head = head
        self._timeout = timeout
        self._queues: dict[_Kind, deque[_Call]] = {}
        self._workers: dict[asyncio.Task[None], list[_Call]] = {}  # And the batch that each has in flight.
        self._collecting = False  # Whether a worker is about to look what is pending.
        self._timer: asyncio.TimerHandle | None = None  # As long as there is anything to do.
        self._loop: asyncio.AbstractEventLoop

    def run(
        self,
        name: str,
        keys: Sequence[str],
        args: Sequence[str | bytes],
        *,
        shared: tuple[str, ...] = (),
        repeatable: bool = True,
    ) -> asyncio.Future[Any]:
        """Run a script for one session; the result is its reply, or the error that this stands for.

        *shared*: arguments that stand before those of the sessions: only calls that share them go together.
        Until the deadline it is run again whenever Redis surely did not run it, and, if *repeatable*, also when that
        is not known since the connection broke. After that, the error is `StoreUnavailable`.
        """
        if self.closed:
            raise RuntimeError("the store is closed")
        # To ask for the loop each time costs a system call.
        loop = self._loop if self._timer else asyncio.get_running_loop()
        call = _Call(keys, args, loop.time() + self._timeout, loop.create_future())
        kind = (name, shared, repeatable)
        queue = self._queues.get(kind)
        if queue is None:
            queue = self._queues[kind] = deque()
        queue.append(call)
        if not self._timer:
            self._loop, self._timer = loop, loop.call_at(call.deadline, self._expire)
        if not self._collecting:
            self._start_worker()
        return call.answer

    async def drain(self) -> None:
        """Wait until every caller has an answer."""
        while self._workers:
            await asyncio.wait(self._workers)

    def _start_worker(self) -> None:
        """Let another worker begin, if one may, when the event loop has run all that is ready now."""
        # The client may serve other purposes, too: if it has more than one connection, one is left to these.
        if len(self._workers) < min(self.max_in_flight, max(self._scripts.max_connections - 1, 1)):
            self._collecting = True
            worker = asyncio.get_running_loop().create_task(self._work())
            self._workers.setdefault(worker, [])
            worker.add_done_callback(self._worker_done)

    def _worker_done(self, worker: asyncio.Task[None]) -> None:
        """Leave no caller without an answer, whatever ended the worker: a deadline, the event loop, or a mistake."""
        self._collecting = self._collecting and not worker.cancelled()
        for call in self._workers.pop(worker):
            if worker.cancelled():
                call.give_up("the operation was cancelled", call.failure)
            else:
                call.fail(cast("BaseException", worker.exception()))
        if any(not call.answer.done() for call in self._pending()):
            if not self._collecting:
                self._start_worker()
        elif not self._workers and self._timer:
            self._timer.cancel()
            self._timer = None

    async def _work(self) -> None:
        """Answer what is pending, a batch at a time, until nothing is."""
        self._collecting = False
        worker = cast("asyncio.Task[None]", asyncio.current_task())
        failures = 0
        while self._queues:
            try:
                async with self._scripts.connection() as connection:
                    until = self._loop.time() + _KEPT
                    while self._loop.time() < until and (batch := self._next_batch()):
                        kind, self._workers[worker] = batch
                        if self._queues and not self._collecting:
                            self._start_worker()
                        await self._send(connection, kind, self._workers[worker])
                        failures = 0
                        # Who got an answer may call again at once, and finds a worker with a connection.
                        self._collecting = True
                        await asyncio.sleep(0)
                        self._collecting = False
                await asyncio.sleep(0)  # Whoever waits for a connection has it now.
            except Unanswered as failure:
                for call in self._pending():
                    call.failure = failure
                failures += 1
                if failures > 1:
                    await asyncio.sleep(_BACKOFF.compute(failures))
            except (redis.exceptions.RedisError, OSError) as error:  # Redis lets nobody in.
                for call in self._pending():
                    call.fail(error_for(error) or error)
                self._queues.clear()

    async def _send(self, connection: AbstractConnection, kind: _Kind, calls: list[_Call]) -> None:
        """Run a script for these calls, once, and hand out the replies; calls that got none are pending again."""
        name, shared, repeatable = kind
        keys: list[str] = []
        args: list[str | bytes] = [*self._head, *shared]
        for call in calls:
            keys += call.keys
            args += call.args
        replies: list[Any] = []
        try:
            replies = await self._scripts.run(connection, name, keys, args)
        except Unanswered as failure:
            if failure.doubtful and not repeatable:
                for call in calls:
                    call.give_up("the connection broke: it is not known what was done", failure)
            self._requeue(kind, calls)
            raise
        except redis.exceptions.RedisError as error:
            replies = [error] * (len(calls) if isinstance(error_for(error), StoreUnavailable) else 1)
        for call, reply in zip(calls, replies, strict=False):
            if isinstance(reply, redis.exceptions.RedisError):
                call.fail(error_for(reply) or reply)
            elif not call.answer.done():
                call.answer.set_result(reply)
        del calls[: len(replies)]
        if calls:
            self._requeue(kind, calls)

    def _pending(self) -> Iterator[_Call]:
        return chain.from_iterable(self._queues.values())

    def _requeue(self, kind: _Kind, calls: list[_Call]) -> None:
        self._queues.setdefault(kind, deque()).extendleft(reversed(calls))
        calls.clear()

    def _next_batch(self) -> tuple[_Kind, list[_Call]] | None:
        """Take calls from the queue that is first in turn, as many as may go together; None if nothing is pending."""
        while self._queues:
            kind = next(iter(self._queues))
            queue = self._queues.pop(kind)
            # Batches of one size keep both sides busy: what is in flight counts, too.
            share = -(-(len(queue) + sum(map(len, self._workers.values()))) // self.max_in_flight)
            most = 1 if kind[0] in _UNBATCHED else min(self.max_batch, share)
            calls: list[_Call] = []
            characters = 0
            while queue and len(calls) < most and characters < _MAX_CHARACTERS:
                call = queue.popleft()
                if not call.answer.done():  # Else the caller is gone.
                    calls.append(call)
                    characters += sum(map(len, call.args)) if kind[0] in _CARRYING_VALUES else 0
            if queue:
                self._queues[kind] = queue
            if calls:
                return kind, calls
        return None

    def _expire(self) -> None:
        """Answer the callers whose deadline has passed, and end the workers whose whole batch has."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        deadlines = []
        for call in chain(self._pending(), *self._workers.values()):
            if call.deadline > now:
                deadlines.append(call.deadline)
            else:
                why = call.failure or "it takes too long"
                call.give_up(f"no answer from Redis within the deadline: {why}", call.failure)
        self._queues = {
            kind: deque(live)
            for kind, queue in self._queues.items()
            if (live := [call for call in queue if not call.answer.done()])
        }
        for worker, calls in self._workers.items():
            if calls and all(call.deadline <= now for call in calls):
                worker.cancel()
        self._timer = loop.call_at(min(deadlines), self._expire) if deadlines else None
