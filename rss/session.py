"""Sessions of a web application, without a framework: the handle of a request, and the cookie behind it."""

import asyncio
import base64
import copy
import enum
import hashlib
import hmac
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Final, Generic, Literal, cast

from rss.cookies import CookiePolicy, Signer
from rss.csrf import CSRFTokens
from rss.durations import Duration, milliseconds
from rss.errors import IdentityChanged, LimitExceeded, SessionEnded, SessionNotFound, StoreUnavailable
from rss.fields import Encoded, field_names, listed
from rss.store import S, SessionStore, max_age_argument

_NONE: Final[tuple[str, object]] = "", None
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{22,342}")  # What `SessionStore.create_session_id` makes.
# Browsers keep no cookie for longer.
_LONGEST: Final = timedelta(days=400)
_SCALARS: Final = frozenset({str, int, float, bool, bytes, type(None)})

_logger = logging.getLogger("rss")


class Sessions(Generic[S]):
    """The sessions of an application: a store, and how cookies are made. Adapters make a `Session` for each request.

    *secret_keys*: keys that sign the cookie, so that Redis is not asked for tokens that a client made up. The first one
    signs, all of them verify. Security does not need it: a token cannot be guessed. It needs itsdangerous.
    *cookie*: its name and attributes.
    *rolling*: reading a session renews it if that time has passed since it was last renewed. None: only writes do.
    *hash_ids*: the cookie holds a token, and Redis only its SHA-256, the id of the session. So a reader of Redis, its
    log or a backup cannot take a session over, and an id may be shown to people. False: the cookie holds the id.
    *on_unavailable*: what reading does if Redis does not answer. "raise": it raises `StoreUnavailable`. "anonymous":
    the request has no session. A write raises in any case.
    """

    __slots__ = (
        "_cookie_age", "_signer", "_warned", "cookie", "hash_ids", "idle", "on_unavailable", "store", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        store: SessionStore[S],
        *,
        secret_keys: Iterable[str] | None = None,
        cookie: CookiePolicy = CookiePolicy(),  # noqa: B008 - it is frozen
        rolling: Duration | None = "1m",
        hash_ids: bool = True,
        on_unavailable: Literal["raise", "anonymous"] = "raise",
    ) -> None:
        if not isinstance(store, SessionStore):
            hint = "SessionStore.from_url(url)" if isinstance(store, str) else "SessionStore(client)"
            raise TypeError(f"store must be a SessionStore, not {type(store).__name__}: Sessions({hint})")
        if not isinstance(cookie, CookiePolicy):
            raise TypeError(f"cookie must be a CookiePolicy, not {type(cookie).__name__}")
        if on_unavailable not in ("raise", "anonymous"):
            raise ValueError("on_unavailable must be 'raise' or 'anonymous'")
        self.store: SessionStore[S] = store
        #: What makes and checks the CSRF tokens.
        self.tokens: CSRFTokens = CSRFTokens()
        self.cookie: CookiePolicy = cookie
        self.hash_ids: bool = hash_ids
        self.on_unavailable = on_unavailable
        #: Milliseconds since the last renewal after which reading renews a session; None for never.
        self.idle: str | None = None if rolling is None else str(milliseconds(rolling, "rolling"))
        self._signer = None if secret_keys is None else Signer(listed(secret_keys, "secret_keys"))
        self._cookie_age = _LONGEST if store.max_lifetime is None else min(store.max_lifetime, _LONGEST)
        self._warned = set[str]()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store!r}, cookie={self.cookie!r})"

    def create_session(self, cookies: str = "", *, scheme: str = "https") -> "Session[S]":
        """Return the session of a request with this Cookie header. Join several headers by a semicolon.

        *scheme*: that of the request. On "http" a warning tells once that browsers may drop a Secure cookie.

        This reads nothing. The first write makes a session.
        """
        return Session(self, cookies, scheme)

    def get_reference_key(self, field: str, value: str | int) -> str:
        """Return the key of a reference set: see `SessionStore.get_reference_key`."""
        return self.store.get_reference_key(field, value)

    def id_of(self, token: str) -> str:
        """Return the id of the session whose cookie holds this token."""
        if not self.hash_ids:
            return token
        return base64.urlsafe_b64encode(hashlib.sha256(token.encode()).digest()).rstrip(b"=").decode()

    def read_tokens(self, cookies: str) -> list[str]:
        """Return the different tokens in a Cookie header that could be ours: nearly always one, or none.

        There are several if a sibling domain, or a page on another path, has set a cookie of the same name.
        """
        values: Iterable[str | None] = self.cookie.read(cookies)
        if self._signer is not None:
            values = map(self._signer.unsign, cast("list[str]", values))
        return [value for value in values if value is not None and _TOKEN.fullmatch(value)]

    def write_token(self, token: str) -> str:
        """Return the Set-Cookie header for a token.

        The cookie lives for `max_lifetime`, at most 400 days: Redis decides how long the session lives.
        """
        return self.cookie.write(self._signer.sign(token) if self._signer else token, self._cookie_age)

    def warn_once(self, warning: str) -> None:
        """Log a warning, unless it was logged before."""
        if warning not in self._warned:
            self._warned.add(warning)
            _logger.warning(warning)


