"""Coalesce calls that wait at the same moment into batches. This makes the store fast.

A call through redis-py costs about fifty microseconds of Python, regardless of Redis. Here a call waits until the event
loop has run all ready callbacks. Then all calls of one kind, such as reads of the same fields, become one EVALSHA: a
batch. One write sends the batches of several kinds: a volley.
"""

import functools
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from redis.backoff import EqualJitterBackoff

from rss.engine.call import Call
from rss.engine.scripts import asked_name, pack

# The approximate maximum of a volley, in bytes. A single call may be larger.
_MAX_BYTES: Final = 131_072
_BACKOFF: Final = EqualJitterBackoff(cap=0.25, base=0.005)
# Seconds for which an empty queue remembers refusals, after the wait for the last one has ended.
_REMEMBERED: Final = 1.0


def backoff(failures: int) -> float:
    """Return the seconds to wait before the next attempt, after this number of failures in a row."""
    return _BACKOFF.compute(min(failures, 10))  # More than 1,000 would raise OverflowError.


def expire(calls: Iterable[Call], now: float, error: Exception | None) -> None:
    """Fail the calls whose deadline has passed.

    *error*: the last failure; None if there was none.
    """
    for call in calls:
        if call.deadline <= now and not call.done():
            call.expire(error)


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """The properties of a script that the engine needs."""

    #: The name of the script in `lua/`; empty for a plain command.
    script: str
    #: The shared parts that the script needs: some of `scripts.PARTS`.
    parts: tuple[str, ...]
    #: Whether the operation may run twice: the second run recognises the work of the first, or does the same again. The
    #: second reply may differ: a second delete finds no session.
    repeatable: bool = True
    #: Whether calls share an EVALSHA. False for a page of a reference set, which takes as long as a whole batch.
    batched: bool = True
    #: Whether the reply holds a cursor, which means something only to the server that gave it: see `Position.after`.
    paged: bool = False
    #: Whether the arguments may be large. If so, their bytes count towards the size of a volley.
    sized: bool = False
    #: Whether the caller would rather take another partition than wait for a slot that moves. It gets `Elsewhere`.
    anywhere: bool = False
    #: A command of Redis with one key that each call is, instead of a part of a script.
    command: str = ""
    #: Converts the reply to a call into the result of the call. None: they are the same.
    convert: Callable[[Any], Any] | None = None
    #: The number of replicas that must have the writes before the caller gets the reply.
    replicas: int = 0
    #: None for an operation on the owner of a partition. Otherwise it is for the server to which the partition moves,
    #: and this is the one for the owner. Its script knows that keys may be absent, and ASKING precedes the EVALSHA.
    on_owner: "Operation | None" = None


@functools.cache
def asking(operation: Operation) -> Operation:
    """Return an operation for the server to which a partition moves."""
    script = operation.script and asked_name(operation.script)
    return replace(operation, script=script, on_owner=operation)


@functools.cache
def durable(operation: Operation, replicas: int) -> Operation:
    """Return an operation whose caller gets the reply when this number of replicas have the writes."""
    return replace(operation, replicas=replicas)


@functools.cache
def batched(operation: Operation) -> Operation:
    """Return an operation whose calls share a volley, because their pages are small."""
    return replace(operation, batched=True)


class Elsewhere(Exception):
    """Raised by an operation that may be in any partition, if the slot of this one moves. Nothing was written."""


#: The common part of the calls of one EVALSHA: the operation, the partition, and the shared arguments.
Kind = tuple[Operation, int, tuple[str, ...]]


