"""The store: one method is one operation is one script."""

import codecs
import functools
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, ItemsView, Iterable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Generic, Self, TypedDict, Unpack, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from rss.coalesce import Coalescer
from rss.codec import Codec, JSONCodec, TextCodec
from rss.durations import Duration, milliseconds
from rss.errors import SessionEnded, SessionError, SessionNotFound
from rss.keys import Keys, text
from rss.references import Reference
from rss.scripts import Scripts

if sys.version_info >= (3, 13):
    from typing import TypeVar
else:
    from typing_extensions import TypeVar

#: The fields of a session: a `TypedDict(total=False)`, or any `dict[str, Any]`.
S = TypeVar("S", bound=Mapping[str, Any], default=dict[str, Any])

_K = TypeVar("_K")
_V = TypeVar("_V")

_TOMBSTONE: Final = "300000"  # Milliseconds. Later than that, no request that began before is still running.
_PAGE: Final = "50"  # Sessions that a script looks at: a millisecond or two, for which all others wait.
_REASON: Final = re.compile(r"[\w-]{1,32}", re.ASCII)


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
    """Sessions in one Redis, or one Redis behind Sentinels.

    *client*: a `redis.asyncio.Redis`. It is neither configured nor closed, and may serve other purposes too. Like it,
    a store belongs to one event loop.
    *references*: the indexed fields; a mapping says more about each with a `Reference`.
    *prefix*: the beginning of every key. No brace, and not that of another kind of data; stores with the same prefix
    must have the same references.
    *max_age*: how long a session lives without a write. One that is given a max_age of its own, by a method that takes
    one, keeps that for later writes and renewals, until it is given another.
    *max_lifetime*: the longest a session lives from its creation, however often it is renewed; by the server's clock.
    *id_bytes*: random bytes in an id, at least 16.
    *codec*: how values stand in Redis. Those of references are stored by `JSONCodec`, or by `TextCodec` if it is that.
    *timeout*: how long an operation may take; by reference, a page of one.

    What every method has in common: bad arguments raise `TypeError` or `ValueError` before anything is sent. What
    fails, fails as a whole. A write by the id of a session that was ended raises `SessionEnded`. When Redis gives no
    answer in time, `StoreUnavailable` is raised; until then an operation is repeated if Redis did not run it, and,
    except `pop`, `increment` and a `set` that expects something, also if that is not known: a second run recognises
    the work of the first, or does the same again.
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
            raise TypeError(f"client must be a redis.asyncio.Redis, not {type(client).__name__}")
        encoder = client.get_encoder()  # type: ignore[no-untyped-call]
        if codecs.lookup(encoder.encoding).name != "utf-8":
            raise ValueError("client must have the encoding utf-8, in which keys and values are compared")
        self._references = _references(references)
        self._keys = Keys(prefix, id_bytes)
        age = str(milliseconds(max_age, "max_age"))
        longest = "0" if max_lifetime is None else str(milliseconds(max_lifetime, "max_lifetime"))
        self._codec = codec
        own = codec if isinstance(codec, TextCodec) else JSONCodec()
        self._codecs: dict[str, Codec] = dict.fromkeys(self._references, own)  # Of the other fields: `codec`.
        self._encoders = _Cached(self._encoder)
        self._decoders = _Cached(self._decoder)
        self._owned: Redis | None = None

        encoding = "text" if isinstance(codec, TextCodec) else "json"
        head = [prefix, age, longest, _TOMBSTONE, encoding, str(len(self._references))]
        for field, reference in self._references.items():
            strictness = "strict" if reference.strict else "lax"
            head += [field, str(reference.limit or 0), reference.on_limit, strictness]
        seconds = milliseconds(timeout, "timeout") / 1000
        self._calls = Coalescer(Scripts(client, seconds), head, seconds)

    @classmethod
    def from_url(cls, url: str, **options: Unpack[StoreOptions]) -> Self:
        """Return a store with a client of its own, which `aclose` closes: redis://, rediss:// or unix://."""
        # Every call has a deadline: the client need not watch each packet too.
        client = Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=None)
        store = cls(client, **options)
        store._owned = client
        return store

    async def load(self) -> None:
        """Load the scripts, so that the first operation finds them: not needed, but it tells whether Redis is there."""
        await self.ended(self._keys.mint())

    async def aclose(self) -> None:
        """Take no more calls, wait for those under way, and close the client, if the store made it itself."""
        self._calls.closed = True
        await self._calls.drain()
        if self._owned is not None:
            await self._owned.aclose()

    async def __aenter__(self) -> Self:
        self._calls.closed = False  # An application may be started again, in tests say.
        try:
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
        return f"{type(self).__name__}(prefix={self._keys.prefix!r}, references={[*self._references]!r})"

    def create_session_id(self) -> str:
        """Return a new random id, URL-safe, for `set`; `create` makes its own."""
        return self._keys.mint()

    def get_session_key(self, session_id: str) -> str:
        """Return the key of a session's hash."""
        return self._keys.session(session_id)

    def get_reference_key(self, field: str, value: str | int) -> str:
        """Return the key of a reference set: SMEMBERS of it are the ids, also of some sessions that have expired."""
        self._number(field)
        return self._keys.reference(field, value)

    async def create(self, values: S | None = None, max_age: Duration | None = None) -> str:
        """Make a session with these values and return its id, which is new.

        Raises `LimitExceeded` if a reference refuses it.
        """
        session_id = self._keys.mint()
        await self._set(session_id, values or {}, max_age, "create", None)
        return session_id

    async def get(self, session_id: str, fields: Iterable[str] | None = None, *, touch: bool | Duration = False) -> S:
        """Return a session with its `id`, or these fields of it; those it does not have are left out.

        With *touch*, renew it in the same round trip; with a time, such as "1m", only if that, or half of its time, has
        passed since it was last renewed. Returns {} if there is no session.
        """
        names = None if fields is None else field_names(fields, "id")
        reply = await self._read(session_id, names, _idle(touch))
        return self._decode(reply[:-2])

    async def set(
        self,
        session_id: str,
        values: S,
        max_age: Duration | None = None,
        *,
        create: bool = True,
        expect: S | None = None,
    ) -> S:
        """Write these fields, renew the session, from now on for *max_age* if that is given, and return the values.

        Other fields stay. A session that is not there is made, unless *create* is false: then `SessionNotFound` is
        raised. *expect* writes only if these fields hold these values now, else raises `Conflict`; None expects
        that a field holds None or is not there. Values are compared as they are stored: a dict with its keys in
        order. With *expect* it is never run twice: if the connection breaks, it is not known whether it was written.
        Raises `LimitExceeded` if a reference refuses the session. What others left under its key is removed.
        """
        await self._set(session_id, values, max_age, "set" if create else "update", expect)
        return values

    async def unset(self, session_id: str, fields: Iterable[str], max_age: Duration | None = None) -> None:
        """Take out these fields and renew the session, as `set` does. Does nothing if there is no session."""
        try:
            await self._unset(session_id, fields, lifetime(max_age), repeatable=True)
        except SessionEnded:
            raise
        except SessionNotFound:
            pass

    async def pop(self, session_id: str, fields: Iterable[str]) -> S:
        """Take out these fields and return what they held, without `id`: {} if there were none of them.

        The TTL stays. Raises `SessionNotFound` if there is no session. Never run twice: if the connection breaks,
        it is not known whether the fields are still there.
        """
        reply = await self._unset(session_id, fields, "-1", repeatable=False)
        return self._decode(reply[:-1])

    async def increment(self, session_id: str, field: str, by: int = 1) -> int:
        """Add to an integer field, 0 if it is not there, and return the sum. The TTL stays.

        It is stored as its digits, which a codec of your own must be able to read. Raises `ValueError` if the field
        holds something else or the sum does not fit into 64 bits, and
        `SessionNotFound` if there is no session. Never run twice: if the connection breaks, it is not known whether
        it was counted.
        """
        if _field(field) in self._references:
            raise ValueError(f"{field!r} is a reference: it cannot be counted")
        if type(by) is not int or not -(2**63) <= by < 2**63:
            raise ValueError("by must be an integer of 64 bits")
        args = [field, str(by)]
        keys = [self._keys.session(session_id)]
        return cast("int", await self._calls.run("increment", keys, args, repeatable=False))

    async def touch(self, session_id: str, max_age: Duration | None = None) -> bool:
        """Renew a session as `set` does, and the reference sets it is in. Returns False if there is no session."""
        return bool(await self._touch(session_id, lifetime(max_age)))

    async def delete(self, session_id: str, *, reason: str = "deleted") -> bool:
        """End a session; for five minutes `ended` tells the *reason*, a short word.

        Returns False if there is no session. So it may also do if the connection broke and it was run twice.
        """
        args = [_reason(reason)]
        return bool(await self._calls.run("delete_with_refs", [self._keys.session(session_id)], args))

    async def ended(self, session_id: str) -> str | None:
        """Return why a session was ended, for five minutes after; None if it was not, or is not known any more."""
        reply = await self._read(session_id, [])
        return cast("bytes", reply[1]).decode() if reply[0] == b"_ended" else None

    async def rotate(
        self,
        session_id: str,
        values: S | None = None,
        max_age: Duration | None = None,
        *,
        grace: Duration | None = None,
    ) -> str:
        """Give a session a new id, as at a login, write these values, and return the id. Data and age stay.

        Without *max_age* its TTL stays, too; with it, the session is renewed, and keeps that for later.
        The old id has ended, with the reason "rotated". For *grace* it still leads to the session, so that requests
        that were under way are not signed out; but it cannot be rotated again. Raises `SessionNotFound` if there
        is no session, and `LimitExceeded` if a reference refuses it.
        """
        new = self._keys.mint()
        patience = "0" if grace is None else str(milliseconds(grace, "grace"))
        await self._rotate(session_id, new, values or {}, max_age, patience)
        return new

    async def ttl(self, session_id: str) -> timedelta | None:
        """Return how long a session has left to live; None if there is none."""
        *_, ttl = await self._read(session_id, [])
        return timedelta(milliseconds=ttl) if ttl else None

    async def ids_by(self, field: str, value: str | int) -> list[str]:
        """Return the ids of the sessions with that value of a reference, in no order."""
        return [session["id"] async for session in self._find(field, value, [])]

    async def count_by(self, field: str, value: str | int) -> int:
        """Return how many sessions have that value of a reference: all are looked at, page by page."""
        return len(await self.ids_by(field, value))

    def find_by(self, field: str, value: str | int, fields: Iterable[str] | None = None) -> AsyncIterator[S]:
        """Iterate over the sessions with that value of a reference, as `get` returns them, in no order.

        Reads fifty at a time. One that joins or ends meanwhile may be seen or not; none is seen twice.
        """
        return self._find(field, value, None if fields is None else field_names(fields, "id"))

    async def delete_by(
        self, field: str, value: str | int, *, keep: Iterable[str] = (), reason: str = "deleted"
    ) -> int:
        """End every session with that value of a reference, except those to *keep*, and return how many that were.

        All that have the value when it is called end, none that gets it later: fifty at a time, so that nobody
        else waits long. When it raises `StoreUnavailable`, some may have ended and some not: call it again. Only if
        a connection broke may it count too few, or end one that got the value in the moment between two attempts.
        """
        keys = [self._keys.reference(field, value), self._keys.fence(field, value)]
        spared = [text(session_id, "an id to keep") for session_id in listed(keep, "keep")]
        head = [self._number(field)]
        args = [_PAGE, self._keys.mint(), _reason(reason), str(len(spared)), *spared]
        cursor, ended = b"0", 0
        while True:
            cursor, count = await self._calls.run("delete_by_ref", keys, [*head, cursor, *args])
            ended += int(count)
            if cursor == b"0":
                return ended

    # What the operations are made of, and what the web layer uses, since the cookie has to know the TTL.

    def _set(
        self, session_id: str, values: Mapping[str, Any], max_age: Duration | None, mode: str, expect: S | None
    ) -> Awaitable[int]:
        """Return the TTL in milliseconds. *mode*: "set", "update" or "create", as the script says."""
        pairs, sets, counts = self._encode(values)
        expected: list[str | bytes] = []
        if expect is not None:
            for field, value in _items(expect, "expect"):
                expected += (field, self._expectation(field, value))
        keys = [self._keys.session(session_id), *sets]
        args = [lifetime(max_age), *expected, str(len(pairs)), *pairs]
        shared = (mode, str(len(expected) // 2) if expected else "0", *counts)
        return self._calls.run("set_with_refs", keys, args, shared=shared, repeatable=not expected)

    async def _unset(self, session_id: str, fields: Iterable[str], max_age: str, *, repeatable: bool) -> list[Any]:
        """Return fields and data in turn, and at last the TTL in milliseconds."""
        names = field_names(fields)
        args = [max_age, str(len(names)), *names]
        keys = [self._keys.session(session_id)]
        reply: list[Any] = await self._calls.run("unset_with_refs", keys, args, repeatable=repeatable)
        return reply

    def _touch(self, session_id: str, max_age: str) -> Awaitable[int]:
        """Return the TTL in milliseconds, 0 if there is no session."""
        return self._calls.run("touch", [self._keys.session(session_id)], [max_age])

    def _rotate(
        self, session_id: str, new: str, values: Mapping[str, Any], max_age: Duration | None, grace: str = "0"
    ) -> Awaitable[int]:
        """Return the TTL in milliseconds."""
        pairs, sets, counts = self._encode(values)
        keys = [self._keys.session(session_id), self._keys.session(new), *sets]
        args = [new, grace, "-1" if max_age is None else lifetime(max_age), str(len(pairs)), *pairs]
        return self._calls.run("rotate_with_refs", keys, args, shared=tuple(counts))

    def _read(self, session_id: str, fields: list[str] | None, idle: str = "-1") -> Awaitable[list[Any]]:
        """Return fields and data in turn, and at last 1 if it was renewed or is due to be, and the TTL in ms."""
        return self._calls.run("get", (self._keys.session(session_id),), (), shared=(idle, *_wanted(fields)))

    def _find(self, field: str, value: str | int, fields: list[str] | None) -> AsyncIterator[S]:
        keys, head = [self._keys.reference(field, value)], [self._number(field)]

        async def sessions() -> AsyncIterator[S]:
            cursor, seen = b"0", set[str]()
            while True:
                cursor, *page = await self._calls.run("find_by_ref", keys, [*head, cursor, _PAGE, *_wanted(fields)])
                for session in map(self._decode, page):
                    if session["id"] not in seen:  # A set that is rehashed between two pages shows members again.
                        seen.add(session["id"])
                        yield session
                if cursor == b"0":
                    return

        return sessions()

    def _number(self, field: str) -> str:
        """Return which of the references a field is, as the scripts count."""
        try:
            return str([*self._references].index(field) + 1)
        except ValueError:
            raise ValueError(f"{field!r} is not one of the references of this store") from None

    def _encode(self, values: Mapping[str, Any]) -> tuple[list[str | bytes], list[str], list[str]]:
        """Return fields and data in turn, the reference sets to be in, and how many these are for each reference."""
        pairs: list[str | bytes] = []
        for field, value in _items(values, "values"):
            pairs += (field, self._encode_value(field, value))
        sets: list[str] = []
        counts: list[str] = []
        for field in self._references:
            own = self._sets(field, values[field]) if field in values else None
            sets += own or ()
            counts.append("-1" if own is None else str(len(own)))
        return pairs, sets, counts

    def _sets(self, field: str, value: Any) -> list[str]:
        if not isinstance(value, list):
            return [] if value is None else [self._keys.reference(field, value)]
        if any(isinstance(one, int) and abs(one) > 2**53 for one in value):
            raise ValueError(f"an integer in a list of the reference {field!r} must not be beyond 2**53")
        return list(dict.fromkeys(self._keys.reference(field, one) for one in value))

    def _as_stored(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values as a read will bring them back."""
        pairs = [data.encode() if isinstance(data, str) else data for data in self._encode(values)[0]]
        return cast("dict[str, Any]", self._decode(pairs))

    def _encode_value(self, field: str, value: Any) -> str | bytes:
        encode = self._encoders[field]
        try:
            return encode(field, value)
        except (TypeError, ValueError) as error:
            # What is wrong is said without the text of the error, which may hold the value.
            kind = TypeError if isinstance(error, TypeError) else ValueError
            codec = type(self._codecs.get(field, self._codec)).__name__
        raise kind(f"{codec} cannot store this {type(value).__name__} in the field {field!r}")

    def _encoder(self, field: str) -> Callable[[str, Any], str | bytes]:
        return self._codecs.get(_field(field), self._codec).encode

    def _expectation(self, field: str, value: Any) -> bytes:
        try:
            data = self._encode_value(field, value)
        except (TypeError, ValueError):
            if value is not None:
                raise
            return b"-"  # This codec stores no None: the field must be absent.
        return (b"-" if value is None else b"=") + (data.encode() if isinstance(data, str) else data)

    def _decode(self, pairs: list[bytes]) -> S:
        session: dict[str, Any] = {}
        decoders, turns = self._decoders, iter(pairs)
        for name, data in zip(turns, turns, strict=True):
            field, decode = decoders[name]
            if decode:
                try:
                    session[field] = decode(field, data)
                except (TypeError, ValueError):
                    raise SessionError(f"the field {field!r} holds data that is not readable") from None
        return cast("S", session)

    def _decoder(self, name: bytes) -> tuple[str, Callable[[str, bytes], Any] | None]:
        """Return what a field is called, and what decodes it: nothing, if it is the library's."""
        field = name.decode(errors="backslashreplace")
        decode = None if field.startswith("_") else self._codecs.get(field, self._codec).decode
        return field, _read_id if field == "id" else decode


class _Cached(dict[_K, _V]):
    """What is made from each key, once. Names may hold data of their own: they must not pile up."""

    def __init__(self, make: Callable[[_K], _V]) -> None:
        self._make = make

    def __missing__(self, key: _K) -> _V:
        if len(self) >= 1000:
            self.clear()
        value = self[key] = self._make(key)
        return value


def _read_id(_: str, data: bytes) -> str:
    return data.decode()


def _references(references: Iterable[str] | Mapping[str, Reference]) -> dict[str, Reference]:
    if not isinstance(references, Mapping):
        references = dict.fromkeys(listed(references, "references"), Reference())
    for field, reference in references.items():
        if any(mark in _field(field) for mark in ":{}"):
            raise ValueError("the field of a reference must not hold a colon or a brace: they delimit it in keys")
        if not isinstance(reference, Reference):
            raise TypeError("references must be fields, or a mapping of fields to Reference")
    return dict(references)


def listed(values: Iterable[str], name: str) -> list[str]:
    """Return several texts; raise TypeError with their *name* if it is but one, or something else."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be several str, in a list for one")
    return list(values)


def _items(values: Mapping[str, Any], name: str) -> ItemsView[str, Any]:
    if type(values) is not dict and not isinstance(values, Mapping):
        raise TypeError(f"{name} must be a mapping of fields to values, not {type(values).__name__}")
    return values.items()


@functools.lru_cache(maxsize=1024)
def _field(field: str) -> str:
    if text(field, "a field") == "id" or field.startswith("_"):
        raise ValueError(f"the field {field!r} is reserved: 'id' and names that begin with '_' are the library's")
    return field


def field_names(fields: Iterable[str], *readable: str) -> list[str]:
    """Return the names of some fields; raise TypeError or ValueError if they are reserved, but for those *readable*."""
    names = listed(fields, "fields")
    if not names:
        raise ValueError("fields must not be empty")
    return [_field(name) for name in names if name not in readable]


def _wanted(fields: list[str] | None) -> Sequence[str]:
    return ("-1",) if fields is None else (str(len(fields)), *fields)


def lifetime(max_age: Duration | None) -> str:
    """Return what the scripts take: 0 for what the session was given before."""
    return "0" if max_age is None else str(milliseconds(max_age, "max_age"))


def _idle(touch: bool | Duration) -> str:  # noqa: FBT001 - as `get` takes it
    """Return the milliseconds after which a session is renewed: 0 for each time, -1 for never."""
    if isinstance(touch, bool):
        return "0" if touch else "-1"
    return str(milliseconds(touch, "touch"))


def _reason(reason: str) -> str:
    if not isinstance(reason, str) or not _REASON.fullmatch(reason):
        raise ValueError("reason must be a short word: at most 32 letters, digits, '-' and '_'")
    return reason
