"""OpenID Connect Back-Channel Logout 1.0: the rules of section 2.6 of the standard, keys, replays and endpoints."""

import asyncio
import base64
import hmac
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import aiohttp
import hypothesis.strategies as st
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from fastapi import FastAPI
from hypothesis import HealthCheck, example, given, settings
from joserfc import jws, jwt
from joserfc.jwk import ECKey, KeySet, RSAKey
from quart import Quart
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.routing import Route

import rss.aiohttp
import rss.quart
from rss import Blocked, Codec, SessionStore, StoreUnavailable, TextCodec
from rss.encryption import EncryptingCodec
from rss.oidc import Answer, BackChannelLogout, InvalidLogoutToken
from tests.integrations.serving import serve_aiohttp, serve_hypercorn, serve_uvicorn
from tests.keyspace import Keyspace

EVENT = "http://schemas.openid.net/event/backchannel-logout"
FORM = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
pytestmark = pytest.mark.usefixtures("kept_secret")


class Provider:
    """A provider on the loopback whose keys can change."""

    def __init__(self) -> None:
        self.issuer = ""
        self.keys: list[RSAKey | ECKey] = [RSAKey.generate_key(2048, {"kid": "first"})]
        self.fetched = 0
        self._jti = itertools.count()

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Return the claims of a good logout token, with changes; a change to None removes the claim."""
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "aud": "app",
            "iat": now,
            "exp": now + 120,
            "jti": f"token-{next(self._jti)}",
            "events": {EVENT: {}},
            "sid": "s1",
            "sub": "alice",
            **changes,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, header: dict[str, Any] | None = None, key: RSAKey | ECKey | None = None, **changes: Any) -> str:
        """Return a good logout token, with changes to its header and claims; a change to None removes one."""
        key = key or self.keys[-1]
        changed = {"alg": "RS256", "kid": key.kid, "typ": "logout+jwt", **(header or {})}
        # Not jwt.encode: it cannot write a lone surrogate, and it adds a typ.
        return jws.serialize_compact(
            {name: value for name, value in changed.items() if value is not None},
            json.dumps(self.claims(**changes)),
            key,
        )

    async def key_set(self) -> dict[str, Any]:
        """Return the public keys, as a function that `BackChannelLogout` can call for them."""
        self.fetched += 1
        return KeySet([*self.keys]).as_dict(private=False)  # type: ignore[return-value]

    def app(self) -> web.Application:
        """Return an application that serves discovery and keys."""

        async def discover(_: web.Request) -> web.Response:
            return web.json_response({"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys"})

        async def keys(_: web.Request) -> web.Response:
            return web.json_response(await self.key_set())

        app = web.Application()
        app.add_routes([web.get("/.well-known/openid-configuration", discover), web.get("/keys", keys)])
        return app


@pytest.fixture(name="provider")
async def _provider() -> AsyncIterator[Provider]:
    """A provider that is served."""
    provider = Provider()
    async with serve_aiohttp(provider.app()) as provider.issuer:
        yield provider


@pytest.fixture(name="store")
def _store(client: Redis, keyspace: Keyspace) -> SessionStore:
    """A store with the references that a logout needs."""
    return SessionStore(client, references=["oidc_sid", "oidc_sub", "user_id"], prefix=keyspace.prefix)


@pytest.fixture(name="logout")
def _logout(store: SessionStore, provider: Provider) -> BackChannelLogout:
    """The back-channel logout of an application."""
    return BackChannelLogout(store, issuer=provider.issuer, client_id="app")


async def sign_in(store: SessionStore, logout: BackChannelLogout, sid: str, sub: str = "alice") -> str:
    """Make a session as a login does."""
    return await store.create({"user_id": 1, **logout.values({"sid": sid, "sub": sub, "iss": logout.issuer})})


def move_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Move the monotonic clock of `rss.oidc` ahead of the real one, which the event loop keeps."""
    moved = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + seconds)
    monkeypatch.setattr("rss.oidc.time", moved)


