"""Bad arguments raise a clear error before anything is sent."""

import enum
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
import redis
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from rss import Reference, SessionStore, TextCodec
from tests.keyspace import Keyspace

Call = Callable[[SessionStore], Awaitable[object]]


async def _first(store: SessionStore, *args: Any) -> object:
    return [session async for session in store.find_by(*args)]


BAD: dict[str, tuple[Call, type[Exception], str]] = {
    # ids
    "empty id": (lambda s: s.get(""), ValueError, "session_id must not be empty"),
    "id of bytes": (lambda s: s.get(b"a"), TypeError, "session_id must be a str, not bytes"),  # type: ignore[arg-type]
    "no id": (lambda s: s.set(None, {}), TypeError, "session_id must be a str, not NoneType"),  # type: ignore[arg-type]
    "id with a surrogate": (lambda s: s.touch("\ud800"), ValueError, "session_id must be valid Unicode"),
    "one id to keep": (lambda s: s.delete_by("user_id", 1, keep="a"), TypeError, "keep must be several str"),
    "an int to keep": (lambda s: s.delete_by("user_id", 1, keep=[1]), TypeError, "an id to keep must be a str"),  # type: ignore[list-item]
    # fields
    "reserved field": (lambda s: s.set("a", {"_created": 1}), ValueError, "'_created' is reserved"),
    "field id": (lambda s: s.create({"id": "x"}), ValueError, "'id' is reserved"),
    "empty field": (lambda s: s.set("a", {"": 1}), ValueError, "a field must not be empty"),
    "field that is an int": (lambda s: s.set("a", {1: 1}), TypeError, "a field must be a str"),  # type: ignore[dict-item]
    "reserved field to read": (lambda s: s.get("a", ["_ended"]), ValueError, "'_ended' is reserved"),
    "reserved field to expect": (lambda s: s.set("a", {}, expect={"_x": 1}), ValueError, "'_x' is reserved"),
    "no fields to get": (lambda s: s.get("a", []), ValueError, "fields must not be empty"),
    "no fields to unset": (lambda s: s.unset("a", []), ValueError, "fields must not be empty"),
    "no fields to pop": (lambda s: s.pop("a", ()), ValueError, "fields must not be empty"),
    "no fields to find": (lambda s: _first(s, "user_id", 1, []), ValueError, "fields must not be empty"),
    "one field to get": (lambda s: s.get("a", "name"), TypeError, "fields must be several str"),
    "one field to unset": (lambda s: s.unset("a", "name"), TypeError, "fields must be several str"),
    "id to unset": (lambda s: s.unset("a", ["id"]), ValueError, "'id' is reserved"),
    "fields of a mapping": (lambda s: s.pop("a", {"name": 1}), TypeError, "fields must be several str"),
    "fields of an int": (lambda s: s.pop("a", 1), TypeError, "fields must be several str"),  # type: ignore[arg-type]
    "reference to increment": (lambda s: s.increment("a", "user_id"), ValueError, "'user_id' is a reference"),
    "increment by a float": (lambda s: s.increment("a", "n", 1.0), ValueError, "by must be an integer"),  # type: ignore[arg-type]
    "increment by too much": (lambda s: s.increment("a", "n", 2**63), ValueError, "by must be an integer"),
    # values
    "values of a list": (lambda s: s.set("a", ["x"]), TypeError, "values must be a mapping"),  # type: ignore[arg-type]
    "expect a list": (lambda s: s.set("a", {}, expect=["x"]), TypeError, "expect must be a mapping"),  # type: ignore[arg-type]
    "bytes": (lambda s: s.set("a", {"x": b"1"}), TypeError, "cannot store this bytes in the field 'x'"),
    "set": (lambda s: s.set("a", {"x": {1}}), TypeError, "cannot store this set in the field 'x'"),
    "tuple": (lambda s: s.set("a", {"x": (1,)}), TypeError, "cannot store this tuple in the field 'x'"),
    "nested tuple": (lambda s: s.set("a", {"x": [(1,)]}), TypeError, "cannot store this list in the field 'x'"),
    "key that is an int": (lambda s: s.set("a", {"x": {1: 1}}), TypeError, "cannot store this dict in the field 'x'"),
    "NaN": (lambda s: s.set("a", {"x": float("nan")}), ValueError, "cannot store this float in the field 'x'"),
    "nested infinity": (lambda s: s.set("a", {"x": [float("inf")]}), ValueError, "this list in the field 'x'"),
    "timedelta": (lambda s: s.set("a", {"x": timedelta(1)}), TypeError, "this timedelta in the field 'x'"),
    "surrogate": (lambda s: s.set("a", {"x": "\ud800"}), ValueError, "cannot store this str in the field 'x'"),
    "nested surrogate": (lambda s: s.set("a", {"x": ["\ud800"]}), ValueError, "this list in the field 'x'"),
    "huge int": (lambda s: s.set("a", {"x": 10**5000}), ValueError, "cannot store this int in the field 'x'"),
    "bytes to expect": (lambda s: s.set("a", {}, expect={"x": b"1"}), TypeError, "this bytes in the field 'x'"),
    # reference values
    "reference of a float": (lambda s: s.set("a", {"user_id": 1.5}), TypeError, "must be a str or an int, not float"),
    "reference of a bool": (lambda s: s.set("a", {"user_id": True}), TypeError, "must be a str or an int, not bool"),
    "reference of a dict": (lambda s: s.set("a", {"user_id": {}}), TypeError, "must be a str or an int, not dict"),
    "reference of a nested list": (lambda s: s.create({"user_id": [[1]]}), TypeError, "a str or an int, not list"),
    "reference of a list with None": (lambda s: s.create({"user_id": [None]}), TypeError, "not NoneType"),
    "empty reference": (lambda s: s.set("a", {"user_id": ""}), ValueError, "a value of 'user_id' must not be empty"),
    "long reference": (lambda s: s.set("a", {"user_id": "ü" * 257}), ValueError, "longer than 512 bytes"),
    "large int in a list": (lambda s: s.set("a", {"user_id": [2**53 + 1]}), ValueError, "must not be beyond 2"),
    "find by no reference": (lambda s: s.ids_by("name", "x"), ValueError, "'name' is not one of the references"),
    "find by None": (lambda s: s.count_by("user_id", None), TypeError, "not NoneType"),  # type: ignore[arg-type]
    "find by a bool": (lambda s: _first(s, "user_id", True), TypeError, "not bool"),
    "delete by an empty value": (lambda s: s.delete_by("user_id", ""), ValueError, "must not be empty"),
    "delete by no reference": (lambda s: s.delete_by("name", "x"), ValueError, "'name' is not one of the references"),
    # durations and reasons
    "max_age without a unit": (lambda s: s.set("a", {}, "90"), ValueError, "max_age must be a number and a unit"),
    "max_age of months": (lambda s: s.create({}, "2 months"), ValueError, "max_age must be a number and a unit"),
    "max_age of zero": (lambda s: s.touch("a", 0), ValueError, "max_age must be between"),
    "negative max_age": (lambda s: s.unset("a", ["x"], -1), ValueError, "max_age must be between"),
    "max_age of NaN": (lambda s: s.touch("a", float("nan")), ValueError, "max_age must be between"),
    "max_age of ages": (lambda s: s.touch("a", 10**400), ValueError, "max_age must be between"),
    "max_age of a bool": (lambda s: s.touch("a", True), ValueError, "max_age must be a timedelta"),
    "max_age of a list": (lambda s: s.touch("a", []), ValueError, "max_age must be a timedelta"),  # type: ignore[arg-type]
    "grace of nothing": (lambda s: s.rotate("a", grace=0), ValueError, "grace must be between"),
    "empty reason": (lambda s: s.delete("a", reason=""), ValueError, "reason must be a short word"),
    "reason of words": (lambda s: s.delete_by("ip", "x", reason="a b"), ValueError, "reason must be a short word"),
    "reason of a number": (lambda s: s.delete("a", reason=1), ValueError, "reason must be a short word"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_argument_is_refused(keyspace: Keyspace, case: str) -> None:
    """Nothing is sent: there is no server where this store looks for one."""
    call, error, text = BAD[case]
    async with Redis(unix_socket_path="/nowhere/redis.sock") as client:
        store = SessionStore(client, references=["user_id", "ip"], prefix=keyspace.prefix, timeout=0.001)
        with pytest.raises(error, match=text) as raised:
            await call(store)
        assert type(raised.value) is error
        assert raised.value.__cause__ is None


def test_reading_by_reference_refuses_at_once(store: SessionStore) -> None:
    """Not only when the first session is asked for."""
    with pytest.raises(ValueError, match="not one of the references"):
        store.find_by("name", "x")


STORES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "prefix with a brace": ({"prefix": "a{b"}, ValueError, "prefix must not hold a brace"),
    "prefix with a closing brace": ({"prefix": "a}"}, ValueError, "prefix must not hold a brace"),
    "empty prefix": ({"prefix": ""}, ValueError, "prefix must not be empty"),
    "prefix of bytes": ({"prefix": b"rss"}, TypeError, "prefix must be a str"),
    "one reference": ({"references": "user_id"}, TypeError, "references must be several str"),
    "reserved reference": ({"references": ["id"]}, ValueError, "'id' is reserved"),
    "reference with a colon": ({"references": ["a:b"]}, ValueError, "must not hold a colon or a brace"),
    "reference with a brace": ({"references": ["a{"]}, ValueError, "must not hold a colon or a brace"),
    "reference of an int": ({"references": [1]}, TypeError, "a field must be a str"),
    "reference of a dict": ({"references": {"a": {}}}, TypeError, "a mapping of fields to Reference"),
    "max_age": ({"max_age": "soon"}, ValueError, "max_age must be a number and a unit"),
    "max_lifetime": ({"max_lifetime": 0}, ValueError, "max_lifetime must be between"),
    "timeout": ({"timeout": None}, ValueError, "timeout must be a timedelta"),
    "few id_bytes": ({"id_bytes": 15}, ValueError, "id_bytes must be an integer from 16"),
    "id_bytes of a bool": ({"id_bytes": True}, ValueError, "id_bytes must be an integer from 16"),
}


@pytest.mark.parametrize("case", STORES)
def test_a_bad_option_is_refused(client: Redis, case: str) -> None:
    """A store that is made wrong says so when it is made."""
    options, error, text = STORES[case]
    with pytest.raises(error, match=text):
        SessionStore(client, **options)


def test_a_client_of_another_kind_is_refused() -> None:
    """A client that blocks, and one for a cluster, whose slots no script can span."""
    with redis.Redis() as blocking, pytest.raises(TypeError, match="must be a redis.asyncio.Redis"):
        SessionStore(blocking)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="not RedisCluster"):
        SessionStore(RedisCluster(host="127.0.0.1"))  # type: ignore[arg-type]


