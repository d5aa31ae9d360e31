"""Calls that wait at the same moment become batches: that is what makes the store fast.

A call through redis-py costs about fifty microseconds of Python, whatever Redis does. Here a call waits until the event
loop has run what is ready. Then all calls of one kind, such as those that read the same fields, become one EVALSHA: a
batch. The batches of several kinds go out in one write: a volley.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from redis.backoff import EqualJitterBackoff

from rss.engine.call import Call
from rss.engine.scripts import pack

# The size of a volley in bytes, roughly. A single call may be larger.
_MAX_BYTES: Final = 131_072
_BACKOFF: Final = EqualJitterBackoff(cap=0.25, base=0.005)
# Seconds for which refusals are remembered after the wait that followed the last one.
_REMEMBERED: Final = 1.0


def backoff(failures: int) -> float:
    """Return how many seconds to wait before the next attempt, after so many failures in a row."""
    return _BACKOFF.compute(min(failures, 10))  # More than 1,000 would raise OverflowError.


def expire(calls: Iterable[Call], now: float, error: Exception | None) -> None:
    """Answer the calls whose deadline has passed. *error*: the last one, if any."""
    for call in calls:
        if call.deadline <= now and not call.done():
            call.expire(error)


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """The properties of a script that the engine needs."""

    #: Its name in `lua/`.
    script: str
    #: The shared parts that it needs: some of `scripts.PARTS`.
    parts: tuple[str, ...]
    #: Whether it may run twice: a second run does the same again, or recognises the work of the first. Its reply may
    #: differ, as that of a second delete.
    repeatable: bool = True
    #: False if one call may keep Redis busy for as long as a whole batch: a page of a reference set.
    batched: bool = True
    #: Whether its arguments may be large. If so, their bytes count for the size of a volley.
    sized: bool = False


#: What the calls of one EVALSHA share: the operation, the partition, and the arguments before those of the sessions.
Kind = tuple[Operation, int, tuple[str, ...]]


class Queue:
    """The calls of one kind that wait, the oldest first."""

    __slots__ = ("calls", "error", "held_until", "kind", "refusals")

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.calls: deque[Call] = deque()
        #: How many times in a row Redis refused to run them; the last error; the loop's time of the next attempt.
        self.refusals = 0
        self.error: Exception | None = None
        self.held_until = 0.0

    def hold(self, error: Exception, now: float, *, at_once: bool = False) -> None:
        """Note that Redis refused. The next attempt waits, except that the first one may be made *at_once*."""
        if self.refusals or not at_once:
            self.held_until = now + backoff(self.refusals + 1)
        self.refusals += 1
        self.error = error

    def release(self) -> None:
        """Note that Redis ran them."""
        self.refusals, self.error, self.held_until = 0, None, 0.0


class _Queues(dict[Kind, Queue]):
    def __missing__(self, kind: Kind) -> Queue:
        queue = self[kind] = Queue(kind)
        return queue


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
    """The calls that wait for one channel."""

    def __init__(self) -> None:
        #: How many there are. Calls whose caller is gone may be among them.
        self.count = 0
        self._queues = _Queues()  # The next one to be served is first.

    def __iter__(self) -> Iterator[Call]:
        for queue in self._queues.values():
            yield from queue.calls

    def put(self, kind: Kind, call: Call) -> None:
        """Let a call wait behind the others of its kind."""
        self._queues[kind].calls.append(call)
        self.count += 1

    def put_back(self, batch: Batch, start: int = 0, *, behind: bool = False) -> Queue:
        """Let the calls of a batch from *start* on wait again: as the next of their kind, or behind the others.

        Returns their queue. The batch may come from another lane.
        """
        queue, calls = self._queues[batch.queue.kind], batch.calls[start:]
        if behind:
            queue.calls.extend(calls)
        else:
            queue.calls.extendleft(reversed(calls))
        self.count += len(calls)
        return queue

    def take(self, room: int, now: float) -> list[Batch]:
        """Take the calls of a volley from the queues in turn. *room* is how many calls it may have.

        A page is alone in its volley. So is a call that was in flight on two channels that broke: it may break them.
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
            if waiting or queue.refusals:  # The next attempt must know of the refusals before it.
                self._queues[kind] = queue
            if calls:
                batches.append(Batch(queue, calls))
            if room <= 0 or size >= _MAX_BYTES:
                break
        return batches

    def expire(self, now: float, error: Exception | None) -> None:
        """Answer the calls whose deadline has passed, and forget those whose caller is gone. *error*: the last one."""
        for kind, queue in list(self._queues.items()):
            expire(queue.calls, now, queue.error or error)
            queue.calls = deque(call for call in queue.calls if not call.done())
            # A batch that is in flight may be refused again: its queue must know of the refusals until then.
            if not queue.calls and queue.held_until + _REMEMBERED <= now:
                del self._queues[kind]
        self.count = sum(len(queue.calls) for queue in self._queues.values())

    def fail(self, error: Callable[[], Exception]) -> None:
        """Answer all of them with an error."""
        for call in self:
            call.fail(error())
        self.clear()

    def clear(self) -> None:
        """Forget all of them. They have an answer, or their caller is gone."""
        self._queues.clear()
        self.count = 0
