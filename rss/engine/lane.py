"""Lanes to one server: each queues calls, sends them through a channel, and retries them if the channel breaks."""

import asyncio
import contextlib
import contextvars
import functools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Container, Iterator, Mapping
from typing import Any, Final, Protocol

import redis.exceptions
from redis.asyncio.connection import AbstractConnection

from rss.engine.call import Call
from rss.engine.channel import Answer, Channel, open_channel
from rss.engine.coalesce import Batch, Kind, Waiting, backoff, expire
from rss.engine.failures import DEMOTED, code_of, error_for, final_error_for, with_cause
from rss.engine.scripts import Scripts, pack
from rss.errors import SessionError, StoreUnavailable
from rss.keys import Layout

#: The maximum number of volleys in flight in a lane. While Redis runs one, Python handles the other.
VOLLEYS: Final = 2
#: The maximum number of calls in a volley. They keep Redis busy for one or two milliseconds.
ROOM: Final = 100
# The maximum seconds of silence before a channel is in doubt.
_SILENCE: Final = 2.0
# The maximum seconds of one attempt to connect.
_CONNECTING: Final = 10.0
# The maximum seconds between two checks of deadlines, refusals and silence.
_TICK: Final = 0.05
_BROKEN: Final = "the connection broke: it is not known what was done"
_PROTOCOL: Final = "Protocol error"
_ASKING: Final = pack("ASKING")
#: Seconds of silence after which the servers of a cluster are asked whether the partitions have moved.
QUIET: Final = 0.5


class Servers(Protocol):
    """The servers of a store, as far as a lane needs them. `OneServer` and `Cluster` implement this."""

    @property
    def split(self) -> Mapping[int, float]:
        """Partitions whose slots move, and the loop's time until which each call of them is a batch of its own."""
        ...

    async def ready(self) -> None:
        """Wait until it is known that the store may use the servers, and which of them has each partition.

        Raises `SessionError` if the store must not use them.
        """
        ...

    def redirect(self, lane: "Lane", batch: Batch, error: Exception) -> bool:
        """Put the calls of a batch that a server refused into another lane. Return False if they stay in this one."""
        ...

    def doubt(self, node: "Node") -> None:
        """Note that a server does not answer, or does not work."""
        ...


class Node:
    """The lanes of one event loop to one server.

    Calls go through the lane `main`. Pages of reference sets go through `pages`, so that other calls do not wait for
    them.

    If a channel breaks, the calls in flight on it are retried through `repair`, one volley at a time. The first retry
    sends them together, the next ones send each alone. So a call that makes Redis hang up fails alone.
    """

    def __init__(
        self,
        make_connection: Callable[[], AbstractConnection],
        scripts: Scripts,
        layout: Layout,
        timeout: float,
        servers: Servers,
    ) -> None:
        self.servers = servers
        self.scripts = scripts
        self.layout = layout
        #: Seconds of silence after which a channel is in doubt.
        self.patience = min(timeout / 3, _SILENCE)
        #: Seconds between two checks of deadlines, refusals and silence.
        self.tick = min(timeout / 20, _TICK)
        self.loop = asyncio.get_running_loop()
        #: An empty context for timers and callbacks. Otherwise they would keep the context of a request alive.
        self.context = contextvars.Context()
        self.main = Lane(self, 0, VOLLEYS)
        self.pages = Lane(self, 1, VOLLEYS)
        self.repair = Lane(self, 2, 1)
        self.make_connection = make_connection
        self._timeout = timeout
        self._guard: AsyncGenerator[None] | None = None

    @property
    def lanes(self) -> tuple["Lane", "Lane", "Lane"]:
        """All lanes."""
        return self.main, self.pages, self.repair

    async def open(self, lane: "Lane") -> Channel:
        """Open a channel for a lane."""
        if self._guard is None:
            self._guard = self._until_the_loop_ends()
            await anext(self._guard)
        await self.servers.ready()
        return await open_channel(self.make_connection, lane.heard, lane.lost, self._timeout)

    async def _until_the_loop_ends(self) -> AsyncGenerator[None]:
        """Close the connections even if the store is never closed: `asyncio.run` closes generators before the loop."""
        try:
            yield
        finally:
            self.close()
            await asyncio.sleep(0)  # A transport closes one turn after `close`.
            await asyncio.sleep(0)

    def close(self) -> None:
        """Close the connections. Calls without a reply get `StoreUnavailable`."""
        for lane in self.lanes:
            lane.close()

    async def aclose(self) -> None:
        """Close the connections, and wait until they are closed."""
        self.close()
        if self._guard is not None:
            with contextlib.suppress(RuntimeError):  # The end of the loop is already closing it.
                await self._guard.aclose()


