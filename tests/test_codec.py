"""Codecs: the data of fields in the hash."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rss import Conflict, JSONCodec, SessionError, SessionStore, TextCodec
from tests.keyspace import Keyspace

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
LIKE_JSON = st.text(alphabet='[]{}",:0123456789.-+eE truefalsnINy\\\t\n', max_size=12)


def _round_trip(value: object) -> Any:
    data = JSONCodec().encode("f", value)
    return JSONCodec().decode("f", data.encode() if isinstance(data, str) else data)


@given(JSON)
def test_every_json_value_comes_back(value: object) -> None:
    """Every JSON value is decoded to the same value of the same type."""
    came = _round_trip(value)
    assert came == value
    assert json.dumps(came) == json.dumps(value)


@given(LIKE_JSON)
def test_text_that_looks_like_json_comes_back(value: str) -> None:
    """A text that looks like JSON is decoded to the same text."""
    assert _round_trip(value) == value


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (1, "1"),
        ("1", '"1"'),
        ("alice", "alice"),
        ("", ""),
        (None, "null"),
        ("null", '"null"'),
        (True, "true"),
        (1.5, "1.5"),
        ([1], "[1]"),
        ({"a": "ü"}, '{"a":"ü"}'.encode()),
        ("ü", "ü".encode()),
        ("tango", "tango"),
        ("007", "007"),
        ("-", "-"),
        (" 1", '" 1"'),
        ("NaN", "NaN"),
        ('"', '"\\""'),
        ("[0x10]", '"[0x10]"'),
    ],
)
def test_what_is_stored_is_readable(value: object, stored: str | bytes) -> None:
    """A text is stored as it is, unless it could be read as JSON."""
    assert JSONCodec().encode("f", value) == stored


@pytest.mark.parametrize("data", [b"[" * 100_000, b"NaN", b"[NaN]", b"{", b"1" * 5000, b'"', b"\xc3\xbc"])
def test_what_others_stored_is_text(data: bytes) -> None:
    """Data that is not JSON is decoded as text."""
    assert JSONCodec().decode("f", data) == data.decode()


def test_a_value_nested_too_deeply_is_refused() -> None:
    """A value that is nested too deeply raises ValueError."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match="deep"):
        JSONCodec().encode("f", value)


def test_text_codec_reads_str() -> None:
    """TextCodec decodes every value to str, as the Node original does."""
    assert TextCodec().encode("f", 1) == b"1"
    assert TextCodec().encode("f", "1") == b"1"
    assert TextCodec().decode("f", b"null") == "null"


class Reversing:
    """A codec as a user would write one, which obscures the data."""

    def encode(self, field: str, value: Any, /) -> bytes:
        return f"{field}={json.dumps(value)}".encode()[::-1]

    def decode(self, field: str, data: bytes, /) -> Any:
        name, _, text = data[::-1].decode().partition("=")
        if name != field:
            raise ValueError("SECRET")
        return json.loads(text)


async def test_a_codec_of_the_users(client: Any, keyspace: Keyspace) -> None:
    """A codec of the user encodes all fields except references."""
    store = SessionStore(client, references=["user_id"], prefix=keyspace.prefix, codec=Reversing())
    await store.set("a", {"user_id": "1", "x": [1]})
    assert await keyspace.dump() == {"{a}": {"id": "a", "user_id": '"1"', "x": "]1[=x"}, "user_id:{1}": {"a"}}
    assert await store.get("a") == {"id": "a", "user_id": "1", "x": [1]}
    await store.set("a", {"user_id": "2", "none": None}, expect={"x": [1], "none": None})
    await store.set("a", {"x": 2}, expect={"none": None})
    assert set(await keyspace.dump()) == {"{a}", "user_id:{2}"}


class Text(str):
    """A subclass of str whose `str()` is another text."""

    __slots__ = ()

    def __str__(self) -> str:
        return "wrong"


class Data(bytes):
    """A subclass of bytes."""


