"""Calls that wait at the same moment become batches: that is what makes the store fast.

A call through redis-py costs a hundred microseconds of Python, whatever Redis does. Here a call waits until the event
loop has run what is ready. Then all calls of one kind, such as those that read the same fields, become one EVALSHA, and
the calls of several kinds go out in one write: a volley.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from redis.backoff import EqualJitterBackoff

from rss.engine.call import Call
from rss.engine.scripts import pack

# A volley carries about so many bytes, unless a single call is larger.
_MAX_BYTES: Final = 131_072
_BACKOFF: Final = EqualJitterBackoff(cap=0.25, base=0.005)


def backoff(failures: int) -> float:
    """Return how many seconds to wait for the next attempt, after so many failures in a row."""
    return _BACKOFF.compute(min(failures, 10))  # It raises OverflowError beyond 1,000.


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """What the engine has to know of a script."""

    #: Its name in `lua/`.
    script: str
    #: The shared parts that it needs: some of `scripts.PARTS`.
    parts: tuple[str, ...]
    #: True if a second run recognises the work of the first, or does the same again.
    repeatable: bool = True
    #: False if one call keeps Redis busy for as long as a batch may: a page of a reference set.
    batched: bool = True
    #: True if it carries values: then its bytes count for the size of a volley.
    sized: bool = False


#: What the calls of one EVALSHA share: the operation, the partition, and the arguments before those of the sessions.
Kind = tuple[Operation, int, tuple[str, ...]]


class Queue:
    """Calls of one kind that wait for one channel, the oldest first."""

    __slots__ = ("calls", "held_until", "kind", "refusals", "trouble")

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.calls: deque[Call] = deque()
        #: How many times in a row Redis refused to run them, why, and the loop's time of the next attempt.
        self.refusals = 0
        self.trouble: Exception | None = None
        self.held_until = 0.0

    def hold(self, trouble: Exception, now: float, *, at_once: bool = False) -> None:
        """Note that Redis refused. The next attempt waits, unless it is the first and may be made *at_once*."""
        if self.refusals or not at_once:
            self.held_until = now + backoff(self.refusals + 1)
        self.refusals += 1
        self.trouble = trouble

    def release(self) -> None:
        """Note that Redis ran them."""
        self.refusals, self.trouble, self.held_until = 0, None, 0.0


@dataclass(slots=True, eq=False)
class Batch:
    """The calls of one EVALSHA."""

    queue: Queue
    calls: list[Call]
    #: Whether it is the last one of its volley.
    last: bool = False

    def pack(self, sha: str, stems: Sequence[str]) -> bytes:
        """Return the EVALSHA as bytes on the wire."""
        keys: list[str] = []
        args: list[str | bytes] = [*stems, *self.queue.kind[2]]
        for call in self.calls:
            keys += call.keys
            args += call.args
        return pack("EVALSHA", sha, len(keys), *keys, *args)


class Waiting:
    """All calls that wait for one channel."""

    def __init__(self) -> None:
        #: How many there are, with those whose caller is gone.
        self.count = 0
        self._queues: dict[Kind, Queue] = {}  # In the order in which it is their turn.

    def __iter__(self) -> Iterator[Call]:
        for queue in self._queues.values():
            yield from queue.calls

    def _queue(self, kind: Kind) -> Queue:
        queue = self._queues.get(kind)
        if queue is None:
            queue = self._queues[kind] = Queue(kind)
        return queue

    def put(self, kind: Kind, call: Call) -> None:
        """Let a call wait behind the others of its kind."""
        self._queue(kind).calls.append(call)
        self.count += 1

    def put_back(self, batch: Batch, start: int = 0, *, behind: bool = False) -> Queue:
        """Let the calls of a batch from *start* on wait again: as the next of their kind, or behind the others.

        Returns where they wait. It may be another lane's batch.
        """
        queue, calls = self._queue(batch.queue.kind), batch.calls[start:]
        if behind:
            queue.calls.extend(calls)
        else:
            queue.calls.extendleft(reversed(calls))
        self.count += len(calls)
        return queue

    def take(self, room: int, now: float) -> list[Batch]:
        """Take the calls of a volley from the queues in turn; *room* is how many calls it may have.

        A page is alone in its volley. So is a call that was in flight on two broken channels, since it may be what
        breaks them.
        """
        batches: list[Batch] = []
        size = 0
        for _ in range(len(self._queues)):
            kind = next(iter(self._queues))
            queue = self._queues.pop(kind)
            calls: list[Call] = []
            waiting = queue.calls
            before = len(waiting)
            while waiting and room > 0 and size < _MAX_BYTES and queue.held_until <= now:
                call = waiting.popleft()
                if call.done():  # The caller is gone.
                    continue
                if call.losses > 1 or not kind[0].batched:
                    if batches or calls:
                        waiting.appendleft(call)
                        room = 0
                        break
                    room = 1
                calls.append(call)
                size += call.size
                room -= 1
            self.count -= before - len(waiting)
            if waiting or queue.refusals:  # The next attempt has to know of the refusals before.
                self._queues[kind] = queue
            if calls:
                batches.append(Batch(queue, calls))
            if room <= 0 or size >= _MAX_BYTES:
                break
        return batches

    def expire(self, now: float, trouble: Exception | None) -> float:
        """Answer the calls whose deadline has passed. Returns the loop's time when to look again.

        In a queue the oldest call is the first to expire, so only the first ones are looked at: unless calls were put
        back behind others.
        """
        soonest = float("inf")
        for kind, queue in list(self._queues.items()):
            calls = queue.calls
            if calls and calls[-1].losses > 1:
                for call in calls:
                    if call.deadline <= now:
                        call.expire(queue.trouble or trouble)
                    elif not call.done():
                        soonest = min(soonest, call.deadline)
            while calls and (calls[0].deadline <= now or calls[0].done()):
                calls.popleft().expire(queue.trouble or trouble)
                self.count -= 1
            if calls:
                soonest = min(soonest, calls[0].deadline, queue.held_until if queue.held_until > now else soonest)
            elif queue.held_until <= now:
                del self._queues[kind]
        return soonest

    def fail(self, error: Callable[[], Exception]) -> None:
        """Answer each of them with an error."""
        for call in self:
            call.fail(error())
        self.clear()

    def clear(self) -> None:
        """Forget all of them: they have an answer, or their caller is gone."""
        self._queues.clear()
        self.count = 0
