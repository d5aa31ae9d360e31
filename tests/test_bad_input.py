"""Bad arguments raise a clear error before anything is sent."""

import enum
import inspect
import re
from collections.abc import Callable
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import pytest
import redis
from redis.asyncio import Redis

from rss import Reference, SessionStore, TextCodec
from rss.observe import Observation
from rss.observe.logging import Logging
from tests.keyspace import Keyspace

Call = Callable[[SessionStore, Any], object]
#: A bad argument, the type of the error that it raises, and a pattern of the message.
Case = tuple[object, type[Exception], str]
Row = tuple[Call, object, type[Exception], str]

IDS: dict[str, Case] = {
    "empty": ("", ValueError, "session_id must not be empty"),
    "bytes": (b"a", TypeError, "session_id must be a str, not bytes"),
    "None": (None, TypeError, "session_id must be a str, not NoneType"),
    "an int": (1, TypeError, "session_id must be a str, not int"),
    "a surrogate": ("\ud800", ValueError, "session_id must be valid Unicode"),
}
FIELD: dict[str, Case] = {
    "reserved": ("_created", ValueError, "'_created' is reserved"),
    "the id": ("id", ValueError, "'id' is reserved"),
    "empty": ("", ValueError, "a field must not be empty"),
    "an int": (1, TypeError, "a field must be a str, not int"),
    "None": (None, TypeError, "a field must be a str, not NoneType"),
    "a list": (["n"], TypeError, "a field must be a str, not list"),
    "a surrogate": ("\ud800", ValueError, "a field must be valid Unicode"),
}
SOME_FIELDS: dict[str, Case] = {
    **{f"one that is {case}": ([bad], error, text) for case, (bad, error, text) in FIELD.items() if case != "the id"},
    "none": ([], ValueError, "fields must not be empty"),
    "an iterator without items": (iter(()), ValueError, "fields must not be empty"),
    "a single one": ("name", TypeError, "fields must be several str, in a list for one"),
    "bytes": (b"name", TypeError, "fields must be several str"),
    "a mapping": ({"name": 1}, TypeError, "fields must be several str"),
    "an int": (1, TypeError, "fields must be several str"),
    "too many": ([f"f{n}" for n in range(1001)], ValueError, "fields must not be more than 1,000"),
}
FIELDS: dict[str, Case] = {
    **SOME_FIELDS,
    "the id": (["x", "id"], ValueError, "'id' is reserved"),
    "None": (None, TypeError, "fields must be several str"),
}
DATA: dict[str, Case] = {
    "a list": (["x"], TypeError, "must be a mapping of fields to values, not list"),
    "a list without items": ([], TypeError, "must be a mapping of fields to values, not list"),
    "a text": ("x", TypeError, "must be a mapping of fields to values, not str"),
    "a text without letters": ("", TypeError, "must be a mapping of fields to values, not str"),
    "False": (False, TypeError, "must be a mapping of fields to values, not bool"),
    "a reserved field": ({"_created": 1}, ValueError, "'_created' is reserved"),
    "the field id": ({"id": "x"}, ValueError, "'id' is reserved"),
    "an empty field": ({"": 1}, ValueError, "a field must not be empty"),
    "a field that is an int": ({1: 1}, TypeError, "a field must be a str"),
    "a field that is a tuple": ({("x",): 1}, TypeError, "a field must be a str"),
    "a field with a surrogate": ({"\ud800": 1}, ValueError, "a field must be valid Unicode"),
    "too many fields": ({f"f{n}": 1 for n in range(1001)}, ValueError, "must not have more than 1,000 fields"),
    "bytes": ({"x": b"1"}, TypeError, "JSONCodec cannot store this bytes in the field 'x'"),
    "a set": ({"x": {1}}, TypeError, "cannot store this set in the field 'x'"),
    "a tuple": ({"x": (1,)}, TypeError, "cannot store this tuple in the field 'x'"),
    "a nested tuple": ({"x": [(1,)]}, TypeError, "cannot store this list in the field 'x'"),
    "a key that is an int": ({"x": {1: 1}}, TypeError, "cannot store this dict in the field 'x'"),
    "NaN": ({"x": float("nan")}, ValueError, "cannot store this float in the field 'x'"),
    "nested infinity": ({"x": [float("inf")]}, ValueError, "cannot store this list in the field 'x'"),
    "a timedelta": ({"x": timedelta(1)}, TypeError, "cannot store this timedelta in the field 'x'"),
    "a surrogate": ({"x": "\ud800"}, ValueError, "cannot store this str in the field 'x'"),
    "a nested surrogate": ({"x": ["\ud800"]}, ValueError, "cannot store this list in the field 'x'"),
    "a huge int": ({"x": 10**5000}, ValueError, "cannot store this int in the field 'x'"),
}
VALUES: dict[str, Case] = {
    **DATA,
    "a reference of a float": ({"user_id": 1.5}, TypeError, "'user_id' must be a str or an int, not float"),
    "a reference of a bool": ({"user_id": True}, TypeError, "'user_id' must be a str or an int, not bool"),
    "a reference of a dict": ({"user_id": {}}, TypeError, "'user_id' must be a str or an int, not dict"),
    "a reference of a nested list": ({"ip": [[1]]}, TypeError, "'ip' must be a str or an int, not list"),
    "a reference of a list with None": ({"ip": [None]}, TypeError, "'ip' must be a str or an int, not NoneType"),
    "a reference of a list with a bool": ({"ip": [1, True]}, TypeError, "'ip' must be a str or an int, not bool"),
    "an empty reference": ({"user_id": ""}, ValueError, "a value of the reference 'user_id' must not be empty"),
    "an empty reference in a list": ({"ip": ["x", ""]}, ValueError, "a value of the reference 'ip' must not be empty"),
    "a long reference": ({"user_id": "ü" * 257}, ValueError, "'user_id' must not be longer than 512 bytes"),
    "a large int in a list": ({"ip": [2**53 + 1]}, ValueError, "must not be beyond 2"),
    "a small int in a list": ({"ip": [-(2**53) - 1]}, ValueError, "must not be beyond 2"),
    "a list for the identity": ({"account": [1]}, ValueError, "'account' is the identity: it has one value"),
    "many reference values": ({"ip": [*range(129)]}, ValueError, "must not have more than 128 reference values"),
    "many reference values in two lists": (
        {"ip": [*range(64)], "tags": [*range(64)], "account": 1},
        ValueError,
        "must not have more than 128 reference values",
    ),
    "many values with a limit": ({"user_id": [*range(11)]}, ValueError, "'user_id' has a limit: .* than 10 values"),
}
EXPECT: dict[str, Case] = {case: row for case, row in DATA.items() if case != "None"}
VALUE: dict[str, Case] = {
    "None": (None, TypeError, "a value of the reference 'user_id' must be a str or an int, not NoneType"),
    "a bool": (True, TypeError, "a value of the reference 'user_id' must be a str or an int, not bool"),
    "a float": (1.0, TypeError, "a value of the reference 'user_id' must be a str or an int, not float"),
    "a list": ([1], TypeError, "a value of the reference 'user_id' must be a str or an int, not list"),
    "bytes": (b"1", TypeError, "a value of the reference 'user_id' must be a str or an int, not bytes"),
    "empty": ("", ValueError, "a value of the reference 'user_id' must not be empty"),
    "long": ("x" * 513, ValueError, "a value of the reference 'user_id' must not be longer than 512 bytes"),
    "a huge int": (10**600, ValueError, "a value of the reference 'user_id' must not be longer than 512 bytes"),
    "a surrogate": ("\ud800", ValueError, "a value of the reference 'user_id' must be valid Unicode"),
}
REFERENCE: dict[str, Case] = {
    "another field": ("name", ValueError, "'name' is not one of the references of this store"),
    "a fence": ("_fence:user_id", ValueError, "is not one of the references of this store"),
    "None": (None, ValueError, "None is not one of the references of this store"),
    "bytes": (b"user_id", ValueError, "is not one of the references of this store"),
    "a list": (["user_id"], ValueError, "is not one of the references of this store"),
}
DURABLE: dict[str, Case] = {
    f"{bad!r}": (bad, ValueError, "durable must be a positive number of replicas") for bad in (0, -1, True, 1.0, "1")
}
REASON: dict[str, Case] = {
    "empty": ("", ValueError, "reason must be a short word"),
    "of words": ("a b", ValueError, "reason must be a short word"),
    "of lines": ("a\n", ValueError, "reason must be a short word"),
    "of letters that are not ASCII": ("gelöscht", ValueError, "reason must be a short word"),
    "long": ("x" * 33, ValueError, "reason must be a short word"),
    "an int": (1, ValueError, "reason must be a short word"),
    "None": (None, ValueError, "reason must be a short word"),
    "bytes": (b"x", ValueError, "reason must be a short word"),
}
KEEP: dict[str, Case] = {
    "a single one": ("a", TypeError, "keep must be several str, in a list for one"),
    "bytes": (b"a", TypeError, "keep must be several str"),
    "None": (None, TypeError, "keep must be several str"),
    "an int in a list": ([1], TypeError, "an id to keep must be a str, not int"),
    "None in a list": (["a", None], TypeError, "an id to keep must be a str, not NoneType"),
    "empty in a list": (["a", ""], ValueError, "an id to keep must not be empty"),
    "a surrogate": (["\ud800"], ValueError, "an id to keep must be valid Unicode"),
    "too many": ([str(n) for n in range(1001)], ValueError, "keep must not have more than 1,000 ids"),
}