class Lane:
    """A queue of calls, and one channel at a time. The channel is opened when needed, and reopened when it breaks.

    *volleys*: the maximum number of volleys in flight.

    Without a channel, the task `_dialling` opens one. With a channel, `_dialling` means that the channel is in doubt,
    because it has been silent for too long. Then nothing more is sent through it, and the task opens another channel.
    If the old channel answers first, it stays. If the new one is ready first, the old one is dropped. So a server that
    stops for a few seconds causes no failure. A connection that was lost without notice costs one wait.
    """

    def __init__(self, node: Node, number: int, volleys: int) -> None:
        #: The calls that are not in flight.
        self.waiting = Waiting()
        self.node = node
        #: The number of this lane among those of its server.
        self.number = number
        self._volleys = volleys
        self._channel: Channel | None = None
        self._in_flight: deque[Batch] = deque()  # The batches without a reply, oldest first.
        self._answering: Batch | None = None  # The batch whose replies are being handed out; None if there is none.
        self._demoted = False  # The server is not the master: close the channel when it is idle.
        self._must_load = False  # The scripts are gone: load them when the channel is idle.
        self._load_error: Exception | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._failures = 0  # The number of failures in a row.
        self._error: Exception | None = None  # The last failure; None after a reply.
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None

    def __iter__(self) -> Iterator[Call]:
        """Iterate over all calls without a reply, including some that were cancelled."""
        yield from self.waiting
        for batch in self._in_flight:
            yield from batch.calls

    def is_full(self, limit: int) -> bool:
        """Return whether the lane refuses more calls.

        *limit*: the maximum number of waiting calls, beside those in flight.

        A caller that just got a reply often calls again, while all others still wait. Its old call does not count.
        """
        if self.waiting.count < limit:
            return False
        in_flight = sum(len(batch.calls) for batch in self._in_flight if batch is not self._answering)
        return self.waiting.count + in_flight >= limit + VOLLEYS * ROOM

    # Send calls.

    def put(self, kind: Kind, call: Call) -> None:
        """Queue a call, and send it after the event loop has run all ready callbacks. These may make more calls."""
        self.waiting.put(kind, call)
        if not self._scheduled:
            self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.node.loop.call_soon(self._flush, context=self.node.context)

    def _flush(self) -> None:
        """Send the waiting calls that may be sent now."""
        self._scheduled = False
        if not self.waiting.count:
            return
        channel, now = self._channel, self.node.loop.time()
        try:
            self._watch_later()
            if channel is None:
                self._dial()
                return
            while self.waiting.count and (room := self._free(channel)):
                batches = self.waiting.take(room, now, self.node.servers.split)
                if not batches:  # Redis has just refused these kinds. `_watch` retries later.
                    return
                self._in_flight.extend(batches)
                self._send(channel, batches)
        except Exception as error:  # noqa: BLE001 - every caller must get an answer
            self._give_up(error)

    def _free(self, channel: Channel) -> int:
        """Return the maximum number of calls for the next volley; 0 if nothing may be sent now.

        With two volleys, this is half of all calls, rounded up: the other half is in flight, or follows.
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
        scripts, stems = self.node.scripts, self.node.layout.stems
        if self._must_load:
            self._must_load, self._load_error = False, None
            channel.send(scripts.load, [functools.partial(self._loaded, sha) for sha in scripts.shas.values()])
        packed: list[bytes] = []
        answers: list[Answer] = []
        for batch in batches:
            operation, partition, _ = batch.queue.kind
            if operation.on_owner:
                packed.append(_ASKING)
                answers.append(_ignore)
            packed.append(batch.pack(scripts.shas[operation.script], stems(partition)))
            answers.append(functools.partial(self._answered, batch))
        channel.send(b"".join(packed), answers)

    # Receive replies.

    def _answered(self, batch: Batch, reply: Any) -> None:
        """Hand out the replies of the oldest batch in flight."""
        if reply.__class__ is list and 0 < len(reply) <= len(batch.calls):
            if len(reply) < len(batch.calls):  # The script stopped early, because its time was spent.
                self.waiting.put_back(batch, len(reply))
                del batch.calls[len(reply) :]
            self._failures, self._error = 0, None
            if batch.queue.refusals:
                batch.queue.release()
            self._scheduled = True  # The callers run here. `_flush` below sends their next calls.
            self._answering = batch
            # `Call.answer` would run a task inside the current one, which asyncio forbids.
            answer = Call.answer if asyncio.current_task() is None else Call.set_result
            for call, own in zip(batch.calls, reply, strict=False):
                if isinstance(own, Exception):
                    call.fail(final_error_for(own))
                elif not call.done():
                    answer(call, own)
            self._answering = None
            if self._in_flight and self._in_flight[0] is batch:  # False if a caller has closed the store.
                self._in_flight.popleft()
            # Send now rather than after the read, so that Redis works while the next replies are handed out.
            self._flush()
        elif not isinstance(reply, Exception) or (_PROTOCOL in str(reply) and len(batch.calls) > 1):
            # Either the reply matches no batch, or one call makes Redis hang up. Sending each again alone shows which.
            raise reply if isinstance(reply, Exception) else redis.exceptions.ConnectionError("an unexpected reply")
        else:
            self._refused(batch, reply)
            self._in_flight.popleft()

    def _refused(self, batch: Batch, error: Exception) -> None:
        """Handle an error reply to a batch.

        Either Redis did not run the script, or the script failed at its first session.
        """
        if (code := code_of(error)) == "NOSCRIPT" and self._load_error:
            error, code, self._load_error = self._load_error, "not loaded", None
        if self.node.servers.redirect(self, batch, error):
            return
        if error_for(error):
            failed = batch.calls if code else batch.calls[:1]  # A code concerns the server, not one session.
            for call in failed:
                call.fail(final_error_for(error))
            self.waiting.put_back(batch, len(failed))
            return
        queue = self.waiting.put_back(batch)
        queue.hold(error, self.node.loop.time(), at_once=code == "NOSCRIPT")
        self._must_load = self._must_load or code == "NOSCRIPT"
        self._demoted = self._demoted or code in DEMOTED

    def _loaded(self, sha: str, reply: Any) -> None:
        if isinstance(reply, Exception):
            self._load_error = reply
        elif reply != sha.encode():
            raise redis.exceptions.ConnectionError("Redis sent an unexpected reply")

    def heard(self, channel: Channel) -> None:
        """End any doubt about the channel, and send more calls: callers that got a reply often call again."""
        if channel is self._channel:
            if self._dialling:
                self._dialling.cancel()
            if self._demoted or (self is self.node.repair and not self.waiting.count):
                self.hang_up()
        self._flush()

    # Open and close channels.

    def _dial(self) -> None:
        if self._dialling is None:
            # Do not use `create_task`: an eager task could end before it is assigned, and uvloop 0.23 on Python 3.13.0
            # fails. The task needs its own context, because the context of the node may be entered already.
            self._dialling = asyncio.Task(self._connect(), loop=self.node.loop, context=contextvars.Context())
            self._dialling.add_done_callback(self._dialled, context=self.node.context)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dialling = None
        if not task.cancelled() and (error := task.exception()):
            self._give_up(error)
        self._schedule()

    async def _connect(self) -> None:
        """Open a channel. Retry until that succeeds, or until no call waits any more."""
        while any(not call.done() for call in self):
            if self._failures > 1:
                await asyncio.sleep(backoff(self._failures))
            try:
                async with asyncio.timeout(min(self.node.patience * 2 ** min(self._failures, 5), _CONNECTING)):
                    channel = await self.node.open(self)
            except Exception as error:  # noqa: BLE001 - a retry may help after any error, even of a hook of the user
                self._failures += 1
                self.node.servers.doubt(self.node)
                self._error = error.with_traceback(None)
                if error_for(error):  # A retry cannot help: the password is wrong, for example.
                    self.waiting.fail(functools.partial(final_error_for, error))
            else:
                if self._channel:
                    self._channel.abort(redis.exceptions.TimeoutError("the connection is silent"))
                    self._channel = None
                    for lane in self.node.lanes:  # The idle channels may be lost too.
                        lane.hang_up()
                self._channel = channel
                return
        self.waiting.clear()  # All calls are done.

    def hang_up(self) -> None:
        """Close the channel if it is idle."""
        if self._channel and self._channel.idle:
            self._channel.close()
            self._channel, self._demoted = None, False

    def lost(self, channel: Channel, error: Exception | None) -> None:
        """Retry the batches in flight that are repeatable, and fail the others. Redis may or may not have run them."""
        if channel is not self._channel:
            return
        self._channel, self._demoted, self._must_load, self._load_error = None, False, False, None
        self._failures += 1
        self._error = with_cause(redis.exceptions.ConnectionError("the connection was lost"), error)
        in_flight, self._in_flight = self._in_flight, deque()
        for batch in in_flight:
            try:
                if batch.queue.kind[0].repeatable:
                    self.node.repair.retry(batch, self._error)
                    continue
            except Exception as mistake:  # noqa: BLE001 - every caller must get an answer
                self._error = mistake
            for call in batch.calls:
                call.fail(with_cause(StoreUnavailable(_BROKEN), self._error))
        self.node.servers.doubt(self.node)
        self._scheduled = False  # True would block `_schedule`, and `heard` may not flush again.
        self._schedule()

    def accept(self, batch: Batch, error: Exception | None = None) -> None:
        """Take over the calls of a batch from a lane of another server.

        *error*: why that server did not run them; None if it did not see them. After a second such error in a row, the
        calls wait before they are sent.
        """
        queue = self.waiting.put_back(batch)
        if error:
            queue.hold(error, self.node.loop.time(), at_once=True)
        self._schedule()

    def release(self, partitions: Container[int]) -> list[Batch]:
        """Return the waiting calls of partitions that this server does not have any more.

        If the server is silent, and only such calls are in flight, drop the channel: they need not wait for it.
        """
        channel = self._channel
        moved = self._in_flight and all(batch.queue.kind[1] in partitions for batch in self._in_flight)
        if channel and moved and channel.heard_at + QUIET <= self.node.loop.time():
            channel.abort(redis.exceptions.TimeoutError("the server is silent, and its partitions have moved"))
        return self.waiting.release(partitions)

    def retry(self, batch: Batch, error: Exception) -> None:
        """Retry the calls of a batch that was in flight on a broken channel. One of them may be the reason."""
        for call in batch.calls:
            call.losses += 1
        losses = batch.calls[0].losses
        # A call that keeps breaking channels waits behind the others, and is retried at growing intervals.
        queue = self.waiting.put_back(batch, behind=losses > 1)
        if losses > 2:
            queue.hold(error, self.node.loop.time())
        self._error = error
        self._schedule()

    # Watch deadlines.

    def _watch_later(self) -> None:
        if self._timer is None:
            self._timer = self.node.loop.call_later(self.node.tick, self._watch, context=self.node.context)

    def _watch(self) -> None:
        """Expire late calls, dial if the channel is silent, and retry refused calls: every tick while calls wait."""
        self._timer = None
        now = self.node.loop.time()
        try:
            if self._channel and not self._channel.usable:  # `lost` was not called yet, or it failed.
                self.lost(self._channel, None)
            for batch in self._in_flight:
                expire(batch.calls, now, batch.queue.error or self._error)
            self.waiting.expire(now, self._error)
            if self._in_flight and self._channel:
                if self._channel.heard_at + self.node.patience <= now:
                    self._dial()
                if self._channel.heard_at + QUIET <= now:
                    self.node.servers.doubt(self.node)
            if self.waiting.count or self._in_flight:
                self._schedule()
                self._watch_later()
        except Exception as error:  # noqa: BLE001 - every caller must get an answer
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
        """Fail all calls after a bug in this library or in redis-py."""
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


def _ignore(_: object) -> None:
    """Ignore the reply to ASKING."""
