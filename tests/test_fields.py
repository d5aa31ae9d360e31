"""Encoding values for Redis, and decoding them."""

import ast
import uuid
from typing import Any

import pytest

from rss import JSONCodec, Reference, SessionError, TextCodec
from rss.fields import Encoded, Fields, field_name


def test_what_a_write_sends() -> None:
    """`encode` returns fields with data, the texts of reference values, and how many values each reference has."""
    fields = Fields(["user_id", "ip", "tags"], JSONCodec())
    assert fields.encode({"x": True, "tags": [1, "1", "a"], "user_id": 7}) == Encoded(
        pairs=["x", "true", "tags", '[1,"1","a"]', "user_id", "7"],
        references=[("user_id", "7"), ("tags", "1"), ("tags", "a")],
        counts=("1", "keep", "2"),
    )
    assert fields.encode({"ip": None}) == Encoded(["ip", "null"], [], ("keep", "0", "keep"))
    assert fields.encode({}) == Encoded([], [], ("keep", "keep", "keep"))
    assert Fields([], JSONCodec()).encode({"user_id": 7}) == Encoded(["user_id", "7"], [], ())


def test_what_is_expected() -> None:
    """`expect` lets None match an absent field, and also None if the codec stores it."""
    values: dict[str, Any] = {"x": "a", "y": None}
    assert Fields([], JSONCodec()).expect(values) == ["x", "holds", "a", "y", "lacks_or_holds", "null"]
    assert Fields([], TextCodec()).expect(values) == ["x", "holds", b"a", "y", "lacks", ""]
    assert Fields([], JSONCodec()).expect({}) == []


class Shuffling:
    """A codec as a user would write one, whose data differs each time."""

    plaintext_codec = JSONCodec()

    def encode(self, field: str, value: Any, /) -> str:
        return f"{uuid.uuid4()} {self.plaintext_codec.encode(field, value)!r}"

    def decode(self, field: str, data: bytes, /) -> Any:
        return self.plaintext_codec.decode(field, ast.literal_eval(data.decode().partition(" ")[2]).encode())


class Twice(Shuffling):
    """The same around another such codec."""

    plaintext_codec: Any = Shuffling()


def test_a_codec_whose_data_differs_each_time() -> None:
    """A codec with a `plaintext_codec` cannot be expected, except in references. That codec compares the values."""
    values = {"user_id": 1, "x": [1]}
    for fields in (Fields(["user_id"], Shuffling()), Fields(["user_id"], Twice())):
        encoded = fields.encode(values)
        assert encoded != fields.encode(values)
        assert fields.comparable(encoded, values).pairs == ["user_id", "1", "x", "[1]"]
        assert fields.as_stored(values) == values
        assert fields.expect({"user_id": 1}) == ["user_id", "holds", "1"]
        kind = type(fields.codec).__name__
        with pytest.raises(ValueError, match=f"^Redis cannot compare the field 'x': {kind} encrypts it$"):
            fields.expect(values)
    plain = Fields(["user_id"], JSONCodec())
    encoded = plain.encode(values, ("y",))
    assert plain.comparable(encoded, values) is encoded
    assert Fields([], Shuffling()).comparable(encoded, values).gone == ("y",)


def test_what_a_read_brings_back() -> None:
    """`decode` leaves out the fields of the library, except for the id."""
    fields = Fields(["user_id"], TextCodec())
    data = [b"id", b"[1]", b"_created", b"1", b"user_id", b"1", b"n", b"2", b"_max_age", b"3"]
    assert fields.decode(data) == {"id": "[1]", "user_id": "1", "n": "2"}
    assert fields.as_stored({"user_id": 1, "n": 2}) == {"user_id": "1", "n": "2"}
    assert Fields([], JSONCodec()).as_stored({"n": [1], "s": "ü"}) == {"n": [1], "s": "ü"}
    assert fields.decode([]) == {}


def test_a_name_that_others_wrote_is_shown() -> None:
    """A field name that is no UTF-8 is shown escaped, and the other fields can be read."""
    assert Fields([], JSONCodec()).decode([b"\xff", b"1", b"x", b"2"]) == {"\\xff": 1, "x": 2}
    with pytest.raises(SessionError, match="^the field 'x' holds data that is not readable$"):
        Fields([], JSONCodec()).decode([b"x", b"\xff"])


def test_names_do_not_pile_up() -> None:
    """The number of cached field names is bounded, since names may be arbitrary data."""
    fields = Fields(["user_id"], JSONCodec())
    for n in range(3000):
        assert fields.as_stored({f"f{n}": n}) == {f"f{n}": n}
    assert len(fields._encoders) <= 1000
    assert len(fields._decoders) <= 1000
    assert fields.as_stored({"f0": 1, "user_id": 1}) == {"f0": 1, "user_id": 1}


def test_the_identity_and_the_numbers_of_references() -> None:
    """References are numbered from 1, as the scripts count them."""
    fields = Fields({"ip": Reference(), "user_id": Reference(identity=True)}, JSONCodec())
    assert fields.identity == "user_id"
    assert [fields.number(field) for field in ("ip", "user_id")] == ["1", "2"]
    assert Fields(["ip"], JSONCodec()).identity is None
    identity = Reference(identity=True)
    with pytest.raises(ValueError, match="at most one reference is the identity"):
        Fields({"user_id": identity, "tenant": identity}, JSONCodec())


@pytest.mark.parametrize("name", ["x", "ids", "a b", "ü", "x_", "a:b", "{x}", "\n", "😀"])
def test_any_text_is_the_name_of_a_field(name: str) -> None:
    """Any text can be the name of a field, even with spaces, colons or braces."""
    assert field_name(name) == name
    assert Fields([], JSONCodec()).as_stored({name: 1}) == {name: 1}