def test_a_client_of_another_encoding_is_refused() -> None:
    """Keys that it names and values that the codec stores would not be the same text."""
    with pytest.raises(ValueError, match="must have the encoding utf-8"):
        SessionStore(Redis(encoding="latin-1"))
    assert SessionStore(Redis(encoding="UTF8"))


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"limit": True}, {"limit": 1001}, {"limit": "5"}, {"on_limit": "ignore"}]
)
def test_a_bad_reference_is_refused(options: dict[str, Any]) -> None:
    """Its limit is an integer, 1 to 1,000, and there are two things to do at it."""
    with pytest.raises(ValueError, match="limit"):
        Reference(**options)


@pytest.mark.parametrize("value", [None, 1.5, True, ["x"], {"x": 1}, b"x"])
async def test_text_codec_stores_str_and_int_only(client: Redis, keyspace: Keyspace, value: object) -> None:
    """Anything else would come back as something else."""
    store = SessionStore(client, references=["user_id"], prefix=keyspace.prefix, codec=TextCodec())
    for field in ("x", "user_id"):
        with pytest.raises(TypeError, match=f"TextCodec cannot store this .* in the field '{field}'"):
            await store.set("a", {field: value})
    assert await keyspace.dump() == {}


async def test_enumerations_are_what_they_stand_for(store: SessionStore, keyspace: Keyspace) -> None:
    """A member of an enumeration of str or int is stored, indexed and found as its value."""

    class Role(str, enum.Enum):  # noqa: UP042 - str() of this one is not its value
        ADMIN = "admin"

    class User(enum.IntEnum):
        ALICE = 1

    await store.set("a", {"user_id": User.ALICE, "ip": Role.ADMIN, "roles": [Role.ADMIN]})
    assert await store.get("a") == {"id": "a", "user_id": 1, "ip": "admin", "roles": ["admin"]}
    assert await store.ids_by("user_id", User.ALICE) == await store.ids_by("ip", "admin") == ["a"]
    assert set(await keyspace.dump()) == {"{a}", "user_id:{1}", "ip:{admin}"}


async def test_no_value_stands_in_an_error_or_a_repr(store: SessionStore) -> None:
    """Neither in the text nor in what it was raised from."""
    with pytest.raises(TypeError) as raised:
        await store.set("SECRET", {"x": {"SECRET": {1}}})
    error: BaseException | None = raised.value
    while error is not None:
        assert "SECRET" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert "SECRET" not in repr(store)