class _State(enum.Enum):
    """What a request knows about its session. `repr` shows the value."""

    #: A token came. Redis was not asked yet.
    UNREAD = "not looked at"
    #: There is none. A write makes one.
    ABSENT = "none"
    ALIVE = "alive"
    #: It was alive in this request and has ended, or it was rotated: a write raises, except a login.
    GONE = "ended"
    #: Redis did not answer, and the client is taken for anonymous: a write raises.
    UNREADABLE = "unreadable"


class _Cookie:
    """The token of a request's session: the one that came, and the one that the response must set."""

    __slots__ = ("_came", "_held", "_removed", "_scheme", "_sessions", "others", "sent", "token")

    def __init__(self, sessions: Sessions[Any], cookies: str, scheme: str) -> None:
        tokens = sessions.read_tokens(cookies)
        #: The token of the session; None if there is none, or if several came: nobody can tell which one is right.
        self.token = tokens[0] if len(tokens) == 1 else None
        #: Several tokens, if they came.
        self.others = tokens if len(tokens) > 1 else []
        #: Whether the response has begun: it can tell nothing more.
        self.sent = False
        self._sessions = sessions
        self._held = self.token
        self._came = sessions.cookie.name in cookies  # Also if it holds no token.
        self._removed = False
        self._scheme = scheme

    def check(self) -> None:
        """Raise RuntimeError if no new token can be told any more."""
        if self.sent:
            raise RuntimeError("the response has begun: it cannot tell the client the id of a new session")

    @property
    def changes(self) -> bool:
        """Whether the response must tell the client something."""
        return self.token != self._held or self._removed

    def adopt(self, token: str) -> None:
        """Let the client get a new token."""
        self.check()
        self.token = token

    def revert(self) -> None:
        """Let the client keep what it holds: a token that was made in this request leads nowhere any more."""
        self.token = self._held

    def remove(self) -> None:
        """Let the client forget its token."""
        self.token, self.others, self._removed = None, [], True

    def take(self) -> list[str]:
        """Return the Set-Cookie headers of the response, which begins now."""
        if self.sent:
            return []
        self.sent = True
        if self.token is None:
            return [self._sessions.cookie.clear()] if self._removed and self._came else []
        if self.token == self._held:
            return []
        if self._sessions.cookie.secure and self._scheme in ("http", "ws"):
            self._sessions.warn_once(
                "A Secure cookie was set on plain http, where clients may drop it. In production, use https; behind a "
                "proxy that ends TLS, let the server trust its X-Forwarded-Proto. For development, use "
                "CookiePolicy(secure=False)."
            )
        return [self._sessions.write_token(self.token)]


