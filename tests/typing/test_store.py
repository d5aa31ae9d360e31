"""Only type-checked, never run: a type error that is missing is reported as an unused ignore."""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any, Protocol, TypedDict, assert_type

from redis.asyncio import Redis

from rss import (
    Blocked,
    Codec,
    IdentityChanged,
    JSONCodec,
    LimitExceeded,
    Reference,
    SessionError,
    SessionStore,
    TextCodec,
)
from rss.encryption import EncryptingCodec
from rss.events import Event
from rss.observe import Observation
from rss.observe.logging import Logging
from rss.observe.opentelemetry import OpenTelemetry
from rss.observe.prometheus import Prometheus


class Login(TypedDict, total=False):
    """A user's session."""

    user_id: int
    cart: list[str]


async def with_a_schema(client: Redis) -> None:
    """Fields and their types are checked, and a read may lack any field."""
    store = SessionStore[Login](client, references={"user_id": Reference(limit=5)}, max_age=timedelta(days=1))
    assert_type(await store.create({"user_id": 1}), str)
    assert_type(await store.get("a"), Login)
    assert_type(await store.set("a", {"cart": []}, expect={"user_id": 1}), Login)
    assert_type(await store.pop("a", ["cart"]), Login)
    assert_type(await store.rotate("a", {"user_id": 1}), str)
    assert_type(store.find_by("user_id", 1), AsyncIterator[Login])
    assert_type(await store.ttl("a"), timedelta | None)
    assert_type(await store.wait_ended("a"), str)
    async with store.events() as events:
        assert_type(await anext(events), Event)
    async with store.sweeper(every="1h") as nothing:
        assert_type(nothing, None)
    assert_type((await store.get("a")).get("cart"), list[str] | None)
    assert_type(await store.delete("a", expect={"user_id": 1}, reason="bye"), bool)
    assert_type(await store.delete_by("user_id", 1, keep=["a"], reason="password", block="30s"), int)
    assert_type(await store.block("user_id", "1", timedelta(hours=1), reason="stolen"), int)
    assert_type(await store.unblock("user_id", 1), bool)
    assert_type(await store.blocked("user_id", 1), timedelta | None)
    assert_type(await store.count_by("user_id", 1, exact=False), int)
    assert_type(await store.increment("a", "visits", by=2), int)
    assert_type(await store.ids_by("user_id", 1), list[str])
    async for session in store.find_by("user_id", 1, ["cart"]):
        assert_type(session, Login)

    await store.create({"user_id": "1"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await store.set("a", {"user": 1})  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportArgumentType]
    await store.set("a", {}, expect={"cart": 1})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await store.delete("a", expect={"user": 1})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await store.delete("a", {"user_id": 1})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await store.delete_by("user_id", 1, block=None)
    await store.block("user_id", 1, None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await store.block("user_id", 1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await store.block("user_id", 1.5, "1h")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await store.unblock("user_id", None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await store.blocked("user_id", [1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await store.count_by("user_id", 1, False)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    (await store.get("a"))["user"]  # type: ignore[typeddict-item]  # pyright: ignore[reportGeneralTypeIssues]


async def without(client: Redis) -> None:
    """Without a schema, any field may hold any value."""
    store = SessionStore(client, references=["user_id"])
    assert_type(store, SessionStore[dict[str, Any]])
    assert_type(await store.get("a"), dict[str, Any])
    assert_type(await store.ended("a"), str | None)
    assert_type(await store.touch("a", "1h"), bool)
    assert_type(await store.unset("a", ["x"]), None)
    await store.set("a", {"x": object()})
    async with SessionStore.from_url("redis://", references=["user_id"]) as owner:
        assert_type(owner, SessionStore[dict[str, Any]])
    SessionStore.from_url("redis://", reference=["user_id"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def references() -> dict[str, Reference]:
    """The options of a reference are checked."""
    Reference(identity=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Reference(on_limit="ignore")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    return {"user_id": Reference(identity=True, limit=5), "ip": Reference(strict=True, on_limit="refuse")}


async def errors(store: SessionStore) -> None:
    """The attributes of errors have types."""
    try:
        await store.create({"user_id": 1})
    except Blocked as error:
        assert_type(error.until, datetime)
        assert_type(error.reason, str)
        assert_type(error.field, str)
        refused: LimitExceeded = error
        assert_type(refused.field, str)
    except IdentityChanged as error:
        changed: SessionError = error
        print(changed.field)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def observers(client: Redis) -> None:
    """An observer takes an observation, and may return anything. The adapters are observers."""

    def both(observation: Observation) -> int:
        assert_type(observation.error, type[BaseException] | None)
        prometheus(observation)
        return 1

    def wrong(operation: str) -> None:
        print(operation)

    prometheus = Prometheus()
    for observe in (both, prometheus, Logging("1s"), OpenTelemetry(), None):
        SessionStore(client, observe=observe)
    SessionStore(client, observe=wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class Wrong(Protocol):
    """Not a codec, since `encode` may return None."""

    def encode(self, field: str, value: Any, /) -> str | None: ...

    def decode(self, field: str, data: bytes, /) -> Any: ...


def codecs(client: Redis, wrong: Wrong) -> list[Codec]:
    """The codecs of the package satisfy the protocol."""
    SessionStore(client, codec=wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    EncryptingCodec("key", plaintext="all")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    EncryptingCodec(["key"], wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    return [JSONCodec(), TextCodec(), EncryptingCodec([EncryptingCodec.generate_key(), b"key"])]
