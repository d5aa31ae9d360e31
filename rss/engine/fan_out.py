"""Operations on all sessions with a value of a reference: page by page, and in all partitions at the same time."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

from rss.engine.operations import Operations, Position
from rss.errors import PartlyDone, StoreUnavailable


class FanOut:
    """The operations of one store on reference sets."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._partitions = range(operations.layout.partitions)

    async def find(
        self, field: str, value: object, fields: Sequence[str] | None, *, begun: bool
    ) -> AsyncGenerator[list[bytes]]:
        """Iterate over the sessions with a value, each as field, data, ... Read a page of each partition at a time.

        *begun*: read even while the store closes.
        """
        found = await self._find_sets(field, value, begun=begun)
        for failure in found.values():
            if failure:
                raise failure
        positions = [Position(partition) for partition in found]
        while positions:
            pages = await asyncio.gather(
                *(self._operations.find_by(field, value, fields, position, begun=begun) for position in positions)
            )
            for page in pages:
                for pairs in page.sessions:
                    yield pairs
            positions = [page.position for page in pages if not page.position.done]

    async def delete(
        self,
        field: str,
        value: object,
        *,
        token: str,
        reason: str,
        block: str,
        keep: Mapping[int, Sequence[str]],
        required: bool,
    ) -> int:
        """End the sessions with a value, and return their number. Call this in the context `Operations.several`.

        *token*, *block*, *required*: as in `Operations.delete_by`, in each partition. *keep*: the ids to keep, by their
        partitions.

        Raises `PartlyDone` if some of several partitions did not answer.
        """
        ended = 0

        async def end(partition: int) -> None:
            nonlocal ended
            position, kept = Position(partition), keep.get(partition, ())
            while True:
                page = await self._operations.delete_by(
                    field, value, position, token=token, reason=reason, block=block, keep=kept, required=required
                )
                ended, position = ended + page.ended, page.position
                if position.done:
                    return

        if len(self._partitions) == 1:
            await end(0)
            return ended
        # A block must reach the partitions without a set, too.
        found = await self._find_sets(field, value, begun=True) if block == "open" else dict.fromkeys(self._partitions)
        reached = [partition for partition, failure in found.items() if not failure]
        outcomes = await asyncio.gather(*map(end, reached), return_exceptions=True)
        failures = [failure for failure in (*found.values(), *outcomes) if failure]
        for failure in failures:
            if not isinstance(failure, StoreUnavailable):
                raise failure
        if failures:
            raise PartlyDone(ended, len(failures), len(self._partitions)) from failures[0]
        return ended

    async def count(self, field: str, value: object) -> int:
        """Return the number of ids in the sets of a value."""
        return sum(await asyncio.gather(*(self._operations.count_by(field, value, p) for p in self._partitions)))

    async def blocked(self, field: str, value: object) -> int:
        """Return the milliseconds until the block of a value ends. Return 0 if it is not blocked."""
        return max(await asyncio.gather(*(self._operations.blocked(field, value, p) for p in self._partitions)))

    async def unblock(self, field: str, value: object) -> bool:
        """Remove the block of a value, and return whether it was blocked."""
        return any(await asyncio.gather(*(self._operations.unblock(field, value, p) for p in self._partitions)))

    async def _find_sets(self, field: str, value: object, *, begun: bool) -> dict[int, BaseException | None]:
        """Return the partitions with a set of a value. A partition without a reply maps to the error."""
        if len(self._partitions) == 1:  # Reading an empty set costs no more than asking for it.
            return {0: None}
        calls = (self._operations.count_by(field, value, p, begun=begun) for p in self._partitions)
        sizes = await asyncio.gather(*calls, return_exceptions=True)
        return {p: size if isinstance(size, BaseException) else None for p, size in enumerate(sizes) if size}
