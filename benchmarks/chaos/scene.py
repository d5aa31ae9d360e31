"""A deployment under load: its phases, the faults that happen in them, and what the tasks count."""

import asyncio
import inspect
import logging
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

from redis.crc import key_slot

from rss import SessionError, StoreUnavailable
from rss.keys import SLOTS, Layout

#: The beginning of every value of a reference. No error and no log record may hold it.
SECRET: Final = "SECRET"  # noqa: S105 - it is none
#: All slots: every acknowledged write is at risk.
EVERYTHING: Final = range(SLOTS)
# Seconds over which the throughput is measured.
_WINDOW: Final = 0.25
# Seconds after a master has stopped in which its last replies may still reach the process.
_UNDER_WAY: Final = 0.5
# The most seconds by which a replica lags behind its master.
_LAG: Final = 0.5
# A session id: 24 bytes in URL-safe Base64.
_ID: Final = re.compile(r"(?<![\w-])[\w-]{32}(?![\w-])")


@dataclass
class Phase:
    """The counts of one fault, or of several rounds of it."""

    name: str
    #: Why the fault was left out. None: it was not.
    skipped: str | None = None
    seconds: float = 0
    #: Seconds from the end of the fault until the throughput was as before. None: it never was.
    recovered: float | None = 0
    #: Seconds of each operation, until the throughput was as before.
    times: list[float] = field(default_factory=list)
    #: Operations that raised a SessionError, by class and operation.
    errors: Counter[str] = field(default_factory=Counter)
    #: The errors of operations that this fault must not disturb.
    unexpected: Counter[str] = field(default_factory=Counter)
    #: Errors of other libraries.
    foreign: Counter[str] = field(default_factory=Counter)
    #: Acknowledged writes that were lost, and those of them that the server must not lose.
    lost: int = 0
    inexcusable: Counter[str] = field(default_factory=Counter)
    #: Increments that were applied twice.
    duplicated: int = 0
    #: Sessions that had ended, and live again.
    revived: int = 0
    #: Live sessions that a reference set lacked.
    unreachable: int = 0
    #: Everything else that differs from the model.
    wrong: Counter[str] = field(default_factory=Counter)
    #: Texts of errors and log records that hold a session id or a value.
    leaks: int = 0
    #: What the plain commands of redis-py counted.
    plain: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Phase") -> None:
        """Add the counts of another round."""
        self.seconds += other.seconds
        both = self.recovered, other.recovered
        self.recovered = None if both[0] is None or both[1] is None else max(both[0], both[1])
        self.times += other.times
        for name in ("errors", "unexpected", "inexcusable", "foreign", "wrong", "plain"):
            getattr(self, name).update(getattr(other, name))
        for name in ("lost", "duplicated", "revived", "unreachable", "leaks"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class Fault:
    """A fault, and what it excuses."""

    name: str
    #: Cause the fault, and return when it is over. A coroutine function runs in the loop, another one in a thread.
    act: Callable[[], object]
    #: Any acknowledged write may be lost.
    lossy: bool = False
    #: A write may take effect after its call has failed, until the fault is over.
    late: bool = False
    #: A write may even take effect again after a retry of it was acknowledged.
    repeats: bool = False
    #: Any operation may fail. Otherwise only `increment` may, because it is never run twice, and a durable operation
    #: without a replica.
    refuses: bool = False
    #: The share of the quiet throughput at which the deployment has recovered.
    recovered: float = 0.9
    #: Why it cannot happen here. None: it can.
    lacks: str | None = None


class Worker(Protocol):
    """A task that works on sessions of its own."""

    async def run(self, stop: asyncio.Event) -> None:
        """Work until the event."""

    async def rest(self) -> None:
        """Return when the operation that runs has ended."""

    async def settle(self) -> None:
        """Compare all sessions with the model."""


class Scene:
    """The phases so far, of which the last one is running, and what the running one excuses."""

    def __init__(self, layout: Layout, quiet: int, patience: float) -> None:
        self.layout = layout
        #: Windows of quiet before each fault, and the most seconds to wait for the recovery after it.
        self.quiet = quiet
        self.patience = patience
        self.phases = [Phase("start")]
        #: The fault of the running phase. None: it is quiet.
        self.fault: Fault | None = None
        #: The slots whose acknowledged writes may be lost, if they were acknowledged before the time below.
        self.at_risk: Collection[int] = ()
        self.at_risk_until = float("inf")
        #: When the fault of the running phase began.
        self.began = 0.0
        #: The share of the operations that are cancelled.
        self.cancelled = 0.0
        #: Set while the tasks may begin operations.
        self.open = asyncio.Event()
        self.open.set()
        self.workers: list[Worker] = []

    @property
    def now(self) -> Phase:
        """The phase that is running."""
        return self.phases[-1]

    @property
    def late(self) -> bool:
        """Whether writes may take effect after their calls have failed."""
        return self.fault is not None and self.fault.late

    @property
    def repeats(self) -> bool:
        """Whether writes may take effect again, after a retry was acknowledged."""
        return self.fault is not None and self.fault.repeats

    async def run(self, fault: Fault) -> None:
        """Run a phase: be quiet for a while, cause the fault, and wait until the throughput is as before."""
        self.phases.append(Phase(fault.name, fault.lacks))
        if fault.lacks:
            return
        print(f"{fault.name} ...", file=sys.stderr, flush=True)
        quiet = statistics.median([await self._rate() for _ in range(self.quiet)])
        self.now.times.clear()
        self.fault = fault
        if fault.lossy:
            self.at_risk = EVERYTHING
        self.began = time.perf_counter() - _LAG
        if inspect.iscoroutinefunction(fault.act):
            await fault.act()
        else:
            await asyncio.to_thread(fault.act)
        ended = time.perf_counter()
        while await self._rate() < fault.recovered * quiet:
            if time.perf_counter() - ended > self.patience:
                self.now.recovered = None
                break
            self.now.recovered = time.perf_counter() - ended
        self.now.seconds = time.perf_counter() - self.began
        await self.settle()

    async def settle(self) -> None:
        """Compare everything with the model. Nothing is excused from here on."""
        await asyncio.gather(*(worker.settle() for worker in self.workers))
        self.fault, self.at_risk, self.at_risk_until = None, (), float("inf")

    def end_risk(self, after: float = _UNDER_WAY) -> None:
        """Note that writes that are acknowledged from now on must not be lost."""
        self.at_risk_until = time.perf_counter() + after

    def is_at_risk(self, session_id: str) -> bool:
        """Return whether writes to a session may be lost."""
        return bool(self.at_risk) and key_slot(self.layout.place(session_id)[0].encode()) in self.at_risk

    def may_lose(self, session_id: str, written: float) -> bool:
        """Return whether a write that was acknowledged at a time may be lost."""
        return self.is_at_risk(session_id) and written > self.began

    def lose(self, what: str, session_id: str, *written: float) -> None:
        """Count a lost write: one of those that were acknowledged at these times."""
        self.now.lost += 1
        late = max(written) - self.at_risk_until
        if not self.is_at_risk(session_id):
            self.now.inexcusable[what] += 1
        elif late > 0 and not any(self.began < when <= self.at_risk_until for when in written):
            self.now.inexcusable[f"{what} {late:.3f} s after the fault"] += 1

    def note_error(self, name: str, error: Exception, *, durable: bool) -> None:
        """Count a SessionError of an operation."""
        what = type(error).__name__
        if what == SessionError.__name__:  # One that should not happen.
            what += f" ({error}: {error.__cause__!r})"
        self.now.errors[f"{what} of {'durable ' if durable else ''}{name}"] += 1
        excused = name == "increment" or (durable and isinstance(error, StoreUnavailable))
        if not excused and not (self.fault and self.fault.refuses):
            self.now.unexpected[f"{what} of {name}"] += 1

    def note_text(self, error: BaseException | None) -> None:
        """Search an error and its causes for ids and values."""
        while error is not None:
            self.now.leaks += tells(f"{error} {error!r}")
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)

    async def _rate(self) -> float:
        before, began = len(self.now.times), time.perf_counter()
        await asyncio.sleep(_WINDOW)
        return (len(self.now.times) - before) / (time.perf_counter() - began)


def tells(text: str) -> bool:
    """Return whether a text holds a session id or a value."""
    return SECRET in text or bool(_ID.search(text))


@contextmanager
def listening(scene: Scene) -> Iterator[None]:
    """Search the log of all libraries while the body runs, at every level."""
    listener, root = _Listener(scene), logging.getLogger()
    level = root.level
    root.addHandler(listener)
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(listener)


class _Listener(logging.Handler):
    """Searches log records for ids and values."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(logging.DEBUG)
        self._scene = scene
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Search one record and its traceback."""
        self._scene.now.leaks += tells(self.format(record))
