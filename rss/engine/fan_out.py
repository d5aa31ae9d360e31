"""Operations on all sessions with a value of a reference: page by page, and in all partitions at the same time."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

from rss.engine.operations import FEW, Operations, Position
from rss.errors import IncompleteReference, PartlyDone, StoreUnavailable


class FanOut:
    """The operations of one store on reference sets."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._layout = operations.layout

    async def find(
        self, field: str, value: object, fields: Sequence[str] | None, *, begun: bool
    ) -> AsyncGenerator[list[bytes]]:
        """Iterate over the sessions with a value, each as field, data, ... Read a page of each partition at a time.

        *begun*: read even while the store closes.

        Raises `IncompleteReference` at the end if sessions may be missing.
        """
        partitions = self._layout.with_value(field, value)
        with self._operations.incompleteness(field, partitions[0], begun=begun) as incomplete:
            positions = await self._beginnings(field, value, begun=begun)
            while positions:
                pages = await self._operations.find_by(field, value, fields, positions, begun=begun)
                for page in pages:
                    for pairs in page.sessions:
                        yield pairs
                positions = [page.position for page in pages if not page.position.done]
            if await incomplete:
                raise IncompleteReference(field)

    async def delete(
        self,
        field: str,
        value: object,
        *,
        reason: str,
        block: str,
        keep: Mapping[int, Sequence[str]],
        required: bool,
        replicas: int,
    ) -> int:
        """End the sessions with a value, and return their number. Call this in the context `Operations.several`.

        *block*, *required*, *replicas*: as in `Operations.delete_by`, in each partition. *keep*: the ids to keep, by
        their partitions.

        A session that moves to another partition meanwhile, because of a login, may be missed in both. So if sessions
        may move, look at all partitions twice.

        Raises `PartlyDone` if some of several partitions did not answer. Raises `IncompleteReference` if sessions may
        have been missed.
        """
        partitions = self._layout.with_value(field, value)
        moving, ended = self._layout.identity not in (None, field), 0

        async def end(partition: int, token: str, *, required: bool) -> None:
            nonlocal ended
            position, kept = Position(partition), keep.get(partition, ())
            while True:
                page = await self._operations.delete_by(
                    field,
                    value,
                    position,
                    token=token,
                    reason=reason,
                    block=block,
                    tell=partition == partitions[0] and not again,
                    keep=kept,
                    required=required,
                    replicas=replicas,
                )
                ended, position = ended + page.ended, page.position
                if position.done:
                    return

        with self._operations.incompleteness(field, partitions[0], begun=True) as incomplete:
            for again in range(1 + moving):
                token, first = self._layout.mint(), [*keep] if required and not again else []
                for partition in first:  # They may raise that nothing is to end.
                    await end(partition, token, required=True)
                rest = [partition for partition in partitions if partition not in first]
                sizes: Sequence[int | BaseException] = [1] * len(rest)
                if block == "open" and len(rest) > 1:  # A block must reach the partitions without a set, too.
                    calls = (self._operations.count_by(field, value, partition, begun=True) for partition in rest)
                    sizes = await asyncio.gather(*calls, return_exceptions=True)
                endings = [
                    end(partition, token, required=False)
                    for partition, size in zip(rest, sizes, strict=True)
                    if size and not isinstance(size, BaseException)
                ]
                outcomes = await asyncio.gather(*endings, return_exceptions=True)
                _raise_first([*sizes, *outcomes], ended, len(partitions))
            if await incomplete:
                raise IncompleteReference(field, ended)
        return ended

    async def count(self, field: str, value: object) -> int:
        """Return the number of ids in the sets of a value. Raises `IncompleteReference` if ids may be missing."""
        partitions = self._layout.with_value(field, value)
        with self._operations.incompleteness(field, partitions[0]) as incomplete:
            sizes = await asyncio.gather(*(self._operations.count_by(field, value, p) for p in partitions))
            if await incomplete:
                raise IncompleteReference(field, found=sum(sizes))
        return sum(sizes)

    async def blocked(self, field: str, value: object) -> int:
        """Return the milliseconds until the block of a value ends. Return 0 if it is not blocked."""
        partitions = self._layout.with_value(field, value)
        return max(await asyncio.gather(*(self._operations.blocked(field, value, p) for p in partitions)))

    async def unblock(self, field: str, value: object) -> bool:
        """Remove the block of a value, and return whether it was blocked."""
        partitions = self._layout.with_value(field, value)
        return any(await asyncio.gather(*(self._operations.unblock(field, value, p) for p in partitions)))

    async def _beginnings(self, field: str, value: object, *, begun: bool) -> list[Position]:
        """Return the beginnings of the sets of a value."""
        partitions = self._layout.with_value(field, value)
        if len(partitions) == 1:  # Reading an empty set costs no more than asking for its size.
            return [Position(partitions[0])]
        calls = (self._operations.count_by(field, value, partition, begun=begun) for partition in partitions)
        sizes = zip(partitions, await asyncio.gather(*calls), strict=True)
        return [Position(partition, few=size <= FEW) for partition, size in sizes if size]


def _raise_first(outcomes: Sequence[object], ended: int, partitions: int) -> None:
    """Raise the first failure. If all of them are partitions that did not answer, raise `PartlyDone`."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for failure in failures:
        if partitions == 1 or not isinstance(failure, StoreUnavailable):
            raise failure
    if failures:
        raise PartlyDone(ended, len(failures), partitions) from failures[0]
