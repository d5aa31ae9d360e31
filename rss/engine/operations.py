"""The operations: the properties of each, and a typed method that sends it and reads the reply.

Each method takes encoded values, builds the keys, and converts the reply to a named tuple or a plain type. The header
of each script describes its arguments.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Final, Literal, NamedTuple

from redis.asyncio import Redis, RedisCluster

from rss.engine.coalesce import Elsewhere, Operation
from rss.engine.engine import Engine
from rss.engine.scripts import Scripts, schema
from rss.fields import Encoded, Fields
from rss.keys import Layout, Partitioned

_READ: Final = ("sets", "session", "read")
_MOVE: Final = ("sets", "session", "write", "renew", "end", "fence", "move")

GET: Final = Operation("get", _READ)
GET_AND_RENEW: Final = Operation("get_and_renew", (*_READ, "renew"))
SET: Final = Operation("set_with_refs", (*_MOVE, "expect"), sized=True)
#: Not repeatable: a second run would take the write of the first for a conflict.
SET_EXPECTING: Final = replace(SET, repeatable=False)
#: A new session may be in any partition.
CREATE: Final = replace(SET, anywhere=True)
UNSET: Final = Operation("unset_with_refs", _MOVE)
#: Not repeatable: a second run would return nothing, because the first has removed the fields.
POP: Final = replace(UNSET, repeatable=False)
INCREMENT: Final = Operation("increment", ("sets", "session", "write"), repeatable=False)
TOUCH: Final = Operation("touch", ("sets", "session", "renew"))
DELETE: Final = Operation("delete_with_refs", ("sets", "session", "expect", "end"))
ROTATE: Final = Operation("rotate_with_refs", _MOVE, sized=True)
FIND_BY: Final = Operation("find_by_ref", (*_READ, "page"), batched=False)
DELETE_BY: Final = Operation(
    "delete_by_ref", ("sets", "session", "write", "end", "fence", "page", "rounds"), batched=False, sized=True
)
COUNT_BY: Final = Operation("count_by_ref", ())
BLOCKED: Final = Operation("blocked", ())
UNBLOCK: Final = Operation("unblock", ())

ALL: Final = (
    GET, GET_AND_RENEW, SET, UNSET, INCREMENT, TOUCH, DELETE, ROTATE, FIND_BY, DELETE_BY, COUNT_BY, BLOCKED, UNBLOCK,
)  # fmt: skip

#: The lifetime of a tombstone in milliseconds: longer than any request that was in flight when the session ended.
TOMBSTONE: Final = 300_000
#: The approximate number of sessions in a page. They keep Redis busy for one or two milliseconds.
_PAGE: Final = "50"

# How many ids to try for a new session before waiting for a slot that moves.
_TRIES: Final = 4
# The argument to read all fields.
_ALL: Final = ("all",)

#: The lifetime of a session from now on: milliseconds, "renew" for the present max_age, or "keep" to leave the TTL.
MaxAge = str
#: When a read renews: () for never, ("always",), or ("after", milliseconds). ("check", milliseconds) only reports it.
Renewal = tuple[str, ...]


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


class Position(NamedTuple):
    """The position of an operation in the reference set of a value in one partition.

    *cursor*: the cursor of SSCAN. *left*: the ids that the last page did not handle in time.
    """

    partition: int = 0
    cursor: bytes = b"0"
    left: tuple[bytes, ...] = ()

    @property
    def done(self) -> bool:
        """Whether the last page has been handled."""
        return self.cursor == b"0" and not self.left


class Found(NamedTuple):
    """A page of sessions, each as field, data, ..."""

    sessions: list[list[bytes]]
    position: Position


class Deleted(NamedTuple):
    """The number of sessions that a page has ended."""

    ended: int
    position: Position


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
    ) -> None:
        self.layout = layout
        self._fields = fields
        lua = schema(
            fields.references,
            max_age=max_age,
            max_lifetime=max_lifetime,
            tombstone=TOMBSTONE,
            json=json,
            before_value=layout.before_value,
            ending=layout.ending,
        )
        #: The assembled scripts.
        parts = {operation.script: operation.parts for operation in ALL}
        self.scripts = Scripts(lua, parts, partitioned=isinstance(layout, Partitioned))
        #: The engine that runs the scripts.
        self.engine = Engine(client, self.scripts, layout, timeout)

    async def get(self, session_id: str, fields: Sequence[str] | None, renewal: Renewal = ()) -> Read:
        """Read a session with its id: all fields, or only *fields*."""
        shared = _ALL if fields is None else (str(len(fields)), *fields)
        operation = GET
        if renewal:
            operation, shared = GET_AND_RENEW, shared + renewal
        key, partition = self.layout.place(session_id)
        reply = await self.engine.run(operation, (key,), shared=shared, partition=partition)
        state = reply.pop()
        if state == b"absent":
            return Read([], state=state)
        if state == b"ended":
            return Read([], state=state, ended=reply[0].decode())
        return Read(reply, reply.pop(), state)

    async def set(
        self,
        session_id: str,
        values: Encoded,
        max_age: MaxAge,
        mode: Literal["set", "update", "create"],
        expected: Sequence[str | bytes] = (),
        *,
        anywhere: bool = False,
    ) -> int:
        """Write a session and return its TTL in milliseconds. Return 0 if it has ended, because no field was left.

        *anywhere*: raise `Elsewhere` instead of waiting, if the slot of the partition moves.
        """
        key, partition = self.layout.place(session_id)
        keys = [key, *self.layout.references(values.references, partition)]
        args = [max_age, *expected, str(len(values.pairs)), *values.pairs, *values.gone]
        shared = (mode, str(len(expected) // 3), str(len(values.gone)), *values.counts)
        operation = CREATE if anywhere else SET_EXPECTING if expected else SET
        ttl: int = await self.engine.run(operation, keys, args, shared=shared, partition=partition)
        return ttl

    async def create(self, mint: Callable[[], str], values: Encoded, max_age: MaxAge) -> str:
        """Make a session under a new id, and return the id. If the slot of its partition moves, take another id."""
        for _ in range(_TRIES):
            session_id = mint()
            try:
                await self.set(session_id, values, max_age, "create", anywhere=True)
            except Elsewhere:
                continue
            return session_id
        session_id = mint()
        await self.set(session_id, values, max_age, "create")
        return session_id

    async def unset(self, session_id: str, fields: Sequence[str], max_age: MaxAge, *, repeatable: bool = True) -> Taken:
        """Remove fields of a session, and return them."""
        args = [max_age, str(len(fields)), *fields]
        key, partition = self.layout.place(session_id)
        reply = await self.engine.run(UNSET if repeatable else POP, (key,), args, partition=partition)
        return Taken(reply, ttl=reply.pop())

    async def increment(self, session_id: str, field: str, by: int) -> int:
        """Add to an integer field and return the sum."""
        key, partition = self.layout.place(session_id)
        return int(await self.engine.run(INCREMENT, (key,), (field, str(by)), partition=partition))

    async def touch(self, session_id: str, max_age: MaxAge) -> int:
        """Renew a session and return its TTL in milliseconds. Return 0 if there is no session."""
        key, partition = self.layout.place(session_id)
        ttl: int = await self.engine.run(TOUCH, (key,), (max_age,), partition=partition)
        return ttl

    async def delete(self, session_id: str, reason: str, expected: Sequence[str | bytes] = ()) -> bool:
        """End a session and return True. Return False if it was not alive, or not as expected."""
        key, partition = self.layout.place(session_id)
        shared = (str(len(expected) // 3),)
        return bool(await self.engine.run(DELETE, (key,), (reason, *expected), shared=shared, partition=partition))

    async def rotate(self, session_id: str, new: str, values: Encoded, max_age: MaxAge, grace: str = "none") -> int:
        """Give a session a new id in the same partition, and return its TTL in milliseconds.

        *grace*: milliseconds, or "none".
        """
        (key, partition), (new_key, new_partition) = self.layout.place(session_id), self.layout.place(new)
        if partition != new_partition:
            raise ValueError("the new id is of another partition than the old one")
        keys = [key, new_key, *self.layout.references(values.references, partition)]
        args = [new, grace, max_age, str(len(values.pairs)), *values.pairs, *values.gone]
        shared = (str(len(values.gone)), *values.counts)
        ttl: int = await self.engine.run(ROTATE, keys, args, shared=shared, partition=partition)
        return ttl

    async def find_by(
        self, field: str, value: object, fields: Sequence[str] | None, at: Position, *, begun: bool = False
    ) -> Found:
        """Read a page of the sessions with a value.

        *begun*: read it even while the store closes. See `several`.
        """
        number = self._fields.number(field)
        wanted = _ALL if fields is None else (str(len(fields)), *fields)
        args: list[str | bytes] = [*wanted, number, at.cursor, _PAGE, str(len(at.left)), *at.left]
        keys = (self.layout.reference(field, value, at.partition),)
        cursor, left, *sessions = await self.engine.run(FIND_BY, keys, args, partition=at.partition, begun=begun)
        return Found(sessions, Position(at.partition, cursor, tuple(left)))

    async def delete_by(
        self,
        field: str,
        value: object,
        at: Position,
        *,
        token: str,
        reason: str,
        block: str,
        keep: Sequence[str],
        required: bool,
    ) -> Deleted:
        """End a page of the sessions with a value.

        *token*: the same for all pages of one call. *block*: milliseconds, or "open". *required*: end nothing if a
        session to keep is not alive.
        """
        number = self._fields.number(field)
        keys = (self.layout.reference(field, value, at.partition), self.layout.fence(field, value, at.partition))
        args: list[str | bytes] = [number, at.cursor, _PAGE, str(len(at.left)), *at.left]
        args += (token, reason, block, "required" if required else "optional", str(len(keep)), *keep)
        cursor, left, ended = await self.engine.run(DELETE_BY, keys, args, partition=at.partition, begun=True)
        return Deleted(ended, Position(at.partition, cursor, tuple(left)))

    def count_by(self, field: str, value: object, partition: int, *, begun: bool = False) -> Awaitable[int]:
        """Return the number of ids in the set of a value in one partition.

        *begun*: as in `find_by`.
        """
        keys = (self.layout.reference(field, value, partition),)
        return self.engine.run(COUNT_BY, keys, partition=partition, begun=begun)

    def blocked(self, field: str, value: object, partition: int) -> Awaitable[int]:
        """Return the milliseconds until the block of a value ends in one partition. Return 0 if it is not blocked."""
        return self.engine.run(BLOCKED, (self.layout.fence(field, value, partition),), partition=partition)

    def unblock(self, field: str, value: object, partition: int) -> Awaitable[int]:
        """Remove the block of a value in one partition. Return 1 if it was blocked, otherwise 0."""
        return self.engine.run(UNBLOCK, (self.layout.fence(field, value, partition),), partition=partition)

    def several(self) -> AbstractContextManager[None]:
        """Return a context for an operation of several calls. A store that closes waits for the end of the context."""
        return self.engine.operation()
