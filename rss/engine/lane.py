"""Lanes to one server: each queues calls, sends them through a channel, and retries them if the channel breaks."""

import asyncio
import contextlib
import contextvars
import functools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import redis.exceptions
from redis.asyncio.connection import AbstractConnection

from rss.engine.call import Call
from rss.engine.channel import QUIET, Answer, Channel, Listener, open_channel
from rss.engine.coalesce import Batch, Kind, Waiting, backoff, expire
from rss.engine.failures import DEMOTED, code_of, error_for, final_error_for, with_cause
from rss.engine.scripts import Scripts, pack
from rss.engine.watch import Watch
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
_UNSAFE: Final = "it was done, but replicas may lack it"
# The replies to WAIT of a master that has become a replica.
_DEMOTED_WHILE_WAITING: Final = "UNBLOCKED", "WAIT cannot be used with replica"
_BROKEN: Final = "the connection broke: it is not known what was done"
_PROTOCOL: Final = "Protocol error"
_REPLACED: Final = redis.exceptions.TimeoutError("the server was silent, and has been replaced")
_ASKING: Final = pack("ASKING")


class Servers(Protocol):
    """The servers of a store, as far as a lane needs them. `OneServer` and `Cluster` implement this."""

    @property
    def owners(self) -> "Sequence[Node]":
        """The server of each partition."""
        ...

    @property
    def masters(self) -> "Sequence[Node]":
        """The servers that together have all keys."""
        ...

    @property
    def split(self) -> Mapping[int, float]:
        """Partitions whose slots move, and the loop's time until which each call of them is a batch of its own."""
        ...

    @property
    def volleys(self) -> int:
        """The maximum number of volleys in flight in the lane `main` to one server."""
        ...

    def master_of(self, key: str) -> "Node":
        """Return the server of a key."""
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

    async def confirm(self, node: "Node") -> bool:
        """Learn whether a server that was silent is still the master, as far as it is known who is."""
        ...


