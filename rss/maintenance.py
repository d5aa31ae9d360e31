"""Check the keys of a store, mend them, and complete the sets of new references, while applications use the store."""

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar, cast

import redis.exceptions

from rss.engine.failures import code_of, failure_of
from rss.engine.lane import Node, Servers
from rss.engine.line import Attempts, line_to
from rss.engine.meta import LACKED, NEW, forget, held_by, known_references
from rss.engine.operations import Mode, Operations, Position
from rss.engine.scan import scan
from rss.engine.scripts import pack
from rss.errors import IncompleteReference, SessionError
from rss.keys import Parsed

_T = TypeVar("_T")
_logger = logging.getLogger("rss")

# How many keys are looked at together. With more of them, each script would keep Redis busy for longer.
_AT_ONCE: Final = 15
# How many stray keys are listed in one pass: another application with the same prefix may have millions.
_MOST_STRAYS: Final = 10_000
# How many findings are remembered, so that a key that SCAN returns twice is reported once. There may be millions.
_MOST_SEEN: Final = 100_000
# How many calls are made at a time, of one for each reference and partition.
_CALLS: Final = 200
# Seconds for some commands outside of the engine, with all attempts.
_PATIENCE: Final = 10.0
# After each page, the sweeper sleeps so many times as long as the page took: Redis serves others meanwhile.
_REST: Final = 3
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
    SCAN, and look at sessions and sets by short scripts, which usually keep Redis busy for less than a millisecond. A
    *report* is called with the share of the work that is done. They raise `StoreUnavailable` if a server does not
    answer.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._layout = operations.layout

    def check(self, report: Report = lambda _: None) -> AsyncGenerator[Finding]:
        """Iterate over what is wrong. Change nothing."""
        return self._inspect_all(report, "check")

    async def repair(self, report: Report = lambda _: None) -> AsyncGenerator[Finding]:
        """Mend what is wrong, and iterate over it.

        Sessions are added to the sets that lack them, and stale ids leave. Keys without a TTL get one. Keys that are
        misplaced, stray or of a wrong type are removed, unless they belong to another store, whose prefix begins with
        that of this store and a colon. So the prefix must not be shared with another application.

        A session is not added to the sets of a strict reference, because it is revoked if they lack it.

        Raises `SessionError` while sessions move to the store: those that have not moved may have the same prefix.
        """
        servers = self._operations.engine.servers
        held = await _outside(servers, lambda: held_by(self._layout, servers.master_of))
        if held and held.moving:
            raise SessionError(
                "sessions move to this store, and a repair could remove those that have not moved: first let all "
                "processes use a plain SessionStore"
            )
        async with aclosing(self._inspect_all(report, "mend_and_remove")) as findings:
            async for finding in findings:
                yield finding

    async def sweep(self, report: Report = lambda _: None) -> int:
        """Remove the stale ids from all reference sets, and return their number. Sets without a TTL get one."""
        return await self._sweep(report)

    async def sweep_forever(self, period: float) -> None:
        """Sweep once in each period of seconds, until the store is closed: see `SessionStore.sweeper`."""
        while not self._operations.engine.closed:
            try:
                if await self._operations.claim_sweep(round(period * 1000)):
                    await self._sweep(rest=_REST)
            except Exception as error:  # noqa: BLE001 - the next sweep may succeed
                if not self._operations.engine.closed:
                    why = error if isinstance(error, SessionError) else type(error).__name__
                    _logger.warning("the sweep failed: %s", why)
            await asyncio.sleep(period)

    async def _sweep(self, report: Report = lambda _: None, *, rest: float = 0) -> int:
        removed = 0
        async with aclosing(self._inspect(report, ("set",), "mend", "set", rest=rest)) as findings:
            async for finding in findings:
                removed += finding.count if finding.kind == "stale" else 0
        return removed

    async def reindex(self, report: Report = lambda _: None) -> list[str]:
        """Complete the sets of the references that are incomplete, and return their names.

        Call this when all processes have the same references. References that the store does not have are forgotten.
        Sessions and sets without a TTL get one. No key is removed.

        Sessions join the sets of a strict reference only if the reference is new. If some stores lacked it for a while,
        sessions that these have made stay revoked, because nothing tells them from those that were revoked.

        Raises `IncompleteReference` if stores with other references open all the time meanwhile.
        """
        operations, partitions = self._operations, range(self._layout.partitions)
        servers, references = operations.engine.servers, operations.fields.references
        known = await _outside(servers, lambda: known_references(self._layout, servers.master_of))
        others = [name for name in known if name not in references]
        await _in_turn(operations.unmark(name, p) for name in others for p in partitions)
        await _outside(servers, lambda: forget(self._layout, others, servers.master_of))
        names = [*await self._incomplete()]
        for _ in range(_TRIES):
            if not (left := await self._incomplete()):
                return names
            marks = {name: f"{kind} {self._layout.mint()}" for name, kind in left.items()}
            await _in_turn(operations.mark(name, text, p) for name, text in marks.items() for p in partitions)
            new = [name for name, kind in left.items() if kind == NEW]
            async with aclosing(self._inspect(report, ("session",), "mend", "hash", added=new)) as findings:
                async for _ in findings:
                    pass
            await _in_turn(operations.complete(name, text, p) for name, text in marks.items() for p in partitions)
        if left := await self._incomplete():
            raise IncompleteReference(next(iter(left)))
        return names

    async def _incomplete(self) -> dict[str, str]:
        """Return the kind of the mark of each incomplete reference: `NEW`, unless some store lacked it."""
        found: dict[str, str] = {}

        async def ask_for(name: str, partition: int) -> None:
            with self._operations.incompleteness(name, partition) as mark_of:
                kind = (await mark_of).partition(" ")[0]
            if kind and found.get(name) != LACKED:
                found[name] = kind

        partitions, names = range(self._layout.partitions), self._operations.fields.references
        await _in_turn(ask_for(name, partition) for name in names for partition in partitions)
        return {name: found[name] for name in names if name in found}

    # One pass over all keys.

    async def _inspect_all(self, report: Report, mode: Mode) -> AsyncGenerator[Finding]:
        """Look at all keys: first at the sessions, so that their mended keys decide which ids of the sets are stale."""
        seen, others = set[tuple[str, str, str | None]](), await self._stems()
        for number, kinds in enumerate((("session", "fence", "stray", "misplaced"), ("set",))):
            half = functools.partial(_report_half, report, number)
            async with aclosing(self._inspect(half, kinds, mode, others=others)) as findings:
                async for finding in findings:
                    what = finding.kind, finding.key, finding.session_id
                    if what not in seen:  # SCAN may return a key twice.
                        if finding.kind != "stale" and len(seen) < _MOST_SEEN:
                            seen.add(what)
                        yield finding

    async def _inspect(
        self,
        report: Report,
        kinds: Collection[str],
        mode: Mode,
        type_of_redis: str | None = None,
        *,
        added: Collection[str] = (),
        others: tuple[bytes, ...] = (),
        rest: float = 0,
    ) -> AsyncGenerator[Finding]:
        """Look at the keys of some kinds.

        *type_of_redis*: look only at keys of this type; None: of all. *others*: the beginnings of keys of other stores,
        which are left out: some may look like keys of this one. *rest*: after each page, sleep so many times as
        long as it took.
        """
        strays, servers = _Strays(), self._operations.engine.servers
        began = time.monotonic()
        async with aclosing(scan(servers, self._layout, type_of_redis)) as pages:
            async for page in pages:
                parsed = [(name, self._parse(name)) for name in page.names if not name.startswith(others)]
                known = [(name.decode(), one) for name, one in parsed if one.kind in kinds and one.kind in _KNOWN]
                for start in range(0, len(known), _AT_ONCE):
                    calls = (self._look(*one, added, mode) for one in known[start : start + _AT_ONCE])
                    for finding in itertools.chain(*await asyncio.gather(*calls)):
                        yield finding
                for name, one in parsed:
                    if one.kind in kinds and one.kind not in _KNOWN:
                        strays.add(name, one, page.node)
                report(page.share)
                await asyncio.sleep(rest * (time.monotonic() - began))
                began = time.monotonic()
        async for finding in self._report_strays(strays, mode):
            yield finding
        report(1)

    async def _report_strays(self, strays: "_Strays", mode: Mode) -> AsyncGenerator[Finding]:
        # Another store may have been opened meanwhile.
        others = await self._stems() if strays.count and mode == "mend_and_remove" else ()
        for node, keys in strays.by_server(others):
            removed = await _remove(node, list(keys)) if mode == "mend_and_remove" else set()
            for name, kind in keys.items():
                yield Finding(kind, name.decode(errors="backslashreplace"), name in removed)
        if strays.count == _MOST_STRAYS:
            _logger.warning("there may be more than %d keys that are stray or misplaced: call again", _MOST_STRAYS)

    async def _stems(self) -> tuple[bytes, ...]:
        """Return the beginnings of the keys of other stores, whose prefixes begin with that of this one."""
        async with aclosing(scan(self._operations.engine.servers, self._layout, "hash", ending=":_meta")) as pages:
            names = {name async for page in pages for name in page.names}
        return tuple(name.removesuffix(b"_meta") for name in names if self._parse(name).kind == "stray")

    def _parse(self, name: bytes) -> Parsed:
        try:
            return self._layout.parse(name.decode())
        except UnicodeDecodeError:
            return Parsed("stray")

    async def _look(self, key: str, parsed: Parsed, added: Collection[str], mode: Mode) -> list[Finding]:
        """Return what is wrong with a session, a set or a fence."""
        kind, partition, mended = parsed.kind, parsed.partition, mode != "check"
        if kind == "session":
            found = await self._operations.inspect(parsed.name, partition, added, mode)
            return [
                Finding(cast("Kind", word), other, mended, session_id=parsed.name if other != key else None)
                for word, other in found
            ]
        if kind == "fence":
            word = await self._operations.inspect_fence(key, partition, mode)
            return [Finding(cast("Kind", word), key, mended)] if word else []
        if parsed.name not in self._operations.fields.references:
            return []  # The set belongs to a reference that the store does not have.
        words, stale, position = dict[str, None](), 0, Position(partition)
        while True:
            page = await self._operations.inspect_set(key, parsed.name, position, mode)
            words |= dict.fromkeys(page.found)
            stale, position = stale + page.stale, page.position
            if position.done:
                break
        findings = [Finding(cast("Kind", word), key, mended) for word in words]
        return [*findings, Finding("stale", key, mended, stale)] if stale else findings