def _durations(name: str, *others: object) -> dict[str, Case]:
    """Return cases of bad durations. *others*: more values that are no duration for this argument."""
    unclear = f"{name} must be a number and a unit"
    beyond = f"{name} must be between a millisecond and 100 years"
    neither = f"{name} must be a timedelta, a number of seconds or a text with a unit"
    return {
        "without a unit": ("90", ValueError, unclear),
        "of months": ("2 months", ValueError, unclear),
        "of words": ("soon", ValueError, unclear),
        "zero": (0, ValueError, beyond),
        "of no time": (timedelta(0), ValueError, beyond),
        "negative": (-1, ValueError, beyond),
        "NaN": (float("nan"), ValueError, beyond),
        "infinite": (float("inf"), ValueError, beyond),
        "of ages": (10**400, ValueError, beyond),
        "a list": ([], ValueError, neither),
        "bytes": (b"1s", ValueError, neither),
        **{str(other): (other, ValueError, neither) for other in others},
    }


MAX_AGE = _durations("max_age", True)


def _rows(argument: str, cases: dict[str, Case], call: Call) -> dict[str, Row]:
    """Return a row for each case of one argument of a method."""
    return {f"{argument}: {case}": (call, *row) for case, row in cases.items()}


#: For each method of a store: its rows, by names of the form "argument: case".
BAD: dict[str, dict[str, Row]] = {
    "from_url": {
        "url: another scheme": (lambda s, x: s.from_url(x), "ftp://x", ValueError, "Redis URL must specify one of"),
        "url: None": (lambda s, x: s.from_url(x), None, ValueError, "Redis URL must specify one of"),
        "options: one of them": (
            lambda s, x: s.from_url("redis://", max_age=x),
            "soon",
            ValueError,
            "max_age must be a number and a unit",
        ),
    },
    "create_session_id": {
        f"identity: {case}": (lambda s, x: s.create_session_id(x), bad, error, text.replace("user_id", "account"))
        for case, (bad, error, text) in VALUE.items()
        if case != "None"
    },
    "get_session_key": _rows("session_id", IDS, lambda s, x: s.get_session_key(x)),
    "get_reference_keys": {
        **_rows("field", REFERENCE, lambda s, x: s.get_reference_keys(x, 1)),
        **_rows("value", VALUE, lambda s, x: s.get_reference_keys("user_id", x)),
    },
    "get_reference_key": {
        **_rows("field", REFERENCE, lambda s, x: s.get_reference_key(x, 1)),
        **_rows("value", VALUE, lambda s, x: s.get_reference_key("user_id", x)),
    },
    "create": {
        **_rows("values", VALUES, lambda s, x: s.create(x)),
        **_rows("max_age", MAX_AGE, lambda s, x: s.create({}, x)),
    },
    "get": {
        **_rows("session_id", IDS, lambda s, x: s.get(x)),
        **_rows("fields", SOME_FIELDS, lambda s, x: s.get("a", x)),
        **_rows("touch", _durations("touch", None), lambda s, x: s.get("a", touch=x)),
    },
    "set": {
        **_rows("session_id", IDS, lambda s, x: s.set(x, {})),
        **_rows("values", VALUES, lambda s, x: s.set("a", x)),
        "values: None": (lambda s, x: s.set("a", x), None, TypeError, "values must be a mapping"),
        **_rows("max_age", MAX_AGE, lambda s, x: s.set("a", {}, x)),
        **_rows("expect", EXPECT, lambda s, x: s.set("a", {}, expect=x)),
    },
    "unset": {
        **_rows("session_id", IDS, lambda s, x: s.unset(x, ["x"])),
        **_rows("fields", FIELDS, lambda s, x: s.unset("a", x)),
        **_rows("max_age", MAX_AGE, lambda s, x: s.unset("a", ["x"], x)),
    },
    "pop": {
        **_rows("session_id", IDS, lambda s, x: s.pop(x, ["x"])),
        **_rows("fields", FIELDS, lambda s, x: s.pop("a", x)),
    },
    "increment": {
        **_rows("session_id", IDS, lambda s, x: s.increment(x, "n")),
        **_rows("field", FIELD, lambda s, x: s.increment("a", x)),
        "field: a reference": (lambda s, x: s.increment("a", x), "user_id", ValueError, "'user_id' is a reference"),
        **_rows(
            "by",
            {
                str(bad): (bad, ValueError, "by must be an integer of 64 bits")
                for bad in (1.0, True, None, "1", 2**63, -(2**63) - 1)
            },
            lambda s, x: s.increment("a", "n", x),
        ),
    },
    "touch": {
        **_rows("session_id", IDS, lambda s, x: s.touch(x)),
        **_rows("max_age", MAX_AGE, lambda s, x: s.touch("a", x)),
    },
    "delete": {
        **_rows("session_id", IDS, lambda s, x: s.delete(x)),
        **_rows("expect", EXPECT, lambda s, x: s.delete("a", expect=x)),
        **_rows("reason", REASON, lambda s, x: s.delete("a", reason=x)),
        **_rows("durable", DURABLE, lambda s, x: s.delete("a", durable=x)),
    },
    "ended": _rows("session_id", IDS, lambda s, x: s.ended(x)),
    "rotate": {
        **_rows("session_id", IDS, lambda s, x: s.rotate(x)),
        **_rows("values", VALUES, lambda s, x: s.rotate("a", x)),
        **_rows("durable", DURABLE, lambda s, x: s.rotate("a", durable=x)),
        **_rows("max_age", MAX_AGE, lambda s, x: s.rotate("a", {}, x)),
        **_rows("grace", _durations("grace", True, False), lambda s, x: s.rotate("a", grace=x)),
    },
    "ttl": _rows("session_id", IDS, lambda s, x: s.ttl(x)),
    "wait_ended": _rows("session_id", IDS, lambda s, x: s.wait_ended(x)),
    "sweeper": _rows("every", _durations("every"), lambda s, x: s.sweeper(x).__aenter__()),
    "ids_by": {
        **_rows("field", REFERENCE, lambda s, x: s.ids_by(x, 1)),
        **_rows("value", VALUE, lambda s, x: s.ids_by("user_id", x)),
    },
    "count_by": {
        **_rows("field", REFERENCE, lambda s, x: s.count_by(x, 1)),
        **_rows("value", VALUE, lambda s, x: s.count_by("user_id", x)),
        **_rows("field, not exact", REFERENCE, lambda s, x: s.count_by(x, 1, exact=False)),
        **_rows("value, not exact", VALUE, lambda s, x: s.count_by("user_id", x, exact=False)),
    },
    # `find_by` is no coroutine: it refuses arguments when it is called, not at the first session.
    "find_by": {
        **_rows("field", REFERENCE, lambda s, x: s.find_by(x, 1)),
        **_rows("value", VALUE, lambda s, x: s.find_by("user_id", x)),
        **_rows("fields", SOME_FIELDS, lambda s, x: s.find_by("user_id", 1, x)),
    },
    "delete_by": {
        **_rows("field", REFERENCE, lambda s, x: s.delete_by(x, 1)),
        **_rows("value", VALUE, lambda s, x: s.delete_by("user_id", x)),
        **_rows("keep", KEEP, lambda s, x: s.delete_by("user_id", 1, keep=x)),
        **_rows("reason", REASON, lambda s, x: s.delete_by("user_id", 1, reason=x)),
        **_rows("durable", DURABLE, lambda s, x: s.delete_by("user_id", 1, durable=x)),
        **_rows("block", _durations("block", True, False), lambda s, x: s.delete_by("user_id", 1, block=x)),
    },
    "block": {
        **_rows("field", REFERENCE, lambda s, x: s.block(x, 1, "1h")),
        **_rows("value", VALUE, lambda s, x: s.block("user_id", x, "1h")),
        **_rows("duration", _durations("(block|duration)", None, True), lambda s, x: s.block("user_id", 1, x)),
        **_rows("reason", REASON, lambda s, x: s.block("user_id", 1, "1h", reason=x)),
        **_rows("durable", DURABLE, lambda s, x: s.block("user_id", 1, "1h", durable=x)),
    },
    "unblock": {
        **_rows("field", REFERENCE, lambda s, x: s.unblock(x, 1)),
        **_rows("value", VALUE, lambda s, x: s.unblock("user_id", x)),
    },
    "blocked": {
        **_rows("field", REFERENCE, lambda s, x: s.blocked(x, 1)),
        **_rows("value", VALUE, lambda s, x: s.blocked("user_id", x)),
    },
}
ROWS = [(method, name) for method, rows in BAD.items() for name in rows]


