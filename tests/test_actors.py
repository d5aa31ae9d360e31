"""Thirty actors use a few sessions and values at once; after each act the whole keyspace is checked.

The actors call every method of the store, through three stores on one prefix. Some calls are cancelled. The `Ledger`
notes which calls were acknowledged, and which replies later calls may get. After each act no call is in flight. Then
all keys are compared with the ledger and with the promises of the store.

Each test plays two short acts. With the Hypothesis profile `thorough`, a test plays thirty long acts, and sessions live
for up to two seconds. A failure names the seed. The server and the event loop also decide the order of events, so a
seed may not fail again.
"""

import asyncio
import random
import secrets
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from redis.exceptions import ResponseError

from rss import (
    Blocked,
    Conflict,
    IdentityChanged,
    JSONCodec,
    LimitExceeded,
    Reference,
    SessionEnded,
    SessionNotFound,
    SessionStore,
    StoreUnavailable,
    TextCodec,
)
from rss.engine import operations, scripts
from rss.keys import Layout
from tests.conftest import send_singly
from tests.keyspace import SLACK, SPARE, Keyspace, Snapshot, parts, texts
from tests.servers import client_of, connections, everywhere

T = TypeVar("T")

ACTORS = 30
#: Values of references, by field. 1 and "1" have the same set.
VALUES: dict[str, list[str | int]] = {"user_id": [1, "1", 2, "[1]"], "ip": ["a", "b"]}
#: Seconds by which the clock of the server and the clock of this process may differ.
MARGIN = 0.005
TOMBSTONE = operations.TOMBSTONE
#: Milliseconds. No grace and no block in these tests is longer.
GRACE = 1000


def ms(number: float) -> timedelta:
    """Return a number of milliseconds as a timedelta."""
    return timedelta(milliseconds=number)


@dataclass(frozen=True)
class Setting:
    """The configuration of the stores of a test, and the faults that the test causes. Times are in milliseconds."""

    user: Reference = field(default_factory=Reference)
    ip: Reference = field(default_factory=Reference)
    ages: tuple[int, ...] = (2, 20, 60, 150, 150, 150)
    lifetime: int | None = None
    text: bool = False
    tombstone: int = TOMBSTONE
    #: The time budget of a script in estimated microseconds, and the number of sessions in a page.
    enough: int = 2000
    page: str = "50"
    #: Whether calls are sent one by one, and whether connections are killed.
    singly: bool = False
    kills: bool = False

    @property
    def lasting(self) -> bool:
        """Whether no session expires during an act."""
        return min(self.ages) > 60_000


# With HURRIED, a script ends after two sessions of a page, or after one or two of a batch. A script without
# time does not look closely at the members of a set with a limit. So settings with limits use PAGES, which only
# shortens pages.
HURRIED: dict[str, Any] = {"enough": 12, "page": "2"}
PAGES: dict[str, Any] = {"page": "2"}
HOUR = (3_600_000, 7_200_000)

SETTINGS = {
    "plain": Setting(),
    "for a moment": Setting(ages=(1, 1, 2, 3, 5, 10, 20, 50), ip=Reference(strict=True)),
    "for hours": Setting(ages=HOUR, **HURRIED),
    "strict": Setting(Reference(strict=True), Reference(strict=True), **HURRIED),
    "evict": Setting(Reference(limit=2), Reference(limit=4), **PAGES),
    "evict for hours": Setting(Reference(limit=3, strict=True), ages=HOUR),
    "refuse": Setting(Reference(limit=2, on_limit="refuse"), Reference(limit=3, on_limit="refuse", strict=True)),
    "identity": Setting(Reference(identity=True), ages=HOUR, **HURRIED),
    "lifetime": Setting(Reference(identity=True, limit=3), lifetime=300, text=True),
    "text": Setting(Reference(limit=2, strict=True), text=True, **PAGES),
    "tombstones expire": Setting(tombstone=30, **HURRIED),
    "one by one": Setting(Reference(identity=True, strict=True), Reference(limit=5), singly=True),
    "killed": Setting(kills=True, **HURRIED),
    "killed for hours": Setting(Reference(limit=4, identity=True), ages=HOUR, kills=True),
}
# On a cluster, only the identity can have a limit. A login that is cancelled may leave a copy there for a minute, so
# sessions with an identity live for hours.
ON_A_CLUSTER = ("for a moment", "for hours", "strict", "identity", "killed", "killed for hours")


@dataclass
class Token:
    """A value that was written once, into the field `name`. Times are seconds of the monotonic clock."""

    origin: str
    #: When the write was acknowledged; None if it was not.
    written: float | None = None
    #: When a later write was acknowledged: calls that begin afterwards must not read this value. None: no later write.
    stale: float | None = None
    refused: bool = False


@dataclass
class Story:
    """One session, under all of its ids. The field `origin` of a session names its story."""

    #: When the session was begun.
    began: float
    #: Whether the session may expire and be made again under the same id.
    loose: bool = False
    #: The time after which no session of this story may be alive. None: there is no such time.
    over: float | None = None
    #: The sums that increments returned, and the number of increments that may have run without a reply.
    sums: set[int] = field(default_factory=set)
    unsure: int = 0
    fresh: list[Token] = field(default_factory=list)


@dataclass
class Ending:
    """A call that ends sessions, identified by its reason."""

    began: float
    keep: set[str] = field(default_factory=set)
    #: When the call was acknowledged (None: not yet), and how many sessions it ended.
    done: float | None = None
    count: int = 0


