"""Check the keys of a store, mend them, and complete the sets of new references, while applications use the store."""

import asyncio
import contextlib
import functools
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, cast

import anyio
import redis.exceptions

from rss.durations import Duration, milliseconds
from rss.engine.failures import failure_of
from rss.engine.lane import Node
from rss.engine.line import line_to
from rss.engine.meta import NEW, forget, mark
from rss.engine.operations import Operations, Position
from rss.engine.scan import scan
from rss.engine.scripts import pack
from rss.errors import IncompleteReference, SessionError
from rss.keys import Parsed

_logger = logging.getLogger("rss")

# How many keys are looked at together: so that each script keeps Redis busy for less than half a millisecond.
_AT_ONCE: Final = 25
# How many stray keys are listed in one pass: another application with the same prefix may have millions.
_MOST_STRAYS: Final = 10_000
# Seconds for some commands outside of the engine.
_PATIENCE: Final = 10.0
# How often `reindex` begins anew because a store has marked a reference meanwhile.
_TRIES: Final = 3

# The kinds of keys that are looked at one by one.
_KNOWN: Final = ("session", "set", "fence")

#: Called with the share of the keys that have been looked at: 0 to 1, about.
Report = Callable[[float], object]

Kind = Literal["outside", "stale", "endless", "short", "wrong type", "misplaced", "stray"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with a key.

    * outside: the set lacks a live session, so operations on the value of its reference miss the session.
    * stale: the set holds ids of sessions that have expired. This is normal: later writes remove them.
    * endless: the key has no TTL.
    * short: the set would expire before a session in it.
    * wrong type: the key holds another type of data than its name says, so calls fail.
    * misplaced: the key is in a partition that the store does not have, or that does not belong to its id.
    * stray: the name or the content of the key is not of this library.
    """

    kind: Kind
    #: The key. It may hold a session id or a value of a reference.
    key: str = field(repr=False)
    #: Whether it was mended: see `Maintenance.repair`.
    mended: bool
    #: How many ids of a set are stale; otherwise 1.
    count: int = 1
    #: The id of the session that its set lacks, or outlives. None: the finding is about the key alone.
    session_id: str | None = field(default=None, repr=False)


class Maintenance:
    """The maintenance of one store.

    All methods may run while applications use the store, and may be stopped and called again. They list the keys by
    SCAN, and look at each session and each page of a set by a script that takes Redis less than two milliseconds. A
    *report* is called with the share of the work that is done. They raise `StoreUnavailable` if a server does not
    answer.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._layout = operations.layout

    def check(self, report: Report = lambda _: None) -> AsyncIterator[Finding]:
        """Iterate over what is wrong. Change nothing."""
        return self._inspect_all(report, mend=False)

    def repair(self, report: Report = lambda _: None) -> AsyncIterator[Finding]:
        """Mend what is wrong, and iterate over it.

        Sessions are added to the sets that lack them, and stale ids leave. Keys without a TTL get one. Keys that are
        misplaced, stray or of a wrong type are removed, unless they belong to another store, whose prefix begins with
        that of this store and a colon. So the prefix must not be shared with another application.

        A session is not added to the sets of a strict reference, because it is revoked if they lack it.
        """
        return self._inspect_all(report, mend=True)

    async def sweep(self, report: Report = lambda _: None) -> int:
        """Remove the stale ids from all reference sets, and return their number."""
        removed = 0
        async for finding in self._inspect(report, ("set",), "set"):
            removed += finding.count if finding.kind == "stale" else 0
        return removed

    @asynccontextmanager
    async def sweeper(self, every: Duration = "10m") -> AsyncIterator[None]:
        """Sweep in the background, while the context is open.

        *every*: the time between two sweeps. If several processes have a sweeper, one of them sweeps in each period.

        So a set never holds the id of a session that expired longer ago than twice this time, plus the time that a
        sweep takes. If Redis does not answer, a warning is logged, and the next sweep is tried.
        """
        period = milliseconds(every, "every")
        async with anyio.create_task_group() as group:
            group.start_soon(self._sweep_forever, period)
            try:
                yield
            finally:
                group.cancel_scope.cancel()

    async def _sweep_forever(self, period: int) -> None:
        while True:
            try:
                if await self._operations.claim_sweep(period):
                    await self.sweep()
            except SessionError as error:
                _logger.warning("the sweep failed: %s", error)
            except RuntimeError:  # The store is closed.
                return
            await asyncio.sleep(period / 1000)

    async def reindex(self, report: Report = lambda _: None) -> list[str]:
        """Complete the sets of the references that are incomplete, and return their names.

        Call this when all processes have the same references. References that the store does not have are forgotten.

        Sessions join the sets of a strict reference only if the reference is new. If some stores lacked it for a while,
        sessions that these have made stay revoked, because nothing tells them from those that were revoked.

        Raises `IncompleteReference` if stores with other references open all the time meanwhile.
        """
        servers, layout = self._operations.engine.servers, self._layout
        async with _step():
            await servers.ready()
        async with _step():
            await forget(layout, self._operations.fields.references, servers.master_of)
        names = [*await self._incomplete()]
        for _ in range(_TRIES):
            if not (left := await self._incomplete()):
                return names
            token = layout.mint()
            for name, kind in left.items():
                async with _step():
                    await mark(layout, [name], f"{kind} {token}", servers.master_of)
            new = [name for name, kind in left.items() if kind == NEW]
            async for _ in self._inspect(report, ("session",), "hash", added=new):
                pass
            for name, kind in left.items():
                partitions = range(layout.partitions)
                await asyncio.gather(*(self._operations.complete(name, f"{kind} {token}", p) for p in partitions))
        if left := await self._incomplete():
            raise IncompleteReference(next(iter(left)))
        return names

    async def _incomplete(self) -> dict[str, str]:
        """Return the kind of the mark of each incomplete reference. If some store lacked it, it is not only new."""
        found: dict[str, str] = {}

        async def ask_for(name: str, partition: int) -> None:
            with self._operations.incompleteness(name, partition) as mark_of:
                kind = (await mark_of).partition(" ")[0]
            if kind:
                found[name] = min(kind, found.get(name, NEW))

        partitions, names = range(self._layout.partitions), self._operations.fields.references
        await asyncio.gather(*(ask_for(name, partition) for name in names for partition in partitions))
        return {name: found[name] for name in names if name in found}

    # One pass over all keys.

    async def _inspect_all(self, report: Report, *, mend: bool) -> AsyncGenerator[Finding]:
        """Look at all keys: first at the sessions, so that their mended keys decide which ids of the sets are stale."""
        seen = set[tuple[str, str, str | None]]()
        for number, kinds in enumerate((("session", "fence", "stray", "misplaced"), ("set",))):
            half = functools.partial(_report_half, report, number)
            async for finding in self._inspect(half, kinds, mend=mend):
                what = finding.kind, finding.key, finding.session_id
                if what not in seen:  # SCAN may return a key twice.
                    if finding.kind != "stale":  # There may be millions of these.
                        seen.add(what)
                    yield finding

    async def _inspect(
        self,
        report: Report,
        kinds: Collection[str],
        type_of_redis: str | None = None,
        *,
        added: Collection[str] = (),
        mend: bool = True,
    ) -> AsyncGenerator[Finding]:
        """Look at the keys of some kinds. *type_of_redis*: look only at keys of this type; None: of all."""
        strays = _Strays()
        async for page in scan(self._operations.engine.servers, self._layout.prefix, type_of_redis):
            parsed = [(name, self._parse(name)) for name in page.names]
            known = [(name.decode(), one) for name, one in parsed if one.kind in kinds and one.kind in _KNOWN]
            for start in range(0, len(known), _AT_ONCE):
                calls = (self._look(*one, added, mend=mend) for one in known[start : start + _AT_ONCE])
                for finding in itertools.chain(*await asyncio.gather(*calls)):
                    yield finding
            for name, one in parsed:
                if one.kind in kinds and one.kind not in _KNOWN:
                    strays.add(name, one, page.node)
            report(page.share)
        for node, keys in strays.by_server():
            removed = await _remove(node, list(keys)) if mend else set()
            for name, kind in keys.items():
                yield Finding(kind, name.decode(errors="backslashreplace"), name in removed)
        report(1)

    def _parse(self, name: bytes) -> Parsed:
        try:
            return self._layout.parse(name.decode())
        except UnicodeDecodeError:
            return Parsed("stray")

    async def _look(self, key: str, parsed: Parsed, added: Collection[str], *, mend: bool) -> list[Finding]:
        """Return what is wrong with a session, a set or a fence."""
        kind, partition = parsed.kind, parsed.partition
        if kind == "session":
            found = await self._operations.inspect(parsed.name, partition, added, mend=mend)
            return [
                Finding(cast("Kind", word), other, mend, session_id=parsed.name if other != key else None)
                for word, other in found
            ]
        if kind == "fence":
            word = await self._operations.inspect_fence(key, partition, mend=mend)
            return [Finding(cast("Kind", word), key, mend)] if word else []
        if parsed.name not in self._operations.fields.references:
            return []  # The set belongs to a reference that the store does not have.
        words, stale, position = dict[str, None](), 0, Position(partition)
        while True:
            page = await self._operations.inspect_set(key, parsed.name, position, mend=mend)
            words |= dict.fromkeys(page.found)
            stale, position = stale + page.stale, page.position
            if position.done:
                break
        findings = [Finding(cast("Kind", word), key, mend) for word in words]
        return [*findings, Finding("stale", key, mend, stale)] if stale else findings


@asynccontextmanager
async def _step() -> AsyncIterator[None]:
    """Run commands outside of the engine. Raises the errors of this library."""
    try:
        async with asyncio.timeout(_PATIENCE):
            yield
    except (OSError, redis.exceptions.RedisError) as error:  # TimeoutError is an OSError.
        raise failure_of(error) from error


def _report_half(report: Report, number: int, share: float) -> None:
    """Report the share of one of two passes as the share of both."""
    report((number + share) / 2)


class _Strays:
    """The keys that are stray or misplaced, without those of other stores whose prefixes begin with the same one."""

    def __init__(self) -> None:
        self._keys: dict[Node, dict[bytes, Kind]] = {}
        self._count = 0
        self._stems: set[bytes] = set()  # The beginnings of the keys of other stores.

    def add(self, name: bytes, parsed: Parsed, node: Node) -> None:
        if name.endswith(b":_meta"):
            self._stems.add(name.removesuffix(b"_meta"))
        elif self._count < _MOST_STRAYS:
            self._count += 1
            self._keys.setdefault(node, {})[name] = cast("Kind", parsed.kind)

    def by_server(self) -> Iterator[tuple[Node, dict[bytes, Kind]]]:
        for node, keys in self._keys.items():
            yield node, {name: kind for name, kind in keys.items() if not any(map(name.startswith, self._stems))}


async def _remove(node: Node, names: Sequence[bytes]) -> set[bytes]:
    """Remove keys, and return those that were removed: not all if a slot has moved, or the server is away."""
    removed = set[bytes]()
    with contextlib.suppress(OSError, redis.exceptions.RedisError):
        async with line_to(node) as line:
            for start in range(0, len(names), _AT_ONCE):
                some = names[start : start + _AT_ONCE]
                replies = await line.ask_each(*(pack("UNLINK", name) for name in some))
                removed.update(
                    name for name, reply in zip(some, replies, strict=True) if not isinstance(reply, Exception)
                )
    return removed