class Queue:
    """The waiting calls of one kind, oldest first."""

    __slots__ = ("calls", "error", "held_until", "kind", "refusals")

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.calls: deque[Call] = deque()
        #: How many attempts failed in a row: Redis refused to run the calls, or they broke the channel.
        self.refusals: int = 0
        #: The last failure; None if there was none.
        self.error: Exception | None = None
        #: The loop's time of the next attempt. 0: nothing delays it.
        self.held_until: float = 0.0

    def hold(self, error: Exception, now: float, *, at_once: bool = False) -> None:
        """Note a failed attempt, and delay the next one.

        *at_once*: do not delay the next attempt after the first failure.
        """
        if self.refusals or not at_once:
            self.held_until = now + backoff(self.refusals + 1)
        self.refusals += 1
        self.error = error

    def release(self) -> None:
        """Note that Redis ran a batch, so the next attempt is not delayed."""
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
    #: Whether this is the last batch of its volley.
    last: bool = False
    #: The replies so far, until the last one of the batch is there.
    replies: Any = None

    def note_attempt(self) -> None:
        """Tell the calls that they are sent. A plain command holds one call."""
        size = 1 if self.queue.kind[0].command else len(self.calls)
        for call in self.calls:
            call.sent(size)

    def pack_commands(self) -> bytes:
        """Return the plain commands in the wire format, one for each call."""
        return b"".join(pack(self.queue.kind[0].command, *call.keys) for call in self.calls)

    def pack(self, sha: str, stems: Sequence[str]) -> bytes:
        """Return the EVALSHA in the wire format. Without ASKING, which `Lane` sends."""
        keys: list[str] = []
        args: list[str | bytes] = [*stems, *self.queue.kind[2]]
        for call in self.calls:
            keys += call.keys
            args += call.args
        return pack("EVALSHA", sha, len(keys), *keys, *args)


class Waiting:
    """The calls that wait for one channel."""

    def __init__(self) -> None:
        #: The number of calls, including some that were cancelled.
        self.count: int = 0
        self._queues = _Queues()  # In the order in which `take` serves them.

    def __iter__(self) -> Iterator[Call]:
        for queue in self._queues.values():
            yield from queue.calls

    def put(self, kind: Kind, call: Call) -> None:
        """Append a call to the queue of its kind."""
        self._queues[kind].calls.append(call)
        self.count += 1

    def put_back(self, batch: Batch, start: int = 0, *, behind: bool = False) -> Queue:
        """Put the calls of a batch, from index *start* on, back into their queue. Return the queue.

        *behind*: append them to the queue, instead of making them the next calls.

        The batch may come from another lane.
        """
        queue, calls = self._queues[batch.queue.kind], batch.calls[start:]
        if behind:
            queue.calls.extend(calls)
        else:
            queue.calls.extendleft(reversed(calls))
        self.count += len(calls)
        return queue

    def take(self, room: int, now: float, split: Mapping[int, float]) -> list[Batch]:
        """Take the calls of a volley from the queues in turn, and return them as batches.

        *room*: the maximum number of calls. *split*: partitions, and the loop's time until which a call of them is a
        batch of its own. After ASK, each call always is.

        A page is alone in its volley. So is a call that was in flight on two channels that broke: this call may be the
        reason.
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
                if call.done():  # Cancelled or expired.
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
            if waiting or queue.refusals:  # An empty queue must remember its refusals.
                self._queues[kind] = queue
            if calls and (kind[0].on_owner or (split and split.get(kind[1], 0) > now)):
                batches += [Batch(queue, [call]) for call in calls]
            elif calls:
                batches.append(Batch(queue, calls))
            if room <= 0 or size >= _MAX_BYTES:
                break
        return batches

    def release(self, partitions: Container[int]) -> list[Batch]:
        """Take all calls of these partitions, except those that ask another server, and return them as batches."""
        batches: list[Batch] = []
        for kind, queue in list(self._queues.items()):
            if kind[1] in partitions and kind[0].on_owner is None:
                del self._queues[kind]
                batches.append(Batch(queue, [call for call in queue.calls if not call.done()]))
        self.count = sum(len(queue.calls) for queue in self._queues.values())
        return batches

    def expire(self, now: float, error: Exception | None) -> None:
        """Fail the calls whose deadline has passed, and drop those that were cancelled.

        *error*: the last failure of the lane; None if there was none.
        """
        for kind, queue in list(self._queues.items()):
            expire(queue.calls, now, queue.error or error)
            queue.calls = deque(call for call in queue.calls if not call.done())
            # Keep an empty queue for a while: if a batch in flight is refused again, the delay must grow.
            if not queue.calls and queue.held_until + _REMEMBERED <= now:
                del self._queues[kind]
        self.count = sum(len(queue.calls) for queue in self._queues.values())

    def fail(self, error: Callable[[], Exception]) -> None:
        """Fail all calls."""
        for call in self:
            call.fail(error())
        self.clear()

    def clear(self) -> None:
        """Drop all calls. Each of them has a result or was cancelled."""
        self._queues.clear()
        self.count = 0
