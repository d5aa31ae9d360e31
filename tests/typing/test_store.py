"""Never run, only type-checked: an error that is not raised is an unused ignore."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, TypedDict, assert_type

from redis.asyncio import Redis

from rss import Codec, JSONCodec, Reference, SessionStore, TextCodec


class Login(TypedDict, total=False):
    """A user's session."""

    user_id: int
    cart: list[str]


async def with_a_schema(client: Redis) -> None:
    """The fields and their types are checked; every read may lack any of them."""
    store = SessionStore[Login](client, references={"user_id": Reference(limit=5)}, max_age=timedelta(days=1))
    assert_type(await store.create({"user_id": 1}), str)
    assert_type(await store.get("a"), Login)
    assert_type(await store.set("a", {"cart": []}, expect={"user_id": 1}), Login)
    assert_type(await store.pop("a", ["cart"]), Login)
    assert_type(await store.rotate("a", {"user_id": 1}), str)
    assert_type(store.find_by("user_id", 1), AsyncIterator[Login])
    assert_type(await store.ttl("a"), timedelta | None)
    assert_type((await store.get("a")).get("cart"), list[str] | None)

    await store.create({"user_id": "1"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await store.set("a", {"user": 1})  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportArgumentType]
    await store.set("a", {}, expect={"cart": 1})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    (await store.get("a"))["user"]  # type: ignore[typeddict-item]  # pyright: ignore[reportGeneralTypeIssues]


async def without(client: Redis) -> None:
    """Any field holds anything."""
    store = SessionStore(client, references=["user_id"])
    assert_type(store, SessionStore[dict[str, Any]])
    assert_type(await store.get("a"), dict[str, Any])
    await store.set("a", {"x": object()})
    async with SessionStore.from_url("redis://", references=["user_id"]) as owner:
        assert_type(owner, SessionStore[dict[str, Any]])
    SessionStore.from_url("redis://", reference=["user_id"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def codecs() -> list[Codec]:
    """What ships is what the protocol asks for."""
    return [JSONCodec(), TextCodec()]
