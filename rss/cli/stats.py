"""Count what a store has in Redis, and estimate its size and how much of it is stale."""

import asyncio
import heapq
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, Final

import redis.exceptions

from rss.cli.opening import Store
from rss.engine.lane import Node
from rss.engine.line import Line, line_to
from rss.engine.scan import scan
from rss.engine.scripts import pack
from rss.errors import IncompleteReference, SessionError, StoreUnavailable
from rss.keys import Parsed

# How many ids of a sampled set are looked at.
_IDS: Final = "100"
# How many keys of each kind are sampled in a page of SCAN.
_SAMPLES: Final = 5
# How many large values of a reference are shown, and how many sets are remembered to find them.
_SHOWN: Final = 5
_REMEMBERED: Final = 100
# How many keys are looked at together.
_AT_ONCE: Final = 50


class Statistics:
    """The numbers of one pass over all keys. SCAN may return a key twice, so they are about right."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lines: dict[Node, Line] = {}
        self._begin()

    def _begin(self) -> None:
        """Begin a pass over all keys."""
        #: The number of keys of each kind: "sessions", "tombstones", "fences", "other", and "set <reference>".
        self.keys: Counter[str] = Counter()
        #: The number of ids in the sets of each reference.
        self.ids: Counter[str] = Counter()
        #: The largest values of each reference, each with the number of ids in its sets.
        self.largest: dict[str, list[tuple[str, int]]] = {}
        self._sampled = defaultdict[str, list[int]](list)  # The bytes of some keys of each kind.
        self._looked: Counter[str] = Counter()  # The number of ids of each reference that were looked at.
        self._stale: Counter[str] = Counter()  # The number of these that are stale.
        self._large = defaultdict[str, list[tuple[int, str]]](list)

    @property
    def bytes(self) -> int | None:
        """The estimated size of all keys. None: the user of Redis may not ask for it."""
        if self.keys and not self._sampled:
            return None
        return round(sum(self.keys[kind] * sum(some) / len(some) for kind, some in self._sampled.items()))

    def stale(self, reference: str) -> float | None:
        """Return the estimated share of the ids in the sets of a reference that belong to no live session.

        Return None if there are no ids.
        """
        looked = self._looked[reference]
        return self._stale[reference] / looked if looked else None

    async def count(self, report: Callable[[float], None]) -> None:
        """Look at all keys."""
        operations = self._store.operations
        async with AsyncExitStack() as stack, aclosing(scan(operations.engine.servers, operations.layout)) as pages:
            async for page in pages:
                if page.first:
                    self._begin()
                names = [name.decode(errors="backslashreplace") for name in page.names]
                samples = defaultdict[str, list[str]](list)
                for start in range(0, len(names), _AT_ONCE):
                    some = names[start : start + _AT_ONCE]
                    found = await asyncio.gather(*(self._look(name) for name in some))
                    self.keys.update(kind for kind in found if kind)
                    for kind, name in zip(found, some, strict=True):
                        if kind and len(samples[kind]) < _SAMPLES:
                            samples[kind].append(name)
                await self._sample([(kind, name) for kind in samples for name in samples[kind]], page.node, stack)
                report(page.share)
        for reference, sets in self._large.items():
            values = dict.fromkeys(value for _, value in sorted(sets, reverse=True))
            sizes = [(value, await self._size(reference, value)) for value in values]
            self.largest[reference] = sorted(sizes, key=lambda one: -one[1])[:_SHOWN]

    async def _look(self, name: str) -> str | None:
        """Return the kind of a key. Return None if it is one of the library itself, or has vanished."""
        operations = self._store.operations
        parsed = operations.layout.parse(name)
        try:
            if parsed.kind == "session":
                read = await operations.get(parsed.name, [])
                if read.pairs and read.pairs[1] != parsed.name.encode():  # It is the successor of one with grace.
                    return "tombstones"
                return {b"alive": "sessions", b"ended": "tombstones"}.get(read.state)
            if parsed.kind == "set" and parsed.name in self._store.fields.references:
                return await self._look_at_set(parsed)
        except StoreUnavailable:
            raise
        except (SessionError, ValueError):
            return "other"  # Its type or its value is wrong: `rss check` says so.
        return {"own": None, "fence": "fences"}.get(parsed.kind, "other")

    async def _look_at_set(self, parsed: Parsed) -> str | None:
        count = await self._store.operations.count_by(parsed.name, parsed.value, parsed.partition)
        if not count:
            return None
        self.ids[parsed.name] += count
        large = self._large[parsed.name]
        (heapq.heappush if len(large) < _REMEMBERED else heapq.heappushpop)(large, (count, parsed.value))
        return f"set {parsed.name}"

    async def _size(self, reference: str, value: str) -> int:
        try:
            return await self._store.count_by(reference, value, exact=False)
        except IncompleteReference as error:
            return error.found

    async def _sample(self, keys: list[tuple[str, str]], node: Node, stack: AsyncExitStack) -> None:
        """Ask for the sizes of some keys, each with its kind, and whether ids of the sets among them are stale.

        If Redis refuses to answer for a key, the key is left out.
        """
        sets = [(kind.removeprefix("set "), name) for kind, name in keys if kind.startswith("set ")]
        try:
            line = self._lines.get(node)
            if line is None:
                line = self._lines[node] = await stack.enter_async_context(line_to(node))
            sizes = await line.ask_each(*(pack("MEMORY", "USAGE", name) for _, name in keys)) if keys else []
            members = await line.ask_each(*(pack("SRANDMEMBER", name, _IDS) for _, name in sets)) if sets else []
        except (OSError, redis.exceptions.RedisError):
            self._lines.pop(node, None)
            return
        for (kind, _), used in zip(keys, sizes, strict=True):
            if isinstance(used, int):
                self._sampled[kind].append(used)
        for (reference, _), ids in zip(sets, members, strict=True):
            await self._look_for_stale(reference, ids if isinstance(ids, list) else [])

    async def _look_for_stale(self, reference: str, ids: list[Any]) -> None:
        operations = self._store.operations
        names = (one.decode(errors="backslashreplace") for one in ids)  # Ids that are not UTF-8 are stale.
        reads = await asyncio.gather(*(operations.get(name, []) for name in names))
        self._looked[reference] += len(reads)
        self._stale[reference] += sum(read.state != b"alive" for read in reads)
