"""What stands in the hash."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rss import Conflict, JSONCodec, SessionStore, TextCodec
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
    """With its type: 1 is not 1.0, and not True."""
    came = _round_trip(value)
    assert came == value
    assert json.dumps(came) == json.dumps(value)


@given(LIKE_JSON)
def test_text_that_looks_like_json_comes_back(value: str) -> None:
    """A str is never read as what it looks like."""
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
    """A text stands as it is, unless it could be taken for JSON."""
    assert JSONCodec().encode("f", value) == stored


@pytest.mark.parametrize("data", [b"[" * 100_000, b"NaN", b"[NaN]", b"{", b"1" * 5000, b'"', b"\xc3\xbc"])
def test_what_others_stored_is_text(data: bytes) -> None:
    """What is no JSON is the text that it is."""
    assert JSONCodec().decode("f", data) == data.decode()


def test_a_value_nested_too_deeply_is_refused() -> None:
    """It is a ValueError, not a crash."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match="deep"):
        JSONCodec().encode("f", value)


def test_text_codec_reads_str() -> None:
    """As the Node original."""
    assert TextCodec().encode("f", 1) == b"1"
    assert TextCodec().encode("f", "1") == b"1"
    assert TextCodec().decode("f", b"null") == "null"


class Reversing:
    """A codec as a user would write one: it hides what it stores."""

    def encode(self, field: str, value: Any, /) -> bytes:
        return f"{field}={json.dumps(value)}".encode()[::-1]

    def decode(self, field: str, data: bytes, /) -> Any:
        name, _, text = data[::-1].decode().partition("=")
        if name != field:
            raise ValueError("SECRET")
        return json.loads(text)


async def test_a_codec_of_the_users(client: Any, keyspace: Keyspace) -> None:
    """It stores all fields but references, whose values stand in the names of keys anyway."""
    store = SessionStore(client, references=["user_id"], prefix=keyspace.prefix, codec=Reversing())
    await store.set("a", {"user_id": "1", "x": [1]})
    assert await keyspace.dump() == {"{a}": {"id": "a", "user_id": '"1"', "x": "]1[=x"}, "user_id:{1}": {"a"}}
    assert await store.get("a") == {"id": "a", "user_id": "1", "x": [1]}
    await store.set("a", {"user_id": "2", "none": None}, expect={"x": [1], "none": None})
    await store.set("a", {"x": 2}, expect={"none": None})
    assert set(await keyspace.dump()) == {"{a}", "user_id:{2}"}


async def test_text_codec_can_expect_that_a_field_is_absent(client: Any, keyspace: Keyspace) -> None:
    """It stores no None, and the text "null" is not one."""
    store = SessionStore(client, prefix=keyspace.prefix, codec=TextCodec())
    await store.set("a", {"x": "null"}, expect={"x": None})
    with pytest.raises(Conflict):
        await store.set("a", {"x": "y"}, expect={"x": None})
    assert await store.get("a") == {"id": "a", "x": "null"}
    await store.set("a", {"x": ""}, expect={"x": "null"})
    with pytest.raises(Conflict):
        await store.set("a", {"x": "y"}, expect={"x": None})