def _bad_store(client: Redis, prefix: str) -> SessionStore:
    references = {
        "user_id": Reference(limit=100),
        "ip": Reference(),
        "tags": Reference(),
        "account": Reference(identity=True),
    }
    return SessionStore(client, references=references, prefix=prefix, timeout=0.001)


async def _refusal(store: SessionStore, method: str, name: str) -> Exception | None:
    """Return the error that a call with a bad argument raises; None if there was none."""
    call, argument, _, _ = BAD[method][name]
    try:
        result = call(store, argument)
        if inspect.isawaitable(result):
            await result
    except Exception as error:  # noqa: BLE001 - any error is examined
        return error
    return None


@pytest.mark.parametrize(("method", "name"), ROWS, ids=lambda text: text.replace(" ", "-"))
async def test_a_bad_argument_is_refused(method: str, name: str) -> None:
    """A bad argument raises an error before anything is sent; this store has no server."""
    _, _, kind, text = BAD[method][name]
    async with Redis(unix_socket_path="/nowhere/redis.sock") as client:
        error = await _refusal(_bad_store(client, "rss"), method, name)
    assert error is not None
    assert type(error) is kind, repr(error)
    assert re.search(text, str(error)), str(error)
    assert error.__cause__ is None


async def test_nothing_is_sent(url: str) -> None:
    """Calls with bad arguments send no script to the server, and change no data."""
    async with Redis.from_url(url, decode_responses=True) as client:
        await client.flushall()
        keyspace = Keyspace(client, "bad")
        store = SessionStore(client, references=["user_id"], prefix=keyspace.prefix)
        await store.set("a", {"user_id": 1, "x": 1})
        await store.aclose()
        before, scripts = await keyspace.dump(), (await client.info("commandstats"))["cmdstat_evalsha"]["calls"]
        store = _bad_store(client, keyspace.prefix)
        answered = [row for row in ROWS if await _refusal(store, *row) is None]
        await store.aclose()
        assert answered == []
        assert await keyspace.dump() == before
        assert (await client.info("commandstats"))["cmdstat_evalsha"]["calls"] == scripts


