"""Web sessions in Redis for asyncio: every operation is one script, and all sessions of a user are one call away.

    store = SessionStore.from_url("redis://localhost", references={"user_id": Reference(identity=True)})
    await store.delete_by("user_id", 7)  # ends every session of the user, on every server

`SessionStore` keeps sessions. `Sessions` adds the cookie, and gives each request of a web application its `Session`.
`rss.aiohttp`, `rss.asgi`, `rss.fastapi`, `rss.quart` and `rss.aiohttp_session` serve frameworks, and `rss.oidc` ends
sessions when an OpenID provider says so. The guides are in the folder `guides` of this package.
"""

from rss.codec import Codec, JSONCodec, TextCodec
from rss.cookies import CookiePolicy
from rss.durations import Duration
from rss.errors import (
    Blocked,
    Conflict,
    IdentityChanged,
    LimitExceeded,
    SessionEnded,
    SessionError,
    SessionNotFound,
    StoreUnavailable,
)
from rss.references import Reference
from rss.session import Session, Sessions
from rss.store import SessionStore

__all__ = [
    "Blocked",
    "Codec",
    "Conflict",
    "CookiePolicy",
    "Duration",
    "IdentityChanged",
    "JSONCodec",
    "LimitExceeded",
    "Reference",
    "Session",
    "SessionEnded",
    "SessionError",
    "SessionNotFound",
    "SessionStore",
    "Sessions",
    "StoreUnavailable",
    "TextCodec",
]