async def send(logout: BackChannelLogout, token: str, method: str = "POST") -> Answer:
    """Return the answer to a request with a logout token, without a server."""
    return await logout.answer(method, FORM["Content-Type"], urlencode({"logout_token": token}).encode())


async def test_a_logout_by_sid_ends_that_session(
    store: SessionStore, logout: BackChannelLogout, provider: Provider
) -> None:
    """A logout token with a sid ends only that session, even if the token also names the user."""
    one, other = await sign_in(store, logout, "s1"), await sign_in(store, logout, "s2")
    assert await logout.logout(provider.token(sid="s1")) == 1
    assert await store.ended(one) == "oidc-logout"
    assert await store.get(other)
    assert await logout.logout(provider.token(sid="unknown")) == 0


async def test_a_logout_by_sub_ends_all_sessions_of_the_user(
    store: SessionStore, logout: BackChannelLogout, provider: Provider
) -> None:
    """A logout token without a sid ends all sessions of the user."""
    sessions = [await sign_in(store, logout, sid) for sid in ("s1", "s2")]
    stranger = await sign_in(store, logout, "s3", "bob")
    assert await logout.logout(provider.token(sid=None)) == 2
    assert [await store.get(session_id) for session_id in sessions] == [{}, {}]
    assert await store.get(stranger)


async def test_a_token_with_a_sid_only(store: SessionStore, logout: BackChannelLogout, provider: Provider) -> None:
    """A logout token needs no sub if it has a sid."""
    one, other = await sign_in(store, logout, "s1"), await sign_in(store, logout, "s2")
    assert await logout.logout(provider.token(sid="s1", sub=None)) == 1
    assert await store.get(one) == {}
    assert await store.get(other)


async def test_two_issuers_with_the_same_subject(
    store: SessionStore, logout: BackChannelLogout, provider: Provider
) -> None:
    """A logout token of one issuer ends no session of another issuer with the same subject."""
    theirs = BackChannelLogout(
        store, issuer="https://other.example", client_id="app", keys="https://other.example/keys"
    )
    other = await sign_in(store, theirs, "s1")
    mine = await sign_in(store, logout, "s1")
    assert await logout.logout(provider.token(sid=None)) == 1
    assert await store.get(other)
    assert await store.get(mine) == {}


async def test_a_token_that_comes_before_the_login_is_done(
    store: SessionStore, logout: BackChannelLogout, provider: Provider
) -> None:
    """After a logout token, no session with its sid can be made for a moment, but other sessions can."""
    assert await logout.logout(provider.token(sid="s1")) == 0
    with pytest.raises(Blocked):
        await sign_in(store, logout, "s1")
    assert await sign_in(store, logout, "s2")


async def test_a_token_with_a_sub_that_comes_before_the_login_is_done(
    store: SessionStore, logout: BackChannelLogout, provider: Provider
) -> None:
    """After a logout token with a sub only, no session of the user can be made for a moment."""
    assert await logout.logout(provider.token(sid=None, sub="alice")) == 0
    with pytest.raises(Blocked):
        await sign_in(store, logout, "s1", "alice")
    assert await sign_in(store, logout, "s2", "bob")


async def test_a_token_is_used_once(store: SessionStore, logout: BackChannelLogout, provider: Provider) -> None:
    """A logout token is accepted once, even by several objects on one store."""
    token = provider.token(jti="once", sid="s1")
    await logout.logout(token)
    another = BackChannelLogout(store, issuer=provider.issuer, client_id="app")
    for one in (logout, another):
        with pytest.raises(InvalidLogoutToken, match="used before"):
            await one.logout(token)
    await another.logout(provider.token(jti="twice", sid="s1"))


