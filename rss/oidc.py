"""OpenID Connect Back-Channel Logout 1.0: when the provider signs a user out, all sessions of the user end.

https://openid.net/specs/openid-connect-backchannel-1_0.html
"""

import asyncio
import hashlib
import json
import logging
import math
import time
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Collection, Mapping
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from joserfc import jwt
from joserfc.errors import BadSignatureError, InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet

from rss.durations import Duration, milliseconds
from rss.errors import Conflict, StoreUnavailable
from rss.store import SessionStore, max_age_argument

#: Returns the keys of a provider: a JWK Set.
FetchKeys = Callable[[], Awaitable[Mapping[str, Any]]]

_EVENT: Final = "http://schemas.openid.net/event/backchannel-logout"
# Seconds until the keys are fetched again: in general, for a token with an unknown key, and after a failed first fetch.
_KEPT: Final = 3600
_PAUSE: Final = 30
_RETRY: Final = 5
# Characters of a claim. A claim and the issuer make a reference value together, which has at most 512 bytes.
_MOST: Final = 255
_LARGEST: Final = 1_000_000  # Bytes of a document of a provider.
_LONGEST: Final = 100_000  # Bytes of a form with a logout token.
# Seconds by which the clocks of the provider and of this machine may differ.
_LEEWAY: Final = 60
_REMEMBERED: Final = timedelta(days=30)  # The longest time for which a used token is remembered.

_logger = logging.getLogger("rss")


class InvalidLogoutToken(ValueError):
    """Raised for a logout token that breaks a rule. The text names the rule, and quotes nothing of the token."""


class Answer(NamedTuple):
    """The response to a provider."""

    status: int
    headers: dict[str, str]
    body: bytes