class Session(Generic[S]):
    """The session of a request. It is read when it is first asked for, and made when it is first written to.

    It is read once, however often `get` is called; own writes show. A request without a session gets one, with a new
    id, by the first write: `set`, `rotate` or `create_csrf_token`. So does a request whose cookie belongs to none.

    A session that was alive in this request and has ended meanwhile is not made again: a write raises `SessionEnded` or
    `SessionNotFound`. So does a write that races a login with the old cookie: `SessionEnded` with the reason "rotated".
    Only a login makes a session then: a write of an identity that this session did not have, or a `rotate` with values
    that races another one, as when a form is sent twice.

    If the store has an identity, a write that changes it gives the session a new id, as `rotate` does.

    The response sets the cookie if its token is new, and removes it after `delete`. Once the response has begun, a
    write that needs a new id raises RuntimeError. Writes to a session that the client knows go on.

    The errors of `SessionStore` are raised here too: `StoreUnavailable` never means that there is no session.
    """

    __slots__ = (
        "_cookie", "_due", "_id", "_kept", "_lock", "_next", "_seen", "_state", "_store", "_values",
        "accessed", "ended", "failure", "is_new", "sessions",
    )  # fmt: skip

    def __init__(self, sessions: Sessions[S], cookies: str, scheme: str) -> None:
        #: The sessions of the application.
        self.sessions: Sessions[S] = sessions
        #: Whether it was made in this request.
        self.is_new: bool = False
        #: Why the session of this cookie ended. None if it has not, if the reason is no longer known, or before this
        #: request has read the session.
        self.ended: str | None = None
        #: Whether the response depends on the session.
        self.accessed: bool = False
        #: What the last call of it that asked Redis raised; None if it raised nothing that `status_for` knows.
        self.failure: StoreUnavailable | SessionNotFound | LimitExceeded | None = None
        self._store = sessions.store
        self._cookie = _Cookie(sessions, cookies, scheme)
        self._state = _State.UNREAD if self._cookie.token else _State.ABSENT
        self._id = sessions.id_of(self._cookie.token) if self._cookie.token else ""
        self._values: dict[str, Any] | None = None  # None: not read, or it is not known what was written.
        self._due = False  # Whether it was read without being renewed, and a renewal is due.
        self._kept = False  # Whether it stays even if its last field is taken out, since a form has its CSRF token.
        self._seen: Any = None  # The identity that it had in this request; None if nobody was signed in.
        self._next = _NONE  # The token of a call that is under way, and what it writes.
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {'new' if self.is_new else self._state.value}>"

    @property
    def id(self) -> str | None:
        """Its id; None if there is no session, or if it was neither read nor written yet.

        With `hash_ids` it may be shown, as on a page of devices: nobody can take the session over by it.
        """
        return self._id if self._state is _State.ALIVE else None

    @property
    def sent(self) -> bool:
        """Whether the response has begun: no new id can be told to the client."""
        return self._cookie.sent

    @property
    def cookie_changes(self) -> bool:
        """Whether this request has made the session, given it a new id, or ended it."""
        return self._cookie.changes

    def get_key(self) -> str:
        """Return the key of its hash in Redis. Raises `SessionNotFound` if `id` is None."""
        if self.id is None:
            raise SessionNotFound("there is no session in this request, or it was not looked at yet")
        return self._store.get_session_key(self.id)

    # Reading.

    async def get(self, fields: Iterable[str] | None = None) -> S:
        """Return the session with its `id`, or these fields of it; {} if there is none.

        The first call reads all of it, and renews it if that is due. Later calls read nothing. To change what is
        returned writes nothing: only `set` does.
        """
        names = None if fields is None else {"id", *field_names(fields, "id")}
        async with self._lock:
            values = await self._load()
        return cast("S", {name: _copied(values[name]) for name in values if names is None or name in names})

    async def peek(self) -> S:
        """Return what `get` returns, without renewing the session, and without making the response depend on it.

        For adapters that read the session before the application asks for it.
        """
        async with self._lock:
            values = await self._load(renew=False)
        return cast("S", {name: _copied(value) for name, value in values.items()})

    async def _load(self, *, renew: bool = True) -> dict[str, Any]:
        """Return the values of the session: {} if there is none.

        *renew*: whether the application reads it: this renews it if that is due, and the response depends on it.
        """
        if renew:
            self.accessed = True
            # Read again instead of `touch`: on a server that takes no writes a read skips the renewal, and touch fails.
            if self._due:
                self._values, self._due = None, False
        if self._state not in (_State.UNREAD, _State.ALIVE):
            return {}
        if self._values is None:
            idle = self.sessions.idle
            renewal = () if idle is None else ("after" if renew else "check", idle)
            try:
                read = await self._answer(self._store.operations.get(self._id, None, renewal))
            except StoreUnavailable:
                if self.sessions.on_unavailable == "raise":
                    raise
                self.failure, self._state = None, _State.UNREADABLE
                return {}
            if not read.ttl:
                self._lose(read.ended)
                return {}
            self._values, self._state = self._store.fields.decode(read.pairs), _State.ALIVE
            self._due = read.state == b"due"
            self._see(self._values)
        return self._values

    # Writing.

    async def set(self, values: S, max_age: Duration | None = None) -> S:
        """Write these fields, renew the session, and return the values. Makes a session if there is none.

        *max_age*: how long the session lives from now on, and after later writes.

        A write that changes the identity gives the session a new id, as `rotate` does. Raises `LimitExceeded` if a
        reference refuses the session, and `Blocked` if a value is blocked.
        """
        async with self._lock:
            await self._change(values, (), max_age)
        return values

    async def unset(self, fields: Iterable[str], max_age: Duration | None = None) -> None:
        """Take out these fields and renew the session, as `set` does. Does nothing if there is none."""
        names, age = tuple(dict.fromkeys(field_names(fields))), max_age_argument(max_age)

        async def unset() -> int:
            return (await self._store.operations.unset(self._id, names, age)).ttl

        async with self._lock:
            try:
                done = await self._write(unset, {})
            except IdentityChanged:
                await self._rotate({}, names, age)
            else:
                if done is not None:
                    self._note({}, names)

    async def replace(
        self,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        max_age: Duration | None = None,
        *,
        anew: bool = False,
    ) -> bool:
        """Write the fields that differ between two states of the session, and take out those that are gone.

        For frameworks in which a session is a dict. It is one script. What others wrote in between stays, also if the
        other methods of this session did. If nothing is left then, the session ends, unless a CSRF token was made for
        it in this request. If nothing differs, it is at most renewed, for *max_age*, and False is returned.

        *anew*: write all of the second state, under a new id.
        """
        encode, held = self._store.fields.plain.encode_value, self._values or before
        gone = tuple(field for field in before if field not in after and held.get(field) == before[field])
        changed = {
            field: value
            for field, value in after.items()
            if field not in before or encode(field, value) != encode(field, before[field])
        }
        if anew:
            async with self._lock:
                await self._rotate(after, gone, max_age_argument(max_age))
            return True
        if gone and not changed and self._kept:
            await self.unset(gone, max_age)
        elif gone or changed:
            async with self._lock:
                await self._change(changed, gone, max_age)
        elif max_age is not None:
            await self.touch(max_age)
        return bool(gone or changed)

    async def touch(self, max_age: Duration | None = None) -> bool:
        """Renew the session, as `set` does, without writing to it. Returns False if there is none, or none any more."""
        age = max_age_argument(max_age)
        async with self._lock:
            return await self._touch(age)

    async def delete(self, *, reason: str = "deleted") -> bool:
        """End the session and remove the cookie. Returns False if there was none.

        *reason*: a short word, which `ended` tells for five minutes.

        It is done even if the request is cancelled meanwhile. If the client sent several cookies of the name, it ends
        the session of each. A later write in this request makes another session.
        """
        async with self._lock:
            self.accessed = True
            ids = [self.sessions.id_of(token) for token in self._cookie.others]
            ids += [self._id] if self._cookie.token else []
            self._values = None  # If this is cancelled, it is not known what is left.
            ending = asyncio.gather(*(self._store.delete(session_id, reason=reason) for session_id in ids))
            deleted = any(await self._answer(asyncio.shield(ending)))
            if deleted:
                self._forget()
            else:
                await self._forget_unless_rotated()
        return deleted

    async def rotate(self, values: S | None = None, max_age: Duration | None = None) -> None:
        """Give the session a new id, as at a login, and write these values. Its data and age stay.

        *max_age*: as in `set`; without it the TTL stays too.

        The old id has ended, and so have the CSRF tokens. If there is no session, this makes one with these values. It
        does the same if another request has rotated the session, for example because a form was sent twice. If the
        session has ended in another way after it was read here, this makes one only if *values* hold another identity,
        and otherwise raises `SessionEnded` or `SessionNotFound`.

        Raises `LimitExceeded` if a reference refuses the session, and `Blocked` if a value is blocked.
        """
        age = "keep" if max_age is None else max_age_argument(max_age)
        async with self._lock:
            await self._rotate(values or {}, (), age)

    async def _change(self, values: Mapping[str, Any], gone: tuple[str, ...], max_age: Duration | None) -> None:
        """Write fields and take others out, in one script. Makes a session if there is none."""
        encoded, age = self._store.fields.encode(values, gone), max_age_argument(max_age)
        try:
            try:
                ttl = await self._write(lambda: self._store.operations.set(self._id, encoded, age, "update"), values)
            except IdentityChanged:
                await self._rotate(values, gone, age)
                return
        except SessionNotFound:
            if values or not gone:
                raise
            self.failure = None  # The fields to take out are gone with the session.
            return
        if ttl is None:
            if values or not gone:
                await self._create(encoded, values, age)
        elif ttl == 0:
            self._forget()
        else:
            self._note(values, gone)

    async def _rotate(self, values: Mapping[str, Any], gone: tuple[str, ...], age: str) -> None:
        encoded = self._store.fields.encode(values, gone)
        comparable = self._store.fields.comparable(encoded, values)
        new = ""

        async def rotate() -> int:
            nonlocal new
            mint = self._minting(comparable, age, self._id)
            new, ttl = await self._store.operations.rotate(self._id, mint, encoded, age)
            return ttl

        if await self._write(rotate, values, rotates=True) is None:
            await self._create(encoded, values, age)
            return
        await self._adopt(new)
        if self._values:
            self._values["id"] = new
        self._note(values, gone)

    async def _touch(self, age: str) -> bool:
        async def touch() -> int:
            if ttl := await self._store.operations.touch(self._id, age):
                return ttl
            reason = await self._store.ended(self._id)
            raise SessionEnded(reason) if reason else SessionNotFound("there is no such session")

        try:
            return await self._write(touch, {}) is not None
        except SessionNotFound:
            self.failure = None
            return False

    async def _create(self, encoded: Encoded, values: Mapping[str, Any], age: str) -> None:
        new, max_age = encoded._replace(gone=()), "renew" if age == "keep" else age
        mint = self._minting(self._store.fields.comparable(encoded, values), age)
        session_id = await self._answer(self._store.operations.create(mint, new, max_age))
        await self._adopt(session_id)
        self.is_new, self._values = True, {"id": session_id}
        self._note(values, ())

    async def _write(
        self, operation: Callable[[], Awaitable[int]], values: Mapping[str, Any], *, rotates: bool = False
    ) -> int | None:
        """Run an operation on the session and return its TTL. Returns None if the caller must make a session first.

        *values*, *rotates*: what the write is, to tell a login from others.
        """
        self.accessed = True
        if self._state is _State.UNREADABLE:  # The application may have computed these values from no session at all.
            self.failure = StoreUnavailable("the session could not be read in this request")
            raise self.failure
        if self._state is _State.GONE and not self._is_login(values, rotates=rotates):
            self.failure = SessionEnded(self.ended) if self.ended else SessionNotFound("there is no such session")
            raise self.failure
        if self._state in (_State.ABSENT, _State.GONE):
            return None
        try:
            ttl: int = await self._answer(operation())
        except SessionNotFound as error:
            gone = self._lose(error.reason if isinstance(error, SessionEnded) else None)
            if gone and not self._is_login(values, rotates=rotates):
                self.failure = error
                raise
            return None
        except (StoreUnavailable, asyncio.CancelledError):
            self._values = None  # It is not known what was written.
            raise
        self._state = _State.ALIVE
        return ttl

    def _is_login(self, values: Mapping[str, Any], *, rotates: bool) -> bool:
        """Return whether a write may make a session although the old one is gone.

        A login may. Any other write would bring back what was ended. A write is a login if it changes the identity, or
        if it is a rotation that lost a race against another one.
        """
        again = rotates and self.ended == "rotated"
        identity = self._store.fields.identity
        if identity is None:
            return again and bool(values)
        value = values.get(identity)
        return value is not None and (again or str(value) != str(self._seen))

    # Noting what happened.

    async def _answer(self, operation: Awaitable[Any]) -> Any:
        self.failure = None
        try:
            return await operation
        except (StoreUnavailable, LimitExceeded) as error:
            self.failure = error
            raise

    def _see(self, values: Mapping[str, Any]) -> None:
        identity = self._store.fields.identity
        if identity is not None and identity in values:
            self._seen = values[identity]

    def _lose(self, reason: str | None) -> bool:
        """Note that there is no session under the id, and return whether it is gone, rather than absent.

        *reason*: why it ended, if that is known.
        """
        gone = self._state is _State.ALIVE or reason == "rotated"
        self.ended, self._values, self._due, self.is_new = reason, None, False, False
        self._state = _State.GONE if gone else _State.ABSENT
        self._cookie.revert()
        return gone

    def _forget(self) -> None:
        """Note that the session was ended here, and let the client forget its token."""
        self._cookie.remove()
        self._state, self._id, self._values, self._seen = _State.ABSENT, "", None, None
        self.is_new, self._next, self._due = False, _NONE, False

    async def _forget_unless_rotated(self) -> None:
        """Forget the session, unless a login has given it a new id: the client must keep the token of that login."""
        if self._cookie.token and await self._answer(self._store.ended(self._id)) == "rotated":
            self._lose("rotated")
        else:
            self._forget()

    async def _adopt(self, session_id: str) -> None:
        """Note that the session lives under the token of `_next`. If the client cannot be told any more, end it."""
        try:
            self._cookie.adopt(self._next[0])
        except RuntimeError:
            await self._answer(asyncio.shield(self._store.delete(session_id)))
            self._state = _State.ALIVE  # It was: so it is gone now, and no write of this request makes another one.
            self._lose("deleted")
            raise
        self._state, self._id, self._next = _State.ALIVE, session_id, _NONE

    def _note(self, values: Mapping[str, Any], gone: Iterable[str]) -> None:
        """Note what was written, if the rest is known."""
        self._due = False
        self._see({**dict.fromkeys(gone), **values})
        if self._values:
            for field in gone:
                self._values.pop(field, None)
            self._values.update(self._store.fields.as_stored(values))

    def _minting(self, encoded: Encoded, age: str, old: str = "") -> Callable[[int | None], str]:
        """Return a function that mints a token, and returns its id. Its argument is a partition; None: any.

        *encoded*: what the call writes, comparable with that of another call. *old*: the id that is rotated.

        A call that repeats one whose outcome is unknown first gets the last token of that call. The scripts recognise
        the id, and do not write twice.
        """
        self._cookie.check()
        work, repeats = (encoded, age, old), True
        if self._next[1] != work:
            self._next = _NONE

        def mint(partition: int | None) -> str:
            nonlocal repeats
            if not self._next[0] or not repeats:
                self._next = self._draw(partition), work
            repeats = False
            return self.sessions.id_of(self._next[0])

        return mint

    def _draw(self, partition: int | None) -> str:
        """Return a new token whose id is in this partition; None: in any."""
        while True:
            token = self._store.create_session_id()
            if partition in (None, self._store.operations.layout.place(self.sessions.id_of(token))[1]):
                return token

    # The other sessions of the same identity.

    async def find_all(self, fields: Iterable[str] | None = None) -> AsyncIterator[S]:
        """Iterate over the sessions of this identity, this one among them, as `SessionStore.find_by` does.

        There are none if nobody is signed in. Raises RuntimeError if the store has no identity.
        """
        field, value = await self._identity()
        if value is None:
            return
        try:
            async for session in self._store.find_by(field, value, fields):
                yield session
        except StoreUnavailable as error:
            self.failure = error
            raise

    async def delete_other(self, session_id: str, *, reason: str = "deleted") -> bool:
        """End another session of the same identity. Returns False if there is none with this id, or it is this one.

        Raises RuntimeError if the store has no identity.
        """
        field, value = await self._identity()
        if value is None or session_id == self.id:
            return False
        expected = cast("S", {field: value})
        return cast("bool", await self._answer(self._store.delete(session_id, expect=expected, reason=reason)))

    async def delete_others(self, *, reason: str = "deleted") -> int:
        """End all other sessions of the same identity, and return how many that were.

        If this session has ended meanwhile, or was rotated, nothing ends: this raises `SessionEnded` or
        `SessionNotFound`.

        Raises RuntimeError if the store has no identity.
        """
        field, value = await self._identity()
        if value is None or self.id is None:
            return 0
        ending = self._store.delete_by(field, value, keep=[self.id], keep_required=True, reason=reason)
        try:
            return cast("int", await self._answer(ending))
        except SessionNotFound as error:
            self._lose(error.reason if isinstance(error, SessionEnded) else None)
            self.failure = error
            raise

    async def delete_all(self, *, reason: str = "deleted", block: Duration | None = None) -> int:
        """End all sessions of the same identity, this one too, remove the cookie, and return how many that were.

        *block*: for so long nobody can sign in as this identity: see `SessionStore.delete_by`.

        Raises RuntimeError if the store has no identity.
        """
        field, value = await self._identity()
        if value is None:
            return 0
        async with self._lock:
            self._values = None  # If this is cancelled, it is not known what is left.
            ending = asyncio.ensure_future(self._store.delete_by(field, value, reason=reason, block=block))
            ended = await self._answer(asyncio.shield(ending))
            await self._forget_unless_rotated()
        return cast("int", ended)

    async def _identity(self) -> tuple[str, Any]:
        field = self._store.fields.identity
        if field is None:
            raise RuntimeError(
                "no reference of the store is the identity: write references={'user_id': Reference(identity=True)}"
            )
        async with self._lock:
            return field, (await self._load()).get(field)

    # CSRF tokens.

    async def create_csrf_token(self) -> str:
        """Return a CSRF token for the forms of this session. Makes a session if there is none.

        Each call returns another token, and all are valid. They are made from what the cookie holds, so nothing is
        written for a token, and Redis does not know it.
        """
        if not await self.get() and not self._raced:
            await self.set(cast("S", {}))
        self._kept = True
        return self.sessions.tokens.create(self._csrf_secret())

    async def verify_csrf_token(self, token: str | None) -> bool:
        """Return whether a token was made for this session, under the id that it has now."""
        return (bool(await self.get()) or self._raced) and self.sessions.tokens.verify(self._csrf_secret(), token)

    @property
    def _raced(self) -> bool:
        """Whether the session was rotated by another request. If its response was lost, the user must sign in again."""
        return self._state is _State.GONE and self.ended == "rotated"

    def _csrf_secret(self) -> bytes:
        return hmac.digest((self._cookie.token or "").encode(), b"csrf", "sha256")

    # For adapters.

    def take_cookies(self) -> list[str]:
        """Return the Set-Cookie headers of the response, once: it begins now."""
        return self._cookie.take()

    def take_headers(self, cache_control: str | None, vary: str | None) -> list[tuple[str, str]]:
        """Return the headers of the session for the response, once.

        *cache_control*, *vary*: the headers of these names that the response has; None if it has none.

        Replace the response's own Cache-Control if one is returned, and add the other headers. A shared cache must not
        store a response that sets the cookie. A response that depends on the session varies by the cookie.
        """
        headers = [("Set-Cookie", cookie) for cookie in self.take_cookies()]
        if headers and not _is_private(cache_control or ""):
            if cache_control:
                self.sessions.warn_once(
                    "A response that sets the session cookie had a Cache-Control without private or no-store. A shared "
                    "cache could give the cookie to others, so the response has no-store instead."
                )
            headers.append(("Cache-Control", "no-store"))
        if self.accessed and not (vary and {"cookie", "*"} & _names(vary)):
            headers.append(("Vary", "Cookie"))
        return headers

    def status_for(self, error: BaseException) -> int | None:
        """Return the status of the response if the application lets this error pass; None if it is not the session's.

        503: Redis does not answer. 409: the request raced a login, and may be sent again. 401: the session has ended.
        403: a limit or a block refuses the session. An error in a group of its own counts too.
        """
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, StoreUnavailable):
            return 503
        if error is not self.failure:
            return None
        if isinstance(error, LimitExceeded):
            return 403
        return 409 if self.ended == "rotated" else 401


def log_refusal(status: int, error: BaseException) -> None:
    """Log an error that an application did not catch. Only 503 is an ERROR: anybody can cause 401 by an old cookie."""
    level = logging.ERROR if status == HTTPStatus.SERVICE_UNAVAILABLE else logging.INFO
    _logger.log(level, "%d: %s", status, error)


def checked(sessions: Sessions[Any], call: str) -> Sessions[Any]:
    """Return *sessions* if that is what they are. Raises TypeError, which shows the *call* that was meant."""
    if not isinstance(sessions, Sessions):
        raise TypeError(f"sessions must be Sessions, not {type(sessions).__name__}: {call}")
    return sessions


def _is_private(cache_control: str) -> bool:
    return bool({"private", "no-store"} & _names(cache_control))


def _names(header: str) -> set[str]:
    """Return the names in a header that is a list, in lower case and without their values."""
    return {item.partition("=")[0].strip().lower() for item in header.split(",")}


def _copied(value: Any) -> Any:
    """Return a value that may be changed without changing this one."""
    return value if type(value) in _SCALARS else copy.deepcopy(value)
