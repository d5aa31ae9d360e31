"""Web sessions in Redis for asyncio. An operation on a session is one script; one call ends all sessions of a user.

    store = SessionStore.from_url("redis://localhost", references={"user_id": Reference(identity=True)})
    await store.delete_by("user_id", 7)  # ends every session of the user, on every server

`SessionStore` keeps sessions. `Sessions` adds the cookie, and gives each request of a web application its `Session`.
The adapters for frameworks are `rss.aiohttp`, `rss.asgi`, `rss.fastapi`, `rss.quart` and `rss.aiohttp_session`.
`rss.oidc` ends sessions when an OpenID provider reports a logout. `rss.observe` has observers for metrics, traces and
logs. The folder `guides` of this package has the guides.
"""

# `rss.errors` looks for this mark, so it stands before the imports.
__distribution__ = "redis-session-sets"

from rss.codec import Codec, JSONCodec, TextCodec
from rss.cookies import CookiePolicy
from rss.durations import Duration
from rss.errors import (
    Blocked,
    Conflict,
    IdentityChanged,
    IncompleteReference,
    LimitExceeded,
    PartlyDone,
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
    "IncompleteReference",
    "JSONCodec",
    "LimitExceeded",
    "PartlyDone",
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
