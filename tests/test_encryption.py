"""Encrypted fields: what Redis holds, who can read it, and which operations work on it."""

import asyncio
import base64
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any, Literal, cast

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from rss import (
    Codec,
    Conflict,
    JSONCodec,
    Reference,
    Session,
    SessionEnded,
    SessionError,
    Sessions,
    SessionStore,
    StoreUnavailable,
    TextCodec,
)
from rss.dict_session import DictSession
from rss.encryption import EncryptingCodec
from tests.keyspace import Keyspace
from tests.test_codec import JSON
from tests.test_session import id_of, request, signed_in, token_in

KEY, OLD = bytes(range(32)), bytes(range(100, 132))
TEXT = base64.urlsafe_b64encode(bytes(range(200, 232))).decode().rstrip("=")
CODEC = EncryptingCodec([KEY])
UNREADABLE = "^the field 'x' holds data that is not readable$"

pytestmark = pytest.mark.usefixtures("kept_secret")


def new_store(client: Redis, keyspace: Keyspace, codec: Codec = CODEC, **options: Any) -> SessionStore:
    """Return a store that encrypts, with one reference."""
    return SessionStore(client, **{"references": ["user_id"], "prefix": keyspace.prefix, "codec": codec, **options})


@pytest.fixture(name="store")
def _store(client: Redis, keyspace: Keyspace) -> SessionStore:
    """A store that encrypts, with one reference."""
    return new_store(client, keyspace)


@pytest.fixture(name="sessions")
def _sessions(client: Redis, keyspace: Keyspace) -> Sessions:
    """The sessions of an application that encrypts, with an identity."""
    return Sessions(new_store(client, keyspace, references={"user_id": Reference(identity=True)}))


async def held(client: Redis, store: SessionStore, session_id: str) -> dict[bytes, bytes]:
    """Return the data of a session in Redis."""
    return cast("dict[bytes, bytes]", await client.hgetall(store.get_session_key(session_id)))


def encrypted(codec: Codec, field: str, value: object) -> bytes:
    """Return the data of a value, which must be bytes."""
    data = codec.encode(field, value)
    assert isinstance(data, bytes)
    return data


# ---------------------------------------------------------------- the data


@given(field=st.text(), value=JSON)
def test_every_value_comes_back(field: str, value: object) -> None:
    """Every JSON value is decoded to the same value of the same type."""
    assert json.dumps(CODEC.decode(field, encrypted(CODEC, field, value))) == json.dumps(value)


@given(value=st.text() | st.integers())
def test_the_codec_inside_encodes(value: str | int) -> None:
    """The values are those of the codec inside."""
    codec = EncryptingCodec([KEY], TextCodec())
    assert codec.decode("x", encrypted(codec, "x", value)) == str(value)


def test_the_data_has_the_documented_format() -> None:
    """Other programs can decrypt the data, by what the docstring says."""
    data = encrypted(CODEC, "näme", "secret")
    label = b"redis-session-sets EncryptingCodec 1"
    derived = HKDF(SHA256(), 36, salt=None, info=label).derive(KEY)
    assert data[:1] == b"\xc1"
    assert data[1:5] == derived[32:]
    assert AESGCM(derived[:32]).decrypt(data[5:17], data[17:], "näme".encode()) == b"secret"
    assert len(data) == 33 + len("secret")
    with pytest.raises(InvalidTag):  # Other uses of the key cannot read it.
        AESGCM(KEY).decrypt(data[5:17], data[17:], "näme".encode())


def test_stored_data_stays_readable() -> None:
    """Data from the first version of this library can be read."""
    data = base64.b64decode("wToDEHnWMcp51VyEUCoIFMJCxcqvL9nRrSws4r2X8bJpVQiyNwLFe1nnt2LIf0k=")
    assert CODEC.decode("x", data) == {"a": [1, "ü"]}


def test_equal_values_look_different() -> None:
    """Each encryption has another nonce, so equal values do not look equal."""
    data = [encrypted(CODEC, "x", 1) for _ in range(1000)]
    assert len({one[5:17] for one in data}) == len({one[17:] for one in data}) == 1000