def test_every_argument_has_rows() -> None:
    """Each argument of each public method has rows, except for flags, which accept anything."""
    for method, function in vars(SessionStore).items():
        if method.startswith("_") or not (callable(function) or isinstance(function, classmethod)):
            continue
        arguments = set(inspect.signature(getattr(SessionStore, method)).parameters) - {"self"}
        told = {name.partition(":")[0].partition(",")[0] for name in BAD.get(method, ())}
        assert told == arguments - {"create", "exact", "keep_required"}, method


@pytest.mark.parametrize("values", [range(1000), range(1, 1001)])
async def test_a_mapping_need_be_no_dict(store: SessionStore, values: range) -> None:
    """A mapping need not be a dict, and several items may come from any iterable, even an iterator."""
    fields = {f"f{n}": n for n in values}
    await store.set("a", MappingProxyType(fields), expect=MappingProxyType({"f1": None}))  # type: ignore[arg-type]
    assert await store.get("a", (name for name in fields)) == {"id": "a", **fields}
    await store.unset("a", iter(fields))
    await store.set("a", {"user_id": 1})
    assert await store.delete_by("user_id", 1, keep=(name for name in "abc")) == 0
    assert await store.get("a") == {"id": "a", "user_id": 1}


async def _observe(_: Observation) -> None:
    """Observe nothing. No store takes this, because nobody would await it."""


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
    "observe: no function": ({"observe": "log"}, TypeError, "observe must be a function"),
    "observe: a class": ({"observe": Logging}, TypeError, "or an observer such as Logging()"),
    "observe: a coroutine function": ({"observe": _observe}, TypeError, "a function that is not async"),
    "two identities": (
        {"references": {"a": Reference(identity=True), "b": Reference(identity=True)}},
        ValueError,
        "at most one reference is the identity",
    ),
    "reference with a surrogate": ({"references": ["\ud800"]}, ValueError, "a field must be valid Unicode"),
    "references of None": ({"references": None}, TypeError, "references must be several str"),
    "few id_bytes": ({"id_bytes": 15}, ValueError, "id_bytes must be an integer from 16"),
    "id_bytes of a bool": ({"id_bytes": True}, ValueError, "id_bytes must be an integer from 16"),
}


