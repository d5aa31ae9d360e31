"""Web sessions in Redis for asyncio: every operation one script, and all sessions of a user one call away."""

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