class Node:
    """The lanes of one event loop to one server.

    Calls go through the lane `main`. Pages of reference sets go through `pages`, and durable operations through
    `durable`, so that other calls do not wait for them.

    If a channel breaks, the calls in flight on it are retried through another lane, one volley at a time. The first
    retry sends them together, the next ones send each alone. So a call that makes Redis hang up fails alone. Durable
    calls are retried through one of their own, because they may wait for replicas for seconds.
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
        self.patience: float = min(timeout / 3, _SILENCE)
        #: The maximum seconds to wait for replicas.
        self.replication: float = timeout / 2
        #: Seconds between two checks of deadlines, refusals and silence.
        self.tick: float = min(timeout / 20, _TICK)
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        #: An empty context for timers and callbacks. Otherwise they would keep the context of a request alive.
        self.context: contextvars.Context = contextvars.Context()
        repair, durable_repair = Lane(self, 3, 1), Lane(self, 4, 1)
        self.main: Lane = Lane(self, 0, servers.volleys, repair)
        self.pages: Lane = Lane(self, 1, VOLLEYS, repair)
        self.durable: Lane = Lane(self, 2, VOLLEYS, durable_repair)
        #: All lanes. Those that retry are the last ones, because calls of the others may get into them.
        self.lanes: Sequence[Lane] = self.main, self.pages, self.durable, repair, durable_repair
        #: Those who wait for the ends of sessions.
        self.watch: Watch = Watch(self, self.loop)
        #: How often another master took its place, behind the same address or Sentinels.
        self.demotions: int = 0
        #: Learns whether the server is still the master. None: there is no reason to doubt that.
        self.confirming: asyncio.Task[None] | None = None
        self._held: list[Channel] = []  # The channels that hold their replies meanwhile.
        self.make_connection = make_connection
        self._timeout = timeout
        self._guard: AsyncGenerator[None] | None = None

    async def open(self, listener: Listener) -> Channel:
        """Open a channel for a lane, or for the callers that wait for ends. Raises the errors of redis-py."""
        if self._guard is None:
            self._guard = self._until_the_loop_ends()
            await anext(self._guard)
        await self.servers.ready()
        return await open_channel(self.make_connection, listener, self._timeout)

    def doubt(self) -> None:
        """Note that the server does not answer, or does not have a key."""
        self.servers.doubt(self)

    def demote(self) -> None:
        """Leave the server, because it is not the master any more: also the channels that only read there."""
        self.demotions += 1
        for lane in self.lanes:
            lane.demote()
        self.watch.leave()

    def confirm(self, channel: Channel) -> None:
        """Let a channel go on when it is known that the server is still the master.

        A master that stops for a while, with its machine, may be replaced meanwhile. When it goes on, it does not know
        that yet. It runs the commands that have waited, and acknowledges writes that will be lost.
        """
        self._held.append(channel)
        if self.confirming is None:
            self.confirming = asyncio.Task(self._confirm(), loop=self.loop, context=contextvars.Context())

    async def _confirm(self) -> None:
        is_master = True
        try:
            is_master = await self.servers.confirm(self)
        finally:
            held, self._held, self.confirming = self._held, [], None
            for channel in held:
                if is_master:
                    channel.go_on()
                else:
                    channel.abort(_REPLACED)

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
        if self.confirming:
            self.confirming.cancel()
        self.watch.close()
        for lane in self.lanes:
            lane.close()

    async def aclose(self) -> None:
        """Close the connections, and wait until they are closed."""
        confirming = self.confirming
        self.close()
        if confirming:
            await asyncio.wait([confirming])
        if self._guard is not None:
            with contextlib.suppress(RuntimeError):  # The end of the loop is already closing it.
                await self._guard.aclose()


class Lane(Listener):
    """A queue of calls, and one channel at a time. The channel is opened when needed, and reopened when it breaks.

    *volleys*: the maximum number of volleys in flight. *repair*: the lane that retries calls; None: this one does.

    Without a channel, the task `_dialling` opens one. With a channel, `_dialling` means that the channel is in doubt,
    because it has been silent for too long. Then nothing more is sent through it, and the task opens another channel.
    If the old channel answers first, it stays. If the new one is ready first, the old one is dropped. So a server that
    stops for a few seconds causes no failure. A connection that was lost without notice costs one wait.
    """

    def __init__(self, node: Node, number: int, volleys: int, repair: "Lane | None" = None) -> None:
        #: The calls that are not in flight.
        self.waiting: Waiting = Waiting()
        self.node = node
        #: The number of this lane among those of its server.
        self.number = number
        self._volleys = volleys
        self._repair = repair or self
        self._channel: Channel | None = None
        self._in_flight: deque[Batch] = deque()  # The batches without a reply, oldest first.
        self._answering: Batch | None = None  # The batch whose replies are being handed out; None if there is none.
        self._demoted = False  # The server is not the master: close the channel when it is idle.
        self._missing = set[str]()  # The names of scripts that are gone: load them when the channel is idle.
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
        waits = self._demoted or self._dialling or self.node.confirming or (volleys and self._missing)
        if volleys == self._volleys or waits or channel.paused or not channel.usable:
            return 0
        return min(ROOM, -(-calls // self._volleys))

    def _send(self, channel: Channel, batches: list[Batch]) -> None:
        batches[-1].last = True
        scripts, stems = self.node.scripts, self.node.layout.stems
        if self._missing:
            # The scripts of this volley are the last ones, so that they are hardly ever flushed again before they run.
            needed = self._missing | {batch.queue.kind[0].script for batch in batches}
            names = sorted({*scripts.usual, *needed} - {""}, key=needed.__contains__)
            self._missing, self._load_error = set(), None
            loads = b"".join(scripts.loads[name] for name in names)
            channel.send(loads, [functools.partial(self._loaded, scripts.shas[name]) for name in names])
        packed: list[bytes] = []
        answers: list[Answer] = []
        for batch in batches:
            operation, partition, _ = batch.queue.kind
            if batch.calls[0].observed:
                batch.note_attempt()
            for call in batch.calls if operation.paged else ():
                call.channel = channel
            if operation.on_owner:
                packed.append(_ASKING)
                answers.append(_ignore)
            if operation.command:
                packed.append(batch.pack_commands())
                answers += [functools.partial(self._collected, batch)] * len(batch.calls)
                continue
            packed.append(batch.pack(scripts.shas[operation.script], stems(partition)))
            if operation.replicas:
                # WAIT waits for the last write of this connection. If the script finds its work done, by a run on
                # another connection, it writes nothing. So write a key that vanishes at once.
                packed.append(pack("SET", self._marker(partition), "", "PX", 1))
                packed.append(pack("WAIT", operation.replicas, round(self.node.replication * 1000)))
                answers += (functools.partial(hear, batch) for hear in (self._ran, self._marked, self._replicated))
            else:
                answers.append(functools.partial(self._answered, batch))
        channel.send(b"".join(packed), answers)

    # Receive replies.

    def _answered(self, batch: Batch, reply: Any) -> None:
        """Handle the reply to the oldest batch in flight: a list of replies, or an error."""
        if reply.__class__ is list and 0 < len(reply) <= len(batch.calls):
            self._hand_out(batch, reply)
        elif not isinstance(reply, Exception) or (_PROTOCOL in str(reply) and len(batch.calls) > 1):
            # Either the reply matches no batch, or one call makes Redis hang up. Sending each again alone shows which.
            raise reply if isinstance(reply, Exception) else redis.exceptions.ConnectionError("an unexpected reply")
        else:
            self._refused(batch, reply)
            self._in_flight.popleft()

    def _hand_out(self, batch: Batch, replies: list[Any]) -> None:
        if len(replies) < len(batch.calls):  # The script stopped early, because its time was spent.
            self.waiting.put_back(batch, len(replies))
            del batch.calls[len(replies) :]
        self._failures, self._error = 0, None
        if batch.queue.refusals:
            batch.queue.release()
        if self._volleys > 1:  # The callers run here. `_flush` sends their next calls: below, or in `heard`.
            self._scheduled = True
        self._answering = batch
        # `Call.answer` would run a task inside the current one, which asyncio forbids.
        kind = type(batch.calls[0])  # All calls of a store are of one class.
        answer = kind.answer if asyncio.current_task() is None else kind.set_result
        convert = batch.queue.kind[0].convert
        for call, reply in zip(batch.calls, replies, strict=True):
            if isinstance(reply, Exception):
                call.fail(final_error_for(reply))
            elif not call.done():
                answer(call, convert(reply) if convert else reply)
        self._answering = None
        if self._in_flight and self._in_flight[0] is batch:  # False if a caller has closed the store.
            self._in_flight.popleft()
        # Send now rather than after the read, so that Redis works while the next replies are handed out. But a lane
        # with one volley waits for the callers who get replies of other servers: so the next volley is larger.
        if batch.last and self._volleys > 1:
            self._flush()

    def _collected(self, batch: Batch, reply: Any) -> None:
        """Collect the replies of plain commands, and hand them out together. A code concerns all calls."""
        batch.replies = [*(batch.replies or ()), reply]
        if len(batch.replies) == len(batch.calls):
            error = next((one for one in batch.replies if isinstance(one, Exception) and code_of(one)), None)
            self._answered(batch, error or batch.replies)

    def _marker(self, partition: int) -> str:
        """Return the key of a write on this server, in another partition than this one, whose slot may move."""
        owners = self.node.servers.owners
        others = (number for number, owner in enumerate(owners) if owner is self.node and number != partition)
        return self.node.layout.marker(next(others, partition))

    def _ran(self, batch: Batch, reply: Any) -> None:
        """Keep the replies of a durable operation until replicas have its writes."""
        if isinstance(reply, list):
            batch.replies = reply
        else:
            self._answered(batch, reply)

    def _marked(self, batch: Batch, reply: Any) -> None:
        if isinstance(reply, Exception):
            unsafe = with_cause(StoreUnavailable(f"{_UNSAFE}: call again"), reply)
            self._unsafe(batch, unsafe if code_of(reply) else final_error_for(reply))

    def _replicated(self, batch: Batch, reply: Any) -> None:
        """Hand out the replies of a durable operation. *reply*: the number of replicas that have its writes."""
        replicas = batch.queue.kind[0].replicas
        if isinstance(reply, Exception):
            demoted = any(words in str(reply) for words in _DEMOTED_WHILE_WAITING)
            unsafe = with_cause(StoreUnavailable(f"{_UNSAFE}: call again"), reply)
            self._unsafe(batch, unsafe if demoted else final_error_for(reply))
        elif reply < replicas:
            self._unsafe(batch, StoreUnavailable(f"{_UNSAFE}: {reply} of {replicas} have it. Call again"))
        if batch.replies is not None:
            self._answered(batch, batch.replies)

    @staticmethod
    def _unsafe(batch: Batch, error: Exception) -> None:
        """Replace the replies of a durable operation by an error. Errors of single sessions stay."""
        if batch.replies is not None:  # Otherwise it was refused.
            batch.replies = [reply if isinstance(reply, Exception) else error for reply in batch.replies]

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
        if code == "NOSCRIPT":  # The next volley may be without this batch.
            self._missing.add(batch.queue.kind[0].script)
        if code in DEMOTED and not self._demoted:  # Once for each channel, not for each batch that it had.
            self.node.demote()

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
            if self._demoted or (self is self._repair and not self.waiting.count):
                self.hang_up()
        if self._volleys > 1:
            self._flush()
        else:
            self._schedule()

    def is_doubted(self) -> bool:
        """Return whether the server is silent in any lane, or was, and it is not known yet if it was replaced."""
        return self.node.confirming is not None or any(lane.is_silent for lane in self.node.lanes)

    def woke(self, channel: Channel) -> None:
        """End any doubt about the channel: only the server is in doubt now."""
        if channel is self._channel and self._dialling:
            self._dialling.cancel()
        if channel is self._channel and self._demoted:
            channel.abort(_REPLACED)
        else:
            self.node.confirm(channel)

    @property
    def is_silent(self) -> bool:
        """Whether replies are late. If the server has been replaced, they are worth nothing."""
        channel = self._channel
        if channel is None or channel.idle:
            return False
        return channel.held or channel.heard_at + QUIET <= self.node.loop.time()

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

    def demote(self) -> None:
        """Send nothing more through this channel, and close it when it is idle: its server is not the master.

        A connection that is just being made may lead there too, as soon as a server that was stopped goes on.
        """
        if self._dialling:
            self._dialling.cancel()
        self._demoted = self._channel is not None
        self.hang_up()
        if self._channel and self.is_silent:
            self._channel.abort(_REPLACED)

    def hang_up(self) -> None:
        """Close the channel if it is idle."""
        if self._channel and self._channel.idle:
            self._channel.close()
            self._channel, self._demoted = None, False

    def lost(self, channel: Channel, error: Exception | None) -> None:
        """Retry the batches in flight that are repeatable, and fail the others. Redis may or may not have run them."""
        if channel is not self._channel:
            return
        self._channel, self._demoted, self._missing, self._load_error = None, False, set(), None
        self._failures += 1
        self._error = with_cause(redis.exceptions.ConnectionError("the connection was lost"), error)
        in_flight, self._in_flight = self._in_flight, deque()
        for batch in in_flight:
            try:
                if batch.queue.kind[0].repeatable:
                    self._repair.retry(batch, self._error)
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
        moved = all(batch.queue.kind[1] in partitions for batch in self._in_flight)
        if self._channel and self.is_silent and moved:
            self._channel.abort(_REPLACED)
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
            if self._in_flight and self._channel and not self._channel.held:
                waits = self.node.replication if self._in_flight[0].queue.kind[0].replicas else 0
                if self._channel.heard_at + self.node.patience + waits <= now:
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
