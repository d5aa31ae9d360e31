"""The operations: the properties of each, and a typed method that sends it and reads the reply.

Each method takes encoded values, builds the keys, and converts the reply to a named tuple or a plain type. The header
of each script describes its arguments.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Final, Literal, NamedTuple

from redis.asyncio import Redis, RedisCluster

from rss.engine.call import Call
from rss.engine.coalesce import Elsewhere, Operation, backoff, batched
from rss.engine.engine import Engine
from rss.engine.meta import describe, incomplete
from rss.engine.scripts import Scripts, pack, schema
from rss.errors import Conflict, SessionEnded, SessionNotFound, StoreUnavailable
from rss.fields import Encoded, Fields
from rss.keys import Layout, Partitioned, reference_value
from rss.observe import Observer


class Read(NamedTuple):
    """A session that was read."""

    #: Field, data, field, data, ... Empty if the session is not alive.
    pairs: list[bytes]
    #: The TTL in milliseconds; 0 if the session is not alive.
    ttl: int = 0
    #: "alive", "ended" or "absent". "renewed" if the read has renewed the session. "due" if a check found it due.
    state: bytes = b"alive"
    #: Why the session was ended; None if it was not.
    ended: str | None = None


class Taken(NamedTuple):
    """The fields that were removed from a session: field, data, ... And the TTL of the session in milliseconds."""

    pairs: list[bytes]
    ttl: int


def _read(reply: list[Any]) -> Read:
    """Convert the reply of `get.lua`."""
    state = reply.pop()
    if state == b"absent":
        return Read([], state=state)
    if state == b"ended":
        return Read([], state=state, ended=reply[0].decode(errors="backslashreplace"))
    return Read(reply, reply.pop(), state)


def _taken(reply: list[Any]) -> Taken:
    """Convert the reply of `unset_with_refs.lua`."""
    return Taken(reply, ttl=reply.pop())


_READ: Final = ("sets", "session", "read")
_MOVE: Final = ("sets", "session", "write", "renew", "tell", "end", "fence", "move")

GET: Final = Operation("get", _READ, convert=_read)
GET_AND_RENEW: Final = Operation("get_and_renew", (*_READ, "renew"), convert=_read)
SET: Final = Operation("set_with_refs", (*_MOVE, "expect"), sized=True)
#: Not repeatable: a second run would take the write of the first for a conflict.
SET_EXPECTING: Final = replace(SET, repeatable=False)
#: A new session without an identity may be in any partition.
CREATE: Final = replace(SET, anywhere=True)
UNSET: Final = Operation("unset_with_refs", _MOVE, convert=_taken)
#: Not repeatable: a second run would return nothing, because the first has removed the fields.
POP: Final = replace(UNSET, repeatable=False)
INCREMENT: Final = Operation("increment", ("sets", "session", "write"), repeatable=False, convert=int)
TOUCH: Final = Operation("touch", ("sets", "session", "renew"))
DELETE: Final = Operation("delete_with_refs", ("sets", "session", "expect", "tell", "end"), convert=bool)
ROTATE: Final = Operation("rotate_with_refs", _MOVE, sized=True)
ARRIVE: Final = Operation("arrive_with_refs", _MOVE, sized=True)
RETIRE: Final = Operation("retire_with_refs", _MOVE, sized=True)
CONFIRM: Final = Operation("confirm_with_refs", _MOVE, sized=True)
FIND_BY: Final = Operation("find_by_ref", (*_READ, "page"), batched=False, paged=True)
DELETE_BY: Final = Operation(
    "delete_by_ref",
    ("sets", "session", "write", "tell", "end", "fence", "page", "rounds"),
    batched=False,
    paged=True,
    sized=True,
)
#: Reads no session, so it needs no script.
COUNT_BY: Final = Operation("", (), command="SCARD")
#: Reads a mark of `open_store`.
IS_INCOMPLETE: Final = Operation("", (), command="HGET", convert=lambda reply: (reply or b"").decode())
#: Writes such a mark, and removes one.
MARK: Final = Operation("", (), command="HSET")
UNMARK: Final = Operation("", (), command="HDEL")
COMPLETE: Final = Operation("complete", ())
INSPECT: Final = Operation("inspect", ("sets", "session", "renew"))
INSPECT_REF: Final = Operation("inspect_ref", ("sets", "session", "renew", "tell", "page"), paged=True)
INSPECT_FENCE: Final = Operation("inspect_fence", ("sets",), convert=bytes.decode)
#: Makes a key, unless it exists.
CLAIM: Final = Operation("", (), command="SET", convert=bool, repeatable=False)
BLOCKED: Final = Operation("blocked", ())
UNBLOCK: Final = Operation("unblock", ())

ALL: Final = (
    GET, GET_AND_RENEW, SET, UNSET, INCREMENT, TOUCH, DELETE, ROTATE, ARRIVE, RETIRE, CONFIRM, FIND_BY, DELETE_BY,
    BLOCKED, UNBLOCK, COMPLETE, INSPECT, INSPECT_REF,
    INSPECT_FENCE,
)  # fmt: skip

#: The lifetime of a tombstone in milliseconds: longer than any request that was in flight when the session ended.
TOMBSTONE: Final = 300_000
#: What the scripts that look for damage do about it. "check": nothing. "mend": they mend what they can, but remove no
#: key. "mend_and_remove": they also remove the keys that cannot be mended.
Mode = Literal["check", "mend", "mend_and_remove"]
#: The approximate number of sessions in a page. They keep Redis busy for one or two milliseconds.
_PAGE: Final = "50"
#: The maximum number of ids in a set whose page shares a volley with others. A volley may have a hundred of these.
FEW: Final = 3

# The lifetime of an unconfirmed copy in milliseconds.
_ARRIVAL: Final = 60_000
# How many ids to try for a new session before waiting for a slot that moves. How often to confirm a copy.
_TRIES: Final = 4
# The argument to read all fields.
_ALL: Final = ("all",)

#: The lifetime of a session from now on: milliseconds, "renew" for the present max_age, or "keep" to leave the TTL.
MaxAge = str
#: When a read renews: () for never, ("always",), or ("after", milliseconds). ("check", milliseconds) only reports it.
Renewal = tuple[str, ...]


class Rotated(NamedTuple):
    """The new id of a session, and its TTL in milliseconds."""

    session_id: str
    ttl: int


class Copy(NamedTuple):
    """The copy of a session. Both lists are empty if the session has ended, or if its id is an old one in grace."""

    #: The session as it was read: field, data, ...
    read: Sequence[bytes]
    #: The content of the copy: field, data, ...
    pairs: Sequence[str | bytes]

    @classmethod
    def of(
        cls,
        session_id: str,
        read: Sequence[bytes],
        pairs: Sequence[str | bytes] = (),
        written: Container[bytes] = frozenset({b"id"}),
    ) -> "Copy":
        """Return the copy of a session that was read. It has other *pairs* in place of the fields in *written*."""
        fields = list(zip(read[::2], read[1::2], strict=True))
        if (b"id", session_id.encode()) not in fields:
            return cls([], [])
        return cls(read, [*pairs, *(part for field in fields if field[0] not in written for part in field)])

    @property
    def name(self) -> str:
        """A hash of the session as it was read. If it changes before a second call reads it, the names differ."""
        fields = sorted(zip(self.read[::2], self.read[1::2], strict=True))
        packed = pack(*(part for field in fields for part in field)) if fields else b""
        return blake2b(packed, digest_size=12, usedforsecurity=False).hexdigest()


class Retired(NamedTuple):
    """A session that was ended because it has a copy."""

    #: The TTL that it had, in milliseconds.
    ttl: int
    #: The name of the copy.
    copy: bytes
    #: Field, data, ... that have changed since it was copied.
    values: list[bytes]
    #: The fields that are gone since then.
    gone: list[bytes]


class Position(NamedTuple):
    """The position of an operation in the reference set of a value in one partition.

    *few*: whether the set has no more than `FEW` ids. *cursor*: what the script returned, empty at the beginning.
    *left*: the ids that the last page did not handle in time. *channel*: the one of the pages so far.
    """

    partition: int = 0
    few: bool = False
    cursor: bytes = b""
    left: tuple[bytes, ...] = ()
    channel: object = None

    @property
    def done(self) -> bool:
        """Whether the last page has been handled."""
        return self.cursor == b"0" and not self.left

    @property
    def start(self) -> bytes:
        """The cursor of the next page."""
        return self.cursor or b"0"

    def after(self, page: Call, cursor: bytes, left: Iterable[bytes]) -> "Position":
        """Return the position after a page, whose script returned *cursor* and *left*.

        A server orders the ids of a set by a secret of its own. So a cursor that another server gave, before a failover
        or a restart, leads to some place between them. Then begin anew.
        """
        if self.channel not in (None, page.channel):
            return Position(self.partition)
        return Position(self.partition, cursor=cursor, left=tuple(left), channel=page.channel)


class Found(NamedTuple):
    """A page of sessions, each as field, data, ..."""

    sessions: list[list[bytes]]
    position: Position


class Inspected(NamedTuple):
    """A page of a reference set that was inspected."""

    #: The number of ids that belong to no session that names the set.
    stale: int
    #: What else was wrong: "wrong type", "endless", "short".
    found: list[str]
    position: Position


class Deleted(NamedTuple):
    """The number of sessions that a page has ended."""

    ended: int
    position: Position


def _unheeded(call: Call) -> Call:
    """Let asyncio not complain about an error of the call, if nobody awaits it."""
    call.add_done_callback(lambda call: call.cancelled() or call.exception())
    return call


class Operations:
    """The operations of one store."""

    def __init__(
        self,
        client: Redis | RedisCluster,
        layout: Layout,
        fields: Fields,
        *,
        max_age: int,
        max_lifetime: int,
        timeout: float,
        json: bool,
        events: bool = False,
        observe: Observer | None,
    ) -> None:
        self.layout = layout
        self.fields = fields
        #: The deadline of an operation, in seconds.
        self.timeout = timeout
        lua = schema(
            fields.references,
            max_age=max_age,
            max_lifetime=max_lifetime,
            tombstone=TOMBSTONE,
            json=json,
            before_value=layout.before_value,
            ending=layout.ending,
            partitioned=isinstance(layout, Partitioned),
            events=events,
        )
        #: The assembled scripts.
        parts = {operation.script: operation.parts for operation in ALL}
        self.scripts: Scripts = Scripts(lua, parts, partitioned=isinstance(layout, Partitioned))
        #: The engine that runs the scripts.
        description = describe(fields.references, json=json, events=events, max_age=max_age, max_lifetime=max_lifetime)
        self.engine: Engine = Engine(client, self.scripts, layout, description, timeout, observe=observe)

    def get(
        self, session_id: str, fields: Sequence[str] | None, renewal: Renewal = (), *, begun: bool = False
    ) -> Awaitable[Read]:
        """Read a session with its id: all fields, or only *fields*.

        *begun*: read it even while the store closes. See `several`.
        """
        shared = _ALL if fields is None else (str(len(fields)), *fields)
        operation = GET
        if renewal:
            operation, shared = GET_AND_RENEW, shared + renewal
        key, partition = self.layout.place(session_id)
        return self.engine.run(operation, (key,), shared=shared, partition=partition, begun=begun)

    async def set(
        self,
        session_id: str,
        values: Encoded,
        max_age: MaxAge,
        mode: Literal["set", "update", "create"],
        expected: Sequence[str | bytes] = (),
        *,
        anywhere: bool = False,
        begun: bool = False,
    ) -> int:
        """Write a session and return its TTL in milliseconds. Return 0 if it has ended, because no field was left.

        *anywhere*: raise `Elsewhere` instead of waiting, if the slot of the partition moves.
        *begun*: write it even while the store closes. See `several`.

        Raises ValueError if the session is new, and its identity belongs to another partition than its id.
        """
        key, partition = self.layout.place(session_id)
        new = mode != "update"
        elsewhere = self.layout.home(values.references) not in (None, partition)
        if elsewhere and new:
            mode = "update"  # If there is a session, the write would change its identity, which the script refuses.
        keys = [key, *self.layout.references(values.references, partition)]
        args = [max_age, *expected, str(len(values.pairs)), *values.pairs, *values.gone]
        shared = (mode, str(len(expected) // 3), str(len(values.gone)), *values.counts)
        operation = CREATE if anywhere else SET_EXPECTING if expected else SET
        try:
            ttl: int = await self.engine.run(operation, keys, args, shared=shared, partition=partition, begun=begun)
        except SessionEnded:
            raise
        except SessionNotFound:
            if elsewhere and new:
                raise ValueError(
                    "the identity of a new session is in another partition than its id: use create, or an id of "
                    "create_session_id(identity)"
                ) from None
            raise
        return ttl

    async def create(self, mint: Callable[[int | None], str], values: Encoded, max_age: MaxAge) -> str:
        """Make a session under a new id, and return the id.

        *mint*: returns a new id in a partition; None: in any. If the slot of that one moves, take another id.
        """
        home = self.layout.home(values.references)
        with self.several():
            for _ in range(_TRIES if home is None else 0):
                session_id = mint(None)
                with suppress(Elsewhere):
                    await self.set(session_id, values, max_age, "create", anywhere=True, begun=True)
                    return session_id
            session_id = mint(home)
            await self.set(session_id, values, max_age, "create", begun=True)
            return session_id

    def unset(
        self, session_id: str, fields: Sequence[str], max_age: MaxAge, *, repeatable: bool = True
    ) -> Awaitable[Taken]:
        """Remove fields of a session, and return them."""
        args = [max_age, str(len(fields)), *fields]
        key, partition = self.layout.place(session_id)
        return self.engine.run(UNSET if repeatable else POP, (key,), args, partition=partition)

    def increment(self, session_id: str, field: str, by: int) -> Awaitable[int]:
        """Add to an integer field and return the sum."""
        key, partition = self.layout.place(session_id)
        return self.engine.run(INCREMENT, (key,), (field, str(by)), partition=partition)

    def touch(self, session_id: str, max_age: MaxAge) -> Awaitable[int]:
        """Renew a session and return its TTL in milliseconds. Return 0 if there is no session."""
        key, partition = self.layout.place(session_id)
        return self.engine.run(TOUCH, (key,), (max_age,), partition=partition)

    def delete(
        self, session_id: str, reason: str, expected: Sequence[str | bytes] = (), *, replicas: int = 0
    ) -> Awaitable[bool]:
        """End a session and return True. Return False if it was not alive, or not as expected."""
        key, partition = self.layout.place(session_id)
        shared, args = (str(len(expected) // 3),), (reason, *expected)
        return self.engine.run(DELETE, (key,), args, shared=shared, partition=partition, replicas=replicas)

    async def rotate(
        self,
        session_id: str,
        mint: Callable[[int | None], str],
        values: Encoded,
        max_age: MaxAge,
        *,
        grace: str = "none",
        replicas: int = 0,
    ) -> Rotated:
        """Give a session a new id. The session stays in its partition, unless its new identity belongs to another one.

        *mint*: returns a new id in a partition. *grace*: milliseconds, or "none". *replicas*: see `Engine.run`.
        """
        key, partition = self.layout.place(session_id)
        home = self.layout.home(values.references)
        if home not in (None, partition):
            return await self._rotate_to(session_id, lambda: mint(home), values, max_age, replicas)
        new = mint(partition)
        keys = [key, self.layout.place(new)[0], *self.layout.references(values.references, partition)]
        args = [new, grace, max_age, str(len(values.pairs)), *values.pairs, *values.gone]
        shared = (str(len(values.gone)), *values.counts)
        ttl = await self.engine.run(ROTATE, keys, args, shared=shared, partition=partition, replicas=replicas)
        return Rotated(new, ttl)

    async def _rotate_to(
        self, session_id: str, mint: Callable[[], str], values: Encoded, max_age: MaxAge, replicas: int
    ) -> Rotated:
        """Give a session a new id in another partition, by four scripts. No script can use keys of two partitions.

        1. Read the session.
        2. Write a copy under the new id, with the new values. It lives for a minute, evicts nobody, and is no session
           yet for any other call.
        3. End the session. If a reference has changed since it was read, begin anew instead.
        4. Confirm the copy: write what else has changed, give it its lifetime, and make room for it.

        If the caller stops before step 3, the session stays and the copy expires. A second call with the same new id
        completes the steps that were not answered.
        """
        deadline = asyncio.get_running_loop().time() + self.timeout
        pairs = [*values.pairs] if max_age in ("keep", "renew") else [*values.pairs, "_max_age", max_age]
        written = {str(name).encode() for name in (*pairs[::2], *values.gone, "id")}
        new = mint()
        with self.several():
            for tries in itertools.count(1):
                copy = Copy.of(session_id, (await self.get(session_id, None, begun=True)).pairs, pairs, written)
                if copy.read:
                    try:
                        await self.arrive(new, copy, lives=_ARRIVAL)
                    except Conflict:  # A call with this id was completed, or its copy was ended.
                        new = mint()
                        continue
                    except BaseException:
                        self.discard(new, copy)  # The script may have run, even if the caller was cancelled.
                        raise
                try:
                    retired = await self.retire(session_id, new, copy, replicas)
                except SessionNotFound:
                    self.discard(new, copy)
                    raise
                if retired:
                    ttl = str(retired.ttl) if max_age == "keep" else "renew"
                    with suppress(Conflict):  # Another call with this id was faster. Begin anew, and complete its work.
                        confirmed = await self.confirm(
                            new, ttl, retired, copy, written, lives=_ARRIVAL, replicas=replicas
                        )
                        return Rotated(new, confirmed or retired.ttl)
                if asyncio.get_running_loop().time() >= deadline:
                    if not retired:
                        self.discard(new, copy)
                    break
                await asyncio.sleep(backoff(tries))
        raise StoreUnavailable("other calls changed or moved the session all the time: it could not get a new id")

    async def arrive(self, new: str, copy: Copy, replaces: str = "any", *, lives: int) -> str:
        """Write a copy of a session. Return "", or the name of another copy, which stays.

        *replaces*: the name of another copy that this one may replace, "" for none, or "any". *lives*: milliseconds
        until it expires, if it is not confirmed. Twice the timeout is added, because two more scripts must run.

        Raises `Conflict` if the id was used otherwise.
        """
        before: list[str | bytes] = []
        fields = dict(zip(copy.read[::2], copy.read[1::2], strict=True))
        for name in self.fields.references:
            if (data := fields.get(name.encode())) is not None:
                before += (name, data)
        expires = str(lives + round(self.timeout * 2000))
        args = [copy.name, replaces, expires, str(len(before)), *before, str(len(copy.pairs)), *copy.pairs]
        reply = await self._step(ARRIVE, new, args)
        return reply.decode() if isinstance(reply, bytes) else ""

    async def retire(self, session_id: str, new: str, copy: Copy, replicas: int = 0) -> Retired | None:
        """End a session that has been copied. Return None if its references have changed since then.

        *new*: the id of the copy. A second run, after the first one was done, returns the same for any copy.
        """
        args: list[str | bytes] = [new, copy.name, str(len(copy.read)), *copy.read]
        reply = await self._step(RETIRE, session_id, args, replicas=replicas)
        return None if reply == b"stays" else Retired(*reply)

    async def confirm(
        self,
        new: str,
        ttl: str,
        retired: Retired,
        copy: Copy,
        written: Container[bytes] = frozenset(),
        *,
        lives: int,
        replicas: int = 0,
    ) -> int:
        """Complete a copy, and return its TTL in milliseconds. Return 0 if it was evicted already.

        Call this directly after `retire`.

        *ttl*: milliseconds, or "renew". *written*: the fields of the rotation, which come after those of `retired`.
        *lives*: as in `arrive`, for a copy that must be written again.

        Raises `Conflict` if the session was ended for a copy of another call. That call must write its copy again.
        """
        # Half the life of a tombstone. After its whole life, nothing tells that the copy was confirmed and then ended,
        # so writing it again would revive the session.
        latest = asyncio.get_running_loop().time() + TOMBSTONE / 2000
        changed = zip(retired.values[::2], retired.values[1::2], strict=True)
        values = [part for pair in changed if pair[0] not in written for part in pair]
        gone = [name for name in retired.gone if name not in written]
        args: list[str | bytes] = [retired.copy, ttl, str(len(values)), *values, str(len(gone)), *gone]
        for left in reversed(range(_TRIES)):
            try:
                return int(await self._step(CONFIRM, new, args, replicas=replicas))
            except SessionEnded as error:
                if error.reason != "evicted":
                    raise
                break  # A later login may evict any session, so this is no failure.
            except (Conflict, SessionNotFound):
                # Another call has put its copy in the place of ours, or a new master lacks ours. What has changed was
                # noted against our copy, so write it again.
                late = asyncio.get_running_loop().time() >= latest
                if late or not left or retired.copy != copy.name.encode():
                    raise
                await self.arrive(new, copy, lives=lives)
        return 0

    def discard(self, new: str, copy: Copy) -> None:
        """Remove a copy, and do not wait for that: a caller that was cancelled cannot."""
        _unheeded(self._step(DELETE, new, ["deleted", "_arriving", "holds", copy.name], ("1",)))

    def _step(
        self,
        operation: Operation,
        session_id: str,
        args: Sequence[str | bytes],
        shared: tuple[str, ...] = (),
        replicas: int = 0,
    ) -> Call:
        """Run an operation on one session, as a part of `several`."""
        key, partition = self.layout.place(session_id)
        return self.engine.run(
            operation, (key,), args, shared=shared, partition=partition, begun=True, replicas=replicas
        )

    async def find_by(
        self,
        field: str,
        value: object,
        fields: Sequence[str] | None,
        positions: Sequence[Position],
        *,
        begun: bool = False,
    ) -> list[Found]:
        """Read a page of the sessions with a value at each of these positions.

        *begun*: read it even while the store closes. See `several`.
        """
        number, texts = self.fields.number(field), [(str.__str__(field), reference_value(value, field))]
        wanted = _ALL if fields is None else (str(len(fields)), *fields)
        calls: list[Call] = []
        for at in positions:
            args: list[str | bytes] = [number, at.start, _PAGE, str(len(at.left)), *at.left]
            keys = self.layout.references(texts, at.partition)
            operation = batched(FIND_BY) if at.few else FIND_BY
            calls.append(self.engine.run(operation, keys, args, shared=wanted, partition=at.partition, begun=begun))
        replies = zip(positions, calls, await asyncio.gather(*calls), strict=True)
        return [Found(sessions, at.after(call, cursor, left)) for at, call, (cursor, left, *sessions) in replies]

    async def delete_by(
        self,
        field: str,
        value: object,
        at: Position,
        *,
        token: str,
        reason: str,
        block: str,
        tell: bool,
        keep: Sequence[str],
        required: bool,
        replicas: int = 0,
    ) -> Deleted:
        """End a page of the sessions with a value.

        *token*: the same for all pages of one call. *block*: milliseconds, or "open". *tell*: publish an event of the
        block. *required*: end nothing if a session to keep is not alive.
        """
        number = self.fields.number(field)
        keys = (self.layout.reference(field, value, at.partition), self.layout.fence(field, value, at.partition))
        args: list[str | bytes] = [number, at.start, _PAGE, str(len(at.left)), *at.left]
        args += (token, reason, "tell" if tell else "silent", block)
        args += ("required" if required else "optional", str(len(keep)), *keep)
        call = self.engine.run(DELETE_BY, keys, args, partition=at.partition, begun=True, replicas=replicas)
        cursor, left, ended = await call
        return Deleted(ended, at.after(call, cursor, left))

    def count_by(self, field: str, value: object, partition: int, *, begun: bool = False) -> Awaitable[int]:
        """Return the number of ids in the set of a value in one partition.

        *begun*: count them even while the store closes. See `several`.
        """
        keys = (self.layout.reference(field, value, partition),)
        return self.engine.run(COUNT_BY, keys, partition=partition, begun=begun)

    @contextmanager
    def incompleteness(self, field: str, partition: int, *, begun: bool = False) -> Iterator[Awaitable[str]]:
        """Ask for the mark of a reference whose sets may lack sessions, beside other calls. "": they are complete.

        All partitions have the same answer, but for a moment.

        *begun*: ask even while the store closes. See `several`.
        """
        keys = (self.layout.mark(partition), incomplete(field))
        call = self.engine.run(IS_INCOMPLETE, keys, partition=partition, begun=begun)
        try:
            yield _unheeded(call)
        except GeneratorExit:  # The caller has found enough. An observer should not see that as a failed call.
            raise
        except BaseException:
            call.cancel()  # Nobody waits for it any more, so it need not be retried.
            raise

    def mark(self, field: str, text: str, partition: int) -> Awaitable[object]:
        """Mark a reference in a partition: its sets may lack sessions."""
        keys = (self.layout.mark(partition), incomplete(field), text)
        return self.engine.run(MARK, keys, partition=partition)

    def unmark(self, field: str, partition: int) -> Awaitable[object]:
        """Remove the mark of a reference in a partition, which no store has any more."""
        return self.engine.run(UNMARK, (self.layout.mark(partition), incomplete(field)), partition=partition)

    def complete(self, field: str, token: str, partition: int) -> Awaitable[int]:
        """Remove the mark of a reference in a partition, and return 1. Return 0 if it does not hold the token."""
        args = (incomplete(field), token)
        return self.engine.run(COMPLETE, (self.layout.mark(partition),), args, partition=partition)

    async def inspect(
        self, session_id: str, partition: int, added: Container[str], mode: Mode
    ) -> list[tuple[str, str]]:
        """Return what is wrong with a session: a word and a key each, as `inspect.lua` lists them.

        *added*: the strict references to whose sets a session is added.
        """
        words = ("yes" if field in added else "no" for field in self.fields.references)
        shared = (mode, *words)
        key = (self.layout.place(session_id)[0],)
        reply = await self.engine.run(INSPECT, key, shared=shared, partition=partition)
        found = [part.decode(errors="backslashreplace") for part in reply]
        return list(zip(found[::2], found[1::2], strict=True))

    async def inspect_set(self, key: str, field: str, at: Position, mode: Mode) -> Inspected:
        """Return what is wrong with a page of a reference set."""
        shared = (mode, _PAGE)
        args: list[str | bytes] = [self.fields.number(field), at.start, str(len(at.left)), *at.left]
        call = self.engine.run(INSPECT_REF, (key,), args, shared=shared, partition=at.partition)
        cursor, left, stale, *found = await call
        return Inspected(stale, [word.decode() for word in found], at.after(call, cursor, left))

    def inspect_fence(self, key: str, partition: int, mode: Mode) -> Awaitable[str]:
        """Return what is wrong with a fence, or ""."""
        return self.engine.run(INSPECT_FENCE, (key,), shared=(mode,), partition=partition)

    def claim_sweep(self, milliseconds: int) -> Awaitable[bool]:
        """Return True if no other call has returned True within this time."""
        return self.engine.run(CLAIM, (self.layout.sweeper(), "1", "NX", "PX", str(milliseconds)))

    def blocked(self, field: str, value: object, partition: int) -> Awaitable[int]:
        """Return the milliseconds until the block of a value ends in one partition. Return 0 if it is not blocked."""
        return self.engine.run(BLOCKED, (self.layout.fence(field, value, partition),), partition=partition)

    def unblock(self, field: str, value: object, partition: int) -> Awaitable[int]:
        """Remove the block of a value in one partition. Return 1 if it was blocked, otherwise 0."""
        return self.engine.run(UNBLOCK, (self.layout.fence(field, value, partition),), partition=partition)

    def several(self) -> AbstractContextManager[None]:
        """Return a context for an operation of several calls. A store that closes waits for the end of the context."""
        return self.engine.operation()
