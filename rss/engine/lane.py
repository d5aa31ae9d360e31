"""The way to one server: what waits for it, the channel it goes through, and what happens when that breaks."""

import asyncio
import contextlib
import contextvars
import functools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Final

import redis.exceptions
from redis.asyncio.connection import AbstractConnection

from rss.engine.call import Call
from rss.engine.channel import Channel, open_channel
from rss.engine.coalesce import Batch, Kind, Waiting, backoff, expire
from rss.engine.failures import DEMOTED, code_of, error_for, final_error_for, with_cause
from rss.engine.scripts import Scripts
from rss.errors import SessionError, StoreUnavailable
from rss.keys import Plain

#: How many volleys of a lane may be in flight: while Redis runs one, Python handles the other.
VOLLEYS: Final = 2
#: The most calls in a volley: they keep Redis busy for a millisecond or two.
ROOM: Final = 100
# The most seconds of silence before a channel is doubted.
_SILENCE: Final = 2.0
# The most seconds that one attempt to connect may take.
_CONNECTING: Final = 10.0
# The most seconds between two looks at deadlines, refusals and silence.
_TICK: Final = 0.05
_BROKEN: Final = "the connection broke: it is not known what was done"
_PROTOCOL: Final = "Protocol error"


class Node:
    """One server, as one event loop sees it.

    Calls go through the lane `main`. Pages of reference sets go through `pages`, so that other calls do not wait for
    them. Calls that were in flight on a channel that broke are retried through `repair`, one volley at a time: first
    all of them together, then each alone. So a call that makes Redis hang up fails alone.
    """

    def __init__(
        self, make_connection: Callable[[], AbstractConnection], scripts: Scripts, layout: Plain, timeout: float
    ) -> None:
        self.scripts = scripts
        self.layout = layout
        #: Seconds of silence after which a channel is doubted.
        self.patience = min(timeout / 3, _SILENCE)
        #: Seconds between two looks at deadlines, refusals and silence.
        self.tick = min(timeout / 20, _TICK)
        self.loop = asyncio.get_running_loop()
        #: Empty: timers and callbacks must not keep the context of a request.
        self.context = contextvars.Context()
        self.main = Lane(self, VOLLEYS)
        self.pages = Lane(self, VOLLEYS)
        self.repair = Lane(self, 1)
        self._make_connection = make_connection
        self._timeout = timeout
        self._guard: AsyncGenerator[None] | None = None

    @property
    def lanes(self) -> tuple["Lane", "Lane", "Lane"]:
        """The three lanes."""
        return self.main, self.pages, self.repair

    async def open(self, lane: "Lane") -> Channel:
        """Make a channel."""
        if self._guard is None:
            self._guard = self._until_the_loop_ends()
            await anext(self._guard)
        return await open_channel(self._make_connection, lane.heard, lane.lost, self._timeout)

    async def _until_the_loop_ends(self) -> AsyncGenerator[None]:
        """Close the connections even if nobody closes the store: `asyncio.run` closes generators before the loop."""
        try:
            yield
        finally:
            self.close()
            await asyncio.sleep(0)  # A transport is closed a turn after it is told to.
            await asyncio.sleep(0)

    def close(self) -> None:
        """Close the connections. Calls without a reply get `StoreUnavailable`."""
        for lane in self.lanes:
            lane.close()

    async def aclose(self) -> None:
        """Close the connections and wait until they are."""
        self.close()
        if self._guard is not None:
            with contextlib.suppress(RuntimeError):  # It runs already, because the loop ends.
                await self._guard.aclose()


