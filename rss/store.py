"""The store: each method is one operation, and an operation on a session is one script."""

import codecs
import inspect
import re
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Generic, Literal, Self, TypedDict, Unpack, cast

import anyio
from redis.asyncio import Redis, RedisCluster

from rss.clients import Client, client_of, close
from rss.codec import Codec, JSONCodec, TextCodec
from rss.durations import Duration, milliseconds
from rss.engine.fan_out import FanOut
from rss.engine.operations import MaxAge, Operations, Renewal
from rss.engine.subscription import Message, subscribed
from rss.errors import IncompleteReference, SessionEnded, SessionError, SessionNotFound
from rss.events import Event, event_of
from rss.fields import Fields, field_name, field_names, listed
from rss.keys import Layout, Partitioned, Plain, text
from rss.maintenance import Maintenance
from rss.observe import Observer
from rss.references import Reference

if sys.version_info >= (3, 13):
    from typing import TypeVar
else:
    from typing_extensions import TypeVar

#: The fields of a session: a `TypedDict(total=False)`, or any `dict[str, Any]`.
S = TypeVar("S", bound=Mapping[str, Any], default=dict[str, Any])

_REASON: Final = re.compile(r"[\w-]{1,32}", re.ASCII)
_MOST_KEPT: Final = 1000
# The number of partitions on a Redis Cluster: for up to eight masters.
_PARTITIONS: Final = 64


class StoreOptions(TypedDict, total=False):
    """The options of `SessionStore`."""

    references: Iterable[str] | Mapping[str, Reference]
    prefix: str
    max_age: Duration
    max_lifetime: Duration | None
    id_bytes: int
    partitions: int | None
    partition_by_identity: bool
    codec: Codec
    timeout: Duration
    events: bool
    observe: Observer | None


