"""The store is compared with a plain model: each random operation is followed by a check of the whole keyspace."""

import asyncio
import itertools
import secrets
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from redis.asyncio import Redis

from rss import (
    Blocked,
    Conflict,
    IdentityChanged,
    LimitExceeded,
    Reference,
    SessionEnded,
    SessionError,
    SessionNotFound,
    SessionStore,
    TextCodec,
)
from rss.engine import operations, scripts
from rss.keys import Partitioned
from tests.bugs import found
from tests.conftest import send_singly
from tests.keyspace import Keyspace, parts, texts
from tests.servers import client_of

T = TypeVar("T")

LUA = Path(__file__).parents[1] / "lua"

MINUTE = 60_000
HOUR = 60 * MINUTE
AGES = {None: HOUR, "1h": HOUR, "2 hours": 2 * HOUR, "3h": 3 * HOUR, "28 days": 28 * 24 * HOUR}
BLOCKS = {"1h": HOUR, "2h": 2 * HOUR, "3h": 3 * HOUR}
REFERENCES = ("user_id", "ip")

IDS = st.integers(0, 39)
STORES = st.integers(0, 1)
TEXTS = st.sampled_from(["x", "id", "_ended", "1", "null", "[1]", "[0x1]", '"', "{}:{", "ü\n"])
# The same value is drawn most often, since most bugs show when sessions share a set.
ONE = st.sampled_from([1, 1, 1, 1, "1", "1", 2, 2, "x", "null", "[1]", "[0x1]", '"', "{}:{", "ü\n"])
LISTS = st.lists(ONE, max_size=3)
NAMES = st.sampled_from(REFERENCES)
FIELDS = st.sampled_from([*REFERENCES, "name", "n"])
# A double in Lua is exact up to 2**53; an integer in Redis has 64 bits.
INTEGERS = st.integers(-3, 9) | st.sampled_from([2**53, 2**53 + 1, 2**62, 2**63 - 1, -(2**53), -(2**63)])
AGE = st.sampled_from([*AGES])
BLOCK = st.sampled_from([*BLOCKS])
MINUTES = st.sampled_from([0, 5, 10, 30])
RARELY = st.sampled_from([False, False, False, True])


@st.composite
def _values(draw: st.DrawFn, *, typed: bool) -> dict[str, Any]:
    reference = st.one_of(ONE, ONE, ONE, st.none(), LISTS) if typed else ONE
    plain = st.one_of(TEXTS, st.integers(), st.none(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False))
    fields = {"ip": reference, "name": plain if typed else TEXTS, "n": INTEGERS}
    joining = st.fixed_dictionaries({"user_id": reference}, optional=fields)
    return draw(st.one_of(joining, joining, st.fixed_dictionaries({}, optional=fields)))


TYPED, TEXT = _values(typed=True), _values(typed=False)


@dataclass
class Session:
    """A live session in the model."""

    values: dict[str, Any]
    #: Milliseconds that the session had left after its last renewal.
    ttl: int
    #: The max_age that the session was given; None means the default of the store.
    age: str | None
    created: int = 0

    @property
    def full(self) -> int:
        """Milliseconds that the session lives after a renewal."""
        return AGES[self.age]