class Ledger:
    """A record of the replies of calls, which decides whether the replies of later calls are allowed."""

    def __init__(self, setting: Setting, keyspace: Keyspace, layout: Layout) -> None:
        """Begin with nothing."""
        self.setting = setting
        self.keyspace = keyspace
        self.layout = layout
        #: Whether a login moves a session to another partition.
        self.moves = layout.partitions > 1 and setting.user.identity
        self.stories: dict[str, Story] = {}
        self.tokens: dict[str, Token] = {}
        #: By id: the origin of its story.
        self.origins: dict[str, str] = {}
        #: Ids that had a session.
        self.made: set[str] = set()
        #: By id: the time after which no call may find a session.
        self.dead: dict[str, float] = {}
        self.endings: dict[str, Ending] = {}
        #: By id: the reasons of acknowledged deletions, the new ids, and the identities.
        self.deleted: dict[str, str] = {}
        self.rotated: dict[str, str] = {}
        self.identities: dict[str, list[str]] = {}
        #: Ids that were rotated to another identity. Such an id does not lead to the new session.
        self.cut_off: set[str] = set()
        #: Results that only one call may get.
        self.taken: set[tuple[str, ...]] = set()
        #: By set: the time until which the set is certainly blocked, in seconds since 1970.
        self.blocks: dict[str, float] = {}
        #: By set: how many calls in flight may lift the block, and how many such calls have begun so far.
        self.lifting: Counter[str] = Counter()
        self.lifts: Counter[str] = Counter()
        #: Sets for which a call of `delete_by` did not finish.
        self.left_fences: set[str] = set()

    def story(self, session_id: str) -> Story:
        """Return the story of an id."""
        return self.stories[self.origins[session_id]]

    def begin(self, origin: str, *, loose: bool = False) -> Story:
        """Return the story of an origin, which begins now if the origin is new."""
        return self.stories.setdefault(origin, Story(time.monotonic(), loose))

    def sets(self, values: dict[str, Any]) -> set[str]:
        """Return the names of the sets for some values."""
        return {f"{name}:{{{text}}}" for name in VALUES for text in texts(values.get(name))}

    def ends(self, began: float, keep: Iterable[str] = ()) -> str:
        """Note a call that ends sessions, and return its reason, which no other call has."""
        reason = f"reason-{len(self.endings)}"
        self.endings[reason] = Ending(began, set(keep))
        return reason

    def lift(self, name: str) -> None:
        """Note that a call begins which may lift the block of a set.

        A call without a reply counts as in flight until `settle`.
        """
        self.blocks.pop(name, None)
        self.lifting[name] += 1
        self.lifts[name] += 1

    @property
    def reasons(self) -> set[str]:
        """All reasons for which a session may be ended."""
        setting, reasons = self.setting, {"rotated", *self.endings}
        if setting.user.limit or setting.ip.limit:
            reasons.add("evicted")
        if setting.lifetime:
            reasons.add("expired")
        if self.moves:
            reasons.add("deleted")  # A copy whose login was cancelled.
        return reasons

    # ------------------------------------------------------------------ writes

    def write(self, origin: str) -> str:
        """Return a value that no other write has."""
        name = f"w{len(self.tokens)}"
        self.tokens[name] = Token(origin)
        self.stories[origin].fresh.append(self.tokens[name])
        return name

    def written(self, name: str, began: float) -> None:
        """Note that a write is done. Values that were written before the write began are stale now."""
        token, now = self.tokens[name], time.monotonic()
        story = self.stories[token.origin]
        token.written = now
        for other in story.fresh:
            if other.written and other.written < began:
                other.stale = now
        story.fresh = [other for other in story.fresh if not other.stale]

    def settle(self) -> None:
        """Note that no call is in flight. A write without a reply has been done by now, or never will be."""
        for token in self.tokens.values():
            token.written = token.written or time.monotonic()
        self.lifting.clear()

    # ------------------------------------------------------------------ reads

    def found(self, session_id: str, began: float) -> None:
        """Check that a call which began at *began* may find a session by an id."""
        late = self.dead.get(session_id, began) < began
        assert not late or self.revives(session_id), f"{session_id} was ended, but was found"
        self.made.add(session_id)

    def read(self, session: dict[str, Any], began: float, *, whole: bool = True) -> None:
        """Check that each value in *session* was written, and was not overwritten before the read began."""
        session_id, origin = session["id"], session.get("origin")
        assert not whole or {"origin", "name"} <= session.keys(), f"{session_id} lacks fields: {session}"
        if origin is not None:
            assert origin in self.stories, f"no call wrote {session}"
            assert self.origins.setdefault(session_id, origin) == origin, f"{session} has fields of another session"
            over = self.stories[origin].over
            assert over is None or over >= began, f"{session} should have been ended"
        if (name := session.get("name")) is not None:
            token = self.tokens[name]
            assert token.origin == self.origins.get(session_id, token.origin), f"{session} has another one's name"
            if not self.revives(session_id):  # A session that was made again has the same origin.
                assert token.stale is None or token.stale >= began, f"{session} has a name that was overwritten"
            assert not token.refused, f"{session} has a name that was refused"
        if whole and not self.revives(session_id):
            identity = texts(session.get("user_id"))
            if self.setting.user.identity:
                assert len(identity) <= 1
                assert self.identities.setdefault(session_id, identity) == identity, f"{session} has another identity"

    def once(self, *what: str) -> None:
        """Check that only one call got this result; calls that may be repeated after a kill are exempt."""
        assert self.setting.kills or what not in self.taken, f"{what} was returned twice"
        self.taken.add(what)

    def explained(self, session_id: str, began: float) -> bool:
        """Return whether `ended` must return a reason to a call that began at *began*."""
        known = self.setting.lasting or session_id in self.rotated or session_id in self.deleted
        return known and self.dead.get(session_id, began) < began and not self.forgets

    @property
    def forgets(self) -> bool:
        """Whether tombstones expire during a test."""
        return self.setting.tombstone < TOMBSTONE

    def revives(self, session_id: str) -> bool:
        """Return whether a session may have been made again under an id."""
        loose = self.stories[self.origins[session_id]].loose if session_id in self.origins else False
        return loose and (not self.setting.lasting or self.forgets)

    # ------------------------------------------------------------------ the keyspace

    def check(self, seen: Snapshot, decode: Callable[[dict[str, str]], dict[str, Any]]) -> None:
        """Compare all keys with the promises of the store and with the replies of calls. No call may be in flight."""
        now, live = time.monotonic(), {i: decode(fields) for i, fields in seen.alive().items()}
        sets = {i: {self.keyspace.beside(i, name) for name in self.sets(session)} for i, session in live.items()}
        ids = {(name, i) for name, held in seen.sets.items() for i in held}
        there = live.keys() | {i for i, fields in seen.hashes.items() if "_ended" in fields}
        seen.check(sets, {(name, i) for name, i in ids if i not in there or self.revives(i)})
        self.check_times(seen)
        self.check_limits(sets.values())
        origins = Counter(session["origin"] for session in live.values())
        for session_id, session in live.items():
            assert session["id"] == session_id
            self.found(session_id, now)
            self.read(session, now)
            story = self.story(session_id)
            if not self.revives(session_id):
                assert origins[session["origin"]] == 1, f"{session} shares its origin"
            if not story.loose:
                count = int(session.get("count", 0))
                assert len(story.sums) <= count <= len(story.sums) + story.unsure, f"{session}: {sorted(story.sums)}"
        for name, until in self.blocks.items():
            for part in parts(self.layout, name) if until > time.time() + MARGIN else ():
                assert int(seen.fences[part]["until"]) / 1000 >= until - MARGIN
                assert not [i for i, named in sets.items() if part in named], f"{part} is blocked, and has sessions"
        self.check_ends(seen)
        left = {part for name in self.left_fences for part in parts(self.layout, name)}
        for name, fence in seen.fences.items():
            if name not in left:
                rest = {k: v for k, v in fence.items() if k not in ("until", "why")}
                assert set(rest.values()) <= {"done"}, f"the fence of {name} remembers {rest}"

    def check_times(self, seen: Snapshot) -> None:
        """Check that no key lives longer than it should."""
        setting, longest, copies = self.setting, max(self.setting.ages), seen.copies()
        for name, when in seen.expires.items():
            left = when - seen.now
            if name in seen.sets:
                assert left <= longest * SLACK + SPARE + 1, f"{name} lives too long"
            elif name.startswith("_fence:") or "_ended" in seen.hashes[name[1:-1]]:
                assert left <= max(setting.tombstone, GRACE), f"{name} lives too long"
            elif name[1:-1] not in copies:
                created = int(seen.hashes[name[1:-1]]["_created"])
                assert created <= seen.now
                assert left <= longest, f"{name} lives too long"
                assert when <= created + (setting.lifetime or 10**12), f"{name} lives longer than it may"

    def check_limits(self, sets: Iterable[set[str]]) -> None:
        """Check that no value has more sessions than its limit."""
        counts = Counter(name for named in sets for name in named)
        for name, count in counts.items():
            reference = self.setting.user if name.startswith("user_id:") else self.setting.ip
            assert count <= (reference.limit or count), f"{name} has {count} sessions"

    def check_ends(self, seen: Snapshot) -> None:
        """Check that sessions which were ended have a tombstone with the reason, and that no other id has one."""
        setting = self.setting
        tombs = {i: fields for i, fields in seen.hashes.items() if "_ended" in fields}
        reasons = Counter(fields["_ended"] for fields in tombs.values())
        strange = reasons.keys() - self.reasons
        assert not strange, f"sessions were ended for {strange}"
        for session_id, fields in tombs.items():
            ending = self.endings.get(fields["_ended"])
            if ending and session_id in self.origins:
                story = self.story(session_id)
                late = ending.done is not None and story.began > ending.done
                assert story.loose or not late, f"{session_id} was made after the call that ended it, {fields}"
                assert session_id not in ending.keep, f"{session_id} should have been kept, but has {fields}"
        if self.forgets:
            return
        for reason, ending in self.endings.items():
            assert ending.done is None or reasons[reason] >= ending.count, f"{reason} did not end {ending.count}"
        for session_id in self.rotated.keys() | self.deleted.keys():
            assert session_id in tombs, f"{session_id} has no tombstone"
        for session_id, new in self.rotated.items():
            tomb = tombs[session_id]
            assert tomb["_ended"] == "rotated"
            assert tomb.get("_next", new) == new
            assert "_next" not in tomb or session_id not in self.cut_off, f"{session_id} leads to another identity"
        for session_id, reason in self.deleted.items():
            last = tombs[session_id]
            while "_next" in last:
                last = tombs[last["_next"]]
            assert last["_ended"] == reason
        if setting.lasting and seen.alive():
            lost = self.made - seen.hashes.keys()
            assert not lost, f"sessions are gone without a tombstone: {lost}"


