"""The store: one method is one operation is one script."""

import codecs
import re
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Generic, Literal, Self, TypedDict, Unpack, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rss.codec import Codec, JSONCodec, TextCodec
from rss.durations import Duration, milliseconds
from rss.engine.operations import MaxAge, Operations, Position, Renewal
from rss.errors import SessionEnded, SessionError, SessionNotFound
from rss.fields import Fields, field_name, field_names, listed
from rss.keys import Plain, text
from rss.references import Reference

if sys.version_info >= (3, 13):
    from typing import TypeVar
else:
    from typing_extensions import TypeVar

#: The fields of a session: a `TypedDict(total=False)`, or any `dict[str, Any]`.
S = TypeVar("S", bound=Mapping[str, Any], default=dict[str, Any])

_REASON: Final = re.compile(r"[\w-]{1,32}", re.ASCII)
_MOST_KEPT: Final = 1000


class StoreOptions(TypedDict, total=False):
    """What `SessionStore` takes beside a client."""

    references: Iterable[str] | Mapping[str, Reference]
    prefix: str
    max_age: Duration
    max_lifetime: Duration | None
    id_bytes: int
    codec: Codec
    timeout: Duration


class SessionStore(Generic[S]):
    """Sessions in one Redis, or in one Redis behind Sentinels.

    *client*: a `redis.asyncio.Redis`. The store makes connections of its own, as the client would: it neither uses up
    the client's pool, nor configures or closes the client.
    *references*: the indexed fields; a mapping says more about each with a `Reference`.
    *prefix*: the beginning of every key, without braces. No other data may have keys that begin with it.
    *max_age*: how long a session lives without a write. A session that is given a *max_age* of its own keeps that for
    later writes and renewals, until it is given another.
    *max_lifetime*: the longest that a session lives from its creation, however often it is renewed.
    *id_bytes*: random bytes in an id, at least 16.
    *codec*: how values are stored. Values of references are always stored by `JSONCodec`, or by `TextCodec` if *codec*
    is that.
    *timeout*: how long an operation may take; an operation by reference, for each page.

    A store serves the event loop that runs: one at a time.

    All methods: bad arguments raise `TypeError` or `ValueError` before anything is sent. What fails, fails as a whole.
    A write to a session that was ended raises `SessionEnded`. If Redis does not answer until the deadline, or more than
    10,000 calls wait, `StoreUnavailable` is raised. Until the deadline a call is sent again if Redis did not run it, or
    if that is not known: a second run recognises the work of the first, or does the same again. `pop`, `increment` and
    a `set` that expects something are never run twice.
    """

    def __init__(
        self,
        client: Redis,
        *,
        references: Iterable[str] | Mapping[str, Reference] = (),
        prefix: str = "rss",
        max_age: Duration = "28 days",
        max_lifetime: Duration | None = None,
        id_bytes: int = 24,
        codec: Codec = JSONCodec(),  # noqa: B008 - it has no state
        timeout: Duration = 5,
    ) -> None:
        if not isinstance(client, Redis):
            hint = ": SessionStore.from_url(url)" if isinstance(client, str) else ""
            raise TypeError(f"client must be a redis.asyncio.Redis, not {type(client).__name__}{hint}")
        encoder = client.get_encoder()  # type: ignore[no-untyped-call]
        if codecs.lookup(encoder.encoding).name != "utf-8":
            raise ValueError("client must have the encoding utf-8, in which keys and values are compared")
        lifetime = None if max_lifetime is None else milliseconds(max_lifetime, "max_lifetime")
        #: The longest that a session lives from its creation; None if it may live for ever.
        self.max_lifetime = None if lifetime is None else timedelta(milliseconds=lifetime)
        #: The fields of sessions, for the web layer.
        self.fields = Fields(references, codec)
        self._layout = Plain(prefix, id_bytes)
        #: The operations with their whole replies, for the web layer.
        self.operations = Operations(
            client,
            self._layout,
            self.fields,
            max_age=milliseconds(max_age, "max_age"),
            max_lifetime=lifetime or 0,
            timeout=milliseconds(timeout, "timeout") / 1000,
            json=not isinstance(codec, TextCodec),
        )
        self._engine = self.operations.engine
        self._owned: Redis | None = None

    @classmethod
    def from_url(cls, url: str, **options: Unpack[StoreOptions]) -> Self:
        """Return a store with a client of its own, which `aclose` closes: redis://, rediss:// or unix://."""
        # Every call has a deadline, so the client need not watch each packet too.
        client = Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=None)
        store = cls(client, **options)
        store._owned = client
        return store

    async def load(self) -> None:
        """Connect and load the scripts. Optional: it tells early whether Redis is there."""
        await self.ended(self._layout.mint())

    async def aclose(self) -> None:
        """Take no more calls, wait for operations that have begun, and close the connections.

        The client is closed if the store made it.
        """
        await self._engine.aclose()
        if self._owned is not None:
            await self._owned.aclose()

    async def __aenter__(self) -> Self:
        """Open the store. Raises `StoreUnavailable` at once if no server answers at its address."""
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

    def create_session_id(self) -> str:
        """Return a new random id, URL-safe, for `set`; `create` makes its own."""
        return self._layout.mint()

    def get_session_key(self, session_id: str) -> str:
        """Return the key of a session's hash."""
        return self._layout.session(session_id)

    def get_reference_key(self, field: str, value: str | int) -> str:
        """Return the key of a reference set: SMEMBERS of it are the ids, also of some sessions that have expired."""
        self.fields.number(field)
        return self._layout.reference(field, value)

    async def create(self, values: S | None = None, max_age: Duration | None = None) -> str:
        """Make a session with these values and return its id, which is new.

        Raises `LimitExceeded` if a reference refuses it, and `Blocked` if one of its values is blocked.
        """
        session_id, encoded = self._layout.mint(), self.fields.encode({} if values is None else values)
        await self.operations.set(session_id, encoded, max_age_argument(max_age), "create")
        return session_id

    async def get(self, session_id: str, fields: Iterable[str] | None = None, *, touch: bool | Duration = False) -> S:
        """Return a session with its `id`, or these fields of it; those it does not have are left out.

        With *touch*, renew it in the same round trip; with a duration, such as "1m", only if the last renewal is at
        least that long ago, or half of its lifetime. Returns {} if there is no session.
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

        *max_age*: how long the session lives from now on, and after later writes.
        *create*: whether to make the session if it is not there; if not, `SessionNotFound` is raised.
        *expect*: write only if these fields hold these values now, else raise `Conflict`. None expects that a field is
        not there, or holds None. Values are compared as they are stored: a dict with its keys in order. A call that
        expects something is never run twice: if the connection breaks, it is not known whether it was written.

        Raises `LimitExceeded` if a reference refuses the session, `Blocked` if a value is blocked, and
        `IdentityChanged` if the write would change the identity of a session that is there.
        """
        expected = () if expect is None else self.fields.expect(expect)
        mode: Literal["set", "update"] = "set" if create else "update"
        await self.operations.set(session_id, self.fields.encode(values), max_age_argument(max_age), mode, expected)
        return values

    async def unset(self, session_id: str, fields: Iterable[str], max_age: Duration | None = None) -> None:
        """Take out these fields and renew the session, as `set` does. Does nothing if there is no session.

        Raises `IdentityChanged` if the session would lose its identity.
        """
        try:
            await self.operations.unset(session_id, field_names(fields), max_age_argument(max_age))
        except SessionEnded:
            raise
        except SessionNotFound:
            pass

    async def pop(self, session_id: str, fields: Iterable[str]) -> S:
        """Take out these fields and return what they held, without `id`: {} if there were none of them.

        The TTL stays. Raises `SessionNotFound` if there is no session, and `IdentityChanged` as `unset` does. Never run
        twice: if the connection breaks, it is not known whether the fields are still there.
        """
        taken = await self.operations.unset(session_id, field_names(fields), "keep", repeatable=False)
        return cast("S", self.fields.decode(taken.pairs))

    async def increment(self, session_id: str, field: str, by: int = 1) -> int:
        """Add to an integer field, 0 if it is not there, and return the sum. The TTL stays.

        The sum is stored as its digits, which a codec of your own must be able to read. Raises `ValueError` if the
        field holds something else or the sum does not fit into 64 bits, and `SessionNotFound` if there is no session.
        Never run twice: if the connection breaks, it is not known whether it was counted.
        """
        if (field := field_name(field)) in self.fields.references:
            raise ValueError(f"{field!r} is a reference: it cannot be counted")
        if type(by) is not int or not -(2**63) <= by < 2**63:
            raise ValueError("by must be an integer of 64 bits")
        return await self.operations.increment(session_id, field, by)

    async def touch(self, session_id: str, max_age: Duration | None = None) -> bool:
        """Renew a session as `set` does, and the reference sets it is in. Returns False if there is no session."""
        return bool(await self.operations.touch(session_id, max_age_argument(max_age)))

    async def delete(self, session_id: str, *, expect: S | None = None, reason: str = "deleted") -> bool:
        """End a session; for five minutes `ended` tells the *reason*, a short word.

        *expect*: end it only if these fields hold these values, as in `set`. So `expect={"user_id": 7}` ends no session
        of another user.

        Returns False if there is no session, or it is not as expected. It may also return False if the connection broke
        and the call was run twice.
        """
        expected = () if expect is None else self.fields.expect(expect)
        return await self.operations.delete(session_id, _reason(reason), expected)

    async def ended(self, session_id: str) -> str | None:
        """Return why a session was ended. None if it was not ended, or more than five minutes ago."""
        return (await self.operations.get(session_id, [])).ended

    async def rotate(
        self,
        session_id: str,
        values: S | None = None,
        max_age: Duration | None = None,
        *,
        grace: Duration | None = None,
    ) -> str:
        """Give a session a new id, as at a login, write these values, and return the id. Data and age stay.

        *max_age*: as in `set`; without it the TTL stays too.
        *grace*: for so long the old id still leads to the session, so that requests in flight are not signed out. It
        cannot be rotated again by the old id. A rotation that changes the identity gives no grace: whoever knew the
        old id must not get in.

        The old id has ended, with the reason "rotated". Raises `SessionNotFound` if there is no session,
        `LimitExceeded` if a reference refuses it, and `Blocked` if a new value is blocked.
        """
        new, encoded = self._layout.mint(), self.fields.encode({} if values is None else values)
        grace_age = "none" if grace is None else str(milliseconds(grace, "grace"))
        age = "keep" if max_age is None else max_age_argument(max_age)
        await self.operations.rotate(session_id, new, encoded, age, grace_age)
        return new

    async def ttl(self, session_id: str) -> timedelta | None:
        """Return how long a session has left to live; None if there is none."""
        read = await self.operations.get(session_id, [])
        return timedelta(milliseconds=read.ttl) if read.ttl else None

    async def ids_by(self, field: str, value: str | int) -> list[str]:
        """Return the ids of the sessions with that value of a reference, in no order."""
        with self.operations.several():
            return [session["id"] async for session in self._find(field, value, [], begun=True)]

    async def count_by(self, field: str, value: str | int, *, exact: bool = True) -> int:
        """Return how many sessions have that value of a reference.

        All of them are looked at, page by page. With *exact* false it is one command whatever their number, and also
        counts some sessions that have expired: an upper bound.
        """
        self.fields.number(field)
        return len(await self.ids_by(field, value)) if exact else await self.operations.count_by(field, value)

    def find_by(self, field: str, value: str | int, fields: Iterable[str] | None = None) -> AsyncIterator[S]:
        """Iterate over the sessions with that value of a reference, as `get` returns them, in no order.

        Reads fifty at a time. A session that joins or ends meanwhile may be seen or not; none is seen twice. Sessions
        that are not readable are left out; at the end a `SessionError` says how many there were.
        """
        return self._find(field, value, None if fields is None else field_names(fields, "id"))

    async def delete_by(
        self,
        field: str,
        value: str | int,
        *,
        keep: Iterable[str] = (),
        reason: str = "deleted",
        block: Duration | None = None,
    ) -> int:
        """End every session with that value of a reference, and return how many that were.

        *keep*: ids of sessions to spare, at most 1,000; the old id of a session that was rotated with grace counts too.
        *block*: for so long no session may join the value: what would raises `Blocked`. So a login that checked the old
        password a moment ago cannot slip in behind a password reset. A longer block that is there already stays.

        All that have the value when it is called end, and none that gets it later: fifty at a time, so that others need
        not wait long. If `StoreUnavailable` is raised, some may have ended and some not: call it again. If a connection
        broke it may count too few, or end a session that got the value between two attempts.
        """
        token, position = self._layout.mint(), Position()
        spared = [text(session_id, "an id to keep") for session_id in listed(keep, "keep")]
        if len(spared) > _MOST_KEPT:
            raise ValueError(f"keep must not have more than {_MOST_KEPT:,} ids")
        blocked_for = "open" if block is None else str(milliseconds(block, "block"))
        ended = 0
        with self.operations.several():
            while True:
                page = await self.operations.delete_by(
                    field, value, position, token=token, reason=_reason(reason), block=blocked_for, keep=spared
                )
                ended, position = ended + page.ended, page.position
                if position.done:
                    return ended

    async def block(self, field: str, value: str | int, duration: Duration, *, reason: str = "blocked") -> int:
        """End every session with that value of a reference, and let none join it for so long: `Blocked` is raised.

        Returns how many sessions were ended. A longer block that is there already stays.
        """
        length = timedelta(milliseconds=milliseconds(duration, "duration"))
        return await self.delete_by(field, value, reason=reason, block=length)

    async def unblock(self, field: str, value: str | int) -> bool:
        """Let sessions join that value of a reference again. Returns False if it was not blocked.

        It may also return False if the connection broke and the call was run twice.
        """
        self.fields.number(field)
        return await self.operations.unblock(field, value)

    async def blocked(self, field: str, value: str | int) -> timedelta | None:
        """Return for how long no session may join that value of a reference; None if it is not blocked."""
        self.fields.number(field)
        left = await self.operations.blocked(field, value)
        return timedelta(milliseconds=left) if left else None

    def _find(self, field: str, value: str | int, fields: list[str] | None, *, begun: bool = False) -> AsyncIterator[S]:
        self.get_reference_key(field, value)  # Bad arguments are told now, not at the first step.

        async def sessions() -> AsyncIterator[S]:
            position, seen, unreadable = Position(), set[str](), set[bytes]()
            while True:
                page = await self.operations.find_by(field, value, fields, position, begun=begun)
                for pairs in page.sessions:
                    try:
                        session = self.fields.decode(pairs)
                    except SessionError:
                        unreadable.add(dict(zip(pairs[::2], pairs[1::2], strict=True))[b"id"])
                        continue
                    if session["id"] not in seen:  # A set that is rehashed between two pages shows members again.
                        seen.add(session["id"])
                        yield cast("S", session)
                position = page.position
                if position.done:
                    break
            if unreadable:
                raise SessionError(
                    f"{len(unreadable):,} sessions hold data that is not readable; the others were found"
                )

        return sessions()


def max_age_argument(max_age: Duration | None) -> MaxAge:
    """Return what the scripts take for the lifetime that a write gives: "renew" if it is None."""
    return "renew" if max_age is None else str(milliseconds(max_age, "max_age"))


def _renewal(touch: bool | Duration) -> Renewal:  # noqa: FBT001 - as `get` takes it
    """Return what the scripts take for when a read renews."""
    return ("always",) if touch is True else ("after", str(milliseconds(touch, "touch")))


def _reason(reason: str) -> str:
    if not isinstance(reason, str) or not _REASON.fullmatch(reason):
        raise ValueError("reason must be a short word: at most 32 letters, digits, '-' and '_'")
    return reason