class Lane:
    """One channel at a time: made when it is needed, and made again when it breaks.

    *volleys*: how many may be in flight.

    Without a channel, the task `_dialling` makes one. With a channel, `_dialling` means that the channel is in doubt:
    it has been silent for too long. Then nothing more is sent through it, and another channel is made. If the old one
    answers first, it stays. If the server answers on the new one, the old one is given up. So a server that stops for
    some seconds causes no failure, and a connection that was dropped silently costs one wait.
    """

    def __init__(self, node: Node, volleys: int) -> None:
        #: The calls that were not sent yet.
        self.waiting = Waiting()
        self._node = node
        self._volleys = volleys
        self._channel: Channel | None = None
        self._in_flight: deque[Batch] = deque()  # Batches that have no reply yet.
        self._answering: Batch | None = None  # The one whose replies are being handed out.
        self._demoted = False  # The server is no master: the channel is closed as soon as it owes no reply.
        self._must_load = False  # The scripts are gone: they are loaded as soon as the channel owes no reply.
        self._load_error: Exception | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._failures = 0  # In a row.
        self._error: Exception | None = None  # The last failure, until a reply comes.
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None

    def __iter__(self) -> Iterator[Call]:
        """Iterate over all calls without a reply, and over some whose caller is gone."""
        yield from self.waiting
        for batch in self._in_flight:
            yield from batch.calls

    def is_full(self, limit: int) -> bool:
        """Return whether so many calls wait that no more may: *limit*, and as many as can be in flight.

        A caller that just got a reply often calls again, while all others still wait. Its place counts as free.
        """
        if self.waiting.count < limit:
            return False
        in_flight = sum(len(batch.calls) for batch in self._in_flight if batch is not self._answering)
        return self.waiting.count + in_flight >= limit + VOLLEYS * ROOM

    # Calls go.

    def put(self, kind: Kind, call: Call) -> None:
        """Send a call after the event loop has run what is ready: other calls may come until then."""
        self.waiting.put(kind, call)
        if not self._scheduled:
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._node.loop.call_soon(self._flush, context=self._node.context)

    def _flush(self) -> None:
        """Send what may be sent."""
        self._scheduled = False
        if not self.waiting.count:
            return
        channel, now = self._channel, self._node.loop.time()
        try:
            self._watch_later()
            if channel is None:
                self._dial()
                return
            while self.waiting.count and (room := self._free(channel)):
                batches = self.waiting.take(room, now)
                if not batches:  # Redis refused these kinds a moment ago: `_watch` tries again.
                    return
                self._in_flight.extend(batches)
                self._send(channel, batches)
        except Exception as error:  # noqa: BLE001 - no caller may be left without an answer
            self._give_up(error)

    def _free(self, channel: Channel) -> int:
        """Return how many calls the next volley may have: 0 if nothing may be sent now.

        It is half of all calls, rounded up: the other half is in flight, or follows.
        """
        volleys, calls = 0, self.waiting.count
        for batch in self._in_flight:
            volleys += batch.last
            calls += len(batch.calls)
        waits = volleys and (self._must_load or self._demoted)
        if volleys == self._volleys or waits or channel.paused or self._dialling or not channel.usable:
            return 0
        return min(ROOM, -(-calls // self._volleys))

    def _send(self, channel: Channel, batches: list[Batch]) -> None:
        batches[-1].last = True
        scripts, stems = self._node.scripts, self._node.layout.stems
        if self._must_load:
            self._must_load, self._load_error = False, None
            channel.send(scripts.load, [functools.partial(self._loaded, sha) for sha in scripts.shas.values()])
        packed = [batch.pack(scripts.shas[batch.queue.kind[0].script], stems(batch.queue.kind[1])) for batch in batches]
        channel.send(b"".join(packed), [functools.partial(self._answered, batch) for batch in batches])

    # Replies come.

    def _answered(self, batch: Batch, reply: Any) -> None:
        """Hand out the replies of a batch: the oldest that is in flight."""
        if reply.__class__ is list and 0 < len(reply) <= len(batch.calls):
            if len(reply) < len(batch.calls):  # The script stopped early, because it had done enough.
                self.waiting.put_back(batch, len(reply))
                del batch.calls[len(reply) :]
            self._failures, self._error = 0, None
            if batch.queue.refusals:
                batch.queue.release()
            self._scheduled = True  # The callers run here; what they call next is sent below.
            self._answering = batch
            # No task can run inside of another one.
            answer = Call.answer if asyncio.current_task() is None else Call.set_result
            for call, own in zip(batch.calls, reply, strict=False):
                if isinstance(own, Exception):
                    call.fail(final_error_for(own))
                elif not call.done():
                    answer(call, own)
            self._answering = None
            if self._in_flight and self._in_flight[0] is batch:  # Unless a caller has closed the store.
                self._in_flight.popleft()
            # Now, not after the whole read: Redis shall work while the replies to the next batch are handed out.
            self._flush()
        elif not isinstance(reply, Exception) or (_PROTOCOL in str(reply) and len(batch.calls) > 1):
            # Either nobody knows whose reply this is, or one call makes Redis hang up: sending each again shows which.
            raise reply if isinstance(reply, Exception) else redis.exceptions.ConnectionError("Redis sent nonsense")
        else:
            self._refused(batch, reply)
            self._in_flight.popleft()

    def _refused(self, batch: Batch, error: Exception) -> None:
        """Handle an error in place of the replies: Redis did not run the script, or it failed at its first session."""
        if (code := code_of(error)) == "NOSCRIPT" and self._load_error:
            error, code, self._load_error = self._load_error, "not loaded", None
        if error_for(error):
            failed = batch.calls if code else batch.calls[:1]  # A code concerns the server, not one session.
            for call in failed:
                call.fail(final_error_for(error))
            self.waiting.put_back(batch, len(failed))
            return
        queue = self.waiting.put_back(batch)
        queue.hold(error, self._node.loop.time(), at_once=code == "NOSCRIPT")
        self._must_load = self._must_load or code == "NOSCRIPT"
        self._demoted = self._demoted or code in DEMOTED

    def _loaded(self, sha: str, reply: Any) -> None:
        if isinstance(reply, Exception):
            self._load_error = reply
        elif reply != sha.encode():
            raise redis.exceptions.ConnectionError("Redis sent a reply to something else")

    def heard(self, channel: Channel) -> None:
        """Send more: the callers that just got a reply often call again."""
        if channel is self._channel:
            if self._dialling:
                self._dialling.cancel()
            if self._demoted or (self is self._node.repair and not self.waiting.count):
                self.hang_up()
        self._flush()

    # Channels come and go.

    def _dial(self) -> None:
        if self._dialling is None:
            # Not `create_task`: an eager task could be done before it is assigned, and uvloop 0.23 on Python 3.13.0
            # cannot make one. It needs a context of its own: the one of the node may be entered already.
            self._dialling = asyncio.Task(self._connect(), loop=self._node.loop, context=contextvars.Context())
            self._dialling.add_done_callback(self._dialled, context=self._node.context)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dialling = None
        if not task.cancelled() and (error := task.exception()):
            self._give_up(error)
        self._schedule()

    async def _connect(self) -> None:
        """Make a channel. Retry until there is one, or until no call waits any more."""
        while any(not call.done() for call in self):
            if self._failures > 1:
                await asyncio.sleep(backoff(self._failures))
            try:
                async with asyncio.timeout(min(self._node.patience * 2 ** min(self._failures, 5), _CONNECTING)):
                    channel = await self._node.open(self)
            except Exception as error:  # noqa: BLE001 - whatever it is, also of a hook of the user, a retry may help
                self._failures += 1
                self._error = error.with_traceback(None)
                if error_for(error):  # Such as a wrong password.
                    self.waiting.fail(functools.partial(final_error_for, error))
            else:
                if self._channel:
                    self._channel.abort(redis.exceptions.TimeoutError("the connection is silent"))
                    self._channel = None
                    for lane in self._node.lanes:  # Idle channels may have been dropped as well.
                        lane.hang_up()
                self._channel = channel
                return
        self.waiting.clear()  # The callers are gone.

    def hang_up(self) -> None:
        """Close the channel if it is idle."""
        if self._channel and self._channel.idle:
            self._channel.close()
            self._channel, self._demoted = None, False

    def lost(self, channel: Channel, error: Exception | None) -> None:
        """Retry what was in flight, if it is repeatable: it is not known whether Redis ran it."""
        if channel is not self._channel:
            return
        self._channel, self._demoted, self._must_load, self._load_error = None, False, False, None
        self._failures += 1
        self._error = with_cause(redis.exceptions.ConnectionError("the connection was lost"), error)
        in_flight, self._in_flight = self._in_flight, deque()
        for batch in in_flight:
            try:
                if batch.queue.kind[0].repeatable:
                    self._node.repair.retry(batch, self._error)
                    continue
            except Exception as mistake:  # noqa: BLE001 - no caller may be left without an answer
                self._error = mistake
            for call in batch.calls:
                call.fail(with_cause(StoreUnavailable(_BROKEN), self._error))
        self._scheduled = False  # `heard` may not be called any more.
        self._schedule()

    def retry(self, batch: Batch, error: Exception) -> None:
        """Retry calls that were in flight on a channel that broke. One of them may have broken it."""
        for call in batch.calls:
            call.losses += 1
        losses = batch.calls[0].losses
        # A call that breaks every channel goes behind the others, and is retried at growing intervals.
        queue = self.waiting.put_back(batch, behind=losses > 1)
        if losses > 2:
            queue.hold(error, self._node.loop.time())
        self._error = error
        self._schedule()

    # Time passes.

    def _watch_later(self) -> None:
        if self._timer is None:
            self._timer = self._node.loop.call_later(self._node.tick, self._watch, context=self._node.context)

    def _watch(self) -> None:
        """Answer late calls, doubt a silent channel, and send what was held back: every tick while calls wait."""
        self._timer = None
        now = self._node.loop.time()
        try:
            if self._channel and not self._channel.usable:  # `lost` has not been called yet, or has failed.
                self.lost(self._channel, None)
            for batch in self._in_flight:
                expire(batch.calls, now, batch.queue.error or self._error)
            self.waiting.expire(now, self._error)
            if self._in_flight and self._channel and self._channel.heard_at + self._node.patience <= now:
                self._dial()
            if self.waiting.count or self._in_flight:
                self._schedule()
                self._watch_later()
        except Exception as error:  # noqa: BLE001 - no caller may be left without an answer
            self._give_up(error)

    def close(self) -> None:
        """Close the channel. Calls without a reply get `StoreUnavailable`."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        with contextlib.suppress(RuntimeError):  # The event loop is closed: no caller waits any more.
            self._fail(lambda: with_cause(StoreUnavailable("the store was closed"), self._error))
            if self._dialling:
                self._dialling.cancel()

    def _give_up(self, error: BaseException) -> None:
        """Answer all callers after a bug, here or in redis-py."""
        self._fail(lambda: with_cause(SessionError(f"a bug in redis-session-sets: {type(error).__name__}"), error))

    def _fail(self, error: Callable[[], Exception]) -> None:
        channel, self._channel = self._channel, None
        if channel:
            if channel.idle:
                channel.close()
            else:
                channel.abort()
        self.waiting.fail(error)
        while self._in_flight:
            for call in self._in_flight.popleft().calls:
                call.fail(error())
