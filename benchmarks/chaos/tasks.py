"""Tasks that work on sessions of their own, and a model of what these sessions may hold."""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from benchmarks.chaos.scene import SECRET, Scene
from rss import SessionEnded, SessionError, SessionNotFound, SessionStore, StoreUnavailable

TASKS: Final = 40
# The most sessions that a task has at a time.
_SESSIONS: Final = 6
# Different users of a task, and different addresses.
_USERS: Final = 4
_ADDRESSES: Final = 3
# Seconds after which a call that was cancelled has taken effect, if it will.
_UNDER_WAY: Final = 0.05
# Seconds after which a read that is repeated is given up.
_LONGEST: Final = 60

T = TypeVar("T")
_tags: Final = itertools.count()


@dataclass
class Model:
    """The possible contents of a session.

    Each `set` writes another number to the field `x`, and an address that follows from it. So a session that was half
    written is noticed.
    """

    #: The field `tag`. It stays when the session gets a new id.
    tag: str
    user: str
    #: The number of its task.
    task: int
    x: int = 0
    #: Increments that were acknowledged, and increments of which that is unknown.
    n: int = 0
    unsure: int = 0
    #: Numbers that calls of unknown outcome were to write to `x`, and the highest number that any call was to write.
    others: set[int] = field(default_factory=set)
    highest: int = 0
    #: The users to whom calls of unknown outcome were to give it.
    users: set[str] = field(default_factory=set)
    #: Whether a call of unknown outcome was to end it.
    mortal: bool = False
    #: When the last `create` or `rotate`, `set` and `increment` was acknowledged.
    made: float = 0
    set: float = 0
    counted: float = 0
    #: When the last write of each reference was acknowledged.
    named: dict[str, float] = field(default_factory=dict)

    @property
    def references(self) -> list[tuple[str, str]]:
        """The names and values of its references."""
        return [("user_id", self.user), ("ip", address(self.task, self.x))]

    @property
    def possible(self) -> list[tuple[str, str]]:
        """The same, with those that calls of unknown outcome were to write."""
        return [*self.references, *(("ip", address(self.task, x)) for x in self.others)]


def address(task: int, x: int) -> str:
    """Return the address of a session that holds this number in `x`: every other `set` changes it."""
    return f"{SECRET}-{task}-{x // 2 % _ADDRESSES}"