async def _in_turn(calls: Iterable[Awaitable[object]]) -> None:
    """Make calls, some at a time: others must find room in the queues."""
    rest = iter(calls)
    while some := list(itertools.islice(rest, _CALLS)):
        await asyncio.gather(*some)


async def _outside(servers: Servers, work: Callable[[], Awaitable[_T]]) -> _T:
    """Run commands outside of the engine. If the server is another one meanwhile, run them again there.

    Raises the errors of this library.
    """
    attempts = Attempts()
    try:
        async with asyncio.timeout(_PATIENCE):
            while True:
                try:
                    await servers.ready()
                    return await work()
                except (OSError, redis.exceptions.RedisError) as error:  # TimeoutError is an OSError.
                    if final := await attempts.failed(error):
                        raise final from error
    except TimeoutError as error:
        raise failure_of(error) from error


def _report_half(report: Report, number: int, share: float) -> None:
    """Report the share of one of two passes as the share of both."""
    report((number + share) / 2)


class _Strays:
    """The keys that are stray or misplaced."""

    def __init__(self) -> None:
        #: How many there are.
        self.count = 0
        self._keys: dict[Node, dict[bytes, Kind]] = {}

    def add(self, name: bytes, parsed: Parsed, node: Node) -> None:
        keys = self._keys.setdefault(node, {})
        if self.count < _MOST_STRAYS and name not in keys:
            self.count += 1
            keys[name] = cast("Kind", parsed.kind)

    def by_server(self, others: tuple[bytes, ...]) -> Iterator[tuple[Node, dict[bytes, Kind]]]:
        """Iterate over the servers and their keys, without those that begin like keys of other stores."""
        for node, keys in self._keys.items():
            yield node, {name: kind for name, kind in keys.items() if not name.startswith(others)}


async def _remove(node: Node, names: Sequence[bytes]) -> set[bytes]:
    """Remove keys, and return those that were removed: not all if a slot has moved, or the server is away."""
    removed, failure = set[bytes](), None
    try:
        async with line_to(node) as line:
            for start in range(0, len(names), _AT_ONCE):
                some = names[start : start + _AT_ONCE]
                replies = await line.ask_each(*(pack("UNLINK", name) for name in some))
                for name, reply in zip(some, replies, strict=True):
                    if isinstance(reply, Exception):
                        failure = reply
                    else:
                        removed.add(name)
    except (OSError, redis.exceptions.RedisError) as error:
        failure = error
    if failure:
        _logger.warning("some keys were not removed: %s", code_of(failure) or failure_of(failure))
    return removed