@dataclass
class Model:
    """Sessions, tombstones, blocks, and the ids of expired sessions that may still be in sets."""

    limit: int
    on_limit: str
    identity: bool
    #: The layout of the store if it has partitions.
    layout: Partitioned | None = None
    live: dict[str, Session] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    leads: dict[str, str] = field(default_factory=dict)
    #: The duration of the block of each set.
    blocks: dict[str, str] = field(default_factory=dict)
    stale: set[tuple[str, str]] = field(default_factory=set)

    def texts(self, name: str, values: dict[str, Any]) -> list[str]:
        """Return the texts of the values that a reference field holds."""
        return texts(values.get(name))

    def sets(self, values: dict[str, Any]) -> set[str]:
        """Return the names of the sets for these values."""
        return {f"{name}:{{{text}}}" for name in REFERENCES for text in self.texts(name, values)}

    def follow(self, session_id: str) -> str:
        """Return the id of the session that an id leads to, over at most eight rotations."""
        for _ in range(8):
            successor = self.leads.get(session_id)
            if self.ended.get(session_id) != "rotated" or successor not in {*self.live, *self.ended}:
                break
            session_id = str(successor)
        return session_id

    def values(self, session_id: str) -> dict[str, Any]:
        """Return the values of a session; empty if the session is not alive."""
        return self.live[session_id].values if session_id in self.live else {}

    def members(self, name: str, value: object) -> set[str]:
        """Return the ids of the live sessions with a value."""
        return {i for i, session in self.live.items() if str(value) in self.texts(name, session.values)}

    def missing(self, session_id: str) -> type[SessionError] | None:
        """Return the error that a write by an id raises if there is no session; None if there is one."""
        if session_id in self.ended:
            return SessionEnded
        return None if session_id in self.live else SessionNotFound

    def malformed(self, values: dict[str, Any]) -> bool:
        """Return whether a write of these values is refused before it is sent."""
        return self.identity and isinstance(values.get("user_id"), list)

    def belongs_elsewhere(self, session_id: str, values: dict[str, Any]) -> bool:
        """Return whether a new session with this id would be in another partition than its identity."""
        users = [("user_id", text) for text in self.texts("user_id", values)]
        return self.layout is not None and self.layout.home(users) not in (None, self.layout.place(session_id)[1])

    def changes_identity(self, old: dict[str, Any], new: dict[str, Any]) -> bool:
        """Return whether a write would change the identity of a session."""
        return self.identity and self.texts("user_id", old) != self.texts("user_id", new)

    def cannot_join(self, old: dict[str, Any], new: dict[str, Any]) -> type[SessionError] | None:
        """Return the error by which a limit or a block refuses a write from *old* to *new*, or None."""
        if self.evicted(old, new) is None:
            return LimitExceeded
        return Blocked if self.blocked(old, new) else None

    def blocked(self, old: dict[str, Any], new: dict[str, Any]) -> tuple[str, str] | None:
        """Return field and duration of the first block that a write meets, or None. Only newly joined sets count."""
        for name in REFERENCES:
            for text in self.texts(name, new):
                duration = self.blocks.get(f"{name}:{{{text}}}")
                if duration and text not in self.texts(name, old):
                    return name, duration
        return None

    def end(self, session_id: str, reason: str) -> None:
        """Turn a session into a tombstone."""
        del self.live[session_id]
        self.ended[session_id] = reason

    def evicted(self, old: dict[str, Any], new: dict[str, Any]) -> set[str] | None:
        """Return the ids that are evicted when a session gets these values; None if the write is refused."""
        victims: set[str] = set()
        for text in self.texts("user_id", new):
            if not self.limit or text in self.texts("user_id", old):
                continue
            others = self.members("user_id", text) - victims
            surplus = len(others) - self.limit + 1
            if surplus > 0 and self.on_limit == "refuse":
                return None
            by_age = sorted(others, key=lambda i: self.live[i].created)
            victims |= set(by_age[: max(0, surplus)])
        return victims


