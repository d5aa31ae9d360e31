"""The store against a plain model of it: random operations, and after each one a look at the whole keyspace."""

import asyncio
import hashlib
import itertools
import secrets
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from redis.asyncio import Redis

from rss import LimitExceeded, Reference, SessionEnded, SessionError, SessionNotFound, SessionStore, TextCodec, scripts
from rss.testing import RedisServer
from tests.conftest import send_singly

T = TypeVar("T")

HOUR = 3_600_000
AGES = {None: 28 * 24 * HOUR, "1h": HOUR, "2 hours": 2 * HOUR, "3h": 3 * HOUR}

IDS = st.integers(0, 9)
TEXTS = st.sampled_from(["x", "id", "_ended", "1", "null", "[1]", "[0x1]", '"', "{}:{", "ü\n"])
# Most often the same value: the interesting things happen when sessions meet.
ONE = st.sampled_from([1, 1, 1, 1, "1", "1", 2, 2, "x", "null", "[1]", "[0x1]", '"', "{}:{", "ü\n"])
LISTS = st.lists(ONE, max_size=3)
FIELDS = st.sampled_from(["user_id", "ip", "name", "n"])
AGE = st.sampled_from([*AGES])
RARELY = st.sampled_from([False, False, False, True])


@st.composite
def _values(draw: st.DrawFn, *, typed: bool) -> dict[str, Any]:
    reference = st.one_of(ONE, ONE, ONE, st.none(), LISTS) if typed else ONE
    plain = st.one_of(TEXTS, st.integers(), st.none(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False))
    fields = {"ip": reference, "name": plain if typed else TEXTS, "n": st.integers(0, 9)}
    joining = st.fixed_dictionaries({"user_id": reference}, optional=fields)
    return draw(st.one_of(joining, joining, st.fixed_dictionaries({}, optional=fields)))


TYPED, TEXT = _values(typed=True), _values(typed=False)


@dataclass
class Session:
    """What the model knows of a live session."""

    values: dict[str, Any]
    ttl: int
    age: int
    created: int = 0


@dataclass
class Model:
    """Sessions, tombstones, and the ids of expired sessions that may still stand in sets."""

    limit: int
    on_limit: str
    live: dict[str, Session] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    leads: dict[str, str] = field(default_factory=dict)
    stale: set[tuple[str, str]] = field(default_factory=set)

    def texts(self, name: str, values: dict[str, Any]) -> list[str]:
        """Return the texts of the values that a reference field holds."""
        value = values.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        return list(dict.fromkeys(str(one) for one in listed))

    def sets(self, values: dict[str, Any]) -> set[str]:
        """Return the names of the sets for these values."""
        return {f"{name}:{{{text}}}" for name in ("user_id", "ip") for text in self.texts(name, values)}

    def follow(self, session_id: str) -> str:
        """Return the id of the session that an id leads to."""
        while self.ended.get(session_id) == "rotated" and session_id in self.leads:
            successor = self.leads[session_id]
            if successor not in self.live and successor not in self.ended:
                break
            session_id = successor
        return session_id

    def members(self, name: str, value: object) -> set[str]:
        """Return the ids of the live sessions with a value."""
        return {i for i, session in self.live.items() if str(value) in self.texts(name, session.values)}

    def refusal(self, session_id: str) -> type[SessionError] | None:
        """Return what a write by an id raises."""
        if session_id in self.ended:
            return SessionEnded
        return None if session_id in self.live else SessionNotFound

    def end(self, session_id: str, reason: str) -> None:
        """Turn a session into a tombstone."""
        del self.live[session_id]
        self.ended[session_id] = reason

    def evicted(self, old: dict[str, Any], new: dict[str, Any], evicted: set[str]) -> set[str] | None:
        """Return who goes for a session to get these values, None if it is refused; *evicted* decides among equals."""
        victims: set[str] = set()
        for text in self.texts("user_id", new):
            if not self.limit or text in self.texts("user_id", old):
                continue
            others = self.members("user_id", text) - victims
            surplus = len(others) - self.limit + 1
            if surplus > 0 and self.on_limit == "refuse":
                return None
            by_age = sorted(others, key=lambda i: (self.live[i].created, i not in evicted))
            victims |= set(by_age[: max(0, surplus)])
        return victims