class Nothing(Exception):
    """Raised when a call has no result: the call was cancelled, or was refused for a valid reason."""

    def __init__(self, *, refused: bool) -> None:
        """*refused*: True if the call certainly changed nothing."""
        super().__init__()
        self.refused = refused


class Stage:
    """The stores and all other state that the actors share."""

    def __init__(self, ledger: Ledger, stores: list[SessionStore], keyspace: Keyspace, rng: random.Random) -> None:
        """Begin with no session."""
        self.ledger = ledger
        self.setting = ledger.setting
        self.stores = stores
        self.keyspace = keyspace
        self.rng = rng
        #: The last ids, for all actors to choose from.
        self.ids: deque[str] = deque(maxlen=12)
        self.flying: set[asyncio.Future[Any]] = set()
        self.counts: Counter[str] = Counter()

    async def act(self, actors: "list[Actor]", deeds: int) -> None:
        """Let each actor do *deeds* deeds, and wait until no call is in flight."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(actor.act(deeds)) for actor in actors]
            while not all(task.done() for task in tasks):
                await self.disturb()
        for store in self.stores:  # Replies come in order: cancelled calls are over when these return.
            await store.blocked("ip", "nobody")
            await store.block("ip", "nobody", ms(1))  # It reads a page in each partition.
            await store.operations.engine.drain()  # A copy may still be deleted.
        self.ledger.settle()

    async def disturb(self) -> None:
        """Wait a moment, cancel many calls at once, and kill connections if the setting says so."""
        await asyncio.sleep(self.rng.uniform(0.005, 0.05))
        for call in [*self.flying]:
            if self.rng.random() < 0.4:
                call.cancel()
        for connection in await connections(self.keyspace.client) if self.setting.kills else ():
            if connection["name"] == "actors" and self.rng.random() < 0.3:
                self.counts["killed"] += 1
                await everywhere(self.keyspace.client, "CLIENT KILL", "ID", connection["id"])

    async def check(self) -> None:
        """Compare the keyspace with the ledger, and the results of finds by reference with the keyspace."""
        ledger, began = self.ledger, time.monotonic()
        before = await self.look()
        for session_id in self.rng.sample(sorted(ledger.dead), min(len(ledger.dead), 10)):
            ended = await self.stores[0].ended(session_id)
            assert ended or not ledger.explained(session_id, began), f"there is no reason for {session_id}"
        found: dict[str, set[str]] = {}
        for name, values in VALUES.items():
            for value in values:
                store = self.rng.choice(self.stores)
                found[f"{name}:{{{value}}}"] = set(await store.ids_by(name, value))
                assert await store.count_by(name, value) <= len(found[f"{name}:{{{value}}}"])
        after = await self.look()
        for name, ids in found.items():
            first, last = self.members(before, name), self.members(after, name)
            assert last <= ids <= first, f"found {ids} by {name}; before: {first}; after: {last}"
            held = {i for part in parts(self.ledger.layout, name) for i in after.sets.get(part, ())}
            assert held - after.copies() <= first, f"{name} still has ids of dead sessions"
        self.counts["checks"] += 2
        self.counts["keys"] += len(before.expires) + len(after.expires)

    async def look(self) -> Snapshot:
        """Check the keyspace and return it."""
        seen = await self.keyspace.look()
        self.ledger.check(seen, self.decode)
        return seen

    def decode(self, fields: dict[str, str]) -> dict[str, Any]:
        """Return the values of a session."""
        return self.stores[0].fields.decode([text.encode() for pair in fields.items() for text in pair])

    def members(self, seen: Snapshot, name: str) -> set[str]:
        """Return the ids of the live sessions in a set."""
        return {i for i, fields in seen.alive().items() if name in self.ledger.sets(self.decode(fields))}

    async def end(self) -> None:
        """Let all sessions expire, and check that only tombstones and fences are left."""
        seen = await self.keyspace.look()
        for session_id in seen.copies():
            await self.keyspace.expire(f"{{{session_id}}}")
        for session_id in seen.alive() if self.setting.lasting else ():
            await self.stores[0].touch(session_id, ms(1))
        while (seen := await self.keyspace.look()).alive():
            await asyncio.sleep(0.02)
        for value in VALUES["user_id"]:
            assert await self.stores[1].ids_by("user_id", value) == []
        if self.setting.lasting:
            for value in VALUES["ip"]:
                assert await self.stores[1].count_by("ip", value) == 0
        else:  # The other sets expire by themselves.
            await self.wait(seen, seen.sets)
        seen = await self.keyspace.look()
        assert not seen.sets
        assert all("_ended" in fields for fields in seen.hashes.values())
        self.ledger.check(seen, self.decode)
        if self.ledger.forgets:
            await self.wait(seen, seen.expires)
            assert await self.keyspace.keys() == []

    async def wait(self, seen: Snapshot, names: Iterable[str]) -> None:
        """Wait until keys have expired."""
        last = max([seen.now, *(seen.expires[name] for name in names)])
        await asyncio.sleep((last - seen.now) / 1000 + 0.01)


class Actor:
    """One of many callers of the stores. The seed and the results of its calls decide what an actor does."""

    def __init__(self, stage: Stage, seed: str) -> None:
        """Take a stage and a seed."""
        self.stage = stage
        self.ledger = stage.ledger
        self.setting = stage.setting
        self.rng = random.Random(seed)
        self.deeds: dict[Callable[[], Awaitable[None]], int] = {
            self.create: 8,
            self.set: 12,
            self.change: 6,
            self.unset: 4,
            self.pop: 4,
            self.increment: 8,
            self.touch: 4,
            self.get: 10,
            self.delete: 3,
            self.rotate: 8,
            self.log_in: 4,
            self.find_by: 4,
            self.ids_by: 4,
            self.count_by: 2,
            self.delete_by: 2,
            self.escape: 2,
            self.keep: 2,
            self.block: 1,
            self.unblock: 2,
            self.blocked: 2,
            self.ended: 4,
            self.ttl: 2,
        }

    async def act(self, deeds: int) -> None:
        """Do *deeds* deeds, one after the other."""
        for deed in self.rng.choices([*self.deeds], [*self.deeds.values()], k=deeds):
            with suppress(Nothing):
                await deed()
            if self.rng.random() < 0.2:
                await asyncio.sleep(self.rng.choice([0, 0.001, 0.003]))

    async def call(self, call: Awaitable[T], *errors: type[Exception]) -> T:
        """Make a call, which may be cancelled, and return its result. Raises `Nothing` if there is no result."""
        task, stage = asyncio.ensure_future(call), self.stage
        stage.flying.add(task)
        if self.rng.random() < 0.06:
            asyncio.get_running_loop().call_later(self.rng.choice([0, 0.0005, 0.002]), task.cancel)
        try:
            await asyncio.wait([task])
        finally:  # If another actor has failed, the call may still be in flight.
            stage.flying.discard(task)
            task.cancel()
        stage.counts["calls"] += 1
        if task.cancelled():
            stage.counts["cancelled"] += 1
            raise Nothing(refused=False)
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, errors):
            self.check_error(error)
            stage.counts["refused"] += 1
            raise Nothing(refused=not self.setting.kills)
        if self.setting.kills and isinstance(error, StoreUnavailable):
            stage.counts["unavailable"] += 1
            raise Nothing(refused=False)
        raise error

    def check_error(self, error: Exception) -> None:
        """Check that an error is possible with this setting, and that its attributes are right."""
        if isinstance(error, Blocked):
            assert error.field in VALUES
            assert error.reason in self.ledger.endings
            assert error.until > datetime.now(UTC) - ms(5000)
        elif isinstance(error, LimitExceeded):
            reference = {"user_id": self.setting.user, "ip": self.setting.ip}[error.field]
            assert reference.on_limit == "refuse"
        elif isinstance(error, SessionEnded):
            assert error.reason in self.ledger.reasons, f"ended for {error.reason}"

    # ------------------------------------------------------------------ choices

    @property
    def store(self) -> SessionStore:
        """One of the stores."""
        return self.rng.choice(self.stage.stores)

    def pick(self) -> str:
        """Choose an id that other actors use too: a minted id, or one that changes with every forty calls."""
        if self.stage.ids and self.rng.random() < 0.85:
            return self.rng.choice(self.stage.ids)
        chosen = f"chosen-{self.stage.counts['calls'] // 40}"
        self.ledger.origins[chosen] = chosen
        self.ledger.begin(chosen, loose=True)
        return chosen

    def age(self) -> timedelta | None:
        """Choose a lifetime."""
        return self.rng.choice([None, ms(self.rng.choice(self.setting.ages))])

    def value(self, name: str) -> str | int:
        """Choose a value of a reference."""
        return self.rng.choice(VALUES[name])

    def references(self, share: float) -> dict[str, Any]:
        """Choose a value for each reference with the probability *share*: a single value, a list or None."""
        values: dict[str, Any] = {}
        for name in VALUES:
            kind = self.rng.random()
            if self.rng.random() > share:
                continue
            if self.setting.text or kind > 0.35:
                values[name] = self.value(name)
            elif kind < 0.1:
                values[name] = None
            elif not (self.setting.user.identity and name == "user_id"):
                values[name] = [self.value(name) for _ in range(self.rng.randrange(4))]
        return values

    async def write(self, origin: str, write: Callable[[str], Awaitable[T]], values: dict[str, Any], *errors: Any) -> T:
        """Make a call that writes a name and *values*, and check that none of these values was blocked."""
        began, name, blocks = time.monotonic(), self.ledger.write(origin), self.ledger.blocks
        closed = {one: blocks[one] for one in self.ledger.sets(values) if blocks.get(one, 0) > time.time() + MARGIN}
        try:
            result = await self.call(write(name), *errors)
        except Nothing as nothing:
            self.ledger.tokens[name].refused = nothing.refused
            raise
        for one, until in closed.items():
            assert blocks.get(one) != until or until < time.time() + MARGIN, f"{one} is blocked"
        self.ledger.written(name, began)
        return result

    # ------------------------------------------------------------------ one session

    async def create(self) -> None:
        """Make a session that other actors may use."""
        self.stage.ids.append(await self.make(self.references(0.8), self.age()))

    async def make(self, values: dict[str, Any], age: timedelta | None) -> str:
        """Make a session."""
        origin, store = f"o{len(self.ledger.stories)}", self.store
        self.ledger.begin(origin)
        session_id = await self.write(
            origin,
            lambda name: store.create({"origin": origin, "name": name, **values}, age),
            values,
            LimitExceeded,
            *([SessionEnded] if self.setting.kills else []),  # The session was ended before the call was repeated.
        )
        self.ledger.origins[session_id] = origin
        self.ledger.made.add(session_id)
        return session_id

    async def set(self) -> None:
        """Write to a session, and perhaps make it."""
        session_id, store, age = self.pick(), self.store, self.age()
        origin, story = self.ledger.origins[session_id], self.ledger.story(session_id)
        minted = not session_id.startswith("chosen-")
        create = not minted or (self.rng.random() < 0.2 and not self.ledger.forgets)
        story.loose = story.loose or create
        values = self.references(0.1 if self.setting.user.identity else 0.6)
        if self.rng.random() < 0.3:
            values["note"] = f"n{secrets.token_hex(6)}"
        errors: list[type[Exception]] = [LimitExceeded, SessionEnded if create else SessionNotFound]
        if self.setting.user.identity:
            errors.append(IdentityChanged)
        if self.ledger.moves:
            errors.append(ValueError)  # A new session must be in the partition of its identity.
        began, held = time.monotonic(), {"origin": origin, **values} if create else values
        await self.write(
            origin, lambda name: store.set(session_id, {"name": name, **held}, age, create=create), values, *errors
        )
        self.ledger.found(session_id, began)

    async def change(self) -> None:
        """Write to a session if its name is still the one that was just read."""
        session_id, store = self.pick(), self.store
        origin = self.ledger.origins[session_id]
        read = await self.call(store.get(session_id, ["name"]))
        if "name" not in read:
            return
        values = {} if self.setting.user.identity else self.references(0.3)
        began = time.monotonic()
        await self.write(
            origin,
            lambda name: store.set(session_id, {"name": name, **values}, create=False, expect={"name": read["name"]}),
            values,
            Conflict,
            SessionNotFound,
            LimitExceeded,
        )
        self.ledger.found(session_id, began)
        self.ledger.once("changed", read["name"])

    async def unset(self) -> None:
        """Unset fields."""
        fields = self.rng.choice([["note"], ["ip"], ["note", "n"], ["user_id", "ip"]])
        errors = [IdentityChanged] if self.setting.user.identity else []
        await self.call(self.store.unset(self.pick(), fields, self.age()), SessionEnded, *errors)

    async def pop(self) -> None:
        """Pop fields, and check that no other call got the same value."""
        session_id, began = self.pick(), time.monotonic()
        fields = self.rng.choice([["note"], ["note", "ip"], ["user_id"]])
        errors = [IdentityChanged] if self.setting.user.identity else []
        taken = await self.call(self.store.pop(session_id, fields), SessionNotFound, *errors)
        self.ledger.found(session_id, began)
        assert taken.keys() <= set(fields)
        if "note" in taken:
            self.ledger.once("popped", taken["note"])

    async def increment(self) -> None:
        """Increment a field, and check that each call gets another sum."""
        await self.count(self.pick())

    async def count(self, session_id: str) -> None:
        """Increment a field of a session."""
        began = time.monotonic()
        story = self.ledger.story(session_id)
        try:
            count = await self.call(self.store.increment(session_id, "count"), SessionNotFound)
        except Nothing as nothing:
            story.unsure += not nothing.refused
            raise
        self.ledger.found(session_id, began)
        assert count > 0
        assert story.loose or count not in story.sums, f"{count} was counted twice"
        story.sums.add(count)

    async def touch(self) -> None:
        """Renew a session."""
        session_id, began = self.pick(), time.monotonic()
        if await self.call(self.store.touch(session_id, self.age())):
            self.ledger.found(session_id, began)

    async def get(self) -> None:
        """Read a session, and perhaps renew it."""
        session_id, began = self.pick(), time.monotonic()
        fields = self.rng.choice([None, None, ["origin", "name"], ["count"]])
        renewals: list[bool | timedelta] = [False, True, ms(1), ms(90)]
        session = await self.call(self.store.get(session_id, fields, touch=self.rng.choice(renewals)))
        if session:
            self.ledger.found(session_id, began)
            self.ledger.read(session, began, whole=fields is None)
            assert session.get("origin", self.ledger.origins[session_id]) == self.ledger.origins[session_id]

    async def delete(self) -> None:
        """End a session, perhaps only if it has a certain user."""
        session_id, began = self.pick(), time.monotonic()
        reason, expect = self.ledger.ends(began), self.rng.choice([None, None, {"user_id": self.value("user_id")}])
        if await self.call(self.store.delete(session_id, expect=expect, reason=reason)):
            now = time.monotonic()
            self.ledger.found(session_id, began)
            self.ledger.deleted[session_id] = reason
            self.ledger.dead[session_id] = min(now, self.ledger.dead.get(session_id, now))
            self.ledger.endings[reason].done, self.ledger.endings[reason].count = now, 1

    async def rotate(self) -> None:
        """Give a session a new id, which other actors may use."""
        values = self.references(0.5) if self.rng.random() < 0.5 else {}
        self.stage.ids.append(await self.move(self.pick(), values, self.rng.choice([None, None, 10, 200])))

    async def log_in(self) -> None:
        """Sign a visitor in, while other requests write to the session. None of their writes may be lost."""
        visitor = await self.make({}, ms(max(self.setting.ages)))

        async def count() -> None:
            for _ in range(4):
                with suppress(Nothing):
                    await self.count(visitor)

        async def sign_in() -> None:
            with suppress(Nothing):
                self.stage.ids.append(await self.move(visitor, {"user_id": self.value("user_id")}, None))

        async with asyncio.TaskGroup() as group:
            for one in (count(), sign_in(), count()):
                group.create_task(one)

    async def move(self, old: str, values: dict[str, Any], grace: int | None) -> str:
        """Give a session a new id and perhaps values."""
        ledger, began, store, age = self.ledger, time.monotonic(), self.store, self.age()
        origin, patience = ledger.origins[old], ms(grace) if grace else None
        new = await self.write(
            origin,
            lambda name: store.rotate(old, {"name": name, **values}, age, grace=patience),
            values,
            SessionNotFound,
            LimitExceeded,
        )
        ledger.found(old, began)
        if not ledger.revives(old):
            assert old not in ledger.rotated, f"{old} was rotated twice"
        ledger.origins[new] = origin
        ledger.made.add(new)
        ledger.rotated[old] = new
        ledger.dead[old] = time.monotonic() + (grace / 1000 + MARGIN if grace else 0)
        if self.setting.user.identity and "user_id" in values:
            identity = texts(values["user_id"])
            assert ledger.identities.setdefault(new, identity) == identity
            if ledger.identities.get(old, identity) != identity and not ledger.revives(old):
                ledger.cut_off.add(old)
                ledger.dead[old] = time.monotonic()
        return new

    async def ended(self) -> None:
        """Ask why a session was ended."""
        session_id, began = self.pick(), time.monotonic()
        reason = await self.call(self.store.ended(session_id))
        assert reason is None or reason in self.ledger.reasons
        assert reason or not self.ledger.explained(session_id, began), f"there is no reason for {session_id}"

    async def ttl(self) -> None:
        """Ask how long a session has left to live."""
        session_id, began = self.pick(), time.monotonic()
        left = await self.call(self.store.ttl(session_id))
        if left is not None:
            self.ledger.found(session_id, began)
            assert ms(0) < left <= ms(max(self.setting.ages))

    # ------------------------------------------------------------------ all sessions of a value

    async def find_by(self) -> None:
        """Read the sessions of a value, and use one of them."""
        name = self.rng.choice([*VALUES])
        value, fields = self.value(name), self.rng.choice([None, [name, "origin", "name", "own"]])
        store, began = self.store, time.monotonic()

        async def find() -> list[dict[str, Any]]:
            return [session async for session in store.find_by(name, value, fields)]

        found = await self.call(find())
        for session in found:
            self.ledger.found(session["id"], began)
            self.ledger.read(session, began, whole=fields is None)
            assert str(value) in texts(session[name]), f"{session} was found by {name} {value}"
        public = [session["id"] for session in found if "own" not in session]
        if public:
            self.stage.ids.append(self.rng.choice(public))

    async def ids_by(self) -> None:
        """List the ids of the sessions of a value."""
        name, began = self.rng.choice([*VALUES]), time.monotonic()
        ids = await self.call(self.store.ids_by(name, self.value(name)))
        assert len(ids) == len(set(ids))
        for session_id in ids:
            self.ledger.found(session_id, began)

    async def count_by(self) -> None:
        """Count the sessions of a value, exactly or not."""
        name = self.rng.choice([*VALUES])
        assert await self.call(self.store.count_by(name, self.value(name), exact=self.rng.random() < 0.5)) >= 0

    async def sign_out(self, name: str, value: str | int, keep: Iterable[str] = (), block: int | None = None) -> None:
        """End all sessions of a value except those to keep, and perhaps block the value."""
        ledger, key, kept = self.ledger, f"{name}:{{{value}}}", [*keep]
        reason, until = ledger.ends(time.monotonic(), kept), time.time() + (block or 0) / 1000
        certain, lifts = block and not kept and not ledger.lifting[key], ledger.lifts[key]
        if block and not kept and self.rng.random() < 0.5:
            call = self.store.block(name, value, ms(block), reason=reason)
        else:
            call = self.store.delete_by(name, value, keep=kept, reason=reason, block=ms(block) if block else None)
        try:
            ended = await self.call(call)
        except Nothing:
            ledger.left_fences.add(key)
            raise
        ledger.endings[reason].done, ledger.endings[reason].count = time.monotonic(), ended
        if certain and ledger.lifts[key] == lifts:
            ledger.blocks[key] = max(until, ledger.blocks.get(key, 0))

    async def delete_by(self) -> None:
        """End all sessions of a value, some of which were just made."""
        name = self.rng.choice([*VALUES])
        value, own = self.value(name), list[str]()
        for _ in range(self.rng.randrange(4)):
            with suppress(Nothing):
                own.append(await self.make({name: value, "own": "yes"}, ms(max(self.setting.ages))))
        keep = [session_id for session_id in [self.pick(), self.pick()] if self.rng.random() < 0.2]
        await self.sign_out(name, value, keep, self.rng.choice([None, None, 30]))
        await self.expect_over(own)

    async def expect_over(self, ids: Iterable[str]) -> None:
        """Check that these sessions have ended, under all of their ids."""
        now = time.monotonic()
        for session_id in ids:
            self.ledger.story(session_id).over = now
            self.ledger.dead[session_id] = min(now, self.ledger.dead.get(session_id, now))
        for session_id in ids:
            assert await self.call(self.store.get(session_id)) == {}, f"{session_id} escaped"

    async def escape(self) -> None:
        """Rotate sessions while another call ends all sessions of their value, and check that none escapes.

        One of the rotations of a session may sign a user in, and move the session to another partition.
        """
        name = self.rng.choice([*VALUES])
        value, ids = self.value(name), list[str]()
        for _ in range(self.rng.randrange(1, 5)):
            with suppress(Nothing):
                ids.append(await self.make({name: value, "own": "yes"}, ms(max(self.setting.ages))))

        async def run(session_id: str) -> None:
            signs_in = self.rng.randrange(4) if name == "ip" else None
            with suppress(Nothing):
                for step in range(3):
                    await asyncio.sleep(self.rng.choice([0, 0, 0.001]))
                    values = {"user_id": self.value("user_id")} if step == signs_in else {}
                    session_id = await self.move(session_id, values, self.rng.choice([None, 200]))
                    ids.append(session_id)

        outcomes = await asyncio.gather(
            self.sign_out(name, value), *(run(session_id) for session_id in ids), return_exceptions=True
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, Nothing)):
            raise error
        await self.expect_over(ids)

    async def keep(self) -> None:
        """End all sessions of a value except one, which may be named by its old id."""
        name = self.rng.choice([*VALUES])
        value = self.value(name)
        kept = await self.make({name: value, "own": "yes"}, ms(max(self.setting.ages)))
        ids, began = [kept], time.monotonic()
        if self.rng.random() < 0.5:
            ids.append(await self.move(kept, {}, GRACE))
        await self.sign_out(name, value, [kept])
        if time.monotonic() > began + GRACE / 1000:  # The grace of the old id may have passed.
            return
        for session_id in ids:  # Other actors may have ended the session.
            reason = await self.call(self.store.ended(session_id))
            ending = self.ledger.endings.get(reason or "")
            assert ending is None or kept not in ending.keep, f"{session_id} should have been kept"

    # ------------------------------------------------------------------ blocks

    async def block(self) -> None:
        """Block a value for a moment."""
        name = self.rng.choice([*VALUES])
        await self.sign_out(name, self.value(name), block=self.rng.choice([3, 30, 80]))

    async def unblock(self) -> None:
        """Unblock a value."""
        name = self.rng.choice([*VALUES])
        value = self.value(name)
        key = f"{name}:{{{value}}}"
        self.ledger.lift(key)
        await self.call(self.store.unblock(name, value))
        self.ledger.lifting[key] -= 1

    async def blocked(self) -> None:
        """Ask for how long a value is blocked."""
        name = self.rng.choice([*VALUES])
        value = self.value(name)
        key, blocks = f"{name}:{{{value}}}", self.ledger.blocks
        until = blocks.get(key, 0)
        left = await self.call(self.store.blocked(name, value))
        assert left is None or left <= ms(1000)
        assert left or blocks.get(key) != until or until < time.time() + MARGIN, f"{key} is blocked"


async def _play(setting: Setting, url: str, seed: str, lengths: tuple[int, int]) -> Counter[str]:
    """Let thirty actors play, check the keyspace after each act, and return the counts.

    *lengths*: the number of acts, and the number of deeds of each actor in an act.
    """
    partitions, (acts, deeds) = 4 if "+cluster" in url else None, lengths
    async with AsyncExitStack() as stack:
        admin = await stack.enter_async_context(client_of(url, decode_responses=True))
        with suppress(ResponseError):  # Small sets must have pages, too. Before Redis 7.2 they always do.
            await everywhere(admin, "CONFIG SET", "set-max-listpack-entries", 0)
        keyspace = Keyspace(admin, f"actors-{secrets.token_hex(8)}", partitions)
        stores: list[SessionStore] = []
        for _ in range(3):
            client = await stack.enter_async_context(client_of(url, client_name="actors"))
            store = SessionStore(
                client,
                references={"user_id": setting.user, "ip": setting.ip},
                prefix=keyspace.prefix,
                partitions=partitions,
                max_age=ms(max(setting.ages)),
                max_lifetime=ms(setting.lifetime) if setting.lifetime else None,
                codec=TextCodec() if setting.text else JSONCodec(),
                timeout=30,
            )
            stores.append(await stack.enter_async_context(store))
        ledger = Ledger(setting, keyspace, stores[0].operations.layout)
        stage = Stage(ledger, stores, keyspace, random.Random(seed))
        actors = [Actor(stage, f"{seed}, actor {n}") for n in range(ACTORS)]
        for _ in range(acts):
            await stage.act(actors, deeds)
            await stage.check()
        await stage.end()
        await keyspace.clear()
    return stage.counts


@pytest.fixture(name="place")
def _place(request: pytest.FixtureRequest) -> str:
    """The URL of a server, or of a cluster, for this file alone."""
    cluster = request.param == "a cluster"
    url: str = request.getfixturevalue("servers").url if cluster else request.getfixturevalue("url")
    return url


@pytest.mark.parametrize(
    ("name", "place"),
    [*((name, "one server") for name in SETTINGS), *((name, "a cluster") for name in ON_A_CLUSTER)],
    indirect=["place"],
)
async def test_thirty_actors(place: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The store keeps its promises while thirty actors use it at the same time."""
    setting, thorough, read = SETTINGS[name], settings().max_examples >= 700, scripts.read
    if thorough and not setting.lasting:
        setting = replace(setting, ages=(*setting.ages, 400, 400, 2000, 2000))
    enough = f"ENOUGH = 0, {setting.enough}"
    assert "ENOUGH = 0, 2000" in read("_store")
    monkeypatch.setattr(scripts, "read", lambda part: read(part).replace("ENOUGH = 0, 2000", enough))
    monkeypatch.setattr(operations, "TOMBSTONE", setting.tombstone)
    monkeypatch.setattr(operations, "_PAGE", setting.page)
    if setting.singly:
        send_singly(monkeypatch)
    counts: Counter[str] = Counter()
    for seed in [f"{name}, play {n}" for n in range(5 if thorough else 1)]:
        try:
            counts += await _play(setting, place, seed, (6, 60) if thorough else (2, 12))
        except BaseException as error:
            error.add_note(f"The seed was {seed!r}.")
            raise
    print(f"{name}:", dict(counts))
