"""Move all sessions to another Redis or Redis Cluster while applications use them. Nobody is signed out."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Literal, NamedTuple, Unpack

from redis.asyncio import Redis, RedisCluster

from rss.engine.coalesce import backoff
from rss.engine.failures import with_cause
from rss.engine.fan_out import FanOut
from rss.engine.operations import TOMBSTONE, Copy, MaxAge, Operations, Read, Renewal, Retired, Rotated, Taken
from rss.engine.scan import scan
from rss.errors import (
    Conflict,
    IncompleteReference,
    PartlyDone,
    SessionEnded,
    SessionError,
    SessionNotFound,
    StoreUnavailable,
)
from rss.fields import Encoded
from rss.keys import Partitioned
from rss.store import S, SessionStore, StoreOptions

# How many sessions move at the same time.
_AT_ONCE: Final = 100


class Progress(NamedTuple):
    """How many sessions and tombstones were looked at, and how many sessions of these have moved."""

    seen: int
    moved: int


class MovingStore(SessionStore[S]):
    """A store whose sessions come from another one, *source*, which applications have used until now.

    Each operation on a session moves the session first, if it is still at the source. Operations on a reference look at
    both. For a process that still uses the source itself, a session that has moved has ended. When no process uses the
    source itself any more, call `move_all`: it moves the rest. Then the processes change to a plain `SessionStore`, one
    after the other.

    If a process dies while it moves a session, the next operation on the session completes the move. If there is none
    within five minutes, the session is lost.

    The source and this store must have the same references and codec. This store must have partitions, on one Redis
    too. Sessions keep their ids, so if there are several partitions, it must have `partition_by_identity=False`. Grace
    does not follow a session that moves.

    The other options are those of `SessionStore`. This store does not close the source.
    """

    def __init__(
        self, client: Redis | RedisCluster, *, source: SessionStore[S], **options: Unpack[StoreOptions]
    ) -> None:
        super().__init__(client, **options)
        if not isinstance(self.operations.layout, Partitioned):
            # Only there can a copy be told from a session. Elsewhere it would keep the lifetime of a copy: a minute.
            raise ValueError("sessions move into partitions: give the store partitions, such as 64")  # noqa: TRY004 - it is an option
        if self.operations.layout.identity is not None:
            raise ValueError("sessions that move keep their ids: the store must have partition_by_identity=False")
        if self.fields.references != source.fields.references:
            raise ValueError("source must have the same references")
        engine = self.operations.engine
        if engine.description is not None:  # The source may have the same prefix in the same Redis.
            engine.description = {**engine.description, "moving": "yes"}
        self._source = source
        self._moving = _MovingOperations(source.operations, self.operations)
        self._by_reference = _Both(self._moving, FanOut(source.operations), FanOut(self.operations))
        self.operations: Operations = self._moving

    async def move_all(self, report: Callable[[Progress], object] = lambda _: None) -> Progress:
        """Move all sessions that are at the source, and return how many keys of sessions and tombstones were there.

        *report*: called with the progress, about every hundred sessions.

        Call this when no process uses the source itself any more. It may be stopped and called again.

        Raises `StoreUnavailable` if a server does not answer. Raises `SessionError` at the end if some sessions could
        not move, for example because a key of the target holds another type of data.
        """
        progress, waiting, failures = Progress(0, 0), list[str](), list[SessionError]()
        layout = self._source.operations.layout

        async def move() -> None:
            nonlocal progress
            moved = await asyncio.gather(*map(self._moving.bring, waiting), return_exceptions=True)
            failures.extend(_failures(moved))
            progress = Progress(progress.seen + len(moved), progress.moved + sum(one is True for one in moved))
            waiting.clear()
            report(progress)

        async with aclosing(scan(self._source.operations.engine.servers, layout, "hash")) as pages:
            async for page in pages:
                for name in page.names:
                    parsed = layout.parse(name.decode(errors="replace"))  # All keys of the store are UTF-8.
                    if parsed.kind == "session":
                        waiting.append(parsed.name)
                        if len(waiting) == _AT_ONCE:
                            await move()
        if waiting:
            await move()
        if failures:
            raise SessionError(f"{len(failures):,} sessions could not move; the cause tells of one") from failures[0]
        return progress

    async def wait_ended(self, session_id: str) -> str:
        """Wait until a session has ended, and return why, as in `SessionStore`. The session moves first."""
        try:
            await self._moving.bring(session_id)
        except SessionEnded as error:
            return error.reason
        return await super().wait_ended(session_id)


def _failures(outcomes: Sequence[bool | BaseException]) -> list[SessionError]:
    """Return the errors that concern single sessions. Raise any other error, such as `StoreUnavailable`."""
    failures = list[SessionError]()
    for outcome in outcomes:
        if isinstance(outcome, bool | SessionNotFound):
            continue
        if isinstance(outcome, StoreUnavailable) or not isinstance(outcome, SessionError):
            raise outcome
        failures.append(outcome)
    return failures


class _MovingOperations(Operations):
    """The operations of the new store. Each moves its session first."""

    def __init__(self, source: Operations, target: Operations) -> None:
        self.layout, self.scripts, self.engine = target.layout, target.scripts, target.engine
        self.fields, self.timeout = target.fields, target.timeout
        #: The operations of the store that the sessions leave.
        self.source: Operations = source
        self._target = target

    async def bring(self, session_id: str) -> bool:
        """Move a session if it is at the source, and return whether it was.

        Raises `SessionEnded` if it has ended there.
        """
        if (await self._target.get(session_id, [], begun=True)).state != b"absent":
            return False
        deadline, replaces = asyncio.get_running_loop().time() + self.timeout, ""
        with self.source.several(), self._target.several():
            for tries in itertools.count(1):
                # A session must not stay half moved because its caller is cancelled.
                outcome = await asyncio.shield(self._try(session_id, replaces))
                if isinstance(outcome, bool):
                    return outcome
                replaces = outcome
                if asyncio.get_running_loop().time() >= deadline:
                    break
                await asyncio.sleep(backoff(tries))
        raise StoreUnavailable("other calls changed or moved the session all the time: it could not move")

    async def _try(self, session_id: str, replaces: str) -> bool | str:
        """Move a session, and return whether it was at the source.

        Return a text if it must be tried again: the name of a copy that the next try may replace, or "". The next try
        reads the source first, because another call may have ended the session for that copy. *replaces*: the name
        that the last try returned.
        """
        with self.source.several(), self._target.several():
            read = await self.source.get(session_id, None, begun=True)
            if read.state == b"absent":
                return False
            copy = Copy.of(session_id, read.pairs)
            try:
                if copy.read:
                    other = await self._target.arrive(session_id, copy, replaces, lives=TOMBSTONE)
                    if other:
                        return other
                retired = await self.source.retire(session_id, session_id, copy)
                return await self._confirm(session_id, retired, copy) if retired else copy.name
            except Conflict:  # It has moved already.
                return False
            except SessionNotFound as error:
                self._target.discard(session_id, copy)
                if isinstance(error, SessionEnded):
                    raise
                return False

    async def _confirm(self, session_id: str, retired: Retired, copy: Copy) -> bool | str:
        """Complete a move. Return what `_try` returns."""
        try:
            await self._target.confirm(session_id, str(retired.ttl), retired, copy, lives=TOMBSTONE)
        except Conflict:  # The call that has ended it must write its copy again.
            return ""
        except SessionNotFound:  # It has moved already, and has ended or expired since.
            return False
        return True

    async def get(
        self, session_id: str, fields: Sequence[str] | None, renewal: Renewal = (), *, begun: bool = False
    ) -> Read:
        """Read a session."""
        try:
            await self.bring(session_id)
        except SessionEnded as error:
            return Read([], state=b"ended", ended=error.reason)
        return await self._target.get(session_id, fields, renewal, begun=begun)

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
        """Write a session."""
        if mode != "create":
            await self.bring(session_id)
        return await self._target.set(session_id, values, max_age, mode, expected, anywhere=anywhere, begun=begun)

    async def unset(self, session_id: str, fields: Sequence[str], max_age: MaxAge, *, repeatable: bool = True) -> Taken:
        """Remove fields of a session."""
        await self.bring(session_id)
        return await self._target.unset(session_id, fields, max_age, repeatable=repeatable)

    async def increment(self, session_id: str, field: str, by: int) -> int:
        """Add to a field of a session."""
        await self.bring(session_id)
        return await self._target.increment(session_id, field, by)

    async def touch(self, session_id: str, max_age: MaxAge) -> int:
        """Renew a session."""
        try:
            await self.bring(session_id)
        except SessionEnded:
            return 0
        return await self._target.touch(session_id, max_age)

    async def delete(
        self, session_id: str, reason: str, expected: Sequence[str | bytes] = (), *, replicas: int = 0
    ) -> bool:
        """End a session."""
        try:
            await self.bring(session_id)
        except SessionEnded:
            return False
        await self._end_there(session_id, reason)
        return await self._target.delete(session_id, reason, expected, replicas=replicas)

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
        """Give a session a new id."""
        await self.bring(session_id)
        await self._end_there(session_id, "rotated")
        return await self._target.rotate(session_id, mint, values, max_age, grace=grace, replicas=replicas)

    async def _end_there(self, session_id: str, reason: str) -> None:
        """End a session that has moved at the source too, before it ends at the target.

        After a failover of the source, its new master may still hold the session, and the session would move again. If
        the source does not answer, the session lives on at the target, and the caller may call again.
        """
        await self.source.delete(session_id, reason)


class _Both(FanOut):
    """Operations on a reference in both stores. First the source: a session that leaves it is found in the target."""

    def __init__(self, operations: _MovingOperations, source: FanOut, target: FanOut) -> None:
        super().__init__(operations)
        self._moving = operations
        self._source = source
        self._target = target

    async def find(
        self, field: str, value: object, fields: Sequence[str] | None, *, begun: bool
    ) -> AsyncGenerator[list[bytes]]:
        """Iterate over the sessions with a value. One that moves meanwhile may come twice."""
        failure = None
        for one in (self._source, self._target):
            try:
                async for pairs in one.find(field, value, fields, begun=begun):
                    yield pairs
            except IncompleteReference as error:  # The other store may have more.
                failure = error
        if failure:
            raise failure

    async def delete(self, field: str, value: object, *, keep: Mapping[int, Sequence[str]], **options: Any) -> int:
        """End the sessions with a value, except those to keep, which move first."""
        required, first = options.pop("required"), 0
        for session_id in (session_id for ids in keep.values() for session_id in ids):
            try:
                await self._moving.bring(session_id)
            except SessionNotFound:
                if required:
                    raise
        if required:  # It may raise that nothing is to end.
            first = await self._target.delete(field, value, keep=keep, required=True, **options)
        here = await _ended(self._source.delete(field, value, keep={}, required=False, **options))
        there = await _ended(self._target.delete(field, value, keep=keep, required=False, **options))
        ended = first + here.ended + there.ended
        failures = [failure for failure in (here.failure, there.failure) if failure]
        for failure in failures:
            if isinstance(failure, IncompleteReference):
                raise with_cause(IncompleteReference(failure.field, ended), failure)
        unfinished = sum(failure.unfinished for failure in failures if isinstance(failure, PartlyDone))
        if unfinished:
            layouts = self._moving.source.layout, self._moving.layout
            partitions = sum(len(layout.with_value(field, value)) for layout in layouts)
            raise PartlyDone(ended, unfinished, partitions) from failures[0]
        return ended

    async def count(self, field: str, value: object) -> int:
        """Return the number of ids in the sets of a value."""
        found, failure = 0, None
        for one in (self._source, self._target):
            try:
                found += await one.count(field, value)
            except IncompleteReference as error:
                found, failure = found + error.found, error
        if failure:
            raise with_cause(IncompleteReference(field, found=found), failure)
        return found

    async def blocked(self, field: str, value: object) -> int:
        """Return the milliseconds until the block of a value ends. Return 0 if it is not blocked."""
        return max(await self._source.blocked(field, value), await self._target.blocked(field, value))

    async def unblock(self, field: str, value: object) -> bool:
        """Remove the block of a value, and return whether it was blocked."""
        return await self._source.unblock(field, value) | await self._target.unblock(field, value)


class _Ended(NamedTuple):
    """The number of sessions that ended in one store, and why others may not have ended."""

    ended: int
    failure: IncompleteReference | PartlyDone | None


async def _ended(deleting: Awaitable[int]) -> _Ended:
    """Let one store end what it can, so that the other one has its turn too."""
    try:
        return _Ended(await deleting, None)
    except (IncompleteReference, PartlyDone) as error:
        return _Ended(error.ended, error)
    except StoreUnavailable as error:  # A store with one partition does not raise PartlyDone.
        return _Ended(0, with_cause(PartlyDone(0, 1, 1), error))