class Machine(RuleBasedStateMachine):
    """Two stores on one server or cluster, and the model, do the same operations."""

    loop: asyncio.Runner
    #: The clients of the stores, and an observer, which is synchronous because that is faster.
    clients: list[Redis]
    observer: Any
    patch: pytest.MonkeyPatch
    #: The number of partitions; None for the layout without any.
    partitions: int | None
    prefixes: Iterator[str] = (f"model-{secrets.token_hex(4)}-{n}" for n in itertools.count())

    @initialize(
        strict=st.booleans(),
        limit=st.sampled_from([(0, "evict"), (2, "evict"), (1, "evict"), (2, "refuse")]),
        text=st.booleans(),
        identity=st.booleans(),
        lifetime=st.sampled_from([None, "90m"]),
        page=st.sampled_from(["50", "1"]),
    )
    def begin(
        self, *, strict: bool, limit: tuple[int, str], text: bool, identity: bool, lifetime: str | None, page: str
    ) -> None:
        """Make the stores."""
        self.prefix = next(self.prefixes)
        self.keyspace = Keyspace(self.clients[1], self.prefix, self.partitions)
        if self.partitions and not identity:
            limit = (0, "evict")  # Elsewhere it is refused.
        reference = Reference(limit[0] or None, limit[1], strict, identity)  # type: ignore[arg-type]
        self.text, self.lifetime = text, 90 * MINUTE if lifetime else 10**12
        # With a page of one session, `delete_by` needs fences, and a set of several ids needs several pages.
        self.patch.setattr(operations, "_PAGE", page)
        options: dict[str, Any] = {"codec": TextCodec()} if text else {}
        self.stores = [
            SessionStore(
                client,
                references={"user_id": reference, "ip": Reference()},
                prefix=self.prefix,
                max_age="1h",
                max_lifetime=lifetime,
                partitions=self.partitions,
                **options,
            )
            for client in self.clients
        ]
        layout = Partitioned(self.prefix, 24, self.partitions) if self.partitions else None
        self.model = Model(*limit, identity, layout and replace(layout, identity="user_id" if identity else None))
        self.ids = [f"id{n}" for n in range(4)]
        for value in (1, "x", 2):
            self.sign_in({"user_id": value, "ip": "x", "n": 1}, None, 0)

    def teardown(self) -> None:
        """Close the stores and remove all keys."""
        if hasattr(self, "prefix"):
            self.do(self._clear())

    async def _clear(self) -> None:
        for store in self.stores:
            await store.aclose()
        await self.keyspace.clear()

    # ------------------------------------------------------------------ operations

    @rule(n=IDS, data=st.data(), age=AGE, create=st.booleans(), which=STORES, expire=RARELY)
    def write(self, n: int, data: st.DataObject, age: str | None, which: int, *, create: bool, expire: bool) -> None:
        """Write values, perhaps to the id of a session that has just expired and whose values must no longer count."""
        given, before = self.pick(n), dict[str, Any]()
        if expire and self.model.live:
            given = [*self.model.live][n % len(self.model.live)]
            before = self.model.live[given].values
            self.let_expire(given, which)
        session_id = self.model.follow(given)
        held, missing = self.model.values(session_id), self.model.missing(session_id)
        values = self.draw(data, held)
        expected = self.draw_expected(data, session_id)
        after = {**held, **values}
        set_ = self.stores[which].set(given, values, age, create=create, expect=expected)
        if self.model.malformed(values):
            self.refuse(set_, ValueError)
        elif missing and not (create and missing is SessionNotFound):
            self.refuse(set_, missing)
        elif missing and self.model.belongs_elsewhere(session_id, values):
            self.refuse(set_, ValueError)
        elif self.differs(held, expected):
            self.refuse(set_, Conflict)
        elif not missing and self.model.changes_identity(held, after):
            self.refuse(set_, IdentityChanged)
        elif refused := self.model.cannot_join(held, after):
            self.refuse(set_, refused, self.model.blocked(held, after))
        else:
            assert self.do(set_) == values
            self.settle(session_id, after, age, was=held)
        self.check()
        for text in self.model.texts("user_id", before):
            self.find_by("user_id", text, which)

    @rule(value=ONE, number=st.integers(2, 3), which=STORES)
    def crowd(self, value: str | int, number: int, which: int) -> None:
        """Sign one user in on several devices."""
        for _ in range(number):
            self.sign_in({"user_id": value}, None, which)

    @rule(data=st.data(), age=AGE, which=STORES)
    def create(self, data: st.DataObject, age: str | None, which: int) -> None:
        """Make a session with an id that the store mints."""
        self.sign_in(self.draw(data), age, which)

    def sign_in(self, values: dict[str, Any], age: str | None, which: int) -> None:
        """Create a session, in the store and in the model."""
        create = self.stores[which].create(values, age)
        if self.model.malformed(values):
            self.refuse(create, ValueError)
        elif refused := self.model.cannot_join({}, values):
            self.refuse(create, refused, self.model.blocked({}, values))
        else:
            session_id = self.do(create)
            self.ids.append(session_id)
            self.settle(session_id, values, age)
        self.check()

    @rule(n=IDS, fields=st.lists(FIELDS, min_size=1), age=AGE, which=STORES)
    def unset(self, n: int, fields: list[str], age: str | None, which: int) -> None:
        """Unset fields."""
        session_id = self.model.follow(self.pick(n))
        held = self.model.values(session_id)
        after = {k: v for k, v in held.items() if k not in fields}
        unset = self.stores[which].unset(self.pick(n), fields, age)
        if self.model.missing(session_id) is SessionEnded:
            self.refuse(unset, SessionEnded)
        elif self.model.changes_identity(held, after):
            self.refuse(unset, IdentityChanged)
        else:
            self.do(unset)
            if session_id in self.model.live:
                self.model.live[session_id].values = after
                self.renew(session_id, age)
        self.check()

    @rule(n=IDS, fields=st.lists(FIELDS, min_size=1), which=STORES)
    def pop(self, n: int, fields: list[str], which: int) -> None:
        """Pop fields, and compare their values."""
        session_id = self.model.follow(self.pick(n))
        held = self.model.values(session_id)
        after = {k: v for k, v in held.items() if k not in fields}
        pop = self.stores[which].pop(self.pick(n), fields)
        if missing := self.model.missing(session_id):
            self.refuse(pop, missing)
        elif self.model.changes_identity(held, after):
            self.refuse(pop, IdentityChanged)
        else:
            assert self.do(pop) == self.read({k: v for k, v in held.items() if k in fields})
            self.model.live[session_id].values = after
        self.check()

    @rule(n=IDS, by=INTEGERS, which=STORES)
    def increment(self, n: int, by: int, which: int) -> None:
        """Increment a field, exactly over 64 bits."""
        session_id = self.model.follow(self.pick(n))
        increment = self.stores[which].increment(self.pick(n), "n", by)
        total = self.model.values(session_id).get("n", 0) + by
        if missing := self.model.missing(session_id):
            self.refuse(increment, missing)
        elif not -(2**63) <= total < 2**63:
            self.refuse(increment, ValueError)
        else:
            assert self.do(increment) == total
            self.model.live[session_id].values["n"] = total
        self.check()

    @rule(n=IDS, age=AGE, which=STORES, how=st.sampled_from(["touch", "get", "get if due"]), minutes=MINUTES)
    def touch(self, n: int, age: str | None, which: int, how: str, minutes: int) -> None:
        """Renew a session after some time, by `touch`, by `get`, or by a `get` that renews only if due."""
        session_id = self.model.follow(self.pick(n))
        self.grow_old(session_id, minutes)
        session = self.model.live.get(session_id)
        if how == "touch":
            touched = self.do(self.stores[which].touch(self.pick(n), age))
        else:
            age = None
            touched = bool(self.do(self.stores[which].get(self.pick(n), touch="7m" if how == "get if due" else True)))
        assert touched == (session is not None)
        if session and (how != "get if due" or session.ttl + 7 * MINUTE <= min(session.full, self.lifetime)):
            self.renew(session_id, age)
        self.check()

    @rule(n=IDS, minutes=MINUTES)
    def wait(self, n: int, minutes: int) -> None:
        """Let time pass for one session."""
        self.grow_old(self.pick(n), minutes)
        self.check()

    def grow_old(self, session_id: str, minutes: int) -> None:
        """Take minutes from the TTL of a session, in Redis and in the model."""
        session = self.model.live.get(session_id)
        if session and minutes and session.ttl > (minutes + 15) * MINUTE:
            session.ttl -= minutes * MINUTE
            key = self.stores[0].get_session_key(session_id)
            self.observer.pexpire(key, self.observer.pttl(key) - minutes * MINUTE)

    @rule(n=IDS, data=st.data(), which=STORES, reason=st.sampled_from(["deleted", "bye"]))
    def delete(self, n: int, data: st.DataObject, which: int, reason: str) -> None:
        """End one session, perhaps only if it holds the expected values."""
        session_id = self.model.follow(self.pick(n))
        expected = self.draw_expected(data, session_id)
        deleted = self.do(self.stores[which].delete(self.pick(n), expect=expected, reason=reason))
        alive = session_id in self.model.live
        assert deleted == (alive and not self.differs(self.model.values(session_id), expected))
        if deleted:
            self.model.end(session_id, reason)
        self.check()

    @rule(n=IDS, data=st.data(), age=AGE, which=STORES, grace=st.booleans())
    def rotate(self, n: int, data: st.DataObject, age: str | None, which: int, *, grace: bool) -> None:
        """Give a session a new id and values. A change of the identity gives no grace."""
        old = self.pick(n)
        self.rotate_to(old, self.draw(data, self.model.values(old)), age, which, grace=grace)

    @rule(n=IDS, value=ONE, which=STORES, grace=st.booleans())
    def log_in(self, n: int, value: str | int, which: int, *, grace: bool) -> None:
        """Sign in a visitor, or change the user."""
        self.rotate_to(self.pick(n), {"user_id": value}, None, which, grace=grace)

    @rule(n=IDS, which=STORES, grace=st.booleans(), block=st.none() | BLOCK)
    def change_password(self, n: int, which: int, block: str | None, *, grace: bool) -> None:
        """Give a session a new id, and end all others of its user by a call that names the old id."""
        old = self.pick(n)
        self.rotate_to(old, {}, None, which, grace=grace)
        for text in self.model.texts("user_id", self.model.values(self.ids[-1])):
            self.delete_by_keeping([old], "user_id", text, which, block)

    def rotate_to(self, old: str, values: dict[str, Any], age: str | None, which: int, *, grace: bool) -> None:
        """Rotate a session, in the store and in the model."""
        held = self.model.values(old)
        after = {**held, **values}
        rotate = self.stores[which].rotate(old, values, age, grace="10m" if grace else None)
        if self.model.malformed(values):
            self.refuse(rotate, ValueError)
        elif missing := self.model.missing(old):
            self.refuse(rotate, missing)
        elif refused := self.model.cannot_join(held, after):
            self.refuse(rotate, refused, self.model.blocked(held, after))
        else:
            new = self.do(rotate)
            self.ids.append(new)
            session = self.model.live.pop(old)
            self.model.ended[old] = "rotated"
            if grace and not self.model.changes_identity(held, after):
                self.model.leads[old] = new
            self.settle(new, after, age or session.age, was=held)
            assert self.model.live[new].created == session.created
            if not age:
                self.model.live[new].ttl = session.ttl
        self.check()

    @rule(
        name=NAMES,
        value=ONE,
        keep=st.lists(IDS, max_size=2),
        which=STORES,
        block=st.none() | st.none() | BLOCK,
        again=st.booleans(),
    )
    def delete_by(
        self, name: str, value: str | int, keep: list[int], which: int, block: str | None, *, again: bool
    ) -> None:
        """End all sessions with a value except some, which may have other values, and perhaps block the value.

        If again, end what an earlier call kept of a value that it blocked.
        """
        given = [self.pick(n) for n in keep]
        for text in self.model.texts(name, self.model.values(self.model.follow(given[0]))) if keep else ():
            value = text
        for blocked in self.model.blocks if again else ():
            name, value = blocked.removesuffix("}").split(":{", 1)
        self.delete_by_keeping(given, name, value, which, block)

    def delete_by_keeping(self, given: list[str], name: str, value: str | int, which: int, block: str | None) -> None:
        """End all sessions with a value except those given, in the store and in the model."""
        kept = {*given, *map(self.model.follow, given)}
        reason = f"for-{block}" if block else "all"
        delete_by = self.stores[which].delete_by(name, value, keep=given, reason=reason, block=block)
        self.end_all(delete_by, f"{name}:{{{value}}}", kept, reason, block)

    @rule(name=NAMES, value=ONE, which=STORES, duration=BLOCK, again=st.booleans())
    def block(self, name: str, value: str | int, which: int, duration: str, *, again: bool) -> None:
        """End all sessions with a value and block it, perhaps a value that is blocked already."""
        for blocked in self.model.blocks if again else ():
            name, value = blocked.removesuffix("}").split(":{", 1)
        reason = f"for-{duration}"
        block = self.stores[which].block(name, value, duration, reason=reason)
        self.end_all(block, f"{name}:{{{value}}}", set(), reason, duration)

    def end_all(
        self, operation: Coroutine[Any, Any, int], key: str, kept: set[str], reason: str, block: str | None
    ) -> None:
        """Run a call that ends all sessions in a set, and note its effect in the model.

        A block is replaced only by a block that is at least as long.
        """
        ending = {i for i, session in self.model.live.items() if key in self.model.sets(session.values)} - kept
        assert self.do(operation) == len(ending)
        for session_id in ending:
            self.model.end(session_id, reason)
        self.model.stale = {(k, i) for k, i in self.model.stale if k != key or i in kept}
        if block and BLOCKS[block] >= BLOCKS.get(self.model.blocks.get(key, ""), 0):
            self.model.blocks[key] = block
        self.check()

    @rule(name=NAMES, value=ONE, which=STORES, unblock=st.booleans())
    def unblock(self, name: str, value: str | int, which: int, *, unblock: bool) -> None:
        """Ask for how long a value is blocked, and perhaps unblock it."""
        for blocked in self.model.blocks if unblock else ():
            name, value = blocked.removesuffix("}").split(":{", 1)
        key = f"{name}:{{{value}}}"
        left, block = self.do(self.stores[which].blocked(name, value)), self.model.blocks.get(key)
        assert (left is None) == (block is None)
        if left and block:
            assert BLOCKS[block] - MINUTE < left / timedelta(milliseconds=1) <= BLOCKS[block]
        if unblock:
            assert self.do(self.stores[which].unblock(name, value)) == (block is not None)
            self.model.blocks.pop(key, None)
        self.check()

    @rule(name=NAMES, value=ONE, which=STORES)
    def find_by(self, name: str, value: str | int, which: int) -> None:
        """Read and count by reference. Only the quick count includes expired ids, which the other reads remove."""
        members, key = self.model.members(name, value), f"{name}:{{{value}}}"
        stale = sum(k == key for k, _ in self.model.stale)
        count = self.do(self.stores[which].count_by(name, value, exact=False))
        assert len(members) <= count <= len(members) + stale
        assert self.do(self.stores[which].count_by(name, value)) == len(members)
        assert sorted(self.do(self.stores[which].ids_by(name, value))) == sorted(members)
        assert self.do(self._find(which, name, value)) == {
            i: {"id": i, **self.read(self.model.live[i].values)} for i in members
        }
        self.model.stale = {(k, i) for k, i in self.model.stale if k != key}
        self.check()

    async def _find(self, which: int, name: str, value: str | int) -> dict[str, dict[str, Any]]:
        return {session["id"]: session async for session in self.stores[which].find_by(name, value)}

    @rule(n=IDS, which=STORES, fields=st.none() | st.lists(FIELDS, min_size=1))
    def get(self, n: int, which: int, fields: list[str] | None) -> None:
        """Read one session, its remaining time, and the reason of its end if it has ended."""
        session_id = self.model.follow(self.pick(n))
        session = self.model.live.get(session_id)
        expected: dict[str, Any] = {}
        if session:
            values = {k: v for k, v in session.values.items() if fields is None or k in fields}
            expected = {"id": session_id, **self.read(values)}
        assert self.do(self.stores[which].get(self.pick(n), fields)) == expected
        assert self.do(self.stores[which].ended(self.pick(n))) == self.model.ended.get(session_id)
        left = self.do(self.stores[which].ttl(self.pick(n)))
        assert (left is None) == (session is None)
        if left and session:
            assert session.ttl - MINUTE < left / timedelta(milliseconds=1) <= session.ttl

    @rule(n=IDS, which=STORES)
    def expire(self, n: int, which: int) -> None:
        """Let a session, or more often a tombstone, expire."""
        self.let_expire(self.ids[-1 - n % len(self.ids)], which)

    def let_expire(self, session_id: str, which: int) -> None:
        """Let a session or tombstone expire, in Redis and in the model, and wait until its key is gone."""
        if session := self.model.live.pop(session_id, None):
            self.model.stale |= {(name, session_id) for name in self.model.sets(session.values)}
            assert self.do(self.stores[which].touch(session_id, timedelta(milliseconds=1)))
        self.model.ended.pop(session_id, None)
        self.model.leads.pop(session_id, None)
        key = self.stores[0].get_session_key(session_id)
        self.observer.pexpire(key, 1)
        while self.observer.exists(key):
            pass
        self.check()

    # ------------------------------------------------------------------ how it is done

    def do(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run an operation to its end."""
        return self.loop.get_loop().run_until_complete(operation)

    def refuse(
        self,
        operation: Coroutine[Any, Any, object],
        error: type[Exception],
        block: tuple[str, str] | None = None,
    ) -> None:
        """Run an operation that must raise *error*. *block*: the field and the duration that `Blocked` must name."""
        with pytest.raises(error) as raised:
            self.do(operation)
        assert type(raised.value) is error
        if isinstance(raised.value, Blocked) and block:
            assert (raised.value.field, raised.value.reason) == (block[0], f"for-{block[1]}")
            left = (raised.value.until - datetime.now(UTC)) / timedelta(milliseconds=1)
            assert BLOCKS[block[1]] - MINUTE < left <= BLOCKS[block[1]]

    def pick(self, n: int) -> str:
        """Choose an id: one of the last ten, or of a live session."""
        if n >= 10 and self.model.live:
            return [*self.model.live][-1 - n % len(self.model.live)]
        return self.ids[-1 - n % min(len(self.ids), 10)]

    def draw(self, data: st.DataObject, held: dict[str, Any] | None = None) -> dict[str, Any]:
        """Choose values that the codec can store; references may repeat the *held* values, or add one to them."""
        values = data.draw(TEXT if self.text else TYPED)
        how = data.draw(st.sampled_from(["new", "same", "more", "more"])) if held else "new"
        if how != "new":
            values = {k: v for k, v in values.items() if k not in REFERENCES}
            values |= {k: v for k, v in (held or {}).items() if k in REFERENCES}
        name = data.draw(NAMES) if how == "more" and not self.text else None
        if name and not (self.model.identity and name == "user_id"):
            value = values.get(name)
            values[name] = [*(value if isinstance(value, list) else [] if value is None else [value]), 2]
        return values

    def draw_expected(self, data: st.DataObject, session_id: str) -> dict[str, Any] | None:
        """Choose the values to expect of a session: often none, or the values that it holds."""
        how = data.draw(st.sampled_from(["none", "none", "none", "held", "held", "drawn", "drawn"]))
        if how == "held":
            held = self.model.values(session_id)
            return {name: held.get(name) for name in data.draw(st.lists(FIELDS, unique=True))}
        return self.draw(data) if how == "drawn" else None

    def differs(self, held: dict[str, Any], expected: dict[str, Any] | None) -> bool:
        """Return whether values differ from the expected ones; None equals an absent value."""
        none = [(), self.stored("name", None)]
        for name, value in (expected or {}).items():
            stored = self.stored(name, held[name]) if name in held else ()
            if stored != self.stored(name, value) if value is not None else stored not in none:
                return True
        return False

    def stored(self, name: str, value: object) -> object:
        """Return the data that Redis holds for a value; () for None with TextCodec, which cannot store None."""
        if self.text and value is None:
            return ()
        data = self.stores[0].fields.encode_value(name, value)
        return data.encode() if isinstance(data, str) else data

    def read(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return values as the codec decodes them."""
        return {k: str(v) for k, v in values.items()} if self.text else values

    def renew(self, session_id: str, age: str | None) -> None:
        """Renew a session in the model, for *age*, else for the max_age that it has, else for the default."""
        session = self.model.live[session_id]
        session.age = age or session.age
        session.ttl = min(session.full, self.lifetime)

    def settle(
        self, session_id: str, values: dict[str, Any], age: str | None, was: dict[str, Any] | None = None
    ) -> None:
        """Note in the model what a write did."""
        before = self.model.live.pop(session_id, None)
        for victim in self.model.evicted(was or {}, values) or ():
            self.model.end(victim, "evicted")
        key = self.stores[0].get_session_key(session_id)
        created = int(self.observer.hget(key, "_created") or 0)
        while before is None and self._milliseconds(key) <= created:
            pass  # Sessions of one millisecond have no order, and a run must be repeatable.
        assert before is None or before.created == created
        self.model.stale -= {(name, session_id) for name in self.model.sets(values)}
        self.model.live[session_id] = Session(values, 0, before.age if before else None, created)
        self.renew(session_id, age)

    def _milliseconds(self, key: str) -> int:
        """Return the time of the server that has a key."""
        seconds, microseconds = map(int, self.observer.eval("return redis.call('TIME')", 1, key))
        return seconds * 1000 + microseconds // 1000

    def check(self) -> None:
        """Check promises 1 to 3 over the whole keyspace, and the content of fences."""
        self.do(self._check())

    async def _check(self) -> None:
        model, seen = self.model, await self.keyspace.look()

        # 1. A live session is in the set of each of its values, and in no other.
        # 2. Every key has a TTL, and a set lives at least as long as its members.
        beside = self.keyspace.beside
        named = {i: {beside(i, name) for name in model.sets(one.values)} for i, one in model.live.items()}
        seen.check(named, {(beside(i, name), i) for name, i in model.stale})
        # 3. A session that was ended is a tombstone. Other hashes are live sessions, with the fields and TTLs written.
        found, expires = seen.hashes, seen.expires
        assert {i: fields["_ended"] for i, fields in found.items() if "_ended" in fields} == model.ended
        assert {i: fields["_next"] for i, fields in found.items() if "_next" in fields} == model.leads
        assert found.keys() == model.live.keys() | model.ended.keys()
        for session_id, session in model.live.items():
            noted = {"_max_age": str(session.full)} if session.age else {}
            assert found[session_id].keys() == {"id", "_created", *noted, *session.values}
            assert noted.items() <= found[session_id].items()
            assert session.ttl - MINUTE < expires[f"{{{session_id}}}"] - seen.now <= session.ttl
        # A fence holds a block until its end, and a mark for each finished call of `delete_by`.
        fences = seen.fences
        reasons = {name: fence.pop("why") for name, fence in fences.items() if fence.pop("until", None)}
        layout = self.stores[0].operations.layout
        blocks = {part: block for name, block in model.blocks.items() for part in parts(layout, name)}
        assert reasons == {name: f"for-{block}" for name, block in blocks.items()}
        for name, block in blocks.items():
            assert BLOCKS[block] - MINUTE < expires[f"_fence:{name}"] - seen.now <= BLOCKS[block]
        assert all(call.startswith("call:") for fence in fences.values() for call in fence)
        assert {done for fence in fences.values() for done in fence.values()} <= {"done"}
        assert all(len(fence) <= 1 for fence in fences.values())


def _run(url: str, *, partitions: int | None = None, **options: Any) -> None:
    """Run the machine on a server, or on a cluster, where there are 64 partitions if not said otherwise."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    how = settings(deadline=None, stateful_step_count=25, suppress_health_check=slow, **options)
    on_cluster = "+cluster" in url
    kind: Any = redis.RedisCluster if on_cluster else redis.Redis
    partitions = partitions or (64 if on_cluster else None)
    with (
        asyncio.Runner() as loop,
        pytest.MonkeyPatch.context() as patch,
        kind.from_url(url.replace("+cluster", ""), decode_responses=True) as observer,
    ):
        clients = [client_of(url), client_of(url, decode_responses=True)]
        bound = {"loop": loop, "clients": clients, "observer": observer, "patch": patch, "partitions": partitions}
        machine = type("BoundMachine", (Machine,), bound)
        try:
            run_state_machine_as_test(machine, settings=how)
        finally:
            for client in clients:
                loop.run(client.aclose())


def test_the_store_does_what_the_model_does(redis_url: str) -> None:
    """The store does what the model does, in random operations through two clients."""
    _run(redis_url)


def test_the_store_does_what_the_model_does_in_partitions(redis_url: str) -> None:
    """The store does what the model does if its sessions are in four partitions, and logins move them."""
    _run(redis_url, partitions=4)


def test_the_store_does_what_the_model_does_on_a_cluster(cluster_url: str) -> None:
    """The store does what the model does if its sessions are on three masters, and logins move them between these."""
    _run(cluster_url, partitions=4, max_examples=settings().max_examples // 3)  # Each takes three times as long.


def test_the_store_does_what_the_model_does_without_coalescing(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store does what the model does without coalescing, too."""
    send_singly(monkeypatch)
    _run(redis_url)


BUGS = {
    # sets
    "a session stays in its old sets": ("if id ~= own or not stays then", "if id ~= own then"),
    "a second value is not joined": ("(wanted[1] ~= set or wanted[2])", "wanted[1] ~= set"),
    "a rotated session is in no set it was in": ("id ~= session.held[1] and #keeps or 0", "0"),
    "the living are pruned": ("ids[j])) == 0 then", "ids[j])) == 1 then"),
    # times
    "a set dies before its members": ("(before >= 0 and now + before < till)", "false"),
    "no set is renewed": ("if horizon(ttl) > horizon(session.ttl - 1000) then", "if false then"),
    "a kept set dies before its member": ("if keeps[1] and horizon", "if false and horizon"),
    "a new set has no TTL": ('members[1] and redis.call("PTTL", set) or -2', "-1"),
    "an old session is not renewed by a read": ("math.min(idle, full / 2) > full", "math.min(idle, full / 2) > 0"),
    "a young session is renewed by a read": ("math.min(idle, full / 2) > full", "math.min(idle, full / 2) > 2 * full"),
    "the default is not noted when it is given": ("tonumber(held[4] or 0)", "tonumber(held[4] or max_age)"),
    # ends
    "a late write revives a session": ("if ended then return", "if false then return"),
    "one too many stays": ("if #live < limit then", "if #live <= limit then"),
    "the youngest goes": (".created < ", ".created > "),
    "keep does not follow grace": ("first_page and #keep or 0", "0"),
    # identity
    "a write changes the identity": ("local after = identity and", "local after = false and"),
    "another identity gets grace": ("if changes_identity(session) then grace = nil end", ""),
    # blocks
    "a blocked value is joined": ("i <= joined and till > now", "false"),
    "a blocked value cannot be left": ("i <= joined and till > now", "till > now"),
    "a shorter block takes the place of a longer one": ("if till > before then", "if till + 1e15 > before then"),
    "a block ends with a call that needs a fence": ("if blocked[1] then", "if false then"),
    "a fence remembers calls that are done": ('redis.call("UNLINK", fence)', ""),
    "nothing is unblocked": ('redis.call("HDEL", KEYS[key], "until", "why")', ""),
    # expectations
    "a set expects nothing": ("if expectations > 0 and differs", "if false and differs"),
    "a delete expects nothing": (
        "if not session.ttl or differs(session, expected, expectations) then",
        "if false then",
    ),
    "no value is not what None expects": ('how ~= "holds"', 'how == "lacks"'),
    # counting
    "a sum is rounded": ("math.abs(sum) < 2 ^ 53 and sum", "sum"),
}


@pytest.mark.timeout(300)  # Some bugs are found after several hundred examples.
@pytest.mark.parametrize("bug", BUGS)
def test_the_model_finds_a_bug(redis_url: str, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """A bug planted in a script makes the comparison with the model fail."""
    (right, wrong), read = BUGS[bug], scripts.read
    assert any(right in file.read_text() for file in LUA.glob("*.lua"))
    monkeypatch.setattr(scripts, "read", lambda name: read(name).replace(right, wrong))
    with found():
        _run(
            redis_url,
            max_examples=500,
            database=None,
            phases=[Phase.generate],
            derandomize=True,
            report_multiple_bugs=False,
        )
