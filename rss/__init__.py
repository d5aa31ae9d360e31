"""Web sessions in Redis for asyncio: every operation one script, and all sessions of a user one call away."""

from rss.codec import Codec, JSONCodec, TextCodec
from rss.durations import Duration
from rss.errors import Conflict, LimitExceeded, SessionEnded, SessionError, SessionNotFound, StoreUnavailable
from rss.references import Reference
from rss.store import SessionStore

__all__ = [
    "Codec",
    "Conflict",
    "Duration",
    "JSONCodec",
    "LimitExceeded",
    "Reference",
    "SessionEnded",
    "SessionError",
    "SessionNotFound",
    "SessionStore",
    "StoreUnavailable",
    "TextCodec",
]