@pytest.mark.parametrize("codec", [TextCodec(), EncryptingCodec([bytes(32)])], ids=["text", "encrypting"])
async def test_the_codec_does_not_matter(client: Redis, keyspace: Keyspace, provider: Provider, codec: Codec) -> None:
    """A token is accepted once, also if the codec stores only text, or encrypts."""
    store = SessionStore(client, references=["oidc_sid", "oidc_sub"], prefix=keyspace.prefix, codec=codec)
    logout = BackChannelLogout(store, issuer=provider.issuer, client_id="app")
    session_id = await store.create(logout.values({"sid": "s1", "sub": "alice"}))
    token = provider.token(sid="s1")
    assert await logout.logout(token) == 1
    with pytest.raises(InvalidLogoutToken, match="used before"):
        await logout.logout(token)
    token = provider.token(jti="parallel")
    results = await asyncio.gather(*(logout.logout(token) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results if result] == [InvalidLogoutToken] * 2, results
    assert await store.ended(session_id) == "oidc-logout"


async def test_a_replay_after_a_new_login(store: SessionStore, logout: BackChannelLogout, provider: Provider) -> None:
    """A replayed token neither ends the session of a later login with the same sid, nor blocks its values."""
    token = provider.token(sid="s1")
    await logout.logout(token)
    values = logout.values({"sid": "s1", "sub": "alice"})
    for field, value in values.items():
        await store.unblock(field, value)
    session_id = await sign_in(store, logout, "s1")
    with pytest.raises(InvalidLogoutToken, match="used before"):
        await logout.logout(token)
    assert await store.get(session_id)
    assert [await store.blocked(field, value) for field, value in values.items()] == [None, None]


async def test_one_jti_of_two_issuers(store: SessionStore, logout: BackChannelLogout, provider: Provider) -> None:
    """Two issuers may use the same jti, since each issuer makes its own."""
    other = "https://other.example"
    theirs = BackChannelLogout(store, issuer=other, client_id="app", keys=provider.key_set)
    one, two = await sign_in(store, logout, "s1"), await sign_in(store, theirs, "s1")
    assert await logout.logout(provider.token(jti="same")) == 1
    assert await theirs.logout(provider.token(jti="same", iss=other)) == 1
    assert [await store.get(session_id) for session_id in (one, two)] == [{}, {}]


async def test_a_token_that_failed_may_be_sent_again(
    store: SessionStore, logout: BackChannelLogout, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token whose logout failed may be sent again, since it counts as used only after the sessions ended."""
    session_id, token = await sign_in(store, logout, "s1"), provider.token()

    async def fail(*_: object, **__: object) -> int:
        raise StoreUnavailable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(store, "delete_by", fail)
        with pytest.raises(StoreUnavailable):
            await logout.logout(token)
    assert await logout.logout(token) == 1
    assert await store.get(session_id) == {}


async def test_the_provider_changes_its_keys(
    logout: BackChannelLogout, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys are fetched again for a token with a new key, but not for every unknown key."""
    for _ in range(3):
        await logout.logout(provider.token())
    assert provider.fetched == 1
    provider.keys = [RSAKey.generate_key(2048, {"kid": "second"})]
    stranger = RSAKey.generate_key(2048, {"kid": "stranger"})
    move_clock(monkeypatch, 31)
    await logout.logout(provider.token())
    assert provider.fetched == 2
    for _ in range(3):
        with pytest.raises(InvalidLogoutToken):
            await logout.logout(provider.token(key=stranger))
    assert provider.fetched == 2
    move_clock(monkeypatch, 31 + 3601)
    await asyncio.gather(*(logout.logout(provider.token()) for _ in range(3)))
    assert provider.fetched == 3


@pytest.mark.parametrize("kid", ["first", "second"])
async def test_a_replaced_key(
    logout: BackChannelLogout, provider: Provider, monkeypatch: pytest.MonkeyPatch, kid: str
) -> None:
    """A key that replaces another is fetched, even under the same kid. Tokens of the old key are refused from then."""
    old = provider.keys[0]
    await logout.logout(provider.token())
    provider.keys = [RSAKey.generate_key(2048, {"kid": kid})]
    move_clock(monkeypatch, 31)
    await logout.logout(provider.token())
    assert provider.fetched == 2
    with pytest.raises(InvalidLogoutToken, match="not signed"):
        await logout.logout(provider.token(key=old))
    await logout.logout(provider.token())


async def test_another_algorithm(store: SessionStore, logout: BackChannelLogout, provider: Provider) -> None:
    """An algorithm is accepted only if it is one of *algorithms*. The default is RS256."""
    provider.keys.append(ECKey.generate_key("P-256", {"kid": "curve"}))
    elliptic = BackChannelLogout(store, issuer=provider.issuer, client_id="app", algorithms=["ES256"])
    token = provider.token(header={"alg": "ES256"})
    with pytest.raises(InvalidLogoutToken, match="not signed"):
        await logout.logout(token)
    await elliptic.logout(token)
    with pytest.raises(InvalidLogoutToken, match="not signed"):
        await elliptic.logout(provider.token(key=provider.keys[0]))


def broken() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each rule, and changes to a token that break the rule."""
    now = int(time.time())
    yield "iss: another", {"iss": "https://other.example"}
    yield "iss: missing", {"iss": None}
    yield "aud: another", {"aud": "other"}
    yield "aud: others", {"aud": ["other", "another"]}
    yield "aud: missing", {"aud": None}
    yield "iat: in the future", {"iat": now + 600}
    yield "iat: missing", {"iat": None}
    yield "iat: no number", {"iat": "now"}
    yield "iat: a huge number", {"iat": 10**400}
    yield "iat: infinite", {"iat": float("inf")}
    yield "exp: past", {"exp": now - 600}
    yield "exp: missing", {"exp": None}
    yield "exp: no number", {"exp": "later"}
    yield "exp: true", {"exp": True}
    yield "exp: a huge number", {"exp": 10**400}
    yield "exp: a huge negative number", {"exp": -(10**400)}
    yield "exp: infinite", {"exp": float("inf")}
    yield "exp: NaN", {"exp": float("nan")}
    yield "exp: too late to be remembered until then", {"exp": now + 31 * 86_400}
    yield "jti: missing", {"jti": None}
    yield "jti: no text", {"jti": 1}
    yield "jti: too long", {"jti": "x" * 256}
    yield "jti: a lone surrogate", {"jti": "\ud800"}
    yield "events: missing", {"events": None}
    yield "events: another", {"events": {"http://schemas.openid.net/event/other": {}}}
    yield "events: no object", {"events": [EVENT]}
    yield "events: the event is no object", {"events": {EVENT: True}}
    yield "nonce", {"nonce": "n"}
    yield "sid and sub: missing", {"sid": None, "sub": None}
    yield "sid: no text", {"sid": 7}
    yield "sid: empty", {"sid": ""}
    yield "sid: not ASCII", {"sid": "é"}
    yield "sid: a lone surrogate", {"sid": "\ud800"}
    yield "sub: a list", {"sub": ["alice"]}
    yield "sub: a lone surrogate", {"sub": "\ud800"}
    yield "typ: an access token's", {"header": {"typ": "at+jwt"}}


RULES = dict(broken())


@pytest.mark.parametrize("changes", RULES.values(), ids=RULES)
async def test_each_rule(
    store: SessionStore, logout: BackChannelLogout, provider: Provider, changes: dict[str, Any]
) -> None:
    """A token that breaks a rule ends no session, and the error shows no part of the token."""
    session_id = await sign_in(store, logout, "s1")
    with pytest.raises(InvalidLogoutToken) as raised:
        await logout.logout(provider.token(**changes))
    assert await store.get(session_id)
    for secret in ("alice", "s1", "token-", provider.issuer, "example"):
        assert secret not in str(raised.value)
    assert await logout.logout(provider.token()) == 1


def accepted() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what the rules allow, and changes to a token that make use of it."""
    yield "aud: one of several", {"aud": ["other", "app"]}
    yield "jti and sub: the longest", {"jti": "x" * 255, "sub": "x" * 255}
    yield "typ: absent", {"header": {"typ": None}}
    yield "typ: general", {"header": {"typ": "JWT"}}
    yield "typ: a full media type", {"header": {"typ": "application/logout+jwt"}}


ALLOWED = dict(accepted())


@pytest.mark.parametrize("changes", ALLOWED.values(), ids=ALLOWED)
async def test_what_the_rules_allow(
    store: SessionStore, logout: BackChannelLogout, provider: Provider, changes: dict[str, Any]
) -> None:
    """A token that keeps the rules ends the session."""
    session_id = await sign_in(store, logout, "s1")
    assert await logout.logout(provider.token(**changes)) == 1
    assert await store.get(session_id) == {}


async def test_clocks_that_differ(logout: BackChannelLogout, provider: Provider) -> None:
    """The clock of the provider may be half a minute slow or fast, and may count fractions of seconds."""
    now = time.time()
    await logout.logout(provider.token(iat=now - 90, exp=now - 30))
    await logout.logout(provider.token(iat=now + 30, exp=now + 90))


async def test_the_rules_follow_the_clock(
    store: SessionStore, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is compared with the present time, even if the object was made an hour ago."""
    hour_ago = time.time() - 3600
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: hour_ago)
        logout = BackChannelLogout(store, issuer=provider.issuer, client_id="app")
    assert await logout.logout(provider.token()) == 0
    with pytest.raises(InvalidLogoutToken):
        await logout.logout(provider.token(exp=int(time.time()) - 600))


# JSON as Python reads it: with lone surrogates, NaN, infinities and integers that no float can hold.
TEXT = st.text("a\ud800") | st.text(st.characters(), max_size=300)
NUMBER = st.sampled_from([10**400, -(10**400), float("nan"), float("inf")]) | st.integers() | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.just(EVENT), inner, max_size=3),
    max_leaves=5,
)
# The claims and header parameters that get these values.
CLAIMS = ["iss", "aud", "iat", "exp", "jti", "events", "sid", "sub", "nonce", "nbf"]
HEADER = ["alg", "kid", "typ", "crit", "b64", "jwk", "x5c"]


@example("\ud800")
@example(10**400)
@given(NUMBER | TEXT | JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # One provider for all examples.
async def test_any_value(logout: BackChannelLogout, provider: Provider, value: Any) -> None:
    """A signed token is answered with 200 or 400, and raises nothing, whatever value a claim or the header has."""
    header = {"alg": "RS256", "kid": "first"}
    tokens = [(header, {name: value}) for name in CLAIMS] + [({**header, name: value}, {}) for name in HEADER]
    for changed, claims in tokens:
        payload = json.dumps({**provider.claims(), **claims}).encode()
        answer = await send(logout, _signed_by_hand(changed, _base64(payload), _by(provider.keys[0])))
        assert answer.status in (200, 400)
        assert b"temporarily" not in answer.body


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _signed_by_hand(header: dict[str, Any], payload: str, sign: Callable[[bytes], bytes]) -> str:
    signed = f"{_base64(json.dumps(header).encode())}.{payload}"
    return f"{signed}.{_base64(sign(signed.encode()))}"


def _by_a_public_text(key: RSAKey | ECKey) -> Callable[[bytes], bytes]:
    return lambda data: hmac.digest(key.as_pem(private=False), data, "sha256")


def _by(key: RSAKey | ECKey) -> Callable[[bytes], bytes]:
    private: Any = key.private_key
    return lambda data: private.sign(data, PKCS1v15(), SHA256())


async def test_signatures(store: SessionStore, logout: BackChannelLogout, provider: Provider) -> None:
    """A token with a wrong, missing or weak signature is refused, and so is a text that is no token."""
    session_id = await sign_in(store, logout, "s1")
    good = provider.token()
    head, payload, signature = good.split(".")
    key = provider.keys[0]
    forged = [
        provider.token(key=RSAKey.generate_key(2048, {"kid": "first"})),
        f"{head}.{payload}.",
        f"{head}.{payload}.{signature[:-8]}AAAAAAAA",
        f"eyJhbGciOiJub25lIn0.{payload}.",
        _signed_by_hand({"alg": "HS256", "kid": key.kid}, payload, _by_a_public_text(key)),
        _signed_by_hand({"alg": "RS256", "kid": key.kid, "crit": ["x"], "x": 1}, payload, _by(key)),
        jwt.encode({"alg": "RS512", "kid": key.kid}, provider.claims(), key, algorithms=["RS512"]),
        "",
        "x",
        "a.b.c",
        "a.b.c.d.e",
        good + "\n.",
        _signed_by_hand({"alg": "RS256", "kid": key.kid}, _base64(b"[" * 30_000), _by(key)),
        f"{_base64(b'[' * 30_000)}.{payload}.{signature}",
        "\ud800.é.x",
    ]
    for token in forged:
        with pytest.raises(InvalidLogoutToken):
            await logout.logout(token)
    assert await store.get(session_id)
    assert await logout.logout(good) == 1


async def test_bad_arguments(client: Redis, store: SessionStore) -> None:
    """Bad arguments of `BackChannelLogout` are refused when the object is made."""
    good: dict[str, Any] = {"issuer": "https://a.example", "client_id": "app"}
    for bad, why in (
        ({"algorithms": ["HS256"]}, "asymmetric"),
        ({"algorithms": ["none"]}, "asymmetric"),
        ({"algorithms": "RS256"}, "asymmetric"),
        ({"sid_field": "unknown"}, "'unknown' is not one of the references"),
        ({"sub_field": "unknown"}, "'unknown' is not one of the references"),
        ({"block": "soon"}, "block must be"),
        ({"issuer": "https://" + "x" * 250}, "issuer must not be longer"),
    ):
        with pytest.raises(ValueError, match=why):
            BackChannelLogout(store, **{**good, **bad})
    short = SessionStore(client, references=["oidc_sid", "oidc_sub"], max_lifetime="2m")
    with pytest.raises(ValueError, match="max_lifetime of the store must be at least three minutes"):
        BackChannelLogout(short, **good)
    assert repr(BackChannelLogout(store, **good)) == "BackChannelLogout(issuer='https://a.example')"


async def test_a_token_that_outlives_the_sessions(client: Redis, keyspace: Keyspace, provider: Provider) -> None:
    """A token that expires later than the note of its use is refused, since it could be replayed."""
    references = ["oidc_sid", "oidc_sub", "user_id"]
    store = SessionStore(client, references=references, prefix=keyspace.prefix, max_lifetime="1h")
    logout = BackChannelLogout(store, issuer=provider.issuer, client_id="app")
    session_id = await sign_in(store, logout, "s1")
    with pytest.raises(InvalidLogoutToken, match="its exp is too far in the future"):
        await logout.logout(provider.token(exp=int(time.time()) + 3590))
    assert await store.get(session_id)
    assert await logout.logout(provider.token(exp=int(time.time()) + 3400)) == 1
    (mark,) = [key async for key in client.scan_iter(match=f"{keyspace.prefix}:{{oidc.*")]
    assert await client.pttl(mark) > 3_400_000 + 60_000


@pytest.mark.parametrize("keys", ["ftp://a.example/keys", "http://127.0.0.1:9/keys", None])
async def test_keys_that_cannot_be_fetched(store: SessionStore, provider: Provider, keys: str | None) -> None:
    """A logout is answered as temporarily unavailable if the keys cannot be fetched."""
    logout = BackChannelLogout(store, issuer="http://127.0.0.1:9", client_id="app", keys=keys)
    answer = await send(logout, provider.token())
    assert answer.status == 400
    assert b"temporarily_unavailable" in answer.body


async def test_discovery_of_another_issuer(store: SessionStore, provider: Provider) -> None:
    """A discovery document that names another issuer is refused."""
    logout = BackChannelLogout(store, issuer=f"{provider.issuer}/", client_id="app")
    with pytest.raises(OSError, match="could not be fetched"):
        await logout.logout(provider.token())
    without = BackChannelLogout(store, issuer=provider.issuer, client_id="app", keys=provider.key_set)
    assert await without.logout(provider.token()) == 0


async def _aiohttp(logout: BackChannelLogout) -> Any:
    app = web.Application()
    app.add_routes([web.post("/logout", rss.aiohttp.logout_handler(logout))])
    return serve_aiohttp(app)


async def _starlette(logout: BackChannelLogout) -> Any:
    return serve_uvicorn(Starlette(routes=[Route("/logout", logout, methods=["POST"])]))


async def _fastapi(logout: BackChannelLogout) -> Any:
    app = FastAPI()
    app.add_route("/logout", logout, ["POST"])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    return serve_uvicorn(app)


async def _quart(logout: BackChannelLogout) -> Any:
    app = Quart(__name__)
    app.post("/logout")(rss.quart.logout_view(logout))
    return serve_hypercorn(app)


@pytest.mark.parametrize("serve", [_aiohttp, _starlette, _fastapi, _quart])
async def test_the_endpoint(store: SessionStore, logout: BackChannelLogout, provider: Provider, serve: Any) -> None:
    """The endpoint answers 200 to a good token and 400 with the reason otherwise, always with `no-store`."""
    session_id = await sign_in(store, logout, "s1")
    async with await serve(logout) as url, aiohttp.ClientSession(url) as client:

        async def post(status: int, data: Any, **more: Any) -> str:
            async with client.post("/logout", data=data, allow_redirects=False, **more) as response:
                assert response.status == status
                assert response.headers["Cache-Control"] == "no-store"
                return await response.text()

        assert "neither sid nor sub" in await post(400, {"logout_token": provider.token(sid=None, sub=None)})
        assert "one logout_token" in await post(400, {"token": "x"})
        assert "one logout_token" in await post(400, "logout_token=a&logout_token=b", headers=FORM)
        assert "too large" in await post(400, {"logout_token": "x" * 200_000})
        assert "in a form" in await post(400, b"{}", headers={"Content-Type": "application/json"})
        assert await store.get(session_id)
        assert await post(200, {"logout_token": provider.token()}) == ""
        assert await store.get(session_id) == {}


async def test_another_method(store: SessionStore, logout: BackChannelLogout, provider: Provider) -> None:
    """A token that is sent by GET is refused, and may still be sent by POST."""
    session_id, token = await sign_in(store, logout, "s1"), provider.token()
    answer = await send(logout, token, method="GET")
    assert answer.status == 400
    assert b"by POST" in answer.body
    assert await store.get(session_id)
    assert (await send(logout, token)).status == 200


async def test_it_serves_http_only(logout: BackChannelLogout) -> None:
    """The endpoint raises RuntimeError for a WebSocket."""
    with pytest.raises(RuntimeError, match="http only"):
        await logout({"type": "websocket"}, None, None)


@pytest.mark.parametrize("document", ["<html>", "[]", "{}", '{"keys": [{"kty": "?"}]}', '{"keys": 1}'])
async def test_a_provider_that_sends_nonsense(store: SessionStore, provider: Provider, document: str) -> None:
    """Keys that are nonsense are answered as temporarily unavailable, and are not fetched for each token."""
    asked = 0

    async def keys(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(text=document)

    app = web.Application()
    app.add_routes([web.get("/keys", keys)])
    async with serve_aiohttp(app) as url:
        logout = BackChannelLogout(store, issuer=provider.issuer, client_id="app", keys=f"{url}/keys")
        for _ in range(3):
            answer = await send(logout, provider.token())
            assert b"temporarily_unavailable" in answer.body
    assert asked == 1


async def test_keys_that_are_known_stay(
    store: SessionStore, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known keys are used if they cannot be fetched again."""
    calls = 0

    async def keys() -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError
        return await provider.key_set()

    logout = BackChannelLogout(store, issuer=provider.issuer, client_id="app", keys=keys)
    await logout.logout(provider.token())
    move_clock(monkeypatch, 3601)
    assert await logout.logout(provider.token()) == 0
    assert calls == 2


async def test_one_token_at_the_same_time(store: SessionStore, logout: BackChannelLogout, provider: Provider) -> None:
    """One token that arrives three times at once is accepted once, and the session ends."""
    session_id, token = await sign_in(store, logout, "s1"), provider.token()
    results = await asyncio.gather(*(logout.logout(token) for _ in range(3)), return_exceptions=True)
    assert len([one for one in results if isinstance(one, InvalidLogoutToken)]) == 2, results
    assert await store.get(session_id) == {}
