"""Sessions of a web application, without a framework: what a request handler holds, and the cookie behind it."""

import asyncio
import base64
import copy
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Generic, Literal, cast

from rss.cookies import CookiePolicy, Signer
from rss.csrf import CSRFTokens
from rss.durations import Duration, milliseconds
from rss.errors import SessionEnded, SessionNotFound, StoreUnavailable
from rss.fields import field_names, listed
from rss.store import S, SessionStore, max_age_argument

_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{22,342}")  # What `SessionStore.create_session_id` makes.


class Sessions(Generic[S]):
    """The sessions of an application: a store and the policy of the cookie. Adapters make a `Session` a request.

    *secret_keys*: sign the cookie, so that what a client makes up does not get as far as Redis; the first one signs,
    all of them verify. Not needed for security: a token cannot be guessed. Needs itsdangerous.
    *cookie*: its name and attributes.
    *rolling*: reading a session renews it when that time has passed since it was last renewed; None for never, then
    only writes do.
    *hash_ids*: the cookie holds a token, and Redis sees only its SHA-256, which is the id of the session. So nobody who
    reads Redis, its log or a backup can take a session over, and an id may be shown to people. Without it the cookie
    holds the id.
    *on_unavailable*: what reading does when Redis gives no answer: "raise" `StoreUnavailable`, or take the client for
    "anonymous" in this request. A write raises it in any case.
    """

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
        if on_unavailable not in ("raise", "anonymous"):
            raise ValueError("on_unavailable must be 'raise' or 'anonymous'")
        self.store = store
        #: What makes and checks the CSRF tokens.
        self.tokens = CSRFTokens()
        self.cookie = cookie
        self.hash_ids = hash_ids
        self.on_unavailable = on_unavailable
        #: Milliseconds since the last renewal after which reading renews a session; None for never.
        self.idle = None if rolling is None else str(milliseconds(rolling, "rolling"))
        self._signer = None if secret_keys is None else Signer(listed(secret_keys, "secret_keys"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.store!r}, cookie={self.cookie!r})"

    def create_session(self, cookies: str = "") -> "Session[S]":
        """Return the session of a request with this Cookie header; several are joined by a semicolon.

        Nothing is read yet, and nothing is made until it is written to.
        """
        return Session(self, cookies)

    def get_reference_key(self, field: str, value: str | int) -> str:
        """Return the key of a reference set: see `SessionStore.get_reference_key`."""
        return self.store.get_reference_key(field, value)

    def id_of(self, token: str) -> str:
        """Return the id of the session whose cookie holds this token."""
        if not self.hash_ids:
            return token
        return base64.urlsafe_b64encode(hashlib.sha256(token.encode()).digest()).rstrip(b"=").decode()

    def read_token(self, cookies: str) -> str | None:
        """Return the token in a Cookie header; None if there is none that could be one of ours."""
        value = self.cookie.read(cookies)
        if value is not None and self._signer is not None:
            value = self._signer.unsign(value)
        return value if value is not None and _TOKEN.fullmatch(value) else None

    def write_token(self, token: str, ttl: int) -> str:
        """Return the Set-Cookie header for a token, whose session has so many milliseconds to live."""
        return self.cookie.write(self._signer.sign(token) if self._signer else token, ttl)