@pytest.mark.parametrize("plaintext", [None, "read", "write"])
def test_changed_data_is_refused(plaintext: Literal["read", "write"] | None) -> None:
    """Data with a changed bit, or of another length, is refused."""
    data = encrypted(CODEC, "x", "value")
    codec = EncryptingCodec([KEY], plaintext=plaintext)
    assert codec.decode("x", data) == "value"
    changed = [data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for at in range(len(data)) for bit in range(8)]
    shorter = [data[:length] for length in range(1, len(data))]
    for bad in (*changed, *shorter, data + b"\0", data[:17] + b"\0" + data[17:]):
        if plaintext and bad[:1] < b"\x80":
            continue  # It passes for text, which these two accept.
        with pytest.raises(ValueError, match="^(none of the keys|the data was changed|the codec inside)"):
            codec.decode("x", bad)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"plain", b'"plain"', b"1", bytes(range(190, 250))])
def test_data_without_encryption_is_refused(data: bytes) -> None:
    """Data that is not encrypted is refused."""
    with pytest.raises(ValueError, match="^none of the keys has encrypted the data$"):
        CODEC.decode("x", data)


def test_an_error_holds_no_value() -> None:
    """An error of `decode` holds no value, not even in its context."""
    inner = EncryptingCodec([KEY], TextCodec())
    data = inner._header + bytes(12) + inner._newest.encrypt(bytes(12), b"SECRET\xff", b"x")
    with pytest.raises(ValueError, match="^the codec inside cannot read the data$") as raised:
        inner.decode("x", data)
    assert raised.value.__context__ is None
    with pytest.raises(ValueError, match="^the data was changed, or is that of another field$") as moved:
        inner.decode("y", data)
    assert isinstance(moved.value.__context__, InvalidTag)
    assert moved.value.__context__.args == ()


# ---------------------------------------------------------------- keys


def test_a_key_may_be_text() -> None:
    """A key is 32 bytes, or base64url with or without padding."""
    data = encrypted(CODEC, "x", 1)
    text = base64.urlsafe_b64encode(KEY).decode()
    for key in (KEY, text, text.rstrip("=")):
        assert EncryptingCodec([key]).decode("x", data) == 1
        assert EncryptingCodec(iter([OLD, key])).decode("x", data) == 1
    key = EncryptingCodec.generate_key()
    assert key != EncryptingCodec.generate_key()
    assert len(base64.urlsafe_b64decode(key + "=")) == 32
    assert EncryptingCodec([key]).decode("x", encrypted(EncryptingCodec([key]), "x", 1)) == 1


@pytest.mark.parametrize(
    ("keys", "kind", "text"),
    [
        ([], ValueError, "^keys must not be empty$"),
        (TEXT, TypeError, "^keys must be several str, in a list for one$"),
        (KEY, TypeError, "^keys must be several str, in a list for one$"),
        (None, TypeError, "^keys must be several str, in a list for one$"),
        ([KEY[:-1]], ValueError, r"^a key must be 32 bytes, or a text of generate_key\(\)$"),
        ([KEY, KEY + b"x"], ValueError, "^a key must be 32 bytes"),
        ([TEXT[:-1]], ValueError, "^a key must be 32 bytes"),
        ([TEXT + "x"], ValueError, "^a key must be 32 bytes"),
        ([TEXT + "\n"], ValueError, "^a key must be 32 bytes"),
        ([TEXT[:-1] + "+"], ValueError, "^a key must be 32 bytes"),
        ([TEXT.encode()], ValueError, "^a key must be 32 bytes"),
        (["k" * 32], ValueError, "^a key must be 32 bytes"),
        ([7], TypeError, "^a key must be bytes or a str, not int$"),
        ([None], TypeError, "^a key must be bytes or a str, not NoneType$"),
        ([TEXT, KEY, TEXT + "="], ValueError, "^keys must differ$"),
    ],
)
def test_bad_keys_are_refused(keys: Any, kind: type[Exception], text: str) -> None:
    """Bad keys raise an error that shows no key."""
    with pytest.raises(kind, match=text) as raised:
        EncryptingCodec(keys)
    assert raised.value.__context__ is None