@pytest.mark.parametrize("case", STORES)
def test_a_bad_option_is_refused(client: Redis, case: str) -> None:
    """A bad option raises an error when the store is made."""
    options, error, text = STORES[case]
    with pytest.raises(error, match=text):
        SessionStore(client, **options)


def test_an_id_for_an_identity_that_a_store_lacks() -> None:
    """An id for an identity is refused in a store that has no identity."""
    with pytest.raises(ValueError, match="no reference of this store is the identity"):
        SessionStore(Redis(), references=["user_id"]).create_session_id(7)


def test_a_client_of_another_kind_is_refused() -> None:
    """A blocking client is refused."""
    with redis.Redis() as blocking, pytest.raises(TypeError, match="must be a redis.asyncio.Redis"):
        SessionStore(blocking)  # pyright: ignore[reportArgumentType]


def test_a_client_of_another_encoding_is_refused() -> None:
    """A client with an encoding other than UTF-8 is refused, since its keys would differ from the codec's text."""
    with pytest.raises(ValueError, match="must have the encoding utf-8"):
        SessionStore(Redis(encoding="latin-1"))
    assert SessionStore(Redis(encoding="UTF8"))


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"limit": True}, {"limit": 1001}, {"limit": "5"}, {"on_limit": "ignore"}]
)
def test_a_bad_reference_is_refused(options: dict[str, Any]) -> None:
    """A reference with a bad `limit` or `on_limit` is refused."""
    with pytest.raises(ValueError, match="limit"):
        Reference(**options)