class BackChannelLogout:
    """Ends sessions when an OpenID provider says so: `rss.aiohttp`, `rss.quart` and ASGI serve it.

    *store*: a store with the references *sid_field* and *sub_field*. A login writes what `values` returns into them.
    *issuer*: the `iss` of the provider's ID tokens.
    *client_id*: the id that this application has with the provider.
    *keys*: the URL of the provider's JWK Set, or a function that fetches the set. None: the provider's discovery
    document has the URL. Keys are kept for an hour, and fetched again when a token names an unknown key.
    *algorithms*: the accepted signature algorithms. Symmetric ones are refused.
    *block*: how long no session may join a value that was logged out. It covers a login that is under way when the
    token arrives.

    An instance is an ASGI application: `Route("/logout", logout, methods=["POST"])` in Starlette,
    `app.add_route("/logout", logout, ["POST"])` in FastAPI.
    """

    def __init__(
        self,
        store: SessionStore[Any],
        *,
        issuer: str,
        client_id: str,
        keys: str | FetchKeys | None = None,
        sid_field: str = "oidc_sid",
        sub_field: str = "oidc_sub",
        algorithms: Collection[str] = ("RS256",),
        block: Duration = "30s",
    ) -> None:
        if any(name == "none" or name.startswith("HS") for name in algorithms) or isinstance(algorithms, str):
            raise ValueError("algorithms must be a list of asymmetric ones, such as RS256 and ES256")
        if len(issuer.encode()) > _MOST:
            raise ValueError(f"issuer must not be longer than {_MOST} bytes")
        store.fields.number(sid_field)
        store.fields.number(sub_field)
        self.issuer = issuer
        self.client_id = client_id
        self._store = store
        self._fields = {"sid": sid_field, "sub": sub_field}
        self._algorithms = [*algorithms]
        self._block = timedelta(milliseconds=milliseconds(block, "block"))
        remembered = _REMEMBERED if store.max_lifetime is None else min(_REMEMBERED, store.max_lifetime)
        # Seconds. A token that is valid for longer could be replayed after the store has forgotten it.
        self._longest = remembered.total_seconds() - 2 * _LEEWAY
        if self._longest < _LEEWAY:
            raise ValueError("the max_lifetime of the store must be at least three minutes: it remembers used tokens")
        self._keys = _Keys(keys if callable(keys) else lambda: _fetch_keys(issuer, keys))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(issuer={self.issuer!r})"

    def values(self, id_token: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that a login writes into the session, from the claims of the verified ID token.

        Their values contain the issuer, since two issuers may have the same subject.
        """
        return {field: self._value(id_token[claim]) for claim, field in self._fields.items() if claim in id_token}

    async def logout(self, logout_token: str) -> int:
        """End the sessions that a logout token names, by its `sid` or else by its `sub`. Returns how many ended.

        Raises `InvalidLogoutToken`; `StoreUnavailable` if some may not have ended; OSError if the keys of the provider
        cannot be fetched.
        """
        claims = await self._verified(logout_token)
        # The mark is stored as a session. No cookie can name it, since cookie tokens have no dot.
        seen = f"oidc.{hashlib.sha256(self._value(claims['jti']).encode()).hexdigest()}"
        if await self._store.get(seen):
            raise InvalidLogoutToken("it was used before")
        claim = "sid" if "sid" in claims else "sub"
        ended = await self._store.delete_by(
            self._fields[claim], self._value(claims[claim]), reason="oidc-logout", block=self._block
        )
        # Mark the token last: if ending the sessions failed, the provider may send it again.
        valid = max(claims["exp"] - time.time(), 0)
        # The mark has no field, since a codec may refuse a value, or encrypt it: then the store cannot expect it.
        mark, max_age = self._store.fields.encode({}), max_age_argument(valid + 2 * _LEEWAY)
        try:
            await self._store.operations.set(seen, mark, max_age, "set", ("id", "lacks", ""))
        except Conflict:
            raise InvalidLogoutToken("it was used before") from None
        return ended

    async def answer(self, method: str, content_type: str, body: bytes) -> Answer:
        """Return the response to a provider's request, by section 2.8 of the standard."""
        try:
            ended = await self.logout(_token_of(method, content_type, body))
        except InvalidLogoutToken as error:
            _logger.warning("A logout token was refused: %s", error)
            return _failed("invalid_request", str(error))
        except (StoreUnavailable, OSError) as error:
            _logger.error("A back-channel logout failed: %s", type(error).__name__)  # noqa: TRY400 - no trace: no token
            return _failed("temporarily_unavailable", "try again")
        _logger.info("A back-channel logout ended %d sessions", ended)
        return Answer(HTTPStatus.OK, {"Cache-Control": "no-store"}, b"")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request, as an ASGI application."""
        if scope["type"] != "http":
            raise RuntimeError("BackChannelLogout serves http only")
        body, more = b"", True
        while more and len(body) <= _LONGEST:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        content_type = b"".join(value for name, value in scope["headers"] if name.lower() == b"content-type")
        answer = await self.answer(scope["method"], content_type.decode("latin-1"), body)
        headers = [(name.lower().encode(), value.encode()) for name, value in answer.headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    def _value(self, claim: str) -> str:
        return f"{self.issuer} {claim}"

    def _rules(self) -> jwt.JWTClaimsRegistry:
        """Return new rules for one token: in joserfc 1.2, they compare with the time at which they were made."""
        return jwt.JWTClaimsRegistry(
            leeway=_LEEWAY,
            iss={"essential": True, "value": self.issuer},
            aud={"essential": True, "value": self.client_id},
            iat={"essential": True},
            exp={"essential": True},
            jti={"essential": True},
        )

    async def _verified(self, logout_token: str) -> dict[str, Any]:
        """Return the claims of a logout token that keeps all rules of section 2.6 of the standard."""
        try:
            token = await self._decoded(logout_token)
            self._rules().validate(token.claims)
        # JSON that is nested too deeply raises RecursionError, which joserfc does not catch.
        except (JoseError, ValueError, TypeError, RecursionError) as error:
            raise InvalidLogoutToken(_rule_of(error)) from None
        claims = token.claims
        if token.header.get("typ", "JWT").lower().removeprefix("application/") not in ("logout+jwt", "jwt"):
            raise InvalidLogoutToken("its type is another one")
        # A subtraction would overflow for a huge int. NaN, which joserfc 1.2 accepts, fails this check too.
        if not claims["exp"] <= time.time() + self._longest:
            raise InvalidLogoutToken("its exp is too far in the future")
        events = claims.get("events")
        if not isinstance(events, dict) or not isinstance(events.get(_EVENT), dict):
            raise InvalidLogoutToken("it has no logout event")
        if "nonce" in claims:
            raise InvalidLogoutToken("it has a nonce, as an ID token has")
        names = [claims[claim] for claim in ("sid", "sub") if claim in claims]
        if not names:
            raise InvalidLogoutToken("it has neither sid nor sub")
        for name in (*names, claims["jti"]):
            if not isinstance(name, str) or not name.isascii() or not 1 <= len(name) <= _MOST:
                raise InvalidLogoutToken(f"sid, sub and jti must be texts of at most {_MOST} ASCII characters")
        return claims

    async def _decoded(self, logout_token: str) -> jwt.Token:
        try:
            return jwt.decode(logout_token, await self._keys.get(fresh=False), algorithms=self._algorithms)
        except (InvalidKeyIdError, BadSignatureError):  # The provider may have changed its keys.
            return jwt.decode(logout_token, await self._keys.get(fresh=True), algorithms=self._algorithms)


class _Keys:
    """The keys of a provider, fetched when they are needed."""

    def __init__(self, fetch: FetchKeys) -> None:
        self._fetch = fetch
        self._keys: KeySet | None = None
        self._tried = -math.inf  # When, by the monotonic clock.
        self._lock = asyncio.Lock()

    async def get(self, *, fresh: bool) -> KeySet:
        """Return the keys. Raises OSError if none could be fetched.

        *fresh*: fetch them again, unless that was done in the last half minute.
        """
        known = self._keys
        lasts = _RETRY if known is None else _PAUSE if fresh else _KEPT
        if time.monotonic() - self._tried > lasts or (known is None and self._lock.locked()):
            async with self._lock:
                if self._keys is known and time.monotonic() - self._tried > lasts:  # No other call has fetched them.
                    self._tried = time.monotonic()
                    await self._renew()
        if self._keys is None:
            raise OSError("the keys of the provider could not be fetched")
        return self._keys

    async def _renew(self) -> None:
        try:
            self._keys = KeySet.import_key_set(await self._fetch())  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - the provider may send anything; known keys stay in use
            _logger.error("The keys of the provider cannot be fetched: %s", type(error).__name__)  # noqa: TRY400


async def _fetch_keys(issuer: str, url: str | None) -> Mapping[str, Any]:
    if url is None:
        document = await asyncio.to_thread(_get, f"{issuer.rstrip('/')}/.well-known/openid-configuration")
        if document.get("issuer") != issuer:
            raise OSError("the discovery document is of another issuer")
        url = str(document["jwks_uri"])
    return await asyncio.to_thread(_get, url)


def _get(url: str) -> dict[str, Any]:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise OSError("the URL of the provider's keys must be one of https")
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - the scheme was checked
        document = json.loads(response.read(_LARGEST))
    if not isinstance(document, dict):
        raise OSError("the provider sent something else")
    return document


def _token_of(method: str, content_type: str, body: bytes) -> str:
    """Return the logout token in a request. Raises `InvalidLogoutToken`."""
    if method != "POST" or content_type.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise InvalidLogoutToken("it must be sent by POST, in a form")
    if len(body) > _LONGEST:
        raise InvalidLogoutToken("the form is too large")
    tokens = urllib.parse.parse_qs(body.decode("latin-1")).get("logout_token", [])
    if len(tokens) != 1:
        raise InvalidLogoutToken("the form must have one logout_token")
    return tokens[0]


def _rule_of(error: Exception) -> str:
    """Return which rule a token breaks, without anything that stands in it."""
    claim = getattr(error, "claim", None)
    return f"its {claim} is missing or wrong" if claim else f"it is not readable, or not signed: {type(error).__name__}"


def _failed(error: str, description: str) -> Answer:
    body = json.dumps({"error": error, "error_description": description}).encode()
    headers = {"Cache-Control": "no-store", "Content-Type": "application/json"}
    return Answer(HTTPStatus.BAD_REQUEST, headers, body)
