"""Tasks beside those that know their sessions: large sets, events, and the maintenance."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final, Protocol

from benchmarks.chaos.scene import SECRET, Scene
from rss import SessionError, SessionStore, StoreUnavailable

# More sessions than three pages hold.
_CROWD: Final = 200
# Seconds between two rounds of a task, and of one round of listening.
_PAUSE: Final = 0.2
_LISTENS: Final = 2.0


class Runner(Protocol):
    """A task that works until an event."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until the event."""


class Repeated:
    """A task that repeats an operation, and counts its errors. Of these only a SessionError is right."""

    def __init__(self, scene: Scene, name: str, operation: Callable[[], Awaitable[None]]) -> None:
        self._scene = scene
        self._name = name
        self._operation = operation

    async def run(self, stop: asyncio.Event) -> None:
        """Work until the event."""
        while not stop.is_set():
            await self._scene.open.wait()
            try:
                await self._operation()
            except SessionError as error:
                self._scene.note_text(error)
            except Exception as error:  # noqa: BLE001 - an application must never see one
                self._scene.now.foreign[f"{type(error).__name__} of {self._name}"] += 1
            await asyncio.sleep(_PAUSE)


def runners(store: SessionStore, scene: Scene) -> list[Runner]:
    """Return the tasks."""
    return [
        Repeated(scene, "crowd", partial(_crowd, store, scene)),
        Repeated(scene, "repair", partial(_repair, store)),
        Repeated(scene, "listen", partial(_listen, store)),
    ]


async def _crowd(store: SessionStore, scene: Scene) -> None:
    """Make many sessions with one value, and end all of them. None may live on."""
    value = f"{SECRET}-crowd"
    ids = [await store.create({"ip": value}) for _ in range(_CROWD)]
    while True:
        try:
            await store.delete_by("ip", value)
            break
        except StoreUnavailable as error:
            scene.note_text(error)
    ended = time.perf_counter()
    for session_id in [one for one in ids if await store.get(one)]:
        if scene.is_at_risk(session_id):
            scene.lose("an end", session_id, ended)
        else:
            scene.now.revived += 1


async def _repair(store: SessionStore) -> None:
    """Mend what is wrong, which is nothing: the other tasks notice if it mends what is right."""
    async for _ in store.maintenance.repair():
        pass


async def _listen(store: SessionStore) -> None:
    """Hear what happens, for a while."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LISTENS), store.events() as events:
            async for _ in events:
                pass