class SessionStore(Generic[S]):
    """Sessions in one Redis, in one Redis behind Sentinels, or in a Redis Cluster.

    *client*: a `redis.asyncio.Redis` or `RedisCluster`. The store makes its own connections with the settings of the
    client. It takes none from the pool of the client, and does not close the client.
    *references*: the indexed fields. A mapping gives each of them a `Reference` with options.
    *prefix*: the beginning of every key, without braces. No other data may have keys that begin with it.
    *max_age*: the lifetime of a session without a write. A call can give a session its own *max_age*, which then
    applies to later writes and renewals too.
    *max_lifetime*: the maximum lifetime from the creation of a session, regardless of renewals. None: no maximum.
    *id_bytes*: the number of random bytes in an id, 16 to 256.
    *partitions*: the number of partitions, 1 to 4,096, for a store that may move to a Redis Cluster. All keys of a
    session are in one partition, and a partition is in one slot of a cluster. The number can never change. None: 64 on
    a Redis Cluster. Elsewhere, the store has no partitions, and its keys are not those of a cluster.
    *partition_by_identity*: in a store with several partitions, whether all sessions of an identity are in one of them.
    False is for sessions that come from a store without partitions and keep their ids. Then the operations on an
    identity ask all partitions, and it cannot have a limit. This cannot change either.
    *codec*: encodes and decodes values. Values of references use `TextCodec` if *codec* is one, or encrypts with one
    inside. Otherwise they use `JSONCodec`.
    *timeout*: the deadline of each operation. In an operation on a reference, each page has its own. So has each of the
    scripts of a login that moves a session to another partition.
    *observe*: an observer, which is called with an `rss.observe.Observation` for each call of a script that has
    finished. None: there is no observer.

    *events*: whether the scripts publish what happens, for `events`. Give it to the stores of all processes.

    A store serves one event loop at a time: the running one.

    Every method raises `TypeError` or `ValueError` for bad arguments, before anything is sent. If Redis
    refuses an operation on one session, nothing of it takes effect. A write to an ended session raises `SessionEnded`.

    `StoreUnavailable` is raised if Redis does not answer before the deadline, or if more than 10,000 calls wait.

    Until the deadline, a call is retried if Redis did not run it, or if that is unknown. Retries are safe: a second run
    recognises the work of the first, or does the same again. `pop`, `increment` and a `set` with *expect* are not
    idempotent, so they are never run twice.
    """

    def __init__(
        self,
        client: Redis | RedisCluster,
        *,
        references: Iterable[str] | Mapping[str, Reference] = (),
        prefix: str = "rss",
        max_age: Duration = "28 days",
        max_lifetime: Duration | None = None,
        id_bytes: int = 24,
        partitions: int | None = None,
        partition_by_identity: bool = True,
        codec: Codec = JSONCodec(),  # noqa: B008 - it has no state
        timeout: Duration = 5,
        events: bool = False,
        observe: Observer | None = None,
    ) -> None:
        if not isinstance(client, Redis | RedisCluster):
            hint = ": SessionStore.from_url(url)" if isinstance(client, str) else ""
            raise TypeError(f"client must be a redis.asyncio.Redis or RedisCluster, not {type(client).__name__}{hint}")
        if isinstance(client, RedisCluster) and partitions is None:
            partitions = _PARTITIONS
        encoder = client.get_encoder()
        if codecs.lookup(encoder.encoding).name != "utf-8":
            raise ValueError("client must have the encoding utf-8, because keys and values are compared as utf-8")
        lifetime = None if max_lifetime is None else milliseconds(max_lifetime, "max_lifetime")
        #: The maximum lifetime of a session from its creation. None: no maximum.
        self.max_lifetime: timedelta | None = None if lifetime is None else timedelta(milliseconds=lifetime)
        #: The fields of sessions, for the web layer.
        self.fields: Fields = Fields(references, codec)
        identity = self.fields.identity if partition_by_identity else None
        self._layout = _layout(prefix, id_bytes, partitions, identity, self.fields)
        #: The operations with their full replies, for the web layer.
        self.operations: Operations = Operations(
            client,
            self._layout,
            self.fields,
            max_age=milliseconds(max_age, "max_age"),
            max_lifetime=lifetime or 0,
            timeout=milliseconds(timeout, "timeout") / 1000,
            json=not isinstance(self.fields.plain.codec, TextCodec),
            events=events,
            observe=_observer(observe),
        )
        self._by_reference = FanOut(self.operations)
        self._engine = self.operations.engine
        self._owned: Client | None = None

    @classmethod
    def from_url(cls, url: str, **options: Unpack[StoreOptions]) -> Self:
        """Return a store with its own client, which `aclose` closes.

        The URL is redis://, rediss:// or unix://. For a Redis Cluster it is redis+cluster:// or rediss+cluster://, with
        the address of any of its servers. For a Redis behind Sentinels it is
        redis+sentinel://user:password@host:port,host:port/service/db or rediss+sentinel://, with the addresses of the
        Sentinels, and the user and the password of Redis. If the Sentinels need a password, make the client by
        `redis.asyncio.Sentinel.master_for`, and call `SessionStore`.
        """
        client = client_of(url)
        store = cls(client, **options)
        store._owned = client
        return store

    async def load(self) -> None:
        """Connect and load the scripts.

        Calling this is optional: it detects an unreachable Redis before the first operation.
        """
        await self.ended(self._layout.mint())

    async def aclose(self) -> None:
        """Refuse new calls, wait for operations that have begun, and close the connections.

        If the store made its client, the client is closed too.
        """
        await self._engine.aclose()
        if self._owned is not None:
            await close(self._owned)

    async def __aenter__(self) -> Self:
        """Open the store.

        Raises `StoreUnavailable` if no server answers: immediately if the connection is refused, otherwise after the
        timeout.
        """
        self._engine.reopen()
        try:
            await self._engine.connect()
            await self.load()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(prefix={self._layout.prefix!r}, references={[*self.fields.references]!r})"

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[Event]]:
        """Iterate over what happens to sessions, in all processes whose stores have `events=True`.

            async with store.events() as events:
                async for event in events:
                    ...

        Events that happen after the context is entered are not missed silently: if the connection was lost, or the
        reader is too slow, an event of the kind "gap" says so. Redis keeps no events.

        Redis does not tell of sessions that expire. `maintenance.sweep` tells of those with an identity whose ids it
        finds in the set of the identity. Others are not told.

        Raises `StoreUnavailable` if Redis does not answer, and `SessionError` if its user lacks a right.
        """
        engine = self._engine
        async with subscribed(engine.servers, self._layout, self.operations.timeout, lambda: engine.closed) as messages:
            yield self._decode_events(messages)

    async def _decode_events(self, messages: AsyncIterator[Message | None]) -> AsyncIterator[Event]:
        async for message in messages:
            yield Event("gap") if message is None else event_of(message, self._layout, self.fields)

    @asynccontextmanager
    async def sweeper(self, every: Duration = "10m") -> AsyncIterator[None]:
        """Remove the ids of expired sessions from all reference sets, in the background while the context is open.

        *every*: the time between two sweeps. If several processes have a sweeper, one of them begins to sweep in each
        period. A sweep rests three times as long as it works, so that it hardly delays others.

        So while sweeps succeed, no set holds the id of a session that expired longer ago than twice this time, plus the
        time that a sweep takes. If a sweep fails, a warning is logged, and the next one is tried.
        """
        period, failure = milliseconds(every, "every") / 1000, None
        async with anyio.create_task_group() as group:
            group.start_soon(self.maintenance.sweep_forever, period)
            try:
                yield
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the group would put it into an ExceptionGroup
                failure = error
            finally:
                group.cancel_scope.cancel()
        if failure:
            raise failure

    @property
    def maintenance(self) -> Maintenance:
        """The methods that check, repair, reindex and sweep the keys of the store."""
        return Maintenance(self.operations)

    def create_session_id(self, identity: str | int | None = None) -> str:
        """Return a new random URL-safe id for `set`. `create` makes its own id.

        *identity*: the identity of the session. In a store with several partitions, a session must be in the partition
        of its identity. None: the session has none.

        Raises ValueError if no reference of the store is the identity.
        """
        if identity is None:
            return self._layout.mint()
        if self.fields.identity is None:
            raise ValueError("no reference of this store is the identity")
        return self._layout.mint(self._layout.with_value(self.fields.identity, identity)[0])

    def get_session_key(self, session_id: str) -> str:
        """Return the key of a session's hash."""
        return self._layout.place(session_id)[0]

    def get_reference_key(self, field: str, value: str | int) -> str:
        """Return the key of a reference set: a Redis set of ids, including those of some expired sessions.

        Raises ValueError if the value has several sets, because the store has several partitions.
        """
        self._check(field, value)
        partitions = self._layout.with_value(field, value)
        if len(partitions) > 1:
            raise ValueError("a value has a set in each partition: use get_reference_keys")
        return self._layout.reference(field, value, partitions[0])

    def get_reference_keys(self, field: str, value: str | int) -> list[str]:
        """Return the keys of the reference sets of a value: one in each partition, or one for an identity."""
        self._check(field, value)
        return [self._layout.reference(field, value, number) for number in self._layout.with_value(field, value)]

    async def create(self, values: S | None = None, max_age: Duration | None = None) -> str:
        """Make a session with these values, and return its new id.

        Raises `LimitExceeded` if a reference refuses the session, and `Blocked` if a value is blocked.
        """
        encoded = self.fields.encode({} if values is None else values)
        return await self.operations.create(self._layout.mint, encoded, max_age_argument(max_age))

    async def get(self, session_id: str, fields: Iterable[str] | None = None, *, touch: bool | Duration = False) -> S:
        """Return the fields of a session with its `id`: all, or only *fields*. Return {} if there is no session.

        Fields that the session does not have are left out.

        *touch*: True renews the session in the same round trip. A duration, such as "1m", does so only if the last
        renewal is at least that long ago. For a short session, half of its lifetime is enough.
        """
        names = None if fields is None else field_names(fields, "id")
        read = await self.operations.get(session_id, names, () if touch is False else _renewal(touch))
        return cast("S", self.fields.decode(read.pairs))

    async def set(
        self,
        session_id: str,
        values: S,
        max_age: Duration | None = None,
        *,
        create: bool = True,
        expect: S | None = None,
    ) -> S:
        """Write these fields, renew the session, and return the values. Other fields stay.

        *max_age*: the lifetime of the session from now on, and after later writes.
        *create*: whether to make the session if it does not exist. If False, `SessionNotFound` is raised instead.
        *expect*: write only if these fields hold these values now; otherwise raise `Conflict`. None expects that a
        field is absent, or holds None. Values are compared as they are stored, so the order of keys in a dict counts.
        A call with *expect* is never run twice. If the connection breaks, it is unknown whether the write took effect.
        If the codec encrypts, *expect* may have references only, and raises ValueError for other fields.

        Raises `LimitExceeded` if a reference refuses the session, and `Blocked` if a value is blocked. Raises
        `IdentityChanged` if the write would change the identity of an existing session. If the store has several
        partitions, raises ValueError for a new session whose id is not in the partition of its identity.
        """
        expected = () if expect is None else self.fields.expect(expect)
        mode: Literal["set", "update"] = "set" if create else "update"
        await self.operations.set(session_id, self.fields.encode(values), max_age_argument(max_age), mode, expected)
        return values

    async def unset(self, session_id: str, fields: Iterable[str], max_age: Duration | None = None) -> None:
        """Remove these fields and renew the session, as `set` does. Do nothing if there is no session.

        Raises `IdentityChanged` if the session would lose its identity.
        """
        try:
            await self.operations.unset(session_id, field_names(fields), max_age_argument(max_age))
        except SessionEnded:
            raise
        except SessionNotFound:
            pass

    async def pop(self, session_id: str, fields: Iterable[str]) -> S:
        """Remove these fields, and return their values without `id`. Return {} if the session had none of them.

        The TTL stays. The call is never run twice. If the connection breaks, it is unknown whether the fields are
        still there.

        Raises `SessionNotFound` if there is no session. Raises `IdentityChanged` if the session would lose its
        identity.
        """
        taken = await self.operations.unset(session_id, field_names(fields), "keep", repeatable=False)
        return cast("S", self.fields.decode(taken.pairs))

    async def increment(self, session_id: str, field: str, by: int = 1) -> int:
        """Add *by* to an integer field, and return the sum. An absent field counts as 0. The TTL stays.

        The sum is stored as decimal digits, so a codec of your own must be able to read digits. The call is never run
        twice. If the connection breaks, it is unknown whether the increment took effect.

        Raises `ValueError` if the field holds no integer, if the sum does not fit into 64 bits, or if the codec
        encrypts. Raises `SessionNotFound` if there is no session.
        """
        if (field := field_name(field)) in self.fields.references:
            raise ValueError(f"{field!r} is a reference: it cannot be counted")
        self.fields.refuse_encrypted(field, "add to")
        if type(by) is not int or not -(2**63) <= by < 2**63:
            raise ValueError("by must be an integer of 64 bits")
        return await self.operations.increment(session_id, field, by)

    async def touch(self, session_id: str, max_age: Duration | None = None) -> bool:
        """Renew a session and its reference sets, as `set` does. Return False if there is no session."""
        return bool(await self.operations.touch(session_id, max_age_argument(max_age)))

    async def delete(
        self, session_id: str, *, expect: S | None = None, reason: str = "deleted", durable: int | None = None
    ) -> bool:
        """End a session, and return True. Return False if there is no session, or if it does not match *expect*.

        *expect*: end the session only if these fields hold these values, as in `set`. So `expect={"user_id": 7}` never
        ends a session of another user.
        *reason*: a short word that `ended` returns for five minutes.
        *durable*: return when this number of replicas have the write, so that it survives the loss of the master. If
        too few have it after half of the timeout, raise `StoreUnavailable`: the session has ended, call again.

        If the connection breaks, the call may run twice. Then it may return False although it ended the session.
        """
        expected = () if expect is None else self.fields.expect(expect)
        return await self.operations.delete(session_id, _reason(reason), expected, replicas=_replicas(durable))

    async def ended(self, session_id: str) -> str | None:
        """Return why a session was ended. Return None if it was not ended, or was ended more than five minutes ago."""
        return (await self.operations.get(session_id, [])).ended

    async def wait_ended(self, session_id: str) -> str:
        """Wait until a session has ended, and return why. Nothing polls, so thousands of callers may wait.

        The reason is "expired" if the session has expired, and also if there is none. It is "rotated" after a rotation
        with grace, although the old id still leads to the session. It is not told if only this store takes the session
        for ended, because of its `max_lifetime` or a strict reference. Use it beside a WebSocket or a
        stream of events, which would otherwise outlive the session. The call has no timeout: use `asyncio.timeout`.
        While Redis does not answer, it waits.

        All callers share one connection to each server, which Redis tells what has changed (CLIENT TRACKING). It needs
        the rights `+hello +client|tracking`.
        """
        key, partition = self._layout.place(session_id)
        return await self._engine.wait_ended(key, partition)

    async def rotate(
        self,
        session_id: str,
        values: S | None = None,
        max_age: Duration | None = None,
        *,
        grace: Duration | None = None,
        durable: int | None = None,
    ) -> str:
        """Give a session a new id, write these values, and return the id. Call this at a login.

        Other fields and the creation time stay. The old id ends with the reason "rotated".

        *max_age*: the lifetime from now on, as in `set`. None: the TTL stays.
        *grace*: how long the old id still leads to the session, so that requests in flight keep their session. The old
        id cannot be rotated again. If the rotation changes the identity, there is no grace: an attacker may know the
        old id.
        *durable*: return when this number of replicas have the writes, as in `delete`. If too few have them in time,
        the new id is lost.

        In a store with several partitions, the session moves to the partition of its new identity, by four scripts. If
        the process dies before the third one, the session is as it was. If it dies between the third and the last one,
        the session is lost.

        Raises `SessionNotFound` if there is no session. Raises `LimitExceeded` if a reference refuses the session, and
        `Blocked` if a new value is blocked.
        """
        encoded = self.fields.encode({} if values is None else values)
        grace_age = "none" if grace is None else str(milliseconds(grace, "grace"))
        age = "keep" if max_age is None else max_age_argument(max_age)
        replicas = _replicas(durable)
        rotated = await self.operations.rotate(
            session_id, self._layout.mint, encoded, age, grace=grace_age, replicas=replicas
        )
        return rotated.session_id

    async def ttl(self, session_id: str) -> timedelta | None:
        """Return the time until a session expires. Return None if there is no session."""
        read = await self.operations.get(session_id, [])
        return timedelta(milliseconds=read.ttl) if read.ttl else None

    async def ids_by(self, field: str, value: str | int) -> list[str]:
        """Return the ids of the sessions with this value of a reference, in no particular order."""
        ids = list[str]()
        with self.operations.several():
            try:
                async for session in self._find(field, value, [], begun=True):
                    ids.append(session["id"])
            except IncompleteReference as error:
                raise IncompleteReference(field, found=len(ids)) from error
        return ids

    async def count_by(self, field: str, value: str | int, *, exact: bool = True) -> int:
        """Return how many sessions have this value of a reference.

        *exact*: look at each of the sessions, page by page. If False, return an upper bound: the number of ids in the
        sets, including those of some expired sessions.
        """
        self.fields.number(field)
        return len(await self.ids_by(field, value)) if exact else await self._by_reference.count(field, value)

    def find_by(self, field: str, value: str | int, fields: Iterable[str] | None = None) -> AsyncIterator[S]:
        """Iterate over the sessions with this value of a reference, as `get` returns them, in no particular order.

        A page of about fifty sessions is read at a time. A session that joins or ends meanwhile may be included or not.
        No session is returned twice.

        Sessions that are not readable are left out. Then the end of the iteration raises `SessionError` with their
        number.
        """
        return self._find(field, value, None if fields is None else field_names(fields, "id"))

    async def delete_by(
        self,
        field: str,
        value: str | int,
        *,
        keep: Iterable[str] = (),
        keep_required: bool = False,
        reason: str = "deleted",
        block: Duration | None = None,
        durable: int | None = None,
    ) -> int:
        """End every session with this value of a reference, and return their number.

        *keep*: the ids of sessions to keep, at most 1,000. The old id of a session that was rotated with grace counts
        too.
        *keep_required*: if a session to keep is not alive, end nothing and raise `SessionEnded` or `SessionNotFound`.
        So "sign out everywhere else" does not end a session that has just got a new id. In a store with several
        partitions, give one id: with ids in several of them, sessions in one may end before the other id is looked at.
        *reason*: a short word that `ended` returns for five minutes.
        *block*: block the value for this time: a session that would join it raises `Blocked`. So a login that checked
        the old password just before a password reset cannot succeed after it. A longer existing block stays.
        *durable*: return when this number of replicas have the writes, as in `delete`.

        Sessions that have the value at the time of the call end. Sessions that get it later do not. About fifty
        sessions end at a time, so that other calls need not wait long.

        If `StoreUnavailable` is raised, some of the sessions may have ended: call it again. If only some partitions did
        not answer, the error is `PartlyDone`. If a connection broke, the number may be too low, and a session that
        joined between two attempts may end. If the store has several partitions, and the field is not the identity, so
        may a session that gets the value during the call.
        """
        self._check(field, value)
        spared: dict[int, list[str]] = {}
        for session_id in listed(keep, "keep"):
            spared.setdefault(self._layout.place(text(session_id, "an id to keep"))[1], []).append(session_id)
        if sum(map(len, spared.values())) > _MOST_KEPT:
            raise ValueError(f"keep must not have more than {_MOST_KEPT:,} ids")
        blocked_for, why = "open" if block is None else str(milliseconds(block, "block")), _reason(reason)
        replicas = _replicas(durable)

        with self.operations.several():
            return await self._by_reference.delete(
                field,
                value,
                reason=why,
                block=blocked_for,
                keep=spared,
                required=keep_required,
                replicas=replicas,
            )

    async def block(
        self,
        field: str,
        value: str | int,
        duration: Duration,
        *,
        reason: str = "blocked",
        durable: int | None = None,
    ) -> int:
        """Block a value of a reference, end every session with it, and return their number.

        Until the block ends, a session that would join the value raises `Blocked`. A longer existing block stays.

        *durable*: return when this number of replicas have the writes, as in `delete`.
        """
        length = timedelta(milliseconds=milliseconds(duration, "duration"))
        return await self.delete_by(field, value, reason=reason, block=length, durable=durable)

    async def unblock(self, field: str, value: str | int) -> bool:
        """Let sessions join this value of a reference again. Return False if it was not blocked.

        If the connection breaks, the call may run twice. Then it may return False although it removed a block.
        """
        self.fields.number(field)
        return await self._by_reference.unblock(field, value)

    async def blocked(self, field: str, value: str | int) -> timedelta | None:
        """Return how long this value of a reference stays blocked. Return None if it is not blocked."""
        self.fields.number(field)
        left = await self._by_reference.blocked(field, value)
        return timedelta(milliseconds=left) if left else None

    def _check(self, field: str, value: str | int) -> None:
        """Raise the errors of a field or a value that is not one of a reference."""
        self.fields.number(field)
        self._layout.reference(field, value)

    def _find(self, field: str, value: str | int, fields: list[str] | None, *, begun: bool = False) -> AsyncIterator[S]:
        self._check(field, value)  # Here, not at the first step.

        async def sessions() -> AsyncIterator[S]:
            seen, unreadable = set[str](), set[bytes]()
            async with aclosing(self._by_reference.find(field, value, fields, begun=begun)) as found:
                async for pairs in found:
                    try:
                        session = self.fields.decode(pairs)
                    except SessionError:
                        unreadable.add(dict(zip(pairs[::2], pairs[1::2], strict=True))[b"id"])
                        continue
                    if session["id"] not in seen:  # After a rehash, SSCAN may return a member again.
                        seen.add(session["id"])
                        yield cast("S", session)
            if unreadable:
                raise SessionError(
                    f"{len(unreadable):,} sessions hold data that is not readable; the others were found"
                )

        return sessions()