class Task:
    """One task with sessions of its own. *durable*: half of its revocations wait for a replica."""

    def __init__(self, store: SessionStore, scene: Scene, number: int, *, durable: bool = False) -> None:
        #: The sessions that live, and those that ended: when, and whether durably.
        self.live: dict[str, Model] = {}
        self.ended: dict[str, tuple[float, bool]] = {}
        self._past: list[str] = []  # The same ids in a list: a choice from a dict takes longer as it grows.
        self._recent: set[str] = set()  # The sessions that ended in this phase.
        self._doomed: set[tuple[str, str]] = set()  # The arguments of `delete_by` calls of unknown outcome.
        self._expected: dict[str, Model] = {}  # Sessions by tag, that calls of unknown outcome were to make.
        self._store = store
        self._scene = scene
        self._number = number
        self._durable = durable
        self._waits = False  # Whether the operation that runs is durable.
        self._random = random.Random(number)
        self._turn = asyncio.Lock()

    async def run(self, stop: asyncio.Event) -> None:
        """Work until the event."""
        while not stop.is_set():
            await self._scene.open.wait()
            if len(self.live) < self._random.randrange(1, _SESSIONS):
                await self._do(self._create)
            kinds = [self._get] * 9 + [self._set] * 3 + [self._rotate, self._login, self._delete, self._increment] * 2
            kind = self._random.choice([*kinds, self._find, self._delete_by, self._touch])
            if self.live:
                await self._do(kind, self._random.choice([*self.live]))

    async def rest(self) -> None:
        """Return when the operation that runs has ended."""
        async with self._turn:
            pass

    async def settle(self) -> None:
        """Compare all sessions with the model, and with what is found by their references."""
        async with self._turn:
            await self._compare(settled=True)
            for session_id in [*self._recent]:
                if await self._read(session_id):
                    await self._revived(session_id)
            self._recent.clear()
            for user in range(_USERS):
                await self._search("user_id", self._user_id(user))
            for ip in {address(self._number, x) for x in range(2 * _ADDRESSES)}:
                await self._search("ip", ip)
            self._expected.clear()
            self._doomed.clear()

    async def _do(self, kind: Callable[..., Coroutine[Any, Any, None]], *session_id: str) -> None:
        """Run one operation, and find out what it did if that is unknown."""
        name, scene = kind.__name__[1:], self._scene
        async with self._turn:
            if session_id and session_id[0] not in self.live:  # `settle`, which had its turn before, did not find it.
                return
            began, known, self._waits = time.perf_counter(), False, False
            try:
                known = await self._run(kind(*session_id))
            except (SessionEnded, SessionNotFound) as error:
                scene.note_text(error)
                for one in session_id:  # This call has not ended it.
                    self.live[one].mortal &= scene.late
            except SessionError as error:
                scene.note_text(error)
                scene.note_error(name, error, durable=self._waits)
            except Exception as error:  # noqa: BLE001 - an application must never see one
                scene.now.foreign[f"{type(error).__name__} of {name}"] += 1
            scene.now.times.append(time.perf_counter() - began)
            if not known:
                await self._compare()

    async def _run(self, operation: Coroutine[Any, Any, None]) -> bool:
        """Run an operation. Return False if it was chosen to be cancelled, and was."""
        if self._random.random() >= self._scene.cancelled:
            await operation
            return True
        running = asyncio.create_task(operation)
        for _ in range(self._random.randrange(10)):
            await asyncio.sleep(0)
        for _ in range(self._random.randrange(1, 3)):
            running.cancel()
        await asyncio.wait([running])
        if not running.cancelled():
            running.result()
            return True
        self._scene.now.plain["cancelled"] += 1
        await asyncio.sleep(_UNDER_WAY)
        return False

    # The operations. Each notes what it is about to do before it begins.

    def _user_id(self, user: int | None = None) -> str:
        return f"{SECRET}-{self._number}-{self._random.randrange(_USERS) if user is None else user}"

    async def _create(self) -> None:
        model = Model(f"tag {next(_tags)}", self._user_id(), self._number)
        self._expected[model.tag] = model
        values = {"tag": model.tag, "user_id": model.user, "ip": address(self._number, 0), "n": 0, "x": 0}
        self._born(await self._store.create(values), model, "user_id", "ip")

    async def _get(self, session_id: str) -> None:
        self._verify(session_id, await self._store.get(session_id))
        if self.ended:
            ended = self._random.choice(self._past)
            if await self._store.get(ended):
                await self._revived(ended)

    async def _set(self, session_id: str) -> None:
        model = self.live[session_id]
        x = model.highest = model.highest + 1
        model.others.add(x)
        await self._store.set(session_id, {"x": x, "ip": address(self._number, x)}, create=False)
        model.others.discard(x)
        model.x, model.set = x, time.perf_counter()
        model.named["ip"] = model.set

    async def _rotate(self, session_id: str) -> None:
        await self._renew_id(session_id, self.live[session_id].user, {})

    async def _login(self, session_id: str) -> None:
        user = self._user_id()
        await self._renew_id(session_id, user, {"user_id": user})

    async def _renew_id(self, session_id: str, user: str, values: dict[str, Any]) -> None:
        model, durable = self.live[session_id], self._wants_durable()
        model.mortal = True
        model.users.add(user)
        heir = replace(model, user=user, others=set(model.others), users=set(model.users), mortal=False)
        heir.named = dict(model.named)
        self._expected[model.tag] = heir
        new = await self._store.rotate(session_id, values, durable=1 if durable else None)
        self._gone(session_id, durable=durable)
        self._born(new, heir, *values)

    async def _touch(self, session_id: str) -> None:
        if not await self._store.touch(session_id, self._random.choice(["1 day", "2 days"])):
            self._verify(session_id, {})

    async def _delete(self, session_id: str) -> None:
        durable = self._wants_durable()
        self.live[session_id].mortal = True
        await self._store.delete(session_id, durable=1 if durable else None)  # After a retry, it may return False.
        self._gone(session_id, durable=durable)

    async def _increment(self, session_id: str) -> None:
        model = self.live[session_id]
        model.unsure += 1
        total = await self._store.increment(session_id, "n")
        model.unsure -= 1
        model.n += 1
        self._count(session_id, model, total)
        model.counted = time.perf_counter()

    async def _find(self, session_id: str) -> None:
        name, value = self._reference(session_id)
        await self._match(name, value, await self._store.ids_by(name, value))

    async def _delete_by(self, session_id: str) -> None:
        name, value = self._reference(session_id)
        durable = self._wants_durable()
        ending = self._with(name, value)
        self._doomed.add((name, value))
        for one in ending:
            self.live[one].mortal = True
        await self._store.delete_by(name, value, durable=1 if durable else None)
        if not self._scene.repeats:
            self._doomed.discard((name, value))
        for one in ending:
            # A write that gave the session this value may be lost. Then the new master did not end the session.
            written = self.live[one].named.get(name, 0)
            if self._scene.may_lose(one, written):
                self._gone(one, when=written)
            else:
                self._gone(one, durable=durable)

    def _wants_durable(self) -> bool:
        self._waits = self._durable and self._random.random() < 0.5
        return self._waits

    def _reference(self, session_id: str) -> tuple[str, str]:
        return self._random.choice(self.live[session_id].references)

    def _with(self, name: str, value: str) -> set[str]:
        return {one for one, model in self.live.items() if (name, value) in model.references}

    def _born(self, session_id: str, model: Model, *names: str) -> None:
        self._expected.pop(model.tag, None)
        model.made = time.perf_counter()
        model.named |= dict.fromkeys(names, model.made)
        self.live[session_id] = model

    def _gone(self, session_id: str, *, durable: bool = False, when: float | None = None) -> None:
        self.live.pop(session_id, None)
        self.ended[session_id] = time.perf_counter() if when is None else when, durable
        self._past.append(session_id)
        self._recent.add(session_id)

    # Compare the keys in Redis with the model.

    async def _patiently(self, call: Callable[..., Awaitable[T]], *arguments: str) -> T:
        """Call until Redis answers."""
        async with asyncio.timeout(_LONGEST):
            while True:
                try:
                    return await call(*arguments)
                except StoreUnavailable as error:
                    self._scene.note_text(error)
                    await asyncio.sleep(0.01)

    async def _read(self, session_id: str) -> dict[str, Any]:
        return await self._patiently(self._store.get, session_id)

    async def _compare(self, *, settled: bool = False) -> None:
        """Read all sessions, and look for those that calls of unknown outcome may have made."""
        for session_id in [*self.live]:
            self._verify(session_id, await self._read(session_id), settled=settled)
        for user in {user for model in self._expected.values() for user in (model.user, *model.users)}:
            await self._search("user_id", user)
        if not self._scene.late:
            self._doomed.clear()

    def _verify(self, session_id: str, found: dict[str, Any], *, settled: bool = False) -> None:
        """Compare what a session holds with the model, which then holds what was found."""
        model, scene = self.live[session_id], self._scene
        if not found:
            if not (model.mortal or self._doomed.intersection(model.possible)):
                # If the write of a reference was lost, a later `delete_by` ended more than the model knows.
                scene.lose("a session", session_id, model.made, *model.named.values())
            if model.tag in self._expected:
                self._expected[model.tag] = model  # It was written to before it got the new id.
            self._gone(session_id)
            return
        if lacking := {"tag", "user_id", "ip", "n", "x"} - found.keys():
            scene.now.wrong[f"a session without {', '.join(sorted(lacking))}"] += 1
            self._gone(session_id)
            return
        x, user = found["x"], found["user_id"]
        if x < model.x and not scene.repeats and x not in model.others:
            scene.lose("a set", session_id, model.set)
        elif x > model.x and x not in model.others and not (scene.repeats and x <= model.highest):
            scene.now.wrong["a value that was never written"] += 1
        if (found["id"], found["tag"], user, found["ip"]) != (
            session_id,
            model.tag,
            model.user,
            address(self._number, x),
        ):
            scene.now.wrong["a session that is half written, or another one"] += 1
        model.x, model.user = x, user
        self._count(session_id, model, found["n"])
        if settled or not scene.late:
            model.others.clear()
            model.users.clear()
            model.n, model.unsure, model.mortal = found["n"], 0, False

    def _count(self, session_id: str, model: Model, total: int) -> None:
        """Compare the increments of a session with the model."""
        if total > model.n + model.unsure:
            self._scene.now.duplicated += total - model.n - model.unsure
            model.n, model.unsure = total, 0
        elif total < model.n:
            self._scene.lose("an increment", session_id, model.counted)
            model.n, model.unsure = total, 0

    async def _search(self, name: str, value: str) -> None:
        await self._match(name, value, await self._patiently(self._store.ids_by, name, value))

    async def _match(self, name: str, value: str, found: list[str]) -> None:
        """Compare the sessions that were found by a value with the model."""
        for one in self._with(name, value).difference(found):
            held = await self._read(one)
            if held and held[name] == value:
                self._scene.now.unreachable += one not in await self._patiently(self._store.ids_by, name, value)
            self._verify(one, held)
        for one in set(found) - self._with(name, value):
            if not (held := await self._read(one)):
                continue
            if one in self.live:
                self._verify(one, held)
            elif one in self.ended:
                await self._revived(one)
            else:
                await self._adopt(one, held)

    async def _adopt(self, session_id: str, held: dict[str, Any]) -> None:
        """Take in a session that a call of unknown outcome has made."""
        model = self._expected.pop(held["tag"], None)
        if model is None:
            self._scene.now.wrong["a session that nobody made"] += 1
            await self._patiently(self._store.delete, session_id)
            return
        for old in [one for one, other in self.live.items() if other.tag == model.tag]:
            model = self.live[old]  # It was written to before it got the new id.
            self._gone(old)
        if held["user_id"] in model.users:
            model.user = held["user_id"]
        self.live[session_id] = model
        self._verify(session_id, held)

    async def _revived(self, session_id: str) -> None:
        """Count a session that has ended and lives, and end it."""
        when, durable = self.ended[session_id]
        if self._scene.is_at_risk(session_id) and not durable:
            self._scene.lose("an end", session_id, when)
        else:
            self._scene.now.revived += 1
        await self._patiently(self._store.delete, session_id)