class Session(Generic[S]):
    """The session of a request, if it has one: read when it is asked for, made when it is first written to.

    It is read once, however often `get` is called, and what is written by it shows. A request without a session, and
    one whose cookie belongs to none, gets one with a new id by the first write: `set`, `rotate` or `create_csrf_token`.
    A session that was there in this request and ended meanwhile is not made again: a write raises `SessionEnded` or
    `SessionNotFound`, and nothing is written.

    The cookie leaves with the headers of the response. After that no new id can be told to the client: a write that
    would make one raises RuntimeError. Writes to a session that the client knows go on.

    What `SessionStore` raises is raised here too: `StoreUnavailable` never means that there is no session.
    """

    def __init__(self, sessions: Sessions[S], cookies: str) -> None:
        #: Whether it was made in this request.
        self.is_new = False
        #: Why the session of this cookie was ended, as far as that is still known and it was looked at.
        self.ended: str | None = None
        #: Whether the response depends on the session.
        self.accessed = False
        #: Whether reading renews it when that is due; if not, `due` tells that it is.
        self.renews = True
        self.due = False
        #: Whether Redis gave no answer for it.
        self.unavailable = False
        #: Whether the response has begun: what leads to a new id is refused from then on.
        self.sent = False
        self._sessions = sessions
        self._store = sessions.store
        self._token = sessions.read_token(cookies)
        self._next: tuple[str, object] | None = None  # A token that is about to be its, and what is written with it.
        self._guessed = False  # It could not be read, and was taken for none.
        self._id = sessions.id_of(self._token) if self._token else ""
        self._alive: bool | None = None if self._token else False  # None: not looked at yet.
        self._told = True  # Whether the client has this token.
        self._cookie_came = sessions.cookie.name in cookies  # Whatever it holds.
        self._values: dict[str, Any] | None = None
        self._cookie: str | None = None
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        state = "new" if self.is_new else {None: "not looked at", True: "alive", False: "none"}[self._alive]
        return f"<{type(self).__name__}: {state}>"

    @property
    def id(self) -> str | None:
        """Its id; None if there is no session, or if it was not looked at yet.

        With `hash_ids` it may be shown, as on a page of one's devices: nobody can take the session over by it.
        """
        return self._id if self._alive and self._values != {} else None

    def get_key(self) -> str:
        """Return the key of its hash in Redis. Raises `SessionNotFound` where `id` is None."""
        if self.id is None:
            raise SessionNotFound("there is no session in this request, or it was not looked at yet")
        return self._store.get_session_key(self.id)

    async def get(self, fields: Iterable[str] | None = None) -> S:
        """Return the session with its `id`, or these fields of it; {} if there is none.

        The first call reads all of it, and renews it if that is due; later ones read nothing. What is returned may be
        changed: only `set` writes.
        """
        names = None if fields is None else {"id", *field_names(fields, "id")}
        async with self._lock:
            values = await self._read()
        return cast("S", {name: _copied(values[name]) for name in values if names is None or name in names})

    async def set(self, values: S, max_age: Duration | None = None) -> S:
        """Write these fields, renew the session, from now on for *max_age* if that is given, and return the values.

        Makes one if there is none. Raises `LimitExceeded` if a reference refuses it.
        """
        async with self._lock:
            ttl = await self._write(lambda: self._set(self._id, values, max_age, "update"))
            if ttl is None:
                await self._create(values, max_age)
            else:
                self._owe(ttl)
                self._note(values)
        return values

    async def unset(self, fields: Iterable[str], max_age: Duration | None = None) -> None:
        """Take out these fields and renew the session, as `set` does. Does nothing if there is none."""
        names, age = field_names(fields), max_age_argument(max_age)

        async def unset() -> int:
            return (await self._store.operations.unset(self._id, names, age)).ttl

        async with self._lock:
            ttl = await self._write(unset)
            if ttl is None:
                return
            self._owe(ttl)
            self._values = {k: v for k, v in self._values.items() if k not in names} if self._values else None

    async def replace(
        self, before: Mapping[str, Any], after: Mapping[str, Any], max_age: Duration | None = None
    ) -> bool:
        """Write the fields that differ between two states of the session, and take out those that are gone.

        For frameworks in which a session is a dict. What others wrote in between stays, also in this request by the
        other methods: only what differs here is written. If nothing does, it is at most renewed, for *max_age*, and
        False is returned.
        """
        encode, held = self._store.fields.encode_value, self._values or before
        gone = [field for field in before if field not in after and held.get(field) == before[field]]
        changed = {
            field: value
            for field, value in after.items()
            if field not in before or encode(field, value) != encode(field, before[field])
        }
        if gone:  # First: if only one of the two succeeds, the session holds rather too little than too much.
            await self.unset(gone, max_age)
        if changed:
            await self.set(cast("S", changed), max_age)
        if max_age is not None and not gone and not changed:
            await self.touch(max_age)
        return bool(gone or changed)

    async def touch(self, max_age: Duration | None = None) -> bool:
        """Renew the session, as `set` does, without writing to it. Returns False if there is none, or none any more."""
        age = max_age_argument(max_age)

        async def touch() -> int:
            if ttl := await self._store.operations.touch(self._id, age):
                return ttl
            raise SessionNotFound("there is no such session")

        async with self._lock:
            try:
                ttl = await self._write(touch)
            except SessionNotFound:
                ttl = None
            if ttl is not None:
                self._owe(ttl)
        return ttl is not None

    async def delete(self, *, reason: str = "deleted") -> bool:
        """End the session and remove the cookie; for five minutes `ended` tells the *reason*. False if there is none.

        Done even if the request is cancelled meanwhile. A later write in this request makes another session.
        """
        async with self._lock:
            self.accessed = True
            deleted = False
            self._values = None  # Should this be cancelled, it is not known what is left.
            if self._alive is not False:
                deleted = await self._answer(asyncio.shield(self._store.delete(self._id, reason=reason)))
            self._token, self._id, self._alive, self._values = None, "", False, None
            self.is_new, self._next = False, None
            self._cookie = self._sessions.cookie.clear() if self._cookie_came and not self.sent else None
        return deleted

    async def rotate(self, values: S | None = None, max_age: Duration | None = None) -> None:
        """Give the session a new id, as is due at a login, and write these values. Its data and age stay.

        Without *max_age* its TTL stays, too; with it, the session is renewed, and keeps that for later. The old id has
        ended, and so have the CSRF tokens. Makes a session if there is none, with these values.
        """
        fields: Any = values or {}
        async with self._lock:
            token = self._mint(fields, max_age)
            new = self._sessions.id_of(token)
            encoded = self._store.fields.encode(fields)
            age = "keep" if max_age is None else max_age_argument(max_age)
            ttl = await self._write(lambda: self._store.operations.rotate(self._id, new, encoded, age))
            if ttl is None:
                await self._create(fields, max_age)
            else:
                self._adopt(token, new, ttl)
                if self._values:
                    self._values["id"] = new
                self._note(fields)

    async def create_csrf_token(self) -> str:
        """Return a token for the forms of this session; makes one if there is none. Another each time, all are valid.

        They are made from what the cookie holds: nothing is written for them, and Redis does not know them.
        """
        if not await self.get():
            await self.set(cast("S", {}))
        return self._sessions.tokens.create(self._csrf_secret())

    async def verify_csrf_token(self, token: str | None) -> bool:
        """Tell whether a token was made for this session, under the id that it has now."""
        return bool(await self.get()) and self._sessions.tokens.verify(self._csrf_secret(), token)

    def take_cookies(self) -> list[str]:
        """Return the Set-Cookie headers that the response has to carry, once: from now on it has begun."""
        cookies, self._cookie = [self._cookie] if self._cookie else [], None
        self.sent = self._told = True
        return cookies

    def take_headers(self, cache_control: str | None, vary: str | None) -> list[tuple[str, str]]:
        """Return all headers that the response has to carry, once; the arguments are those of its own, if it has any.

        What sets the cookie is not to be stored, unless the application says otherwise; what depends on the session
        varies by it.
        """
        headers = [("Set-Cookie", cookie) for cookie in self.take_cookies()]
        if headers and cache_control is None:
            headers.append(("Cache-Control", "no-store"))
        if self.accessed and not {"cookie", "*"} & {name.strip().lower() for name in (vary or "").split(",")}:
            headers.append(("Vary", "Cookie"))
        return headers

    def _csrf_secret(self) -> bytes:
        return hmac.digest((self._token or "").encode(), b"csrf", "sha256")

    async def _answer(self, operation: Awaitable[Any]) -> Any:
        """Wait for Redis, and note if it does not answer."""
        try:
            return await operation
        except StoreUnavailable:
            self.unavailable = True
            raise

    async def _read(self) -> dict[str, Any]:
        self.accessed = True
        if self._alive is False:
            return {}
        if self._values is None:
            idle = self._sessions.idle
            renewal = () if idle is None else ("after" if self.renews else "check", idle)
            try:
                read = await self._answer(self._store.operations.get(self._id, None, renewal))
            except StoreUnavailable:
                if self._sessions.on_unavailable == "raise":
                    raise
                self.unavailable, self._guessed = False, True
                self._values = {}  # For all of this request.
                return self._values
            self._values, self.ended = self._store.fields.decode(read.pairs), read.ended
            # One that was there is not to be made again. One that was not may be.
            self._alive = self._alive or read.ttl > 0
            if read.state == b"renewed":
                self._owe(read.ttl)
            self.due = read.state == b"due"
        return self._values

    async def _write(self, operation: Callable[[], Awaitable[int]]) -> int | None:
        """Run an operation on the session and return its TTL; None if there is none, and was none in this request."""
        self.accessed = True
        if self._alive is False:
            return None
        if self._guessed:  # What is to be written may follow from what could not be read.
            raise StoreUnavailable("the session could not be read in this request")
        try:
            ttl: int = await self._answer(operation())
        except SessionNotFound as error:
            self._values, self._cookie = {}, None
            if isinstance(error, SessionEnded):
                self.ended = error.reason
            if self._alive:
                raise
            self._alive = False  # An id that is not known is not adopted.
            return None
        except (StoreUnavailable, asyncio.CancelledError):
            if self._alive:
                self._values = None  # It is not known what was written.
            raise
        self._alive = True
        return ttl

    async def _create(self, values: Mapping[str, Any], max_age: Duration | None) -> None:
        token = self._mint(values, max_age)
        session_id = self._sessions.id_of(token)
        ttl: int = await self._answer(self._set(session_id, values, max_age, "create"))
        self._alive, self.is_new, self._values = True, True, {"id": session_id}
        self._adopt(token, session_id, ttl)
        self._note(values)

    def _set(
        self, session_id: str, values: Mapping[str, Any], max_age: Duration | None, mode: Literal["update", "create"]
    ) -> Awaitable[int]:
        return self._store.operations.set(
            session_id, self._store.fields.encode(values), max_age_argument(max_age), mode
        )

    def _mint(self, values: Mapping[str, Any], max_age: Duration | None) -> str:
        """Return a new token; the same again for the same work, if it is not known whether that was done.

        The scripts recognise what they have done by the id that goes with it.
        """
        self._may_mint()
        work = dict(values), max_age
        if self._next is None or self._next[1] != work:
            self._next = self._store.create_session_id(), work
        return self._next[0]

    def _may_mint(self) -> None:
        if self.sent:
            raise RuntimeError("the response has begun: it cannot tell the client the id of a new session")

    def _adopt(self, token: str, session_id: str, ttl: int) -> None:
        self._token, self._id, self._told, self._next = token, session_id, False, None
        self._owe(ttl)

    def _owe(self, ttl: int) -> None:
        """Let the cookie live as long as the session."""
        if not self._told:
            self._may_mint()
        elif self.sent or not self._sessions.cookie.persistent:
            return
        self._cookie = self._sessions.write_token(self._token or "", ttl)

    def _note(self, values: Mapping[str, Any]) -> None:
        if self._values:
            self._values.update(self._store.fields.as_stored(values))


def _copied(value: Any) -> Any:
    """Return a value that may be changed without changing this one."""
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


def field_of(item: str) -> str:
    """Return the name of the field for an item of a session that is a dict: those that are the store's get a dot."""
    return f".{item}" if _is_reserved(item) else item


def item_of(field: str) -> str:
    """Return the name of the item that such a field is."""
    return field[1:] if field.startswith(".") and _is_reserved(field) else field


def _is_reserved(name: str) -> bool:
    plain = name.lstrip(".")
    return plain == "id" or plain.startswith("_")