def _layout(prefix: str, id_bytes: int, partitions: int | None, identity: str | None, fields: Fields) -> Layout:
    """Return the layout of a store. Raises ValueError if a limit needs all sessions of a value in one partition."""
    if partitions is None:
        return Plain(prefix, id_bytes)
    layout = Partitioned(prefix, id_bytes, partitions)
    if layout.partitions == 1:
        return layout
    for field, reference in fields.references.items():
        if reference.limit and field != identity:
            raise ValueError(
                f"{field!r} cannot have a limit in a store with several partitions: it is not the identity"
            )
    return replace(layout, identity=identity)


def _observer(observe: Observer | None) -> Observer | None:
    """Return *observe*. Raises TypeError if it is no function, or a class or a coroutine function by mistake."""
    if observe is not None and (
        not callable(observe) or isinstance(observe, type) or inspect.iscoroutinefunction(observe)
    ):
        raise TypeError("observe must be a function that is not async, or an observer such as Logging()")
    return observe


def max_age_argument(max_age: Duration | None) -> MaxAge:
    """Encode the *max_age* of a write for the scripts. None is "renew"."""
    return "renew" if max_age is None else str(milliseconds(max_age, "max_age"))


def _renewal(touch: bool | Duration) -> Renewal:  # noqa: FBT001 - as `get` takes it
    """Encode the *touch* of a read for the scripts."""
    return ("always",) if touch is True else ("after", str(milliseconds(touch, "touch")))


def _replicas(durable: int | None) -> int:
    if durable is not None and (type(durable) is not int or durable < 1):
        raise ValueError("durable must be a positive number of replicas")
    return durable or 0


def _reason(reason: str) -> str:
    if not isinstance(reason, str) or not _REASON.fullmatch(reason):
        raise ValueError("reason must be a short word: at most 32 letters, digits, '-' and '_'")
    return reason