class Machine(RuleBasedStateMachine):
    """Two stores on one server, doing what the model does."""

    loop: asyncio.Runner
    clients: list[Redis]
    prefixes: Iterator[str] = (f"model-{secrets.token_hex(4)}-{n}" for n in itertools.count())

    @initialize(
        strict=st.booleans(),
        limit=st.sampled_from([(0, "evict"), (2, "evict"), (1, "evict"), (2, "refuse")]),
        text=st.booleans(),
        lifetime=st.sampled_from([None, "90m"]),
    )
    def begin(self, *, strict: bool, limit: tuple[int, str], text: bool, lifetime: str | None) -> None:
        """Make the stores."""
        self.prefix = next(self.prefixes)
        reference = Reference(limit=limit[0] or None, on_limit=limit[1], strict=strict)  # type: ignore[arg-type]
        self.text, self.lifetime = text, 90 * HOUR // 60 if lifetime else 10**12
        options: dict[str, Any] = {"codec": TextCodec()} if text else {}
        self.stores = [
            SessionStore(
                client,
                references={"user_id": reference, "ip": Reference()},
                prefix=self.prefix,
                max_lifetime=lifetime,
                **options,
            )
            for client in self.clients
        ]
        self.model = Model(*limit)
        self.ids = [f"id{n}" for n in range(4)]

    def teardown(self) -> None:
        """Leave nothing behind."""
        if hasattr(self, "prefix"):
            self.do(self._clear())

    async def _clear(self) -> None:
        keys = [key async for key in self.clients[1].scan_iter(match=f"{self.prefix}:*", count=1000)]
        if keys:
            await self.clients[1].unlink(*keys)

    # ------------------------------------------------------------------ operations

    @rule(n=IDS, data=st.data(), age=AGE, create=st.booleans(), which=st.integers(0, 1), expire=RARELY)
    def write(self, n: int, data: st.DataObject, age: str | None, which: int, *, create: bool, expire: bool) -> None:
        """Write values, by set, perhaps where a session has just expired: then it no longer counts for what it had."""
        given, before = self.pick(n), dict[str, Any]()
        if expire and self.model.live:
            given = [*self.model.live][n % len(self.model.live)]
            before = self.model.live[given].values
            self.let_expire(given, which)
        session_id, values = self.model.follow(given), data.draw(TEXT if self.text else TYPED)
        set_ = self.stores[which].set(given, values, age, create=create)
        refused = self.model.refusal(session_id)
        held = self.model.live[session_id].values if session_id in self.model.live else {}
        if refused and not (create and refused is SessionNotFound):
            self.refuse(set_, refused)
        elif self.model.evicted(held, values, set()) is None:
            self.refuse(set_, LimitExceeded)
        else:
            self.do(set_)
            self.settle(session_id, {**held, **values}, self.age(session_id, age), was=held)
        self.check()
        for text in self.model.texts("user_id", before):
            self.find_by("user_id", text, which)

    @rule(value=ONE, number=st.integers(2, 3), which=st.integers(0, 1))
    def crowd(self, value: str | int, number: int, which: int) -> None:
        """Sign one user in on several devices."""
        for _ in range(number):
            self.sign_in({"user_id": value}, None, which)

    @rule(data=st.data(), age=AGE, which=st.integers(0, 1))
    def create(self, data: st.DataObject, age: str | None, which: int) -> None:
        """Make a session with an id of the store's."""
        self.sign_in(data.draw(TEXT if self.text else TYPED), age, which)

    def sign_in(self, values: dict[str, Any], age: str | None, which: int) -> None:
        """Do that, here and in the model."""
        victims = self.model.evicted({}, values, set())
        write = self.stores[which].create(values, age)
        if victims is None:
            self.refuse(write, LimitExceeded)
        else:
            session_id = self.do(write)
            self.ids.append(session_id)
            self.settle(session_id, values, self.age(session_id, age))
        self.check()

    @rule(n=IDS, fields=st.lists(FIELDS, min_size=1), age=AGE, which=st.integers(0, 1))
    def unset(self, n: int, fields: list[str], age: str | None, which: int) -> None:
        """Take fields out."""
        session_id = self.model.follow(self.pick(n))
        unset = self.stores[which].unset(self.pick(n), fields, age)
        if self.model.refusal(session_id) is SessionEnded:
            self.refuse(unset, SessionEnded)
        else:
            self.do(unset)
        if session_id in self.model.live:
            session = self.model.live[session_id]
            session.values = {k: v for k, v in session.values.items() if k not in fields}
            session.age = self.age(session_id, age)
            session.ttl = min(session.age, self.lifetime)
        self.check()

    @rule(n=IDS, fields=st.lists(FIELDS, min_size=1), which=st.integers(0, 1))
    def pop(self, n: int, fields: list[str], which: int) -> None:
        """Take fields out and see what they held."""
        session_id = self.model.follow(self.pick(n))
        pop = self.stores[which].pop(self.pick(n), fields)
        if refused := self.model.refusal(session_id):
            self.refuse(pop, refused)
        else:
            values = self.model.live[session_id].values
            assert self.do(pop) == self.read({k: v for k, v in values.items() if k in fields})
            self.model.live[session_id].values = {k: v for k, v in values.items() if k not in fields}
        self.check()

    @rule(n=IDS, by=st.integers(-3, 3), which=st.integers(0, 1))
    def increment(self, n: int, by: int, which: int) -> None:
        """Count."""
        session_id = self.model.follow(self.pick(n))
        increment = self.stores[which].increment(self.pick(n), "n", by)
        if refused := self.model.refusal(session_id):
            self.refuse(increment, refused)
        else:
            values = self.model.live[session_id].values
            values["n"] = values.get("n", 0) + by
            assert self.do(increment) == values["n"]
        self.check()

    @rule(n=IDS, age=AGE, which=st.integers(0, 1), by_get=st.booleans())
    def touch(self, n: int, age: str | None, which: int, *, by_get: bool) -> None:
        """Renew, by touch or by get."""
        session_id = self.model.follow(self.pick(n))
        if by_get:
            age = None
            touched = bool(self.do(self.stores[which].get(self.pick(n), touch=True)))
        else:
            touched = self.do(self.stores[which].touch(self.pick(n), age))
        assert touched == (session_id in self.model.live)
        if touched:
            session = self.model.live[session_id]
            session.age = self.age(session_id, age)
            session.ttl = min(session.age, self.lifetime)
        self.check()

    @rule(n=IDS, which=st.integers(0, 1), reason=st.sampled_from(["deleted", "bye"]))
    def delete(self, n: int, which: int, reason: str) -> None:
        """End one session."""
        session_id = self.model.follow(self.pick(n))
        deleted = self.do(self.stores[which].delete(self.pick(n), reason=reason))
        assert deleted == (session_id in self.model.live)
        if deleted:
            self.model.end(session_id, reason)
        self.check()

    @rule(n=IDS, data=st.data(), age=AGE, which=st.integers(0, 1), grace=st.booleans())
    def rotate(self, n: int, data: st.DataObject, age: str | None, which: int, *, grace: bool) -> None:
        """Give a new id and values."""
        old, values = self.pick(n), data.draw(TEXT if self.text else TYPED)
        rotate = self.stores[which].rotate(old, values, age, grace="10m" if grace else None)
        if refused := self.model.refusal(old):
            self.refuse(rotate, refused)
        else:
            session = self.model.live[old]
            if self.model.evicted(session.values, values, set()) is None:
                self.refuse(rotate, LimitExceeded)
            else:
                new = self.do(rotate)
                self.ids.append(new)
                del self.model.live[old]
                self.model.ended[old] = "rotated"
                if grace:
                    self.model.leads[old] = new
                self.settle(new, {**session.values, **values}, AGES[age] if age else session.age, was=session.values)
                self.model.live[new].ttl = self.model.live[new].ttl if age else session.ttl
        self.check()

    @rule(name=st.sampled_from(["user_id", "ip"]), value=ONE, keep=st.lists(IDS, max_size=2), which=st.integers(0, 1))
    def delete_by(self, name: str, value: str | int, keep: list[int], which: int) -> None:
        """End all with a value, but for some."""
        kept = {self.pick(n) for n in keep}
        ending = self.model.members(name, value) - kept
        assert self.do(self.stores[which].delete_by(name, value, keep=kept, reason="all")) == len(ending)
        for session_id in ending:
            self.model.end(session_id, "all")
        self.model.stale = {(key, i) for key, i in self.model.stale if key != f"{name}:{{{value}}}" or i in kept}
        self.check()

    @rule(name=st.sampled_from(["user_id", "ip"]), value=ONE, which=st.integers(0, 1))
    def find_by(self, name: str, value: str | int, which: int) -> None:
        """Read by reference; dead ids leave the set."""
        found = self.do(self._find(self.stores[which], name, value))
        assert {session["id"]: session for session in found} == {
            i: {"id": i, **self.read(self.model.live[i].values)} for i in self.model.members(name, value)
        }
        assert self.do(self.stores[which].count_by(name, value)) == len(found)
        self.model.stale = {(key, i) for key, i in self.model.stale if key != f"{name}:{{{value}}}"}
        self.check()

    @staticmethod
    async def _find(store: SessionStore, name: str, value: str | int) -> list[dict[str, Any]]:
        return [session async for session in store.find_by(name, value)]

    @rule(n=IDS, which=st.integers(0, 1), fields=st.none() | st.lists(FIELDS, min_size=1))
    def get(self, n: int, which: int, fields: list[str] | None) -> None:
        """Read one session, and why it ended if it did."""
        session_id = self.model.follow(self.pick(n))
        session = self.model.live.get(session_id)
        expected: dict[str, Any] = {}
        if session:
            values = {k: v for k, v in session.values.items() if fields is None or k in fields}
            expected = {"id": session_id, **self.read(values)}
        assert self.do(self.stores[which].get(self.pick(n), fields)) == expected
        assert self.do(self.stores[which].ended(self.pick(n))) == self.model.ended.get(session_id)

    @rule(n=IDS, which=st.integers(0, 1))
    def expire(self, n: int, which: int) -> None:
        """Let a session, or a tombstone, expire."""
        self.let_expire(self.pick(n), which)

    def let_expire(self, session_id: str, which: int) -> None:
        """Wait until Redis has removed it, here and in the model."""
        if session := self.model.live.pop(session_id, None):
            self.model.stale |= {(name, session_id) for name in self.model.sets(session.values)}
            assert self.do(self.stores[which].touch(session_id, timedelta(milliseconds=1)))
        self.model.ended.pop(session_id, None)
        self.model.leads.pop(session_id, None)
        self.do(self._gone(f"{self.prefix}:{{{session_id}}}"))
        self.check()

    async def _gone(self, key: str) -> None:
        await self.clients[1].pexpire(key, 1)
        while await self.clients[1].exists(key):
            pass

    # ------------------------------------------------------------------ how it is done

    def do(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run an operation to its end."""
        return self.loop.get_loop().run_until_complete(operation)

    def refuse(self, operation: Coroutine[Any, Any, object], error: type[SessionError]) -> None:
        """Run an operation that must raise this error."""
        with pytest.raises(error) as raised:
            self.do(operation)
        assert type(raised.value) is error

    def pick(self, n: int) -> str:
        """Choose an id: of the last ones."""
        return self.ids[-1 - n % len(self.ids)]

    def read(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return values as the codec brings them back."""
        return {k: str(v) for k, v in values.items()} if self.text else values

    def age(self, session_id: str, age: str | None) -> int:
        """Return how long a session lives from a write on: as it is given now, was given before, or by default."""
        session = self.model.live.get(session_id)
        return session.age if age is None and session else AGES[age]

    def settle(self, session_id: str, values: dict[str, Any], age: int, was: dict[str, Any] | None = None) -> None:
        """Note in the model what a write did."""
        evicted = {i for i in self.model.live if self.hget(i, "_ended") == "evicted"}
        before = self.model.live.pop(session_id, None)
        for victim in self.model.evicted(was or {}, values, evicted) or ():
            self.model.end(victim, "evicted")
        created = int(self.hget(session_id, "_created") or 0)
        assert before is None or before.created == created
        self.model.stale -= {(name, session_id) for name in self.model.sets(values)}
        self.model.live[session_id] = Session(values, min(age, self.lifetime), age, created)

    def hget(self, session_id: str, name: str) -> str | None:
        """Return what stands in a hash."""
        read: Coroutine[Any, Any, str | None] = self.clients[1].hget(f"{self.prefix}:{{{session_id}}}", name)  # type: ignore[assignment]
        return self.do(read)

    def check(self) -> None:
        """Check promises 1 to 3 over the whole keyspace."""
        self.do(self._check())

    async def _check(self) -> None:
        model, client = self.model, self.clients[1]
        keys = [key async for key in client.scan_iter(match=f"{self.prefix}:*", count=1000)]
        async with client.pipeline() as pipe:
            for key in sorted(keys, key=lambda key: f"{self.prefix}:{{" in key):  # The sets first: time runs on.
                pipe.pttl(key)
                if f"{self.prefix}:{{" in key:
                    pipe.hgetall(key)
                else:
                    pipe.smembers(key)
            replies = await pipe.execute()
        ordered = sorted(keys, key=lambda key: f"{self.prefix}:{{" in key)
        ttls = {key.removeprefix(self.prefix + ":"): ttl for key, ttl in zip(ordered, replies[::2], strict=True)}
        held = {key.removeprefix(self.prefix + ":"): what for key, what in zip(ordered, replies[1::2], strict=True)}

        # 2. Every key has a TTL, and a set lives at least as long as its members.
        assert all(ttl > 0 for ttl in ttls.values())
        # 1. A live session is in the set of each of its values, and in no other.
        members: dict[str, set[str]] = {}
        for session_id, session in model.live.items():
            for name in model.sets(session.values):
                members.setdefault(name, set()).add(session_id)
                assert ttls[name] >= ttls[f"{{{session_id}}}"]
        for name in {name for name in held if not name.startswith("{")} | set(members):
            extra = held[name] - members.get(name, set())
            assert members.get(name, set()) <= held[name]
            assert all((name, session_id) in model.stale for session_id in extra)
        # 3. What was ended is a tombstone, nothing else is a session, and that has what was written, for as long.
        found = {name[1:-1]: fields for name, fields in held.items() if name.startswith("{")}
        assert {i: fields["_ended"] for i, fields in found.items() if "_ended" in fields} == model.ended
        assert found.keys() == model.live.keys() | model.ended.keys()
        for session_id, session in model.live.items():
            assert set(found[session_id]) - {"_max_age"} == {"id", "_created", *session.values}
            assert int(found[session_id].get("_max_age", AGES[None])) == session.age
            assert session.ttl - 60_000 < ttls[f"{{{session_id}}}"] <= session.ttl


def _run(server: RedisServer, **options: Any) -> None:
    """Run the machine on a server."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    how = settings(deadline=None, stateful_step_count=25, suppress_health_check=slow, **options)
    with asyncio.Runner() as loop:
        clients = [Redis.from_url(server.url), Redis.from_url(server.url, decode_responses=True)]
        machine = type("BoundMachine", (Machine,), {"loop": loop, "clients": clients})
        try:
            run_state_machine_as_test(machine, settings=how)
        finally:
            for client in clients:
                loop.run(client.aclose())


def test_the_store_does_what_the_model_does(redis_server: RedisServer) -> None:
    """All operations, on several sessions and values, through two clients."""
    _run(redis_server)


def test_the_store_does_what_the_model_does_without_coalescing(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same, only slower."""
    send_singly(monkeypatch)
    _run(redis_server)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        pytest.param("or not has(after, set) then", "then", id="a session stays in its old sets"),
        pytest.param("(before >= 0 and now + before < till)", "false", id="a set dies before its members"),
        pytest.param("if horizon(ttl) > horizon(session.ttl - 1000) then", "if false then", id="none is renewed"),
        pytest.param("if ended then", "if false then", id="a late write revives a session"),
        pytest.param("if #live < refs[n].limit then", "if #live <= refs[n].limit then", id="one too many stays"),
        pytest.param("a.created or 0) <", "a.created or 0) >", id="the youngest goes"),
    ],
)
def test_the_model_finds_a_bug(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    """Scripts with a bug planted do not do what the model does."""
    planted = {name: source.replace(right, wrong) for name, source in scripts.SCRIPTS.items()}
    assert planted != scripts.SCRIPTS
    monkeypatch.setattr(scripts, "_LOAD", [("SCRIPT", "LOAD", source) for source in planted.values()])
    monkeypatch.setattr(scripts, "_SHAS", {n: hashlib.sha1(s.encode()).hexdigest() for n, s in planted.items()})
    with pytest.raises((AssertionError, SessionError, pytest.fail.Exception)):
        _run(redis_server, max_examples=500, database=None, phases=[Phase.generate], derandomize=True)
