"""Calls of one script that wait in the same moment become one: that is what makes the store fast.

A call through redis-py costs some hundred microseconds of Python, whatever Redis does. Here it waits until the event
loop has run all that is ready, and goes out with the others of its kind: one EVALSHA over many sessions, a flight. A
call that is alone goes at once. Every caller has a deadline of its own and gets a reply or an error of its own.
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
_ALONE: Final = {"find_by_ref", "delete_by_ref"}
# Characters in the arguments of a flight, about: the larger they are, the fewer fly together.
_LOAD: Final = 131072
# Seconds between attempts; the first repetition does not wait.
_BACKOFF: Final = EqualJitterBackoff(cap=0.25, base=0.005)


_Kind = tuple[str, bool]  # The name of a script, and whether it is repeatable.


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
            self.answer.exception()  # A caller that is cancelled now will not ask for it; asyncio would complain.

    def give_up(self, why: str, failure: Unanswered | None) -> None:
        error = StoreUnavailable(why)
        error.__cause__ = failure and failure.__cause__
        self.fail(error)


class Coalescer:
    """Runs scripts for many callers at once, each of whom sees only the own session.

    *head*: the arguments that every script begins with. *timeout*: seconds that a caller waits at most.
    """

    #: Calls in a flight, at most: over so many sessions, a script holds Redis for a millisecond or two.
    seats: int = 100
    #: Flights in the air, at most: while Redis is at one, Python is at the other.
    flights: int = 2

    def __init__(self, scripts: Scripts, head: Sequence[str], timeout: float) -> None:
        self._scripts = scripts
        self._head = head
        self._timeout = timeout
        self._waiting: dict[_Kind, deque[_Call]] = {}
        self._flights: dict[asyncio.Task[None], list[_Call]] = {}
        self._boarding = False  # A flight is about to take all that wait when it takes off.
        self._timer: asyncio.TimerHandle | None = None

    def run(
        self, name: str, keys: Sequence[str], args: Sequence[str | bytes], *, repeatable: bool = True
    ) -> asyncio.Future[Any]:
        """Run a script for one session; the result is its reply, or the error that this stands for.

        Until the deadline it is run again whenever Redis surely did not run it, and, if *repeatable*, also when that
        is not known since the connection broke. After that, the error is `StoreUnavailable`.
        """
        loop = asyncio.get_running_loop()
        call = _Call(keys, args, loop.time() + self._timeout, loop.create_future())
        kind = (name, repeatable)
        queue = self._waiting.get(kind)
        if queue is None:
            queue = self._waiting[kind] = deque()
        queue.append(call)
        if self._timer is None:
            self._timer = loop.call_at(call.deadline, self._expire)
        if not self._boarding:
            self._board()
        return call.answer

    async def drain(self) -> None:
        """Wait until every caller has an answer."""
        while self._flights:
            await asyncio.wait(self._flights)

    def _board(self) -> None:
        """Begin another flight, if one may; it takes off when the event loop has run all that is ready."""
        if len(self._flights) < min(self.flights, self._scripts.max_connections):
            self._boarding = True
            flight = asyncio.get_running_loop().create_task(self._fly())
            self._flights.setdefault(flight, [])
            flight.add_done_callback(self._land)

    def _land(self, flight: asyncio.Task[None]) -> None:
        """Leave nobody behind, whatever ended the flight: the deadline, the end of the event loop, or an error."""
        self._boarding = self._boarding and not flight.cancelled()
        for call in self._flights.pop(flight):
            if flight.cancelled():
                call.give_up("the operation was cancelled", call.failure)
            else:
                call.fail(flight.exception() or asyncio.InvalidStateError())
        if any(not call.answer.done() for call in self._queued()):
            if not self._boarding:
                self._board()
        elif not self._flights and self._timer:
            self._timer.cancel()
            self._timer = None

    async def _fly(self) -> None:
        """Answer the calls that wait, a batch at a time, until nobody waits."""
        self._boarding = False
        flight = cast("asyncio.Task[None]", asyncio.current_task())
        failures = 0
        while self._waiting:
            try:
                async with self._scripts.connection() as connection:
                    while batch := self._take():
                        kind, self._flights[flight] = batch
                        if self._waiting and not self._boarding:
                            self._board()
                        await self._serve(connection, kind, self._flights[flight])
                        failures = 0
                        # Those who got an answer may call again at once: this flight takes them too.
                        self._boarding = True
                        await asyncio.sleep(0)
                        self._boarding = False
            except Unanswered as failure:
                for call in self._queued():
                    call.failure = failure
                failures += 1
                if failures > 1:
                    await asyncio.sleep(_BACKOFF.compute(failures))
            except (redis.exceptions.RedisError, OSError) as error:  # Redis lets nobody in.
                for call in self._queued():
                    call.fail(error_for(error) or error)
                self._waiting.clear()

    async def _serve(self, connection: AbstractConnection, kind: _Kind, calls: list[_Call]) -> None:
        """Run a script for these calls, once, and hand out the replies; calls that got none wait again."""
        name, repeatable = kind
        keys: list[str] = []
        args: list[str | bytes] = [*self._head]
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
            self._wait_again(kind, calls)
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
            self._wait_again(kind, calls)

    def _queued(self) -> Iterator[_Call]:
        return chain.from_iterable(self._waiting.values())

    def _wait_again(self, kind: _Kind, calls: list[_Call]) -> None:
        self._waiting.setdefault(kind, deque()).extendleft(reversed(calls))
        calls.clear()

    def _take(self) -> tuple[_Kind, list[_Call]] | None:
        """Take calls of the kind that waits longest, as many as may fly together; None if nobody waits."""
        while self._waiting:
            kind = next(iter(self._waiting))
            queue = self._waiting.pop(kind)
            share = -(-(len(queue) + sum(map(len, self._flights.values()))) // self.flights)
            seats = 1 if kind[0] in _ALONE else min(self.seats, share)
            calls: list[_Call] = []
            load = 0
            while queue and len(calls) < seats and load < _LOAD:
                call = queue.popleft()
                if not call.answer.done():  # Else the caller is gone.
                    calls.append(call)
                    load += sum(map(len, call.args))
            if queue:
                self._waiting[kind] = queue
            if calls:
                return kind, calls
        return None

    def _expire(self) -> None:
        """Tell the callers whose deadline has passed, and end the flights that nobody waits for any more."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        deadlines = []
        for call in chain(self._queued(), *self._flights.values()):
            if call.deadline > now:
                deadlines.append(call.deadline)
            else:
                why = call.failure or "it takes too long"
                call.give_up(f"no answer from Redis within the deadline: {why}", call.failure)
        self._waiting = {
            kind: deque(live)
            for kind, queue in self._waiting.items()
            if (live := [call for call in queue if not call.answer.done()])
        }
        for flight, calls in self._flights.items():
            if calls and all(call.deadline <= now for call in calls):
                flight.cancel()
        self._timer = loop.call_at(min(deadlines), self._expire) if deadlines else None
