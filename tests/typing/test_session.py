"""Only type-checked, never run: a type error that is missing is reported as an unused ignore."""

from typing import Any, TypedDict, assert_type

from rss import CookiePolicy, Session, Sessions, SessionStore
from rss.asgi import get_session


class Login(TypedDict, total=False):
    """A user's session."""

    user_id: int
    cart: list[str]


async def with_a_schema(store: SessionStore[Login]) -> None:
    """The sessions have the schema of their store."""
    sessions = Sessions(store, cookie=CookiePolicy(name="__Host-sid", same_site="strict"), secret_keys=["x" * 16])
    assert_type(sessions, Sessions[Login])
    assert_type(sessions.store, SessionStore[Login])
    session = sessions.create_session("sid=x")
    assert_type(session, Session[Login])
    assert_type(session.id, str | None)
    assert_type(session.ended, str | None)
    assert_type(await session.get(), Login)
    assert_type(await session.set({"cart": []}), Login)
    assert_type(await session.rotate({"user_id": 1}), None)
    assert_type(await session.delete(reason="bye"), bool)
    assert_type(await session.create_csrf_token(), str)

    await session.set({"user_id": "1"})  # type: ignore[typeddict-item]  # pyright: ignore[reportArgumentType]
    await session.rotate({"user": 1})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    CookiePolicy(same_site="Lax")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def without(store: SessionStore, connection: Any) -> None:
    """Without a schema, any field may hold any value."""
    assert_type(Sessions(store), Sessions[dict[str, Any]])
    assert_type(await Sessions(store).create_session().get(), dict[str, Any])
    assert_type(await get_session(connection), Session[Any])