class Returning:
    """A codec that returns a given object for the field "odd"."""

    def __init__(self, data: object) -> None:
        self.data = data

    def encode(self, field: str, value: Any, /) -> Any:
        return self.data if field == "odd" else str(value)

    def decode(self, _: str, data: bytes, /) -> Any:
        return data.decode()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (1, TypeError),
        (None, TypeError),
        (True, TypeError),
        (1.5, TypeError),
        (bytearray(b"x"), TypeError),
        (memoryview(b"x"), TypeError),
        (["x"], TypeError),
        ("\ud800", ValueError),
        ("ü\udfff", ValueError),
    ],
)
async def test_a_codec_that_returns_what_cannot_be_stored(
    client: Any, keyspace: Keyspace, data: object, kind: type[Exception]
) -> None:
    """A call whose codec returns bad data raises an error that names codec and field; other calls succeed."""
    store = SessionStore(client, references=["user_id"], prefix=keyspace.prefix, codec=Returning(data))
    await store.set("a", {"x": 1})
    odd: dict[str, Any] = {"odd": "SECRET", "x": 2}
    results = await asyncio.gather(
        *(store.set(f"b{n}", {"user_id": 1, "x": n}) for n in range(5)),
        store.set("a", odd),
        store.set("a", {"x": 2}, expect={"odd": "SECRET"}),
        store.delete("a", expect={"odd": "SECRET"}),
        store.create(odd),
        store.rotate("a", odd),
        *(store.set(f"c{n}", {"user_id": 1, "x": n}) for n in range(5)),
        return_exceptions=True,
    )
    errors = results[5:10]
    for error in errors:
        assert type(error) is kind
        assert str(error).startswith("Returning cannot store this str in the field 'odd': store a str")
    assert not [result for result in results if isinstance(result, BaseException) and result not in errors]
    names = [f"{letter}{n}" for letter in "bc" for n in range(5)]
    assert await keyspace.dump() == {
        "{a}": {"id": "a", "x": "1"},
        **{f"{{{name}}}": {"id": name, "user_id": "1", "x": name[1]} for name in names},
        "user_id:{1}": set(names),
    }


@pytest.mark.parametrize("data", [Text("right"), Data(b"right")])
async def test_a_codec_that_returns_a_subclass(client: Any, keyspace: Keyspace, data: object) -> None:
    """A subclass of str or bytes is stored with its own content."""
    store = SessionStore(client, prefix=keyspace.prefix, codec=Returning(data))
    await store.set("a", {"odd": 1})
    assert await keyspace.dump() == {"{a}": {"id": "a", "odd": "right"}}
    await store.set("a", {"x": 1}, expect={"odd": 1})
    assert await store.get("a") == {"id": "a", "odd": "right", "x": "1"}


@pytest.mark.parametrize(
    ("error", "kind"),
    [(TypeError("SECRET"), TypeError), (ValueError("SECRET"), ValueError), (UnicodeError("SECRET"), ValueError)],
)
async def test_a_codec_that_raises(client: Any, keyspace: Keyspace, error: Exception, kind: type[Exception]) -> None:
    """A TypeError or ValueError of a codec is replaced by an error that names the field and shows no value."""

    class Raising:
        def encode(self, *_: object) -> Any:
            raise error

        def decode(self, *_: object) -> Any:
            raise error

    store = SessionStore(client, prefix=keyspace.prefix, codec=Raising())
    with pytest.raises(kind) as raised:
        await store.set("a", {"x": 1})
    assert type(raised.value) is kind
    assert str(raised.value).startswith("Raising cannot store this int in the field 'x': store a str")
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None
    await keyspace.client.hset(store.get_session_key("a"), mapping={"id": "a", "x": "SECRET"})
    await keyspace.client.pexpire(store.get_session_key("a"), 60_000)
    with pytest.raises(SessionError, match="^the field 'x' holds data that is not readable$") as unreadable:
        await store.get("a")
    assert unreadable.value.__cause__ is None
    assert unreadable.value.__suppress_context__


async def test_an_error_of_a_codec_that_is_a_mistake(client: Any, keyspace: Keyspace) -> None:
    """Any other error of a codec reaches its own caller unchanged, and no other caller."""

    class Mistaken(Returning):
        def encode(self, field: str, value: Any, /) -> Any:
            return {"x": str(value)}[field]

    store = SessionStore(client, prefix=keyspace.prefix, codec=Mistaken(None))
    values: list[dict[str, Any]] = [{"x": 1}, {"odd": 1}, {"x": 1}]
    results = await asyncio.gather(
        *(store.set(name, value) for name, value in zip("abc", values, strict=True)), return_exceptions=True
    )
    assert results[::2] == values[::2]
    assert isinstance(results[1], KeyError)
    assert set(await keyspace.dump()) == {"{a}", "{c}"}


async def test_text_codec_can_expect_that_a_field_is_absent(client: Any, keyspace: Keyspace) -> None:
    """TextCodec can expect None, which matches an absent field but not the text "null"."""
    store = SessionStore(client, prefix=keyspace.prefix, codec=TextCodec())
    await store.set("a", {"x": "null"}, expect={"x": None})
    with pytest.raises(Conflict):
        await store.set("a", {"x": "y"}, expect={"x": None})
    assert await store.get("a") == {"id": "a", "x": "null"}
    await store.set("a", {"x": ""}, expect={"x": "null"})
    with pytest.raises(Conflict):
        await store.set("a", {"x": "y"}, expect={"x": None})