@pytest.mark.parametrize("value", [None, 1.5, True, ["x"], {"x": 1}, b"x"])
async def test_text_codec_stores_str_and_int_only(client: Redis, keyspace: Keyspace, value: object) -> None:
    """TextCodec refuses values other than str and int, which it could not bring back."""
    store = SessionStore(client, references=["user_id"], prefix=keyspace.prefix, codec=TextCodec())
    for field in ("x", "user_id"):
        with pytest.raises(TypeError, match=f"TextCodec cannot store this .* in the field '{field}'"):
            await store.set("a", {field: value})
    assert await keyspace.dump() == {}


async def test_a_field_may_be_an_enumeration(client: Redis, keyspace: Keyspace) -> None:
    """A member of a str enumeration stands for the field that is its value, in any argument."""

    class Field(str, enum.Enum):  # noqa: UP042 - str() of this one is not its value
        USER = "user_id"
        NAME = "name"

    store = SessionStore(client, references=[Field.USER], prefix=keyspace.prefix)
    await store.set("a", {Field.USER: 1, Field.NAME: "x"}, expect={Field.NAME: None})
    assert await keyspace.dump() == {"{a}": {"id": "a", "user_id": "1", "name": "x"}, "user_id:{1}": {"a"}}
    assert await store.get("a", [Field.NAME]) == {"id": "a", "name": "x"}
    assert await store.ids_by("user_id", 1) == await store.ids_by(Field.USER, 1) == ["a"]
    assert await store.block(Field.USER, 1, "1h") == 1
    assert await store.blocked("user_id", 1)


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
    """A value appears neither in an error nor in its cause nor in the repr of the store."""
    with pytest.raises(TypeError) as raised:
        await store.set("SECRET", {"x": {"SECRET": {1}}})
    error: BaseException | None = raised.value
    while error is not None:
        assert "SECRET" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert "SECRET" not in repr(store)