def test_a_bad_option_is_refused() -> None:
    """A bad value of *plaintext* raises ValueError."""
    with pytest.raises(ValueError, match="^plaintext must be 'read', 'write' or None$"):
        EncryptingCodec([KEY], plaintext="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_no_key_is_shown() -> None:
    """Neither `repr` nor the attributes of the codec show a key."""
    codec = EncryptingCodec([KEY, TEXT])
    shown = repr(codec) + repr(vars(codec))
    for key in (KEY, base64.urlsafe_b64decode(TEXT + "=")):
        derived = HKDF(SHA256(), 32, salt=None, info=b"redis-session-sets EncryptingCodec 1").derive(key)
        for secret in (key, derived):
            assert repr(secret)[2:-1] not in shown
            assert secret.hex() not in shown
            assert base64.urlsafe_b64encode(secret).decode()[:-1] not in shown


async def test_a_new_key_reads_old_values(client: Redis, keyspace: Keyspace) -> None:
    """The first key encrypts, and all of them decrypt. Without its key, a value is not readable."""
    before, between, after = (new_store(client, keyspace, EncryptingCodec(keys)) for keys in ([OLD], [KEY, OLD], [KEY]))
    await before.set("a", {"user_id": 1, "x": "old", "y": "old"})
    assert await between.get("a") == {"id": "a", "user_id": 1, "x": "old", "y": "old"}
    with pytest.raises(SessionError, match=UNREADABLE):
        await after.get("a", ["x"])
    await between.set("a", {"x": "new"})
    assert await after.get("a", ["x"]) == {"id": "a", "x": "new"}
    with pytest.raises(SessionError, match="^the field 'y' holds data that is not readable$"):
        await after.get("a")
    with pytest.raises(SessionError, match=UNREADABLE):
        await before.get("a")
    assert await after.delete_by("user_id", 1) == 1
    with pytest.raises(SessionEnded):
        await before.set("a", {"x": 1})


# ---------------------------------------------------------------- what Redis holds


async def everything(client: Any, prefix: str) -> bytes:
    """Return all bytes of all keys, with their names."""
    found = []
    async for key in client.scan_iter(match=f"{prefix}:*"):
        if await client.type(key) == b"hash":
            found += [part for pair in (await client.hgetall(key)).items() for part in pair]
        else:
            found += await client.smembers(key)
        found.append(key)
    return b"\n".join(found)


async def test_redis_holds_nothing_readable(client: Redis, keyspace: Keyspace) -> None:
    """Redis holds no value in the clear, except those of references, and the fields of the library."""
    store = new_store(client, keyspace, references=["user_id", "tags"])
    values = {
        "text": "SECRET-1", "list": ["SECRET-2"], "map": {"SECRET-3": 1}, "number": 987654321, "float": 1.23456789,
        "none": None, "true": True, "empty": "",
    }  # fmt: skip
    await store.set("a", {"user_id": "USER", "tags": ["TAG"], **values})
    session_id = await store.rotate("a", {"late": "SECRET-4"}, "1h", grace="1m")
    await store.set(session_id, {"text": "SECRET-5"})
    data = await everything(client, keyspace.prefix)
    for plain in (b"SECRET", b"987654321", b"1.2345", b"null"):
        assert plain not in data
    assert b"true" not in data.replace(b"\ntrue\n", b"")  # This is the name of the field.
    for readable in (b"USER", b"TAG", session_id.encode(), b"_created", b"_max_age", b"text"):
        assert readable in data
    fields = await held(client, store, session_id)
    clear = {name for name, one in fields.items() if not one.startswith(b"\xc1")}
    assert clear == {b"id", b"_created", b"_max_age", b"user_id", b"tags"}
    assert fields[b"user_id"] == b"USER"
    assert fields[b"tags"] == b'["TAG"]'
    assert await store.get(session_id) == {
        "id": session_id, "user_id": "USER", "tags": ["TAG"], **values, "text": "SECRET-5", "late": "SECRET-4"
    }  # fmt: skip


async def test_a_value_belongs_to_its_field(client: Redis, store: SessionStore) -> None:
    """A value that was moved to another field is refused. In another session it is readable: ids change."""
    await store.set("a", {"x": "one", "y": "two"})
    await store.set("b", {"x": "three"})
    fields = await held(client, store, "a")
    await client.hset(store.get_session_key("b"), "x", fields[b"x"])
    assert await store.get("b") == {"id": "b", "x": "one"}
    await client.hset(store.get_session_key("b"), "x", fields[b"y"])
    with pytest.raises(SessionError, match=UNREADABLE) as raised:
        await store.get("b")
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


# ---------------------------------------------------------------- operations


async def test_the_operations_work(store: SessionStore, client: Redis) -> None:
    """Every operation that reads or writes fields works on encrypted ones."""
    a = await store.create({"user_id": 1, "x": [1], "y": None})
    await store.set(a, {"z": "ü"})
    assert [one async for one in store.find_by("user_id", 1)] == [
        {"id": a, "user_id": 1, "x": [1], "y": None, "z": "ü"}
    ]
    before = await held(client, store, a)
    b = await store.rotate(a, {"user_id": 2, "w": 2})
    after = await held(client, store, b)
    assert [after[name] for name in (b"x", b"y", b"z")] == [before[name] for name in (b"x", b"y", b"z")]
    assert await store.get(b, ["x", "w"], touch=True) == {"id": b, "x": [1], "w": 2}
    await store.unset(b, ["w"])
    assert await store.pop(b, ["x", "y", "absent"]) == {"x": [1], "y": None}
    assert await store.get(b) == {"id": b, "user_id": 2, "z": "ü"}
    assert await store.delete_by("user_id", 2) == 1


async def test_a_session_moves_to_another_partition(client: Redis, keyspace: Keyspace) -> None:
    """A session whose new identity belongs to another partition keeps its values."""
    keyspace = Keyspace(keyspace.client, keyspace.prefix + ":parts", 16)
    references = {"user_id": Reference(identity=True)}
    store = new_store(client, keyspace, references=references, partitions=16)
    session_id = await store.create({"x": "value"})
    for user in range(8):
        session_id = await store.rotate(session_id, {"user_id": user, "y": user})
        assert await store.get(session_id) == {"id": session_id, "user_id": user, "x": "value", "y": user}
    assert b"value" not in await everything(client, keyspace.prefix)


async def test_a_reference_can_be_expected(store: SessionStore) -> None:
    """Redis compares the values of references, which are not encrypted."""
    await store.set("a", {"user_id": 1, "x": 1})
    await store.set("a", {"x": 2}, expect={"user_id": 1})
    with pytest.raises(Conflict):
        await store.set("a", {"x": 3}, expect={"user_id": 2})
    await store.set("a", {"x": 4}, expect={})
    assert not await store.delete("a", expect={"user_id": 2})
    assert await store.delete("a", expect={"user_id": 1})


@pytest.mark.parametrize(
    ("verb", "call"),
    [
        ("compare", lambda store: store.set("a", {"y": 1}, expect={"user_id": 1, "x": 1})),
        ("compare", lambda store: store.set("a", {"y": 1}, expect={"x": None})),
        ("compare", lambda store: store.delete("a", expect={"x": 1})),
        ("add to", lambda store: store.increment("a", "x")),
    ],
    ids=["set", "set-absent", "delete", "increment"],
)
@pytest.mark.parametrize("plaintext", [None, "read", "write"])
async def test_what_redis_would_have_to_read_is_refused(
    verb: str, call: Callable[[SessionStore], Awaitable[object]], plaintext: Literal["read", "write"] | None
) -> None:
    """An expectation or an increment of an encrypted field is refused before anything is sent: there is no server."""
    async with Redis(unix_socket_path="/nowhere/redis.sock") as client:
        codec = EncryptingCodec([KEY], plaintext=plaintext)
        store = SessionStore(client, references=["user_id"], codec=codec, timeout=0.001)
        with pytest.raises(ValueError, match=f"^Redis cannot {verb} the field 'x': EncryptingCodec encrypts it$"):
            await call(store)


async def test_bad_values_are_refused(store: SessionStore) -> None:
    """An error for a value that cannot be stored names the field, and shows no value."""
    with pytest.raises(TypeError, match="^EncryptingCodec cannot store this set in the field 'x': ") as raised:
        await store.set("a", {"x": {"SECRET"}})
    assert "SECRET" not in str(raised.value)
    assert raised.value.__context__ is None
    for field in ("id", "_x"):
        with pytest.raises(ValueError, match="reserved"):
            await store.set("a", {"x": 1}, expect={field: 1})


@pytest.mark.parametrize("codec", [TextCodec(), JSONCodec()])
async def test_references_are_those_of_the_codec_inside(client: Redis, keyspace: Keyspace, codec: Codec) -> None:
    """References are stored as without encryption, so turning it on changes none of them."""
    plain, store = new_store(client, keyspace, codec), new_store(client, keyspace, EncryptingCodec([KEY], codec))
    for value in ("1", "null", "[", "007", "alice"):
        await plain.set("a", {"user_id": value})
        await store.set("b", {"user_id": value})
        one, other = await held(client, store, "a"), await held(client, store, "b")
        assert one[b"user_id"] == other[b"user_id"]
        assert await store.get("a") == {"id": "a", "user_id": value}
        assert set(await store.ids_by("user_id", value)) == {"a", "b"}
        await plain.set("b", {"user_id": "other"})
        assert await store.ids_by("user_id", value) == ["a"]


# ---------------------------------------------------------------- beginning and ending


@pytest.mark.parametrize("codec", [JSONCodec(), TextCodec()])
async def test_the_way_there_and_back(client: Redis, keyspace: Keyspace, codec: Codec) -> None:
    """At each step, the servers of this step and of the next one read what both of them write."""

    def step(plaintext: Literal["read", "write"] | None) -> SessionStore:
        return new_store(client, keyspace, EncryptingCodec([KEY], codec, plaintext=plaintext))

    plain = new_store(client, keyspace, codec)
    steps = [plain, step("write"), step("read"), step(None)]
    await plain.set("a", {"old": "plain"})
    for n, pair in enumerate(itertools.pairwise(steps)):
        for writer in pair:
            values = {"x": f"{n}", "empty": ""}
            await writer.set("a", values)
            for reader in pair:
                assert await reader.get("a", [*values]) == {"id": "a", **values}
    for reader in steps[:-1]:
        assert await reader.get("a", ["old"]) == {"id": "a", "old": "plain"}


async def test_what_each_step_writes(client: Redis, keyspace: Keyspace) -> None:
    """In the mode "write", values are not encrypted. What a mode does not read raises `SessionError`."""
    plain = new_store(client, keyspace, JSONCodec())
    write, read = (new_store(client, keyspace, EncryptingCodec([KEY], plaintext=mode)) for mode in ("write", "read"))
    strict = new_store(client, keyspace)
    await write.set("a", {"x": "value"})
    assert (await held(client, write, "a"))[b"x"] == b"value"
    with pytest.raises(SessionError, match=UNREADABLE):
        await strict.get("a")
    for store in (read, strict):
        await store.set("a", {"x": "value"})
        assert (await held(client, store, "a"))[b"x"].startswith(b"\xc1")
    for codec in (JSONCodec(), TextCodec()):
        with pytest.raises(SessionError, match=UNREADABLE):
            await new_store(client, keyspace, codec).get("a")
    with pytest.raises(SessionError, match=UNREADABLE):
        await plain.get("a")


# ---------------------------------------------------------------- the web layer


async def test_the_session_of_a_request(sessions: Sessions, client: Redis, keyspace: Keyspace) -> None:
    """A session is read, written, rotated by a login and protected from forged requests, as without encryption."""
    session = sessions.create_session()
    token = await session.create_csrf_token()
    await session.set({"cart": ["SECRET"]})
    cookie = token_in(session.take_cookies())
    session = request(sessions, cookie)
    assert await session.get() == {"id": id_of(cookie), "cart": ["SECRET"]}
    assert await session.verify_csrf_token(token)
    await session.set({"user_id": 7, "name": "SECRET"})
    assert await session.get() == {"id": session.id, "user_id": 7, "cart": ["SECRET"], "name": "SECRET"}
    assert not await session.verify_csrf_token(token)
    token, cookie = await session.create_csrf_token(), token_in(session.take_cookies())
    session = request(sessions, cookie)
    assert await session.verify_csrf_token(token)
    await session.unset(["cart"])
    assert await session.get() == await sessions.store.get(id_of(cookie))
    other = await sessions.store.create({"user_id": 7, "name": "SECRET"})
    assert [one["name"] async for one in session.find_all()] == ["SECRET"] * 2
    assert b"SECRET" not in await everything(client, keyspace.prefix)
    assert await session.delete_other(other)
    assert await session.delete_all() == 1


async def test_a_read_after_a_write_is_that_of_the_codec(client: Redis, keyspace: Keyspace) -> None:
    """A session shows its own writes as the codec inside reads them."""
    session = Sessions(new_store(client, keyspace, EncryptingCodec([KEY], TextCodec()))).create_session()
    await session.set({"n": 1})
    await session.set({"m": 2})
    assert await session.get() == {"id": session.id, "n": "1", "m": "2"}


async def loaded(session: Session) -> DictSession:
    """Return the session of a request as a dict."""
    return DictSession(session, await session.peek())


async def test_a_dict_session_writes_what_changed(sessions: Sessions, client: Redis) -> None:
    """A dict session writes only the fields that changed, even if their type alone did."""
    token = await signed_in(sessions, {"user_id": 1, "a": 1, "b": {"c": [1]}, "d": "gone", "e": 1})
    before = await held(client, sessions.store, id_of(token))
    items = await loaded(request(sessions, token))
    items["b"]["c"].append(2)
    items["a"], items["e"] = 1, True
    del items["d"]
    await items.save()
    after = await held(client, sessions.store, id_of(token))
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed == {b"b", b"d", b"e"}
    assert await sessions.store.get(id_of(token)) == {
        "id": id_of(token), "user_id": 1, "a": 1, "b": {"c": [1, 2]}, "e": True
    }  # fmt: skip
    assert (await sessions.store.get(id_of(token)))["e"] is True


async def test_parallel_requests_do_not_undo_each_other(sessions: Sessions) -> None:
    """Two dict sessions that change different items leave both changes."""
    token = await signed_in(sessions, {"user_id": 1, "a": 1, "b": 1})
    one, other = await asyncio.gather(*(loaded(request(sessions, token)) for _ in range(2)))
    one["a"], other["b"] = 2, 2
    await one.save()
    await other.save()
    assert await sessions.store.get(id_of(token)) == {"id": id_of(token), "user_id": 1, "a": 2, "b": 2}


@pytest.mark.parametrize("there", [True, False])
async def test_a_login_that_is_repeated_makes_one_session(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, *, there: bool
) -> None:
    """A login whose answer was lost finds its session when it is repeated, although its data is encrypted anew."""
    session = request(sessions, await signed_in(sessions, {"n": 1})) if there else sessions.create_session()
    operations = sessions.store.operations
    name = "rotate" if there else "create"
    done: list[object] = []

    async def lose(*args: Any) -> None:
        done.append(await getattr(type(operations), name)(operations, *args))
        raise StoreUnavailable("no answer")

    monkeypatch.setattr(operations, name, lose)
    with pytest.raises(StoreUnavailable):
        await session.rotate({"user_id": 7, "x": [1]})
    monkeypatch.undo()
    await session.rotate({"user_id": 7, "x": [1]})
    assert len(done) == 1
    assert await sessions.store.ids_by("user_id", 7) == [session.id]
